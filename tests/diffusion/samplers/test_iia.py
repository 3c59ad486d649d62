"""Oracles of IIA: the base samplers, least squares, the exact map of a Gaussian."""

import sys
from pathlib import Path

import pytest
import torch

from _common import Example
from perturbkit.core import Denoiser, EDMSchedule
from perturbkit.diffusion import fit_iia, sample_ddim, sample_iia

sys.path.insert(0, str(Path(__file__).parents[1]))
from _worlds import VE, VP, gaussian, mixture, start

EDM = EDMSchedule(10.0)


def example(generator, dtype):
    x, times = start(5, 4, VP, dtype=dtype), VP.times(6)
    return sample_iia(gaussian(), x, times, fit_iia(gaussian(), x, times))


EXAMPLE = Example(
    call=example,
    read=lambda result: [result.x],
    refusals=(
        (lambda: fit_iia(gaussian(), start(5, 4, VP), VP.times(6), n_fine=1), "n_fine is 1"),
        (lambda: fit_iia(gaussian(), start(5, 4, VP), VP.times(6), base="rk"), "base is 'rk'"),
        (lambda: fit_iia(gaussian(), start(5, 4, VP), VP.times(6), ridge=-1.0), "ridge is -1"),
        (
            lambda: sample_iia(gaussian(), start(5, 4, VP), VP.times(6), torch.zeros(5, 2)),
            "coefficients has shape",
        ),
    ),
)


@pytest.mark.parametrize("schedule", [VE, VP, EDM], ids=["ve", "vp", "edm"])
def test_zero_coefficients_give_ddim(schedule):
    d = Denoiser(lambda x, t: torch.tanh(x + t[:, None]), schedule)
    x, times = start(schedule=schedule), schedule.times(9, t_end=0.05 * schedule.t_max)
    found = sample_iia(d, x, times, torch.zeros(9, 2))
    torch.testing.assert_close(found.x, sample_ddim(d, x, times).x, rtol=1e-12, atol=1e-11)
    assert found.cost.nfev == 9 * len(x)


def test_given_coefficients_weigh_the_changes_of_data_and_noise():
    d = Denoiser(lambda x, t: torch.tanh(x + t[:, None]), VP)
    x, times = start(4, 3, VP), VP.times(5, t_end=0.1)
    coefficients = torch.linspace(-0.3, 0.4, 10, dtype=torch.float64).reshape(5, 2)
    expected, memory = x, None
    for i, (s, t) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        (a, b), (sigma, tau) = ((f(s), f(t)) for f in (VP.alpha, VP.sigma))
        eps = d.eps(expected, s)
        x0 = (expected - sigma * eps) / a
        expected = b * x0 + tau * eps
        if memory is not None:
            expected = (
                expected + coefficients[i, 0] * (x0 - memory[0]) + coefficients[i, 1] * (eps - memory[1])
            )
        memory = (x0, eps)
    torch.testing.assert_close(sample_iia(d, x, times, coefficients).x, expected, rtol=1e-9, atol=1e-9)


def test_zero_coefficients_give_heun():
    d = Denoiser(lambda x, t: torch.tanh(x + t[:, None]), EDM)
    x, times = start(4, 3, EDM), EDM.times(5, t_end=0.1)
    expected = x
    for s, t in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        slope = d.eps(expected, s)
        expected = expected + (t - s) * (slope + d.eps(expected + (t - s) * slope, t)) / 2
    found = sample_iia(d, x, times, torch.zeros(5, 2), base="heun")
    torch.testing.assert_close(found.x, expected, rtol=1e-11, atol=1e-11)
    assert found.cost.nfev == 2 * 5 * len(x)


@pytest.mark.parametrize("base", ["ddim", "heun"])
def test_each_step_is_a_least_squares_optimum(base):
    """Along the corrected path, no change of a step's coefficients comes closer to the fine run."""
    d, _ = mixture()
    x, times = start(24), VE.times(6, t_end=0.0, spacing="karras")
    coefficients = fit_iia(d, x, times, base=base, ridge=0.0)
    states = [x]
    sample_iia(d, x, times, coefficients, base=base, callback=lambda i, z: states.append(z.clone()))
    first = 0 if base == "heun" else 1
    for i in range(first, 6):
        lam = VE.lam(times[i : i + 2])
        fine = VE.time(lam[0] * (lam[1] / lam[0]) ** torch.linspace(0, 1, 11, dtype=torch.float64))
        fine[0], fine[-1] = times[i], times[i + 1]
        target = sample_iia(d, states[i], fine, torch.zeros(10, 2), base=base).x

        def error(c, i=i, target=target):
            moved = []
            sample_iia(d, x, times, c, base=base, callback=lambda j, z: moved.append(z.clone()))
            return float((moved[i] - target).square().sum())

        best = error(coefficients)
        for k in (0, 1):
            for sign in (-1, 1):
                changed = coefficients.clone()
                changed[i, k] += sign * 1e-3
                assert error(changed) >= best - 1e-12
        plain = coefficients.clone()
        plain[i] = 0
        assert best <= error(plain) + 1e-12


def test_a_gaussian_is_followed_to_the_error_of_the_fine_run():
    d = gaussian(EDM)
    x, times = start(30, 3, EDM), EDM.times(6, t_end=0.1)
    errors = []
    for n_fine in (10, 200):
        coefficients = fit_iia(d, x, times, n_fine=n_fine)
        fresh = start(10, 3, EDM, seed=9)
        scale = ((0.5 + 0.1**2) / (0.5 + 10.0**2)) ** 0.5
        errors.append(float((sample_iia(d, fresh, times, coefficients).x - scale * fresh).abs().max()))
    ddim = float((sample_ddim(d, fresh, times).x - scale * fresh).abs().max())
    # The first step has no correction; a single affine map per later step is reproduced.
    assert errors[0] < 0.6 * ddim
    assert errors[1] <= errors[0] * 1.5


@pytest.mark.parametrize("base", ["ddim", "heun"])
def test_fresh_starts_on_a_mixture(base):
    d, world = mixture()
    times = VE.times(10, t_end=0.0, spacing="karras")
    coefficients = fit_iia(d, start(64, seed=3), times, base=base)
    x = start(60, seed=4)
    exact = world.probability_flow(x, 20.0, 0.02)

    def error(c):
        return float((sample_iia(d, x, times, c, base=base).x - exact).norm(dim=1).median())

    assert error(coefficients) < 0.8 * error(torch.zeros(10, 2))


def test_a_last_level_of_zero():
    d = gaussian(EDM)
    x, times = start(8, 3, EDM), torch.tensor([10.0, 3.0, 1.0, 0.0], dtype=torch.float64)
    for base in ("ddim", "heun"):
        found = sample_iia(d, x, times, fit_iia(d, x, times, base=base), base=base)
        assert bool(torch.isfinite(found.x).all())
