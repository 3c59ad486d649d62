"""Infidelity: whether an explanation predicts how the output changes under perturbations that mean something.

Use it to compare explanations of any kind on one scale, and :func:`optimal_infidelity_explanation` for the best there
can be under the same perturbations.
Yeh, Hsieh, Suggala, Inouye and Ravikumar (2019), On the (In)fidelity and Sensitivity for Explanations, arXiv:1901.09392.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from perturbkit.core import Attribution, Cost, Distribution, Gaussian, Oracle, Result, checks, track
from perturbkit.core.perturbation import all_masks
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randint, randn, uniform
from perturbkit.explain.metrics._parts import BLOCK, Model, as_slopes, blocks, repeated
from perturbkit.explain.removal._parts import expanded_baseline

__all__ = [
    "ExplanationScore",
    "NoisyBaseline",
    "SquareRemoval",
    "SubsetToBaseline",
    "infidelity",
    "optimal_infidelity_explanation",
]


@dataclass(frozen=True, eq=False)
class ExplanationScore(Result):
    """How good explanations are by one metric, row by row.

    Attributes
    ----------
    values : Tensor, shape (n,)
        The score of each row.
    metric : str
        Name of the metric.
    better : str
        "lower" or "higher": which end is good.
    cost : Cost
        Evaluations spent.
    extras : dict
        What the metric adds.
    """

    values: Tensor
    metric: str
    better: str
    cost: Cost = field(default_factory=Cost)
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class NoisyBaseline:
    """Perturbations I = x - (baseline + noise): the input is replaced by a noisy baseline.

    Parameters
    ----------
    baseline : float or Tensor
        A number, or a tensor that broadcasts to the inputs.
    sigma : float
        Standard deviation of the noise, zero or above.

    Notes
    -----
    ``sample(like)`` takes the inputs themselves and draws one perturbation for each of them.

    Examples
    --------
    >>> NoisyBaseline(0.0, sigma=0.0).sample(torch.tensor([[1.0, 2.0]]))
    tensor([[1., 2.]])
    """

    baseline: Tensor | float = 0.0
    sigma: float = 0.1

    def __post_init__(self) -> None:
        checks.nonnegative("sigma", self.sigma)

    def sample(self, like: Tensor, *, generator: Seed = None, n: int | None = None) -> Tensor:
        """Draw one perturbation a row of ``like``, the inputs."""
        noise = randn(like.shape, generator=as_generator(generator), like=like)
        return like - expanded_baseline(self.baseline, like) - self.sigma * noise


@dataclass(frozen=True, eq=False)
class SquareRemoval:
    """Perturbations that bring a random square of an image to the baseline.

    Parameters
    ----------
    sizes : (int, int)
        Smallest and largest side in pixels; each side is equally likely, and so is each place inside the image.
    baseline : float or Tensor
        A number, or a tensor that broadcasts to the images.

    Notes
    -----
    I = (x - baseline) inside the square and zero outside. A side beyond the image is cut to the image.

    Examples
    --------
    >>> SquareRemoval((1, 1)).sample(torch.ones(2, 1, 3, 3), generator=0).sum((1, 2, 3))
    tensor([1., 1.])
    """

    sizes: tuple[int, int] = (1, 10)
    baseline: Tensor | float = 0.0

    def __post_init__(self) -> None:
        low, high = self.sizes
        checks.integer("sizes", high, low=checks.integer("sizes", low, low=1))

    def sample(self, like: Tensor, *, generator: Seed = None, n: int | None = None) -> Tensor:
        """Draw one perturbation a row of ``like``, the images."""
        checks.image_batch("x", like)
        g, inside = as_generator(generator), []
        side = randint(self.sizes[0], self.sizes[1] + 1, (len(like),), generator=g, device=like.device)
        for length in like.shape[2:]:
            cut = side.clamp(max=length)
            start = (
                uniform((len(like),), generator=g, dtype=torch.float64).to(like.device) * (length - cut + 1)
            ).long()
            place = torch.arange(length, device=like.device) - start[:, None]
            inside.append((place >= 0) & (place < cut[:, None]))
        square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return (like - expanded_baseline(self.baseline, like)) * square


@dataclass(frozen=True, eq=False)
class SubsetToBaseline:
    """Perturbations that bring a random subset of the features to the baseline.

    Parameters
    ----------
    p : float
        Chance of each feature to be removed, in (0, 1).
    baseline : float or Tensor
        A number, or a tensor that broadcasts to the inputs.
    weights : {"uniform", "shapley"}
        Of the subsets in :meth:`enumerate`: all alike, or the Shapley kernel, under which the full set is a
        constraint and the best explanation holds Shapley values.

    Notes
    -----
    I = x - baseline on the subset and zero elsewhere.

    Examples
    --------
    >>> SubsetToBaseline().enumerate(torch.tensor([[3.0, 5.0]]))[0][:, 0]
    tensor([[0., 0.],
            [3., 0.],
            [0., 5.],
            [3., 5.]])
    """

    p: float = 0.5
    baseline: Tensor | float = 0.0
    weights: Literal["uniform", "shapley"] = "uniform"

    def __post_init__(self) -> None:
        checks.between("p", self.p, 0, 1, inclusive="neither")
        checks.one_of("weights", self.weights, ("uniform", "shapley"))

    def sample(self, like: Tensor, *, generator: Seed = None, n: int | None = None) -> Tensor:
        """Draw one perturbation a row of ``like``, the inputs."""
        removed = uniform(like.shape, generator=as_generator(generator), like=like) < self.p
        return (like - expanded_baseline(self.baseline, like)) * removed

    def enumerate(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return all perturbations of at most 20 features, shape (m, n, ...), and their weights, shape (m,)."""
        d = like[0].numel()
        removed = all_masks(d, like=like)
        size = removed.sum(1)
        weights = torch.ones_like(size)
        if self.weights == "shapley":
            log_choose = torch.lgamma(torch.tensor(d + 1.0).to(size)) - (
                torch.lgamma(size + 1) + torch.lgamma(d - size + 1)
            )
            weights = (d - 1) / (log_choose.exp() * size * (d - size))  # infinite for the full set
            weights[0] = 0.0  # the empty set says nothing: I = 0
        change = like - expanded_baseline(self.baseline, like)
        return change * removed.reshape(-1, 1, *like.shape[1:]), weights


