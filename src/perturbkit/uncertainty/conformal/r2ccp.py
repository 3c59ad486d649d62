"""Conformal regression by classification: sets that may have several parts, from a histogram a network predicts.

Use it where the response may be skewed or have several modes given the inputs, so that an interval would be mostly
empty. Guha, Natarajan, Möllenhoff, Khan and Ndiaye (2024), Conformal Prediction via Regression-as-Classification,
arXiv:2404.08168.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from perturbkit.core import checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randperm
from perturbkit.core.statistics import conformal_quantile
from perturbkit.uncertainty.conformal import _parts
from perturbkit.uncertainty.conformal._parts import IntervalUnion

__all__ = ["R2CCP"]


class R2CCP(RegressorMixin, BaseEstimator):
    r"""A network with a bin for each of a grid of responses, calibrated to sets of a stated coverage.

    Parameters
    ----------
    alpha : float
        Chance of missing the response, in (0, 1).
    n_bins : int
        Centres of bins, at least 2, from one bin below the smallest training response to one above the largest.
    p : float
        Exponent of the distance in the loss, above 0.
    entropy_weight : float
        Weight of the entropy, at least 0; keeps the histogram from collapsing onto one bin.
    hidden, n_layers : int
        Width and number of hidden layers, at least 1.
    lr, weight_decay : float
        Step and weight decay of AdamW.
    epochs, batch_size : int
        Passes over the training rows, and rows a step.
    calibration_share : float
        Share of the rows kept to calibrate where ``fit`` is given none, in (0, 1).
    generator : torch.Generator, int or None
        Source of the split, the weights and the order of rows.
    progress : Progress, bool or None
        Reports epochs.

    Attributes
    ----------
    centres_ : ndarray, shape (n_bins,)
        Centres of the bins, in units of the response.
    threshold_ : float
        Smallest value of the histogram that is kept.
    n_calibration_ : int
        Rows of calibration data.
    n_features_in_ : int
        Columns of ``X``.

    Notes
    -----
    With standardised responses and centres :math:`k_j` the network's softmax q minimises the mean of
    :math:`\sum_j q_j |y - k_j|^p - w H(q)`, in which near bins cost little. The score of y is the linear interpolation
    of q between centres, zero outside; the set holds all y whose score is at least the
    :math:`\lfloor \alpha (n+1) \rfloor`-th smallest of the calibration scores, so its coverage is at least 1 - alpha in
    finite samples. Ends are exact crossings of the piecewise linear score. If the threshold is zero, because
    calibration responses lie outside the bins, the set is the whole line.

    Only ``entropy_weight`` over the weight of the distance matters, so the second is 1.

    References
    ----------
    Guha, Natarajan, Möllenhoff, Khan and Ndiaye (2024), arXiv:2404.08168.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.uniform(1, 2, (1000, 1))
    >>> y = np.where(rng.random(1000) < 0.5, -2, 2) * x[:, 0] + 0.1 * rng.normal(size=1000)
    >>> made = R2CCP(hidden=32, n_layers=1, epochs=60, lr=0.01, generator=0).fit(x, y)
    >>> [bool(made.predict_set([[1.5]]).contains([v])[0]) for v in (-3.0, 0.0, 3.0)]
    [True, False, True]
    """

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        n_bins: int = 50,
        p: float = 0.5,
        entropy_weight: float = 0.2,
        hidden: int = 256,
        n_layers: int = 3,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        epochs: int = 100,
        batch_size: int = 128,
        calibration_share: float = 0.5,
        generator: Seed = None,
        progress: ProgressLike = False,
    ) -> None:
        self.alpha = alpha
        self.n_bins = n_bins
        self.p = p
        self.entropy_weight = entropy_weight
        self.hidden = hidden
        self.n_layers = n_layers
        self.lr = lr
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.calibration_share = calibration_share
        self.generator = generator
        self.progress = progress

    def fit(self, X: Any, y: Any, X_cal: Any = None, y_cal: Any = None) -> Self:
        """Train on rows and calibrate on others.

        Parameters
        ----------
        X : array, shape (n, features)
            Inputs.
        y : array, shape (n,)
            Responses.
        X_cal, y_cal : arrays, optional
            Rows to calibrate on; by default a random share of the rows given.

        Returns
        -------
        R2CCP

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an option is not allowed, or fewer than ``ceil(1/alpha - 1)`` rows are left to calibrate.
        """
        self._check()
        generator = as_generator(self.generator)
        x, response = validate_data(self, X, y, y_numeric=True, dtype=[np.float64, np.float32])
        if X_cal is None:
            order = randperm(len(x), generator=generator).numpy()
            kept = order[: int(np.ceil(self.calibration_share * len(x)))]
            used = order[len(kept) :]
            x_cal, y_cal = x[kept], response[kept]
            x, response = x[used], response[used]
        else:
            x_cal = validate_data(self, X_cal, reset=False, dtype=x.dtype)
            y_cal = checks.array("y_cal", y_cal, shape=(len(x_cal),))
        need = _parts.minimum_size(self.alpha)
        if len(x_cal) < need or len(x) < 2:
            raise checks.ArgumentError(
                f"there are {len(x)} training and {len(x_cal)} calibration rows (n_samples={len(x) + len(x_cal)}); allowed: "
                f"at least 2 and at least {need} for alpha {self.alpha:g}. Add rows or raise alpha."
            )
        self._train(x, np.asarray(response, dtype=np.float64), generator)
        scores = self._interpolated(self._histogram(x_cal), np.asarray(y_cal, dtype=np.float64))
        self.threshold_ = -float(conformal_quantile(-scores, self.alpha))
        self.n_calibration_ = len(x_cal)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the mean of the predicted histogram, shape (n,)."""
        q = self._histogram(self._rows(X))
        return q @ self.centres_

    def density(self, X: Any, y_grid: Any) -> np.ndarray:
        """Return the predicted density at each y of a grid for each row, shape (n, len(y_grid))."""
        q = self._histogram(self._rows(X))
        grid = checks.array("y_grid", y_grid, ndim=1)
        area = np.diff(self.centres_)[0] * (q.sum(1) - (q[:, 0] + q[:, -1]) / 2)
        tall = np.repeat(q, len(grid), 0)
        return self._interpolated(tall, np.tile(grid, len(q))).reshape(len(q), -1) / area[:, None]

    def predict_set(self, X: Any) -> IntervalUnion:
        """Return the set of each row: where the interpolated histogram is at least the threshold."""
        q = self._histogram(self._rows(X))
        return _above(self.centres_, q, self.threshold_)

    def coverage_length(self, X: Any, y: Any) -> tuple[float, float]:
        """Return the share of responses in their sets, and the mean length of the sets."""
        found = self.predict_set(X)
        return float(found.contains(y).mean()), float(found.length.mean())

    def _check(self) -> None:
        checks.between("alpha", self.alpha, 0, 1, inclusive="neither")
        checks.integer("n_bins", self.n_bins, low=2)
        checks.nonnegative("entropy_weight", self.entropy_weight)
        checks.nonnegative("weight_decay", self.weight_decay)
        for name in ("p", "lr"):
            checks.positive(name, getattr(self, name))
        for name in ("hidden", "n_layers", "epochs", "batch_size"):
            checks.integer(name, getattr(self, name), low=1)
        checks.between("calibration_share", self.calibration_share, 0, 1, inclusive="neither")

    def _train(self, x: np.ndarray, y: np.ndarray, generator: torch.Generator) -> None:
        spread = float(y.std()) or 1.0
        low, high = float(y.min()), float(y.max())
        step = (high - low) / max(self.n_bins - 3, 1) or spread
        self.centres_ = np.linspace(low - step, high + step, self.n_bins)
        self._mean, self._std = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1)
        dtype = torch.float32 if x.dtype == np.float32 else torch.float64
        inputs = self._standardised(x)
        distance = np.abs(y[:, None] - self.centres_) / spread
        cost = torch.as_tensor(distance**self.p, dtype=dtype)
        sizes = [x.shape[1], *[self.hidden] * self.n_layers, self.n_bins]
        self._net = _parts.mlp(sizes, generator, dtype=dtype)
        optimizer = torch.optim.AdamW(self._net.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        for _ in track(range(self.epochs), "r2ccp", progress=self.progress):
            for rows in randperm(len(x), generator=generator).split(self.batch_size):
                log_q = self._net(inputs[rows]).log_softmax(1)
                q = log_q.exp()
                # The entropy enters as sum q log q.
                loss = (q * (cost[rows] + self.entropy_weight * log_q)).sum(1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
        self._net.requires_grad_(False)

    def _rows(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "threshold_", msg=_parts.NOT_FITTED)
        return validate_data(self, X, reset=False, dtype=[np.float64, np.float32])

    def _standardised(self, x: np.ndarray) -> Tensor:
        return torch.as_tensor((x - self._mean) / self._std)

    def _histogram(self, x: np.ndarray) -> np.ndarray:
        like = next(self._net.parameters())
        return self._net(self._standardised(x).to(like.dtype)).double().softmax(1).numpy()

    def _interpolated(self, q: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return each row's histogram at its y, linear between centres and zero outside."""
        place = (y - self.centres_[0]) / (self.centres_[1] - self.centres_[0])
        left = np.clip(np.floor(place).astype(np.int64), 0, len(self.centres_) - 2)
        share, rows = place - left, np.arange(len(q))
        value = (1 - share) * q[rows, left] + share * q[rows, left + 1]
        return np.where((share >= 0) & (share <= 1), value, 0.0)


def _above(centres: np.ndarray, q: np.ndarray, threshold: float) -> IntervalUnion:
    """Return where the interpolation of each row of ``q`` is at least the threshold, a piece a gap of centres."""
    if threshold <= 0:
        whole = np.full((len(q), 1), np.inf)
        return IntervalUnion(-whole, whole)
    left, right = q[:, :-1], q[:, 1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = centres[:-1] + np.diff(centres) * (threshold - left) / (right - left)
    in_left, in_right = left >= threshold, right >= threshold
    low = np.where(in_left, centres[:-1], np.where(in_right, crossing, np.nan))
    high = np.where(in_right, centres[1:], np.where(in_left, crossing, np.nan))
    return IntervalUnion(low, high)
