"""Oracles of ST-DQR: normal responses, discs, intervals of one response, exact coverage, a curved response."""

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.exceptions import NotFittedError

from _common import Example
from perturbkit.core import statistics
from perturbkit.uncertainty import (
    STDQR,
    DirectionalQuantileRegression,
    MultivariateConformalizer,
    SplitConformalRegressor,
)
from perturbkit.uncertainty.conformal import _directional
from perturbkit.uncertainty.conformal._clouds import Surroundings


def data(n=60, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    y = np.stack([x[:, 0] + rng.normal(size=n), rng.normal(size=n)], 1)
    return x.astype(dtype), y.astype(dtype)


X, Y = data()
TINY = {"hidden": 4, "n_layers": 1, "epochs": 2, "n_points": 64, "n_directions": 8, "generator": 0}


def quick(**options):
    return STDQR(**TINY | {"vae_epochs": 2, "latent_dim": 2} | options)


def quantiles(**options):
    return DirectionalQuantileRegression(**TINY | options)


def disc(n=3000, seed=0, radius=1.0):
    rng = np.random.default_rng(seed)
    angle, share = rng.uniform(0, 2 * np.pi, n), rng.uniform(0, 1, n)
    return radius * np.sqrt(share)[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)


def conformalizer(cloud=None, **options):
    points = disc(200) if cloud is None else cloud
    return MultivariateConformalizer(lambda x: [points] * len(x), **{"generator": 0} | options)


def call(generator, dtype):
    kind = str(dtype)[6:]
    x, y = X.astype(kind), Y.astype(kind)
    made = quick(generator=generator).fit(x[:40], y[:40]).calibrate(x[40:], y[40:])
    return made.area(x[:3], 200), made.contains(x, y), made.quantiles_.predict(x[:2])


EXAMPLE = Example(
    call=call,
    stochastic=True,
    refusals=(
        (lambda: quick(alpha=1.0).fit(X, Y), "alpha is 1"),
        (lambda: quick(latent_dim=0).fit(X, Y), "latent_dim is 0"),
        (lambda: quick(kl_weight=0.0).fit(X, Y), "kl_weight is 0"),
        (lambda: quick(vae_epochs=0).fit(X, Y), "vae_epochs is 0"),
        (lambda: quick(n_directions=0).fit(X, Y), "n_directions is 0"),
        (lambda: quick(lr=0.0).fit(X, Y), "lr is 0"),
        (lambda: quantiles(hidden=0).fit(X, Y), "hidden is 0"),
        (lambda: quantiles(n_layers=0).fit(X, Y), "n_layers is 0"),
        (lambda: quantiles(epochs=0).fit(X, Y), "epochs is 0"),
        (lambda: quantiles(batch_size=0).fit(X, Y), "batch_size is 0"),
        (lambda: quantiles(n_points=0).fit(X, Y), "n_points is 0"),
        (lambda: quantiles().fit(X[:9], Y[:9]), "X has 9 rows"),
        (lambda: quantiles().fit(X, Y[:9]), "Y has shape"),
        (lambda: quantiles().fit(X, Y).predict(X[:, :1]), "X has shape"),
        (lambda: quantiles().fit(X, Y).contains(X, Y[:, :1]), "Y has shape"),
        (lambda: quick().fit(X, Y).calibrate(X[:8], Y[:8]), "8 calibration rows"),
        (lambda: conformalizer(alpha=0.0).calibrate(X, Y), "alpha is 0"),
        (lambda: conformalizer(n_candidates=0).calibrate(X, Y), "n_candidates is 0"),
        (lambda: conformalizer(scale=[1.0, 0.0]).calibrate(X, Y), "scale has a smallest entry of 0"),
        (lambda: conformalizer(scale=[1.0]).calibrate(X, Y), "scale has shape"),
        (lambda: conformalizer().calibrate(X, Y).area(X, 0), "n_points is 0"),
    ),
)  # fmt: skip


def test_a_normal_response_has_ellipsoids():
    rng = np.random.default_rng(1)
    root = np.array([[1.0, 0.0], [0.8, 0.6]])
    x = np.zeros((20_000, 1), dtype=np.float32)
    y = (np.array([3.0, -1.0]) + rng.normal(size=(20_000, 2)) @ root.T).astype(np.float32)
    made = DirectionalQuantileRegression(
        n_directions=64, hidden=16, epochs=20, lr=0.01, batch_size=512, generator=1
    ).fit(x, y)
    u = made.directions_.astype(float)
    np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1, rtol=1e-6)
    size = -scipy.stats.norm.ppf(made.level_) * np.linalg.norm(u @ root, axis=1)
    below = u @ [3.0, -1.0] - made.predict(x[:1])[0]
    np.testing.assert_allclose(below / size, 1, atol=0.05)
    # Together the half-planes hold 0.9: in two dimensions the level of a disc of that mass.
    assert made.level_ == pytest.approx(scipy.stats.norm.cdf(-np.sqrt(-2 * np.log(0.1))), rel=0.2)
    fresh = np.array([3.0, -1.0]) + rng.normal(size=(4000, 2)) @ root.T
    assert made.contains(x[:4000], fresh).mean() == pytest.approx(0.9, abs=0.02)


