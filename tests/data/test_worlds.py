import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest, multivariate_normal

from perturbkit.core import checks
from perturbkit.data import EmpiricalMeasure, GaussianMixture, linear_gaussian, logistic, mixture_8


def random_mixture(seed, full, k=3, d=2):
    g = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(k, d, generator=g, dtype=torch.float64)
    weights = 0.2 + torch.rand(k, generator=g, dtype=torch.float64)
    if not full:
        return GaussianMixture(
            means, stds=0.3 + torch.rand(k, d, generator=g, dtype=torch.float64), weights=weights
        )
    root = torch.randn(k, d, d, generator=g, dtype=torch.float64)
    return GaussianMixture(
        means, covs=root @ root.mT + 0.2 * torch.eye(d, dtype=torch.float64), weights=weights
    )


def points(seed, n=7, d=2):
    return 2 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LEVELS = [(1.0, 0.0), (1.0, 0.7), (0.6, 0.8)]


@pytest.mark.parametrize("full", [False, True])
def test_density_agrees_with_scipy(full):
    world, x = random_mixture(0, full), points(1)
    for alpha, sigma in LEVELS:
        total = np.zeros(len(x))
        for j in range(3):
            axes = torch.eye(2, dtype=torch.float64) if world.axes is None else world.axes[j]
            cov = alpha**2 * axes @ world.variances[j].diag() @ axes.mT + sigma**2 * torch.eye(
                2, dtype=torch.float64
            )
            total += float(world.weights[j]) * multivariate_normal(alpha * world.means[j], cov).pdf(x)
        np.testing.assert_allclose(world.log_density(x, alpha, sigma).exp(), total, rtol=1e-10)


def test_covs_are_kept():
    g = torch.Generator().manual_seed(3)
    root = torch.randn(2, 3, 3, generator=g, dtype=torch.float64)
    cov = root @ root.mT + torch.eye(3, dtype=torch.float64)
    world = GaussianMixture(
        torch.zeros(2, 3, dtype=torch.float64), covs=cov, weights=torch.tensor([1.0, 1e-9])
    )
    sample = world.sample(200_000, 0)
    torch.testing.assert_close(torch.cov(sample.T), cov[0], rtol=0, atol=0.03 * float(cov[0].abs().max()))


MIXTURES = [random_mixture(2, False), random_mixture(2, True)]


