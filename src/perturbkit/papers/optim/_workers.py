"""Workers that own different digits and share softmax regression; importable, so that processes can run them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from perturbkit.core.random import mixed_seed, randint
from perturbkit.optim import OneByteSPSA
from perturbkit.papers.optim._digits import Digits

__all__ = ["softmax_regression", "train_in_process", "worker_losses"]


def softmax_regression() -> nn.Linear:
    """Return a linear classifier of digits whose weights are zero."""
    net = nn.Linear(64, 10)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    return net.eval()


def _batch(data: Digits, workers: int, seed: int, worker: int, t: int) -> tuple[Tensor, Tensor]:
    """Draw a worker's batch of a round from its own classes."""
    x, y = data.x, data.y
    own = (y % workers == worker).nonzero()[:, 0]
    g = torch.Generator().manual_seed(mixed_seed(seed, worker, t))
    rows = own[randint(0, len(own), (64,), generator=g)]
    return x[rows], y[rows]


def worker_losses(data: Digits, net: nn.Module, workers: int, seed: int) -> list[Callable[[int], Tensor]]:
    """Return each worker's loss as a function of the round."""

    def loss(worker: int, t: int) -> Tensor:
        x, y = _batch(data, workers, seed, worker, t)
        return nn.functional.cross_entropy(net(x), y)

    return [partial(loss, worker) for worker in range(workers)]


def train_in_process(data: Digits, rounds: int, samples: int) -> str:
    """Train with the other processes of the group, and return the digest of the weights."""
    rank = torch.distributed.get_rank()
    net = softmax_regression()
    loss = worker_losses(data, net, torch.distributed.get_world_size(), 0)[rank]
    optimizer = OneByteSPSA(net.parameters(), lr=0.01, samples_per_round=samples)
    for t in range(rounds):
        optimizer.step(partial(loss, t))
    return optimizer.digest()
