"""Layer masking disturbs predictions less than a black or grey fill, and tells less of the mask's shape; LIME gains nothing here.

Digits of 16x16 pixels on uneven grounds (on a black ground a black fill would remove nothing but the digit), a network that ends in
a global pool, and EfficientNet-lite0 on eight photographs. With a quarter and half of the image removed in random squares (4 pixels
a side of the canvas, 16 of the photographs), the share of unchanged predictions must be at least that of the better of black and
grey, and 0.05 above the worse. Masked by the silhouette of its own digit, or of another one, a linear probe of the outputs must tell
the silhouette's class less often than under black, by 0.025, two standard errors. LIME's maps must have a smaller deletion area
than those of LIME with black; what deletes is the mean colour, which is neither's. Another image under the mask, and a
random map, are the controls.
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Oracle
from perturbkit.core.random import uniform
from perturbkit.explain import (
    BiasReport,
    LayerMasked,
    deletion_curve,
    layer_masking,
    lime_stratified,
    missingness_bias,
)
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.explain._canvas import Canvas, draw_canvas, normalised_network, one_cycle

_BLACK, _GREY = 0.0, 0.5
_IMAGENET = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
_SHARES = (0.25, 0.5)


@paper(
    number=4,
    title="Towards Improved Input Masking for Convolutional Neural Networks",
    authors="Balasubramanian, Feizi",
    year=2022,
    arxiv="2211.14646",
    claim="Masking activations in every layer leaves predictions much less to the mask's shape and colour than black or grey "
    "pixels do, and improves LIME.",
    method="perturbkit.explain.layer_masking",
    needs="forward",
    input="image",
    cost="one masked forward pass a mask, 1.5 to 3 times a plain one",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Unchanged predictions, shape leakage and LIME's deletion area."""
    from perturbkit.data import image_model, load_digits8, load_photographs

    train, test = load_digits8("train"), load_digits8("test")
    model = _network(train.x, train.y, run)
    canvas = _canvas(test.x, test.y, 1500, run.generator("test"))
    accuracy = float((model(canvas.x).argmax(1) == canvas.y).float().mean())
    few = canvas.x[:200]
    photos, network = load_photographs().x, image_model().module
    digits = {share: _reports(model, few, share, 4, _GREY, run) for share in _SHARES}
    pictures = {share: _reports(network, photos, share, 16, _IMAGENET, run) for share in _SHARES}
    leaks = {name: _leakage(model, canvas, name) for name in ("own", "another")}
    areas = _deletion(model, canvas, run)
    comparisons = [
        Comparison(
            "accuracy of the digits network, which must have learned", accuracy, 0.85, "higher", n=len(canvas.x)
        ),
        *(c for share in _SHARES for c in _unchanged("digits", share, digits[share])),
        *(c for share in _SHARES for c in _unchanged("photographs", share, pictures[share])),
        *(
            Comparison(
                f"accuracy of a probe for {name} digit's silhouette, against black", found["layer"], found["black"], "lower",
                margin=0.025, n=len(canvas.x),
            )
            for name, found in leaks.items()
        ),
        Comparison.over_seeds(
            "deletion area of LIME, against LIME with black", areas["layer"].tolist(), areas["black"].tolist(), "lower"
        ),
        Comparison.over_seeds(
            "deletion area of a random map, against LIME with black", areas["random"].tolist(), areas["black"].tolist(),
            "lower", control=True, note="must fail",
        ),
        Comparison(
            "predictions as unchanged by another image, digits, 25% removed, as by the worse fill", _other_images(model, few, run),
            min(float(digits[0.25][key].unchanged.mean()) for key in ("black", "grey")), "higher", margin=0.05, n=len(few),
            control=True, note="must fail: the masked network is shown the kept squares of the next image",
        ),
    ]  # fmt: skip
    notes = "Share of unchanged predictions (layer/black/grey): " + "; ".join(
        f"{name} {share:.0%} removed " + "/".join(f"{float(r.unchanged.mean()):.3f}" for r in found[share].values())
        for name, found in (("digits", digits), ("photographs", pictures))
        for share in _SHARES
    )  # fmt: skip
    notes += ". Probe of the silhouette: " + "; ".join(
        f"{name} " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()) for name, found in leaks.items()
    )
    notes += f" (chance 0.1). Entropy of the predicted digits, half removed: {_entropies(digits[0.5])}."
    notes += " Deletion areas: " + ", ".join(f"{k} {float(v.mean()):.3f}" for k, v in areas.items()) + "."
    notes += (
        " LIME's areas lie within the noise of each other here: sixteen parts are told apart under any fill."
    )
    return Evidence(comparisons, _figure(digits, pictures, leaks), notes)


def _canvas(digits: Tensor, labels: Tensor, n: int, g: torch.Generator) -> Canvas:
    """Draw digits with clutter on smooth grounds between 0.1 and 0.7."""
    made = draw_canvas(digits, labels, n, g)
    coarse = uniform((n, 1, 4, 4), 0.1, 0.7, generator=g)
    ground = functional.interpolate(coarse, (16, 16), mode="bilinear", align_corners=False)
    ink = (made.x[:, 0] > 0) & made.inside  # all of it, so that the silhouette takes the digit away
    return Canvas(ground + (1 - ground) * made.x, made.y, made.inside, ink)


