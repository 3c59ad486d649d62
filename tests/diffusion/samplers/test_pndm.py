"""Oracles of PNDM: constants, DDIM, the order, and diffusers where it is installed."""

import sys
from pathlib import Path

import pytest
import torch

from _common import Example
from perturbkit.core import Denoiser, DiscreteSchedule
from perturbkit.diffusion import sample_ddim, sample_pndm

sys.path.insert(0, str(Path(__file__).parents[1]))
from _worlds import VE, VP, constant, gaussian, gaussian_end, mixture, slope, start

EXAMPLE = Example(
    call=lambda generator, dtype: sample_pndm(gaussian(), start(3, 4, VP, dtype=dtype), VP.times(6)),
    read=lambda result: [result.x],
    refusals=(
        (
            lambda: sample_pndm(gaussian(), start(3, 4, VP), VP.times(6), variant="third"),
            "variant is 'third'",
        ),
        (lambda: sample_pndm(gaussian(), start(3, 4, VP), VP.times(6), warmup="none"), "warmup is 'none'"),
        (lambda: sample_pndm(gaussian(), start(3, 4, VP), torch.tensor([0.1, 0.5])), "strictly decreasing"),
    ),
)
VARIANTS = [("fourth", "runge_kutta"), ("fourth", "euler"), ("second", "euler")]


@pytest.mark.parametrize(("variant", "warmup"), VARIANTS)
@pytest.mark.parametrize("schedule", [VE, VP], ids=["ve", "vp"])
@pytest.mark.parametrize("n", [1, 6])
def test_constant_noise_is_exact(variant, warmup, schedule, n):
    d, eps = constant(schedule)
    x, times = start(schedule=schedule), schedule.times(n, t_end=0.01)
    a, b = (float(schedule.alpha(t)) for t in times[[0, -1]])
    la, lb = (float(schedule.lam(t)) for t in times[[0, -1]])
    expected = b * (x / a + (lb - la) * eps)
    found = sample_pndm(d, x, times, variant=variant, warmup=warmup)
    torch.testing.assert_close(found.x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("variant", "warmup", "extra"),
    [("fourth", "runge_kutta", 9), ("fourth", "euler", 1), ("second", "euler", 1)],
)
def test_calls_are_counted(variant, warmup, extra):
    found = sample_pndm(gaussian(), start(2, 4, VP), VP.times(10), variant=variant, warmup=warmup)
    assert found.cost.nfev == 2 * (10 + extra)


@pytest.mark.parametrize(("variant", "warmup"), VARIANTS)
def test_order_at_least_two_on_equal_steps(variant, warmup):
    x = start(6, 3, VP)
    exact = gaussian_end(x, VP, 1.0, 0.1)

    def error(n):
        times = VP.times(n, t_end=0.1, spacing="time")
        return float((sample_pndm(gaussian(), x, times, variant=variant, warmup=warmup).x - exact).norm())

    assert slope(error, 40) > 1.8


def test_the_multistep_weights_by_hand():
    d = Denoiser(lambda x, t: torch.sin(x) * t[:, None], VP)
    x, times = start(3, 2, VP), VP.times(3, t_end=0.2, spacing="time")
    states, eps = [x], []
    for i in range(3):
        s, t = float(times[i]), float(times[i + 1])
        eps.append(d.eps(states[-1], s))

        def move(z, e, s=s, t=t):
            at, alpha_s = float(VP.alpha(t)), float(VP.alpha(s))
            return at / alpha_s * z + at * (float(VP.lam(t)) - float(VP.lam(s))) * e

        if i == 0:
            mean = (eps[0] + d.eps(move(states[-1], eps[0]), t)) / 2
        elif i == 1:
            mean = 1.5 * eps[1] - 0.5 * eps[0]
        else:
            mean = (23 * eps[2] - 16 * eps[1] + 5 * eps[0]) / 12
        states.append(move(states[-1], mean))
    found = sample_pndm(d, x, times, warmup="euler")
    torch.testing.assert_close(found.x, states[-1], rtol=1e-11, atol=1e-11)


def test_far_better_than_ddim_on_a_mixture():
    d, world = mixture()
    x = start(60)
    exact = world.probability_flow(x, 20.0, 0.02)
    times = VE.times(20, t_end=0.0, spacing="karras")
    ours = (sample_pndm(d, x, times, warmup="euler").x - exact).norm(dim=1).median()
    ddim = (sample_ddim(d, x, times).x - exact).norm(dim=1).median()
    assert float(ours) < 0.25 * float(ddim)


@pytest.mark.parametrize("skip_prk", [True, False])
def test_agrees_with_diffusers_step_by_step(skip_prk):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is an extra")
    peer = diffusers.PNDMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", skip_prk_steps=skip_prk,
        set_alpha_to_one=False, steps_offset=0,
    )  # fmt: skip
    peer.set_timesteps(10)
    schedule = DiscreteSchedule(peer.alphas_cumprod.double())

    def network(x, t):
        return 0.5 * torch.tanh(x) + 0.001 * t[:, None]

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    theirs = x.clone()
    for t in peer.timesteps:
        theirs = peer.step(network(theirs, t.double().expand(3)), t, theirs).prev_sample
    # Their last step goes to t = -100, where they take the alpha of t = 0; ours ends at t = 0.
    times = torch.cat([torch.arange(900, -1, -100, dtype=torch.float64)])
    ours = sample_pndm(Denoiser(network, schedule), x, times, warmup="euler" if skip_prk else "runge_kutta").x
    last = network(ours, torch.zeros(3, dtype=torch.float64))
    assert last.shape == ours.shape
    difference = float((ours - theirs).abs().max())
    # The state at t = 0 is moved by their last step only as far as alpha(0) to alpha(0): not at all.
    assert difference < 1e-5 * max(1.0, float(theirs.abs().max())), difference
