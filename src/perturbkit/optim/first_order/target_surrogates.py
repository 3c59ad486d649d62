"""Target-based surrogates: many cheap steps of a model for each dear gradient in the space of its outputs.

Use it where the loss of the outputs costs much (an environment, an expert) and the model little. Lavington, Vaswani,
Babanezhad, Schmidt and Le Roux (2023), Target-based Surrogates for Stochastic Optimization, arXiv:2302.02607.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from perturbkit.core import checks
from perturbkit.core.optimizers import BaseOptimizer, loss_value

__all__ = ["SSO"]

Schedule = Literal["constant", "sqrt", "inverse"]
Divergence = Literal["euclidean", "kl"]


class SSO(BaseOptimizer):
    r"""Descend a surrogate of the loss that needs no further gradient in the outputs.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups.
    inner_optimizer : callable or {"armijo-gd", "lbfgs"}
        Gradient descent with a line search that starts from twice the last step; PyTorch's L-BFGS; or a class of
        optimizers such as ``torch.optim.Adam``, made anew for each step.
    target_lr : float
        :math:`\eta`, above 0; the surrogate is above the loss if it is at most the inverse of the loss's Lipschitz constant
        in the outputs.
    inner_steps : int
        Steps on each surrogate, at least 1.
    schedule : {"constant", "sqrt", "inverse"}
        :math:`\eta` itself, over the root of the steps, or over them.
    divergence : {"euclidean", "kl"}
        Squared distance of the outputs; or the Kullback-Leibler divergence of the classes' chances, for outputs that are
        logits, (n, classes).
    **inner_options
        Of the inner optimizer's class, such as ``lr``.

    Attributes
    ----------
    oracle_calls : int
        Gradients of the loss in the outputs.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    With the outputs :math:`z_t = f(w_t)` and one gradient :math:`\nabla \ell(z_t)`, the surrogate is

    .. math:: S_t(w) = \ell(z_t) + \langle \nabla \ell(z_t), f(w) - z_t \rangle + \frac{1}{2 \eta} |f(w) - z_t|^2,

    the square a mean over the rows like the loss. It equals the loss at :math:`w_t` and, for small :math:`\eta`, is nowhere
    below it: what lowers it lowers the loss. One plain gradient step on it is one on the loss; many project a step in the
    outputs onto those the model can make.

    Cost: one dear gradient and ``inner_steps`` passes of the model a step.

    References
    ----------
    Lavington et al. (2023), arXiv:2302.02607, algorithm 1.

    Examples
    --------
    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([2.0, 4.0])
    >>> w = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = SSO([w], "lbfgs", target_lr=1.0, inner_steps=10)
    >>> for _ in range(3):
    ...     loss = optimizer.step(lambda: x @ w, lambda z: (z - y).square().mean() / 2)
    >>> round(w.item(), 4), optimizer.oracle_calls
    (2.0, 3)
    """

    def __init__(
        self,
        params: Any,
        inner_optimizer: Callable[..., torch.optim.Optimizer] | str = "armijo-gd",
        target_lr: float = 1.0,
        inner_steps: int = 10,
        schedule: Schedule = "constant",
        divergence: Divergence = "euclidean",
        **inner_options: Any,
    ) -> None:
        if isinstance(inner_optimizer, str):
            checks.one_of("inner_optimizer", inner_optimizer, ("armijo-gd", "lbfgs"))
        elif not callable(inner_optimizer):
            raise checks.ArgumentTypeError(
                f"inner_optimizer is a {type(inner_optimizer).__name__}; allowed: 'armijo-gd', 'lbfgs' or a class of optimizers. "
                "Pass torch.optim.Adam, and its options by name."
            )
        self._inner, self._options = inner_optimizer, inner_options
        self._steps = checks.integer("inner_steps", inner_steps, low=1)
        self._schedule = checks.one_of("schedule", schedule, ("constant", "sqrt", "inverse"))
        self._divergence = checks.one_of("divergence", divergence, ("euclidean", "kl"))
        self.oracle_calls = 0
        super().__init__(params, {"lr": target_lr})

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check a group's own options."""
        checks.positive("target_lr", group["lr"])

    def step(self, model_fn: Callable[[], Tensor], loss_fn: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        """Take one step and return the loss before it.

        Parameters
        ----------
        model_fn : callable
            ``model_fn() -> outputs`` of the batch, rows first, with a graph to the parameters; the same at each call.
        loss_fn : callable
            ``loss_fn(outputs) -> loss``, the mean over the rows; called once.
        """
        for name, function in (("model_fn", model_fn), ("loss_fn", loss_fn)):
            if not callable(function):
                raise checks.ArgumentTypeError(
                    f"{name} is a {type(function).__name__}; allowed: a function. Pass step(lambda: model(x), loss)."
                )
        with torch.enable_grad():
            # A copy: the outputs may be the parameters themselves.
            z = model_fn().detach().clone().requires_grad_(True)
            loss = loss_fn(z)
            loss_value(loss)
            (slope,) = torch.autograd.grad(loss, z)
        self.oracle_calls += 1
        t = self.advance() + 1
        eta = self.param_groups[0]["lr"] / {"constant": 1, "sqrt": math.sqrt(t), "inverse": t}[self._schedule]
        anchor, value = z.detach(), loss.detach()

        def surrogate() -> Tensor:
            move = model_fn() - anchor
            if self._divergence == "kl":
                own, new = anchor.log_softmax(-1), (anchor + move).log_softmax(-1)
                far = (own.exp() * (own - new)).sum() / len(anchor)
            else:
                far = move.square().sum() / (2 * len(anchor))
            return value + (slope * move).sum() + far / eta

        self._descend(surrogate)
        return value

    def _descend(self, surrogate: Callable[[], Tensor]) -> None:
        weights = self.weights
        if self._inner == "armijo-gd":
            self._armijo(weights, surrogate)
            return
        if self._inner == "lbfgs":
            options = {"max_iter": self._steps, "line_search_fn": "strong_wolfe", **self._options}
            inner: Any = torch.optim.LBFGS(weights, **options)
        else:
            assert callable(self._inner)
            inner = self._inner(weights, **self._options)

        def closure() -> Tensor:
            inner.zero_grad()
            with torch.enable_grad():
                loss = surrogate()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        for _ in range(1 if self._inner == "lbfgs" else self._steps):
            inner.step(closure)

    def _armijo(self, weights: list[Tensor], surrogate: Callable[[], Tensor]) -> None:
        """Take gradient steps, each halved until it descends by half of what its slope promises."""
        rate = float(self.state.get("rate", 1.0))  # type: ignore[call-overload]
        for _ in range(self._steps):
            with torch.enable_grad():
                value = surrogate()
            grads = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
            promised = sum(float(g.square().sum()) for g in grads)
            if promised == 0:
                break
            start = [p.detach().clone() for p in weights]
            with torch.no_grad():
                while True:
                    for p, origin, g in zip(weights, start, grads, strict=True):
                        p.copy_(origin - rate * g)
                    if float(surrogate()) <= float(value) - rate / 2 * promised:
                        break
                    if rate < 1e-12:
                        # The decrease is lost in rounding: this is as low as it gets.
                        for p, origin in zip(weights, start, strict=True):
                            p.copy_(origin)
                        break
                    rate /= 2
            if rate < 1e-12:
                rate = 1e-6
                break
            rate *= 2
        self.state["rate"] = rate  # type: ignore[index]
