"""Interval arithmetic through a traced network, one rule an operation.

Shared by interval bound propagation and linear relaxation. An operation without a rule is refused by its name;
nothing is skipped.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from perturbkit.core import checks

__all__ = ["Interval", "affine", "interval_forward", "trace"]


@dataclass(frozen=True)
class Interval:
    """Elementwise bounds on an activation."""

    lower: Tensor
    upper: Tensor

    @property
    def centre(self) -> Tensor:
        return (self.lower + self.upper) / 2

    @property
    def radius(self) -> Tensor:
        return (self.upper - self.lower) / 2

    def map(self, fun: Callable[[Tensor], Tensor]) -> Interval:
        """Apply a monotone (or merely rearranging) function to both ends."""
        return Interval(fun(self.lower), fun(self.upper))


def trace(model: nn.Module) -> fx.GraphModule:
    """Return the graph of a module's forward.

    Raises
    ------
    ModelError
        If the forward depends on values and has no fixed graph.
    """
    try:
        return fx.symbolic_trace(model)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise checks.ModelError(
            f"the forward of {type(model).__name__} has no fixed graph ({reason}); allowed: a forward made of layers "
            "and tensor operations, without branches on values. Certify a part of it, or smooth it."
        ) from error


def interval_forward(graph: fx.GraphModule, lower: Tensor, upper: Tensor) -> Interval:
    """Propagate a box through a traced network."""
    out = _Propagate(graph, garbage_collect_values=True).run(
        Interval(lower, upper), enable_io_processing=False
    )
    if not isinstance(out, Interval):
        raise checks.ModelError(
            f"the network answers a {type(out).__name__} that does not depend on its input; allowed: one tensor that "
            "does. Return the logits alone."
        )
    return out


def affine(x: Interval, apply: Callable[[Tensor], Tensor], magnitude: Callable[[Tensor], Tensor]) -> Interval:
    """Return the exact box of a linear map: its value at the centre, and ``|W|`` on the radius."""
    centre, radius = apply(x.centre), magnitude(x.radius)
    return Interval(centre - radius, centre + radius)


class _Propagate(fx.Interpreter):
    """Runs a graph on intervals; values that depend on no input stay tensors."""

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if not _has_interval((args, kwargs)):
            return super().call_module(target, args, kwargs)
        for kind, rule in _MODULES.items():
            if isinstance(module, kind):
                return rule(module, args[0])
        raise _unsupported(f"the layer {target} ({type(module).__name__})")

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not _has_interval((args, kwargs)):
            return super().call_function(target, args, kwargs)
        rule = _FUNCTIONS.get(target)
        if rule is None:
            raise _unsupported(f"the operation {getattr(target, '__name__', target)}")
        return rule(*args, **kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not _has_interval((args, kwargs)):
            return super().call_method(target, args, kwargs)
        rule = _METHODS.get(target)
        if rule is None:
            raise _unsupported(f"the method {target}")
        return rule(*args, **kwargs)


def _has_interval(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_has_interval, value))
    if isinstance(value, dict):
        return any(map(_has_interval, value.values()))
    return isinstance(value, Interval)


def _unsupported(what: str) -> checks.ModelError:
    layers = ", ".join(k.__name__.lstrip("_") for k in _MODULES)
    return checks.ModelError(
        f"{what} has no interval rule; allowed: {layers}, and sums, products with constants, relu, tanh, sigmoid, cat, "
        "flatten and reshape. Replace it, or certify the smoothed model."
    )


# -- layers ---------------------------------------------------------------------------------------------------


def _linear(m: nn.Linear, x: Interval) -> Interval:
    return affine(x, m, lambda r: functional.linear(r, m.weight.abs()))


def _conv(m: Any, x: Interval) -> Interval:
    centre = m(x.centre)
    radius = m._conv_forward(x.radius, m.weight.abs(), None)
    return Interval(centre - radius, centre + radius)


def _batch_norm(m: Any, x: Interval) -> Interval:
    # Evaluation statistics: a diagonal affine map. In training mode the batch's own would depend on the box.
    if m.training or m.running_mean is None:
        raise checks.ModelError(
            f"{type(m).__name__} uses the statistics of the batch; allowed: evaluation mode with running statistics. "
            "Call model.eval()."
        )
    scale = (m.running_var + m.eps).rsqrt() * (1 if m.weight is None else m.weight)
    shape = (1, -1, *[1] * (x.lower.ndim - 2))
    return affine(x, m, lambda r: r * scale.abs().reshape(shape))


def _monotone(m: nn.Module, x: Interval) -> Interval:
    return x.map(m)


def _layer_norm(m: nn.LayerNorm, x: Interval) -> Interval:
    """Bound (x - mean) / std: the centred value by its affine box, the deviation by the box's own extremes."""
    axes = tuple(range(-len(m.normalized_shape), 0))
    n = 1
    for size in m.normalized_shape:
        n *= size
    others_low = x.lower.sum(axes, keepdim=True) - x.lower
    others_high = x.upper.sum(axes, keepdim=True) - x.upper
    low = x.lower * (1 - 1 / n) - others_high / n
    high = x.upper * (1 - 1 / n) - others_low / n
    smallest = torch.where((low <= 0) & (high >= 0), 0.0, torch.minimum(low.abs(), high.abs()))
    largest = torch.maximum(low.abs(), high.abs())
    wide = ((largest**2).mean(axes, keepdim=True) + m.eps).rsqrt()
    narrow = ((smallest**2).mean(axes, keepdim=True) + m.eps).rsqrt()
    bottom = torch.where(low < 0, low * narrow, low * wide)
    top = torch.where(high > 0, high * narrow, high * wide)
    # A normalised vector has no entry beyond sqrt(n - 1).
    limit = (n - 1) ** 0.5
    unit = Interval(bottom.clamp(min=-limit), top.clamp(max=limit))
    if m.weight is None:
        return unit
    bias = 0 if m.bias is None else m.bias
    return affine(unit, lambda c: c * m.weight + bias, lambda r: r * m.weight.abs())


