"""Stochastic model-based minimisation: each step minimises a model of one sample's loss, not only its tangent.

Use it for losses that are a convex function of something smooth, where the step size of subgradients is hard to choose.
Davis and Drusvyatskiy (2019), Stochastic model-based minimization of weakly convex functions, arXiv:1803.06523.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perturbkit.core import Cost, Minimum, checks
from perturbkit.core.progress import ProgressLike, track
from perturbkit.core.random import Seed, as_generator, randint, randn, uniform

__all__ = [
    "CompositeProblem",
    "make_blind_deconvolution",
    "make_phase_retrieval",
    "minimize_model_based",
    "weakly_convex_envelope",
]

Model = Literal["subgradient", "prox_linear", "prox_point", "clipped"]
_MODELS = ("subgradient", "prox_linear", "prox_point", "clipped")
_INNER = 60


@dataclass(frozen=True, eq=False)
class CompositeProblem:
    """The mean of ``|c_i(x)|`` over samples, for smooth functions c_i of one number.

    Attributes
    ----------
    inner : callable
        ``inner(x, rows) -> (values, gradients)`` of c: (n, d) points and (n,) samples to (n,) and (n, d).
    n : int
        Samples.
    solution : Tensor, shape (k, d)
        Points at which all c vanish, if there are.
    """

    inner: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    n: int
    solution: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the objective, (..., d) to (...)."""
        points = x.reshape(-1, x.shape[-1])
        rows = torch.arange(self.n, device=x.device).repeat(len(points))
        values, _ = self.inner(points.repeat_interleave(self.n, 0), rows)
        return values.abs().reshape(-1, self.n).mean(1).reshape(x.shape[:-1])

    def distance(self, x: Tensor) -> Tensor:
        """Return the distance to the nearest solution over the solution's length, (..., d) to (...)."""
        gaps = (x[..., None, :] - self.solution).norm(dim=-1) / self.solution.norm(dim=-1)
        return gaps.amin(-1)


def minimize_model_based(
    problem: CompositeProblem,
    x0: Tensor,
    *,
    model: Model = "prox_linear",
    step: float | Tensor = 1.0,
    schedule: Literal["sqrt", "constant"] = "sqrt",
    max_iter: int = 1000,
    prox: Callable[[Tensor, Tensor], Tensor] | None = None,
    output: Literal["random", "last"] = "last",
    generator: Seed = None,
    progress: ProgressLike = None,
) -> Minimum:
    r"""Minimise a mean of absolute values of smooth functions, a sample a step.

    Parameters
    ----------
    problem : CompositeProblem
        The functions.
    x0 : Tensor, shape (d,) or (runs, d)
        Start, or one start a run; runs are independent and share their batches.
    model : {"subgradient", "prox_linear", "prox_point", "clipped"}
        What a step minimises of a sample's loss f: its tangent; the absolute value of c's tangent; f itself, by Newton steps
        on its optimality condition; or the tangent, but no less than the infimum 0 (a Polyak step).
    step : float or Tensor of shape (runs,)
        First step size :math:`\alpha_0`, above 0.
    schedule : {"sqrt", "constant"}
        :math:`\alpha_0 / \sqrt{t + 1}` at step t, or :math:`\alpha_0 / \sqrt{T + 1}` for all T steps.
    max_iter : int
        Steps T, at least 1.
    prox : callable, optional
        ``prox(x, alpha) -> x``, the proximal operator of alpha times a regulariser, (runs, d) and (runs, 1) to (runs, d); for
        "subgradient", which alone has a closed form with it.
    output : {"random", "last"}
        Which iterate is returned; the theory speaks of one drawn uniformly.
    generator : torch.Generator, int or None
        Source of the samples.
    progress : optional
        See :func:`~perturbkit.core.progress.track`.

    Returns
    -------
    Minimum
        ``history`` has the sample's loss at each step.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`x \leftarrow \arg\min_y f_x(y; \xi) + r(y) + |y - x|^2 / 2 \alpha_t`. For :math:`f = |c|` with gradient J of c the
    prox-linear step is :math:`-\operatorname{clip}(c / \alpha |J|^2, -1, 1)\, \alpha J`, and the clipped one
    :math:`-\min(\alpha, |c| / |J|^2) \operatorname{sign}(c) J`: the same. The mean squared gradient of the Moreau envelope falls as
    :math:`T^{-1/2}`.

    Cost: one sample a step and run; up to 60 evaluations of it for "prox_point".

    References
    ----------
    Davis and Drusvyatskiy (2019), arXiv:1803.06523, algorithm 4.1.

    Examples
    --------
    >>> problem, start = make_phase_retrieval(60, 10, generator=0)
    >>> found = minimize_model_based(problem, start, step=1.0, max_iter=3000, generator=0)
    >>> bool(problem.distance(found.x) < 0.02)
    True
    """
    if not isinstance(problem, CompositeProblem):
        raise checks.ArgumentTypeError(
            f"problem is a {type(problem).__name__}; allowed: a CompositeProblem. Make one by make_phase_retrieval or from c and its gradient."
        )
    checks.tensor("x0", x0, ndim=(1, 2))
    checks.one_of("model", model, _MODELS)
    checks.one_of("schedule", schedule, ("sqrt", "constant"))
    checks.one_of("output", output, ("random", "last"))
    steps = checks.integer("max_iter", max_iter, low=1)
    if prox is not None and model != "subgradient":
        raise checks.ArgumentError(
            f"prox is given with the model {model!r}; allowed: with 'subgradient'. Leave it out, or choose that model."
        )
    x = x0.detach().clone().reshape(-1, x0.shape[-1])
    first = _sizes(step, x)
    g = as_generator(generator)
    chosen, history = x, []
    for t in track(range(steps), "model-based steps", progress=progress):
        alpha = first / math.sqrt(t + 1 if schedule == "sqrt" else steps + 1)
        rows = randint(0, problem.n, (len(x),), generator=g, device=x.device)
        c, slope = problem.inner(x, rows)
        history.append(c.abs())
        if output == "random" and float(uniform((1,), generator=g)) < 1 / (t + 1):
            chosen = x
        c, square = c[:, None], slope.square().sum(1, keepdim=True)
        if model == "subgradient":
            x = x - alpha * c.sign() * slope
            x = x if prox is None else prox(x, alpha)
        elif model == "prox_linear":
            x = x - (c / (alpha * square)).clamp(-1, 1).nan_to_num(0.0) * alpha * slope
        elif model == "clipped":
            x = x - torch.minimum(alpha, c.abs() / square).nan_to_num(0.0) * c.sign() * slope
        else:
            x = _prox_point(problem, x, rows, alpha)
    if output == "last":
        chosen = x
    chosen = chosen.reshape(x0.shape)
    seen = torch.stack(history).reshape(-1, *x0.shape[:-1])
    cost = Cost(steps * len(x) * (_INNER if model == "prox_point" else 1), steps * len(x))
    return Minimum(chosen, problem(chosen), False, f"{steps} steps were taken", seen, cost=cost)


