"""Oracles of DDIM: one Gaussian in closed form, first order, the ancestral limit."""

import itertools
import math

import pytest
import torch

from _common import Example
from perturbkit.core import CosineSchedule, Denoiser, EDMSchedule, FlowSchedule, VPSchedule, ddim_step
from perturbkit.diffusion import sample_ddim


def gaussian(schedule, variance=1.0):
    """The exact denoiser of N(0, variance)."""

    def x0(x, t):
        a, s = schedule.alpha(t), schedule.sigma(t)
        gain = a * variance / (a**2 * variance + s**2)
        return gain.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) * x

    return Denoiser(x0, schedule, predicts="x0")


def start(schedule, variance=1.0, shape=(5, 3), seed=0, dtype=torch.float64):
    a, s = float(schedule.alpha(schedule.t_max)), float(schedule.sigma(schedule.t_max))
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return math.sqrt(a**2 * variance + s**2) * z


def exact(x, schedule, t_end, variance=1.0):
    """The flow of a Gaussian scales: x_t / std_t is constant."""

    def std(t):
        return math.sqrt(float(schedule.alpha(t)) ** 2 * variance + float(schedule.sigma(t)) ** 2)

    return x * std(t_end) / std(schedule.t_max)


VP = VPSchedule()
EXAMPLE = Example(
    read=lambda result: [result.x],
    call=lambda generator, dtype: sample_ddim(
        gaussian(VP), start(VP, dtype=dtype), VP.times(6), eta=1.0, generator=generator
    ),
    stochastic=True,
    refusals=(
        (lambda: sample_ddim(lambda x, t: x, start(VP), VP.times(4)), "denoiser is a function"),
        (lambda: sample_ddim(gaussian(VP), start(VP), VP.times(4).flip(0)), "strictly decreasing"),
        (lambda: sample_ddim(gaussian(VP), start(VP), torch.tensor([3.0, 0.1])), "times starts at 3"),
        (lambda: sample_ddim(gaussian(VP), start(VP), VP.times(4), eta=2.0), "eta is 2"),
        (
            lambda: sample_ddim(gaussian(FlowSchedule(1.0)), start(VP), torch.tensor([1.0, 0.5])),
            "no signal is left",
        ),
        (lambda: sample_ddim(gaussian(VP), start(VP) * torch.inf, VP.times(4)), "infinite"),
    ),
)


@pytest.mark.parametrize(
    "schedule", [VPSchedule(), CosineSchedule(), EDMSchedule()], ids=["vp", "cosine", "edm"]
)
@pytest.mark.parametrize("variance", [0.3, 2.0])
def test_first_order_towards_the_exact_flow(schedule, variance):
    errors = []
    for n in (50, 100, 200):
        x = start(schedule, variance)
        found = sample_ddim(gaussian(schedule, variance), x, schedule.times(n, t_end=1e-2)).x
        errors.append(float((found - exact(x, schedule, 1e-2, variance)).norm()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(0.85 < s < 1.15 for s in slopes), (errors, slopes)


def test_is_the_elementary_step():
    x, times = start(VP), VP.times(7, t_end=0.01)
    expected, d = x, gaussian(VP)
    for s, t in itertools.pairwise(times):
        expected = ddim_step(expected, d.eps(expected, s), VP, s, t)
    found = sample_ddim(gaussian(VP), x, times)
    torch.testing.assert_close(found.x, expected, rtol=1e-12, atol=1e-12)
    assert found.cost.nfev == 7 * len(x)


def test_ancestral_steps_keep_the_variance():
    # eta = 1 with the exact posterior mean of a Gaussian: the variance of the marginal is right up to O(step).
    x = start(VP, 0.5, shape=(20_000, 1), seed=3)
    found = sample_ddim(gaussian(VP, 0.5), x, VP.times(400, t_end=1e-3), eta=1.0, generator=5).x
    assert abs(float(found.var()) - 0.5) < 0.5 * 4 * math.sqrt(2 / 20_000) + 0.005
    # The noise is fresh: the end does not follow the start as it does on the deterministic path.
    assert abs(float(torch.corrcoef(torch.stack([x[:, 0], found[:, 0]]))[0, 1])) < 0.2


def test_fresh_noise_of_one_step_has_the_ancestral_deviation():
    schedule = EDMSchedule(10.0)
    still = Denoiser(lambda x, t: torch.zeros_like(x), schedule)
    x = torch.zeros(40_000, 1, dtype=torch.float64)
    found = sample_ddim(still, x, torch.tensor([4.0, 3.0]), eta=0.5, generator=0).x
    expected = 0.5 * 3.0 * math.sqrt(1 - (3 / 4) ** 2)
    assert abs(float(found.std()) / expected - 1) < 0.015


def test_callback_sees_every_step():
    seen = []
    found = sample_ddim(
        gaussian(VP), start(VP), VP.times(5), callback=lambda i, x: seen.append((i, x.clone()))
    )
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[-1][1], found.x)
