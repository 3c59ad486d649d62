"""Functions that tests run in other processes, which import them by name."""

import os
import time
import warnings
from functools import partial
from typing import Any

import torch
from torch import distributed

from perturbkit.core import checks
from perturbkit.optim import OneByteSPSA


def summed_ranks(offset: int) -> tuple[int, float]:
    total = torch.tensor(float(distributed.get_rank() + offset))
    distributed.all_reduce(total)
    return distributed.get_rank(), float(total)


def one_fails() -> None:
    if distributed.get_rank() == 1:
        raise KeyError("lost")
    distributed.barrier()


def one_dies() -> None:
    if distributed.get_rank() == 1:
        os._exit(3)
    distributed.barrier()


def sleeps() -> None:
    time.sleep(60)


def one_byte_problem(worker: int) -> tuple[torch.nn.Module, Any]:
    """Return a small model, the same on every worker, and the closure of the worker's own batch in a round."""
    g = torch.Generator().manual_seed(5)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    own = torch.Generator().manual_seed(worker)
    x = torch.randn(20, 6, generator=own)
    y = torch.randint(0, 3, (20,), generator=own)

    def loss(t: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(net(x[t % 4 :: 4]), y[t % 4 :: 4])

    return net, loss


def one_byte_run(rounds: int, options: dict[str, Any]) -> tuple[str, int, float]:
    """Train with all processes; return the digest, the bytes sent and the last weight."""
    net, loss = one_byte_problem(distributed.get_rank())
    optimizer = OneByteSPSA(net.parameters(), **options)
    for t in range(rounds):
        optimizer.step(partial(loss, t))
    return optimizer.digest(), optimizer.bytes_sent, net[2].bias[-1].item()


def one_byte_join_and_drop() -> list[str]:
    """Two of three train; the third joins from the log; then the second leaves. Return a digest after each part."""
    rank = distributed.get_rank()
    first, everyone, last = (distributed.new_group(ranks) for ranks in ([0, 1], [0, 1, 2], [0, 2]))
    net, loss = one_byte_problem(rank)
    optimizer = OneByteSPSA(net.parameters(), lr=0.05, group=first)
    digests = []
    parcel: list[Any] = [None]
    if rank < 2:
        for t in range(4):
            optimizer.step(partial(loss, t))
        checkpoint = optimizer.checkpoint()
        for t in range(4, 12):
            optimizer.step(partial(loss, t))
        parcel = [(checkpoint, optimizer.messages)]
    distributed.broadcast_object_list(parcel, src=0)
    if rank == 2:
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
        optimizer.join(*parcel[0])
    digests.append(optimizer.digest())
    optimizer.group = everyone
    for t in range(12, 16):
        optimizer.step(partial(loss, t))
    digests.append(optimizer.digest())
    if rank != 1:
        optimizer.group = last
        for t in range(16, 20):
            optimizer.step(partial(loss, t))
    digests.append(optimizer.digest())
    return digests


def one_byte_mismatch() -> list[str]:
    """Return what a worker is told when seeds and weights differ, and when the rates do."""
    rank, said = distributed.get_rank(), []
    for start, options in ((float(rank), {"seed": rank}), (1.0, {"lr": 0.1 * (1 + rank)})):
        w = torch.nn.Parameter(torch.full((3,), start))
        try:
            OneByteSPSA([w], **options).step(w.sum)
        except checks.ModelError as error:
            said.append(str(error))
    return said


def one_fails_one_sleeps() -> None:
    if distributed.get_rank() == 1:
        raise KeyError("lost")
    time.sleep(100)


def one_byte_nan_and_batches() -> tuple[list[str], str, list[float]]:
    """Train on batches of other sizes, one of which has a loss that is not a number; return digest and messages.

    Before it, what is told of workers that differ: processes are slow to start.
    """
    said = one_byte_mismatch()
    rank = distributed.get_rank()
    w = torch.nn.Parameter(torch.ones(3))
    x = torch.arange(1.0, 4.0).repeat(rank + 1, 1)
    optimizer = OneByteSPSA([w], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", checks.PerturbkitWarning)
        for t in range(4):
            optimizer.step(lambda t=t: (x @ w).mean() * (float("nan") if rank == 1 and t % 2 else 1))  # type: ignore[misc]
    return said, optimizer.digest(), [optimizer.messages[t][1][0] for t in range(4)]
