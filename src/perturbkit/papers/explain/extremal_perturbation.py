"""Smooth masks of a fixed area: does their peak lie on the digit that is asked for, and do they keep its score?

Two canvases with a digit each, of different classes, side by side on 16x32 pixels with clutter; a network that says which digits are
there, and has learned to say so of partly blurred images too (one that has not answers high logits to fragments); 50 images whose two
digits it names, the digit of a random side asked for. As in the authors' pointing game the masks of areas 0.025 to 0.2 are summed
and blurred by 0.09 of the height: the peak must lie on the digit's half in 90 % of images. Of each map the best 10 % of pixels are
kept, the others blurred: the logit must be higher than with those of RISE, and of gradient times input, in 70 % of images. The logit
that the masks keep must grow with the area on average. A random map, and a network with shuffled weights, are the controls.

Grid and window are the paper's, in proportion to the height; a window twice as wide is reported beside it. The first weight of the area
term is that of 300 (the paper's, for logits of ImageNet), 100, 30 and 10 which keeps the highest logits in twenty training images;
it grows to the same end.
"""

from __future__ import annotations

import copy

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Masks, Oracle
from perturbkit.core.random import randint, randperm, uniform
from perturbkit.explain import ExtremalResult, extremal_perturbation
from perturbkit.explain.removal._extremal import between_levels, blur_pyramid
from perturbkit.explain.removal._parts import gaussian_blur
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.explain._canvas import draw_canvas, normalised_network, one_cycle

_N, _AREAS = 50, (0.025, 0.05, 0.1, 0.2)
# The paper's strongest blur for 224 pixels, in proportion to the height.
_BLUR = 20.0 * 16 / 224
_SMOOTH = 0.09 * 16
_MASKS = Masks(0.5, cells=(4, 8), mode="bilinear", shift=True)


@paper(
    number=7,
    title="Understanding Deep Networks via Extremal Perturbations and Smooth Masks",
    authors="Fong, Patrick, Vedaldi",
    year=2019,
    arxiv="1910.08485",
    claim="Masks of a fixed area, found by optimisation, point at the object as well as other methods do, without weights to tune.",
    method="perturbkit.explain.extremal_perturbation",
    needs="gradient",
    input="image",
    cost="max_iter gradients an area",
    seconds=110,
)
def reproduce(run: Run) -> Evidence:
    """Pointing, kept scores and growth with the area."""
    from perturbkit.data import load_digits8

    train, test = load_digits8("train"), load_digits8("test")
    model = _network(train.x, train.y, run)
    x, _, left, right = _pairs(test.x, test.y, 400, run.generator("test"))
    named = _named(model, x, left, right)
    accuracy = float(named.float().mean())
    x, left, right = (v[named][:_N] for v in (x, left, right))
    second = randint(0, 2, (_N,), generator=run.generator("side"))
    target = torch.where(second > 0, right, left)
    oracle = Oracle(model)
    weights = _weights(oracle, train.x, train.y, run)
    weight = max(weights, key=lambda w: weights[w])
    found = _extremal(oracle, x, target, _AREAS, weight)
    shuffled = Oracle(_shuffled(model, run.generator("shuffled")))
    wide = _extremal(oracle, x, target, (0.1,), weight, step=2, sigma=3.0)
    maps = {
        "extremal": found.attribution(_SMOOTH).values,
        "RISE": _rise(oracle, x, target, run),
        "gradient x input": oracle.gradient(x, target) * x,
        "random": uniform(x.shape, generator=run.generator("random"), like=x),
        "shuffled weights": _extremal(shuffled, x, target, (0.1,), weight).attribution(_SMOOTH).values,
        "area 0.1 alone": gaussian_blur(found.masks[2], _SMOOTH),
        "area 0.1 alone, window twice as wide": wide.attribution(_SMOOTH).values,
    }
    pointing = {name: _pointing(values, second) for name, values in maps.items()}
    pyramid = blur_pyramid(x, 8, _BLUR)
    best = {
        **{name: maps[name] for name in ("RISE", "gradient x input", "random")},
        "extremal": found.masks[2],
        "wide window": wide.masks[0],
    }
    kept = {name: _kept(oracle, pyramid, values, target) for name, values in best.items()}
    wins = {name: (kept["extremal"] > kept[name]).float() for name in ("RISE", "gradient x input")}
    comparisons = [
        Comparison(
            "share of images whose two digits the network names, which must have learned", accuracy, 0.8, "higher", n=400
        ),
        Comparison("share of peaks on the digit's half", pointing["extremal"], 0.9, "higher", n=_N),
        *(
            Comparison(f"share of images with a higher kept logit than {name}", float(w.mean()), 0.7, "higher", n=_N)
            for name, w in wins.items()
        ),
        *(
            Comparison.over_seeds(
                f"kept logit, area {_AREAS[i + 1]} against {_AREAS[i]}", found.scores[i + 1].tolist(),
                found.scores[i].tolist(), "higher",
            )
            for i in range(3)
        ),
        *(
            Comparison(
                f"share of peaks on the digit's half, {name}", pointing[name], 0.9, "higher", n=_N, control=True,
                note="must fail: chance is one half",
            )
            for name in ("random", "shuffled weights")
        ),
    ]  # fmt: skip
    notes = f"First weight of the area term: {weight:g} (logits kept in training images: "
    notes += (
        ", ".join(f"{w:g} {v:.2f}" for w, v in weights.items())
        + "). Pointing: "
        + ", ".join(f"{name} {value:.2f}" for name, value in pointing.items())
    )
    notes += f". Mean of the masks at areas {_AREAS}: "
    notes += ", ".join(f"{float(v):.3f}" for v in found.masks.flatten(1).mean(1)) + "; kept logits "
    notes += ", ".join(f"{float(v):.2f}" for v in found.scores.mean(1))
    ends = [float(oracle.value(z, target).mean()) for z in (x, pyramid[:, -1])]
    notes += f"; whole image {ends[0]:.2f}, blurred {ends[1]:.2f}. Logit kept by a tenth of the pixels: "
    notes += ", ".join(f"{name} {float(values.mean()):.2f}" for name, values in kept.items()) + "."
    return Evidence(comparisons, _figure(x, maps, found), notes)


