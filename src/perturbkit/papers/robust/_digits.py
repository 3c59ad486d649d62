"""What the reproductions of training defences share: a small digits network, a plain loop, and accuracy under attack."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from perturbkit.core import around
from perturbkit.core.random import randperm, uniform
from perturbkit.robust import projected_gradient

__all__ = ["accuracy", "fill", "fit", "robust_accuracy", "small_network", "stream"]

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def stream(seed: int, number: int) -> torch.Generator:
    """Return one of ten generators of a repetition."""
    return torch.Generator().manual_seed(10 * seed + number)


def small_network(generator: torch.Generator, width: int = 8, hidden: int = 64) -> nn.Sequential:
    """Return a LeNet-like network for 8x8 digits: two convolutions and two linear layers."""
    return fill(
        nn.Sequential(
            nn.utils.skip_init(nn.Conv2d, 1, width, 3, padding=1),
            nn.ReLU(),
            nn.utils.skip_init(nn.Conv2d, width, 2 * width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.utils.skip_init(nn.Linear, 32 * width, hidden),
            nn.ReLU(),
            nn.utils.skip_init(nn.Linear, hidden, 10),
        ),
        generator,
    )


def fill(net: nn.Sequential, generator: torch.Generator) -> nn.Sequential:
    """Draw the weights of a network's layers as PyTorch does by default, from a generator."""
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            bound = layer.weight[0].numel() ** -0.5
            for parameter in layer.parameters():
                parameter.data = uniform(parameter.shape, -bound, bound, generator=generator)
    return net


def fit(
    net: nn.Module, x: Tensor, y: Tensor, loss: Loss, epochs: int, generator: torch.Generator, lr: float = 0.1,
    weight_decay: float = 5e-4, batch_size: int = 100,
) -> None:  # fmt: skip
    """Train by stochastic gradient descent with momentum; the rate falls to a tenth at half and three quarters."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
    drops = torch.optim.lr_scheduler.MultiStepLR(optimizer, [epochs // 2, 3 * epochs // 4])
    for _ in range(epochs):
        for rows in randperm(len(x), generator=generator).split(batch_size):
            optimizer.zero_grad()
            loss(net, x[rows], y[rows]).backward()
            optimizer.step()
        drops.step()


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of right answers."""
    with torch.no_grad():
        return float((net(x).argmax(1) == y).double().mean())


def robust_accuracy(
    net: nn.Module, x: Tensor, y: Tensor, epsilon: float, generator: torch.Generator, n_steps: int = 20
) -> float:
    """Return the share of rows that stand 20 steps of projected gradient in a ball of the largest-change norm."""
    attack = projected_gradient(net, x, y, around(x, "linf", epsilon), n_steps=n_steps, generator=generator)
    return 1 - float(attack.success.double().mean())
