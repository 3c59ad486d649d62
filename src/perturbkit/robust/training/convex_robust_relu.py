"""One-hidden-layer rectifier networks trained to the optimum, plainly or against perturbations, as a convex program.

Use it for small tables, where training by gradients leaves doubt about restarts and about the attack trained with: the
optimum is found, and the worst case of every row is in the loss. Bai, Gautam and Sojoudi (2021), Efficient Global
Optimization of Two-layer ReLU Networks / Practical Convex Formulation of Robust One-hidden-layer Neural Network Training,
arXiv:2105.12237.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from torch import nn

from perturbkit.core import checks
from perturbkit.core.random import Seed, numpy_generator

__all__ = ["ConvexReLUClassifier", "ConvexReLURegressor", "sample_patterns"]

_DUAL: dict[str, Any] = {"linf": 1, "l2": 2, "l1": np.inf}


def sample_patterns(
    x: np.ndarray, n_patterns: int, *, epsilon: float = 0.0, generator: Seed = None
) -> np.ndarray:
    """Draw which rows a rectifier lets through, for random rectifiers.

    Parameters
    ----------
    x : array, shape (n, d)
        Data, with a column of ones if the rectifiers have a bias.
    n_patterns : int
        Patterns wanted, at least 1; fewer come back if there are no more, or they are hard to find.
    epsilon : float
        Largest change of an element; half of the patterns are then of data moved by as much.
    generator : torch.Generator, int or None
        Draws the rectifiers.

    Returns
    -------
    array of bool, shape (n, patterns)
        All different.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    References
    ----------
    Bai, Gautam and Sojoudi (2021), arXiv:2105.12237.

    Examples
    --------
    >>> sample_patterns(np.array([[1.0], [2.0]]), 5, generator=0).shape  # one sign or the other: two patterns
    (2, 2)
    """
    rows = checks.array("x", x, ndim=2)
    wanted = checks.integer("n_patterns", n_patterns, low=1)
    checks.nonnegative("epsilon", epsilon)
    rng = numpy_generator(generator)
    found: dict[bytes, np.ndarray] = {}
    for attempt in range(40):
        moved = rows + epsilon * rng.choice([-1.0, 1.0], rows.shape) * (attempt % 2)
        masks = moved @ rng.standard_normal((rows.shape[1], 2 * wanted)) >= 0
        for mask in masks.T:
            if len(found) < wanted:
                found.setdefault(mask.tobytes(), mask)
        if len(found) == wanted:
            break
    return np.array(list(found.values())).T


class _ConvexReLU(BaseEstimator):
    _losses: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        n_patterns: int = 60,
        beta: float = 1e-3,
        epsilon: float = 0.0,
        norm: Literal["linf", "l2", "l1"] = "linf",
        loss: str = "hinge",
        bias: bool = True,
        solver: str = "CLARABEL",
        generator: Seed = None,
    ) -> None:
        self.n_patterns = n_patterns
        self.beta = beta
        self.epsilon = epsilon
        self.norm = norm
        self.loss = loss
        self.bias = bias
        self.solver = solver
        self.generator = generator

    def _solve(self, x: np.ndarray, y: np.ndarray) -> None:
        cp: Any = checks.extra("cvxpy", "convex")
        checks.positive("beta", self.beta)
        eps = checks.nonnegative("epsilon", self.epsilon)
        checks.one_of("norm", self.norm, tuple(_DUAL))
        checks.one_of("loss", self.loss, self._losses)
        checks.one_of("solver", self.solver, cp.installed_solvers())
        n, d = x.shape
        wide = np.hstack([x, np.ones((n, 1))]) if self.bias else x
        masks = sample_patterns(wide, self.n_patterns, epsilon=eps, generator=self.generator)
        on, side, p = masks.astype(float), 2.0 * masks - 1, masks.shape[1]
        v, w = cp.Variable((p, wide.shape[1])), cp.Variable((p, wide.shape[1]))
        answers = cp.sum(cp.multiply(on, wide @ (v - w).T), axis=1)
        # How far an answer, and a rectifier, can move: the bias is not perturbed.
        reach: Any = 0.0
        steady: list[Any] = [0.0, 0.0]
        if eps > 0:
            q = _DUAL[self.norm]
            reach = eps * cp.norm(on @ (v - w)[:, :d], q, axis=1)
            steady = [eps * cp.reshape(cp.norm(u[:, :d], q, axis=1), (1, p), order="C") for u in (v, w)]
        least = [np.ones((n, 1)) @ s if eps > 0 else 0.0 for s in steady]
        kept = [cp.multiply(side, wide @ u.T) >= at for u, at in zip((v, w), least, strict=True)]
        size = cp.sum(cp.norm(v, 2, axis=1)) + cp.sum(cp.norm(w, 2, axis=1))
        problem = cp.Problem(cp.Minimize(self._worst(cp, answers, y, reach) / n + self.beta * size), kept)
        problem.solve(solver=self.solver)
        if v.value is None:
            raise checks.ModelError(
                f"the convex program ended as {problem.status}; allowed: one that is solved. Scale the data, raise beta or "
                "lower epsilon."
            )
        self.objective_ = float(problem.value)
        self.patterns_ = masks
        self.answers_ = np.asarray(answers.value)
        self.reach_ = np.zeros(n) if eps == 0 else np.asarray(reach.value)
        self.n_features_in_ = d
        self._recover(np.asarray(v.value), np.asarray(w.value))

    def _worst(self, cp: Any, answers: Any, y: np.ndarray, reach: Any) -> Any:
        """Return the sum of the losses at the worst point of each row's set."""
        if self.loss == "hinge":
            return cp.sum(cp.pos(1 - cp.multiply(y, answers) + reach))
        distance = cp.abs(answers - y) + reach
        return cp.sum(cp.square(distance)) if self.loss == "squared" else cp.sum(distance)

    def _recover(self, v: np.ndarray, w: np.ndarray) -> None:
        """Return to neurons: u = v / sqrt(|v|) with the outer weight sqrt(|v|), minus it for the w."""
        both = np.vstack([v, w])
        sizes = np.linalg.norm(both, axis=1)
        sign = np.repeat([1.0, -1.0], [len(v), len(w)])
        used = sizes > 1e-7 * max(sizes.max(initial=0.0), 1e-12)
        root = np.sqrt(sizes[used])
        self.hidden_ = both[used] / root[:, None]
        self.outer_ = sign[used] * root

    def _answers(self, x: Any) -> np.ndarray:
        if not hasattr(self, "hidden_"):
            raise checks.ArgumentError(
                "the estimator is not fitted; allowed: after fit. Call fit(X, y) first."
            )
        rows = checks.array("X", x, shape=(None, self.n_features_in_))
        wide = np.hstack([rows, np.ones((len(rows), 1))]) if self.bias else rows
        return np.maximum(wide @ self.hidden_.T, 0) @ self.outer_

    def to_network(self) -> nn.Sequential:
        """Return the network, in float64: a hidden layer of rectifiers and one output without a bias."""
        self._answers(np.zeros((1, getattr(self, "n_features_in_", 1))))
        d, m = self.n_features_in_, len(self.hidden_)
        first, last = nn.Linear(d, m, bias=self.bias), nn.Linear(m, 1, bias=False)
        network = nn.Sequential(first, nn.ReLU(), last).double()
        with torch.no_grad():
            first.weight.copy_(torch.from_numpy(self.hidden_[:, :d]))
            if self.bias:
                first.bias.copy_(torch.from_numpy(self.hidden_[:, d]))
            last.weight.copy_(torch.from_numpy(self.outer_[None]))
        return network


