"""LIME's masks of superpixels and its weighted linear model."""

from __future__ import annotations

import torch
from torch import Tensor

from perturbkit.core.random import uniform


def lime_masks(parts: int, n: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """Draw masks of zeros and ones with equal chance, the first of which keeps everything, in double precision."""
    z = (uniform((n, parts), generator=generator, dtype=torch.float64) < 0.5).double()
    z[0] = 1
    return z.to(like.device)


def lime_fit(z: Tensor, y: Tensor, width: float, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return coefficients, intercept and weighted R^2 of ridge regression, masks weighed by their cosine to the full one."""
    share = z.mean(1)
    distance = torch.where(share > 0, 1 - share.sqrt(), torch.ones_like(share))
    weight = torch.exp(-(distance**2) / (2 * width**2))
    z_mean, y_mean = (weight @ z) / weight.sum(), (weight @ y) / weight.sum()
    centred, rest = z - z_mean, y - y_mean
    gram = (centred.T * weight) @ centred + ridge * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    b = torch.linalg.pinv(gram, hermitian=True) @ (centred.T @ (weight * rest))
    total, left = (weight * rest**2).sum(), (weight * (rest - centred @ b) ** 2).sum()
    score = torch.where(total > 0, 1 - left / total.clamp(min=1e-300), torch.ones_like(total))
    return b, y_mean - z_mean @ b, score
