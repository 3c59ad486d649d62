"""Small networks drawn from a generator, and the one loop that trains them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from perturbkit.core import checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import randn, randperm


def mlp(sizes: Sequence[int], generator: torch.Generator, like: Tensor) -> nn.Sequential:
    """Return linear layers with ReLUs between them, drawn from the generator, with the dtype and device of ``like``."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        linear = torch.nn.utils.skip_init(nn.Linear, a, b, device=like.device, dtype=like.dtype)
        linear.weight.data = randn((b, a), generator=generator, like=like) * math.sqrt(2 / a)
        linear.bias.data = like.new_zeros(b)
        layers += [linear] + ([nn.ReLU()] if i < len(sizes) - 2 else [])
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Training:
    """The size of a network and how it is trained, checked."""

    hidden: int
    n_layers: int
    lr: float
    weight_decay: float
    epochs: int
    batch_size: int

    def __post_init__(self) -> None:
        for name in ("hidden", "n_layers", "epochs", "batch_size"):
            checks.integer(name, getattr(self, name), low=1)
        checks.positive("lr", self.lr)
        checks.nonnegative("weight_decay", self.weight_decay)

    def sizes(self, inputs: int, outputs: int) -> list[int]:
        """Return the widths of the layers."""
        return [inputs, *[self.hidden] * self.n_layers, outputs]

    def minimise(
        self,
        net: nn.Module,
        loss: Callable[[Tensor], Tensor],
        n: int,
        generator: torch.Generator,
        name: str,
        progress: ProgressLike,
    ) -> None:
        """Minimise ``loss(rows)`` over random batches by AdamW with a step that falls along a cosine; then freeze the net."""
        optimiser = torch.optim.AdamW(net.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.epochs)
        device = next(net.parameters()).device
        with torch.enable_grad():
            for _ in track(range(self.epochs), name, progress=progress):
                for rows in randperm(n, generator=generator, device=device).split(self.batch_size):
                    optimiser.zero_grad()
                    loss(rows).backward()
                    optimiser.step()
                schedule.step()
        net.requires_grad_(False)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and spread of each element, with 1 for elements that do not vary."""
    mean, spread = x.mean(0), x.std(0, unbiased=False)
    return mean, torch.where(spread > 0, spread, torch.ones_like(spread))
