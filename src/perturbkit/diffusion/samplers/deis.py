"""Exponential Adams multistep: every call is used in several steps, at the exact weights of the grid.

The sampler to take at 5 to 30 calls: order 2 at the fewest, order 3 from about 8, with the corrector from about 20. Zhang
and Chen (2023), Fast Sampling of Diffusion Models with Exponential Integrator, arXiv:2204.13902 (DEIS); the corrector
without extra calls is that of Zhao, Bai, Rao, Zhou and Lu (2023), UniPC, arXiv:2302.04867, in Adams-Moulton form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from perturbkit.core import Denoiser, SampleResult, checks
from perturbkit.core.sampling import Path, check_noise_left, check_start, weighted

__all__ = ["sample_deis"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def sample_deis(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    order: int = 3,
    corrector: bool = False,
    callback: Callable[[int, Tensor], None] | None = None,
) -> SampleResult:
    """Integrate the probability flow with a polynomial through the last noise predictions.

    Parameters
    ----------
    denoiser : Denoiser
        The network with its schedule.
    x : Tensor, shape (n, ...)
        State at ``times[0]``, floating point.
    times : Tensor, shape (steps + 1,)
        Decreasing times, the last with noise.
    order : int
        Predictions in a step, 1 to 4; 1 is DDIM. The first steps use as many as there are.
    corrector : bool
        Whether each state is corrected once the prediction at it is known, which costs no call and gains an order.
    callback : callable, optional
        Called as ``callback(i, x)`` after step ``i`` (before its correction).

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
    With ``z = x / alpha`` and ``u = log lam``, the flow is ``z' = z + int eps e^u du`` exactly; ``eps`` is replaced by the
    polynomial in u through its last values, whose Lagrange basis is integrated against ``e^u`` on the grid as it is. The
    corrector repeats the step with the new prediction among the values. The first step is DDIM's: its error, small where
    the noise is high, is of order 2 in the step (3 with the corrector) whatever the order of the rest.

    Cost: one call a step.

    References
    ----------
    Zhang and Chen (2023), arXiv:2204.13902; Zhao et al. (2023), arXiv:2302.04867.

    Examples
    --------
    >>> import torch
    >>> from perturbkit.core import EDMSchedule
    >>> schedule = EDMSchedule()
    >>> gaussian = Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), schedule, predicts="x0")  # data N(0, 1)
    >>> x = torch.tensor([[80.0]], dtype=torch.float64)
    >>> round(float(sample_deis(gaussian, x, schedule.times(30, t_end=1e-3, spacing="karras")).x), 2)
    1.0
    """
    check_start(denoiser, x, times)
    check_noise_left(denoiser.schedule, times, "End at 1e-3, or take sample_ddim for the last step.")
    checks.integer("order", order, low=1, high=4)
    path, calls = Path(denoiser, times), denoiser.nfev
    u = [math.log(p.lam) for p in path.points]
    z = x / path.points[0].alpha
    eps = [denoiser.eps(x, path.times[0])]
    for i in range(path.n_steps):
        values = eps[-order:]
        known = u[i + 1 - len(values) : i + 1]
        moved = weighted((1.0, z), *zip(_adams(known, u[i], u[i + 1]), values, strict=True))
        x = path.points[i + 1].alpha * moved
        if callback is not None:
            callback(i, x)
        if i + 1 == path.n_steps:
            break
        eps = [*values, denoiser.eps(x, path.times[i + 1])]
        if corrector:
            weights = _adams([*known, u[i + 1]], u[i], u[i + 1])
            moved = weighted((1.0, z), *zip(weights, eps, strict=True))
        z = moved
    return path.result(x, denoiser.nfev - calls)


def _adams(nodes: Sequence[float], start: float, stop: float) -> list[float]:
    """Return the integrals of the Lagrange basis of the nodes against ``e^u``, by Gauss-Legendre."""
    half = 0.5 * (stop - start)
    points = start + half * (1 + _NODES)
    measure = half * _WEIGHTS * np.exp(points)
    basis = (
        math.prod((points - other) / (node - other) for other in nodes if other != node) for node in nodes
    )
    return [float((measure * values).sum()) for values in basis]
