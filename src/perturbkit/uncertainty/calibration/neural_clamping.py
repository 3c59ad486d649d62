"""Calibration of a frozen classifier by one temperature, or by a temperature and one perturbation of all inputs.

Use :class:`TemperatureScaling` first: it needs the logits alone and keeps every prediction. :class:`NeuralClamping`
also moves the input, at the cost of gradients through the network. Guo, Pleiss, Sun and Weinberger (2017), On
Calibration of Modern Neural Networks, arXiv:1706.04599; Tang, Chen and Ho (2023), Neural Clamping: Joint Input
Perturbation and Temperature Scaling for Neural Network Calibration, arXiv:2209.11604.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import numpy as np
import torch
from scipy.optimize import brentq, minimize_scalar
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from perturbkit.core import Oracle, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randn, randperm

__all__ = ["NeuralClamping", "TemperatureScaling"]

# Temperatures looked at: below, a softmax is a maximum; above, it is uniform.
_LOG_RANGE = (math.log(1e-3), math.log(1e3))
_NOT_FITTED = "this %(name)s is not fitted; allowed: a calibrator whose fit was called. Call fit with held-out data first."


class TemperatureScaling(BaseEstimator):
    r"""Divide the logits by the one temperature that fits held-out labels best.

    Parameters
    ----------
    model : nn.Module, Oracle, fitted classifier or None
        What answers logits, or ``predict_proba``, whose logarithm is then scaled. ``None``: ``X`` is the logits.

    Attributes
    ----------
    temperature_ : float
        The temperature, in [0.001, 1000]: above 1 for an overconfident model. It is at an end if the model is
        always right (any certainty fits) or says nothing of the labels (only the uniform answer fits).

    Notes
    -----
    ``softmax(z / T)`` with ``T = argmin -mean log softmax(z / T)_y``, a convex problem in 1 / T, solved to rounding.
    The predicted classes do not change. Cost: one evaluation a row.

    References
    ----------
    Guo, Pleiss, Sun and Weinberger (2017), arXiv:1706.04599.

    Examples
    --------
    >>> z = torch.tensor([[4.0, 0.0]]).repeat(10, 1)
    >>> made = TemperatureScaling().fit(z, [0] * 8 + [1] * 2)
    >>> round(made.temperature_, 3), made.predict_proba(z[:1])
    (2.885, tensor([[0.8000, 0.2000]]))
    """

    def __init__(self, model: Any = None) -> None:
        self.model = model

    def fit(self, X: Any, y: Any) -> Self:
        """Find the temperature on rows that the model has not seen.

        Parameters
        ----------
        X : Tensor or array
            What the model takes; logits of shape (n, K) without a model.
        y : array of int, shape (n,)
            Labels: of the model's ``classes_``, else 0..K-1.

        Returns
        -------
        TemperatureScaling

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If the data are not allowed.
        """
        z = self._logits(X)
        self.classes_ = np.asarray(getattr(self.model, "classes_", np.arange(z.shape[1])))
        self.temperature_ = _best_temperature(z, _column(y, self.classes_, len(z)), 0.0)
        return self

    def predict_proba(self, X: Any) -> Any:
        """Return calibrated probabilities, shape (n, K): a Tensor for a Tensor, else an array."""
        check_is_fitted(self, "temperature_", msg=_NOT_FITTED)
        p = (self._logits(X) / self.temperature_).softmax(1)
        return p if isinstance(X, Tensor) else p.numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable class of each row, as without calibration."""
        check_is_fitted(self, "temperature_", msg=_NOT_FITTED)
        return self.classes_[self._logits(X).argmax(1).cpu().numpy()]

    def _logits(self, X: Any) -> Tensor:
        if hasattr(self.model, "predict_proba"):
            p = checks.probabilities("the model's predict_proba", self.model.predict_proba(X))
            return torch.from_numpy(np.log(np.maximum(p, np.finfo(np.float64).tiny)))
        if self.model is not None:
            return Oracle.wrap(self.model)(checks.tensor("X", X))
        given = X if isinstance(X, Tensor) else torch.as_tensor(checks.array("X", X))
        z = checks.tensor("X", given, ndim=2)
        if z.shape[1] < 2:
            raise checks.ArgumentError(
                "X has 1 column; allowed: one logit a class, at least two. For a binary problem pass [0, z]."
            )
        return z


