"""Oracles of optimal input gains: the linearised minimiser, invariance under rescaling, whitening, and scikit-learn."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator

from _common import Example
from perturbkit.core import checks
from perturbkit.optim import OIGRegressor, optimal_input_gain


def data(seed=0, n=120, d=4, targets=2):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    return x, np.column_stack([np.sin(x @ rng.normal(size=d)) + 0.1 * k * x[:, k] for k in range(targets)])


def quick(**options):
    return OIGRegressor(**({"n_hidden": 6, "max_iter": 8, "generator": 0} | options))


X, Y = data()
ONE = np.ones((2, 2))
EXAMPLE = Example(
    call=lambda generator, dtype: quick(generator=generator).fit(X, Y),
    read=lambda made: [made.input_weights_, made.errors_],
    dtypes=(torch.float64,),
    stochastic=True,
    refusals=(
        (lambda: quick(n_hidden=0).fit(X, Y), "n_hidden is 0"),
        (lambda: quick(algorithm="lm").fit(X, Y), "algorithm is 'lm'"),
        (lambda: quick(max_iter=0).fit(X, Y), "max_iter is 0"),
        (lambda: quick(activation="gelu").fit(X, Y), "activation is 'gelu'"),
        (lambda: quick(ridge=-1.0).fit(X, Y), "ridge is -1"),
        (lambda: optimal_input_gain(ONE, np.ones((3, 1)), np.ones((3, 2)), np.ones((3, 1)), np.ones((1, 2))), "x has shape"),
        (lambda: optimal_input_gain(ONE, ONE, np.ones((3, 2)), ONE, ONE), "activation_slopes"),
        (lambda: optimal_input_gain(ONE, ONE, ONE, ONE, ONE, ridge=-1.0), "ridge is -1"),
    ),
)  # fmt: skip


def test_gains_minimise_the_linearised_error():
    rng = np.random.default_rng(1)
    g, x, slopes = rng.normal(size=(5, 3)), rng.normal(size=(40, 3)), rng.uniform(size=(40, 5))
    residual, through = rng.normal(size=(40, 2)), rng.normal(size=(2, 5))
    gains = optimal_input_gain(g, x, slopes, residual, through, ridge=0.0)

    def error(r):
        moved = (slopes * (x @ (g * r).T)) @ through.T
        return ((residual - moved) ** 2).sum()

    found = minimize(error, np.zeros(3), tol=1e-12)
    np.testing.assert_allclose(gains, found.x, rtol=1e-4, atol=1e-6)
    # In other units of the inputs the gains are in other units squared: the direction is the same.
    s = np.array([1e-3, 1.0, 1e4])
    np.testing.assert_allclose(optimal_input_gain(g * s, x * s, slopes, residual, through, ridge=0.1) * s**2,
                               optimal_input_gain(g, x, slopes, residual, through, ridge=0.1), rtol=1e-6)  # fmt: skip


def test_an_input_that_is_always_zero_has_no_gain():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(20, 3))
    x[:, 1] = 0
    gains = optimal_input_gain(
        rng.normal(size=(4, 3)),
        x,
        rng.uniform(size=(20, 4)),
        rng.normal(size=(20, 1)),
        rng.normal(size=(1, 4)),
    )
    assert gains[1] == 0
    assert np.isfinite(gains).all()


@pytest.mark.parametrize(
    ("algorithm", "gain", "invariant"),
    [("bp", True, True), ("hwo", True, True), ("hwo", False, True), ("bp", False, False)],
)
def test_units_of_the_inputs_do_not_matter_where_gains_or_whitening_are_used(algorithm, gain, invariant):
    s = 10 ** np.random.default_rng(3).uniform(-2, 2, 4)
    one, two = (quick(algorithm=algorithm, input_gain=gain).fit(x, Y) for x in (X, X * s))
    if invariant:
        np.testing.assert_allclose(one.errors_, two.errors_, rtol=1e-6)
        np.testing.assert_allclose(one.predict(X), two.predict(X * s), rtol=1e-4, atol=1e-6)
    else:
        assert np.abs(one.errors_ / two.errors_ - 1).max() > 0.05


def test_whitening_is_descent_on_whitened_inputs():
    x = np.column_stack([X, np.ones(len(X))])
    a = np.linalg.inv(np.linalg.cholesky(x.T @ x / len(x))).T  # a a^T is the inverse of the second moments
    rng = np.random.default_rng(4)
    g = rng.normal(size=(3, 5))
    whitened = x @ a
    np.testing.assert_allclose(whitened.T @ whitened / len(x), np.eye(5), atol=1e-10)
    # A step of the gradient in whitened coordinates, g a, moves the inputs' weights by g a a^T.
    made = quick(algorithm="hwo", input_gain=False, max_iter=1).fit(X, Y)
    start = quick(algorithm="hwo", input_gain=False, max_iter=1, generator=0)
    before = start.fit(X, Y).input_weights_
    np.testing.assert_allclose(made.input_weights_, before)
    plain = quick(algorithm="bp", input_gain=False, max_iter=1).fit(whitened[:, :-1], Y)
    assert plain.errors_[1] <= plain.errors_[0]
    np.testing.assert_allclose((g @ a) @ a.T, g @ np.linalg.inv(x.T @ x / len(x)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("algorithm", ["bp", "hwo"])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
def test_errors_fall_and_predictions_are_those_of_the_weights(algorithm, activation):
    made = quick(algorithm=algorithm, activation=activation, max_iter=30).fit(X, Y)
    assert (np.diff(made.errors_) <= 1e-12).all()
    assert made.errors_[-1] < 0.9 * made.errors_[0]
    assert ((made.predict(X) - Y) ** 2).sum() / len(X) == pytest.approx(made.errors_[-1], rel=1e-9)
    assert made.n_iter_ == len(made.errors_) - 1


def test_gains_beat_one_factor_on_unlike_scales():
    x, y = data(5, n=300, d=6, targets=1)
    x = x * 10 ** np.random.default_rng(6).uniform(-2, 2, 6)
    ours, plain = (quick(n_hidden=10, input_gain=g, max_iter=60).fit(x, y[:, 0]) for g in (True, False))
    assert ours.errors_[-1] < 0.8 * plain.errors_[-1]
    assert ours.predict(x).shape == (300,)


def test_scikit_learn_accepts_the_estimator():
    found = check_estimator(quick(), on_skip=None, on_fail=None)
    failed = [f"{c['check_name']}: {c['exception']!r}" for c in found if c["status"] == "failed"]
    assert failed == []
    with pytest.raises(NotFittedError):
        quick().predict(X)
    with pytest.raises(checks.PerturbkitError):
        quick(n_hidden=1.5).fit(X, Y)
