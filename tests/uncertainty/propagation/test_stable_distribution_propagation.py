"""Oracles of stable distribution propagation: a million samples, the Jacobian, closed forms of one ReLU."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from _common import Example
from perturbkit.core import Oracle
from perturbkit.uncertainty import StableCauchy, StableGaussian, pairwise_probability, propagate, sdp_loss


def network(*layers, seed=0, dtype=torch.float64):
    net = nn.Sequential(
        *(layers or (nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)))
    ).to(dtype)
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype) / math.sqrt(p.shape[-1])
    return net.eval()


def normal(shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(n=2, d=4, seed=1, dtype=torch.float64):
    return StableGaussian(normal((n, d), seed).to(dtype), normal((n, d), seed + 50).square().to(dtype))


def correlated(n=2, d=4, seed=1):
    half = normal((n, d, d), seed + 70)
    full = half @ half.transpose(1, 2)
    return StableGaussian(normal((n, d), seed), full.diagonal(dim1=1, dim2=2), full)


NET = network()

EXAMPLE = Example(
    model=lambda: network(dtype=torch.float32),
    with_model=lambda model, generator, dtype: (
        propagate(model, gaussian(dtype=dtype)),
        propagate(model, gaussian(dtype=dtype), mode="marginal"),
        propagate(model, StableCauchy(normal((2, 4)).to(dtype), torch.ones(2, 4, dtype=dtype))),
    ),
    chunked=lambda size: propagate(Oracle(network(), chunk_size=size), gaussian(9)),
    refusals=(
        (lambda: propagate(NET, gaussian(), mode="exact"), "mode is 'exact'"),
        (lambda: propagate(NET, normal((2, 4))), "distribution is a Tensor"),
        (lambda: propagate(NET, StableGaussian(normal((2, 4)), normal((2, 4)))), "negative entries"),
        (lambda: propagate(NET, StableGaussian(normal((2, 4)), torch.ones(2, 3))), "the spread has shape"),
        (lambda: propagate(NET, StableGaussian(normal((2, 4)), torch.ones(2, 4), torch.ones(2, 3, 3))), "covariance has shape"),
        (lambda: propagate(NET, StableCauchy(normal((2, 4)), torch.ones(2, 4)), mode="moments"), "which has none"),
        (lambda: propagate(NET, gaussian(), mode="moments"), "the model has a Tanh"),
        (lambda: propagate(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).double(), gaussian(), mode="marginal"), "the model has a LayerNorm"),
        (lambda: propagate(lambda x: x, gaussian(), mode="marginal"), "the model has a function"),
        (lambda: propagate(nn.Conv1d(1, 1, 3, padding="same").double(), StableGaussian(normal((1, 1, 4)), torch.ones(1, 1, 4)), mode="marginal"), "options have no rule"),
        (lambda: propagate(nn.AvgPool2d(3, padding=1, count_include_pad=False), StableGaussian(normal((1, 1, 4, 4)), torch.ones(1, 1, 4, 4)), mode="marginal"), "options have no rule"),
        (lambda: propagate(nn.MaxPool2d(2, ceil_mode=True), StableGaussian(normal((1, 1, 5, 5)), torch.ones(1, 1, 5, 5)), mode="marginal"), "MaxPool2d has no rule"),
        (lambda: pairwise_probability(gaussian(), [0, 4]), "y holds labels"),
        (lambda: sdp_loss(NET, normal((2, 4)), normal((2, 2)), input_std=0.1), "y has shape"),
    ),
)  # fmt: skip


def sampled(net, distribution, n=1_000_000, seed=9):
    """Outputs of a million draws of the first row's inputs."""
    z = normal((n, distribution.mean.shape[1]), seed)
    if distribution.covariance is None:
        x = distribution.mean[0] + distribution.variance[0].sqrt() * z
    else:
        x = distribution.mean[0] + z @ torch.linalg.cholesky(distribution.covariance[0]).T
    with torch.no_grad():
        return net(x)


@pytest.mark.parametrize("make", [gaussian, correlated])
def test_affine_network_against_a_million_samples(make):
    net, given = network(nn.Linear(4, 5), nn.Linear(5, 3)), make(1)
    found, out = propagate(net, given), sampled(net, given)
    scale = found.variance[0].sqrt()
    assert float(((out.mean(0) - found.mean[0]).abs() / scale).max()) < 5e-3
    correlation = (out.T.cov() - found.covariance[0]) / (scale[:, None] * scale)
    assert float(correlation.abs().max()) < 1e-2
    torch.testing.assert_close(found.variance, found.covariance.diagonal(dim1=1, dim2=2))


