"""Forward gradients train a logistic regression and a network on digits, without one backward pass.

The same batches go to forward gradients with 1, 10 and 100 directions and to backpropagation. Untrained weights are
the control.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import randint, randn
from perturbkit.optim import ForwardSGD
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.optim._digits import Digits, accuracy, load


@paper(
    number=118,
    title="Gradients without Backpropagation",
    authors="Baydin, Pearlmutter, Syme, Wood, Torr",
    year=2022,
    arxiv="2202.08587",
    claim="Forward gradients alone train models, at a cost of a few forward passes a step and without stored activations.",
    method="perturbkit.optim.ForwardSGD",
    needs="weights",
    input="any",
    cost="one forward pass with tangents a step and direction",
    seconds=45,
)
def reproduce(run: Run) -> Evidence:
    """Accuracy of two models, its growth with the directions, and the cost of a step."""
    data = load(run)
    seeds = run.seeds(2)
    linear = [_train(_linear(s), data, s, lr=0.3, directions=64, steps=2500) for s in seeds]
    network = [_train(_network(s), data, s, lr=0.1, directions=64, steps=1500) for s in seeds]
    straight = [_train(_linear(s), data, s, lr=0.3, directions=0, steps=2500) for s in seeds]
    comparisons = [
        Comparison.over_seeds(
            "test accuracy, logistic regression, against backpropagation",
            linear,
            straight,
            "higher",
            margin=-0.02,
        ),
        Comparison.over_seeds("test accuracy, logistic regression", linear, [0.95] * 2, "higher"),
        Comparison.over_seeds("test accuracy, network of 2,410 weights", network, [0.90] * 2, "higher"),
    ]
    grown = {
        k: _train(_network(seeds[0]), data, seeds[0], lr=min(0.3, 0.004 * k), directions=k, steps=600)
        for k in (1, 10, 100)
    }
    by_backprop = _train(_network(seeds[0]), data, seeds[0], lr=0.3, directions=0, steps=600)
    comparisons += [
        Comparison("accuracy after 600 steps, 100 directions against 1", grown[100], grown[1], "higher", margin=0.02),
        Comparison("accuracy after 600 steps, 100 directions against backpropagation", grown[100], by_backprop, "higher", margin=-0.05),
        Comparison("tensors saved for a backward pass", _saved(data), 0, "equal"),
        Comparison(
            "test accuracy, untrained", accuracy(_network(seeds[0]), data), 0.90, "higher", control=True,
            note="must fail: nothing was learned",
        ),
    ]  # fmt: skip
    forward, backward = _seconds_a_step(data, 1), _seconds_a_step(data, 0)
    return Evidence(
        comparisons, _figure(grown, by_backprop),
        notes=f"A step with one direction takes {forward / backward:.1f} times as long as one of backpropagation on this "
        "network, whose passes are too small to show the ratio of large ones.",
    )  # fmt: skip


def _initialised(net: nn.Module, seed: int) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = randn(p.shape, generator=g) * (0.0 if p.ndim == 1 else p.shape[1] ** -0.5)
    return net


def _linear(seed: int) -> nn.Module:
    return _initialised(nn.Linear(64, 10), seed)


def _network(seed: int) -> nn.Module:
    return _initialised(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), seed)


def _train(net: nn.Module, data: Digits, seed: int, *, lr: float, directions: int, steps: int) -> float:
    """Train by forward gradients, or by backpropagation for no directions; return the test accuracy."""
    x, y = data[:2]
    g = torch.Generator().manual_seed(seed)
    optimizer = ForwardSGD(net, lr, directions=directions, generator=seed) if directions else None
    plain = torch.optim.SGD(net.parameters(), lr) if not directions else None
    for _ in range(steps):
        rows = randint(0, len(x), (64,), generator=g)
        loss = _loss(x[rows], y[rows])
        if optimizer is not None:
            optimizer.step(loss)
        elif plain is not None:
            plain.zero_grad()
            loss(net).backward()
            plain.step()
    return accuracy(net, data)


def _loss(x: Tensor, y: Tensor) -> Callable[[Callable[..., Any]], Tensor]:
    return lambda model: nn.functional.cross_entropy(model(x), y)


def _saved(data: Digits) -> int:
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ForwardSGD(_network(0), 0.01, generator=0).step(_loss(*data[:2]))
    return len(saved)


def _seconds_a_step(data: Digits, directions: int, steps: int = 200) -> float:
    started = time.perf_counter()
    _train(_network(0), data, 0, lr=0.01, directions=directions, steps=steps)
    return (time.perf_counter() - started) / steps


def _figure(grown: dict[int, float], by_backprop: float) -> Figure:
    figure = Figure(figsize=(5, 3), layout="constrained")
    ax = figure.subplots()
    ax.semilogx(list(grown), list(grown.values()), marker="o", label="forward gradients")
    ax.axhline(by_backprop, ls="--", color="0.5", label="backpropagation")
    ax.set_xlabel("directions a step")
    ax.set_ylabel("test accuracy after 600 steps")
    ax.legend(frameon=False)
    return figure
