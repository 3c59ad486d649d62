"""What both methods use: the Langevin corrector, and short-time spectra."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from perturbkit.core import checks
from perturbkit.core.random import randn

__all__ = ["check_grid", "langevin_step", "like_noise", "window"]


def check_grid(times: Tensor, last: float, owner: str) -> None:
    """Check the times of a reverse equation: down from at most ``last``, and not to zero, where the score is infinite."""
    checks.tensor("times", times, ndim=1)
    falls = len(times) >= 2 and bool((times.diff() < 0).all())
    if not falls or float(times[-1]) <= 0 or float(times[0]) > last * (1 + 1e-9):
        raise checks.ArgumentError(
            f"times has {len(times)} values from {float(times[0]):g} to {float(times[-1]):g}; allowed: at least two, strictly "
            f"decreasing, above zero and at most {last:g}. Use {owner}.times(n_steps)."
        )


def langevin_step(
    x: Tensor, score: Callable[[Tensor], Tensor], snr: float, generator: torch.Generator
) -> Tensor:
    """Move states (n, ...) by one step of Langevin dynamics of a size set row by row.

    The step is ``2 (snr |z| / |s|)^2``, with the norms of that row's noise and score.
    """
    s, z = score(x), like_noise(x, generator)
    noise, size = (torch.linalg.vector_norm(v.reshape(len(x), -1), dim=1) for v in (z, s))
    ratio = noise / size.clamp_min(1e-12)
    step = (2 * (snr * ratio) ** 2).reshape(-1, *[1] * (x.ndim - 1))
    root = (2 * step).sqrt()
    return torch.addcmul(torch.addcmul(x, s, step.to(s.dtype)), z, root.to(z.dtype))


def like_noise(x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal noise in the shape of ``x``; of complex ones both parts have variance one half."""
    if not x.is_complex():
        return randn(x.shape, generator=generator, like=x)
    parts = randn((*x.shape, 2), generator=generator, like=x.real)
    return torch.view_as_complex(parts) * 0.5**0.5


def window(n_fft: int, like: Tensor) -> Tensor:
    """Return the Hann window of a length."""
    return torch.hann_window(n_fft, dtype=like.dtype, device=like.device)
