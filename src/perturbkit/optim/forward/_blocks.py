"""The unknowns of block coordinate training, with three splittings and with two, and a sweep over each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from perturbkit.core import checks
from perturbkit.core.random import Seed, as_generator, randn

__all__ = ["Blocks", "Options", "ThreeSplitting", "TwoSplitting", "layer", "proximal_relu"]

_HALVINGS = 12


class Options(Protocol):
    """What the objective is made of; see the classifier."""

    gamma: float
    rho: float
    prox: float
    loss: str
    residual: bool
    weight_decay: float
    init_scale: float
    generator: Seed


def layer(h: Tensor, w: Tensor, b: Tensor, last: bool, residual: bool) -> tuple[Tensor, Tensor]:
    """Return the input and the output of a layer's activation, the latter with what skips it."""
    u = h @ w.mT + b
    skip = h if residual and not last and h.shape == u.shape else 0
    return u, u.clone() if last else torch.relu(u) + skip


def proximal_relu(a: Tensor, b: Tensor, gamma: float) -> Tensor:
    """Return the u of the least ``gamma (a - max(u, 0))^2 + (u - b)^2``: the better of two branches."""
    up, down = ((gamma * a + b) / (gamma + 1)).clamp(min=0), b.clamp(max=0)
    value_up = gamma * (a - up).square() + (up - b).square()
    value_down = gamma * a.square() + (down - b).square()
    return torch.where(value_up <= value_down, up, down)


class Blocks(ABC):
    """Weights w and b, and outputs v[i] of layer i, with v[0] the data."""

    def __init__(self, options: Options, x: Tensor, codes: Tensor, sizes: list[int]) -> None:
        self.o, self.hinge = options, options.loss == "hinge"
        self.y, self.n = (2 * codes - 1 if self.hinge else codes), len(sizes) - 1
        g = as_generator(options.generator)
        self.w = [randn((b, a), generator=g, dtype=x.dtype) * options.init_scale for a, b in pairwise(sizes)]
        self.b = [x.new_zeros(b) for b in sizes[1:]]
        self.u, self.v = [x], [x]
        for i in range(self.n):
            u, v = layer(self.v[i], self.w[i], self.b[i], i == self.n - 1, options.residual)
            self.u.append(u)
            self.v.append(v)

    @abstractmethod
    def objective(self) -> float:
        """Return the loss and all penalties."""

    @abstractmethod
    def sweep(self) -> Iterator[str]:
        """Update each block once, from the last layer, and name it."""

    @abstractmethod
    def kkt(self) -> float:
        """Return the distance of zero from the limiting subdifferential."""

    def skips(self, i: int) -> bool:
        """Return whether layer i adds its input."""
        return bool(self.o.residual and 0 < i < self.n and self.v[i].shape == self.v[i - 1].shape)

    def target(self, i: int) -> Tensor:
        """Return what the activation of layer i should be."""
        return self.v[i] - self.v[i - 1] if self.skips(i) else self.v[i]

    def affine(self, i: int) -> Tensor:
        """Return the weighted sums of layer i's inputs."""
        return self.v[i - 1] @ self.w[i - 1].mT + self.b[i - 1]

    def loss(self) -> Tensor:
        """Return the loss of the last outputs, and the decay of the weights."""
        v, y = self.v[-1], self.y
        total = (1 - y * v).clamp(min=0).sum() if self.hinge else (v - y).square().sum() / 2
        return total + sum(self.o.weight_decay / 2 * w.square().sum() for w in self.w)

    def fit_output(self, u: Tensor) -> None:
        """Set the last outputs to the minimiser of loss, penalty for their distance from u, and proximal term."""
        c = self.o.gamma + self.o.prox
        near = (self.o.gamma * u + self.o.prox * self.v[-1]) / c
        margin = self.y * near
        hinged = self.y * torch.where(margin >= 1, margin, (margin + 1 / c).clamp(max=1))
        self.v[-1] = hinged if self.hinge else (self.y + c * near) / (1 + c)

    def output_residual(self, off: Tensor) -> Tensor:
        """Return the squared residual of the last outputs, from the slope of their penalty."""
        if self.hinge:
            # On the side of the margin, where the loss falls by one, and beyond it.
            return _kink(self.y * self.v[-1] - 1, off * self.y - 1, off * self.y).square().sum()
        return (self.v[-1] - self.y + off).square().sum()


