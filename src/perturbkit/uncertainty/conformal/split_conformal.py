"""Split conformal prediction: sets and intervals with finite-sample coverage around any model, and a check for drift.

Use it whenever some labelled data were kept from training. Vovk, Gammerman and Shafer (2005), Algorithmic Learning in
a Random World; Romano, Sesia and Candès (2020), Classification with Valid and Adaptive Coverage, arXiv:2006.02544;
Romano, Patterson and Candès (2019), Conformalized Quantile Regression, arXiv:1905.03222.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from scipy.stats import ks_2samp
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from perturbkit.core import Result, checks
from perturbkit.core.random import Seed, as_generator, numpy_generator
from perturbkit.uncertainty.conformal import _parts

__all__ = ["DriftReport", "SplitConformalClassifier", "SplitConformalRegressor"]


@dataclass(frozen=True)
class DriftReport(Result):
    """Whether new data still look like the calibration data; if not, the coverage no longer holds.

    Attributes
    ----------
    statistic : float
        Kolmogorov-Smirnov distance between the two samples of scores, in [0, 1].
    p_value : float
        Of the hypothesis that the new rows are exchangeable with the calibration rows.
    level : float
        The level of the test.
    drifted : bool
        Whether ``p_value <= level``.
    scores : str
        What was compared: "labelled" scores of the truth, or "unlabelled" predictions.
    n : int
        New rows.
    """

    statistic: float
    p_value: float
    level: float
    drifted: bool
    scores: str
    n: int


class SplitConformalClassifier(BaseEstimator):
    r"""Sets of labels that hold the true one with chance at least 1 - alpha.

    Parameters
    ----------
    estimator : fitted classifier, nn.Module, Oracle or None
        What predicts: ``predict_proba``, or logits of a module. ``None``: ``X`` is the probabilities themselves,
        shape (n, K).
    alpha : float
        Chance of missing the true label, in (0, 1).
    score : {"aps", "lac", "raps"}
        "aps": probability of the labels above the given one, plus a share of its own; sets adapt to the row.
        "lac": one less its probability; the smallest sets in the mean. "raps": aps plus ``penalty`` for every label
        beyond the first ``k_reg``; keeps sets small where there are many classes.
    randomized : bool
        Take a uniform share of the label's own probability in "aps" and "raps" (exact coverage, at times an empty
        set) instead of all of it (larger sets).
    label_conditional : bool
        Give the guarantee for each true label separately; the calibration data then need rows of every label.
    penalty : float
        Of "raps", at least 0.
    k_reg : int
        Labels free of penalty, at least 0.
    generator : torch.Generator, int or None
        Source of the shares; made in ``fit`` and advanced by every prediction after it.

    Attributes
    ----------
    classes_ : ndarray, shape (K,)
        Labels, in the order of the columns.
    thresholds_ : ndarray, shape (groups, K or 1)
        Largest score that is kept, by group and (label_conditional) label.
    n_calibration_ : int
        Rows of calibration data.

    Notes
    -----
    A label y is kept if its score is at most the :math:`\lceil (n+1)(1-\alpha) \rceil`-th smallest calibration
    score, which is the same as its p-value :math:`(1 + \#\{s_i \geq s\}) / (n + 1)` being above alpha. If the
    calibration rows and the new one are exchangeable, the true label is in the set with chance at least 1 - alpha,
    and at most 1 - alpha + 1/(n+1) if scores have no ties; within each group or label with ``groups`` or
    ``label_conditional``. The chance is over calibration data and new row together, not for one row.

    References
    ----------
    Vovk, Gammerman and Shafer (2005). Sadinle, Lei and Wasserman (2019), arXiv:1609.00451 (lac). Romano, Sesia and
    Candès (2020), arXiv:2006.02544 (aps). Angelopoulos et al. (2021), arXiv:2009.14193 (raps).

    Examples
    --------
    >>> p = np.repeat([[0.8, 0.15, 0.05]], 20, axis=0)
    >>> y = np.array([0] * 16 + [1] * 3 + [2])
    >>> SplitConformalClassifier(alpha=0.1, score="lac").fit(p, y).predict_set(p[:1])
    array([[ True,  True, False]])
    """

    def __init__(
        self,
        estimator: Any = None,
        *,
        alpha: float = 0.1,
        score: Literal["aps", "lac", "raps"] = "aps",
        randomized: bool = True,
        label_conditional: bool = False,
        penalty: float = 0.01,
        k_reg: int = 1,
        generator: Seed = None,
    ) -> None:
        self.estimator = estimator
        self.alpha = alpha
        self.score = score
        self.randomized = randomized
        self.label_conditional = label_conditional
        self.penalty = penalty
        self.k_reg = k_reg
        self.generator = generator

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Calibrate on rows that the estimator has not seen.

        Parameters
        ----------
        X : array or Tensor
            What the estimator takes; probabilities without an estimator.
        y : array, shape (n,)
            Labels: of the estimator's ``classes_``, else 0..K-1.
        groups : array, shape (n,), optional
            Group of each row, for coverage within each group.

        Returns
        -------
        SplitConformalClassifier

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If data or options are not allowed, or a group or label has fewer than ``ceil(1/alpha - 1)`` rows.
        """
        alpha = checks.between("alpha", self.alpha, 0, 1, inclusive="neither")
        checks.one_of("score", self.score, ("aps", "lac", "raps"))
        checks.nonnegative("penalty", self.penalty)
        checks.integer("k_reg", self.k_reg, low=0)
        generator = as_generator(self.generator)
        p = _parts.probabilities(self.estimator, X)
        n, k = p.shape
        classes = np.asarray(getattr(self.estimator, "classes_", np.arange(k)))
        index = _class_index(y, classes, n)
        group, names = _parts.group_index(groups, n, None)
        self._random = numpy_generator(generator)
        scores = self._scores(p)[np.arange(n), index]
        category = group * k + index if self.label_conditional else group
        shown = [""] if names is None else [f"in group {name}" for name in names]
        if self.label_conditional:
            shown = [f"{s} with label {c}".strip() for s in shown for c in classes]
        found = _parts.Thresholds(scores, category, [s or "given" for s in shown], alpha)
        self.classes_, self.groups_, self.n_calibration_ = classes, names, n
        self.thresholds_ = found.values.reshape(-1, k if self.label_conditional else 1)
        self._fitted, self._calibration_scores, self._confidence = found, scores, p.max(1)
        return self

    def predict_set(self, X: Any, groups: Any = None) -> np.ndarray:
        """Return which labels are in the set of each row, bool of shape (n, K)."""
        scores, group, _ = self._new_scores(X, groups)
        return scores <= self.thresholds_[group]

    def p_values(self, X: Any, groups: Any = None) -> np.ndarray:
        """Return the p-value of each label, shape (n, K): small if the label does not fit the row."""
        scores, group, _ = self._new_scores(X, groups)
        k = scores.shape[1]
        category = group[:, None] * k + np.arange(k) if self.label_conditional else group[:, None]
        return self._fitted.p_values(scores, np.broadcast_to(category, scores.shape))

    def drift(self, X: Any, y: Any = None, *, level: float = 0.01) -> DriftReport:
        """Test whether new rows are exchangeable with the calibration rows.

        Parameters
        ----------
        X : array or Tensor
            New rows, as in ``fit``.
        y : array, optional
            Their labels: the scores of the truth are then compared, which sees every change that matters for
            coverage; without labels the confidence is compared.
        level : float
            Chance of a false alarm, in (0, 1).

        Returns
        -------
        DriftReport
        """
        scores, _, p = self._new_scores(X, None, grouped=False)
        if y is None:
            return _drift(self._confidence, p.max(1), level, "unlabelled")
        index = _class_index(y, self.classes_, len(p))
        return _drift(self._calibration_scores, scores[np.arange(len(p)), index], level, "labelled")

    def _new_scores(
        self, X: Any, groups: Any, grouped: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        check_is_fitted(self, "thresholds_", msg=_parts.NOT_FITTED)
        p = _parts.probabilities(self.estimator, X)
        if p.shape[1] != len(self.classes_):
            raise checks.ArgumentError(
                f"X has {p.shape[1]} classes; allowed: the {len(self.classes_)} of the calibration data. "
                "Use the same model for both."
            )
        group = _parts.fitted_groups(groups, len(p), self.groups_) if grouped else np.zeros(len(p), np.int64)
        return self._scores(p), group, p

    def _scores(self, p: np.ndarray) -> np.ndarray:
        """Return the score of every label of every row, shape (n, K); large scores do not fit."""
        if self.score == "lac":
            return 1 - p
        share = self._random.random((len(p), 1)) if self.randomized else np.ones((len(p), 1))
        penalty = self.penalty if self.score == "raps" else 0.0
        return _parts.adaptive_scores(p, share, penalty, self.k_reg)


class SplitConformalRegressor(BaseEstimator):
    r"""Intervals that hold the response with chance at least 1 - alpha.

    Parameters
    ----------
    estimator : fitted regressor, nn.Module, Oracle or None
        What predicts; ``None``: ``X`` is the predictions themselves.
    alpha : float
        Chance of missing, in (0, 1).
    score : {"absolute", "normalized", "quantile"}
        "absolute": predictions are means, shape (n,), and every interval is as wide. "normalized": predictions are
        (mean, positive scale), shape (n, 2), and the width follows the scale. "quantile" (conformalized quantile
        regression): predictions are the lower and upper quantile, shape (n, 2).

    Attributes
    ----------
    thresholds_ : ndarray, shape (groups,)
        What is added on both sides (in units of the scale for "normalized"); may be negative for "quantile".
    n_calibration_ : int
        Rows of calibration data.

    Notes
    -----
    Scores are :math:`|y - m|`, :math:`|y - m| / s` and :math:`\max(l - y, y - u)`; the set of all y whose score is
    at most the threshold of :class:`SplitConformalClassifier` is an interval, with the same guarantee. Where a
    negative threshold leaves nothing between the quantiles, the interval is their middle.

    References
    ----------
    Vovk, Gammerman and Shafer (2005). Lei et al. (2018), arXiv:1604.04173. Romano, Patterson and Candès (2019),
    arXiv:1905.03222.

    Examples
    --------
    >>> y = np.arange(-10.0, 10.0)
    >>> SplitConformalRegressor(alpha=0.2).fit(np.zeros(20), y).predict_interval(np.array([5.0]))
    array([[-4., 14.]])
    """

    def __init__(
        self,
        estimator: Any = None,
        *,
        alpha: float = 0.1,
        score: Literal["absolute", "normalized", "quantile"] = "absolute",
    ) -> None:
        self.estimator = estimator
        self.alpha = alpha
        self.score = score

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Calibrate on rows that the estimator has not seen.

        Parameters
        ----------
        X : array or Tensor
            What the estimator takes; predictions without an estimator.
        y : array, shape (n,)
            Responses.
        groups : array, shape (n,), optional
            Group of each row, for coverage within each group.

        Returns
        -------
        SplitConformalRegressor

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If data or options are not allowed, or a group has fewer than ``ceil(1/alpha - 1)`` rows.
        """
        alpha = checks.between("alpha", self.alpha, 0, 1, inclusive="neither")
        checks.one_of("score", self.score, ("absolute", "normalized", "quantile"))
        low, high, scale = self._band(X)
        scores = _outside(low, high, scale, checks.array("y", y, shape=(len(low),)))
        group, names = _parts.group_index(groups, len(low), None)
        shown = ["given"] if names is None else [f"in group {name}" for name in names]
        self.thresholds_ = _parts.Thresholds(scores, group, shown, alpha).values
        self.groups_, self.n_calibration_ = names, len(low)
        self._calibration_scores, self._middle = scores, (low + high) / 2
        return self

    def predict_interval(self, X: Any, groups: Any = None) -> np.ndarray:
        """Return the lower and upper end of each row's interval, shape (n, 2)."""
        check_is_fitted(self, "thresholds_", msg=_parts.NOT_FITTED)
        low, high, scale = self._band(X)
        reach = scale * self.thresholds_[_parts.fitted_groups(groups, len(low), self.groups_)]
        reach = np.maximum(reach, (low - high) / 2)
        return np.stack([low - reach, high + reach], 1)

    def drift(self, X: Any, y: Any = None, *, level: float = 0.01) -> DriftReport:
        """Test whether new rows are exchangeable with the calibration rows.

        With responses their scores are compared, without them the predictions; see
        :meth:`SplitConformalClassifier.drift`.
        """
        check_is_fitted(self, "thresholds_", msg=_parts.NOT_FITTED)
        low, high, scale = self._band(X)
        if y is None:
            return _drift(self._middle, (low + high) / 2, level, "unlabelled")
        scores = _outside(low, high, scale, checks.array("y", y, shape=(len(low),)))
        return _drift(self._calibration_scores, scores, level, "labelled")

    def _band(self, X: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the ends of the uncalibrated band and the scale by which it is widened."""
        found = _parts.predictions(self.estimator, X, 1 if self.score == "absolute" else 2)
        if self.score == "absolute":
            return found, found, np.ones_like(found)
        first, second = found.T
        wrong = second <= 0 if self.score == "normalized" else first > second
        if wrong.any():
            allowed = (
                "positive scales"
                if self.score == "normalized"
                else "a lower quantile that is not above the upper"
            )
            raise checks.ArgumentError(
                f"{int(wrong.sum())} rows of the predictions have {first[wrong][0]:g}, {second[wrong][0]:g}; "
                f"allowed: {allowed}. Correct or sort them."
            )
        return (first, first, second) if self.score == "normalized" else (first, second, np.ones_like(first))


def _class_index(y: Any, classes: np.ndarray, n: int) -> np.ndarray:
    """Return the column of each label."""
    if np.array_equal(classes, np.arange(len(classes))):
        return checks.labels("y", y, n=n, n_classes=len(classes)).numpy()
    given = np.asarray(y)
    order = np.argsort(classes)
    place = np.searchsorted(classes, given, sorter=order).clip(0, len(classes) - 1)
    index = order[place]
    if given.shape != (n,) or (classes[index] != given).any():
        raise checks.ArgumentError(
            f"y has shape {given.shape} and labels such as {given.flat[0]!r}; allowed: {n} labels among "
            f"{', '.join(map(str, classes))}. Use the labels that the estimator was fitted with."
        )
    return index


def _outside(low: np.ndarray, high: np.ndarray, scale: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(low - y, y - high) / scale


def _drift(before: np.ndarray, now: np.ndarray, level: float, scores: str) -> DriftReport:
    checks.between("level", level, 0, 1, inclusive="neither")
    found = ks_2samp(before, now)
    p = float(found.pvalue)
    return DriftReport(float(found.statistic), p, level, p <= level, scores, len(now))
