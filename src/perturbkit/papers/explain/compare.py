"""No metric decides alone: on one network the metrics rank explanations differently, and a random map loses.

Four methods on 60 digits, over two draws. Integrated gradients and occlusion must beat the random map in infidelity,
deletion and insertion; at least two metrics must crown different methods. A second random map is the control.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import Oracle
from perturbkit.core.random import as_generator, randn
from perturbkit.explain import compare, integrated_gradients, occlusion
from perturbkit.papers import Comparison, Evidence, Run, paper

_N, _SEEDS = 60, 2
_SIGNS = {"infidelity": 1, "deletion": 1, "insertion": -1, "max_sensitivity": 1}


@paper(
    number=0,
    title="Quantus: An Explainable AI Toolkit for Responsible Evaluation of Neural Network Explanations and Beyond",
    authors="Hedström, Weber, Bareeva, Krakowczyk, Motzkus, Samek, Lapuschkin, Höhne",
    year=2023,
    arxiv="2202.06861",
    claim="Explanation methods must be judged by several metrics, since each ranks them differently.",
    method="perturbkit.explain.compare",
    needs="forward, gradient",
    input="any",
    cost="the metrics' evaluations for each method",
    seconds=25,
)
def reproduce(run: Run) -> Evidence:
    """Winners by metric, and gains over a random map."""
    from perturbkit.data import digits_classifier, load_digits8

    oracle = Oracle(digits_classifier(8).module)
    x = load_digits8("test").x[:_N]
    label = oracle(x).argmax(1)
    frames = [_table(oracle, x, label, seed, run) for seed in run.seeds(_SEEDS)]
    comparisons = []
    for metric in ("infidelity", "deletion", "insertion"):
        direction = "lower" if _SIGNS[metric] > 0 else "higher"
        for name in ("integrated gradients", "occlusion", "random again"):
            control = name == "random again"
            ours, theirs = ([float(f.loc[m, metric]) for f in frames] for m in (name, "random"))
            comparisons.append(
                Comparison.over_seeds(
                    f"{metric} of {name} against a random map", ours, theirs, direction,  # type: ignore[arg-type]
                    factor=0.8 if direction == "lower" else 1.25, control=control,
                    note="must fail: two random maps are alike" if control else "",
                )
            )  # fmt: skip
    means = sum(f.drop(index=["random", "random again"]) for f in frames) / _SEEDS
    winners = {metric: (sign * means[metric]).idxmin() for metric, sign in _SIGNS.items()}
    comparisons.append(
        Comparison("different methods that win a metric", len(set(winners.values())), 2, "higher")
    )
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    for ax, metric in zip(figure.subplots(1, len(_SIGNS)), _SIGNS, strict=True):
        ax.barh(list(frames[0].index), frames[0][metric], color="#4393c3")
        ax.set_title(metric, fontsize=8)
        ax.tick_params(labelsize=6)
    return Evidence(
        comparisons, figure, "Best by metric: " + ", ".join(f"{k}: {v}" for k, v in winners.items()) + "."
    )


def _table(oracle: Oracle, x: Tensor, label: Tensor, seed: int, run: Run) -> Any:
    again = as_generator(seed + 1)
    methods: dict[str, Any] = {
        "integrated gradients": partial(integrated_gradients, n_steps=16),
        "gradient x input": lambda f, z, t: z * f.gradient(z, t),
        "gradient": lambda f, z, t: f.gradient(z, t),
        "occlusion": partial(occlusion, window=2, stride=1),
        "random again": lambda f, z, t: randn(z.shape, generator=again, like=z),
    }
    return compare(oracle, x, label, methods=methods, generator=seed, progress=run.progress)
