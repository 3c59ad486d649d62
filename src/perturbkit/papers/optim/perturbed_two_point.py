"""Noise takes two-point descent off a saddle, for as many evaluations with one pair a step as with fifty.

The first bed is a quadratic saddle in 50 dimensions on which descent starts exactly; the second is the staircase of
saddles of Du et al. (2017) in ten. Descent without the noise is the baseline, and on the first bed the control.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.optim import minimize_perturbed_two_point
from perturbkit.papers import Comparison, Evidence, Run, paper

RUNS = 20


@paper(
    number=15,
    title="Escaping saddle points in zeroth-order optimization: the power of two-point estimators",
    authors="Ren, Tang, Li",
    year=2023,
    arxiv="2209.13555",
    claim="Two-point descent with noise escapes saddle points in as many evaluations whatever the number of pairs a step.",
    method="perturbkit.optim.minimize_perturbed_two_point",
    needs="forward",
    input="any",
    cost="two evaluations a pair",
    seconds=30,
)
def reproduce(run: Run) -> Evidence:
    """Value reached from a saddle, evaluations by the number of pairs, and evaluations on the staircase."""
    seed = run.seeds(1)[0]
    start = torch.zeros(RUNS, 50, dtype=torch.float64)
    found = {m: _descend(start, m, 0.1, seed) for m in (1, 5, 50)}
    still = _descend(start, 1, 0.0, seed)
    evaluations = {m: float(_first(values, -0.05).double().mean()) * 2 * m for m, values in found.items()}
    stairs = {noise: _stairs(noise, seed) for noise in (0.0, 1.0)}
    comparisons = [
        Comparison("value reached with noise, worst of 20 runs", float(found[1].amin(0).max()), -0.05, "lower", n=RUNS),
        Comparison(
            "evaluations to -0.05, most over least among 1, 5 and 50 pairs a step",
            max(evaluations.values()) / min(evaluations.values()), 3.0, "lower", n=RUNS,
        ),
        Comparison(
            "evaluations on the staircase, mean of 20 runs", float(stairs[1.0].mean()), float(stairs[0.0].mean()), "lower", n=RUNS,
        ),
        Comparison(
            "value reached without noise", float(still.amin(0).max()), -0.05, "lower", n=RUNS, control=True,
            note="must fail: on the saddle the two values of every pair are equal",
        ),
    ]  # fmt: skip
    shown = ", ".join(f"{m} pairs: {n:,.0f}" for m, n in evaluations.items())
    return Evidence(comparisons, _figure(found, still), notes=f"Mean evaluations to -0.05. {shown}.")


def _saddle(x: Tensor) -> Tensor:
    return (x[:, :-1].square().sum(1) - x[:, -1].square() / 2) / 2 + x[:, -1] ** 4 / 4


def _descend(start: Tensor, pairs: int, noise: float, seed: int) -> Tensor:
    """Return the values seen, shape (steps, runs), with the step size of the theory and equal evaluations."""
    d = start.shape[1]
    return minimize_perturbed_two_point(
        _saddle, start, step=1 / (1 + d / pairs), pairs=pairs, noise=noise, max_iter=6000 // pairs + 200, generator=seed
    ).history  # fmt: skip


def _first(values: Tensor, target: float) -> Tensor:
    """Return each run's first step at or below the target, or the number of steps."""
    reached = values <= target
    return torch.where(reached.any(0), reached.double().argmax(0), len(values))


def octopus(x: Tensor, tau: float = 1.0, large: float = 1.0, gamma: float = 0.25) -> Tensor:
    """Return the staircase of saddles of Du et al. (2017, arXiv:1705.10412), made even in every coordinate.

    Coordinate i has a strict saddle at 0 that is left towards ``4 tau`` before coordinate i + 1 has one.
    """
    x = x.abs()
    d = x.shape[1]
    a, b = (-14 * large + 10 * gamma) / (3 * tau), (5 * large - 3 * gamma) / (2 * tau**2)

    def ridge(t: Tensor) -> Tensor:
        return -gamma * t**2 + a * (t - tau) ** 3 + b * (t - tau) ** 4

    def turn(t: Tensor) -> Tensor:
        s = (t - 2 * tau) / tau
        return -gamma - (large + gamma) * (10 * s**3 + 15 * s**4 + 6 * s**5)

    drop = 4 * large * tau**2 - float(ridge(torch.tensor(2 * tau, dtype=torch.float64)))
    value = torch.full_like(x[:, 0], float("nan"))
    done = torch.zeros_like(value)  # of the coordinates that are past 2 tau
    open_ = torch.ones_like(value, dtype=torch.bool)
    for i in range(d):
        here, after = x[:, i], x[:, i + 1 :].square().sum(1) * large
        low = done - gamma * here**2 + after
        following = x[:, i + 1].square() if i + 1 < d else torch.zeros_like(here)
        middle = done + ridge(here) + turn(here) * following + after - large * following
        value = torch.where(open_ & (here <= tau), low, value)
        value = torch.where(open_ & (here > tau) & (here <= 2 * tau), middle, value)
        open_ = open_ & (here > 2 * tau)
        done = done + large * (here - 4 * tau) ** 2 - drop
    return torch.where(open_, done, value)


def _stairs(noise: float, seed: int) -> Tensor:
    """Return the evaluations of each run until it is past every saddle, or all that were given."""
    d = 10
    goal = float(octopus(torch.full((1, d), 4.0, dtype=torch.float64))[0])
    start = torch.full((RUNS, d), 1e-3, dtype=torch.float64)
    found = minimize_perturbed_two_point(
        octopus, start, step=0.02, noise=noise, pairs=1, max_iter=12_000, target=goal + 1.0, generator=seed
    )
    return 2 * _first(found.history, goal + 1.0).double()


def _figure(found: dict[int, Tensor], still: Tensor) -> Figure:
    figure = Figure(figsize=(4.8, 3), layout="constrained")
    axes = figure.add_subplot()
    for m, values in found.items():
        axes.plot(2 * m * torch.arange(len(values)), values.mean(1), label=f"noise, {m} pairs a step")
    axes.plot(2 * torch.arange(len(still)), still.mean(1), color="tab:gray", linestyle="--", label="no noise")
    axes.set_xlabel("evaluations")
    axes.set_ylabel("value, mean of 20 runs")
    axes.legend(frameon=False, fontsize=8)
    return figure
