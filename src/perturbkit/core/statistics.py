"""Intervals and tests that turn measured numbers into statements with a confidence.

:func:`clopper_pearson` for a share of successes, :func:`bootstrap_interval` for any statistic,
:func:`conformal_quantile` for a threshold that new data exceed with at most a given chance, and
:func:`paired_comparison` for a method against its baseline on the same work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.stats

from perturbkit.core import checks, random
from perturbkit.core.results import Result

__all__ = [
    "Interval",
    "PairedComparison",
    "bootstrap_interval",
    "clopper_pearson",
    "conformal_quantile",
    "paired_comparison",
]

Statistic = Callable[..., Any]

# Numbers held at once while resampling.
_BLOCK = 2**22


@dataclass(frozen=True, eq=False)
class Interval(Result):
    """A confidence interval.

    Attributes
    ----------
    estimate : float or ndarray
        The estimate itself.
    low, high : float or ndarray
        Ends of the interval; an end that a one-sided interval lacks is the end of the parameter's range.
    confidence : float
        Chance with which such an interval covers the true value.
    """

    estimate: Any
    low: Any
    high: Any
    confidence: float


@dataclass(frozen=True, eq=False)
class PairedComparison(Result):
    """How one method compares with another on the same work.

    Attributes
    ----------
    difference : float
        Mean of ours minus baseline.
    standard_error : float
        Standard error of that mean over the pairs.
    low, high : float
        Student's t interval for the mean difference.
    confidence : float
        Its confidence.
    p_value : float
        Of the hypothesis that there is no difference.
    test : str
        The test that gave it.
    n : int
        Number of pairs.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    confidence: float
    p_value: float
    test: str
    n: int


def clopper_pearson(
    k: Any, n: Any, confidence: float = 0.95, *, side: Literal["both", "lower", "upper"] = "both"
) -> Interval:
    r"""Return the exact binomial interval for a share, given k successes in n trials.

    Parameters
    ----------
    k : int or array of int
        Successes.
    n : int or array of int
        Trials, at least one.
    confidence : float
        In (0, 1).
    side : {"both", "lower", "upper"}
        Which bounds are wanted; with one, all of the error is spent on it and the other end is 0 or 1.

    Returns
    -------
    Interval
        Floats for single numbers, arrays for arrays.

    Raises
    ------
    ArgumentError
        If k is not in 0..n, or n is below one.

    Notes
    -----
    The ends are quantiles of Beta(k, n-k+1) and Beta(k+1, n-k). The coverage is at least the confidence,
    whatever the true share.

    References
    ----------
    C. J. Clopper, E. S. Pearson (1934). The use of confidence or fiducial limits illustrated in the case of the
    binomial. Biometrika 26(4).

    Examples
    --------
    >>> interval = clopper_pearson(99, 100, 0.999, side="lower")
    >>> round(interval.low, 4), interval.high
    (0.9114, 1.0)
    """
    successes, trials = checks.array("k", k), checks.array("n", n)
    checks.between("confidence", confidence, 0, 1, inclusive="neither")
    checks.one_of("side", side, ("both", "lower", "upper"))
    whole = (successes == np.floor(successes)).all() and (trials == np.floor(trials)).all()
    if not whole or (trials < 1).any() or (successes < 0).any() or (successes > trials).any():
        raise checks.ArgumentError(
            f"k is {k} and n is {n}; allowed: whole numbers with n >= 1 and 0 <= k <= n. Pass counts, not shares."
        )
    error = (1 - confidence) / (2 if side == "both" else 1)
    inner = np.clip(successes, 1, None), np.clip(successes, None, trials - 1)
    low = np.where(successes == 0, 0.0, scipy.stats.beta.ppf(error, inner[0], trials - inner[0] + 1))
    high = np.where(successes == trials, 1.0, scipy.stats.beta.isf(error, inner[1] + 1, trials - inner[1]))
    if side == "lower":
        high = np.ones_like(high)
    if side == "upper":
        low = np.zeros_like(low)
    return Interval(_plain(successes / trials), _plain(low), _plain(high), confidence)


