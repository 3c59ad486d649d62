"""Infeasibility detection: find a fixed point of a nonexpansive map, or the displacement that shows there is none.

Use it under splitting methods (Douglas-Rachford, ADMM, PDHG), whose displacement is a certificate of infeasibility of the
program they solve; the anchored iteration finds it at the optimal worst-case rate. Park and Ryu (2023), Accelerated
Infeasibility Detection of Constrained Optimization and Fixed-Point Iterations, arXiv:2303.15876.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perturbkit.core import Result, checks
from perturbkit.core.progress import ProgressLike, track

__all__ = [
    "FixedPointResult",
    "PDHGOperator",
    "displacement_bound",
    "douglas_rachford_operator",
    "pdhg_operator",
    "solve_fixed_point",
]

Map = Callable[[Tensor], Tensor]
Method = Literal["picard", "halpern"]
_METHODS = ("picard", "halpern")
_AGREE, _FIRST = 0.1, 64
"""How far the estimates may differ, relative to the residual, and the first step at which they are asked."""


@dataclass(frozen=True, eq=False)
class FixedPointResult(Result):
    """A fixed point, or the displacement of a map that has none.

    Attributes
    ----------
    x : Tensor, shape (..., d)
        Iterate at which the row was decided, the last one of the undecided.
    displacement : Tensor, shape (..., d)
        ``x - T(x)`` there, an estimate of the infimal displacement vector.
    normalized : Tensor, shape (..., d)
        The other estimate: ``(x0 - x) / k``, doubled for Halpern.
    status : tuple of str
        "solved", "infeasible" or "undecided", one a row (a single one for one start).
    excluded : Tensor, shape (...,)
        A proof: no fixed point lies nearer to ``x0`` than this, in the norm of the iteration.
    residual_norms : Tensor, shape (iterations + 1, ...)
        Norm of ``x - T(x)`` at each iterate.
    iterations : Tensor of int64, shape (...,)
        When each row was decided.
    converged : bool
        Whether all rows were decided.
    message : str
        Why it stopped.
    evaluations : int
        Evaluations of the map, on all rows at once.
    """

    x: Tensor
    displacement: Tensor
    normalized: Tensor
    status: tuple[str, ...]
    excluded: Tensor
    residual_norms: Tensor
    iterations: Tensor
    converged: bool
    message: str
    evaluations: int


def solve_fixed_point(
    operator: Map,
    x0: Tensor,
    *,
    method: Method = "halpern",
    max_iter: int = 10_000,
    tol: float = 1e-6,
    certificate_tol: float = 1e-4,
    verify: Callable[[Tensor], Tensor] | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    progress: ProgressLike = None,
) -> FixedPointResult:
    r"""Iterate a nonexpansive map until each row is seen to have a fixed point or to have none.

    Parameters
    ----------
    operator : callable
        ``operator(x)``, from and to the shape of ``x0``, nonexpansive: a row's image depends on that row alone.
    x0 : Tensor, shape (d,) or (runs, d)
        Start, or one start a problem; the anchor of "halpern".
    method : {"picard", "halpern"}
        ``T x_k``, or its mean with the start. "halpern" has the better worst case; "picard" is often faster on problems that
        are not.
    max_iter : int
        Steps, at least 1.
    tol : float
        Residual of a solution, relative to the first residual, zero or above.
    certificate_tol : float
        Size of a displacement that counts, relative to the first residual, above 0.
    verify : callable, optional
        ``verify(displacement) -> bool``, shapes (runs, d) to (runs,): whether the displacement proves infeasibility of the
        program behind the map. Without it "infeasible" is a judgement from the agreement of two estimates.
    norm : callable, optional
        Norm of the rows in which the map is nonexpansive; Euclidean unless given (see :class:`PDHGOperator`).
    progress : optional
        See :func:`~perturbkit.core.progress.track`.

    Returns
    -------
    FixedPointResult
        Whatever the status, ``excluded`` is a proof.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed, or the map answers in another shape.

    Notes
    -----
    .. math:: x_{k+1} = T x_k \quad\text{or}\quad x_{k+1} = \tfrac{1}{k+2} x_0 + \tfrac{k+1}{k+2} T x_k

    The infimal displacement vector v is the shortest vector of the closure of the range of I - T. Both :math:`x_k - T x_k` and
    the normalised iterate, :math:`(x_0 - x_k) / k` or :math:`2 (x_0 - x_k) / k`, tend to it. Their squared errors fall as
    1/k and 1/k^2 for "picard", and as log(k)/k^2 and 1/k^2 for "halpern", where v is attained; no method can do better
    than 1/k^2.

    At powers of two from 64 on, a row is infeasible if its residual is above the tolerance and agrees within a tenth with the
    normalised iterate, as both do with their values at half the steps. A fixed point x would give
    :math:`|x_0 - x_k| \le 2 |x_0 - x|`, and :math:`(k + 1) |x_k - T x_k| \le 2 |x_0 - x|` with "halpern"; hence ``excluded``.

    Cost: one evaluation of the map a step; memory for one more vector.

    References
    ----------
    Park and Ryu (2023), arXiv:2303.15876. The bound of a consistent map: Lieder (2021), On the convergence rate of the
    Halpern-iteration, Optimization Letters 15.

    Examples
    --------
    >>> found = solve_fixed_point(lambda x: x - torch.tensor([3.0, 4.0]), torch.zeros(2))
    >>> found.status, found.displacement, found.normalized
    (('infeasible',), tensor([3., 4.]), tensor([3., 4.]))
    """
    checks.tensor("x0", x0, ndim=(1, 2))
    checks.one_of("method", method, _METHODS)
    checks.integer("max_iter", max_iter, low=1)
    checks.nonnegative("tol", tol)
    checks.positive("certificate_tol", certificate_tol)
    length = norm or _euclidean
    halpern = method == "halpern"
    factor = 2.0 if halpern else 1.0
    start = x0.detach()

    def image(x: Tensor) -> Tensor:
        value = operator(x)
        if not isinstance(value, Tensor) or value.shape != x.shape:
            given = (
                f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            raise checks.ArgumentError(
                f"operator answered {given}; allowed: the shape of x, {tuple(x.shape)}. Return one image a row."
            )
        return value.detach()

    def size(v: Tensor) -> Tensor:
        return length(v.reshape(-1, v.shape[-1]))

    x = start
    moved = image(x)
    residual = x - moved
    norms = [size(residual)]
    first = norms[0]
    kept, displacement, normalized = x, residual, residual
    solved = first == 0
    infeasible = torch.zeros_like(solved)
    when = torch.zeros(len(first), dtype=torch.int64, device=x.device)
    excluded = torch.zeros_like(first)
    half: tuple[Tensor, Tensor] | None = None
    for k in track(range(1, max_iter + 1), "fixed point", progress=progress):
        open_ = ~(solved | infeasible)
        if not bool(open_.any()):
            break
        x = start / (k + 1) + moved * (k / (k + 1)) if halpern else moved
        moved = image(x)
        residual, mean = x - moved, factor / k * (start - x)
        norms.append(size(residual))
        excluded = torch.maximum(excluded, size(start - x) / 2)
        if halpern:
            excluded = torch.maximum(excluded, norms[-1] * ((k + 1) / 2))
        pick = open_.reshape(*open_.shape, 1) if x.ndim == 2 else open_
        kept = torch.where(pick, x, kept)
        displacement, normalized = (
            torch.where(pick, residual, displacement),
            torch.where(pick, mean, normalized),
        )
        when = torch.where(open_, k, when)
        solved = solved | (open_ & (norms[-1] <= tol * first))
        if k & (k - 1) == 0:
            if k >= _FIRST and half is not None:
                differences = (residual - half[0], mean - half[1], residual - mean)
                judged = norms[-1] > certificate_tol * first
                for d in differences:
                    judged = judged & (size(d) <= _AGREE * norms[-1])
                if verify is not None and bool(judged.any()):
                    judged = judged & verify(residual.reshape(-1, x.shape[-1])).to(judged)
                infeasible = infeasible | (open_ & ~solved & judged)
            half = residual, mean
    names = [
        "solved" if s else "infeasible" if i else "undecided" for s, i in zip(solved, infeasible, strict=True)
    ]
    decided = "undecided" not in names
    message = "every row was decided" if decided else f"{max_iter} steps do not decide every row"
    shape = x0.shape[:-1]
    return FixedPointResult(
        kept, displacement, normalized, tuple(names), excluded.reshape(shape),
        torch.stack(norms).reshape(-1, *shape), when.reshape(shape), decided, message, len(norms),
    )  # fmt: skip


def _euclidean(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1)


def displacement_bound(
    k: int,
    distance: float,
    method: Method = "halpern",
    estimate: Literal["normalized", "residual"] = "normalized",
) -> float:
    r"""Bound the error of an estimate of the infimal displacement vector v after k steps.

    Parameters
    ----------
    k : int
        Steps, at least 1.
    distance : float
        From the start to a point x where ``x - T(x) = v``, zero or above.
    method : {"picard", "halpern"}
        The iteration.
    estimate : {"normalized", "residual"}
        Which estimate; for the residual only "halpern" has a bound of this kind.

    Returns
    -------
    float
        At least the norm of the error.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    With D the distance: :math:`2 D / k` for Picard's and :math:`4 D / k` for Halpern's normalised iterate, since the iterations
    from the start and from the point stay within D of each other; and
    :math:`(\sqrt{1 + 1/2 + \dots + 1/k + 12} + 1) D / (k + 1)` for Halpern's residual. Where v is not attained, nothing bounds
    the error.

    References
    ----------
    Park and Ryu (2023), arXiv:2303.15876, theorem 8.

    Examples
    --------
    >>> displacement_bound(100, 1.0), round(displacement_bound(100, 1.0, estimate="residual"), 4)
    (0.04, 0.051)
    """
    checks.integer("k", k, low=1)
    checks.nonnegative("distance", distance)
    checks.one_of("method", method, _METHODS)
    checks.one_of(
        "estimate", estimate, ("normalized", "residual") if method == "halpern" else ("normalized",)
    )
    if estimate == "residual":
        return distance * (math.sqrt(sum(1 / j for j in range(1, k + 1)) + 12) + 1) / (k + 1)
    return (4 if method == "halpern" else 2) * distance / k


def douglas_rachford_operator(prox_f: Map, prox_g: Map) -> Map:
    r"""Return the Douglas-Rachford map of two proximal maps, which is nonexpansive.

    Parameters
    ----------
    prox_f, prox_g : callable
        Proximal maps of the two functions of a sum, for instance projections on two sets.

    Returns
    -------
    callable
        The map. Its fixed points z give minimisers ``prox_f(z)``.

    Raises
    ------
    ArgumentTypeError
        If one is not callable.

    Notes
    -----
    :math:`T z = z + \mathrm{prox}_g(2 p - z) - p` with :math:`p = \mathrm{prox}_f(z)`. For the projections on two sets the
    infimal displacement is the vector from the second to the first, of the length of their distance.

    Examples
    --------
    >>> T = douglas_rachford_operator(lambda z: z.clamp(max=0.0), lambda z: z.clamp(min=2.0))
    >>> solve_fixed_point(T, torch.zeros(1)).displacement
    tensor([-2.])
    """
    for name, value in (("prox_f", prox_f), ("prox_g", prox_g)):
        _callable(name, value)

    def operator(z: Tensor) -> Tensor:
        p = prox_f(z)
        return z + prox_g(2 * p - z) - p

    return operator


@dataclass(frozen=True)
class PDHGOperator:
    r"""The map of the primal-dual hybrid gradient method; see :func:`pdhg_operator`.

    Parameters
    ----------
    matrix : Tensor, shape (m, n)
        The matrix A.
    prox_f, prox_dual : callable
        Proximal maps of :math:`\tau f` and :math:`\sigma g^*`.
    tau, sigma : float
        Step sizes.

    Notes
    -----
    Nonexpansive in :meth:`norm`, and in the Euclidean norm only by accident.

    Examples
    --------
    >>> T = PDHGOperator(torch.eye(1), lambda x: x, lambda y: y, 0.5, 0.5)
    >>> T(torch.tensor([1.0, 2.0]))
    tensor([0.0000, 1.5000])
    """

    matrix: Tensor
    prox_f: Map
    prox_dual: Map
    tau: float
    sigma: float

    def __call__(self, z: Tensor) -> Tensor:
        """Return the image of primal and dual variables, side by side in the last dimension."""
        n = self.matrix.shape[1]
        x, y = z[..., :n], z[..., n:]
        primal = self.prox_f(x - self.tau * (y @ self.matrix))
        dual = self.prox_dual(y + self.sigma * ((2 * primal - x) @ self.matrix.T))
        return torch.cat([primal, dual], -1)

    def norm(self, z: Tensor) -> Tensor:
        r"""Return :math:`\sqrt{|x|^2/\tau - 2 \langle A x, y \rangle + |y|^2/\sigma}` of each row."""
        n = self.matrix.shape[1]
        x, y = z[..., :n], z[..., n:]
        square = (
            x.square().sum(-1) / self.tau
            - 2 * ((x @ self.matrix.T) * y).sum(-1)
            + y.square().sum(-1) / self.sigma
        )
        return square.clamp(min=0).sqrt()


def pdhg_operator(matrix: Tensor, prox_f: Map, prox_dual: Map, tau: float, sigma: float) -> PDHGOperator:
    r"""Return the map of the primal-dual hybrid gradient method for ``min f(x) + g(A x)``.

    Parameters
    ----------
    matrix : Tensor, shape (m, n)
        The matrix A.
    prox_f : callable
        Proximal map of :math:`\tau f`, on the last dimension.
    prox_dual : callable
        Proximal map of :math:`\sigma g^*`: ``y - sigma * b`` for the constraint ``A x = b``.
    tau, sigma : float
        Step sizes, above 0, with :math:`\tau \sigma |A|^2 < 1`.

    Returns
    -------
    PDHGOperator
        A map of (x, y), side by side in the last dimension, with the norm in which it is nonexpansive.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`x^+ = \mathrm{prox}_{\tau f}(x - \tau A^\top y)`,
    :math:`y^+ = \mathrm{prox}_{\sigma g^*}(y + \sigma A (2 x^+ - x))`. The blocks of a displacement are certificates: that of
    y of primal infeasibility, that of x of dual infeasibility.

    Examples
    --------
    >>> A, b = torch.tensor([[1.0, 1.0]]), torch.tensor([-1.0])  # x >= 0 with x_1 + x_2 = -1
    >>> T = pdhg_operator(A, lambda x: x.clamp(min=0), lambda y: y - 0.5 * b, 0.5, 0.5)
    >>> solve_fixed_point(T, torch.zeros(3), norm=T.norm).status
    ('infeasible',)
    """
    checks.tensor("matrix", matrix, ndim=2)
    for name, value in (("prox_f", prox_f), ("prox_dual", prox_dual)):
        _callable(name, value)
    checks.positive("tau", tau)
    checks.positive("sigma", sigma)
    product = tau * sigma * float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    if product >= 1:
        raise checks.ArgumentError(
            f"tau sigma |A|^2 is {product:.4g}; allowed: below 1. Take both steps below 1 / |A|."
        )
    return PDHGOperator(matrix, prox_f, prox_dual, float(tau), float(sigma))


def _callable(name: str, value: object) -> None:
    if not callable(value):
        raise checks.ArgumentTypeError(
            f"{name} is a {type(value).__name__}; allowed: a callable. Pass a function of a tensor."
        )
