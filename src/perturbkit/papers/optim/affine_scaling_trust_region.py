"""A convex combination of scaling matrices against its members, on twelve classical bounded systems from four starts each.

What counts is how many of the 48 runs reach a norm of 1e-8 within 300 trial steps, and how many steps they take. A scaled
gradient method with the same evaluations is the control.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.optim import solve_bounded_system
from perturbkit.papers import Comparison, Evidence, Run, paper

System = tuple[Callable[[Tensor], Tensor], list[float], list[float]]
SCALINGS = ("combined", "coleman_li", "heinkenschloss", "kanzow_klug", "hager")
LIMIT, TOL = 300, 1e-8


@paper(
    number=236,
    title="A New Class of Scaling Matrices for Scaled Trust Region Algorithms",
    authors="Ayanzadeh, Yazdanian, Shahamatnia",
    year=2019,
    arxiv="1904.09209",
    claim="A convex combination of affine scalings solves more bounded systems, in fewer steps, than each of them.",
    method="perturbkit.optim.solve_bounded_system",
    needs="data",
    input="any",
    cost="an evaluation a trial; a Jacobian and an O(d^3) solve a step",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Runs solved and steps taken, by scaling."""
    steps = {kind: _steps(kind) for kind in SCALINGS}
    solved = {kind: sum(map(math.isfinite, row)) for kind, row in steps.items()}
    weights = {w: sum(map(math.isfinite, _steps("combined", w))) for w in ((1, 1, 0), (1, 0, 1), (0, 1, 1))}
    best = max(solved[kind] for kind in SCALINGS[1:])
    common = [i for i in range(len(steps["combined"])) if all(math.isfinite(steps[k][i]) for k in SCALINGS)]
    middle = {kind: statistics.median(steps[kind][i] for i in common) for kind in SCALINGS}
    first = _gradient()
    n = len(steps["combined"])
    comparisons = [
        Comparison("runs solved, combined against the best single scaling", solved["combined"], best, "higher", margin=-1, n=n),
        Comparison("runs solved, combined more than the best single scaling", solved["combined"], best, "higher", margin=1, n=n),
        Comparison("median steps where all solve, combined against Coleman-Li", middle["combined"], middle["coleman_li"], "lower", n=len(common)),
        Comparison(
            "runs solved by a projected gradient method", first, best, "higher", margin=-1, n=n, control=True,
            note="must fail: it has no second-order information",
        ),
    ]  # fmt: skip
    notes = (
        f"Of {n} runs solved: "
        + ", ".join(f"{kind} {solved[kind]} (median {middle[kind]:g} steps)" for kind in SCALINGS)
        + "; combined with weights "
        + ", ".join(f"{w} {count}" for w, count in weights.items())
        + ". The weights of the paper are not known; these are equal."
    )
    return Evidence(comparisons, _figure(steps), notes=notes)


def _cases() -> list[tuple[Callable[[Tensor], Tensor], Tensor, Tensor, Tensor]]:
    """Return system, start, lower and upper bounds of every run."""
    cases = []
    for fun, low, high in _systems():
        lower, upper = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
        cases += [(fun, lower + k / 5 * (upper - lower), lower, upper) for k in range(1, 5)]
    return cases


def _steps(kind: Any, weights: tuple[int, int, int] | None = None) -> list[float]:
    """Return the trial steps of each run, infinite where it failed."""
    found = [
        solve_bounded_system(fun, x0, (low, high), scaling=kind, weights=weights, tol=TOL, max_iter=LIMIT)
        for fun, x0, low, high in _cases()
    ]
    return [float(f.iterations) if f.converged else math.inf for f in found]


def _gradient() -> int:
    """Return how many runs reach the tolerance by projected gradient steps of exact model lengths."""
    solved = 0
    for fun, low, high in _systems():
        lower, upper = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
        x = torch.stack([lower + k / 5 * (upper - lower) for k in range(1, 5)])
        d = len(low)
        cotangents = torch.eye(d, dtype=torch.float64).repeat(len(x), 1)
        for _ in range(LIMIT):
            leaf = x.repeat_interleave(d, 0).requires_grad_(True)
            value = fun(leaf)
            (rows,) = torch.autograd.grad(value, leaf, cotangents)
            matrix, value = rows.reshape(len(x), d, d), value.detach()[::d]
            g = torch.einsum("kij,ki->kj", matrix, value)
            image = torch.einsum("kij,kj->ki", matrix, g)
            length = g.square().sum(1) / image.square().sum(1).clamp(min=1e-300)
            x = torch.clamp(x - length[:, None] * g, lower, upper)
        solved += int((fun(x).norm(dim=1) <= TOL).sum())
    return solved