def bootstrap_interval(
    values: Any,
    statistic: Statistic = np.mean,
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    method: Literal["bca", "percentile"] = "bca",
    generator: random.Seed = None,
) -> Interval:
    """Return a bootstrap confidence interval of a statistic.

    Parameters
    ----------
    values : array, shape (n,) or (n, ...)
        Observations, resampled along the first dimension (rows stay together).
    statistic : callable
        ``statistic(array, axis=1)`` reduces dimension 1, that of the observations, of an array of shape
        (resamples, n, ...); NumPy's reductions do.
    n_resamples : int
        Number of resamples.
    confidence : float
        In (0, 1).
    method : {"bca", "percentile"}
        Bias-corrected and accelerated, or plain percentiles.
    generator : torch.Generator, int or None
        Source of randomness.

    Returns
    -------
    Interval

    Raises
    ------
    ArgumentError
        If there are fewer than two observations.

    Notes
    -----
    Costs ``n_resamples`` evaluations of the statistic, and n more for "bca", whose acceleration is a jackknife.
    Where all resamples agree, or the correction is not defined, the percentile interval is returned.

    References
    ----------
    B. Efron (1987). Better bootstrap confidence intervals. JASA 82(397).

    Examples
    --------
    >>> interval = bootstrap_interval(np.arange(50.0), generator=0)
    >>> bool(interval.low < 24.5 < interval.high)
    True
    """
    data = checks.array("values", values)
    if data.ndim == 0 or len(data) < 2:
        raise checks.ArgumentError(
            f"values has shape {data.shape}; allowed: at least two observations. Pass more data."
        )
    checks.integer("n_resamples", n_resamples, low=1)
    checks.between("confidence", confidence, 0, 1, inclusive="neither")
    checks.one_of("method", method, ("bca", "percentile"))
    rng = random.numpy_generator(generator)
    n = len(data)
    estimate = np.asarray(statistic(data[None], axis=1))[0]
    drawn = [
        np.asarray(statistic(data[rng.integers(0, n, (size, n))], axis=1))
        for size in _blocks(n_resamples, data.size)
    ]
    resampled = np.concatenate(drawn)
    tails = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    levels = np.broadcast_to(tails.reshape(2, *[1] * estimate.ndim), (2, *estimate.shape))
    if method == "bca":
        levels = _bca_levels(levels, data, statistic, estimate, resampled)
    flat, flat_levels = resampled.reshape(n_resamples, -1), levels.reshape(2, -1)
    ends = np.stack([np.quantile(flat[:, j], flat_levels[:, j]) for j in range(flat.shape[1])], 1)
    low, high = ends.reshape(2, *estimate.shape)
    return Interval(_plain(estimate), _plain(low), _plain(high), confidence)


def conformal_quantile(scores: Any, alpha: float, weights: Any = None) -> Any:
    r"""Return the threshold that a new score exceeds with chance at most alpha.

    Parameters
    ----------
    scores : array, shape (n,) or (n, m)
        Calibration scores, exchangeable with the new one along the first dimension; infinities are allowed.
    alpha : float
        Level, in (0, 1).
    weights : array, shape (n + 1,), optional
        Likelihood ratios of the new distribution over that of the calibration data, the new point's last, for
        covariate shift; only with scores of shape (n,).

    Returns
    -------
    float, or ndarray of shape (m,)
        The :math:`\lceil (n+1)(1-\alpha) \rceil`-th smallest score; infinity when there are too few scores for
        the level.

    Raises
    ------
    ArgumentError
        If a score is NaN, or weights are negative or of another length.

    Notes
    -----
    With weights it is the :math:`1-\alpha` quantile of :math:`\sum_i p_i \delta_{s_i} + p_{n+1} \delta_\infty`,
    where p are the weights over their sum.

    References
    ----------
    V. Vovk, A. Gammerman, G. Shafer (2005). Algorithmic Learning in a Random World. Springer.
    R. J. Tibshirani, R. Foygel Barber, E. J. Candès, A. Ramdas (2019). Conformal prediction under covariate
    shift. arXiv:1904.06019.

    Examples
    --------
    >>> conformal_quantile([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0], 0.1)
    9.0
    >>> conformal_quantile([1.0, 2.0], 0.1)
    inf
    """
    given = checks.array("scores", scores, ndim=(1, 2), finite=False)
    checks.between("alpha", alpha, 0, 1, inclusive="neither")
    if np.isnan(given).any():
        raise checks.ArgumentError(
            f"scores holds {int(np.isnan(given).sum())} NaN; allowed: numbers and infinities. Remove them."
        )
    n = len(given)
    if weights is None:
        # The product may exceed a whole number by rounding alone; the rank is then that number.
        rank = math.ceil((n + 1) * (1 - alpha) * (1 - 1e-12))
        ordered = np.concatenate([np.sort(given, axis=0), np.full_like(given[:1], np.inf)])
        return _plain(ordered[min(max(rank, 1), n + 1) - 1])
    mass = checks.array("weights", weights, shape=(n + 1,))
    if given.ndim != 1 or (mass < 0).any() or mass.sum() == 0:
        raise checks.ArgumentError(
            f"weights range from {mass.min():.4g} to {mass.max():.4g} for scores of shape {given.shape}; allowed: "
            "nonnegative weights with a positive sum, for scores of one dimension. Correct or leave them out."
        )
    order = np.argsort(given, kind="stable")
    reached = np.cumsum(mass[:-1][order]) >= (1 - alpha) * mass.sum() * (1 - 1e-12)
    return float(given[order][np.argmax(reached)]) if reached.any() else math.inf


