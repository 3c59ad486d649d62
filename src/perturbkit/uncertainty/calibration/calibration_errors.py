"""How far class probabilities are from the frequencies they claim, by the usual measures, with an interval.

Use it on held-out predictions of any classifier before and after calibration. Guo, Pleiss, Sun and Weinberger (2017),
On Calibration of Modern Neural Networks, arXiv:1706.04599; Nixon et al. (2019), Measuring Calibration in Deep
Learning, arXiv:1904.01685.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from perturbkit.core import Result, checks
from perturbkit.core.random import Seed, numpy_generator

__all__ = ["CalibrationErrors", "calibration_errors"]

# Probabilities below the smallest normal float32 count as it, so that an underflowed softmax has a finite loss.
_TINY = float(np.finfo(np.float32).tiny)
# Rows drawn at once while resampling.
_BLOCK = 2**22


@dataclass(frozen=True)
class CalibrationErrors(Result):
    """Measures of calibration on one set of predictions; zero is perfect for the three calibration errors.

    Attributes
    ----------
    ece : float
        Expected calibration error of the top label, bins of equal width, in [0, 1].
    ece_low, ece_high : float
        Bootstrap interval of it.
    adaptive_ece : float
        The same with bins of equal count.
    static_ece : float
        The class-wise error: bins of equal width for each class's probability, averaged over classes.
    nll : float
        Mean negative log-likelihood, nats a row.
    brier : float
        Mean squared distance of the probabilities to the label's indicator, in [0, 2].
    entropy : float
        Mean entropy of the predictions, nats.
    n : int
        Rows.
    """

    ece: float
    ece_low: float
    ece_high: float
    adaptive_ece: float
    static_ece: float
    nll: float
    brier: float
    entropy: float
    n: int


def calibration_errors(
    proba: Any,
    y: Any,
    *,
    n_bins: int = 15,
    confidence: float = 0.95,
    n_resamples: int = 1000,
    generator: Seed = None,
) -> CalibrationErrors:
    r"""Measure the calibration of predicted class probabilities.

    Parameters
    ----------
    proba : array, shape (n, K)
        Probabilities, rows that sum to one; K at least 2.
    y : array of int, shape (n,)
        True classes, 0..K-1.
    n_bins : int
        Bins of the three calibration errors, at least 1.
    confidence : float
        Of the interval of the ECE, in (0, 1).
    n_resamples : int
        Bootstrap resamples of rows, at least 1.
    generator : torch.Generator, int or None
        Source of the resamples.

    Returns
    -------
    CalibrationErrors

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the rows are no probabilities, a label is none of the classes, or an option is not allowed.

    Notes
    -----
    With confidence :math:`c = \max_k p_k` and correctness :math:`a`,
    :math:`ECE = \sum_b \frac{|b|}{n} |\overline{a}_b - \overline{c}_b|` over bins ``[i/B, (i+1)/B)``, the last one
    closed. Bins of equal count are cut at quantiles of the confidence, so equal confidences share a bin.

    The plug-in ECE is biased upward by sampling noise, and its resamples are biased by as much again. The interval
    is therefore the basic bootstrap's, ``2 ece - quantiles``, clipped to [0, 1] and widened to hold the estimate.

    A probability below 1.2e-38 (the smallest normal single) counts as that in the NLL. Cost: ``n n_resamples``.

    References
    ----------
    Guo, Pleiss, Sun and Weinberger (2017), arXiv:1706.04599. Nixon et al. (2019), arXiv:1904.01685.

    Examples
    --------
    >>> errors = calibration_errors([[0.9, 0.1]] * 10, [0] * 8 + [1] * 2, generator=0)
    >>> round(errors.ece, 3), round(errors.brier, 3)
    (0.1, 0.34)
    """
    p = checks.probabilities("proba", proba)
    n, k = p.shape
    labels = checks.labels("y", y, n=n, n_classes=k).numpy()
    checks.integer("n_bins", n_bins, low=1)
    checks.between("confidence", confidence, 0, 1, inclusive="neither")
    checks.integer("n_resamples", n_resamples, low=1)
    rng = numpy_generator(generator)

    top = p.max(1)
    gap = (p.argmax(1) == labels) - top
    bins = _equal_width(top, n_bins)
    ece = _binned(bins, gap, n_bins)
    drawn = np.concatenate([_resampled(bins, gap, n_bins, rng, r) for r in _blocks(n_resamples, n)])
    tails = np.quantile(drawn, [(1 + confidence) / 2, (1 - confidence) / 2])
    low, high = np.clip(2 * ece - tails, 0, 1)

    edges = np.quantile(top, np.arange(1, n_bins) / n_bins)
    hit = np.zeros_like(p)
    hit[np.arange(n), labels] = 1
    cell = _equal_width(p, n_bins) + n_bins * np.arange(k)
    return CalibrationErrors(
        ece=ece,
        ece_low=float(min(low, ece)),
        ece_high=float(max(high, ece)),
        adaptive_ece=_binned(np.searchsorted(edges, top, side="right"), gap, n_bins),
        static_ece=_binned(cell.ravel(), (hit - p).ravel(), n_bins * k),
        nll=float(-np.log(np.maximum(p[np.arange(n), labels], _TINY)).mean()),
        brier=float(((p - hit) ** 2).sum(1).mean()),
        entropy=float(-(p * np.log(np.maximum(p, _TINY))).sum(1).mean()),
        n=n,
    )


def _equal_width(value: np.ndarray, n_bins: int) -> np.ndarray:
    return np.clip((value * n_bins).astype(np.int64), 0, n_bins - 1)


def _binned(bins: np.ndarray, gap: np.ndarray, n_bins: int) -> float:
    """Return the sum over bins of |sum of gaps|, a row (for class-wise cells: a row and class)."""
    return float(np.abs(np.bincount(bins, gap, minlength=n_bins)).sum() / len(gap))


def _blocks(total: int, n: int) -> Iterator[int]:
    size = max(1, _BLOCK // n)
    for start in range(0, total, size):
        yield min(size, total - start)


def _resampled(
    bins: np.ndarray, gap: np.ndarray, n_bins: int, rng: np.random.Generator, size: int
) -> np.ndarray:
    """Return the ECE of ``size`` resamples of the rows."""
    n = len(gap)
    drawn = rng.integers(0, n, (size, n))
    cells = bins[drawn] + n_bins * np.arange(size)[:, None]
    sums = np.bincount(cells.ravel(), gap[drawn].ravel(), minlength=size * n_bins)
    return np.abs(sums.reshape(size, n_bins)).sum(1) / n
