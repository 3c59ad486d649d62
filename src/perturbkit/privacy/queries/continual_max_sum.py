"""Largest column sum of a stream, released after every row: by recomputing now and then, or by a tree of partial sums.

Use it for running maxima and leaders of counts; a single running count is the tree with dimension 1. Jain,
Raskhodnikova, Sivakumar and Smith (2021), The Price of Differential Privacy under Continual Observation,
arXiv:2112.00828.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from perturbkit.core import checks
from perturbkit.core.random import Seed, numpy_generator
from perturbkit.privacy._noise import Noise, gaussian_variance

__all__ = [
    "BinaryTreeCounter",
    "ContinualMaxSum",
    "batch_max_sum",
    "continual_error_bounds",
    "hard_stream",
]

Rows = np.ndarray[Any, np.dtype[np.int64]]


class BinaryTreeCounter:
    r"""Column sums of a stream after every row, from noisy sums over blocks of doubling length.

    Parameters
    ----------
    horizon : int
        Rows at most, at least 1; public.
    rho : float
        Zero-concentrated privacy of the whole stream of answers, above 0; infinity for exact answers.
    dimension : int
        Columns.
    generator : torch.Generator, int or None
        Source of the noise; ``None``: the secure source of the operating system.

    Attributes
    ----------
    variance : float
        Of the noise of one block in each column.
    levels : int
        Blocks that hold a row, at most: floor(log2(horizon)) + 1.
    t : int
        Rows seen.

    Notes
    -----
    The sum of t rows is made of one block for each bit of t, so its noise has variance ``popcount(t) * variance`` with
    :math:`d L / 2\rho`. A row in :math:`\{0,1\}^d` moves at most L blocks by at most :math:`\sqrt d`, which makes the
    answers :math:`\rho`-zCDP for a replaced row, also for rows chosen after seeing answers. The noise is exact
    (:func:`discrete_gaussian`). Cost: d draws a row, L d numbers of memory.

    References
    ----------
    Dwork, Naor, Pitassi and Rothblum (2010), STOC; Chan, Shi and Song (2011), ACM TISSEC 14(3). Jain et al. (2021),
    arXiv:2112.00828.

    Examples
    --------
    >>> counter = BinaryTreeCounter(4, math.inf)
    >>> counter.update([[1], [0], [1]]).tolist()
    [[1], [1], [2]]
    """

    def __init__(self, horizon: int, rho: float, dimension: int = 1, *, generator: Seed = None) -> None:
        self.horizon = checks.integer("horizon", horizon, low=1)
        self.dimension = checks.integer("dimension", dimension, low=1)
        self.rho = _privacy(rho)
        self.levels = horizon.bit_length()
        exact = dimension * self.levels / (2 * rho)
        self._fraction = gaussian_variance(exact) if exact > 0 else Fraction(0)
        self.variance = float(self._fraction)
        self._source = Noise(generator)
        self._open: dict[int, np.ndarray] = {}
        self._sums = np.zeros(dimension, dtype=np.int64)
        self.t = 0

    def update(self, rows: Any) -> Rows:
        """Take one row, shape (d,), or several, shape (k, d), of zeros and ones; return the noisy sums after each.

        Raises
        ------
        ArgumentError
            If a row is not of zeros and ones, or the horizon would be passed; nothing is then taken.
        """
        given = _rows(rows, self.dimension, self.t, self.horizon)
        k, start = len(given), self.t
        times = np.arange(start + 1, start + k + 1)
        # The only new block at time t ends there and is as long as the lowest bit of t.
        drawn = _gaussian(self._source, self._fraction, k * self.dimension).reshape(k, self.dimension)
        ends = np.array([*self._open, *times], dtype=np.int64)
        noise = np.concatenate([np.reshape(b, (1, -1)) for b in self._open.values()] + [drawn])
        total = np.zeros((k, self.dimension), dtype=np.int64)
        order = np.argsort(ends)
        for level in range(self.levels):
            has = np.flatnonzero((times >> level) & 1)
            block = (times[has] >> level) << level
            total[has] += noise[order[np.searchsorted(ends, block, sorter=order)]]
        sums = self._sums + given.cumsum(0)
        self._sums, self.t = sums[-1], start + k
        still = [(self.t >> level) << level for level in range(self.levels) if (self.t >> level) & 1]
        self._open = {
            end: noise[place]
            for end, place in zip(ends.tolist(), range(len(ends)), strict=True)
            if end in still
        }
        found = sums + total
        return found[0] if np.ndim(rows) == 1 else found


class ContinualMaxSum:
    r"""The largest column sum of a stream, or its column, after every row.

    Parameters
    ----------
    dimension : int
        Columns d.
    horizon : int
        Rows at most; public.
    rho : float
        Zero-concentrated privacy of all answers together, above 0; infinity for exact answers.
    method : {"auto", "recompute", "tree", "zero"}
        "recompute": a fresh noisy answer every ``period`` rows, held in between. "tree": the noisy column sums of
        :class:`BinaryTreeCounter`. "zero": always 0. "auto": the least error by :func:`continual_error_bounds`.
    answer : {"max", "select"}
        The largest sum, or a column with (nearly) the largest sum; "zero" then always answers column 0.
    period : int, optional
        Of "recompute", 1..horizon; by default that of the least error bound.
    generator : torch.Generator, int or None
        Source of the noise; ``None``: the secure source of the operating system.

    Attributes
    ----------
    method : str
        What is used, with "auto" resolved.
    period : int or None
        Rows between fresh answers.

    Notes
    -----
    A replaced row moves the maximum by at most one, so each of K = floor(T/r) fresh answers has Gaussian noise of
    variance :math:`K / 2\rho`; the error is about :math:`r + \sqrt{T / 2 \rho r}`, which is of order
    :math:`(T/\rho)^{1/3}` at the best r. "select" uses the exponential mechanism, :math:`\epsilon^2/8 = \rho / K` each.
    No mechanism has an error below the order of :math:`\min(T^{1/3}, \sqrt d, T)`, up to logarithms: for the maximum,
    unlike for a sum, answering all along costs a power of T over answering once. A tree of maxima would be wrong: the
    maximum of a union is not the sum of maxima. Privacy also holds for rows chosen after seeing answers.

    References
    ----------
    Jain et al. (2021), arXiv:2112.00828. Cesar and Rogers (2021), arXiv:2004.07223 (the exponential mechanism in zCDP).

    Examples
    --------
    >>> stream = ContinualMaxSum(2, 4, math.inf)
    >>> stream.update([[0, 1], [1, 1], [0, 0], [1, 0]]).tolist()
    [1, 2, 2, 2]
    """

    def __init__(
        self,
        dimension: int,
        horizon: int,
        rho: float,
        method: Literal["auto", "recompute", "tree", "zero"] = "auto",
        *,
        answer: Literal["max", "select"] = "max",
        period: int | None = None,
        generator: Seed = None,
    ) -> None:
        self.dimension = checks.integer("dimension", dimension, low=1)
        self.horizon = checks.integer("horizon", horizon, low=1)
        self.rho = _privacy(rho)
        checks.one_of("method", method, ("auto", "recompute", "tree", "zero"))
        self.answer = checks.one_of("answer", answer, ("max", "select"))
        if period is not None:
            checks.integer("period", period, low=1, high=horizon)
        if method == "auto":
            bounds = continual_error_bounds(horizon, dimension, rho)
            method = min(("recompute", "tree", "zero"), key=bounds.__getitem__)  # type: ignore[assignment]
        self.method = method
        self.period = (period or _best_period(horizon, rho)) if method == "recompute" else None
        self._source = Noise(generator)
        self._tree = (
            BinaryTreeCounter(horizon, rho, dimension, generator=generator) if method == "tree" else None
        )
        self._sums = np.zeros(dimension, dtype=np.int64)
        self._held = self.t = 0

    def update(self, rows: Any) -> Any:
        """Take one row, shape (d,), or several, shape (k, d), of zeros and ones; return the answer after each.

        Returns
        -------
        int, or ndarray of shape (k,)

        Raises
        ------
        ArgumentError
            If a row is not of zeros and ones, or the horizon would be passed; nothing is then taken.
        """
        given = _rows(rows, self.dimension, self.t, self.horizon)
        times = np.arange(self.t + 1, self.t + len(given) + 1)
        if self._tree is not None:
            sums = self._tree.update(given)
            found = sums.argmax(1) if self.answer == "select" else sums.max(1)
        else:
            found = np.zeros(len(given), dtype=np.int64)
            sums = self._sums + given.cumsum(0)
            self._sums = sums[-1]
            if self.period is not None:
                fresh = np.flatnonzero(times % self.period == 0)
                values = np.concatenate([[self._held], self._fresh(sums[fresh])])
                found = values[np.searchsorted(fresh, np.arange(len(given)), side="right")]
                self._held = int(values[-1])
        self.t += len(given)
        return int(found[0]) if np.ndim(rows) == 1 else found

    def _fresh(self, sums: Rows) -> Rows:
        """Return one noisy answer a row of column sums."""
        assert self.period is not None
        count = self.horizon // self.period
        if self.answer == "max":
            variance = gaussian_variance(count / (2 * self.rho)) if self.rho < math.inf else Fraction(0)
            return sums.max(1, initial=0) + _gaussian(self._source, variance, len(sums))
        if self.rho == math.inf:
            return sums.argmax(1)
        half = Fraction(math.floor(math.sqrt(8 * self.rho / count) / 2 * 2**20), 2**20)
        return np.array([self._source.exponential_mechanism(row, half) for row in sums], dtype=np.int64)


def batch_max_sum(X: Any, rho: float, *, generator: Seed = None) -> int:
    r"""Return the largest column sum of a whole data set, once, with noise.

    Parameters
    ----------
    X : array, shape (n, d)
        Zeros and ones.
    rho : float
        Zero-concentrated privacy, above 0; infinity for the exact answer.
    generator : torch.Generator, int or None
        Source of the noise; ``None``: the secure source of the operating system.

    Returns
    -------
    int

    Notes
    -----
    Sensitivity one, hence variance :math:`1 / 2\rho`, whatever n and d.

    References
    ----------
    Jain et al. (2021), arXiv:2112.00828.

    Examples
    --------
    >>> batch_max_sum([[1, 0], [1, 1]], math.inf)
    2
    """
    given = np.asarray(X)
    columns = given.shape[1] if given.ndim == 2 else 1
    rows = _rows(given, columns, 0, max(len(given), 1) if given.ndim else 1)
    variance = gaussian_variance(1 / (2 * _privacy(rho))) if rho < math.inf else Fraction(0)
    return int(rows.sum(0).max() + _gaussian(Noise(generator), variance, 1)[0])


def continual_error_bounds(T: int, d: int, rho: float) -> dict[str, float]:
    r"""Predict the largest error over time of each way to release the maximum.

    Parameters
    ----------
    T, d : int
        Rows and columns, at least 1.
    rho : float
        Zero-concentrated privacy, above 0.

    Returns
    -------
    dict
        "batch" (one answer), "recompute", "tree", "zero", "best" (the least of the three continual ones), and
        "lower_order", the order :math:`\min(T^{1/3}, \sqrt d, T)` that no mechanism beats, without constants.

    Notes
    -----
    batch :math:`\sqrt{1/2\rho}`; recompute :math:`\min_r\, r + \sqrt{(K/2\rho)\, 2 \log 2K}`, K = T/r; tree
    :math:`\sqrt{(L/2)(dL/2\rho)\, 2\log 2T}` with L levels, half of whose bits are set in a typical t; zero T.

    References
    ----------
    Jain et al. (2021), arXiv:2112.00828, theorems 1.1 and 1.2.

    Examples
    --------
    >>> bounds = continual_error_bounds(4096, 8, 0.5)
    >>> bounds["best"] == bounds["tree"] or bounds["best"] == bounds["recompute"]
    True
    """
    checks.integer("T", T, low=1)
    checks.integer("d", d, low=1)
    _privacy(rho)
    levels = T.bit_length()
    found = {
        "recompute": float(_recompute_error(T, rho, _best_period(T, rho))),
        "tree": math.sqrt(levels / 2 * d * levels / (2 * rho) * 2 * math.log(2 * T)),
        "zero": float(T),
    }
    return found | {
        "best": min(found.values()),
        "batch": math.sqrt(1 / (2 * rho)),
        "lower_order": min(T ** (1 / 3), math.sqrt(d), float(T)),
    }


def hard_stream(T: int, d: int, generator: Seed = None) -> Rows:
    """Return a stream whose running maximum tells the column sums of a hidden block, one after the other.

    Parameters
    ----------
    T, d : int
        Rows and columns, at least 1.
    generator : torch.Generator, int or None
        Source of the hidden block.

    Returns
    -------
    ndarray of int64, shape (T, d)

    Notes
    -----
    The first n rows are random, n the cube root of T. Then n rows with bit j alone make column j the largest, so that the
    maximum is n plus its sum in the block, and n rows with all other bits make up for it; so for j = 0, 1, ... as long as
    rows last. Accurate answers thus give the d one-way marginals of the block, which private mechanisms cannot.

    References
    ----------
    Jain et al. (2021), arXiv:2112.00828, section 4.

    Examples
    --------
    >>> hard_stream(10, 2, 0).sum(0).tolist() == hard_stream(10, 2, 0)[:2].sum(0).__add__(4).tolist()
    True
    """
    checks.integer("T", T, low=1)
    checks.integer("d", d, low=1)
    n = max(1, round(T ** (1 / 3)))
    rng = numpy_generator(generator)
    place = np.arange(T) - n
    phase, rest = np.divmod(np.maximum(place, 0), 2 * n)
    alone = (phase[:, None] % d) == np.arange(d)
    out = np.where((rest < n)[:, None], alone, ~alone).astype(np.int64)
    out[:n] = rng.integers(0, 2, (min(n, T), d))
    return out


def _privacy(rho: float) -> float:
    return rho if rho == math.inf else checks.positive("rho", rho)


def _rows(rows: Any, d: int, t: int, horizon: int) -> Rows:
    given = np.asarray(rows)
    shaped = given[None] if given.ndim == 1 else given
    if (
        shaped.ndim != 2
        or shaped.shape[1] != d
        or len(shaped) == 0
        or not ((shaped == 0) | (shaped == 1)).all()
    ):
        raise checks.ArgumentError(
            f"rows has shape {given.shape}; allowed: zeros and ones of shape ({d},) or (k, {d}). Encode each person as one "
            "row of bits."
        )
    if t + len(shaped) > horizon:
        raise checks.ArgumentError(
            f"{len(shaped)} rows after {t} pass the horizon; allowed: {horizon} rows in all. Set the horizon before the "
            "stream starts: the privacy budget is spent at its end."
        )
    return shaped.astype(np.int64)


def _gaussian(source: Noise, variance: Fraction, n: int) -> Rows:
    return source.discrete_gaussian(variance, n) if variance > 0 else np.zeros(n, dtype=np.int64)


def _recompute_error(T: int, rho: float, period: Any) -> Any:
    count = T // period
    return period - 1 + np.sqrt(count / (2 * rho) * 2 * np.log(2 * count))


def _best_period(T: int, rho: float) -> int:
    return 1 + int(np.argmin(_recompute_error(T, rho, np.arange(1, T + 1))))
