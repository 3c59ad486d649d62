"""Optimal input gains: train a network of one hidden layer with a gain for each input that is found anew in every step.

Use it for regression on tables whose columns have unlike scales, where Levenberg-Marquardt costs too much. Auddy, Manry, Tyagi
and others (2023), Optimal Input Gain: All You Need to Supercharge a Feed-Forward Neural Network, arXiv:2303.17732.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from perturbkit.core import checks
from perturbkit.core.random import Seed, numpy_generator

__all__ = ["OIGRegressor", "optimal_input_gain"]

_SLOPES: dict[str, tuple[Any, Any]] = {
    "tanh": (np.tanh, lambda o: 1 - o**2),
    "sigmoid": (lambda z: 1 / (1 + np.exp(-np.clip(z, -700, 700))), lambda o: o * (1 - o)),
    "relu": (lambda z: np.maximum(z, 0), lambda o: (o > 0).astype(o.dtype)),
}


class OIGRegressor(RegressorMixin, BaseEstimator):
    r"""Regression by one hidden layer with bypass weights, whose output weights are solved for in every step.

    Parameters
    ----------
    n_hidden : int
        Hidden units, at least 1.
    algorithm : {"bp", "hwo"}
        The direction: the gradient; or the gradient times the inverse of the inputs' second moments.
    input_gain : bool
        Rescale the direction's columns by optimal gains; otherwise by one optimal factor.
    max_iter : int
        Steps, at least 1.
    activation : {"tanh", "sigmoid", "relu"}
        Of the hidden units.
    ridge : float
        Added to the gains' equations relative to their diagonal, zero or above.
    generator : torch.Generator, int or None
        Source of the first weights.

    Attributes
    ----------
    input_weights_ : ndarray, shape (n_hidden, n_features + 1)
        Of the inputs and the constant.
    output_weights_ : ndarray, shape (n_targets, n_features + 1 + n_hidden)
        Of the inputs, the constant and the hidden units.
    errors_ : ndarray, shape (steps + 1,)
        Mean squared error on the training rows after each solve of the output weights, summed over targets.
    n_iter_ : int
        Steps that were taken; fewer where no step descends.

    Notes
    -----
    With :math:`O = \sigma(W x)` and :math:`y = W_o [x; O]`, each step solves least squares for :math:`W_o`, takes the negative
    gradient G of the mean squared error in W, and moves :math:`W \leftarrow W + G \operatorname{diag}(r)` with the gains of
    :func:`optimal_input_gain`, halved until the error falls. For ``"hwo"`` the same is done in whitened inputs,
    :math:`W \leftarrow W + G A \operatorname{diag}(r) A^\top` with :math:`A A^\top = R^{-1}` and :math:`R = E[x x^\top]`. Rescaling the
    inputs changes nothing where gains are used.

    Cost: a step is O(N M n) and a solve of n + 1 equations, for M targets and n inputs; beside the output weights' O(N (n + h)^2).

    References
    ----------
    Auddy et al. (2023), arXiv:2303.17732.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(300, 2)) * [1, 1000]
    >>> y = np.sin(x[:, 0]) + np.cos(x[:, 1] / 1000)
    >>> OIGRegressor(max_iter=100, generator=0).fit(x, y).score(x, y) > 0.97
    True
    """

    def __init__(
        self,
        n_hidden: int = 20,
        *,
        algorithm: Literal["bp", "hwo"] = "bp",
        input_gain: bool = True,
        max_iter: int = 200,
        activation: Literal["tanh", "sigmoid", "relu"] = "tanh",
        ridge: float = 1e-8,
        generator: Seed = None,
    ) -> None:
        self.n_hidden = n_hidden
        self.algorithm = algorithm
        self.input_gain = input_gain
        self.max_iter = max_iter
        self.activation = activation
        self.ridge = ridge
        self.generator = generator

    def fit(self, X: Any, y: Any) -> Self:
        """Train on rows and their targets.

        Parameters
        ----------
        X : array, shape (n, features)
            Inputs, at least two rows.
        y : array, shape (n,) or (n, targets)
            Targets.

        Returns
        -------
        OIGRegressor

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an option is not allowed.
        """
        checks.integer("n_hidden", self.n_hidden, low=1)
        checks.one_of("algorithm", self.algorithm, ("bp", "hwo"))
        checks.integer("max_iter", self.max_iter, low=1)
        checks.one_of("activation", self.activation, tuple(_SLOPES))
        checks.nonnegative("ridge", self.ridge)
        x, target = validate_data(
            self, X, y, y_numeric=True, multi_output=True, dtype=np.float64, ensure_min_samples=2
        )
        self._flat = target.ndim == 1
        target = np.asarray(target, dtype=np.float64).reshape(len(x), -1)
        inputs = np.column_stack([x, np.ones(len(x))])
        weights = _first_weights(inputs, self.n_hidden, numpy_generator(self.generator))
        root = _inverse_root(inputs) if self.algorithm == "hwo" else None
        errors = []
        for step in range(self.max_iter + 1):
            state = _solved(inputs, target, weights, self.activation)
            errors.append(state.error)
            if step == self.max_iter:
                break
            moved = self._moved(inputs, target, weights, state, root)
            if moved is None:
                break
            weights = moved
        self.input_weights_, self.output_weights_ = weights, state.output
        self.errors_, self.n_iter_ = np.array(errors), len(errors) - 1
        return self

    def __sklearn_tags__(self) -> Any:
        """Say that several targets are taken."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def predict(self, X: Any) -> np.ndarray:
        """Return the targets of rows, shape (n,) or (n, targets)."""
        check_is_fitted(self, "input_weights_")
        x = validate_data(self, X, reset=False, dtype=np.float64)
        inputs = np.column_stack([x, np.ones(len(x))])
        hidden = _SLOPES[self.activation][0](inputs @ self.input_weights_.T)
        out = np.column_stack([inputs, hidden]) @ self.output_weights_.T
        return out[:, 0] if self._flat else out

    def _moved(
        self, x: np.ndarray, target: np.ndarray, weights: np.ndarray, state: _State, root: np.ndarray | None
    ) -> np.ndarray | None:
        """Return better input weights, or None where no step along the direction descends."""
        bypass = x.shape[1]
        through = state.output[:, bypass:]
        slopes = _SLOPES[self.activation][1](state.hidden)
        delta = slopes * (2 * state.residual @ through)
        gradient = delta.T @ x / len(x)
        if self.input_gain:
            seen = x if root is None else x @ root
            own = gradient if root is None else gradient @ root
            gains = optimal_input_gain(own, seen, slopes, state.residual, through, self.ridge)
            direction = own * gains if root is None else own * gains @ root.T
        else:
            direction = gradient if root is None else gradient @ root @ root.T
            effect = (slopes * (x @ direction.T)) @ through.T
            size = float((effect**2).sum())
            direction = direction * (float((state.residual * effect).sum()) / size if size > 0 else 0.0)
        factor = 1.0
        for _ in range(40):
            tried = weights + factor * direction
            hidden = _SLOPES[self.activation][0](x @ tried.T)
            left = target - np.column_stack([x, hidden]) @ state.output.T
            error = float((left**2).sum() / len(x))
            if np.isfinite(error) and error < state.error:
                return tried
            factor /= 2
        return None


