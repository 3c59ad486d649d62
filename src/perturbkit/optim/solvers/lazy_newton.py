"""Lazy Newton: second-order minimisation that computes and factorises a Hessian once for many steps.

Use it for smooth functions of up to a few thousand variables where a Hessian costs much more than a gradient; convex ones with
regularisation by the gradient, others with the cubic one, which ends where the Hessian is positive too. Doikov, Chayti and
Jaggi (2022), Second-order optimization with lazy Hessians, arXiv:2212.00781.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perturbkit.core import Minimum, Oracle, checks, curvature
from perturbkit.core.progress import ProgressLike, track
from perturbkit.optim.solvers._parts import value_and_gradient

__all__ = ["NewtonMinimum", "cubic_step", "minimize_lazy_newton"]

_DOUBLINGS = 60
"""Regularisations tried in one step before rounding is blamed."""


@dataclass(frozen=True, eq=False)
class NewtonMinimum(Minimum):
    """A minimum with its first- and second-order certificates.

    Attributes
    ----------
    x, fun, converged, message, history, gap, cost
        See :class:`~perturbkit.core.Minimum`; ``history`` has the objective at each iterate.
    gradient_norm : Tensor, shape ()
        Norm of the gradient at ``x``.
    lowest_curvature : Tensor, shape (), or None
        Smallest eigenvalue of the Hessian at ``x``, if it converged with cubic regularisation.
    nhess : int
        Hessians computed, each factorised once.
    """

    gradient_norm: Tensor | None = None
    lowest_curvature: Tensor | None = None
    nhess: int = 0


def minimize_lazy_newton(
    fun: Oracle | Callable[..., Tensor],
    x0: Tensor,
    *,
    hess: Callable[[Tensor], Tensor] | None = None,
    period: int | Literal["dim"] = "dim",
    regularization: Literal["cubic", "gradient"] = "cubic",
    lipschitz_hessian: float | None = None,
    tol: float = 1e-8,
    curvature_tol: float = 1e-4,
    max_iter: int = 1000,
    progress: ProgressLike = None,
) -> NewtonMinimum:
    r"""Minimise a twice differentiable function with Hessians that are reused.

    Parameters
    ----------
    fun : Oracle or callable
        ``fun(x) -> values``, shapes (n, d) to (n,), that PyTorch can differentiate.
    x0 : Tensor, shape (d,)
        Start.
    hess : callable, optional
        ``hess(x) -> Tensor``, shapes (d,) to (d, d). By differentiation, at the cost of about d gradients, unless given.
    period : int or "dim"
        Steps for which a Hessian serves, at least 1; "dim" is d, the best where a Hessian costs d gradients.
    regularization : {"cubic", "gradient"}
        "gradient" for convex functions; "cubic" for all.
    lipschitz_hessian : float, optional
        Lipschitz constant L of the Hessian, above 0: the regularisation is then that of the theory, ``6 m L`` or ``3 m L``. It
        is adapted from step to step unless given.
    tol : float
        Norm of the gradient at which to stop, zero or above.
    curvature_tol : float
        With "cubic" the smallest eigenvalue must be above minus this, too; zero or above.
    max_iter : int
        Steps, at least 1.
    progress : optional
        See :func:`~perturbkit.core.progress.track`.

    Returns
    -------
    NewtonMinimum
        With its gradient norm, and its lowest curvature from a Hessian at ``x`` itself.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed, or the Hessian has another shape.

    Notes
    -----
    With H the Hessian at the last snapshot, one in m steps, and g the gradient at x:

    .. math:: x^+ = \arg\min_y \langle g, y - x\rangle + \tfrac12 \langle H (y - x), y - x\rangle + \tfrac{M}{6} |y - x|^3
        \quad\text{or}\quad x^+ = x - (H + \sqrt{M |g|} I)^{-1} g

    Adapted, M is doubled until :math:`f(x) - f(x^+) \ge |g^+|^{3/2} / (12 \sqrt M)`, or
    :math:`\langle g^+, x - x^+\rangle \ge |g^+|^2 / (4 \sqrt{M |g|})`, and halved after each step.

    Cost: one gradient a trial, and one Hessian with its eigendecomposition, O(d^3), in m steps; a step is O(d^2). To reach a
    gradient of :math:`\epsilon` takes :math:`O(\sqrt m\,(1 + d/m)\, \epsilon^{-3/2})` gradients if a Hessian costs d. Where it costs a few, as of a linear model by
    one product of matrices, ``period=1`` is the faster.

    References
    ----------
    Doikov, Chayti and Jaggi (2022), arXiv:2212.00781, algorithms 1 to 3.

    Examples
    --------
    >>> rosenbrock = lambda x: (1 - x[:, 0]) ** 2 + 100 * (x[:, 1] - x[:, 0] ** 2) ** 2
    >>> found = minimize_lazy_newton(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64))
    >>> found.x, found.converged, bool(found.lowest_curvature > 0)
    (tensor([1.0000, 1.0000], dtype=torch.float64), True, True)
    """
    checks.tensor("x0", x0, ndim=1)
    d = len(x0)
    if isinstance(period, str):
        checks.one_of("period", period, ("dim",))
        m = d
    else:
        m = checks.integer("period", period, low=1)
    checks.one_of("regularization", regularization, ("cubic", "gradient"))
    if lipschitz_hessian is not None:
        checks.positive("lipschitz_hessian", lipschitz_hessian)
    checks.nonnegative("tol", tol)
    checks.nonnegative("curvature_tol", curvature_tol)
    checks.integer("max_iter", max_iter, low=1)
    oracle = Oracle.wrap(fun)
    before = oracle.cost
    cubic = regularization == "cubic"
    x = x0.detach().clone()
    value, g = value_and_gradient(oracle, x)
    history = [value]
    factors: tuple[Tensor, Tensor] | None = None
    age = nhess = 0
    weight = 0.0 if lipschitz_hessian is None else (6 if cubic else 3) * m * lipschitz_hessian
    lowest, message, converged = None, f"{max_iter} steps were taken", False
    for _ in track(range(max_iter + 1), "lazy Newton", progress=progress):
        small = bool(g.norm() <= tol)
        if small and not cubic:
            converged, message = True, f"the gradient is at most {tol:g}"
            break
        if factors is None or age == m or (small and age > 0):
            pair = torch.linalg.eigh(_hessian(oracle, hess, x))
            factors, age, nhess = (pair.eigenvalues, pair.eigenvectors), 0, nhess + 1
            if weight == 0.0:
                # In the units of a third derivative; a guess that is soon adapted.
                weight = float((0.1 * factors[0].abs().max()) ** 2 / g.norm().clamp(min=1e-30)) or 1.0
        if small and bool(factors[0][0] >= -curvature_tol):
            converged, lowest = True, factors[0][0]
            message = f"the gradient is at most {tol:g}, and the curvature at least {-curvature_tol:g}"
            break
        if len(history) > max_iter:
            break
        step = None
        for _ in range(_DOUBLINGS):
            h = _step(*factors, g, weight, cubic)
            trial = x + h
            new, slope = value_and_gradient(oracle, trial)
            if lipschitz_hessian is not None or _enough(value, new, g, slope, h, weight, cubic):
                step = trial, new, slope
                break
            weight *= 2
        if step is None:
            message = "no step decreases the objective in this precision"
            break
        x, value, g = step
        if lipschitz_hessian is None:
            weight = max(weight / 2, 1e-30)
        history.append(value)
        age += 1
    return NewtonMinimum(
        x,
        value,
        converged,
        message,
        torch.stack(history),
        None,
        oracle.cost - before,
        g.norm(),
        lowest,
        nhess,
    )


def cubic_step(values: Tensor, vectors: Tensor, g: Tensor, weight: float) -> Tensor:
    r"""Minimise a quadratic with a cubic term globally, from the eigendecomposition of its matrix.

    Parameters
    ----------
    values : Tensor, shape (d,)
        Eigenvalues, from the smallest.
    vectors : Tensor, shape (d, d)
        Eigenvectors, one a column, as of ``torch.linalg.eigh``.
    g : Tensor, shape (d,)
        Slope at the origin.
    weight : float
        M, above 0.

    Returns
    -------
    Tensor, shape (d,)
        The minimiser h, one of two where g is orthogonal to the lowest eigenvectors and the term alone decides.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    Minimises :math:`\langle g, h\rangle + \tfrac12 \langle H h, h\rangle + \tfrac M6 |h|^3`: :math:`(H + \tfrac{M r}{2} I) h = -g`
    with :math:`r = |h|` and a positive semidefinite matrix, a root-finding in one number. O(d^2).

    Examples
    --------
    >>> H = torch.diag(torch.tensor([-1.0, 2.0]))
    >>> cubic_step(*torch.linalg.eigh(H), torch.tensor([0.0, 1.0]), 2.0)  # lowest along the first axis: |h| = 1
    tensor([ 0.9428, -0.3333])
    """
    checks.tensor("values", values, ndim=1)
    checks.tensor("vectors", vectors, shape=(len(values), len(values)))
    checks.tensor("g", g, shape=(len(values),))
    checks.positive("weight", weight)
    return _cubic(values, vectors, g, weight)


def _hessian(oracle: Oracle, hess: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    d = len(x)
    if hess is None:
        with oracle.frozen():
            product = curvature.hessian(lambda v: oracle.fun(v[None]).reshape(()), x)
            matrix = product(torch.eye(d, dtype=x.dtype, device=x.device))
    else:
        matrix = hess(x)
        if not isinstance(matrix, Tensor) or matrix.shape != (d, d):
            given = (
                f"shape {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else f"a {type(matrix).__name__}"
            )
            raise checks.ArgumentError(
                f"hess answered {given}; allowed: shape {(d, d)}. Return the matrix of second derivatives."
            )
    matrix = matrix.detach()
    return (matrix + matrix.mT) / 2


def _step(values: Tensor, vectors: Tensor, g: Tensor, weight: float, cubic: bool) -> Tensor:
    if cubic:
        return _cubic(values, vectors, g, weight)
    # A convex function's Hessian has no negative eigenvalues but for rounding.
    shifted = values.clamp(min=0) + (weight * g.norm()).sqrt()
    return -(vectors @ ((vectors.mT @ g) / shifted))


def _enough(
    value: Tensor, new: Tensor, g: Tensor, slope: Tensor, h: Tensor, weight: float, cubic: bool
) -> bool:
    """Return whether the step makes the progress that the theory promises for a large enough regularisation."""
    if cubic:
        # Values that differ by rounding alone cannot speak against a step.
        rounding = 8 * torch.finfo(value.dtype).eps * value.abs()
        return bool(value - new >= slope.norm() ** 1.5 / (12 * math.sqrt(weight)) - rounding)
    return bool(-(slope @ h) >= slope.square().sum() / (4 * (weight * g.norm()).sqrt()))


def _cubic(values: Tensor, vectors: Tensor, g: Tensor, weight: float) -> Tensor:
    """Find the length by a safeguarded Newton iteration on 1/|h(r)| - 1/r, which is almost linear in r."""
    c = vectors.mT @ g
    low = values[0].clamp(max=0)
    # With r = floor + 2 s / M the shifted eigenvalues are gaps + s: exact even next to the lowest.
    gaps, floor = values - low, float(-2 * low / weight)
    total = float(c.norm())
    if floor > 0:
        # Components along the lowest eigenvectors that are rounding do not count.
        eps = torch.finfo(g.dtype).eps
        bottom = gaps <= eps * values.abs().max()
        ratio = torch.where(bottom, torch.zeros_like(c), c / torch.where(bottom, 1, gaps))
        inner = float(ratio.norm())
        if bool(c[bottom].norm() <= 4 * eps * total) and inner <= floor:
            ratio[0] -= math.sqrt(floor**2 - inner**2)
            return -(vectors @ ratio)
    if total == 0:
        return torch.zeros_like(g)
    lower, upper = 0.0, math.sqrt(total * weight / 2)
    s = upper
    for _ in range(100):
        shifted = gaps + s
        h = c / shifted
        length, r = float(h.norm()), floor + 2 * s / weight
        if abs(length - r) <= 4e-16 * r:
            break
        if length > r:
            lower = s
        else:
            upper = s
        slope = float((h.square() / shifted).sum()) / length**3 + 2 / (weight * r * r)
        s -= (1 / length - 1 / r) / slope
        if not lower < s < upper:
            s = lower + (upper - lower) / 2
        if not lower < s < upper:
            break
    return -(vectors @ (c / (gaps + s)))
