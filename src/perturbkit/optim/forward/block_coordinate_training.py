"""Train a network by block coordinate descent: each layer's weights, inputs and outputs in turn, in closed form.

Use it where gradients vanish or no learning rate is to be chosen, and all rows fit into memory. Zeng, Lau, Lin and Yao
(2019), Global Convergence of Block Coordinate Descent in Deep Learning, arXiv:1803.00225.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from perturbkit.core.random import Seed
from perturbkit.optim.forward._blocks import Blocks, ThreeSplitting, TwoSplitting, layer, proximal_relu

__all__ = ["BCDClassifier", "relu_prox"]


class BCDClassifier(ClassifierMixin, BaseEstimator):
    r"""A network of rectified linear layers that is trained by block coordinate descent.

    Parameters
    ----------
    hidden : sequence of int
        Units of each hidden layer, at least 1; none for a linear classifier.
    gamma, rho : float
        Weights of the terms that tie a layer's output to its activation, and the activation's input to the layer's; above
        0. Two splittings have no use for ``rho``.
    prox : float
        Weight of the distance from a block's last value, above 0.
    loss : {"square", "hinge"}
        Of the output layer, for codes of 0 and 1 or of -1 and 1.
    residual : bool
        Add a hidden layer's input to its output where they have as many units.
    splitting : {"three", "two"}
        Whether the activations' inputs are unknowns too, which gives every block its minimiser in closed form, or only the
        layers' outputs, with half the memory.
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
        Distance of zero from the objective's limiting subdifferential after each sweep; with two splittings, norm of its
        slopes, those of the left where an activation bends.
    n_features_in_ : int
        Columns of ``X``.
    n_iter_ : int
        Sweeps made.

    Notes
    -----
    With :math:`V_0 = X`, activations :math:`\sigma_i` (rectified, and none at the output) and outputs :math:`V_i` and inputs
    :math:`U_i` of activations as unknowns of their own, three splittings descend

    .. math:: \ell(V_N, Y) + \sum_i \tfrac{\gamma}{2} |V_i - \sigma_i(U_i)|^2 + \tfrac{\rho}{2} |U_i - W_i V_{i-1} - b_i|^2
        + \tfrac{\lambda}{2} |W_i|^2

    over one block at a time from the last layer to the first, each exactly, with ``prox`` times half the squared distance
    from its last value for :math:`V_N, W_i, b_i` and hidden :math:`U_i`. Two splittings descend

    .. math:: \ell(V_N, Y) + \sum_i \tfrac{\gamma}{2} |V_i - \sigma_i(W_i V_{i-1} + b_i)|^2 + \tfrac{\lambda}{2} |W_i|^2

    with the proximal term for every block. :math:`V_N, W_N, b_N` and :math:`V_{N-1}` are exact. The other blocks are nonlinear
    least squares without a closed form, and minimise an upper bound: with :math:`u^0` the weighted sums at the block's last value,

    .. math:: \tfrac12 (a - \max(u, 0))^2 \le \tfrac12 (t - u)^2 + \mathrm{const}, \quad
        t = a \text{ where } u^0 > 0, \text{ else } u^0,

    holds for all u if :math:`a \ge 0`, with equality at :math:`u^0`, so that
    :math:`V_i \leftarrow V_i - \nabla_{V_i} ((\gamma + \alpha) I + \gamma W_{i+1}^\top W_{i+1})^{-1}` and
    :math:`W_i \leftarrow W_i - \nabla_{W_i} (\gamma V_{i-1} V_{i-1}^\top + (\lambda + \alpha) I)^{-1}` cannot rise. Where
    targets :math:`a` are below zero, the steps of units and rows whose part would rise are halved until it does not.

    The residual falls at least as fast as :math:`O(k^{-1/2})`. Predictions are those of the forward pass. Inputs should be of
    order one.

    Cost: :math:`O(n d^2 + d^3)` a layer and sweep, no gradient of the network; memory for all layers' outputs of all rows,
    twice with three splittings.

    References
    ----------
    Zeng, Lau, Lin and Yao (2019), arXiv:1803.00225, algorithms 1 and 2. The upper bound is ours.

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
        splitting: Literal["three", "two"] = "three",
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
        self.splitting = splitting
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
            If an option is not allowed, there is one class only, or the penalties are so unequal that a block's equations
            are singular in the precision of ``X``.
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
            kind: type[Blocks] = TwoSplitting if self.splitting == "two" else ThreeSplitting
            blocks = kind(self, inputs, codes, [x.shape[1], *sizes, len(self.classes_)])
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
            h = layer(h, w, b, i == len(self.weights_) - 1, self.residual)[1]
        score = h.numpy()
        return score[:, 1] - score[:, 0] if len(self.classes_) == 2 else score

    def predict(self, X: Any) -> np.ndarray:
        """Return the label of the largest output, shape (n,)."""
        score = self.decision_function(X)
        return self.classes_[(score > 0).astype(int) if score.ndim == 1 else score.argmax(1)]

    def _check(self) -> list[int]:
        if isinstance(self.hidden, str) or not isinstance(self.hidden, Iterable):
            raise checks.ArgumentTypeError(
                f"hidden is {self.hidden!r}; allowed: a sequence of units, one a layer. Pass (64, 64)."
            )
        for name in ("gamma", "rho", "prox"):
            checks.positive(name, getattr(self, name))
        for name in ("weight_decay", "init_scale"):
            checks.nonnegative(name, getattr(self, name))
        checks.one_of("loss", self.loss, ("square", "hinge"))
        checks.one_of("splitting", self.splitting, ("three", "two"))
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
    return proximal_relu(a, b, checks.positive("gamma", gamma))
