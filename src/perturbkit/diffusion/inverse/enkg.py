"""EnKG: an ensemble of particles that answers a measurement nobody can differentiate.

Use it where the forward model is a simulator or an instrument and many calls of it are cheap enough. Zheng, Chu, Wang,
Kovachki, Baptista and Yue (2025), Ensemble Kalman Diffusion Guidance: A Derivative-free Method for Inverse Problems,
arXiv:2409.20175.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from perturbkit.core import Cost, Denoiser, SampleResult, checks
from perturbkit.core.sampling import Path, Point, check_noise_left, check_start, transfer

__all__ = ["sample_enkg"]


@torch.no_grad()
def sample_enkg(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    forward: Callable[[Tensor], Tensor],
    y: Tensor,
    *,
    guidance: float = 1.0,
    n_updates: int = 1,
    window: tuple[float, float] = (0.1, 0.9),
    ode_steps: int | Literal["auto"] = "auto",
    noise_precision: Tensor | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> SampleResult:
    """Sample given a measurement, with values of the forward model alone.

    Parameters
    ----------
    denoiser : Denoiser
        The prior.
    x : Tensor, shape (J, ...)
        The ensemble at ``times[0]``, at least two particles. Guidance moves it inside its own span: take more particles
        than dimensions, or than the prior has degrees of freedom.
    times : Tensor, shape (steps + 1,)
        Decreasing times that end with some noise left; Karras spacing in the paper.
    forward : callable
        Maps clean states (J, ...) to measurements (J, ...); only ever called.
    y : Tensor, shape of one row of ``forward``'s answer
        What was measured.
    guidance : float
        Length of an update, 0 or more.
    n_updates : int
        Updates a step, at least 1.
    window : (float, float)
        The steps, as fractions of the run, that are guided. The length of an update does not shrink as it converges: leave
        the last steps to the prior.
    ode_steps : int or "auto"
        Calls of the denoiser that take a particle to its clean state; "auto" is ``min(1 + (steps - i) // 4, 20)``.
    noise_precision : Tensor of shape (m,) or (m, m), optional
        Inverse covariance of the measurement's noise (of its diagonal, or whole); its scale does not matter.
    callback : callable, optional
        Called as ``callback(i, x)`` after step ``i``.

    Returns
    -------
    SampleResult
        ``x`` at ``times[-1]``; ``extras`` has ``misfit``, the norm of ``forward(x) - y`` a particle, and
        ``nfev_forward``, the rows that ``forward`` was asked.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the ensemble, the times, the measurement or an option is not allowed.
    ModelError
        If the forward model answers NaN or infinity.

    Notes
    -----
    With clean states ``h_j`` at the end of the particles' own probability flow, ``y_j = forward(h_j)`` and bars for means,

    ``x_j <- x_j - guidance / ||C||_F sum_k C_jk (x_k - x_bar)``, ``C_jk = <P (y_j - y), y_k - y_bar> / J``,

    with the precision ``P`` of the noise:
    the covariance of state and measurement takes the place of the Jacobian, so that for a linear model this is a gradient
    step preconditioned by the ensemble's covariance. Then one Euler step of the flow for all.

    Cost: a guided step takes ``J (1 + ode_steps n_updates)`` rows of the denoiser and ``J n_updates`` of ``forward``, and
    ``J^2 (m + d)`` operations.

    References
    ----------
    Zheng et al. (2025), arXiv:2409.20175, algorithm 1.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> from perturbkit.core.random import as_generator, randn
    >>> schedule = EDMSchedule(10.0)
    >>> prior = Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), schedule, predicts="x0")  # N(0, I)
    >>> start = 10 * randn((64, 2), generator=as_generator(0))
    >>> times = schedule.times(30, t_end=0.01, spacing="karras")
    >>> found = sample_enkg(prior, start, times, lambda x: x[:, :1] ** 3, torch.tensor([1.0]))
    >>> bool((found.x[:, 0].mean() - 1).abs() < 0.2), bool((found.x[:, 1].std() - 1).abs() < 0.3)
    (True, True)
    """
    check_start(denoiser, x, times)
    check_noise_left(denoiser.schedule, times, "Pass t_end above 0.")
    checks.nonnegative("guidance", guidance)
    checks.integer("n_updates", n_updates, low=1)
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise checks.ArgumentTypeError(
            f"window is {window!r}; allowed: two fractions of the run. Pass (0.1, 0.9)."
        )
    first = checks.between("window[0]", window[0], 0, 1)
    last = checks.between("window[1]", window[1], first, 1)
    if ode_steps != "auto":
        checks.integer("ode_steps", ode_steps, low=1)
    if len(x) < 2:
        raise checks.ArgumentError(
            f"x has {len(x)} particle; allowed: at least two, from which a covariance is taken. Draw an ensemble."
        )
    precision = _precision(noise_precision, checks.tensor("y", y))
    path, calls, asked = Path(denoiser, times), denoiser.nfev, 0
    for i in range(path.n_steps):
        if guidance > 0 and first <= i / path.n_steps < last:
            k = min(1 + (path.n_steps - i) // 4, 20) if ode_steps == "auto" else ode_steps
            levels = _levels(path, i, k)
            for _ in range(n_updates):
                answers = _answers(forward, _clean(denoiser, x, levels), y)
                x = _updated(x, answers, y, guidance, precision)
                asked += len(x)
        x = transfer(x, denoiser.eps(x, path.times[i]), path.points[i], path.points[i + 1])
        if callback is not None:
            callback(i, x)
    misfit = (_answers(forward, x, y) - y.to(x)).reshape(len(x), -1).norm(dim=1)
    result = path.result(x, denoiser.nfev - calls)
    extras = {"misfit": misfit, "nfev_forward": asked + len(x)}
    return SampleResult(x, result.times, Cost(nfev=result.cost.nfev), extras)


def _precision(given: Tensor | None, y: Tensor) -> Tensor | None:
    """Return the weights of the measurements' errors, checked against their number."""
    m = y.numel()
    if given is None:
        return None
    checks.tensor("noise_precision", given, ndim=(1, 2))
    if given.shape not in ((m,), (m, m)):
        raise checks.ArgumentError(
            f"noise_precision has shape {tuple(given.shape)}; allowed: ({m},) or ({m}, {m}) for {m} measurements. Pass the "
            "inverse variances or the inverse covariance."
        )
    return given


