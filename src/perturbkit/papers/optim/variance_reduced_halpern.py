"""Variance reduction makes the Halpern iteration's last residual smaller for the same component evaluations.

Ill-conditioned least squares over 10,000 rows, against the ordinary iteration with its larger step and, as the control,
against recursive differences of two different batches. A matrix game that is a mean of 500, against the anchored and the plain extragradient
method.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core.projection import project_simplex
from perturbkit.core.random import randint, randn
from perturbkit.optim import MonotoneSolution, solve_monotone_finite_sum
from perturbkit.papers import Comparison, Evidence, Run, paper

ROWS, CALLS = 10_000, 3_000_000
GAMES, ACTIONS, GAME_CALLS = 500, 20, 100_000


@paper(
    number=61,
    title="Variance Reduced Halpern Iteration for Finite-Sum Monotone Inclusions",
    authors="Cai, Alacaoglu, Diakonikolas",
    year=2023,
    arxiv="2310.02987",
    claim="Recursive estimates bring the last iterate's residual down as 1 over the calls, up to sqrt(n) below full evaluations.",
    method="perturbkit.optim.solve_monotone_finite_sum",
    needs="data",
    input="any",
    cost="O(n log n + sqrt(n) L / eps) component evaluations",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Exact residuals after equal component evaluations."""
    squares = [_squares(seed) for seed in run.seeds(5)]
    games = [_game(seed) for seed in run.seeds(3)]
    ours, full, other, plain = (
        _mean(column) for column in zip(*(row.residuals for row in squares), strict=True)
    )
    game, anchored, extra = (_mean(column) for column in zip(*(row.residuals for row in games), strict=True))
    slopes = [_slope(row.ours) for row in games]
    comparisons = [
        Comparison(f"least squares, residual after {CALLS:,} calls, against full Halpern", ours, full, "lower", factor=0.5, n=5),
        Comparison(f"matrix game, residual after {GAME_CALLS:,} calls, against anchored extragradient", game, anchored, "lower", factor=0.5, n=3),
        Comparison(f"matrix game, residual after {GAME_CALLS:,} calls, against extragradient", game, extra, "lower", factor=0.5, n=3),
        Comparison("matrix game, slope of log residual against log calls", _mean(slopes), -1.0, "equal", margin=0.25, n=3),
        Comparison(
            "least squares, residual with differences of two batches", other, full, "lower", factor=0.5, n=5, control=True,
            note="must fail: the noise of a difference does not vanish with the step",
        ),
    ]  # fmt: skip
    return Evidence(
        comparisons,
        _figure(squares[0].ours, squares[0].full),
        notes="Extragradient has no last-iterate guarantee of this kind, but converges linearly on small bilinear games. "
        "Each method has the step of its own theory: 1 / (4 L) with the mean constant, 1 / L with that of F. "
        f"Fresh batches without any recursion left {plain:.2g} on the least squares: their noise is small there.",
    )


class _Squares(NamedTuple):
    """Residuals of ours, of full evaluations, of two batches a difference, of no recursion; and two whole results."""

    residuals: tuple[float, float, float, float]
    ours: MonotoneSolution
    full: MonotoneSolution


class _Game(NamedTuple):
    """Residuals of ours, of anchored and of plain extragradient; and our whole result."""

    residuals: tuple[float, float, float]
    ours: MonotoneSolution


