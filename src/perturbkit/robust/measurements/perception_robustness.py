"""The perception-robustness tradeoff: a deterministic restorer whose outputs look like the truth must be steep.

Use it to say how well the outputs of a restorer (denoising, super-resolution, imputation) and its inputs together resemble the
true pairs, how steep it is, and to use the steepness: to draw several plausible answers from a restorer that gives one. Ohayon,
Michaeli and Elad (2023), The Perception-Robustness Tradeoff in Deterministic Image Restoration, arXiv:2311.09253.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from perturbkit.core import Cost, Oracle, Result, Sphere, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randn
from perturbkit.robust.attacks._parts import column, half_cosine
from perturbkit.robust.measurements._perception import (
    GaussianProblem,
    TwoPointProblem,
    joint_perceptual_index,
)

__all__ = [
    "GaussianProblem",
    "LipschitzEstimate",
    "PosteriorExploration",
    "TradeoffCurve",
    "TwoPointProblem",
    "estimate_lipschitz",
    "explore_posterior",
    "fit_lipschitz_bound",
    "joint_perceptual_index",
    "lipschitz_lower_bound",
    "tradeoff_curve",
]

Restorer = Oracle | nn.Module | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LipschitzEstimate(Result):
    """How steep a function is near each row; a lower bound.

    Attributes
    ----------
    values : Tensor, shape (n,)
        Largest ``|f(y + d) - f(y)| / |d|`` found.
    delta : Tensor
        The d of each row, in the shape of the inputs.
    cost : Cost
        Evaluations spent.
    """

    values: Tensor
    delta: Tensor
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True, eq=False)
class PosteriorExploration(Result):
    """Answers of a restorer to noisy copies of each input.

    Attributes
    ----------
    samples : Tensor, shape (n, n_samples, ...)
        The answers.
    consistent : Tensor of bool, shape (n, n_samples)
        Whether their degraded copy is as near to the input as the tolerance says; true without a degradation.
    error : Tensor, shape (n, n_samples)
        Root mean square distance of the degraded copy from the input; zero without a degradation.
    """

    samples: Tensor
    consistent: Tensor
    error: Tensor

    @property
    def diversity(self) -> Tensor:
        """Root mean square standard deviation of a row's consistent answers, shape (n,); zero below two of them."""
        rows = self.samples.flatten(2)
        kept = self.consistent[..., None]
        count = kept.sum(1)
        mean = torch.where(kept, rows, 0.0).sum(1) / count.clamp_min(1)
        gap = torch.where(kept, rows - mean[:, None], 0.0)
        variance = gap.square().sum(1) / (count - 1).clamp_min(1)
        return torch.where(count[:, 0] > 1, variance.mean(1).sqrt(), 0.0)


@dataclass(frozen=True, eq=False)
class TradeoffCurve(Result):
    """Restorers of one degradation, side by side.

    Attributes
    ----------
    names : tuple of str
        Of the restorers.
    index, lipschitz, distortion : Tensor, shape (restorers,)
        Joint perceptual index, largest local Lipschitz constant found, and root mean square error.
    m1, m2 : float
        Constants of the tightest bound that the restorers obey; see :func:`fit_lipschitz_bound`.
    """

    names: tuple[str, ...]
    index: Tensor
    lipschitz: Tensor
    distortion: Tensor
    m1: float
    m2: float


def lipschitz_lower_bound(index: float, m1: float, m2: float) -> float:
    """Return how steep a restorer of a perceptual index must be: ``m1 / sqrt(index) - m2``.

    Parameters
    ----------
    index : float
        Joint perceptual index, zero or above; at zero the bound is infinite.
    m1, m2 : float
        Constants of the problem, zero or above; see :func:`fit_lipschitz_bound`.

    Returns
    -------
    float

    Raises
    ------
    ArgumentError
        If a number is negative.

    Notes
    -----
    The theorem says that some constants above zero exist if the degradation cannot be inverted; it does not give them.

    References
    ----------
    Ohayon, Michaeli and Elad (2023), arXiv:2311.09253, theorem 3.1.

    Examples
    --------
    >>> lipschitz_lower_bound(0.25, 1.0, 0.5)
    1.5
    """
    checks.nonnegative("index", index)
    checks.nonnegative("m1", m1)
    checks.nonnegative("m2", m2)
    return (math.inf if m1 > 0 else 0.0) - m2 if index == 0 else m1 / math.sqrt(index) - m2