class ThreeSplitting(Blocks):
    """Outputs v and inputs u of the activations are unknowns: every block has its minimiser in closed form."""

    def active(self, i: int) -> Tensor:
        """Return the activation of layer i."""
        return self.u[i] if i == self.n else torch.relu(self.u[i])

    def objective(self) -> float:
        o, total = self.o, self.loss()
        for i in range(1, self.n + 1):
            total = total + o.gamma / 2 * (self.target(i) - self.active(i)).square().sum()
            total = total + o.rho / 2 * (self.u[i] - self.affine(i)).square().sum()
        return float(total)

    def sweep(self) -> Iterator[str]:
        o, n = self.o, self.n
        self.fit_output(self.u[n])
        yield f"V{n}"
        self.u[n] = (o.gamma * self.v[n] + o.rho * self.affine(n)) / (o.gamma + o.rho)
        yield f"U{n}"
        for i in range(n, 0, -1):
            v, eye = self.v[i - 1], _eye(self.v[i - 1])
            right = o.prox * self.w[i - 1] + o.rho * (self.u[i] - self.b[i - 1]).mT @ v
            self.w[i - 1] = _solved((o.prox + o.weight_decay) * eye + o.rho * v.mT @ v, right)
            yield f"W{i}"
            rest = (self.u[i] - v @ self.w[i - 1].mT).sum(0)
            self.b[i - 1] = (o.prox * self.b[i - 1] + o.rho * rest) / (o.rho * len(v) + o.prox)
            yield f"b{i}"
            if i > 1:
                self._hidden(i - 1, eye)
                yield f"V{i - 1}"
                c = o.rho + o.prox
                near = (o.rho * self.affine(i - 1) + o.prox * self.u[i - 1]) / c
                self.u[i - 1] = proximal_relu(self.target(i - 1), near, o.gamma / c)
                yield f"U{i - 1}"

    def _hidden(self, j: int, eye: Tensor) -> None:
        o, w = self.o, self.w[j]
        known = self.active(j) + self.v[j - 1] if self.skips(j) else self.active(j)
        right, weight = o.rho * (self.u[j + 1] - self.b[j]) @ w + o.gamma * known, o.gamma
        if self.skips(j + 1):
            right, weight = right + o.gamma * (self.v[j + 1] - self.active(j + 1)), 2 * o.gamma
        self.v[j] = _solved(o.rho * w.mT @ w + weight * eye, right)

    def kkt(self) -> float:
        o, n = self.o, self.n
        off = [self.y] + [o.gamma * (self.target(i) - self.active(i)) for i in range(1, n + 1)]
        tie = [self.y] + [o.rho * (self.u[i] - self.affine(i)) for i in range(1, n + 1)]
        total = self.output_residual(off[n])
        for i in range(1, n + 1):
            total += (o.weight_decay * self.w[i - 1] - tie[i].mT @ self.v[i - 1]).square().sum()
            total += tie[i].sum(0).square().sum()
            if i == n:
                total += (tie[i] - off[i]).square().sum()
                continue
            total += (
                (off[i] - tie[i + 1] @ self.w[i] - (off[i + 1] if self.skips(i + 1) else 0)).square().sum()
            )
            total += _kink(self.u[i], tie[i], tie[i] - off[i]).square().sum()
        return float(total.sqrt())


