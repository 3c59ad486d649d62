"""BDIA: a sampler whose path can be run backward exactly, at one call a step.

Use it to find the noise of a sample (editing, interpolation) without the drift of DDIM inversion. Zhang, Lewis and
Kleijn (2024), Exact Diffusion Inversion via Bi-directional Integration Approximation, arXiv:2307.10829.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from perturbkit.core import Cost, Denoiser, SampleResult, checks
from perturbkit.core.random import Seed
from perturbkit.core.sampling import Path, Point, check_start, transfer, weighted

__all__ = ["BDIAResult", "invert_bdia", "sample_bdia"]


@dataclass(frozen=True, eq=False)
class BDIAResult(SampleResult):
    """Draws with the state before the last.

    Attributes
    ----------
    previous : Tensor
        The state at ``times[-2]``: with ``x`` it determines the whole path.
    """

    previous: Tensor = field(default_factory=lambda: torch.empty(0))


def sample_bdia(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    gamma: float = 1.0,
    base: Literal["ddim", "heun"] = "ddim",
    generator: Seed = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> BDIAResult:
    """Follow the probability flow by steps that integrate forward and backward from the same call.

    Parameters
    ----------
    denoiser : Denoiser
        The network with its schedule; read as a noise prediction.
    x : Tensor, shape (n, ...)
        State at ``times[0]``, floating point; float64 where the path is to be inverted with ``gamma < 1``.
    times : Tensor, shape (steps + 1,)
        Decreasing times, at least 2 steps to be invertible.
    gamma : float
        Share of the earlier step that is replaced by its backward estimate, in [0, 1]: 0 is the base method, 1 a
        leapfrog, which is unstable on coarse or strongly uneven grids.
    base : {"ddim", "heun"}
        The step that is doubled.
    generator : torch.Generator, int or None
        Not used: the sampler is deterministic. Accepted so that samplers can be exchanged.
    callback : callable, optional
        Called as ``callback(i, x)`` after step ``i``.

    Returns
    -------
    BDIAResult
        ``x`` at ``times[-1]`` and ``previous`` at ``times[-2]``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the state, the times or an option are not allowed.

    Notes
    -----
    ``x_{i+1} = x_{i-1} - (1 - gamma)(x_{i-1} - x_i) - gamma Delta(t_i -> t_{i-1} | x_i) + Delta(t_i -> t_{i+1} | x_i)``,
    where ``Delta`` is the increment of the base method; the first step is plain.

    Cost: one call a step ("heun": three, one at the state and one at either end).

    References
    ----------
    Zhang, Lewis and Kleijn (2024), arXiv:2307.10829, equation 15.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> schedule = EDMSchedule(10.0)
    >>> gaussian = Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), schedule, predicts="x0")  # data N(0, 1)
    >>> x, times = torch.tensor([[10.0]], dtype=torch.float64), schedule.times(40, t_end=0.1)
    >>> drawn = sample_bdia(gaussian, x, times)
    >>> found = invert_bdia(gaussian, drawn.x, drawn.previous, times)
    >>> bool((found.x - x).abs().max() < 1e-9)
    True
    """
    check_start(denoiser, x, times)
    checks.between("gamma", gamma, 0, 1)
    checks.one_of("base", base, ("ddim", "heun"))
    path, calls = Path(denoiser, times), denoiser.nfev
    before = x
    for i in range(path.n_steps):
        here = path.points[i]
        eps = denoiser.eps(x, here.time)
        if i == 0 or gamma == 0:
            after = transfer(
                x, _noise(denoiser, x, eps, here, path.points[i + 1], base), here, path.points[i + 1]
            )
        else:
            after = weighted((gamma, before), *_own_terms(denoiser, x, eps, path, i, gamma, base))
        before, x = x, after
        if callback is not None:
            callback(i, x)
    cost = Cost(nfev=denoiser.nfev - calls)
    return BDIAResult(x, times.detach().cpu().double(), cost, previous=before)


def invert_bdia(
    denoiser: Denoiser,
    x: Tensor,
    previous: Tensor,
    times: Tensor,
    *,
    gamma: float = 1.0,
    base: Literal["ddim", "heun"] = "ddim",
) -> SampleResult:
    """Run a path of :func:`sample_bdia` backward, from its last two states to its start.

    Parameters
    ----------
    denoiser, times, base
        As the path was sampled with.
    x, previous : Tensor, shape (n, ...)
        States at ``times[-1]`` and ``times[-2]``. For data that were not sampled take a DDIM step back for the second.
    gamma : float
        As the path was sampled with, in (0, 1]. Rounding grows like ``gamma^(-steps)``: in float64 about 20 steps can
        be inverted at 0.5, any number at 1.

    Returns
    -------
    SampleResult
        ``x`` at ``times[0]``.

    Raises
    ------
    ArgumentError
        If ``gamma`` is 0, where nothing can be inverted, or the states do not match.

    Notes
    -----
    The equation of :func:`sample_bdia` is solved for ``x_{i-1}``; nothing is approximated.

    References
    ----------
    Zhang, Lewis and Kleijn (2024), arXiv:2307.10829, equation 16.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> schedule = EDMSchedule(10.0)
    >>> denoiser = Denoiser(lambda x, t: 0 * x, schedule, predicts="eps")
    >>> invert_bdia(denoiser, torch.ones(1, 1), torch.ones(1, 1), schedule.times(3, t_end=0.1)).x.tolist()
    [[1.0]]
    """
    check_start(denoiser, x, times)
    checks.same_shape("previous", checks.tensor("previous", previous), "x", x)
    checks.between("gamma", gamma, 0, 1, inclusive="high")
    checks.one_of("base", base, ("ddim", "heun"))
    path, calls = Path(denoiser, times), denoiser.nfev
    after, here = x, previous
    for i in range(path.n_steps - 1, 0, -1):
        eps = denoiser.eps(here, path.times[i])
        before = (after - weighted(*_own_terms(denoiser, here, eps, path, i, gamma, base))) / gamma
        after, here = here, before
    return path.result(here, denoiser.nfev - calls)


def _own_terms(
    denoiser: Denoiser, x: Tensor, eps: Tensor, path: Path, i: int, gamma: float, base: str
) -> list[tuple[float, Tensor]]:
    """Return the terms, with weights, of ``x_{i+1} - gamma x_{i-1}``: increments are linear in the state and the noise."""
    here, ahead, behind = (path.points[j] for j in (i, i + 1, i - 1))
    own = (1 - gamma) + (ahead.alpha / here.alpha - 1) - gamma * (behind.alpha / here.alpha - 1)
    add, remove = (p.alpha * (p.lam - here.lam) for p in (ahead, behind))
    if base == "ddim":
        return [(own, x), (add - gamma * remove, eps)]
    forth, back = (_noise(denoiser, x, eps, here, p, base) for p in (ahead, behind))
    return [(own, x), (add, forth), (-gamma * remove, back)]


def _noise(denoiser: Denoiser, x: Tensor, eps: Tensor, s: Point, t: Point, base: str) -> Tensor:
    """Return the noise along which the base method goes from ``s`` to ``t``."""
    return eps if base == "ddim" else (eps + denoiser.eps(transfer(x, eps, s, t), t.time)) / 2