def weakly_convex_envelope(
    problem: CompositeProblem, x: Tensor, lam: float, *, steps: int = 2000, tol: float = 1e-8
) -> tuple[Tensor, Tensor]:
    r"""Return the Moreau envelope of the objective and the norm of its gradient.

    Parameters
    ----------
    problem : CompositeProblem
        The objective F.
    x : Tensor, shape (d,)
        The point.
    lam : float
        Above 0, and below the inverse of the weak convexity.
    steps : int
        Most prox-linear iterations of the inner problem, at least 1.
    tol : float
        Length of the last iteration over ``lam``, above 0.

    Returns
    -------
    value, gradient_norm : Tensor, shape ()

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`F_\lambda(x) = \min_y F(y) + |y - x|^2 / 2 \lambda` and :math:`|\nabla F_\lambda| = |x - \hat y| / \lambda`. The inner
    problem is solved by prox-linear iterations, each a least-absolute-deviation problem that is smoothed and solved by
    reweighted least squares.

    References
    ----------
    Davis and Drusvyatskiy (2019), arXiv:1803.06523, section 2.

    Examples
    --------
    >>> line = CompositeProblem(lambda x, rows: (x[:, 0], torch.ones_like(x)), 1, torch.zeros(1, 1))
    >>> value, slope = weakly_convex_envelope(line, torch.tensor([3.0]), 0.5)  # Huber's function
    >>> round(float(value), 3), round(float(slope), 3)
    (2.75, 1.0)
    """
    checks.tensor("x", x, ndim=1)
    checks.positive("lam", lam)
    checks.integer("steps", steps, low=1)
    checks.positive("tol", tol)
    rows = torch.arange(problem.n, device=x.device)
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    y = x.detach().clone()
    for _ in range(steps):
        c, slope = problem.inner(y.expand(problem.n, -1), rows)
        # |c + J m| is majorised by a square whose weight is the inverse of its present value.
        weight = 1 / c.abs().clamp(min=1e-12) / problem.n
        matrix = (slope * weight[:, None]).T @ slope + eye / lam
        move = torch.linalg.solve(matrix, -((weight * c) @ slope + (y - x) / lam))
        y = y + move
        if float(move.norm()) <= tol * lam:
            break
    return problem(y) + (y - x).square().sum() / (2 * lam), (y - x).norm() / lam


