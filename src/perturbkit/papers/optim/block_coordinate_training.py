"""Block coordinate descent trains digits classifiers of three and of ten hidden layers, where plain gradient descent stalls.

Both splittings are held to the same thresholds. Stochastic gradient descent starts from the same weights and gets the same
passes over the rows, at the best of three rates.
Sweeps from weights of almost zero, from which no layer learns, are the control.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from perturbkit.core.random import randn, randperm
from perturbkit.optim import BCDClassifier
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.optim._digits import Digits, accuracy, load

SWEEPS = 50
Splitting = Literal["three", "two"]
_SPLITTINGS: tuple[Splitting, ...] = ("three", "two")


@paper(
    number=163,
    title="Global Convergence of Block Coordinate Descent in Deep Learning",
    authors="Zeng, Lau, Lin, Yao",
    year=2019,
    arxiv="1803.00225",
    claim="Block coordinate descent trains deep networks where SGD stalls, and comes to a critical point at a rate of O(1/k).",
    method="perturbkit.optim.BCDClassifier",
    needs="training",
    input="tabular",
    cost="a least-squares problem a layer and sweep",
    seconds=150,
)
def reproduce(run: Run) -> Evidence:
    """Test accuracy of three and ten hidden layers, descent, and the residual."""
    data = load(run)
    seeds = run.seeds(3)
    runs = {(k, n): [_fit(data, n, seed, k) for seed in seeds] for k in _SPLITTINGS for n in (3, 10)}
    tests = {key: [_score(made, data) for made in each] for key, each in runs.items()}
    sgd = [max(_sgd(data, 10, seed, lr) for lr in (0.01, 0.1, 0.5)) for seed in seeds]
    still = {k: _score(_fit(data, 10, seeds[0], k, init_scale=0.001), data) for k in _SPLITTINGS}
    comparisons = [
        Comparison.over_seeds("test accuracy of gradient descent, 10 hidden layers", sgd, [0.5] * 3, "lower")
    ]
    for kind in _SPLITTINGS:
        made = runs[kind, 3] + runs[kind, 10]
        rises = max(float((np.diff(m.objective_) / m.objective_[:-1]).max()) for m in made)
        k = np.arange(1, SWEEPS + 1)
        rate = [np.minimum.accumulate(m.kkt_residual_**2) * k for m in made]
        growth = max(float(r[SWEEPS // 2 :].max() / r[: SWEEPS // 2].max()) for r in rate)
        comparisons += [
            Comparison.over_seeds(f"test accuracy, 3 hidden layers, {kind} splittings", tests[kind, 3], [0.9] * 3, "higher"),
            Comparison.over_seeds(f"test accuracy, 10 hidden layers, {kind} splittings", tests[kind, 10], [0.8] * 3, "higher"),
            Comparison(
                f"largest relative rise of the objective in a sweep, {kind} splittings", rises, 1e-9, "lower",
                note="in double precision",
            ),
            Comparison(
                f"k times the least squared residual of k sweeps, later half against the first, {kind} splittings", growth, 1.0,
                "lower", note="bounded, as a rate of O(1/k) has it",
            ),
            Comparison(
                f"test accuracy, 10 hidden layers from weights of 0.001, {kind} splittings", still[kind], 0.8, "higher",
                control=True, note="must fail: nothing passes through the layers",
            ),
        ]  # fmt: skip
    return Evidence(
        comparisons,
        _figure(tests, sgd),
        notes="Layers have 64 units; first weights are normal of standard deviation 0.1, and prox is 0.1. With ten layers of this "
        "width, gradient descent at its best rate does not stall on every seed, and blocks beat it by less than the thresholds "
        "ask for. Fifty sweeps of three splittings are too few to tell a rate of O(1/k) of the least residual from a slower start.",
    )


def _fit(
    data: Digits, layers: int, seed: int, splitting: Splitting, init_scale: float = 0.1
) -> BCDClassifier:
    made = BCDClassifier(
        (64,) * layers, splitting=splitting, prox=0.1, init_scale=init_scale, max_iter=SWEEPS, generator=seed
    )
    return made.fit(data.x.double().numpy(), data.y.numpy())


def _score(made: BCDClassifier, data: Digits) -> float:
    return float(made.score(data.test_x.double().numpy(), data.test_y.numpy()))


def _sgd(data: Digits, layers: int, seed: int, lr: float) -> float:
    """Train by stochastic gradient descent on the cross-entropy, with as many passes; return the test accuracy."""
    g = torch.Generator().manual_seed(seed)
    parts: list[nn.Module] = []
    for a, b in pairwise([64] * (layers + 1) + [10]):
        layer = nn.utils.skip_init(nn.Linear, a, b)
        with torch.no_grad():
            layer.weight.copy_(0.1 * randn((b, a), generator=g))
            layer.bias.zero_()
        parts += [layer, nn.ReLU()]
    net = nn.Sequential(*parts[:-1])
    optimizer = torch.optim.SGD(net.parameters(), lr)
    for _ in range(SWEEPS):
        for rows in randperm(len(data.y), generator=g).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
    return accuracy(net, data)


def _figure(tests: dict[tuple[Splitting, int], list[float]], sgd: list[float]) -> Figure:
    figure = Figure(figsize=(6.5, 3), layout="constrained")
    axes = figure.add_subplot()
    bars = {f"{kind} splittings,\n{n} layers": each for (kind, n), each in tests.items()}
    bars["SGD,\n10 layers"] = sgd
    axes.bar(
        list(bars),
        [sum(v) / len(v) for v in bars.values()],
        color=["tab:blue"] * 2 + ["tab:orange"] * 2 + ["tab:gray"],
    )
    axes.set_ylim(0, 1)
    axes.set_ylabel("test accuracy")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_title(f"digits, {SWEEPS} sweeps or passes", fontsize=10)
    return figure