class NeuralClamping(BaseEstimator):
    r"""Add one perturbation to every input and divide the logits by one temperature, fitted together.

    Parameters
    ----------
    model : nn.Module, Oracle or callable
        Answers logits of shape (n, K), differentiable in its inputs; it is not changed.
    focal_gamma : float
        Exponent of the focal loss, at least 0. At 0 it is the log-likelihood, and temperature scaling is the case
        without perturbation; a larger one pulls away from certainty, and is chosen on other rows if at all.
    perturbation_weight : float
        Weight of the Euclidean norm of the perturbation, at least 0.
    init : {"random", "zero", "gradient"}
        Start of the perturbation: 0.01 times normal noise; zero; or minus the mean gradient of the loss times the
        best of a few step lengths.
    epochs : int
        Passes over the data, at least 1.
    lr : float
        Step of Adam for the perturbation, in units of the inputs, above 0.
    batch_size : int or None
        Rows a step; ``None`` for all.
    validation_share : float
        Share of the rows kept to choose the epoch, in [0, 0.9]; 0 chooses by the loss on all rows.
    generator : torch.Generator, int or None
        Source of the split, the order of rows and the random start.
    progress : Progress, bool or None
        Reports epochs.

    Attributes
    ----------
    temperature_ : float
        The temperature.
    perturbation_ : Tensor
        What is added to each input, in its shape; zero if no epoch beat temperature scaling on the rows kept.
    epoch_ : int
        The epoch chosen; 0 is temperature scaling, or the start.
    classes_ : ndarray, shape (K,)
        Labels 0..K-1.

    Notes
    -----
    With :math:`p = \mathrm{softmax}(z(x + \delta) / T)` it minimises
    :math:`-\mathrm{mean}\,(1 - p_y)^\gamma \log p_y + \lambda \|\delta\|_2`. Each epoch moves :math:`\delta` by Adam and
    then sets T to its optimum for that :math:`\delta`, which leaves the gradient in :math:`\delta` as it is. At
    :math:`\delta = 0, \gamma = 0` this is :class:`TemperatureScaling`, which stands for the result where the rows kept
    have a lower loss with it. Predicted classes may change. With fewer than about a thousand rows the
    perturbation overfits. Cost an epoch: two evaluations and one gradient a row.

    References
    ----------
    Tang, Chen and Ho (2023), arXiv:2209.11604.

    Examples
    --------
    >>> net = lambda x: 5 * torch.stack([x[:, 0], -x[:, 0]], 1)
    >>> x = torch.linspace(-1, 1, 100)[:, None]
    >>> made = NeuralClamping(net, init="zero", epochs=5, generator=0).fit(x, (x[:, 0] < -0.1).long())
    >>> made.predict_proba(x[:2]).shape, made.perturbation_.shape
    (torch.Size([2, 2]), torch.Size([1]))
    """

    def __init__(
        self,
        model: Any = None,
        *,
        focal_gamma: float = 0.0,
        perturbation_weight: float = 0.01,
        init: Literal["random", "zero", "gradient"] = "random",
        epochs: int = 30,
        lr: float = 1e-2,
        batch_size: int | None = 256,
        validation_share: float = 0.2,
        generator: Seed = None,
        progress: ProgressLike = False,
    ) -> None:
        self.model = model
        self.focal_gamma = focal_gamma
        self.perturbation_weight = perturbation_weight
        self.init = init
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.validation_share = validation_share
        self.generator = generator
        self.progress = progress

    def fit(self, X: Tensor, y: Any) -> Self:
        """Fit the perturbation and the temperature on rows that the model has not seen.

        Parameters
        ----------
        X : Tensor, shape (n, ...)
            Inputs, floating point.
        y : array of int, shape (n,)
            Labels, 0..K-1.

        Returns
        -------
        NeuralClamping

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If data or options are not allowed.
        """
        oracle, g = self._checked()
        x = checks.tensor("X", X)
        with oracle.frozen():
            z = oracle(x)
            self.classes_ = np.arange(z.shape[1])
            labels = _column(y, self.classes_, len(x)).to(x.device)
            self._search(oracle, x, labels, z, g)
        return self

    def predict_proba(self, X: Tensor) -> Tensor:
        """Return calibrated probabilities, shape (n, K)."""
        check_is_fitted(self, "temperature_", msg=_NOT_FITTED)
        z = Oracle.wrap(self.model)(checks.tensor("X", X) + self.perturbation_)
        return (z / self.temperature_).softmax(1)

    def predict(self, X: Tensor) -> np.ndarray:
        """Return the most probable class of each row, with the perturbation."""
        return self.predict_proba(X).argmax(1).cpu().numpy()

    def _checked(self) -> tuple[Oracle, torch.Generator]:
        if not isinstance(self.model, Oracle | nn.Module) and not callable(self.model):
            raise checks.ArgumentTypeError(
                f"model is a {type(self.model).__name__}; allowed: an nn.Module, an Oracle or a callable that answers "
                "logits. For predictions without a model use TemperatureScaling()."
            )
        checks.nonnegative("focal_gamma", self.focal_gamma)
        checks.nonnegative("perturbation_weight", self.perturbation_weight)
        checks.one_of("init", self.init, ("random", "zero", "gradient"))
        checks.integer("epochs", self.epochs, low=1)
        checks.positive("lr", self.lr)
        if self.batch_size is not None:
            checks.integer("batch_size", self.batch_size, low=1)
        checks.between("validation_share", self.validation_share, 0, 0.9)
        return Oracle.wrap(self.model), as_generator(self.generator)

    def _search(self, oracle: Oracle, x: Tensor, y: Tensor, z: Tensor, g: torch.Generator) -> None:
        """Run the epochs and keep the perturbation of the lowest loss on the rows kept."""
        gamma = self.focal_gamma
        order = randperm(len(x), generator=g, device=x.device)
        n_kept = int(self.validation_share * len(x))
        kept, used = (order[:n_kept], order[n_kept:]) if n_kept else (order, order)
        x_used, y_used = x[used], y[used]
        t = _best_temperature(z[used], y_used, gamma)
        best = _focal(z[kept] / t, y[kept], gamma).mean()
        self.perturbation_, self.epoch_ = torch.zeros_like(x[0]), 0
        delta = self._start(oracle, x_used, y_used, t, g)
        optimizer = torch.optim.Adam([delta], lr=self.lr)
        size = self.batch_size or len(used)
        for epoch in track(range(1, self.epochs + 1), "neural clamping", progress=self.progress):
            for rows in randperm(len(used), generator=g, device=x.device).split(size):
                delta.grad = self._gradient(oracle, x_used[rows], y_used[rows], delta, t)
                optimizer.step()
            z_used = oracle(x_used + delta)
            t = _best_temperature(z_used, y_used, gamma)
            z_kept = z_used if used is order else oracle(x[kept] + delta)
            loss = _focal(z_kept / t, y[kept], gamma).mean()
            if n_kept == 0:
                loss = loss + self.perturbation_weight * delta.norm()
            if loss < best:
                best, self.perturbation_, self.epoch_ = loss, delta.clone(), epoch
        # The temperature needs no rows kept: it is one number.
        z = oracle(x + self.perturbation_) if self.epoch_ else z
        self.temperature_ = _best_temperature(z, y, gamma)

    def _start(self, oracle: Oracle, x: Tensor, y: Tensor, t: float, g: torch.Generator) -> Tensor:
        if self.init == "random":
            return 0.01 * randn(x.shape[1:], generator=g, like=x)
        zero = torch.zeros_like(x[0])
        if self.init == "zero":
            return zero
        step = -self._gradient(oracle, x, y, zero, t)
        tried = [a / max(float(step.norm()), 1e-30) * step for a in (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)]
        losses = [float(_focal(oracle(x + d) / t, y, self.focal_gamma).mean()) for d in tried]
        return tried[int(np.argmin(losses))].clone()

    def _gradient(self, oracle: Oracle, x: Tensor, y: Tensor, delta: Tensor, t: float) -> Tensor:
        """Return the gradient of the loss in the perturbation; that of the norm at zero is zero."""
        rows = oracle.gradient(x + delta, y, objective=lambda z, k: _focal(z / t, k, self.focal_gamma))
        return rows.mean(0) + self.perturbation_weight * delta / delta.norm().clamp_min(1e-30)


