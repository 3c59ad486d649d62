"""Oracles of posterior moments: Gaussian and mixture priors in closed form, exact derivatives, densities by quadrature."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import Denoiser, Oracle, VPSchedule, checks
from perturbkit.data import GaussianMixture
from perturbkit.uncertainty import (
    DirectionalMoments,
    directional_moments,
    max_entropy_density,
    posterior_principal_components,
)
from perturbkit.uncertainty.posterior import _parts

F64 = torch.float64
Y = torch.randn(2, 1, 2, 3, generator=torch.Generator().manual_seed(0), dtype=F64)


def net():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(6, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 6), nn.Unflatten(1, (1, 2, 3))
    )


def both(model, generator, dtype, chunk_size=None):
    y = Y.to(dtype)
    oracle = Oracle(model, chunk_size=chunk_size)
    # Differences would amplify the rounding in which chunks differ.
    derivative = "difference" if chunk_size is None else "jvp"
    found = posterior_principal_components(
        oracle, y, 0.5, n_components=2, iterations=3, derivative=derivative, generator=generator
    )
    moments = directional_moments(oracle, y, 0.5, found.components)
    return [found.components, found.eigenvalues, found.mean, found.residuals, moments.mean, moments.central]


def chunked(chunk_size):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = net().double()
    return both(model, torch.Generator().manual_seed(1), F64, chunk_size)


def pca(y=Y, **options):
    return posterior_principal_components(lambda z: z / 2, y, **{"sigma": 1.0} | options)


def along(direction=Y, **options):
    return directional_moments(lambda z: z / 2, Y, 1.0, direction, **options)


def given(*central):
    values = torch.tensor([central], dtype=F64)
    return DirectionalMoments(torch.zeros(1, dtype=F64), values, values)


EXAMPLE = Example(
    model=net,
    with_model=both,
    chunked=chunked,
    stochastic=True,
    refusals=(
        (lambda: pca(Y[0, 0, 0]), "y has shape"),
        (lambda: pca(sigma=0.0), "sigma is 0"),
        (lambda: pca(n_components=7), "n_components is 7"),
        (lambda: pca(n_components=3, mask=torch.tensor([[[1, 1, 0], [0, 0, 0]]])), "n_components is 3"),
        (lambda: pca(mask=torch.ones(2, 3)), "mask has shape"),
        (lambda: pca(mask=torch.full((1, 2, 3), 0.5)), "mask has shape"),
        (lambda: pca(mask=torch.zeros(1, 2, 3)), "at least one of them 1"),
        (lambda: pca(iterations=0), "iterations is 0"),
        (lambda: pca(tol=-1.0), "tol is -1"),
        (lambda: pca(step=0.0), "step is 0"),
        (lambda: pca(derivative="vjp"), "derivative is 'vjp'"),
        (lambda: posterior_principal_components(lambda z: z[:, 0], Y, 1.0), "denoiser answered shape"),
        (lambda: along(Y[:, 0]), "direction has shape"),
        (lambda: along(Y[:1]), "direction has shape"),
        (lambda: along(torch.zeros_like(Y)), "zero vector"),
        (lambda: along(order=1), "order is 1"),
        (lambda: along(order=9), "order is 9"),
        (lambda: along(method="spline"), "method is 'spline'"),
        (lambda: along(radius=0.0), "radius is 0"),
        (lambda: along(n_points=11), "n_points is 11"),
        (lambda: max_entropy_density(given(-1.0, 0.0, 3.0), [0.0]), "smallest variance of -1"),
        (lambda: max_entropy_density(given(1.0), np.zeros((2, 3))), "grid has shape"),
    ),
)  # fmt: skip


def mixture(d, seed=0, spread=1.5, k=3):
    """Return a mixture, a noisy row and the components of its exact posterior: weights, means, covariances."""
    g = torch.Generator().manual_seed(seed)
    means = spread * torch.randn(k, d, generator=g, dtype=F64) * math.sqrt(2 / d)
    a = torch.randn(k, d, d, generator=g, dtype=F64) / math.sqrt(d)
    covs = 0.3 * a @ a.mT + 0.05 * torch.eye(d, dtype=F64)
    world = GaussianMixture(means, covs=covs)
    y = world.sample(1, g) + torch.randn(1, d, generator=g, dtype=F64)
    gain = covs @ torch.linalg.inv(covs + torch.eye(d, dtype=F64))
    weights = world.responsibilities(y, 1.0, 1.0)[0]
    centres = means + torch.einsum("kij,kj->ki", gain, y - means)
    return world, y, weights, centres, covs - gain @ covs


def coordinate(parts, v):
    """Return weights, means and variances of the exact posterior's coordinate along a unit vector."""
    weights, centres, covs = parts
    return weights.numpy(), (centres @ v).numpy(), torch.einsum("i,kij,j->k", v, covs, v).numpy()


