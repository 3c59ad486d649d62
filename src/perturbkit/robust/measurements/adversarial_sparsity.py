"""Adversarial sparsity: how far a random perturbation is from one that breaks the model.

Use it where adversarial accuracy says zero for models that differ: it tells those that one direction in many breaks from
those that nearly any does. Olivier and Raj (2023), How many perturbations break this model? Evaluating robustness beyond
adversarial accuracy, arXiv:2207.04129.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from perturbkit.core import Ball, Cost, Oracle, Result, Sphere, around, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, rademacher, randperm
from perturbkit.robust.attacks._parts import column, half_cosine, labels_for, softened_margin
from perturbkit.robust.attacks.projected_gradient import projected_gradient

__all__ = [
    "Sparsity",
    "SparsityReport",
    "adversarial_sparsity",
    "cone_projection",
    "pixel_projection",
    "sparsity_report",
]

_VALUES = 2**23  # perturbed values held at once
_Found = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Sparsity(Result):
    """How far random perturbations are from adversarial ones, row by row.

    Attributes
    ----------
    mean : Tensor, shape (n,)
        Mean over the directions: the higher, the fewer perturbations break the row. NaN where the row is not vulnerable.
    per_direction : Tensor, shape (n, n_directions)
        Smallest angle in radians ("l2"), or smallest number of values changed ("linf"). NaN likewise.
    vulnerable : Tensor of bool, shape (n,)
        Whether the row is answered rightly and plain projected gradient breaks it.
    correct : Tensor of bool, shape (n,)
        Whether the clean row is answered rightly.
    unit : str
        "radians" or "values".
    cost : Cost
        Evaluations spent.
    """

    mean: Tensor
    per_direction: Tensor
    vulnerable: Tensor
    correct: Tensor
    unit: str
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class SparsityReport(Result):
    """The two numbers of a model: how many rows stand, and how sparse the attacks on the others are.

    Attributes
    ----------
    adversarial_accuracy : float
        Share of rows that are right and stay right under projected gradient.
    mean_sparsity : float
        Mean over the vulnerable rows; NaN where there is none.
    standard_error : float
        Of that mean over rows; NaN for fewer than two.
    n_vulnerable : int
        Number of those rows.
    unit : str
        "radians" or "values".
    """

    adversarial_accuracy: float
    mean_sparsity: float
    standard_error: float
    n_vulnerable: int
    unit: str


def adversarial_sparsity(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    norm: Literal["l2", "linf"] = "l2",
    n_directions: int = 100,
    search_steps: int = 10,
    attack_steps: int = 20,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: Seed = None,
    progress: ProgressLike = False,
) -> Sparsity:
    """Measure how large a part of the perturbations of a size an attacker needs to break each row.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Classifier of a batch (n, ...), answering logits (n, classes).
    x : Tensor, shape (n, ...)
        Clean inputs, floating point.
    y : Tensor of int64, shape (n,)
        True labels.
    epsilon : float
        Size of the perturbations, above 0.
    norm : {"l2", "linf"}
        Directions of the Euclidean sphere, or corners of the cube.
    n_directions : int
        Random directions a row, at least 1.
    search_steps : int
        Halvings of the angle (resolution pi / 2**search_steps) or of the number of values, at least 1.
    attack_steps : int
        Gradients of each attack, at least 1.
    bounds : (float, float) or None
        Range of valid inputs, to which every perturbed input is clipped.
    generator : torch.Generator, int or None
        Source of directions and starts.
    progress : Progress, bool or None
        Reports groups of rows.

    Returns
    -------
    Sparsity

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an input or option is not allowed.

    Notes
    -----
    For the Euclidean norm the sparsity of a row in the direction u is the smallest angle a at which an attack succeeds
    in ``{d : |d| = epsilon, angle(d, u) <= a}``; for the other, the smallest k at which one succeeds that may change the
    first k values, in a random order, of a random corner of the cube. Both are bisected, all directions together; each
    attack starts from the best point known, moved into the smaller set, and what it finds counts with its own angle or
    number. An attack that fails proves nothing, so these are upper bounds; a direction from which nothing was found
    counts pi, or all values.

    Cost: up to ``n_directions * search_steps * attack_steps`` gradients a vulnerable row.

    References
    ----------
    Olivier and Raj (2023), arXiv:2207.04129.

    Examples
    --------
    >>> w = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    >>> x, y = torch.tensor([[0.5, 0.0]]), torch.tensor([0])
    >>> found = adversarial_sparsity(lambda z: z @ w, x, y, 1.0, bounds=None, n_directions=400, generator=0)
    >>> round(float(found.mean[0]), 1)  # angles of a third of the circle are broken: (2 pi / 3) ** 2 / (2 pi)
    0.7
    """
    checks.tensor("x", x)
    checks.labels("y", y, n=len(x))
    checks.positive("epsilon", epsilon)
    checks.one_of("norm", norm, ("l2", "linf"))
    for name, value in (
        ("n_directions", n_directions),
        ("search_steps", search_steps),
        ("attack_steps", attack_steps),
    ):
        checks.integer(name, value, low=1)
    around(x, norm, 0.0, bounds)  # refuses inputs outside the bounds
    g = as_generator(generator)
    oracle = Oracle.wrap(model)
    before = oracle.cost
    search = _search_angles if norm == "l2" else _search_values
    found = x.new_full((len(x), n_directions), torch.nan)
    with oracle.frozen():
        scores, labels = labels_for(oracle, x, y)
        correct = scores.argmax(1) == labels
        plain = projected_gradient(
            oracle, x, labels, around(x, norm, epsilon, bounds), n_steps=attack_steps, generator=g
        )
        vulnerable = correct & plain.success
        weak = vulnerable.nonzero()[:, 0]
        size = max(1, _VALUES // (n_directions * x[0].numel()))
        groups = weak.split(size) if len(weak) else ()
        for rows in track(groups, "adversarial sparsity", progress=progress):
            problem = _Problem(oracle, x[rows], labels[rows], epsilon, n_directions, bounds, attack_steps)
            found[rows] = search(problem, plain.x[rows] - x[rows], search_steps, g)
    unit = "radians" if norm == "l2" else "values"
    return Sparsity(found.mean(1), found, vulnerable, correct, unit, oracle.cost - before)


def sparsity_report(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    norm: Literal["l2", "linf"] = "l2",
    n_directions: int = 100,
    search_steps: int = 10,
    attack_steps: int = 20,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    generator: Seed = None,
    progress: ProgressLike = False,
) -> SparsityReport:
    """Return adversarial accuracy and the mean sparsity of the rows that fell, the two numbers to report together.

    Parameters
    ----------
    model, x, y, epsilon, norm, n_directions, search_steps, attack_steps, bounds, generator, progress
        As in :func:`adversarial_sparsity`.

    Returns
    -------
    SparsityReport

    Notes
    -----
    Rows that stand have no sparsity and are left out of its mean, so neither number says enough alone.

    References
    ----------
    Olivier and Raj (2023), arXiv:2207.04129.

    Examples
    --------
    >>> w = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    >>> x, y = torch.tensor([[0.5, 0.0], [3.0, 0.0]]), torch.tensor([0, 0])
    >>> report = sparsity_report(lambda z: z @ w, x, y, 1.0, bounds=None, n_directions=50, generator=0)
    >>> report.adversarial_accuracy, report.n_vulnerable
    (0.5, 1)
    """
    found = adversarial_sparsity(
        model, x, y, epsilon, norm=norm, n_directions=n_directions, search_steps=search_steps, attack_steps=attack_steps,
        bounds=bounds, generator=generator, progress=progress,
    )  # fmt: skip
    values = found.mean[found.vulnerable].double()
    standing = float((found.correct & ~found.vulnerable).double().mean())
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    mean = float(values.mean()) if len(values) else math.nan
    return SparsityReport(standing, mean, error, len(values), found.unit)


def cone_projection(delta: Tensor, direction: Tensor, angle: Tensor | float, epsilon: float) -> Tensor:
    """Move perturbations into the part of a sphere within an angle of a direction.

    Parameters
    ----------
    delta, direction : Tensor, shape (n, ...)
        Perturbations, and directions of norm one.
    angle : float or Tensor of shape (n,)
        Largest angle, in radians, in [0, pi].
    epsilon : float
        Norm of the result, above 0.

    Returns
    -------
    Tensor, shape (n, ...)
        The nearest point; for a perturbation exactly opposite to the direction, one of the nearest.

    Notes
    -----
    ``epsilon (cos(a) u + sin(a) d_perp / |d_perp|)`` where the angle of d to u is above a; else ``epsilon d / |d|``.

    References
    ----------
    Olivier and Raj (2023), arXiv:2207.04129, section 4.

    Examples
    --------
    >>> u = torch.tensor([[1.0, 0.0]])
    >>> cone_projection(torch.tensor([[0.0, 3.0]]), u, torch.pi / 6, 2.0)
    tensor([[1.7321, 1.0000]])
    """
    flat, u = delta.flatten(1), direction.flatten(1)
    a = torch.as_tensor(angle, dtype=flat.dtype, device=flat.device).reshape(-1, 1)
    along = (flat * u).sum(1, keepdim=True)
    across = flat - along * u
    # Once more, since what is left of a nearly parallel difference is mostly rounding.
    across = across - (across * u).sum(1, keepdim=True) * u
    width = torch.linalg.vector_norm(across, dim=1, keepdim=True)
    some = torch.zeros_like(u).scatter(1, u.abs().argmin(1, keepdim=True), 1.0)
    some = some - (some * u).sum(1, keepdim=True) * u
    across = torch.where(width > 0, across, some)
    across = across / torch.linalg.vector_norm(across, dim=1, keepdim=True).clamp_min(
        torch.finfo(flat.dtype).tiny
    )
    own = torch.atan2(width, along)
    held = torch.minimum(own, a)
    return (epsilon * (held.cos() * u + held.sin() * across)).reshape(delta.shape)


def pixel_projection(delta: Tensor, vertex: Tensor, free: Tensor, epsilon: float) -> Tensor:
    """Move perturbations to a corner of a cube, but for the values that are free inside it.

    Parameters
    ----------
    delta, vertex : Tensor, shape (n, ...)
        Perturbations, and corners of the cube.
    free : Tensor of bool, shape (n, ...)
        Values that may differ from the corner.
    epsilon : float
        Half the side of the cube, above 0.

    Returns
    -------
    Tensor, shape (n, ...)

    Notes
    -----
    ``clip(d, -epsilon, epsilon)`` where free, else the corner.

    References
    ----------
    Olivier and Raj (2023), arXiv:2207.04129, section 4.

    Examples
    --------
    >>> pixel_projection(torch.tensor([[2.0, 2.0]]), torch.tensor([[-1.0, -1.0]]), torch.tensor([[True, False]]), 1.0)
    tensor([[ 1., -1.]])
    """
    return torch.where(free, delta.clamp(-epsilon, epsilon), vertex)


class _Problem:
    """Some rows, each with all of its directions: pairs, row by row."""

    def __init__(
        self, oracle: Oracle, x: Tensor, y: Tensor, epsilon: float, k: int, bounds: tuple[float, float] | None, steps: int
    ) -> None:  # fmt: skip
        self.oracle, self.epsilon, self.k, self.bounds, self.steps = oracle, epsilon, k, bounds, steps
        self.rows, self.x, self.y = x, x.repeat_interleave(k, 0), y.repeat_interleave(k, 0)

    def at(self, delta: Tensor, pairs: Tensor | slice) -> Tensor:
        moved = self.x[pairs] + delta
        return moved if self.bounds is None else moved.clamp(*self.bounds)

    def wrong(self, delta: Tensor, pairs: Tensor | slice = slice(None)) -> Tensor:
        return self.oracle(self.at(delta, pairs)).argmax(1) != self.y[pairs]

    def attack(self, start: Tensor, pairs: Tensor, project: Callable[[Tensor], Tensor], ball: Ball) -> _Found:
        """Climb inside a set from a start in it; return the last wrong point of each pair, and whether there was one."""
        delta, found = start, start
        broken = torch.zeros(len(pairs), dtype=torch.bool, device=start.device)
        for step in range(self.steps):
            fall = half_cosine(step, self.steps)
            lead, gradient = self.oracle.value_and_gradient(
                self.at(delta, pairs), self.y[pairs], objective=softened_margin(fall)
            )
            found = torch.where(column(lead < 0, delta), delta, found)
            broken |= lead < 0
            delta = project(delta - (0.1 + 1.9 * fall) * ball.maximiser(gradient))
        last = self.wrong(delta, pairs)
        return torch.where(column(last, delta), delta, found), broken | last

    def climbed(self, start: Tensor, project: Callable[[Tensor], Tensor], ball: Ball) -> _Found:
        """Attack every row once with its first pair, in the whole set, and give all of its pairs what was found."""
        first = torch.arange(0, len(self.x), self.k, device=self.x.device)
        found, broken = self.attack(start, first, project, ball)
        return found.repeat_interleave(self.k, 0), broken.repeat_interleave(self.k)


def _search_angles(problem: _Problem, plain: Tensor, n_halvings: int, generator: torch.Generator) -> Tensor:
    """Return the smallest angle of a success for every row and direction, shape (rows, k)."""
    eps, k = problem.epsilon, problem.k
    # Direction by direction for each row, so that the draws do not depend on how rows are grouped.
    u = torch.cat([Sphere(1.0).sample(row[None], generator=generator, n=k) for row in problem.rows])
    best, broken = problem.climbed(Sphere(eps).project(plain), Sphere(eps).project, Ball("l2", eps))
    high = torch.where(broken, _angle(best, u), math.pi)
    high = torch.where(problem.wrong(eps * u), 0.0, high)
    low = torch.zeros_like(high)
    for _ in range(n_halvings):
        pairs = (high > low).nonzero()[:, 0]
        if len(pairs) == 0:
            break
        angle, axis = (low[pairs] + high[pairs]) / 2, u[pairs]

        def project(delta: Tensor, axis: Tensor = axis, angle: Tensor = angle) -> Tensor:
            return cone_projection(delta, axis, angle, eps)

        found, broken = problem.attack(project(best[pairs]), pairs, project, Ball("l2", eps))
        hit = pairs[broken]
        best[hit] = found[broken]
        high[hit] = torch.minimum(_angle(found[broken], axis[broken]), angle[broken])
        low[pairs[~broken]] = angle[~broken]
    return high.reshape(-1, k)


def _search_values(problem: _Problem, plain: Tensor, n_halvings: int, generator: torch.Generator) -> Tensor:
    """Return the smallest number of freed values of a success for every row and corner, shape (rows, k)."""
    eps, k = problem.epsilon, problem.k
    d = problem.rows[0].numel()
    orders = [randperm(d, generator=generator, device=problem.x.device) for _ in problem.x]
    place = torch.stack(orders).reshape(problem.x.shape)
    corner = eps * rademacher(problem.x.shape, generator=generator, like=problem.x)
    best, _ = problem.climbed(plain, Ball("linf", eps).project, Ball("linf", eps))
    high = torch.where(problem.wrong(corner), 0, d)
    low = torch.zeros_like(high)
    for _ in range(n_halvings):
        pairs = (high - low > 1).nonzero()[:, 0]
        if len(pairs) == 0:
            break
        count = (low[pairs] + high[pairs]) // 2
        free, vertex = place[pairs] < column(count, best), corner[pairs]

        def project(delta: Tensor, vertex: Tensor = vertex, free: Tensor = free) -> Tensor:
            return pixel_projection(delta, vertex, free, eps)

        found, broken = problem.attack(project(best[pairs]), pairs, project, Ball("linf", eps))
        hit = pairs[broken]
        best[hit] = found[broken]
        changed = torch.where(found != vertex, place[pairs] + 1, 0).flatten(1).amax(1)
        high[hit] = changed[broken]
        low[pairs[~broken]] = count[~broken]
    return high.to(problem.x.dtype).reshape(-1, k)


def _angle(delta: Tensor, direction: Tensor) -> Tensor:
    """Return the angle to a direction, accurate near zero and pi."""
    flat, u = delta.flatten(1), direction.flatten(1)
    along = (flat * u).sum(1)
    return torch.atan2(torch.linalg.vector_norm(flat - along[:, None] * u, dim=1), along)