def test_the_size_of_regions_follows_the_inputs():
    rng = np.random.default_rng(2)
    x = rng.uniform(-1, 1, (4000, 1)).astype(np.float32)
    y = (np.hstack([x, -x]) + np.exp(x) * rng.normal(size=(4000, 2))).astype(np.float32)
    made = DirectionalQuantileRegression(n_directions=16, generator=1).fit(x, y)
    at = np.array([[-0.8], [0.0], [0.8]], dtype=np.float32)
    u = made.directions_.astype(float)
    below = (np.hstack([at, -at]) @ u.T - made.predict(at)).mean(1)
    np.testing.assert_allclose(below / (np.exp(at[:, 0]) * -scipy.stats.norm.ppf(made.level_)), 1, atol=0.15)


def test_half_spaces_clouds_and_membership_agree():
    x, y = data(300, 2)
    made = quantiles(epochs=10, n_points=512).fit(x, y * [1.0, 100.0])
    thresholds, u = made.predict(x[:5]), made.directions_
    np.testing.assert_allclose(u[:4], [[1, 0], [0, 1], [-1, 0], [0, -1]], atol=1e-12)
    np.testing.assert_allclose(np.sort(-u, axis=0), np.sort(u, axis=0), atol=1e-12)
    y = y * [1.0, 100.0]
    for row in range(5):
        inside = (y @ u.T >= thresholds[row]).all(1)
        np.testing.assert_array_equal(made.contains(np.tile(x[row], (300, 1)), y), inside)
        cloud = made.cloud(x[row : row + 1])[0]
        assert (cloud @ u.T >= thresholds[row] - 1e-9).all()
        # The cloud fills the region: it reaches near to every side.
        assert ((cloud @ u.T).min(0) - thresholds[row]).max() < 0.2 * np.ptp(thresholds[row])


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_directions_are_unit_and_in_pairs(d):
    u = _directional.directions(32, d, torch.Generator().manual_seed(0), torch.float64)
    assert len(u) >= (32 if d > 1 else 2)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(len(u), dtype=torch.float64))
    torch.testing.assert_close(u[: 2 * d], torch.cat([torch.eye(d), -torch.eye(d)]).double())
    assert all(((u + v).norm(dim=1) < 1e-9).any() for v in u)


def test_the_signed_distance_of_a_disc():
    rng = np.random.default_rng(3)
    around = Surroundings(disc(4000), rng.random((4000, 2)))
    y = rng.uniform(-2.5, 2.5, (500, 2))
    np.testing.assert_allclose(around.distance(y), np.linalg.norm(y, axis=1) - 1, atol=0.2)
    # A cloud of a single point has an outside, too.
    single = Surroundings(np.zeros((1, 2)), rng.random((8, 2)))
    assert single.distance(np.array([[0.0, 0.0]]))[0] < 0
    assert single.distance(np.array([[3.0, 4.0]]))[0] == pytest.approx(5.0)


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_regions_grow_or_shrink_to_the_right_disc(spread):
    rng = np.random.default_rng(4)
    y = spread * rng.normal(size=(500, 2))
    made = conformalizer(disc(1500), n_candidates=1500).calibrate(np.zeros((500, 1)), y)
    right = spread * np.sqrt(-2 * np.log(0.1))
    assert np.sign(made.radius_) == np.sign(right - 1)
    assert made.area(np.zeros((1, 1)), 20_000)[0] == pytest.approx(np.pi * right**2, rel=0.3)
    points = made.sample_region(np.zeros((1, 1)), 4000)[0]
    assert np.linalg.norm(points, axis=1).max() == pytest.approx(right, abs=0.25)
    assert made.contains(np.zeros((50, 1)), points[:50]).all()


@pytest.mark.parametrize("n", [9, 25])
def test_coverage_is_exact_in_finite_samples(n):
    rng, hits, draws = np.random.default_rng(5), 0, 300
    cloud = disc(40)
    for _ in range(draws):
        y = 0.7 * rng.standard_t(3, size=(n + 1, 2))
        made = conformalizer(cloud, n_candidates=32).calibrate(np.zeros((n, 1)), y[:n])
        hits += made.contains(np.zeros((1, 1)), y[n:])[0]
    interval = statistics.clopper_pearson(hits, draws, 1 - 1e-4)
    assert interval.high >= 0.9
    assert interval.low <= 0.9 + 1 / (n + 1)


def test_one_response_gives_conformalised_quantile_intervals():
    rng = np.random.default_rng(6)
    x = rng.uniform(1, 2, (300, 1))
    y = x[:, 0] * rng.normal(size=300)
    made = quantiles(epochs=20, n_points=4000).fit(x, y)
    q = made.predict(x)
    assert made.directions_.tolist() == [[1.0], [-1.0]]
    pair = np.stack([q[:, 0], -q[:, 1]], 1)
    new = slice(150, None)
    ours = MultivariateConformalizer(made.cloud, generator=0, n_candidates=4000).calibrate(
        x[new], 1.3 * y[new]
    )
    theirs = SplitConformalRegressor(alpha=0.1, score="quantile").fit(pair[new], 1.3 * y[new])
    assert ours.radius_ == pytest.approx(theirs.thresholds_[0], abs=0.02)
    length = np.diff(theirs.predict_interval(pair[:20]), axis=1)[:, 0]
    np.testing.assert_allclose(ours.area(x[:20]), length, rtol=0.02)


