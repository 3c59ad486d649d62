"""Lines below and above an activation between two bounds, one rule a shape of curve."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

__all__ = ["Lines", "lines_of", "relax"]

Curve = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Lines:
    """``low_slope x + low_shift <= s(x) <= high_slope x + high_shift`` between the bounds."""

    low_slope: Tensor
    low_shift: Tensor
    high_slope: Tensor
    high_shift: Tensor


def relax(kind: tuple[str, float], low: Tensor, high: Tensor) -> Lines:
    """Return the lines of an activation between its bounds, elementwise."""
    name, parameter = kind
    if name == "leaky":
        return _leaky(low, high, parameter)
    if name == "exp":
        return _convex(torch.exp, torch.exp, low, high, furthest=0.99)
    if name == "softplus":
        return _convex(functional.softplus, torch.sigmoid, low, high)
    if name == "tanh":
        return _s_shaped(torch.tanh, _tanh_slope, lambda x: -2 * torch.tanh(x) * _tanh_slope(x), low, high)
    return _s_shaped(
        torch.sigmoid, _sigmoid_slope, lambda x: _sigmoid_slope(x) * (1 - 2 * torch.sigmoid(x)), low, high
    )


def lines_of(node: fx.Node, root: fx.GraphModule) -> tuple[str, float] | None:
    """Return which rule bounds a node by lines, or ``None``."""
    if node.op == "call_module":
        module: Any = root.get_submodule(str(node.target))
        if isinstance(module, nn.ReLU):
            return ("leaky", 0.0)
        if isinstance(module, nn.LeakyReLU):
            return ("leaky", module.negative_slope)
        if isinstance(module, nn.Softplus):
            return ("softplus", 0.0) if module.beta == 1 else None
        return {nn.Tanh: ("tanh", 0.0), nn.Sigmoid: ("sigmoid", 0.0)}.get(type(module))
    if len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return None
    return _FUNCTIONS.get(node.target)


_FUNCTIONS: dict[Any, tuple[str, float]] = {
    torch.relu: ("leaky", 0.0), functional.relu: ("leaky", 0.0), "relu": ("leaky", 0.0),
    functional.leaky_relu: ("leaky", 0.01), torch.exp: ("exp", 0.0), "exp": ("exp", 0.0),
    torch.tanh: ("tanh", 0.0), functional.tanh: ("tanh", 0.0), "tanh": ("tanh", 0.0),
    torch.sigmoid: ("sigmoid", 0.0), functional.sigmoid: ("sigmoid", 0.0), "sigmoid": ("sigmoid", 0.0),
    functional.softplus: ("softplus", 0.0),
}  # fmt: skip


def _chord(at_low: Tensor, at_high: Tensor, slope_low: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the slope of the chord; where the bounds are one point, that of the curve."""
    width = high - low
    narrow = width <= 1e-12 * (1 + low.abs())
    return torch.where(narrow, slope_low, (at_high - at_low) / torch.where(narrow, 1.0, width))


def _leaky(low: Tensor, high: Tensor, slope: float) -> Lines:
    at_low, at_high = (functional.leaky_relu(end, slope) for end in (low, high))
    one, other = torch.ones_like(low), torch.full_like(low, slope)
    top = _chord(at_low, at_high, torch.where(low >= 0, one, other), low, high)
    # The lower line goes through zero: the identity where more of the interval is above it. Convex up to slope 1.
    bottom = torch.where((high > 0) & (high >= -low), one, other)
    lines = (bottom, torch.zeros_like(low), top, at_low - top * low)
    return Lines(*lines) if slope <= 1 else Lines(*lines[2:], *lines[:2])


def _tangent(curve: Curve, slope: Curve, at: Tensor) -> tuple[Tensor, Tensor]:
    k = slope(at)
    return k, curve(at) - k * at


def _convex(curve: Curve, slope: Curve, low: Tensor, high: Tensor, furthest: float = math.inf) -> Lines:
    top = _chord(curve(low), curve(high), slope(low), low, high)
    # A tangent to exp further than one from the low end would be below zero there.
    middle = torch.minimum((low + high) / 2, low + furthest)
    return Lines(*_tangent(curve, slope, middle), top, curve(low) - top * low)


def _s_shaped(curve: Curve, slope: Curve, bend: Curve, low: Tensor, high: Tensor) -> Lines:
    """Bound a curve that is odd about its value at zero, convex below and concave above."""
    low_slope, low_shift = _below_s(curve, slope, bend, low, high)
    mirrored, shift = _below_s(curve, slope, bend, -high, -low)
    # s(x) = 2 s(0) - s(-x): a line below at -x is one above at x.
    centre = curve(torch.zeros_like(low))
    return Lines(low_slope, low_shift, mirrored, 2 * centre - shift)


def _below_s(curve: Curve, slope: Curve, bend: Curve, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    at_low, at_high = curve(low), curve(high)
    chord = _chord(at_low, at_high, slope(low), low, high)
    # Concave throughout, or so far up that the chord stays below the convex part.
    take_chord = (low >= 0) | ((low < 0) & (high > 0) & (slope(low) >= chord))
    middle = (low + high) / 2
    touch = torch.where(
        high <= 0, middle, torch.minimum(_touching(curve, slope, bend, low, high), torch.zeros_like(low))
    )
    k, b = _tangent(curve, slope, touch)
    return torch.where(take_chord, chord, k), torch.where(take_chord, at_low - chord * low, b)


def _touching(curve: Curve, slope: Curve, bend: Curve, low: Tensor, high: Tensor) -> Tensor:
    """Return the point below zero whose tangent goes through the curve at ``high``, or a little further out.

    Every tangent further out is also below the curve on the interval, so the outer end of the bracket is taken. Its
    derivative is that of the root of ``s(d) + s'(d) (high - d) = s(high)``.
    """
    with torch.no_grad():
        outer, inner = low.clone(), torch.zeros_like(low)
        goal = curve(high)
        for _ in range(40):
            middle = (outer + inner) / 2
            above = curve(middle) + slope(middle) * (high - middle) > goal
            outer, inner = torch.where(above, outer, middle), torch.where(above, middle, inner)
        rate = bend(outer) * (high - outer)
        rate = torch.where(rate.abs() > 1e-12, rate, torch.inf)
    residual = curve(outer) + slope(outer) * (high - outer) - curve(high)
    moving = torch.where(outer > low, residual / rate, outer - low)
    return outer - (moving - moving.detach())


def _tanh_slope(x: Tensor) -> Tensor:
    return 1 - torch.tanh(x) ** 2


def _sigmoid_slope(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * torch.sigmoid(-x)
