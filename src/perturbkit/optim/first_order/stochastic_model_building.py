"""Stochastic model building: where a step of gradient descent fails, a quadratic model of the batch's loss corrects it.

Use it where the learning rate is not tuned and may be too large. Birbil, Martin, Onay and Oztoprak (2021), Bolstering
Stochastic Gradient Descent with Model Building, arXiv:2111.07058.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.optimizers import (
    BaseOptimizer,
    Closure,
    Replay,
    dense_gradients,
    global_norm,
    loss_value,
)

__all__ = ["SMB", "model_building_step"]


class SMB(BaseOptimizer):
    r"""Gradient descent that tries each step on its batch, and rebuilds those that do not descend.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups.
    lr : float
        Rate of the trial steps, above 0.
    eta : float
        Longest rebuilt step over the trial, in (0, 1).
    sufficient_decrease : float
        Share of the decrease that the slope promises for a trial to be kept, zero or above.
    groups : {"tensor", "all"}
        A model for each tensor, or one for all.
    independent_batch : bool
        Build the model from another batch, whose closure :meth:`step` is then given.
    autoschedule : bool
        Multiply the rate by 1.05 after kept trials and by 0.9 after rebuilt ones.
    model : nn.Module, optional
        Where given, the running statistics of its batch normalisations are moved by the first pass only.

    Attributes
    ----------
    models_built : int
        Steps that were rebuilt.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    With :math:`s = -\alpha g`, the trial is kept if :math:`f(x + s) \le f(x) - c \alpha |g|^2`. Otherwise each tensor's step is
    that of :func:`model_building_step`, from x. Both evaluations see the same batch and dropout masks.

    Cost: two gradients and losses a step.

    References
    ----------
    Birbil et al. (2021), arXiv:2111.07058, algorithm 1.

    Examples
    --------
    >>> w = nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = SMB([w], lr=100.0)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = w.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> losses = [float(optimizer.step(closure).detach()) for _ in range(20)]
    >>> losses[-1] < losses[0]
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        eta: float = 0.99,
        sufficient_decrease: float = 0.1,
        groups: Literal["tensor", "all"] = "tensor",
        independent_batch: bool = False,
        autoschedule: bool = False,
        model: nn.Module | None = None,
    ) -> None:
        self._eta = checks.between("eta", eta, 0, 1, inclusive="neither")
        self._share = checks.nonnegative("sufficient_decrease", sufficient_decrease)
        self._groups = checks.one_of("groups", groups, ("tensor", "all"))
        self._independent, self._auto, self._model = bool(independent_batch), bool(autoschedule), model
        self.models_built = 0
        super().__init__(params, {"lr": lr})

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check a group's own options."""
        checks.positive("lr", group["lr"])

    def step(self, closure: Closure, closure2: Closure | None = None) -> Any:  # type: ignore[override]
        """Take one step and return the loss before it.

        Parameters
        ----------
        closure : callable
            ``closure() -> loss``; clears the gradients, evaluates the batch and calls ``backward``.
        closure2 : callable, optional
            The same for an independent batch; only with ``independent_batch``, where it is needed.
        """
        if (closure2 is not None) != self._independent:
            raise checks.ArgumentError(
                f"closure2 is {'given' if closure2 is not None else 'not given'}; allowed: with independent_batch, and only then. "
                "Pass the closure of another batch, or leave it out."
            )
        weights = [p for group in self.param_groups for p in group["params"]]
        again = Replay(closure, weights, self._model)
        loss = again()
        members = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        moved = [p for _, p in members]
        before = [p.detach().clone() for p in moved]
        g = dense_gradients(moved)
        s = [-group["lr"] * v for (group, _), v in zip(members, g, strict=True)]
        try:
            with torch.no_grad():
                for (_, p), shift in zip(members, s, strict=True):
                    p.add_(shift)
            trial = loss_value(again())
            promised = sum(
                group["lr"] * float(global_norm([v])) ** 2 for (group, _), v in zip(members, g, strict=True)
            )
            kept = trial <= loss_value(loss) - self._share * promised
            if not kept:
                if closure2 is None:
                    y = [b - a for a, b in zip(g, dense_gradients(moved), strict=True)]
                else:
                    y = self._other(moved, before, Replay(closure2, weights, self._model))
        except BaseException:
            _put(moved, before)
            raise
        if not kept:
            self.models_built += 1
            _put(moved, before)
            with torch.no_grad():
                for (_, p), shift in zip(members, self._rebuilt(g, y, s), strict=True):
                    p.add_(shift)
        if self._auto:
            for group in self.param_groups:
                group["lr"] *= 1.05 if kept else 0.9
        return loss

    def _other(self, moved: list[Tensor], before: list[Tensor], again: Replay) -> list[Tensor]:
        """Return the difference of the gradients of an independent batch at the trial and at x."""
        again()
        there = dense_gradients(moved)
        _put(moved, before)
        again()
        return [a - b for a, b in zip(there, dense_gradients(moved), strict=True)]

    def _rebuilt(self, g: list[Tensor], y: list[Tensor], s: list[Tensor]) -> list[Tensor]:
        if self._groups == "tensor":
            return [_model_step(*parts, self._eta) for parts in zip(g, y, s, strict=True)]
        flat = [torch.cat([v.reshape(-1) for v in parts]) for parts in (g, y, s)]
        step = _model_step(flat[0], flat[1], flat[2], self._eta)
        return [v.view(p.shape) for v, p in zip(step.split([p.numel() for p in g]), g, strict=True)]


