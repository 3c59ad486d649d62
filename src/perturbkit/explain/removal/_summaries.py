"""The summaries of the framework: what is told of the values of all subsets of parts."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perturbkit.core import all_masks, checks
from perturbkit.core.random import uniform
from perturbkit.explain.removal._lime import cosine_kernel, weighted_ridge
from perturbkit.explain.removal._parts import kernel_masks, order_masks, shapley_coefficients, shapley_kernel

# Values (m, rows) of subsets, given as masks (m, parts).
SetFunction = Callable[[Tensor], Tensor]

_EXACT, _SAMPLES = 12, 2048


class Summary(ABC):
    """What a summary is: scores (rows, parts) from a set function; values are in double precision."""

    @abstractmethod
    def scores(self, u: SetFunction, d: int, generator: torch.Generator) -> Tensor:
        """Return one score a part for each row."""


@dataclass(frozen=True)
class _Sampled(Summary):
    n_samples: int | None = None

    def number(self, d: int) -> int | None:
        """Return how many subsets to draw, or ``None`` for all of them."""
        if self.n_samples is not None:
            return checks.integer("n_samples", self.n_samples, low=2)
        return None if d <= _EXACT else _SAMPLES


@dataclass(frozen=True)
class RemoveIndividual(Summary):
    """``a_i = u(D) - u(D without i)``.

    Parameters
    ----------
    None
    """

    def scores(self, u: SetFunction, d: int, generator: torch.Generator) -> Tensor:
        values = u(torch.cat((torch.ones(1, d), 1 - torch.eye(d))) > 0)
        return (values[:1] - values[1:]).T


@dataclass(frozen=True)
class IncludeIndividual(Summary):
    """``a_i = u({i}) - u({})``.

    Parameters
    ----------
    None
    """

    def scores(self, u: SetFunction, d: int, generator: torch.Generator) -> Tensor:
        values = u(torch.cat((torch.zeros(1, d), torch.eye(d))) > 0)
        return (values[1:] - values[:1]).T


@dataclass(frozen=True)
class Shapley(_Sampled):
    """The mean of ``u(S and i) - u(S)`` over the orders in which parts can come.

    Attributes
    ----------
    n_samples : int or None
        Orders (permutation) or subsets (kernel) drawn; ``None``: all of them up to 12 parts, else 2048.
    estimator : {"permutation", "kernel"}
        Average over orders, or the weighted least squares of KernelSHAP with paired subsets.
    """

    estimator: Literal["permutation", "kernel"] = "permutation"

    def scores(self, u: SetFunction, d: int, generator: torch.Generator) -> Tensor:
        checks.one_of("estimator", self.estimator, ("permutation", "kernel"))
        if self.estimator == "kernel":
            return LinearModel(self.n_samples, "shapley").scores(u, d, generator)
        n = self.number(d)
        if n is None:
            masks = all_masks(d)
            return u(masks > 0).T @ shapley_coefficients(masks)
        masks = order_masks(d, n, generator)
        values = u(masks.flatten(0, 1)).reshape(n, d + 1, -1)
        came = (masks[:, 1:] & ~masks[:, :-1]).double()  # [orders, place, part]
        return torch.einsum("opr,opd->rd", values[:, 1:] - values[:, :-1], came) / n


@dataclass(frozen=True)
class Banzhaf(_Sampled):
    """The mean of ``u(S and i) - u(S)`` over all subsets alike.

    Attributes
    ----------
    n_samples : int or None
        Subsets drawn; ``None``: all of them up to 12 parts, else 2048.
    """

    def scores(self, u: SetFunction, d: int, generator: torch.Generator) -> Tensor:
        masks = _coins(d, self.number(d), 0.5, generator)
        values, kept = u(masks).T, masks.double()
        return _mean_over(values, kept) - _mean_over(values, 1 - kept)


@dataclass(frozen=True)
class MeanWhenIncluded(_Sampled):
    """``a_i = E[u(S) | i in S]``, with every part kept by chance.

    Attributes
    ----------
    n_samples : int or None
        Subsets drawn; ``None``: all of them up to 12 parts, else 2048.
    keep : float
        The chance, above 0.
    """

    keep: float = 0.5

    def scores(self, u: SetFunction, d: int, generator: torch.Generator) -> Tensor:
        keep = checks.between("keep", self.keep, 0, 1, inclusive="high")
        n = self.number(d)
        masks = _coins(d, n, keep, generator)
        kept = masks.double()
        if n is None:
            kept = kept * torch.prod(torch.where(masks, keep, 1 - keep), 1, keepdim=True)
        return _mean_over(u(masks).T, kept)


@dataclass(frozen=True)
class LinearModel(_Sampled):
    """The coefficients of a weighted linear model of the subsets' values.

    Attributes
    ----------
    n_samples : int or None
        Subsets drawn; ``None``: all of them up to 12 parts, else 2048.
    weights : {"lime", "shapley", "uniform"}
        Exponential kernel of the cosine distance to the full subset, Shapley kernel (with the ends as constraints), or
        none.
    width : float
        Of the exponential kernel.
    ridge : float
        Penalty of the coefficients; not with the Shapley kernel.
    """

    weights: Literal["lime", "shapley", "uniform"] = "lime"
    width: float = 0.25
    ridge: float = 0.0

    def scores(self, u: SetFunction, d: int, generator: torch.Generator) -> Tensor:
        checks.one_of("weights", self.weights, ("lime", "shapley", "uniform"))
        width, ridge = checks.positive("width", self.width), checks.nonnegative("ridge", self.ridge)
        n = self.number(d)
        if self.weights == "shapley":
            return _constrained(u, d, n, generator)
        masks = _coins(d, n, 0.5, generator)
        if n is not None:
            masks[0] = True
        values, z = u(masks), masks.double()
        weight = torch.ones(len(z), dtype=torch.float64)
        if self.weights == "lime":
            weight = cosine_kernel(z, width)
        return weighted_ridge(z, values, weight, ridge)[0].T


@dataclass(frozen=True)
class LowValueSubset(Summary):
    """Ones for the ``size`` parts without which the value is lowest, zeros for the others.

    Attributes
    ----------
    size : int
    """

    size: int = 1

    def scores(self, u: SetFunction, d: int, generator: torch.Generator) -> Tensor:
        removed = _of_size(d, self.size)
        return removed[u(~removed).argmin(0)].double()


@dataclass(frozen=True)
class HighValueSubset(Summary):
    """Ones for the parts that alone have the highest value, zeros for the others.

    Attributes
    ----------
    size : int or None
        How many parts; or
    threshold : float or None
        as few as reach this value, of these the highest; all parts if none does.
    """

    size: int | None = 1
    threshold: float | None = None

    def scores(self, u: SetFunction, d: int, generator: torch.Generator) -> Tensor:
        size, level = self.size, self.threshold
        if (size is None) == (level is None):
            raise checks.ArgumentError(
                f"size is {self.size} and threshold {self.threshold}; allowed: one of them. Give the other as None."
            )
        if level is None:
            kept = _of_size(d, -1 if size is None else size)
            return kept[u(kept).argmax(0)].double()
        masks = all_masks(d) > 0
        values = u(masks)
        few = masks.sum(1)[:, None].where(values >= level, d).amin(0)
        best = values.where(masks.sum(1)[:, None] == few, -math.inf).argmax(0)
        return masks[best].double()


@dataclass(frozen=True)
class PartitionedSubsets(Summary):
    """Ones for the ``size`` parts of which ``u(S) - gamma u(D without S)`` is highest, zeros for the others.

    Attributes
    ----------
    size : int
    gamma : float
        Weight of the value of the rest.
    """

    size: int = 1
    gamma: float = 1.0

    def scores(self, u: SetFunction, d: int, generator: torch.Generator) -> Tensor:
        kept = _of_size(d, self.size)
        both = u(torch.cat((kept, ~kept)))
        return kept[(both[: len(kept)] - self.gamma * both[len(kept) :]).argmax(0)].double()


def _coins(d: int, n: int | None, keep: float, generator: torch.Generator) -> Tensor:
    if n is None:
        return all_masks(d) > 0
    return uniform((n, d), generator=generator, dtype=torch.float64) < keep


def _mean_over(values: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean of values (rows, m) for each column of the weights (m, parts)."""
    return values @ weight / weight.sum(0).clamp(min=1e-300)


