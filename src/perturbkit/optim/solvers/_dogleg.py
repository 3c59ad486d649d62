"""The dogleg step of a scaled trust region between bounds."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decrease", "dogleg", "inside"]

_THETA = 0.99995
"""Part of the way to the bounds that a step may go."""


def dogleg(
    x: Tensor,
    value: Tensor,
    jacobian: Tensor,
    g: Tensor,
    d: Tensor,
    newton: Tensor,
    low: Tensor,
    high: Tensor,
    delta: float,
) -> Tensor:
    """Return the dogleg step, cut before the bounds, or the scaled gradient step where the cut took the decrease away."""
    root = d.sqrt()
    # In the variables s / sqrt(d): the model's minimiser along the scaled gradient.
    downhill = -root * g
    image = jacobian @ (root * downhill)
    cauchy = downhill * (downhill.square().sum() / image.square().sum().clamp(min=torch.finfo(d.dtype).tiny))
    scaled = newton / root
    if bool(scaled.norm() <= delta):
        step = scaled
    elif bool(cauchy.norm() >= delta):
        step = cauchy * (delta / cauchy.norm())
    else:
        # Where the segment from one to the other leaves the region.
        leg = scaled - cauchy
        a, b, c = leg.square().sum(), cauchy @ leg, cauchy.square().sum() - delta**2
        step = cauchy + leg * ((-b + (b * b - a * c).clamp(min=0).sqrt()) / a)
    limited = cauchy * (delta / cauchy.norm()).clamp(max=1)
    whole, gradient = _cut(x, root * step, low, high), _cut(x, root * limited, low, high)
    # Of the step as cut: the uncut one's decrease says nothing of it.
    if bool(decrease(value, jacobian, whole) < 0.1 * decrease(value, jacobian, gradient)):
        return gradient
    return whole


def _cut(x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    room = torch.where(step > 0, high - x, x - low) / step.abs()
    reach = torch.where(step == 0, torch.inf, room).amin()
    if bool(reach > 1):
        return step
    return torch.clamp(1 - step.norm(), min=_THETA) * reach * step


def decrease(value: Tensor, jacobian: Tensor, step: Tensor) -> Tensor:
    """Return by how much the linear model's half squared norm falls along a step."""
    return 0.5 * (value.square().sum() - (value + jacobian @ step).square().sum())


def inside(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Undo what rounding does to a step that ends next to a bound."""
    up, down = torch.full_like(x, torch.inf), torch.full_like(x, -torch.inf)
    return torch.clamp(x, torch.nextafter(low, up), torch.nextafter(high, down))
