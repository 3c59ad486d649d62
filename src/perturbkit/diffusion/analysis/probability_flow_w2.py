"""How far samples of the probability flow are from the data, in Wasserstein distance, by cause.

Use it to choose schedule and steps for log-concave data, and as the exact error on Gaussian data. Gao and Zhu (2024),
Convergence Analysis for General Probability Flow ODEs of Diffusion Models in Wasserstein Distances, arXiv:2401.17958.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from perturbkit.core import Result, Schedule, checks
from perturbkit.core.sampling import check_times

__all__ = ["W2Bound", "probability_flow_w2_bound", "probability_flow_w2_gaussian", "steps_to_accuracy"]

TimeLipschitz = float | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class W2Bound(Result):
    """A bound on the Wasserstein-2 distance between the samples and the law of the data at the last time.

    Attributes
    ----------
    initialisation : float
        For starting from noise instead of the noisy data, after what the steps contract of it.
    discretization : float
        For freezing the score over each step.
    score : float
        For the error of the score.
    total : float
        Their sum.
    """

    initialisation: float
    discretization: float
    score: float

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return self.initialisation + self.discretization + self.score


def probability_flow_w2_bound(
    schedule: Schedule,
    times: Tensor,
    *,
    convexity: float,
    smoothness: float,
    dim: int,
    second_moment: float,
    score_error: float = 0.0,
    score_time_lipschitz: TimeLipschitz = 0.0,
) -> W2Bound:
    """Bound the distance of the exponential integrator's samples from log-concave data.

    Parameters
    ----------
    schedule : Schedule
        The forward process.
    times : Tensor, shape (steps + 1,)
        Decreasing times; 0 is allowed as the last.
    convexity, smoothness : float
        Bounds ``m0 I <= -Hessian(log p_0) <= L0 I``, above zero.
    dim : int
        Dimension of the data.
    second_moment : float
        ``E|x_0|^2``.
    score_error : float
        Largest error of the score, in Euclidean norm.
    score_time_lipschitz : float or callable
        M of ``|score(x, t) - score(x, u)| <= M |t - u| (1 + |x|)``. A callable takes the times, shape (steps + 1,) in float64,
        and is taken as monotone over a step.

    Returns
    -------
    W2Bound

    Raises
    ------
    ArgumentError
        If an argument is not allowed.

    Notes
    -----
    The sampler starts from N(0, sigma_T^2 I) and steps ``x' = (alpha' / alpha) x + G score(x, t)``,
    ``G = 1/2 int (alpha' / alpha_u) g_u^2 du``. Coupled with the exact flow from the noisy data,

    ``E' <= rho E + G [score_error + M h (1 + X) + L h (f X + g^2 sqrt(d L) / 2)]``,  ``E_0 <= alpha_T sqrt(M2)``,

    where ``rho = max |alpha'/alpha - G a|, |alpha'/alpha - G L|``, ``1 / a(t) = alpha^2 / m0 + sigma^2``,
    ``L(t) = min(1 / sigma^2, L0 / alpha^2)``, ``X^2 = alpha^2 M2 + sigma^2 d``, ``E|score|^2 <= d L`` and the coefficients in
    brackets are the largest over the step (``f`` and ``g`` are taken as monotone, as all schedules of
    :mod:`perturbkit.core.noise` have them). The structure and the orders are the paper's, the constants those of this
    recursion.

    References
    ----------
    Gao and Zhu (2024), arXiv:2401.17958.

    Examples
    --------
    >>> from perturbkit.core import VPSchedule
    >>> schedule = VPSchedule()
    >>> bound = probability_flow_w2_bound(
    ...     schedule, schedule.times(1000, t_end=0.0, spacing="time"), convexity=1.0, smoothness=1.0, dim=2, second_moment=2.0
    ... )
    >>> bound.score, round(bound.initialisation, 4), round(bound.discretization, 2)
    (0.0, 0.0093, 0.11)
    """
    check_times(times)
    checks.positive("convexity", convexity)
    checks.between("smoothness", smoothness, convexity, math.inf, inclusive="low")
    d = checks.integer("dim", dim, low=1)
    checks.nonnegative("second_moment", second_moment)
    checks.nonnegative("score_error", score_error)
    steps = _Steps(schedule, times)
    alpha, sigma = steps.alpha, steps.sigma
    late, early = slice(None, -1), slice(1, None)  # the noisier and the cleaner end of each step
    if callable(score_time_lipschitz):
        at_grid = score_time_lipschitz(steps.grid).numpy()
        in_time = np.maximum(at_grid[late], at_grid[early])
    else:
        in_time = np.full(steps.n, checks.nonnegative("score_time_lipschitz", score_time_lipschitz))

    concavity = 1 / (alpha**2 / convexity + sigma**2)
    with np.errstate(divide="ignore"):
        from_noise, from_data = 1 / sigma**2, smoothness / alpha**2
    lipschitz = np.minimum(from_noise, from_data)[late]
    # The first falls with time and the second rises, so each has its largest value at its own end of the step.
    largest = np.minimum(from_noise[early], from_data[late])
    size = np.sqrt(alpha[early] ** 2 * second_moment + sigma[late] ** 2 * d)
    f, g2 = steps.coefficients()
    speed = np.maximum(f[late], f[early]) * size
    speed += 0.5 * np.maximum(g2[late], g2[early]) * np.sqrt(d * largest)
    rho = np.maximum(
        np.abs(steps.ratio - steps.weight * concavity[late]), np.abs(steps.ratio - steps.weight * lipschitz)
    )
    # What is left at the end of an error made in each step.
    left = np.append(np.cumprod(rho[::-1])[::-1][1:], 1.0)
    local = left * steps.weight
    frozen = steps.h * (in_time * (1 + size) + largest * speed)
    return W2Bound(
        initialisation=float(np.prod(rho) * alpha[0] * math.sqrt(second_moment)),
        discretization=float((local * frozen).sum()),
        score=float(local.sum() * score_error),
    )


def probability_flow_w2_gaussian(schedule: Schedule, times: Tensor, covariance: Tensor) -> float:
    """Return the distance of the sampler's law from Gaussian data, exactly.

    Parameters
    ----------
    schedule : Schedule
        The forward process.
    times : Tensor, shape (steps + 1,)
        Decreasing times.
    covariance : Tensor, shape (d,) or (d, d)
        Eigenvalues of the covariance of the data, or the matrix; positive.

    Returns
    -------
    float
        Wasserstein-2 distance between the samples and the law of the data at ``times[-1]``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the times or the covariance are not allowed.

    Notes
    -----
    Along an eigenvector with variance c the score is ``-x / (alpha^2 c + sigma^2)``, so the standard deviation is multiplied
    by ``alpha'/alpha - G / (alpha^2 c + sigma^2)`` in each step, from ``sigma_T``.

    References
    ----------
    Gao and Zhu (2024), arXiv:2401.17958.

    Examples
    --------
    >>> from perturbkit.core import VPSchedule
    >>> times = VPSchedule().times(10, t_end=0.0, spacing="time")
    >>> round(probability_flow_w2_gaussian(VPSchedule(), times, torch.tensor([1.0])), 4)  # only the start is off
    0.0
    """
    check_times(times)
    checks.tensor("covariance", covariance, ndim=(1, 2))
    values = covariance.detach().to("cpu", torch.float64)
    if values.ndim == 2:
        if values.shape[0] != values.shape[1] or not torch.allclose(values, values.mT):
            raise checks.ArgumentError(
                f"covariance has shape {tuple(values.shape)}; allowed: a symmetric matrix. Symmetrise it or pass eigenvalues."
            )
        values = torch.linalg.eigvalsh(values)
    if float(values.min()) <= 0:
        raise checks.ArgumentError(
            f"covariance has an eigenvalue of {float(values.min()):g}; allowed: above 0. Add a small multiple of the identity."
        )
    steps = _Steps(schedule, times)
    variance = steps.alpha[:, None] ** 2 * values.numpy() + steps.sigma[:, None] ** 2
    factors = steps.ratio[:, None] - steps.weight[:, None] / variance[:-1]
    found = np.abs(steps.sigma[0] * np.prod(factors, axis=0))
    return float(np.sqrt(((found - np.sqrt(variance[-1])) ** 2).sum()))


def steps_to_accuracy(
    schedule: Schedule,
    accuracy: float,
    *,
    convexity: float,
    smoothness: float,
    dim: int,
    second_moment: float,
    score_error: float = 0.0,
    score_time_lipschitz: TimeLipschitz = 0.0,
    t_end: float = 0.0,
    spacing: Literal["logsnr", "time", "karras"] = "time",
    max_steps: int = 1_000_000,
) -> int:
    """Return how many steps make :func:`probability_flow_w2_bound` at most ``accuracy``.

    Parameters
    ----------
    schedule : Schedule
        The forward process.
    accuracy : float
        Wasserstein-2 distance wanted, above zero.
    convexity, smoothness, dim, second_moment, score_error, score_time_lipschitz
        As in :func:`probability_flow_w2_bound`.
    t_end, spacing
        As in :meth:`Schedule.times <perturbkit.core.noise.Schedule.times>`.
    max_steps : int
        Where to give up.

    Returns
    -------
    int

    Raises
    ------
    ArgumentError
        If so many steps do not reach it; the message says which part of the bound is left.

    Notes
    -----
    Doubling, then bisection: the bound falls with the number of steps once they are not coarse.

    References
    ----------
    Gao and Zhu (2024), arXiv:2401.17958.

    Examples
    --------
    >>> from perturbkit.core import VPSchedule
    >>> steps_to_accuracy(VPSchedule(), 0.1, convexity=1.0, smoothness=1.0, dim=2, second_moment=2.0)
    1118
    """
    checks.positive("accuracy", accuracy)
    limit = checks.integer("max_steps", max_steps, low=1)

    def bound(n: int) -> W2Bound:
        return probability_flow_w2_bound(
            schedule,
            schedule.times(n, t_end=t_end, spacing=spacing),
            convexity=convexity,
            smoothness=smoothness,
            dim=dim,
            second_moment=second_moment,
            score_error=score_error,
            score_time_lipschitz=score_time_lipschitz,
        )

    high = 1
    while (found := bound(high)).total > accuracy:
        if high >= limit:
            raise checks.ArgumentError(
                f"accuracy is {accuracy:g}; allowed with {limit} steps: at least {found.total:.3g} (initialisation "
                f"{found.initialisation:.3g}, score {found.score:.3g}, discretisation {found.discretization:.3g}). Lengthen "
                "the schedule, improve the score, or allow more steps."
            )
        high = min(2 * high, limit)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if bound(middle).total <= accuracy else (middle, high)
    return high


class _Steps:
    """The coefficients of the exponential integrator, in float64."""

    def __init__(self, schedule: Schedule, times: Tensor) -> None:
        self.schedule = schedule
        self.grid = times.detach().to("cpu", torch.float64)
        self.n = len(self.grid) - 1
        self.alpha, self.sigma = schedule.alpha(self.grid).numpy(), schedule.sigma(self.grid).numpy()
        if self.alpha[0] <= 0 or float(self.grid[0]) > schedule.t_max * (1 + 1e-9):
            raise checks.ArgumentError(
                f"times starts at {float(self.grid[0]):g}; allowed: inside the schedule, at most {schedule.t_max:g} and with "
                "signal left. Start a little later."
            )
        self.h = -self.grid.diff().numpy()
        self.ratio = self.alpha[1:] / self.alpha[:-1]
        self.weight = self._weights()

    def _weights(self) -> np.ndarray:
        """G of each step, ``alpha' int alpha lam dlam``: with g^2 = alpha^2 d(lam^2)/dt, by Gauss-Legendre."""
        nodes, weights = np.polynomial.legendre.leggauss(8)
        lam = self.sigma / self.alpha
        half = 0.5 * (lam[:-1] - lam[1:])[:, None]
        points = lam[1:, None] + half * (1 + nodes)
        alpha = self.schedule.alpha(self.schedule.time(torch.from_numpy(points))).numpy()
        return self.alpha[1:] * (half * weights * alpha * points).sum(1)

    def coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """Return f and g^2 at the grid: ``dx = -f x dt + g dW``."""
        # At time 0 of a variance preserving schedule sigma' is infinite and sigma sigma' is not: go there from above.
        t = self.grid.clamp_min(1e-12 * float(self.grid[0]))
        alpha_rate, sigma_rate = (r.numpy() for r in self.schedule.rates(t))
        f = -alpha_rate / self.schedule.alpha(t).numpy()
        sigma = self.schedule.sigma(t).numpy()
        return f, 2 * sigma * (sigma_rate + f * sigma)
