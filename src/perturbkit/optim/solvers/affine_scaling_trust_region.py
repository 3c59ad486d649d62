"""Affine-scaling trust region: roots of a nonlinear system strictly inside simple bounds.

Use it where unknowns are concentrations, fractions or lengths, outside of whose bounds the system is not even defined. The
scaling that keeps steps away from the bounds is a convex combination of those in the literature, or one of them. Ayanzadeh,
Yazdanian and Shahamatnia (2019), A New Class of Scaling Matrices for Scaled Trust Region Algorithms, arXiv:1904.09209.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perturbkit.core import Cost, Oracle, Result, checks
from perturbkit.core.progress import ProgressLike, track
from perturbkit.optim.solvers._dogleg import decrease, dogleg, inside

__all__ = ["BoundedRoot", "scaling_vector", "solve_bounded_system"]

Scaling = Literal["combined", "coleman_li", "heinkenschloss", "kanzow_klug", "hager"]
_SCALINGS = ("combined", "coleman_li", "heinkenschloss", "kanzow_klug", "hager")
_MEMBERS = ("coleman_li", "kanzow_klug", "hager")


@dataclass(frozen=True, eq=False)
class BoundedRoot(Result):
    """Where a bounded system was left.

    Attributes
    ----------
    x : Tensor, shape (d,)
        Strictly between the bounds.
    fun : Tensor, shape (d,)
        The system there.
    residual : Tensor, shape ()
        Its norm: zero at a root.
    optimality : Tensor, shape ()
        Norm of the scaled gradient ``D J^T F``: zero at a root, and where the bounds admit no decrease.
    status : str
        "solved", "stationary" (a local minimum of the norm that is no root), "stalled" or "limit".
    converged : bool
        Whether the status is "solved".
    message : str
        Why it stopped.
    history : Tensor, shape (iterations + 1,)
        Norm of the system at each iterate.
    iterations : int
        Trial steps evaluated.
    njev : int
        Jacobians.
    cost : Cost
        Rows evaluated; a Jacobian by differentiation is d rows, each with its ``ngrad``.
    """

    x: Tensor
    fun: Tensor
    residual: Tensor
    optimality: Tensor
    status: str
    converged: bool
    message: str
    history: Tensor
    iterations: int
    njev: int
    cost: Cost


def solve_bounded_system(
    fun: Oracle | Callable[[Tensor], Tensor],
    x0: Tensor,
    bounds: tuple[float | Tensor, float | Tensor],
    *,
    jac: Callable[[Tensor], Tensor] | None = None,
    scaling: Scaling = "combined",
    weights: Sequence[float] | None = None,
    tol: float = 1e-8,
    max_iter: int = 300,
    radius: float = 1.0,
    progress: ProgressLike = None,
) -> BoundedRoot:
    r"""Solve a square system between bounds by a scaled dogleg method.

    Parameters
    ----------
    fun : Oracle or callable
        ``fun(x)``, shapes (n, d) to (n, d); only asked strictly between the bounds.
    x0 : Tensor, shape (d,)
        Start, strictly between the bounds.
    bounds : (float or Tensor, float or Tensor)
        Lower and upper bounds, one for all unknowns or shape (d,); infinite where there is none.
    jac : callable, optional
        ``jac(x) -> Tensor``, shapes (d,) to (d, d). By backward differentiation unless given.
    scaling : {"combined", "coleman_li", "heinkenschloss", "kanzow_klug", "hager"}
        See :func:`scaling_vector`.
    weights : sequence of 3 floats, optional
        Of the combined scaling's members: Coleman-Li, Kanzow-Klug, Hager. Equal unless given.
    tol : float
        Norm of the system at which to stop, zero or above.
    max_iter : int
        Evaluations of trial steps, at least 1.
    radius : float
        First radius of the trust region, in the scaled norm; above 0.
    progress : optional
        See :func:`~perturbkit.core.progress.track`.

    Returns
    -------
    BoundedRoot

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed, or the system answers in another shape.

    Notes
    -----
    With :math:`g = J^\top F` and D the diagonal matrix of the scaling, :math:`D g = 0` at every minimum of
    :math:`\tfrac12 |F|^2` between the bounds. A step is the dogleg from the minimiser along :math:`-D g` to the Newton step,
    cut at :math:`|D^{-1/2} s| \le \Delta`, and cut again before the bounds:

    .. math:: s \leftarrow \max(\theta, 1 - |s|)\, \lambda s, \quad \theta = 0.99995

    with :math:`\lambda` the step to the bounds, if at most 1. The scaled gradient step replaces it where the cut step keeps
    less than a tenth of its model decrease. It is taken if the decrease is a tenth of the model's; the radius is quartered if
    not, and doubled where it is three quarters.

    Cost: one evaluation a trial; a Jacobian and an O(d^3) solve a step. Locally quadratic at a nonsingular root inside.

    References
    ----------
    Ayanzadeh, Yazdanian and Shahamatnia (2019), arXiv:1904.09209. The trust region: Bellavia, Macconi and Morini (2003), An affine scaling trust-region approach
    to bound-constrained nonlinear systems, Applied Numerical Mathematics 44.

    Examples
    --------
    >>> circle_and_line = lambda x: torch.stack([x.square().sum(1) - 1, x[:, 0] - x[:, 1]], 1)
    >>> found = solve_bounded_system(circle_and_line, torch.tensor([0.9, 0.1], dtype=torch.float64), (0.0, 1.0))
    >>> found.status, found.x
    ('solved', tensor([0.7071, 0.7071], dtype=torch.float64))
    """
    checks.tensor("x0", x0, ndim=1)
    low, high = _bounds(bounds, x0)
    if not bool(((x0 > low) & (x0 < high)).all()):
        raise checks.ArgumentError(
            "x0 touches or leaves the bounds; allowed: strictly between them. Move it inside."
        )
    checks.one_of("scaling", scaling, _SCALINGS)
    shares = _weights(weights)
    checks.nonnegative("tol", tol)
    checks.integer("max_iter", max_iter, low=1)
    delta = checks.positive("radius", radius)
    oracle = Oracle.wrap(fun)
    before = oracle.cost
    x = x0.detach().clone()
    value = _value(oracle, x)
    history = [value.norm()]
    jacobian, njev, curvature = _jacobian(oracle, jac, x), 1, 1.0
    g = jacobian.mT @ value
    status, trials = "limit", 0
    for _ in track(range(max_iter), "affine scaling", progress=progress):
        d = _scaling(x, g, low, high, scaling, shares, 1.5, 1.0, curvature)
        if bool(history[-1] <= tol):
            status = "solved"
            break
        if bool((d * g).norm() <= tol * history[-1]):
            status = "stationary"
            break
        newton = _newton(jacobian, value)
        step = dogleg(x, value, jacobian, g, d, newton, low, high, delta)
        trial = inside(x + step, low, high)
        new, trials = _value(oracle, trial), trials + 1
        predicted = decrease(value, jacobian, step)
        actual = 0.5 * (value.square().sum() - new.square().sum())
        length = float((step / d.sqrt()).norm())
        # Not finite is not decreased either: it compares as false.
        if not bool(actual >= 0.1 * predicted):
            delta = min(delta / 4, length / 2)
            if bool(trial.eq(x).all()) or delta < 1e-30:
                status = "stalled"
                break
            continue
        if bool(actual >= 0.75 * predicted):
            delta = max(delta, 2 * length)
        moved, slope = trial - x, g
        x, value = trial, new
        history.append(value.norm())
        jacobian, njev = _jacobian(oracle, jac, x), njev + 1
        g = jacobian.mT @ value
        # The Barzilai-Borwein value, an estimate of the curvature of the squared norm.
        curvature = max(1e-3, float(moved @ (g - slope) / moved.square().sum()))
    if bool(history[-1] <= tol):
        status = "solved"
    message = {
        "solved": f"the norm of the system is at most {tol:g}",
        "stationary": "the norm of the system has a local minimum here that is no root",
        "stalled": "no step decreases the norm of the system in this precision",
        "limit": f"{max_iter} trial steps were evaluated",
    }[status]
    d = _scaling(x, g, low, high, scaling, shares, 1.5, 1.0, curvature)
    return BoundedRoot(
        x, value, history[-1], (d * g).norm(), status, status == "solved", message, torch.stack(history), trials, njev,
        oracle.cost - before,
    )  # fmt: skip


def scaling_vector(
    x: Tensor,
    g: Tensor,
    low: float | Tensor,
    high: float | Tensor,
    kind: Scaling = "combined",
    *,
    weights: Sequence[float] | None = None,
    power: float = 1.5,
    slope: float = 1.0,
    curvature: float = 1.0,
) -> Tensor:
    r"""Return the diagonal of an affine-scaling matrix.

    Parameters
    ----------
    x : Tensor, shape (..., d)
        Points strictly between the bounds.
    g : Tensor, shape (..., d)
        Gradients there.
    low, high : float or Tensor that broadcasts against x
        Bounds, infinite where there is none.
    kind : {"combined", "coleman_li", "heinkenschloss", "kanzow_klug", "hager"}
        Which scaling.
    weights : sequence of 3 floats, optional
        Of "combined": non-negative, in any scale; equal unless given.
    power : float
        p of "heinkenschloss", above 1.
    slope : float
        c of "kanzow_klug", above 0.
    curvature : float
        a of "hager", above 0.

    Returns
    -------
    Tensor, shape (..., d)
        Positive; near zero next to a bound against which the gradient pushes.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    Coleman-Li: the distance X to the bound towards which -g points, 1 if that is infinite, the smaller distance where g is
    zero. Heinkenschloss, Ulbrich and Ulbrich: the same where :math:`|g| < m^p` or :math:`m < |g|^p` for the smaller distance m,
    else 1. Kanzow-Klug: :math:`\min(x - l + c \max(0, -g), u - x + c \max(0, g))`, 1 without bounds. Hager, Mair and Zhang:
    :math:`a X / (a X + |g|)`, here multiplied by a, so that it lies in (0, 1] as is right next to the others. Combined: the
    weighted mean of Coleman-Li, Kanzow-Klug and Hager, which vanishes, stays bounded and stays positive where they all do.

    References
    ----------
    Ayanzadeh, Yazdanian and Shahamatnia (2019), arXiv:1904.09209.

    Examples
    --------
    >>> x, g = torch.tensor([0.1, 0.1]), torch.tensor([1.0, -1.0])
    >>> scaling_vector(x, g, 0.0, 1.0, "coleman_li"), scaling_vector(x, g, 0.0, 1.0, "kanzow_klug")
    (tensor([0.1000, 0.9000]), tensor([0.1000, 0.9000]))
    """
    checks.tensor("x", x)
    checks.same_shape("g", checks.tensor("g", g), "x", x)
    low, high = _bounds((low, high), x)
    if not bool(((x > low) & (x < high)).all()):
        raise checks.ArgumentError(
            "x touches or leaves the bounds; allowed: strictly between them. Move it inside."
        )
    checks.one_of("kind", kind, _SCALINGS)
    checks.between("power", power, 1, float("inf"), inclusive="neither")
    checks.positive("slope", slope)
    checks.positive("curvature", curvature)
    return _scaling(x, g, low, high, kind, _weights(weights), power, slope, curvature)


def _bounds(bounds: tuple[float | Tensor, float | Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise checks.ArgumentTypeError(
            f"bounds is {type(bounds).__name__}; allowed: a pair (low, high). Pass numbers or tensors of shape (d,)."
        )
    low, high = (torch.as_tensor(b, dtype=x.dtype, device=x.device).broadcast_to(x.shape) for b in bounds)
    if not bool((low < high).all()):
        raise checks.ArgumentError(
            "a lower bound is not below its upper bound; allowed: low < high. Swap them, or fix the unknown."
        )
    return low, high


def _weights(weights: Sequence[float] | None) -> tuple[float, ...]:
    shares = (1.0, 1.0, 1.0) if weights is None else tuple(checks.nonnegative("weights", w) for w in weights)
    if len(shares) != len(_MEMBERS) or sum(shares) == 0:
        raise checks.ArgumentError(
            f"weights is {list(shares)}; allowed: 3 numbers, not all zero. Give one for each of {', '.join(_MEMBERS)}."
        )
    return tuple(s / sum(shares) for s in shares)


def _scaling(
    x: Tensor,
    g: Tensor,
    low: Tensor,
    high: Tensor,
    kind: str,
    weights: tuple[float, ...],
    power: float,
    slope: float,
    curvature: float,
) -> Tensor:
    if kind == "combined":
        parts = [_scaling(x, g, low, high, m, weights, power, slope, curvature) for m in _MEMBERS]
        return sum(w * p for w, p in zip(weights, parts, strict=True))  # type: ignore[return-value]
    below, above = x - low, high - x
    nearest = torch.minimum(below, above)
    if kind == "kanzow_klug":
        d = torch.minimum(below + slope * (-g).clamp(min=0), above + slope * g.clamp(min=0))
        return torch.where(torch.isinf(nearest), 1.0, d)
    distance = torch.where(g < 0, above, torch.where(g > 0, below, nearest))
    if kind == "hager":
        d = curvature * distance / (curvature * distance + g.abs())
        return torch.where(torch.isinf(distance), 1.0, d)
    distance = torch.where(torch.isinf(distance), 1.0, distance)
    if kind == "heinkenschloss":
        strong = (g.abs() < nearest**power) | (nearest < g.abs() ** power)
        distance = torch.where(strong, distance, 1.0)
    return distance


def _value(oracle: Oracle, x: Tensor) -> Tensor:
    value = oracle(x[None])
    if value.shape != (1, len(x)):
        raise checks.ArgumentError(
            f"fun answered shape {tuple(value.shape)} to (1, {len(x)}); allowed: as many equations as unknowns. "
            "Use scipy.optimize.least_squares for other systems."
        )
    return value[0]


def _jacobian(oracle: Oracle, jac: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    d = len(x)
    if jac is None:
        return oracle.vjp(x.repeat(d, 1), torch.eye(d, dtype=x.dtype, device=x.device))[1]
    matrix = jac(x)
    if not isinstance(matrix, Tensor) or matrix.shape != (d, d):
        given = f"shape {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else f"a {type(matrix).__name__}"
        raise checks.ArgumentError(f"jac answered {given}; allowed: shape {(d, d)}. Return dF_i / dx_j.")
    return matrix.detach()


def _newton(jacobian: Tensor, value: Tensor) -> Tensor:
    step, info = torch.linalg.solve_ex(jacobian, -value)
    if bool(info == 0) and bool(torch.isfinite(step).all()):
        return step
    return -(torch.linalg.pinv(jacobian) @ value)