class ConvexReLUClassifier(ClassifierMixin, _ConvexReLU):
    """Two-class rectifier network, optimal for the hinge loss and its penalty over the patterns drawn.

    Parameters
    ----------
    n_patterns : int
        Activation patterns, each of which can hold two neurons.
    beta : float
        Weight decay, above zero.
    epsilon : float
        Largest perturbation of a row, in ``norm``; 0 trains plainly.
    norm : {"linf", "l2", "l1"}
        Of the perturbation.
    loss : {"hinge"}
        The loss.
    bias : bool
        Whether neurons have a bias, which is not perturbed.
    solver : str
        A solver of cvxpy.
    generator : torch.Generator, int or None
        Draws the patterns.

    Attributes
    ----------
    objective_ : float
        The optimum: mean loss in the worst case, plus ``beta / 2 (|U|^2 + |a|^2)``.
    answers_, reach_ : array, shape (n,)
        Answers on the training rows, and by how much a perturbation can move each at most.
    hidden_, outer_ : array, shape (m, d + 1) and (m,)
        The neurons.

    Notes
    -----
    With patterns ``D_i = diag(1[X h_i >= 0])`` the training problem is the convex program

    ``min 1/n sum loss(sum_i D_i X (v_i - w_i), y) + beta sum_i (|v_i| + |w_i|)``, ``(2 D_i - I) X v_i >= 0``, and so for w.

    Against perturbations, the patterns must hold in the whole set, ``>= epsilon |v_i|_q`` with the dual norm q, and the
    hinge becomes ``max(0, 1 - y_k f_k + epsilon |sum_i d_ik (v_i - w_i)|_q)``: exact for the patterns taken. Patterns are drawn;
    with few of them the optimum is one of a smaller network.

    Cost: a cone program in ``2 patterns d`` unknowns and ``2 patterns n`` inequalities: for hundreds of rows. Needs the extra
    ``convex``.

    References
    ----------
    Bai, Gautam and Sojoudi (2021), arXiv:2105.12237; Pilanci and Ergen (2020), arXiv:2002.10553.

    Examples
    --------
    >>> x = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> model = ConvexReLUClassifier(n_patterns=14, generator=0).fit(x, ["same", "other", "other", "same"])
    >>> model.predict(x).tolist()
    ['same', 'other', 'other', 'same']
    """

    _losses: ClassVar[tuple[str, ...]] = ("hinge",)

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to rows (n, d) and labels of two classes, (n,).

        Raises
        ------
        ArgumentError, ArgumentTypeError, ModelError, MissingExtraError
            If data or options are not allowed, or the program is not solved.
        """
        rows = checks.array("X", X, ndim=2)
        labels = np.asarray(y)
        if labels.shape != (len(rows),):
            raise checks.ArgumentError(
                f"y has shape {labels.shape}; allowed: one label a row, ({len(rows)},). Pass a vector."
            )
        self.classes_ = np.unique(labels)
        if len(self.classes_) != 2:
            raise checks.ArgumentError(
                f"y has {len(self.classes_)} classes; allowed: two. Fit one against the rest."
            )
        self._solve(rows, np.where(labels == self.classes_[1], 1.0, -1.0))
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the answer of the network, positive for the second class."""
        return self._answers(X)

    def predict(self, X: Any) -> np.ndarray:
        """Return the classes."""
        answers = self._answers(X)
        return self.classes_[(answers > 0).astype(int)]