def _squares(seed: int) -> _Squares:
    g = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, 5, dtype=torch.float64)
    a = scales * randn((ROWS, 5), generator=g, dtype=torch.float64)
    a = a / a.norm(dim=1, keepdim=True)
    truth = randn((5,), generator=g, dtype=torch.float64)
    b = a @ truth + 0.1 * randn((ROWS,), generator=g, dtype=torch.float64)

    def operator(x: Tensor, i: Tensor) -> Tensor:
        rows = a[i]
        return rows.T @ (rows @ x - b[i]) / len(i)

    start = torch.zeros(5, dtype=torch.float64)
    hessian, offset = a.T @ a / ROWS, a.T @ b / ROWS
    top = float(torch.linalg.eigvalsh(hessian)[-1])
    ours = solve_monotone_finite_sum(
        operator, ROWS, start, lipschitz=1.0, tol=0.0, max_calls=CALLS, generator=seed
    )
    full = solve_monotone_finite_sum(
        operator, ROWS, start, lipschitz=top, tol=0.0, max_calls=CALLS, batch=ROWS
    )

    def redrawn(x: Tensor, i: Tensor) -> Tensor:
        return operator(x, i if len(i) == ROWS else randint(0, ROWS, (len(i),), generator=g))

    other = solve_monotone_finite_sum(
        redrawn, ROWS, start, lipschitz=1.0, tol=0.0, max_calls=CALLS, generator=seed
    )
    x, size = start, math.ceil(math.sqrt(ROWS))
    steps = CALLS // size
    for k in range(steps):
        i = randint(0, ROWS, (size,), generator=g)
        x = 2 / (k + 4) * start + (k + 2) / (k + 4) * x - 0.25 * operator(x, i)
    plain = float((hessian @ x - offset).norm())
    residuals = (float(ours.residual), float(full.residual), float(other.residual), plain)
    return _Squares(residuals, ours, full)


def _game(seed: int) -> _Game:
    g = torch.Generator().manual_seed(seed)
    common = randn((ACTIONS, ACTIONS), generator=g, dtype=torch.float64)
    games = common + randn((GAMES, ACTIONS, ACTIONS), generator=g, dtype=torch.float64)
    mean = games.mean(0)

    def operator(u: Tensor, i: Tensor) -> Tensor:
        a = games[i].mean(0) if len(i) < GAMES else mean
        return torch.cat([a @ u[ACTIONS:], -(u[:ACTIONS] @ a)])

    def project(v: Tensor, step: float) -> Tensor:
        return project_simplex(v.reshape(2, ACTIONS)).reshape(-1)

    # E|F_i u - F_i v|^2 is a quadratic form with these two blocks.
    blocks = [(games.mT @ games).mean(0), (games @ games.mT).mean(0)]
    average = max(float(torch.linalg.eigvalsh(m)[-1]) for m in blocks) ** 0.5
    whole = float(torch.linalg.matrix_norm(mean, 2))
    start = torch.zeros(2 * ACTIONS, dtype=torch.float64)
    start[0] = start[ACTIONS] = 1.0
    ours = solve_monotone_finite_sum(
        operator, GAMES, start, lipschitz=average, kind="monotone", resolvent=project, tol=0.0,
        max_calls=GAME_CALLS, generator=seed,
    )  # fmt: skip
    every = torch.arange(GAMES)
    residuals = []
    for anchored, step in ((True, 0.7 / whole), (False, 0.9 / whole)):
        u, steps = start, GAME_CALLS // (2 * GAMES)
        element = torch.zeros_like(u)
        for k in range(steps):
            base = u + (start - u) / (k + 2) if anchored else u
            half = project(base - step * operator(u, every), step)
            target = base - step * operator(half, every)
            u = project(target, step)
            element = (target - u) / step
        residuals.append(float((operator(u, every) + element).norm()))
    return _Game((float(ours.residual), residuals[0], residuals[1]), ours)


def _mean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return (
        math.exp(sum(map(math.log, values)) / len(values)) if min(values) > 0 else sum(values) / len(values)
    )


def _slope(found: MonotoneSolution) -> float:
    """Return the slope over the last nine tenths of the calls."""
    late = found.history_calls >= GAME_CALLS // 10
    x, y = found.history_calls[late].double().log(), found.history[late].log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def _figure(ours: MonotoneSolution, full: MonotoneSolution) -> Figure:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.loglog(full.history_calls, full.history, color="tab:gray", label="Halpern, all components")
    axes.loglog(ours.history_calls, ours.history, ".-", color="tab:blue", label="variance reduced")
    axes.set_xlabel("component evaluations")
    axes.set_ylabel("residual, exact")
    axes.legend(frameon=False, fontsize=8)
    return figure