def infidelity(
    model: Model,
    x: Tensor,
    explanation: Attribution | Tensor,
    target: Tensor | int | None = None,
    *,
    perturbation: Distribution | None = None,
    baseline: Tensor | float | None = None,
    n_samples: int = 1000,
    normalize: bool = False,
    generator: Seed = None,
    progress: ProgressLike = False,
) -> ExplanationScore:
    """Score explanations by how well they predict the change of the output under perturbations.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Function of a batch (n, ...), answering (n, outputs) or (n,).
    x : Tensor, shape (n, ...)
        Inputs, floating point.
    explanation : Attribution or Tensor, shape of ``x``
        Explanations of the rows, by any method.
    target : Tensor of shape (n,), int or None
        The output explained.
    perturbation : Distribution, optional
        Draws I, **which is subtracted**: the model is asked at ``x - I``. ``sample(like, generator=...)`` is given the
        inputs. ``Gaussian(0.1)`` by default; ``SquareRemoval``, ``SubsetToBaseline``, ``NoisyBaseline`` or any of core.
    baseline : float or Tensor, optional
        Leave out for explanations that are slopes (a gradient: output a unit of input). Give it for shares of the
        output (integrated gradients, occlusion, Shapley values), which are divided by ``x - baseline`` first, and are
        zero where that is zero.
    n_samples : int
        Perturbations a row.
    normalize : bool
        Scale each explanation by its best factor before measuring, so that scale does not decide.
    generator : torch.Generator, int or None
        Source of the perturbations.
    progress : Progress, bool or None
        Reports blocks of perturbations.

    Returns
    -------
    ExplanationScore
        Lower is better; ``extras["scale"]`` is the best factor of each row.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``INFD = E[(<I, phi> - (F(x) - F(x - I)))^2]``; with ``normalize`` phi is multiplied by
    ``b* = E[<I, phi> (F(x) - F(x - I))] / E[<I, phi>^2]``.

    Cost: ``n_samples + 1`` evaluations a row.

    References
    ----------
    Yeh et al. (2019), arXiv:1901.09392, definition 2.1.

    Examples
    --------
    >>> w = torch.tensor([1.0, -2.0])
    >>> infidelity(lambda x: x @ w, torch.ones(1, 2), w[None], n_samples=8, generator=0).values.round(decimals=4)
    tensor([0.])
    """
    oracle, phi = Oracle.wrap(model), as_slopes(explanation, checks.tensor("x", x), baseline)
    checks.integer("n_samples", n_samples, low=1)
    source, draw = as_generator(generator), perturbation or Gaussian(0.1)
    before = oracle.cost
    # With a the predicted and c the true change: E[a^2], E[a c] and E[(a - c)^2], in double, since they cancel.
    moments = [torch.zeros(len(x), dtype=torch.float64, device=x.device) for _ in range(3)]
    for drawn, change in track(
        _changes(oracle, x, target, draw, n_samples, source),
        "infidelity", total=len(blocks(x, n_samples)), progress=progress,
    ):  # fmt: skip
        predicted, true = (drawn * phi).flatten(2).sum(2).double(), change.double()
        for moment, product in zip(
            moments, (predicted**2, predicted * true, (predicted - true) ** 2), strict=True
        ):
            moment += product.sum(0) / n_samples
    scale = torch.where(moments[0] > 0, moments[1] / moments[0], torch.zeros_like(moments[0]))
    b = scale if normalize else torch.ones_like(scale)
    values = (moments[2] + (b**2 - 1) * moments[0] - 2 * (b - 1) * moments[1]).clamp(min=0)
    return ExplanationScore(
        values.to(x.dtype), "infidelity", "lower", oracle.cost - before, {"scale": scale.to(x.dtype)}
    )


