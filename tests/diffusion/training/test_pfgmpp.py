"""Oracles of PFGM++: its kernel against known laws, both limits, the posterior mean, and the invariant of its flow."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from _common import Example
from perturbkit.core import EDMSchedule, Preconditioned, TimeMLP
from perturbkit.core.random import seeded_init
from perturbkit.data import EmpiricalMeasure
from perturbkit.diffusion import PoissonFlow, mixture_poisson_denoiser, sample_heun


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def call(generator, dtype):
    flow = PoissonFlow(16, 3)
    x0 = rand(5, 3, dtype=dtype)
    denoiser = mixture_poisson_denoiser(x0, None, flow)
    x = flow.prior(4, generator=generator, dtype=dtype)
    return [sample_heun(denoiser, x, flow.times(4)).x, flow.loss(denoiser, x0, generator=generator)]


FLOW = PoissonFlow(8, 3)
EXAMPLE = Example(
    call=call,
    stochastic=True,
    refusals=(
        (lambda: PoissonFlow(0, 3), "extra_dims is 0"),
        (lambda: PoissonFlow(math.nan, 3), "extra_dims is nan"),
        (lambda: PoissonFlow(8, 0), "data_dim is 0"),
        (lambda: PoissonFlow(8, 3, sigma_min=2.0, sigma_max=1.0), "sigma_max is 1"),
        (lambda: PoissonFlow(8, 3, data_std=0.0), "data_std is 0"),
        (lambda: FLOW.perturb(rand(4, 2), 1.0), "x0 has shape"),
        (lambda: FLOW.perturb(rand(4, 3), -1.0), "sigma is -1"),
        (lambda: FLOW.perturb(rand(4, 3), torch.ones(3)), "sigma has shape"),
        (lambda: FLOW.prior(0), "n is 0"),
        (lambda: FLOW.loss(lambda x, t: x, rand(4, 2)), "x0 has shape"),
        (lambda: FLOW.loss(lambda x, t: x[:, :1], rand(4, 3)), r"answered shape \(4, 1\)"),
        (lambda: FLOW.loss(lambda x, t: x, rand(4, 3), sigma=torch.zeros(4)), "sigma is 0"),
        (lambda: FLOW.sigma_to_radius(-1.0), "sigma is -1"),
        (lambda: mixture_poisson_denoiser(rand(4, 2), None, FLOW), "points has shape"),
        (lambda: mixture_poisson_denoiser(rand(2, 3), torch.tensor([1.0, 0.0]), FLOW), "weights is 0"),
        (lambda: mixture_poisson_denoiser(rand(2, 3), None, 8), "flow is a int"),
    ),
)


def distances(extra_dims, data_dim, sigma, n=4000, seed=0):
    flow = PoissonFlow(extra_dims, data_dim)
    y = rand(1, data_dim, seed=9).expand(n, -1)
    away = flow.perturb(y, sigma, seed) - y
    return flow, away


@pytest.mark.parametrize(("extra_dims", "data_dim"), [(1, 1), (1, 6), (8, 5), (2048, 64), (math.inf, 3)])
def test_the_kernel_has_its_radial_law(extra_dims, data_dim):
    flow, away = distances(extra_dims, data_dim, 0.7)
    ratio = (away.square().sum(1) / 0.7**2).numpy()
    if extra_dims == math.inf:
        assert stats.kstest(ratio, stats.chi2(data_dim).cdf).pvalue > 0.01
    else:
        # R^2 / r^2 = b / (1 - b) with b of Beta(N/2, D/2).
        share = ratio * 0.7**2 / flow.sigma_to_radius(0.7) ** 2
        assert stats.kstest(share, stats.betaprime(data_dim / 2, extra_dims / 2).cdf).pvalue > 0.01
    # Every direction alike.
    angle = (away[:, 0] / away.norm(dim=1)).numpy()
    assert abs(np.mean(angle)) < 4 / math.sqrt(4000 * data_dim)
    assert abs(np.mean(angle**2) * data_dim - 1) < 4 * math.sqrt(2 / 4000)


def test_one_extra_dimension_in_one_is_cauchy():
    _, away = distances(1, 1, 2.0)
    assert stats.kstest(away[:, 0].abs().numpy() / 2.0, stats.halfcauchy.cdf).pvalue > 0.01


def test_many_extra_dimensions_are_diffusion():
    _, away = distances(1e7, 16, 1.5)
    assert stats.kstest((away.square().sum(1) / 1.5**2).numpy(), stats.chi2(16).cdf).pvalue > 0.01
    points, x = rand(20, 4), 2 * rand(50, 4, seed=1)
    world = EmpiricalMeasure(points)
    for sigma in (0.3, 1.0, 5.0):
        expected = world.posterior_mean(x, 1.0, sigma)
        many = mixture_poisson_denoiser(points, None, PoissonFlow(1e7, 4)).x0(x, sigma)
        infinite = mixture_poisson_denoiser(points, None, PoissonFlow(math.inf, 4)).x0(x, sigma)
        torch.testing.assert_close(many, expected, rtol=0, atol=1e-3)
        torch.testing.assert_close(infinite, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("extra_dims", [1, 7, 300])
def test_two_points_in_closed_form(extra_dims):
    flow, points, charge = PoissonFlow(extra_dims, 3), rand(2, 3), torch.tensor([1.0, 3.0]).double()
    x, sigma = rand(9, 3, seed=2), 0.4
    found = mixture_poisson_denoiser(points, charge, flow).x0(x, sigma)
    r = flow.sigma_to_radius(sigma)
    field = [
        q * ((x - y).square().sum(1) + r**2) ** (-(3 + extra_dims) / 2)
        for q, y in zip(charge, points, strict=True)
    ]
    share = (field[1] / (field[0] + field[1]))[:, None]
    torch.testing.assert_close(found, (1 - share) * points[0] + share * points[1])


@pytest.mark.parametrize("extra_dims", [1, 5, math.inf])
def test_the_flow_carries_the_marginals(extra_dims):
    # In one dimension the flow keeps the distribution function: that of a mixture of t variables with D degrees of freedom.
    flow = PoissonFlow(extra_dims, 1, sigma_max=10.0, sigma_min=0.2)
    points, charge = torch.tensor([[-1.0], [0.5]]).double(), torch.tensor([0.3, 0.7]).double()
    law = stats.norm if extra_dims == math.inf else stats.t(extra_dims)

    def cdf(x, sigma):
        return sum(float(q) * law.cdf((x - float(y)) / sigma) for q, y in zip(charge, points, strict=True))

    x = torch.linspace(-12, 12, 25).double()[:, None]
    found = sample_heun(mixture_poisson_denoiser(points, charge, flow), x, flow.times(200)).x
    np.testing.assert_allclose(cdf(found.numpy(), 0.2), cdf(x.numpy(), 10.0), rtol=0, atol=2e-4)


def test_the_loss_is_least_at_the_posterior_mean():
    flow, points = PoissonFlow(8, 2, data_std=0.9), rand(4, 2)
    exact = mixture_poisson_denoiser(points, None, flow)
    batch = points.repeat(2000, 1)
    best = float(flow.loss(exact, batch, generator=0))
    other = mixture_poisson_denoiser(points, None, PoissonFlow(math.inf, 2))
    for worse in (other, lambda x, t: exact(x, t) + 0.05, lambda x, t: 0.97 * exact(x, t)):
        assert float(flow.loss(worse, batch, generator=0)) > best


def test_loss_by_hand():
    flow, x0, sigma = PoissonFlow(5, 3, data_std=0.6), rand(6, 3), rand(6, seed=1).exp()
    x = flow.perturb(x0, sigma, 4)
    expected = ((sigma**2 + 0.36) / (0.6 * sigma) ** 2)[:, None] * (0.5 * x - x0).square()
    found = flow.loss(lambda x, t: 0.5 * x, x0, sigma=sigma, generator=4)
    torch.testing.assert_close(found, expected.mean())


def test_prior_and_levels():
    flow = PoissonFlow(64, (1, 4, 4), sigma_min=0.01, sigma_max=30.0)
    x = flow.prior(3000, generator=0)
    assert x.shape == (3000, 1, 4, 4)
    share = x.double().flatten(1).square().sum(1).numpy() / flow.sigma_to_radius(30.0) ** 2
    assert stats.kstest(share, stats.betaprime(8, 32).cdf).pvalue > 0.01
    assert flow.sigma_to_radius(2.0) == 16.0
    assert flow.times(9)[[0, -1]].tolist() == [30.0, 0.01]


def test_a_preconditioned_network_drops_in():
    flow = PoissonFlow(32, 2)
    with seeded_init(0):
        net = Preconditioned(TimeMLP(2, hidden=8), EDMSchedule(), 0.5)
    loss = flow.loss(net, rand(7, 2, dtype=torch.float32), generator=0)
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())
