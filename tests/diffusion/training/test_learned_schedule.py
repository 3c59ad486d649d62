"""Oracles of learned schedules: consistent pairs, monotone fractions, DDPM's loss, the posterior of the chain."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from _common import Example
from perturbkit.core import VPSchedule
from perturbkit.core.checks import ArgumentError
from perturbkit.core.random import randn, seeded_init, uniform
from perturbkit.diffusion import LearnedSchedule, cvdm_loss, sample_cvdm

F64 = torch.float64
VP = VPSchedule()


def data(n=6, dim=3, dtype=F64, seed=1):
    return randn((n, dim), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(dtype=F64, seed=0, **options):
    with seeded_init(seed):
        return LearnedSchedule(3, **{"condition_dim": 2, "hidden": 8, **options}).to(dtype)


def network(x, fraction, condition):
    return x * fraction


class Square:
    """G = exp(-L t^2 / 2) and B = L t, a consistent pair."""

    speed = torch.tensor([[4.0, 9.0, 30.0]], dtype=F64)

    def __init__(self, factor=1.0):
        self.factor = factor

    def signal_fraction(self, t, condition):
        return (-self.speed * t**2 / 2).exp()

    def rate(self, t, condition):
        return self.factor * self.speed * t


class Linear:
    """The linear variance-preserving schedule, as one that is not learned."""

    def signal_fraction(self, t, condition):
        return (2 * VP.log_alpha(t)).exp()

    def rate(self, t, condition):
        return VP.beta_min + t * (VP.beta_max - VP.beta_min)


EXAMPLE = Example(
    call=lambda generator, dtype: sample_cvdm(
        network, made(dtype), data(dtype=dtype), data(6, 2, dtype, 2), n_steps=4, generator=generator
    ),
    stochastic=True,
    read=lambda result: [result.x],
    refusals=(
        (lambda: cvdm_loss(network, LearnedSchedule(5), data()), "schedule is of 5 elements"),
        (lambda: sample_cvdm(lambda x, G, c: x[:, :1], made(), data(), data(6, 2)), "network answered shape"),
        (lambda: sample_cvdm(network, made(), data(), n_steps=3), "condition is None"),
        (lambda: sample_cvdm(network, made(), data(), data(6, 4)), r"allowed: \(n, 2\)"),
        (lambda: sample_cvdm(network, made(), data(), data(5, 2)), "condition has shape"),
        (lambda: sample_cvdm(network, made(), data(), data(6, 2), n_steps=0), "n_steps is 0"),
        (
            lambda: sample_cvdm(network, Linear(), data(), bounds=(1.0, -1.0)),
            "bounds is",
        ),
        (lambda: cvdm_loss(network, made(), data(), data(6, 2), weights=(1, 2)), "weights has 2 numbers"),
        (lambda: cvdm_loss(network, made(), data(), data(6, 2), reg=-1.0), "reg is -1"),
        (lambda: cvdm_loss(network, made(), data(), data(6, 2), taylor_order=0), "taylor_order is 0"),
        (lambda: LearnedSchedule(0), "dim is 0"),
    ),
)


def test_a_consistent_pair_has_no_consistency_loss_but_the_ends():
    x0 = data(4000)
    found = cvdm_loss(network, Square(), x0, generator=3)
    ends = (-Square.speed).exp().mean()  # G(1)^2, and G(0) = 1
    assert float(found["consistency"].detach()) == pytest.approx(float(ends), rel=1e-9)
    assert (
        float(cvdm_loss(network, Square(1.1), x0, generator=3)["consistency"].detach()) > float(ends) + 1e-3
    )


def test_other_parts_have_their_closed_forms():
    x0 = data(20000, seed=5)
    found = cvdm_loss(network, Square(), x0, generator=4, reg=1.0, taylor_order=2)
    last = (-Square.speed / 2).exp()
    prior = torch.distributions.kl_divergence(
        torch.distributions.Normal(last.sqrt() * x0, (1 - last).sqrt()),
        torch.distributions.Normal(torch.zeros_like(x0), torch.ones_like(x0)),
    ).mean()
    torch.testing.assert_close(found["prior"], prior)
    # d^2/dt^2 exp(-k L t^2 / 2) = (k^2 L^2 t^2 - k L) exp(-k L t^2 / 2), averaged over uniform times by quadrature.
    t = torch.linspace(0, 1, 20001, dtype=F64)[:, None]
    second = sum(
        ((k * Square.speed * t) ** 2 - k * Square.speed) * (-k * Square.speed * t**2 / 2).exp()
        for k in (1, 2)
    )
    assert float(found["steepness"]) == pytest.approx(float(second.square().mean()), rel=0.05)
    weighted = cvdm_loss(network, Square(), x0, generator=4, weights=(0.5, 0.25, 3.0, 7.0))
    parts = [
        0.5 * weighted["noise"],
        0.25 * weighted["consistency"],
        3 * weighted["prior"],
        7 * weighted["steepness"],
    ]
    torch.testing.assert_close(weighted["total"], sum(parts))


@pytest.mark.parametrize("condition_dim", [0, 2])
def test_slopes_by_hand_are_those_of_automatic_differentiation(condition_dim):
    schedule, g = made(condition_dim=condition_dim), torch.Generator().manual_seed(6)
    for weights in schedule.parameters():  # away from the start, clamped at some times and not at others
        weights.data += 0.5 * randn(weights.shape, generator=g, like=weights)
    schedule.fraction_course.level.data += 3.0
    t = uniform((200, 1), generator=g, dtype=F64)
    condition = data(200, condition_dim, seed=7) if condition_dim else None

    def once(t):
        return torch.func.jvp(lambda t: schedule.signal_fraction(t, condition), (t,), (torch.ones_like(t),))

    (value, slope), (_, bend) = torch.func.jvp(once, (t,), (torch.ones_like(t),))
    assert 0 < float((slope == 0).double().mean()) < 1
    for found, expected in zip(schedule.with_slopes(t, condition), (value, slope, bend), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_subclass_with_a_fraction_of_its_own_has_its_slopes():
    class Delayed(LearnedSchedule):
        def signal_fraction(self, t, condition=None):
            return super().signal_fraction(t**2, condition)

    with seeded_init(3):
        schedule, x0 = Delayed(3).double(), data(40)
    same = SimpleNamespace(signal_fraction=schedule.signal_fraction, rate=schedule.rate)
    found, expected = (
        cvdm_loss(lambda x, fraction, c: x, which, x0, generator=4) for which in (schedule, same)
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_steepness_is_the_series_second_derivative(order):
    x0, g = data(40), torch.Generator().manual_seed(4)
    t = uniform((40, 1), generator=g, like=x0)
    # G^k = exp(-k L t^2 / 2), one term at a time.
    rate = [k * Square.speed for k in range(1, order + 1)]
    second = sum(((r * t) ** 2 - r) * (-r * t**2 / 2).exp() for r in rate)
    found = cvdm_loss(network, Square(), x0, reg=0.3, taylor_order=order, generator=4)
    torch.testing.assert_close(found["steepness"], 0.3 * second.square().mean())


def test_a_frozen_linear_schedule_has_ddpms_loss():
    x0 = data(50)
    g = torch.Generator().manual_seed(8)
    t = uniform((50, 1), generator=g, like=x0)
    eps = randn(x0.shape, generator=g, like=x0)
    x = VP.add_noise(x0, eps, t[:, 0])
    expected = (network(x, VP.alpha(t) ** 2, None) - eps).square().mean()
    torch.testing.assert_close(cvdm_loss(network, Linear(), x0, generator=8)["noise"], expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 3.0), st.booleans())
def test_fractions_fall_whatever_the_weights(seed, size, elementwise):
    schedule = made(elementwise=elementwise)
    g = torch.Generator().manual_seed(seed)
    for p in schedule.parameters():
        p.data.copy_(size * randn(p.shape, generator=g, dtype=F64))
    t = torch.linspace(0, 1, 41, dtype=F64)[:, None]
    condition = randn((1, 2), generator=g, dtype=F64).expand(41, 2)
    fraction, rate = schedule.signal_fraction(t, condition), schedule.rate(t, condition)
    assert fraction.shape == (41, 3 if elementwise else 1)
    assert float(fraction.diff(dim=0).max()) <= 0
    assert float(rate.min()) >= 0
    assert float(rate.diff(dim=0).min()) >= 0
    assert float(rate[0].max()) == 0
    torch.testing.assert_close(fraction[0], torch.full_like(fraction[0], 0.99999))


def test_a_new_schedule_ends_in_noise():
    schedule = LearnedSchedule(2)
    assert float(schedule.signal_fraction(torch.ones(1, 1)).max()) < 1e-4
    assert float(schedule.signal_fraction(torch.full((1, 1), 0.1)).min()) > 0.4


def test_the_noise_loss_reaches_the_schedule():
    schedule, model = made(), nn.Linear(3, 3).double()
    found = cvdm_loss(lambda x, fraction, c: model(x), schedule, data(), data(6, 2), generator=2)
    gradients = torch.autograd.grad(
        found["noise"], list(schedule.fraction_course.parameters()), retain_graph=True
    )
    assert all(float(g.abs().max()) > 0 for g in gradients)
    found["total"].backward()
    assert all(p.grad is not None for p in schedule.parameters())


def test_training_makes_the_pair_consistent():
    schedule = made(condition_dim=0).float()
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.02)
    losses = []
    for i in range(150):
        found = cvdm_loss(network, schedule, data(64, dtype=torch.float32), generator=i)
        optimizer.zero_grad()
        found["consistency"].backward()
        optimizer.step()
        losses.append(float(found["consistency"].detach()))
    assert sum(losses[-10:]) < 0.2 * sum(losses[:10])


def test_sampling_a_gaussian_with_its_exact_denoiser():
    deviation = 0.6

    def exact(x, fraction, condition):
        return (1 - fraction).sqrt() * x / (fraction * deviation**2 + 1 - fraction)

    found = sample_cvdm(exact, Square(), data(20000, seed=9), n_steps=400, generator=1)
    assert found.cost.nfev == 400 * 20000
    # The first element's noise is not all there is at t = 1 (G(1) = 0.14), where the chain starts from noise alone.
    for j, tolerance in ((0, 0.13), (1, 0.04), (2, 0.04)):
        assert abs(float(found.x[:, j].std()) / deviation - 1) < tolerance


def test_one_step_is_the_posterior_of_the_chain():
    x, n, seen = data(5, seed=12), 30, []
    found = sample_cvdm(network, Linear(), x, n_steps=n, generator=6, callback=lambda i, s: seen.append(s))
    rates = 0.1 + 19.9 * (torch.arange(n, dtype=F64) + 0.5) / n
    kept = 1 - rates / n
    second, first = kept.prod(), kept[:-1].prod()
    torch.testing.assert_close(found.extras["signal_fractions"][:, 0, 0], kept.cumprod(0))
    x0 = (x - (1 - second).sqrt() * network(x, second, None)) / second.sqrt()
    z = randn(x.shape, generator=torch.Generator().manual_seed(6), like=x)
    variance = (1 - kept[-1]) * (1 - first) / (1 - second)
    # The same posterior in the usual words: its mean mixes the guess and the state.
    mean = (first.sqrt() * (1 - kept[-1]) * x0 + kept[-1].sqrt() * (1 - first) * x) / (1 - second)
    torch.testing.assert_close(seen[0], mean + variance.sqrt() * z)
    last = (seen[-2] - (1 - kept[0]).sqrt() * network(seen[-2], kept[0], None)) / kept[0].sqrt()
    torch.testing.assert_close(found.x, last)
    with pytest.raises(ArgumentError, match="x has shape"):
        sample_cvdm(network, Linear(), x[0])


def test_guesses_outside_the_bounds_are_cut_off():
    x, seen = 5 * data(6, seed=3), []
    wide = sample_cvdm(network, Linear(), x, n_steps=20, generator=2, bounds=(-1e9, 1e9))
    torch.testing.assert_close(wide.x, sample_cvdm(network, Linear(), x, n_steps=20, generator=2).x)
    found = sample_cvdm(
        network,
        Linear(),
        x,
        n_steps=20,
        generator=2,
        bounds=(-0.1, 0.2),
        callback=lambda i, s: seen.append(s),
    )
    assert float(found.x.min()) >= -0.1
    assert float(found.x.max()) <= 0.2
    # Where the guess was cut off, the noise is what the state holds beyond it.
    kept = 1 - (0.1 + 19.9 * (torch.arange(20, dtype=F64) + 0.5) / 20) / 20
    now, before = kept.prod(), kept[:-1].prod()
    x0 = ((x - (1 - now).sqrt() * network(x, now, None)) / now.sqrt()).clamp(-0.1, 0.2)
    z = randn(x.shape, generator=torch.Generator().manual_seed(2), like=x)
    mean = (before.sqrt() * (1 - kept[-1]) * x0 + kept[-1].sqrt() * (1 - before) * x) / (1 - now)
    torch.testing.assert_close(seen[0], mean + ((1 - kept[-1]) * (1 - before) / (1 - now)).sqrt() * z)
