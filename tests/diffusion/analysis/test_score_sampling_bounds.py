"""Oracles of the bounds: Gaussian data in closed form, the recursion of variances, and another schedule's clock."""

import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from scipy.integrate import quad

from _common import Example
from perturbkit.core import Denoiser, EDMSchedule, OUSchedule
from perturbkit.data import GaussianMixture
from perturbkit.diffusion import decreasing_times, path_kl, sample_reverse_sde, sampling_kl_bound

sys.path.insert(0, str(Path(__file__).parents[1]))
from _worlds import gaussian

OU = OUSchedule(6.0)


def _data(n=4000, d=3, variance=1.0, seed=0, dtype=torch.float64):
    return variance**0.5 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


EXAMPLE = Example(
    call=lambda generator, dtype: [
        path_kl(gaussian(OU), decreasing_times(4, 2.0, 0.1), _data(9, dtype=dtype), n_mc=9, generator=generator).steps,
        sample_reverse_sde(gaussian(OU), _data(9, dtype=dtype), decreasing_times(4, 2.0, 0.1), generator=generator).x,
    ],
    read=lambda result: result,
    stochastic=True,
    refusals=(
        (lambda: sampling_kl_bound(torch.tensor([1.0, 0.0]), dim=2, second_moment=1.0), "times ends at 0"),
        (lambda: sampling_kl_bound(torch.tensor([1.0, 0.5]), dim=0, second_moment=1.0), "dim is 0"),
        (lambda: sampling_kl_bound(torch.tensor([1.0, 0.5]), dim=2, second_moment=-1.0), "second_moment"),
        (lambda: decreasing_times(3, 1.0, 2.0), "horizon"),
        (lambda: path_kl(gaussian(OU), torch.tensor([1.0, 0.0]), _data(9)), "no noise"),
        (lambda: path_kl(gaussian(OU), torch.tensor([1.0, 0.5]), _data(9), n_mc=1), "n_mc is 1"),
        (lambda: sample_reverse_sde(gaussian(OU), _data(9), torch.tensor([7.0, 0.5])), "last"),
    ),
)  # fmt: skip


def _exact(times, variance, d):
    """Sum over steps of the integral of E|x_t / v_t - x_k / v_k|^2, by adaptive quadrature."""

    def v(t):
        return math.exp(-2 * t) * variance - math.expm1(-2 * t)

    total = 0.0
    for start, end in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        total += quad(
            lambda t, s=start: 1 / v(t) + 1 / v(s) - 2 * math.exp(t - s) / v(s), end, start, epsabs=1e-13
        )[0]
    return d * total


@pytest.mark.parametrize("variance", [0.1, 1.0, 5.0])
def test_path_kl_of_gaussian_data(variance):
    times = decreasing_times(12, 5.0, 0.02)
    found = path_kl(gaussian(OU, variance), times, _data(variance=variance), n_mc=4000, generator=3)
    exact = _exact(times, variance, 3)
    assert abs(found.value - exact) < 4 * found.standard_error
    assert found.standard_error < 0.03 * exact
    assert float(found.steps.sum()) == pytest.approx(found.value)
    assert found.cost.nfev == 5 * 12 * 4000


def test_path_kl_of_standard_data_has_the_closed_form():
    times = torch.tensor([3.0, 2.0, 1.7, 0.3], dtype=torch.float64)
    h = -times.diff()
    assert _exact(times, 1.0, 3) == pytest.approx(2 * 3 * float((h - 1 + (-h).exp()).sum()), rel=1e-9)
    found = path_kl(gaussian(OU, 1.0), times, _data(20_000), n_mc=20_000, generator=1)
    assert abs(found.value - _exact(times, 1.0, 3)) < 4 * found.standard_error


def test_quadrature_is_exact_where_the_score_is_linear_in_time():
    """A score without randomness: s = t for every state, so that each step gives h^3 / 3."""
    fixed = Denoiser(lambda x, t: t[:, None].expand_as(x), OU, predicts="score")
    times = torch.tensor([2.0, 1.5, 0.5], dtype=torch.float64)
    found = path_kl(fixed, times, _data(5, d=1), n_mc=5, generator=0)
    assert found.value == pytest.approx((0.5**3 + 1) / 3, rel=1e-9)
    assert found.standard_error < 1e-9


def test_another_schedule_gives_the_same_number():
    edm = EDMSchedule(200.0)
    times = decreasing_times(10, 4.0, 0.05)
    levels = (torch.exp(2 * times) - 1).sqrt()
    ours = path_kl(gaussian(OU, 0.6), times, _data(500), n_mc=500, generator=2)
    theirs = path_kl(gaussian(edm, 0.6), levels, _data(500), n_mc=500, generator=2)
    assert theirs.value == pytest.approx(ours.value, rel=1e-9)


