"""Oracles of DPM-Solver: limits, exactness, orders of convergence against the exact flow."""

import math

import pytest
import torch

from _common import Example
from perturbkit.core import Denoiser, EDMSchedule, VESchedule, VPSchedule
from perturbkit.data import mixture_8
from perturbkit.diffusion import (
    sample_ddim,
    sample_dpm_solver,
    sample_dpm_solver_adaptive,
    sample_dpm_solver_fast,
)

VE = VESchedule(0.02, 20.0)


def mixture(schedule=VE, seed=0):
    world = mixture_8(seed)

    def x0(x, t):
        return world.posterior_mean(x.double(), float(schedule.alpha(t[0])), float(schedule.sigma(t[0]))).to(
            x.dtype
        )

    return Denoiser(x0, schedule, predicts="x0"), world


def start(n=16, seed=1, schedule=VE, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return float(schedule.sigma(schedule.t_max)) * torch.randn(n, 8, generator=g, dtype=dtype)


def constant(schedule, value):
    return Denoiser(lambda x, t: value.expand_as(x), schedule, predicts="eps")


EXAMPLE = Example(
    read=lambda result: [result.x],
    call=lambda generator, dtype: sample_dpm_solver(
        mixture()[0], start(4, dtype=dtype), VE.times(4, t_end=0.0)
    ),
    refusals=(
        (lambda: sample_dpm_solver(mixture()[0], start(), VE.times(4), order=4), "order is 4"),
        (
            lambda: sample_dpm_solver(mixture(EDMSchedule())[0], start(), torch.tensor([20.0, 0.0])),
            "times ends at 0",
        ),
        (lambda: sample_dpm_solver(None, start(), VE.times(4)), "denoiser is a NoneType"),
        (lambda: sample_dpm_solver_fast(mixture()[0], start(), 0), "n_evaluations is 0"),
        (lambda: sample_dpm_solver_adaptive(mixture()[0], start(), order=1), "order is 1"),
        (lambda: sample_dpm_solver_adaptive(mixture()[0], start(), atol=0.0), "atol is 0"),
        (lambda: sample_dpm_solver_adaptive(mixture()[0], start(), max_steps=3), "max_steps is 3"),
    ),
)


@pytest.mark.parametrize("schedule", [VE, VPSchedule(), EDMSchedule()], ids=["ve", "vp", "edm"])
def test_order_one_is_ddim(schedule):
    x, times = start(schedule=schedule), schedule.times(9, t_end=0.05 * schedule.t_max)
    d = Denoiser(lambda x, t: torch.tanh(x + t[:, None]), schedule)
    ours, theirs = sample_dpm_solver(d, x, times, order=1), sample_ddim(d, x, times)
    torch.testing.assert_close(ours.x, theirs.x, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("schedule", [VE, VPSchedule()], ids=["ve", "vp"])
def test_constant_noise_is_exact_in_one_step(order, schedule):
    eps = torch.randn(8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x, times = start(schedule=schedule), schedule.times(1, t_end=0.01)
    a, b = (float(schedule.alpha(t)) for t in times)
    la, lb = (float(schedule.lam(t)) for t in times)
    expected = b * (x / a + (lb - la) * eps)
    found = sample_dpm_solver(constant(schedule, eps), x, times, order=order)
    torch.testing.assert_close(found.x, expected, rtol=1e-10, atol=1e-10)
    assert found.cost.nfev == order * len(x)


def test_order_two_is_exact_for_noise_linear_in_l():
    # eps = l, the half log-SNR: the second order's expansion is then exact, the first's is not.
    schedule = VPSchedule()
    d = Denoiser(lambda x, t: (0.5 * schedule.logsnr(t))[:, None].expand_as(x), schedule)
    x, times = start(2, schedule=schedule), torch.tensor([0.6, 0.3], dtype=torch.float64)
    l0, l1 = (0.5 * float(schedule.logsnr(t)) for t in times)
    a0, a1 = (float(schedule.alpha(t)) for t in times)
    # int_{l0}^{l1} e^{-l} l dl = (l0 + 1) e^{-l0} - (l1 + 1) e^{-l1}
    integral = (l0 + 1) * math.exp(-l0) - (l1 + 1) * math.exp(-l1)
    exact = (a1 / a0) * x - a1 * integral
    first, third = (sample_dpm_solver(d, x, times, order=k).x for k in (1, 3))
    assert float((first - exact).abs().max()) > 1e-2
    torch.testing.assert_close(third, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_convergence(order):
    d, world = mixture()
    x = start(48)
    exact = world.probability_flow(x, 20.0, 0.02)
    medians = []
    for n in (80, 160):
        found = sample_dpm_solver(d, x, VE.times(n, t_end=0.0), order=order).x
        medians.append(float((found - exact).norm(dim=1).median()))
    slope = math.log2(medians[0] / medians[1])
    assert order - 0.3 < slope < order + 0.6, (medians, slope)


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 5, 9, 10, 11])
def test_fast_spends_the_budget(budget):
    d, _ = mixture()
    assert sample_dpm_solver_fast(d, start(2), budget, t_end=0.0).cost.nfev == 2 * budget


@pytest.mark.parametrize("order", [2, 3])
def test_adaptive_meets_its_tolerance(order):
    d, world = mixture()
    x = start(24)
    exact = world.probability_flow(x, 20.0, 0.02)
    errors, costs = [], []
    for tol in (1e-1, 1e-3):
        found = sample_dpm_solver_adaptive(d, x, t_end=0.0, order=order, atol=tol * 0.1, rtol=tol)
        errors.append(float((found.x - exact).norm(dim=1).median()))
        costs.append(found.cost.nfev)
        assert found.extras["n_accepted"] == len(found.times) - 1
        assert abs(float(found.times[-1])) < 1e-9
    assert errors[1] < 0.2 * errors[0]
    assert errors[1] < 5e-3
    assert costs[1] > costs[0]
