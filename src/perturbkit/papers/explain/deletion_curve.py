"""Deletion and insertion areas rank explanations as the truth does, on a digits network and on functions with known answers.

Explanations of known quality are made by mixing true terms with noise; the areas must fall and rise with the quality. On a
digits network integrated gradients must beat a random order in both. Two halves of random orders are the control.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor

from perturbkit.core import Oracle
from perturbkit.core.random import as_generator, randn, uniform
from perturbkit.explain import deletion_curve, insertion_curve, integrated_gradients
from perturbkit.papers import Comparison, Evidence, Run, paper

_LEVELS, _N, _D, _SEEDS = 8, 100, 30, 3


@paper(
    number=0,
    title="RISE: Randomized Input Sampling for Explanation of Black-box Models",
    authors="Petsiuk, Das, Saenko",
    year=2018,
    arxiv="1806.07421",
    claim="The areas under deletion and insertion curves measure how well an explanation ranks what the model uses.",
    method="perturbkit.explain.deletion_curve",
    needs="forward",
    input="any",
    cost="n_steps evaluations a row",
    seconds=10,
)
def reproduce(run: Run) -> Evidence:
    """Rank correlation of areas with the quality of explanations, and integrated gradients against a random order."""
    from perturbkit.data import digits_classifier, load_digits28

    down, up, shuffled = [], [], []
    for seed in run.seeds(_SEEDS):
        fallen, risen, blind = _known(seed)
        down.append(float(spearmanr(range(_LEVELS), fallen).statistic))
        up.append(float(spearmanr(range(_LEVELS), risen).statistic))
        shuffled.append(float(spearmanr(range(_LEVELS), blind).statistic))
    wanted = [0.9] * _SEEDS
    digits = load_digits28("test")
    oracle, x = Oracle(digits_classifier(28).module), digits.x[:_N]
    label = oracle(x).argmax(1)
    orders = {
        "integrated gradients": integrated_gradients(oracle, x, label, n_steps=32).values,
        "random": uniform(x.shape, generator=run.generator("random"), like=x),
        "random again": uniform(x.shape, generator=run.generator("random again"), like=x),
    }
    falls = {name: deletion_curve(oracle, x, v, label) for name, v in orders.items()}
    rises = {name: insertion_curve(oracle, x, v, label) for name, v in orders.items()}
    comparisons = [
        Comparison.over_seeds("rank correlation of deletion area and noise", down, wanted, "higher"),
        Comparison.over_seeds(
            "rank correlation of insertion area and noise, sign changed", [-u for u in up], wanted, "higher"
        ),
        Comparison.over_seeds(
            "rank correlation of deletion area and noise, scores of another row", shuffled, wanted, "higher",
            control=True, note="must fail: scores of another row say nothing of this one",
        ),
        _against("deletion", falls, "integrated gradients", "lower", False),
        _against("insertion", rises, "integrated gradients", "higher", False),
        _against("deletion", falls, "random again", "lower", True),
    ]  # fmt: skip
    return Evidence(comparisons, _figure(falls, rises))


def _known(seed: int) -> tuple[list[float], list[float], list[float]]:
    """Return mean areas for explanations with more and more noise, of a function whose terms are known."""
    g = as_generator(seed)
    x, w = randn((_N, _D), generator=g), randn((_D,), generator=g)
    noise = randn((_N, _D), generator=g)

    def f(z: Tensor) -> Tensor:
        return (w * z).sum(1)

    terms, fallen, risen, blind = w * x, [], [], []
    for level in torch.linspace(0, 1, _LEVELS).tolist():
        scores = (1 - level) * terms + level * noise
        fallen.append(float(deletion_curve(f, x, scores, n_steps=10).area.mean()))
        risen.append(float(insertion_curve(f, x, scores, n_steps=10).area.mean()))
        blind.append(float(deletion_curve(f, x, scores.roll(1, 0), n_steps=10).area.mean()))
    return fallen, risen, blind


def _against(what: str, curves: dict, name: str, direction: str, control: bool) -> Comparison:
    gap = curves[name].area - curves["random"].area
    return Comparison(
        f"{what} area of {name} against a random order, digits", float(curves[name].area.mean()),
        float(curves["random"].area.mean()), direction, margin=0.05, n=_N,  # type: ignore[arg-type]
        spread=float(gap.std() / _N**0.5), control=control,
        note="must fail: two random orders are alike" if control else "",
    )  # fmt: skip


def _figure(falls: dict, rises: dict) -> Figure:
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    for ax, curves in zip(figure.subplots(1, 2), (falls, rises), strict=True):
        for name in ("integrated gradients", "random"):
            curves[name].plot(ax=ax)
            ax.lines[-1].set_label(name)
        ax.legend(frameon=False)
    return figure
