"""Adafactor: adaptive steps whose second moments take the memory of rows and columns only.

Use it where Adam's two buffers of the weights' size do not fit. Shazeer and Stern (2018), Adafactor: Adaptive Learning
Rates with Sublinear Memory Cost, arXiv:1804.04235.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from perturbkit.core import checks
from perturbkit.core.optimizers import BaseOptimizer, dense_gradients, evaluated

__all__ = ["Adafactor", "state_bytes"]


class Adafactor(BaseOptimizer):
    r"""Adaptive steps with factored second moments.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups.
    lr : float, optional
        Learning rate, zero or above; only where ``relative_step_size`` is off, and then needed.
    relative_step_size : bool
        Steps of :math:`\min(10^{-2}, t^{-1/2})` instead of ``lr``.
    warmup : bool
        Relative steps of :math:`\min(10^{-6} t, t^{-1/2})`.
    clip_threshold : float
        Largest root mean square of a tensor's update, above 0; infinite for no clipping.
    decay_power : float
        The moments' weight is :math:`1 - t^{p}`, below 0.
    eps : pair of float
        Added to squared gradients, above 0; least root mean square of a parameter that scales its step, zero or above.
    beta1 : float, optional
        Weight of a first moment of the clipped updates, in [0, 1); none, and no memory for it, by default.
    scale_parameter : bool
        Multiply the step by the root mean square of the parameter.
    weight_decay : float
        Decoupled decay, times the step; zero or above.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    For a matrix G of gradients, :math:`R \leftarrow \beta R + (1 - \beta) \operatorname{mean}_j (G^2 + \epsilon_1)`, C alike
    over rows, and :math:`V = R C^\top / \operatorname{mean}(R)`: the product of marginals that is nearest to the moving mean
    of squares in Kullback-Leibler divergence. Vectors keep all of V; tensors of more dimensions factor the last two. Then
    :math:`U = G / \sqrt V`, :math:`U \leftarrow U / \max(1, \operatorname{RMS}(U) / d)` and :math:`X \leftarrow X - \alpha U`. There
    is no bias to correct, since the first weight is zero.

    Cost: the gradient's; n + m numbers of state for an n by m matrix. Sparse gradients are made dense.

    References
    ----------
    Shazeer and Stern (2018), arXiv:1804.04235, algorithms 4 and 5.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.ones(20, 30))
    >>> optimizer = Adafactor([w], lr=0.1, relative_step_size=False)
    >>> w.square().sum().backward()
    >>> optimizer.step()
    >>> bool(w.allclose(torch.tensor(0.9))), state_bytes(optimizer)
    (True, 200)
    """

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        relative_step_size: bool = True,
        warmup: bool = False,
        clip_threshold: float = 1.0,
        decay_power: float = -0.8,
        eps: Sequence[float] = (1e-30, 1e-3),
        beta1: float | None = None,
        scale_parameter: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr, "relative_step_size": relative_step_size, "warmup": warmup, "clip_threshold": clip_threshold,
            "decay_power": decay_power, "eps": eps, "beta1": beta1, "scale_parameter": scale_parameter,
            "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check a group's own options."""
        _checked(group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; return the closure's loss, if one is given.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the loss and its gradients.
        """
        loss = evaluated(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(group, p)
        return loss

    def _update(self, group: dict[str, Any], p: Tensor) -> None:
        g = dense_gradients([p])[0].to(torch.promote_types(p.dtype, torch.float32))
        state = self.state[p]
        t = state["step"] = state.get("step", 0) + 1
        update = g * _inverse_root(state, g, 1 - t ** group["decay_power"], group["eps"][0])
        update.div_((_rms(update) / group["clip_threshold"]).clamp_(min=1.0))
        if group["beta1"] is not None:
            mean = state.setdefault("mean", torch.zeros_like(update))
            update = mean.lerp_(update, 1 - group["beta1"])
        rate = group["lr"]
        if group["relative_step_size"]:
            rate = min(1e-6 * t if group["warmup"] else 1e-2, 1 / math.sqrt(t))
        wide = p.to(update.dtype)
        scale = _rms(wide).clamp_(min=group["eps"][1]) * rate if group["scale_parameter"] else rate
        if group["weight_decay"] > 0:
            wide = wide * (1 - group["weight_decay"] * scale)
        p.copy_((wide - update * scale).to(p.dtype))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of an optimizer's state, without the counters of steps.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Any, after its first step.

    Returns
    -------
    int

    Raises
    ------
    ArgumentTypeError
        If it is no optimizer.

    Notes
    -----
    The bytes of all tensors but those named ``step``.

    References
    ----------
    Shazeer and Stern (2018), arXiv:1804.04235, section 3.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.ones(4))
    >>> optimizer = torch.optim.Adam([w])
    >>> w.sum().backward(); optimizer.step()
    >>> state_bytes(optimizer)
    32
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise checks.ArgumentTypeError(
            f"optimizer is a {type(optimizer).__name__}; allowed: a torch.optim.Optimizer. Pass one after its first step."
        )
    return sum(
        value.nbytes
        for own in optimizer.state.values()
        if isinstance(own, dict)
        for name, value in own.items()
        if isinstance(value, Tensor) and name != "step"
    )


def _inverse_root(state: dict[str, Any], g: Tensor, beta: float, epsilon: float) -> Tensor:
    """Move the second moments on by a gradient, and return what divides it, in a shape that broadcasts."""
    square = g.square().add_(epsilon)
    if g.ndim < 2:
        moment = state.setdefault("square", torch.zeros_like(g))
        return moment.lerp_(square, 1 - beta).rsqrt()
    rows = state.setdefault("rows", g.new_zeros(g.shape[:-1]))
    columns = state.setdefault("columns", g.new_zeros((*g.shape[:-2], g.shape[-1])))
    rows.lerp_(square.mean(-1), 1 - beta)
    columns.lerp_(square.mean(-2), 1 - beta)
    # The two roots apart: their product could leave the range of single precision.
    left = (rows / rows.mean(-1, keepdim=True)).rsqrt_()
    return left[..., None] * columns.rsqrt()[..., None, :]


def _rms(x: Tensor) -> Tensor:
    return x.norm() / max(x.numel(), 1) ** 0.5


def _checked(group: Mapping[str, Any]) -> None:
    if group["relative_step_size"] == (group["lr"] is not None):
        raise checks.ArgumentError(
            f"lr is {group['lr']!r} and relative_step_size {group['relative_step_size']}; allowed: one of the two. Pass "
            "relative_step_size=False with an lr, or leave the lr out."
        )
    if group["lr"] is not None:
        checks.nonnegative("lr", group["lr"])
    if group["warmup"] and not group["relative_step_size"]:
        raise checks.ArgumentError(
            "warmup is on without relative steps; allowed: with relative_step_size. Use a scheduler to warm up an lr."
        )
    if group["clip_threshold"] != math.inf:
        checks.positive("clip_threshold", group["clip_threshold"])
    checks.between("decay_power", group["decay_power"], -math.inf, 0, inclusive="neither")
    if isinstance(group["eps"], str) or not isinstance(group["eps"], Sequence) or len(group["eps"]) != 2:
        raise checks.ArgumentTypeError(f"eps is {group['eps']!r}; allowed: two numbers. Pass (1e-30, 1e-3).")
    checks.positive("eps", group["eps"][0])
    checks.nonnegative("eps", group["eps"][1])
    if group["beta1"] is not None:
        checks.between("beta1", group["beta1"], 0, 1, inclusive="low")
    checks.nonnegative("weight_decay", group["weight_decay"])
