"""DDIM: the deterministic sampler of first order, one call of the denoiser a step.

Use it as the plain baseline, and where the path itself matters (inversion, interpolation). Song, Meng and Ermon
(2021), Denoising Diffusion Implicit Models, arXiv:2010.02502.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from perturbkit.core import Denoiser, SampleResult, checks
from perturbkit.core.random import Seed, as_generator, randn
from perturbkit.core.sampling import Path, check_start, weighted

__all__ = ["sample_ddim"]


def sample_ddim(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    eta: float = 0.0,
    generator: Seed = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> SampleResult:
    """Follow the probability flow from noise to data by Euler steps in the scaled state.

    Parameters
    ----------
    denoiser : Denoiser
        The network with its schedule.
    x : Tensor, shape (n, ...)
        State at ``times[0]``, floating point.
    times : Tensor, shape (steps + 1,)
        Decreasing times, as :meth:`~perturbkit.core.noise.Schedule.times` gives them.
    eta : float
        Share of fresh noise in [0, 1]: 0 is deterministic, 1 the ancestral sampler of DDPM.
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
        If the state or the times are not allowed.

    Notes
    -----
    ``x_t = alpha_t x0 + sqrt(sigma_t^2 - v^2) eps + v xi``, with ``xi`` fresh noise of deviation
    ``v = eta sigma_t sqrt(1 - lam_t^2 / lam_s^2)``, that of the ancestral step. For ``eta = 0`` this is
    ``z_t = z_s + (lam_t - lam_s) eps`` with ``z = x / alpha``.

    Cost: one call of the denoiser a step; error O(step).

    References
    ----------
    Song, Meng and Ermon (2021), arXiv:2010.02502, equation 12.

    Examples
    --------
    >>> import torch
    >>> from perturbkit.core import EDMSchedule
    >>> schedule = EDMSchedule()
    >>> gaussian = Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), schedule, predicts="x0")  # data N(0, 1)
    >>> x = torch.tensor([[80.0]], dtype=torch.float64)
    >>> round(float(sample_ddim(gaussian, x, schedule.times(500, t_end=1e-3)).x), 2)
    0.99
    """
    check_start(denoiser, x, times)
    checks.between("eta", eta, 0, 1)
    g = as_generator(generator)
    path, calls = Path(denoiser, times), denoiser.nfev
    for i in range(path.n_steps):
        eps = denoiser.eps(x, path.times[i])
        s, t = path.points[i], path.points[i + 1]
        noise = eta * t.sigma * max(0.0, 1 - (t.lam / s.lam) ** 2) ** 0.5
        kept = max(0.0, t.sigma**2 - noise**2) ** 0.5
        # alpha_t x0 + kept eps, with x0 = (x - sigma_s eps) / alpha_s.
        x = weighted((t.alpha / s.alpha, x), (kept - t.alpha * s.lam, eps))
        if noise > 0:
            x = x + noise * randn(x.shape, generator=g, like=x)
        if callback is not None:
            callback(i, x)
    return path.result(x, denoiser.nfev - calls)
