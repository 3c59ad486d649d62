"""Symmetric-polynomial preconditioning: gradient methods that do not feel the largest gaps of a known curvature's spectrum.

Use it for convex functions whose Hessian is known up to factors, as of generalised linear models, where that matrix can be
multiplied with but not be factorised. Doikov and Rodomanov (2023), Polynomial Preconditioning for Gradient Methods,
arXiv:2301.13194.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from perturbkit.core import Minimum, Oracle, checks, curvature
from perturbkit.core.progress import ProgressLike, track
from perturbkit.core.random import Seed, as_generator, rademacher
from perturbkit.optim.solvers._parts import (
    Products,
    checked_start,
    descent,
    exact_traces,
    value_and_gradient,
    why_stuck,
)

__all__ = [
    "PreconditionedMinimum",
    "minimize_krylov",
    "minimize_preconditioned",
    "power_traces",
    "symmetric_polynomial_preconditioner",
]

Matvec = curvature.Matvec
_DOUBLINGS = 60


@dataclass(frozen=True, eq=False)
class PreconditionedMinimum(Minimum):
    """A minimum with its gradient norm and the products with the curvature that it took.

    Attributes
    ----------
    x, fun, converged, message, history, gap, cost
        See :class:`~perturbkit.core.Minimum`; ``history`` has the objective at each iterate.
    gradient_norm : Tensor, shape ()
        Norm of the gradient at ``x``.
    products : int
        Products of the curvature with a vector.
    """

    gradient_norm: Tensor | None = None
    products: int = 0


def minimize_preconditioned(
    fun: Oracle | Callable[..., Tensor],
    x0: Tensor,
    matvec: Matvec,
    *,
    degree: int = 2,
    traces: Tensor | None = None,
    accelerated: bool = False,
    tol: float = 1e-6,
    max_iter: int = 10_000,
    progress: ProgressLike = None,
) -> PreconditionedMinimum:
    r"""Minimise a convex function by gradient steps that a polynomial of its curvature preconditions.

    Parameters
    ----------
    fun : Oracle or callable
        ``fun(x) -> values``, shapes (n, d) to (n,), that PyTorch can differentiate.
    x0 : Tensor, shape (d,)
        Start.
    matvec : callable
        The curvature B, positive definite, as products with rows, (k, d) to (k, d): the Hessian is between
        :math:`\mu B` and :math:`L B`, whose constants need not be known.
    degree : int
        Degree of the polynomial, 0..d-1: the number of large eigenvalues that are dealt with. 0 is the gradient method.
    traces : Tensor, shape (at least degree,), optional
        Of the powers of B, from :func:`power_traces`; found from d products unless given.
    accelerated : bool
        Nesterov's fast gradient method in the preconditioner's metric, restarted where the momentum goes uphill.
    tol : float
        Norm of the gradient at which to stop, zero or above.
    max_iter : int
        Steps, at least 1.
    progress : optional
        See :func:`~perturbkit.core.progress.track`.

    Returns
    -------
    PreconditionedMinimum

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed, or the curvature answers in another shape.

    Notes
    -----
    .. math:: x^+ = x - \tfrac1M P_\tau \nabla f(x), \quad f(x^+) \le f(x) - \tfrac{1}{2M} \langle \nabla f(x), P_\tau \nabla f(x)\rangle

    with M doubled until that holds and halved after each step, from the value that is right along the first step for B itself.
    The rate is that of the condition number of :math:`P_\tau B`, see :func:`symmetric_polynomial_preconditioner`.

    Cost: one gradient a trial and ``degree`` products a step.

    References
    ----------
    Doikov and Rodomanov (2023), arXiv:2301.13194, algorithms 1 and 2.

    Examples
    --------
    >>> B = torch.diag(torch.tensor([100.0, 2.0, 1.0], dtype=torch.float64))
    >>> fun = lambda x: 0.5 * ((x - 1) @ B * (x - 1)).sum(1)
    >>> start = torch.zeros(3, dtype=torch.float64)
    >>> plain = minimize_preconditioned(fun, start, lambda v: v @ B, degree=0)
    >>> better = minimize_preconditioned(fun, start, lambda v: v @ B, degree=1)
    >>> better.converged, len(better.history) < len(plain.history) / 3
    (True, True)
    """
    d = checked_start(x0, tol, max_iter)
    checks.integer("degree", degree, low=0, high=d - 1)
    product = Products(matvec)
    if traces is None:
        traces = exact_traces(product(torch.eye(d, dtype=x0.dtype, device=x0.device)), max(degree, 1))
    precondition = symmetric_polynomial_preconditioner(product, traces, degree)
    oracle = Oracle.wrap(fun)
    before = oracle.cost
    x = x0.detach().clone()
    value, g = value_and_gradient(oracle, x)
    history, message, converged = [value], f"{max_iter} steps were taken", False
    weight = 0.0
    # The accelerated method's own: the point of the estimating sequence, and the sum of its weights.
    v, total = x, 0.0
    for _ in track(range(max_iter + 1), "preconditioned gradient", progress=progress):
        if bool(g.norm() <= tol):
            converged, message = True, f"the gradient is at most {tol:g}"
            break
        if len(history) > max_iter:
            break
        if not accelerated or total == 0:
            y, fy, gy = x, value, g
            direction = precondition(gy[None])[0]
        if weight == 0.0:
            weight = float((direction @ product(direction[None])[0]) / (gy @ direction).clamp(min=1e-300))
        step = None
        for _ in range(_DOUBLINGS):
            if accelerated and total > 0:
                part = (1 + math.sqrt(1 + 4 * weight * total)) / (2 * weight)
                y = (total * x + part * v) / (total + part)
                fy, gy = value_and_gradient(oracle, y)
                direction = precondition(gy[None])[0]
            square = gy @ direction
            if not bool(square > 0):
                break
            step = descent(oracle, y, fy, direction / weight, square / (2 * weight))
            if step is not None:
                break
            weight *= 2
        if step is None:
            message = why_stuck(bool(gy @ direction > 0))
            break
        if accelerated:
            part = (1 + math.sqrt(1 + 4 * weight * total)) / (2 * weight)
            uphill = total > 0 and bool(gy @ (step[0] - x) > 0)
            v, total = (step[0], 0.0) if uphill else (v - part * direction, total + part)
        x, value, g = step
        history.append(value)
        weight /= 2
    return PreconditionedMinimum(
        x,
        value,
        converged,
        message,
        torch.stack(history),
        None,
        oracle.cost - before,
        g.norm(),
        product.count,
    )


def minimize_krylov(
    fun: Oracle | Callable[..., Tensor],
    x0: Tensor,
    matvec: Matvec,
    *,
    degree: int = 4,
    tol: float = 1e-6,
    max_iter: int = 10_000,
    progress: ProgressLike = None,
) -> PreconditionedMinimum:
    r"""Minimise a convex function with the best polynomial of its curvature in each step.

    Parameters
    ----------
    fun : Oracle or callable
        ``fun(x) -> values``, shapes (n, d) to (n,), that PyTorch can differentiate.
    x0 : Tensor, shape (d,)
        Start.
    matvec : callable
        The curvature B, positive definite, as products with rows, (k, d) to (k, d).
    degree : int
        Largest degree of the polynomial, 0..d-1.
    tol : float
        Norm of the gradient at which to stop, zero or above.
    max_iter : int
        Steps, at least 1.
    progress : optional
        See :func:`~perturbkit.core.progress.track`.

    Returns
    -------
    PreconditionedMinimum

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed, or the curvature answers in another shape.

    Notes
    -----
    The step minimises :math:`\langle g, h \rangle + \tfrac M2 \langle B h, h\rangle` over the span of
    :math:`g, B g, \dots, B^\tau g`, by a Lanczos basis; M is doubled until the model's decrease is had and halved after each
    step. On a quadratic with the Hessian B a step is :math:`\tau + 1` steps of conjugate gradients.

    Cost: one gradient a trial and ``degree + 1`` products a step. No traces are needed.

    References
    ----------
    Doikov and Rodomanov (2023), arXiv:2301.13194, algorithm 3.

    Examples
    --------
    >>> B = torch.diag(torch.tensor([100.0, 2.0, 1.0], dtype=torch.float64))
    >>> fun = lambda x: 0.5 * ((x - 1) @ B * (x - 1)).sum(1)
    >>> found = minimize_krylov(fun, torch.zeros(3, dtype=torch.float64), lambda v: v @ B, degree=2)
    >>> found.converged, len(found.history)
    (True, 2)
    """
    d = checked_start(x0, tol, max_iter)
    checks.integer("degree", degree, low=0, high=d - 1)
    product = Products(matvec)
    oracle = Oracle.wrap(fun)
    before = oracle.cost
    x = x0.detach().clone()
    value, g = value_and_gradient(oracle, x)
    history, message, converged, weight = [value], f"{max_iter} steps were taken", False, 1.0
    for _ in track(range(max_iter + 1), "Krylov gradient", progress=progress):
        if bool(g.norm() <= tol):
            converged, message = True, f"the gradient is at most {tol:g}"
            break
        if len(history) > max_iter:
            break
        alpha, beta, basis = curvature.lanczos(product, g, degree + 1)
        alive = basis.any(1)
        small = (torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1))[alive][:, alive]
        right = torch.zeros_like(small[0])
        right[0] = g.norm()
        direction = torch.linalg.solve(small, right) @ basis[alive]
        square, step = g @ direction, None
        for _ in range(_DOUBLINGS if bool(square > 0) else 0):
            step = descent(oracle, x, value, direction / weight, square / (2 * weight))
            if step is not None:
                break
            weight *= 2
        if step is None:
            message = why_stuck(bool(square > 0))
            break
        x, value, g = step
        history.append(value)
        weight /= 2
    return PreconditionedMinimum(
        x,
        value,
        converged,
        message,
        torch.stack(history),
        None,
        oracle.cost - before,
        g.norm(),
        product.count,
    )


def symmetric_polynomial_preconditioner(matvec: Matvec, traces: Tensor, degree: int) -> Matvec:
    r"""Return the symmetric-polynomial preconditioner of a matrix as products with rows.

    Parameters
    ----------
    matvec : callable
        The matrix B, symmetric and positive definite, (k, d) to (k, d).
    traces : Tensor, shape (at least degree,)
        Of its powers, from the first.
    degree : int
        Degree :math:`\tau`, zero or above.

    Returns
    -------
    callable
        (k, d) to (k, d), at ``degree`` products with B a row.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    On the j-th eigenvector the eigenvalue is the elementary symmetric polynomial of degree :math:`\tau` of all eigenvalues of B
    but the j-th, divided here by that of all, so that it is in (0, 1]:

    .. math:: P_\tau = I - \frac{e_{\tau - 1}}{e_\tau} B P_{\tau - 1}, \quad P_0 = I, \quad
        k\, e_k = \sum_{i = 1}^k (-1)^{i - 1} e_{k - i} \operatorname{tr} B^i

    The last degree, d - 1, is the inverse up to a factor. The condition number of :math:`P_\tau B` falls towards
    :math:`\lambda_{\tau + 1} / \lambda_d` as the first :math:`\tau` eigenvalues move away from the others. Above degree 5 or so
    the traces' rounding shows.

    References
    ----------
    Doikov and Rodomanov (2023), arXiv:2301.13194, section 3.

    Examples
    --------
    >>> B = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    >>> P = symmetric_polynomial_preconditioner(lambda v: v @ B, power_traces(B, 2), 2)
    >>> P(torch.eye(3)).diag() * 14  # 2 * 1, 4 * 1 and 4 * 2, of 8 + 4 + 2
    tensor([2., 4., 8.])
    """
    checks.tensor("traces", traces, ndim=1)
    checks.integer("degree", degree, low=0, high=len(traces))
    # Of B / tr B, lest powers overflow; the ratios of neighbours are all that is used.
    scale, e = float(traces[0]) or 1.0, [1.0]
    powers = [t / scale**i for i, t in enumerate(traces.tolist(), 1)]
    for k in range(1, degree + 1):
        e.append(sum((-1) ** (i - 1) * e[k - i] * powers[i - 1] for i in range(1, k + 1)) / k)
    if scale < 0 or min(e) <= 0:
        raise checks.ArgumentError(
            f"traces do not belong to a positive definite matrix of rank {degree} or more; allowed: exact or well-estimated "
            "ones. Use more probes, or a lower degree."
        )
    ratios = [e[k - 1] / e[k] / scale for k in range(1, degree + 1)]

    def apply(rows: Tensor) -> Tensor:
        out = rows
        for ratio in ratios:
            out = rows - ratio * matvec(out)
        return out

    return apply


def power_traces(
    matrix: Tensor | Matvec,
    degree: int,
    *,
    like: Tensor | None = None,
    n_probes: int = 64,
    generator: Seed = None,
) -> Tensor:
    r"""Return the traces of the powers of a symmetric matrix, exact or estimated.

    Parameters
    ----------
    matrix : Tensor of shape (d, d), or callable
        The matrix, for exact traces, or its products with rows, (k, d) to (k, d), for Hutchinson's estimates.
    degree : int
        Highest power, at least 1.
    like : Tensor, shape (d,), optional
        Gives the dimension, dtype and device of a callable.
    n_probes : int
        Random sign vectors of an estimate, at least 1; the same for all powers.
    generator : torch.Generator, int or None
        Source of the probes.

    Returns
    -------
    Tensor, shape (degree,)
        Traces of B, B^2, and so on.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    With probes z: the mean of :math:`\langle B^i z, B^{k - i} z\rangle`, so that k powers take k/2 products a probe.

    References
    ----------
    M. F. Hutchinson (1990). A stochastic estimator of the trace of the influence matrix. Communications in Statistics 19(2).

    Examples
    --------
    >>> power_traces(torch.diag(torch.tensor([1.0, 2.0])), 3)
    tensor([3., 5., 9.])
    """
    checks.integer("degree", degree, low=1)
    if isinstance(matrix, Tensor):
        checks.tensor("matrix", matrix, ndim=2)
        checks.tensor("matrix", matrix, shape=(len(matrix), len(matrix)))
        return exact_traces(matrix, degree)
    if like is None:
        raise checks.ArgumentError(
            "like is None; allowed: a tensor of shape (d,) for a callable. Pass the start."
        )
    checks.tensor("like", like, ndim=1)
    checks.integer("n_probes", n_probes, low=1)
    z = rademacher((n_probes, len(like)), generator=as_generator(generator), like=like)
    product = Products(matrix)
    images = [z]
    for _ in range((degree + 1) // 2):
        images.append(product(images[-1]))
    return torch.stack([(images[k // 2] * images[k - k // 2]).sum(1).mean() for k in range(1, degree + 1)])