def optimal_input_gain(
    gradient: np.ndarray,
    x: np.ndarray,
    activation_slopes: np.ndarray,
    residual: np.ndarray,
    output_weights: np.ndarray,
    ridge: float = 1e-8,
) -> np.ndarray:
    r"""Return the gains of the inputs that minimise the Gauss-Newton model of the error.

    Parameters
    ----------
    gradient : ndarray, shape (hidden, inputs)
        Negative gradient G of the mean squared error in the input weights.
    x : ndarray, shape (n, inputs)
        Inputs, with the constant if there is one.
    activation_slopes : ndarray, shape (n, hidden)
        Derivatives of the hidden units.
    residual : ndarray, shape (n, targets)
        Targets less outputs.
    output_weights : ndarray, shape (targets, hidden)
        Of the hidden units.
    ridge : float
        Added relative to the diagonal, zero or above: so the gains of rescaled inputs are rescaled gains.

    Returns
    -------
    ndarray, shape (inputs,)

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the shapes do not fit.

    Notes
    -----
    The outputs move by :math:`v_n = x_n \sum_k W_{o,k} \sigma'_k G_{kn}` for a gain of one at input n; the gains solve
    :math:`(H + \epsilon \operatorname{diag} H) r = g` with :math:`H_{nm} = \frac2N \sum v_n v_m` and :math:`g_n = \frac2N \sum
    (t - y) v_n`.

    References
    ----------
    Auddy et al. (2023), arXiv:2303.17732, section 3.

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> optimal_input_gain(2 * one, 3 * one, one, 12 * one, one)  # the output moves by 6 for a gain of 1
    array([2.])
    """
    g, inputs = checks.array("gradient", gradient, ndim=2), checks.array("x", x, ndim=2)
    slopes = checks.array("activation_slopes", activation_slopes, shape=(len(inputs), len(g)))
    left = checks.array("residual", residual, ndim=2)
    through = checks.array("output_weights", output_weights, shape=(left.shape[1], len(g)))
    if inputs.shape[1] != g.shape[1] or len(left) != len(inputs):
        raise checks.ArgumentError(
            f"x has shape {inputs.shape}, gradient {g.shape} and residual {left.shape}; allowed: (n, inputs), (hidden, inputs) and "
            "(n, targets). Pass the inputs that the gradient belongs to."
        )
    checks.nonnegative("ridge", ridge)
    # One target at a time, so that only (n, inputs) numbers are held.
    h, b = np.zeros((g.shape[1], g.shape[1])), np.zeros(g.shape[1])
    for own, r in zip(through, left.T, strict=True):
        v = inputs * ((slopes * own) @ g)
        h += v.T @ v
        b += v.T @ r
    diagonal = np.diag(h).copy()
    live = diagonal > 0
    # Scaled to a unit diagonal: columns of unlike units would make it singular to working precision.
    scale = np.where(live, 1 / np.sqrt(np.where(live, diagonal, 1)), 0)
    system = h * scale[:, None] * scale + np.diag(np.where(live, ridge, 1.0))
    return scale * np.linalg.lstsq(system, scale * b, rcond=None)[0]


