"""A shifted ReLU network needs few of its neurons for an input, also while it is trained on attacked inputs.

Digits three and eight in eight principal components, on the unit sphere: the share of neurons that fire and the work of a
step over the width, robust training to the end at one width, and the same network without a shift, of which half the
neurons fire, as baseline and control.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from perturbkit.core.random import randperm
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.robust import (
    ShiftedReLUNet,
    SublinearAdversarialTrainer,
    SublinearHistory,
    expected_active_fraction,
)

_WIDTHS = tuple(2**k for k in range(8, 15))
_RADIUS = 0.05
_WIDTH = 1024


@paper(
    number=188,
    title="A Sublinear Adversarial Training Algorithm",
    authors="Gao, Qin, Song, Wang",
    year=2022,
    arxiv="2208.05395",
    claim="Of m neurons with shifted ReLU only o(m) fire, at the start and during adversarial training, which converges; with "
    "half-space reporting a step takes o(nmd) time.",
    method="perturbkit.robust.SublinearAdversarialTrainer",
    needs="training",
    input="vectors",
    cost="O(d m^0.8) a row and step, and the search",
    seconds=50,
)
def reproduce(run: Run) -> Evidence:
    """Count neurons and work over the width, and train to the end."""
    x, y, test_x, test_y = _pairs(run)
    short = {
        name: [_train(run.seed, m, bias, x, y, 5, "halfspace")[1] for m in _WIDTHS]
        for name, bias in (("shift", None), ("none", 0.0))
    }
    active = {
        n: [m * float(h.active_fraction[0]) for m, h in zip(_WIDTHS, hs, strict=True)]
        for n, hs in short.items()
    }
    work = {n: [float(h.multiply_adds.double().mean()) for h in hs] for n, hs in short.items()}
    visited = [float(h.visited_fraction.mean()) for h in short["shift"]]
    expected = [m * expected_active_fraction(math.sqrt(0.4 * math.log(m))) for m in _WIDTHS]
    worst = max(abs(a / e - 1) for a, e in zip(active["shift"], expected, strict=True))
    robust: dict[str, list[float]] = {"shift": [], "none": []}
    histories = []
    for seed in run.seeds(3):
        for name, bias in (("shift", None), ("none", 0.0)):
            net, history = _train(seed, _WIDTH, bias, x, y, 600, "dense")
            robust[name].append(_standing(net, test_x, test_y))
            histories += [history] if name == "shift" else []
    long = histories[0]
    first, last = float(long.active_fraction[0]), float(long.active_fraction[-1])
    n = len(_WIDTHS)
    comparisons = [
        Comparison("firing neurons against a normal variable's, largest relative difference", worst, 0.2, "lower", n=n),
        Comparison("share that fires after training, twice that before", last, first, "lower", factor=2.0, n=len(x)),
        Comparison("slope of firing neurons in the width, in logarithms", _slope(active["shift"]), 0.85, "lower", n=n),
        Comparison("slope of multiply-adds of a step in the width, in logarithms", _slope(work["shift"]), 0.95, "lower", n=n),
        Comparison("robust training loss, a tenth of the first", float(long.loss[-1]), float(long.loss[0]), "lower", factor=0.1, n=len(x)),
        Comparison.over_seeds("robust test accuracy within a point of the network without a shift", robust["shift"], robust["none"], "higher", margin=-0.01),
        Comparison(
            "slope of firing neurons in the width without a shift", _slope(active["none"]), 0.85, "lower", control=True, n=n,
            note="must fail: half of all neurons fire",
        ),
    ]  # fmt: skip
    return Evidence(
        comparisons,
        _figure(active, work, expected),
        notes="Multiply-adds of attack, search, gradient and update; the tree visits "
        f"{visited[0]:.0%} of its nodes at {_WIDTHS[0]} neurons and {visited[-1]:.0%} at {_WIDTHS[-1]}, in 8 dimensions. Without "
        f"a shift the slope of the work is {_slope(work['none']):.2f}. Radius {_RADIUS}, Euclidean, on the sphere; {len(test_x)} test rows.",
    )


def _pairs(run: Run) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 100 training rows and the test rows of two digits, in eight principal components, of norm one."""
    from perturbkit.data import load_digits8

    train, test = load_digits8("train"), load_digits8("test")
    parts = []
    for part in (train, test):
        keep = (part.y == 3) | (part.y == 8)
        parts.append((part.x[keep].flatten(1).double(), (part.y[keep] == 8).long()))
    (x, y), (test_x, test_y) = parts
    rows = randperm(len(x), generator=run.generator("rows"))[:100]
    mean = x.mean(0)
    axes = torch.linalg.svd(x - mean, full_matrices=False)[2][:8]
    x, test_x = (functional.normalize((z - mean) @ axes.T, dim=1) for z in (x, test_x))
    return x[rows], y[rows], test_x, test_y


def _train(
    seed: int,
    m: int,
    bias: float | None,
    x: Tensor,
    y: Tensor,
    n_steps: int,
    backend: Literal["halfspace", "dense"],
) -> tuple[ShiftedReLUNet, SublinearHistory]:
    net = ShiftedReLUNet(8, m, bias=bias, generator=seed, dtype=torch.float64)
    trainer = SublinearAdversarialTrainer(net, _RADIUS, lr=20.0, backend=backend)
    return net, trainer.fit(x, y, n_steps=n_steps)


def _standing(net: ShiftedReLUNet, x: Tensor, y: Tensor) -> float:
    """Return the accuracy under ten steps of attack along the sphere."""
    copy = ShiftedReLUNet(8, len(net.signs), bias=net.bias, generator=0, dtype=x.dtype)
    copy.load_state_dict(net.state_dict())
    at = x
    for _ in range(10):
        leaf = at.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(functional.cross_entropy(copy(leaf), y, reduction="sum"), leaf)
        step = at + _RADIUS / 4 * functional.normalize(gradient, dim=1)
        delta = step - x
        length = delta.norm(dim=1, keepdim=True).clamp_min(_RADIUS)
        at = functional.normalize(x + delta * _RADIUS / length, dim=1)
    with torch.no_grad():
        return float((copy(at).argmax(1) == y).double().mean())


def _slope(values: list[float]) -> float:
    """Return the slope of logarithms over those of the widths, by least squares."""
    u = torch.tensor(_WIDTHS, dtype=torch.float64).log()
    v = torch.tensor(values, dtype=torch.float64).log()
    u = u - u.mean()
    return float((u * v).sum() / u.square().sum())


def _figure(active: dict[str, list[float]], work: dict[str, list[float]], expected: list[float]) -> Figure:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (("shift", "shifted ReLU"), ("none", "ReLU")):
        left.loglog(_WIDTHS, active[name], marker="o", label=label)
        right.loglog(_WIDTHS, work[name], marker="o", label=label)
    left.loglog(_WIDTHS, expected, "k--", lw=1, label="normal variable")
    left.set_ylabel("firing neurons, mean")
    right.set_ylabel("multiply-adds a step")
    for ax in (left, right):
        ax.set_xlabel("neurons")
        ax.legend(frameon=False)
    return figure