def _column(y: Any, classes: np.ndarray, n: int) -> Tensor:
    """Return the column of each label."""
    if np.array_equal(classes, np.arange(len(classes))):
        return checks.labels("y", y, n=n, n_classes=len(classes))
    given = np.asarray(y)
    index = np.searchsorted(classes, given).clip(0, len(classes) - 1)
    if given.shape != (n,) or (classes[index] != given).any():
        raise checks.ArgumentError(
            f"y has shape {given.shape} and labels such as {given.flat[0]!r}; allowed: {n} labels among "
            f"{', '.join(map(str, classes))}. Use the labels that the model was fitted with."
        )
    return torch.from_numpy(index)


def _focal(z: Tensor, y: Tensor, gamma: float) -> Tensor:
    log_p = z.log_softmax(1).gather(1, y[:, None])[:, 0]
    return -log_p if gamma == 0 else -((-torch.expm1(log_p)).clamp_min(1e-30) ** gamma) * log_p


def _best_temperature(z: Tensor, y: Tensor, gamma: float) -> float:
    wide, labels = z.double(), y.to(z.device)

    def loss(s: float) -> float:
        return float(_focal(wide * math.exp(-s), labels, gamma).mean())

    def slope(s: float) -> float:
        with torch.enable_grad():
            leaf = torch.tensor(s, dtype=torch.float64, requires_grad=True)
            value = _focal(wide.detach() * torch.exp(-leaf), labels, gamma).mean()
            return float(torch.autograd.grad(value, leaf)[0])

    s = float(minimize_scalar(loss, bounds=_LOG_RANGE, method="bounded", options={"xatol": 1e-5}).x)
    # A minimum is known to half the digits; where the slope changes sign beside it, all of them.
    low, high = s - 1e-3, s + 1e-3
    return math.exp(brentq(slope, low, high, xtol=1e-14) if slope(low) < 0 < slope(high) else s)