class TwoSplitting(Blocks):
    """Outputs v are unknowns: hidden blocks take the minimiser of an upper bound with one curvature for all rows."""

    def objective(self) -> float:
        return float(
            self.loss() + sum(self.o.gamma / 2 * self._off(i).square().sum() for i in self._layers())
        )

    def sweep(self) -> Iterator[str]:
        self.fit_output(self.affine(self.n))
        yield f"V{self.n}"
        for i in range(self.n, 0, -1):
            self.fit_weights(i)
            yield f"W{i}"
            self.fit_biases(i)
            yield f"b{i}"
            if i > 1:
                self.fit_hidden(i - 1)
                yield f"V{i - 1}"

    def fit_weights(self, i: int) -> None:
        """Update the weights of layer i."""
        o, v = self.o, self.v[i - 1]
        bound = o.gamma * v.mT @ v + (o.weight_decay + o.prox) * _eye(v)
        self._descend(self.w, i - 1, _solved(bound, self._slope_w(i)), partial(self._by_unit, i))

    def fit_biases(self, i: int) -> None:
        """Update the biases of layer i."""
        step = self._slope_b(i) / (self.o.gamma * len(self.y) + self.o.prox)
        self._descend(self.b, i - 1, step, partial(self._by_unit, i))

    def fit_hidden(self, i: int) -> None:
        """Update the outputs of hidden layer i."""
        o, w = self.o, self.w[i]
        # What skips the layer above and what does not: the square of a sum is at most twice the sum of the squares.
        own, through = (3, 2) if self.skips(i + 1) else (1, 1)
        bound = through * o.gamma * w.mT @ w + (own * o.gamma + o.prox) * _eye(self.v[i])
        self._descend(self.v, i, _solved(bound, self._slope_v(i)), partial(self._by_row, i))

    def kkt(self) -> float:
        total = self.output_residual(-self.o.gamma * self._off(self.n))
        for i in self._layers():
            total += self._slope_w(i).square().sum() + self._slope_b(i).square().sum()
            total += self._slope_v(i).square().sum() if i < self.n else 0
        return float(total.sqrt())

    def _layers(self) -> range:
        return range(1, self.n + 1)

    def _off(self, i: int) -> Tensor:
        """Return how far the activation of layer i is above what it should be."""
        u = self.affine(i)
        return (u if i == self.n else torch.relu(u)) - self.target(i)

    def _back(self, i: int) -> Tensor:
        """Return the slope of layer i's penalty by its weighted sums, that of the left at a kink."""
        slope = self.o.gamma * self._off(i)
        return slope if i == self.n else torch.where(self.affine(i) > 0, slope, 0)

    def _slope_w(self, i: int) -> Tensor:
        return self._back(i).mT @ self.v[i - 1] + self.o.weight_decay * self.w[i - 1]

    def _slope_b(self, i: int) -> Tensor:
        return self._back(i).sum(0)

    def _slope_v(self, i: int) -> Tensor:
        """Return the slope by a hidden layer's outputs."""
        slope = self._back(i + 1) @ self.w[i] - self.o.gamma * self._off(i)
        return slope + self.o.gamma * self._off(i + 1) if self.skips(i + 1) else slope

    def _by_unit(self, i: int) -> Tensor:
        """Return each unit's part of the objective."""
        decay = self.o.weight_decay / 2 * self.w[i - 1].square().sum(1)
        return self.o.gamma / 2 * self._off(i).square().sum(0) + decay

    def _by_row(self, i: int) -> Tensor:
        """Return each row's part of the objective that has a hidden layer's outputs."""
        return self.o.gamma / 2 * (self._off(i).square().sum(1) + self._off(i + 1).square().sum(1))

    def _descend(self, blocks: list[Tensor], i: int, step: Tensor, value: Callable[[], Tensor]) -> None:
        """Subtract a step; halve each unit's or row's own until value and proximal term do not rise, but by rounding.

        The bound holds wherever no activation should be below zero. The halvings are for where one should.
        """
        old, before = blocks[i], value()
        limit = before * (1 + 8 * torch.finfo(before.dtype).eps)
        share, near = torch.ones_like(before), self.o.prox / 2 * step.reshape(len(step), -1).square().sum(1)
        for halved in range(_HALVINGS + 1):
            blocks[i] = old - (share if old.ndim == 1 else share[:, None]) * step
            rises = ~(value() + share.square() * near <= limit)
            if not bool(rises.any()):
                return
            share = torch.where(rises, share / 2 if halved < _HALVINGS else 0, share)
        blocks[i] = old - (share if old.ndim == 1 else share[:, None]) * step


def _eye(v: Tensor) -> Tensor:
    return torch.eye(v.shape[1], dtype=v.dtype)


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Return right times the inverse of a positive definite matrix."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        raise checks.ArgumentError(
            f"the equations of a block are singular in {matrix.dtype}; allowed: penalties that are not too small beside inputs, "
            "weights and other penalties. Scale X to order one, raise prox, or pass X in double precision."
        )
    return torch.cholesky_solve(right.mT, factor).mT


def _kink(place: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the least size of a subgradient, from the slopes at the left and the right of zero."""
    least = torch.minimum(left.abs(), right.abs())
    at_zero = torch.where((left <= 0) & (right >= 0), torch.zeros_like(least), least)
    return torch.where(place == 0, at_zero, torch.where(place < 0, left, right).abs())