def test_a_region_is_a_function_of_its_row_alone():
    x, y = data(60, 7)
    made = quick().fit(x, y)
    together = made._cloud(x[:8])
    for i in range(8):
        np.testing.assert_allclose(made._cloud(x[i : i + 1])[0], together[i], rtol=1e-9)


def test_the_most_isolated_decoded_points_are_left_out():
    x, y = data(60, 11)
    made = quick(n_points=400).fit(x, y)
    (z,) = made.quantiles_.inside(x[:1], made._latents)
    decoded = made._vae.decode(made._x(x[:1]).expand(len(z), -1), z).numpy()
    kept = made._y(made._cloud(x[:1])[0]).numpy()
    assert len(kept) == pytest.approx(0.9 * len(z), abs=2)
    gone = np.array([p for p in decoded if np.abs(kept - p).sum(1).min() > 1e-9])
    tenth = [np.sort(np.linalg.norm(decoded - p, axis=1))[9] for p in (*gone, *kept)]
    assert min(tenth[: len(gone)]) >= max(tenth[len(gone) :]) - 1e-9


def test_a_direction_of_length_zero_does_no_harm(monkeypatch):
    g = torch.Generator().manual_seed(0)
    net = _directional.QuantileNet(1, 1, [4], g, torch.float32)
    monkeypatch.setattr(_directional, "randn", lambda shape, **_: torch.zeros(shape))
    loss = net.loss(torch.zeros(3, 1), torch.ones(3, 1), -2.0, -1.0, g)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_units_do_not_matter():
    x, y = data(60, 8)
    areas = []
    for units in (np.ones(2), np.array([1000.0, 0.01])):
        made = quick().fit(x[:40], y[:40] * units).calibrate(x[40:], y[40:] * units)
        areas.append(made.area(x[:4], 500) / np.prod(units))
        inside = made.contains(x, y * units)
    np.testing.assert_allclose(areas[0], areas[1], rtol=1e-5)
    np.testing.assert_array_equal(
        inside, quick().fit(x[:40], y[:40]).calibrate(x[40:], y[40:]).contains(x, y)
    )


def test_a_curved_response_gets_a_curved_region():
    rng = np.random.default_rng(9)
    t = rng.normal(size=(1400, 1))
    y = np.hstack([t, t**2 / 2 + 0.1 * rng.normal(size=(1400, 1))]).astype(np.float32)
    x = rng.uniform(size=(1400, 1)).astype(np.float32)
    made = STDQR(hidden=32, epochs=20, vae_epochs=100, batch_size=64, n_points=1024, generator=9).fit(
        x[:1000], y[:1000]
    )
    made.calibrate(x[1000:1200], y[1000:1200])
    convex = DirectionalQuantileRegression(hidden=32, epochs=20, n_points=1024, generator=9).fit(
        x[:1000], y[:1000]
    )
    box = MultivariateConformalizer(convex.cloud, scale=y.std(0), generator=9)
    box.calibrate(x[1000:1200], y[1000:1200])
    assert made.contains(x[1200:], y[1200:]).mean() > 0.82
    assert made.area(x[:5]).mean() < 0.7 * box.area(x[:5]).mean()
    # The hollow of the parabola is in the convex region alone.
    assert not made.contains(x[:1], [[0.0, 1.0]])[0]
    assert box.contains(x[:1], [[0.0, 1.0]])[0]


def test_latents_decode_to_their_responses_and_are_near_normal():
    x, y = data(400, 10)
    made = STDQR(hidden=32, vae_epochs=100, epochs=1, generator=0).fit(x, y)
    inputs, outputs = made._x(x), made._y(y)
    z, divergence = made._vae.encode(inputs, outputs, torch.Generator().manual_seed(0))
    assert (made._vae.decode(inputs, z) - outputs).square().mean() < 0.15
    assert z.mean(0).abs().max() < 0.25
    assert (z.std(0) - 1).abs().max() < 0.3
    mean, log_variance = made._vae.encoder(torch.cat([inputs, outputs], 1)).chunk(2, 1)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    exact = torch.distributions.kl_divergence(normal, torch.distributions.Normal(torch.zeros(1).double(), torch.ones(1).double()))  # fmt: skip
    torch.testing.assert_close(divergence, exact.sum(1))


def test_use_before_fitting_is_refused():
    for early in (
        lambda: quantiles().predict(X),
        lambda: quick().calibrate(X, Y),
        lambda: quick().fit(X, Y).contains(X, Y),
        lambda: conformalizer().contains(X, Y),
    ):
        with pytest.raises(NotFittedError, match="not fitted; allowed"):
            early()
