"""Recursive estimates reach smaller Goldstein subgradients than fresh ones from the same evaluations.

A support vector machine with a capped l1 penalty, neither smooth nor convex, on the breast-cancer table. Both methods get
the same evaluations and the same grid of step sizes, and each keeps its best. No descent is the control.
"""

from __future__ import annotations

import statistics

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core.random import randint
from perturbkit.optim import goldstein_gradient_norm, minimize_gradient_free_nonsmooth
from perturbkit.papers import Comparison, Evidence, Run, paper

EVALUATIONS, RADIUS, STEPS = 400_000, 0.05, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
WEIGHT, CAP = 0.01, 0.5


@paper(
    number=117,
    title="Faster Gradient-Free Algorithms for Nonsmooth Nonconvex Stochastic Optimization",
    authors="Chen, Xu, Luo",
    year=2023,
    arxiv="2301.06428",
    claim="Recursive estimates find Goldstein-stationary points in fewer evaluations than fresh estimates do.",
    method="perturbkit.optim.minimize_gradient_free_nonsmooth",
    needs="forward",
    input="any",
    cost="two evaluations a fresh direction, four a recursive one",
    seconds=90,
)
def reproduce(run: Run) -> Evidence:
    """Norm of the Goldstein subgradient after equal evaluations."""
    data = _table()
    seeds = run.seeds(5)
    norms = {kind: [[_end(data, kind, step, s) for s in seeds] for step in STEPS] for kind in (True, False)}
    best = {kind: min(statistics.median(row) for row in rows) for kind, rows in norms.items()}
    start = _norm(data, torch.zeros(data[0].shape[1], dtype=torch.float64))
    return Evidence(
        [
            Comparison(
                f"Goldstein norm after {EVALUATIONS:,} evaluations, median of 5", best[True], best[False], "lower", factor=0.7, n=5
            ),
            Comparison(
                "Goldstein norm at the start", start, best[False], "lower", factor=0.7, control=True,
                note="must fail: nothing was descended",
            ),
        ],
        _figure(norms),
        notes="The batch of a fresh estimate is 256 directions, and the recursive method's small batch and period 16.",
    )  # fmt: skip


Table = tuple[Tensor, Tensor]


def _table() -> Table:
    from perturbkit.data import load_breast_cancer

    table = load_breast_cancer()
    x = table.x.double()
    x = (x - x.mean(0)) / x.std(0)
    return x, 2.0 * table.y.double() - 1


def _end(data: Table, variance_reduced: bool, step: float, seed: int) -> float:
    """Return the Goldstein norm of the drawn iterate."""
    x, y = data

    def fun(w: Tensor, rows: Tensor) -> Tensor:
        hinge = (1 - y[rows] * (x[rows] * w).sum(1)).clamp(min=0)
        return hinge + WEIGHT * w.abs().clamp(max=CAP).sum(1)

    def sampler(n: int, generator: torch.Generator) -> Tensor:
        return randint(0, len(y), (n,), generator=generator)

    found = minimize_gradient_free_nonsmooth(
        fun, torch.zeros(x.shape[1], dtype=torch.float64), sampler, radius=RADIUS, step=step, max_evals=EVALUATIONS,
        big_batch=256, variance_reduced=variance_reduced, generator=seed,
    )  # fmt: skip
    return _norm(data, found.x)


def _norm(data: Table, w: Tensor) -> float:
    x, y = data

    def gradients(points: Tensor) -> Tensor:
        active = (y * (points @ x.T) < 1).double() * y
        penalty = WEIGHT * points.sign() * (points.abs() < CAP)
        return -(active @ x) / len(y) + penalty

    return goldstein_gradient_norm(gradients, w, RADIUS, 256, generator=0)


def _figure(norms: dict[bool, list[list[float]]]) -> Figure:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    for kind, label in ((False, "fresh estimates (GFM)"), (True, "recursive estimates (GFM+)")):
        axes.loglog(STEPS, [statistics.median(row) for row in norms[kind]], "o-", label=label)
    axes.set_xlabel("step size")
    axes.set_ylabel("Goldstein norm, median of 5")
    axes.legend(frameon=False, fontsize=8)
    return figure
