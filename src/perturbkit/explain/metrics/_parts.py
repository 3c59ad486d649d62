"""What the metrics share: explanations as tensors, and blocks of copies of the inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from perturbkit.core import Attribution, Oracle, checks, target_rows
from perturbkit.explain.removal._parts import expanded_baseline

Model = Oracle | nn.Module | Callable[[Tensor], Tensor]
Method = Callable[..., Attribution | Tensor]

# Numbers held at once while perturbations are drawn; independent of the oracle's chunks, so that they do not
# change the draws.
BLOCK = 2**22


def blocks(x: Tensor, n: int) -> list[int]:
    """Return numbers of copies of ``x`` that add up to ``n``."""
    size = max(1, BLOCK // x.numel())
    return [min(size, n - start) for start in range(0, n, size)]


def repeated(target: Tensor | int | None, x: Tensor, times: int = 1) -> Tensor | None:
    """Return the target of every row of ``times`` copies of ``x``."""
    rows = target_rows(target, x)
    return None if rows is None else rows.repeat(times)


def as_scores(explanation: Attribution | Tensor, x: Tensor) -> Tensor:
    """Return the scores of an explanation, which must have the shape of ``x``."""
    values = explanation.values if isinstance(explanation, Attribution) else explanation
    return checks.same_shape("explanation", checks.tensor("explanation", values), "x", x).detach()


def as_slopes(explanation: Attribution | Tensor, x: Tensor, baseline: Tensor | float | None) -> Tensor:
    """Return scores as output a unit of input: shares of the output are divided by the change that they are of."""
    phi = as_scores(explanation, x)
    if baseline is None:
        return phi
    change = x - expanded_baseline(baseline, x)
    return torch.where(change == 0, torch.zeros_like(phi), phi / change)


def explained(method: Method, oracle: Oracle, x: Tensor, target: Tensor | int | None) -> Tensor:
    """Return the scores that a method gives."""
    return as_scores(method(oracle, x, target), x)