def test_small_noise_in_a_network_against_a_million_samples():
    """Linearised: the error of the mean is second order, and the spread is right to some per cent."""
    given = gaussian(1, seed=3)
    given = StableGaussian(given.mean, torch.full_like(given.variance, 0.02**2))
    found, out = propagate(NET, given), sampled(NET, given)
    scale = found.variance[0].sqrt()
    assert float(((out.mean(0) - found.mean[0]).abs() / scale).max()) < 0.05
    assert float((out.std(0) / scale - 1).abs().max()) < 0.03


@pytest.mark.parametrize("outputs", [3, 9])
def test_full_is_the_jacobian_on_both_sides(outputs):
    net = network(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, outputs))
    given = correlated()
    jacobian = torch.func.vmap(torch.func.jacrev(net))(given.mean)
    expected = jacobian @ given.covariance @ jacobian.transpose(1, 2)
    found = propagate(net, given)
    torch.testing.assert_close(found.covariance, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.mean, net(given.mean))
    plain = propagate(net, StableGaussian(given.mean, given.variance))
    expected = jacobian @ torch.diag_embed(given.variance) @ jacobian.transpose(1, 2)
    torch.testing.assert_close(plain.covariance, expected, rtol=1e-9, atol=1e-12)
    cauchy = propagate(net, StableCauchy(given.mean, given.variance))
    torch.testing.assert_close(cauchy.scale, (jacobian.abs() @ given.variance[..., None])[..., 0])


