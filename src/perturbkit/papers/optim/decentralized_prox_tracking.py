"""Five workers on a ring, each with two digits of its own, train together by messages to neighbours.

Softmax regression and a small network with an l1 regulariser, on fresh batches of 16 a worker: with tracked gradients, sent
whole or a third of them, against one process with all batches and against workers that average weights but do not track.
A worker that trains alone is the control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import run_workers
from perturbkit.optim import TopK, prox_stationarity, ring_mixing, simulate_dproxsgt
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.optim._digits import Digits, accuracy, load
from perturbkit.papers.optim._distributed import Classes, dproxsgt_in_process, l1

WORKERS, BATCH, STEPS, LR = 5, 16, 1000, 0.2


@paper(
    number=204,
    title="Compressed Decentralized Proximal Stochastic Gradient Method for Nonconvex Composite Problems with Heterogeneous Data",
    authors="Yan, Chen, Chen, Cui, Xu",
    year=2023,
    arxiv="2302.14252",
    claim="Workers with different data learn as one by messages to neighbours, with tracked gradients, at 60 % of the bytes.",
    method="perturbkit.optim.DProxSGT",
    needs="gradient",
    input="any",
    cost="a gradient and two messages to each neighbour a step",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Test accuracy, distance from stationarity, bytes, and equality with processes."""
    data = load(run)
    comparisons, bars = [], {}
    for name, hidden in (("softmax regression", 0), ("network", 32)):
        workers = Classes(data, WORKERS, hidden)
        start = workers.start(run.generator("start")) if hidden else torch.zeros(650, dtype=torch.float64)
        seed = run.seeds(1)[0]
        tracked, squeezed = (
            simulate_dproxsgt(
                workers.stochastic(BATCH, seed),
                start,
                ring_mixing(WORKERS),
                LR,
                l1,
                compressor=c,
                steps=STEPS,
            )
            for c in (None, TopK(0.3))
        )
        central = _central(workers.stochastic(BATCH, seed), start)
        untracked = _untracked(workers.stochastic(BATCH, seed), start)
        alone = _central(workers.stochastic(BATCH, seed)[:1], start)
        score = {
            kind: _score(workers, x, data)
            for kind, x in (
                ("one process", central), ("tracked", tracked.x), ("compressed", squeezed.x), ("untracked", untracked), ("alone", alone)
            )
        }  # fmt: skip
        bars[name] = score
        comparisons += [
            Comparison(f"test accuracy, {name}", score["tracked"], 0.92, "higher"),
            Comparison(f"test accuracy against one process, {name}", score["tracked"], score["one process"], "higher", margin=-0.02),
            Comparison(f"test accuracy, compressed against whole, {name}", score["compressed"], score["tracked"], "higher", margin=-0.02),
            Comparison(
                f"distance from stationarity and consensus, against no tracking, {name}",
                _distance(workers, tracked.x), _distance(workers, untracked), "lower", factor=0.5,
            ),
            Comparison(
                f"test accuracy, a worker alone, {name}", score["alone"], 0.92, "higher", control=True, note="must fail: it sees two digits"
            ),
        ]  # fmt: skip
    single = TopK(0.3).nbytes(650) / (650 * 4)
    off = _processes(data)
    comparisons += [
        Comparison(
            "bytes, against sending all, single precision", single, 0.65, "lower", note="indices included"
        ),
        Comparison(
            "largest difference of weights, 3 processes and the simulation", off, 0, "equal", margin=1e-10
        ),
    ]
    return Evidence(comparisons, _figure(bars), notes="Weights are the mean over the workers.")


def _central(grads: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    """Proximal stochastic gradient descent on the workers' batches together."""
    for _ in range(STEPS):
        x = l1(x - LR * torch.stack([g(x) for g in grads]).mean(0), LR)
    return x[None]


def _untracked(grads: Sequence[Callable[[Tensor], Tensor]], start: Tensor) -> Tensor:
    """Return weights of workers that average after each proximal step along their own gradient."""
    w, x = ring_mixing(WORKERS), start.expand(WORKERS, -1)
    for _ in range(STEPS):
        gradients = torch.stack([g(row) for g, row in zip(grads, x, strict=True)])
        x = w @ l1(x - LR * gradients, LR)
    return x


def _score(workers: Classes, x: Tensor, data: Digits) -> float:
    return accuracy(lambda rows: workers.scores(x.mean(0), rows), data)


def _distance(workers: Classes, x: Tensor) -> float:
    """Return the stationarity measure at the mean of the workers, plus their distance from it."""
    mean = x.mean(0)
    gradient = torch.stack([g(mean) for g in workers.full()]).mean(0)
    spread = float((x - mean).square().sum(1).mean().sqrt())
    return prox_stationarity(mean, gradient, LR, l1) + spread


def _processes(data: Digits) -> float:
    """Return how far three processes are from the simulation after 30 compressed steps."""
    start = torch.zeros(650, dtype=torch.float64)
    found = run_workers(dproxsgt_in_process, 3, data, 30, 0.1, {"compressor": TopK(0.3)})
    alone = simulate_dproxsgt(
        Classes(data, 3).full(), start, ring_mixing(3), 0.1, l1, compressor=TopK(0.3), steps=30
    )
    return float((torch.stack(found) - alone.x).abs().max())


def _figure(bars: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(7, 3), layout="constrained")
    for axes, (name, score) in zip(figure.subplots(1, 2, sharey=True), bars.items(), strict=True):
        axes.bar(
            list(score), list(score.values()), color=["tab:gray", "tab:blue", "tab:cyan", "tab:orange", "0.8"]
        )
        axes.tick_params("x", labelrotation=30)
        axes.set_title(name, fontsize=10)
    figure.axes[0].set_ylabel("test accuracy")
    return figure
