"""Private answers keep an adaptive analyst from overfitting, for far more queries than exact or fresh ones.

Freedman's analyst on pure noise, with as many features as rows: the exact oracle against Gaussian noise whose size is tuned on
other draws. The number of queries at a fixed error against the rows, for Gaussian noise and for splitting. Multiplicative
weights on 1,024 kinds of row against Gaussian noise for 10,000 and 50,000 conjunctions. Claimed beforehand: the exact oracle
claims an accuracy of at least 0.6 where it is 0.5; noise lowers the largest error by at least 1.8, below m^(1/4)/n^(1/2);
slopes 2 and 1, within 0.3; multiplicative weights have a smaller largest error with at most 50 corrections. Control: the
exact oracle against m^(1/4)/n^(1/2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from matplotlib.figure import Figure

from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.privacy import (
    AttackReport,
    PrivateMultiplicativeWeights,
    StatisticalQueryOracle,
    freedman_attack,
)

_TAU, _ROWS, _RHO = 0.15, 2000, 0.5


@paper(
    number=145,
    title="Preserving Statistical Validity in Adaptive Data Analysis",
    authors="Dwork, Feldman, Hardt, Pitassi, Reingold, Roth",
    year=2015,
    arxiv="1411.2664",
    claim="Answering through a differentially private mechanism gives accurate answers to quadratically, or exponentially, many "
    "adaptive queries in the number of rows, in place of linearly many.",
    method="perturbkit.privacy.StatisticalQueryOracle",
    needs="data",
    input="any",
    cost="one evaluation of the query on all rows, or on all kinds of row",
    seconds=110,
)
def reproduce(run: Run) -> Evidence:
    """The analyst's claims, growth with the rows, and very many queries."""
    comparisons, drawn = [], {}
    for n in (1000, 4000):
        naive = [_attack("naive", n, n, seed) for seed in run.seeds(8)]
        rho = _tuned(n, n, Run(run.seed + 1).seeds(2))
        noisy = [_attack("gaussian", n, n, seed, rho) for seed in run.seeds(8)]
        drawn[n] = naive, noisy
        worst = [r.worst for r in noisy]
        limit = n**0.25 / n**0.5
        comparisons += [
            Comparison.over_seeds(f"accuracy claimed by exact answers, n = m = {n}", [r.claimed for r in naive], [0.6] * 8, "higher",
                                  note="the true one is 0.5"),
            Comparison.over_seeds(f"largest error of exact answers over that of noisy ones, n = m = {n}",
                                  [r.worst for r in naive], worst, "higher", factor=1.8),
            Comparison.over_seeds(f"largest error of noisy answers against m^(1/4)/n^(1/2), n = m = {n}", worst, [limit] * 8, "lower"),
            Comparison.over_seeds(f"largest error of exact answers against m^(1/4)/n^(1/2), n = m = {n}",
                                  [r.worst for r in naive], [limit] * 8, "lower", control=True,
                                  note="must fail: exact answers overfit"),
        ]  # fmt: skip
    gaussian = {n: _capacity("gaussian", n, n**2 * _TAU**4 * 3.5, run) for n in (250, 500, 1000)}
    split = {n: _capacity("split", n, n * _TAU**2 / 2.5, run) for n in (4000, 16000, 64000)}
    comparisons += [
        Comparison("slope of log queries at error 0.15 in log n, Gaussian", _slope(gaussian), 2.0, "equal", margin=0.3, n=3),
        Comparison("slope of log queries at error 0.15 in log n, split", _slope(split), 1.0, "equal", margin=0.3, n=3),
    ]  # fmt: skip
    weights = {m: [_many(m, seed) for seed in run.seeds(3)] for m in (10_000, 50_000)}
    for m, found in weights.items():
        comparisons += [
            Comparison.over_seeds(f"largest error of multiplicative weights against Gaussian noise, {m} queries",
                                  [f[0] for f in found], [f[1] for f in found], "lower"),
            Comparison(f"largest number of corrections, {m} queries", max(f[2] for f in found), 50, "lower", n=3),
        ]  # fmt: skip
    return Evidence(
        comparisons,
        _figure(drawn, gaussian, split, weights),
        f"Largest errors over all answers, against the population. Multiplicative weights: {_ROWS} rows, rho {_RHO} in total, "
        "threshold 0.08, three-component mixtures of product distributions on ten bits, random conjunctions of up to five. "
        "If the corrections had been used up the error would count as 1.",
    )