def density(coordinates, t):
    weights, means, variances = (np.asarray(a)[:, None] for a in coordinates)
    return (weights * np.exp(-((t - means) ** 2) / 2 / variances) / np.sqrt(2 * math.pi * variances)).sum(0)


def wide(coordinates, n=8001):
    weights, means, variances = coordinates
    centre, width = weights @ means, math.sqrt(variances.max() + np.ptp(means) ** 2)
    return np.linspace(centre - 10 * width, centre + 10 * width, n)


@pytest.mark.parametrize("derivative", ["difference", "jvp"])
def test_gaussian_prior(derivative):
    g = torch.Generator().manual_seed(3)
    a = torch.randn(7, 7, generator=g, dtype=F64)
    prior, sigma = a @ a.T, 0.8
    gain = prior @ torch.linalg.inv(prior + sigma**2 * torch.eye(7, dtype=F64))
    y = torch.randn(4, 7, generator=g, dtype=F64)
    found = posterior_principal_components(
        lambda z: z @ gain.T,
        y,
        sigma,
        n_components=4,
        iterations=400,
        tol=1e-7,
        derivative=derivative,
        generator=1,
    )
    values, vectors = torch.linalg.eigh(sigma**2 * gain)
    torch.testing.assert_close(found.eigenvalues, values.flip(0)[:4].expand(4, 4), rtol=1e-6, atol=0)
    overlap = (found.components @ vectors.flip(1)[:, :4]).diagonal(dim1=1, dim2=2).abs()
    assert overlap.min() > 1 - 1e-5
    torch.testing.assert_close(found.mean, y @ gain.T)
    moments = directional_moments(lambda z: z @ gain.T, y, sigma, found.components, order=6)
    torch.testing.assert_close(moments.variance, found.eigenvalues, rtol=1e-6, atol=0)
    assert moments.skewness.abs().max() < 1e-9
    torch.testing.assert_close(moments.kurtosis, torch.full((4, 4), 3.0, dtype=F64), rtol=1e-7, atol=0)
    torch.testing.assert_close(moments.central[..., 4], 15 * moments.variance**3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("d", [2, 8, 64])
def test_mixture_prior_against_the_exact_posterior(d):
    world, y, *parts = mixture(d, seed=d)

    def denoiser(z):
        return world.posterior_mean(z, 1.0, 1.0)

    weights, centres, covs = parts
    off = centres - weights @ centres
    exact = torch.einsum("k,ki,kj->ij", weights, off, off) + torch.einsum("k,kij->ij", weights, covs)
    found = posterior_principal_components(
        denoiser, y, 1.0, n_components=2, iterations=500, tol=1e-4, generator=0
    )
    top = torch.linalg.eigvalsh(exact).flip(0)[:2]
    torch.testing.assert_close(found.eigenvalues[0], top, rtol=1e-5, atol=0)
    v = found.components[0, 0]
    moments = directional_moments(denoiser, y, 1.0, v[None], order=6)
    exactly = directional_moments(denoiser, y, 1.0, v[None], order=5, method="jet")
    one = coordinate(parts, v)
    t = wide(one)
    p, mean = density(one, t), one[0] @ one[1]
    assert float(moments.mean) == pytest.approx(mean, rel=1e-8)
    for j in range(2, 7):
        wanted = np.trapezoid(p * (t - mean) ** j, t)
        scale = float(moments.variance) ** (j / 2)
        if j <= 5:
            assert float(exactly.central[0, j - 2]) == pytest.approx(wanted, abs=1e-7 * scale)
        assert float(moments.central[0, j - 2]) == pytest.approx(wanted, abs=1e-3 * scale)


def test_jvp_and_differences_agree():
    world, y, *_ = mixture(5, seed=1)
    two = [
        posterior_principal_components(
            lambda z: world.posterior_mean(z, 1.0, 1.0),
            y,
            1.0,
            iterations=30,
            tol=0,
            derivative=d,
            generator=2,
        )
        for d in ("difference", "jvp")
    ]
    torch.testing.assert_close(two[0].components, two[1].components, rtol=0, atol=1e-5)
    torch.testing.assert_close(two[0].eigenvalues, two[1].eigenvalues, rtol=1e-6, atol=0)
    assert two[0].cost.nfev == 1 + 30 * 3
    assert two[0].cost.njvp == 0
    assert two[1].cost.njvp == 90


def test_the_recursion_of_the_paper():
    """m_{j+1} = sigma^2 m_j' + j m_{j-1} m_2, with m_1 = 0, by differences in y."""
    world, y, *_ = mixture(3, seed=4)
    sigma, h = 1.0, 1e-3
    v = torch.tensor([[0.6, 0.8, 0.0]], dtype=F64)
    rows = torch.cat([y - h * v, y, y + h * v])
    found = directional_moments(
        lambda z: world.posterior_mean(z, 1.0, sigma), rows, sigma, v.expand(3, 3), order=5, method="jet"
    )
    m = [torch.ones(3, dtype=F64), torch.zeros(3, dtype=F64), *found.central.T]
    for j in range(2, 5):
        slope = (m[j][2] - m[j][0]) / (2 * h)
        assert float(m[j + 1][1]) == pytest.approx(
            float(sigma**2 * slope + j * m[j - 1][1] * m[2][1]), abs=1e-5
        )


def test_directions_need_not_be_of_length_one_and_come_in_batches():
    world, y, *_ = mixture(4, seed=2)
    rows = torch.cat([y, y + 0.3])
    v = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=F64)

    def denoiser(z):
        return world.posterior_mean(z, 1.0, 1.0)

    together = directional_moments(denoiser, rows, 1.0, 7 * v)
    assert together.central.shape == (2, 3, 3)
    one = directional_moments(denoiser, rows, 1.0, v[:, 1])
    torch.testing.assert_close(one.central, together.central[:, 1])
    torch.testing.assert_close(one.mean, together.mean[:, 1])
    assert one.cost.nfev == 2 + 2 * 21


