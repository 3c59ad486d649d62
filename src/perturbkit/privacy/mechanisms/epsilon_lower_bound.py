"""Lower bound on the privacy loss of any mechanism, from its outputs on two neighbouring inputs.

Use it to catch a broken mechanism: a bound above the stated epsilon disproves the guarantee; one below proves
nothing. Jagielski, Ullman and Oprea (2020), Auditing Differentially Private Machine Learning, arXiv:2006.07709.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from perturbkit.core import Result, checks
from perturbkit.core.statistics import clopper_pearson

__all__ = ["EpsilonBound", "epsilon_lower_bound"]


@dataclass(frozen=True)
class EpsilonBound(Result):
    """A lower bound on epsilon and the event that shows it.

    Attributes
    ----------
    epsilon : float
        With the given confidence the mechanism is not (epsilon', delta)-DP for any smaller epsilon'; 0 if nothing
        was shown.
    threshold : float
        The event: a score at or above it (``above``), or at or below it.
    above : bool
        Side of the event.
    likelier : str
        The input under which the event is likelier: "first" or "second".
    counts : tuple of int
        Times the event happened in the held-out halves of the two samples.
    n : tuple of int
        Sizes of these halves.
    confidence : float
        Of the bound.
    """

    epsilon: float
    threshold: float
    above: bool
    likelier: str
    counts: tuple[int, int]
    n: tuple[int, int]
    confidence: float


def epsilon_lower_bound(
    first: Any, second: Any, *, delta: float = 0.0, confidence: float = 0.999, n_thresholds: int = 200
) -> EpsilonBound:
    r"""Attack a mechanism by the best threshold on a score of its outputs.

    Parameters
    ----------
    first, second : array, shape (n,)
        One score an independent run on each of two neighbouring inputs; the output itself, or for outputs of more
        dimensions a projection or log-likelihood ratio. At least 20 each.
    delta : float
        The delta of the guarantee under attack, in [0, 1).
    confidence : float
        In (0, 1).
    n_thresholds : int
        Thresholds tried, at least 1.

    Returns
    -------
    EpsilonBound

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the samples are too small or an option is not allowed.

    Notes
    -----
    (epsilon, delta)-DP means :math:`P(E) \leq e^\epsilon Q(E) + \delta` for every event. The even runs choose the
    threshold; on the odd ones the exact binomial bounds of :math:`P(E)` from below and :math:`Q(E)` from above, each at
    half of the error, give :math:`\epsilon \geq \log((\underline p - \delta) / \overline q)`. The bound cannot exceed
    about log(n).

    References
    ----------
    Jagielski, Ullman and Oprea (2020), arXiv:2006.07709, section 4.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> bound = epsilon_lower_bound(rng.laplace(0, 1, 20000), rng.laplace(1, 1, 20000))
    >>> 0.7 < bound.epsilon < 1
    True
    """
    samples = [checks.array("first", first, ndim=1), checks.array("second", second, ndim=1)]
    checks.between("delta", delta, 0, 1, inclusive="low")
    checks.between("confidence", confidence, 0, 1, inclusive="neither")
    checks.integer("n_thresholds", n_thresholds, low=1)
    if min(map(len, samples)) < 20:
        raise checks.ArgumentError(
            f"first and second have {len(samples[0])} and {len(samples[1])} scores; allowed: at least 20 each. "
            "Run the mechanism more often."
        )
    error = (1 - confidence) / 2
    choose, judge = [s[::2] for s in samples], [s[1::2] for s in samples]
    tried = np.unique(np.quantile(np.concatenate(choose), np.linspace(0, 1, n_thresholds)))
    best = (-math.inf, float(tried[0]), True, 0)
    for above in (True, False):
        hits = [_hits(s, tried, above) for s in choose]
        for likelier in (0, 1):
            values = _bound(hits[likelier], hits[1 - likelier], choose, likelier, delta, error)
            place = int(np.argmax(values))
            if values[place] > best[0]:
                best = (float(values[place]), float(tried[place]), above, likelier)
    _, threshold, above, likelier = best
    counts = [int(_hits(s, np.array([threshold]), above)[0]) for s in judge]
    value = _bound(
        np.array([counts[likelier]]), np.array([counts[1 - likelier]]), judge, likelier, delta, error
    )[0]
    return EpsilonBound(
        max(float(value), 0.0), threshold, above, ("first", "second")[likelier], (counts[0], counts[1]),
        (len(judge[0]), len(judge[1])), confidence,
    )  # fmt: skip


def _hits(scores: np.ndarray, thresholds: np.ndarray, above: bool) -> np.ndarray:
    ordered = np.sort(scores)
    if above:
        return len(scores) - np.searchsorted(ordered, thresholds, side="left")
    return np.searchsorted(ordered, thresholds, side="right")


def _bound(
    hits: np.ndarray, others: np.ndarray, samples: list[np.ndarray], likelier: int, delta: float, error: float
) -> np.ndarray:
    low = clopper_pearson(hits, len(samples[likelier]), 1 - error, side="lower").low
    high = clopper_pearson(others, len(samples[1 - likelier]), 1 - error, side="upper").high
    return np.log(np.maximum(low - delta, 1e-300) / high)