class ConvexReLURegressor(RegressorMixin, _ConvexReLU):
    """Rectifier network for one number a row, optimal for the squared or the absolute loss.

    Parameters
    ----------
    n_patterns, beta, epsilon, norm, bias, solver, generator
        As in :class:`ConvexReLUClassifier`.
    loss : {"squared", "absolute"}
        The loss; in the worst case ``(|f - y| + epsilon |.|_q)^2``, or without the square.

    Attributes
    ----------
    objective_, answers_, reach_, hidden_, outer_
        As in :class:`ConvexReLUClassifier`.

    References
    ----------
    Bai, Gautam and Sojoudi (2021), arXiv:2105.12237.

    Examples
    --------
    >>> x = np.linspace(-1, 1, 11)[:, None]
    >>> model = ConvexReLURegressor(n_patterns=20, beta=1e-6, generator=0).fit(x, np.abs(x[:, 0]))
    >>> bool(np.abs(model.predict(x) - np.abs(x[:, 0])).max() < 0.01)
    True
    """

    _losses: ClassVar[tuple[str, ...]] = ("squared", "absolute")

    def __init__(
        self,
        n_patterns: int = 60,
        beta: float = 1e-3,
        epsilon: float = 0.0,
        norm: Literal["linf", "l2", "l1"] = "linf",
        loss: str = "squared",
        bias: bool = True,
        solver: str = "CLARABEL",
        generator: Seed = None,
    ) -> None:
        super().__init__(n_patterns, beta, epsilon, norm, loss, bias, solver, generator)

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to rows (n, d) and numbers (n,).

        Raises
        ------
        ArgumentError, ArgumentTypeError, ModelError, MissingExtraError
            If data or options are not allowed, or the program is not solved.
        """
        rows = checks.array("X", X, ndim=2)
        self._solve(rows, checks.array("y", y, shape=(len(rows),)))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the answers."""
        return self._answers(X)
