"""Oracles of gradient estimation: DDIM, subspaces, a single point, the schedule."""

import sys
from pathlib import Path

import pytest
import torch

from _common import Example
from perturbkit.core import Denoiser, EDMSchedule
from perturbkit.diffusion import (
    admissible_schedule,
    distance_function_error,
    sample_ddim,
    sample_gradient_estimation,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from _worlds import VE, VP, gaussian, gaussian_end, mixture, start

EDM = EDMSchedule(10.0)
EXAMPLE = Example(
    call=lambda generator, dtype: sample_gradient_estimation(
        gaussian(), start(3, 4, VP, dtype=dtype), VP.times(6), noise_fraction=0.2, generator=generator
    ),
    read=lambda result: [result.x],
    stochastic=True,
    refusals=(
        (
            lambda: sample_gradient_estimation(gaussian(), start(3, 4, VP), VP.times(6), gamma=0.0),
            "gamma is 0",
        ),
        (
            lambda: sample_gradient_estimation(gaussian(), start(3, 4, VP), VP.times(6), noise_fraction=1.0),
            "noise_fraction is 1",
        ),
        (lambda: admissible_schedule(2, 1.0, 4.0, 0.1), "start is 1"),
        (lambda: admissible_schedule(1, 100.0, 1.0, 0.05), "Take "),
        (
            lambda: distance_function_error(gaussian(), torch.ones(2, 4), 0.5, torch.ones(3, 5)),
            "points have shape",
        ),
    ),
)


@pytest.mark.parametrize("schedule", [VE, VP, EDM], ids=["ve", "vp", "edm"])
def test_gamma_one_is_ddim(schedule):
    d = Denoiser(lambda x, t: torch.tanh(x + t[:, None]), schedule)
    x, times = start(schedule=schedule), schedule.times(9, t_end=0.05 * schedule.t_max)
    torch.testing.assert_close(
        sample_gradient_estimation(d, x, times, gamma=1.0).x,
        sample_ddim(d, x, times).x,
        rtol=1e-12,
        atol=1e-11,
    )


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_a_subspace_is_approached_by_the_ratio_of_the_levels(gamma):
    q = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    d = Denoiser(lambda x, t: x @ q @ q.T, EDM, predicts="x0")
    x = start(5, 6, EDM)

    def distance(z):
        return (z - z @ q @ q.T).norm(dim=1)

    seen = [x]
    times = torch.tensor([10.0, 4.0, 1.0, 0.0], dtype=torch.float64)
    sample_gradient_estimation(d, x, times, gamma=gamma, callback=lambda i, z: seen.append(z.clone()))
    for before, after, s, t in zip(seen, seen[1:], times, times[1:], strict=False):
        torch.testing.assert_close(distance(after), distance(before) * t / s, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(after @ q, before @ q, rtol=1e-9, atol=1e-9)


def test_a_single_point_is_reached_on_a_straight_line():
    point = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    d = Denoiser(lambda x, t: point.expand_as(x), EDM, predicts="x0")
    x = start(4, 3, EDM)
    seen = []
    times = EDM.times(8, t_end=0.01)
    sample_gradient_estimation(d, x, times, callback=lambda i, z: seen.append(z.clone()))
    for z, t in zip(seen, times[1:], strict=True):
        torch.testing.assert_close(z, point + (x - point) * t / times[0], rtol=1e-10, atol=1e-10)


def test_two_predictions_are_combined_as_stated():
    d = Denoiser(lambda x, t: torch.sin(x) + t[:, None], EDM)
    x, t = start(3, 2, EDM), torch.tensor([10.0, 3.0, 1.0], dtype=torch.float64)
    e0 = d.eps(x, 10.0)
    middle = x + (3.0 - 10.0) * e0
    expected = middle + (1.0 - 3.0) * (1.7 * d.eps(middle, 3.0) - 0.7 * e0)
    torch.testing.assert_close(
        sample_gradient_estimation(d, x, t, gamma=1.7).x, expected, rtol=1e-12, atol=1e-12
    )


def test_beats_ddim_at_few_calls_on_a_mixture():
    d, world = mixture()
    x = start(60)
    exact = world.probability_flow(x, 20.0, 0.02)
    times = VE.times(10, t_end=0.0, spacing="karras")
    ours = (sample_gradient_estimation(d, x, times).x - exact).norm(dim=1).median()
    ddim = (sample_ddim(d, x, times).x - exact).norm(dim=1).median()
    assert float(ours) < 0.7 * float(ddim)


def test_noise_has_the_variance_that_was_taken_away():
    # Predictions of zero noise leave alpha x; what is added is the share of the level.
    d = Denoiser(lambda x, t: torch.zeros_like(x), EDM)
    x = torch.zeros(20_000, 1, dtype=torch.float64)
    found = sample_gradient_estimation(d, x, torch.tensor([4.0, 2.0]), noise_fraction=0.3, generator=0).x
    assert abs(float(found.std()) - 2.0 * (0.3 * (1 - 0.5**2)) ** 0.5) < 0.02


def test_noise_leaves_the_law_of_the_data_as_steps_shrink():
    x = start(20_000, 1, VP, seed=7)
    found = sample_gradient_estimation(
        gaussian(), x, VP.times(300, t_end=1e-3), gamma=1.0, noise_fraction=0.9, generator=2
    ).x
    assert abs(float(found.var()) / 0.5 - 1) < 0.06


def test_order_one_towards_the_exact_flow():
    x = start(6, 3, VP)
    exact = gaussian_end(x, VP, VP.t_max, 0.01)
    errors = [
        float((sample_gradient_estimation(gaussian(), x, VP.times(n, t_end=0.01)).x - exact).norm())
        for n in (100, 200)
    ]
    assert errors[1] < 0.6 * errors[0]


def test_admissible_schedule_keeps_the_band():
    levels = admissible_schedule(60, 20.0, 0.1, 0.1)
    assert levels[0] == 20.0
    ratios = levels[1:] / levels[:-1]
    torch.testing.assert_close(ratios, ratios[0].expand(60), rtol=1e-9, atol=0)
    beta = float(ratios[0])
    worst = [(beta + s * (1 - beta) * 0.1) / beta for s in (1, -1)]
    assert worst[0] ** 60 <= 2.0 + 1e-9
    assert worst[1] ** 60 >= 0.5 - 1e-9


def test_distance_function_error_of_a_projection_is_zero():
    points = torch.randn(7, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def nearest(x, t):
        return points[torch.cdist(x, points).argmin(1)]

    d = Denoiser(nearest, EDM, predicts="x0")
    assert float(distance_function_error(d, start(5, 4, EDM), 3.0, points).max()) < 1e-12
    off = Denoiser(lambda x, t: nearest(x, t) + 0.1, EDM, predicts="x0")
    x = start(5, 4, EDM)
    expected = 0.2 / torch.cdist(x, points).amin(1)
    torch.testing.assert_close(distance_function_error(off, x, 3.0, points), expected, rtol=1e-9, atol=0)
