"""Oracles of stochastic interpolants: Gaussians in closed form, flow matching, one-sided diffusion, and the pairs' variance."""

import math

import pytest
import torch

from _common import Example
from perturbkit.core import TimeMLP
from perturbkit.core.random import seeded_init
from perturbkit.data import GaussianMixture
from perturbkit.diffusion import StochasticInterpolant

PATHS = ("linear", "trigonometric", "encoding-decoding")
KINDS = [
    (p, g) for p in PATHS for g in ("brownian", "sin2", "zero") if (p, g) != ("encoding-decoding", "zero")
]
M0, S0, M1, S1 = -1.0, 0.5, 2.0, 1.2


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(path, squared=lambda t: 2 * t * (1 - t), slope=lambda t: 1 - 2 * t):
    """Mean, variance, velocity and score between N(M0, S0^2) and N(M1, S1^2), with gamma^2 and half its derivative."""

    def moments(t):
        a, b, _, da, db, _ = path.coefficients(t)
        mean, rate = a * M0 + b * M1, da * M0 + db * M1
        variance = a**2 * S0**2 + b**2 * S1**2 + squared(t)
        return mean, variance, rate, a * da * S0**2 + b * db * S1**2 + slope(t)

    def velocity(x, t):
        mean, variance, rate, half = (v[:, None] for v in moments(t))
        return rate + half / variance * (x - mean)

    def score(x, t):
        mean, variance, _, _ = (v[:, None] for v in moments(t))
        return -(x - mean) / variance

    return velocity, score, moments


def call(generator, dtype):
    path = StochasticInterpolant("trigonometric", "sin2")
    with seeded_init(0):
        net = TimeMLP(2, hidden=8).to(dtype)
    x0, x1, times = rand(5, 2, dtype=dtype), rand(5, 2, seed=1, dtype=dtype), torch.linspace(0.01, 0.99, 4)
    drawn = path.solve(net, x0, times, score=path.score(net), diffusion=0.5, generator=generator)
    return [
        drawn.x,
        path.velocity_loss(net, x0, x1, generator=generator),
        path.denoiser_loss(net, x0, x1, generator=generator),
        path.log_prob(net, x1, times, divergence="hutchinson", generator=generator),
    ]


LINEAR = StochasticInterpolant()


def zero(x, t):
    return torch.zeros_like(x)


EXAMPLE = Example(
    call=call,
    stochastic=True,
    refusals=(
        (lambda: StochasticInterpolant("straight"), "path is 'straight'"),
        (lambda: StochasticInterpolant(gamma="one"), "gamma is 'one'"),
        (lambda: StochasticInterpolant("encoding-decoding", "zero"), "gamma is 'zero'"),
        (lambda: StochasticInterpolant(gamma="zero").score(zero), "knows no score"),
        (lambda: LINEAR.coefficients(torch.tensor([1.5])), "t is 1.5"),
        (lambda: LINEAR.sample_path(rand(3, 2), rand(3, 1), torch.rand(3)), "x1 has shape"),
        (lambda: LINEAR.sample_path(rand(3, 2), rand(3, 2), torch.zeros(3)), "t is 0"),
        (lambda: LINEAR.velocity_loss(zero, rand(3, 2), rand(3, 2), t=torch.ones(2) / 2), "t has shape"),
        (lambda: LINEAR.denoiser_loss(zero, rand(3, 2) / 0, rand(3, 2)), "infinite"),
        (lambda: LINEAR.solve(zero, rand(3, 2), torch.tensor([0.0, 2.0])), "times has 2 values"),
        (lambda: LINEAR.solve(zero, rand(3, 2), torch.tensor([0.0, 1.0]), diffusion=1.0), "score is None"),
        (
            lambda: LINEAR.solve(zero, rand(3, 2), torch.tensor([0.0, 1.0]), score=zero, diffusion=-1.0),
            "diffusion is -1",
        ),
        (
            lambda: LINEAR.velocity_loss(lambda x, t: x[:, 0], rand(3, 1), rand(3, 1)),
            r"answered shape \(3,\)",
        ),
        (
            lambda: LINEAR.denoiser_loss(lambda x, t: x[:, 0], rand(3, 1), rand(3, 1)),
            r"answered shape \(3,\)",
        ),
        (
            lambda: LINEAR.solve(lambda x, t: x[:, 0], rand(3, 1), torch.tensor([0.0, 1.0])),
            "velocity answered",
        ),
        (lambda: LINEAR.score(zero)(rand(3, 2), torch.zeros(3)), "t is 0"),
        (
            lambda: LINEAR.log_prob(zero, rand(3, 2), torch.tensor([0.0, 1.0]), divergence="none"),
            "divergence is",
        ),
    ),
)