@pytest.mark.parametrize(
    ("world", "level"),
    [(w, level) for w in MIXTURES for level in LEVELS]
    + [(EmpiricalMeasure(points(9, 20)), level) for level in LEVELS if level[1] > 0],
)
def test_score_is_the_gradient_and_tweedie_holds(world, level):
    alpha, sigma = level
    x = points(4).requires_grad_(True)
    (gradient,) = torch.autograd.grad(world.log_density(x, alpha, sigma).sum(), x)
    score = world.score(x.detach(), alpha, sigma)
    torch.testing.assert_close(score, gradient, rtol=1e-9, atol=1e-9)
    mean = world.posterior_mean(x.detach(), alpha, sigma)
    torch.testing.assert_close(alpha * mean, x.detach() + sigma**2 * score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("full", [False, True])
def test_posterior_mean_by_monte_carlo(full):
    """E[x_0 | x] = E[x_0 N(x; alpha x_0, sigma²)] / E[N(x; alpha x_0, sigma²)] over prior draws."""
    world, x, alpha, sigma = random_mixture(5, full), 0.5 * points(6, 3), 0.8, 0.6
    draws = world.sample(400_000, 1)
    weight = torch.softmax(-((x[:, None] - alpha * draws) ** 2).sum(-1) / (2 * sigma**2), 1)
    torch.testing.assert_close(world.posterior_mean(x, alpha, sigma), weight @ draws, atol=0.02, rtol=0)


def test_posterior_mean_by_integration():
    world = random_mixture(7, False, k=3, d=1)
    grid = torch.linspace(-15, 15, 200_001, dtype=torch.float64)[:, None]
    prior = world.log_density(grid).exp()
    assert float(torch.trapezoid(prior, grid[:, 0])) == pytest.approx(1, abs=1e-9)
    for x in (-2.0, 0.3, 4.0):
        likelihood = torch.exp(-((x - 0.7 * grid[:, 0]) ** 2) / (2 * 0.5**2))
        want = float((grid[:, 0] * prior * likelihood).sum() / (prior * likelihood).sum())
        got = world.posterior_mean(torch.tensor([[x]], dtype=torch.float64), 0.7, 0.5)
        assert float(got) == pytest.approx(want, abs=1e-8)


def test_levels_may_differ_by_row():
    world, x = random_mixture(8, True), points(2, 2)
    alpha, sigma = torch.tensor([1.0, 0.5]), torch.tensor([0.1, 2.0])
    both = world.posterior_mean(x, alpha, sigma)
    for i in range(2):
        one = world.posterior_mean(x[i : i + 1], float(alpha[i]), float(sigma[i]))
        torch.testing.assert_close(both[i : i + 1], one, rtol=1e-6, atol=1e-6)


def test_empirical_measure_against_sums_and_limits():
    p = points(11, 6, 3)
    world, x = EmpiricalMeasure(p), points(12, 5, 3)
    square = ((x[:, None] - 0.9 * p) ** 2).sum(-1)
    want = torch.logsumexp(-square / (2 * 0.25), 1) - math.log(6) - 1.5 * math.log(2 * math.pi * 0.25)
    torch.testing.assert_close(world.log_density(x, 0.9, 0.5), want)
    nearest = p[((x[:, None] - p) ** 2).sum(-1).argmin(1)]
    torch.testing.assert_close(world.posterior_mean(x, 1.0, 1e-4), nearest)
    torch.testing.assert_close(world.posterior_mean(x, 1.0, 1e6), p.mean(0).expand(5, 3), atol=1e-6, rtol=0)
    assert {tuple(r) for r in world.sample(200, 0).tolist()} == {tuple(r) for r in p.tolist()}
    narrow = GaussianMixture(p, stds=1e-7)
    torch.testing.assert_close(world.score(x, 0.9, 0.5), narrow.score(x, 0.9, 0.5))


def test_empirical_measure_in_float32_at_small_noise():
    p = points(13, 50, 64)
    x = p[:8] + 0.002 * points(14, 8, 64)
    exact = EmpiricalMeasure(p).score(x, 1.0, 0.002)
    single = EmpiricalMeasure(p).posterior_mean(x.float(), 1.0, 0.002)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, p[:8].float())
    torch.testing.assert_close(x + 0.002**2 * exact, p[:8])


@pytest.mark.parametrize("ends", [(20.0, 0.02), (0.02, 20.0), (3.0, 0.0)])
def test_flow_of_one_gaussian_is_exact(ends):
    start, end = ends
    g = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, generator=g, dtype=torch.float64)
    cov = root @ root.mT + 0.3 * torch.eye(3, dtype=torch.float64)
    mean = torch.randn(1, 3, generator=g, dtype=torch.float64)
    world = GaussianMixture(mean, covs=cov[None])
    z = mean + (1 + start) * torch.randn(6, 3, generator=g, dtype=torch.float64)
    values, axes = torch.linalg.eigh(cov)
    ratio = ((values + end**2) / (values + start**2)).sqrt()
    want = mean + ((z - mean) @ axes * ratio) @ axes.mT
    torch.testing.assert_close(world.probability_flow(z, start, end), want, rtol=1e-8, atol=1e-8)


def test_flow_takes_noise_to_data_and_back():
    world = mixture_8(0)
    z = 20 * torch.randn(100, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = world.probability_flow(z, 20.0, 0.02)
    nearest = ((x[:, None] - world.means) ** 2).sum(-1).min(1).values
    # Squared distances to the mode are (0.25² + 0.02²) chi² with 8 degrees of freedom.
    assert kstest((nearest / (0.25**2 + 0.02**2)).numpy(), "chi2", args=(8,)).pvalue > 1e-3
    torch.testing.assert_close(world.probability_flow(x, 0.02, 20.0), z, rtol=1e-4, atol=1e-4)
    assert torch.equal(world.probability_flow(x, 1.0, 1.0), x)
    single = world.probability_flow(z[:2].float(), 20.0, 0.02)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), x[:2], atol=1e-3, rtol=1e-3)


