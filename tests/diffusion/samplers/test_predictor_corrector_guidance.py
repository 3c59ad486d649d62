"""Oracles of guidance: conditional sampling, the closed-form variances, the theorem."""

import math
import sys
from pathlib import Path

import pytest
import torch

from _common import Example
from perturbkit.core import EDMSchedule
from perturbkit.diffusion import guided_gaussian_variance, sample_ddim, sample_guided, sample_pcg

sys.path.insert(0, str(Path(__file__).parents[1]))
from _worlds import VP, gaussian, start

EDM = EDMSchedule(100.0)


def pair(schedule=EDM):
    """x|c ~ N(0, 1) at c = 0, and x ~ N(0, 2)."""
    return gaussian(schedule, 1.0), gaussian(schedule, 2.0)


EXAMPLE = Example(
    call=lambda generator, dtype: sample_pcg(
        *pair(VP), start(3, 4, VP, dtype=dtype), VP.times(6), weight=2.0, generator=generator
    ),
    read=lambda result: [result.x],
    stochastic=True,
    refusals=(
        (lambda: sample_guided(*pair(VP), start(3, 4, VP), VP.times(6), weight=-1.0), "weight is -1"),
        (
            lambda: sample_guided(*pair(VP), start(3, 4, VP), VP.times(6), weight=1.0, sampler="heun"),
            "sampler is 'heun'",
        ),
        (
            lambda: sample_pcg(*pair(VP), start(3, 4, VP), VP.times(6), weight=1.0, langevin_steps=-1),
            "langevin_steps is -1",
        ),
        (lambda: sample_pcg(gaussian(), 3, start(3, 4, VP), VP.times(6), weight=1.0), "denoiser is a int"),
        (lambda: guided_gaussian_variance(0.5, "ddim"), "weight is 0.5"),
        (lambda: guided_gaussian_variance(2.0, "sde"), "rule is 'sde'"),
    ),
)


def many(n=20_000, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 100.0 * torch.randn(n, 1, generator=g, dtype=torch.float64)


def test_weight_one_is_conditional_sampling():
    x, times = start(5, 3, VP), VP.times(9)
    with_, without = pair(VP)
    plain = sample_ddim(with_, x, times).x
    torch.testing.assert_close(
        sample_guided(with_, without, x, times, weight=1.0).x, plain, rtol=1e-12, atol=1e-12
    )
    predictor = sample_pcg(with_, without, x, times, weight=3.0, langevin_steps=0)
    torch.testing.assert_close(predictor.x, plain, rtol=1e-12, atol=1e-12)
    ancestral = sample_guided(with_, without, x, times, weight=1.0, sampler="ddpm", generator=3).x
    torch.testing.assert_close(
        ancestral, sample_ddim(with_, x, times, eta=1.0, generator=3).x, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("rule", ["ddim", "ddpm", "gamma_powered"])
def test_closed_forms_are_one_without_guidance(rule):
    assert guided_gaussian_variance(1.0, rule) == pytest.approx(1.0)


@pytest.mark.parametrize("weight", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_sampled_variance_is_the_closed_form(weight, sampler):
    with_, without = pair()
    found = sample_guided(
        with_, without, many(), EDM.times(500, t_end=1e-3), weight=weight, sampler=sampler, generator=1
    ).x
    expected = guided_gaussian_variance(weight, sampler)
    # Sampling error of a variance, and 2 % for 500 steps from a finite noise level.
    assert abs(float(found.var()) - expected) < expected * (4 * math.sqrt(2 / 20_000) + 0.02)


@pytest.mark.parametrize("weight", [1.5, 3.0])
def test_ancestral_guidance_is_a_predictor_corrector_of_weight_2w_minus_1(weight):
    with_, without = pair()
    times = EDM.times(500, t_end=1e-2)
    one = sample_guided(with_, without, many(), times, weight=weight, sampler="ddpm", generator=1).x.var()
    two = sample_pcg(with_, without, many(seed=5), times, weight=2 * weight - 1, generator=2).x.var()
    assert abs(float(one / two) - 1) < 4 * math.sqrt(4 / 20_000) + 0.03


def test_more_corrector_steps_approach_the_powered_density():
    with_, without = pair()
    times = EDM.times(60, t_end=1e-2)
    target = guided_gaussian_variance(3.0, "gamma_powered")
    gaps = [
        abs(
            float(
                sample_pcg(
                    with_, without, many(8000), times, weight=3.0, langevin_steps=k, generator=1
                ).x.var()
            )
            - target
        )
        for k in (0, 2, 20)
    ]
    assert gaps[0] > gaps[1] > gaps[2]


def test_calls_are_counted():
    with_, without = pair(VP)
    x, times = start(5, 3, VP), VP.times(4)
    assert sample_guided(with_, without, x, times, weight=2.0).cost.nfev == 5 * 4 * 2
    assert (
        sample_pcg(with_, without, x, times, weight=2.0, langevin_steps=3, generator=0).cost.nfev == 5 * 4 * 7
    )