def _network(digits: Tensor, labels: Tensor, run: Run) -> nn.Sequential:
    model, g = normalised_network(run.seeds(1)[0], nn.AdaptiveAvgPool2d(1)), run.generator("training")

    def loss() -> Tensor:
        batch = _canvas(digits, labels, 128, g)
        return functional.cross_entropy(model(batch.x), batch.y)

    return one_cycle(model, loss, 700, 4e-3)


def _reports(
    model: nn.Module, x: Tensor, share: float, side: int, grey: float | Tensor, run: Run
) -> dict[str, BiasReport]:
    """Return the reports of layer masking, black and grey, with random squares of ``side`` pixels removed, four masks an image."""
    masks = _squares(x, share, side, run)
    return {name: missingness_bias(model, x, masks, masker=masker) for name, masker in _maskers(grey).items()}


def _squares(x: Tensor, share: float, side: int, run: Run) -> Tensor:
    """Return four masks an image, shape (4, n, 1, height, width), with a share of its squares removed."""
    height, width = x.shape[2] // side, x.shape[3] // side
    drawn = uniform((4, len(x), height * width), generator=run.generator(f"squares {share}"))
    kept = drawn.argsort(2).argsort(2) >= round(share * height * width)
    wide = kept.reshape(4, len(x), 1, height, width).repeat_interleave(side, 3)
    return wide.repeat_interleave(side, 4)


def _unchanged(name: str, share: float, found: dict[str, BiasReport]) -> list[Comparison]:
    """Compare with the better fill, and with the worse one by 0.05."""
    means = {key: float(found[key].unchanged.mean()) for key in ("black", "grey")}
    better, worse = sorted(means, key=lambda key: -means[key])
    return [
        Comparison.over_seeds(
            f"unchanged predictions, {name}, {share:.0%} removed, against {key}", found["layer"].unchanged.tolist(),
            found[key].unchanged.tolist(), "higher", margin=margin,
        )
        for key, margin in ((better, 0.0), (worse, 0.05))
    ]  # fmt: skip


def _maskers(grey: float | Tensor) -> dict[str, Any]:
    return {"layer": "layer", "black": _BLACK, "grey": grey}


def _leakage(model: nn.Module, canvas: Canvas, silhouette: str) -> dict[str, float]:
    """Return how often the class of a silhouette is told from the masked outputs."""
    silhouettes, kinds = canvas.ink[:, None], canvas.y
    if silhouette == "another":
        silhouettes, kinds = silhouettes.roll(1, 0), kinds.roll(1, 0)
    return {
        name: missingness_bias(model, canvas.x, ~silhouettes[None], masker=masker, shapes=kinds[None]).leakage
        for name, masker in _maskers(_GREY).items()
    }


def _deletion(model: nn.Module, canvas: Canvas, run: Run) -> dict[str, Tensor]:
    """Return deletion areas over sixteen squares, one an image of those the network gets right."""
    right = (model(canvas.x).argmax(1) == canvas.y).nonzero()[:80, 0]
    x, y, oracle = canvas.x[right], canvas.y[right], Oracle(nn.Sequential(model, nn.Softmax(1)))
    line = torch.arange(16) // 4
    parts = line[:, None] * 4 + line
    maps = {
        "layer": layer_masking(
            oracle, x, y, segments=parts, n_samples=300, generator=run.generator("lime")
        ).values,
        "random": uniform((len(x), 1, 16), generator=run.generator("random"))[:, :, parts],
    }
    for name, fill in (("black", _BLACK), ("grey", _GREY)):
        maps[name] = lime_stratified(
            oracle, x, y, segments=parts, sampling="uniform", n_samples=300, hide=fill, generator=run.generator("lime")
        ).values  # fmt: skip
    mean = float(canvas.x.mean())
    return {
        name: deletion_curve(Oracle(model), x, values, y, baseline=mean, n_steps=16).area
        for name, values in maps.items()
    }


def _other_images(model: nn.Module, x: Tensor, run: Run) -> float:
    """Return the share of predictions that stay when the kept squares are those of the next image."""
    outputs = Oracle(LayerMasked(model))(x.roll(1, 0), _squares(x, 0.25, 4, run)[0])
    return float((outputs.argmax(1) == model(x).argmax(1)).float().mean())


def _entropies(found: dict[str, BiasReport]) -> str:
    rest = ", ".join(f"{name} {report.class_entropy:.2f}" for name, report in found.items())
    return f"{rest}, whole images {found['layer'].whole_entropy:.2f}"


def _figure(
    digits: dict[float, dict[str, BiasReport]],
    pictures: dict[float, dict[str, BiasReport]],
    leaks: dict[str, dict[str, float]],
) -> Figure:
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, (name, found) in zip(axes, (("digits", digits), ("photographs", pictures)), strict=False):
        for key in ("layer", "black", "grey"):
            ax.plot(
                [0, *_SHARES], [1, *(float(found[s][key].unchanged.mean()) for s in _SHARES)], "o-", label=key
            )
        ax.set_title(name, fontsize=8)
        ax.set_xlabel("share removed")
        ax.set_ylabel("unchanged predictions")
    axes[0].legend(frameon=False)
    for i, key in enumerate(("layer", "black", "grey")):
        axes[2].bar(
            [j + 0.27 * (i - 1) for j in range(2)], [found[key] for found in leaks.values()], 0.25, label=key
        )
    axes[2].axhline(0.1, color="0.4", lw=0.8)
    axes[2].set_xticks(range(2), [f"{name} silhouette" for name in leaks], fontsize=7)
    axes[2].set_ylabel("accuracy of the probe")
    return figure