def test_flow_of_two_points_in_one_dimension():
    """Mass is transported in order: the flow keeps F_lam(z), here solved by inverting the distribution function."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    world = EmpiricalMeasure(torch.tensor([[-1.0], [1.0]], dtype=torch.float64))
    start, end = 5.0, 0.3
    f = lambda z, lam: 0.5 * norm.cdf((z + 1) / lam) + 0.5 * norm.cdf((z - 1) / lam)
    z = torch.tensor([[-4.0], [0.5], [7.0]], dtype=torch.float64)
    got = world.probability_flow(z, start, end)
    quantiles = [f(a, start) for a in z[:, 0].tolist()]
    want = [brentq(lambda y, q=q: f(y, end) - q, -50, 50, xtol=1e-13) for q in quantiles]
    np.testing.assert_allclose(got[:, 0], want, atol=1e-6)


def test_mixture_8():
    world = mixture_8(3)
    assert world.means.shape == (5, 8)
    torch.testing.assert_close(world.variances, torch.full((5, 8), 0.0625, dtype=torch.float64))
    spread = torch.cat([mixture_8(s).means for s in range(200)]).std()
    assert float(spread) == pytest.approx(2, abs=0.05)
    assert torch.equal(mixture_8(3).means, world.means)
    assert mixture_8(3, dtype=torch.float32).sample(4, 0).dtype == torch.float32


def test_samples_are_repeatable_and_leave_the_global_generator():
    state = torch.get_rng_state()
    for world in (mixture_8(0), EmpiricalMeasure(points(0))):
        assert torch.equal(world.sample(9, 4), world.sample(9, 4))
        assert not torch.equal(world.sample(9, 4), world.sample(9, 5))
    for world in (linear_gaussian(generator=0), logistic(generator=0)):
        assert torch.equal(world.sample(9, 4)[0], world.sample(9, 4)[0])
    assert torch.equal(state, torch.get_rng_state())


def test_mixture_sample_shares():
    world = GaussianMixture(
        torch.tensor([[-9.0], [9.0]]), stds=torch.tensor([1.0, 2.0]), weights=torch.tensor([1.0, 3.0])
    )
    x = world.sample(40_000, 0)[:, 0]
    assert float((x > 0).float().mean()) == pytest.approx(0.75, abs=0.01)
    assert float(x[x > 0].std()) == pytest.approx(2.0, abs=0.05)
    assert float(x[x < 0].std()) == pytest.approx(1.0, abs=0.05)
    share = world.responsibilities(torch.tensor([[-9.0], [9.0]]))
    torch.testing.assert_close(share, torch.eye(2), atol=1e-4, rtol=0)


def test_denoiser_can_be_differentiated_and_mapped():
    for world in (random_mixture(1, True), EmpiricalMeasure(points(5))):
        x = points(6, 4)
        denoise = lambda r, w=world: w.posterior_mean(r[None], 0.8, 0.6)[0]
        jacobian = torch.func.vmap(torch.func.jacrev(denoise))(x)
        # The posterior covariance is sigma²/alpha times the Jacobian of the mean: symmetric, positive.
        torch.testing.assert_close(jacobian, jacobian.mT, atol=1e-9, rtol=1e-9)
        assert torch.linalg.eigvalsh(jacobian).min() >= -1e-9


def test_linear_world_is_recovered_by_least_squares():
    world = linear_gaussian(4, n_informative=3, noise=0.5, intercept=2.0, correlation=0.6, generator=1)
    x, y = world.sample(50_000, 2)
    design = torch.cat([x, torch.ones(len(x), 1)], 1)
    fit = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    torch.testing.assert_close(fit, torch.cat([world.coef, torch.tensor([2.0])]), atol=0.02, rtol=0)
    assert world.coef[3] == 0
    assert float((y - world.mean(x)).std()) == pytest.approx(0.5, abs=0.01)
    assert float(torch.corrcoef(x.T)[0, 2]) == pytest.approx(0.36, abs=0.02)


def test_logistic_world_is_calibrated():
    world = logistic(3, scale=2.0, intercept=-1.0, generator=3)
    x, y = world.sample(60_000, 4)
    p = world.probability(x)
    torch.testing.assert_close(p, 1 / (1 + torch.exp(-(x @ world.coef - 1.0))))
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (p >= low) & (p < low + 0.2)
        assert float(y[inside].double().mean()) == pytest.approx(float(p[inside].mean()), abs=0.02)


MEANS = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: GaussianMixture(torch.zeros(3), stds=1.0), "means has shape"),
        (lambda: GaussianMixture(MEANS), "neither of stds and covs"),
        (lambda: GaussianMixture(MEANS, stds=1.0, covs=torch.eye(3).expand(2, 3, 3)), "both of stds and covs"),
        (lambda: GaussianMixture(MEANS, stds=0.0), "stds has a smallest value of 0"),
        (lambda: GaussianMixture(MEANS, stds=torch.ones(3, 3)), "stds has shape"),
        (lambda: GaussianMixture(MEANS, covs=-torch.eye(3).expand(2, 3, 3)), "smallest eigenvalue"),
        (lambda: GaussianMixture(MEANS, covs=torch.eye(3)), "covs has shape"),
        (lambda: GaussianMixture(MEANS, stds=1.0, weights=torch.tensor([1.0, 0.0])), "weights has a smallest"),
        (lambda: GaussianMixture(MEANS, stds=1.0, weights=torch.ones(3)), "weights has shape"),
        (lambda: mixture_8(0).score(torch.zeros(2, 3)), "x has shape"),
        (lambda: mixture_8(0).score(torch.zeros(2, 8), 1.0, -1.0), "sigma has a smallest value of -1"),
        (lambda: mixture_8(0).score(torch.zeros(2, 8), 0.0, 1.0), "alpha has a smallest value of 0"),
        (lambda: mixture_8(0).score(torch.zeros(2, 8), 1.0, torch.ones(3)), "sigma has shape"),
        (lambda: mixture_8(0).sample(0), "n is 0"),
        (lambda: mixture_8(0, dtype=torch.float16), "dtype"),
        (lambda: mixture_8(0).probability_flow(torch.zeros(2, 8), 1.0, -0.1), "lam_end is -0.1"),
        (lambda: mixture_8(0).probability_flow(torch.zeros(2, 8), 1.0, 0.1, rtol=1.0), "rtol is 1"),
        (lambda: EmpiricalMeasure(MEANS).probability_flow(torch.zeros(2, 3), 1.0, 0.0), "lam_end is 0"),
        (lambda: mixture_8(0).probability_flow(torch.full((2, 8), math.nan), 1.0, 0.1), "NaN or infinite"),
        (lambda: EmpiricalMeasure(MEANS).score(torch.zeros(2, 3)), "point masses have no density"),
        (lambda: EmpiricalMeasure(torch.zeros(3)), "points has shape"),
        (lambda: linear_gaussian(0), "n_features is 0"),
        (lambda: linear_gaussian(2, n_informative=3), "n_informative is 3"),
        (lambda: linear_gaussian(2, noise=-1.0), "noise is -1"),
        (lambda: linear_gaussian(2, correlation=1.0), "correlation is 1"),
        (lambda: linear_gaussian(2).mean(torch.zeros(1, 3)), "x has shape"),
        (lambda: logistic(2, scale=0.0), "scale is 0"),
        (lambda: logistic(2).probability(torch.zeros(1, 3)), "x has shape"),
        (lambda: logistic(2).sample(0), "n is 0"),
    ],
)  # fmt: skip
def test_refusals(call, match):
    with pytest.raises(checks.PerturbkitError, match=match):
        call()
