"""Stratified masks spread the sampled outputs that plain LIME bunches together, and estimate the same coefficients.

EfficientNet-lite0 on eight photographs and a digits network on twenty canvases, cut into about 60 superpixels: the standard
deviation of the outputs must be twice that of uniform masks. With 10 parts the mean coefficients of both samplings must agree
within two standard errors. The variation of the coefficients over repeats is reported, with no threshold: the unbiased weights leave few
effective samples where there are many superpixels.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import Oracle
from perturbkit.explain import lime_stratified
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.explain._canvas import canvas_classifier, draw_canvas

_REPEATS, _SAMPLES, _PHOTO_SAMPLES = 10, 500, 40


@paper(
    number=218,
    title="Using Stratified Sampling to Improve LIME Image Explanations",
    authors="Rashid, Amparore, Ferrari, Verda",
    year=2024,
    arxiv="2403.17742",
    claim="Stratified sampling of the number of hidden superpixels cures the undersampling of outputs in LIME for images.",
    method="perturbkit.explain.lime_stratified",
    needs="forward",
    input="image",
    cost="n_samples evaluations an image",
    seconds=45,
)
def reproduce(run: Run) -> Evidence:
    """Spread of the outputs, agreement of the coefficients and their variation."""
    from perturbkit.data import image_model, load_digits8, load_photographs

    photos, module = load_photographs().x, image_model().module
    network = Oracle(lambda z: module(z).softmax(1))
    spread = {"photographs": _spread(network, photos, 60, _PHOTO_SAMPLES, run)}
    train, test = load_digits8("train"), load_digits8("test")
    model = canvas_classifier(train.x, train.y, run.seeds(1)[0], steps=300)
    canvas = draw_canvas(test.x, test.y, 20, run.generator("canvas"))
    oracle = Oracle(lambda z: model(z).softmax(1))
    one, digit = canvas.x[:1], oracle(canvas.x[:1]).argmax(1)
    few, many = _strips(10), _strips(60)
    runs = {
        (count, kind): _repeated(oracle, one, digit, parts, kind, run)
        for count, parts in ((10, few), (60, many))
        for kind in ("uniform", "stratified", "legacy")
    }
    spread["digits"] = _spread(oracle, canvas.x, many, _SAMPLES, run)
    differences = {
        kind: _difference(runs[10, kind], runs[10, "uniform"]) for kind in ("stratified", "legacy")
    }
    comparisons = [
        *(
            Comparison.over_seeds(
                f"standard deviation of the outputs, 60 superpixels, {name}", found["stratified"], found["uniform"],
                "higher", factor=2.0,
            )
            for name, found in spread.items()
        ),
        Comparison(
            "root mean square difference of mean coefficients, 10 parts, in standard errors", differences["stratified"],
            2.0, "lower", n=_REPEATS,
        ),
        Comparison(
            "the same for the authors' program, which weighs distances", differences["legacy"], 2.0, "lower",
            n=_REPEATS, control=True, note="must fail: its weights do not undo the strata",
        ),
    ]  # fmt: skip
    variation = {key: float(v.std(0).mean() / v.mean(0).abs().mean()) for key, v in runs.items()}
    notes = "Coefficient of variation of the coefficients: " + ", ".join(
        f"{kind} {variation[count, kind]:.2f} ({count} parts)" for count, kind in runs
    )
    return Evidence(comparisons, _figure(spread, variation), notes + ".")


def _spread(oracle: Oracle, x: Tensor, segments: int | Tensor, n: int, run: Run) -> dict[str, list[float]]:
    """Return the standard deviation of the sampled outputs, an image each, by sampling."""
    label = oracle(x).argmax(1)
    return {
        sampling: lime_stratified(
            oracle, x, label, segments=segments, sampling=sampling, n_samples=n,  # type: ignore[arg-type]
            generator=run.generator(sampling),
        )
        .extras["output_std"]
        .tolist()
        for sampling in ("stratified", "uniform")
    }  # fmt: skip


def _strips(count: int) -> Tensor:
    """Cut 16x16 pixels into ``count`` rectangles: 5 columns by ``count / 5`` rows."""
    rows = (torch.arange(16) * (count // 5)) // 16
    columns = (torch.arange(16) * 5) // 16
    return rows[:, None] * 5 + columns[None]


def _repeated(oracle: Oracle, x: Tensor, label: Tensor, parts: Tensor, kind: str, run: Run) -> Tensor:
    """Return the coefficients of every repeat, shape (repeats, parts)."""
    return torch.stack(
        [
            lime_stratified(
                oracle, x, label, segments=parts, sampling="uniform" if kind == "uniform" else "stratified",
                legacy=kind == "legacy", n_samples=_SAMPLES, hide=0.0, ridge=0.0, generator=seed,
            ).extras["coefficients"][0]
            for seed in run.seeds(_REPEATS)
        ]
    )  # fmt: skip


def _difference(a: Tensor, b: Tensor) -> float:
    error = (a.var(0) + b.var(0)).div(len(a)).sqrt()
    return float(((a.mean(0) - b.mean(0)) / error).square().mean().sqrt())


def _figure(spread: dict[str, dict[str, list[float]]], variation: dict[tuple[int, str], float]) -> Figure:
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, found in spread.items():
        left.plot(found["uniform"], found["stratified"], ".", label=name)
    left.axline((0, 0), slope=1, color="0.6", lw=0.8)
    left.set_xlabel("std of the outputs, uniform")
    left.set_ylabel("stratified")
    left.legend(frameon=False)
    right.bar([f"{kind}\n{count}" for count, kind in variation], list(variation.values()), color="#d6604d")
    right.set_ylabel("coefficient of variation")
    right.tick_params(labelsize=6)
    return figure