class _State(NamedTuple):
    """The network with its output weights solved for."""

    output: np.ndarray
    hidden: np.ndarray
    residual: np.ndarray
    error: float


def _solved(x: np.ndarray, target: np.ndarray, weights: np.ndarray, activation: str) -> _State:
    hidden = _SLOPES[activation][0](x @ weights.T)
    basis = np.column_stack([x, hidden])
    size = np.sqrt((basis**2).mean(0))
    size = np.where(size > 0, size, 1.0)
    output = (np.linalg.lstsq(basis / size, target, rcond=None)[0] / size[:, None]).T
    residual = target - basis @ output.T
    return _State(output, hidden, residual, float((residual**2).sum() / len(x)))


def _first_weights(x: np.ndarray, n_hidden: int, rng: np.random.Generator) -> np.ndarray:
    """Return weights under which every net input has the deviation 1 and a mean of 0.5, whatever the inputs' scales."""
    spread, mean = x[:, :-1].std(0), x[:, :-1].mean(0)
    weights = rng.normal(size=(n_hidden, x.shape[1] - 1))
    weights = (
        weights
        / np.sqrt(max(weights.shape[1], 1))
        * np.where(spread > 0, 1 / np.where(spread > 0, spread, 1), 0)
    )
    return np.column_stack([weights, rng.uniform(-1, 1, n_hidden) - weights @ mean])


def _inverse_root(x: np.ndarray) -> np.ndarray:
    """Return R^{-1/2} of the inputs' second moments, in units in which their diagonal is one."""
    size = np.sqrt((x**2).mean(0))
    scale = np.where(size > 0, 1 / np.where(size > 0, size, 1), 0)
    values, vectors = np.linalg.eigh((x * scale).T @ (x * scale) / len(x))
    keep = values > 1e-12 * values.max()
    half = vectors[:, keep] / np.sqrt(values[keep])
    # Any root will do: A A^T = R^{-1}; the symmetric one of the scaled moments, taken back to the inputs' units.
    root = half @ vectors[:, keep].T
    return scale[:, None] * root
