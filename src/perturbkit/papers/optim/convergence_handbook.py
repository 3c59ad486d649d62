"""Every theorem of the handbook, beside fifty runs of its method on problems whose solutions are known.

No mean may exceed its bound, and in each family one bound must be within a factor of ten of what is seen. A bound divided by a
thousand is the control.
"""

from __future__ import annotations

from matplotlib.figure import Figure

from perturbkit.optim import (
    convergence_handbook,
    make_abs,
    make_lasso,
    make_least_squares,
    make_logistic,
)
from perturbkit.optim.first_order.convergence_handbook import HandbookCheck
from perturbkit.papers import Comparison, Evidence, Run, paper

PAIRS = {
    "gradient descent": [("gd", a) for a in ("convex", "strongly_convex", "pl", "nonconvex")],
    "stochastic descent": [("sgd", "convex"), ("sgd", "strongly_convex"), ("sgd_momentum", "convex")],
    "batches": [("minibatch", "convex"), ("minibatch", "strongly_convex")],
    "subgradients": [("subgradient", "convex"), ("stochastic_subgradient", "convex")],
    "proximal steps": [("proximal_gradient", a) for a in ("convex", "strongly_convex")]
    + [("stochastic_proximal_gradient", a) for a in ("convex", "strongly_convex")],
}


@paper(
    number=225,
    title="Handbook of Convergence Theorems for (Stochastic) Gradient Methods",
    authors="Garrigos, Gower",
    year=2023,
    arxiv="2301.11235",
    claim="Simple proofs give rates and steps of gradient methods that hold for the stated outputs and assumptions.",
    method="perturbkit.optim.convergence_handbook",
    needs="gradient",
    input="any",
    cost="the method's gradients",
    seconds=40,
)
def reproduce(run: Run) -> Evidence:
    """Violations and tightness of every theorem."""
    seed = run.seeds(1)[0]
    problems = {
        "smooth": [make_least_squares(generator=seed), make_logistic(generator=seed)],
        "proximal": [make_lasso(generator=seed)],
        "lipschitz": [make_abs(generator=seed)],
    }
    found: dict[str, list[tuple[str, HandbookCheck]]] = {}
    for family, pairs in PAIRS.items():
        kind = (
            "proximal"
            if family == "proximal steps"
            else "lipschitz"
            if family == "subgradients"
            else "smooth"
        )
        found[family] = [
            (f"{m}, {a}", convergence_handbook(problem, m, a, steps=1000, runs=50, generator=seed))
            for m, a in pairs
            for problem in problems[kind]
        ]
    comparisons = []
    for family, results in found.items():
        broken = sum(not check.holds for _, check in results)
        comparisons += [
            Comparison(f"theorems that runs break, {family}", broken, 0, "equal", n=len(results)),
            Comparison(f"largest of what is seen over its bound, {family}", max(check.tightness for _, check in results), 0.1, "higher", n=len(results)),
        ]  # fmt: skip
    interpolating = make_least_squares(noise=0.0, ridge=0.0, generator=seed)
    linear = convergence_handbook(
        interpolating, "sgd", "strongly_convex", steps=4000, runs=50, generator=seed
    )
    loose = found["stochastic descent"][0][1]
    comparisons += [
        Comparison("squared distance after 4,000 steps over the first where all functions share a minimum", float(linear.observed[-1] / linear.observed[0]), 1e-6, "lower"),
        Comparison(
            "largest of what is seen over a thousandth of its bound, stochastic descent", 1000 * loose.tightness, 1.0, "lower", control=True,
            note="must fail: the bound is not that loose",
        ),
    ]  # fmt: skip
    shown = "; ".join(
        f"{name}: {check.tightness:.3g}" for results in found.values() for name, check in results
    )
    return Evidence(comparisons, _figure(found), notes=f"Largest of what is seen over its bound. {shown}.")


def _figure(found: dict[str, list[tuple[str, HandbookCheck]]]) -> Figure:
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    for axes, (family, results) in zip(figure.subplots(2, 3).flat, found.items(), strict=False):
        name, check = results[0]
        axes.loglog(check.steps, check.bound, "k:", label="bound")
        axes.loglog(check.steps, check.observed.clamp(min=1e-16), color="tab:blue", label="seen")
        axes.set_title(f"{family}\n{name}", fontsize=8)
        axes.legend(frameon=False, fontsize=7)
    figure.axes[-1].set_axis_off()
    return figure