def model_building_step(g: Tensor, y: Tensor, s: Tensor, eta: float) -> Tensor:
    r"""Return the minimiser of the quadratic model that fits the slopes at both ends of a trial step.

    Parameters
    ----------
    g : Tensor
        Gradient at x.
    y : Tensor
        Gradient at the end of the trial less g, of its shape.
    s : Tensor
        The trial, of its shape.
    eta : float
        Longest step over the trial, in (0, 1).

    Returns
    -------
    Tensor
        Of length ``eta |s|`` at most; zero where g or s is, or where y is not finite.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    It solves :math:`(2 \delta I + s y^\top + y s^\top) p = -|s|^2 g` with :math:`2 \delta = |s| (|y| + |g| / \eta) - y^\top s`, whose
    matrix has no eigenvalue below :math:`|s| |g| / \eta`, in the span of g, y and s.

    References
    ----------
    Birbil et al. (2021), arXiv:2111.07058, section 2.

    Examples
    --------
    >>> g = torch.tensor([2.0, 0.0])
    >>> model_building_step(g, torch.zeros(2), -g, 0.5)  # no curvature seen: eta times the trial
    tensor([-1., -0.])
    """
    for name, value in (("g", g), ("y", y), ("s", s)):
        checks.tensor(name, value, finite=False)
        checks.same_shape(name, value, "g", g)
    return _model_step(g, y, s, checks.between("eta", eta, 0, 1, inclusive="neither"))


def _model_step(g: Tensor, y: Tensor, s: Tensor, eta: float) -> Tensor:
    own = g.dtype
    # Products of four lengths leave the range of half precision.
    g, y, s = (v.to(torch.promote_types(own, torch.float32)) for v in (g, y, s))
    gs, ys, yg = (s * g).sum(), (y * s).sum(), (y * g).sum()
    long, bent, steep = s.norm(), y.norm(), g.norm() / eta
    twice = long * (bent + steep) - ys
    # D^2 - |s|^2 |y|^2 with D = y.s + 2 delta, without the difference of squares.
    d, theta = long * (bent + steep), long.square() * steep * (2 * bent + steep)
    square = long.square()
    along_g = -square / twice
    along_y = along_g / theta * (square * yg - d * gs)
    along_s = along_g / theta * (bent.square() * gs - d * yg)
    step = along_g * g + along_y * y + along_s * s
    sound = (theta > 0) & (twice > 0) & torch.isfinite(bent) & torch.isfinite(step).all()
    return torch.where(sound, step, torch.zeros_like(step)).to(own)


def _put(weights: list[Tensor], before: list[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(weights, before, strict=True):
            p.copy_(value)
