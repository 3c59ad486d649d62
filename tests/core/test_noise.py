"""Schedules and conversions, in float64."""

import math

import pytest
import torch

from perturbkit.core import checks
from perturbkit.core.noise import (
    CosineSchedule,
    Denoiser,
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    OUSchedule,
    VESchedule,
    VPSchedule,
    convert_prediction,
    ddim_step,
)

SCHEDULES = {
    "vp": VPSchedule(),
    "vp-steep": VPSchedule(0.5, 12.0),
    "ou": OUSchedule(5.0),
    "cosine": CosineSchedule(),
    "discrete": DiscreteSchedule.from_betas(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),
    "ve": VESchedule(),
    "edm": EDMSchedule(),
    "flow": FlowSchedule(),
}
KINDS = ["x0", "eps", "v", "score", "velocity"]
schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def some_times(schedule, n=57, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (0.002 + 0.996 * torch.rand(n, generator=g, dtype=torch.float64)) * schedule.t_max


@schedules
def test_time_inverts_lam(schedule):
    t = some_times(schedule)
    torch.testing.assert_close(
        schedule.time(schedule.lam(t)), t, rtol=1e-12, atol=1e-12 * max(1, schedule.t_max)
    )


@schedules
def test_lam_inverts_time(schedule):
    levels = schedule.lam(some_times(schedule, seed=1))
    torch.testing.assert_close(schedule.lam(schedule.time(levels)), levels, rtol=2e-12, atol=1e-12)


@schedules
def test_logsnr_and_lam_agree(schedule):
    t = some_times(schedule, seed=2)
    torch.testing.assert_close(schedule.logsnr(t), -2 * schedule.lam(t).log(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["vp", "cosine", "discrete"])
def test_variance_is_preserved(name):
    t = some_times(SCHEDULES[name])
    total = SCHEDULES[name].alpha(t) ** 2 + SCHEDULES[name].sigma(t) ** 2
    torch.testing.assert_close(total, torch.ones_like(t), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", ["vp", "cosine"])
def test_sigma_keeps_its_digits_near_the_data(name):
    # sigma^2 = -expm1(2 log alpha): to first order in t it is -2 t times the rate of log alpha.
    t = torch.tensor([1e-9, 1e-12], dtype=torch.float64)
    expected = (-2 * t * SCHEDULES[name].log_alpha_rate(torch.zeros(2, dtype=torch.float64))).sqrt()
    torch.testing.assert_close(SCHEDULES[name].sigma(t), expected, rtol=1e-6, atol=0)


@schedules
def test_rates_are_the_derivatives(schedule):
    t = some_times(schedule, seed=3)
    if isinstance(schedule, DiscreteSchedule):
        t = t.floor() + 0.4  # the interpolation has kinks at whole steps
    _, alpha_rate = torch.func.jvp(schedule.alpha, (t,), (torch.ones_like(t),))
    _, sigma_rate = torch.func.jvp(schedule.sigma, (t,), (torch.ones_like(t),))
    for got, expected in zip(schedule.rates(t), (alpha_rate, sigma_rate), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@schedules
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("to", KINDS)
def test_conversions_round_trip(schedule, source, to):
    g = torch.Generator().manual_seed(4)
    t = some_times(schedule, n=11, seed=5)
    x0, noise = torch.randn(2, 11, 3, 2, generator=g, dtype=torch.float64)
    x = schedule.add_noise(x0, noise, t)
    given = convert_prediction(noise, x, t, schedule, "eps", source)
    back = convert_prediction(
        convert_prediction(given, x, t, schedule, source, to), x, t, schedule, to, source
    )
    scale = float(given.abs().max())
    # Solving for x0 at lam, or for eps at 1/lam, magnifies rounding by that ratio.
    magnified = float(torch.maximum(schedule.lam(t), 1 / schedule.lam(t)).max())
    assert float((back - given).abs().max()) <= 1e-12 * max(1.0, magnified / 100) * max(1.0, scale)


def test_conversions_against_the_definitions():
    g = torch.Generator().manual_seed(6)
    schedule = VPSchedule()
    t = 0.37
    x0, noise = torch.randn(2, 5, 4, generator=g, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x = alpha * x0 + sigma * noise
    h = 1e-6
    velocity = (schedule.add_noise(x0, noise, t + h) - schedule.add_noise(x0, noise, t - h)) / (2 * h)
    expected = {"x0": x0, "v": alpha * noise - sigma * x0, "score": -noise / sigma, "velocity": velocity}
    for kind, value in expected.items():
        got = convert_prediction(noise, x, t, schedule, "eps", kind)
        torch.testing.assert_close(got, value, rtol=1e-8, atol=1e-8)


def test_ddim_step_is_exact_for_constant_noise():
    g = torch.Generator().manual_seed(7)
    schedule = CosineSchedule()
    x0, noise = torch.randn(2, 3, 4, generator=g, dtype=torch.float64)
    start = schedule.add_noise(x0, noise, 0.9)
    torch.testing.assert_close(
        ddim_step(start, noise, schedule, 0.9, 0.1),
        schedule.add_noise(x0, noise, 0.1),
        rtol=1e-12,
        atol=1e-12,
    )


@schedules
@pytest.mark.parametrize("spacing", ["logsnr", "time", "karras"])
def test_grids_decrease_and_have_exact_ends(schedule, spacing):
    grid = schedule.times(13, t_end=0.01 * schedule.t_max, spacing=spacing)
    assert grid.shape == (14,)
    assert bool((grid.diff() < 0).all())
    assert float(grid[0]) == schedule.t_max
    assert float(grid[-1]) == 0.01 * schedule.t_max
    if spacing == "logsnr":
        steps = schedule.logsnr(grid).diff()
        torch.testing.assert_close(steps, steps.mean().expand(13), rtol=1e-9, atol=1e-9)


def test_float_times_keep_the_dtype_of_x():
    x = torch.ones(2, 3)
    assert VPSchedule().add_noise(x, x, 0.5).dtype == torch.float32
    denoiser = Denoiser(lambda x, t: x * t[:, None], VPSchedule())
    for kind in KINDS:
        assert denoiser.predict(x, 0.5, kind).dtype == torch.float32
    assert (denoiser.nfev, denoiser.n_calls) == (10, 5)


def test_denoiser_takes_one_time_a_row():
    schedule = FlowSchedule()
    denoiser = Denoiser(lambda x, t: x * t[:, None], schedule, predicts="velocity")
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    both = denoiser.x0(x, t)
    each = torch.cat([denoiser.x0(x[:1], 0.2), denoiser.x0(x[1:], 0.7)])
    torch.testing.assert_close(both, each, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: VPSchedule(beta_min=-1), "beta_min is -1; allowed"),
        (lambda: VPSchedule(2.0, 1.0), "beta_max is 1.0; allowed"),
        (lambda: OUSchedule(0.0), "horizon"),
        (lambda: VESchedule(1.0, 0.5), "sigma_max"),
        (lambda: EDMSchedule(0), "sigma_max"),
        (lambda: FlowSchedule(1.5), "t_max"),
        (lambda: DiscreteSchedule(torch.tensor([0.5, 0.6])), "strictly decreasing"),
        (lambda: VPSchedule().times(0), "n_steps is 0; allowed"),
        (lambda: VPSchedule().times(3, t_end=2.0), "t_end is 2.0; allowed"),
        (lambda: VPSchedule().times(3, spacing="log"), "spacing is 'log'; allowed"),
        (lambda: EDMSchedule().times(3, t_end=0.0), "noise levels"),
        (lambda: Denoiser(lambda x, t: x, VPSchedule(), predicts="noise"), "predicts is 'noise'; allowed"),
        (lambda: Denoiser(3, VPSchedule()), "fun is a int"),
        (lambda: Denoiser(lambda x, t: x, "vp"), "schedule is a str"),
        (
            lambda: Denoiser(lambda x, t: x[:, 0], VPSchedule()).x0(torch.ones(3, 1), 0.5),
            r"answered shape \(3,\)",
        ),
    ],
)
def test_refusals(call, match):
    with pytest.raises(checks.PerturbkitError, match=match):
        call()


def test_flow_at_one_has_no_signal():
    assert math.isinf(float(FlowSchedule(1.0).lam(1.0)))
