"""The loop that the adversarial training methods share: batches, attack, rate, history.

A training loss is any ``loss(model, x, y)`` that answers a scalar with a graph; whatever has that shape goes into this
loop, into the others of the room, and into one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Ball, Norm, Oracle, Result, around, checks, keeping_modes, track, unwrap_output
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import randperm

__all__ = [
    "Attack",
    "Schedule",
    "TrainingHistory",
    "TrainingLoss",
    "ascend",
    "checked_data",
    "cross_entropy",
    "run_epochs",
]

TrainingLoss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class TrainingHistory(Result):
    """An adversarial training, one entry an epoch.

    Attributes
    ----------
    loss : Tensor, shape (epochs,)
        Mean training loss, as it was descended.
    reference_loss : Tensor, shape (epochs,) or (0,)
        Mean reference loss, where the method has one.
    score : Tensor, shape (epochs,) or (0,)
        What ``evaluate`` returned after each epoch.
    """

    loss: Tensor
    reference_loss: Tensor
    score: Tensor


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and on how many rows; checked on construction."""

    epochs: int
    lr: float
    momentum: float
    weight_decay: float
    drops: Sequence[float]
    batch_size: int
    max_norm: float | None = None

    def __post_init__(self) -> None:
        checks.integer("epochs", self.epochs, low=1)
        checks.positive("lr", self.lr)
        checks.between("momentum", self.momentum, 0, 1, inclusive="low")
        checks.nonnegative("weight_decay", self.weight_decay)
        for drop in self.drops:
            checks.between("drops", drop, 0, 1)
        checks.integer("batch_size", self.batch_size, low=1)
        if self.max_norm is not None:
            checks.positive("max_norm", self.max_norm)

    def factor(self, epoch: int) -> float:
        """Return what the rate is multiplied by: a tenth for every drop that is passed."""
        return 0.1 ** sum(epoch >= drop * self.epochs for drop in self.drops)

    def stages(self) -> list[int]:
        """Return the epochs at which the rate changes, with the first and the end."""
        inner = [e for e in range(1, self.epochs) if self.factor(e) != self.factor(e - 1)]
        return [0, *inner, self.epochs]


def checked_data(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Check a module and its training data; return the labels."""
    if not isinstance(model, nn.Module):
        raise checks.ArgumentTypeError(
            f"model is a {type(model).__name__}; allowed: an nn.Module, whose weights can be trained. Pass the network."
        )
    checks.tensor("x", x)
    return checks.labels("y", y, n=len(x)).to(x.device)


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy: the plain training loss."""
    return functional.cross_entropy(unwrap_output(model(x)), y)


def ascend(
    oracle: Oracle, x: Tensor, y: Tensor, epsilon: float, norm: Norm, clip: tuple[float, float] | None,
    n_steps: int, step_size: float, generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Climb the cross-entropy by projected gradient from a random start, in evaluation mode; return the inputs found.

    The attack that training needs: unlike one that measures, it goes on where a row is broken already, and keeps what it
    reached where a row stands.
    """
    ball = around(x, norm, epsilon, clip)
    stride = Ball(norm, step_size)
    delta = ball.sample(x, generator=generator)
    with oracle.frozen():
        for _ in range(n_steps):
            _, gradient = oracle.value_and_gradient(x + delta, y, objective=_row_loss)
            delta = ball.project(delta + stride.maximiser(gradient))
    return x + delta


def run_epochs(
    model: nn.Module,
    n: int,
    step: Callable[[Tensor, int], tuple[float, float | None]],
    schedule: Schedule,
    *,
    like: Tensor,
    end_epoch: Callable[[int, float | None], None] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    generator: torch.Generator,
    progress: ProgressLike,
) -> TrainingHistory:
    """Descend by SGD with momentum what ``step(rows, epoch)`` puts into the gradients.

    ``step`` answers the loss and, or None, a reference loss, whose means over the epoch go to ``end_epoch``. The model is
    in training mode for steps and in evaluation mode for ``evaluate``; its modes come back.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=schedule.lr,
        momentum=schedule.momentum,
        weight_decay=schedule.weight_decay,
    )
    losses, references, scores = [], [], []
    with keeping_modes(model):
        for epoch in track(range(schedule.epochs), "adversarial training", progress=progress):
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr * schedule.factor(epoch)
            model.train()
            total, reference_total, referred = 0.0, 0.0, False
            for rows in randperm(n, generator=generator).split(schedule.batch_size):
                optimizer.zero_grad(set_to_none=True)
                loss, reference = step(rows.to(like.device), epoch)
                if schedule.max_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), schedule.max_norm)
                optimizer.step()
                total += loss * len(rows) / n
                if reference is not None:
                    reference_total += reference * len(rows) / n
                    referred = True
            losses.append(total)
            references += [reference_total] if referred else []
            if end_epoch is not None:
                end_epoch(epoch, reference_total if referred else None)
            if evaluate is not None:
                model.eval()
                scores.append(float(evaluate(model)))
    return TrainingHistory(*(torch.tensor(v, dtype=like.dtype) for v in (losses, references, scores)))


def _row_loss(out: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(out, y, reduction="none")