def _systems() -> list[System]:
    """Return twelve systems with their boxes."""
    e, pi = math.e, math.pi

    def himmelblau(x: Tensor) -> Tensor:
        a, b = x.T
        return torch.stack([a * a + b - 11, a + b * b - 7], 1)

    def bullard_biegler(x: Tensor) -> Tensor:
        a, b = x.T
        return torch.stack([1e4 * a * b - 1, (-a).exp() + (-b).exp() - 1.001], 1)

    def ferraris_tronconi(x: Tensor) -> Tensor:
        a, b = x.T
        first = 0.5 * (a * b).sin() - 0.25 * b / pi - 0.5 * a
        second = (1 - 0.25 / pi) * ((2 * a).exp() - e) + e * b / pi - 2 * e * a
        return torch.stack([first, second], 1)

    def brown(x: Tensor) -> Tensor:
        n = x.shape[1]
        linear = x[:, :-1] + x.sum(1, keepdim=True) - (n + 1)
        return torch.cat([linear, x.prod(1, keepdim=True) - 1], 1)

    def rosenbrock(x: Tensor) -> Tensor:
        a, b = x.T
        return torch.stack([10 * (b - a * a), 1 - a], 1)

    def powell_badly_scaled(x: Tensor) -> Tensor:
        a, b = x.T
        return torch.stack([1e4 * a * b - 1, (-a).exp() + (-b).exp() - 1.0001], 1)

    def boundary_value(x: Tensor) -> Tensor:
        n = x.shape[1]
        h = 1 / (n + 1)
        t = h * torch.arange(1, n + 1, dtype=x.dtype)
        padded = torch.nn.functional.pad(x, (1, 1))
        return 2 * x - padded[:, :-2] - padded[:, 2:] + h * h * (x + t + 1) ** 3 / 2

    def combustion(x: Tensor) -> Tensor:
        a, b, c, d, f = x.T
        r, s = 10.0, math.sqrt(40)
        r5, r6, r7, r8, r9, r10 = (
            0.193,
            0.002597 / s,
            0.003448 / s,
            1.799e-5 / 40,
            2.155e-4 / s,
            3.846e-5 / 40,
        )
        return torch.stack(
            [
                a * b + a - 3 * f,
                2 * a * b + a + b * c**2 + r8 * b - r * f + 2 * r10 * b**2 + r7 * b * c + r9 * b * d,
                2 * b * c**2 + 2 * r5 * c**2 - 8 * f + r6 * c + r7 * b * c,
                r9 * b * d + 2 * d**2 - 4 * r * f,
                a * (b + 1) + r10 * b**2 + b * c**2 + r8 * b + r5 * c**2 + d**2 - 1 + r6 * c + r7 * b * c + r9 * b * d,
            ],
            1,
        )  # fmt: skip

    def trigonometric(x: Tensor) -> Tensor:
        n = x.shape[1]
        i = torch.arange(1, n + 1, dtype=x.dtype)
        return n - x.cos().sum(1, keepdim=True) + i * (1 - x.cos()) - x.sin()

    def powell_singular(x: Tensor) -> Tensor:
        a, b, c, d = x.T
        return torch.stack(
            [a + 10 * b, math.sqrt(5) * (c - d), (b - 2 * c) ** 2, math.sqrt(10) * (a - d) ** 2], 1
        )

    def broyden(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (1, 1))
        return (3 - 2 * x) * x - padded[:, :-2] - 2 * padded[:, 2:] + 1

    def complementary(x: Tensor) -> Tensor:
        a, b = x.T
        return torch.stack([a * b, a * a + b - 1], 1)

    return [
        (himmelblau, [-5.0] * 2, [5.0] * 2),
        (bullard_biegler, [5.45e-6, 2.196e-3], [4.553, 18.21]),
        (ferraris_tronconi, [0.25, 1.5], [1.0, 2 * pi]),
        (brown, [-2.0] * 5, [2.0] * 5),
        (rosenbrock, [-2.0] * 2, [2.0] * 2),
        (powell_badly_scaled, [0.0] * 2, [20.0] * 2),
        (boundary_value, [-1.0] * 50, [1.0] * 50),
        (combustion, [0.0] * 5, [100.0] * 5),
        (trigonometric, [-0.7] * 5, [4.0] * 5),
        (powell_singular, [-2.0] * 4, [4.0] * 4),
        (broyden, [-2.0] * 20, [1.0] * 20),
        (complementary, [0.0] * 2, [2.0] * 2),
    ]


def _figure(steps: dict[str, list[float]]) -> Figure:
    """Draw performance profiles: the share of runs solved within a factor of the best scaling's steps."""
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    best = [min(column) for column in zip(*steps.values(), strict=True)]
    factors = [2 ** (i / 8) for i in range(33)]
    for kind, row in steps.items():
        ratios = [s / b if math.isfinite(s) else math.inf for s, b in zip(row, best, strict=True)]
        share = [sum(r <= f for r in ratios) / len(ratios) for f in factors]
        axes.step(factors, share, where="post", label=kind, lw=2.5 if kind == "combined" else 1.2)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("steps, relative to the best scaling")
    axes.set_ylabel("share of runs solved")
    axes.legend(frameon=False, fontsize=8)
    return figure