def fit_lipschitz_bound(index: Tensor, lipschitz: Tensor) -> tuple[float, float]:
    """Fit the constants of the lower bound: the line in ``index^{-1/2}`` below all restorers and nearest to them.

    Parameters
    ----------
    index, lipschitz : Tensor, shape (m,)
        Joint perceptual index and Lipschitz constant of at least two restorers, zero or above.

    Returns
    -------
    (float, float)
        m1 and m2, zero or above; both zero where an index is, since no other line is below a finite constant there.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If shapes or values are not allowed.

    Notes
    -----
    Maximises ``sum_i (m1 index_i^{-1/2} - m2)`` subject to ``m1 index_i^{-1/2} - m2 <= L_i``, a linear program.

    References
    ----------
    Ohayon, Michaeli and Elad (2023), arXiv:2311.09253, theorem 3.1.

    Examples
    --------
    >>> m1, m2 = fit_lipschitz_bound(torch.tensor([1.0, 0.25, 0.0625]), torch.tensor([1.0, 3.0, 9.0]))
    >>> round(m1, 6), round(m2, 6)
    (3.0, 3.0)
    """
    from scipy.optimize import linprog

    checks.tensor("index", index, ndim=1)
    checks.same_shape("lipschitz", checks.tensor("lipschitz", lipschitz), "index", index)
    checks.integer("the number of restorers", len(index), low=2)
    checks.nonnegative("the least index", float(index.min()))
    checks.nonnegative("the least Lipschitz constant", float(lipschitz.min()))
    if bool((index == 0).any()):
        return 0.0, 0.0
    t, steep = index.detach().double().rsqrt().cpu().numpy(), lipschitz.detach().double().cpu().numpy()
    rows = np.stack([t, -np.ones_like(t)], 1)
    solved = linprog(-rows.sum(0), A_ub=rows, b_ub=steep, bounds=[(0, None), (0, None)])
    return float(solved.x[0]), float(solved.x[1])


