"""Polynomials of a known curvature cut the gaps of its spectrum, and the iterations of the gradient method with them.

Logistic regression whose matrix has three large singular values, and on the breast-cancer table with its columns as they are.
Counted are steps and products with the curvature. The preconditioner of another spectrum's traces is the control.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core.random import randn, uniform
from perturbkit.optim import (
    PreconditionedMinimum,
    minimize_krylov,
    minimize_preconditioned,
    power_traces,
    symmetric_polynomial_preconditioner,
)
from perturbkit.papers import Comparison, Evidence, Run, paper

LARGE = (100.0, 90.0, 80.0)
DEGREES = range(5)
BUDGET = 500


@paper(
    number=62,
    title="Polynomial Preconditioning for Gradient Methods",
    authors="Doikov, Rodomanov",
    year=2023,
    arxiv="2301.13194",
    claim="A symmetric polynomial of degree 3 cuts the iterations of the gradient method by the ratio of two condition numbers.",
    method="perturbkit.optim.minimize_preconditioned",
    needs="data",
    input="any",
    cost="one gradient a trial and as many products as the degree a step",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Steps, products and objectives, by degree."""
    fun, product = _gapped(run.generator("problem"))
    start = torch.zeros(50, dtype=torch.float64)
    found = [minimize_preconditioned(fun, start, product, degree=k, max_iter=40_000) for k in DEGREES]
    krylov = minimize_krylov(fun, start, product, degree=4)
    flat = torch.full((3,), 50.0, dtype=torch.float64)
    other = minimize_preconditioned(fun, start, product, degree=3, traces=flat, max_iter=BUDGET)
    steps, work = [_steps(r) for r in found], [_work(r) for r in found]
    conditions = [_condition(k) for k in DEGREES]
    table = {k: _table(k) for k in (0, 3)}
    comparisons = [
        Comparison("gapped spectrum, steps to 1e-6, degree 3 against 0", steps[3], steps[0], "lower", factor=1 / 3),
        Comparison(
            "steps of degree 3 over those of degree 0, against the condition numbers' ratio",
            steps[3] / steps[0], conditions[3] / conditions[0], "equal", margin=0.05,
        ),
        Comparison("gradients and products, Krylov of degree 4 against the best fixed degree", _work(krylov), min(work), "lower", factor=1.2),
        Comparison(f"breast cancer, objective after {BUDGET} steps, degree 3 against 0", table[3], table[0], "lower"),
        Comparison(
            "gapped spectrum, steps of degree 3 with the traces of the identity", _steps(other), steps[0], "lower", factor=1 / 3, control=True,
            note="must fail: its polynomial is not positive on this spectrum (infinite)",
        ),
    ]  # fmt: skip
    notes = (
        "By degree, condition numbers: "
        + ", ".join(f"{c:.0f}" for c in conditions)
        + "; steps: "
        + ", ".join(f"{s:.0f}" for s in steps)
        + "; gradients and products: "
        + ", ".join(f"{w:.0f}" for w in work)
        + f". Krylov of degree 4 takes {_steps(krylov):.0f} steps, {_work(krylov):.0f} gradients and products."
    )
    return Evidence(comparisons, _figure(conditions, steps), notes=notes)


Problem = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


def _spectrum() -> Tensor:
    rest = torch.linspace(10, 1, 47, dtype=torch.float64)
    return torch.cat([torch.tensor(LARGE, dtype=torch.float64), rest])


def _gapped(generator: torch.Generator) -> Problem:
    """Return the logistic loss of 1,000 rows whose singular values are given, and the product with A^T A / n."""
    n, d = 1000, 50
    left = torch.linalg.qr(randn((n, d), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(randn((d, d), generator=generator, dtype=torch.float64)).Q
    a = left * _spectrum() @ right.T * (math.sqrt(n) / LARGE[0])
    chance = torch.sigmoid(a @ randn((d,), generator=generator, dtype=torch.float64))
    y = torch.where(uniform((n,), generator=generator, dtype=torch.float64) < chance, 1.0, -1.0).double()
    return _logistic(y[:, None] * a, 0.0)


def _logistic(signed: Tensor, ridge: float) -> Problem:
    n = len(signed)

    def fun(x: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-x @ signed.T).mean(1) + ridge / 2 * x.square().sum(1)

    # The Hessian is at most a quarter of the one and all of the other.
    return fun, lambda v: (v @ signed.T) @ signed / n + 4 * ridge * v


def _table(degree: int) -> float:
    """Return the objective on the breast-cancer table, unscaled, after a fixed number of steps."""
    from perturbkit.data import load_breast_cancer

    table = load_breast_cancer()
    x, y = table.x.double(), 2.0 * table.y.double() - 1
    fun, product = _logistic(y[:, None] * torch.cat([x, torch.ones(len(x), 1)], 1), 1e-6)
    start = torch.zeros(x.shape[1] + 1, dtype=torch.float64)
    return float(minimize_preconditioned(fun, start, product, degree=degree, max_iter=BUDGET).fun)


def _condition(degree: int) -> float:
    b = torch.diag(_spectrum() ** 2)
    apply = symmetric_polynomial_preconditioner(lambda v: v @ b, power_traces(b, 5), degree)
    spectrum = (apply(torch.eye(len(b), dtype=b.dtype)) @ b).diag()
    return float(spectrum.max() / spectrum.min())


def _steps(found: PreconditionedMinimum) -> float:
    return float(len(found.history) - 1) if found.converged else math.inf


def _work(found: PreconditionedMinimum) -> float:
    """Return gradients and products together: each is two products with the data."""
    return float(found.cost.ngrad + found.products) if found.converged else math.inf


def _figure(conditions: list[float], steps: list[float]) -> Figure:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.semilogy(list(DEGREES), [s / steps[0] for s in steps], "o-", label="steps to 1e-6")
    axes.semilogy(list(DEGREES), [c / conditions[0] for c in conditions], "k:", label="condition number")
    axes.set_xlabel("degree")
    axes.set_ylabel("relative to degree 0")
    axes.legend(frameon=False, fontsize=8)
    return figure
