"""Block coordinate descent trains digits classifiers of three and of ten hidden layers, where plain gradient descent stalls.

Stochastic gradient descent starts from the same weights and gets the same passes over the rows, at the best of three rates.
Sweeps from weights of almost zero, from which no layer learns, are the control.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from perturbkit.core.random import randn, randperm
from perturbkit.optim import BCDClassifier
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.optim._digits import Digits, accuracy, load

SWEEPS = 50


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
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Test accuracy of three and ten hidden layers, descent, and the residual."""
    data = load(run)
    seeds = run.seeds(3)
    three = [_fit(data, 3, seed) for seed in seeds]
    ten = [_fit(data, 10, seed) for seed in seeds]
    shallow, deep = ([_score(made, data) for made in each] for each in (three, ten))
    sgd = [max(_sgd(data, 10, seed, lr) for lr in (0.01, 0.1, 0.5)) for seed in seeds]
    still = _score(_fit(data, 10, seeds[0], init_scale=0.001), data)
    rises = max(float((np.diff(m.objective_) / m.objective_[:-1]).max()) for m in three + ten)
    k = np.arange(1, SWEEPS + 1)
    rate = [np.minimum.accumulate(m.kkt_residual_**2) * k for m in three + ten]
    growth = max(float(r[SWEEPS // 2 :].max() / r[: SWEEPS // 2].max()) for r in rate)
    return Evidence(
        [
            Comparison.over_seeds("test accuracy, 3 hidden layers", shallow, [0.9] * 3, "higher"),
            Comparison.over_seeds("test accuracy, 10 hidden layers", deep, [0.8] * 3, "higher"),
            Comparison.over_seeds("test accuracy of gradient descent, 10 hidden layers", sgd, [0.5] * 3, "lower"),
            Comparison("largest relative rise of the objective in a sweep", rises, 1e-9, "lower", note="in double precision"),
            Comparison(
                "k times the least squared residual of k sweeps, later half against the first", growth, 1.0, "lower",
                note="bounded, as a rate of O(1/k) has it",
            ),
            Comparison(
                "test accuracy, 10 hidden layers from weights of 0.001", still, 0.8, "higher", control=True,
                note="must fail: nothing passes through the layers",
            ),
        ],
        _figure(shallow, deep, sgd),
        notes="Layers have 64 units; first weights are normal of standard deviation 0.1, and prox is 0.1. With ten layers of this "
        "width, gradient descent at its best rate does not stall on every seed, and blocks beat it by less than the thresholds "
        "ask for. Fifty sweeps are too few to tell a rate of O(1/k) of the least residual from a slower start.",
    )  # fmt: skip


def _fit(data: Digits, layers: int, seed: int, init_scale: float = 0.1) -> BCDClassifier:
    made = BCDClassifier((64,) * layers, prox=0.1, init_scale=init_scale, max_iter=SWEEPS, generator=seed)
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


def _figure(shallow: list[float], deep: list[float], sgd: list[float]) -> Figure:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    bars = {"blocks,\n3 layers": shallow, "blocks,\n10 layers": deep, "SGD,\n10 layers": sgd}
    axes.bar(list(bars), [sum(v) / len(v) for v in bars.values()], color=["tab:blue", "tab:blue", "tab:gray"])
    axes.set_ylim(0, 1)
    axes.set_ylabel("test accuracy")
    axes.set_title(f"digits, {SWEEPS} sweeps or passes", fontsize=10)
    return figure
