"""Oracles of perturbed likelihood: one latent, probabilistic PCA, exact Gaussian evidence, and the runaway that it cures."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from _common import Example
from perturbkit.core import checks
from perturbkit.diffusion import PerturbedLikelihoodGenerator, perturbation_scale
from perturbkit.diffusion.training.perturbed_likelihood import _TRIED, _Model


def circle(n=60, seed=0, dtype=np.float64):
    angle = 2 * np.pi * np.random.default_rng(seed).random(n)
    return np.column_stack([np.cos(angle), np.sin(angle)]).astype(dtype)


def quick(*arguments, **options):
    return PerturbedLikelihoodGenerator(
        *arguments, **{"n_latent": 8, "max_iter": 5, "batch_size": 16, "generator": 0, **options}
    )


class Constant(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.level = nn.Parameter(torch.full((d,), 0.3))

    def forward(self, z):
        return self.level.expand(len(z), -1)


EXAMPLE = Example(
    model=lambda: nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2)),
    with_model=lambda model, generator, dtype: quick(model, generator=generator).fit(
        circle(dtype=np.float32 if dtype == torch.float32 else np.float64)
    ),
    read=lambda model: [model.sample(3, 0), model.score_samples(model.sample(4, 1))],
    stochastic=True,
    refusals=(
        (lambda: quick(lambda z: z).fit(circle()), "generator_net is a function"),
        (lambda: quick(nn.Linear(1, 3)).fit(circle()), "a row of the data"),
        (lambda: quick(nn.Linear(2, 2)).fit(circle()), r"does not take latents of shape \(1, 1\)"),
        (lambda: quick(intrinsic_dim=0).fit(circle()), "intrinsic_dim is 0"),
        (lambda: quick(latent_dim=0).fit(circle()), "latent_dim is 0"),
        (lambda: quick(latent="beta").fit(circle()), "latent is 'beta'"),
        (lambda: quick(perturbation="none").fit(circle()), "perturbation is 'none'"),
        (lambda: quick(perturbation=-0.1).fit(circle()), "perturbation is -0.1"),
        (lambda: quick(n_latent=0).fit(circle()), "n_latent is 0"),
        (lambda: quick(noise_floor=0.0).fit(circle()), "noise_floor is 0"),
        (lambda: quick(max_iter=0).fit(circle()), "max_iter is 0"),
        (lambda: quick(lr=0.0).fit(circle()), "lr is 0"),
        (lambda: quick(batch_size=1.5).fit(circle()), "batch_size is 1.5"),
        (lambda: quick(smoothness=0.0).fit(circle()), "smoothness is 0"),
        (lambda: quick().fit(circle()).sample(0), "n_samples is 0"),
        (lambda: perturbation_scale(0, 1.0, 1.0), "n is 0"),
        (lambda: perturbation_scale(10, 1.0, 0.0), "intrinsic_dim is 0"),
    ),
)


def test_one_latent_gives_mean_and_variance():
    x = np.random.default_rng(1).normal([3.0, -1.0, 0.0], 2.0, (400, 3))
    model = quick(Constant(3), n_latent=1, perturbation=1.5, max_iter=500, lr=0.03, batch_size=400).fit(x)
    np.testing.assert_allclose(model.sample(1, 0)[0], x.mean(0), atol=0.1)
    assert model.noise_**2 == pytest.approx(x.var(0).mean() + 1.5**2, rel=0.03)
    assert model.perturbation_ == pytest.approx(1.5)


def test_a_linear_generator_of_normal_latents_is_probabilistic_pca():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(1000, 1)) * np.array([[2.0, -1.0, 0.5]]) + 0.1 * rng.normal(size=(1000, 3)) + 5
    model = quick(
        nn.Linear(1, 3),
        latent="normal",
        n_latent=200,
        perturbation=0.5,
        max_iter=600,
        lr=0.02,
        batch_size=400,
    ).fit(x)
    noisy = x + 0.5 * rng.normal(size=x.shape)
    assert model.score(noisy) == pytest.approx(PCA(1).fit(noisy).score(noisy), abs=1e-2)


def test_importance_samples_find_the_evidence_of_a_gaussian():
    x = np.random.default_rng(3).normal(size=(300, 3)) @ np.random.default_rng(4).normal(size=(3, 5))
    model = quick(
        nn.Linear(3, 5),
        latent_dim=3,
        latent="normal",
        perturbation=0.5,
        max_iter=400,
        lr=0.01,
        batch_size=128,
    ).fit(x)
    net, s = model._model.net, model.noise_
    w, b = (p.detach().double().numpy() for p in (net.weight, net.bias))
    w, b = w * model.scale_, b * model.scale_ + model.location_
    exact = torch.distributions.MultivariateNormal(
        torch.tensor(b), torch.tensor(w @ w.T + s**2 * np.eye(5))
    ).log_prob(torch.tensor(x))
    found = model.score_samples(x)
    assert float(np.abs(found - exact.numpy()).mean()) < 0.1
    assert float(found.mean() - exact.mean()) < 0.02  # a bound from below


@pytest.mark.parametrize("d", [2, 5])
def test_likelihood_runs_away_as_the_noise_falls(d):
    # Data on the segment that the generator draws: every halving of the noise adds (d - 1) log 2, while the grid is finer.
    line = nn.Linear(1, d, dtype=torch.float64)
    z = torch.linspace(0.2, 0.8, 50, dtype=torch.float64)[:, None]
    with torch.no_grad():
        line.weight.copy_(torch.ones(d, 1))
        line.bias.zero_()
        values = []
        for floor in (0.04, 0.02, 0.01):
            model = _Model(line, 1, "uniform", 2000, line(z), floor)
            model.log_excess.fill_(-math.inf)
            values.append(float(model.log_likelihood(line(z), None, 1).mean()))
    for a, b in itertools.pairwise(values):
        assert b - a == pytest.approx((d - 1) * math.log(2), abs=1e-3)
    assert values[0] == pytest.approx(-(d - 1) * math.log(0.04 * (2 * math.pi) ** 0.5) - 0.5 * math.log(d))


def test_perturbation_bounds_the_noise_from_below():
    # A segment: plain likelihood drives the noise down to where the grid of latents stops it.
    x = np.random.default_rng(5).random((100, 1)) * np.array([[1.0, 2.0]])
    options = {"n_latent": 64, "max_iter": 600, "lr": 0.03, "batch_size": 50}
    plain = quick(nn.Linear(1, 2), perturbation=0.0, **options).fit(x)
    held = quick(nn.Linear(1, 2), perturbation=0.2, **options).fit(x)
    assert plain.noise_ < 0.05
    assert 0.2 <= held.noise_ < 0.25
    assert plain.score(x) > held.score(x) + 0.5
    assert plain.losses_.shape == (600,)
    drawn = held.sample(500, 0)
    np.testing.assert_allclose(drawn[:, 1], 2 * drawn[:, 0], atol=0.15)


def test_rate():
    assert perturbation_scale(500, 2.0, 1.0) == pytest.approx(500 ** (-1 / 3))
    assert perturbation_scale(500, 1.0, 3.0) == pytest.approx(500 ** (-1 / 8))
    x = circle()
    scale = float(np.sqrt(np.linalg.eigvalsh(np.cov(x.T, bias=True))[-1]))
    assert quick().fit(x).perturbation_ == pytest.approx(scale * perturbation_scale(60, 2.0, 1))
    assert quick(latent_dim=2).fit(x).perturbation_ == pytest.approx(scale * perturbation_scale(60, 2.0, 2))
    assert quick(intrinsic_dim=5).fit(x).perturbation_ == pytest.approx(
        scale * perturbation_scale(60, 2.0, 5)
    )


def test_auto_takes_one_of_the_multiples():
    x = circle()
    rate = quick().fit(x).perturbation_
    found = quick(perturbation="auto", max_iter=30).fit(x).perturbation_ / rate
    assert any(found == pytest.approx(m) for m in _TRIED)


def test_units_of_the_data_do_not_matter():
    one, other = quick(max_iter=50).fit(circle()), quick(max_iter=50).fit(8 * circle())
    assert other.perturbation_ == pytest.approx(8 * one.perturbation_)
    np.testing.assert_allclose(other.sample(20, 1), 8 * one.sample(20, 1), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(
        other.score_samples(8 * circle()), one.score_samples(circle()) - 2 * math.log(8), rtol=1e-9
    )


def test_a_larger_space_does_not_matter():
    # The same curve, rotated into eight dimensions: the same perturbation.
    turn = np.linalg.qr(np.random.default_rng(6).normal(size=(8, 2)))[0].T
    assert quick().fit(circle() @ turn).perturbation_ == pytest.approx(quick().fit(circle()).perturbation_)


def test_samples_follow_the_generator_and_have_no_noise():
    model = quick(Constant(2), perturbation=1.0).fit(circle())
    drawn = model.sample(50, 0)
    assert drawn.shape == (50, 2)
    assert np.ptp(drawn, axis=0).max() < 1e-12
    model = quick(latent_dim=2).fit(circle())
    assert not np.array_equal(model.sample(5, 0), model.sample(5, 1))


@pytest.mark.filterwarnings("ignore")
def test_scikit_learn_accepts_the_estimator():
    found = check_estimator(quick(), on_skip=None, on_fail=None)
    failed = [f"{c['check_name']}: {c['exception']!r}" for c in found if c["status"] == "failed"]
    assert failed == []
    with pytest.raises(NotFittedError):
        quick().sample(3)
    with pytest.raises(checks.PerturbkitError):
        quick(n_latent=1.5).fit(circle())
