"""Fits on a group are linear in rate, bear noise and follow a Hessian that changes.

A Hessian of condition 100 in fifty dimensions, from exact pairs, from noisy ones and while it drifts: the group against the
closed form, secant updates and two other gradients. Pairs that belong to other Hessians are the control. Preconditioned
descent is set beside Adam.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import randn
from perturbkit.optim import PSGD, HessianFitter, fit_bfgs, fit_closed_form, fit_euclidean_gd, fit_spd_gd
from perturbkit.papers import Comparison, Evidence, Run, paper

D, PAIRS = 50, 8000


@paper(
    number=102,
    title="Stochastic Hessian Fitting on Lie Group",
    authors="Li",
    year=2024,
    arxiv="2402.11858",
    claim="Preconditioners fitted by relative gradients on a group converge linearly, bear noise and follow changes.",
    method="perturbkit.optim.HessianFitter",
    needs="gradient",
    input="any",
    cost="a Hessian product a pair",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Spectral errors of the fits after the pairs, with and without noise, and while the Hessian drifts."""
    g = run.generator("pairs")
    turn = torch.linalg.qr(randn((D, D), generator=g, dtype=torch.float64)).Q
    matrix = turn @ torch.diag(torch.logspace(-1, 1, D, dtype=torch.float64)) @ turn.T
    v = randn((PAIRS, D), generator=g, dtype=torch.float64)
    h = v @ matrix
    curve = _curve(matrix, v, h)
    closed = [(n, _error(fit_closed_form(h[:n]), matrix)) for n in (500, 2000, 8000)]
    slope = math.log(closed[-1][1] / closed[0][1]) / math.log(16)
    others = {
        "entries": _error(fit_euclidean_gd(v[:4000], h[:4000]), matrix),
        "manifold": _error(fit_spd_gd(v[:4000], h[:4000], 1.0), matrix),
    }
    noisy = h + 0.01 * randn(h.shape, generator=g, dtype=torch.float64)
    group = HessianFitter(D, rate=1.0, dtype=torch.float64)
    for t in range(PAIRS):
        group.rate = min(1.0, 400 / (t + 1))
        group.update(v[t], noisy[t])
    secant = _error(fit_bfgs(v[:2000], noisy[:2000]), matrix)
    drift = _drift(matrix, run.generator("drift"))
    wrong = HessianFitter(D, rate=1.0, dtype=torch.float64)
    for t in range(PAIRS):
        wrong.update(v[t], h[(t + 1) % PAIRS])
    steps = {kind: _rosenbrock(kind) for kind in ("PSGD", "Adam")}
    return Evidence(
        [
            Comparison("error of the group's fit after 8,000 exact pairs", curve[-1][1], 1e-5, "lower"),
            Comparison("error of the closed form after as many", closed[-1][1], 5e-2, "higher"),
            Comparison("slope of the closed form's error in the pairs", slope, -0.5, "equal", margin=0.15),
            Comparison("error of the group's fit after 4,000 pairs, against descent on the entries", dict(curve)[4000], others["entries"], "lower"),
            Comparison("error of secant updates from noisy pairs, over the group's", secant / _error(group.preconditioner(), matrix), 10.0, "higher"),
            Comparison("mean error while the Hessian drifts, against the closed form", drift["group"], drift["closed"], "lower"),
            Comparison("steps to a Rosenbrock value of 0.0001, against Adam at its best of four rates", steps["PSGD"], steps["Adam"], "lower"),
            Comparison(
                "error of the group's fit to pairs of other vectors", _error(wrong.preconditioner(), matrix), 1e-5, "lower", control=True,
                note="must fail: vector and product do not belong together",
            ),
        ],
        _figure(curve, closed),
        notes=f"After 4,000 pairs descent on the entries is off by {others['entries']:.3g} and on the manifold by {others['manifold']:.3g}.",
    )  # fmt: skip


def _error(p: Tensor, matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(p @ matrix - torch.eye(D, dtype=p.dtype), 2))


def _curve(matrix: Tensor, v: Tensor, h: Tensor) -> list[tuple[int, float]]:
    fitter = HessianFitter(D, rate=1.0, dtype=torch.float64)
    found = []
    for t in range(len(v)):
        fitter.update(v[t], h[t])
        if (t + 1) % 500 == 0:
            found.append((t + 1, _error(fitter.preconditioner(), matrix)))
    return found


def _drift(matrix: Tensor, g: torch.Generator) -> dict[str, float]:
    """Return mean errors over 3000 pairs of a Hessian that a random rank-one term is added to in each."""
    fitter = HessianFitter(D, rate=1.0, dtype=torch.float64)
    seen = torch.zeros(D, D, dtype=torch.float64)
    errors: dict[str, list[float]] = {"group": [], "closed": []}
    now = matrix.clone()
    for t in range(3000):
        u = 0.02 * randn((D,), generator=g, dtype=torch.float64)
        now += torch.outer(u, u)
        v = randn((D,), generator=g, dtype=torch.float64)
        h = now @ v
        fitter.update(v, h)
        seen += torch.outer(h, h)
        if t >= 1000 and t % 200 == 0:
            values, vectors = torch.linalg.eigh(seen / (t + 1))
            closed = vectors @ torch.diag(values.rsqrt()) @ vectors.T
            errors["group"].append(_error(fitter.preconditioner(), now))
            errors["closed"].append(_error(closed, now))
    return {kind: sum(e) / len(e) for kind, e in errors.items()}


def _rosenbrock(kind: str, most: int = 3000) -> int:
    """Return the steps until the value is 0.0001, at the best of four rates."""
    least = most
    for lr in (0.03, 0.1, 0.3, 1.0):
        # As a matrix of one row: the triangular factor of its columns is the whole of a dense preconditioner.
        w = nn.Parameter(torch.tensor([[-1.0, 1.0]], dtype=torch.float64))
        optimizer: Any = PSGD([w], lr, rate=0.5) if kind == "PSGD" else torch.optim.Adam([w], lr)

        def loss(w: nn.Parameter = w, optimizer: Any = optimizer) -> Tensor:
            x, y = w[0]
            value = (1 - x) ** 2 + 100 * (y - x**2) ** 2
            if kind == "Adam":
                optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
            return value

        for t in range(least):
            if float(optimizer.step(loss).detach()) <= 1e-4:
                least = t + 1
                break
    return least


def _figure(curve: list[tuple[int, float]], closed: list[tuple[int, float]]) -> Figure:
    figure = Figure(figsize=(4.2, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.semilogy(*zip(*curve, strict=True), color="tab:blue", label="group")
    axes.semilogy(*zip(*closed, strict=True), "o-", color="tab:gray", label="closed form")
    axes.set_xlabel("pairs")
    axes.set_ylabel("spectral error")
    axes.legend(frameon=False)
    return figure
