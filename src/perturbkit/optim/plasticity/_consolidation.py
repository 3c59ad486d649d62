"""What learners of tasks in sequence share: the fit to a task and to what stands for the tasks before it."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.parameters import flatten, functional, keeping_modes

__all__ = ["LossFn", "SequentialLearner"]

LossFn = Callable[[Tensor, Tensor], Tensor]


class SequentialLearner(ABC):
    """A model that is fitted to a task and an approximation of the loss of the tasks before it."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        strength: float,
        prior_precision: float,
        chunk_size: int,
        max_iter: int,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise checks.ArgumentTypeError(
                f"model is a {type(model).__name__}; allowed: an nn.Module. Pass the head, or a network whose features are frozen."
            )
        if not callable(loss_fn):
            raise checks.ArgumentTypeError(
                f"loss_fn is a {type(loss_fn).__name__}; allowed: a function of outputs and targets. "
                'Pass nn.CrossEntropyLoss(reduction="sum").'
            )
        self.strength = checks.nonnegative("strength", strength)
        self.prior_precision = checks.positive("prior_precision", prior_precision)
        self.chunk_size = checks.integer("chunk_size", chunk_size, low=1)
        self.max_iter = checks.integer("max_iter", max_iter, low=1)
        self.model, self.loss_fn = model, loss_fn
        self.weights_ = flatten(model)
        self.n_tasks_ = 0

    def fit_task(self, x: Tensor, y: Tensor) -> Self:
        """Fit the next task and take its loss up into the approximation.

        Parameters
        ----------
        x : Tensor, shape (n, ...)
            Inputs.
        y : Tensor, shape (n, ...)
            Targets, as the loss takes them.

        Raises
        ------
        ArgumentError
            If the shapes do not fit or the loss is not a sum over rows.
        """
        checks.tensor("x", x)
        if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != len(x):
            given = f"of shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise checks.ArgumentError(f"y is {given}; allowed: {len(x)} targets, one a row of x. Pass them.")
        call = functional(self.model)
        with keeping_modes(self.model):
            self.model.eval()
            _summed(self.loss_fn, call(self.weights_, x).detach(), y)
            fixed = self.penalty

            def total(w: Tensor) -> Tensor:
                return fixed(w) + self.loss_fn(call(w, x), y)

            self._consolidate(total, _minimum(total, self.weights_, self.max_iter))
        self.n_tasks_ += 1
        return self

    def outputs(self, x: Tensor) -> Tensor:
        """Return the model's outputs at the fitted weights."""
        if self.n_tasks_ == 0:
            raise checks.ArgumentError(
                "the learner is not fitted; allowed: after fit_task. Call fit_task(x, y) first."
            )
        with torch.no_grad(), keeping_modes(self.model):
            self.model.eval()
            return functional(self.model)(self.weights_, checks.tensor("x", x))

    def predict(self, x: Tensor) -> Tensor:
        """Return the class of the largest output of each row."""
        return self.outputs(x).argmax(-1)

    def penalty(self, flat_params: Tensor) -> Tensor:
        """Return what stands for the loss of the tasks so far: at first the prior, up to a constant."""
        if self.n_tasks_ == 0:
            return self.prior_precision / 2 * flat_params.square().sum(-1)
        return self.strength * self._approximation(flat_params)

    @abstractmethod
    def _approximation(self, w: Tensor) -> Tensor:
        """Return the approximation of the loss so far."""

    @abstractmethod
    def _consolidate(self, total: Callable[[Tensor], Tensor], w: Tensor) -> None:
        """Approximate the total loss round its minimum, and take on the minimum as the weights."""


def _summed(loss_fn: LossFn, outputs: Tensor, y: Tensor) -> None:
    """Refuse a loss that is not twice as large for all rows twice."""
    once, twice = loss_fn(outputs, y), loss_fn(torch.cat([outputs] * 2), torch.cat([y] * 2))
    shown = f"of shape {tuple(once.shape)}" if once.numel() != 1 else "not twice as large for every row twice"
    if once.numel() != 1 or not torch.isclose(twice, 2 * once, rtol=1e-3):
        raise checks.ArgumentError(
            f'loss_fn is {shown}; allowed: one number, the sum over the rows. Pass reduction="sum".'
        )


def _minimum(total: Callable[[Tensor], Tensor], start: Tensor, max_iter: int) -> Tensor:
    """Return the minimiser by L-BFGS; warn where the gradient is not zero but for rounding."""
    w = start.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [w], max_iter=max_iter, max_eval=2 * max_iter, tolerance_grad=1e-10, tolerance_change=0.0, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = total(w)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
        loss = closure()
    rest = float(w.grad.abs().max())  # type: ignore[union-attr]
    if not rest <= torch.finfo(w.dtype).eps ** (1 / 3) * max(1.0, float(loss.detach().abs())):
        warnings.warn(
            f"the task was not fitted to convergence: a gradient of {rest:.3g} is left; raise max_iter or use double precision",
            checks.PerturbkitWarning,
            stacklevel=3,
        )
    return w.detach()
