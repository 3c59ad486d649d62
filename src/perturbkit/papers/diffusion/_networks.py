"""The denoisers that the reproductions train: the reference networks of core, on points or on digits."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from perturbkit.core import Denoiser, EDMSchedule, Preconditioned, Schedule, TimeMLP, fit
from perturbkit.core.random import seeded_init, seeds

__all__ = ["digits_denoiser8", "train_denoiser"]


def train_denoiser(
    points: Tensor,
    schedule: Schedule,
    seed: int,
    *,
    steps: int = 3000,
    batch: int = 128,
    t_end: float = 1e-3,
    hidden: int = 256,
) -> Denoiser:
    """Train a denoiser on flat points, the noise levels log-uniform, and return it in float64."""
    g = torch.Generator().manual_seed(seed)
    data = points.float()
    with seeded_init(seeds(g, 1)[0]):
        model = Preconditioned(TimeMLP(points.shape[1], hidden=hidden), schedule, float(points.std()))

    def loss(model: Preconditioned, x0: Tensor, *, generator: torch.Generator) -> Tensor:
        return model.loss(x0, generator=generator, t_end=t_end)

    fit(model, loss, data, steps=steps, batch_size=batch, lr=2e-3, generator=g, progress=False)
    return model.double().eval().requires_grad_(False).denoiser()


@cache
def digits_denoiser8(seed: int = 0, steps: int = 4000) -> Denoiser:
    """Digits of 8x8 in [-1, 1], flat: a denoiser trained on the train part, once a process."""
    from perturbkit.data import load_digits8

    points = load_digits8("train").x.flatten(1) * 2 - 1
    return train_denoiser(points, EDMSchedule(sigma_max=20.0), seed, steps=steps)
