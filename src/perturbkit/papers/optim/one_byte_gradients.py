"""One byte a gradient trains a digits classifier over workers that each see other classes.

Two workers own different digits and share softmax regression. The same directions are sent as bytes and as whole
numbers; the same number of bytes is also spent on the largest entries of true gradients. Two processes, the simulation
and a worker that comes late must hold the same bits. Workers that draw directions from different seeds are the control.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from perturbkit.core import run_workers
from perturbkit.optim import OneByteSPSA, simulate_one_byte
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.optim._digits import Digits, accuracy, load
from perturbkit.papers.optim._workers import softmax_regression, train_in_process, worker_losses

WORKERS, ROUNDS, SAMPLES = 2, 2000, 1
RATES = (0.01, 0.03)


@paper(
    number=10,
    title="Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model Finetuning Using Shared Randomness",
    authors="Zelikman, Huang, Liang, Haber, Goodman",
    year=2023,
    arxiv="2306.10015",
    claim="Workers that share random seeds train one model by sending a byte a sampled gradient, and may come late.",
    method="perturbkit.optim.OneByteSPSA",
    needs="weights",
    input="any",
    cost="two evaluations of the loss and one byte a direction",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Accuracy against whole numbers and against sparse gradients of as many bytes, and equality bit for bit."""
    data = load(run)
    seeds = run.seeds(2)
    score = {
        kind: [
            max(accuracy(_train(data, s, lr, one_byte=kind == "byte"), data) for lr in RATES) for s in seeds
        ]
        for kind in ("byte", "whole")
    }
    sparse = [max(accuracy(_train_sparse(data, s, lr), data) for lr in (0.1, 1.0, 10.0)) for s in seeds]
    first, history = softmax_regression(), _history(data, seeds[0], rounds=600)
    late = _join(data, seeds[0], after=500)
    processes = run_workers(train_in_process, WORKERS, data, 100, SAMPLES, timeout=110)
    alone = simulate_one_byte(
        worker_losses(data, first, WORKERS, 0), first.parameters(), 100, lr=0.01, samples_per_round=SAMPLES
    )
    apart = _disagreement(data)
    comparisons = [
        Comparison.over_seeds(
            "test accuracy, bytes against whole numbers", score["byte"], score["whole"], "higher", margin=-0.02
        ),
        Comparison.over_seeds(
            "test accuracy, against sparse gradients of as many bytes", score["byte"], sparse, "higher", margin=0.0
        ),
        Comparison("bytes a worker and round", alone.bytes_sent / 100, SAMPLES, "equal"),
        Comparison("different weights among two processes and the simulation", len({*processes, alone.digest}) - 1, 0, "equal"),
        Comparison("different weights of a worker that joined at round 500", float(late != history), 0, "equal"),
        Comparison(
            "different weights of workers with seeds of their own", apart, 0, "equal", control=True,
            note="must fail: a byte says nothing without the direction it belongs to",
        ),
    ]  # fmt: skip
    return Evidence(
        comparisons, _figure(score, sparse),
        notes=f"A gradient of this model takes {4 * sum(p.numel() for p in first.parameters())} bytes. A sparse entry takes "
        "six bytes, so its workers send one every sixth round.",
    )  # fmt: skip


def _train(data: Digits, seed: int, lr: float, *, one_byte: bool) -> nn.Module:
    net = softmax_regression()
    simulate_one_byte(
        worker_losses(data, net, WORKERS, seed), net.parameters(), ROUNDS, lr=lr, samples_per_round=SAMPLES,
        one_byte=one_byte, seed=seed % 2**31,
    )  # fmt: skip
    return net


def _train_sparse(data: Digits, seed: int, lr: float) -> nn.Module:
    """Send the largest entry of each worker's gradient and what it left behind, six bytes, with the same budget."""
    net = softmax_regression()
    left = torch.zeros(WORKERS, sum(p.numel() for p in net.parameters()))
    losses = worker_losses(data, net, WORKERS, seed)
    for t in range(ROUNDS * SAMPLES // 6):
        total = torch.zeros_like(left[0])
        for worker, loss in enumerate(losses):
            grads = torch.autograd.grad(loss(t), list(net.parameters()))
            left[worker] += torch.cat([g.flatten() for g in grads])
            entry = left[worker].abs().argmax()
            total[entry] += left[worker, entry] / WORKERS
            left[worker, entry] = 0
        with torch.no_grad():
            for p, step in zip(net.parameters(), total.split([640, 10]), strict=True):
                p.sub_(lr * step.reshape(p.shape))
    return net


def _history(data: Digits, seed: int, rounds: int) -> str:
    net = softmax_regression()
    optimizer = OneByteSPSA(net.parameters(), lr=0.01)
    loss = worker_losses(data, net, 1, seed)[0]
    for t in range(rounds):
        optimizer.step(partial(loss, t))
    return optimizer.digest()


def _join(data: Digits, seed: int, after: int) -> str:
    """Train, come late as another worker from a checkpoint and the log, and go on; return the digest."""
    net, other = softmax_regression(), softmax_regression()
    optimizer, late = (OneByteSPSA(n.parameters(), lr=0.01) for n in (net, other))
    loss = worker_losses(data, net, 1, seed)[0]
    for t in range(after // 2):
        optimizer.step(partial(loss, t))
    checkpoint = optimizer.checkpoint()
    for t in range(after // 2, after):
        optimizer.step(partial(loss, t))
    late.join(checkpoint, optimizer.messages)
    loss = worker_losses(data, other, 1, seed)[0]
    for t in range(after, 600):
        late.step(partial(loss, t))
    return late.digest()


def _disagreement(data: Digits) -> float:
    """Return whether workers differ after one round if each applies the messages along directions of its own."""
    sent: Any = {0: (70.0,), 1: (200.0,)}
    digests = set()
    for seed in (1, 2):
        optimizer = OneByteSPSA(softmax_regression().parameters(), lr=0.01, seed=seed)
        optimizer.join(optimizer.checkpoint(), [sent])
        digests.add(optimizer.digest())
    return float(len(digests) - 1)


def _figure(score: dict[str, list[float]], sparse: list[float]) -> Figure:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    bars = {
        "one byte": score["byte"],
        "eight bytes": score["whole"],
        "largest entries,\nas many bytes": sparse,
    }
    axes.bar(
        list(bars), [sum(v) / len(v) for v in bars.values()], color=["tab:blue", "tab:gray", "tab:orange"]
    )
    axes.set_ylim(0, 1)
    axes.set_ylabel("test accuracy")
    axes.set_title(f"{WORKERS} workers, {ROUNDS * SAMPLES:,} bytes each", fontsize=10)
    return figure