def _extremal(
    oracle: Oracle,
    x: Tensor,
    target: Tensor,
    areas: tuple[float, ...],
    weight: float,
    step: int = 1,
    sigma: float = 1.5,
) -> ExtremalResult:
    # A quarter of the paper's steps, each four times as long.
    growth = (300 * 1.0035**800 / weight) ** (1 / 200)
    return extremal_perturbation(
        oracle, x, target, areas=areas, step=step, sigma=sigma, max_blur=_BLUR, max_iter=200, lr=0.04, weight=weight,
        growth=growth,
    )  # fmt: skip


def _weights(oracle: Oracle, digits: Tensor, labels: Tensor, run: Run) -> dict[float, float]:
    """Return the mean logit that a tenth of the pixels keeps in training images, by the first weight."""
    x, _, left, _ = _pairs(digits, labels, 20, run.generator("weights"))
    pyramid = blur_pyramid(x, 8, _BLUR)
    found = {w: _extremal(oracle, x, left, (0.1,), w).masks[0] for w in (300.0, 100.0, 30.0, 10.0)}
    return {w: float(_kept(oracle, pyramid, mask, left).mean()) for w, mask in found.items()}


def _pairs(
    digits: Tensor, labels: Tensor, n: int, g: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images (n, 1, 16, 32) with a digit at a random place of each half, of different classes, and their ink."""
    left, right = (draw_canvas(digits, labels, 2 * n, g) for _ in range(2))
    differ = (left.y != right.y).nonzero()[:n, 0]
    x = torch.cat((left.x[differ], right.x[differ]), 3)
    return x, torch.cat((left.ink[differ], right.ink[differ]), 2), left.y[differ], right.y[differ]


def _network(digits: Tensor, labels: Tensor, run: Run) -> nn.Module:
    """Train a network to say which digits are there, one logit each; half of the images have blurred parts."""
    net, g = normalised_network(run.seeds(1)[0], nn.AdaptiveMaxPool2d(1)), run.generator("train")

    def loss() -> Tensor:
        x, ink, left, right = _pairs(digits, labels, 64, g)
        mask = _MASKS.sample(x, generator=g, n=len(x))
        mask[::2] = 1
        # A digit is there if six tenths of its ink are.
        halves, whole = ((part * ink).unflatten(2, (2, 16)).sum((1, 3)) for part in (mask[:, 0], 1))
        present = torch.zeros(len(x), 10).scatter(
            1, torch.stack((left, right), 1), (halves > 0.6 * whole).float()
        )
        shown = between_levels(blur_pyramid(x, 8, _BLUR), mask)
        return functional.binary_cross_entropy_with_logits(net(shown), present)

    return one_cycle(net, loss, 800, 4e-3)


def _named(model: nn.Module, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return whether the two highest logits are those of the two digits."""
    top = model(x).topk(2, 1).indices.sort(1).values
    return (top == torch.stack((left, right), 1).sort(1).values).all(1)


def _shuffled(model: nn.Module, g: torch.Generator) -> nn.Module:
    """Return a copy whose weights are shuffled within each layer."""
    shuffled = copy.deepcopy(model)
    for p in shuffled.parameters():
        p.data = p.data.flatten()[randperm(p.numel(), generator=g)].reshape(p.shape)
    return shuffled


def _rise(oracle: Oracle, x: Tensor, target: Tensor, run: Run) -> Tensor:
    """Return the mean logit over random masks that keep a pixel, from 500 masks."""
    masks = _MASKS.sample(x, generator=run.generator("rise"), n=500)
    values = torch.stack([oracle.value(x * mask, target) for mask in masks])  # [masks, images]
    return torch.einsum("mn,mchw->nchw", values, masks) / masks.sum(0)


def _kept(oracle: Oracle, pyramid: Tensor, values: Tensor, target: Tensor) -> Tensor:
    """Return the logit with the best tenth of a map's pixels kept and the others blurred."""
    flat = values.flatten(1)
    top = flat.topk(round(0.1 * flat.shape[1]), 1).indices
    mask = torch.zeros_like(flat).scatter(1, top, 1.0).reshape(values.shape)
    return oracle.value(between_levels(pyramid, mask), target)


def _pointing(values: Tensor, second: Tensor) -> float:
    column = values.flatten(1).argmax(1) % 32
    return float(((column >= 16) == (second > 0)).float().mean())


def _figure(x: Tensor, maps: dict[str, Tensor], found: ExtremalResult) -> Figure:
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots(2, 4)
    shown = {
        "image": x,
        **{f"area {a}": found.masks[i] for i, a in enumerate(_AREAS[1:3], 1)},
        "RISE": maps["RISE"],
    }
    for row in range(2):
        for ax, (name, image) in zip(axes[row], shown.items(), strict=True):
            ax.imshow(image[row, 0], cmap="gray" if name == "image" else "viridis")
            ax.set_title(name if row == 0 else "", fontsize=8)
            ax.set_axis_off()
    return figure
