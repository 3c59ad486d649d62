"""Problems with known solutions and constants on which theorems about gradient methods are checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perturbkit.core import checks, prox_l1
from perturbkit.core.random import Seed, as_generator, randn, uniform

__all__ = [
    "FiniteSum",
    "make_abs",
    "make_lasso",
    "make_least_squares",
    "make_logistic",
    "observed",
    "run_method",
]


@dataclass(frozen=True, eq=False)
class FiniteSum:
    """A mean of n convex functions of linear forms, with an l1 regulariser, and what theorems ask of it.

    Attributes
    ----------
    rows : Tensor, shape (n, d)
        Linear forms.
    link : callable
        ``link(z, index) -> (values, slopes)`` of each function at its form, in shapes that broadcast.
    ridge, l1 : float
        Weights of ``|x|^2 / 2``, part of every function, and of ``|x|_1``.
    x_star : Tensor, shape (d,)
        Solution.
    constants : dict of str to float
        ``L`` and ``mu`` of the mean, ``L_max`` of the single functions, ``n``, ``sigma_star`` the mean squared gradient of the
        functions at the solution, ``sigma_prox`` its variance, ``G`` the root mean square of subgradients.
    """

    rows: Tensor
    link: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    ridge: float
    l1: float
    x_star: Tensor
    constants: dict[str, float]

    def value(self, x: Tensor) -> Tensor:
        """Return the objective, (runs, d) to (runs,)."""
        index = torch.arange(len(self.rows))
        smooth = self.link(x @ self.rows.T, index)[0].mean(1) + self.ridge / 2 * x.square().sum(1)
        return smooth + self.l1 * x.abs().sum(1)

    def gradient(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        """Return the mean (sub)gradient of the smooth part, over all functions or those of (runs, b) indices."""
        if index is None:
            index = torch.arange(len(self.rows))
            return self.link(x @ self.rows.T, index)[1] @ self.rows / len(self.rows) + self.ridge * x
        a = self.rows[index]
        slopes = self.link(torch.einsum("rbd,rd->rb", a, x), index)[1]
        return torch.einsum("rb,rbd->rd", slopes, a) / index.shape[1] + self.ridge * x

    def prox(self, x: Tensor, step: float) -> Tensor:
        """Return the proximal point of the l1 part."""
        return prox_l1(x, step * self.l1) if self.l1 > 0 else x

    @property
    def gap(self) -> Callable[[Tensor], Tensor]:
        """The objective above its minimum, as a function."""
        least = self.value(self.x_star[None])[0]
        return lambda x: self.value(x) - least


def make_least_squares(
    n: int = 200, d: int = 20, *, noise: float = 0.1, ridge: float = 0.01, generator: Seed = None
) -> FiniteSum:
    r"""Return a mean of squared residuals with a ridge.

    Parameters
    ----------
    n, d : int
        Functions and unknowns, at least 1.
    noise : float
        Of the targets, zero or above: with zero and no ridge every function is minimal at the solution.
    ridge : float
        Zero or above.
    generator : torch.Generator, int or None
        Source of the data.

    Returns
    -------
    FiniteSum

    Raises
    ------
    ArgumentError
        If an argument is outside its range.

    Notes
    -----
    :math:`f_i = (a_i^\top x - b_i)^2 / 2 + \lambda |x|^2 / 2`.

    References
    ----------
    Garrigos and Gower (2023), arXiv:2301.11235.

    Examples
    --------
    >>> problem = make_least_squares(30, 4, generator=0)
    >>> bool(problem.gradient(problem.x_star[None]).norm() < 1e-10)
    True
    """
    a, b, _ = _data(n, d, noise, generator)
    checks.nonnegative("ridge", ridge)
    star = torch.linalg.solve(a.T @ a / n + ridge * torch.eye(d, dtype=a.dtype), a.T @ b / n)
    return _built(a, lambda z, i: ((z - b[i]).square() / 2, z - b[i]), ridge, 0.0, star, 1.0)


def make_logistic(n: int = 200, d: int = 20, *, ridge: float = 0.01, generator: Seed = None) -> FiniteSum:
    r"""Return a mean of logistic losses with a ridge.

    Parameters
    ----------
    n, d, generator
        As for :func:`make_least_squares`.
    ridge : float
        Above 0.

    Returns
    -------
    FiniteSum

    Raises
    ------
    ArgumentError
        If an argument is outside its range.

    Notes
    -----
    :math:`f_i = \ln(1 + e^{-y_i a_i^\top x}) + \lambda |x|^2 / 2`; solved by Newton's method.

    References
    ----------
    Garrigos and Gower (2023), arXiv:2301.11235.

    Examples
    --------
    >>> problem = make_logistic(30, 4, generator=0)
    >>> bool(problem.gradient(problem.x_star[None]).norm() < 1e-10)
    True
    """
    a, b, _ = _data(n, d, 1.0, generator)
    checks.positive("ridge", ridge)
    y = b.sign()

    def link(z: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        return torch.nn.functional.softplus(-y[i] * z), -y[i] * torch.sigmoid(-y[i] * z)

    x = torch.zeros(d, dtype=a.dtype)
    for _ in range(100):
        p = torch.sigmoid(a @ x)
        g = -(y * torch.sigmoid(-y * (a @ x))) @ a / n + ridge * x
        h = (a * (p * (1 - p))[:, None]).T @ a / n + ridge * torch.eye(d, dtype=a.dtype)
        move = torch.linalg.solve(h, g)
        # Damped far from the solution, where a whole step may overshoot.
        x = x - move / max(1.0, float(move.norm()))
    return _built(a, link, ridge, 0.0, x, 0.25)


def make_lasso(
    n: int = 200,
    d: int = 20,
    *,
    noise: float = 0.1,
    l1: float = 0.1,
    ridge: float = 0.01,
    generator: Seed = None,
) -> FiniteSum:
    r"""Return a mean of squared residuals with a ridge and an l1 regulariser.

    Parameters
    ----------
    n, d, noise, ridge, generator
        As for :func:`make_least_squares`.
    l1 : float
        Above 0.

    Returns
    -------
    FiniteSum

    Raises
    ------
    ArgumentError
        If an argument is outside its range.

    Notes
    -----
    :func:`make_least_squares` plus :math:`\lambda_1 |x|_1`; solved by many proximal gradient steps.

    References
    ----------
    Garrigos and Gower (2023), arXiv:2301.11235.

    Examples
    --------
    >>> problem = make_lasso(60, 5, l1=1.0, generator=0)
    >>> step = 1 / problem.constants["L"]
    >>> x = problem.x_star[None]
    >>> bool((problem.prox(x - step * problem.gradient(x), step) - x).norm() < 1e-10)
    True
    """
    a, b, _ = _data(n, d, noise, generator)
    checks.positive("l1", l1)
    checks.nonnegative("ridge", ridge)
    step = 1 / (float(torch.linalg.eigvalsh(a.T @ a / n)[-1]) + ridge)
    x = torch.zeros(d, dtype=a.dtype)
    for _ in range(20_000):
        before = x
        x = prox_l1(x - step * ((a @ x - b) @ a / n + ridge * x), step * l1)
        if float((x - before).norm()) <= 1e-14 * max(1.0, float(x.norm())):
            break
    return _built(a, lambda z, i: ((z - b[i]).square() / 2, z - b[i]), ridge, l1, x, 1.0)


def make_abs(n: int = 200, d: int = 20, *, generator: Seed = None) -> FiniteSum:
    r"""Return a mean of absolute residuals that all vanish at the solution.

    Parameters
    ----------
    n, d, generator
        As for :func:`make_least_squares`.

    Returns
    -------
    FiniteSum
        Its ``L`` and ``L_max`` are infinite.

    Raises
    ------
    ArgumentError
        If an argument is outside its range.

    Notes
    -----
    :math:`f_i = |a_i^\top (x - x^*)|`.

    References
    ----------
    Garrigos and Gower (2023), arXiv:2301.11235.

    Examples
    --------
    >>> problem = make_abs(30, 4, generator=0)
    >>> float(problem.value(problem.x_star[None]))
    0.0
    """
    a, b, truth = _data(n, d, 0.0, generator)
    return _built(a, lambda z, i: ((z - b[i]).abs(), (z - b[i]).sign()), 0.0, 0.0, truth, float("inf"))


def _data(n: int, d: int, noise: float, generator: Seed) -> tuple[Tensor, Tensor, Tensor]:
    checks.integer("n", n, low=1)
    checks.integer("d", d, low=1)
    checks.nonnegative("noise", noise)
    g = as_generator(generator)
    a = randn((n, d), generator=g, dtype=torch.float64)
    truth = randn((d,), generator=g, dtype=torch.float64)
    # The forms that targets are made of, to the last bit those that are evaluated.
    return a, (truth[None] @ a.T)[0] + noise * randn((n,), generator=g, dtype=torch.float64), truth


def _built(
    a: Tensor,
    link: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ridge: float,
    l1: float,
    star: Tensor,
    bend: float,
) -> FiniteSum:
    n = len(a)
    values = torch.linalg.eigvalsh(a.T @ a / n)
    slopes = link((star[None] @ a.T)[0], torch.arange(n))[1]
    single = slopes[:, None] * a + ridge * star
    # Of logistic losses only the ridge is sure to bend everywhere.
    least = float(values[0].clamp(min=0)) if bend == 1 else 0.0
    constants = {
        "n": float(n),
        "L": bend * float(values[-1]) + ridge,
        "L_max": bend * float(a.square().sum(1).max()) + ridge,
        "mu": least + ridge,
        "sigma_star": float(single.square().sum(1).mean()),
        "sigma_prox": float((single - single.mean(0)).square().sum(1).mean()),
        "G": float(a.square().sum(1).mean().sqrt()),
    }
    return FiniteSum(a, link, ridge, l1, star, constants)


def run_method(
    problem: FiniteSum,
    method: str,
    gamma: float,
    steps: int,
    start: Tensor,
    runs: int,
    batch: int,
    generator: Seed,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the runs' points before and after each step."""
    g, n = as_generator(generator), len(problem.rows)
    x = start.expand(runs, -1).clone()
    z = x
    for t in range(steps):
        index = None
        if runs > 1:
            index = uniform((runs, n), generator=g).argsort(1)[:, :batch]
        before, slope = x, problem.gradient(x, index)
        if method == "sgd_momentum":
            z = z - gamma * slope
            x = ((t + 1) * x + 2 * z) / (t + 3)
        elif "proximal" in method:
            x = problem.prox(x - gamma * slope, gamma)
        else:
            x = x - gamma * slope
        yield before, x


def observed(
    problem: FiniteSum, quantity: str, at: list[int], path: Iterator[tuple[Tensor, Tensor]]
) -> Tensor:
    """Return the bounded quantity of each run at each of the numbers of steps, (k, runs)."""
    total: Any = 0.0
    least: Any = math.inf
    found, wanted = [], set(at)
    for t, (before, after) in enumerate(path, 1):
        total = total + (after if quantity == "next average gap" else before)
        if quantity == "least gradient":
            least = torch.minimum(torch.as_tensor(least), problem.gradient(before).square().sum(1))
        if t in wanted:
            if quantity == "last gap":
                found.append(problem.gap(after))
            elif quantity == "last distance":
                found.append((after - problem.x_star).square().sum(1))
            elif quantity == "least gradient":
                found.append(least)
            else:
                found.append(problem.gap(total / t))
    return torch.stack(found)
