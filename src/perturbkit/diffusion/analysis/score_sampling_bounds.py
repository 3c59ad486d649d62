"""How far samples of the reverse diffusion are from the data, in Kullback-Leibler divergence, by cause.

Use it to choose the number and spacing of steps, and to see which part of the error is the steps' own. Chen, Lee and Lu
(2023), Improved Analysis of Score-based Generative Modeling: User-Friendly Bounds under Minimal Smoothness Assumptions,
arXiv:2211.01916.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from perturbkit.core import Cost, Denoiser, Result, SampleResult, Schedule, checks
from perturbkit.core.random import Seed, as_generator, randn
from perturbkit.core.sampling import Path, check_noise_left, check_start, check_times, weighted

__all__ = ["KLBound", "PathKL", "decreasing_times", "path_kl", "sample_reverse_sde", "sampling_kl_bound"]

# Gauss-Legendre on four points is exact to order 8 in the step.
_NODES, _WEIGHTS = (a.tolist() for a in np.polynomial.legendre.leggauss(4))


@dataclass(frozen=True)
class KLBound(Result):
    """A bound on the divergence of the samples from the data as they are at the last time, up to a constant.

    Attributes
    ----------
    initialisation : float
        For starting from noise instead of the noisy data.
    score : float
        For the error of the score.
    discretization : float
        For the steps.
    total : float
        Their sum.
    """

    initialisation: float
    score: float
    discretization: float

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return self.initialisation + self.score + self.discretization


def sampling_kl_bound(
    times: Tensor,
    *,
    dim: int,
    second_moment: float,
    score_error: float = 0.0,
    smoothness: float | None = None,
) -> KLBound:
    """Bound the divergence of the reverse diffusion's samples from the data.

    Parameters
    ----------
    times : Tensor, shape (steps + 1,)
        Decreasing times of the Ornstein-Uhlenbeck process; the last above 0 unless ``smoothness`` is given.
    dim : int
        Dimension of the data.
    second_moment : float
        ``E|x_0|^2``.
    score_error : float
        Root mean square error of the score, over time and data.
    smoothness : float, optional
        Lipschitz constant of the score at all times. By default nothing is assumed, and ``1 / sigma(t)^2`` is taken.

    Returns
    -------
    KLBound

    Raises
    ------
    ArgumentError
        If an argument is not allowed.

    Notes
    -----
    ``KL(p_delta | output) <= C ((M2 + d) e^{-2T} + T score_error^2 + d sum_k h_k^2 L_k^2)`` with ``L_k`` the smoothness at the
    lower end of step k. The paper leaves C open and it is 1 here, so rates and shares mean something, and the size only
    where a test has shown it. Times in which ``alpha = e^-t``.

    References
    ----------
    Chen, Lee and Lu (2023), arXiv:2211.01916.

    Examples
    --------
    >>> bound = sampling_kl_bound(decreasing_times(100, 6.0, 1e-3), dim=2, second_moment=4.0, score_error=0.1)
    >>> round(bound.initialisation, 6), round(bound.score, 3), round(bound.discretization, 3)
    (3.7e-05, 0.06, 1.884)
    """
    check_times(times)
    d = checks.integer("dim", dim, low=1)
    checks.nonnegative("second_moment", second_moment)
    checks.nonnegative("score_error", score_error)
    grid = times.detach().to("cpu", torch.float64)
    if smoothness is not None:
        lipschitz = torch.full_like(grid[1:], checks.positive("smoothness", smoothness))
    elif grid[-1] <= 0:
        raise checks.ArgumentError(
            "times ends at 0 and smoothness is not given; allowed: a last time above 0. Stop early, as with "
            "decreasing_times, or pass smoothness=."
        )
    else:
        lipschitz = -1 / torch.expm1(-2 * grid[1:])
    return KLBound(
        initialisation=(second_moment + d) * math.exp(-2 * float(grid[0])),
        score=float(grid[0]) * score_error**2,
        discretization=d * float((grid.diff() * lipschitz).square().sum()),
    )


def decreasing_times(n_steps: int, horizon: float, stop: float) -> Tensor:
    """Return times whose steps shrink with the time left, as data without smoothness asks.

    Parameters
    ----------
    n_steps : int
        Number of steps, at least 1.
    horizon : float
        First time.
    stop : float
        Last time, above 0 and below the first.

    Returns
    -------
    Tensor of float64, shape (n_steps + 1,)

    Raises
    ------
    ArgumentError
        If an argument is not allowed.

    Notes
    -----
    Steps of about ``c min(1, t)``: uniform in ``max(t, 1) + log min(t, 1)``, so that ``c`` is about
    ``(horizon - 1 + log(1 / stop)) / n_steps``.

    References
    ----------
    Chen, Lee and Lu (2023), arXiv:2211.01916.

    Examples
    --------
    >>> [round(t, 3) for t in decreasing_times(6, 4.0, math.exp(-3)).tolist()]
    [4.0, 3.0, 2.0, 1.0, 0.368, 0.135, 0.05]
    """
    n = checks.integer("n_steps", n_steps, low=1)
    checks.positive("stop", stop)
    checks.between("horizon", horizon, stop, math.inf, inclusive="neither")

    def place(t: float) -> float:
        return max(t, 1.0) + math.log(min(t, 1.0))

    u = torch.linspace(place(horizon), place(stop), n + 1, dtype=torch.float64)
    times = torch.where(u > 1, u, (u - 1).exp())
    times[0], times[-1] = horizon, stop
    return times


@dataclass(frozen=True, eq=False)
class PathKL(Result):
    """The divergence between the reverse diffusion and its steps, over the paths.

    Attributes
    ----------
    value : float
        The estimate; by Girsanov's theorem it bounds the divergence of the end points that is due to the steps.
    standard_error : float
        Of the estimate.
    steps : Tensor, shape (steps,)
        What each step contributes.
    cost : Cost
        Rows evaluated.
    """

    value: float
    standard_error: float
    steps: Tensor
    cost: Cost = field(default_factory=Cost)


def path_kl(
    denoiser: Denoiser,
    times: Tensor,
    x0: Tensor,
    *,
    n_mc: int = 1000,
    generator: Seed = None,
) -> PathKL:
    """Measure the divergence that freezing the score over each step causes.

    Parameters
    ----------
    denoiser : Denoiser
        The network with its schedule; the exact one for the discretisation part alone.
    times : Tensor, shape (steps + 1,)
        Decreasing times of the schedule, the last with noise.
    x0 : Tensor, shape (m, ...)
        Data, from which rows are taken in turn.
    n_mc : int
        Paths, at least 2.
    generator : torch.Generator, int or None
        Draws the noise.

    Returns
    -------
    PathKL

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``sum_k int E|s(t, x_t) - s(t_k, x_{t_k})|^2 dt`` over the steps, along the forward process ``dx = -x dt + sqrt(2) dW``,
    four Gauss-Legendre points a step, the same path through them. A schedule that is not variance preserving is read in
    the Ornstein-Uhlenbeck clock ``log(1 + lam^2) / 2``.

    Cost: five rows a path and step.

    References
    ----------
    Chen, Lee and Lu (2023), arXiv:2211.01916.

    Examples
    --------
    >>> from perturbkit.core import OUSchedule
    >>> gaussian = Denoiser(lambda x, t: -x, OUSchedule(), predicts="score")  # data N(0, 1)
    >>> x0 = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> found = path_kl(gaussian, torch.tensor([1.0, 0.5]), x0, n_mc=4000, generator=1)
    >>> exact = 2 * (0.5 - 1 + math.exp(-0.5))
    >>> abs(found.value - exact) < 4 * found.standard_error
    True
    """
    check_start(denoiser, x0, times)
    n = checks.integer("n_mc", n_mc, low=2)
    check_noise_left(denoiser.schedule, times, "Stop early, as with decreasing_times.")
    g, calls = as_generator(generator), denoiser.nfev
    clean = x0[torch.arange(n, device=x0.device) % len(x0)]
    clock = _clock(denoiser.schedule, times.detach().to("cpu", torch.float64)).tolist()
    steps, rows = [], clean.new_zeros(n)
    for start, end in pairwise(clock):
        h = start - end
        # From the latest node up to the start of the step, each state noised into the next.
        places = [end + 0.5 * h * (1 + node) for node in _NODES] + [start]
        state, seen = clean, 0.0
        scores = []
        for t in places:
            kept = math.exp(seen - t)
            state = kept * state + math.sqrt(-math.expm1(2 * (seen - t))) * randn(
                state.shape, generator=g, like=state
            )
            scores.append(_score(denoiser, state, t))
            seen = t
        found = sum(
            0.5 * h * w * (s - scores[-1]).flatten(1).square().sum(1)
            for s, w in zip(scores, _WEIGHTS, strict=False)
        )
        rows = rows + found
        steps.append(found.mean())  # type: ignore[union-attr]
    return PathKL(
        float(rows.mean()),
        float(rows.std() / math.sqrt(n)),
        torch.stack(steps),
        Cost(nfev=denoiser.nfev - calls),
    )


def sample_reverse_sde(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    generator: Seed = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> SampleResult:
    """Draw by the reverse diffusion, the score frozen over each step.

    Parameters
    ----------
    denoiser : Denoiser
        The network with its schedule.
    x : Tensor, shape (n, ...)
        State at ``times[0]``, floating point.
    times : Tensor, shape (steps + 1,)
        Decreasing times; no noise may be left only at the last.
    generator : torch.Generator, int or None
        Source of the noise.
    callback : callable, optional
        Called as ``callback(i, x)`` after step ``i``.

    Returns
    -------
    SampleResult
        ``x`` at ``times[-1]``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the state or the times are not allowed.

    Notes
    -----
    In the Ornstein-Uhlenbeck clock, ``x' = e^h x + 2 (e^h - 1) s(t_k, x) + sqrt(e^{2h} - 1) xi``: the exponential integrator.
    Cost: one call a step.

    References
    ----------
    Chen, Lee and Lu (2023), arXiv:2211.01916.

    Examples
    --------
    >>> from perturbkit.core import OUSchedule
    >>> schedule = OUSchedule()
    >>> gaussian = Denoiser(lambda x, t: -x, schedule, predicts="score")  # data N(0, 1)
    >>> x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    >>> found = sample_reverse_sde(gaussian, x, decreasing_times(100, 8.0, 1e-3), generator=1)
    >>> round(float(found.x.std()), 1)
    1.0
    """
    check_start(denoiser, x, times)
    g, path, calls = as_generator(generator), Path(denoiser, times), denoiser.nfev
    for i, (s, t) in enumerate(pairwise(path.points)):
        h = 0.5 * (math.log1p(s.lam**2) - math.log1p(t.lam**2))
        unit, unit_next = (p.alpha * math.sqrt(1 + p.lam**2) for p in (s, t))
        eps = denoiser.eps(x, s.time)  # the score is -eps / sigma
        x = weighted(
            (unit_next * math.exp(h) / unit, x),
            (-2 * unit_next * unit * math.expm1(h) / s.sigma, eps),
            (unit_next * math.sqrt(math.expm1(2 * h)), randn(x.shape, generator=g, like=x)),
        )
        if callback is not None:
            callback(i, x)
    return path.result(x, denoiser.nfev - calls)


def _clock(schedule: Schedule, t: Tensor) -> Tensor:
    """Return the time of the Ornstein-Uhlenbeck process with the same noise level."""
    return 0.5 * torch.log1p(schedule.lam(t) ** 2)


def _score(denoiser: Denoiser, y: Tensor, clock: float) -> Tensor:
    """Return the score of the unit-variance state y = x / (alpha sqrt(1 + lam^2))."""
    schedule = denoiser.schedule
    lam = math.sqrt(math.expm1(2 * clock))
    t = float(schedule.time(lam))
    unit = float(schedule.alpha(t)) * math.sqrt(1 + lam**2)
    return unit * denoiser.score(unit * y, t)
