"""GFM+: gradient-free descent of functions that are neither smooth nor convex, with recursive estimates.

Use it for stochastic objectives with kinks, where a small Goldstein subgradient is what can be had. Chen, Xu and Luo (2023),
Faster Gradient-Free Algorithms for Nonsmooth Nonconvex Stochastic Optimization, arXiv:2301.06428.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from perturbkit.core import Ball, Minimum, Oracle, Sphere, checks
from perturbkit.core.progress import ProgressLike, track
from perturbkit.core.random import Seed, as_generator, uniform

__all__ = ["goldstein_gradient_norm", "minimize_gradient_free_nonsmooth"]

Sampler = Callable[[int, torch.Generator], Any]


def minimize_gradient_free_nonsmooth(
    fun: Oracle | Callable[..., Tensor],
    x0: Tensor,
    sampler: Sampler | None = None,
    *,
    radius: float,
    step: float,
    max_evals: int,
    big_batch: int = 64,
    small_batch: int | None = None,
    period: int | None = None,
    variance_reduced: bool = True,
    output: Literal["random", "last"] = "random",
    generator: Seed = None,
    progress: ProgressLike = None,
) -> Minimum:
    r"""Minimise a stochastic Lipschitz function from pairs of its values.

    Parameters
    ----------
    fun : Oracle or callable
        ``fun(x, *samples) -> values``, shapes (n, d) and (n, ...) to (n,): each point with its own sample.
    x0 : Tensor, shape (d,)
        Start.
    sampler : callable, optional
        ``sampler(n, generator)`` draws n samples, a tensor or a tuple of tensors of n rows. Left out for a function that is
        not random.
    radius : float
        Radius r of the smoothing, in units of x; above 0.
    step : float
        Step size, above 0; the theory's is ``r / (2 L max(sqrt(d), d sqrt(period / small_batch)))`` for a Lipschitz constant L.
    max_evals : int
        Evaluations; no step is begun that would exceed them. At least two a direction of the first step.
    big_batch : int
        Directions of the fresh estimates, at least 1.
    small_batch, period : int, optional
        Directions of the recursive estimates, and steps from one fresh estimate to the next; the root of ``big_batch``,
        rounded up, unless given.
    variance_reduced : bool
        Recursive estimates; otherwise every step has a fresh one (GFM).
    output : {"random", "last"}
        Which iterate is returned: the theory speaks of one drawn uniformly.
    generator : torch.Generator, int or None
        Source of directions, samples and the iterate that is returned.
    progress : optional
        See :func:`~perturbkit.core.progress.track`.

    Returns
    -------
    Minimum
        ``fun`` is the mean of the last step's values, ``history`` that of each step, at no cost of its own.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed, or the values have another shape.

    Notes
    -----
    For :math:`f_r(x) = E f(x + r u)`, u uniform in the unit ball, and w uniform on the unit sphere,

    .. math:: g(x; w, \xi) = \frac{d}{2 r} [F(x + r w; \xi) - F(x - r w; \xi)]\, w, \quad E g = \nabla f_r(x),

    and :math:`\nabla f_r(x)` is in the Goldstein subdifferential of radius r. Every ``period`` steps v is the mean of
    ``big_batch`` estimates, and in between :math:`v \leftarrow v + \operatorname{mean}[g(x_t; w, \xi) - g(x_{t-1}; w, \xi)]` with
    the same pairs at both points; :math:`x_{t+1} = x_t - \eta v`. For a warm start call twice, first with a larger radius and
    ``variance_reduced=False``.

    Cost: two evaluations a fresh direction and four a recursive one.

    References
    ----------
    Chen, Xu and Luo (2023), arXiv:2301.06428, algorithms 2 and 3.

    Examples
    --------
    >>> kink = lambda x: x.abs().sum(1)
    >>> found = minimize_gradient_free_nonsmooth(
    ...     kink, torch.tensor([1.0, -2.0]), radius=0.05, step=0.02, max_evals=20_000, output="last", generator=0)
    >>> bool(found.x.abs().max() < 0.1)
    True
    """
    checks.tensor("x0", x0, ndim=1)
    checks.positive("radius", radius)
    checks.positive("step", step)
    big = checks.integer("big_batch", big_batch, low=1)
    root = math.isqrt(big - 1) + 1
    small = checks.integer("small_batch", root if small_batch is None else small_batch, low=1)
    every = checks.integer("period", root if period is None else period, low=1)
    checks.integer("max_evals", max_evals, low=2 * big)
    checks.one_of("output", output, ("random", "last"))
    g = as_generator(generator)
    oracle = Oracle.wrap(fun)
    before = oracle.cost
    x = x0.detach().clone()
    previous, v, chosen = x, torch.zeros_like(x), x
    history: list[Tensor] = []
    plan = list(_plan(max_evals, 2 * big, 4 * small, every if variance_reduced else 1))
    for t, fresh in enumerate(track(plan, "gradient-free descent", progress=progress)):
        n = big if fresh else small
        w = Sphere(1.0).sample(x.expand(n, -1), generator=g)
        drawn = () if sampler is None else sampler(n, g)
        samples = drawn if isinstance(drawn, tuple) else (drawn,)
        points = x[None] if fresh else torch.stack([x, previous])
        value, estimates = _estimates(oracle, points, w, samples, radius)
        v = estimates[0] if fresh else v + estimates[0] - estimates[1]
        history.append(value)
        # Each iterate is the one that is returned with the same probability.
        if output == "last" or float(uniform((1,), generator=g)) < 1 / (t + 1):
            chosen = x
        previous, x = x, x - step * v
    if output == "last":
        chosen = x
    spent = f"the next step would exceed {max_evals} evaluations"
    return Minimum(chosen, history[-1], False, spent, torch.stack(history), cost=oracle.cost - before)


def goldstein_gradient_norm(
    grad_fun: Callable[[Tensor], Tensor], x: Tensor, radius: float, n: int = 256, *, generator: Seed = None
) -> float:
    r"""Return an upper bound of the smallest Goldstein subgradient's norm at a point.

    Parameters
    ----------
    grad_fun : callable
        ``grad_fun(x) -> gradients``, shapes (n, d) to (n, d).
    x : Tensor, shape (d,)
        The point.
    radius : float
        Radius of the ball, above 0.
    n : int
        Gradients that are sampled in the ball, at least 1.
    generator : torch.Generator, int or None
        Source of the points.

    Returns
    -------
    float

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    The norm of the shortest vector in the convex hull of the gradients at x and at n points of the ball,
    :math:`\min_{\lambda \ge 0, \sum \lambda = 1} |G^\top \lambda|`, by non-negative least squares on
    :math:`|G^\top \lambda|^2 + (1 - \sum \lambda)^2`, which has the same minimiser up to its scale.

    References
    ----------
    Goldstein (1977), Optimization of Lipschitz continuous functions; Zhang et al. (2020), arXiv:2002.04130.

    Examples
    --------
    >>> goldstein_gradient_norm(torch.sign, torch.tensor([0.01]), 0.1, generator=0) < 1e-6
    True
    """
    checks.tensor("x", x, ndim=1)
    checks.positive("radius", radius)
    checks.integer("n", n, low=1)
    shifts = Ball("l2", radius).sample(x.expand(n, -1), generator=as_generator(generator))
    gradients = grad_fun(torch.cat([x[None], x + shifts]).detach())
    if not isinstance(gradients, Tensor) or gradients.shape != (n + 1, len(x)):
        shown = tuple(gradients.shape) if isinstance(gradients, Tensor) else f"a {type(gradients).__name__}"
        raise checks.ArgumentError(
            f"grad_fun answered {shown}; allowed: gradients of shape {(n + 1, len(x))}. Return one row a point."
        )
    matrix = gradients.detach().double().cpu().numpy().T
    # Scaled, so that the constraint weighs as much as the gradients.
    size = float(np.linalg.norm(matrix, axis=0).max()) or 1.0
    system = np.vstack([matrix / size, np.ones(n + 1)])
    weights, _ = nnls(system, np.append(np.zeros(len(x)), 1.0), maxiter=50 * (n + 1))
    return float(np.linalg.norm(matrix @ weights) / weights.sum())


def _plan(max_evals: int, fresh: int, recursive: int, period: int) -> Iterator[bool]:
    """Yield whether each step's estimate is fresh, while the evaluations last."""
    left, t = max_evals, 0
    while True:
        left -= fresh if t % period == 0 else recursive
        if left < 0:
            return
        yield t % period == 0
        t += 1


def _estimates(
    oracle: Oracle, points: Tensor, w: Tensor, samples: tuple[Tensor, ...], radius: float
) -> tuple[Tensor, Tensor]:
    """Return the mean value and the mean estimate at each of k points, with the same directions and samples."""
    k, d = points.shape
    n = len(w)
    both = radius * torch.stack([w, -w])
    asked = (points[:, None, None] + both).reshape(-1, d)
    rows = [s.repeat(2 * k, *[1] * (s.ndim - 1)) for s in samples]
    values = oracle(asked, *rows).reshape(k, 2, n)
    slopes = (values[:, 0] - values[:, 1]) * (d / (2 * radius))
    return values.mean(), torch.einsum("kn,nd->kd", slopes, w) / n
