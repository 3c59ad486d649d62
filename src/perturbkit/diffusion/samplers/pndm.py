"""PNDM: a linear multistep method whose steps move along the noise schedule exactly.

Use it at 15 calls and more on smooth denoisers; one call a step once it has its history. Liu, Ren, Lin and Zhao (2022),
Pseudo Numerical Methods for Diffusion Models on Manifolds, arXiv:2202.09778.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from perturbkit.core import Denoiser, SampleResult, checks
from perturbkit.core.random import Seed
from perturbkit.core.sampling import Path, Point, check_start, transfer, weighted

__all__ = ["sample_pndm"]

# Adams-Bashforth, newest first.
_WEIGHTS = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def sample_pndm(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    variant: Literal["fourth", "second"] = "fourth",
    warmup: Literal["runge_kutta", "euler"] = "runge_kutta",
    generator: Seed = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> SampleResult:
    """Follow the probability flow by a pseudo linear multistep method.

    Parameters
    ----------
    denoiser : Denoiser
        The network with its schedule; read as a noise prediction.
    x : Tensor, shape (n, ...)
        State at ``times[0]``, floating point.
    times : Tensor, shape (steps + 1,)
        Decreasing times; the coefficients are those of equal steps in time and are used as they stand on other grids.
    variant : {"fourth", "second"}
        Four or two stored predictions.
    warmup : {"runge_kutta", "euler"}
        The first three steps by the pseudo Runge-Kutta method (9 more calls); or the first step by the pseudo improved
        Euler method (1 more call) and the order built up. The second-order variant always takes the latter.
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
        If the state, the times or an option are not allowed.

    Notes
    -----
    ``x_s = transfer(x_t, e', t -> s)`` with ``e' = (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3) / 24`` over the last predictions and
    ``transfer = (alpha_s / alpha_t) x + alpha_s (lam_s - lam_t) e``, exact for a constant prediction.

    Cost: ``steps + 9`` calls with the Runge-Kutta start, ``steps + 1`` with the Euler start.

    References
    ----------
    Liu, Ren, Lin and Zhao (2022), arXiv:2202.09778, equations 11 to 13.

    Examples
    --------
    >>> import torch
    >>> from perturbkit.core import VPSchedule
    >>> s = VPSchedule()
    >>> gaussian = Denoiser(lambda x, t: s.sigma(t)[:, None] * x, s, predicts="eps")  # data N(0, 1)
    >>> found = sample_pndm(gaussian, torch.tensor([[1.0]], dtype=torch.float64), s.times(20, spacing="time"))
    >>> found.cost.nfev, round(float(found.x), 1)
    (29, 1.0)
    """
    check_start(denoiser, x, times)
    checks.one_of("variant", variant, ("fourth", "second"))
    checks.one_of("warmup", warmup, ("runge_kutta", "euler"))
    length = 4 if variant == "fourth" else 2
    by_runge_kutta = variant == "fourth" and warmup == "runge_kutta"
    path, calls = Path(denoiser, times), denoiser.nfev
    history: list[Tensor] = []
    for i in range(path.n_steps):
        s, t = path.points[i], path.points[i + 1]
        eps = denoiser.eps(x, s.time)
        history = [eps, *history[: length - 1]]
        if by_runge_kutta and i < 3:
            mean = _runge_kutta(denoiser, x, eps, s, t)
        elif not by_runge_kutta and i == 0:
            mean = (eps + denoiser.eps(transfer(x, eps, s, t), t.time)) / 2
        else:
            mean = weighted(*zip(_WEIGHTS[len(history)], history, strict=True))
        x = transfer(x, mean, s, t)
        if callback is not None:
            callback(i, x)
    return path.result(x, denoiser.nfev - calls)


def _runge_kutta(denoiser: Denoiser, x: Tensor, first: Tensor, s: Point, t: Point) -> Tensor:
    """Return the mean noise of the classical method, with transfers in place of additions."""
    m = Point.at(denoiser.schedule, (s.time + t.time) / 2)
    second = denoiser.eps(transfer(x, first, s, m), m.time)
    third = denoiser.eps(transfer(x, second, s, m), m.time)
    fourth = denoiser.eps(transfer(x, third, s, t), t.time)
    return weighted((1 / 6, first), (1 / 3, second), (1 / 3, third), (1 / 6, fourth))
