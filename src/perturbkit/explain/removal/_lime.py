"""LIME's masks of superpixels and its weighted linear model."""

from __future__ import annotations

import torch
from torch import Tensor

from perturbkit.core.random import uniform

__all__ = ["cosine_distance", "cosine_kernel", "lime_fit", "lime_masks", "weighted_ridge"]


def lime_masks(parts: int, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Draw masks of zeros and ones with equal chance, the first of which keeps everything, in double precision."""
    z = (uniform((n, parts), generator=generator, dtype=torch.float64) < 0.5).double()
    z[0] = 1
    return z.to(like.device)


def lime_fit(z: Tensor, y: Tensor, width: float, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return coefficients, intercept and weighted R^2, masks weighed by their cosine to the full one."""
    return weighted_ridge(z, y, cosine_kernel(z, width), ridge)


def cosine_kernel(z: Tensor, width: float) -> Tensor:
    """Return LIME's weights of masks: near the full one they count most."""
    return torch.exp(-(cosine_distance(z) ** 2) / (2 * width**2))


def cosine_distance(z: Tensor) -> Tensor:
    """Return the distance of every mask to the full one; 1 for the empty one."""
    share = z.mean(1)
    return torch.where(share > 0, 1 - share.sqrt(), torch.ones_like(share))


def weighted_ridge(z: Tensor, y: Tensor, weight: Tensor, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return coefficients, intercept and weighted R^2 of ridge regression, for values (n,) or (n, rows)."""
    share = weight / weight.sum()
    z_mean, y_mean = share @ z, share @ y
    centred, rest = z - z_mean, y - y_mean
    gram = (centred.T * weight) @ centred
    right = (centred.T * weight) @ rest
    if ridge > 0:
        b = torch.linalg.solve(
            gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), right
        )
    else:
        b = torch.linalg.pinv(gram, hermitian=True) @ right
    total, left = weight @ rest**2, weight @ (rest - centred @ b) ** 2
    score = torch.where(total > 0, 1 - left / total.clamp(min=1e-300), torch.ones_like(total))
    return b, y_mean - z_mean @ b, score
