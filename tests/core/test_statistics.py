"""Intervals and tests against SciPy, closed forms and their coverage in simulation."""

import json
import math

import numpy as np
import pytest
import scipy.stats
import torch

from perturbkit.core import checks
from perturbkit.core.statistics import (
    Interval,
    PairedComparison,
    bootstrap_interval,
    clopper_pearson,
    conformal_quantile,
    paired_comparison,
)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 17), (999, 1000)])
@pytest.mark.parametrize("side", ["both", "lower", "upper"])
def test_clopper_pearson_agrees_with_scipy(k: int, n: int, side: str) -> None:
    alternative = {"both": "two-sided", "lower": "greater", "upper": "less"}[side]
    want = scipy.stats.binomtest(k, n, alternative=alternative).proportion_ci(0.9, method="exact")
    got = clopper_pearson(k, n, 0.9, side=side)
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=1e-9)
    assert got.estimate == k / n


def test_clopper_pearson_covers_for_every_share() -> None:
    # Exactly, not by simulation: the coverage is the binomial mass of the counts whose interval holds p.
    n = 30
    interval = clopper_pearson(np.arange(n + 1), n, 0.9)
    for p in np.linspace(0.001, 0.999, 101):
        covered = scipy.stats.binom.pmf(np.arange(n + 1), n, p)[
            (interval.low <= p) & (p <= interval.high)
        ].sum()
        assert covered >= 0.9 - 1e-12


@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize("name", ["mean", "median", "std"])
def test_bootstrap_agrees_with_scipy(method: str, name: str) -> None:
    x = np.random.default_rng(0).exponential(size=60)
    statistic = getattr(np, name)
    got = bootstrap_interval(x, statistic, n_resamples=20_000, method=method, confidence=0.9, generator=1)
    want = scipy.stats.bootstrap(
        (x,),
        statistic,
        n_resamples=20_000,
        method="BCa" if method == "bca" else method,
        confidence_level=0.9,
        rng=np.random.default_rng(2),
    ).confidence_interval
    width = want.high - want.low
    assert (got.low, got.high) == pytest.approx((want.low, want.high), abs=0.04 * width)


def test_bootstrap_covers() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(200):
        interval = bootstrap_interval(
            rng.exponential(size=40), n_resamples=400, confidence=0.9, generator=seed
        )
        hits += interval.low <= 1.0 <= interval.high
    assert 160 <= hits <= 196


def test_bootstrap_of_rows_keeps_pairs_together() -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(80, 2))
    x[:, 1] = x[:, 0] + 5
    interval = bootstrap_interval(x, lambda a, axis: (a[..., 1] - a[..., 0]).mean(axis), generator=0)
    assert (interval.low, interval.high) == pytest.approx((5, 5))
    both = bootstrap_interval(x, generator=0)
    assert both.low.shape == (2,)
    one = bootstrap_interval(x[:, 0], generator=0)
    assert both.low[0] == pytest.approx(one.low)


def test_bootstrap_of_a_constant_is_a_point_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    interval = bootstrap_interval(np.full(5, 2.0), generator=0)
    assert (interval.low, interval.high) == (2.0, 2.0)
    x = np.random.default_rng(0).normal(size=30)
    whole = bootstrap_interval(x, n_resamples=100, generator=0)
    monkeypatch.setattr("perturbkit.core.statistics._BLOCK", 30 * 7)
    parts = bootstrap_interval(x, n_resamples=100, generator=0)
    assert (whole.low, whole.high) == pytest.approx((parts.low, parts.high))


@pytest.mark.parametrize(("n", "alpha"), [(9, 0.1), (19, 0.1), (20, 0.1), (99, 0.01), (57, 0.37)])
def test_conformal_quantile_is_the_stated_rank(n: int, alpha: float) -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    rank = math.ceil(round((n + 1) * (1 - alpha), 9))
    assert conformal_quantile(scores, alpha) == rank
    assert conformal_quantile(scores, alpha, weights=np.ones(n + 1)) == rank
    assert (conformal_quantile(np.stack([scores, -scores], 1), alpha) == [rank, -(n + 1 - rank)]).all()


def test_conformal_quantile_is_infinite_with_too_few_scores() -> None:
    assert conformal_quantile(np.zeros(8), 0.1) == math.inf
    assert conformal_quantile(np.zeros(9), 0.1) == 0
    assert conformal_quantile(np.zeros(9), 0.1, weights=[1] * 9 + [1.01]) == math.inf


def test_conformal_quantile_covers() -> None:
    rng = np.random.default_rng(1)
    s = rng.normal(size=(20, 4000))
    rate = (rng.normal(size=4000) <= conformal_quantile(s, 0.2)).mean()
    # 20 scores: the exact coverage is 17/21.
    assert rate == pytest.approx(17 / 21, abs=0.025)


