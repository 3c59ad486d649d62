"""Answers to many queries about a population that stay right although each is chosen after seeing the answers before.

Use it to let an analyst, a leaderboard or a search explore one sample without overfitting it. Dwork, Feldman, Hardt, Pitassi,
Reingold and Roth (2015), Preserving Statistical Validity in Adaptive Data Analysis, arXiv:1411.2664.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from perturbkit.core import Result, checks
from perturbkit.core.random import Seed
from perturbkit.privacy._noise import Noise
from perturbkit.privacy.queries._sparse import (
    COMPARE,
    RESOLUTION,
    THRESHOLD,
    AboveThreshold,
    Drawn,
    PrivateMultiplicativeWeights,
    privacy,
    unit_values,
    whole_values,
)

__all__ = [
    "AttackReport",
    "PrivateMultiplicativeWeights",
    "StatisticalQueryOracle",
    "freedman_attack",
    "generalization_bound",
    "max_adaptive_queries",
]

Query = Callable[[Any], Any]
_MECHANISMS = ("naive", "split", "laplace", "gaussian", "pmw", "thresholdout")


@dataclass(frozen=True)
class AttackReport(Result):
    """What an overfitting analyst reached.

    Attributes
    ----------
    claimed : float
        The oracle's answer to the last query: the accuracy of the classifier found.
    true : float
        Its accuracy on the population.
    selected : int
        Features used.
    worst : float
        Largest distance of an answer from the population's value, 0.5 for each feature of pure noise.
    """

    claimed: float
    true: float
    selected: int
    worst: float


class StatisticalQueryOracle:
    r"""Answer an analyst's queries about the population that a sample was drawn from.

    Parameters
    ----------
    data : array, shape (n, ...)
        The sample, one independent draw a row. For "pmw" the kind of each row, as integers. The number of rows is public.
    mechanism : {"naive", "split", "laplace", "gaussian", "pmw", "thresholdout"}
        "naive": means of the sample. "split": means of n / n_queries fresh rows each. "laplace" and "gaussian": means with
        noise. "pmw": :class:`PrivateMultiplicativeWeights`. "thresholdout": means of ``train``, and of the sample, with
        noise, where the two differ.
    n_queries : int
        Queries answered at most.
    epsilon, rho : float, optional
        Pure, or zero-concentrated, privacy loss of all answers together: exactly one for "laplace", "pmw" and
        "thresholdout", rho for "gaussian", none for the others. Infinity for no noise.
    train : array, shape (m, ...), optional
        "thresholdout": rows that the analyst may see; they are not protected.
    universe : array, shape (kinds, ...), optional
        "pmw": all rows that there can be.
    threshold : float
        Difference from which "thresholdout" and "pmw" ask the sample, in (0, 1).
    max_updates : int
        How often these two may ask it.
    generator : torch.Generator, int or None
        Source of the noise; ``None``: the secure source of the operating system.

    Attributes
    ----------
    n : int
        Rows of the sample.
    n_answered : int
        Queries answered.
    epsilon, rho : float
        Privacy losses of all answers together, for a replaced row of the sample; infinite for "naive" and "split".

    Notes
    -----
    The mean of a query with values in [0, 1] has sensitivity 1/n. "laplace": noise of scale :math:`m / n\epsilon` for m
    queries, each :math:`\epsilon/m`-private, or :math:`1/n\epsilon_0` with :math:`m \epsilon_0^2 / 2 = \rho`; "gaussian":
    variance :math:`m / 2 \rho n^2`; "thresholdout": ``max_updates`` rounds of above threshold and of one Laplace answer, with
    equal losses. Losses add up, also for queries chosen after seeing answers. They are stated for queries that treat rows
    independently: a query must not combine rows, and as it is code that is given the rows, it must come from someone who may
    see them or from a language that cannot carry them away. Noise is exact, on integers, as in
    :class:`PrivateMultiplicativeWeights`, and never used twice. That private answers are close to the population is the
    statement of :func:`generalization_bound`.

    Cost: one evaluation of the query on all rows, or kinds.

    References
    ----------
    Dwork et al. (2015), arXiv:1411.2664; Dwork, Feldman, Hardt, Pitassi, Reingold and Roth (2015), arXiv:1506.02629, for
    "thresholdout".

    Examples
    --------
    >>> rows = np.array([0.0, 1.0, 1.0, 1.0])
    >>> StatisticalQueryOracle(rows, "naive").answer(lambda x: x > 0.5)
    0.75
    """

    def __init__(
        self,
        data: Any,
        mechanism: Literal["naive", "split", "laplace", "gaussian", "pmw", "thresholdout"] = "gaussian",
        n_queries: int = 1000,
        *,
        epsilon: float | None = None,
        rho: float | None = None,
        train: Any = None,
        universe: Any = None,
        threshold: float = 0.1,
        max_updates: int = 50,
        generator: Seed = None,
    ) -> None:
        self.mechanism = checks.one_of("mechanism", mechanism, _MECHANISMS)
        self.n_queries = checks.integer("n_queries", n_queries, low=1)
        self._data = np.atleast_1d(np.asarray(data))
        self.n, self.n_answered = len(self._data), 0
        needed = n_queries if mechanism == "split" else 1
        if self.n < needed:
            raise checks.ArgumentError(
                f"data has {self.n} rows; allowed: at least {needed} for {n_queries} queries. Add rows or ask less."
            )
        for name, value, wanted in (("train", train, "thresholdout"), ("universe", universe, "pmw")):
            if (value is None) == (mechanism == wanted):
                given = "not given" if value is None else "given"
                raise checks.ArgumentError(
                    f"{name} is {given} for {mechanism!r}; allowed: with {wanted!r}, and only there. Add it or leave it out."
                )
            checks.integer(f"the number of rows of {name}", len(np.atleast_1d(value)), low=1)
        self.epsilon = self.rho = math.inf
        if mechanism in ("naive", "split"):
            if epsilon is not None or rho is not None:
                raise checks.ArgumentError(
                    f"epsilon is {epsilon} and rho is {rho} for {mechanism!r}, which is not private; allowed: None. Choose "
                    "another mechanism, or leave them out."
                )
            return
        pure, concentrated = privacy(epsilon, rho)
        checks.between("threshold", threshold, 0, 1, inclusive="neither")
        checks.integer("max_updates", max_updates, low=1)
        source = Noise(generator)
        if mechanism == "gaussian":
            if rho is None:
                raise checks.ArgumentError(
                    f"epsilon is {epsilon} for 'gaussian'; allowed: rho. Give rho, or choose 'laplace'."
                )
            self._noise = Drawn.gaussian(source, RESOLUTION**2 * n_queries / (2 * concentrated))
            self.rho = concentrated
        elif mechanism == "laplace":
            each = pure / n_queries if rho is None else math.sqrt(2 * concentrated / n_queries)
            self._noise = Drawn.laplace(source, RESOLUTION / each)
            self.epsilon, self.rho = n_queries * each, n_queries * each * each / 2
        elif mechanism == "pmw":
            self._universe = np.atleast_1d(universe)
            self._inner = PrivateMultiplicativeWeights(
                len(self._universe), data, alpha=threshold, max_updates=max_updates, epsilon=epsilon, rho=rho,
                generator=generator,
            )  # fmt: skip
            self.epsilon, self.rho = self._inner.epsilon, self._inner.rho
        else:
            self._train, self.max_updates, self.updates = np.atleast_1d(train), max_updates, 0
            each = pure / (2 * max_updates) if rho is None else math.sqrt(concentrated / max_updates)
            self._noise = Drawn.laplace(source, RESOLUTION / each)
            level = math.ceil(threshold * self.n * RESOLUTION)
            self._test = AboveThreshold(source, level, RESOLUTION, each)
            self.epsilon, self.rho = 2 * max_updates * each, max_updates * each * each

    @property
    def remaining(self) -> int:
        """Queries that may still be asked."""
        return self.n_queries - self.n_answered

    def answer(self, query: Query) -> float:
        """Answer one query: a function of rows, shape (k, ...), to values in [0, 1], shape (k,); they are clipped to it.

        Raises
        ------
        ArgumentError
            If no query is left, or the query answers another shape.
        """
        if self.remaining == 0:
            raise checks.ArgumentError(
                f"all {self.n_queries} queries are answered; allowed: no more, since the privacy loss is spent. Set n_queries "
                "before the first."
            )
        found = self._answer(query)
        self.n_answered += 1
        return min(max(found, 0.0), 1.0)

    def _answer(self, query: Query) -> float:
        if self.mechanism == "pmw":
            return self._inner.answer(query(self._universe))
        if self.mechanism in ("naive", "split"):
            size = self.n // self.n_queries if self.mechanism == "split" else self.n
            start = self.n_answered * size if self.mechanism == "split" else 0
            rows = self._data[start : start + size]
            return float(unit_values(query(rows), size).mean())
        exact, total = int(whole_values(query(self._data), self.n).sum()), self.n * RESOLUTION
        if self.mechanism != "thresholdout":
            return (exact + self._noise.next()) / total
        seen = float(whole_values(query(self._train), len(self._train)).mean()) / RESOLUTION
        if self.updates >= self.max_updates:
            raise checks.ArgumentError(
                f"the sample was asked all {self.max_updates} times; allowed: queries before. Set max_updates before the first."
            )
        if not self._test.above(abs(exact - round(seen * total))):
            return seen
        self.updates += 1
        return (exact + self._noise.next()) / total


def generalization_bound(
    n: int,
    *,
    epsilon: float | None = None,
    rho: float | None = None,
    delta: float = 0.0,
    failure: float | None = None,
) -> float:
    r"""Return how far the sample's mean of a query may be from the population's if it was chosen privately.

    Parameters
    ----------
    n : int
        Rows of the sample, independent draws from the population.
    epsilon, rho : float
        Exactly one: privacy loss of all that the choice of the query depends on, for a replaced row.
    delta : float
        In [0, 1), with epsilon.
    failure : float, optional
        In (0, 1): bound the distance itself, with at most this chance of failing, for a pure loss; for all of m queries
        pass failure / m. By default the expected, signed, distance.

    Returns
    -------
    float
        At most 1.

    Raises
    ------
    ArgumentError
        If a value is not allowed, or ``failure`` is given without a pure loss.

    Notes
    -----
    In expectation: exchanging a row for a fresh one changes the chance of each value by a factor of at most
    :math:`e^\epsilon` and :math:`\delta`, so the bias is at most :math:`e^\epsilon - 1 + \delta`. With zCDP the output has at
    most :math:`n \rho` nats of information on a sample of independent rows, and the mean of any fixed query is
    1/4n-subgaussian, so the bias is at most :math:`\sqrt{\rho/2}`, which is :math:`\epsilon/2` for a pure loss.

    With a chance of failure :math:`\beta`: for a fixed output a, log P(a | S) moves by at most epsilon with each row; by
    McDiarmid's bound on its moment generating function, tilted to the samples that gave a, the ratio
    P(a | S) / P(a) is at most :math:`e^t`, :math:`t = s + \sqrt{s^2 + 2 s \log(2/\beta)}`, :math:`s = \epsilon^2 n / 4`, except
    with chance :math:`\beta/2`; Hoeffding's bound then gives :math:`\sqrt{(t + \log(4/\beta)) / 2n}`.

    References
    ----------
    Dwork et al. (2015), arXiv:1411.2664; Bun and Steinke (2016), arXiv:1605.02065, on information; Dwork
    et al. (2015), arXiv:1506.02629, on max-information.

    Examples
    --------
    >>> generalization_bound(1000, epsilon=0.1)
    0.05
    >>> round(generalization_bound(1000, epsilon=0.1, failure=0.05), 3)
    0.077
    """
    checks.integer("n", n, low=1)
    checks.between("delta", delta, 0, 1, inclusive="low")
    pure, concentrated = privacy(epsilon, rho)
    if failure is not None:
        checks.between("failure", failure, 0, 1, inclusive="neither")
        if epsilon is None or delta > 0:
            raise checks.ArgumentError(
                f"failure is {failure:g} with rho {rho} and delta {delta:g}; allowed: epsilon with delta 0. Give a pure loss, "
                "or leave failure out."
            )
        s = pure**2 * n / 4
        t = s + math.sqrt(s**2 + 2 * s * math.log(2 / failure))
        return min(math.sqrt((t + math.log(4 / failure)) / (2 * n)), 1.0)
    if epsilon is None:
        return min(math.sqrt(concentrated / 2), 1.0)
    return min(pure / 2 if delta == 0 else math.expm1(min(pure, 1.0)) + delta, 1.0)


def max_adaptive_queries(
    n: int,
    tau: float,
    mechanism: Literal["naive", "split", "laplace", "gaussian", "pmw"],
    *,
    log_universe: float | None = None,
) -> float:
    r"""Predict how many adaptive queries a sample answers at an error.

    Parameters
    ----------
    n : int
        Rows.
    tau : float
        Error, in (0, 1).
    mechanism : {"naive", "split", "laplace", "gaussian", "pmw"}
        As in :class:`StatisticalQueryOracle`.
    log_universe : float, optional
        "pmw": logarithm of the number of kinds of row.

    Returns
    -------
    float
        A prediction, not a guarantee; may be below 1, or infinite.

    Notes
    -----
    "naive": :math:`\pi^2 n \tau^2`, where :func:`freedman_attack` with cutoff 0 reaches a small tau. "split":
    :math:`4 n \tau^2`, one standard error. The others balance the bias of :func:`generalization_bound` with one deviation of the noise: "laplace" (basic
    composition) :math:`n \tau^2 / 2\sqrt 2`, no better than splitting; "gaussian" :math:`n^2 \tau^4 / 4`. "pmw" spends a third
    of tau each on bias, on the threshold and on the largest noise of all comparisons, which makes the logarithm of the
    number of order :math:`n \tau^3 / \sqrt{\log |X|}`.

    References
    ----------
    Dwork et al. (2015), arXiv:1411.2664.

    Examples
    --------
    >>> [round(max_adaptive_queries(n, 0.1, "gaussian")) for n in (1000, 2000)]
    [25, 100]
    """
    checks.integer("n", n, low=1)
    checks.between("tau", tau, 0, 1, inclusive="neither")
    checks.one_of("mechanism", mechanism, ("naive", "split", "laplace", "gaussian", "pmw"))
    if (log_universe is None) == (mechanism == "pmw"):
        raise checks.ArgumentError(
            f"log_universe is {log_universe} for {mechanism!r}; allowed: a number with 'pmw', and only there. Add it or leave it "
            "out."
        )
    if log_universe is None:
        factors = {"naive": math.pi**2, "split": 4.0, "laplace": 1 / (2 * math.sqrt(2))}
        return n**2 * tau**4 / 4 if mechanism == "gaussian" else factors[mechanism] * n * tau**2
    rho, updates = 2 * (tau / 3) ** 2, 4 * checks.positive("log_universe", log_universe) / (tau / 3) ** 2
    each = math.sqrt(2 * COMPARE * rho / updates)
    exponent = (1 - THRESHOLD) * each / 2 * n * tau / 3
    return math.exp(exponent) if exponent < 700 else math.inf


def freedman_attack(oracle: Any, n_features: int, *, cutoff: float | None = None) -> AttackReport:
    r"""Overfit an oracle's sample of pure noise: choose the features that seem to tell the label, and let them vote.

    Parameters
    ----------
    oracle : StatisticalQueryOracle
        Over rows of ``n_features`` independent signs, -1 or 1, and a label, -1 or 1, independent of them.
    n_features : int
        Features, at least 1; asks one query more.
    cutoff : float, optional
        Smallest distance from 0.5 of the answers whose features vote. Default: half a standard error, 0.25 / sqrt(n).

    Returns
    -------
    AttackReport

    Notes
    -----
    Query j asks how often feature j agrees with the label; the last one how often the majority of the chosen features, each
    with the sign of its answer, does; a tie counts one half. On the population all are 0.5. With exact means of n rows and
    ``cutoff`` 0 the last answer is about :math:`\Phi(\sqrt{2 m / \pi n})` for m features, :math:`0.5 + \sqrt{m/n} / \pi`
    if m is small; the default cutoff raises it, to :math:`\Phi(0.90 \sqrt{m/n})`.

    References
    ----------
    Freedman (1983), A Note on Screening Regression Equations, The American Statistician 37(2); Dwork et al. (2015),
    arXiv:1411.2664.

    Examples
    --------
    >>> rows = np.random.default_rng(0).choice([-1, 1], (100, 101))
    >>> freedman_attack(StatisticalQueryOracle(rows, "naive", 101), 100).claimed > 0.7
    True
    """
    checks.integer("n_features", n_features, low=1)
    if not hasattr(oracle, "answer") or oracle.remaining <= n_features:
        raise checks.ArgumentError(
            f"oracle has {getattr(oracle, 'remaining', 'no')} queries left; allowed: a StatisticalQueryOracle with at least "
            f"{n_features + 1}. Set its n_queries."
        )
    answers = np.array(
        [oracle.answer(lambda rows, j=j: (1 + rows[:, j] * rows[:, -1]) / 2) for j in range(n_features)]
    )
    least = 0.25 / math.sqrt(oracle.n) if cutoff is None else checks.nonnegative("cutoff", cutoff)
    chosen = np.flatnonzero(np.abs(answers - 0.5) >= least)
    signs = np.sign(answers[chosen] - 0.5)

    def accuracy(rows: Any) -> Any:
        return (1 + np.sign(rows[:, chosen] @ signs) * rows[:, -1]) / 2

    claimed = oracle.answer(accuracy)
    worst = float(np.abs(np.append(answers, claimed) - 0.5).max())
    return AttackReport(claimed, 0.5, len(chosen), worst)
