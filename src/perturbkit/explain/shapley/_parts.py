"""The parts of an input, predictions from some of them, and the game whose value is how little such a prediction loses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from perturbkit.core import Attribution, Oracle, checks

# Class probabilities (n, classes) from inputs with unknown elements set to zero, and masks of the known ones.
SubsetPredictor = Oracle | nn.Module | Callable[[Tensor, Tensor], Tensor]

# Numbers held at once while copies are made; independent of the oracle's chunks.
_BLOCK = 2**18


def numbered(parts: Tensor | None, x: Tensor) -> Tensor:
    """Return the part of every element of a row, counted from 0."""
    if parts is None:
        return torch.arange(x[0].numel(), device=x.device).reshape(x.shape[1:])
    checks.tensor("parts", parts, floating=False)
    try:
        wide = parts.to(x.device).expand(x.shape[1:])
    except RuntimeError:
        wide = None
    if (
        wide is None
        or wide.is_floating_point()
        or len(wide.unique()) != int(wide.max()) + 1
        or int(wide.min()) < 0
    ):
        raise checks.ArgumentError(
            f"parts has shape {tuple(parts.shape)} and dtype {parts.dtype}; allowed: integers that broadcast to a row of x, "
            f"{tuple(x.shape[1:])}, with every number from 0 to the largest. Number the part of each element."
        )
    return wide


def whole_answer(oracle: Oracle, x: Tensor) -> Tensor:
    """Return the probabilities given everything, checked to be such."""
    out = oracle(x, torch.ones_like(x))
    checks.probabilities("the model's answer", out)
    return out


def answers(oracle: Oracle, x: Tensor, keep: Tensor) -> Tensor:
    """Return the probabilities for every row under every mask ``keep`` (m, ...), shape (m, n, classes)."""
    found = []
    for part in keep.split(max(1, _BLOCK // x.numel())):
        mask = part[:, None].expand(-1, *x.shape).to(x.dtype)
        out = oracle((x * mask).flatten(0, 1), mask.flatten(0, 1))
        found.append(out.reshape(len(part), len(x), -1))
    return torch.cat(found)


def negative_kl(whole: Tensor, known: Tensor) -> Tensor:
    """Return -KL(whole || known) over the last dimension, in double precision."""
    p, q = whole.double(), known.double()
    least = torch.finfo(whole.dtype).tiny
    return (torch.xlogy(p, q.clamp(min=least)) - torch.xlogy(p, p.clamp(min=least))).sum(-1)


def top_parts(scores: Tensor, fraction: float) -> Tensor:
    """Return masks (n, parts) of the share of parts with the highest scores, at least one."""
    count = max(1, round(fraction * scores.shape[1]))
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter(1, order, True)


def part_scores(name: str, scores: Any, n: int, d: int) -> Tensor:
    """Return the scores of an explanation, one a row and part."""
    values = scores.values if isinstance(scores, Attribution) else scores
    checks.tensor(name, values)
    if values.numel() != n * d or len(values) != n:
        raise checks.ArgumentError(
            f"{name} has shape {tuple(values.shape)}; allowed: {(n, d)}, one score a row and part. Pass the values of a method "
            "that was given the same rows and parts."
        )
    return values.detach().reshape(n, d)
