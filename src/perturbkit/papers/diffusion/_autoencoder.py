"""A small autoencoder of 8x8 digits and a denoiser of its latents, trained once a process."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from perturbkit.core import Denoiser, Schedule, fit
from perturbkit.core.random import randn, seeded_init, seeds
from perturbkit.papers.diffusion._networks import train_denoiser

__all__ = ["Autoencoder", "digits_autoencoder", "latent_denoiser"]


class Autoencoder(nn.Module):
    """Flat digits in [0, 1] to latents of about unit variance, and back."""

    def __init__(self, latent: int, hidden: int = 256) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, latent),
            nn.BatchNorm1d(latent, affine=False),
        )  # fmt: skip
        self.decode = nn.Sequential(
            nn.Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 64), nn.Sigmoid()
        )  # fmt: skip


@cache
def digits_autoencoder(latent: int, seed: int = 0, steps: int = 3000) -> Autoencoder:
    """Train on the train part, with a little noise on the latents so that the decoder is smooth; in float64."""
    from perturbkit.data import load_digits8

    g = torch.Generator().manual_seed(seed)
    with seeded_init(seeds(g, 1)[0]):
        model = Autoencoder(latent)

    def loss(model: Autoencoder, x: Tensor, *, generator: torch.Generator) -> Tensor:
        code = model.encode(x)
        noise = 0.05 * randn(code.shape, generator=generator, like=code)
        return (model.decode(code + noise) - x).square().sum(1).mean()

    data = load_digits8("train").x.flatten(1)
    fit(model, loss, data, steps=steps, lr=2e-3, generator=g, progress=False)
    return model.double().eval().requires_grad_(False)


def latent_denoiser(model: Autoencoder, schedule: Schedule, seed: int = 0) -> Denoiser:
    """Train a denoiser of the latents of the train part."""
    from perturbkit.data import load_digits8

    codes = model.encode(load_digits8("train").x.flatten(1).double())
    return train_denoiser(codes, schedule, seed)