def paired_comparison(
    ours: Any,
    baseline: Any,
    confidence: float = 0.95,
    *,
    alternative: Literal["two-sided", "greater", "less"] = "two-sided",
    test: Literal["sign-flip", "wilcoxon"] = "sign-flip",
    generator: random.Seed = 0,
) -> PairedComparison:
    r"""Compare two methods on the same seeds, data sets or examples.

    Parameters
    ----------
    ours, baseline : array, shape (n,)
        One number a pair, n at least 2.
    confidence : float
        Of the interval, in (0, 1).
    alternative : {"two-sided", "greater", "less"}
        What the p-value speaks for: ours differs, is greater, or is less.
    test : {"sign-flip", "wilcoxon"}
        The permutation test that flips the sign of each difference, or Wilcoxon's signed-rank test.
    generator : torch.Generator, int or None
        Source of randomness, used by the sign-flip test above 20 pairs.

    Returns
    -------
    PairedComparison

    Raises
    ------
    ArgumentError
        If the shapes differ or there are fewer than two pairs.

    Notes
    -----
    The sign-flip test asks for the share of sign patterns whose mean is at least as extreme as the observed
    one. Up to 20 pairs all :math:`2^n` patterns are counted; above, 100,000 are drawn and the p-value is
    (1 + count) / 100,001, which is valid for every number of draws. The interval and the test need not agree.

    Examples
    --------
    >>> result = paired_comparison([2.0, 3.1, 4.2, 5.0], [1.0, 2.0, 3.0, 4.1], alternative="greater")
    >>> round(result.difference, 3), result.p_value
    (1.05, 0.0625)
    """
    first = checks.array("ours", ours, ndim=1)
    second = checks.array("baseline", baseline, shape=first.shape)
    checks.between("confidence", confidence, 0, 1, inclusive="neither")
    checks.one_of("alternative", alternative, ("two-sided", "greater", "less"))
    checks.one_of("test", test, ("sign-flip", "wilcoxon"))
    d = first - second
    n = len(d)
    if n < 2:
        raise checks.ArgumentError(f"there is {n} pair; allowed: at least two. Pass one number a pair.")
    mean, error = float(d.mean()), float(d.std(ddof=1)) / math.sqrt(n)
    reach = float(scipy.stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    if not d.any():
        p_value = 1.0
    elif test == "wilcoxon":
        p_value = float(scipy.stats.wilcoxon(d, alternative=alternative).pvalue)
    else:
        p_value = _sign_flip(d, alternative, generator)
    return PairedComparison(mean, error, mean - reach, mean + reach, confidence, p_value, test, n)


def _plain(value: Any) -> Any:
    value = np.asarray(value)
    return float(value) if value.ndim == 0 else value


def _blocks(total: int, size: int) -> Iterator[int]:
    """Yield numbers of resamples of ``size`` elements that add up to the total and fit one block."""
    at_once = max(1, _BLOCK // size)
    for start in range(0, total, at_once):
        yield min(at_once, total - start)


def _bca_levels(
    levels: np.ndarray, data: np.ndarray, statistic: Statistic, estimate: np.ndarray, resampled: np.ndarray
) -> np.ndarray:
    """Move the percentile levels by the bias z0 and the acceleration a."""
    n = len(data)
    below = ((resampled < estimate).mean(0) + (resampled <= estimate).mean(0)) / 2
    bias = scipy.stats.norm.ppf(below)
    left_out, start = [], 0
    for size in _blocks(n, data.size):
        rows = np.arange(start, start + size)[:, None]
        others = np.arange(n - 1)[None] + (np.arange(n - 1)[None] >= rows)
        left_out.append(np.asarray(statistic(data[others], axis=1)))
        start += size
    jackknife = np.concatenate(left_out)
    influence = jackknife.mean(0) - jackknife
    with np.errstate(divide="ignore", invalid="ignore"):
        acceleration = (influence**3).sum(0) / (6 * (influence**2).sum(0) ** 1.5)
        z = bias + scipy.stats.norm.ppf(levels)
        moved = scipy.stats.norm.cdf(bias + z / (1 - acceleration * z))
    return np.where(np.isfinite(moved) & np.isfinite(bias), moved, levels)


def _sign_flip(d: np.ndarray, alternative: str, generator: random.Seed) -> float:
    n = len(d)
    observed = d.sum()
    if n <= 20:
        sums = np.zeros(1)
        for value in d:
            sums = np.concatenate([sums + value, sums - value])
        extra = 0
    else:
        rng = random.numpy_generator(generator)
        sums = np.concatenate([(2.0 * rng.integers(0, 2, (size, n)) - 1) @ d for size in _blocks(100_000, n)])
        extra = 1
    # Equal sums may differ by the order of summation.
    slack = 1e-12 * np.abs(d).sum()
    if alternative == "two-sided":
        extreme = np.abs(sums) >= abs(observed) - slack
    elif alternative == "greater":
        extreme = sums >= observed - slack
    else:
        extreme = sums <= observed + slack
    return float((extreme.sum() + extra) / (len(sums) + extra))
