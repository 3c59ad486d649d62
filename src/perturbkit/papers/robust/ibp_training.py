"""Training through intervals gives networks that intervals verify, which plain and attacked training do not.

On 8x8 digits: share of test rows verified at a change of 0.1, for one small convolutional network trained with intervals,
plainly, and on attacked inputs; accuracy under attack, which must never be below what is verified; and training with
intervals from the first step on, which collapses.
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import around
from perturbkit.core.random import randperm, uniform
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.robust import IBPTrainer, projected_gradient, verified_accuracy

_RADIUS = 0.1
_RADII = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2)


@paper(
    number=122,
    title="On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models",
    authors="Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli",
    year=2018,
    arxiv="1810.12715",
    claim="Networks trained on interval bounds, with a slow ramp of the radius, are verified by those bounds, where other "
    "training leaves next to nothing verified.",
    method="perturbkit.robust.IBPTrainer",
    needs="training, data",
    input="image, tabular",
    cost="two forward passes and one backward pass a step",
    seconds=40,
)
def reproduce(run: Run) -> Evidence:
    """Train four ways and verify."""
    from perturbkit.data import load_digits8

    train, test = load_digits8("train"), load_digits8("test")
    nets = {name: _network(run) for name in ("intervals", "plain", "attacked", "no ramp")}
    options: dict[str, Any] = {"lr": 3e-3, "generator": run.generator("batches")}
    IBPTrainer(nets["intervals"], 0.15, kappa=0.25, **options).fit(
        train.x, train.y, n_steps=1500, progress=run.progress
    )
    IBPTrainer(nets["no ramp"], 0.15, kappa=0.25, warmup=0, rampup=0, **options).fit(
        train.x, train.y, n_steps=600
    )
    _fit(nets["plain"], train.x, train.y, 600, 0.0, run)
    _fit(nets["attacked"], train.x, train.y, 600, 0.12, run)
    verified = {
        name: [verified_accuracy(net, test.x, test.y, eps) for eps in _RADII] for name, net in nets.items()
    }
    at = {name: curve[_RADII.index(_RADIUS)] for name, curve in verified.items()}
    attack = projected_gradient(
        nets["intervals"],
        test.x,
        test.y,
        around(test.x, "linf", _RADIUS),
        n_steps=20,
        generator=run.generator("attack"),
    )
    standing = 1 - float(attack.success.double().mean())
    n = len(test)
    comparisons = [
        Comparison("verified accuracy at 0.1 above 70 %", at["intervals"], 0.7, "higher", n=n),
        Comparison("verified accuracy at 0.1, plain training below 5 %", at["plain"], 0.05, "lower", n=n),
        Comparison("verified accuracy at 0.1, training on attacked inputs below 20 %", at["attacked"], 0.2, "lower", n=n),
        Comparison("accuracy under 20 steps of attack against what is verified", standing, at["intervals"], "higher", n=n),
        Comparison(
            "verified accuracy at 0.1 against the same training without a ramp", at["intervals"], at["no ramp"], "higher",
            margin=0.05, n=n,
        ),
        Comparison(
            "verified accuracy at 0.1 of plain training against intervals", at["plain"], at["intervals"], "higher",
            control=True, n=n, note="must fail: nothing in plain training keeps the intervals narrow",
        ),
    ]  # fmt: skip
    return Evidence(
        comparisons,
        _figure(verified),
        notes="One network a way of training: 8 and 16 channels and 64 units, 1500 steps against the paper's 100,000.",
    )


def _network(run: Run) -> nn.Module:
    """The same first weights for every way of training."""
    net = nn.Sequential(
        nn.utils.skip_init(nn.Conv2d, 1, 8, 3, padding=1), nn.ReLU(),
        nn.utils.skip_init(nn.Conv2d, 8, 16, 4, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
        nn.utils.skip_init(nn.Linear, 256, 64), nn.ReLU(), nn.utils.skip_init(nn.Linear, 64, 10),
    )  # fmt: skip
    generator = run.generator("weights")
    for layer in net:
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            bound = layer.weight[0].numel() ** -0.5
            layer.weight.data = uniform(layer.weight.shape, -bound, bound, generator=generator)
            layer.bias.data = uniform(layer.bias.shape, -bound, bound, generator=generator)
    return net


def _fit(net: nn.Module, x: Tensor, y: Tensor, n_steps: int, eps: float, run: Run) -> None:
    """Train on inputs attacked by five steps of gradient signs; on clean ones where the radius is zero."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    generator = run.generator("plain batches")
    for step in range(n_steps):
        rows = randperm(len(x), generator=generator)[:100]
        at = x[rows]
        if step > n_steps // 10 and eps > 0:
            delta = uniform(at.shape, -eps, eps, generator=generator)
            for _ in range(5):
                leaf = (at + delta).clamp(0, 1).requires_grad_(True)
                (gradient,) = torch.autograd.grad(functional.cross_entropy(net(leaf), y[rows]), leaf)
                delta = (delta + eps / 2 * gradient.sign()).clamp(-eps, eps)
            at = (at + delta).clamp(0, 1)
        loss = functional.cross_entropy(net(at), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _figure(verified: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    for name, curve in verified.items():
        ax.plot(_RADII, curve, marker="o", label=name)
    ax.set_xlabel("largest change of a pixel")
    ax.set_ylabel("verified accuracy")
    ax.legend(frameon=False)
    return figure