def test_components_stay_in_the_mask():
    world, y, *parts = mixture(6, seed=6)
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
    keep = mask.flatten().bool()

    def denoiser(z):
        return world.posterior_mean(z.flatten(1), 1.0, 1.0).view_as(z)

    found = posterior_principal_components(
        denoiser, y.view(1, 2, 3), 1.0, n_components=3, mask=mask, iterations=300, tol=1e-6, generator=0
    )
    flat = found.components.reshape(3, 6)
    assert (flat[:, ~keep] == 0).all()
    torch.testing.assert_close(flat @ flat.T, torch.eye(3, dtype=F64))
    weights, centres, covs = parts
    off = centres - weights @ centres
    exact = torch.einsum("k,ki,kj->ij", weights, off, off) + torch.einsum("k,kij->ij", weights, covs)
    top = torch.linalg.eigvalsh(exact[keep][:, keep]).flip(0)
    torch.testing.assert_close(found.eigenvalues[0], top, rtol=1e-6, atol=0)
    full = posterior_principal_components(denoiser, y.view(1, 2, 3), 1.0, n_components=1, generator=0)
    assert full.eigenvalues[0, 0] > top[0]


def test_a_diffusion_model_s_denoiser_is_read_at_the_right_time():
    world, y, *_ = mixture(3, seed=7)
    schedule = VPSchedule()

    def noise(x, t):
        alpha, sigma = schedule.alpha(t).to(x), schedule.sigma(t).to(x)
        return (x - alpha[:, None] * world.posterior_mean(x, alpha, sigma)) / sigma[:, None]

    model = Denoiser(noise, schedule, predicts="eps")
    found = directional_moments(model, y, 0.7, torch.ones_like(y))
    plain = directional_moments(lambda z: world.posterior_mean(z, 1.0, 0.7), y, 0.7, torch.ones_like(y))
    torch.testing.assert_close(found.central, plain.central, rtol=1e-5, atol=1e-7)
    pair = [
        posterior_principal_components(f, y, 0.7, generator=0, derivative="jvp")
        for f in (model, lambda z: world.posterior_mean(z, 1.0, 0.7))
    ]
    torch.testing.assert_close(pair[0].eigenvalues, pair[1].eigenvalues, rtol=1e-6, atol=0)


def test_residuals_tell_a_derivative_that_is_not_symmetric():
    turn = torch.tensor([[0.8, 0.3, 0.0], [-0.3, 0.7, 0.0], [0.0, 0.0, 0.1]], dtype=F64)
    found = posterior_principal_components(
        lambda z: z @ turn.T, torch.ones(1, 3, dtype=F64), 1.0, n_components=2, generator=0
    )
    torch.testing.assert_close(found.eigenvalues, torch.tensor([[0.8, 0.7]], dtype=F64), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.residuals, torch.full((1, 2), 0.3, dtype=F64), rtol=1e-5, atol=0)


