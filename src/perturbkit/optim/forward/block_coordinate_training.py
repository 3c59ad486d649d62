"""Train a network by block coordinate descent: each layer's weights, inputs and outputs in turn, in closed form.

Use it where gradients vanish or no learning rate is to be chosen, and all rows fit into memory. Zeng, Lau, Lin and Yao
(2019), Global Convergence of Block Coordinate Descent in Deep Learning, arXiv:1803.00225.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.nn.functional import one_hot

from perturbkit.core import checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randn

__all__ = ["BCDClassifier", "relu_prox"]


class BCDClassifier(ClassifierMixin, BaseEstimator):
    r"""A network of rectified linear layers that is trained by block coordinate descent with three splittings.

    Parameters
    ----------
    hidden : sequence of int
        Units of each hidden layer, at least 1; none for a linear classifier.
    gamma, rho : float
        Weights of the terms that tie a layer's output to its activation, and that to its input; above 0.
    prox : float
        Weight of the distance from a block's last value, above 0.
    loss : {"square", "hinge"}
        Of the output layer, for codes of 0 and 1 or of -1 and 1.
    residual : bool
        Add a hidden layer's input to its output where they have as many units.
    weight_decay : float
        Factor of half the squared weights in the objective, zero or above.
    init_scale : float
        Standard deviation of the first weights, zero or above.
    max_iter : int
        Sweeps over all blocks, at least 1.
    generator : torch.Generator, int or None
        Source of the first weights.
    progress : Progress, bool or None
        Reports sweeps.

    Attributes
    ----------
    classes_ : ndarray, shape (classes,)
        Labels.
    weights_, biases_ : list of Tensor
        Of each layer, shapes (out, in) and (out,).
    objective_ : ndarray, shape (max_iter + 1,)
        Objective at the start and after each sweep; it never rises.
    kkt_residual_ : ndarray, shape (max_iter,)
        Distance of zero from the objective's limiting subdifferential after each sweep.
    n_features_in_ : int
        Columns of ``X``.
    n_iter_ : int
        Sweeps made.

    Notes
    -----
    With :math:`V_0 = X`, activations :math:`\sigma_i` (rectified, and none at the output) and outputs :math:`V_i` and inputs
    :math:`U_i` of layers as unknowns of their own, it descends

    .. math:: \ell(V_N, Y) + \sum_i \tfrac{\gamma}{2} |V_i - \sigma_i(U_i)|^2 + \tfrac{\rho}{2} |U_i - W_i V_{i-1} - b_i|^2
        + \tfrac{\lambda}{2} |W_i|^2

    over one block at a time from the last layer to the first, each exactly, with ``prox`` times half the squared distance
    from its last value for :math:`V_N, W_i, b_i` and hidden :math:`U_i`. The residual falls at least as fast as
    :math:`O(k^{-1/2})`. Predictions are those of the forward pass. Inputs should be of order one.

    Cost: :math:`O(n d^2 + d^3)` a layer and sweep, no gradient; memory for all layers' outputs of all rows, twice.

    References
    ----------
    Zeng, Lau, Lin and Yao (2019), arXiv:1803.00225, algorithm 2.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(200, 2))
    >>> y = np.where(x[:, 0] * x[:, 1] > 0, "same", "other")
    >>> BCDClassifier((32,), max_iter=100, prox=0.1, generator=0).fit(x, y).score(x, y) > 0.9
    True
    """

    def __init__(
        self,
        hidden: Sequence[int] = (64, 64),
        *,
        gamma: float = 1.0,
        rho: float = 1.0,
        prox: float = 1.0,
        loss: Literal["square", "hinge"] = "square",
        residual: bool = False,
        weight_decay: float = 0.0,
        init_scale: float = 0.1,
        max_iter: int = 50,
        generator: Seed = None,
        progress: ProgressLike = False,
    ) -> None:
        self.hidden = hidden
        self.gamma = gamma
        self.rho = rho
        self.prox = prox
        self.loss = loss
        self.residual = residual
        self.weight_decay = weight_decay
        self.init_scale = init_scale
        self.max_iter = max_iter
        self.generator = generator
        self.progress = progress

    def fit(self, X: Any, y: Any) -> Self:
        """Train on rows and their labels.

        Parameters
        ----------
        X : array, shape (n, features)
            Inputs.
        y : array, shape (n,)
            Labels of at least two classes.

        Returns
        -------
        BCDClassifier

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an option is not allowed or there is one class only.
        """
        sizes = self._check()
        x, labels = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(labels)
        self.classes_, index = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise checks.ArgumentError(
                f"y has one class, {self.classes_[0]!r}; allowed: at least two classes. Add rows of another class."
            )
        inputs = torch.tensor(x)
        codes = one_hot(torch.as_tensor(index), len(self.classes_)).to(inputs.dtype)
        with torch.no_grad():
            blocks = _Blocks(self, inputs, codes, [x.shape[1], *sizes, len(self.classes_)])
            objective, residual = [blocks.objective()], []
            for _ in track(range(self.max_iter), "block coordinate descent", progress=self.progress):
                for _ in blocks.sweep():
                    pass
                objective.append(blocks.objective())
                residual.append(blocks.kkt())
        self.weights_, self.biases_ = blocks.w, blocks.b
        self.n_iter_ = self.max_iter
        self.objective_, self.kkt_residual_ = np.asarray(objective), np.asarray(residual)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the outputs of the forward pass, shape (n, classes); for two classes their difference, (n,)."""
        check_is_fitted(self, "weights_")
        h = torch.tensor(validate_data(self, X, reset=False, dtype=[np.float64, np.float32]))
        h = h.to(self.weights_[0].dtype)
        for i, (w, b) in enumerate(zip(self.weights_, self.biases_, strict=True)):
            h = _layer(h, w, b, i == len(self.weights_) - 1, self.residual)[1]
        score = h.numpy()
        return score[:, 1] - score[:, 0] if len(self.classes_) == 2 else score

    def predict(self, X: Any) -> np.ndarray:
        """Return the label of the largest output, shape (n,)."""
        score = self.decision_function(X)
        return self.classes_[(score > 0).astype(int) if score.ndim == 1 else score.argmax(1)]

    def _check(self) -> list[int]:
        if isinstance(self.hidden, (str, int)):
            raise checks.ArgumentTypeError(
                f"hidden is {self.hidden!r}; allowed: a sequence of units, one a layer. Pass (64, 64)."
            )
        for name in ("gamma", "rho", "prox"):
            checks.positive(name, getattr(self, name))
        for name in ("weight_decay", "init_scale"):
            checks.nonnegative(name, getattr(self, name))
        checks.one_of("loss", self.loss, ("square", "hinge"))
        checks.integer("max_iter", self.max_iter, low=1)
        return [checks.integer("hidden", n, low=1) for n in self.hidden]


