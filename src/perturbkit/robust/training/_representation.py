"""How :mod:`rrcm` trains: batches, augmentations, rates by layer, the loop and the consistency of copies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from perturbkit.core import Result, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import randperm

__all__ = [
    "Augment",
    "RepresentationHistory",
    "augmented",
    "batches_of",
    "check_augment",
    "descend",
    "disagreement",
    "layers_of",
]

Augment = Callable[[Tensor, torch.Generator], Tensor]
Loss = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class RepresentationHistory(Result):
    """A training of the representation or of the classifier on it, one entry a step.

    Attributes
    ----------
    loss : Tensor, shape (steps,)
        What was descended.
    consistency : Tensor, shape (steps,)
        Its part that asks for agreement: of neighbours on a path, or of two noisy copies.
    """

    loss: Tensor
    consistency: Tensor


def check_augment(augment: Augment) -> None:
    if not callable(augment):
        raise checks.ArgumentTypeError(
            f"augment is a {type(augment).__name__}; allowed: a callable (x, generator). Pass a function; the identity is one."
        )


def augmented(augment: Augment, rows: Tensor, generator: torch.Generator) -> Tensor:
    found = checks.tensor("what augment answered", augment(rows, generator))
    return checks.same_shape("what augment answered", found, "its rows", rows)


def batches_of(n: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Return the rows of each step: whole batches of one order after another."""
    whole = slice(n // min(size, n))
    orders = (randperm(n, generator=generator).split(min(size, n))[whole] for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(orders), steps)


def layers_of(encoder: nn.Module, head: nn.Module, lr: float, decay: float) -> list[dict[str, Any]]:
    """Return groups of parameters whose rates fall from the head down to what is the encoder's own."""
    layers = [head, *reversed(list(encoder.children())), nn.ParameterList(encoder.parameters(recurse=False))]
    return [{"params": [*m.parameters()], "lr": lr * decay**depth} for depth, m in enumerate(layers)]


def descend(
    rates: LambdaLR, loss: Loss, batches: Iterator[Tensor], steps: int, max_norm: float, like: Tensor,
    progress: ProgressLike,
) -> RepresentationHistory:  # fmt: skip
    optimizer = rates.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    history = []
    try:
        for step, rows in enumerate(track(batches, "representation", total=steps, progress=progress)):
            fit, agreement = loss(rows.to(like.device), step)
            optimizer.zero_grad(set_to_none=True)
            (fit + agreement).backward()
            nn.utils.clip_grad_norm_(parameters, max_norm)
            optimizer.step()
            rates.step()
            history.append(torch.stack([fit + agreement, agreement]).detach())
    finally:
        optimizer.zero_grad(set_to_none=True)
    return RepresentationHistory(*torch.stack(history).unbind(1))


def disagreement(logits: Tensor, consistency: float, entropy: float) -> Tensor:
    """Return the weighted divergence of copies (copies, n, classes) from their mean answer, and that mean's entropy."""
    log_p = logits.log_softmax(2)
    mean = log_p.exp().mean(0)
    log_mean = log_p.logsumexp(0) - math.log(len(logits))
    divergence = (mean * (log_mean - log_p)).sum(2).mean()
    return consistency * divergence - entropy * (mean * log_mean).sum(1).mean()
