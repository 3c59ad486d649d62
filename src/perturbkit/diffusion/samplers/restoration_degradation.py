"""Restoration and degradation: a deterministic sampler for forward processes with any drift.

Use it to sample under a non-linear forward process, where DDIM's exact coefficients do not exist, and to see what a DDIM
step means: undo a stretch of noise, then put most of it back. It is a proof device rather than a fast solver: its order is
one half where Euler's on the probability flow is one. Chen, Daras and Dimakis (2023), Restoration-Degradation Beyond Linear
Diffusions: A Non-Asymptotic Analysis For DDIM-Type Samplers, arXiv:2303.03384.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from perturbkit.core import Cost, Result, SampleResult, Schedule, checks
from perturbkit.core.sampling import check_inside, check_times

__all__ = ["FlowError", "ForwardSDE", "probability_flow_error", "sample_restoration_degradation"]

Field = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class ForwardSDE:
    """A forward process ``dx = f(x, t) dt + g(t) dW`` with any drift.

    Attributes
    ----------
    drift : callable
        ``f(x, t)`` with ``x`` of shape (n, ...) and a float; answers in the shape of ``x``.
    diffusion : callable
        ``g(t)``, a float above zero.

    Examples
    --------
    >>> cubic = ForwardSDE(lambda x, t: -x**3 - x, lambda t: 2**0.5)
    >>> cubic.drift(torch.tensor([[2.0]]), 0.0).tolist()
    [[-10.0]]
    """

    drift: Field
    diffusion: Callable[[float], float]


def sample_restoration_degradation(
    score: Field,
    forward: ForwardSDE | Schedule,
    x: Tensor,
    times: Tensor,
    *,
    lookback: float | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> SampleResult:
    """Draw by restoring each state to an earlier time and degrading it again with the noise found.

    Parameters
    ----------
    score : callable
        ``score(x, t)``, the gradient of the log-density of the forward process at time ``t``; answers in the shape of
        ``x``. ``Denoiser.score`` is one.
    forward : ForwardSDE or Schedule
        The forward process. A schedule is a linear process, whose steps are taken with exact coefficients.
    x : Tensor, shape (n, ...)
        State at ``times[0]``, floating point.
    times : Tensor, shape (steps + 1,)
        Decreasing times, none below zero.
    lookback : float, optional
        How far to restore, in time: at least a step is, and at most all the way to 0. The square root of the step by
        default; ``math.inf`` restores to time 0, which with a schedule that has no noise there is DDIM.
    callback : callable, optional
        Called as ``callback(i, x)`` after step ``i``.

    Returns
    -------
    SampleResult
        ``x`` at ``times[-1]``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the process, the state, the times or the lookback are not allowed.

    Notes
    -----
    A step of size h looks back by l: ``r = x - l f(x, t) + l g^2 score(x, t)`` is one gradient step on
    ``log p(x_{t-l} | x_t)``; ``n = (x - r - l f(r, t - l)) / (g sqrt(l))`` is the noise that would lead from r to x; and
    ``x' = r + (l - h) f(r, t - l) + g sqrt(l - h) n`` uses it again for the shorter way. Since
    ``sqrt(l (l - h)) = l - h/2 + O(h^2 / l)`` this is Euler on the probability flow with a global error O(h / l + l), least
    at l of the order of sqrt(h). For a schedule, r is the exact posterior mean.

    Cost: one score and two drifts a step.

    References
    ----------
    Chen, Daras and Dimakis (2023), arXiv:2303.03384.

    Examples
    --------
    >>> from perturbkit.core import VPSchedule
    >>> x = torch.tensor([[1.0]], dtype=torch.float64)
    >>> times = VPSchedule().times(50, spacing="time")
    >>> round(float(sample_restoration_degradation(lambda x, t: -x, VPSchedule(), x, times).x), 2)  # data N(0, 1): 1
    0.9
    """
    checks.tensor("x", x)
    check_times(times)
    if not isinstance(forward, ForwardSDE | Schedule):
        raise checks.ArgumentTypeError(
            f"forward is a {type(forward).__name__}; allowed: a ForwardSDE or a Schedule. Pass ForwardSDE(drift, diffusion)."
        )
    if isinstance(forward, Schedule):
        check_inside(forward, times)
    if lookback is not None and lookback != math.inf:
        checks.positive("lookback", lookback)
    grid = times.detach().to("cpu", torch.float64)
    points = grid.tolist()
    for i, (t, t_next) in enumerate(pairwise(points)):
        h = t - t_next
        wanted = math.sqrt(h) if lookback is None else lookback
        back = min(max(wanted, h), t)
        if isinstance(forward, Schedule):
            x = _linear_step(score, forward, x, t, h, back)
        else:
            x = _step(score, forward, x, t, h, back)
        if callback is not None:
            callback(i, x)
    return SampleResult(x, grid, Cost(nfev=len(x) * (len(points) - 1)))


@dataclass(frozen=True)
class FlowError(Result):
    """How far samples are from the probability flow's.

    Attributes
    ----------
    rmse : float
        Root mean square distance between each sample and the end of the exact flow from its start; at least ``w2``.
    w2 : float
        Wasserstein-2 distance between the two sets of samples.
    """

    rmse: float
    w2: float


def probability_flow_error(
    sampled: Tensor,
    score: Field,
    forward: ForwardSDE | Schedule,
    start: Tensor,
    times: Tensor,
    *,
    rtol: float = 1e-8,
) -> FlowError:
    """Compare samples with the exact probability flow from the same starts.

    Parameters
    ----------
    sampled : Tensor, shape (n, ...)
        What a sampler returned from ``start`` over ``times``.
    score : callable
        As for :func:`sample_restoration_degradation`.
    forward : ForwardSDE or Schedule
        The forward process.
    start : Tensor, shape (n, ...)
        The states at ``times[0]``.
    times : Tensor, shape (steps + 1,)
        Only both ends are used; the last must be above 0 if the score is infinite there.
    rtol : float
        Tolerance of the reference solver, relative and absolute.

    Returns
    -------
    FlowError

    Raises
    ------
    ArgumentError, ArgumentTypeError, ModelError
        If shapes or times are not allowed, or the reference cannot be computed.

    Notes
    -----
    The reference solves ``dx/dt = f - g^2 score / 2`` with SciPy's DOP853. The Wasserstein distance is that of the best
    assignment, with a cost cubic in n for more than one dimension.

    References
    ----------
    Chen, Daras and Dimakis (2023), arXiv:2303.03384.

    Examples
    --------
    >>> still = ForwardSDE(lambda x, t: -x, lambda t: 2**0.5)
    >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    >>> probability_flow_error(x.flip(0), lambda x, t: -x, still, x, torch.tensor([1.0, 0.5]))
    FlowError(rmse=1.0, w2=0.0)
    """
    checks.tensor("start", start)
    checks.same_shape("sampled", sampled, "start", start)
    check_times(times)
    checks.positive("rtol", rtol)
    shape, dtype, device = start.shape, start.dtype, start.device

    def flow(t: float, flat: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(flat.copy()).reshape(shape).to(device, dtype)
        f, g2 = _coefficients(forward, x, t)
        return (f - 0.5 * g2 * score(x, t)).double().cpu().numpy().ravel()

    ends = (float(times[0]), float(times[-1]))
    solved = solve_ivp(
        flow, ends, start.double().cpu().numpy().ravel(), method="DOP853", rtol=rtol, atol=rtol
    )
    if not solved.success:
        raise checks.ModelError(
            f"the reference flow stopped at t={solved.t[-1]:g} ({solved.message}); allowed: a score that is finite down to "
            f"times[-1]={ends[1]:g}. End the times earlier."
        )
    exact = solved.y[:, -1].reshape(len(start), -1)
    found = sampled.double().cpu().numpy().reshape(len(start), -1)
    if exact.shape[1] == 1:
        matched = np.sort(found, 0) - np.sort(exact, 0)
    else:
        cost = torch.cdist(torch.from_numpy(found), torch.from_numpy(exact)).square().numpy()
        rows, columns = linear_sum_assignment(cost)
        matched = found[rows] - exact[columns]
    return FlowError(
        rmse=float(np.sqrt(((found - exact) ** 2).sum(1).mean())),
        w2=float(np.sqrt((matched**2).sum(1).mean())),
    )


def _step(score: Field, forward: ForwardSDE, x: Tensor, t: float, h: float, back: float) -> Tensor:
    g = checks.positive("diffusion(t)", float(forward.diffusion(t)))
    restored = x - back * forward.drift(x, t) + (back * g**2) * score(x, t)
    # The drift of the way back must be that at the restored point, or a non-linear one costs an order.
    drift = forward.drift(restored, t - back)
    noise = (x - restored - back * drift) / (g * math.sqrt(back))
    return restored + (back - h) * drift + (g * math.sqrt(max(back - h, 0.0))) * noise


def _linear_step(score: Field, forward: Schedule, x: Tensor, t: float, h: float, back: float) -> Tensor:
    signal, variance = _transition(forward, t - back, t)
    restored = (x + variance * score(x, t)) / signal
    noise = (x - signal * restored) / math.sqrt(variance)
    signal, variance = _transition(forward, t - back, t - h)
    return signal * restored + math.sqrt(max(variance, 0.0)) * noise


def _transition(schedule: Schedule, s: float, t: float) -> tuple[float, float]:
    """Return a and v of ``x_t = a x_s + sqrt(v) n``."""
    signal = float((schedule.log_alpha(t) - schedule.log_alpha(s)).exp())
    return signal, float(schedule.sigma(t)) ** 2 - (signal * float(schedule.sigma(s))) ** 2


def _coefficients(forward: ForwardSDE | Schedule, x: Tensor, t: float) -> tuple[Tensor, float]:
    """Return the drift and the squared diffusion."""
    if isinstance(forward, ForwardSDE):
        return forward.drift(x, t), float(forward.diffusion(t)) ** 2
    sigma = float(forward.sigma(t))
    rate, sigma_rate = (float(r) for r in forward.rates(t))
    rate /= float(forward.alpha(t))
    return rate * x, 2 * sigma * (sigma_rate - rate * sigma)