def estimate_lipschitz(
    restorer: Restorer,
    y: Tensor,
    radius: float | Sequence[float],
    *,
    n_steps: int = 20,
    n_restarts: int = 5,
    generator: Seed = None,
    progress: ProgressLike = False,
) -> LipschitzEstimate:
    """Search the surroundings of each input for the steepest change of the output.

    Parameters
    ----------
    restorer : Oracle, nn.Module or callable
        Maps (n, ...) to outputs of any shape (n, ...).
    y : Tensor, shape (n, ...)
        Inputs.
    radius : float or sequence of float
        Lengths of the changes that are tried, above zero; the least of several is the nearest to the gradient.
    n_steps, n_restarts : int
        Steps of a start, and starts a radius, at least 1.
    generator : torch.Generator, int or None
        Source of the starts.
    progress : Progress, bool or None
        Reports steps.

    Returns
    -------
    LipschitzEstimate

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.
    ModelError
        If an answer to an input itself is not finite.

    Notes
    -----
    Projected gradient ascent of ``|f(y + d) - f(y)|`` on the sphere ``|d| = r``, whose steps fall from four radii to a fifth
    along half a cosine; long steps are those of power iteration on ``J^T J``. The best of all points visited counts.

    Cost: two evaluations and a gradient a row, step, start and radius.

    References
    ----------
    Ohayon, Michaeli and Elad (2023), arXiv:2311.09253, section 5.

    Examples
    --------
    >>> found = estimate_lipschitz(lambda y: torch.stack([3 * y[:, 0], y[:, 1]], 1), torch.zeros(1, 2), 0.1, generator=0)
    >>> round(float(found.values[0]), 3)
    3.0
    """
    checks.tensor("y", y)
    radii = [checks.positive("radius", float(r)) for r in checks.array("radius", radius, ndim=(0, 1)).ravel()]
    checks.integer("n_steps", n_steps, low=1)
    checks.integer("n_restarts", n_restarts, low=1)
    g = as_generator(generator)
    oracle = Oracle.wrap(restorer)
    before = oracle.cost
    best, at = torch.zeros(len(y), dtype=y.dtype, device=y.device), torch.zeros_like(y)
    with oracle.frozen():
        clean = oracle(y)
        if not bool(clean.isfinite().all()):
            raise checks.ModelError(
                f"the restorer answered {int((~clean.isfinite()).sum())} NaN or infinite values; allowed: finite numbers. "
                "Leave out the inputs that it cannot restore."
            )
        for r in (r for r in radii for _ in range(n_restarts)):
            sphere = Sphere(r)
            delta = sphere.sample(y, generator=g)
            for step in track(range(n_steps + 1), "steepness", progress=progress):
                change = oracle(y + delta) - clean
                # By what was really added: y + d is rounded.
                moved = ((y + delta) - y).flatten(1).norm(dim=1).clamp_min(torch.finfo(y.dtype).tiny)
                ratio = change.flatten(1).norm(dim=1) / moved
                better = ratio > best
                best, at = torch.where(better, ratio, best), torch.where(column(better, y), delta, at)
                if step < n_steps:
                    _, uphill = oracle.vjp(y + delta, change)
                    stride = Sphere(r * (0.2 + 3.8 * half_cosine(step, n_steps)))
                    still = uphill.flatten(1).norm(dim=1) == 0
                    stepped = sphere.project(delta + stride.maximiser(uphill))
                    delta = torch.where(column(still, y), sphere.sample(y, generator=g), stepped)
    return LipschitzEstimate(best, at, oracle.cost - before)


def tradeoff_curve(
    restorers: Mapping[str, Restorer],
    degradation: Callable[[Tensor, torch.Generator], Tensor],
    x: Tensor,
    *,
    radius: float | Sequence[float] = 0.05,
    n_probed: int = 50,
    p: float = 2,
    method: Literal["exact", "sliced"] = "exact",
    n_steps: int = 20,
    n_restarts: int = 2,
    generator: Seed = None,
) -> TradeoffCurve:
    """Measure restorers of one degradation on the same data.

    Parameters
    ----------
    restorers : mapping of str to Oracle, nn.Module or callable
        At least two, which map degraded signals to restored ones.
    degradation : callable (x, generator) -> y
        Degrades signals (n, ...).
    x : Tensor, shape (n, ...)
        True signals.
    radius, n_steps, n_restarts
        As in :func:`estimate_lipschitz`.
    n_probed : int
        Rows around which the steepness is searched, the first of x, at least 1.
    p, method
        As in :func:`joint_perceptual_index`.
    generator : torch.Generator, int or None
        Source of everything.

    Returns
    -------
    TradeoffCurve

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    The largest of the local constants stands for the Lipschitz constant, of which it is a lower bound.

    References
    ----------
    Ohayon, Michaeli and Elad (2023), arXiv:2311.09253, section 5.

    Examples
    --------
    >>> toy = TwoPointProblem(1.0)
    >>> x, _ = toy.sample(200, generator=0)
    >>> found = tradeoff_curve({"mean": toy.restorer(1.0), "steep": toy.restorer(9.0)}, toy.degrade, x, generator=0)
    >>> bool(found.index[1] < found.index[0]), bool(found.lipschitz[1] > found.lipschitz[0])
    (True, True)
    """
    checks.tensor("x", x)
    checks.integer("n_probed", n_probed, low=1)
    if not isinstance(restorers, Mapping):
        raise checks.ArgumentTypeError(
            f"restorers is a {type(restorers).__name__}; allowed: a mapping of names to restorers. Pass a dict."
        )
    if not callable(degradation):
        raise checks.ArgumentTypeError(
            f"degradation is a {type(degradation).__name__}; allowed: a callable (x, generator). Pass a function."
        )
    checks.integer("the number of restorers", len(restorers), low=2)
    g = as_generator(generator)
    y = checks.tensor("the degradation's answer", degradation(x, g))
    indices, steepness, errors = [], [], []
    for restorer in restorers.values():
        x_hat = Oracle.wrap(restorer)(y)
        # The same directions for all of them.
        indices.append(joint_perceptual_index(x, y, x_hat, p=p, method=method, generator=0))
        found = estimate_lipschitz(
            restorer, y[:n_probed], radius, n_steps=n_steps, n_restarts=n_restarts, generator=g
        )
        steepness.append(float(found.values.max()))
        errors.append(float((x_hat - x).square().mean().sqrt()))
    index, lipschitz, distortion = (x.new_tensor(v) for v in (indices, steepness, errors))
    return TradeoffCurve(
        tuple(restorers), index, lipschitz, distortion, *fit_lipschitz_bound(index, lipschitz)
    )


