"""Bounded domains: which points are inside, mirrors at the walls, and fields whose component across the wall fades there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from perturbkit.core import checks
from perturbkit.diffusion.constrained._parts import folded

__all__ = ["Domain", "ImplicitDomain", "Polygon", "UnitCube"]

_PROJECTIONS = 30


class Domain(ABC):
    """A bounded domain of ``dim`` dimensions with mirrors for walls."""

    dim: int

    @abstractmethod
    def contains(self, x: Tensor) -> Tensor:
        """Return whether each row is in the closed domain, shape (n,)."""

    @abstractmethod
    def reflect(self, x: Tensor) -> Tensor:
        """Return the rows, mirrored at the wall where they are outside, and inside all the same where a mirror fails."""

    @abstractmethod
    def faded(self, field: Tensor, x: Tensor, width: float) -> Tensor:
        """Return a field with its component across the nearest wall times ``min(1, distance / width)``."""

    def check(self, name: str, x: Tensor) -> Tensor:
        """Accept rows inside the domain."""
        checks.tensor(name, x, shape=(None, self.dim))
        outside = int((~self.contains(x)).sum())
        if outside:
            raise checks.ArgumentError(
                f"{name} has {outside} of {len(x)} rows outside the domain; allowed: rows inside. "
                "Scale the data, or widen the domain."
            )
        return x


class UnitCube(Domain):
    """The cube [0, 1]^dim, by folding.

    Parameters
    ----------
    dim : int
        Dimensions, at least 1.

    Notes
    -----
    Folding each coordinate is exact: a step of any size ends where the mirrored path does.

    Examples
    --------
    >>> UnitCube(2).reflect(torch.tensor([[0.5, 1.25]]))
    tensor([[0.5000, 0.7500]])
    """

    def __init__(self, dim: int) -> None:
        self.dim = checks.integer("dim", dim, low=1)

    def contains(self, x: Tensor) -> Tensor:
        return ((x >= 0) & (x <= 1)).all(1)

    def reflect(self, x: Tensor) -> Tensor:
        return folded(x)

    def faded(self, field: Tensor, x: Tensor, width: float) -> Tensor:
        # The walls are those of the coordinates, each with its own distance.
        return field * (torch.minimum(x, 1 - x) / width).clamp(0, 1)


class Polygon(Domain):
    """The inside of a polygon in the plane, convex or not.

    Parameters
    ----------
    vertices : Tensor, shape (k, 2)
        Corners in order, either way round, at least three; edges must not cross.

    Notes
    -----
    A point outside goes to its mirror image at the nearest point ``b`` of the boundary, ``2 b - x``, or just inside of ``b`` where
    the image is outside as well (beyond a corner).

    Examples
    --------
    >>> square = Polygon(torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 1.0], [0.0, 1.0]]))
    >>> square.reflect(torch.tensor([[1.0, 1.25], [0.5, 0.5]]))
    tensor([[1.0000, 0.7500],
            [0.5000, 0.5000]])
    """

    dim = 2

    def __init__(self, vertices: Tensor) -> None:
        corners = checks.tensor("vertices", vertices, shape=(None, 2))
        following = corners.roll(-1, 0)
        repeated = (corners == following).all(1).nonzero()[:, 0].tolist()
        if repeated:
            raise checks.ArgumentError(
                f"vertices has corner {repeated[0]} twice in a row (the last is followed by the first); allowed: each once. Leave the "
                "second out."
            )
        area = float((corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0]).sum()) / 2
        if len(corners) < 3 or area == 0:
            raise checks.ArgumentError(
                f"vertices has {len(corners)} corners around an area of {abs(area):g}; allowed: at least three, around an "
                "area above 0. Pass the corners in order."
            )
        self.vertices = corners if area > 0 else corners.flip(0)  # anticlockwise: the inside is on the left

    def contains(self, x: Tensor) -> Tensor:
        a, b = self._edges(x)
        rising, falling = a[:, 1] <= x[:, 1, None], b[:, 1] <= x[:, 1, None]
        side = (b - a)[:, 0] * (x[:, 1, None] - a[:, 1]) - (b - a)[:, 1] * (x[:, 0, None] - a[:, 0])
        # Edges that cross the height of the point to its right: an odd number of them around what is inside.
        crossed = (rising & ~falling & (side > 0)) | (~rising & falling & (side < 0))
        return (crossed.sum(1) % 2 == 1) | (self._nearest(x)[1] == 0)

    def reflect(self, x: Tensor) -> Tensor:
        outside = ~self.contains(x)
        nearest = self._nearest(x)[0]
        out = torch.where(outside[:, None], 2 * nearest - x, x)
        small = 8 * torch.finfo(x.dtype).eps * float(self.vertices.abs().max())
        for k in range(_PROJECTIONS):
            lost = ~self.contains(out)
            if not bool(lost.any()):
                break
            # As little inward as rounding leaves inside, away from all walls that are no farther.
            step = small * 2.0**k
            out = torch.where(lost[:, None], nearest + step * self._nearest(nearest, slack=2 * step)[2], out)
        return out

    def faded(self, field: Tensor, x: Tensor, width: float) -> Tensor:
        _, distance, inward = self._nearest(x)
        across = (field * inward).sum(1, keepdim=True)
        return field - (1 - (distance / width).clamp_max(1))[:, None] * across * inward

    def _edges(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.vertices.to(x)
        return a, a.roll(-1, 0)

    def _nearest(self, x: Tensor, slack: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """Return the nearest point of the boundary, its distance, and the direction inward there: the mean of those of all
        edges that are as near, up to the slack (at a corner that of the bisector).
        """
        a, b = self._edges(x)
        along = b - a
        share = (((x[:, None] - a) * along).sum(2) / along.square().sum(1)).clamp(0, 1)
        points = a + share[:, :, None] * along  # [n, edges, 2]
        distances = (x[:, None] - points).norm(dim=2)
        least, which = distances.min(1)
        normals = torch.stack((-along[:, 1], along[:, 0]), 1) / along.norm(dim=1, keepdim=True)
        rounding = 16 * torch.finfo(x.dtype).eps * float(self.vertices.abs().max())
        tied = (distances - least[:, None]) <= max(slack, rounding)
        inward = tied.to(x.dtype) @ normals
        inward = inward / inward.norm(dim=1, keepdim=True).clamp_min(1e-12)
        return points[torch.arange(len(x), device=x.device), which], least, inward


class ImplicitDomain(Domain):
    """Where a function is positive.

    Parameters
    ----------
    distance : callable
        ``distance(x)`` of rows (n, dim) answers (n,), positive inside; the signed distance to the boundary, or a smooth function
        like it near the boundary. Differentiable.
    dim : int
        Dimensions, at least 1.

    Notes
    -----
    With ``n = grad f``, a point outside goes to ``x - 2 f n / |n|^2``, its mirror image where ``f`` is a distance, and is moved
    inward along ``n`` until it is inside where that fails.

    Examples
    --------
    >>> disc = ImplicitDomain(lambda x: 1 - x.norm(dim=1), 2)
    >>> disc.reflect(torch.tensor([[1.25, 0.0]]))
    tensor([[0.7500, 0.0000]])
    """

    def __init__(self, distance: Callable[[Tensor], Tensor], dim: int) -> None:
        if not callable(distance):
            raise checks.ArgumentTypeError(
                f"distance is a {type(distance).__name__}; allowed: a callable of rows. Pass the signed distance."
            )
        self.distance = distance
        self.dim = checks.integer("dim", dim, low=1)

    def contains(self, x: Tensor) -> Tensor:
        return self._value(x) >= 0

    def reflect(self, x: Tensor) -> Tensor:
        value, normal = self._level(x)
        step = normal / normal.square().sum(1, keepdim=True).clamp_min(1e-12)
        out = x - 2 * value.clamp_max(0)[:, None] * step
        small = 8 * torch.finfo(x.dtype).eps
        for k in range(_PROJECTIONS):
            value, normal = self._level(out)
            if bool((value >= 0).all()):
                return out
            step = normal / normal.square().sum(1, keepdim=True).clamp_min(1e-12)
            out = out + torch.where(value < 0, small * 2.0**k - value, 0)[:, None] * step
        raise checks.ModelError(
            f"distance leads {int((self._value(out) < 0).sum())} of {len(x)} rows not back inside; allowed: a function that grows "
            "inward near the boundary. Pass a signed distance, or take smaller steps."
        )

    def faded(self, field: Tensor, x: Tensor, width: float) -> Tensor:
        value, normal = self._level(x)
        length = normal.norm(dim=1, keepdim=True).clamp_min(1e-12)
        inward, distance = normal / length, value[:, None] / length
        across = (field * inward).sum(1, keepdim=True)
        return field - (1 - (distance / width).clamp(0, 1)) * across * inward

    def _value(self, x: Tensor) -> Tensor:
        value = self.distance(x)
        if value.shape != (len(x),):
            raise checks.ModelError(
                f"distance answers shape {tuple(value.shape)} to {len(x)} rows; allowed: ({len(x)},), one number a row. Add up or "
                "take out the other dimensions."
            )
        return value

    def _level(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the function and its gradient, both differentiable where ``x`` is."""
        with torch.enable_grad():
            rows = x if x.requires_grad else x.detach().requires_grad_()
            value = self._value(rows)
            if not value.requires_grad:
                raise checks.ModelError(
                    "distance answers without a gradient; allowed: a differentiable function of the rows. Take detach and "
                    "torch.no_grad out of it."
                )
            (normal,) = torch.autograd.grad(value.sum(), rows, create_graph=x.requires_grad)
        return (value, normal) if x.requires_grad else (value.detach(), normal.detach())