@pytest.mark.parametrize("schedule", ["ou", "edm"])
def test_variance_of_the_samples_follows_the_recursion(schedule):
    variance, n = 0.3, 40_000
    clock = decreasing_times(15, 4.0, 0.05)
    v = torch.tensor(1.0, dtype=torch.float64)
    for start, end in pairwise(clock):
        h = start - end
        noisy = torch.exp(-2 * start) * variance - torch.expm1(-2 * start)
        v = (h.exp() - 2 * torch.expm1(h) / noisy) ** 2 * v + torch.expm1(2 * h)
    x = _data(n, 1, seed=4)
    if schedule == "ou":
        found = sample_reverse_sde(gaussian(OU, variance), x, clock, generator=5).x
    else:
        levels = (torch.exp(2 * clock) - 1).sqrt()
        edm = EDMSchedule(200.0)
        end = sample_reverse_sde(gaussian(edm, variance), x * torch.exp(clock[0]), levels, generator=5).x
        found = end * torch.exp(-clock[-1])
    assert float(found.var()) == pytest.approx(float(v), abs=4 * float(v) * math.sqrt(2 / n))


def test_parts_of_the_bound():
    times = decreasing_times(50, 5.0, 1e-3)
    plain = sampling_kl_bound(times, dim=4, second_moment=10.0)
    worse = sampling_kl_bound(times, dim=4, second_moment=10.0, score_error=0.2)
    assert plain.initialisation == pytest.approx(14 * math.exp(-10))
    assert plain.score == 0
    assert worse.score == pytest.approx(5 * 0.04)
    assert worse.total == pytest.approx(plain.total + worse.score)
    assert (
        sampling_kl_bound(decreasing_times(50, 6.0, 1e-3), dim=4, second_moment=10.0).initialisation
        < plain.initialisation
    )
    even = torch.linspace(5, 0, 51, dtype=torch.float64)
    smooth = sampling_kl_bound(even, dim=4, second_moment=10.0, smoothness=3.0)
    assert smooth.discretization == pytest.approx(4 * 9 * 25 / 50)


def test_bound_covers_the_measured_divergence_of_a_mixture():
    world = GaussianMixture(torch.tensor([[-3.0, 0.0], [3.0, 1.0]], dtype=torch.float64), stds=0.2)
    exact = Denoiser(lambda x, t: world.score(x, OU.alpha(t), OU.sigma(t)), OU, predicts="score")
    for n in (10, 40):
        times = decreasing_times(n, 6.0, 1e-3)
        found = path_kl(exact, times, world.sample(1000, 1), generator=2)
        assert found.value < sampling_kl_bound(times, dim=2, second_moment=10.0).discretization


def test_steps_shrink_with_the_time_left():
    times = decreasing_times(300, 7.0, 1e-4)
    h = -times.diff()
    c = (7 - 1 + math.log(1e4)) / 300
    ratio = h / times[:-1].clamp_max(1)
    assert float(ratio.min()) > 0.9 * c
    assert float(ratio.max()) < 1.05 * c
    assert times[0] == 7
    assert times[-1] == 1e-4
    below_one = decreasing_times(4, 0.5, 0.1)
    torch.testing.assert_close(
        below_one[1:] / below_one[:-1], torch.full((4,), 0.2**0.25, dtype=torch.float64)
    )


def test_weak_order_one_in_the_variance():
    """By the recursion of the variance, without sampling: the sampler's law is Gaussian."""
    variance = 0.3

    def error(n):
        clock = torch.linspace(2.0, 0.1, n + 1, dtype=torch.float64)
        exact = torch.exp(-2 * clock) * variance - torch.expm1(-2 * clock)
        v = exact[0]
        for k, h in enumerate((-clock.diff()).tolist()):
            v = (math.exp(h) - 2 * math.expm1(h) / exact[k]) ** 2 * v + math.expm1(2 * h)
        return abs(float(v - exact[-1]))

    assert math.log2(error(100) / error(200)) == pytest.approx(1, abs=0.1)


def test_strong_order_one_on_one_path(monkeypatch):
    """Coarse steps are given the noise of the fine ones, as the exponential integrator adds it up."""
    finest, clock = 512, torch.linspace(2.0, 0.1, 513, dtype=torch.float64)
    unit = _data(finest * 50, 1, seed=9).reshape(finest, 50, 1)
    h = 1.9 / finest
    x = _data(50, 1, seed=2)

    def draw(n):
        group = finest // n
        decay = torch.exp(h * torch.arange(group - 1, -1, -1, dtype=torch.float64))[None, :, None, None]
        added = (decay * math.sqrt(math.expm1(2 * h)) * unit.reshape(n, group, 50, 1)).sum(1)
        noise = iter(added / math.sqrt(math.expm1(2 * h * group)))
        monkeypatch.setattr(
            "perturbkit.diffusion.analysis.score_sampling_bounds.randn", lambda *args, **kwargs: next(noise)
        )
        return sample_reverse_sde(gaussian(OU, 0.3), x, clock[::group]).x

    exact = draw(finest)
    errors = [float((draw(n) - exact).norm()) for n in (8, 16, 32)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.25)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(1, abs=0.25)
