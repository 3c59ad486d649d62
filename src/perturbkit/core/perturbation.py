"""The sets and distributions that perturbations come from: balls, boxes, their intersection, spheres, noise, masks.

A set can be sampled, projected onto, tested for membership and searched for the maximum of a linear form; a
distribution can be sampled. All work on a batch ``delta`` of shape (n, ...), each row by itself, with norms over
all dimensions but the first. Start with :func:`around`, the set of an adversarial attack on inputs with bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from perturbkit.core import checks, random

__all__ = [
    "Ball",
    "BallInBox",
    "Box",
    "Distribution",
    "Gaussian",
    "Masks",
    "Norm",
    "Perturbation",
    "Rademacher",
    "Sphere",
    "Uniform",
    "all_masks",
    "around",
    "row_norm",
]

Norm = Literal["l1", "l2", "linf"]
_NORMS = ("l1", "l2", "linf")
_ORDER = {"l1": 1.0, "l2": 2.0, "linf": math.inf}


@runtime_checkable
class Distribution(Protocol):
    """What perturbations can be drawn from."""

    def sample(self, like: Tensor, *, generator: random.Seed = None, n: int | None = None) -> Tensor:
        """Draw perturbations for rows like those of ``like``.

        Parameters
        ----------
        like : Tensor, shape (m, ...)
            Gives the shape of a row, the dtype and the device.
        generator : torch.Generator, int or None
            Source of randomness.
        n : int, optional
            Number of draws; ``m`` by default.

        Returns
        -------
        Tensor, shape (n, ...)
        """


@runtime_checkable
class Perturbation(Distribution, Protocol):
    """A closed set of perturbations. Shapes: ``delta`` and ``g`` are (n, ...), one answer a row."""

    def project(self, delta: Tensor) -> Tensor:
        """Return the nearest point of the set in the Euclidean norm."""

    def contains(self, delta: Tensor, atol: float = 1e-6) -> Tensor:
        """Return whether each row lies in the set, up to ``atol`` in the norm or bounds; shape (n,)."""

    def support(self, g: Tensor) -> Tensor:
        """Return the maximum of <g, delta> over the set; shape (n,)."""

    def maximiser(self, g: Tensor) -> Tensor:
        """Return a point of the set at which <g, delta> is largest."""


def row_norm(delta: Tensor, norm: Norm) -> Tensor:
    """Return the norm of each row over all dimensions but the first, shape (n,).

    Examples
    --------
    >>> row_norm(torch.tensor([[3.0, -4.0]]), "l2")
    tensor([5.])
    """
    order = _ORDER[checks.one_of("norm", norm, _NORMS)]
    return torch.linalg.vector_norm(_rows("delta", delta), ord=order, dim=1)


@dataclass(frozen=True, eq=False)
class Ball:
    r"""The ball :math:`\{\delta : \|\delta\|_p \le r\}`.

    Parameters
    ----------
    norm : {"l1", "l2", "linf"}
        The norm.
    radius : float or Tensor of shape (n,)
        Radius, zero or above; a tensor gives each row its own.

    Notes
    -----
    ``sample`` is uniform over the volume. The l1 projection sorts each row: O(d log d) [1]_.

    References
    ----------
    .. [1] J. Duchi, S. Shalev-Shwartz, Y. Singer, T. Chandra (2008). Efficient projections onto the l1-ball for
       learning in high dimensions. ICML.

    Examples
    --------
    >>> Ball("l1", 1.0).project(torch.tensor([[1.0, 0.5]]))
    tensor([[0.7500, 0.2500]])
    >>> Ball("linf", 0.1).support(torch.tensor([[2.0, -3.0]]))
    tensor([0.5000])
    """

    norm: Norm
    radius: float | Tensor

    def __post_init__(self) -> None:
        checks.one_of("norm", self.norm, _NORMS)
        object.__setattr__(self, "radius", _radius(self.radius))

    def sample(self, like: Tensor, *, generator: random.Seed = None, n: int | None = None) -> Tensor:
        """Draw uniformly from the ball."""
        draw = _Draw(like, generator, n)
        radius = _column(self.radius, draw.wide)
        if self.norm == "linf":
            flat = draw.uniform(draw.d, -1.0, 1.0)
        elif self.norm == "l2":
            # A uniform direction at a radius of density d r^(d-1).
            flat = draw.direction() * draw.uniform(1) ** (1 / draw.d)
        else:
            # d+1 exponentials over their sum are uniform on the simplex; the first d of them, with random
            # signs, are uniform in the l1 ball.
            exponentials = -torch.log1p(-draw.uniform(draw.d + 1))
            total = exponentials.sum(1, keepdim=True).clamp_min(torch.finfo(exponentials.dtype).tiny)
            flat = draw.signs() * exponentials[:, :-1] / total
        return draw.finish(radius * flat)

    def project(self, delta: Tensor) -> Tensor:
        """Return the nearest point of the ball."""
        z = _rows("delta", delta)
        radius = _column(self.radius, z)
        if self.norm == "linf":
            out = torch.clamp(z, -radius, radius)
        elif self.norm == "l2":
            length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
            out = torch.where(length > radius, z * (radius / length.clamp_min(torch.finfo(z.dtype).tiny)), z)
        else:
            out = _soft(z, sum_threshold(z.abs(), radius).clamp_min(0))
        return out.reshape(delta.shape)

    def contains(self, delta: Tensor, atol: float = 1e-6) -> Tensor:
        """Return whether each row's norm is at most the radius plus ``atol``."""
        return row_norm(delta, self.norm) <= _column(self.radius, _rows("delta", delta))[:, 0] + atol

    def support(self, g: Tensor) -> Tensor:
        """Return the radius times the dual norm of ``g``."""
        dual: dict[str, Norm] = {"l1": "linf", "l2": "l2", "linf": "l1"}
        return _column(self.radius, _rows("g", g))[:, 0] * row_norm(g, dual[self.norm])

    def maximiser(self, g: Tensor) -> Tensor:
        """Return the radius times the sign, the unit vector or the largest coordinate's signed unit vector."""
        flat = _rows("g", g)
        if self.norm == "linf":
            unit = flat.sign()
        elif self.norm == "l2":
            # Scaled by the largest coordinate first, so that squares neither underflow nor overflow.
            unit = functional.normalize(flat / _positive(flat.abs().amax(1, keepdim=True)), dim=1)
        else:
            first = flat.abs().argmax(1, keepdim=True)
            unit = torch.zeros_like(flat).scatter(1, first, flat.gather(1, first).sign())
        return (_column(self.radius, flat) * unit).reshape(g.shape)


