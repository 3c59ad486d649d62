"""IIA: a base sampler with a few coefficients a step, fitted once so that it follows a finer run of itself.

Use it where one model is sampled many times on one grid: fitting costs a small batch, sampling costs nothing more.
Zhang, Niwa and Kleijn (2024), On Accelerating Diffusion-Based Sampling Process via Improved Integration Approximation,
arXiv:2304.11328.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from perturbkit.core import Denoiser, SampleResult, checks
from perturbkit.core.random import Seed
from perturbkit.core.sampling import Path, Point, check_start, transfer, weighted

__all__ = ["fit_iia", "sample_iia"]

Base = Literal["ddim", "heun"]
#: A sum of tensors with weights.
Parts = list[tuple[float, Tensor]]
_BASES = ("ddim", "heun")


def fit_iia(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    base: Base = "ddim",
    n_fine: int = 10,
    ridge: float = 1e-8,
) -> Tensor:
    """Fit the coefficients of each step by least squares on a calibration batch.

    Parameters
    ----------
    denoiser : Denoiser
        The network with its schedule.
    x : Tensor, shape (n, ...)
        Calibration starts at ``times[0]``; 16 to 256 rows are enough.
    times : Tensor, shape (steps + 1,)
        The grid that will be sampled on.
    base : {"ddim", "heun"}
        The sampler corrected.
    n_fine : int
        Substeps of the base sampler, geometric in ``lam``, that give the target of each step; at least 2.
    ridge : float
        Relative ridge of the normal equations, zero or above.

    Returns
    -------
    Tensor of float64, shape (steps, 2)
        Coefficients of the two extra terms; zero gives the base sampler.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the state, the times or an option are not allowed.

    Notes
    -----
    Step by step ``min_phi sum |y - x_{i+1}(phi)|^2`` over the batch, ``y`` the end of the fine run from the same ``x_i``;
    then the batch is moved by the corrected step, so that later steps are fitted where sampling will be. The
    calibration error of a step never exceeds that of the base step. The last level may be 0; its fine run is then
    equally spaced.

    Cost: ``(1 + n_fine) steps`` calls on the batch (twice that for "heun"), once.

    References
    ----------
    Zhang, Niwa and Kleijn (2024), arXiv:2304.11328, equations 12 to 17.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> s = EDMSchedule(10.0)
    >>> gaussian = Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), s, predicts="x0")  # data N(0, 1)
    >>> x = torch.linspace(-20, 20, 16, dtype=torch.float64)[:, None]
    >>> fit_iia(gaussian, x, s.times(5, t_end=0.01)).shape
    torch.Size([5, 2])
    """
    check_start(denoiser, x, times)
    checks.one_of("base", base, _BASES)
    checks.integer("n_fine", n_fine, low=2)
    checks.nonnegative("ridge", ridge)
    path = Path(denoiser, times)
    found = torch.zeros(path.n_steps, 2, dtype=torch.float64)
    memory: tuple[Parts, ...] = ()
    for i in range(path.n_steps):
        s, t = path.points[i], path.points[i + 1]
        step, terms, memory = _step(denoiser, x, s, t, base, memory)
        if terms:
            target, plain = _fine(denoiser, x, s, t, base, n_fine), weighted(*step)
            columns = torch.stack([weighted(*term).flatten() for term in terms], 1).double()
            # Sums and a solution by hand: the rounding of matrix products and solvers depends on where in memory their factors lie.
            gram = (columns[:, :, None] * columns[:, None]).sum(0)
            gram += ridge * gram.diagonal().mean().clamp_min(1e-300) * torch.eye(len(terms)).to(gram)
            right = (columns * (target - plain).flatten().double()[:, None]).sum(0)
            found[i] = torch.tensor(_solved(gram.tolist(), right.tolist()), dtype=torch.float64)
        x = _corrected(step, terms, found[i])
    return found


def sample_iia(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    coefficients: Tensor,
    *,
    base: Base = "ddim",
    generator: Seed = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> SampleResult:
    """Sample with the coefficients that :func:`fit_iia` found on the same grid.

    Parameters
    ----------
    denoiser : Denoiser
        The network with its schedule.
    x : Tensor, shape (n, ...)
        State at ``times[0]``, floating point.
    times : Tensor, shape (steps + 1,)
        Decreasing times.
    coefficients : Tensor, shape (steps, 2)
        Of the extra terms; zero gives the base sampler.
    base : {"ddim", "heun"}
        The sampler corrected.
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
        If the state, the times or the coefficients are not allowed.

    Notes
    -----
    "ddim": ``x_{i+1} = DDIM(x_i) + phi_0 (x0_i - x0_{i-1}) + phi_1 (eps_i - eps_{i-1})``, with no correction of the first
    step, which has no history. "heun": the weights of the two slopes are ``1/2 + phi_0`` and ``1/2 + phi_1``.

    Cost: that of the base sampler, one call a step, or two.

    References
    ----------
    Zhang, Niwa and Kleijn (2024), arXiv:2304.11328.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> s = EDMSchedule(10.0)
    >>> gaussian = Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), s, predicts="x0")  # data N(0, 1)
    >>> x, times = torch.linspace(-20, 20, 16, dtype=torch.float64)[:, None], s.times(8, t_end=0.01)
    >>> found = sample_iia(gaussian, torch.tensor([[10.05]], dtype=torch.float64), times, fit_iia(gaussian, x, times))
    >>> round(float(found.x), 1)
    1.0
    """
    check_start(denoiser, x, times)
    checks.one_of("base", base, _BASES)
    checks.tensor("coefficients", coefficients, shape=(len(times) - 1, 2))
    path, calls = Path(denoiser, times), denoiser.nfev
    memory: tuple[Parts, ...] = ()
    for i in range(path.n_steps):
        step, terms, memory = _step(denoiser, x, path.points[i], path.points[i + 1], base, memory)
        x = _corrected(step, terms, coefficients[i])
        if callback is not None:
            callback(i, x)
    return path.result(x, denoiser.nfev - calls)


def _step(
    denoiser: Denoiser, x: Tensor, s: Point, t: Point, base: str, memory: tuple[Parts, ...]
) -> tuple[Parts, tuple[Parts, ...], tuple[Parts, ...]]:
    """Return the base step, the terms whose coefficients are free, and what the next step remembers, all as weighted sums."""
    eps, reach = denoiser.eps(x, s.time), t.alpha * (t.lam - s.lam)
    kept = (t.alpha / s.alpha, x)
    if base == "heun":
        if t.lam <= 0:
            return [kept, (reach, eps)], (), ()
        after = denoiser.eps(transfer(x, eps, s, t), t.time)
        return [kept, (reach / 2, eps), (reach / 2, after)], ([(reach, eps)], [(reach, after)]), ()
    # The predicted data is (x - sigma eps) / alpha.
    now: tuple[Parts, ...] = ([(1 / s.alpha, x), (-s.lam, eps)], [(1.0, eps)])
    terms = tuple(new + [(-w, v) for w, v in old] for new, old in zip(now, memory, strict=False))
    return [kept, (reach, eps)], terms, now


def _solved(gram: list[list[float]], right: list[float]) -> tuple[float, float]:
    """Return the shortest solution of two symmetric equations, by their principal axes."""
    (a, b), (_, d) = gram
    angle = 0.5 * math.atan2(2 * b, a - d)
    c, s = math.cos(angle), math.sin(angle)
    most, least = a * c**2 + 2 * b * c * s + d * s**2, a * s**2 - 2 * b * c * s + d * c**2
    along = (c * right[0] + s * right[1]) / most if most > 0 else 0.0
    across = (c * right[1] - s * right[0]) / least if least > 4e-16 * most else 0.0
    return c * along - s * across, s * along + c * across


def _corrected(base: Parts, terms: tuple[Parts, ...], coefficients: Tensor) -> Tensor:
    """Return the step with its terms: one pass over memory for each tensor that takes part, however often."""
    parts = base + [
        (c * w, v) for term, c in zip(terms, coefficients.tolist(), strict=False) for w, v in term
    ]
    weights: dict[int, float] = {}
    for w, v in parts:
        weights[id(v)] = weights.get(id(v), 0.0) + w
    tensors = {id(v): v for _, v in parts}
    return weighted(*((w, tensors[key]) for key, w in weights.items() if w))


def _fine(denoiser: Denoiser, x: Tensor, s: Point, t: Point, base: str, n: int) -> Tensor:
    """Return the end of ``n`` substeps of the base sampler."""
    u = torch.linspace(0, 1, n + 1, dtype=torch.float64)
    levels = s.lam * (t.lam / s.lam) ** u if t.lam > 0 else s.lam * (1 - u)
    times = denoiser.schedule.time(levels).tolist()
    points = [s, *(Point.at(denoiser.schedule, v) for v in times[1:-1]), t]
    for here, there in itertools.pairwise(points):
        x = weighted(*_step(denoiser, x, here, there, base, ())[0])
    return x
