"""Oracles of restoration and degradation: DDIM, Gaussian variances, the flow's field, and a step by hand."""

import math
import sys
from pathlib import Path

import pytest
import torch

from _common import Example
from perturbkit.core import FlowSchedule
from perturbkit.diffusion import (
    ForwardSDE,
    probability_flow_error,
    sample_ddim,
    sample_restoration_degradation,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from _worlds import VP, gaussian, gaussian_end, mixture, start

CUBIC = ForwardSDE(lambda x, t: -(x**3) - x, lambda t: math.sqrt(2) * (1 + t))
OU = ForwardSDE(lambda x, t: -x, lambda t: math.sqrt(2))
UNIFORM = torch.linspace(1, 0, 6, dtype=torch.float64)


def _score(x, t):
    return -x / (1 - 0.5 * math.exp(-2 * t))  # OU from N(0, 1/2)


EXAMPLE = Example(
    call=lambda generator, dtype: sample_restoration_degradation(
        _score, CUBIC, start(3, 4, VP, dtype=dtype), UNIFORM
    ),
    read=lambda result: [result.x],
    refusals=(
        (lambda: sample_restoration_degradation(_score, "cubic", torch.ones(1, 1), UNIFORM), "forward is a str"),
        (lambda: sample_restoration_degradation(_score, OU, torch.ones(1, 1), UNIFORM.flip(0)), "strictly decreasing"),
        (lambda: sample_restoration_degradation(_score, OU, torch.ones(1, 1), UNIFORM, lookback=0.0), "lookback"),
        (
            lambda: sample_restoration_degradation(
                _score, ForwardSDE(OU.drift, lambda t: 0.0), torch.ones(1, 1), UNIFORM
            ),
            "diffusion",
        ),
        (lambda: sample_restoration_degradation(_score, VP, torch.ones(1, 1), UNIFORM + 0.5), "at most 1"),
        (lambda: sample_restoration_degradation(_score, FlowSchedule(1.0), torch.ones(1, 1), UNIFORM), "no signal is left"),
        (lambda: probability_flow_error(torch.ones(2, 1), _score, OU, torch.ones(1, 1), UNIFORM), "sampled"),
    ),
)  # fmt: skip


@pytest.mark.parametrize("schedule", [VP, FlowSchedule()], ids=["vp", "flow"])
def test_looking_back_to_the_data_is_ddim(schedule):
    d, x = gaussian(schedule, 0.7), start(5, 3, schedule)
    times = schedule.times(9, t_end=0.02, spacing="time")
    found = sample_restoration_degradation(d.score, schedule, x, times, lookback=math.inf)
    torch.testing.assert_close(found.x, sample_ddim(d, x, times).x, rtol=1e-10, atol=1e-10)


def test_looking_back_to_the_data_is_ddim_on_a_mixture():
    d, _ = mixture(schedule=VP)
    x, times = start(5, 8, VP), VP.times(9, t_end=0.02)
    found = sample_restoration_degradation(d.score, VP, x, times, lookback=5.0)
    torch.testing.assert_close(found.x, sample_ddim(d, x, times).x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lookback", [None, 0.3, 0.01])
def test_a_step_by_hand(lookback):
    x = start(4, 2, VP)
    t, h = 0.8, 0.15
    back = {None: math.sqrt(h), 0.3: 0.3, 0.01: h}[lookback]
    g = math.sqrt(2) * (1 + t)
    r = x + back * (x**3 + x) + back * g**2 * torch.sin(x)
    f = -(r**3) - r
    n = (x - r - back * f) / (g * math.sqrt(back))
    expected = r + (back - h) * f + g * math.sqrt(back - h) * n
    times = torch.tensor([t, t - h], dtype=torch.float64)
    found = sample_restoration_degradation(lambda x, t: torch.sin(x), CUBIC, x, times, lookback=lookback)
    torch.testing.assert_close(found.x, expected, rtol=1e-9, atol=1e-9)


def test_lookback_is_capped_at_the_data():
    x = start(4, 2, VP)
    times = torch.tensor([0.1, 0.05], dtype=torch.float64)  # sqrt(0.05) > 0.1
    a = sample_restoration_degradation(_score, CUBIC, x, times).x
    b = sample_restoration_degradation(_score, CUBIC, x, times, lookback=0.1).x
    assert torch.equal(a, b)


@pytest.mark.parametrize("forward", [OU, VP], ids=["sde", "schedule"])
def test_gaussian_variance_converges_at_order_one_half(forward):
    if forward is OU:
        score, x = _score, torch.ones(1, 1, dtype=torch.float64)
        exact = x * math.sqrt(0.5 / (1 - 0.5 * math.exp(-2)))
        ends = (1.0, 0.0)
    else:
        score, x = gaussian(VP, 0.5).score, torch.ones(1, 1, dtype=torch.float64)
        exact, ends = gaussian_end(x, VP, 1.0, 0.01, 0.5), (1.0, 0.01)

    def error(n):
        times = torch.linspace(*ends, n + 1, dtype=torch.float64)
        return abs(float(sample_restoration_degradation(score, forward, x, times).x - exact))

    order = math.log2(error(500) / error(4000)) / 3
    assert 0.35 < order < 0.65
    assert error(4000) < 0.04


def test_small_steps_follow_the_probability_flow():
    x, t = start(6, 2, VP), 0.7

    def gap(h):
        times = torch.tensor([t, t - h], dtype=torch.float64)
        moved = sample_restoration_degradation(_score, CUBIC, x, times).x
        g = CUBIC.diffusion(t)
        field = (x**3 + x) + 0.5 * g**2 * _score(x, t)
        return float(((moved - x) / h - field).norm())

    assert gap(1e-6) < 0.2 * gap(1e-4) < 0.2 * gap(1e-2)
    assert gap(1e-8) / gap(1e-10) == pytest.approx(10, rel=0.2)  # of the order of the lookback, sqrt(h)


def test_calls_and_callback():
    x, calls, seen = start(4, 2, VP), [], []

    def score(x, t):
        calls.append(t)
        return _score(x, t)

    found = sample_restoration_degradation(score, OU, x, UNIFORM, callback=lambda i, s: seen.append((i, s)))
    assert calls == pytest.approx(UNIFORM[:-1].tolist())
    assert found.cost.nfev == 4 * 5
    assert torch.equal(seen[-1][1], found.x)
    assert len(seen) == 5


@pytest.mark.parametrize("forward", [OU, VP], ids=["sde", "schedule"])
def test_reference_flow_is_exact_on_gaussians(forward):
    x = start(5, 3, VP)
    if forward is OU:
        score, exact = _score, x * math.sqrt((1 - 0.5 * math.exp(-0.2)) / (1 - 0.5 * math.exp(-2)))
    else:
        score, exact = gaussian(VP, 0.5).score, gaussian_end(x, VP, 1.0, 0.1, 0.5)
    times = torch.tensor([1.0, 0.1], dtype=torch.float64)
    assert probability_flow_error(exact, score, forward, x, times).rmse < 1e-7
    moved = exact.clone()
    moved[0, 1] += 0.5
    found = probability_flow_error(moved, score, forward, x, times)
    assert found.rmse == pytest.approx(0.5 / math.sqrt(5), rel=1e-6)
    assert found.w2 <= found.rmse
    assert probability_flow_error(exact.flip(0), score, forward, x, times).w2 < 1e-6