def test_conformal_weights_restore_coverage_under_shift() -> None:
    rng = np.random.default_rng(2)
    hits = {"plain": 0, "weighted": 0}
    for _ in range(600):
        # Scores depend on x; the new x comes from density 2x instead of uniform.
        x, new = rng.uniform(size=60), math.sqrt(rng.uniform())
        s, s_new = x + 0.1 * rng.normal(size=60), new + 0.1 * rng.normal()
        hits["plain"] += s_new <= conformal_quantile(s, 0.3)
        hits["weighted"] += s_new <= conformal_quantile(s, 0.3, weights=2 * np.append(x, new))
    assert hits["weighted"] / 600 >= 0.65
    assert hits["plain"] / 600 < 0.6


def test_paired_comparison_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.4, 1, 12), rng.normal(0, 1, 12)
    t = scipy.stats.ttest_rel(a, b)
    interval = t.confidence_interval(0.9)
    for alternative in ("two-sided", "greater", "less"):
        got = paired_comparison(a, b, 0.9, alternative=alternative)
        flips = scipy.stats.permutation_test(
            (a, b),
            lambda x, y, axis: (x - y).mean(axis),
            permutation_type="samples",
            alternative=alternative,
            n_resamples=np.inf,
        )
        assert got.p_value == pytest.approx(flips.pvalue, abs=1e-12)
        assert (got.low, got.high) == pytest.approx((interval.low, interval.high))
        assert got.difference / got.standard_error == pytest.approx(t.statistic)
        ranks = paired_comparison(a, b, alternative=alternative, test="wilcoxon")
        assert ranks.p_value == scipy.stats.wilcoxon(a, b, alternative=alternative).pvalue
        assert (ranks.test, ranks.n) == ("wilcoxon", 12)


def test_sign_flips_are_drawn_above_twenty_pairs() -> None:
    rng = np.random.default_rng(5)
    d = rng.normal(0.3, 1, 30)
    drawn = paired_comparison(d, np.zeros(30), generator=1)
    # Close to the t test for normal data of this size, and never zero.
    assert drawn.p_value == pytest.approx(scipy.stats.ttest_1samp(d, 0).pvalue, rel=0.15)
    assert drawn.p_value == paired_comparison(d, np.zeros(30), generator=1).p_value
    assert paired_comparison(np.ones(30), np.zeros(30)).p_value == pytest.approx(1 / 100_001)


def test_no_difference_and_smallest_p_value() -> None:
    assert paired_comparison([1.0, 2.0], [1.0, 2.0]).p_value == 1
    assert paired_comparison([1.0, 2.0], [1.0, 2.0], test="wilcoxon").p_value == 1
    assert paired_comparison(np.ones(6), np.zeros(6), alternative="greater").p_value == 2**-6


def test_p_values_are_uniform_without_a_difference() -> None:
    rng = np.random.default_rng(6)
    p = [paired_comparison(rng.normal(size=10), rng.normal(size=10)).p_value for _ in range(400)]
    assert scipy.stats.kstest(p, scipy.stats.uniform.cdf).pvalue > 1e-3


def test_results_are_plain_and_tensors_are_accepted() -> None:
    interval = clopper_pearson(torch.tensor([1, 2]), 5)
    back = Interval.from_dict(json.loads(json.dumps(interval.to_dict())))
    assert np.array_equal(back.low, interval.low)
    result = paired_comparison(torch.ones(3), torch.zeros(3))
    assert PairedComparison.from_dict(json.loads(json.dumps(result.to_dict()))).to_dict() == result.to_dict()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: clopper_pearson(5, 4), "0 <= k <= n"),
        (lambda: clopper_pearson(-1, 4), "0 <= k <= n"),
        (lambda: clopper_pearson(0.5, 4), "counts, not shares"),
        (lambda: clopper_pearson(0, 0), "n >= 1"),
        (lambda: clopper_pearson(1, 2, 1.0), "confidence"),
        (lambda: clopper_pearson(1, 2, side="left"), "side"),
        (lambda: bootstrap_interval([1.0]), "two observations"),
        (lambda: bootstrap_interval([1.0, math.nan]), "NaN"),
        (lambda: bootstrap_interval([1.0, 2.0], n_resamples=0), "n_resamples"),
        (lambda: bootstrap_interval([1.0, 2.0], method="t"), "method"),
        (lambda: bootstrap_interval([1.0, 2.0], confidence=0), "confidence"),
        (lambda: conformal_quantile([1.0, math.nan], 0.1), "NaN"),
        (lambda: conformal_quantile([1.0], 0.0), "alpha"),
        (lambda: conformal_quantile([1.0, 2.0], 0.1, weights=[1.0, 1.0]), "weights"),
        (lambda: conformal_quantile([1.0, 2.0], 0.1, weights=[1.0, 1.0, -1.0]), "nonnegative"),
        (lambda: paired_comparison([1.0, 2.0], [1.0]), "baseline"),
        (lambda: paired_comparison([1.0], [1.0]), "at least two"),
        (lambda: paired_comparison([1.0, 2.0], [1.0, 1.0], test="t"), "test"),
        (lambda: paired_comparison([1.0, 2.0], [1.0, 1.0], alternative="more"), "alternative"),
    ],
)
def test_refusals(call, match: str) -> None:
    with pytest.raises(checks.PerturbkitError, match=match):
        call()
