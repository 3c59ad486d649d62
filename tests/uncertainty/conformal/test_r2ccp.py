"""Oracles of R2CCP: brute force over y, a known density, exact coverage, scikit-learn's own checks."""

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator

from _common import Example
from perturbkit.core import checks, statistics
from perturbkit.uncertainty import R2CCP
from perturbkit.uncertainty.conformal.r2ccp import _above


def data(rng, n=60, dtype=np.float64):
    x = rng.normal(size=(n, 2)).astype(dtype)
    return x, (x[:, 0] + rng.normal(size=n)).astype(dtype)


def quick(**options):
    return R2CCP(**{"hidden": 8, "n_layers": 1, "epochs": 2, "n_bins": 12, "generator": 0} | options)


X, Y = data(np.random.default_rng(0))

EXAMPLE = Example(
    call=lambda generator, dtype: quick(generator=generator).fit(X.astype(str(dtype)[6:]), Y).predict_set(X[:3]).pieces(0),
    stochastic=True,
    refusals=(
        (lambda: quick(alpha=0.0).fit(X, Y), "alpha is 0"),
        (lambda: quick(n_bins=1).fit(X, Y), "n_bins is 1"),
        (lambda: quick(p=0.0).fit(X, Y), "p is 0"),
        (lambda: quick(lr=-1.0).fit(X, Y), "lr is -1"),
        (lambda: quick(entropy_weight=-1.0).fit(X, Y), "entropy_weight is -1"),
        (lambda: quick(weight_decay=-1.0).fit(X, Y), "weight_decay is -1"),
        (lambda: quick(hidden=0).fit(X, Y), "hidden is 0"),
        (lambda: quick(n_layers=0).fit(X, Y), "n_layers is 0"),
        (lambda: quick(epochs=0).fit(X, Y), "epochs is 0"),
        (lambda: quick(batch_size=0).fit(X, Y), "batch_size is 0"),
        (lambda: quick(calibration_share=1.0).fit(X, Y), "calibration_share is 1"),
        (lambda: quick(alpha=0.01).fit(X, Y), "30 training and 30 calibration rows"),
        (lambda: quick().fit(X, Y, X[:8], Y[:8]), "8 calibration rows"),
        (lambda: quick().fit(X, Y, X[:20], Y[:8]), "y_cal has shape"),
        (lambda: quick().fit(X, Y).density(X, 1.0), "y_grid has shape"),
    ),
)  # fmt: skip


def test_two_bins_make_a_line():
    centres, q = np.array([0.0, 1.0]), np.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1], [0.4, 0.4]])
    union = _above(centres, q, 0.5)
    np.testing.assert_allclose(union.length, [0.5, 1, 0.5, 0], atol=1e-12)
    assert union.pieces(0) == [(pytest.approx(0.5), 1.0)]
    assert union.pieces(3) == []


@pytest.mark.parametrize("seed", range(4))
def test_set_against_brute_force_over_the_response(seed):
    rng = np.random.default_rng(seed)
    made = quick(n_bins=15).fit(X, Y)
    q = rng.dirichlet(np.ones(15), 6)
    # Equal neighbours and a set that reaches both ends.
    q[0, 4:7] = q[0, 4]
    q[1] = 1 / 15
    made._histogram = lambda x: q
    for made.threshold_ in (0.03, float(q[0, 4]), 1 / 15):
        union = made.predict_set(X[:6])
        grid = np.linspace(made.centres_[0] - 1, made.centres_[-1] + 1, 4001)
        for i in range(6):
            score = np.interp(grid, made.centres_, q[i], left=0, right=0)
            inside = ((union.low[i] <= grid[:, None]) & (grid[:, None] <= union.high[i])).any(1)
            # At a threshold that is hit exactly only rounding decides.
            clear = np.abs(score - made.threshold_) > 1e-12
            np.testing.assert_array_equal(inside[clear], (score >= made.threshold_)[clear])
            np.testing.assert_allclose(made._interpolated(np.tile(q[i], (4001, 1)), grid), score, atol=1e-12)
        expected = sum(high - low for low, high in union.pieces(2))
        assert union.length[2] == pytest.approx(expected, abs=1e-9)


def test_with_the_true_density_it_is_the_region_of_highest_density():
    """A triangle on [-1, 1]: the set of highest density of mass 1 - a is [-1 + sqrt a, 1 - sqrt a]."""
    rng = np.random.default_rng(5)
    made = quick(n_bins=3, alpha=0.2)
    made.fit(X, np.clip(Y, -0.9, 0.9))
    made.centres_ = np.array([-1.0, 0.0, 1.0])
    made._histogram = lambda x: np.tile([0.0, 1.0, 0.0], (len(x), 1))
    y = rng.triangular(-1, 0, 1, 40_000)
    scores = made._interpolated(made._histogram(y), y)
    made.threshold_ = -statistics.conformal_quantile(-scores, 0.2)
    coverage, length = made.coverage_length(np.zeros((40_000, 2)), rng.triangular(-1, 0, 1, 40_000))
    assert coverage == pytest.approx(0.8, abs=0.01)
    assert length == pytest.approx(2 * (1 - np.sqrt(0.2)), abs=0.015)