def test_single_precision_is_enough():
    world, y, *parts = mixture(64, seed=8, spread=1.0)
    narrow = GaussianMixture(world.means.float(), covs=torch.einsum("kij,kj,klj->kil", world.axes, world.variances, world.axes).float())  # fmt: skip

    def denoiser(z):
        return narrow.posterior_mean(z, 1.0, 1.0)

    found = posterior_principal_components(
        denoiser, y.float(), 1.0, n_components=1, iterations=300, generator=0
    )
    one = coordinate(parts, found.components[0, 0].double())
    t = wide(one)
    p, mean = density(one, t), one[0] @ one[1]
    variance = np.trapezoid(p * (t - mean) ** 2, t)
    assert float(found.eigenvalues) == pytest.approx(variance, rel=0.01)
    moments = directional_moments(denoiser, y.float(), 1.0, found.components[:, 0], radius=1.0)
    assert moments.central.dtype == torch.float32
    assert float(moments.variance) == pytest.approx(variance, rel=0.01)
    third, fourth = (np.trapezoid(p * (t - mean) ** j, t) for j in (3, 4))
    assert float(moments.central[0, 1]) == pytest.approx(third, abs=0.02 * variance**1.5)
    assert float(moments.central[0, 2]) == pytest.approx(fourth, rel=0.05)


def test_the_density_recovers_a_member_of_its_family():
    t = np.linspace(-5, 5, 4001)
    p = np.exp(0.3 * t + 0.9 * t**2 - 0.4 * t**4)
    p /= np.trapezoid(p, t)
    mean = np.trapezoid(p * t, t)
    central = [np.trapezoid(p * (t - mean) ** j, t) for j in (2, 3, 4)]
    moments = DirectionalMoments(torch.tensor([mean]), torch.tensor([central]), torch.tensor([central]))
    grid = np.linspace(-2.5, 2.5, 101)
    found = max_entropy_density(moments, grid)
    assert found.dtype == F64
    np.testing.assert_allclose(found[0].numpy(), np.interp(grid, t, p), atol=1e-4)


@pytest.mark.parametrize("order", [2, 4, 6])
def test_the_density_has_the_moments(order):
    one = np.array([0.35, 0.65]), np.array([-1.0, 1.4]), np.array([0.4, 0.6])
    t = wide(one)
    p, mean = density(one, t), one[0] @ one[1]
    central = np.array([np.trapezoid(p * (t - mean) ** j, t) for j in range(2, order + 1)])
    # Two directions at once, one of them on another scale.
    scales = np.array([1.0, 5.0])
    values = torch.tensor(central * scales[:, None] ** np.arange(2, order + 1))
    moments = DirectionalMoments(torch.tensor(mean * scales), values, values)
    grid = torch.tensor(scales[:, None] * np.linspace(-8, 9, 6001))
    found = max_entropy_density(moments, grid).numpy()
    for row in range(2):
        g, q = grid[row].numpy(), found[row]
        assert np.trapezoid(q, g) == pytest.approx(1, abs=1e-4)
        assert np.trapezoid(q * g, g) == pytest.approx(float(moments.mean[row]), abs=1e-3)
        for j in range(2, order + 1):
            got = np.trapezoid(q * (g - float(moments.mean[row])) ** j, g)
            assert got == pytest.approx(float(values[row, j - 2]), rel=2e-3, abs=1e-3)
    np.testing.assert_allclose(found[0], 5 * found[1], rtol=1e-6, atol=1e-12)
    if order == 2:
        gauss = np.exp(-((grid[0] - mean) ** 2) / 2 / central[0]) / math.sqrt(2 * math.pi * central[0])
        np.testing.assert_allclose(found[0], gauss.numpy(), atol=1e-6)


def test_impossible_moments_fall_back_with_a_warning():
    values = torch.tensor([[1.0, 0.5, 1.1], [1.0, 0.0, 3.0]], dtype=F64)
    moments = DirectionalMoments(torch.zeros(2, dtype=F64), values, values)
    with pytest.warns(checks.PerturbkitWarning, match="1 of 2 directions"):
        made = max_entropy_density(moments, [0.0, 1.0])
    torch.testing.assert_close(made[0], made[1], rtol=1e-6, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        max_entropy_density(given(1.0, 0.0, 1.5), [0.0])


def test_derivative_weights_are_exact_for_polynomials():
    points, weights = _parts.derivative_weights(17, 9, 5)
    coefficients = np.random.default_rng(0).normal(size=10)
    values = np.polynomial.polynomial.polyval(points, coefficients)
    wanted = [math.factorial(j) * coefficients[j] for j in range(5)]
    np.testing.assert_allclose(weights @ values, wanted, rtol=1e-7, atol=1e-9)
