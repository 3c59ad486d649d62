"""Oracles of Heun's sampler: one Gaussian in closed form, second order, and noise that keeps the marginal."""

import itertools
import math

import pytest
import torch

from _common import Example
from perturbkit.core import CosineSchedule, Denoiser, EDMSchedule, VPSchedule
from perturbkit.diffusion import sample_bdia, sample_ddim, sample_heun


def gaussian(schedule, variance=1.0):
    """The exact denoiser of N(0, variance)."""

    def x0(x, t):
        a, s = schedule.alpha(t), schedule.sigma(t)
        gain = a * variance / (a**2 * variance + s**2)
        return gain.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype) * x

    return Denoiser(x0, schedule, predicts="x0")


def std(schedule, t, variance):
    return math.sqrt(float(schedule.alpha(t)) ** 2 * variance + float(schedule.sigma(t)) ** 2)


def start(schedule, variance=1.0, shape=(5, 3), seed=0, dtype=torch.float64):
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return std(schedule, schedule.t_max, variance) * z


VP = VPSchedule()
EXAMPLE = Example(
    read=lambda result: [result.x],
    call=lambda generator, dtype: sample_heun(
        gaussian(VP), start(VP, dtype=dtype), VP.times(6), churn=2.0, generator=generator
    ),
    stochastic=True,
    refusals=(
        (lambda: sample_heun(lambda x, t: x, start(VP), VP.times(4)), "denoiser is a function"),
        (lambda: sample_heun(gaussian(VP), start(VP), VP.times(4).flip(0)), "strictly decreasing"),
        (lambda: sample_heun(gaussian(VP), start(VP), VP.times(4), churn=-1.0), "churn is -1"),
        (lambda: sample_heun(gaussian(VP), start(VP), VP.times(4), churn_min=-1.0), "churn_min is -1"),
        (
            lambda: sample_heun(gaussian(VP), start(VP), VP.times(4), churn_min=2.0, churn_max=1.0),
            "churn_max is 1",
        ),
        (lambda: sample_heun(gaussian(VP), start(VP), VP.times(4), noise_scale=0.0), "noise_scale is 0"),
        (lambda: sample_heun(gaussian(VP), start(VP) * torch.nan, VP.times(4)), "NaN"),
    ),
)


@pytest.mark.parametrize(
    "schedule", [VPSchedule(), CosineSchedule(), EDMSchedule()], ids=["vp", "cosine", "edm"]
)
@pytest.mark.parametrize("variance", [0.3, 2.0])
def test_second_order_towards_the_exact_flow(schedule, variance):
    x, errors = start(schedule, variance), []
    for n in (100, 200, 400):
        found = sample_heun(gaussian(schedule, variance), x, schedule.times(n, t_end=1e-2)).x
        exact = x * std(schedule, 1e-2, variance) / std(schedule, schedule.t_max, variance)
        errors.append(float((found - exact).norm()))
    assert all(1.8 < math.log2(a / b) < 2.2 for a, b in itertools.pairwise(errors)), errors


def test_one_step_by_hand():
    d, x, (s, t) = gaussian(EDMSchedule(), 0.7), start(EDMSchedule()), (5.0, 2.0)
    slope = (x - d.x0(x, s)) / s
    ahead = x + (t - s) * slope
    expected = x + (t - s) * 0.5 * (slope + (ahead - d.x0(ahead, t)) / t)
    found = sample_heun(d, x, torch.tensor([s, t]))
    torch.testing.assert_close(found.x, expected)
    assert found.cost.nfev == 2 * len(x)
    last = sample_heun(d, x, torch.tensor([s, 0.0]))
    torch.testing.assert_close(last.x, d.x0(x, s))
    assert last.cost.nfev == len(x)


def test_ddim_is_its_first_stage():
    # With a noise prediction that never changes both stages agree.
    eps = torch.randn(3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    d = Denoiser(lambda x, t: eps.expand_as(x), VP, predicts="eps")
    x, times = start(VP), VP.times(7)
    torch.testing.assert_close(sample_heun(d, x, times).x, sample_ddim(d, x, times).x)
    torch.testing.assert_close(sample_heun(d, x, times).x, sample_bdia(d, x, times, base="heun").x)


def test_churn_keeps_the_marginal_and_forgets_the_start():
    schedule, n = EDMSchedule(10.0), 20_000
    x = start(schedule, 0.5, shape=(n, 1), seed=3)
    found = sample_heun(gaussian(schedule, 0.5), x, schedule.times(60, t_end=1e-2), churn=20.0, generator=5).x
    assert abs(float(found.var()) / (0.5 + 1e-4) - 1) < 4 * math.sqrt(2 / n) + 0.005
    assert abs(float(torch.corrcoef(torch.stack([x[:, 0], found[:, 0]]))[0, 1])) < 0.5


@pytest.mark.parametrize(("churn", "share"), [(0.2, 0.1), (50.0, math.sqrt(2) - 1)])
def test_fresh_noise_of_one_step(churn, share):
    still = Denoiser(lambda x, t: torch.zeros_like(x), EDMSchedule(10.0))
    x = torch.zeros(40_000, 1, dtype=torch.float64)
    found = sample_heun(
        still, x, torch.tensor([4.0, 3.0, 2.0]), churn=churn, churn_min=3.5, noise_scale=1.1, generator=0
    )
    expected = 1.1 * 4.0 * math.sqrt((1 + share) ** 2 - 1)
    assert abs(float(found.x.std()) / expected - 1) < 0.015
    none = sample_heun(still, x, torch.tensor([4.0, 3.0]), churn=churn, churn_max=3.5, generator=0)
    assert float(none.x.abs().max()) == 0
    # Not above the schedule's last level, where no network was trained.
    top = sample_heun(still, x, torch.tensor([10.0, 3.0]), churn=churn, generator=0)
    assert float(top.x.abs().max()) == 0
    assert [round(t, 6) for t in top.times.tolist()] == [10.0, 3.0]


def test_callback_sees_every_step():
    seen = []
    found = sample_heun(
        gaussian(VP), start(VP), VP.times(5), callback=lambda i, x: seen.append((i, x.clone()))
    )
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[-1][1], found.x)
