"""Holding the loss of single-step adversarial training to that of the epoch before keeps its robustness from collapsing.

Accuracy under 20 steps of attack, after every epoch, for single-step training with a random start, the same with the
constraint, and training on several steps, all from one trained digits
network. The same constraint with its sign drawn at random is the control.
"""

from __future__ import annotations

import copy
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import rademacher
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.robust._digits import accuracy, robust_accuracy, stream
from perturbkit.robust import ConvergeSmooth, adversarial_train, fast_adversarial_train

_RADIUS = 0.2
_STEP = 1.5
_EPOCHS = 12


class _RandomSign(ConvergeSmooth):
    """The gate as it is, and a coin for the direction: what the sign is worth."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def step(self, loss: Tensor, reference_loss: Tensor, epoch: int) -> Tensor:
        if super().step(loss, reference_loss, epoch) is loss:
            return loss
        return loss + float(rademacher((), generator=self.generator)) * reference_loss


@paper(
    number=128,
    title="Fast Adversarial Training with Smooth Convergence",
    authors="Zhao, Zhang, Kong, Yin",
    year=2023,
    arxiv="2308.12857",
    claim="Limiting the difference of the loss between epochs keeps single-step adversarial training from catastrophic "
    "overfitting at large budgets, and ends more robust.",
    method="perturbkit.robust.ConvergeSmooth",
    needs="training",
    input="any",
    cost="two forward and backward passes a step",
    seconds=120,
)
def reproduce(run: Run) -> Evidence:
    """Train four ways, three seeds."""
    from perturbkit.data import digits_classifier, load_digits28

    train, test = load_digits28("train").rows(range(2000)), load_digits28("test").rows(range(200))
    curves: dict[str, list[list[float]]] = {
        n: [] for n in ("single step", "smooth", "random sign", "five steps")
    }
    clean: dict[str, list[float]] = {name: [] for name in curves}
    for seed in run.seeds(3):
        for name in curves:

            def evaluate(net: nn.Module, seed: int = seed) -> float:
                return robust_accuracy(net, test.x, test.y, _RADIUS, stream(seed, 2))

            net = copy.deepcopy(digits_classifier(28).module).requires_grad_(True)
            shared: dict[str, Any] = {
                "batch_size": 100, "drops": (0.9,), "evaluate": evaluate, "generator": stream(seed, 1)
            }  # fmt: skip
            if name == "five steps":
                parts: list[float] = []
                for radius in (
                    0.25,
                    0.5,
                    0.75,
                    1.0,
                    1.0,
                    1.0,
                ):  # at the full radius from the start the network dies
                    history = adversarial_train(
                        net, train.x, train.y, radius * _RADIUS, epochs=1, n_attack_steps=5, **{**shared, "lr": 0.03}
                    )  # fmt: skip
                    parts += history.score.tolist()
                curves[name].append(parts)
            else:
                smooth = {
                    "single step": None,
                    "smooth": ConvergeSmooth(),
                    "random sign": _RandomSign(stream(seed, 3)),
                }[name]
                history = fast_adversarial_train(
                    net, train.x, train.y, _RADIUS, epochs=_EPOCHS, attack_step=_STEP * _RADIUS, smooth=smooth, **shared
                )  # fmt: skip
                curves[name].append(history.score.tolist())
            clean[name].append(accuracy(net, test.x, test.y))
    last = {name: [c[-1] for c in rows] for name, rows in curves.items()}
    best = {name: [max(c) for c in rows] for name, rows in curves.items()}
    fall = {name: [_fall(c) for c in rows] for name, rows in curves.items()}
    collapsed = sum(max(c) > 0.3 and min(c[c.index(max(c)) :]) < 0.1 for c in curves["single step"])
    over = Comparison.over_seeds
    comparisons = [
        Comparison("seeds of three in which the single step collapses: above 30 %, then below 10 %", collapsed, 2, "higher", n=3),
        over("largest fall of accuracy under attack, half of the single step's", fall["smooth"], fall["single step"], "lower", factor=0.5),
        over("last accuracy under attack within 5 points of its own best", last["smooth"], best["smooth"], "higher", margin=-0.05),
        over("last accuracy under attack, 15 points above the single step", last["smooth"], last["single step"], "higher", margin=0.15),
        over("clean accuracy within 5 points of training on five steps", clean["smooth"], clean["five steps"], "higher", margin=-0.05),
        over(
            "largest fall of accuracy under attack with a random sign, half of the single step's", fall["random sign"],
            fall["single step"], "lower", factor=0.5, control=True, note="must fail: the direction of the correction matters",
        ),
    ]  # fmt: skip
    numbers = ", ".join(
        f"{n} {fmean(best[n]):.3f} / {fmean(last[n]):.3f} / {fmean(clean[n]):.3f}" for n in curves
    )
    return Evidence(
        comparisons,
        _figure(curves),
        notes="Single steps of 1.5 times the radius, 20 batches an epoch; training on five steps has a rate of 0.03 and a "
        "radius that grows over three epochs, since it dies otherwise. Robustness falls by tens of points for an epoch and "
        "comes back: it does not collapse for good, neither here nor on 8x8 digits at 0.25 with steps of twice the radius, where "
        "the constraint ended at 0.139 and the single step at 0.437. Losses of single batches differ by more than the limit of 0.03, so that the correction acts on most of them. "
        f"Best and last accuracy under attack and clean accuracy: {numbers}.",
    )


def _fall(curve: list[float]) -> float:
    """Return the largest fall from a peak to a later epoch."""
    peak = fall = 0.0
    for value in curve:
        peak = max(peak, value)
        fall = max(fall, peak - value)
    return fall


def _figure(curves: dict[str, list[list[float]]]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    for i, (name, rows) in enumerate(curves.items()):
        for j, row in enumerate(rows):
            ax.plot(range(1, len(row) + 1), row, color=f"C{i}", lw=1, label=name if j == 0 else None)
    ax.set_xlabel("epoch")
    ax.set_ylabel(f"accuracy under attack at {_RADIUS}")
    ax.legend(frameon=False)
    return figure
