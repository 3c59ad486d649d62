"""Renewing the Hessian once in d steps makes second-order methods cheaper.

Logistic regression in 50 variables with the theory's regularisation, counted in gradients with a Hessian as d of them; the same
adapted, in seconds, in 300 variables; and phase retrieval, which is not convex. The stale Hessian without the regularisation
that grows with the period is the control.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core.random import randn
from perturbkit.optim import NewtonMinimum, minimize_lazy_newton
from perturbkit.papers import Comparison, Evidence, Run, paper

PERIODS = (1, 5, 25, 50)
LIMIT = 20_000


@paper(
    number=210,
    title="Second-order optimization with lazy Hessians",
    authors="Doikov, Chayti, Jaggi",
    year=2022,
    arxiv="2212.00781",
    claim="One Hessian in d steps is the best rate of renewal, and makes Newton's method sqrt(d) times cheaper.",
    method="perturbkit.optim.minimize_lazy_newton",
    needs="data",
    input="any",
    cost="one gradient a trial, a Hessian and its decomposition in d steps",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Gradient equivalents and seconds until the gradient is small."""
    seeds = run.seeds(3)
    fixed = {m: [_convex(s, m, adapted=False) for s in seeds] for m in PERIODS}
    adapted = {m: [_convex(s, m, adapted=True) for s in seeds] for m in PERIODS}
    control = [_convex(s, 50, adapted=False, factor=1e-12) for s in seeds]
    retrieval = {m: [_retrieval(s, m) for s in seeds] for m in (1, 30)}
    lazy, eager = _seconds(seeds[0])
    comparisons = [
        Comparison.over_seeds(
            "logistic regression, gradient equivalents to 1e-9, once in 50 steps against each", fixed[50], fixed[1], "lower", factor=1 / 3
        ),
        Comparison.over_seeds("the same, adapted regularisation", adapted[50], adapted[1], "lower", factor=1 / 3),
        Comparison.over_seeds("phase retrieval, gradient equivalents to a certified minimum", retrieval[30], retrieval[1], "lower"),
        Comparison("logistic regression in 300 variables, adapted, seconds", lazy, eager, "lower"),
        Comparison.over_seeds(
            "gradient equivalents, once in 50 steps without regularisation", control, fixed[1], "lower", factor=1 / 3, control=True,
            note="must fail: a stale Hessian alone does not converge (infinite here)",
        ),
    ]  # fmt: skip
    notes = (
        "Mean gradient equivalents for the periods 1, 5, 25 and 50: "
        + ", ".join(f"{_mean(fixed[m]):.0f}" for m in PERIODS)
        + " with the theory's regularisation, "
        + ", ".join(f"{_mean(adapted[m]):.0f}" for m in PERIODS)
        + " adapted."
    )
    return Evidence(comparisons, _figure(fixed, adapted), notes=notes)


def _problem(seed: int, n: int, d: int) -> tuple[Callable[[Tensor], Tensor], Tensor, float]:
    """Return a regularised logistic loss, a start, and a Lipschitz constant of its Hessian."""
    g = torch.Generator().manual_seed(seed)
    a = torch.logspace(0, -1.3, d, dtype=torch.float64) * randn((n, d), generator=g, dtype=torch.float64)
    noisy = a @ randn((d,), generator=g, dtype=torch.float64) * 3 + randn(
        (n,), generator=g, dtype=torch.float64
    )
    signed = noisy.sign()[:, None] * a
    start = 2 * randn((d,), generator=g, dtype=torch.float64)
    # The logistic function's second derivative is at most 1 / (6 sqrt 3).
    top = float(torch.linalg.eigvalsh(a.T @ a / n)[-1])
    lipschitz = top * float(a.norm(dim=1).max()) / (6 * math.sqrt(3))

    def fun(x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-x @ signed.T).mean(1) + 5e-5 * x.square().sum(1)

    return fun, start, lipschitz


def _convex(seed: int, period: int, *, adapted: bool, factor: float = 1.0) -> float:
    fun, start, lipschitz = _problem(seed, 500, 50)
    found = minimize_lazy_newton(
        fun, start, period=period, regularization="gradient", tol=1e-9, max_iter=LIMIT if factor == 1.0 else 500,
        lipschitz_hessian=None if adapted else factor * lipschitz,
    )  # fmt: skip
    return _equivalents(found)


def _retrieval(seed: int, period: int) -> float:
    """Return the gradient equivalents to a point with gradient below 1e-8 and curvature above -1e-4."""
    g = torch.Generator().manual_seed(seed)
    a = randn((150, 30), generator=g, dtype=torch.float64)
    b = (a @ randn((30,), generator=g, dtype=torch.float64)).square()

    def fun(x: Tensor) -> Tensor:
        return ((x @ a.T).square() - b).square().mean(1) / 8

    start = 0.01 * randn((30,), generator=g, dtype=torch.float64)
    return _equivalents(minimize_lazy_newton(fun, start, period=period, tol=1e-8, max_iter=LIMIT))


def _equivalents(found: NewtonMinimum) -> float:
    return found.cost.ngrad + len(found.x) * found.nhess if found.converged else math.inf


def _seconds(seed: int) -> tuple[float, float]:
    """Return the best of three times with a Hessian in 300 steps and in each."""
    fun, start, _ = _problem(seed, 1000, 300)
    times: dict[int, list[float]] = {300: [], 1: []}
    for _ in range(3):
        for period, spent in times.items():
            begin = time.perf_counter()
            minimize_lazy_newton(fun, start, period=period, regularization="gradient", tol=1e-9)
            spent.append(time.perf_counter() - begin)
    return min(times[300]), min(times[1])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _figure(fixed: dict[int, list[float]], adapted: dict[int, list[float]]) -> Figure:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.loglog(PERIODS, [_mean(fixed[m]) for m in PERIODS], "o-", label="theory's regularisation")
    axes.loglog(PERIODS, [_mean(adapted[m]) for m in PERIODS], "o-", label="adapted")
    axes.set_xlabel("steps of one Hessian (50 variables)")
    axes.set_ylabel("gradient equivalents to 1e-9")
    axes.legend(frameon=False, fontsize=8)
    return figure
