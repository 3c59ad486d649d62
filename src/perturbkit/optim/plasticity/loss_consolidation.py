"""Tasks one after another without their data: the loss so far as a quadratic of the weights (AQC), or as a network (NC).

Use them to train a small head on fixed features where classes come in over time and old data may not be kept: the quadratic for
some hundred weights, the network for a few dozen. Zhu and Kuruoglu (2024), On Sequential Loss Approximation for Continual
Learning, arXiv:2405.16498.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.curvature import hessian as hessian_operator
from perturbkit.core.random import Seed, as_generator, randn, seeded_init, seeds, uniform
from perturbkit.core.results import Result
from perturbkit.optim.plasticity._consolidation import LossFn, SequentialLearner

__all__ = ["ContinualAccuracy", "NeuralConsolidation", "QuadraticConsolidation", "continual_evaluate"]

_STIFFNESS = 1e3
"""Curvature of the wall round the ball in which a network knows the loss, in units of the loss's deviation there."""


@dataclass(frozen=True, eq=False)
class ContinualAccuracy(Result):
    """How well each task is known after each.

    Attributes
    ----------
    accuracy : Tensor, shape (tasks, tasks)
        Share of right test rows: after the task of the row, on the task of the column; NaN for tasks that are still to come.
    """

    accuracy: Tensor

    @property
    def average(self) -> float:
        """Mean over all tasks after the last one."""
        return float(self.accuracy[-1].mean())

    @property
    def forgetting(self) -> float:
        """Mean over the tasks but the last of the best accuracy before less the one at the end; 0 for one task."""
        past = self.accuracy[:-1, :-1].nan_to_num(-math.inf)
        return float((past.amax(0) - self.accuracy[-1, :-1]).mean()) if len(past) else 0.0


