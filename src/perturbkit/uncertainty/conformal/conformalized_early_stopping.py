"""Conformalized early stopping: one hold-out set both to stop the training and to calibrate, without losing validity.

Use it where held-out rows are too few to be split in two. Liang, Zhou and Sesia (2023), Conformal inference is (almost)
free for neural networks trained with early stopping, arXiv:2301.11556.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from perturbkit.core import checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, numpy_generator, randperm
from perturbkit.core.statistics import conformal_quantile
from perturbkit.uncertainty.conformal import _parts
from perturbkit.uncertainty.conformal._parts import IntervalUnion

__all__ = ["ConformalizedEarlyStopping", "IntervalUnion", "train_with_snapshots"]

_TASKS = ("outlier", "classification", "regression", "quantile")
# Numbers held at once while envelopes are taken.
_BLOCK = 2**22


class ConformalizedEarlyStopping(BaseEstimator):
    r"""Conformal inference with a model chosen among snapshots on the calibration rows themselves.

    Parameters
    ----------
    snapshots : sequence of M models, or None
        Fitted on other rows, in order of training: estimators, modules or oracles. ``None``: ``X`` is their
        predictions, stacked in front: (M, n) for "outlier" and "regression", (M, n, K) probabilities for
        "classification", (M, n, 2) lower and upper quantiles for "quantile".
    task : {"outlier", "classification", "regression", "quantile"}
        What the predictions are. "outlier": a loss of each row, large for outliers (a reconstruction error).
    alpha : float
        Chance of missing (for outliers: level to which p-values are valid), in (0, 1).
    label_conditional : bool
        Classification: compare with the calibration rows of the label tested only.
    generator : torch.Generator, int or None
        Source of the random shares of the adaptive scores; classification only.

    Attributes
    ----------
    losses_ : ndarray, shape (M,)
        Loss of each snapshot over the calibration rows: squared error, cross-entropy, pinball, or as given.
    n_calibration_ : int
        Rows of calibration data.

    Notes
    -----
    The new row takes part in the choice: :math:`m(x, y) = \arg\min_m L_m + \ell_m(x, y)`, the first on ties, treats it
    like the calibration rows, so their scores under that snapshot are exchangeable and the p-value
    :math:`(1 + \#\{s_i \geq s\})/(n+1)` is valid in finite samples, whatever the snapshots. Choosing on the calibration
    rows alone is not. For a response, the choice as a function of y is the lower envelope of M functions (squared
    losses differ by lines; pinball losses are piecewise linear): the set is the union over m of the part where m is
    chosen and within its own interval.

    Cost: predictions of all snapshots; then M^2 a row for regression and 2 M^3 for quantiles.

    References
    ----------
    Liang, Zhou and Sesia (2023), arXiv:2301.11556.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> y = rng.normal(size=50)
    >>> predictions = np.stack([np.zeros(50), 0.8 * y])
    >>> made = ConformalizedEarlyStopping(task="regression", alpha=0.2).fit(predictions, y)
    >>> made.predict_interval([[0.0], [1.0]]).shape, int(made.losses_.argmin())
    ((1, 2), 1)
    """

    def __init__(
        self,
        snapshots: Sequence[Any] | None = None,
        *,
        task: Literal["outlier", "classification", "regression", "quantile"] = "classification",
        alpha: float = 0.1,
        label_conditional: bool = False,
        generator: Seed = None,
    ) -> None:
        self.snapshots = snapshots
        self.task = task
        self.alpha = alpha
        self.label_conditional = label_conditional
        self.generator = generator

    def fit(self, X: Any, y: Any = None) -> Self:
        """Take the losses and scores of the calibration rows under every snapshot.

        Parameters
        ----------
        X : array or Tensor
            What the snapshots take; their predictions without snapshots.
        y : array, shape (n,), optional
            Labels 0..K-1 or responses; none for "outlier".

        Returns
        -------
        ConformalizedEarlyStopping

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If data or options are not allowed, or there are fewer than ``ceil(1/alpha - 1)`` rows (of a label).
        """
        checks.one_of("task", self.task, _TASKS)
        alpha = checks.between("alpha", self.alpha, 0, 1, inclusive="neither")
        rng = numpy_generator(as_generator(self.generator))
        found = self._predictions(X)
        n = found.shape[1]
        category, names, self.n_classes_ = np.zeros(n, dtype=np.int64), ["given"], 0
        if self.task == "outlier":
            losses = scores = found
        elif self.task == "classification":
            self.n_classes_ = found.shape[2]
            label = checks.labels("y", y, n=n, n_classes=self.n_classes_).numpy()
            scores = _parts.adaptive_scores(found, rng.random((n, 1)))[:, np.arange(n), label]
            losses = _parts.cross_entropy(found)[:, np.arange(n), label]
            if self.label_conditional:
                category, names = label, [f"with label {c}" for c in range(self.n_classes_)]
        else:
            response = checks.array("y", y, shape=(n,))
            if self.task == "regression":
                scores = np.abs(response - found)
                losses = scores**2
            else:
                scores = np.maximum(found[..., 0] - response, response - found[..., 1])
                losses = _parts.pinball(response[:, None] - found, np.array([alpha / 2, 1 - alpha / 2])).sum(
                    2
                )
        self._by_snapshot = [_parts.Thresholds(s, category, names, alpha) for s in scores]
        self.losses_, self.n_calibration_, self._random = losses.sum(1), n, rng
        self._reach = np.array([conformal_quantile(s, alpha) for s in scores])
        return self

    def p_values(self, X: Any) -> np.ndarray:
        """Return the p-value of each row (outlier), or of each label of each row (classification)."""
        return self._p_values(self._new("p_values", X, ("outlier", "classification")))

    def predict_set(self, X: Any) -> np.ndarray | IntervalUnion:
        """Return which labels are in each row's set, bool of shape (n, K), or a union of intervals a row."""
        found = self._new("predict_set", X, _TASKS[1:])
        return (
            self._p_values(found) > self.alpha + 1e-12
            if self.task == "classification"
            else self._union(found)
        )

    def predict_interval(self, X: Any) -> np.ndarray:
        """Return the hull of each row's union, shape (n, 2)."""
        return self._union(self._new("predict_interval", X, _TASKS[2:])).hull

    def _predictions(self, x: Any) -> np.ndarray:
        """Return the predictions of all snapshots, stacked in front."""
        if self.snapshots is None:
            found = checks.array("X", x, ndim=3 if self.task in ("classification", "quantile") else 2)
            if self.task == "classification":
                checks.probabilities("X", found.reshape(-1, found.shape[2]))
        else:
            if not len(self.snapshots):
                raise checks.ArgumentError(
                    "snapshots is empty; allowed: at least one model. Pass snapshots or None."
                )
            columns = 2 if self.task == "quantile" else 1
            found = np.stack(
                [
                    _parts.probabilities(m, x)
                    if self.task == "classification"
                    else _parts.predictions(m, x, columns)
                    for m in self.snapshots
                ]
            )
        if self.task == "quantile":
            checks.array("X", found, shape=(None, None, 2))
            crossed = int((found[..., 0] > found[..., 1]).sum())
            if crossed:
                raise checks.ArgumentError(
                    f"{crossed} predictions have a lower quantile above the upper one; allowed: lower <= upper. "
                    "Sort each pair."
                )
        return found

    def _new(self, method: str, x: Any, tasks: Sequence[str]) -> np.ndarray:
        check_is_fitted(self, "losses_", msg=_parts.NOT_FITTED)
        if self.task not in tasks:
            raise checks.ArgumentError(
                f"{method} was called for task {self.task!r}; allowed: {', '.join(map(repr, tasks))}. "
                "Use p_values for outliers and classes, predict_interval for responses."
            )
        found = self._predictions(x)
        if len(found) != len(self.losses_) or (self.n_classes_ and found.shape[2] != self.n_classes_):
            raise checks.ArgumentError(
                f"X has predictions of shape {found.shape}; allowed: {len(self.losses_)} snapshots with as many "
                "columns as in fit. Use the same snapshots."
            )
        return found

    def _p_values(self, found: np.ndarray) -> np.ndarray:
        if self.task == "outlier":
            losses = scores = found[..., None]
        else:
            losses = _parts.cross_entropy(found)
            scores = _parts.adaptive_scores(found, self._random.random((found.shape[1], 1)))
        chosen = (self.losses_[:, None, None] + losses).argmin(0)
        picked = np.take_along_axis(scores, chosen[None], 0)[0]
        category = np.zeros_like(chosen)
        if self.label_conditional and self.task == "classification":
            category += np.arange(found.shape[2])
        p = np.empty(picked.shape)
        for m in np.unique(chosen):
            here = chosen == m
            p[here] = self._by_snapshot[m].p_values(picked[here], category[here])
        return p[:, 0] if self.task == "outlier" else p

    def _union(self, found: np.ndarray) -> IntervalUnion:
        blocks = _blocks(found.shape[1], len(found), self.task)
        parts = [self._pieces(found[:, start:stop]) for start, stop in blocks]
        low, high = (np.concatenate(ends) for ends in zip(*parts, strict=True))
        return IntervalUnion(low, high)

    def _pieces(self, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ends of the parts where a snapshot is chosen and within its own interval."""
        n = found.shape[1]
        if self.task == "regression":
            mean = found.T
            # (y - f)^2 less y^2, which all share.
            first, last = _parts.lowest_lines(-2 * mean, self.losses_ + mean**2)
            low, high = mean - self._reach, mean + self._reach
        else:
            lower, upper = found[..., 0].T, found[..., 1].T
            kinks = np.sort(np.concatenate([lower, upper], 1), 1)
            ends = np.pad(kinks, ((0, 0), (1, 1)), constant_values=((0, 0), (-np.inf, np.inf)))
            start, stop = ends[:, :-1, None], ends[:, 1:, None]
            inside = (
                np.maximum(start, kinks[:, :1, None] - 1) + np.minimum(stop, kinks[:, -1:, None] + 1)
            ) / 2
            # Between kinks each pinball loss is the line  slope * (y - quantile).
            slope_low = np.where(inside > lower[:, None], self.alpha / 2, self.alpha / 2 - 1)
            slope_high = np.where(inside > upper[:, None], 1 - self.alpha / 2, -self.alpha / 2)
            offset = self.losses_ - slope_low * lower[:, None] - slope_high * upper[:, None]
            m = len(found)
            first, last = _parts.lowest_lines((slope_low + slope_high).reshape(-1, m), offset.reshape(-1, m))
            first = np.maximum(first.reshape(offset.shape), start).reshape(n, -1)
            last = np.minimum(last.reshape(offset.shape), stop).reshape(n, -1)
            times = 2 * m + 1
            low, high = np.tile(lower - self._reach, times), np.tile(upper + self._reach, times)
        low, high = np.maximum(low, first), np.minimum(high, last)
        empty = low > high
        return np.where(empty, np.nan, low), np.where(empty, np.nan, high)


def train_with_snapshots(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int = 50,
    every: int = 1,
    lr: float = 1e-3,
    batch_size: int = 64,
    generator: Seed = None,
    progress: ProgressLike = False,
) -> list[nn.Module]:
    """Train a copy of a model by Adam and return what it was along the way.

    Parameters
    ----------
    model : nn.Module
        The start; it is not changed.
    x, y : Tensor, shape (n, ...)
        Training rows.
    loss : callable
        ``loss(outputs, y)``, a scalar.
    epochs, every : int
        Passes over the rows, and passes between snapshots; both at least 1.
    lr : float
        Step of Adam, above 0.
    batch_size : int
        Rows a step, at least 1.
    generator : torch.Generator, int or None
        Source of the order of rows.
    progress : Progress, bool or None
        Reports epochs.

    Returns
    -------
    list of nn.Module
        ``epochs // every`` copies, in evaluation mode and without gradients.

    Notes
    -----
    Dropout and other random layers draw from torch's global generator; leave them out where runs must repeat.

    Examples
    --------
    >>> line = torch.nn.utils.skip_init(nn.Linear, 1, 1)
    >>> _ = line.requires_grad_(False).weight.fill_(0.0), line.bias.fill_(0.0)
    >>> x = torch.linspace(-1, 1, 32)[:, None]
    >>> found = train_with_snapshots(line, x, 2 * x, loss=nn.functional.mse_loss, epochs=4, every=2, generator=0)
    >>> len(found), bool(found[1].weight > found[0].weight > 0)
    (2, True)
    """
    checks.tensor("x", x)
    checks.integer("epochs", epochs, low=1)
    checks.integer("every", every, low=1, high=epochs)
    checks.integer("batch_size", batch_size, low=1)
    if not isinstance(y, Tensor) or len(y) != len(x):
        raise checks.ArgumentError(
            f"y does not go with the {len(x)} rows of x; allowed: a Tensor with one row each. Pass targets."
        )
    net = copy.deepcopy(model).train().requires_grad_(True)
    optimizer = torch.optim.Adam(net.parameters(), lr=checks.positive("lr", lr))
    g, snapshots = as_generator(generator), []
    for epoch in track(range(1, epochs + 1), "training", progress=progress):
        for rows in randperm(len(x), generator=g, device=x.device).split(batch_size):
            optimizer.zero_grad()
            loss(net(x[rows]), y[rows]).backward()
            optimizer.step()
        if epoch % every == 0:
            snapshots.append(copy.deepcopy(net).eval().requires_grad_(False))
            snapshots[-1].zero_grad(set_to_none=True)
    return snapshots


def _blocks(n: int, m: int, task: str) -> Iterator[tuple[int, int]]:
    size = max(1, _BLOCK // (m * m * (2 * m + 1 if task == "quantile" else 1)))
    for start in range(0, n, size):
        yield start, min(start + size, n)