def relu_prox(a: Tensor, b: Tensor, gamma: float) -> Tensor:
    r"""Return the minimiser of a squared distance of rectified numbers, plus the squared distance from a point.

    Parameters
    ----------
    a : Tensor
        What the rectified numbers should be.
    b : Tensor
        What the numbers should be, in the shape of ``a``.
    gamma : float
        Weight of the first, above 0.

    Returns
    -------
    Tensor
        In the shape of ``a``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`\arg\min_u \tfrac{\gamma}{2} (a - \max(u, 0))^2 + \tfrac12 (u - b)^2`: the better of
    :math:`\max(0, (\gamma a + b) / (\gamma + 1))` and :math:`\min(0, b)`.

    References
    ----------
    Zeng, Lau, Lin and Yao (2019), arXiv:1803.00225, lemma on rectified linear units.

    Examples
    --------
    >>> relu_prox(torch.tensor([2.0, -1.0]), torch.tensor([0.0, -3.0]), 1.0)
    tensor([ 1., -3.])
    """
    checks.tensor("a", a)
    checks.same_shape("b", checks.tensor("b", b), "a", a)
    return _relu_prox(a, b, checks.positive("gamma", gamma))


def _relu_prox(a: Tensor, b: Tensor, gamma: float) -> Tensor:
    up, down = ((gamma * a + b) / (gamma + 1)).clamp(min=0), b.clamp(max=0)
    value_up = gamma * (a - up).square() + (up - b).square()
    value_down = gamma * a.square() + (down - b).square()
    return torch.where(value_up <= value_down, up, down)


def _layer(h: Tensor, w: Tensor, b: Tensor, last: bool, residual: bool) -> tuple[Tensor, Tensor]:
    """Return a layer's U and V."""
    u = h @ w.mT + b
    skip = h if residual and not last and h.shape == u.shape else 0
    return u, u.clone() if last else torch.relu(u) + skip