def _constrained(u: SetFunction, d: int, n: int | None, generator: torch.Generator) -> Tensor:
    """Solve least squares under the Shapley kernel with u({}) and u(D) met exactly."""
    ends = u(torch.stack((torch.zeros(d), torch.ones(d))) > 0)
    none, change = ends[0], ends[1] - ends[0]
    if d == 1:
        return change[:, None]
    masks = all_masks(d)[1:-1] > 0 if n is None else kernel_masks(d, n, generator)
    z = masks.double()
    weight = shapley_kernel(z) if n is None else torch.ones(len(z), dtype=torch.float64)
    gram, right = (z.T * weight) @ z, z.T @ (weight[:, None] * (u(masks) - none))
    inverse = torch.linalg.pinv(gram, hermitian=True)
    free, ones = inverse @ right, inverse.sum(1)
    return (free - ones[:, None] * (free.sum(0) - change) / ones.sum()).T


def _of_size(d: int, size: int) -> Tensor:
    checks.integer("size", size, low=1, high=d)
    if math.comb(d, size) > 2**20:
        raise checks.ArgumentError(
            f"size is {size} with {d} parts, which is {math.comb(d, size)} subsets; allowed: at most {2**20}. "
            "Use fewer parts: the search tries every subset."
        )
    chosen = torch.tensor(list(itertools.combinations(range(d), size)))
    return torch.zeros(len(chosen), d, dtype=torch.bool).scatter(1, chosen, True)
