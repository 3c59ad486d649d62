"""Oracles of BDIA: DDIM, the exact round trip, the leapfrog."""

import sys
from pathlib import Path

import pytest
import torch

from _common import Example
from perturbkit.core import Denoiser, EDMSchedule
from perturbkit.diffusion import invert_bdia, sample_bdia, sample_ddim

sys.path.insert(0, str(Path(__file__).parents[1]))
from _worlds import VE, VP, gaussian, gaussian_end, mixture, slope, start

EDM = EDMSchedule(10.0)
EXAMPLE = Example(
    call=lambda generator, dtype: sample_bdia(gaussian(), start(3, 4, VP, dtype=dtype), VP.times(6)),
    read=lambda result: [result.x, result.previous],
    refusals=(
        (lambda: sample_bdia(gaussian(), start(3, 4, VP), VP.times(6), gamma=1.5), "gamma is 1.5"),
        (lambda: sample_bdia(gaussian(), start(3, 4, VP), VP.times(6), base="rk"), "base is 'rk'"),
        (
            lambda: invert_bdia(gaussian(), torch.ones(2, 4), torch.ones(2, 4), VP.times(6), gamma=0.0),
            "gamma is 0",
        ),
        (
            lambda: invert_bdia(gaussian(), torch.ones(2, 4), torch.ones(3, 4), VP.times(6)),
            "previous has shape",
        ),
    ),
)


@pytest.mark.parametrize("schedule", [VE, VP, EDM], ids=["ve", "vp", "edm"])
def test_gamma_zero_is_ddim(schedule):
    d = Denoiser(lambda x, t: torch.tanh(x + t[:, None]), schedule)
    x, times = start(schedule=schedule), schedule.times(9, t_end=0.05 * schedule.t_max)
    ours, ddim = sample_bdia(d, x, times, gamma=0.0), sample_ddim(d, x, times)
    torch.testing.assert_close(ours.x, ddim.x, rtol=1e-12, atol=1e-11)
    assert ours.cost.nfev == ddim.cost.nfev


@pytest.mark.parametrize(("gamma", "n", "tol"), [(1.0, 50, 1e-9), (0.8, 20, 1e-8), (0.5, 15, 1e-7)])
@pytest.mark.parametrize("base", ["ddim", "heun"])
def test_the_round_trip_is_exact(gamma, n, tol, base):
    d, _ = mixture()
    x, times = start(), VE.times(n, t_end=0.0, spacing="karras")
    drawn = sample_bdia(d, x, times, gamma=gamma, base=base)
    found = invert_bdia(d, drawn.x, drawn.previous, times, gamma=gamma, base=base)
    assert float((found.x - x).abs().max()) < tol * float(x.abs().max())


def test_equal_steps_in_lam_are_a_leapfrog():
    d, x = gaussian(EDM), start(5, 3, EDM)
    times = EDM.times(6, t_end=0.5, spacing="time")
    h = float(times[1] - times[0])
    states = [x, x + h * d.eps(x, float(times[0]))]
    for i in range(1, 6):
        states.append(states[-2] + 2 * h * d.eps(states[-1], float(times[i])))
    torch.testing.assert_close(sample_bdia(d, x, times).x, states[-1], rtol=1e-11, atol=1e-11)


def test_the_leapfrog_has_order_two():
    x = start(5, 3, EDM)
    exact = gaussian_end(x, EDM, 10.0, 0.5)

    def error(n):
        return float(
            (sample_bdia(gaussian(EDM), x, EDM.times(n, t_end=0.5, spacing="time")).x - exact).norm()
        )

    assert 1.7 < slope(error, 100) < 2.4


def test_heun_averages_the_slopes_of_both_ends():
    d, x = gaussian(EDM), start(4, 2, EDM)
    s, t = 10.0, 4.0
    first = d.eps(x, s)
    expected = x + (t - s) * (first + d.eps(x + (t - s) * first, t)) / 2
    times = torch.tensor([s, t], dtype=torch.float64)
    torch.testing.assert_close(sample_bdia(d, x, times, base="heun").x, expected, rtol=1e-12, atol=1e-12)


def test_the_last_two_states_are_returned():
    seen = []
    found = sample_bdia(
        gaussian(), start(3, 4, VP), VP.times(5), callback=lambda i, x: seen.append(x.clone())
    )
    assert torch.equal(found.x, seen[-1])
    assert torch.equal(found.previous, seen[-2])
