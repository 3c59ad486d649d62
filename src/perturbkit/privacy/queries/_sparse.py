"""Parts of what answers statistical queries: noise drawn ahead, above threshold, multiplicative weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from perturbkit.core import checks
from perturbkit.core.random import Seed
from perturbkit.privacy._noise import Noise, gaussian_variance, rational_above

# Query values are rounded to multiples of this, so that sums are integers and their noise exact.
RESOLUTION = 2**16
# Share of an above-threshold round that is spent on its threshold; the rest is for the many comparisons.
THRESHOLD = 0.25
# Share of a round of multiplicative weights for its comparisons; the rest is for the noisy answer.
COMPARE = 0.9
_BLOCK = 1024
# Largest scale, in whole values, at which the sampler's products fit 64 bits.
_LARGEST = 2.0**46


class Drawn:
    """Exact integer noise, one number at a time, drawn in blocks; zero at infinite privacy loss."""

    def __init__(self, draw: Callable[[int], np.ndarray] | None) -> None:
        self._draw = draw
        self._block: list[int] = []
        self._size = 8

    @classmethod
    def laplace(cls, source: Noise, scale: float) -> Drawn:
        """Return discrete Laplace noise of at least that scale."""
        if scale == 0:
            return cls(None)
        if scale > _LARGEST:
            raise checks.ArgumentError(
                f"the privacy loss asks for Laplace noise of scale {scale / RESOLUTION:.3g} in units of one row; allowed: up to "
                f"{_LARGEST / RESOLUTION:.3g}, beyond which its integers overflow. Raise epsilon or rho, or ask fewer queries."
            )
        fraction = rational_above(scale)
        return cls(lambda n: source.discrete_laplace(fraction, n))

    @classmethod
    def gaussian(cls, source: Noise, variance: float) -> Drawn:
        """Return discrete Gaussian noise of at least that variance."""
        if variance == 0:
            return cls(None)
        if variance > _LARGEST**2:
            raise checks.ArgumentError(
                f"the privacy loss asks for Gaussian noise of deviation {math.sqrt(variance) / RESOLUTION:.3g} in units of one "
                f"row; allowed: up to {_LARGEST / RESOLUTION:.3g}, beyond which its integers overflow. Raise rho, or ask fewer "
                "queries."
            )
        fraction = gaussian_variance(variance)
        return cls(lambda n: source.discrete_gaussian(fraction, n))

    def next(self) -> int:
        """Return one number, never to be returned again."""
        if self._draw is None:
            return 0
        if not self._block:
            self._block = self._draw(self._size).tolist()
            self._size = min(2 * self._size, _BLOCK)
        return self._block.pop()


class AboveThreshold:
    r"""Says of integers that depend on the data whether they are above a noisy threshold, until one is.

    Parameters
    ----------
    source : Noise
        Source of the noise.
    threshold : int
        Public.
    sensitivity : int
        By how much one row changes each value.
    epsilon : float
        Pure privacy loss of a round: all answers up to and including the first "above".

    Notes
    -----
    The threshold has discrete Laplace noise of scale :math:`\Delta / \epsilon_1`, each value fresh noise of scale
    :math:`2 \Delta / \epsilon_2`, with :math:`\epsilon_1 + \epsilon_2 = \epsilon`. For neighbours D, D' and the answers
    below, ..., below, above at k, hold the noise of the values before k fixed and let g be their largest noisy value. The
    event is g < threshold + r <= f_k + v. Taking :math:`r' = r + g(D') - g(D)` and
    :math:`v' = v + g(D') - g(D) + f_k(D) - f_k(D')` maps it for D one to one on that for D', with shifts of at most
    :math:`\Delta` and :math:`2 \Delta`, hence a factor of at most :math:`e^{\epsilon_1 + \epsilon_2}`; all is in integers, so
    this holds for the discrete noise exactly. If no value is above, r alone is shifted. The threshold is never reused after
    an answer "above".

    References
    ----------
    Lyu, Su and Li (2017), arXiv:1603.01699, algorithm 1 with c = 1.
    """

    def __init__(self, source: Noise, threshold: int, sensitivity: int, epsilon: float) -> None:
        self._threshold = threshold
        self._offsets = Drawn.laplace(source, sensitivity / (THRESHOLD * epsilon))
        self._noise = Drawn.laplace(source, 2 * sensitivity / ((1 - THRESHOLD) * epsilon))
        self._start()

    def _start(self) -> None:
        self._level = self._threshold + self._offsets.next()

    def above(self, value: int) -> bool:
        """Return whether the value is above; if so, a new round begins."""
        found = value + self._noise.next() >= self._level
        if found:
            self._start()
        return found


class PrivateMultiplicativeWeights:
    r"""Answer very many queries from a synthetic distribution that is corrected only where it is found to be wrong.

    Parameters
    ----------
    n_universe : int
        Kinds of row that there are, at least 2; public.
    data : array of int, shape (n,)
        The kind of each row, 0..n_universe - 1. Their number is public.
    alpha : float
        Error above which the distribution is corrected, in (0, 1), before noise.
    max_updates : int
        Corrections at most.
    epsilon, rho : float
        Exactly one: pure, or zero-concentrated, privacy loss of all answers together; infinity for no noise.
    learning_rate : float, optional
        Exponent of a correction. Default: twice the error found.
    generator : torch.Generator, int or None
        Source of the noise; ``None``: the secure source of the operating system.

    Attributes
    ----------
    hypothesis : ndarray, shape (n_universe,)
        The synthetic distribution; public, as all that follows from it.
    updates : int
        Corrections so far.
    epsilon, rho : float
        Privacy losses for a replaced row; epsilon is infinite if rho was given.

    Notes
    -----
    A query q has a value in [0, 1] for each kind. Its answer is that under the hypothesis, :math:`\sum_x w_x q(x)`, unless a
    sparse-vector comparison finds the sample's mean more than alpha away; then it is the mean with noise, and
    :math:`w_x \propto w_x e^{\mp \eta q(x)}`, down where the hypothesis was too high. By Hoeffding's lemma a correction with
    a true error g lowers the divergence of the data from the hypothesis by at least :math:`\eta g - \eta^2/8`; it starts at
    most at log n_universe, which bounds the corrections, by :math:`4 \log(n\_universe) / \alpha^2` without noise at the default
    rate.

    Privacy: each of the ``max_updates`` rounds is one run of above threshold, purely private, and one noisy sum, Laplace
    (epsilon) or Gaussian (rho); answers from the hypothesis cost nothing. Losses add up, also for rounds chosen after seeing
    answers (Bun and Steinke 2016; a pure loss e is :math:`e^2/2`-zCDP). Values are rounded to multiples of 2^-16 so that
    sums and noise are integers, without floating-point gaps. Once the corrections are used up queries are refused, since
    wrong answers could no longer be noticed; the hypothesis may still be used.

    Cost: O(n_universe) a query.

    References
    ----------
    Hardt and Rothblum (2010), FOCS; Dwork et al. (2015), arXiv:1411.2664.

    Examples
    --------
    >>> data = np.repeat([0, 1, 2, 3], [70, 10, 10, 10])
    >>> made = PrivateMultiplicativeWeights(4, data, alpha=0.1, rho=math.inf)
    >>> round(made.answer([1, 0, 0, 0]), 4), made.updates
    (0.7, 1)
    """

    def __init__(
        self,
        n_universe: int,
        data: Any,
        *,
        alpha: float,
        max_updates: int = 50,
        epsilon: float | None = None,
        rho: float | None = None,
        learning_rate: float | None = None,
        generator: Seed = None,
    ) -> None:
        checks.integer("n_universe", n_universe, low=2)
        checks.between("alpha", alpha, 0, 1, inclusive="neither")
        self.max_updates = checks.integer("max_updates", max_updates, low=1)
        self._rate = None if learning_rate is None else checks.positive("learning_rate", learning_rate)
        pure, concentrated = privacy(epsilon, rho)
        rows = checks.labels("data", data, n_classes=n_universe).numpy()
        self._counts = np.bincount(rows, minlength=n_universe)
        self._total = len(rows) * RESOLUTION
        source = Noise(generator)
        if rho is None:
            compare, release = (share * pure / max_updates for share in (COMPARE, 1 - COMPARE))
            self._noise = Drawn.laplace(source, RESOLUTION / release)
            self.epsilon, self.rho = pure, max_updates * (compare * compare + release * release) / 2
        else:
            compare = math.sqrt(2 * COMPARE * concentrated / max_updates)
            self._noise = Drawn.gaussian(
                source, RESOLUTION**2 * max_updates / (2 * (1 - COMPARE) * concentrated)
            )
            self.epsilon, self.rho = math.inf, concentrated
        self._test = AboveThreshold(source, math.ceil(alpha * self._total), RESOLUTION, compare)
        self.hypothesis = np.full(n_universe, 1 / n_universe)
        self.updates = 0

    def answer(self, query: Any) -> float:
        """Answer one query: an array of shape (n_universe,) with values in [0, 1], clipped to it.

        Raises
        ------
        ArgumentError
            If the query has another shape, or the corrections are used up.
        """
        values = whole_values(query, len(self._counts))
        if self.updates >= self.max_updates:
            raise checks.ArgumentError(
                f"all {self.max_updates} corrections are used up; allowed: queries before. Use the hypothesis, whose answers "
                "are no longer checked, or start with more max_updates, a larger alpha or more rows."
            )
        guess = float(self.hypothesis @ values) / RESOLUTION
        exact = int(self._counts @ values)
        if not self._test.above(abs(exact - round(guess * self._total))):
            return guess
        found = (exact + self._noise.next()) / self._total
        rate = 2 * abs(found - guess) if self._rate is None else self._rate
        weights = self.hypothesis * np.exp(math.copysign(rate, found - guess) * values / RESOLUTION)
        self.hypothesis = weights / weights.sum()
        self.updates += 1
        return min(max(found, 0.0), 1.0)


def whole_values(values: Any, n: int) -> np.ndarray:
    """Return a query's values as integers in 0..RESOLUTION; those outside [0, 1] are clipped, NaN is 0.

    Clipped and not refused: an error that depends on a row would tell of it.
    """
    return np.rint(unit_values(values, n) * RESOLUTION).astype(np.int64)


def unit_values(values: Any, n: int) -> np.ndarray:
    """Return a query's values, clipped to [0, 1], NaN as 0, or refuse another shape."""
    given = np.asarray(values, dtype=np.float64)
    if given.shape != (n,):
        raise checks.ArgumentError(
            f"the query answered shape {given.shape} to {n} rows; allowed: ({n},), one value in [0, 1] a row. Return one "
            "number a row."
        )
    return np.clip(np.nan_to_num(given, nan=0.0), 0, 1)


def privacy(epsilon: float | None, rho: float | None) -> tuple[float, float]:
    """Return (epsilon, infinity) or (infinity, rho), whichever is given."""
    if (epsilon is None) == (rho is None):
        raise checks.ArgumentError(
            f"epsilon is {epsilon} and rho is {rho}; allowed: exactly one of them. Give the privacy loss of all answers "
            "together in one currency."
        )
    for name, value in (("epsilon", epsilon), ("rho", rho)):
        if value is not None and value != math.inf:
            checks.positive(name, value)
    return (math.inf if epsilon is None else epsilon, math.inf if rho is None else rho)
