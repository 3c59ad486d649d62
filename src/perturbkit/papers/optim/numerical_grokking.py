"""Orthogonal gradients generalise soon on modular addition, where plain training collapses and weight decay takes long.

Networks with two hidden layers and no biases learn half of the sums modulo 37 from whole batches, each method at the best of
four rates; counted are the steps to 95% test accuracy. Gradients made orthogonal to a random direction are the control.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import mixed_seed, randn, seeded_init
from perturbkit.optim import (
    ModularAddition,
    OrthogonalGradient,
    naive_loss_alignment,
    softmax_collapse_fraction,
)
from perturbkit.papers import Comparison, Evidence, Run, paper

RATES = (0.03, 0.01, 0.003, 0.001)
PLAIN_STEPS = 3000
MOST_STEPS = 2000
# The authors' own: the usual 1e-8 hides small gradients before the softmax does.
ADAM: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-25}

Wrap = Callable[..., torch.optim.Optimizer]


@paper(
    number=197,
    title="Grokking at the Edge of Numerical Stability",
    authors="Prieto, Barsbey, Mediano, Birdal",
    year=2025,
    arxiv="2501.04697",
    claim="Without decay the softmax collapses and nothing is generalised; orthogonal gradients generalise without the delay of weight decay.",
    method="perturbkit.optim.OrthogonalGradient",
    needs="training",
    input="any",
    cost="one gradient a step, and a few inner products a tensor",
    seconds=75,
)
def reproduce(run: Run) -> Evidence:
    """Steps to 95% test accuracy, and what plain training ends with."""
    steps: dict[str, list[float]] = {"orthogonal": [], "decay": [], "random": []}
    plain: list[dict[str, list[float]]] = []
    for seed in run.seeds(3):
        task = ModularAddition(37, 0.5, generator=seed)
        steps["orthogonal"].append(_fastest(task, seed, OrthogonalGradient))
        steps["decay"].append(_fastest(task, seed, _decayed))
        steps["random"].append(_fastest(task, seed, _RandomlyProjected, most=500))
        plain.append(_train(task, seed, _undecayed, RATES[1], PLAIN_STEPS, every=100))
    last = {name: [p[name][-1] for p in plain] for name in plain[0]}
    ones = [1.0] * len(plain)
    comparisons = [
        Comparison.over_seeds("steps to 95% test accuracy, best rate", steps["orthogonal"], steps["decay"], "lower", factor=0.5),
        Comparison.over_seeds("training accuracy of plain training", last["train"], ones, "equal", margin=0.01),
        Comparison.over_seeds("test accuracy of plain training", last["test"], [0.5] * len(plain), "lower"),
        Comparison.over_seeds("collapsed share of its training rows", last["collapsed"], [0.25] * len(plain), "higher"),
        Comparison.over_seeds(
            "steps to 95%, orthogonal to a random direction (at most 500)", steps["random"], steps["decay"], "lower",
            factor=0.5, control=True, note="must fail: the direction that does harm is that of the weights",
        ),
    ]  # fmt: skip
    early = [p["aligned"][5] for p in plain]
    return Evidence(
        comparisons, _figure(plain),
        notes=f"The cosine of plain training's step and its weights is {sum(early) / len(early):.2f} after 500 steps. StableMax is not "
        "run here: with p = 37 or 47 it reached no more than 14% in 40000 steps at any of these rates, and with p = 113, width 200 "
        "and 40% for training 84 to 97% in 80000 steps on an accelerator, which agrees with the paper, slowly.",
    )  # fmt: skip


def _network(task: ModularAddition, seed: int) -> nn.Sequential:
    with seeded_init(seed):
        return nn.Sequential(
            nn.Linear(2 * task.p, 128, bias=False), nn.ReLU(), nn.Linear(128, 128, bias=False), nn.ReLU(),
            nn.Linear(128, task.p, bias=False),
        )  # fmt: skip


def _train(
    task: ModularAddition, seed: int, wrap: Wrap, lr: float, steps: int, every: int = 25, until: float = 2.0
) -> dict[str, list[float]]:
    """Train until a test accuracy, and return what was measured every so many steps."""
    net = _network(task, seed)
    optimizer = wrap(net.parameters(), lr=lr, **ADAM)
    found: dict[str, list[float]] = {"step": [], "train": [], "test": [], "collapsed": [], "aligned": []}
    for step in range(steps + 1):
        optimizer.zero_grad()
        logits = net(task.x)
        nn.functional.cross_entropy(logits, task.y).backward()
        if step % every == 0:
            found["step"].append(step)
            found["train"].append(_accuracy(logits, task.y))
            with torch.no_grad():
                found["test"].append(_accuracy(net(task.test_x), task.test_y))
            found["collapsed"].append(softmax_collapse_fraction(logits, task.y))
            found["aligned"].append(naive_loss_alignment(net.parameters()))
            if found["test"][-1] >= until:
                break
        optimizer.step()
    return found


def _fastest(task: ModularAddition, seed: int, wrap: Wrap, most: int = MOST_STEPS) -> float:
    """Return the fewest steps to 95% over the rates; a rate is given up when another was faster."""
    for lr in RATES:
        found = _train(task, seed, wrap, lr, most, until=0.95)
        if found["test"][-1] >= 0.95:
            most = min(most, int(found["step"][-1]))
    return float(most)


def _accuracy(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(1) == y).double().mean())


def _undecayed(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, weight_decay=0.0, **options)


def _decayed(params: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, weight_decay=1.0, **options)


class _RandomlyProjected(torch.optim.AdamW):
    """Gradients orthogonal to a fresh random direction, at their own length."""

    def __init__(self, params: Any, **options: Any) -> None:
        self._t = 0
        super().__init__(params, weight_decay=0.0, **options)

    def step(self, closure: Any = None) -> Any:
        self._t += 1
        g = torch.Generator().manual_seed(mixed_seed(self._t))
        for p in self.param_groups[0]["params"]:
            u = randn(p.shape, generator=g)
            part = p.grad - (p.grad * u).sum() / u.square().sum() * u
            p.grad = part * (p.grad.norm() / part.norm())
        return super().step(closure)


def _figure(plain: list[dict[str, list[float]]]) -> Figure:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    for name, label in (
        ("train", "training accuracy"),
        ("test", "test accuracy"),
        ("collapsed", "collapsed rows"),
    ):
        values = torch.tensor([p[name] for p in plain]).mean(0)
        axes.plot(plain[0]["step"], values, label=label)
    axes.set_xlabel("step of plain training")
    axes.legend(frameon=False)
    return figure
