"""The explanation that is optimal for infidelity has at most half the infidelity of gradients and integrated gradients.

On 100 test inputs each of a digits network (random squares are blackened) and a breast cancer network (the input goes to a
noisy mean). Perturbations for the score are drawn anew; every explanation is scaled best first, so that scale does not
decide. A shuffled optimal explanation is the control.
"""

from __future__ import annotations

from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import Gaussian
from perturbkit.core.random import randperm
from perturbkit.explain import (
    infidelity,
    integrated_gradients,
    optimal_infidelity_explanation,
    smooth_explanation,
)
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.explain._classifiers import Case, cases

_N, _FIT, _SCORE, _SEEDS = 100, 1000, 500, 2


@paper(
    number=203,
    title="On the (In)fidelity and Sensitivity for Explanations",
    authors="Yeh, Hsieh, Suggala, Inouye, Ravikumar",
    year=2019,
    arxiv="1901.09392",
    claim="Explanations optimal for infidelity under a perturbation predict the model better than existing ones.",
    method="perturbkit.explain.infidelity",
    needs="forward",
    input="any",
    cost="n_samples evaluations a row",
    seconds=30,
)
def reproduce(run: Run) -> Evidence:
    """Infidelity of four explanations and a control, on two networks."""
    comparisons, table = [], {}
    for case in cases(_N):
        found: dict[str, list[Tensor]] = {}
        for seed in run.seeds(_SEEDS):
            for name, values in _scores(case, seed, run).items():
                found.setdefault(name, []).append(values)
        means = {name: [float(v.mean()) for v in values] for name, values in found.items()}
        table[case.name] = {name: sum(v) / len(v) for name, v in means.items()}
        ours = means.pop("optimal")
        shuffled = means.pop("optimal, shuffled")
        for other, theirs in means.items():
            comparisons.append(
                Comparison.over_seeds(
                    f"infidelity against {other}, {case.name}", ours, theirs, "lower", factor=0.5
                )
            )
        comparisons.append(
            Comparison.over_seeds(
                f"infidelity of shuffled scores against gradient, {case.name}", shuffled, means["gradient"], "lower",
                factor=0.5, control=True, note="must fail: right values at wrong places predict nothing",
            )
        )  # fmt: skip
    missed = [c.metric for c in comparisons if not c.as_wanted]
    return Evidence(comparisons, _figure(table), f"More than half: {'; '.join(missed)}." if missed else "")


def _scores(case: Case, seed: int, run: Run) -> dict[str, Tensor]:
    oracle, x, label = case.oracle, case.x, case.label
    best = optimal_infidelity_explanation(
        oracle, x, label, perturbation=case.perturbation, n_samples=_FIT, ridge=1e-4, generator=seed
    ).values
    order = randperm(x[0].numel(), generator=run.generator("shuffle"))
    smooth = smooth_explanation(
        oracle,
        x,
        lambda f, z, t: f.gradient(z, t),
        label,
        kernel=Gaussian(0.15),
        n_samples=30,
        generator=seed + 1,
    )
    # Shares of the output, with the baseline that they are shares of; all others are slopes.
    explanations = {
        "optimal": (best, None),
        "gradient": (oracle.gradient(x, label), None),
        "SmoothGrad": (smooth.values, None),
        "integrated gradients": (integrated_gradients(oracle, x, label, n_steps=32).values, 0.0),
        "optimal, shuffled": (best.flatten(1)[:, order].reshape(x.shape), None),
    }
    return {
        name: infidelity(
            oracle, x, values, label, perturbation=case.perturbation, baseline=baseline, n_samples=_SCORE,
            normalize=True, generator=seed + 2,
        ).values
        for name, (values, baseline) in explanations.items()
    }  # fmt: skip


def _figure(table: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(7, 2.6), layout="constrained")
    for ax, (name, row) in zip(figure.subplots(1, len(table)), table.items(), strict=True):
        ax.barh(list(row)[::-1], list(row.values())[::-1], color="#4393c3")
        ax.set_title(name)
        ax.set_xlabel("infidelity, best scale")
    return figure
