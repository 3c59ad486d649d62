"""Oracles of randomized smoothing: the exact radius of a linear classifier, and the confidence it promises."""

import pytest
import torch
from scipy.stats import binom
from scipy.stats import norm as normal
from torch import nn

from _common import Example
from perturbkit.core import Oracle, around
from perturbkit.core.random import randn, uniform
from perturbkit.robust import projected_gradient, randomized_smoothing


def network(seed=0, d=4, k=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, k)).to(dtype)
    for p in net.parameters():
        p.data = randn(p.shape, generator=g, dtype=dtype)
    return net


def inputs(n=3, d=4, dtype=torch.float64):
    return uniform((n, d), generator=torch.Generator().manual_seed(1), dtype=dtype)


def certify(model, dtype=torch.float64, generator=0, **options):
    return randomized_smoothing(
        model,
        inputs(dtype=dtype),
        **{"sigma": 0.3, "n_selection": 20, "n_samples": 50, "generator": generator} | options,
    )


EXAMPLE = Example(
    model=lambda: network(dtype=torch.float32),
    with_model=lambda model, generator, dtype: certify(model.to(dtype), dtype, generator),
    chunked=lambda size: certify(Oracle(network(), chunk_size=size)),
    refusals=(
        (lambda: certify(network(), sigma=0.0), "sigma is 0"),
        (lambda: certify(network(), n_selection=0), "n_selection is 0"),
        (lambda: certify(network(), n_samples=0), "n_samples is 0"),
        (lambda: certify(network(), alpha=1.0), "alpha is 1"),
        (lambda: certify(lambda z: z[:, :1]), "at least two classes"),
        (lambda: randomized_smoothing(network(), inputs().long(), sigma=1.0), "floating-point"),
    ),
    stochastic=True,
)  # fmt: skip


def linear(z):
    """Answer class 0 where the first feature is above zero: the distance to the boundary is that feature."""
    return torch.stack([z[:, 0], -z[:, 0]], 1)


def test_a_linear_classifier_has_its_distance_as_radius_but_for_the_confidence():
    distance = torch.tensor([0.1, 0.25, 0.5], dtype=torch.float64)
    x = torch.stack([distance, torch.zeros(3, dtype=torch.float64)], 1)
    n, alpha, sigma = 20_000, 0.001, 0.5
    found = randomized_smoothing(linear, x, sigma=sigma, n_samples=n, alpha=alpha, generator=0)
    assert found.prediction.tolist() == [0, 0, 0]
    assert bool((found.radius <= distance).all())
    # Clopper-Pearson in the normal approximation: z(0.999) deviations of the share below it, itself within four.
    p = normal.cdf(distance.numpy() / sigma)
    slack = (3.09 + 4) * (p * (1 - p) / n) ** 0.5
    assert (normal.cdf(found.radius.numpy() / sigma) >= p - slack).all()
    assert found.confidence == 1 - alpha


def test_the_largest_radius_is_that_of_a_unanimous_vote():
    found = randomized_smoothing(
        lambda z: torch.stack([1 + 0 * z[:, 0], 0 * z[:, 0]], 1),
        inputs(),
        sigma=2.0,
        n_samples=500,
        alpha=0.01,
    )
    # Clopper-Pearson for n of n: alpha^(1/n).
    expected = 2.0 * normal.ppf(0.01 ** (1 / 500))
    torch.testing.assert_close(found.radius, torch.full((3,), float(expected), dtype=torch.float64))
    assert found.cost.nfev == 3 * (100 + 500)


def test_a_close_vote_abstains():
    x = torch.zeros(4, 2, dtype=torch.float64)
    found = randomized_smoothing(linear, x, sigma=1.0, n_samples=200, generator=1)
    assert found.prediction.tolist() == [-1] * 4
    assert found.radius.tolist() == [0.0] * 4
    assert bool((found.share <= 0.5).all())


def test_the_bound_is_wrong_as_rarely_as_promised():
    alpha, trials = 0.2, 300
    x = torch.full((trials, 1), 0.3, dtype=torch.float64)
    found = randomized_smoothing(
        linear, x, sigma=1.0, n_selection=50, n_samples=100, alpha=alpha, generator=3
    )
    wrong = int((found.radius > 0.3).sum())
    assert wrong > 0
    assert binom.sf(wrong - 1, trials, alpha) > 1e-3


def test_more_noise_and_more_draws_as_the_equation_says():
    x = torch.full((1, 2), 3.0, dtype=torch.float64)
    radii = [
        float(randomized_smoothing(linear, x, sigma=s, n_samples=n, alpha=0.01, generator=0).radius)
        for s, n in ((0.1, 100), (0.2, 100), (0.2, 1000))
    ]
    assert radii[1] == pytest.approx(2 * radii[0])
    assert radii[2] > radii[1]


def test_no_attack_on_the_smoothed_model_crosses_the_radius():
    # The exact smoothed classifier of a linear one is linear in the probit; of the network it is estimated by many draws.
    net, x = network(), inputs(6)
    sigma = 0.5
    found = randomized_smoothing(net, x, sigma=sigma, n_samples=4000, generator=0)
    noise = sigma * randn((4000, 4), generator=torch.Generator().manual_seed(9), dtype=torch.float64)

    def smoothed(z):
        return net((z[:, None] + noise).flatten(0, 1)).softmax(1).reshape(len(z), len(noise), -1).mean(1)

    def votes(z):
        answers = net((z[:, None] + noise).flatten(0, 1)).argmax(1).reshape(len(z), -1)
        return nn.functional.one_hot(answers, 3).double().mean(1)

    sure = found.prediction >= 0
    assert bool(sure.any())
    x, y, radius = x[sure], found.prediction[sure], found.radius[sure]
    attack = projected_gradient(smoothed, x, y, around(x, "l2", radius, None), n_steps=8, generator=0)
    moved = torch.where(attack.success[:, None], attack.x, x)
    assert torch.equal(votes(moved).argmax(1), y)