def explore_posterior(
    restorer: Restorer,
    y: Tensor,
    n_samples: int,
    scale: float,
    *,
    degradation: Callable[[Tensor], Tensor] | None = None,
    tolerance: float | None = None,
    generator: Seed = None,
) -> PosteriorExploration:
    """Draw several plausible answers from a deterministic restorer, by noise on its input.

    Parameters
    ----------
    restorer : Oracle, nn.Module or callable
        Maps (n, ...) to restored signals.
    y : Tensor, shape (n, ...)
        Inputs.
    n_samples : int
        Draws an input, at least 1.
    scale : float
        Standard deviation of the noise, zero or above; well below what the measurement itself is off by.
    degradation : callable, optional
        The degradation without its noise, by which answers are compared with their input.
    tolerance : float, optional
        Largest root mean square distance of a consistent answer; twice ``scale`` by default.
    generator : torch.Generator, int or None
        Source of the noise.

    Returns
    -------
    PosteriorExploration

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    Answers ``f(y + s e)`` spread like the posterior only if f is steep; those of the mean square restorer hardly move.

    Cost: ``n_samples`` evaluations a row.

    References
    ----------
    Ohayon, Michaeli and Elad (2023), arXiv:2311.09253, section 6.

    Examples
    --------
    >>> steep, flat = (lambda y: torch.sign(y)), (lambda y: 0.5 * y)
    >>> y = torch.full((1, 1), 0.01)
    >>> [bool(explore_posterior(f, y, 50, 0.1, generator=0).diversity > 0.5) for f in (steep, flat)]
    [True, False]
    """
    checks.tensor("y", y)
    checks.integer("n_samples", n_samples, low=1)
    checks.nonnegative("scale", scale)
    limit = 2 * scale if tolerance is None else checks.nonnegative("tolerance", tolerance)
    noise = randn((len(y), n_samples, *y.shape[1:]), generator=as_generator(generator), like=y)
    answers = Oracle.wrap(restorer)((y[:, None] + scale * noise).flatten(0, 1))
    error = torch.zeros(len(y), n_samples, dtype=answers.dtype, device=answers.device)
    if degradation is not None:
        again = Oracle.wrap(degradation)(answers)
        if again.shape[1:] != y.shape[1:]:
            raise checks.ArgumentError(
                f"degradation answered shape {tuple(again.shape)}; allowed: (n, ...) as y has, {('n', *y.shape[1:])}. "
                "Pass the degradation that y comes from."
            )
        error = (
            (again.reshape(len(y), n_samples, *y.shape[1:]) - y[:, None]).flatten(2).square().mean(2).sqrt()
        )
    return PosteriorExploration(answers.reshape(len(y), n_samples, *answers.shape[1:]), error <= limit, error)
