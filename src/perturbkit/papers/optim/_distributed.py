"""Workers with different data for distributed optimizers; importable, so that processes can run them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from perturbkit.core import prox_l1
from perturbkit.core.random import mixed_seed, randint, randn
from perturbkit.optim import EF21, DProxSGT, ring_mixing
from perturbkit.papers.optim._digits import Digits

__all__ = ["Classes", "dproxsgt_in_process", "ef21_in_process", "l1", "logistic_gradients"]


def _logistic_gradient(a: Tensor, y: Tensor, l2: float, w: Tensor) -> Tensor:
    margin = y * (a @ w)
    return -(a.T @ (y * torch.sigmoid(-margin))) / len(a) + l2 * w


def logistic_gradients(parts: list[tuple[Tensor, Tensor]], l2: float) -> list[Callable[[Tensor], Tensor]]:
    """Return each worker's gradient of its mean logistic loss, labels -1 and 1, with a ridge."""
    return [partial(_logistic_gradient, a, y, l2) for a, y in parts]


def ef21_in_process(
    parts: list[tuple[Tensor, Tensor]], l2: float, steps: int, options: dict[str, Any]
) -> tuple[Tensor, int]:
    """Train logistic regression with the other processes; return the weights and the bytes sent."""
    a, y = parts[torch.distributed.get_rank()]
    w = nn.Parameter(a.new_zeros(a.shape[1]))
    optimizer = EF21([w], **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = softplus(-y * (a @ w)).mean() + l2 / 2 * w.square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return w.detach(), optimizer.bytes_sent


def l1(v: Tensor, step: float) -> Tensor:
    """Return the proximal map of the regulariser, 1e-4 times an l1 norm."""
    return prox_l1(v, 1e-4 * step)


class Classes:
    """Workers that own different digits and share a network whose weights are one vector.

    Parameters
    ----------
    data : Digits
        Worker i of n owns the classes whose number has the remainder i modulo n.
    n : int
        Workers.
    hidden : int
        Units of a hidden layer; 0 for softmax regression.
    """

    def __init__(self, data: Digits, n: int, hidden: int = 0) -> None:
        self.data = data
        self.own = [(data.y % n == i).nonzero()[:, 0] for i in range(n)]
        self.sizes = [64, hidden, 10] if hidden else [64, 10]

    def start(self, generator: torch.Generator) -> Tensor:
        """Return the first weights."""
        blocks = [
            torch.cat([randn((a, b), generator=generator) * a**-0.5, torch.zeros(1, b)]).reshape(-1)
            for a, b in pairwise(self.sizes)
        ]
        return torch.cat(blocks).double()

    def scores(self, w: Tensor, x: Tensor) -> Tensor:
        """Return the scores of rows."""
        pieces = w.split([(a + 1) * b for a, b in pairwise(self.sizes)])
        h = x.to(w.dtype)
        for i, (piece, (a, b)) in enumerate(zip(pieces, pairwise(self.sizes), strict=True)):
            matrix = piece.reshape(a + 1, b)
            h = (torch.relu(h) if i else h) @ matrix[:-1] + matrix[-1]
        return h

    def gradient(self, rows: Tensor, w: Tensor) -> Tensor:
        """Return the gradient of the mean cross-entropy of rows."""
        w = w.detach().requires_grad_(True)
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(self.scores(w, self.data.x[rows]), self.data.y[rows])
        return torch.autograd.grad(loss, w)[0]

    def stochastic(self, batch: int, seed: int) -> list[Callable[[Tensor], Tensor]]:
        """Return each worker's gradient on a fresh batch of its own digits."""

        def grad(own: Tensor, g: torch.Generator, w: Tensor) -> Tensor:
            return self.gradient(own[randint(0, len(own), (batch,), generator=g)], w)

        made = [torch.Generator().manual_seed(mixed_seed(seed, i)) for i in range(len(self.own))]
        return [partial(grad, own, g) for own, g in zip(self.own, made, strict=True)]

    def full(self) -> list[Callable[[Tensor], Tensor]]:
        """Return each worker's gradient on all its digits."""
        return [partial(self.gradient, own) for own in self.own]


def dproxsgt_in_process(data: Digits, steps: int, lr: float, options: dict[str, Any]) -> Tensor:
    """Train softmax regression with the neighbouring processes, each on its own digits; return the weights."""
    n, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    grad = Classes(data, n).full()[rank]
    w = nn.Parameter(torch.zeros(650, dtype=torch.float64))
    optimizer = DProxSGT([w], lr, ring_mixing(n), l1, **options)
    for _ in range(steps):
        w.grad = grad(w)
        optimizer.step()
    return w.detach()
