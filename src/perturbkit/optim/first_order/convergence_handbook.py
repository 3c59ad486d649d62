"""A handbook of convergence theorems that can be called: step sizes, guarantees, and checks of runs against them.

Use it to choose a step size from constants, to know what is guaranteed after how many steps, and to see how far a run is from
its guarantee. Garrigos and Gower (2023), Handbook of Convergence Theorems for (Stochastic) Gradient Methods,
arXiv:2301.11235.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from perturbkit.core import Result, checks
from perturbkit.core.random import Seed
from perturbkit.optim.first_order._finite_sums import (
    FiniteSum,
    make_abs,
    make_lasso,
    make_least_squares,
    make_logistic,
    observed,
    run_method,
)

__all__ = [
    "FiniteSum",
    "HandbookCheck",
    "convergence_handbook",
    "convergence_rate",
    "expected_smoothness",
    "gradient_noise",
    "make_abs",
    "make_lasso",
    "make_least_squares",
    "make_logistic",
    "theory_step_size",
]


@dataclass(frozen=True, eq=False)
class HandbookCheck(Result):
    """A theorem beside runs, one entry a step that was looked at.

    Attributes
    ----------
    steps : Tensor, shape (k,)
        Numbers of steps.
    bound : Tensor, shape (k,)
        What is guaranteed.
    observed : Tensor, shape (k,)
        Mean over the runs of what it is guaranteed for.
    standard_error : Tensor, shape (k,)
        Of the mean; zero where nothing is random.
    quantity : str
        What is bounded.
    """

    steps: Tensor
    bound: Tensor
    observed: Tensor
    standard_error: Tensor
    quantity: str

    @property
    def holds(self) -> bool:
        """Whether no mean exceeds its bound by more than three standard errors and rounding."""
        slack = 3 * self.standard_error + 1e-12 * (1 + self.bound)
        return bool((self.observed <= self.bound + slack).all())

    @property
    def tightness(self) -> float:
        """Largest of what was observed over what is guaranteed, where that is above rounding."""
        above = self.bound > 1e-10 * (1 + float(self.bound[0]))
        return float((self.observed / self.bound)[above].max())

    def to_frame(self) -> pd.DataFrame:
        """Return a table with a row a number of steps."""
        columns = {n: getattr(self, n).numpy() for n in ("steps", "bound", "observed", "standard_error")}
        return pd.DataFrame(columns).assign(ratio=lambda t: t["observed"] / t["bound"])


@dataclass(frozen=True)
class _Theorem:
    """What a theorem bounds, its largest step, and its bound; both of constants."""

    quantity: str
    step: Callable[[Any], float]
    bound: Callable[[Any, float, int], float]


class _Constants(dict[str, float]):
    """Constants that say which one is missing."""

    def __getattr__(self, name: str) -> float:
        if name not in self:
            raise checks.ArgumentError(
                f"{name} is not given; allowed: all constants of the theorem. Pass {name}=..., or those of a FiniteSum."
            )
        return checks.nonnegative(name, self[name])


def _sgd(c: Any, g: float, t: int, smooth: float, noise: float) -> float:
    return c.D**2 / (2 * g * t * (1 - 2 * g * smooth)) + g * noise / (1 - 2 * g * smooth)


_THEOREMS: dict[tuple[str, str], _Theorem] = {
    ("gd", "convex"): _Theorem("last gap", lambda c: 1 / c.L, lambda c, g, t: c.D**2 / (2 * g * t)),
    ("gd", "strongly_convex"): _Theorem("last distance", lambda c: 1 / c.L, lambda c, g, t: (1 - g * c.mu) ** t * c.D**2),
    ("gd", "pl"): _Theorem("last gap", lambda c: 1 / c.L, lambda c, g, t: (1 - g * c.mu) ** t * c.F),
    ("gd", "nonconvex"): _Theorem("least gradient", lambda c: 1 / c.L, lambda c, g, t: 2 * c.F / (g * t)),
    ("sgd", "convex"): _Theorem("average gap", lambda c: 1 / (4 * c.L_max), lambda c, g, t: _sgd(c, g, t, c.L_max, c.sigma_star)),
    ("sgd", "strongly_convex"): _Theorem(
        "last distance", lambda c: 1 / (2 * c.L_max), lambda c, g, t: (1 - g * c.mu) ** t * c.D**2 + 2 * g * c.sigma_star / c.mu
    ),
    ("minibatch", "convex"): _Theorem("average gap", lambda c: 1 / (4 * c.L_b), lambda c, g, t: _sgd(c, g, t, c.L_b, c.sigma_b)),
    ("minibatch", "strongly_convex"): _Theorem(
        "last distance", lambda c: 1 / (2 * c.L_b), lambda c, g, t: (1 - g * c.mu) ** t * c.D**2 + 2 * g * c.sigma_b / c.mu
    ),
    ("sgd_momentum", "convex"): _Theorem(
        "last gap", lambda c: 1 / (4 * c.L_max), lambda c, g, t: c.D**2 / (g * (t + 1)) + 2 * g * c.sigma_star
    ),
    ("subgradient", "convex"): _Theorem("average gap", lambda c: c.D / (c.G * math.sqrt(c.T)), lambda c, g, t: c.D**2 / (2 * g * t) + g * c.G**2 / 2),
    ("stochastic_subgradient", "convex"): _Theorem(
        "average gap", lambda c: c.D / (c.G * math.sqrt(c.T)), lambda c, g, t: c.D**2 / (2 * g * t) + g * c.G**2 / 2
    ),
    ("proximal_gradient", "convex"): _Theorem("last gap", lambda c: 1 / c.L, lambda c, g, t: c.D**2 / (2 * g * t)),
    ("proximal_gradient", "strongly_convex"): _Theorem(
        "last distance", lambda c: 1 / c.L, lambda c, g, t: (1 - g * c.mu) ** t * c.D**2
    ),
    ("stochastic_proximal_gradient", "convex"): _Theorem(
        "next average gap", lambda c: 1 / (8 * c.L_max),
        lambda c, g, t: ((c.D**2 + 2 * g * c.F) / (2 * g * t) + 2 * g * c.sigma_prox) / (1 - 4 * g * c.L_max),
    ),
    ("stochastic_proximal_gradient", "strongly_convex"): _Theorem(
        "last distance", lambda c: 1 / (2 * c.L_max), lambda c, g, t: (1 - g * c.mu) ** t * c.D**2 + 2 * g * c.sigma_prox / c.mu
    ),
}  # fmt: skip


def theory_step_size(method: str, assumption: str, **constants: float) -> float:
    r"""Return the step size of a theorem: the largest it is stated for, or the best where that is less.

    Parameters
    ----------
    method : str
        "gd", "sgd", "minibatch", "sgd_momentum", "subgradient", "stochastic_subgradient", "proximal_gradient" or
        "stochastic_proximal_gradient".
    assumption : str
        "convex", "strongly_convex", or for "gd" also "pl" and "nonconvex".
    **constants
        ``L``, ``L_max``; ``L_b`` of :func:`expected_smoothness`; ``D`` the distance to the solution, ``G`` and the steps ``T``
        for subgradients.

    Returns
    -------
    float

    Raises
    ------
    ArgumentError
        If there is no such theorem or a constant is missing.

    Notes
    -----
    1 / L for gradient descent, 1 / (4 L_max) for stochastic descent on convex and 1 / (2 L_max) on strongly convex functions;
    for stochastic proximal steps on convex ones half of what is allowed, where the bound would be infinite.

    References
    ----------
    Garrigos and Gower (2023), arXiv:2301.11235.

    Examples
    --------
    >>> theory_step_size("sgd", "convex", L_max=2.0)
    0.125
    """
    return _theorem(method, assumption).step(_Constants(constants))


def convergence_rate(
    method: str, assumption: str, t: int, *, step: float | None = None, **constants: float
) -> float:
    r"""Return what a theorem guarantees after t steps.

    Parameters
    ----------
    method, assumption
        As for :func:`theory_step_size`.
    t : int
        Steps, at least 1.
    step : float, optional
        Step size, above 0 and at most the theorem's; that one unless given.
    **constants
        Those of the step size, and of ``D`` the distance from the start to the solution, ``F`` the first gap, ``mu``,
        ``sigma_star``, ``sigma_b`` of :func:`gradient_noise`, ``sigma_prox``: see :class:`FiniteSum`.

    Returns
    -------
    float
        Of the last or average iterate's gap, the squared distance or the least squared gradient: the theorem's own quantity.

    Raises
    ------
    ArgumentError
        If there is no such theorem, a constant is missing or the step is too large.

    Notes
    -----
    Gradient descent: :math:`D^2 / 2 \gamma t`, :math:`(1 - \gamma \mu)^t D^2`, :math:`(1 - \gamma \mu)^t F` under the
    Polyak-Lojasiewicz condition, and :math:`2 F / \gamma t`. Stochastic descent: :math:`D^2 / 2 \gamma t (1 - 2 \gamma L) + \gamma
    \sigma^* / (1 - 2 \gamma L)` and :math:`(1 - \gamma \mu)^t D^2 + 2 \gamma \sigma^* / \mu`; with momentum, for the last iterate,
    :math:`D^2 / \eta (t + 1) + 2 \eta \sigma^*`. Subgradients: :math:`D^2 / 2 \gamma t + \gamma G^2 / 2`.

    References
    ----------
    Garrigos and Gower (2023), arXiv:2301.11235, theorems 3.4 to 12.6.

    Examples
    --------
    >>> convergence_rate("gd", "convex", 10, L=2.0, D=1.0)
    0.1
    """
    checks.integer("t", t, low=1)
    theorem, own = _theorem(method, assumption), _Constants(constants)
    largest = theorem.step(own)
    gamma = largest if step is None else checks.positive("step", step)
    limit = 2 * largest if (method, assumption) == ("stochastic_proximal_gradient", "convex") else largest
    if "subgradient" not in method and gamma > limit * (1 + 1e-12):
        raise checks.ArgumentError(
            f"step is {gamma:g}; allowed: at most {limit:g} for this theorem. Lower it, or leave it out."
        )
    return theorem.bound(own, gamma, t)


def convergence_handbook(
    problem: FiniteSum,
    method: str,
    assumption: str,
    *,
    steps: int = 1000,
    runs: int = 50,
    batch: int = 10,
    step: float | None = None,
    x0: Tensor | None = None,
    generator: Seed = None,
) -> HandbookCheck:
    r"""Run a method on a problem many times at once, and set what it does beside what is guaranteed.

    Parameters
    ----------
    problem : FiniteSum
        The problem.
    method, assumption
        As for :func:`theory_step_size`.
    steps : int
        Steps, at least 1.
    runs : int
        Runs, at least 2; methods without chance take one.
    batch : int
        Functions a step of "minibatch", drawn without replacement, in 1..n.
    step : float, optional
        As for :func:`convergence_rate`.
    x0 : Tensor, shape (d,), optional
        Start; the origin unless given.
    generator : torch.Generator, int or None
        Source of the functions drawn.

    Returns
    -------
    HandbookCheck
        At about twenty numbers of steps, evenly spaced in the logarithm.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    Averages are over the points at which gradients were taken, ``(x_0 + ... + x_{t-1}) / t``, for stochastic proximal steps
    over those reached.

    References
    ----------
    Garrigos and Gower (2023), arXiv:2301.11235.

    Examples
    --------
    >>> check = convergence_handbook(make_least_squares(generator=0), "sgd", "convex", steps=200, runs=20, generator=0)
    >>> check.holds, check.quantity
    (True, 'average gap')
    """
    if not isinstance(problem, FiniteSum):
        raise checks.ArgumentTypeError(
            f"problem is a {type(problem).__name__}; allowed: a FiniteSum. Make one by make_least_squares and the others."
        )
    theorem = _theorem(method, assumption)
    checks.integer("steps", steps, low=1)
    checks.integer("runs", runs, low=2)
    n = len(problem.rows)
    b = checks.integer("batch", batch, low=1, high=n) if method == "minibatch" else 1
    start = (
        torch.zeros_like(problem.x_star)
        if x0 is None
        else checks.tensor("x0", x0, shape=problem.x_star.shape)
    )
    own = dict(problem.constants)
    own["D"], own["F"] = float((start - problem.x_star).norm()), float(problem.gap(start[None])[0])
    own["T"] = float(steps)
    own["L_b"] = expected_smoothness(own["L"], own["L_max"], n, b) if math.isfinite(own["L"]) else math.inf
    own["sigma_b"] = gradient_noise(own["sigma_star"], n, b)
    gamma = theorem.step(_Constants(own)) if step is None else step
    convergence_rate(method, assumption, 1, step=gamma, **own)
    at = sorted({round(steps ** (i / 20)) for i in range(21)})
    random = method in (
        "sgd",
        "minibatch",
        "sgd_momentum",
        "stochastic_subgradient",
        "stochastic_proximal_gradient",
    )
    seen = observed(
        problem,
        theorem.quantity,
        at,
        run_method(problem, method, gamma, steps, start, runs if random else 1, b, generator),
    )
    bound = torch.tensor(
        [convergence_rate(method, assumption, t, step=gamma, **own) for t in at], dtype=seen.dtype
    )
    error = seen.std(1) / math.sqrt(runs) if random else torch.zeros(len(at), dtype=seen.dtype)
    return HandbookCheck(torch.tensor(at), bound, seen.mean(1), error, theorem.quantity)


def expected_smoothness(smooth: float, largest: float, n: int, batch: int) -> float:
    r"""Return the smoothness that counts for batches drawn without replacement.

    Parameters
    ----------
    smooth, largest : float
        L of the mean and L_max of the functions, zero or above.
    n, batch : int
        Functions, and those in a batch, 1..n.

    Returns
    -------
    float

    Raises
    ------
    ArgumentError
        If an argument is outside its range.

    Notes
    -----
    :math:`L_b = \frac{n (b - 1)}{b (n - 1)} L + \frac{n - b}{b (n - 1)} L_{\max}`.

    References
    ----------
    Garrigos and Gower (2023), arXiv:2301.11235, proposition 6.3.

    Examples
    --------
    >>> expected_smoothness(1.0, 5.0, 10, 1), expected_smoothness(1.0, 5.0, 10, 10)
    (5.0, 1.0)
    """
    checks.nonnegative("smooth", smooth)
    checks.nonnegative("largest", largest)
    b = checks.integer("batch", batch, low=1, high=checks.integer("n", n, low=1))
    if n == 1:
        return smooth
    return (n * (b - 1) * smooth + (n - b) * largest) / (b * (n - 1))


def gradient_noise(sigma_star: float, n: int, batch: int) -> float:
    r"""Return the gradient noise at the solution of batches drawn without replacement.

    Parameters
    ----------
    sigma_star : float
        Mean squared gradient of the single functions there, zero or above.
    n, batch : int
        Functions, and those in a batch, 1..n.

    Returns
    -------
    float

    Raises
    ------
    ArgumentError
        If an argument is outside its range.

    Notes
    -----
    :math:`\sigma_b^* = \frac{n - b}{b (n - 1)} \sigma^*`.

    References
    ----------
    Garrigos and Gower (2023), arXiv:2301.11235, proposition 6.3.

    Examples
    --------
    >>> gradient_noise(2.0, 10, 1), gradient_noise(2.0, 10, 10)
    (2.0, 0.0)
    """
    checks.nonnegative("sigma_star", sigma_star)
    b = checks.integer("batch", batch, low=1, high=checks.integer("n", n, low=1))
    return 0.0 if n == 1 else (n - b) / (b * (n - 1)) * sigma_star


def _theorem(method: str, assumption: str) -> _Theorem:
    if (method, assumption) not in _THEOREMS:
        known = ", ".join(f"{m} / {a}" for m, a in _THEOREMS)
        raise checks.ArgumentError(
            f"method and assumption are {method!r} and {assumption!r}; allowed: {known}. Choose one of these pairs."
        )
    return _THEOREMS[method, assumption]
