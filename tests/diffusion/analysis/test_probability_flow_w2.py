"""Oracles of the Wasserstein bounds: Gaussian recursions, closed-form coefficients, sampled distances, limits."""

import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from _common import Example
from perturbkit.core import CosineSchedule, EDMSchedule, FlowSchedule, OUSchedule, VESchedule, VPSchedule
from perturbkit.diffusion import probability_flow_w2_bound, probability_flow_w2_gaussian, steps_to_accuracy
from perturbkit.diffusion.analysis.probability_flow_w2 import _Steps

sys.path.insert(0, str(Path(__file__).parents[1]))
from _worlds import gaussian

VP = VPSchedule()
FACTS = {"convexity": 0.25, "smoothness": 4.0, "dim": 3, "second_moment": 6.0}
EVEN = VP.times(20, t_end=0.0, spacing="time")

EXAMPLE = Example(
    call=lambda generator, dtype: torch.tensor(
        [
            probability_flow_w2_bound(VP, EVEN.to(dtype), **FACTS).total,
            probability_flow_w2_gaussian(VP, EVEN.to(dtype), torch.tensor([0.5, 2.0], dtype=dtype)),
        ],
        dtype=dtype,
    ),
    refusals=(
        (lambda: probability_flow_w2_bound(VP, EVEN.flip(0), **FACTS), "strictly decreasing"),
        (lambda: probability_flow_w2_bound(VP, 2 * EVEN, **FACTS), "times starts at 2"),
        (lambda: probability_flow_w2_bound(VP, EVEN, **{**FACTS, "smoothness": 0.1}), "smoothness is 0.1"),
        (lambda: probability_flow_w2_bound(VP, EVEN, **{**FACTS, "convexity": 0.0}), "convexity"),
        (lambda: probability_flow_w2_bound(VP, EVEN, score_time_lipschitz=-1.0, **FACTS), "score_time_lipschitz"),
        (lambda: probability_flow_w2_gaussian(VP, EVEN, torch.tensor([1.0, 0.0])), "eigenvalue of 0"),
        (lambda: probability_flow_w2_gaussian(VP, EVEN, torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "symmetric"),
        (lambda: steps_to_accuracy(VP, 1e-6, max_steps=64, **FACTS), "accuracy is 1e-06"),
    ),
)  # fmt: skip


def _integrated(schedule, t_from, t_to, n=20_000):
    """G by the trapezoid rule in the time, from the definition with f and g."""
    u = torch.linspace(t_to, t_from, n + 1, dtype=torch.float64)
    alpha_rate, sigma_rate = schedule.rates(u)
    alpha, sigma = schedule.alpha(u), schedule.sigma(u)
    g2 = 2 * sigma * (sigma_rate - alpha_rate / alpha * sigma)
    return float(0.5 * torch.trapezoid(alpha[0] / alpha * g2, u))


@pytest.mark.parametrize(
    "schedule",
    [VP, VESchedule(0.02, 20.0), EDMSchedule(9.0), FlowSchedule(), CosineSchedule(), OUSchedule(4.0)],
)
def test_weights_are_the_integral_of_the_definition(schedule):
    times = schedule.times(6, t_start=0.9 * schedule.t_max, t_end=0.1 * schedule.t_max, spacing="time")
    steps = _Steps(schedule, times)
    expected = [_integrated(schedule, float(a), float(b)) for a, b in pairwise(times)]
    assert steps.weight.tolist() == pytest.approx(expected, rel=1e-6)


def test_weights_have_their_closed_forms():
    ve = EDMSchedule(9.0)
    times = torch.tensor([9.0, 4.0, 1.0, 0.0], dtype=torch.float64)
    assert _Steps(ve, times).weight.tolist() == pytest.approx([(81 - 16) / 2, 15 / 2, 0.5])
    steps = _Steps(VP, EVEN)
    assert steps.weight.tolist() == pytest.approx((steps.ratio - 1).tolist(), rel=1e-9)


def test_standard_data_is_a_fixed_point_of_the_variance_preserving_sampler():
    steps = 7
    times = VP.times(steps, t_end=0.0, spacing="time")
    start_only = abs(float(VP.sigma(1.0)) - 1)
    found = probability_flow_w2_gaussian(VP, times, torch.ones(4))
    assert found == pytest.approx(2 * start_only, abs=1e-9)


@pytest.mark.parametrize("schedule", [VP, EDMSchedule(20.0)])
def test_exact_error_is_that_of_the_simulated_sampler(schedule):
    variances = torch.tensor([0.3, 1.7], dtype=torch.float64)
    times = schedule.times(12, t_end=0.05 * schedule.t_max, spacing="time")
    steps = _Steps(schedule, times)
    x = float(schedule.sigma(times[0])) * torch.eye(
        2, dtype=torch.float64
    )  # one standard deviation along each axis
    for i in range(12):
        score = torch.stack(
            [gaussian(schedule, float(v)).score(x, float(times[i]))[:, j] for j, v in enumerate(variances)], 1
        )
        x = steps.ratio[i] * x + steps.weight[i] * score
    exact = (schedule.alpha(times[-1]) ** 2 * variances + schedule.sigma(times[-1]) ** 2).sqrt()
    expected = float((x.diagonal().abs() - exact).norm())
    assert probability_flow_w2_gaussian(schedule, times, variances) == pytest.approx(expected, rel=1e-9)


def test_matrix_and_eigenvalues_agree():
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    values = torch.tensor([0.4, 1.0, 3.0], dtype=torch.float64)
    a = probability_flow_w2_gaussian(VP, EVEN, values)
    assert probability_flow_w2_gaussian(VP, EVEN, q @ values.diag() @ q.T) == pytest.approx(a)


def _in_time(values):
    """The time Lipschitz constant of the score of N(0, diag(values)) under the variance preserving schedule."""

    def m(t):
        a2 = VP.alpha(t)[:, None] ** 2
        f = 0.5 * (VP.beta_min + t * (VP.beta_max - VP.beta_min))[:, None]
        v = a2 * values + 1 - a2
        return (2 * f * a2 * (values - 1).abs() / v**2).amax(1)

    return m


@pytest.mark.parametrize("n", [10, 100, 1000])
@pytest.mark.parametrize("low", [0.25, 0.9])
def test_bound_covers_the_exact_error(n, low):
    values = torch.linspace(low, 4.0, 5, dtype=torch.float64)
    times = VP.times(n, t_end=0.0, spacing="time")
    bound = probability_flow_w2_bound(
        VP, times, convexity=0.25, smoothness=1 / low, dim=5, second_moment=float(values.sum()),
        score_time_lipschitz=lambda t: 4 * _in_time(values)(t),
    )  # fmt: skip
    assert probability_flow_w2_gaussian(VP, times, values) < bound.total


@pytest.mark.parametrize("n", [20, 200])
def test_bound_covers_the_exact_error_without_scaling(n):
    edm, values = EDMSchedule(40.0), torch.tensor([0.5, 2.0], dtype=torch.float64)
    times = edm.times(n, t_end=0.0, spacing="time")
    bound = probability_flow_w2_bound(
        edm, times, convexity=0.5, smoothness=2.0, dim=2, second_moment=2.5,
        score_time_lipschitz=lambda t: torch.where(t > 0.5, 2 * t / (0.5 + t**2) ** 2, 2.0),
    )  # fmt: skip
    assert probability_flow_w2_gaussian(edm, times, values) < bound.total


def test_parts_and_limits():
    coarse, fine = (VP.times(n, t_end=0.0, spacing="time") for n in (500, 5000))
    plain = probability_flow_w2_bound(VP, fine, **FACTS)
    assert plain.score == 0
    assert plain.discretization < 0.12 * probability_flow_w2_bound(VP, coarse, **FACTS).discretization
    worse = probability_flow_w2_bound(VP, fine, score_error=0.1, **FACTS)
    twice = probability_flow_w2_bound(VP, fine, score_error=0.2, **FACTS)
    assert worse.score > 0
    assert twice.score == pytest.approx(2 * worse.score)
    assert worse.total == pytest.approx(plain.total + worse.score)
    assert probability_flow_w2_bound(VP, fine, score_time_lipschitz=1.0, **FACTS).total > plain.total
    # The exact flow contracts by the ratio of standard deviations of the least concave direction.
    exact = math.sqrt(4.0 / (float(VP.alpha(1.0)) ** 2 * 4 + float(VP.sigma(1.0)) ** 2))
    expected = exact * float(VP.alpha(1.0)) * math.sqrt(6.0)
    assert plain.initialisation == pytest.approx(expected, rel=0.02)


def test_steps_are_the_fewest():
    facts = {"convexity": 1.0, "smoothness": 1.0, "dim": 2, "second_moment": 2.0}
    n = steps_to_accuracy(VP, 0.2, **facts)

    def total(k):
        return probability_flow_w2_bound(VP, VP.times(k, t_end=0.0, spacing="time"), **facts).total

    assert total(n) <= 0.2 < total(n - 1)
    assert steps_to_accuracy(VP, 0.2, max_steps=n, **facts) == n
