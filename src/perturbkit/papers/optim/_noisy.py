"""A small set of digits, a fifth of them mislabelled, on which a wide network overfits; shared by regularisers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from perturbkit.core import functional, hessian, lanczos, ritz_values
from perturbkit.core.parameters import flatten
from perturbkit.core.random import randint, randn, randperm, seeded_init

__all__ = ["NoisyDigits", "draw", "largest_curvature", "network", "score", "train"]

Wrap = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class NoisyDigits(NamedTuple):
    """Training rows with wrong labels among them, and clean rows for validation and testing."""

    x: Tensor
    y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    test_x: Tensor
    test_y: Tensor


def draw(seed: int, *, n: int = 500, noise: float = 0.2) -> NoisyDigits:
    """Return ``n`` training digits of which a share got another label, 300 for validation and the rest."""
    from perturbkit.data import load_digits8

    digits = load_digits8()
    g = torch.Generator().manual_seed(seed)
    order = randperm(len(digits.y), generator=g)
    x, y = digits.x.flatten(1)[order], digits.y[order].clone()
    wrong = randperm(n, generator=g)[: round(noise * n)]
    y[wrong] = (y[wrong] + randint(1, 10, (len(wrong),), generator=g)) % 10
    return NoisyDigits(x[:n], y[:n], x[n : n + 300], y[n : n + 300], x[n + 300 :], y[n + 300 :])


def network(seed: int) -> nn.Sequential:
    """Return a network of one hidden layer of 256 units."""
    with seeded_init(seed):
        return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def train(wrap: Wrap, data: NoisyDigits, seed: int, *, epochs: int = 60, batch: int = 100) -> nn.Module:
    """Train a network by an optimizer that takes closures; return it."""
    net = network(seed)
    optimizer = wrap(net.parameters())
    g = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in randperm(len(data.y), generator=g).split(batch):

            def closure(rows: Tensor = rows) -> Any:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(data.x[rows]), data.y[rows])
                loss.backward()
                return loss

            optimizer.step(closure)
    return net


def score(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of rows that are classified rightly."""
    with torch.no_grad():
        return float((net(x).argmax(1) == y).double().mean())


def largest_curvature(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the largest eigenvalue of the Hessian of the loss, by 20 Lanczos steps."""
    call = functional(net)
    vector = flatten(net)
    product = hessian(lambda w: nn.functional.cross_entropy(call(w, x), y), vector)
    alpha, beta, _ = lanczos(product, randn(vector.shape, generator=torch.Generator().manual_seed(0)), 20)
    return float(ritz_values(alpha, beta)[-1])