class _Blocks:
    """The unknowns: weights w and b, inputs u[i] and outputs v[i] of layer i, with v[0] the data."""

    def __init__(self, options: BCDClassifier, x: Tensor, codes: Tensor, sizes: list[int]) -> None:
        self.o, self.hinge = options, options.loss == "hinge"
        self.y, self.n = (2 * codes - 1 if self.hinge else codes), len(sizes) - 1
        g = as_generator(options.generator)
        self.w = [randn((b, a), generator=g, dtype=x.dtype) * options.init_scale for a, b in pairwise(sizes)]
        self.b = [x.new_zeros(b) for b in sizes[1:]]
        self.u, self.v = [x], [x]
        for i in range(self.n):
            u, v = _layer(self.v[i], self.w[i], self.b[i], i == self.n - 1, options.residual)
            self.u.append(u)
            self.v.append(v)

    def skips(self, i: int) -> bool:
        """Return whether layer i adds its input."""
        return bool(self.o.residual and 0 < i < self.n and self.v[i].shape == self.v[i - 1].shape)

    def target(self, i: int) -> Tensor:
        """Return what the activation of layer i should be."""
        return self.v[i] - self.v[i - 1] if self.skips(i) else self.v[i]

    def active(self, i: int) -> Tensor:
        return self.u[i] if i == self.n else torch.relu(self.u[i])

    def affine(self, i: int) -> Tensor:
        return self.v[i - 1] @ self.w[i - 1].mT + self.b[i - 1]

    def objective(self) -> float:
        v, y, o = self.v[-1], self.y, self.o
        total = (1 - y * v).clamp(min=0).sum() if self.hinge else (v - y).square().sum() / 2
        for i in range(1, self.n + 1):
            total = total + o.gamma / 2 * (self.target(i) - self.active(i)).square().sum()
            total = total + o.rho / 2 * (self.u[i] - self.affine(i)).square().sum()
            total = total + o.weight_decay / 2 * self.w[i - 1].square().sum()
        return float(total)

    def sweep(self) -> Iterator[str]:
        """Update each block once, from the last layer, and name it."""
        o, n = self.o, self.n
        near = (o.gamma * self.u[n] + o.prox * self.v[n]) / (o.gamma + o.prox)
        self.v[n] = self._fit_output(near, o.gamma + o.prox)
        yield f"V{n}"
        self.u[n] = (o.gamma * self.v[n] + o.rho * self.affine(n)) / (o.gamma + o.rho)
        yield f"U{n}"
        for i in range(n, 0, -1):
            v, eye = self.v[i - 1], torch.eye(self.v[i - 1].shape[1], dtype=self.y.dtype)
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
                self.u[i - 1] = _relu_prox(self.target(i - 1), near, o.gamma / c)
                yield f"U{i - 1}"

    def _fit_output(self, near: Tensor, c: float) -> Tensor:
        """Return the minimiser of the loss plus c / 2 times the squared distance from a point."""
        if not self.hinge:
            return (self.y + c * near) / (1 + c)
        margin = self.y * near
        return self.y * torch.where(margin >= 1, margin, (margin + 1 / c).clamp(max=1))

    def _hidden(self, j: int, eye: Tensor) -> None:
        o, w = self.o, self.w[j]
        known = self.active(j) + self.v[j - 1] if self.skips(j) else self.active(j)
        right, weight = o.rho * (self.u[j + 1] - self.b[j]) @ w + o.gamma * known, o.gamma
        if self.skips(j + 1):
            right, weight = right + o.gamma * (self.v[j + 1] - self.active(j + 1)), 2 * o.gamma
        self.v[j] = _solved(o.rho * w.mT @ w + weight * eye, right)

    def kkt(self) -> float:
        """Return the distance of zero from the limiting subdifferential."""
        o, n, total = self.o, self.n, self.y.new_zeros(())
        off = [self.y] + [o.gamma * (self.target(i) - self.active(i)) for i in range(1, n + 1)]
        tie = [self.y] + [o.rho * (self.u[i] - self.affine(i)) for i in range(1, n + 1)]
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
        if self.hinge:
            # On the side of the margin, where the loss falls by one, and beyond it.
            below, beyond = off[n] * self.y - 1, off[n] * self.y
            total += _kink(self.y * self.v[n] - 1, below, beyond).square().sum()
        else:
            total += (self.v[n] - self.y + off[n]).square().sum()
        return float(total.sqrt())


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Return right times the inverse of a positive definite matrix."""
    return torch.cholesky_solve(right.mT, torch.linalg.cholesky(matrix)).mT


def _kink(place: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the least size of a subgradient, from the slopes at the left and the right of zero."""
    least = torch.minimum(left.abs(), right.abs())
    at_zero = torch.where((left <= 0) & (right >= 0), torch.zeros_like(least), least)
    return torch.where(place == 0, at_zero, torch.where(place < 0, left, right).abs())