def _levels(path: Path, i: int, k: int) -> list[Point]:
    """Return ``k`` levels from that of step ``i`` to the last of the run, in Karras spacing."""
    now, end = path.points[i], path.points[-1]
    if k == 1:
        return [now]
    grid = path.schedule.times(k - 1, t_start=now.time, t_end=end.time, spacing="karras")
    return [Point.at(path.schedule, t) for t in grid.tolist()]


def _clean(denoiser: Denoiser, x: Tensor, levels: list[Point]) -> Tensor:
    """Return the clean states at the end of the flow, by Euler steps and the denoiser's answer at the last level."""
    for s, t in itertools.pairwise(levels):
        x = transfer(x, denoiser.eps(x, s.time), s, t)
    return denoiser.x0(x, levels[-1].time)


def _answers(forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return what the forward model says, checked against the measurement's shape."""
    found = torch.as_tensor(forward(x)).to(x)
    if found.shape != (len(x), *y.shape):
        raise checks.ArgumentError(
            f"y has shape {tuple(y.shape)}, but forward answered {tuple(found.shape)} to {len(x)} rows; allowed: y in the shape "
            "of one row of the answer. Pass y without a batch dimension."
        )
    if not bool(torch.isfinite(found).all()):
        wrong = int((~torch.isfinite(found)).reshape(len(x), -1).any(1).sum())
        raise checks.ModelError(
            f"forward answered NaN or infinity to {wrong} of {len(x)} rows; allowed: finite numbers, since every particle moves by "
            "those of all. Bound its inputs, or lower guidance."
        )
    return found


def _updated(x: Tensor, answers: Tensor, y: Tensor, guidance: float, precision: Tensor | None) -> Tensor:
    """Return the ensemble after one step along its covariance with the measurements."""
    dx, dy = x - x.mean(0), (answers - answers.mean(0)).reshape(len(x), -1)
    error = (answers - y.to(answers)).reshape(len(x), -1)
    if precision is not None:
        weights = precision.to(error)
        error = error * weights if weights.ndim == 1 else error @ weights.mT
    c = error @ dy.T / len(x)
    size = torch.linalg.matrix_norm(c)
    # An ensemble whose answers agree has no direction to go.
    step = torch.where(size > 0, guidance / size.clamp_min(torch.finfo(c.dtype).tiny), 0)
    return x - (step * c @ dx.flatten(1)).view(x.shape)