def _attack(mechanism: str, n: int, m: int, seed: int, rho: float | None = None) -> AttackReport:
    # By columns, since each query reads one.
    rows = np.asfortranarray(np.random.default_rng(seed).choice(np.array([-1, 1], dtype=np.int8), (n, m + 1)))
    oracle = StatisticalQueryOracle(rows, mechanism, m + 1, rho=rho, generator=seed)  # type: ignore[arg-type]
    return freedman_attack(oracle, m)


def _tuned(n: int, m: int, seeds: list[int]) -> float:
    """Return the privacy loss whose largest error is smallest on other draws."""
    grid = [float(r) * math.sqrt(m) / n for r in np.geomspace(2, 60, 7)]
    return min(grid, key=lambda rho: np.mean([_attack("gaussian", n, m, seed, rho).worst for seed in seeds]))


def _capacity(mechanism: str, n: int, guess: float, run: Run) -> float:
    """Return the number of queries at which the largest error reaches the level, between those tried."""
    tried = sorted({max(2, round(guess * f)) for f in (0.35, 0.6, 1.0, 1.7, 3.0)})
    errors = []
    for m in tried:
        rho = _tuned(n, m, Run(run.seed + 1).seeds(2)) if mechanism == "gaussian" else None
        errors.append(np.mean([_attack(mechanism, n, m, seed, rho).worst for seed in run.seeds(8)]))
    return float(np.exp(np.interp(np.log(_TAU), np.log(np.maximum.accumulate(errors)), np.log(tried))))


def _many(m: int, seed: int) -> tuple[float, float, int]:
    """Return the largest errors of multiplicative weights and of Gaussian noise, and the corrections made."""
    rng = np.random.default_rng(seed)
    bits = (np.arange(1024)[:, None] >> np.arange(10)) & 1
    centres, shares = rng.uniform(0.1, 0.9, (3, 10)), rng.dirichlet(np.full(3, 3.0))
    population = sum(s * np.where(bits == 1, c, 1 - c).prod(1) for s, c in zip(shares, centres, strict=True))
    data = rng.choice(1024, _ROWS, p=population)
    made = PrivateMultiplicativeWeights(1024, data, alpha=0.08, max_updates=50, rho=_RHO, generator=seed)
    other = StatisticalQueryOracle(data, "gaussian", m, rho=_RHO, generator=seed)
    ours = theirs = 0.0
    for query in _conjunctions(rng, bits, m):
        true = float(population @ query)
        answer = made.answer(query) if made.updates < made.max_updates else math.inf
        ours = max(ours, min(abs(answer - true), 1.0))
        theirs = max(theirs, abs(other.answer(_of_kinds(query)) - true))
    return ours, theirs, made.updates


def _of_kinds(query: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda kinds: query[kinds]


def _conjunctions(rng: np.random.Generator, bits: np.ndarray, m: int) -> Iterator[np.ndarray]:
    for _ in range(m):
        width = rng.integers(1, 6)
        place, value = rng.permutation(10)[:width], rng.integers(0, 2, width)
        yield (bits[:, place] == value).all(1).astype(float)


def _slope(found: dict[int, float]) -> float:
    return float(np.polyfit(np.log(list(found)), np.log(list(found.values())), 1)[0])


def _figure(
    drawn: dict[int, tuple[list[AttackReport], list[AttackReport]]],
    gaussian: dict[int, float],
    split: dict[int, float],
    weights: dict[int, list[tuple[float, float, int]]],
) -> Figure:
    figure = Figure(figsize=(9, 3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    place = np.arange(len(drawn))
    for i, name in enumerate(("exact", "Gaussian noise")):
        left.bar(
            place + 0.3 * i, [np.mean([r.worst for r in pair[i]]) for pair in drawn.values()], 0.3, label=name
        )
    left.set_xticks(place + 0.15, [f"n = m = {n}" for n in drawn])
    left.set_title("largest error, adaptive analyst")
    for name, found in (("Gaussian noise", gaussian), ("split", split)):
        middle.loglog(list(found), list(found.values()), "o-", label=name)
    middle.set_title("queries at error 0.15")
    middle.set_xlabel("rows")
    for i, name in enumerate(("multiplicative weights", "Gaussian noise")):
        right.semilogx(
            list(weights), [np.mean([f[i] for f in found]) for found in weights.values()], "o-", label=name
        )
    right.set_title("largest error, conjunctions")
    right.set_xlabel("queries")
    for ax in (left, middle, right):
        ax.legend(frameon=False, fontsize=7)
    return figure