def test_cauchy_quartiles_against_samples():
    net = network(nn.Linear(4, 2))
    scale = torch.tensor([[0.5, 1.0, 2.0, 0.1]], dtype=torch.float64)
    found = propagate(net, StableCauchy(normal((1, 4)), scale))
    u = torch.rand(1_000_000, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    out = net(normal((1, 4)) + scale * torch.tan(math.pi * (u - 0.5))).detach()
    low, middle, high = torch.quantile(out[:, 0], torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    assert float((high - low) / 2) == pytest.approx(float(found.scale[0, 0]), rel=0.01)
    assert float(middle) == pytest.approx(float(found.loc[0, 0]), abs=0.01 * float(found.scale[0, 0]))
    marginal = propagate(net, StableCauchy(normal((1, 4)), scale), mode="marginal")
    torch.testing.assert_close(marginal.scale, found.scale)


@pytest.mark.parametrize("ratio", [-3.0, -1.0, 0.5, 2.0, 6.0])
def test_one_relu_is_as_far_off_as_its_lighter_side(ratio):
    """Total variation of N(mu, s) with slope 1 or a point at 0 from ReLU(N(mu, s)) is Phi(-|mu| / s)."""
    std = 0.7
    given = StableGaussian(
        torch.tensor([[ratio * std]], dtype=torch.float64), torch.tensor([[std**2]], dtype=torch.float64)
    )
    found = propagate(nn.Sequential(nn.ReLU()), given, mode="marginal")
    if ratio > 0:
        # The two laws agree above zero and put their rest on different sets.
        assert float(found.mean) == pytest.approx(ratio * std)
        assert float(found.variance) == pytest.approx(std**2)
        distance = norm.cdf(0, float(found.mean), math.sqrt(float(found.variance)))
    else:
        assert float(found.mean) == float(found.variance) == 0
        distance = 1 - norm.cdf(0, ratio * std, std)
    assert distance == pytest.approx(norm.cdf(-abs(ratio)))


def test_slope_at_zero_is_zero():
    given = StableGaussian(torch.zeros(1, 1), torch.ones(1, 1))
    for mode in ("full", "marginal"):
        assert float(propagate(nn.Sequential(nn.ReLU()), given, mode=mode).variance) == 0


@pytest.mark.parametrize("mean", [-2.0, -0.3, 0.0, 1.0, 5.0])
def test_moments_of_a_relu_against_quadrature(mean):
    x = torch.linspace(mean - 12, mean + 12, 400_001, dtype=torch.float64)
    weight = torch.as_tensor(norm.pdf(x, mean, 1.3))
    first, second = (torch.trapezoid(torch.relu(x) ** k * weight, x) for k in (1, 2))
    given = StableGaussian(
        torch.tensor([[mean]], dtype=torch.float64), torch.tensor([[1.69]], dtype=torch.float64)
    )
    found = propagate(nn.Sequential(nn.ReLU()), given, mode="moments")
    assert float(found.mean) == pytest.approx(float(first), abs=1e-8)
    assert float(found.variance) == pytest.approx(float(second - first**2), abs=1e-8)


def test_marginal_equals_full_where_entries_stay_independent():
    images = StableGaussian(normal((2, 2, 6, 6)), normal((2, 2, 6, 6), 5).square())
    norm_layer = nn.BatchNorm2d(2)
    nets = [
        network(nn.Conv2d(2, 3, 3, stride=2, padding=1, groups=1), nn.SiLU(), nn.Flatten()),
        network(nn.Sequential(nn.AvgPool2d(2), nn.Flatten()), nn.Identity(), nn.Dropout(0.5)),
        network(nn.MaxPool2d(2), nn.Softplus(), nn.Flatten()),
        network(norm_layer, nn.Tanh(), nn.Flatten()),
    ]
    norm_layer.running_mean, norm_layer.running_var = (
        torch.tensor([0.5, -1.0]).double(),
        torch.tensor([2.0, 0.3]).double(),
    )
    for net in nets:
        full, marginal = propagate(net, images), propagate(net, images, mode="marginal")
        torch.testing.assert_close(marginal.mean, full.mean)
        torch.testing.assert_close(marginal.variance, full.variance)
        scale = StableCauchy(images.mean, images.variance)
        torch.testing.assert_close(propagate(net, scale, mode="marginal").scale, propagate(net, scale).scale)
    line = network(nn.Conv1d(1, 2, 3, padding=1), nn.BatchNorm1d(2), nn.ELU(), nn.Flatten())
    line[1].running_mean, line[1].running_var = torch.zeros(2).double(), torch.ones(2).double()
    signal = StableGaussian(normal((2, 1, 7)), torch.ones(2, 1, 7, dtype=torch.float64))
    torch.testing.assert_close(
        propagate(line, signal).variance, propagate(line, signal, mode="marginal").variance
    )


def test_marginal_forgets_correlations():
    net = network(nn.Linear(1, 2), nn.Linear(2, 1))
    net[0].weight.data = torch.ones(2, 1).double()
    net[1].weight.data = torch.tensor([[1.0, -1.0]]).double()
    given = StableGaussian(torch.zeros(1, 1).double(), torch.ones(1, 1).double())
    assert float(propagate(net, given).variance) == 0
    assert float(propagate(net, given, mode="marginal").variance) == 2


def test_pairwise_probability_against_samples():
    given = correlated(1, 3, seed=4)
    z = given.mean[0] + normal((1_000_000, 3), 6) @ torch.linalg.cholesky(given.covariance[0]).T
    expected = [(z[:, 1] > z[:, j]).double().mean() for j in (0, 2)]
    found = pairwise_probability(given, [1])[0]
    assert found[1] == 1
    np.testing.assert_allclose(found[[0, 2]], expected, atol=3e-3)
    u = torch.rand(1_000_000, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    draw = torch.tensor([0.3, -0.5]) + torch.tensor([1.0, 0.4]) * torch.tan(math.pi * (u - 0.5))
    cauchy = StableCauchy(torch.tensor([[0.3, -0.5]]).double(), torch.tensor([[1.0, 0.4]]).double())
    found = pairwise_probability(cauchy, [0])[0, 1]
    assert float(found) == pytest.approx(float((draw[:, 0] > draw[:, 1]).double().mean()), abs=3e-3)


def test_loss_of_responses_is_the_likelihood_and_trains():
    x, y = normal((5, 4)), normal((5, 3), 8)
    found = propagate(NET, StableGaussian(x, torch.full_like(x, 0.04)))
    expected = -norm.logpdf(y, found.mean, (found.variance + 0.09).sqrt()).mean()
    loss = sdp_loss(NET, x, y, input_std=0.2, output_std=0.3)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    loss.backward()
    step = {n: p.grad.clone() for n, p in NET.named_parameters()}
    NET.zero_grad(set_to_none=True)
    net = network()
    eps = 1e-6
    net[0].weight.data[1, 2] += eps
    up = sdp_loss(net, x, y, input_std=0.2, output_std=0.3)
    assert (up - loss).item() / eps == pytest.approx(float(step["0.weight"][1, 2]), rel=1e-3, abs=1e-6)


def test_loss_of_classes_is_that_of_the_pairs():
    x, y = normal((5, 4)), torch.tensor([0, 1, 2, 1, 0])
    chance = pairwise_probability(propagate(NET, StableGaussian(x, torch.full_like(x, 4.0))), y)
    expected = -chance.log().sum(1).mean() / 2
    assert sdp_loss(NET, x, y, input_std=2.0).item() == pytest.approx(float(expected), rel=1e-9)
    # Where the chance underflows, its logarithm does not.
    assert sdp_loss(NET, x, y, input_std=1e-4).isfinite()
