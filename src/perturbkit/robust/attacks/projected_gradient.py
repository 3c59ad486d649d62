"""Projected gradient descent: the strongest first-order search of a perturbation set for a wrong answer.

Use it to measure accuracy under attack inside a given set. Madry, Makelov, Schmidt, Tsipras and Vladu (2018), Towards
Deep Learning Models Resistant to Adversarial Attacks, arXiv:1706.06083.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from perturbkit.core import AttackResult, Ball, BallInBox, Box, Oracle, checks, row_norm, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator

__all__ = ["projected_gradient"]

Loss = Literal["cross-entropy", "margin"]


def projected_gradient(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    perturbation: Ball | BallInBox,
    *,
    n_steps: int = 20,
    step_size: float | None = None,
    n_restarts: int = 1,
    random_start: bool = True,
    loss: Loss = "cross-entropy",
    generator: Seed = None,
    progress: ProgressLike = False,
) -> AttackResult:
    """Search a ball, or its part that keeps inputs valid, for a wrong answer.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Classifier of a batch (n, ...), answering logits (n, classes).
    x : Tensor, shape (n, ...)
        Clean inputs, floating point.
    y : Tensor of int64, shape (n,)
        True labels.
    perturbation : Ball or BallInBox
        The set, for instance ``core.around(x, "linf", 8 / 255)``.
    n_steps : int
        Steps of each start, at least 1.
    step_size : float, optional
        Length of a step in the norm of the set; 2.5 radius / n_steps by default, so that any point can be reached.
    n_restarts : int
        Starts, at least 1; rows already broken are not attacked again.
    random_start : bool
        Start from a random point of the set; otherwise the first start is the clean input.
    loss : {"cross-entropy", "margin"}
        What is climbed: cross-entropy, or the best wrong logit less the right one, which does not saturate.
    generator : torch.Generator, int or None
        Source of the starts.
    progress : Progress, bool or None
        Reports steps.

    Returns
    -------
    AttackResult
        The perturbed inputs of the rows that broke, the clean ones of the rest; ``radius`` is the norm found, zero
        where the clean input is already wrong.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an input or option is not allowed.

    Notes
    -----
    ``delta <- P(delta + argmax_{|v| <= s} <grad, v>)`` with the exact projection on the ball and box together.

    Cost: a gradient a row, step and start, one evaluation of the clean row and one of the end of each start, which
    confirms it.

    References
    ----------
    Madry et al. (2018), arXiv:1706.06083.

    Examples
    --------
    >>> from perturbkit.core import around
    >>> w = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    >>> x, y = torch.tensor([[0.6, 0.4]]), torch.tensor([0])
    >>> found = projected_gradient(lambda z: z @ w, x, y, around(x, "linf", 0.2), generator=0)
    >>> bool(found.success[0]), round(float(found.radius[0]), 3)
    (True, 0.2)
    """
    checks.tensor("x", x)
    labels = checks.labels("y", y, n=len(x)).to(x.device)
    ball = _ball(perturbation)
    checks.integer("n_steps", n_steps, low=1)
    checks.integer("n_restarts", n_restarts, low=1)
    objective = _OBJECTIVES[checks.one_of("loss", loss, tuple(_OBJECTIVES))]
    length = ball.radius * 2.5 / n_steps if step_size is None else checks.positive("step_size", step_size)
    g = as_generator(generator)
    oracle = Oracle.wrap(model)
    before = oracle.cost
    stride = Ball(ball.norm, length)
    best = torch.zeros_like(x)
    with oracle.frozen():
        clean = oracle(x).argmax(1) != labels
        success = clean.clone()
        for start in range(n_restarts):
            rows = (~success).nonzero()[:, 0]
            if len(rows) == 0:
                break
            part = _restrict(perturbation, rows)
            stride_part = Ball(ball.norm, _rows(stride.radius, rows))
            at, truth = x[rows], labels[rows]
            random_one = random_start or start > 0
            delta = part.sample(at, generator=g) if random_one else torch.zeros_like(at)
            for _ in track(range(n_steps), "projected gradient", progress=progress):
                _, gradient = oracle.value_and_gradient(at + delta, truth, objective=objective)
                delta = part.project(delta + stride_part.maximiser(gradient))
            wrong = oracle(at + delta).argmax(1) != truth
            best[rows[wrong]] = delta[wrong]
            success[rows[wrong]] = True
    radius = torch.where(success, row_norm(best, ball.norm), torch.inf)
    return AttackResult(x + best, success, radius, ball.norm, oracle.cost - before)


def _ball(perturbation: Ball | BallInBox) -> Ball:
    if isinstance(perturbation, BallInBox):
        return perturbation.ball
    if isinstance(perturbation, Ball):
        return perturbation
    raise checks.ArgumentTypeError(
        f"perturbation is a {type(perturbation).__name__}; allowed: a Ball or BallInBox. "
        "Write for instance core.around(x, 'linf', 8 / 255)."
    )


def _rows(values: float | Tensor, rows: Tensor) -> float | Tensor:
    return values[rows] if isinstance(values, Tensor) and values.ndim and len(values) > 1 else values


def _restrict(perturbation: Ball | BallInBox, rows: Tensor) -> Ball | BallInBox:
    """Return the set of some rows only."""
    if isinstance(perturbation, Ball):
        return Ball(perturbation.norm, _rows(perturbation.radius, rows))
    box = Box(_rows(perturbation.box.low, rows), _rows(perturbation.box.high, rows))
    return BallInBox(Ball(perturbation.ball.norm, _rows(perturbation.ball.radius, rows)), box)


def _cross_entropy(out: Tensor, target: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(out, target, reduction="none")


def _margin(out: Tensor, target: Tensor) -> Tensor:
    """Return the best wrong logit less the right one."""
    own = out.gather(1, target[:, None])[:, 0]
    return out.scatter(1, target[:, None], -torch.inf).amax(1) - own


_OBJECTIVES = {"cross-entropy": _cross_entropy, "margin": _margin}
