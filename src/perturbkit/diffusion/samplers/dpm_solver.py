"""DPM-Solver: single-step exponential integrators of the probability flow, of order one to three.

Use it for pretrained models at 10 to 50 calls. Lu, Zhou, Bao, Chen, Li and Zhu (2022), DPM-Solver: A Fast ODE Solver
for Diffusion Probabilistic Model Sampling in Around 10 Steps, arXiv:2206.00927.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from perturbkit.core import Cost, Denoiser, SampleResult, checks
from perturbkit.core.random import Seed
from perturbkit.core.sampling import Path, Point, check_noise_left, check_start, weighted

__all__ = ["sample_dpm_solver", "sample_dpm_solver_adaptive", "sample_dpm_solver_fast"]

# Where in a step, in log(alpha / sigma), each order evaluates besides its start.
_SHARES: dict[int, tuple[float, ...]] = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}

Order = Literal[1, 2, 3]


def sample_dpm_solver(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    order: Order = 3,
    generator: Seed = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> SampleResult:
    """Follow the probability flow by steps of one order.

    Parameters
    ----------
    denoiser : Denoiser
        The network with its schedule; read as a noise prediction.
    x : Tensor, shape (n, ...)
        State at ``times[0]``, floating point.
    times : Tensor, shape (steps + 1,)
        Decreasing times with ``sigma > 0``; uniform in log-SNR is the paper's choice.
    order : {1, 2, 3}
        Calls of the denoiser a step, and order of the error. Order 1 is DDIM.
    generator : torch.Generator, int or None
        Not used: the sampler is deterministic. Accepted so that samplers can be exchanged.
    callback : callable, optional
        Called as ``callback(i, x)`` after step ``i``.

    Returns
    -------
    SampleResult
        ``x`` at ``times[-1]``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the state, the times or the order are not allowed.

    Notes
    -----
    With ``l = log(alpha / sigma)`` the flow solves exactly
    ``x_t = (alpha_t / alpha_s) x_s - alpha_t int_{l_s}^{l_t} e^{-l} eps dl``; order k expands ``eps`` in ``l`` to k
    terms from values inside the step.

    Cost: ``order`` calls a step; error O(h^order) in the step h of l. At 6 to 10 calls the higher orders need not be
    better than DDIM; from about 15 they are.

    References
    ----------
    Lu et al. (2022), arXiv:2206.00927, algorithms 1 and 2.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> schedule = EDMSchedule()
    >>> gaussian = Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), schedule, predicts="x0")  # data N(0, 1)
    >>> x = torch.tensor([[80.0]], dtype=torch.float64)
    >>> round(float(sample_dpm_solver(gaussian, x, schedule.times(20, t_end=1e-3)).x), 3)
    1.0
    """
    check_start(denoiser, x, times)
    checks.one_of("order", order, (1, 2, 3))
    check_noise_left(denoiser.schedule, times, "End at 1e-3, or take sample_ddim for the last step.")
    path, calls = Path(denoiser, times), denoiser.nfev
    inner = [path.between(share) for share in _SHARES[order]]
    for i in range(path.n_steps):
        x = _step(denoiser, x, path.points[i], path.points[i + 1], [m[i] for m in inner])[0]
        if callback is not None:
            callback(i, x)
    return path.result(x, denoiser.nfev - calls)


def sample_dpm_solver_fast(
    denoiser: Denoiser,
    x: Tensor,
    n_evaluations: int,
    t_start: float | None = None,
    t_end: float = 1e-3,
    *,
    callback: Callable[[int, Tensor], None] | None = None,
) -> SampleResult:
    """Spend a budget of calls on steps of order three and a remainder, uniform in log-SNR.

    Parameters
    ----------
    denoiser, x, callback
        As in :func:`sample_dpm_solver`.
    n_evaluations : int
        Calls of the denoiser, at least 1, all of them used.
    t_start, t_end : float
        First and last time; the schedule's last time by default.

    Returns
    -------
    SampleResult

    Notes
    -----
    A budget K that leaves 0, 1 or 2 when divided by 3 takes K/3 - 1 steps of order 3 and one each of 2 and 1; or
    floor(K/3) of order 3 and one of order 1; or floor(K/3) of order 3 and one of order 2.

    References
    ----------
    Lu et al. (2022), arXiv:2206.00927, section 3.4.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> gaussian = Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), EDMSchedule(), predicts="x0")
    >>> found = sample_dpm_solver_fast(gaussian, torch.tensor([[80.0]], dtype=torch.float64), 30)
    >>> found.cost.nfev, round(float(found.x), 2)
    (30, 1.0)
    """
    k = checks.integer("n_evaluations", n_evaluations, low=1)
    rest = {0: [2, 1], 1: [1], 2: [2]}[k % 3]
    orders = [3] * ((k - sum(rest)) // 3) + rest
    times = denoiser.schedule.times(len(orders), t_start=t_start, t_end=t_end)
    check_start(denoiser, x, times)
    path, calls = Path(denoiser, times), denoiser.nfev
    inner = {order: [path.between(share) for share in _SHARES[order]] for order in set(orders)}
    for i, order in enumerate(orders):
        x = _step(denoiser, x, path.points[i], path.points[i + 1], [m[i] for m in inner[order]])[0]
        if callback is not None:
            callback(i, x)
    return path.result(x, denoiser.nfev - calls)


def sample_dpm_solver_adaptive(
    denoiser: Denoiser,
    x: Tensor,
    t_start: float | None = None,
    t_end: float = 1e-3,
    *,
    order: Literal[2, 3] = 3,
    atol: float = 0.0078,
    rtol: float = 0.05,
    first_step: float = 0.05,
    max_steps: int = 10_000,
) -> SampleResult:
    """Choose the steps by an embedded error estimate, one step size for the whole batch.

    Parameters
    ----------
    denoiser, x
        As in :func:`sample_dpm_solver`.
    t_start, t_end : float
        First and last time.
    order : {2, 3}
        The higher order of the pair (1, 2) or (2, 3).
    atol, rtol : float
        Tolerances of a step, above 0; 0.0078 is one grey level of images in [-1, 1].
    first_step : float
        First step of log(alpha / sigma), above 0.
    max_steps : int
        Steps tried at most, at least 1.

    Returns
    -------
    SampleResult
        ``extras["n_accepted"]`` and ``extras["n_rejected"]`` count the steps.

    Raises
    ------
    ArgumentError
        If an option is not allowed, or the end is not reached in ``max_steps``.

    Notes
    -----
    ``E = ||(x_high - x_low) / max(atol, rtol max(|x_low|, |x_previous|))|| / sqrt(d)``, the largest over the batch;
    a step is kept if ``E <= 1`` and the next is ``0.9 E^(-1/order)`` times as long.

    References
    ----------
    Lu et al. (2022), arXiv:2206.00927, appendix C.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> gaussian = Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), EDMSchedule(), predicts="x0")
    >>> found = sample_dpm_solver_adaptive(gaussian, torch.tensor([[80.0]], dtype=torch.float64), rtol=1e-3, atol=1e-4)
    >>> round(float(found.x), 3)
    1.0
    """
    schedule = denoiser.schedule
    ends = schedule.times(1, t_start=t_start, t_end=t_end)
    check_start(denoiser, x, ends)
    checks.one_of("order", order, (2, 3))
    checks.positive("atol", atol)
    checks.positive("rtol", rtol)
    h = checks.positive("first_step", first_step)
    checks.integer("max_steps", max_steps, low=1)
    calls, accepted, rejected = denoiser.nfev, 0, 0
    here, last = (Point.at(schedule, float(t)) for t in ends)
    visited, previous = [here.time], x
    while here.lam > last.lam:
        if accepted + rejected == max_steps:
            raise checks.ArgumentError(
                f"max_steps is {max_steps}, and time {here.time:g} is reached; allowed: enough to reach {t_end:g}. "
                "Raise max_steps or the tolerances."
            )
        lam = here.lam * math.exp(-h)
        there = last if lam <= last.lam else Point.at(schedule, float(schedule.time(lam)))
        length = math.log(here.lam / there.lam)
        inner = [
            Point.at(schedule, float(schedule.time(here.lam * math.exp(-share * length))))
            for share in _SHARES[order]
        ]
        high, low = _step(denoiser, x, here, there, inner)
        scale = torch.clamp(rtol * torch.maximum(low.abs(), previous.abs()), min=atol)
        error = float(((high - low) / scale).flatten(1).square().mean(1).sqrt().max())
        if error <= 1:
            x, previous, here = high, low, there
            visited.append(here.time)
            accepted += 1
        else:
            rejected += 1
        h = min(
            0.9 * h * max(error, 1e-10) ** (-1 / order), math.log(max(here.lam / last.lam, 1 + 1e-12)) + 1e-9
        )
    extras = {"n_accepted": accepted, "n_rejected": rejected}
    return SampleResult(
        x, torch.tensor(visited, dtype=torch.float64), Cost(nfev=denoiser.nfev - calls), extras
    )


def _step(denoiser: Denoiser, x: Tensor, s: Point, t: Point, inner: list[Point]) -> tuple[Tensor, Tensor]:
    """Return the state at ``t`` by one order more than there are points inside, and by the order below."""
    h = math.log(s.lam / t.lam)
    ratio, growth = t.alpha / s.alpha, math.expm1(h)
    eps = denoiser.eps(x, s.time)
    first = weighted((ratio, x), (-t.sigma * growth, eps))
    if not inner:
        return first, first
    r1, m = _SHARES[len(inner) + 1][0], inner[0]
    u = weighted((m.alpha / s.alpha, x), (-m.sigma * math.expm1(r1 * h), eps))
    change = denoiser.eps(u, m.time) - eps
    second = torch.add(first, change, alpha=-t.sigma * growth / (2 * r1))
    if len(inner) == 1:
        return second, first
    r2, m = _SHARES[3][1], inner[1]
    weight = math.expm1(r2 * h) / (r2 * h) - 1
    u = weighted(
        (m.alpha / s.alpha, x), (-m.sigma * math.expm1(r2 * h), eps), (-m.sigma * r2 / r1 * weight, change)
    )
    change = denoiser.eps(u, m.time) - eps
    return torch.add(first, change, alpha=-t.sigma / r2 * (growth / h - 1)), second
