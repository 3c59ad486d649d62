"""Small networks for the reproductions, built and trained without the global generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from perturbkit.core.random import randperm
from perturbkit.uncertainty.conformal._parts import mlp

__all__ = ["mlp", "train"]


def train(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
    epochs: int = 50,
    lr: float = 1e-3,
    batch: int = 64,
    weight_decay: float = 0.0,
) -> nn.Module:
    """Fit by AdamW, in place."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=weight_decay)
    for _ in range(epochs):
        for rows in randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            loss(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()
