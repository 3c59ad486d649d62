"""The removals of the framework: how a model acts when it has only some of its features."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perturbkit.core import Oracle, checks
from perturbkit.core.random import randint, randn, uniform
from perturbkit.explain.removal._parts import expanded_baseline, gaussian_blur

# Numbers held at once while copies are made; independent of the oracle's chunks.
_BLOCK = 2**22


class Removal(ABC):
    """What a removal is: the answers of the model to rows of which only some elements are known."""

    def oracle(self, model: Any) -> Oracle | None:
        """Return the function that will be asked."""
        return Oracle.wrap(model)

    def drawn(self, x: Tensor, generator: torch.Generator) -> Removal:
        """Return the removal with its random draws made, so that the value of a subset is one number."""
        return self

    @abstractmethod
    def answers(self, oracle: Oracle | None, x: Tensor, keep: Tensor) -> Tensor:
        """Return the outputs for the rows of ``x`` under masks ``keep`` (m, ...), shape (m, n, outputs)."""


class _Cover(Removal):
    """Removal by copies of a row with other values put in, over which the outputs are averaged."""

    def answers(self, oracle: Oracle | None, x: Tensor, keep: Tensor) -> Tensor:
        assert oracle is not None
        found = []
        for row in x:
            parts = []
            for part in self._blocks(row, keep):
                copies = self.copies(row, part)
                out = oracle(copies.flatten(0, 1))
                parts.append(out.reshape(len(part), copies.shape[1], -1).mean(1))
            found.append(torch.cat(parts))
        return torch.stack(found, 1)

    def copies(self, row: Tensor, keep: Tensor) -> Tensor:
        """Return the copies for each mask, shape (m, copies, ...)."""
        return torch.where(keep[:, None], row, self.cover(row))

    def cover(self, row: Tensor) -> Tensor:
        """Return the values put in, shape (copies, ...)."""
        raise AssertionError("a removal defines cover or copies")

    def _blocks(self, row: Tensor, keep: Tensor) -> Iterator[Tensor]:
        per_mask = self.cover(row).numel()
        yield from keep.split(max(1, _BLOCK // per_mask))


@dataclass(frozen=True, eq=False)
class DefaultRemoval(_Cover):
    """Removed elements take a default value.

    Attributes
    ----------
    value : float or Tensor
        A number, or a tensor that broadcasts to a row.
    """

    value: Tensor | float = 0.0

    def cover(self, row: Tensor) -> Tensor:
        return expanded_baseline(self.value, row[None])


@dataclass(frozen=True, eq=False)
class MarginalRemoval(_Cover):
    """Removed elements take those of each row of a background, together; outputs are averaged.

    Attributes
    ----------
    background : Tensor, shape (k, ...)
    """

    background: Tensor

    def cover(self, row: Tensor) -> Tensor:
        return _background(self.background, row)


@dataclass(frozen=True, eq=False)
class ProductMarginalRemoval(_Cover):
    """Removed elements are each drawn from the background on their own.

    Attributes
    ----------
    background : Tensor, shape (k, ...)
    n_samples : int
        Draws, shared by all subsets.
    """

    background: Tensor
    n_samples: int = 64

    def drawn(self, x: Tensor, generator: torch.Generator) -> Removal:
        given = _background(self.background, x[0]).flatten(1)
        which = randint(0, len(given), (self.n_samples, given.shape[1]), generator=generator, device=x.device)
        return MarginalRemoval(given.gather(0, which).reshape(-1, *x.shape[1:]))


@dataclass(frozen=True, eq=False)
class UniformRemoval(_Cover):
    """Removed elements are drawn uniformly from an interval.

    Attributes
    ----------
    low, high : float or Tensor
        Ends, broadcastable to a row.
    n_samples : int
        Draws, shared by all subsets.
    """

    low: Tensor | float = 0.0
    high: Tensor | float = 1.0
    n_samples: int = 64

    def drawn(self, x: Tensor, generator: torch.Generator) -> Removal:
        low, high = (expanded_baseline(end, x[:1]) for end in (self.low, self.high))
        share = uniform((self.n_samples, *x.shape[1:]), generator=generator, like=x)
        return MarginalRemoval(low + (high - low) * share)


@dataclass(frozen=True, eq=False)
class ConditionalGaussian(_Cover):
    """Removed elements are drawn given the kept ones, under a Gaussian with the background's mean and covariance.

    Attributes
    ----------
    background : Tensor, shape (k, ...)
        At least two rows.
    n_samples : int
        Draws, shared by all subsets; with 0 the conditional mean.
    shrinkage : float
        Weight of the covariance's diagonal, in [0, 1].
    """

    background: Tensor
    n_samples: int = 64
    shrinkage: float = 0.0
    _draws: Tensor | None = dataclasses.field(default=None, repr=False)

    def drawn(self, x: Tensor, generator: torch.Generator) -> Removal:
        mean, covariance = self._moments(x[0])
        values, vectors = torch.linalg.eigh(covariance)
        z = randn((max(self.n_samples, 1), len(mean)), generator=generator, like=mean)
        spread = (z * values.clamp(min=0).sqrt()) @ vectors.T if self.n_samples else torch.zeros_like(z)
        return dataclasses.replace(self, _draws=mean + spread)

    def copies(self, row: Tensor, keep: Tensor) -> Tensor:
        assert self._draws is not None
        covariance = self._moments(row)[1]
        flat, known = row.flatten().double(), keep.flatten(1).double()
        # A draw z of everything becomes one given x_K by adding S_.K S_KK^-1 (x_K - z_K).
        inner = covariance * known[:, :, None] * known[:, None] + torch.diag_embed(1 - known)
        error = known[:, :, None] * (flat - self._draws).T
        shift = covariance @ torch.linalg.solve(inner, error)
        filled = (self._draws + shift.mT).to(row.dtype).reshape(len(keep), -1, *row.shape)
        return torch.where(keep[:, None], row, filled)

    def _moments(self, row: Tensor) -> tuple[Tensor, Tensor]:
        given = _background(self.background, row).flatten(1).double()
        covariance = torch.cov(given.T).reshape(given.shape[1], given.shape[1])
        diagonal = covariance.diagonal().diag()
        return given.mean(0), torch.lerp(covariance, diagonal, self.shrinkage) + 1e-10 * diagonal

    def _blocks(self, row: Tensor, keep: Tensor) -> Iterator[Tensor]:
        yield from keep.split(max(1, _BLOCK // (row.numel() * (row.numel() + max(self.n_samples, 1)))))


@dataclass(frozen=True, eq=False)
class Blur(_Cover):
    """Removed pixels take those of the blurred image.

    Attributes
    ----------
    sigma : float
        Standard deviation of the Gaussian, in pixels.
    """

    sigma: float = 2.0

    def cover(self, row: Tensor) -> Tensor:
        checks.tensor("a row of x under Blur", row, ndim=3)
        return gaussian_blur(row[None], checks.positive("sigma", self.sigma))


@dataclass(frozen=True, eq=False)
class TreePathRemoval(Removal):
    """At a split on a removed feature a tree follows both branches, weighted by their shares of the training rows.

    Attributes
    ----------
    estimator : scikit-learn tree, random forest or extra trees
        Fitted; the model that is explained. Regressors answer values, classifiers probabilities.
    """

    estimator: Any

    def oracle(self, model: Any) -> None:
        """Return nothing: the trees answer."""

    def answers(self, oracle: Oracle | None, x: Tensor, keep: Tensor) -> Tensor:
        trees = [t.tree_ for t in getattr(self.estimator, "estimators_", [self.estimator])]
        return torch.stack([self._walk(tree, 0, x, keep) for tree in trees]).mean(0)

    def _walk(self, tree: Any, node: int, x: Tensor, keep: Tensor) -> Tensor:
        left, right, feature = tree.children_left[node], tree.children_right[node], tree.feature[node]
        if left < 0:
            value = torch.as_tensor(tree.value[node][0], dtype=x.dtype, device=x.device)
            share = value / value.sum() if hasattr(self.estimator, "classes_") else value
            return share.expand(len(keep), len(x), -1)
        down = [self._walk(tree, child, x, keep) for child in (left, right)]
        part = float(tree.weighted_n_node_samples[left] / tree.weighted_n_node_samples[node])
        goes_left = (x[:, feature].float() <= float(tree.threshold[node]))[None, :, None]
        known = torch.where(goes_left, down[0], down[1])
        return torch.where(keep[:, feature, None, None], known, part * down[0] + (1 - part) * down[1])


@dataclass(frozen=True, eq=False)
class RetrainRemoval(Removal):
    """A model of the kept features alone is fitted for every subset; none kept, the mean label.

    Attributes
    ----------
    estimator : scikit-learn estimator
        Cloned and fitted a subset; classifiers answer probabilities.
    x : Tensor, shape (k, features)
    y : Tensor, shape (k,)
        Training data.
    """

    estimator: Any
    x: Tensor
    y: Tensor

    def oracle(self, model: Any) -> None:
        """Return nothing: the fitted estimators answer."""

    def answers(self, oracle: Oracle | None, x: Tensor, keep: Tensor) -> Tensor:
        from sklearn.base import clone, is_classifier

        inputs, labels = self.x.cpu().numpy(), self.y.cpu().numpy()
        found = []
        for one in keep.cpu():
            if not one.any():
                mean = (
                    nn.functional.one_hot(self.y.long()) if is_classifier(self.estimator) else self.y[:, None]
                )
                found.append(mean.to(x).mean(0).expand(len(x), -1))
                continue
            fitted = clone(self.estimator).fit(inputs[:, one.numpy()], labels)
            ask = fitted.predict_proba if is_classifier(self.estimator) else fitted.predict
            out = torch.as_tensor(ask(x.cpu().numpy()[:, one.numpy()])).to(x)
            found.append(out.reshape(len(x), -1))
        return torch.stack(found)


@dataclass(frozen=True, eq=False)
class SurrogateRemoval(Removal):
    """A network trained for it answers the kept elements and their mask.

    Attributes
    ----------
    net : callable (x * mask, mask) -> outputs
    """

    net: nn.Module | Callable[..., Tensor]

    def oracle(self, model: Any) -> Oracle:
        """Return the surrogate, which answers for the model."""
        return Oracle.wrap(self.net)

    def answers(self, oracle: Oracle | None, x: Tensor, keep: Tensor) -> Tensor:
        assert oracle is not None
        found = []
        for row in x:
            mask = keep.to(x.dtype)
            found.append(oracle(row * mask, mask).reshape(len(keep), -1))
        return torch.stack(found, 1)


def _background(given: Tensor, row: Tensor) -> Tensor:
    checks.tensor("background", given)
    if given.shape[1:] != row.shape:
        raise checks.ArgumentError(
            f"background has shape {tuple(given.shape)}; allowed: rows of shape {tuple(row.shape)}, as those of x. "
            "Reshape it."
        )
    return given.to(row)
