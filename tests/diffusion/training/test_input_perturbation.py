"""Oracles of input perturbation: the linear optimum of Gaussian data, the plain loss, and steps without bias."""

import itertools

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import Denoiser, EDMSchedule, FlowSchedule, VPSchedule, ddim_step
from perturbkit.core.random import randn, uniform
from perturbkit.diffusion import exposure_bias, input_perturbation_loss

VP = VPSchedule()


def gaussian(schedule=VP, deviation=1.0):
    """The exact denoiser of N(0, deviation^2)."""

    def eps(x, t):
        a, s = schedule.alpha(t).to(x), schedule.sigma(t).to(x)
        gain = s / (a**2 * deviation**2 + s**2)
        return gain.reshape(-1, *[1] * (x.ndim - 1)) * x

    return Denoiser(eps, schedule, predicts="eps")


def data(n=6, dtype=torch.float64, seed=3):
    return randn((n, 2, 3), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def times(n, dtype=torch.float64):
    return uniform((n,), 0.1, 0.9, generator=torch.Generator().manual_seed(4), dtype=dtype)


EXAMPLE = Example(
    call=lambda generator, dtype: input_perturbation_loss(
        gaussian(), data(dtype=dtype), times(6, dtype), generator=generator
    ),
    stochastic=True,
    refusals=(
        (lambda: input_perturbation_loss(gaussian(), data(), times(6), strength=-0.1), "strength is -0.1"),
        (lambda: input_perturbation_loss(gaussian(), data(), times(5)), "t has shape"),
        (lambda: input_perturbation_loss(gaussian(), data(), 0 * times(6)), "least noise at t is 0"),
        (lambda: input_perturbation_loss(lambda x, t: x, data(), times(6)), "denoiser is a function"),
        (lambda: exposure_bias(gaussian(), data(1), VP.times(3)), "x0 has 1 rows"),
        (lambda: exposure_bias(gaussian(), data(), VP.times(3).flip(0)), "strictly decreasing"),
    ),
)


def test_no_strength_is_the_plain_loss_bit_for_bit():
    x0, t = data(), times(6)
    eps = randn(x0.shape, generator=torch.Generator().manual_seed(9), like=x0)
    plain = (gaussian().eps(VP.add_noise(x0, eps, t), t) - eps).square().mean()
    assert torch.equal(input_perturbation_loss(gaussian(), x0, t, strength=0.0, generator=9), plain)


def test_the_target_does_not_know_the_extra_noise():
    # A network that answers with its input, data zero: the loss is E (eps - sigma (eps + c xi))^2.
    identity = Denoiser(lambda x, t: x, VP, predicts="eps")
    t = torch.full((40000,), 0.35, dtype=torch.float64)
    sigma = float(VP.sigma(0.35))
    for strength in (0.3, 1.2):
        found = input_perturbation_loss(
            identity, torch.zeros(40000, 4).double(), t, strength=strength, generator=1
        )
        expected = (1 - sigma) ** 2 + (sigma * strength) ** 2
        assert abs(float(found) / expected - 1) < 0.02


class Gain(nn.Module):
    """The best linear answer at one time."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x, t):
        return self.gain * x


@pytest.mark.parametrize("schedule", [VP, EDMSchedule(), FlowSchedule()], ids=["vp", "edm", "flow"])
@pytest.mark.parametrize("strength", [0.1, 0.7])
def test_population_optimum_of_gaussian_data(schedule, strength):
    deviation, at, n = 0.6, 0.4, 200_000
    model = Gain()
    x0 = deviation * randn((n, 1), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    t = torch.full((n,), at, dtype=torch.float64)
    # The loss is quadratic in the gain: one Newton step from its gradients at 0 and 1 finds the optimum.
    slopes = []
    for value in (0.0, 1.0):
        model.gain.data.fill_(value)
        loss = input_perturbation_loss(
            Denoiser(model, schedule, predicts="eps"), x0, t, strength=strength, generator=6
        )
        slopes.append(torch.autograd.grad(loss, model.gain)[0])
    found = float(slopes[0] / (slopes[0] - slopes[1]))
    alpha, sigma = float(schedule.alpha(at)), float(schedule.sigma(at))
    expected = sigma / (alpha**2 * deviation**2 + sigma**2 * (1 + strength**2))
    assert abs(found / expected - 1) < 1e-2
    # The plain optimum at the higher level, shrunk.
    wide = sigma * (1 + strength**2) ** 0.5
    assert expected == pytest.approx(wide / (alpha**2 * deviation**2 + wide**2) / (1 + strength**2) ** 0.5)


@pytest.mark.parametrize("predicts", ["x0", "v", "score"])
def test_every_prediction_has_the_same_loss(predicts):
    exact = gaussian()
    other = Denoiser(getattr(exact, predicts), VP, predicts=predicts)
    x0, t = data(), times(6)
    a, b = (input_perturbation_loss(d, x0, t, generator=2) for d in (exact, other))
    torch.testing.assert_close(a, b)


def test_gradients_reach_the_network():
    model = nn.Linear(4, 4)
    denoiser = Denoiser(lambda x, t: model(x), VP, predicts="eps")
    input_perturbation_loss(denoiser, torch.ones(3, 4), torch.full((3,), 0.5), generator=0).backward()
    assert float(model.weight.grad.abs().sum()) > 0


def test_exposure_bias_of_the_exact_denoiser_goes_with_the_steps():
    deviation = 0.5
    x0 = deviation * randn((20000, 4), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    worst = []
    for n in (10, 40, 160):
        found = exposure_bias(gaussian(deviation=deviation), x0, VP.times(n, spacing="time"), generator=8)
        assert found.variance_gap.shape == found.mean_gap.shape == found.times.shape == (n + 1,)
        assert found.nfev == found.cost.nfev == n * len(x0)
        worst.append(float(found.variance_gap.abs().max()))
    assert all(b < 0.5 * a for a, b in itertools.pairwise(worst)), worst
    assert worst[-1] < 0.025


def test_a_denoiser_that_predicts_too_little_noise_leaves_too_much():
    deviation = 0.5
    x0 = deviation * randn((4000, 4), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    exact = gaussian(deviation=deviation)
    timid = Denoiser(lambda x, t: 0.9 * exact.eps(x, t), VP, predicts="eps")
    assert float(exposure_bias(timid, x0, VP.times(80), generator=8).variance_gap[-1]) > 0.01
    shifted = Denoiser(lambda x, t: exact.eps(x, t) + 0.1, VP, predicts="eps")
    gap = exposure_bias(shifted, x0, VP.times(80), generator=8).mean_gap
    assert float(gap[-1]) > 5 * float(gap[0])


def test_another_step_can_be_measured():
    x0, grid = data(50), VP.times(4)
    exact = gaussian()

    def step(denoiser, x, s, t, generator):
        return ddim_step(x, denoiser.eps(x, s), VP, s, t)

    found = exposure_bias(exact, x0, grid, step=step, generator=1)
    x = VP.add_noise(x0, randn(x0.shape, generator=torch.Generator().manual_seed(1), like=x0), float(grid[0]))
    for s, t in itertools.pairwise(grid):
        x = ddim_step(x, exact.eps(x, float(s)), VP, float(s), float(t))
    alpha, sigma = float(VP.alpha(grid[-1])), float(VP.sigma(grid[-1]))
    torch.testing.assert_close(found.variance_gap[-1], (x.var(0) - alpha**2 * x0.var(0) - sigma**2).mean())
    torch.testing.assert_close(found.mean_gap[-1], (x.mean(0) - alpha * x0.mean(0)).norm())
