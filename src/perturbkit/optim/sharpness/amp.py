"""Adversarial model perturbation: descend the largest loss in a ball around the weights.

Use it as a regulariser that prefers wide minima; near a minimum its perturbation vanishes, unlike that of
sharpness-aware minimisation. Zheng, Zhang and Mao (2021), Regularizing Neural Networks via Adversarial Model
Perturbation, arXiv:2010.04925.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.optimizers import (
    Closure,
    Replay,
    WrappingOptimizer,
    dense_gradients,
    displaced,
    global_norm,
    loss_value,
)

__all__ = ["AMP", "amp_loss"]


class AMP(WrappingOptimizer):
    r"""Adversarial model perturbation around any PyTorch optimizer.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups; a group may have its own ``radius`` and ``inner_lr``.
    base_optimizer : callable
        Class of the optimizer that steps.
    radius : float
        Radius of the ball, in units of the weights; zero or above.
    inner_lr : float
        Step of the ascent in the ball, zero or above.
    inner_steps : int
        Steps of the ascent, at least 1.
    per_tensor : bool
        Each tensor has a ball of this radius, as in the authors' code; otherwise all tensors share one, as in the paper.
        The radii are not comparable: balls of n tensors together reach out to ``radius sqrt(n)``.
    model : nn.Module, optional
        Where given, the running statistics of its batch normalisations are moved by the first pass only.
    **base_options
        Of the optimizer inside, such as ``lr``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    The loss is :math:`\max_{|\delta| \le r} L(w + \delta)`, and the ascent :math:`\delta \leftarrow
    \Pi_r(\delta + \eta \nabla L(w + \delta))` with the raw gradient. The optimizer inside is given
    :math:`\nabla L(w + \delta)` at ``w``. All passes see the same batch and dropout masks.

    Cost: ``inner_steps + 1`` gradients a step, and a copy of the weights.

    References
    ----------
    Zheng et al. (2021), arXiv:2010.04925, algorithm 1.

    Examples
    --------
    >>> w = nn.Parameter(torch.tensor([2.0]))
    >>> optimizer = AMP([w], lr=0.1, radius=0.5, inner_lr=1.0)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = w.square().sum() / 2
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure).item(), w.item()  # the gradient at 2.5
    (2.0, 1.75)
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        radius: float = 0.5,
        inner_lr: float = 1.0,
        inner_steps: int = 1,
        per_tensor: bool = True,
        model: nn.Module | None = None,
        **base_options: Any,
    ) -> None:
        self._inner_steps = checks.integer("inner_steps", inner_steps, low=1)
        self._per_tensor = bool(per_tensor)
        super().__init__(
            params, base_optimizer, {"radius": radius, "inner_lr": inner_lr}, base_options, model
        )

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check the ball and the step of a group."""
        checks.nonnegative("radius", group["radius"])
        checks.nonnegative("inner_lr", group["inner_lr"])

    def step(self, closure: Closure) -> Any:  # type: ignore[override]
        """Take one step and return the loss before it.

        Parameters
        ----------
        closure : callable
            ``closure() -> loss``; clears the gradients, evaluates the batch and calls ``backward``.
        """
        again = self.replay(closure)
        loss = again()
        members = self.trained()
        weights = [p for _, p in members]
        radii, rates = [g["radius"] for g, _ in members], [g["inner_lr"] for g, _ in members]
        shifts = [torch.zeros_like(p) for p in weights]
        for _ in range(self._inner_steps if weights else 0):
            shifts = _ascended(shifts, dense_gradients(weights), rates, radii, self._per_tensor)
            with displaced(weights, shifts):
                again()
        self.base_optimizer.step()
        return loss


def amp_loss(
    loss_fn: Closure,
    params: Iterable[Tensor],
    radius: float,
    inner_lr: float = 1.0,
    inner_steps: int = 1,
    *,
    per_tensor: bool = True,
) -> float:
    """Return the largest loss that the ascent finds in the ball around the weights.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn() -> loss`` with a graph to the parameters.
    params : iterable of Tensor
        Parameters; they and their gradients are left as they are.
    radius, inner_lr, inner_steps, per_tensor
        As for :class:`AMP`.

    Returns
    -------
    float
        At least the loss at the weights themselves.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    A lower bound of ``max L(w + delta)`` over ``|delta| <= radius``.

    References
    ----------
    Zheng et al. (2021), arXiv:2010.04925, equation 3.

    Examples
    --------
    >>> w = torch.tensor([2.0], requires_grad=True)
    >>> amp_loss(lambda: w.square().sum() / 2, [w], radius=0.5)
    3.125
    """
    checks.nonnegative("radius", radius)
    checks.nonnegative("inner_lr", inner_lr)
    checks.integer("inner_steps", inner_steps, low=1)
    weights = [p for p in params if p.requires_grad]
    if not weights:
        raise checks.ArgumentError(
            "params has none that require a gradient; allowed: at least one. Pass model.parameters()."
        )
    again = Replay(loss_fn, weights)
    shifts = [torch.zeros_like(p) for p in weights]
    found = []
    for i in range(inner_steps + 1):
        with displaced(weights, shifts):
            loss = again()
            found.append(loss_value(loss))
            if not isinstance(loss, Tensor) or loss.grad_fn is None:
                raise checks.ModelError(
                    f"the loss is a {type(loss).__name__} without a graph; allowed: a loss that can be differentiated. Return it "
                    "without backward."
                )
            if i < inner_steps:
                grads = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
                n = len(weights)
                shifts = _ascended(shifts, grads, [inner_lr] * n, [radius] * n, per_tensor)
    return max(found)


def _ascended(
    shifts: Sequence[Tensor],
    grads: Sequence[Tensor],
    rates: Sequence[float],
    radii: Sequence[float],
    per_tensor: bool,
) -> list[Tensor]:
    """Return the shifts after one step up the gradient, projected on the ball."""
    moved = [s.add(g, alpha=rate) for s, g, rate in zip(shifts, grads, rates, strict=True)]
    whole = None if per_tensor else global_norm(moved)
    return [
        s
        * (radius / (global_norm([s]) if whole is None else whole).to(s.device))
        .clamp(max=1)
        .nan_to_num(1.0)
        .to(s)
        for s, radius in zip(moved, radii, strict=True)
    ]
