"""Projected gradient descent: the strongest first-order search of a perturbation set for a wrong answer.

Use it to measure accuracy under attack inside a given set. Madry, Makelov, Schmidt, Tsipras and Vladu (2018), Towards
Deep Learning Models Resistant to Adversarial Attacks, arXiv:1706.06083.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import AttackResult, Ball, BallInBox, Box, Oracle, checks, row_norm, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator
from perturbkit.robust.attacks._parts import (
    half_cosine,
    labels_for,
    margin,
    softened_margin,
    steepest,
)

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
    loss: Loss = "margin",
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
        Length of every step in the norm of the set. By default steps fall from twice the radius to a tenth of it
        along half a cosine, which breaks more rows than any constant length.
    n_restarts : int
        Starts, at least 1.
    random_start : bool
        Start from a random point of the set; otherwise the first start is the clean input, or the nearest to it.
    loss : {"margin", "cross-entropy"}
        What is climbed: the best wrong logit less the right one, softened at first, which does not saturate; or
        cross-entropy, with a constant ``step_size`` the attack as it is in the paper.
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

    Every point visited counts, and a row that is broken is attacked no more.

    Cost: at most a gradient a row, step and start, an evaluation of each start's end, and one of the clean row.

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
    checks.labels("y", y, n=len(x))
    ball = _ball(perturbation)
    centre = perturbation.project(torch.zeros_like(x))
    checks.integer("n_steps", n_steps, low=1)
    checks.integer("n_restarts", n_restarts, low=1)
    checks.one_of("loss", loss, ("margin", "cross-entropy"))
    if step_size is not None:
        checks.positive("step_size", step_size)
    g = as_generator(generator)
    oracle = Oracle.wrap(model)
    before = oracle.cost
    best = torch.zeros_like(x)
    with oracle.frozen():
        scores, labels = labels_for(oracle, x, y)
        success = scores.argmax(1) != labels
        for start in range(n_restarts):
            rows = (~success).nonzero()[:, 0]
            if len(rows) == 0:
                break
            tried, part, at = rows, _restrict(perturbation, rows, x), x[rows]
            delta = part.sample(at, generator=g) if random_start or start > 0 else centre[rows]
            for step in track(range(n_steps), "projected gradient", progress=progress):
                fall = half_cosine(step, n_steps)
                lead, gradient = oracle.value_and_gradient(
                    at + delta, labels[rows], objective=_objective(loss, fall)
                )
                broken = lead < 0
                if bool(broken.any()):
                    best[rows[broken]], success[rows[broken]] = delta[broken], True
                    rows, delta, gradient = rows[~broken], delta[~broken], gradient[~broken]
                    if len(rows) == 0:
                        break
                    part, at = _restrict(perturbation, rows, x), x[rows]
                length = _rows(ball.radius, rows, 1) * (0.1 + 1.9 * fall) if step_size is None else step_size
                delta = part.project(delta + steepest(gradient, Ball(ball.norm, length), _room(part, delta)))
            best[rows] = delta
            # One evaluation tries the last point of the rows that still stand and confirms what broke the others.
            success[tried] = oracle(x[tried] + best[tried]).argmax(1) != labels[tried]
            best[tried[~success[tried]]] = 0.0
    size = torch.where(success, row_norm(best, ball.norm), torch.inf)
    return AttackResult(x + best, success, size, ball.norm, oracle.cost - before)


def _ball(perturbation: Ball | BallInBox) -> Ball:
    if isinstance(perturbation, BallInBox):
        return perturbation.ball
    if isinstance(perturbation, Ball):
        return perturbation
    raise checks.ArgumentTypeError(
        f"perturbation is a {type(perturbation).__name__}; allowed: a Ball or BallInBox. "
        "Write for instance core.around(x, 'linf', 8 / 255)."
    )


def _rows(values: float | Tensor, rows: Tensor, ndim: int) -> float | Tensor:
    """Return the values of some rows, where there is one a row: what broadcasts over rows stays as it is."""
    one_a_row = isinstance(values, Tensor) and values.ndim == ndim and len(values) > 1
    return values[rows] if one_a_row else values  # type: ignore[index]


def _restrict(perturbation: Ball | BallInBox, rows: Tensor, x: Tensor) -> Ball | BallInBox:
    """Return the set of some rows only."""
    if isinstance(perturbation, Ball):
        return Ball(perturbation.norm, _rows(perturbation.radius, rows, 1))
    box = Box(*(_rows(bound, rows, x.ndim) for bound in (perturbation.box.low, perturbation.box.high)))
    return BallInBox(Ball(perturbation.ball.norm, _rows(perturbation.ball.radius, rows, 1)), box)


def _room(part: Ball | BallInBox, delta: Tensor) -> Box | None:
    """Return how far each value may still move, where the step needs to know: see ``steepest``."""
    if isinstance(part, Ball) or part.ball.norm != "l1":
        return None
    low, high = part.box.low - delta, part.box.high - delta
    return Box(torch.as_tensor(low).clamp_max(0), torch.as_tensor(high).clamp_min(0))


def _objective(loss: Loss, softness: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function whose value is the margin, above zero where the answer is right, and whose gradient climbs."""
    if loss == "margin":
        softened = softened_margin(softness)

        def downhill(out: Tensor, target: Tensor) -> Tensor:
            lead = softened(out, target)
            return 2 * lead.detach() - lead

        return downhill

    def objective(out: Tensor, target: Tensor) -> Tensor:
        climbed = functional.cross_entropy(out, target, reduction="none")
        return margin(out, target).detach() + climbed - climbed.detach()

    return objective
