"""The small networks that the reproductions train: a multilayer perceptron that knows the noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perturbkit.core import Denoiser, Schedule
from perturbkit.core.random import randint, randn, seeded_init, seeds, uniform


class TimeMLP(nn.Module):
    """``(x, t) -> x0`` for flat inputs: two hidden layers between the scalings of Karras et al. (2022), table 1."""

    def __init__(self, dim: int, schedule: Schedule, data_std: float, hidden: int = 256) -> None:
        super().__init__()
        self.schedule, self.data_std = schedule, data_std
        self.rates = [2.0**k * math.pi / 16 for k in range(8)]
        self.body = nn.Sequential(
            nn.Linear(dim + 2 * len(self.rates), hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, dim),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        lam = self.schedule.lam(t).to(x)[:, None]
        z = x / self.schedule.alpha(t).to(x)[:, None]
        angles = lam.log() * torch.tensor(self.rates, dtype=x.dtype, device=x.device)
        total = lam**2 + self.data_std**2
        answer = self.body(torch.cat([z / total.sqrt(), angles.sin(), angles.cos()], 1))
        return (self.data_std**2 / total) * z + (lam * self.data_std / total.sqrt()) * answer


def train_denoiser(
    points: Tensor, schedule: Schedule, seed: int, *, steps: int = 3000, batch: int = 128, t_end: float = 1e-3
) -> Denoiser:
    """Train a denoiser on flat points, the noise levels log-uniform, and return it in float64."""
    g = torch.Generator().manual_seed(seed)
    data_std = float(points.std())
    with seeded_init(seeds(g, 1)[0]):
        network = TimeMLP(points.shape[1], schedule, data_std)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data = points.float()
    ends = schedule.lam(torch.tensor([t_end, schedule.t_max], dtype=torch.float64)).log().tolist()
    for _ in range(steps):
        clean = data[randint(0, len(data), (batch,), generator=g)]
        t = schedule.time(uniform((batch,), *ends, generator=g, dtype=torch.float64).exp())
        noisy = schedule.add_noise(clean, randn(clean.shape, generator=g, like=clean), t)
        weight = (1 / schedule.lam(t) ** 2 + 1 / data_std**2).to(clean)[:, None]
        loss = (weight * (network(noisy, t) - clean).square()).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        decay.step()
    return Denoiser(network.double().eval().requires_grad_(False), schedule, predicts="x0")
