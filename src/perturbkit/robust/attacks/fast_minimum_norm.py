"""Fast minimum-norm attack: the smallest change of each input that changes the answer.

Use it where the question is how far, not whether. Pintor, Roli, Brendel and Biggio (2021), Fast Minimum-norm
Adversarial Attacks through Adaptive Norm Constraints, arXiv:2102.12827.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from perturbkit.core import AttackResult, Ball, Box, Oracle, around, checks, row_norm, track
from perturbkit.core.perturbation import Norm
from perturbkit.core.progress import ProgressLike
from perturbkit.robust.attacks._parts import (
    column,
    half_cosine,
    labels_for,
    margin,
    softened_margin,
    steepest,
)

__all__ = ["fast_minimum_norm"]

_DUAL: dict[str, Norm] = {"l1": "linf", "l2": "l2", "linf": "l1"}
_LINE = 6


def fast_minimum_norm(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    norm: Norm = "linf",
    bounds: tuple[float | Tensor, float | Tensor] | None = (0.0, 1.0),
    n_steps: int = 100,
    gamma: float = 0.3,
    progress: ProgressLike = False,
) -> AttackResult:
    """Find the smallest perturbation that changes each answer.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Classifier of a batch (n, ...), answering logits (n, classes).
    x : Tensor, shape (n, ...)
        Clean inputs, floating point, inside the bounds.
    y : Tensor of int64, shape (n,)
        True labels.
    norm : {"l1", "l2", "linf"}
        What is kept small.
    bounds : (float, float), two tensors that broadcast to ``x``, or None
        Range of valid inputs.
    n_steps : int
        Steps, at least 1.
    gamma : float
        First relative change of the radius, in (0, 1); it falls to 0.01 along a quarter of a cosine.
    progress : Progress, bool or None
        Reports steps.

    Returns
    -------
    AttackResult
        The smallest perturbation found for each row, confirmed by an evaluation; ``radius`` is its norm, zero where
        the clean input is already wrong, infinity (and the clean input) where none was found.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an input or option is not allowed.

    Notes
    -----
    With the margin ``L = z_y - max_{k != y} z_k``, each step first moves the radius: to ``|delta| + L / |grad L|_*``,
    the distance to the boundary of the linearised margin, until the row has once been broken; after that down by
    ``1 - gamma`` from the best norm where the point is adversarial, and up by ``1 + gamma`` where it is not. Then it
    moves the point, by a step down the margin as long as the radius, and projects it on the ball of that radius
    within the bounds.

    Three things differ from the paper and make a small budget go further. The step is the steepest of its norm and
    as long as the radius, where the paper's has a fixed Euclidean length; so nothing depends on the scale of the
    inputs. The gradient is that of a margin whose maximum is softened at first, ``T log sum exp(z_k / T)``, so that the
    nearest class is not decided by the clean logits alone. At the end the length of each perturbation is halved in
    on along its direction.

    Cost: ``n_steps`` gradients and 9 evaluations a row.

    References
    ----------
    Pintor et al. (2021), arXiv:2102.12827, algorithm 1.

    Examples
    --------
    >>> w = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    >>> found = fast_minimum_norm(lambda z: z @ w, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), n_steps=20)
    >>> round(float(found.radius[0]), 2)
    0.1
    """
    checks.tensor("x", x)
    checks.labels("y", y, n=len(x))
    checks.one_of("norm", norm, tuple(_DUAL))
    checks.integer("n_steps", n_steps, low=1)
    checks.between("gamma", gamma, 0, 1, inclusive="neither")
    around(x, norm, 0.0, bounds)  # refuses inputs outside the bounds
    oracle = Oracle.wrap(model)
    before = oracle.cost
    with oracle.frozen():
        _, labels = labels_for(oracle, x, y)
        best, radius = _descend(oracle, x, labels, norm, bounds, n_steps, gamma, progress)
        best = _shorten(oracle, x, labels, best, torch.isfinite(radius))
        success = oracle(x + best).argmax(1) != labels
    radius = torch.where(success, row_norm(best, norm), torch.inf)
    found = torch.where(column(success, x), x + best, x)
    return AttackResult(found, success, radius, norm, oracle.cost - before)


def _descend(
    oracle: Oracle, x: Tensor, y: Tensor, norm: Norm, bounds: tuple[float | Tensor, float | Tensor] | None, n_steps: int, gamma: float,
    progress: ProgressLike,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the smallest adversarial perturbation visited and its norm, infinity where there was none."""
    low, high = (-math.inf, math.inf) if bounds is None else bounds
    # No radius is larger than the way to the farthest corner, whatever a vanishing gradient says.
    farthest = row_norm(torch.maximum(x - low, high - x), norm).clamp_max(torch.finfo(x.dtype).max ** 0.5)
    delta, best = torch.zeros_like(x), torch.zeros_like(x)
    shortest = x.new_full((len(x),), torch.inf)
    for step in track(range(n_steps), "fast minimum norm", progress=progress):
        fall = half_cosine(step, n_steps)
        rate, reach = 0.01 + (gamma - 0.01) * fall, 0.01 + 0.99 * fall
        lead, gradient = oracle.value_and_gradient(x + delta, y, objective=softened_margin(fall))
        size = row_norm(delta, norm)
        better = (lead < 0) & (size < shortest)
        best = torch.where(column(better, x), delta, best)
        shortest = torch.where(better, size, shortest)
        slope = row_norm(gradient, _DUAL[norm]).clamp_min(torch.finfo(x.dtype).tiny)
        boundary = size + lead / slope
        grown = torch.where(torch.isfinite(shortest), size, boundary) * (1 + rate)
        radius = torch.where(lead < 0, shortest * (1 - rate), torch.minimum(grown, shortest))
        radius = torch.minimum(radius, farthest)
        room = None
        if norm == "l1":
            room = Box((low - x - delta).clamp_max(0), (high - x - delta).clamp_min(0))
        moved = delta + steepest(-gradient, Ball(norm, reach * radius), room)
        delta = around(x, norm, radius, bounds).project(moved)
    lead = margin(oracle(x + delta), y)
    size = row_norm(delta, norm)
    better = (lead < 0) & (size < shortest)
    return torch.where(column(better, x), delta, best), torch.where(better, size, shortest)


def _shorten(oracle: Oracle, x: Tensor, y: Tensor, delta: Tensor, found: Tensor) -> Tensor:
    """Bisect the length of each perturbation between half and whole; the whole is kept where nothing shorter works."""
    rows = found.nonzero()[:, 0]
    if len(rows) == 0:
        return delta
    at, direction, truth = x[rows], delta[rows], y[rows]
    low, high = at.new_full((len(rows),), 0.5), at.new_ones(len(rows))
    for _ in range(_LINE):
        middle = (low + high) / 2
        wrong = oracle(at + direction * column(middle, at)).argmax(1) != truth
        low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)
    shorter = delta.clone()
    shorter[rows] = direction * column(high, at)
    return shorter
