"""Heun's sampler: second order with two calls a step, and as much fresh noise as is asked for.

Use it as the plain second-order sampler, and with ``churn`` where fresh noise corrects what a network gets wrong. Karras,
Aittala, Aila and Laine (2022), Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from perturbkit.core import Denoiser, SampleResult, checks
from perturbkit.core.random import Seed, as_generator, randn
from perturbkit.core.sampling import Path, Point, check_start, transfer

__all__ = ["sample_heun"]


def sample_heun(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    noise_scale: float = 1.0,
    generator: Seed = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> SampleResult:
    """Follow the probability flow from noise to data by Heun's steps in the noise level, stirred if asked for.

    Parameters
    ----------
    denoiser : Denoiser
        The network with its schedule.
    x : Tensor, shape (n, ...)
        State at ``times[0]``, floating point.
    times : Tensor, shape (steps + 1,)
        Decreasing times; the last may be 0.
    churn : float
        Fresh noise of the whole path, zero or above; 0 is deterministic.
    churn_min, churn_max : float
        Noise levels ``sigma / alpha`` between which noise is added.
    noise_scale : float
        Factor of the deviation of the fresh noise, positive; a little above 1 makes up for networks that remove too much.
    generator : torch.Generator, int or None
        Source of the fresh noise.
    callback : callable, optional
        Called as ``callback(i, x)`` after step ``i``.

    Returns
    -------
    SampleResult
        ``x`` at ``times[-1]``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the state, the times or an option are not allowed.

    Notes
    -----
    With ``lam = sigma / alpha`` and ``z = x / alpha``, a step raises the level to ``(1 + gamma) lam``,
    ``gamma = min(churn / steps, sqrt(2) - 1)``, by noise, at most to that of the schedule's last time, and goes down by
    ``z' = z + (lam' - lam) (eps(z, lam) + eps(z + (lam' - lam) eps(z, lam), lam')) / 2``. A step to no noise at all is Euler's.

    Cost: two calls a step, one in a last step to zero; error O(step^2).

    References
    ----------
    Karras, Aittala, Aila and Laine (2022), arXiv:2206.00364, algorithm 2.

    Examples
    --------
    >>> import torch
    >>> from perturbkit.core import EDMSchedule
    >>> schedule = EDMSchedule()
    >>> gaussian = Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), schedule, predicts="x0")  # data N(0, 1)
    >>> x = torch.tensor([[80.0]], dtype=torch.float64)
    >>> round(float(sample_heun(gaussian, x, schedule.times(40, t_end=1e-3)).x), 2)
    1.0
    """
    check_start(denoiser, x, times)
    checks.nonnegative("churn", churn)
    checks.nonnegative("churn_min", churn_min)
    if churn_max != math.inf:
        checks.between("churn_max", churn_max, churn_min, math.inf)
    checks.positive("noise_scale", noise_scale)
    g = as_generator(generator)
    path, calls = Path(denoiser, times), denoiser.nfev
    gamma = min(churn / path.n_steps, math.sqrt(2) - 1)
    ceiling = float(denoiser.schedule.lam(denoiser.schedule.t_max))
    for i in range(path.n_steps):
        s, t = path.points[i], path.points[i + 1]
        if gamma > 0 and churn_min <= s.lam <= churn_max:
            x, s = _stirred(denoiser, x, s, min((1 + gamma) * s.lam, max(s.lam, ceiling)), noise_scale, g)
        eps = denoiser.eps(x, s.time)
        ahead = transfer(x, eps, s, t)
        if t.sigma > 0:
            ahead = transfer(x, 0.5 * (eps + denoiser.eps(ahead, t.time)), s, t)
        x = ahead
        if callback is not None:
            callback(i, x)
    return path.result(x, denoiser.nfev - calls)


def _stirred(
    denoiser: Denoiser, x: Tensor, s: Point, lam: float, noise_scale: float, generator: torch.Generator
) -> tuple[Tensor, Point]:
    """Raise the noise level of a state to ``lam``."""
    higher = Point.at(denoiser.schedule, float(denoiser.schedule.time(lam)))
    fresh = math.sqrt(max(0.0, higher.lam**2 - s.lam**2)) * noise_scale
    noise = randn(x.shape, generator=generator, like=x)
    return higher.alpha * (x / s.alpha + fresh * noise), higher
