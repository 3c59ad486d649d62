"""Oracles of ASAP: truncated Gaussians, the W-infinity lemma by brute force, and the privacy loss under attack."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

from _common import Example
from perturbkit.core import checks
from perturbkit.privacy import (
    ApproximateSamplePerturbation,
    constrained_mala,
    epsilon_lower_bound,
    gaussian_delta,
    private_posterior_erm,
    required_tv,
    tv_to_w_inf,
)
from perturbkit.privacy._noise import Noise
from perturbkit.privacy.learning._parts import newton, radial, rejection

F64 = torch.float64


def logistic(w, x, y):
    return torch.nn.functional.softplus(-y * (x @ w))


def data(n=60, d=2, seed=0, dtype=F64):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    x = x / x.norm(dim=1, keepdim=True)
    return x, torch.sign(x[:, 0])


def fitted(generator=None, dtype=F64, **options):
    given = {"lipschitz": 1.0, "strong_convexity": 5.0, "smoothness": 20.0} | options
    if "gdp_mu" not in given:
        given = {"epsilon": 1.0} | given
    return private_posterior_erm(logistic, *data(dtype=dtype), generator=generator, **given)


def normal(x):
    return -x.square().sum(1) / 2


ZERO = torch.zeros(2, dtype=F64)

EXAMPLE = Example(
    call=lambda generator, dtype: fitted(generator, dtype),
    stochastic=True,
    refusals=(
        (lambda: fitted(gdp_mu=1.0, epsilon=1.0), "exactly one"),
        (lambda: ApproximateSamplePerturbation(), "exactly one"),
        (lambda: ApproximateSamplePerturbation(gdp_mu=-1.0), "gdp_mu is -1"),
        (lambda: ApproximateSamplePerturbation(epsilon=1.0, share=1.0), "share is 1"),
        (lambda: ApproximateSamplePerturbation(epsilon=1.0).perturb(ZERO, -1.0), "w_inf is -1"),
        (lambda: fitted(epsilon=0.0), "epsilon is 0"),
        (lambda: fitted(lipschitz=0.0), "lipschitz is 0"),
        (lambda: fitted(strong_convexity=-1.0), "strong_convexity is -1"),
        (lambda: fitted(smoothness=1.0), "smoothness is 1"),
        (lambda: fitted(sampler="gibbs"), "sampler is 'gibbs'"),
        (lambda: fitted(max_proposals=0), "max_proposals is 0"),
        (lambda: fitted(sampler="mala", w_inf=0.0), "w_inf is 0"),
        (lambda: fitted(curvature=lambda c, r: torch.ones(3)), "curvature"),
        (lambda: fitted(smoothness=2e9, strong_convexity=1.0, curvature=lambda c, r: 1e9 * torch.eye(2, dtype=F64),
                        max_proposals=1, epsilon=1e-9, generator=0) and checks.positive("stop", 0), "none of|stop"),
        (lambda: constrained_mala(normal, ZERO, 0.0, step=0.1, n_steps=1), "radius is 0"),
        (lambda: constrained_mala(normal, ZERO, 1.0, step=0.0, n_steps=1), "step is 0"),
        (lambda: constrained_mala(normal, ZERO, 1.0, step=0.1, n_steps=0), "n_steps is 0"),
        (lambda: constrained_mala(normal, ZERO, 1.0, step=0.1, n_steps=1, initial=ZERO), "initial has shape"),
        (lambda: tv_to_w_inf(1.5, 1.0, 1), "tv is 1.5"),
        (lambda: tv_to_w_inf(0.5, 0.0, 1), "density_floor is 0"),
        (lambda: required_tv(0.0, 1.0, 1), "w_inf is 0"),
    ),
)  # fmt: skip


def truncated_moments(mean, precision, radius, n=400_000, seed=0):
    """Moments of N(mean, 1/precision) on the centred ball, by rejection in NumPy."""
    rng = np.random.default_rng(seed)
    z = mean + rng.normal(size=(n, len(mean))) / np.sqrt(precision)
    z = z[(z**2).sum(1) <= radius**2]
    return z.mean(0), np.cov(z.T)


@pytest.mark.parametrize("radius", [0.8, 3.0])
def test_mala_has_the_moments_of_the_truncated_gaussian(radius):
    mean, precision = torch.tensor([0.6, -0.3], dtype=F64), torch.tensor([1.0, 6.0], dtype=F64)
    found = constrained_mala(
        lambda x: -((x - mean).square() * precision).sum(1) / 2, ZERO, radius, step=0.15, n_steps=150,
        n_chains=6000, generator=1,
    ).numpy()  # fmt: skip
    assert (np.linalg.norm(found, axis=1) <= radius).all()
    expected, covariance = truncated_moments(mean.numpy(), precision.numpy(), radius)
    np.testing.assert_allclose(found.mean(0), expected, atol=5 * math.sqrt(covariance.max() / 6000))
    np.testing.assert_allclose(np.cov(found.T), covariance, atol=0.05 * covariance.max())


@pytest.mark.parametrize("shift", [0.2, 2.5])
def test_rejection_is_exact_also_when_the_minimiser_is_outside_the_ball(shift):
    best, precision, radius = torch.tensor([shift, 0.0], dtype=F64), torch.tensor([1.0, 4.0], dtype=F64), 1.0

    def objective(w):
        return ((w - best).square() * precision).sum(1) / 2

    noise = Noise(2)
    drawn = torch.stack([
        rejection(objective, 2.0, torch.eye(2, dtype=F64) * 0.9, best, ZERO, radius, noise, 10**5)[0]
        for _ in range(600)
    ]).numpy()  # fmt: skip
    expected, covariance = truncated_moments(best.numpy(), 2 * precision.numpy(), radius, 10**6)
    np.testing.assert_allclose(drawn.mean(0), expected, atol=5 * math.sqrt(covariance.max() / 600))
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=0.25 * covariance.max())


def test_lemma_by_brute_force_in_one_dimension():
    """W-infinity on the line is the largest difference of quantiles."""
    rng, grid = np.random.default_rng(3), np.linspace(-1, 1, 2001)
    tightest = 0.0
    for trial in range(400):
        q = 0.05 + rng.random(2000) ** (1 + 3 * rng.random())
        p = q.copy()
        if trial % 2:  # move mass across a short or long way
            i, j = rng.integers(0, 1900, 2)
            p[i : i + 100] += q[j : j + 100] * rng.random()
            p[j : j + 100] *= 1 - rng.random()
        else:
            p = 0.05 + rng.random(2000)
        q, p = q / q.sum() * 1000, p / p.sum() * 1000
        tv = np.abs(p - q).sum() / 2000
        bound = tv_to_w_inf(min(tv, 1.0), q.min(), 1)
        cdf_p, cdf_q = (np.concatenate([[0], f.cumsum() / 1000]) for f in (p, q))
        levels = np.unique(np.concatenate([cdf_p, cdf_q]).clip(0, 1))
        w = np.abs(np.interp(levels, cdf_p, grid) - np.interp(levels, cdf_q, grid)).max()
        assert w <= bound + 1e-9
        tightest = max(tightest, w / bound)
    assert tightest > 0.05


def test_conversions_are_inverse_and_zero_gives_zero():
    for dim in (1, 2, 7):
        for floor in (0.3, 1e-8):
            tv = required_tv(1e-2, floor, dim)
            assert tv_to_w_inf(tv, floor, dim) == pytest.approx(1e-2, rel=1e-9)
    # A disc of radius 0.5/4 at density 2.
    assert required_tv(0.5, 2.0, 2) == pytest.approx(2 * math.pi / 64)
    assert tv_to_w_inf(0.0, 0.3, 4) == 0.0
    theta = torch.tensor([1.0, 2.0])
    assert torch.equal(ApproximateSamplePerturbation(epsilon=1.0).perturb(theta, 0.0), theta)
    assert fitted(generator=0).w_inf == 0.0


def test_radial_noise():
    noise = Noise(4)
    r = np.array([np.linalg.norm(radial(noise, 3, 0.5, True)) for _ in range(2000)])
    assert scipy.stats.kstest(r, scipy.stats.gamma(3, scale=0.5).cdf).pvalue > 1e-4
    z = np.concatenate([radial(noise, 3, 0.5, False) for _ in range(700)])
    assert scipy.stats.kstest(z / 0.5, "norm").pvalue > 1e-4


def test_budgets_add_up():
    pure = ApproximateSamplePerturbation(epsilon=2.0, share=0.3)
    assert pure.noise_budget + pure.sample_budget == pytest.approx(2.0)
    gdp = ApproximateSamplePerturbation(gdp_mu=2.0, share=0.3)
    assert gdp.noise_budget**2 + gdp.sample_budget**2 == pytest.approx(4.0)


def draws(rows, runs, seed, **options):
    x = torch.full((rows, 1), 1.0, dtype=F64)
    y = -torch.ones(rows, dtype=F64)
    y[: rows // 2] = 1
    source = torch.Generator().manual_seed(seed)
    return [
        private_posterior_erm(
            logistic, x, y, lipschitz=1.0, strong_convexity=1.0, smoothness=3.0, generator=source, **options
        ).theta.item()
        for _ in range(runs)
    ]


@pytest.mark.parametrize(
    "options", [{"epsilon": 2.0}, {"gdp_mu": 1.5}, {"epsilon": 2.0, "sampler": "mala", "w_inf": 0.2}]
)
def test_attack_does_not_exceed_the_stated_privacy(options):
    runs = 20 if "sampler" in options else 80
    a, b = (draws(n, runs, n, **options) for n in (4, 5))
    if "epsilon" in options:
        assert epsilon_lower_bound(a, b).epsilon <= options["epsilon"]
    else:
        found = epsilon_lower_bound(a, b, delta=0.05)
        assert gaussian_delta(found.epsilon, options["gdp_mu"]) >= 0.05 or found.epsilon == 0


def test_histograms_of_exact_samples_differ_by_at_most_epsilon():
    """The posterior on a fixed interval: log ratio of the exact densities, and of a histogram of draws."""
    epsilon, radius = 1.0, 1.5
    gamma = epsilon / (2 * radius)
    grid = np.linspace(-radius, radius, 4001)
    dens = []
    for extra in (0, 1):
        f = np.log1p(np.exp(-grid)) + np.log1p(np.exp(grid)) + extra * np.log1p(np.exp(-grid)) + grid**2 / 2
        p = np.exp(-gamma * f)
        dens.append(p / p.sum())
    assert np.abs(np.log(dens[0] / dens[1])).max() <= epsilon
    noise, counts = Noise(5), []
    for extra in (0, 1):

        def objective(w, extra=extra):
            s = torch.nn.functional.softplus
            return (s(-w) * (1 + extra) + s(w) + w**2 / 2).sum(1)

        zero = torch.zeros(1, dtype=F64)
        best = newton(objective, zero, 1e-9)
        z = [
            rejection(objective, gamma, torch.ones(1, 1, dtype=F64), best, zero, radius, noise, 10**5)[
                0
            ].item()
            for _ in range(700)
        ]
        counts.append(np.histogram(z, np.linspace(-radius, radius, 7))[0])
    error = np.sqrt(1 / counts[0] + 1 / counts[1])
    assert (np.abs(np.log(counts[0] / counts[1])) <= epsilon + 4 * error).all()
    expected = [p.reshape(-1) for p in (np.add.reduceat(d[:-1], np.arange(0, 4000, 667)[:6]) for d in dens)]
    np.testing.assert_allclose(counts[0] / 700, expected[0], atol=0.08)


def test_minimiser_and_its_failure():
    found = newton(lambda w: (torch.exp(w) - 2 * w).sum(1), torch.zeros(3, dtype=F64), 1e-10)
    torch.testing.assert_close(found, torch.full((3,), math.log(2), dtype=F64), rtol=1e-9, atol=0)
    with pytest.raises(checks.ModelError, match="gradient at the minimiser"):
        newton(lambda w: torch.cos(1e3 * w).sum(1) * 1e3 + w.abs().sum(1), torch.ones(1, dtype=F64), 1e-30)


def test_mala_is_reported_as_not_certified_and_reaches_the_posterior():
    options = {"epsilon": 4.0, "strong_convexity": 20.0, "smoothness": 35.0}
    chain = fitted(generator=7, sampler="mala", w_inf=1e-3, **options)
    exact = fitted(generator=8, **options)
    assert not chain.certified
    assert exact.certified
    assert chain.w_inf == 1e-3
    assert chain.steps > exact.steps
    assert float((chain.theta - chain.center).norm()) < chain.radius * 1.1
    assert (exact.epsilon, exact.gdp_mu) == (4.0, None)
    assert fitted(generator=7, gdp_mu=0.7).gdp_mu == 0.7


def test_curvature_changes_the_cost_and_not_the_law():
    n = 300
    x, y = data(n, 2, 5)
    h = 0.25 * x.T @ x + 2 * torch.eye(2, dtype=F64)

    def run(curvature, source):
        return private_posterior_erm(
            logistic, x, y, lipschitz=1.0, strong_convexity=2.0, smoothness=float(torch.linalg.eigvalsh(h)[-1]),
            epsilon=8.0, curvature=curvature, generator=source,
        )  # fmt: skip

    def floor(center, radius):
        s = torch.sigmoid(x @ center)
        # Moving by r changes each row's curvature by at most a factor exp(r), for rows of norm one.
        return math.exp(-radius) * (x * (s * (1 - s))[:, None]).T @ x + 2 * torch.eye(2, dtype=F64)

    plain, sharp = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    a, b = [run(None, plain) for _ in range(30)], [run(floor, sharp) for _ in range(30)]
    assert np.mean([f.steps for f in b]) < 0.5 * np.mean([f.steps for f in a])
    for j in range(2):
        assert (
            scipy.stats.ks_2samp([f.theta[j].item() for f in a], [f.theta[j].item() for f in b]).pvalue > 1e-3
        )


def test_wrapper_runs_the_chain_and_perturbs():
    asap = ApproximateSamplePerturbation(epsilon=1.0)
    found = asap.sample(normal, ZERO, 1.0, w_inf=0.01, step=0.2, n_steps=50, generator=3)
    assert found.epsilon == 1.0
    assert not found.certified
    assert float(found.theta.norm()) < 1.5
    again = asap.sample(normal, ZERO, 1.0, w_inf=0.01, step=0.2, n_steps=50, generator=3)
    assert torch.equal(found.theta, again.theta)
