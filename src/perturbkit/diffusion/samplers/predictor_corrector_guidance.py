"""Classifier-free guidance, and the predictor-corrector that it is.

Use :func:`sample_guided` for guidance as it is commonly run, and :func:`sample_pcg` where the law that is sampled should be
understood, or moved towards the powered density by more corrector steps. Bradley and Nakkiran (2024), Classifier-Free
Guidance is a Predictor-Corrector, arXiv:2408.09000.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from perturbkit.core import Denoiser, SampleResult, checks
from perturbkit.core.random import Seed, as_generator, randn
from perturbkit.core.sampling import Path, Point, check_start, transfer

__all__ = ["guided_gaussian_variance", "sample_guided", "sample_pcg"]

Callback = Callable[[int, Tensor], None]


def sample_guided(
    conditional: Denoiser,
    unconditional: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    weight: float,
    sampler: Literal["ddim", "ddpm"] = "ddim",
    generator: Seed = None,
    callback: Callback | None = None,
) -> SampleResult:
    """Sample with the guided noise prediction ``w eps_c + (1 - w) eps_u``.

    Parameters
    ----------
    conditional, unconditional : Denoiser
        The two networks, of one schedule.
    x : Tensor, shape (n, ...)
        State at ``times[0]``, floating point.
    times : Tensor, shape (steps + 1,)
        Decreasing times.
    weight : float
        ``w``, zero or above: 1 is conditional sampling, more is guidance.
    sampler : {"ddim", "ddpm"}
        Deterministic steps, or ancestral ones.
    generator : torch.Generator, int or None
        Source of the fresh noise of "ddpm".
    callback : callable, optional
        Called as ``callback(i, x)`` after step ``i``.

    Returns
    -------
    SampleResult
        ``x`` at ``times[-1]``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the state, the times or the weight are not allowed.

    Notes
    -----
    Neither sampler draws from ``p(x|c)^w p(x)^(1-w)``, and the two differ: see :func:`guided_gaussian_variance`.

    Cost: two calls a step, one of each network.

    References
    ----------
    Bradley and Nakkiran (2024), arXiv:2408.09000, section 2.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> s = EDMSchedule(10.0)
    >>> narrow = Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), s, predicts="x0")  # N(0, 1)
    >>> wide = Denoiser(lambda x, t: 2 * x / (2 + t[:, None] ** 2), s, predicts="x0")  # N(0, 2)
    >>> x = torch.tensor([[10.0]], dtype=torch.float64)
    >>> round(float(sample_guided(narrow, wide, x, s.times(200, t_end=1e-3), weight=3.0).x), 1)
    0.5
    """
    _check(conditional, unconditional, x, times, weight)
    checks.one_of("sampler", sampler, ("ddim", "ddpm"))
    g = as_generator(generator)
    path, calls = Path(conditional, times), _calls(conditional, unconditional)
    for i in range(path.n_steps):
        s, t = path.points[i], path.points[i + 1]
        eps = _guided(conditional, unconditional, x, s.time, weight)
        if sampler == "ddim":
            x = transfer(x, eps, s, t)
        else:
            noise = t.sigma * math.sqrt(max(0.0, 1 - (t.lam / s.lam) ** 2))
            kept = math.sqrt(max(0.0, t.sigma**2 - noise**2))
            x = (t.alpha / s.alpha) * x + (kept - t.alpha * s.lam) * eps
            x = x + noise * randn(x.shape, generator=g, like=x)
        if callback is not None:
            callback(i, x)
    return path.result(x, _calls(conditional, unconditional) - calls)


def sample_pcg(
    conditional: Denoiser,
    unconditional: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    weight: float,
    langevin_steps: int = 1,
    generator: Seed = None,
    callback: Callback | None = None,
) -> SampleResult:
    """Sample by a conditional DDIM step and Langevin steps towards the powered density of the same noise level.

    Parameters
    ----------
    conditional, unconditional : Denoiser
        The two networks, of one schedule.
    x : Tensor, shape (n, ...)
        State at ``times[0]``, floating point.
    times : Tensor, shape (steps + 1,)
        Decreasing times.
    weight : float
        Power ``w`` of the density ``p_t(x|c)^w p_t(x)^(1-w)`` that the corrector targets, zero or above.
    langevin_steps : int
        Corrector steps after each predictor, zero or more.
    generator : torch.Generator, int or None
        Source of the corrector's noise.
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
    The corrector is ``x <- x + (b / 2) s_w + sqrt(b) xi`` with ``b = alpha_t^2 (lam_s^2 - lam_t^2)``, the variance that the
    forward process adds over the step. With one corrector step and steps going to zero this is ancestral guidance of
    weight ``(w + 1) / 2``: that is, ``sample_guided(weight=v, sampler="ddpm")`` is ``sample_pcg(weight=2 v - 1)``. More
    corrector steps move the law towards the powered density.

    Cost: ``1 + 2 langevin_steps`` calls a step.

    References
    ----------
    Bradley and Nakkiran (2024), arXiv:2408.09000, algorithm 1 and theorem 3.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> s = EDMSchedule(10.0)
    >>> normal = Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), s, predicts="x0")
    >>> x = 10 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> drawn = sample_pcg(normal, normal, x, s.times(100, t_end=0.01), weight=2.0, generator=1).x
    >>> abs(float(drawn.std()) - 1.0) < 0.06
    True
    """
    _check(conditional, unconditional, x, times, weight)
    checks.integer("langevin_steps", langevin_steps, low=0)
    g = as_generator(generator)
    path, calls = Path(conditional, times), _calls(conditional, unconditional)
    for i in range(path.n_steps):
        s, t = path.points[i], path.points[i + 1]
        x = transfer(x, conditional.eps(x, s.time), s, t)
        for _ in range(langevin_steps if t.sigma > 0 else 0):
            x = _correct(conditional, unconditional, x, s, t, weight, g)
        if callback is not None:
            callback(i, x)
    return path.result(x, _calls(conditional, unconditional) - calls)


def guided_gaussian_variance(weight: float, rule: Literal["ddim", "ddpm", "gamma_powered"]) -> float:
    """Return the variance that guidance gives where everything is Gaussian, in closed form.

    Parameters
    ----------
    weight : float
        ``w``, at least 1.
    rule : {"ddim", "ddpm", "gamma_powered"}
        Guidance with deterministic steps, with ancestral steps, or the density ``p(x|c)^w p(x)^(1-w)``.

    Returns
    -------
    float

    Notes
    -----
    For ``x|c ~ N(c, 1)``, ``c ~ N(0, 1)`` at ``c = 0``, under a variance-exploding schedule from infinite noise:
    ``2^(1-w)``, ``(2 - 2^(2-2w)) / (2 w - 1)`` and ``2 / (w + 1)``.

    References
    ----------
    Bradley and Nakkiran (2024), arXiv:2408.09000, theorem 2.

    Examples
    --------
    >>> [round(guided_gaussian_variance(3.0, r), 3) for r in ("ddim", "ddpm", "gamma_powered")]
    [0.25, 0.388, 0.5]
    """
    w = checks.between("weight", weight, 1, math.inf)
    checks.one_of("rule", rule, ("ddim", "ddpm", "gamma_powered"))
    if rule == "ddim":
        return 2.0 ** (1 - w)
    if rule == "ddpm":
        return (2 - 2.0 ** (2 - 2 * w)) / (2 * w - 1)
    return 2 / (w + 1)


def _correct(
    conditional: Denoiser,
    unconditional: Denoiser,
    x: Tensor,
    s: Point,
    t: Point,
    weight: float,
    generator: torch.Generator,
) -> Tensor:
    step = t.alpha**2 * (s.lam**2 - t.lam**2)
    score = _guided(conditional, unconditional, x, t.time, weight) / -t.sigma
    noise = randn(x.shape, generator=generator, like=x)
    return x + (step / 2) * score + math.sqrt(step) * noise


def _guided(conditional: Denoiser, unconditional: Denoiser, x: Tensor, t: float, weight: float) -> Tensor:
    with_, without = conditional.eps(x, t), unconditional.eps(x, t)
    return without + weight * (with_ - without)


def _check(conditional: Denoiser, unconditional: Denoiser, x: Tensor, times: Tensor, weight: float) -> None:
    check_start(conditional, x, times)
    check_start(unconditional, x, times)
    checks.nonnegative("weight", weight)


def _calls(conditional: Denoiser, unconditional: Denoiser) -> int:
    return conditional.nfev + (0 if unconditional is conditional else unconditional.nfev)
