"""Zeroth-order Frank-Wolfe: minimise over a convex set from values alone, without projecting.

Use it where the set has cheap extreme points and costly projections: the l1 ball, the simplex, the nuclear ball; every
iterate is feasible. Sahu, Zaheer and Kar (2019), Towards Gradient Free and Projection Free Stochastic Optimization,
arXiv:1810.03233.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from perturbkit.core import Minimum, Oracle, checks
from perturbkit.core.progress import ProgressLike, track
from perturbkit.core.random import Seed, as_generator, randn, seeds

__all__ = ["NuclearBall", "Simplex", "Spectrahedron", "minimize_zo_frank_wolfe"]

Estimator = Literal["random", "averaged", "coordinate", "gradient"]
_ESTIMATORS = ("random", "averaged", "coordinate", "gradient")
_DENSE = 64
"""Smaller side up to which a full decomposition is faster than iterating for the largest pair."""


class ConvexSet(Protocol):
    """A set that knows where a linear form is largest: :class:`~perturbkit.core.Ball`, Box, or those below."""

    def maximiser(self, g: Tensor) -> Tensor:
        """Return, for each row, the point of the set at which ``<g, v>`` is largest."""


@dataclass(frozen=True)
class Simplex:
    """The set of non-negative vectors of a given sum.

    Parameters
    ----------
    total : float
        The sum, above 0.

    Notes
    -----
    ``{v >= 0, sum v = total}``.

    Examples
    --------
    >>> Simplex().maximiser(torch.tensor([[1.0, 3.0, 2.0]]))
    tensor([[0., 1., 0.]])
    """

    total: float = 1.0

    def __post_init__(self) -> None:
        checks.positive("total", self.total)

    def maximiser(self, g: Tensor) -> Tensor:
        """Return the corner of the largest coordinate of each row."""
        return self.total * torch.zeros_like(g).scatter(1, g.argmax(1, keepdim=True), 1.0)


@dataclass(frozen=True)
class NuclearBall:
    """The set of matrices whose singular values have at most a given sum; the rows are flattened matrices.

    Parameters
    ----------
    radius : float
        The sum, zero or above.
    shape : (int, int)
        Rows and columns of the matrices.

    Notes
    -----
    A linear form is largest at ``radius u v^T`` for the largest pair of singular vectors; only that pair is computed where
    the matrix is large.

    Examples
    --------
    >>> NuclearBall(2.0, (2, 2)).maximiser(torch.tensor([[3.0, 0.0, 0.0, 1.0]]))
    tensor([[2., 0., 0., 0.]])
    """

    radius: float
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        checks.nonnegative("radius", self.radius)
        for side in self.shape:
            checks.integer("shape", side, low=1)

    def maximiser(self, g: Tensor) -> Tensor:
        """Return the outer product of the largest singular pair of each row."""
        matrices = _matrices(g, self.shape)
        if min(self.shape) <= _DENSE:
            u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
            u, v = u[:, :, 0], vt[:, 0]
        else:
            from scipy.sparse.linalg import svds

            pairs = [svds(m.double().cpu().numpy(), k=1, rng=0) for m in matrices]
            u = torch.stack([torch.as_tensor(p[0][:, 0].copy()) for p in pairs]).to(g)
            v = torch.stack([torch.as_tensor(p[2][0].copy()) for p in pairs]).to(g)
        return self.radius * (u[:, :, None] * v[:, None, :]).flatten(1)


@dataclass(frozen=True)
class Spectrahedron:
    """The set of positive semidefinite matrices of a given trace; the rows are flattened matrices.

    Parameters
    ----------
    total : float
        The trace, above 0.
    side : int
        Rows of the matrices, at least 1.

    Notes
    -----
    A linear form is largest at ``total v v^T`` for the eigenvector of the largest eigenvalue of its symmetric part.

    Examples
    --------
    >>> Spectrahedron(1.0, 2).maximiser(torch.tensor([[3.0, 0.0, 0.0, 1.0]]))
    tensor([[1., 0., 0., 0.]])
    """

    total: float
    side: int

    def __post_init__(self) -> None:
        checks.positive("total", self.total)
        checks.integer("side", self.side, low=1)

    def maximiser(self, g: Tensor) -> Tensor:
        """Return the outer square of the largest eigenvector of each row."""
        matrices = _matrices(g, (self.side, self.side))
        v = torch.linalg.eigh((matrices + matrices.mT) / 2).eigenvectors[:, :, -1]
        return self.total * (v[:, :, None] * v[:, None, :]).flatten(1)


def minimize_zo_frank_wolfe(
    fun: Oracle | Callable[..., Tensor],
    x0: Tensor,
    constraint: ConvexSet,
    *,
    estimator: Estimator = "random",
    directions: int = 1,
    max_iter: int = 1000,
    averaging: bool = True,
    exponent: float = 2 / 3,
    offset: int = 8,
    sampled: bool = False,
    generator: Seed = None,
    progress: ProgressLike = None,
) -> Minimum:
    r"""Minimise a function over a convex set from its values and the set's extreme points.

    Parameters
    ----------
    fun : Oracle or callable
        ``fun(x) -> values``, shapes (n, d) to (n,). Defined around the set too: iterates are feasible, queried points need
        not be.
    x0 : Tensor, shape (d,) or (runs, d)
        Start in the set, or one start a run.
    constraint : object with ``maximiser``
        The set: :class:`~perturbkit.core.Ball`, :class:`~perturbkit.core.Box`, :class:`Simplex`, :class:`NuclearBall`,
        :class:`Spectrahedron`, or your own linear oracle.
    estimator : {"random", "averaged", "coordinate", "gradient"}
        Forward differences along one Gaussian direction, along ``directions`` of them, along every axis; or the exact
        gradient, of a function that PyTorch can differentiate.
    directions : int
        Of the averaged estimator, at least 1.
    max_iter : int
        Steps, at least 1.
    averaging : bool
        Keep a running mean of the estimates. Without it the method does not converge, since the variance of an estimate
        does not vanish.
    exponent : float
        Of the decay of the mean's weight, in (0, 1].
    offset : int
        The step sizes are ``2 / (t + offset)``, at least 1; 2 is the ordinary method's.
    sampled : bool
        Whether the function is random: it is then called ``fun(x, generator)`` with the same generator state for all points
        of a step, and a new one at the next.
    generator : torch.Generator, int or None
        Source of directions and samples.
    progress : optional
        See :func:`~perturbkit.core.progress.track`.

    Returns
    -------
    Minimum
        ``history`` has the value at each iterate, from the differences' base points (not for "gradient": there it is exact
        too). ``gap`` is the last ``<d, x - v>``: a certificate for the exact gradient, a biased statistic otherwise.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed, or the values have another shape.

    Notes
    -----
    .. math:: d_t = (1 - \rho_t) d_{t-1} + \rho_t g_t, \quad v_t = \arg\min_{v \in C} \langle d_t, v \rangle, \quad
        x_{t+1} = (1 - \gamma_t) x_t + \gamma_t v_t, \quad \gamma_t = 2 / (t + 8)

    from ``d = 0``. With m directions, :math:`\rho_t = 4 / ((1 + d/m)^{1/3} (t + 8)^{2/3})` and the differences'
    :math:`c_t = 2 \sqrt m / (d^{3/2} (t + 8)^{1/3})`; for axes :math:`4 / (t + 8)^{2/3}` and
    :math:`2 / (d^{1/2} (t + 8)^{1/3})`. The differences are no less than a millionth of the largest coordinate. The primal gap
    falls as :math:`(d / T)^{1/3}` for convex functions.

    Cost: ``directions + 1`` evaluations a step and run (d + 1 for axes), and one linear problem over the set.

    References
    ----------
    Sahu, Zaheer and Kar (2019), arXiv:1810.03233, algorithm 2.

    Examples
    --------
    >>> from perturbkit.core import Ball
    >>> fun = lambda x: (x - torch.tensor([2.0, 0.0])).square().sum(1)
    >>> found = minimize_zo_frank_wolfe(fun, torch.zeros(2), Ball("l1", 1.0), max_iter=300, generator=0)
    >>> bool((found.x - torch.tensor([1.0, 0.0])).abs().max() < 0.05)
    True
    """
    checks.tensor("x0", x0, ndim=(1, 2))
    if not callable(getattr(constraint, "maximiser", None)):
        raise checks.ArgumentTypeError(
            f"constraint is a {type(constraint).__name__}; allowed: a set with maximiser(g). Pass Ball, Box, Simplex or NuclearBall."
        )
    checks.one_of("estimator", estimator, _ESTIMATORS)
    m = checks.integer("directions", directions, low=1)
    checks.integer("max_iter", max_iter, low=1)
    checks.between("exponent", exponent, 0, 1, inclusive="high")
    checks.integer("offset", offset, low=1)
    g = as_generator(generator)
    x = x0.detach().clone().reshape(-1, x0.shape[-1])
    d = x.shape[1]
    function = fun.fun if isinstance(fun, Oracle) else fun
    seed = [0]
    asked: Any = (lambda p: function(p, torch.Generator().manual_seed(seed[0]))) if sampled else fun
    oracle = Oracle.wrap(asked)
    before = oracle.cost
    slope = torch.zeros_like(x)
    history, gap = [], x.new_zeros(len(x))
    steps = _steps(estimator, d, m)
    for t in track(range(max_iter), "zeroth-order Frank-Wolfe", progress=progress):
        seed[0] = seeds(g, 1)[0] if sampled else 0
        rho, c = steps(t + 8, exponent)
        value, estimate = _estimate(oracle, x, estimator, m, c, g)
        history.append(value)
        slope = slope + (rho if averaging else 1.0) * (estimate - slope)
        vertex = constraint.maximiser(-slope)
        gap = (slope * (x - vertex)).sum(1)
        gamma = min(2 / (t + offset), 1.0)
        x = (1 - gamma) * x + gamma * vertex
    seed[0] = seeds(g, 1)[0] if sampled else 0
    values = oracle.value(x).reshape(x0.shape[:-1])
    seen = torch.stack(history).reshape(-1, *x0.shape[:-1])
    message = f"{max_iter} steps were taken"
    return Minimum(
        x.reshape(x0.shape), values, False, message, seen, gap.reshape(x0.shape[:-1]), oracle.cost - before
    )


def _steps(estimator: str, d: int, m: int) -> Callable[[int, float], tuple[float, float]]:
    """Return the function that gives the mean's weight and the differences' length at a shifted time."""
    if estimator == "gradient":
        return lambda s, exponent: (1.0, 0.0)
    if estimator == "coordinate":
        return lambda s, exponent: (min(4 / s**exponent, 1.0), 2 / (math.sqrt(d) * s ** (1 / 3)))
    if estimator == "random":
        m = 1
    weight, length = 4 / (1 + d / m) ** (1 / 3), 2 * math.sqrt(m) / d**1.5
    return lambda s, exponent: (min(weight / s**exponent, 1.0), length / s ** (1 / 3))


def _estimate(
    oracle: Oracle, x: Tensor, estimator: str, m: int, c: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the values and the estimated gradients of a batch of points."""
    runs, d = x.shape
    if estimator == "gradient":
        return oracle.value_and_gradient(x)
    # Shorter differences would be lost in the rounding of the values.
    length = (1e-6 * x.abs().amax(1)).clamp(min=c)[:, None, None]
    if estimator == "coordinate":
        z = torch.eye(d, dtype=x.dtype, device=x.device).expand(runs, d, d)
    else:
        z = randn((runs, m if estimator == "averaged" else 1, d), generator=generator, like=x)
    points = torch.cat([x[:, None], x[:, None] + length * z], 1)
    values = oracle.value(points.reshape(-1, d)).reshape(runs, -1)
    slopes = (values[:, 1:] - values[:, :1]) / length[:, :, 0]
    estimate = torch.einsum("rk,rkd->rd", slopes, z) / (1 if estimator == "coordinate" else z.shape[1])
    return values[:, 0], estimate


def _matrices(g: Tensor, shape: tuple[int, int]) -> Tensor:
    if g.ndim != 2 or g.shape[1] != shape[0] * shape[1]:
        raise checks.ArgumentError(
            f"x has shape {tuple(g.shape)}; allowed: (n, {shape[0] * shape[1]}), matrices of {shape[0]} x {shape[1]} flattened. "
            "Flatten them with x.flatten(1)."
        )
    return g.reshape(-1, *shape)