@pytest.mark.parametrize(("kind", "gamma"), KINDS)
def test_coefficients_have_their_ends_and_rates(kind, gamma):
    path = StochasticInterpolant(kind, gamma)
    ends = path.coefficients(torch.tensor([0.0, 1.0]).double())
    for found, expected in zip(ends[:3], ([1.0, 0.0], [0.0, 1.0], [0.0, 0.0]), strict=True):
        torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=1e-12)
    t, h = torch.tensor([0.1, 0.3, 0.45, 0.6, 0.9]).double(), 1e-6
    before, at, after = (path.coefficients(t + shift) for shift in (-h, 0.0, h))
    for i in range(3):
        torch.testing.assert_close(at[3 + i], (after[i] - before[i]) / (2 * h), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", PATHS)
def test_the_flow_of_gaussians_scales(kind):
    path = StochasticInterpolant(kind)
    velocity, _, moments = gaussian(path)
    x = M0 + S0 * torch.linspace(-2, 2, 5).double()[:, None]
    for end in (0.3, 0.8, 1.0):
        found = path.solve(velocity, x, torch.linspace(0, end, 601)).x
        mean, variance, *_ = moments(torch.tensor([end]).double())
        torch.testing.assert_close(found, mean + variance.sqrt() / S0 * (x - M0), rtol=0, atol=1e-4)
    back = path.solve(velocity, found, torch.linspace(1, 0, 601)).x
    torch.testing.assert_close(back, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("epsilon", [0.5, 2.0, None], ids=["half", "two", "varying"])
@pytest.mark.parametrize("backward", [False, True])
def test_every_diffusion_has_the_same_law(epsilon, backward):
    path, n = StochasticInterpolant(), 20_000
    velocity, score, _ = gaussian(path)
    (m, s), (goal, spread) = ((M1, S1), (M0, S0)) if backward else ((M0, S0), (M1, S1))
    x = m + s * rand(n, 1)
    times = torch.linspace(0, 1, 101)
    level = (lambda t: 2 * t) if epsilon is None else epsilon
    drawn = path.solve(
        velocity, x, times.flip(0) if backward else times, score=score, diffusion=level, generator=1
    )
    assert abs(float(drawn.x.mean()) - goal) < 4 * spread / math.sqrt(n)
    assert abs(float(drawn.x.std()) / spread - 1) < 4 / math.sqrt(2 * n) + 0.005
    assert drawn.cost.nfev == 4 * 100 * n
    assert abs(float(torch.corrcoef(torch.stack((x[:, 0], drawn.x[:, 0])))[0, 1])) < 0.95


def test_noise_of_one_step_is_the_mean_of_both_ends():
    drawn = LINEAR.solve(
        zero,
        torch.zeros(20_000, 1),
        torch.tensor([0.0, 0.5]),
        score=zero,
        diffusion=lambda t: 4 * t,
        generator=0,
    )
    # 2 epsilon h with epsilon = 1 on average and h = 1/2.
    assert abs(float(drawn.x.std()) - 1) < 0.02


@pytest.mark.parametrize(("kind", "gamma"), KINDS)
def test_the_losses_are_least_at_the_exact_fields(kind, gamma):
    path, n = StochasticInterpolant(kind, gamma), 40_000
    of = {
        "brownian": lambda t: 2 * t * (1 - t),
        "sin2": lambda t: torch.sin(math.pi * t) ** 4,
        "zero": torch.zeros_like,
    }
    slopes = {
        "brownian": lambda t: 1 - 2 * t,
        "sin2": lambda t: math.pi * torch.sin(math.pi * t) ** 2 * torch.sin(2 * math.pi * t),
        "zero": torch.zeros_like,
    }
    velocity, score, _ = gaussian(path, of[gamma], slopes[gamma])
    x0, x1 = M0 + S0 * rand(n, 1), M1 + S1 * rand(n, 1, seed=1)

    def losses(loss, field):
        answers = [lambda x, t, c=c: c * field(x, t) for c in (1.0, 0.9, 1.1)]
        return [float(loss(answer, x0, x1, generator=3)) for answer in answers]

    best, *worse = losses(path.velocity_loss, velocity)
    assert min(worse) > best
    best, *worse = losses(path.denoiser_loss, lambda x, t: -path.coefficients(t)[2][:, None] * score(x, t))
    assert min(worse) > best or gamma == "zero"


def test_the_score_of_a_one_sided_path_is_that_of_diffusion():
    path = StochasticInterpolant("trigonometric")
    world = GaussianMixture(torch.tensor([[M1]]).double(), stds=S1)
    x, t = rand(40, 1), torch.linspace(0.05, 0.95, 40).double()
    a, b, gamma, *_ = path.coefficients(t)
    # z and x_t are jointly Gaussian.
    variance = a**2 + b**2 * S1**2 + gamma**2
    found = path.score(lambda x, t: (gamma / variance)[:, None] * (x - (b * M1)[:, None]))(x, t)
    expected = world.score(x, b, (a**2 + gamma**2).sqrt())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_without_noise_it_is_flow_matching():
    path = StochasticInterpolant(gamma="zero")
    x0, x1 = rand(30, 3), rand(30, 3, seed=1)
    t = torch.rand(30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with seeded_init(0):
        net = TimeMLP(3, hidden=8).double()
    matching = 0.5 * (net((1 - t[:, None]) * x0 + t[:, None] * x1, t) - (x1 - x0)).square().sum(1)
    expected = (matching - 0.5 * (x1 - x0).square().sum(1)).mean()
    torch.testing.assert_close(path.velocity_loss(net, x0, x1, t=t), expected)
    state, rate, _ = path.sample_path(x0, x1, t, 0)
    torch.testing.assert_close(state, x0 + t[:, None] * (x1 - x0))
    torch.testing.assert_close(rate, x1 - x0)


def test_pairs_are_the_mean_over_both_signs_and_keep_the_variance_finite():
    path, x0, x1 = StochasticInterpolant(), rand(1, 2), rand(1, 2, seed=1)

    def net(x, t):
        return torch.sin(2 * x) + t[:, None]

    t = torch.tensor([0.3]).double()
    z = torch.randn(1, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    c = [v[:, None] for v in path.coefficients(t)]
    parts = []
    for sign in (1, -1):
        answer = net(c[0] * x0 + c[1] * x1 + sign * c[2] * z, t)
        target = c[3] * x0 + c[4] * x1 + sign * c[5] * z
        parts.append((0.5 * answer.square() - target * answer).sum())
    torch.testing.assert_close(path.velocity_loss(net, x0, x1, t=t, generator=5), sum(parts) / 2)
    torch.testing.assert_close(path.velocity_loss(net, x0, x1, t=t, antithetic=False, generator=5), parts[0])
    spread = {}
    for antithetic in (True, False):
        for early in (1e-4, 1e-7):
            g, at = torch.Generator().manual_seed(0), torch.full((1,), early).double()
            draws = [
                path.velocity_loss(net, x0, x1, t=at, antithetic=antithetic, generator=g) for _ in range(200)
            ]
            spread[antithetic, early] = float(torch.stack(draws).std())
    # Towards the end the loss of one sign grows as the rate of gamma, that of pairs tends to a limit.
    assert spread[True, 1e-7] < 1.2 * spread[True, 1e-4]
    assert spread[False, 1e-7] > 20 * spread[False, 1e-4]


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_log_density_of_gaussians(divergence):
    path = StochasticInterpolant()
    velocity, _, _ = gaussian(path)
    x = M1 + S1 * rand(20, 3)
    start = torch.distributions.Normal(torch.tensor(M0).double(), S0)
    end = torch.distributions.Normal(torch.tensor(M1).double(), S1)
    found = path.log_prob(
        velocity,
        x,
        torch.linspace(0, 1, 401),
        base=lambda x: start.log_prob(x).sum(1),
        divergence=divergence,
        generator=0,
    )
    # The Jacobian is diagonal, so that a probe of signs is exact too.
    torch.testing.assert_close(found, end.log_prob(x).sum(1), rtol=0, atol=1e-3)
    still = path.log_prob(zero, x, torch.linspace(0, 1, 3))
    torch.testing.assert_close(still, -0.5 * (x.square() + math.log(2 * math.pi)).sum(1))


def test_exact_divergence_of_coupled_coordinates():
    # A constant rotation and scaling: the volume grows by the trace alone.
    matrix = torch.tensor([[0.5, 2.0], [-1.0, 0.3]]).double()
    x = rand(6, 2)
    found = LINEAR.log_prob(lambda x, t: x @ matrix.T, x, torch.linspace(0, 1, 801))
    inverse = torch.linalg.matrix_exp(-matrix)
    expected = -0.5 * ((x @ inverse.T).square() + math.log(2 * math.pi)).sum(1) - 0.8
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
