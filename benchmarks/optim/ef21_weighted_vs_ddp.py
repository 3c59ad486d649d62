"""EF21 against communication hooks of DistributedDataParallel over two gloo processes: seconds and bytes a step.

The floor is the mean gradient without compression, by a plain all-reduce. On one machine messages are cheap, so that what is timed is
mostly the work of compressing; bytes are what a slow link would feel. Ours is the slower: it finds the largest of 270,000 numbers in double
precision, keeps estimates of all workers' gradients, and adds them up by rank so that all workers hold the same bits.
"""

from __future__ import annotations

import time

import torch
from benchmarks._timing import Row
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from perturbkit.core import run_workers
from perturbkit.core.random import randn, seeded_init
from perturbkit.optim import EF21, TopK

_WIDTH, _STEPS = 512, 20


def _net() -> nn.Module:
    with seeded_init(0):
        return nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, 16))


def _timed(kind: str) -> tuple[float, float]:
    """Seconds and bytes a step on this worker."""
    net = _net()
    g = torch.Generator().manual_seed(distributed.get_rank())
    x, y = randn((64, _WIDTH), generator=g), randn((64, 16), generator=g)
    size = sum(p.numel() for p in net.parameters())
    if kind == "EF21, top 1 %":
        optimizer = EF21(net.parameters(), lr=0.01, compressor=TopK(0.01), init="zero")

        def step() -> None:
            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = (net(x) - y).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
    else:
        model: nn.Module = DistributedDataParallel(net)
        if kind == "fp16 hook":
            model.register_comm_hook(None, fp16_compress_hook)  # type: ignore[operator]
        elif kind == "PowerSGD hook, rank 2":
            state = PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
            model.register_comm_hook(state, powerSGD_hook)  # type: ignore[operator]
        plain = torch.optim.SGD(model.parameters(), lr=0.01)

        def step() -> None:
            plain.zero_grad()
            (model(x) - y).square().mean().backward()
            plain.step()

    for _ in range(5):
        step()
    before = getattr(locals().get("optimizer"), "bytes_sent", 0)
    began = time.perf_counter()
    for _ in range(_STEPS):
        step()
    seconds = (time.perf_counter() - began) / _STEPS
    matrices = [p for p in net.parameters() if p.ndim == 2]
    bytes_of = {
        "all-reduce": 4.0 * size,
        "fp16 hook": 2.0 * size,
        "PowerSGD hook, rank 2": 4.0
        * (sum(2 * (len(p) + p[0].numel()) for p in matrices) + size - sum(p.numel() for p in matrices)),
    }
    return seconds, bytes_of.get(
        kind, (getattr(locals().get("optimizer"), "bytes_sent", 0) - before) / _STEPS
    )


def main(rounds: int = 2) -> list[Row]:
    """Print the table and return its rows."""
    kinds = ("EF21, top 1 %", "fp16 hook", "PowerSGD hook, rank 2", "all-reduce")
    best: dict[str, tuple[float, float]] = {}
    for _ in range(rounds):
        for kind in kinds:
            found = max(run_workers(_timed, 2, kind))
            best[kind] = min(best.get(kind, found), found)
    ours, floor = best[kinds[0]], best["all-reduce"]
    rows: list[Row] = []
    print(
        f"{'comparison':<40}{'ours ms':>9}{'peer ms':>9}{'/peer':>7}{'/floor':>7}{'ours B':>10}{'peer B':>10}"
    )
    for kind in kinds[1:]:
        peer = best[kind]
        row: Row = {"comparison": kind, "ratio_peer": ours[0] / peer[0], "ratio_floor": ours[0] / floor[0]}
        rows.append(row)
        print(
            f"{kind:<40}{1e3 * ours[0]:>9.2f}{1e3 * peer[0]:>9.2f}{row['ratio_peer']:>7.2f}{row['ratio_floor']:>7.2f}"
            f"{ours[1]:>10.0f}{peer[1]:>10.0f}"
        )
    return rows


if __name__ == "__main__":
    main()
