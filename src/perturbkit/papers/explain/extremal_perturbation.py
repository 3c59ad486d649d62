"""Smooth masks of a fixed area find the digit that is asked for, and keep its score higher than other maps' best pixels do.

Two different digits side by side on 16x32 pixels, a network that scores both, 50 images, the digit on a random side asked for:
the peak of the masks summed over the areas 0.1 and 0.2 must lie on its half in 90 % of images; the logit that the mask of
area 0.1 keeps must be above that of the best 10 % of pixels by RISE, and by gradient times input, in 70 %; and the kept logit must
grow with the area on average.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core import Masks, Oracle
from perturbkit.core.random import as_generator, randint, uniform
from perturbkit.explain import extremal_perturbation
from perturbkit.explain.removal._parts import between_levels, blur_pyramid
from perturbkit.papers import Comparison, Evidence, Run, paper

_N, _AREAS, _BLUR = 50, (0.1, 0.2), 20.0 * 16 / 224


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
    seconds=35,
)
def reproduce(run: Run) -> Evidence:
    """Pointing, kept scores and growth with the area."""
    from perturbkit.data import load_digits8

    train, test = load_digits8("train"), load_digits8("test")
    oracle = Oracle(_network(train.x, train.y, run))
    x, left, right = _pairs(test.x, test.y, _N, run.generator("test"))
    second = randint(0, 2, (_N,), generator=run.generator("side"))
    target = torch.where(second > 0, right, left)
    found = extremal_perturbation(
        oracle, x, target, areas=_AREAS, step=3, sigma=2.0, max_blur=_BLUR, max_iter=200, lr=0.04
    )
    maps = {
        "extremal": found.saliency,
        "RISE": _rise(oracle, x, target, run),
        "gradient x input": oracle.gradient(x, target) * x,
        "random": uniform(x.shape, generator=run.generator("random"), like=x),
    }
    pointing = {name: _pointing(values, second) for name, values in maps.items()}
    pyramid = blur_pyramid(x, 8, _BLUR)
    kept = {}
    for name in ("RISE", "gradient x input"):
        top = maps[name].flatten(1).topk(round(_AREAS[0] * 512), 1).indices
        mask = torch.zeros(_N, 512).scatter(1, top, 1.0).reshape(x.shape)
        kept[name] = oracle.value(between_levels(pyramid, mask), target)
    wins = {name: (found.scores[0] > values).float() for name, values in kept.items()}
    comparisons = [
        Comparison("share of peaks on the digit's half", pointing["extremal"], 0.9, "higher", n=_N),
        Comparison(
            "share of peaks on the digit's half, random map", pointing["random"], 0.9, "higher", n=_N, control=True,
            note="must fail: chance is one half",
        ),
        *(
            Comparison(f"share of images with a higher kept logit than {name}", float(w.mean()), 0.7, "higher", n=_N)
            for name, w in wins.items()
        ),
        Comparison.over_seeds(
            "kept logit, area 0.2 against 0.1", found.scores[1].tolist(), found.scores[0].tolist(), "higher"
        ),
    ]  # fmt: skip
    area = found.masks.flatten(2).mean(2).mean(1)
    notes = "Pointing: " + ", ".join(f"{name} {value:.2f}" for name, value in pointing.items())
    notes += f". Mean of the masks at areas {_AREAS}: {area[0]:.3f}, {area[1]:.3f}."
    ends = [float(oracle.value(z, target).mean()) for z in (x, pyramid[:, -1])]
    notes += f" Mean logit: whole image {ends[0]:.2f}, blurred {ends[1]:.2f}, kept by the masks of area 0.1 "
    notes += f"{float(found.scores[0].mean()):.2f}, by as many pixels of "
    notes += ", ".join(f"{name} {float(values.mean()):.2f}" for name, values in kept.items()) + "."
    return Evidence(comparisons, _figure(x, maps), notes)


def _pairs(digits: Tensor, labels: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return images (n, 1, 16, 32) with a digit at a random place of each half, of different classes."""
    first = randint(0, len(digits), (n,), generator=g)
    other = torch.stack([_other(labels, int(labels[i]), g) for i in first])
    x, small = torch.zeros(n, 1, 16, 32), torch.arange(8)
    for side, chosen in ((0, first), (16, other)):
        place = randint(0, 9, (n, 2), generator=g)
        rows = place[:, 0, None, None] + small[None, :, None]
        columns = side + place[:, 1, None, None] + small[None, None, :]
        x[torch.arange(n)[:, None, None], 0, rows, columns] = digits[chosen, 0]
    return x, labels[first], labels[other]


def _other(labels: Tensor, label: int, g: torch.Generator) -> Tensor:
    choices = (labels != label).nonzero()[:, 0]
    return choices[randint(0, len(choices), (1,), generator=g)[0]]


def _network(digits: Tensor, labels: Tensor, run: Run) -> nn.Module:
    """Train a network to say which digits are there, one logit each."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seeds(1)[0])
        net = nn.Sequential(
            nn.Conv2d(1, 24, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(),
            nn.Linear(64, 10),
        )  # fmt: skip
    g, optimiser = as_generator(run.generator("train")), torch.optim.AdamW(net.parameters(), 2e-3)
    for _ in range(400):
        x, left, right = _pairs(digits, labels, 64, g)
        present = nn.functional.one_hot(left, 10) + nn.functional.one_hot(right, 10)
        optimiser.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(net(x), present.float()).backward()
        optimiser.step()
    return net.eval().requires_grad_(False)


def _rise(oracle: Oracle, x: Tensor, target: Tensor, run: Run) -> Tensor:
    """Return the mean logit over random masks that keep a pixel, from 500 masks."""
    masks = Masks(0.5, cells=(4, 8), mode="bilinear", shift=True).sample(
        x, generator=run.generator("rise"), n=500
    )
    values = torch.stack([oracle.value(x * mask, target) for mask in masks])  # [masks, images]
    return torch.einsum("mn,mchw->nchw", values, masks) / masks.sum(0)


def _pointing(values: Tensor, second: Tensor) -> float:
    column = values.flatten(1).argmax(1) % 32
    return float(((column >= 16) == (second > 0)).float().mean())


def _figure(x: Tensor, maps: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(7, 2.4), layout="constrained")
    axes = figure.subplots(2, 4)
    for row in range(2):
        for ax, (name, image) in zip(axes[row], {"image": x, **maps}.items(), strict=False):
            ax.imshow(image[row, 0], cmap="gray" if name == "image" else "viridis")
            ax.set_title(name if row == 0 else "", fontsize=8)
            ax.set_axis_off()
    return figure
