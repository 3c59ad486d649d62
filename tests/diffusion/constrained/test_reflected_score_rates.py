"""Oracles of the spectral reflected model: uniform data, the folded normal kernel, one mode, and its own density."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from sklearn.utils import estimator_checks

from _common import Example
from perturbkit.diffusion import SpectralReflectedModel, folded_normal_log_prob, reflected_minimax_rate


def rows(n, d=1, seed=0):
    return np.random.default_rng(seed).random((n, d))


def call(generator, dtype):
    x = rows(60, 2).astype("float32" if dtype is torch.float32 else "float64")
    made = SpectralReflectedModel(n_modes=2).fit(x)
    return [made.score(x[:5], 0.1), made.density(x[:5]), made.sample(4, 5, generator)]


EXAMPLE = Example(
    call=call,
    stochastic=True,
    refusals=(
        (lambda: SpectralReflectedModel(0.0).fit(rows(5)), "smoothness is 0"),
        (lambda: SpectralReflectedModel(n_modes=0).fit(rows(5)), "n_modes is 0"),
        (lambda: SpectralReflectedModel(horizon=-1.0).fit(rows(5)), "horizon is -1"),
        (lambda: SpectralReflectedModel(early_stop=2.0).fit(rows(5)), "early_stop is 2"),
        (lambda: SpectralReflectedModel(method="mlp").fit(rows(5)), "method is 'mlp'"),
        (lambda: SpectralReflectedModel(training_steps=0).fit(rows(5)), "training_steps is 0"),
        (lambda: SpectralReflectedModel().fit(rows(5) + 1), "X has values"),
        (lambda: SpectralReflectedModel().fit(rows(5, 4)), "columns is 4"),
        (lambda: SpectralReflectedModel().fit(rows(5)).score(rows(5), 1.5), "t is 1.5"),
        (lambda: SpectralReflectedModel().fit(rows(5)).sample(0), "n is 0"),
        (lambda: reflected_minimax_rate(0, 1.0, 1), "n is 0"),
        (lambda: reflected_minimax_rate(5, 0.0, 1), "smoothness is 0"),
    ),
)


@pytest.mark.parametrize("t", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("d", [1, 2])
def test_the_series_is_the_folded_normal_kernel(t, d):
    point, x = rows(1, d, seed=3), rows(40, d, seed=4)
    made = SpectralReflectedModel(n_modes=24).fit(point)
    logs = folded_normal_log_prob(torch.tensor(x), torch.tensor(point), math.sqrt(2 * t))
    np.testing.assert_allclose(made.density(x, t), logs.sum(1).exp(), rtol=0, atol=1e-10)


def test_uniform_data_have_no_score():
    n = 5000
    made = SpectralReflectedModel(n_modes=5).fit(rows(n, seed=1))
    x, k = np.linspace(0.05, 0.95, 19)[:, None], np.arange(1, 6)
    fade = np.exp(-((np.pi * k) ** 2) * made.early_stop_)
    error = np.sqrt(((np.sqrt(2) * np.pi * k * np.sin(np.pi * k * x) * fade) ** 2).sum(1) / n)
    assert np.abs(made.score(x)[:, 0] / error).max() < 3
    drawn = made.sample(2000, 100, generator=2)
    assert kstest(drawn[:, 0], "uniform").pvalue > 0.01


def test_one_mode_in_closed_form():
    made = SpectralReflectedModel(n_modes=1).fit(rows(50, seed=5) ** 2)
    a = math.sqrt(2) * made.coefficients_[1]
    assert abs(a) > 0.3
    x = rows(30, seed=6)
    for t in (0.0, 0.05, 0.4):
        faded = a * math.exp(-(math.pi**2) * t)
        expected = -np.pi * faded * np.sin(np.pi * x) / (1 + faded * np.cos(np.pi * x))
        np.testing.assert_allclose(made.score(x, t), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_score_is_the_gradient_of_the_log_density(d):
    made = SpectralReflectedModel(n_modes=3).fit(rows(300, d) ** 1.5)
    x, h = 0.1 + 0.8 * rows(20, d, seed=2), 1e-6
    x = x[made.density(x, 0.02) > 0.06]
    assert len(x) > 5
    for i in range(d):
        step = h * np.eye(d)[i]
        slope = np.log(made.density(x + step, 0.02)) - np.log(made.density(x - step, 0.02))
        np.testing.assert_allclose(made.score(x, 0.02)[:, i], slope / (2 * h), rtol=1e-5, atol=1e-5)


def test_the_density_below_the_score_is_bounded():
    made = SpectralReflectedModel(n_modes=8).fit(0.1 + 0.1 * rows(200))
    x = np.linspace(0.4, 0.9, 21)[:, None]
    density = made.density(x)
    assert density.min() < 0.05
    slope = (made.density(x + 1e-6) - made.density(x - 1e-6)) / 2e-6
    np.testing.assert_allclose(made.score(x)[:, 0], slope / np.maximum(density, 0.05), rtol=1e-4, atol=1e-4)


def test_draws_have_the_density():
    made = SpectralReflectedModel().fit(np.random.default_rng(7).beta(1, 2, (4000, 1)))
    grid = np.linspace(0, 1, 2001)
    cumulative = np.concatenate(([0], np.cumsum(made.density(grid[:, None])[:-1]))) / 2000
    drawn = made.sample(2500, 400, generator=1)[:, 0]
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert kstest(drawn, lambda v: np.interp(v, grid, cumulative / cumulative[-1])).pvalue > 0.01
    assert kstest(drawn, "uniform").pvalue < 1e-6


def test_draws_around_a_point_have_the_first_times_spread():
    # Wide enough that few draws are where the density is below the bound of the score's denominator.
    made = SpectralReflectedModel(n_modes=12, early_stop=0.01).fit(np.full((1, 1), 0.5))
    drawn = made.sample(10_000, 400, generator=3)
    grid = np.linspace(0, 1, 1001)
    density = made.density(grid[:, None])
    spread = math.sqrt(np.trapezoid(density * (grid - 0.5) ** 2, grid))
    assert abs(drawn.std() / spread - 1) < 0.03
    assert abs(drawn.mean() - 0.5) < 0.01


def test_modes_and_first_time_follow_the_rate():
    for n, s, d in ((1000, 1.0, 1), (500, 2.0, 2), (1000, 3.0, 1)):
        made = SpectralReflectedModel(s).fit(rows(n, d))
        assert made.n_modes_ == math.ceil(n ** (1 / (2 * s + d)))
        assert made.early_stop_ == pytest.approx(n ** (-max(s, 2) / (2 * s + d)) / math.pi**2)
        assert len(made.coefficients_) == (made.n_modes_ + 1) ** d
    assert reflected_minimax_rate(10_000, 2.0, 1) == pytest.approx(10_000**-0.4)
    assert reflected_minimax_rate(10_000, 1.0, 2) == pytest.approx(0.1)


def test_a_network_learns_the_same_score():
    x = np.random.default_rng(3).beta(1, 2, (2000, 1))
    series = SpectralReflectedModel(n_modes=2).fit(x)
    made = SpectralReflectedModel(method="network", training_steps=250, random_state=0, early_stop=0.01).fit(
        x
    )
    grid = np.linspace(0.1, 0.7, 13)[:, None]
    found, expected = made.score(grid, 0.05), series.score(grid, 0.05)
    assert np.abs(found - expected).mean() < 0.35 * np.abs(expected).mean()
    again = SpectralReflectedModel(method="network", training_steps=250, random_state=0, early_stop=0.01).fit(
        x
    )
    assert np.array_equal(found, again.score(grid, 0.05))


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_parameters_default_constructible,
    ],
    ids=lambda check: check.__name__,
)
def test_is_an_estimator(check):
    check("SpectralReflectedModel", SpectralReflectedModel())