class QuadraticConsolidation(SequentialLearner):
    r"""Autodiff quadratic consolidation: the loss so far is its second-order Taylor polynomial at its minimum.

    Parameters
    ----------
    model : nn.Module
        Gives the outputs; its parameters that require a gradient are the weights. It is left as it is, and evaluated in
        evaluation mode.
    loss_fn : callable
        ``loss_fn(outputs, targets)``, summed over the rows: a mean would give each task the same weight, whatever its size.
    strength : float
        Factor of the approximation, zero or above; below 1 the past counts less.
    hessian : {"full", "diagonal"}
        The whole matrix, or its diagonal alone, which for a linear head with cross-entropy is elastic weight consolidation.
    prior_precision : float
        Precision of the Gaussian prior of the weights, with mean zero; above 0.
    chunk_size : int
        Hessian-vector products made at a time.
    max_iter : int
        Most iterations of L-BFGS a task.

    Attributes
    ----------
    weights_ : Tensor, shape (d,)
        The fitted weights; ``core.assign(model, weights_)`` writes them into the model.
    hessian_ : Tensor, shape (d, d) or (d,)
        The Hessian of the approximation; the prior's at first.
    n_tasks_ : int
        Tasks fitted.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    With :math:`L_0(w) = \tau |w|^2 / 2` and the loss :math:`l_t` of a task, :math:`w_t` minimises :math:`L_{t-1} + l_t` by L-BFGS with
    a strong Wolfe search, and

    .. math:: L_t(w) = \tfrac{\lambda}{2} (w - w_t)^\top H_t (w - w_t), \quad H_t = \nabla^2 (L_{t-1} + l_t)(w_t).

    The gradient at the minimum is taken to be zero: a warning is given where the search did not get there. Use double precision.

    Cost: d^2 numbers, and d Hessian-vector products a task.

    References
    ----------
    Zhu and Kuruoglu (2024), arXiv:2405.16498, section 3.1.

    Examples
    --------
    >>> x = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    >>> learner = QuadraticConsolidation(nn.Linear(2, 3).double(), nn.CrossEntropyLoss(reduction="sum"))
    >>> learner.fit_task(x[:2], torch.tensor([0, 1])).fit_task(x[2:], torch.tensor([2])).predict(x)
    tensor([0, 1, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        strength: float = 1.0,
        hessian: Literal["full", "diagonal"] = "full",
        prior_precision: float = 1.0,
        chunk_size: int = 64,
        max_iter: int = 2000,
    ) -> None:
        super().__init__(model, loss_fn, strength, prior_precision, chunk_size, max_iter)
        self.hessian: str = checks.one_of("hessian", hessian, ("full", "diagonal"))
        diagonal = torch.full_like(self.weights_, prior_precision)
        self.hessian_ = torch.diag(diagonal) if hessian == "full" else diagonal

    def _approximation(self, w: Tensor) -> Tensor:
        step = w - self.weights_
        return ((step @ self.hessian_ if self.hessian_.ndim == 2 else step * self.hessian_) * step).sum(
            -1
        ) / 2

    def _consolidate(self, total: Callable[[Tensor], Tensor], w: Tensor) -> None:
        product = hessian_operator(total, w)
        rows = []
        for i in torch.arange(len(w), device=w.device).split(self.chunk_size):
            units = torch.zeros(len(i), len(w), dtype=w.dtype, device=w.device)
            units[torch.arange(len(i)), i] = 1
            image = product(units)
            rows.append(image if self.hessian == "full" else image.gather(1, i[:, None])[:, 0])
        found = torch.cat(rows)
        self.hessian_ = (found + found.T) / 2 if self.hessian == "full" else found
        self.weights_ = w


class NeuralConsolidation(SequentialLearner):
    r"""Neural consolidation: the loss so far is a network of the weights, fitted in a ball round its minimum.

    Parameters
    ----------
    model, loss_fn, strength, prior_precision, max_iter
        As for :class:`QuadraticConsolidation`.
    radius : float
        Radius of the ball, in units of the weights, above 0: about as far as the next tasks move them.
    samples : int
        Points of the ball that are drawn anew for each step of the network's training.
    hidden : sequence of int
        Widths of the network's hidden layers.
    steps : int
        Steps of Adam that train the network, after each task.
    lr : float
        Rate of Adam, above 0; it falls to zero as a half cosine.
    chunk_size : int
        Points whose losses are computed at a time.
    generator : torch.Generator, int or None
        Source of first weights and points.

    Attributes
    ----------
    weights_ : Tensor, shape (d,)
        The fitted weights.
    network_ : nn.Module or None
        The approximation, of ``sqrt(d + 2) (w - weights_) / radius``, and in units of ``scale_`` above ``shift_``.
    scale_, shift_ : float
        Standard deviation and mean of the loss in the ball.
    fit_error_ : float
        Root mean square error of the network on fresh points, in units of ``scale_``.
    n_tasks_ : int
        Tasks fitted.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    At points p of the ball, the network minimises the mean of :math:`(\kappa(p) - L_{t-1}(p) - l_t(p))^2`, and
    :math:`\lambda \kappa` is the next penalty. Half the points are uniform in the ball, as in the paper, and half have uniform
    lengths: in many dimensions nearly all of a ball is near its sphere, and its middle would not be learnt. The network means
    nothing outside its ball: there the penalty is that of the nearest point of the ball, and a steep quadratic of the distance
    to it.

    Cost: ``steps * samples`` losses of the task. Sampling a ball becomes hopeless in many dimensions.

    References
    ----------
    Zhu and Kuruoglu (2024), arXiv:2405.16498, section 3.2.

    Examples
    --------
    >>> x = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    >>> learner = NeuralConsolidation(
    ...     nn.Linear(2, 3).double(), nn.CrossEntropyLoss(reduction="sum"), radius=3.0, hidden=(32,), steps=200, generator=0
    ... )
    >>> learner.fit_task(x[:2], torch.tensor([0, 1])).fit_task(x[2:], torch.tensor([2])).predict(x)
    tensor([0, 1, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        strength: float = 1.0,
        radius: float = 1.0,
        samples: int = 256,
        hidden: Sequence[int] = (256, 256),
        steps: int = 1000,
        lr: float = 3e-3,
        prior_precision: float = 1.0,
        chunk_size: int = 256,
        max_iter: int = 2000,
        generator: Seed = None,
    ) -> None:
        super().__init__(model, loss_fn, strength, prior_precision, chunk_size, max_iter)
        self.radius = checks.positive("radius", radius)
        self.samples = checks.integer("samples", samples, low=2)
        self.hidden = tuple(checks.integer("hidden", h, low=1) for h in hidden)
        self.steps = checks.integer("steps", steps, low=1)
        self.lr = checks.positive("lr", lr)
        self._generator = as_generator(generator)
        self.network_: nn.Module | None = None
        self.scale_, self.shift_, self.fit_error_ = 1.0, 0.0, math.nan

    def _approximation(self, w: Tensor) -> Tensor:
        step = (w - self.weights_) / self.radius
        # The norm has no gradient at the centre, where the point is inside anyway.
        length = step.square().sum(-1, keepdim=True).clamp(min=1).sqrt()
        inside = self._evaluated(step / length)
        return inside * self.scale_ + self.shift_ + _STIFFNESS / 2 * self.scale_ * (length[..., 0] - 1) ** 2

    def _evaluated(self, u: Tensor) -> Tensor:
        assert self.network_ is not None
        return self.network_(u * math.sqrt(u.shape[-1] + 2))[..., 0]

    def _consolidate(self, total: Callable[[Tensor], Tensor], w: Tensor) -> None:
        losses = torch.func.vmap(total, chunk_size=self.chunk_size)

        def draw() -> tuple[Tensor, Tensor]:
            u = _ball(self.samples, w, self._generator)
            with torch.no_grad():
                return u, losses(w + self.radius * u)

        _, first = draw()
        scale, shift = float(first.std()) or 1.0, float(first.mean())
        sizes = (len(w), *self.hidden, 1)
        with seeded_init(seeds(self._generator, 1)[0]):
            layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
        network = nn.Sequential(*layers[:-1]).to(w)
        optimizer = torch.optim.Adam(network.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        # The closure of the loss goes on with the old network until this one is whole.
        for _ in range(self.steps):
            u, target = draw()
            optimizer.zero_grad()
            error = network(u * math.sqrt(len(w) + 2))[:, 0] - (target - shift) / scale
            error.square().mean().backward()
            optimizer.step()
            schedule.step()
        u, target = draw()
        self.network_ = network.requires_grad_(False)
        self.weights_, self.scale_, self.shift_ = w, scale, shift
        self.fit_error_ = float((self._evaluated(u) - (target - shift) / scale).square().mean().sqrt())


def continual_evaluate(
    learner: Any, tasks: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]
) -> ContinualAccuracy:
    """Fit tasks one after another, and after each return the accuracy on all so far.

    Parameters
    ----------
    learner : object
        Has ``fit_task(x, y)`` and ``predict(x)``, as the learners of this module.
    tasks : sequence of tuple of Tensor
        Training inputs and classes, and test inputs and classes, one tuple a task.

    Returns
    -------
    ContinualAccuracy

    Raises
    ------
    ArgumentError
        If there is no task, or one is not four tensors.

    Notes
    -----
    Cost: that of the fits, and a prediction of each pair of tasks.

    Examples
    --------
    >>> x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    >>> learner = QuadraticConsolidation(nn.Linear(1, 2), nn.CrossEntropyLoss(reduction="sum"))
    >>> continual_evaluate(learner, [(x, y, x, y)]).accuracy
    tensor([[1.]])
    """
    if not tasks or any(len(task) != 4 for task in tasks):
        raise checks.ArgumentError(
            f"tasks has {len(tasks)} entries; allowed: at least one, each of four tensors. "
            "Pass [(x, y, test_x, test_y), ...]."
        )
    accuracy = torch.full((len(tasks), len(tasks)), math.nan)
    for i, (x, y, _, _) in enumerate(tasks):
        learner.fit_task(x, y)
        for j, (_, _, test_x, test_y) in enumerate(tasks[: i + 1]):
            accuracy[i, j] = (learner.predict(test_x) == test_y).double().mean()
    return ContinualAccuracy(accuracy)


def _ball(n: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Return points of the unit ball: every other uniform in it, and the rest with uniform lengths."""
    directions = randn((n, len(like)), generator=generator, like=like)
    lengths = uniform((n, 1), generator=generator, like=like)
    lengths[::2] = lengths[::2] ** (1 / len(like))
    return directions / directions.norm(dim=1, keepdim=True) * lengths
