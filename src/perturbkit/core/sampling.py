"""What samplers share: the grid of times with its coefficients as plain numbers, and the checks at the door."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perturbkit.core import checks
from perturbkit.core.noise import Denoiser, Schedule
from perturbkit.core.results import Cost, SampleResult

__all__ = [
    "Path",
    "Point",
    "check_inside",
    "check_noise_left",
    "check_start",
    "check_times",
    "transfer",
    "weighted",
]


@dataclass(frozen=True)
class Point:
    """One time with its coefficients, as floats: no kernel is launched and no device is waited for."""

    time: float
    alpha: float
    sigma: float
    lam: float

    @classmethod
    def at(cls, schedule: Schedule, t: float) -> Point:
        """Return the coefficients at a time."""
        return cls(t, float(schedule.alpha(t)), float(schedule.sigma(t)), float(schedule.lam(t)))


class Path:
    """A decreasing grid of times with its coefficients in float64."""

    def __init__(self, denoiser: Denoiser, times: Tensor) -> None:
        grid = times.detach().to("cpu", torch.float64)
        schedule = denoiser.schedule
        self.schedule = schedule
        self.points = self._points(grid)
        self.times = [p.time for p in self.points]
        self.n_steps = len(self.points) - 1
        self._grid = grid

    def between(self, share: float) -> list[Point]:
        """Return a point inside each step, this share of the way in log(alpha / sigma)."""
        level = self.schedule.lam(self._grid).log()
        return self._points(self.schedule.time(torch.lerp(level[:-1], level[1:], share).exp()))

    def _points(self, grid: Tensor) -> list[Point]:
        alpha, sigma = self.schedule.alpha(grid), self.schedule.sigma(grid)
        columns = (grid, alpha, sigma, self.schedule.lam(grid))
        return [Point(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]

    def result(self, x: Tensor, nfev: int) -> SampleResult:
        """Return the state at the end of the path."""
        return SampleResult(x, self._grid, Cost(nfev=nfev))


def transfer(x: Tensor, eps: Tensor, s: Point, t: Point) -> Tensor:
    """Return the state at ``t`` from that at ``s``, exact for a constant noise prediction."""
    return weighted((t.alpha / s.alpha, x), (t.alpha * (t.lam - s.lam), eps))


def weighted(first: tuple[float, Tensor], *rest: tuple[float, Tensor]) -> Tensor:
    """Return a sum of tensors with weights, in one pass over memory a term."""
    total = first[0] * first[1]
    if rest:
        # Not in place: under vmap over what the network depends on, the state is not batched and the prediction is.
        (weight, tensor), *rest = rest  # type: ignore[assignment]
        total = torch.add(total, tensor, alpha=weight)
    for weight, tensor in rest:
        total.add_(tensor, alpha=weight)
    return total


def check_start(denoiser: Denoiser, x: Tensor, times: Tensor) -> None:
    """Check what every sampler is given."""
    if not isinstance(denoiser, Denoiser):
        raise checks.ArgumentTypeError(
            f"denoiser is a {type(denoiser).__name__}; allowed: a core.Denoiser. Wrap the network: "
            "Denoiser(network, schedule, predicts='eps')."
        )
    checks.tensor("x", x)
    check_times(times)
    check_inside(denoiser.schedule, times)


def check_inside(schedule: Schedule, times: Tensor) -> None:
    """Check that a grid starts inside a schedule, with signal left."""
    if float(schedule.alpha(times[0].double().cpu())) <= 0:
        raise checks.ArgumentError(
            f"times starts at {float(times[0]):g}, where no signal is left; allowed: times with alpha above 0. Start a "
            "little later."
        )
    if float(times[0]) > schedule.t_max * (1 + 1e-9):
        raise checks.ArgumentError(
            f"times starts at {float(times[0]):g}; allowed: at most {schedule.t_max:g}, the schedule's last "
            "time. Start there."
        )


def check_times(times: Tensor) -> None:
    """Check a grid of times."""
    checks.tensor("times", times, ndim=1)
    if len(times) < 2 or not bool((times.diff() < 0).all()) or float(times[-1]) < 0:
        raise checks.ArgumentError(
            f"times has {len(times)} values from {float(times[0]):g} to {float(times[-1]):g}; allowed: at least two, "
            "strictly decreasing, none below zero. Use schedule.times(n_steps)."
        )


def check_noise_left(schedule: Schedule, times: Tensor, remedy: str) -> None:
    """Check that a grid ends with noise, where the log noise level and the score are finite."""
    last = times[-1].detach().double().cpu()
    if float(schedule.sigma(last)) <= 0:
        raise checks.ArgumentError(
            f"times ends at {float(last):g}, where there is no noise; allowed: a last time with noise. {remedy}"
        )