@dataclass(frozen=True, eq=False)
class Box:
    r"""The box :math:`\{\delta : l \le \delta \le u\}`, elementwise.

    Parameters
    ----------
    low, high : float or Tensor
        Bounds of the perturbation (not of the perturbed input), broadcast against ``delta``; infinities are
        allowed, but then there is nothing to sample uniformly.

    Examples
    --------
    >>> Box(0.0, 1.0).project(torch.tensor([[-2.0, 0.5]]))
    tensor([[0.0000, 0.5000]])
    """

    low: float | Tensor
    high: float | Tensor

    def __post_init__(self) -> None:
        low, high = (
            torch.as_tensor(self.low),
            torch.as_tensor(self.high, device=torch.as_tensor(self.low).device),
        )
        # The negation also refuses NaN.
        if not bool((low <= high).all()):
            raise checks.ArgumentError(
                "the box is empty: low is above high, or one is NaN, in "
                f"{int((~(low <= high)).sum())} elements; allowed: low <= high. Swap or correct the bounds."
            )

    def bounds(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bounds in the shape (n, d) of the flattened rows of ``delta``, and its dtype and device."""
        return _spread("low", self.low, delta), _spread("high", self.high, delta)

    def sample(self, like: Tensor, *, generator: random.Seed = None, n: int | None = None) -> Tensor:
        """Draw uniformly from the box."""
        draw = _Draw(like, generator, n)
        low, high = self.bounds(draw.shaped)
        return draw.finish(_uniform_between(draw, low, high))

    def project(self, delta: Tensor) -> Tensor:
        """Clip each element to its bounds."""
        z = _rows("delta", delta)
        return torch.clamp(z, *self.bounds(delta)).reshape(delta.shape)

    def contains(self, delta: Tensor, atol: float = 1e-6) -> Tensor:
        """Return whether all elements of a row are within their bounds, up to ``atol``."""
        z, (low, high) = _rows("delta", delta), self.bounds(delta)
        return ((z >= low - atol) & (z <= high + atol)).all(1)

    def support(self, g: Tensor) -> Tensor:
        """Return the sum of the larger of g l and g u."""
        return _dot(_rows("g", g), _rows("g", self.maximiser(g)))

    def maximiser(self, g: Tensor) -> Tensor:
        """Return the corner that ``g`` points to; where ``g`` is zero, the value nearest to zero."""
        flat, (low, high) = _rows("g", g), self.bounds(g)
        return _corner(flat, low, high).reshape(g.shape)


@dataclass(frozen=True, eq=False)
class BallInBox:
    r"""The intersection of a ball and a box, such as the perturbations of an image that stay an image.

    Parameters
    ----------
    ball : Ball
        The ball.
    box : Box
        The box, in the space of the perturbation.

    Notes
    -----
    ``project`` is the exact Euclidean projection, not clipping one after the other. With soft thresholding
    :math:`S`, it is :math:`\mathrm{clip}(z)` to the smaller interval for linf, :math:`\mathrm{clip}(t z, l, u)`
    for l2 and :math:`\mathrm{clip}(S_\lambda(z), l, u)` for l1. The multiplier solves a piecewise equation, by
    Newton steps from piece to piece inside a bracket: a few passes over the row, exact to rounding.
    The l2 support is attained at :math:`\mathrm{clip}(t g, l, u)`, the l1 support by spending the radius on the
    coordinates of largest :math:`|g|`, each up to its bound.

    ``sample`` is uniform for linf. For l1 and l2 it is the projection of a uniform draw from the ball, the usual
    random start of an attack, which is not uniform on the intersection.

    Examples
    --------
    >>> pixels = BallInBox(Ball("l2", 1.0), Box(torch.tensor([[-2.0, -2.0]]), torch.tensor([[0.6, 2.0]])))
    >>> pixels.project(torch.tensor([[3.0, 1.6]]))
    tensor([[0.6000, 0.8000]])
    """

    ball: Ball
    box: Box

    def __post_init__(self) -> None:
        if not isinstance(self.ball, Ball) or not isinstance(self.box, Box):
            raise checks.ArgumentTypeError(
                f"the parts are a {type(self.ball).__name__} and a {type(self.box).__name__}; allowed: a Ball and "
                "a Box. Write BallInBox(Ball(...), Box(...))."
            )
        low, high = torch.as_tensor(self.box.low), torch.as_tensor(self.box.high)
        # With zero in the box the intersection holds zero; only otherwise does it depend on the row's shape.
        object.__setattr__(self, "_holds_zero", bool((low <= 0).all() and (high >= 0).all()))
        shape = list(torch.broadcast_shapes(low.shape, high.shape))
        if len(shape) > 1:
            if isinstance(self.ball.radius, Tensor) and shape[0] == 1:
                shape[0] = len(self.ball.radius)
            dtype = torch.promote_types(low.dtype, high.dtype)
            self._parts(torch.empty(1, dtype=dtype, device=low.device).expand(shape))

    def _parts(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the radius as a column and the bounds as rows; refuse an empty intersection."""
        low, high = self.box.bounds(delta)
        radius = _column(self.ball.radius, low)
        if not self._holds_zero:  # type: ignore[attr-defined]
            nearest = row_norm(_near(low, high), self.ball.norm)[:, None]
            # The last bits are forgiven: a box may touch the ball.
            empty = nearest > radius * (1 + 8 * torch.finfo(low.dtype).eps)
            if bool(empty.any()):
                row = int(empty[:, 0].nonzero()[0])
                raise checks.ArgumentError(
                    f"the intersection is empty: in row {row} the box is {float(nearest[row]):.4g} away from zero "
                    f"in {self.ball.norm}, the radius is {float(radius[row]):.4g}; allowed: a radius that reaches "
                    "the box. Enlarge the radius, or clip the inputs to their bounds."
                )
        return radius, low, high

    def sample(self, like: Tensor, *, generator: random.Seed = None, n: int | None = None) -> Tensor:
        """Draw from the set; see the notes."""
        draw = _Draw(like, generator, n)
        radius, low, high = self._parts(draw.shaped)
        if self.ball.norm != "linf":
            return self.project(self.ball.sample(draw.shaped, generator=draw.generator)).to(draw.dtype)
        return draw.finish(_uniform_between(draw, *_intervals(radius, low, high)))

    def project(self, delta: Tensor) -> Tensor:
        """Return the nearest point of the intersection."""
        z = _rows("delta", delta)
        radius, low, high = self._parts(delta)
        if self.ball.norm == "linf":
            return torch.clamp(z, *_intervals(radius, low, high)).reshape(delta.shape)
        clipped = torch.clamp(z, low, high)
        inside = row_norm(clipped, self.ball.norm)[:, None] <= radius
        if bool(inside.all()):
            return clipped.reshape(delta.shape)
        if self.ball.norm == "l2":
            one = torch.ones_like(radius)
            scale = torch.where(inside, one, _l2_root(z, low, high, radius, one, one))
            out = torch.clamp(z * scale, low, high)
        else:
            out = torch.where(inside, clipped, _l1_box(z, low, high, radius))
        return out.reshape(delta.shape)

    def contains(self, delta: Tensor, atol: float = 1e-6) -> Tensor:
        """Return whether each row lies in both."""
        return self.ball.contains(delta, atol) & self.box.contains(delta, atol)

    def support(self, g: Tensor) -> Tensor:
        """Return the maximum of <g, delta>."""
        return _dot(_rows("g", g), _rows("g", self.maximiser(g)))

    def maximiser(self, g: Tensor) -> Tensor:
        """Return a point at which <g, delta> is largest."""
        flat = _rows("g", g)
        radius, low, high = self._parts(g)
        if self.ball.norm == "linf":
            out = _corner(flat, *_intervals(radius, low, high))
        elif self.ball.norm == "l2":
            unit = flat / _positive(flat.abs().amax(1, keepdim=True))
            scale = _l2_scale(unit, low, high, radius)
            free = torch.clamp(scale.nan_to_num(posinf=0) * unit, low, high)
            out = torch.where(scale.isinf(), _corner(flat, low, high), free)
        else:
            out = _knapsack(flat, low, high, radius)
        return out.reshape(g.shape)


def around(
    x: Tensor,
    norm: Norm,
    radius: float | Tensor,
    bounds: tuple[float | Tensor, float | Tensor] | None = (0.0, 1.0),
) -> BallInBox:
    """Return the perturbations of inputs that stay in a ball and keep the inputs within bounds.

    Parameters
    ----------
    x : Tensor, shape (n, ...)
        Clean inputs.
    norm : {"l1", "l2", "linf"}
        The norm.
    radius : float or Tensor of shape (n,)
        The radius.
    bounds : (float, float), two tensors that broadcast to ``x``, or None
        Smallest and largest value that ``x + delta`` may take; ``None`` for no bounds.

    Returns
    -------
    BallInBox

    Raises
    ------
    ArgumentError
        If an input lies outside the bounds by more than the radius.

    Examples
    --------
    >>> around(torch.tensor([[0.1, 0.9]]), "linf", 0.3).maximiser(torch.tensor([[-1.0, 1.0]]))
    tensor([[-0.1000,  0.1000]])
    """
    _rows("x", x)
    low, high = (-math.inf, math.inf) if bounds is None else bounds
    return BallInBox(Ball(norm, radius), Box(low - x.detach(), high - x.detach()))


@dataclass(frozen=True, eq=False)
class Sphere:
    r"""The Euclidean sphere :math:`\{\delta : \|\delta\|_2 = r\}`.

    Parameters
    ----------
    radius : float or Tensor of shape (n,)
        Radius, zero or above.

    Notes
    -----
    The centre has no nearest point; ``project`` sends it to the first coordinate's pole, and the maximiser of
    the zero form is that pole too.

    Examples
    --------
    >>> Sphere(5.0).project(torch.tensor([[0.3, 0.4], [0.0, 0.0]]))
    tensor([[3., 4.],
            [5., 0.]])
    """

    radius: float | Tensor = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", _radius(self.radius))

    def sample(self, like: Tensor, *, generator: random.Seed = None, n: int | None = None) -> Tensor:
        """Draw uniformly from the sphere."""
        draw = _Draw(like, generator, n)
        return draw.finish(_column(self.radius, draw.wide) * draw.direction())

    def project(self, delta: Tensor) -> Tensor:
        """Return the nearest point of the sphere."""
        z = _rows("delta", delta)
        peak = z.abs().amax(1, keepdim=True)
        pole = torch.zeros_like(z)
        pole[:, :1] = 1
        unit = torch.where(peak > 0, functional.normalize(z / _positive(peak), dim=1), pole)
        return (_column(self.radius, z) * unit).reshape(delta.shape)

    def contains(self, delta: Tensor, atol: float = 1e-6) -> Tensor:
        """Return whether each row's norm is the radius, up to ``atol``."""
        return (row_norm(delta, "l2") - _column(self.radius, _rows("delta", delta))[:, 0]).abs() <= atol

    def support(self, g: Tensor) -> Tensor:
        """Return the radius times the norm of ``g``."""
        return _column(self.radius, _rows("g", g))[:, 0] * row_norm(g, "l2")

    def maximiser(self, g: Tensor) -> Tensor:
        """Return the point of the sphere in the direction of ``g``."""
        return self.project(g)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Independent normal perturbations of mean zero.

    Parameters
    ----------
    sigma : float or Tensor of shape (n,)
        Standard deviation, zero or above.

    Examples
    --------
    >>> Gaussian(0.25).sample(torch.zeros(1, 3), generator=0, n=5).shape
    torch.Size([5, 3])
    """

    sigma: float | Tensor = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", _radius(self.sigma, "sigma"))

    def sample(self, like: Tensor, *, generator: random.Seed = None, n: int | None = None) -> Tensor:
        """Draw perturbations."""
        draw = _Draw(like, generator, n)
        return draw.finish(_column(self.sigma, draw.wide) * draw.normal())


@dataclass(frozen=True, eq=False)
class Uniform:
    """Independent uniform perturbations between two numbers.

    Parameters
    ----------
    low, high : float
        Ends of the interval.

    Examples
    --------
    >>> bool(Uniform(-1.0, 1.0).contains(torch.tensor([[0.5, -0.5]])))
    True
    """

    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        checks.between("low", self.low, -math.inf, math.inf, inclusive="neither")
        checks.between("high", self.high, self.low, math.inf)

    def sample(self, like: Tensor, *, generator: random.Seed = None, n: int | None = None) -> Tensor:
        """Draw perturbations."""
        draw = _Draw(like, generator, n)
        return draw.finish(draw.uniform(draw.d, self.low, self.high))

    def contains(self, delta: Tensor, atol: float = 1e-6) -> Tensor:
        """Return whether each row lies in the support of the distribution."""
        return Box(self.low, self.high).contains(delta, atol)


@dataclass(frozen=True, eq=False)
class Rademacher:
    """Independent random signs times a scale.

    Parameters
    ----------
    scale : float or Tensor of shape (n,)
        Magnitude of each element, zero or above.

    Examples
    --------
    >>> Rademacher(2.0).sample(torch.zeros(1, 4), generator=0).abs()
    tensor([[2., 2., 2., 2.]])
    """

    scale: float | Tensor = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _radius(self.scale, "scale"))

    def sample(self, like: Tensor, *, generator: random.Seed = None, n: int | None = None) -> Tensor:
        """Draw perturbations."""
        draw = _Draw(like, generator, n)
        return draw.finish(_column(self.scale, draw.wide) * draw.signs())

    def contains(self, delta: Tensor, atol: float = 1e-6) -> Tensor:
        """Return whether each element of a row has the scale as its magnitude, up to ``atol``."""
        z = _rows("delta", delta)
        return ((z.abs() - _column(self.scale, z)).abs() <= atol).all(1)


@dataclass(frozen=True, eq=False)
class Masks:
    """Random masks: one where a part is kept, zero where it is removed.

    Parameters
    ----------
    keep : float
        Chance of keeping a part, in [0, 1].
    cells : int, (int, int) or None
        ``None``: every element of a row is a part. Else the parts are the cells of a coarse grid, rows by
        columns, that is laid over the last two dimensions and shared by all others.
    mode : {"nearest", "bilinear"}
        How the grid is enlarged: into blocks, or smoothly, with values between zero and one.
    shift : bool
        Move each mask by a random fraction of a cell, so that the borders of cells are not always in the same
        place.

    Notes
    -----
    With a grid, masks have size one in the dimensions between the first and the last two, so that they broadcast
    over channels. Every value has the mean ``keep``.

    Examples
    --------
    >>> Masks(0.5, cells=7).sample(torch.zeros(1, 3, 28, 28), generator=0, n=10).shape
    torch.Size([10, 1, 28, 28])
    >>> Masks(0.5).enumerate(torch.zeros(1, 2))
    tensor([[0., 0.],
            [1., 0.],
            [0., 1.],
            [1., 1.]])
    """

    keep: float = 0.5
    cells: int | tuple[int, int] | None = None
    mode: Literal["nearest", "bilinear"] = "nearest"
    shift: bool = False

    def __post_init__(self) -> None:
        checks.between("keep", self.keep, 0, 1)
        checks.one_of("mode", self.mode, ("nearest", "bilinear"))
        if self.cells is None:
            return
        pair = self.cells if isinstance(self.cells, tuple) else (self.cells, self.cells)
        if len(pair) != 2:
            raise checks.ArgumentError(
                f"cells is {self.cells}; allowed: an int, or rows and columns. Write cells=(rows, columns)."
            )
        object.__setattr__(self, "cells", tuple(checks.integer("cells", side, low=1) for side in pair))

    def sample(self, like: Tensor, *, generator: random.Seed = None, n: int | None = None) -> Tensor:
        """Draw masks, of shape (n, ...) or, with a grid, (n, 1, ..., height, width)."""
        draw = _Draw(like, generator, n)
        if self.cells is None:
            return draw.finish((draw.uniform(draw.d) < self.keep).to(draw.wide.dtype))
        rows, columns = self._grid(like)
        # A shifted mask needs one more cell on each axis to move into.
        rows, columns = rows + self.shift, columns + self.shift
        kept = (draw.uniform(rows * columns) < self.keep).to(draw.wide.dtype).reshape(-1, 1, rows, columns)
        offset = draw.uniform(2) if self.shift else None
        return self._enlarge(kept, like, offset).to(draw.dtype)

    def contains(self, delta: Tensor, atol: float = 1e-6) -> Tensor:
        """Return whether all values of a row are zero or one (between them, for bilinear masks)."""
        z = _rows("delta", delta)
        if self.cells is not None and self.mode == "bilinear":
            return Box(0.0, 1.0).contains(delta, atol)
        return (torch.minimum(z.abs(), (z - 1).abs()) <= atol).all(1)

    def enumerate(self, like: Tensor) -> Tensor:
        """Return every mask once, of at most 20 parts, in binary order with the first part changing fastest."""
        flat = _rows("like", like)
        if self.cells is None:
            return all_masks(flat.shape[1], like=like).reshape(-1, *like.shape[1:])
        rows, columns = self._grid(like)
        return self._enlarge(all_masks(rows * columns, like=like).reshape(-1, 1, rows, columns), like, None)

    def _grid(self, like: Tensor) -> tuple[int, int]:
        rows, columns = self.cells  # type: ignore[misc]
        if like.ndim < 3 or rows > like.shape[-2] or columns > like.shape[-1]:
            raise checks.ArgumentError(
                f"cells is {self.cells} for rows of shape {tuple(like.shape[1:])}; allowed: a grid no finer than "
                "the last two dimensions. Use fewer cells, or cells=None for rows without a height and width."
            )
        return rows, columns

    def _enlarge(self, kept: Tensor, like: Tensor, offset: Tensor | None) -> Tensor:
        """Enlarge cells (n, 1, rows, columns) to the size of ``like``; ``offset`` (n, 2) is in cells."""
        size = tuple(like.shape[-2:])
        if offset is None:
            out = functional.interpolate(
                kept, size, mode=self.mode, align_corners=False if self.mode == "bilinear" else None
            )
        else:
            positions = []
            for axis in (0, 1):
                inner = kept.shape[2 + axis] - 1
                pixels = (torch.arange(size[axis], device=kept.device, dtype=kept.dtype) + 0.5) / size[axis]
                # Coordinates from -1 to 1 across the enlarged grid, as grid_sample wants them.
                positions.append(2 * (pixels * inner + offset[:, axis : axis + 1]) / (inner + 1) - 1)
            vertical, horizontal = positions
            shape = (len(kept), *size)
            where = torch.stack(
                (horizontal[:, None, :].expand(shape), vertical[:, :, None].expand(shape)), -1
            )
            out = functional.grid_sample(
                kept, where, mode=self.mode, padding_mode="border", align_corners=False
            )
        return out.reshape(len(out), *([1] * (like.ndim - 3)), *size)


def all_masks(n_parts: int, *, like: Tensor | None = None) -> Tensor:
    """Return all subsets of at most 20 parts as masks of shape (2**n_parts, n_parts).

    Row ``i`` is ``i`` in binary, lowest bit first, so row 0 is empty and the last row is full.

    Parameters
    ----------
    n_parts : int
        Number of parts, 1..20.
    like : Tensor, optional
        Gives dtype and device.

    Examples
    --------
    >>> all_masks(3).sum(1)
    tensor([0., 1., 1., 2., 1., 2., 2., 3.])
    """
    n = checks.integer("n_parts", n_parts, low=1, high=20)
    device = None if like is None else like.device
    bits = torch.arange(2**n, device=device)[:, None] >> torch.arange(n, device=device)
    return (bits & 1).to(torch.get_default_dtype() if like is None else like.dtype)


# -- the shapes of arguments -------------------------------------------------------------------------------------


def _rows(name: str, value: Tensor) -> Tensor:
    """Return a batch as (n, d)."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 1:
        given = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise checks.ArgumentTypeError(
            f"{name} is {given}; allowed: a floating-point tensor of shape (n, ...), one perturbation a row. "
            "Convert it with torch.as_tensor(..., dtype=torch.float32)."
        )
    return value.reshape(len(value), math.prod(value.shape[1:]))


def _radius(value: float | Tensor, name: str = "radius") -> float | Tensor:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return checks.nonnegative(name, float(value) if isinstance(value, Tensor) else value)
    checks.tensor(name, value, ndim=1)
    if bool((value < 0).any()):
        raise checks.ArgumentError(
            f"{name} has the value {float(value.min()):.4g}; allowed: zero or above. Correct the negative entries."
        )
    return value


def _column(value: float | Tensor, rows: Tensor) -> Tensor:
    """Return a number a row as a column that broadcasts against (n, d)."""
    column = torch.as_tensor(value, dtype=rows.dtype, device=rows.device).reshape(-1, 1)
    if len(column) not in (1, len(rows)):
        raise checks.ArgumentError(
            f"the set has {len(column)} rows; allowed: one, or the {len(rows)} of the perturbations. "
            "Build the set for these rows."
        )
    return column.expand(len(rows), 1)


def _spread(name: str, bound: float | Tensor, delta: Tensor) -> Tensor:
    """Return a bound in the shape (n, d)."""
    rows = _rows("delta", delta)
    given = torch.as_tensor(bound, dtype=delta.dtype, device=delta.device)
    try:
        return given.expand(delta.shape).reshape(rows.shape)
    except RuntimeError:
        raise checks.ArgumentError(
            f"{name} has shape {tuple(given.shape)}; allowed: a shape that broadcasts to that of the "
            f"perturbations, {tuple(delta.shape)}. Build the box for these rows."
        ) from None


class _Draw:
    """The flat shape, the dtype (single precision at least) and the generator of one call of ``sample``."""

    def __init__(self, like: Tensor, generator: random.Seed, n: int | None) -> None:
        flat = _rows("like", like)
        self.n = len(like) if n is None else checks.integer("n", n, low=1)
        self.shape, self.d, self.dtype = (self.n, *like.shape[1:]), flat.shape[1], like.dtype
        self.generator = random.as_generator(generator)
        wide = torch.promote_types(like.dtype, torch.float32)
        #: A stand-in of the wanted number of rows without memory, flat and shaped.
        self.wide = torch.empty(1, dtype=wide, device=like.device).expand(self.n, max(self.d, 1))
        self.shaped = torch.empty(1, dtype=wide, device=like.device).expand(self.shape)

    def uniform(self, d: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return random.uniform((self.n, d), low, high, generator=self.generator, like=self.wide)

    def normal(self) -> Tensor:
        return random.randn((self.n, self.d), generator=self.generator, like=self.wide)

    def signs(self) -> Tensor:
        return random.rademacher((self.n, self.d), generator=self.generator, like=self.wide)

    def direction(self) -> Tensor:
        return functional.normalize(self.normal(), dim=1, eps=torch.finfo(self.wide.dtype).tiny)

    def finish(self, flat: Tensor) -> Tensor:
        return flat.reshape(self.shape).to(self.dtype)


# -- the mathematics, on rows (n, d) ------------------------------------------------------------------------------


def _dot(a: Tensor, b: Tensor) -> Tensor:
    # Zero times an infinite bound is zero here: the form does not see that coordinate.
    return torch.where(a == 0, torch.zeros_like(a), a * b).sum(1)


def _positive(value: Tensor) -> Tensor:
    return torch.where(value > 0, value, torch.ones_like(value))


def _soft(z: Tensor, threshold: Tensor) -> Tensor:
    return z - torch.clamp(z, -threshold, threshold)


def _near(low: Tensor, high: Tensor) -> Tensor:
    """Return the value nearest to zero between the bounds."""
    return torch.clamp(torch.zeros_like(low), low, high)


def _corner(g: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.where(g > 0, high, torch.where(g < 0, low, _near(low, high)))


def _intervals(radius: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    # Where box and ball only touch, rounding may have put the ends in the wrong order.
    lower = torch.maximum(low, -radius)
    return lower, torch.maximum(torch.minimum(high, radius), lower)


def _uniform_between(draw: _Draw, low: Tensor, high: Tensor) -> Tensor:
    if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise checks.ArgumentError(
            "the box has infinite bounds; allowed: finite ones to sample from. Give bounds, or sample a Gaussian."
        )
    # A convex combination, clamped, never leaves the interval by rounding.
    u = draw.uniform(draw.d)
    return torch.clamp((1 - u) * low + u * high, low, high)


def sum_threshold(values: Tensor, total: Tensor) -> Tensor:
    """Return the threshold t (n, 1) with sum max(values - t, 0) = total, for rows (n, d) and totals (n, 1)."""
    ordered = values.sort(dim=1, descending=True).values
    count = torch.arange(1, values.shape[1] + 1, device=values.device, dtype=values.dtype)
    candidate = (ordered.cumsum(1) - total) / count
    kept = (ordered > candidate).sum(1, keepdim=True).clamp_min(1)
    # The sum is taken again over the support alone, which is more accurate than the running sum.
    inside = values >= ordered.gather(1, kept - 1)
    summed = torch.where(inside, values, torch.zeros_like(values)).sum(1, keepdim=True)
    return (summed - total) / inside.sum(1, keepdim=True)


def _oriented(z: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mirror coordinates so that z >= 0: return its magnitude and the mirrored bounds."""
    negative = z < 0
    return z.abs(), torch.where(negative, -high, low), torch.where(negative, -low, high)


def _root(step: Callable[[Tensor], tuple[Tensor, ...]], start: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the largest t (n, 1) between two non-negative ends at which a function that never falls is not above zero.

    ``step(t)`` returns the function at t, the root of the piece that t lies on (NaN where that is flat), and the point
    to try next. Inside a bracket, these take a few steps for most inputs. Where they would pass one breakpoint at a
    time, the bracket is halved instead, counted in floating-point numbers, so that their number is bounded whatever
    the scales.
    """
    tolerance = 2 * torch.finfo(low.dtype).eps
    t, found = start, torch.zeros_like(low)
    open_ = torch.ones_like(low, dtype=torch.bool)
    for count in range(4 * torch.finfo(low.dtype).bits):
        value, root, better = step(t)
        low, high = torch.where(value > 0, low, t), torch.where(value > 0, t, high)
        inside = (root >= low) & (root <= high)
        found = torch.where(open_, torch.where(inside, root, low), found)
        open_ &= ~(inside & ((root - t).abs() <= tolerance * t) | (high - low <= tolerance * low))
        if not bool(open_.any()):
            break
        if count < 8 or count % 2:
            t = torch.where(
                (better >= low) & (better <= high), better, torch.where(inside, root, _half_way(low, high))
            )
        else:
            t = _half_way(low, high)
    return found


def _half_way(low: Tensor, high: Tensor) -> Tensor:
    """Return the middle of two non-negative numbers, counted in floating-point numbers between them."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[low.element_size()]
    left, right = low.contiguous().view(whole), high.contiguous().view(whole)
    return (left + (right - left) // 2).view(low.dtype)


def _l2_scale(z: Tensor, low: Tensor, high: Tensor, radius: Tensor) -> Tensor:
    """Return the largest t with ||clip(t z, low, high)||_2 <= radius, infinite where every t will do."""
    unbound = torch.linalg.vector_norm(_corner(z, low, high), dim=1, keepdim=True) <= radius
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    # A first guess from the ball alone, and an interval of one point where there is nothing to find.
    start = (radius / _positive(length)).masked_fill(unbound, 0)
    limit = torch.full_like(radius, torch.finfo(radius.dtype).max).masked_fill(unbound, 0)
    return torch.where(unbound, math.inf, _l2_root(z, low, high, radius, start, limit))


def _l2_root(z: Tensor, low: Tensor, high: Tensor, radius: Tensor, start: Tensor, limit: Tensor) -> Tensor:
    """Return the largest t <= limit with ||clip(t z, low, high)||_2 <= radius."""
    free, value = torch.empty_like(z), torch.empty_like(z)

    def step(t: Tensor) -> tuple[Tensor, ...]:
        torch.mul(z, t, out=free)
        torch.clamp(free, low, high, out=value)
        total = torch.linalg.vector_norm(value, dim=1, keepdim=True)
        moving = torch.linalg.vector_norm(value.mul_(free.eq_(value)), dim=1, keepdim=True)
        excess = (total - radius) * (total + radius)
        # The moving part grows as t^2, the clipped part stays: moving^2 (t'/t)^2 = moving^2 - excess.
        root = t * (1 - excess / moving.square()).sqrt()
        return excess, root, root

    # Squares of tiny numbers vanish, so a radius of zero is set apart.
    return torch.where(radius > 0, _root(step, start, torch.zeros_like(radius), limit), 0)


def _l1_box(z: Tensor, low: Tensor, high: Tensor, radius: Tensor) -> Tensor:
    """Return clip(soft(z, threshold), low, high) with the smallest threshold >= 0 that brings it into the l1 ball."""
    size, lower, upper = _oriented(z, low, high)
    # Measured from the largest element, thresholds and what exceeds them are exact though they nearly cancel.
    peak = size.amax(1, keepdim=True)
    below = peak - size
    soft, value, moves = torch.empty_like(z), torch.empty_like(z), torch.empty_like(z)
    wide = torch.promote_types(z.dtype, torch.float32)  # counts are exact

    def step(depth: Tensor) -> tuple[Tensor, ...]:
        torch.sub(depth, below, out=soft).relu_()
        torch.clamp(soft, lower, upper, out=value)
        torch.eq(value, soft, out=moves)
        moving = moves.mul_(soft.ne_(0)).sum(1, keepdim=True, dtype=wide).to(z.dtype)
        length = value.abs_().sum(1, keepdim=True)
        # Tails of data fall about exponentially: a step on the logarithm gets there sooner.
        better = depth + length / moving * (radius / length).log()
        return length - radius, depth + (radius - length) / moving, better

    depth = _root(step, peak, torch.zeros_like(radius), peak)
    out = torch.clamp((depth - below).relu_(), lower, upper)
    return torch.where(z < 0, -out, out)


def _knapsack(g: Tensor, low: Tensor, high: Tensor, radius: Tensor) -> Tensor:
    """Return the maximiser of <g, delta> in the l1 ball and the box."""
    size, lower, upper = _oriented(g, low, high)
    start = _near(lower, upper)
    budget = (radius - start.abs().sum(1, keepdim=True)).clamp_min(0)
    room = torch.minimum((upper - start).clamp_min(0), budget)
    room = torch.where(size > 0, room, torch.zeros_like(room))
    order = size.argsort(dim=1, descending=True)
    wanted = room.gather(1, order)
    spent = torch.minimum(wanted, (budget - (wanted.cumsum(1) - wanted)).clamp_min(0))
    out = start + torch.zeros_like(start).scatter(1, order, spent)
    return torch.where(g < 0, -out, out)
