"""Errors of the probability flow on Gaussian and on log-concave data, against the bound and its rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import EDMSchedule, Schedule, VESchedule, VPSchedule
from perturbkit.diffusion import (
    W2Bound,
    probability_flow_w2_bound,
    probability_flow_w2_gaussian,
    steps_to_accuracy,
)
from perturbkit.papers import Comparison, Evidence, Run, paper

_VP = VPSchedule()
_STEPS = (100, 200, 400, 800)
_DIMS = (2, 8, 32, 128)


@paper(
    number=126,
    title="Convergence Analysis for General Probability Flow ODEs of Diffusion Models in Wasserstein Distances",
    authors="Gao, Zhu",
    year=2024,
    arxiv="2401.17958",
    claim="Variance preserving schedules need about sqrt(d) / eps steps for Wasserstein error eps; variance exploding ones more.",
    method="perturbkit.diffusion.probability_flow_w2_bound",
    needs="data",
    input="any",
    cost="arithmetic",
    seconds=10,
)
def reproduce(run: Run) -> Evidence:
    """Gaussian data with eigenvalues in [1/4, 4], and the product of densities exp(-x^2/2) / cosh(x/2)^2."""
    error = [_exact(_VP, n, 8) for n in _STEPS]
    in_dims = [_exact(_VP, 400, d) for d in _DIMS]
    accuracies = (0.1, 0.05, 0.025)
    vp = [_needed(_VP, a) for a in accuracies]
    ve = [_needed(VESchedule(0.01, 200.0), a) for a in accuracies]
    growth = [b / a for a, b in pairwise(vp)]
    cases = [(s, n, d) for s in (_VP, EDMSchedule(40.0)) for n in (20, 100, 500) for d in (2, 32)]
    worst = max(_exact(s, n, d) / _bound(s, n, d).total for s, n, d in cases)
    curved = _Curved()
    curved_worst = max(curved.error(n) / curved.bound(n) for n in (20, 100, 500))
    start_only = max(_exact(s, n, d) / _bound(s, n, d).initialisation for s, n, d in cases)
    comparisons = [
        Comparison("Gaussian data: order of the error in the step", -_slope(_STEPS, error), 1.0, "equal", margin=0.1, n=len(_STEPS)),
        Comparison("Gaussian data: order of the error in the dimension", _slope(_DIMS, in_dims), 0.5, "equal", margin=0.05, n=len(_DIMS)),
        Comparison("growth of the steps when the accuracy is halved, least", min(growth), 2.0, "equal", margin=0.3),
        Comparison("growth of the steps when the accuracy is halved, largest", max(growth), 2.0, "equal", margin=0.3),
        Comparison("steps for accuracy 0.1, variance exploding against preserving", float(ve[0]), float(vp[0]), "higher"),
        Comparison("Gaussian data: largest error over the bound", worst, 1.0, "lower", n=len(cases)),
        Comparison("log-concave data that are not Gaussian: largest error over the bound", curved_worst, 1.0, "lower", n=3),
        Comparison("Gaussian data: largest error over the part of the bound for the start alone", start_only, 1.0, "lower", control=True),
    ]  # fmt: skip
    return Evidence(
        comparisons,
        _figure(error),
        notes=f"Steps from the bound for 0.1, 0.05, 0.025: {vp} variance preserving, {ve} exploding (sigma up to 200). "
        "The horizon is fixed, so that the start takes a growing share of a smaller accuracy; the paper lets it grow. Its "
        "constants are not used: the recursion is ours, of the same structure. With a spectrum that has its two ends in two "
        "dimensions and fills up in more, the order in the dimension was 0.36.",
    )


def _eigenvalues(d: int) -> Tensor:
    """The same spectrum in every dimension: midpoints of a log-uniform one."""
    return 2.0 ** (4 * (torch.arange(d, dtype=torch.float64) + 0.5) / d - 2)


def _exact(schedule: Schedule, n: int, d: int) -> float:
    return probability_flow_w2_gaussian(
        schedule, schedule.times(n, t_end=0.0, spacing="time"), _eigenvalues(d)
    )


def _time_lipschitz(schedule: Schedule, values: Tensor) -> Callable[[Tensor], Tensor]:
    """|d/dt 1 / (alpha^2 c + sigma^2)|, the largest over the eigenvalues c and over what is near a time."""

    def at(t: Tensor) -> Tensor:
        t = t.clamp(1e-9, schedule.t_max)[:, None]
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        alpha_rate, sigma_rate = schedule.rates(t)
        v = alpha**2 * values + sigma**2
        return ((2 * alpha * alpha_rate * values + 2 * sigma * sigma_rate).abs() / v**2).amax(1)

    return lambda t: torch.stack([at(t), at(0.9 * t), at(1.1 * t)]).amax(0)


def _facts(d: int) -> dict[str, float]:
    values = _eigenvalues(d)
    return {"convexity": 0.25, "smoothness": 4.0, "second_moment": float(values.sum())}


def _bound(schedule: Schedule, n: int, d: int) -> W2Bound:
    return probability_flow_w2_bound(
        schedule, schedule.times(n, t_end=0.0, spacing="time"), dim=d,
        score_time_lipschitz=_time_lipschitz(schedule, _eigenvalues(d)), **_facts(d),
    )  # fmt: skip


def _needed(schedule: Schedule, accuracy: float) -> int:
    """Steps for standard Gaussian data in two dimensions."""
    return steps_to_accuracy(
        schedule, accuracy, dim=2, convexity=1.0, smoothness=1.0, second_moment=2.0,
        score_time_lipschitz=_time_lipschitz(schedule, torch.ones(2, dtype=torch.float64)),
    )  # fmt: skip


class _Curved:
    """The density exp(-x^2/2) / cosh(x/2)^2: 1-strongly log-concave, 3/2-smooth; its noisy scores by quadrature."""

    def __init__(self) -> None:
        self.x = np.linspace(-8, 8, 4001)
        log = -0.5 * self.x**2 - 2 * np.log(np.cosh(self.x / 2))
        self.p = np.exp(log)
        self.p /= self.p.sum()
        self.moment = float((self.p * self.x**2).sum())

    def score(self, y: np.ndarray, t: float) -> np.ndarray:
        alpha, sigma = float(_VP.alpha(t)), float(_VP.sigma(t))
        if sigma < 0.02:  # the kernel is as narrow as the grid, and the score that of the data
            return -y - np.tanh(y / 2)
        weight = self.p * np.exp(-((y[:, None] - alpha * self.x) ** 2) / (2 * sigma**2))
        mean = (weight * self.x).sum(1) / weight.sum(1)
        return (alpha * mean - y) / sigma**2

    def error(self, n: int, quantiles: int = 400) -> float:
        """W2 of the sampler's quantiles from those of the data, in one dimension."""
        from scipy.stats import norm

        levels = (np.arange(quantiles) + 0.5) / quantiles
        times = _VP.times(n, t_end=0.0, spacing="time").tolist()
        y = float(_VP.sigma(1.0)) * norm.ppf(levels)
        for t, t_next in pairwise(times):
            ratio = float(_VP.alpha(t_next)) / float(_VP.alpha(t))
            y = ratio * y + (ratio - 1) * self.score(y, t)
        exact = np.interp(levels, np.cumsum(self.p) - 0.5 * self.p, self.x)
        return float(np.sqrt(np.mean((y - exact) ** 2)))

    def bound(self, n: int) -> float:
        y = np.linspace(-6, 6, 101)

        def in_time(times: Tensor) -> Tensor:
            found = []
            for t in times.clamp(1e-3, 0.999).tolist():
                step = 1e-3 * t
                change = np.abs(self.score(y, t + step) - self.score(y, t - step)) / (2 * step)
                found.append((change / (1 + np.abs(y))).max())
            return torch.tensor(found, dtype=torch.float64)

        times = _VP.times(n, t_end=0.0, spacing="time")
        return probability_flow_w2_bound(
            _VP, times, convexity=1.0, smoothness=1.5, dim=1, second_moment=self.moment,
            score_time_lipschitz=in_time,
        ).total  # fmt: skip


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _figure(error: Sequence[float]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    ax.loglog(_STEPS, error, marker="o", label="exact")
    ax.loglog(_STEPS, [_bound(_VP, n, 8).total for n in _STEPS], marker="o", label="bound")
    ax.set_xlabel("steps")
    ax.set_ylabel("Wasserstein-2 distance to the data")
    ax.legend(frameon=False)
    return figure