def optimal_infidelity_explanation(
    model: Model,
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    perturbation: Distribution | None = None,
    n_samples: int | None = 2000,
    ridge: float = 0.0,
    generator: Seed = None,
    progress: ProgressLike = False,
) -> Attribution:
    """Return the explanation of least infidelity under a distribution of perturbations.

    Parameters
    ----------
    model, x, target, perturbation, generator, progress
        As in :func:`infidelity`.
    n_samples : int or None
        Perturbations a row, at least as many as features for a unique answer. ``None``: all of them once, with their
        weights, for a perturbation that has ``enumerate``.
    ridge : float
        Added to the diagonal of E[I I^T]; with zero the solution of least norm is taken.

    Returns
    -------
    Attribution
        ``values`` are slopes: output a unit of perturbation.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``phi* = (E[I I^T] + ridge)^-1 E[I (F(x) - F(x - I))]``, which is also the average of integrated gradients from
    ``x - I`` to ``x``, smoothed by I I^T. Perturbations of infinite weight are met exactly.

    Cost: ``n_samples + 1`` evaluations a row, and one solve of a d x d system.

    References
    ----------
    Yeh et al. (2019), arXiv:1901.09392, proposition 2.1.

    Examples
    --------
    >>> f = lambda x: 3 * x[:, 0] - x[:, 1]
    >>> optimal_infidelity_explanation(f, torch.ones(1, 2), generator=0).values.round(decimals=3)
    tensor([[ 3., -1.]])
    """
    oracle = Oracle.wrap(model)
    checks.tensor("x", x)
    checks.nonnegative("ridge", ridge)
    draw, source, before = perturbation or Gaussian(0.1), as_generator(generator), oracle.cost
    if n_samples is None and not hasattr(draw, "enumerate"):
        raise checks.ArgumentError(
            f"n_samples is None for a {type(draw).__name__}, which has no enumerate; allowed: a number of samples. "
            "Pass n_samples=2000, or a perturbation that can list all of its values."
        )
    values, d, rows = torch.empty_like(x), x[0].numel(), repeated(target, x)
    # Rows are solved in groups whose d x d systems fit the block.
    group = max(1, BLOCK // d**2)
    starts = range(0, len(x), group)
    for start in track(starts, "optimal explanation", progress=progress):
        part = x[start : start + group]
        label = None if rows is None else rows[start : start + group]
        system = _System(part)
        if n_samples is None:
            drawn, weights = draw.enumerate(part)  # type: ignore[attr-defined]
            true = _change(oracle, part, label, drawn, oracle.value(part, label))
            system.add(drawn, true, weights)
        else:
            checks.integer("n_samples", n_samples, low=1)
            for drawn, true in _changes(oracle, part, label, draw, n_samples, source):
                system.add(drawn, true, drawn.new_full((len(drawn),), 1 / n_samples))
        values[start : start + group] = system.solve(ridge).to(x.dtype).reshape(part.shape)
    return Attribution(values, rows, oracle.cost - before, "optimal infidelity explanation")


class _System:
    """Weighted normal equations of ``<I, phi> = b``, one system a row, with constraints where weights are infinite."""

    def __init__(self, x: Tensor) -> None:
        n, d = len(x), x[0].numel()
        self.matrix = torch.zeros(n, d, d, dtype=torch.float64, device=x.device)
        self.right = torch.zeros(n, d, dtype=torch.float64, device=x.device)
        self.fixed: list[tuple[Tensor, Tensor]] = []

    def add(self, drawn: Tensor, true: Tensor, weights: Tensor) -> None:
        flat, change, w = drawn.flatten(2).double(), true.double(), weights.double()
        hard = w.isinf()
        soft = ~hard
        self.matrix += torch.einsum("mnd,m,mne->nde", flat[soft], w[soft], flat[soft])
        self.right += torch.einsum("mnd,m,mn->nd", flat[soft], w[soft], change[soft])
        if bool(hard.any()):
            self.fixed.append((flat[hard].transpose(0, 1), change[hard].T))

    def solve(self, ridge: float) -> Tensor:
        matrix, right = self.matrix, self.right
        d = right.shape[1]
        matrix = matrix + ridge * torch.eye(d, dtype=matrix.dtype, device=matrix.device)
        for rows, values in self.fixed:  # [n, k, d], [n, k]: the multipliers join the unknowns
            k = rows.shape[1]
            corner = torch.zeros(len(rows), k, k, dtype=matrix.dtype, device=matrix.device)
            matrix = torch.cat([torch.cat([matrix, rows.mT], 2), torch.cat([rows, corner], 2)], 1)
            right = torch.cat([right, values], 1)
        return (torch.linalg.pinv(matrix, hermitian=True) @ right[..., None])[:, :d, 0]


def _changes(
    oracle: Oracle,
    x: Tensor,
    target: Tensor | int | None,
    draw: Distribution,
    n: int,
    source: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of perturbations (m, n, ...) and the changes of the output that they cause (m, n)."""
    whole = oracle.value(x, target)
    for size in blocks(x, n):
        rows = x.repeat(size, *[1] * (x.ndim - 1))
        drawn = draw.sample(rows, generator=source).reshape(size, *x.shape)
        yield drawn, _change(oracle, x, target, drawn, whole)


def _change(oracle: Oracle, x: Tensor, target: Tensor | int | None, drawn: Tensor, whole: Tensor) -> Tensor:
    after = oracle.value((x - drawn).flatten(0, 1), repeated(target, x, len(drawn)))
    return whole - after.reshape(len(drawn), len(x))
