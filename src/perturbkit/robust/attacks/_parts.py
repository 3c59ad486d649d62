"""What the attacks share: labels checked against answers, the margin and its softened form, and their schedule."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from perturbkit.core import Ball, BallInBox, Box, Oracle, checks

__all__ = ["column", "half_cosine", "labels_for", "margin", "softened_margin", "steepest"]

# The softest margin averages over wrong classes within this share of the logits' own spread.
_SOFTEST = 0.4


def labels_for(oracle: Oracle, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the clean answers and the labels, checked against each other.

    Raises
    ------
    ModelError
        If the model does not answer one score a class.
    ArgumentError
        If a label is not that of a class.
    """
    clean = oracle(x)
    if clean.ndim != 2 or clean.shape[1] < 2:
        raise checks.ModelError(
            f"the model answered shape {tuple(clean.shape)}; allowed: (n, classes) with at least two classes. "
            "For one logit z, return torch.stack([0 * z, z], 1)."
        )
    return clean, checks.labels("y", y, n=len(x), n_classes=clean.shape[1]).to(x.device)


def margin(out: Tensor, target: Tensor) -> Tensor:
    """Return the right logit less the best wrong one: above zero where the answer is right."""
    return out.gather(1, target[:, None])[:, 0] - out.scatter(1, target[:, None], -torch.inf).amax(1)


def column(values: Tensor, like: Tensor) -> Tensor:
    """Return one number a row in a shape that broadcasts against a batch."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def half_cosine(step: int, n_steps: int) -> float:
    """Return a factor that falls from 1 at the first step towards 0 after the last."""
    return 0.5 * (1 + math.cos(math.pi * step / n_steps))


def softened_margin(softness: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return an objective whose value is the margin and whose gradient is that of a softened one.

    The maximum over wrong classes is ``T log sum exp(z_k / T)`` with T falling with the softness, from 1 to 0: an attack
    that starts soft does not decide on the nearest wrong class by the clean logits alone.
    """

    def objective(out: Tensor, target: Tensor) -> Tensor:
        own = out.gather(1, target[:, None])[:, 0]
        wrong = out.scatter(1, target[:, None], -torch.inf)
        spread = out.detach().std(1, correction=0, keepdim=True)
        temperature = (_SOFTEST * softness**2 * spread).clamp_min(torch.finfo(out.dtype).eps)
        soft = own - (temperature * torch.logsumexp(wrong / temperature, 1, keepdim=True))[:, 0]
        return margin(out, target).detach() + soft - soft.detach()

    return objective


def steepest(uphill: Tensor, ball: Ball, room: Box | None) -> Tensor:
    """Return the step in a ball that climbs most. One of l1 moves few values, so it must know how far they can."""
    if ball.norm != "l1" or room is None:
        return ball.maximiser(uphill)
    return BallInBox(ball, room).maximiser(uphill)
