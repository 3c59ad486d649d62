"""ZO-AdaMU against zeroth-order descent with fresh directions, on three test functions and on fine-tuning of a network.

Both get the same evaluations and the same grid of rates, and each keeps its best. The network knows the digits 0 to 4 and
learns the others by forward passes alone. No training is the control.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.random import randint, seeded_init, uniform
from perturbkit.optim import MeZO, ZOAdaMU
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.optim._digits import Digits, load

STEPS, FINE = 1500, 3000
RATES = (1e-4, 1e-3, 1e-2, 1e-1)


@paper(
    number=97,
    title="ZO-AdaMU Optimizer: Adapting Perturbation by the Momentum and Uncertainty in Zeroth-order Optimization",
    authors="Jiang, Chen, Pan, Xiang, Lin, Wu, Liu, Song",
    year=2023,
    arxiv="2312.15184",
    claim="Momentum in the perturbation makes zeroth-order training faster and smoother than fresh directions do.",
    method="perturbkit.optim.ZOAdaMU",
    needs="forward",
    input="any",
    cost="two evaluations a step and one buffer of the weights' size",
    seconds=90,
)
def reproduce(run: Run) -> Evidence:
    """Losses after equal evaluations, and the oscillation of fine-tuning."""
    seeds = run.seeds(10)
    comparisons = []
    for name, (function, d) in _FUNCTIONS.items():
        best = {kind: _best(partial(_minimise, function, d, kind), seeds) for kind in ("ours", "fresh")}
        comparisons.append(
            Comparison(
                f"{name} after {2 * STEPS:,} evaluations, median of 10 starts",
                best["ours"],
                best["fresh"],
                "lower",
                n=10,
            )
        )
    data = load(run)
    traces = {kind: [_fine_tune(data, kind, lr, seeds[0]) for lr in RATES] for kind in ("ours", "fresh")}
    kept = {kind: min(found, key=lambda t: _end(t)) for kind, found in traces.items()}
    untouched = _fine_tune(data, "fresh", 0.0, seeds[0])
    comparisons += [
        Comparison("loss after fine-tuning, mean of the last 300 steps", _end(kept["ours"]), _end(kept["fresh"]), "lower"),
        Comparison("variance of the change of the loss from step to step", _roughness(kept["ours"]), _roughness(kept["fresh"]), "lower"),
        Comparison(
            "loss without training", _end(untouched), _end(kept["fresh"]), "lower", control=True,
            note="must fail: the digits 5 to 9 were never seen",
        ),
    ]  # fmt: skip
    return Evidence(comparisons, _figure(kept))


def _rosenbrock(x: Tensor) -> Tensor:
    return (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2


def _beale(x: Tensor) -> Tensor:
    a, b = x[0], x[1]
    return (1.5 - a + a * b) ** 2 + (2.25 - a + a * b**2) ** 2 + (2.625 - a + a * b**3) ** 2


def _quadratic(x: Tensor) -> Tensor:
    return (torch.logspace(-2, 0, len(x), dtype=x.dtype) * x.square()).sum() / 2


_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "Rosenbrock": (_rosenbrock, 2),
    "Beale": (_beale, 2),
    "quadratic in 100 dimensions, condition 100": (_quadratic, 100),
}


def _optimizer(params: Any, kind: str, lr: float, steps: int, seed: int) -> Any:
    if kind == "ours":
        return ZOAdaMU(params, lr=lr, total_steps=steps, seed=seed % 2**31)
    return MeZO(params, lr=lr, seed=seed % 2**31)


def _minimise(function: Callable[[Tensor], Tensor], d: int, kind: str, lr: float, seed: int) -> float:
    start = uniform((d,), -1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w = nn.Parameter(start)
    optimizer = _optimizer([w], kind, lr, STEPS, seed)
    try:
        for _ in range(STEPS):
            optimizer.step(lambda: function(w))
    except checks.ModelError:  # the rate is too large
        return float("inf")
    return float(function(w.detach()))


def _best(minimise: Callable[[float, int], float], seeds: list[int]) -> float:
    """Return the median over starts at the rate that is best on the first start."""
    rate = min(RATES, key=lambda lr: minimise(lr, seeds[0]))
    return statistics.median(minimise(rate, seed) for seed in seeds)


def _fine_tune(data: Digits, kind: str, lr: float, seed: int) -> list[float]:
    """Return the losses of the steps of training on all digits, by forward passes."""
    with seeded_init(seed):
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    known = data.y < 5
    plain = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(200):
        plain.zero_grad()
        nn.functional.cross_entropy(net(data.x[known]), data.y[known]).backward()
        plain.step()
    optimizer = _optimizer(net.parameters(), kind, lr, FINE, seed)
    g = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(FINE):
        rows = randint(0, len(data.y), (256,), generator=g)

        def loss(rows: Tensor = rows) -> Tensor:
            return nn.functional.cross_entropy(net(data.x[rows]), data.y[rows])

        try:
            losses.append(optimizer.step(loss))
        except checks.ModelError:  # the rate is too large
            return [float("inf")] * FINE
    return losses


def _end(losses: list[float]) -> float:
    return statistics.fmean(losses[-300:])


def _roughness(losses: list[float]) -> float:
    tail = losses[FINE // 2 :]
    return statistics.pvariance([b - a for a, b in pairwise(tail)])


def _figure(kept: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(4.8, 3), layout="constrained")
    axes = figure.add_subplot()
    for kind, label in (("fresh", "fresh directions"), ("ours", "ZO-AdaMU")):
        axes.plot(kept[kind], linewidth=0.6, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss on all digits")
    axes.legend(frameon=False)
    return figure