def _unimodal(fun: Callable[[Tensor], Tensor], lowest: float) -> Callable[[nn.Module, Interval], Interval]:
    """Return the rule of an activation that falls to one minimum and rises after it (GELU, SiLU)."""

    def rule(m: nn.Module, x: Interval) -> Interval:
        ends = x.map(m)
        inside = (x.lower < lowest) & (x.upper > lowest)
        bottom = fun(torch.full_like(x.lower, lowest))
        low = torch.where(inside, bottom, torch.minimum(ends.lower, ends.upper))
        # The minimum's place is known to 1e-6 only; there the activation is flat, so this covers the rest.
        return Interval(low - 1e-9, torch.maximum(ends.lower, ends.upper))

    return rule


_MONOTONE = (
    nn.ReLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Hardtanh, nn.ReLU6,
    nn.LogSigmoid, nn.Hardsigmoid, nn.Softsign,
)  # fmt: skip
_REARRANGING = (
    nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d,
    nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d, nn.PixelShuffle,
)  # fmt: skip
_MODULES: dict[type[nn.Module], Callable[[Any, Interval], Interval]] = {
    nn.Linear: _linear, nn.Conv1d: _conv, nn.Conv2d: _conv, nn.Conv3d: _conv, nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm, nn.LayerNorm: _layer_norm,
    nn.GELU: _unimodal(functional.gelu, -0.7517916), nn.SiLU: _unimodal(functional.silu, -1.2784645),
    **dict.fromkeys((*_MONOTONE, *_REARRANGING), _monotone),
}  # fmt: skip


# -- functions ------------------------------------------------------------------------------------------------


def _add(a: Any, b: Any, *, alpha: float = 1) -> Interval:
    if alpha != 1:
        b = _multiply(b, alpha) if isinstance(b, Interval) else b * alpha
    left, right = _as_interval(a), _as_interval(b)
    return Interval(left.lower + right.lower, left.upper + right.upper)


def _subtract(a: Any, b: Any) -> Interval:
    left, right = _as_interval(a), _as_interval(b)
    return Interval(left.lower - right.upper, left.upper - right.lower)


def _multiply(a: Any, b: Any) -> Interval:
    left, right = _as_interval(a), _as_interval(b)
    corners = [
        left.lower * right.lower,
        left.lower * right.upper,
        left.upper * right.lower,
        left.upper * right.upper,
    ]
    lower, upper = corners[0], corners[0]
    for corner in corners[1:]:
        lower, upper = torch.minimum(lower, corner), torch.maximum(upper, corner)
    return Interval(lower, upper)


def _divide(a: Any, b: Any) -> Interval:
    if isinstance(b, Interval):
        raise _unsupported("division by something that depends on the input")
    return _multiply(a, 1 / torch.as_tensor(b))


def _as_interval(value: Any) -> Interval:
    if isinstance(value, Interval):
        return value
    constant = torch.as_tensor(value)
    return Interval(constant, constant)


def _negate(x: Interval) -> Interval:
    return Interval(-x.upper, -x.lower)


def _cat(parts: Any, dim: int = 0) -> Interval:
    items = [_as_interval(p) for p in parts]
    return Interval(torch.cat([i.lower for i in items], dim), torch.cat([i.upper for i in items], dim))


def _both(fun: Callable[..., Tensor]) -> Callable[..., Interval]:
    def rule(x: Interval, *args: Any, **kwargs: Any) -> Interval:
        return x.map(lambda end: fun(end, *args, **kwargs))

    return rule


def _function_linear(x: Interval, weight: Tensor, bias: Tensor | None = None) -> Interval:
    return affine(
        x, lambda c: functional.linear(c, weight, bias), lambda r: functional.linear(r, weight.abs())
    )


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.add: _add, torch.add: _add, operator.iadd: _add, operator.sub: _subtract, torch.sub: _subtract,
    operator.mul: _multiply, torch.mul: _multiply, operator.truediv: _divide, torch.div: _divide,
    operator.neg: _negate, torch.neg: _negate, torch.cat: _cat, functional.linear: _function_linear,
    operator.getitem: _both(operator.getitem),
    **{f: _both(f) for f in (
        torch.relu, functional.relu, torch.tanh, functional.tanh, torch.sigmoid, functional.sigmoid,
        functional.leaky_relu, functional.elu, functional.softplus, torch.flatten, torch.reshape, torch.squeeze,
        torch.unsqueeze, torch.transpose, torch.permute, torch.mean, torch.sum, torch.exp, functional.max_pool2d,
        functional.avg_pool2d, functional.adaptive_avg_pool2d, functional.dropout, torch.clamp,
    )},
}  # fmt: skip
_METHODS: dict[str, Callable[..., Any]] = {
    "add": _add, "sub": _subtract, "mul": _multiply, "div": _divide, "neg": _negate,
    **{name: _both(getattr(torch.Tensor, name)) for name in (
        "relu", "tanh", "sigmoid", "flatten", "reshape", "view", "squeeze", "unsqueeze", "transpose", "permute",
        "mean", "sum", "contiguous", "float", "double", "exp", "clamp",
    )},
    # A size is the same at both ends.
    "size": lambda x, *args: x.lower.size(*args),
    "dim": lambda x: x.lower.dim(),
}  # fmt: skip