def make_phase_retrieval(
    m: int, d: int, *, corrupt: float = 0.0, distance: float = 0.5, generator: Seed = None
) -> tuple[CompositeProblem, Tensor]:
    r"""Return measurements of squared products with a vector, and a start near it.

    Parameters
    ----------
    m, d : int
        Measurements and unknowns, at least 1.
    corrupt : float
        Share of measurements that are replaced, in [0, 1).
    distance : float
        Of the start over the solution's length, zero or above.
    generator : torch.Generator, int or None
        Source of the measurements.

    Returns
    -------
    problem : CompositeProblem
    start : Tensor, shape (d,)

    Raises
    ------
    ArgumentError
        If an argument is outside its range.

    Notes
    -----
    :math:`c_i(x) = \langle a_i, x \rangle^2 - b_i`, with standard normal :math:`a_i` and a solution on the unit sphere.

    References
    ----------
    Davis and Drusvyatskiy (2019), arXiv:1803.06523, section 5.1.

    Examples
    --------
    >>> problem, start = make_phase_retrieval(30, 5, generator=0)
    >>> float(problem(problem.solution[0])), round(float(problem.distance(start)), 4)
    (0.0, 0.5)
    """
    checks.integer("m", m, low=1)
    checks.integer("d", d, low=1)
    checks.between("corrupt", corrupt, 0, 1, inclusive="low")
    checks.nonnegative("distance", distance)
    g = as_generator(generator)
    a = randn((m, d), generator=g, dtype=torch.float64)
    truth, away = (randn((d,), generator=g, dtype=torch.float64) for _ in range(2))
    truth = truth / truth.norm()
    b = (a @ truth).square()
    wrong = round(corrupt * m)
    b[:wrong] = 5 * randn((wrong,), generator=g, dtype=torch.float64).abs()

    def inner(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        product = (a[rows].to(x) * x).sum(1)
        return product.square() - b[rows].to(x), 2 * product[:, None] * a[rows].to(x)

    start = truth + distance * away / away.norm()
    return CompositeProblem(inner, m, torch.stack([truth, -truth])), start


def make_blind_deconvolution(
    m: int, d: int, *, corrupt: float = 0.0, distance: float = 0.5, generator: Seed = None
) -> tuple[CompositeProblem, Tensor]:
    r"""Return measurements of products of two vectors, and a start near both.

    Parameters
    ----------
    m, d : int
        Measurements, and unknowns of each vector, at least 1.
    corrupt, distance, generator
        As for :func:`make_phase_retrieval`.

    Returns
    -------
    problem : CompositeProblem
        Of the two vectors in a row, 2 d numbers. Scaling one and dividing the other changes nothing: ``distance`` is to the
        pair of equal lengths.
    start : Tensor, shape (2 d,)

    Raises
    ------
    ArgumentError
        If an argument is outside its range.

    Notes
    -----
    :math:`c_i(x, y) = \langle u_i, x \rangle \langle v_i, y \rangle - b_i`.

    References
    ----------
    Davis and Drusvyatskiy (2019), arXiv:1803.06523, section 5.2.

    Examples
    --------
    >>> problem, start = make_blind_deconvolution(30, 5, generator=0)
    >>> round(float(problem(problem.solution[0])), 6), start.shape
    (0.0, torch.Size([10]))
    """
    checks.integer("m", m, low=1)
    checks.integer("d", d, low=1)
    checks.between("corrupt", corrupt, 0, 1, inclusive="low")
    checks.nonnegative("distance", distance)
    g = as_generator(generator)
    u, v = (randn((m, d), generator=g, dtype=torch.float64) for _ in range(2))
    x, y, away = (randn((n,), generator=g, dtype=torch.float64) for n in (d, d, 2 * d))
    x, y = x / x.norm(), y / y.norm()
    b = (u @ x) * (v @ y)
    wrong = round(corrupt * m)
    b[:wrong] = 5 * randn((wrong,), generator=g, dtype=torch.float64)

    def inner(z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        left, right = u[rows].to(z), v[rows].to(z)
        p, q = (left * z[:, :d]).sum(1), (right * z[:, d:]).sum(1)
        return p * q - b[rows].to(z), torch.cat([q[:, None] * left, p[:, None] * right], 1)

    truth = torch.cat([x, y])
    start = truth + distance * truth.norm() * away / away.norm()
    return CompositeProblem(inner, m, torch.stack([truth, -truth])), start


def _prox_point(problem: CompositeProblem, x: Tensor, rows: Tensor, alpha: Tensor) -> Tensor:
    """Return the minimiser of a sample's loss and the proximal term, by prox-linear iterations from x."""
    y = x
    for _ in range(_INNER):
        c, slope = problem.inner(y, rows)
        square = slope.square().sum(1, keepdim=True)
        # min |c + J m| + |y + m - x|^2 / 2 alpha: from x, move by -lambda alpha J with lambda in [-1, 1].
        at = c[:, None] + (slope * (x - y)).sum(1, keepdim=True)
        weight = (at / (alpha * square)).clamp(-1, 1).nan_to_num(0.0)
        y = x - weight * alpha * slope
    return y


def _sizes(step: float | Tensor, x: Tensor) -> Tensor:
    sizes = torch.as_tensor(step, dtype=x.dtype, device=x.device).reshape(-1)
    if len(sizes) not in (1, len(x)) or not bool((sizes > 0).all()):
        raise checks.ArgumentError(
            f"step is {step}; allowed: a number above 0, or one a run. Pass a first step size such as 1.0."
        )
    return sizes[:, None]