@pytest.mark.parametrize("n", [9, 25])
def test_coverage_is_exact_in_finite_samples(n):
    rng, hits, draws = np.random.default_rng(6), 0, 400
    x, y = data(rng, 40)
    for _ in range(draws):
        x_cal, y_cal = data(rng, n + 1)
        made = quick(epochs=1).fit(x, y, x_cal[:n], y_cal[:n])
        hits += made.predict_set(x_cal[n:]).contains(y_cal[n:])[0]
    interval = statistics.clopper_pearson(hits, draws, 1 - 1e-4)
    assert interval.high >= 0.9
    if n == 25:
        # At 9 rows one response outside the bins makes the set the whole line.
        assert interval.low <= 0.9 + 1 / (n + 1)


def test_threshold_is_an_order_statistic():
    rng = np.random.default_rng(7)
    x_cal, y_cal = data(rng, 49)
    made = quick(alpha=0.1).fit(X, Y, x_cal, y_cal)
    scores = [
        np.interp(v, made.centres_, q, left=0, right=0)
        for v, q in zip(y_cal, made._histogram(x_cal), strict=True)
    ]
    assert made.threshold_ == pytest.approx(np.sort(scores)[int(0.1 * 50) - 1], abs=1e-12)


def test_responses_outside_the_bins_make_the_set_the_whole_line():
    made = quick(alpha=0.1).fit(X, Y, X[:9], np.full(9, 1e6))
    assert made.threshold_ == 0
    np.testing.assert_array_equal(made.predict_set(X[:2]).hull, [[-np.inf, np.inf]] * 2)
    assert made.predict_set(X[:1]).contains([-1e9])[0]


def test_density_integrates_to_one_and_bins_reach_beyond_the_data():
    made = quick().fit(X, Y, X, Y)
    grid = np.linspace(made.centres_[0], made.centres_[-1], 11 * 50 + 1)
    area = np.trapezoid(made.density(X[:4], grid), grid, axis=1)
    np.testing.assert_allclose(area, 1, rtol=1e-6)
    step = made.centres_[1] - made.centres_[0]
    np.testing.assert_allclose([made.centres_[1], made.centres_[-2]], [Y.min(), Y.max()])
    assert step == pytest.approx((Y.max() - Y.min()) / 9)
    np.testing.assert_allclose(made.predict(X[:4]), made._histogram(X[:4]) @ made.centres_)


def test_two_modes_give_two_parts():
    rng = np.random.default_rng(8)
    x = rng.uniform(1, 2, (1600, 1))
    y = np.where(rng.random(1600) < 0.5, -2, 2) * x[:, 0] + 0.1 * rng.normal(size=1600)
    made = R2CCP(hidden=32, n_layers=1, epochs=60, lr=0.01, generator=0).fit(x[:1200], y[:1200])
    coverage, length = made.coverage_length(x[1200:], y[1200:])
    assert coverage > 0.84
    assert length < 3
    assert not made.predict_set([[1.5]]).contains([0.0])[0]


def test_more_entropy_flattens_the_histogram():
    x, y = data(np.random.default_rng(9), 200)
    spread = [
        (lambda q: -(q * np.log(q)).sum(1).mean())(
            quick(epochs=40, lr=0.02, entropy_weight=w).fit(x, y)._histogram(x)
        )
        for w in (0.05, 0.5, 5.0)
    ]
    assert spread[0] < spread[1] < spread[2] < np.log(12)


def test_scikit_learn_accepts_the_estimator():
    found = check_estimator(
        quick(hidden=64, epochs=80, alpha=0.4, lr=0.02, calibration_share=0.2, n_bins=30),
        on_skip=None,
        on_fail=None,
        # It sets alpha to 0.01, which for it is a penalty; here 99 rows to calibrate.
        expected_failed_checks={"check_regressors_train": "alpha is a level"},
    )
    failed = [f"{c['check_name']}: {c['exception']!r}" for c in found if c["status"] == "failed"]
    assert failed == []
    with pytest.raises(NotFittedError, match="not fitted; allowed"):
        quick().predict_set(X)
    with pytest.raises(checks.PerturbkitError):
        quick().fit(X, Y).density(X, [np.nan])
