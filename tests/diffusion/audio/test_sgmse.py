"""Oracles of the mean-reverting diffusion: its moments' equations, the exploding limit, exact linear scores; and of the spectra."""

import math

import numpy as np
import pytest
import scipy.integrate
import torch

from _common import Example
from perturbkit.core import VESchedule
from perturbkit.core.random import randn
from perturbkit.diffusion import MeanRevertingDiffusion, complex_stft, complex_stft_inverse
from perturbkit.diffusion.audio._parts import langevin_step, like_noise

F64 = torch.float64
MODEL = MeanRevertingDiffusion()


def state(n=6, dim=4, dtype=F64, seed=1):
    return randn((n, dim), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def linear(x, y, t):
    return -(x - y) / MODEL.std(t)[:, None] ** 2


EXAMPLE = Example(
    call=lambda generator, dtype: MODEL.sample(
        linear, state(dtype=dtype), MODEL.times(5), generator=generator
    ),
    stochastic=True,
    read=lambda result: [result.x],
    refusals=(
        (lambda: MeanRevertingDiffusion(-1.0), "stiffness is -1"),
        (lambda: MeanRevertingDiffusion(sigma_min=0.5, sigma_max=0.4), "sigma_max is 0.4"),
        (lambda: MODEL.marginal(state(), state(5), 0.5), "y has shape"),
        (lambda: MODEL.marginal(state(), state(), torch.ones(4)), "t has shape"),
        (lambda: MODEL.marginal(state(), state(), -0.1), "t is -0.1"),
        (lambda: MODEL.marginal(state(), state() + 0j, 0.5), "both real or both complex"),
        (lambda: MODEL.sample(lambda x, y, t: x[:, :1], state(), MODEL.times(3)), "score answered shape"),
        (lambda: MODEL.loss(lambda x, y, t: x[:, :1], state(), state()), "score_net answered shape"),
        (lambda: MODEL.sample(linear, state(), MODEL.times(3).flip(0)), "strictly decreasing"),
        (lambda: MODEL.sample(linear, state(), MODEL.times(3), x=state(5)), "y has shape"),
        (lambda: MODEL.sample(linear, state() * torch.nan, MODEL.times(3)), "y holds"),
        (lambda: MODEL.sample(linear, state(), MODEL.times(3), snr=-1.0), "snr is -1"),
        (lambda: MODEL.loss(linear, state(), state(), t_min=1.0), "t_min is 1"),
        (lambda: complex_stft(state(2, 200)), "wave has 200 samples"),
        (lambda: complex_stft(state(2, 2000), hop=256), "hop is 256"),
        (lambda: complex_stft_inverse(state(2, 256)[None], 300), "allowed: complex"),
    ),
)


@pytest.mark.parametrize("stiffness", [0.0, 0.4, 3.0])
def test_moments_solve_their_equations(stiffness):
    model = MeanRevertingDiffusion(stiffness, 0.1, 0.8)
    x0, y = 0.3, -1.1

    def right(t, moments):
        mean, variance = moments
        return [stiffness * (y - mean), -2 * stiffness * variance + float(model.diffusion(t)) ** 2]

    at = [0.05, 0.5, 1.0]
    solved = scipy.integrate.solve_ivp(right, (0, 1), [x0, 0.0], t_eval=at, rtol=1e-10, atol=1e-12).y
    for i, t in enumerate(at):
        mean, std = model.marginal(torch.full((1, 1), x0, dtype=F64), torch.full((1, 1), y, dtype=F64), t)
        assert float(mean) == pytest.approx(solved[0, i], abs=1e-6)
        assert float(std) ** 2 == pytest.approx(solved[1, i], rel=1e-6)


def test_moments_against_paths():
    rng, n, h = np.random.default_rng(3), 20000, 1 / 500
    x = np.full(n, 0.5)
    for i in range(500):
        x = (
            x
            + 1.5 * (-0.2 - x) * h
            + float(MODEL.diffusion((i + 0.5) * h)) * math.sqrt(h) * rng.standard_normal(n)
        )
    mean, std = MODEL.marginal(torch.full((1, 1), 0.5, dtype=F64), torch.full((1, 1), -0.2, dtype=F64), 1.0)
    assert x.mean() == pytest.approx(float(mean), abs=0.01)
    assert x.std() == pytest.approx(float(std), rel=0.02)


def test_without_stiffness_it_explodes():
    model, schedule = MeanRevertingDiffusion(0.0, 0.05, 0.5), VESchedule(0.05, 0.5)
    t = torch.tensor([0.1, 0.6, 1.0], dtype=F64)
    torch.testing.assert_close(model.std(t) ** 2, schedule.sigma(t) ** 2 - 0.05**2)
    mean, _ = model.marginal(state(3), state(3, seed=2), t)
    torch.testing.assert_close(mean, state(3))


def exact(model, deviation, centre=0.0):
    """The score where x0 given y is N(centre, deviation^2), real or complex."""

    def score(x, y, t):
        kept = (-model.stiffness * t).exp()[:, None]
        mean = kept * centre + (1 - kept) * y
        return -(x - mean) / (kept**2 * deviation**2 + model.std(t)[:, None] ** 2)

    return score


@pytest.mark.parametrize("complex_data", [False, True], ids=["real", "complex"])
def test_exact_scores_bring_back_the_marginal(complex_data):
    deviation, centre, n = 0.8, 0.4, 6000
    g = torch.Generator().manual_seed(5)

    def noise():
        if not complex_data:
            return randn((n, 3), generator=g, dtype=F64)
        return torch.view_as_complex(randn((n, 3, 2), generator=g, dtype=F64)) * 0.5**0.5

    y = torch.full((n, 3), -0.6, dtype=torch.complex128 if complex_data else F64)
    x0 = centre + deviation * noise()
    start = MODEL.perturb(x0, y, 1.0, generator=g)[0]
    found = MODEL.sample(
        exact(MODEL, deviation, centre), y, MODEL.times(200), x=start, corrector_steps=0, generator=g
    ).x
    kept = math.exp(-1.5 * 0.03)
    mean, variance = kept * centre + (1 - kept) * -0.6, kept**2 * deviation**2 + float(MODEL.std(0.03)) ** 2
    assert abs(complex(found.mean()) - mean) / deviation < 0.03
    assert float((found - found.mean()).abs().square().mean()) == pytest.approx(variance, rel=0.03)
    if complex_data:
        assert float(found.real.var()) == pytest.approx(variance / 2, rel=0.05)


def test_starting_at_the_measurement_shifts_the_mean_as_known():
    deviation, centre, n = 0.8, 0.4, 20000
    y = torch.full((n, 2), -0.6, dtype=F64)
    found = MODEL.sample(
        exact(MODEL, deviation, centre), y, MODEL.times(300), corrector_steps=0, generator=6
    ).x
    # E[x_end | x_1] is linear; the start's mean is off by y - mean(1) = e^-k (y - centre).
    kept, end = math.exp(-1.5), math.exp(-1.5 * 0.03)
    mean = end * centre + (1 - end) * -0.6
    covariance = end * kept * deviation**2 + float(MODEL.std(0.03)) ** 2 * math.exp(-1.5 * 0.97)
    variance = kept**2 * deviation**2 + float(MODEL.std(1.0)) ** 2
    expected = mean + covariance / variance * kept * (-0.6 - centre)
    assert float(found.mean()) == pytest.approx(expected, abs=0.02)
    assert abs(float(found.mean()) - mean) > 0.1


def test_loss_is_least_for_the_exact_score():
    x0 = 0.4 + 0.8 * state(20000, 2, seed=7)
    y = torch.full_like(x0, -0.6)
    score = exact(MODEL, 0.8, 0.4)
    losses = [
        float(MODEL.loss(lambda x, y, t, f=f: f * score(x, y, t), x0, y, generator=8))
        for f in (0.9, 1.0, 1.1)
    ]
    assert losses[1] < min(losses[0], losses[2])
    t = torch.linspace(0.03, 1, 10001, dtype=F64)
    signal = (-3.0 * t).exp() * 0.64
    assert losses[1] == pytest.approx(float((signal / (signal + MODEL.std(t) ** 2)).mean()), rel=0.03)


def test_corrector_calls_are_counted_and_the_last_step_has_no_noise():
    calls = []

    def score(x, y, t):
        calls.append(float(t[0]))
        return linear(x, y, t)

    found = MODEL.sample(score, state(), MODEL.times(4), corrector_steps=2, generator=1)
    assert len(calls) == 12
    assert found.cost.nfev == 12 * 6
    states = []
    found = MODEL.sample(
        linear,
        state(),
        MODEL.times(4),
        corrector_steps=0,
        generator=1,
        callback=lambda i, x: states.append(x),
    )
    h, t = float(MODEL.times(4)[3] - MODEL.times(4)[4]), MODEL.times(4)[3]
    x, y, g = states[2], state(), float(MODEL.diffusion(t))
    torch.testing.assert_close(found.x, x - 1.5 * (y - x) * h + g**2 * h * linear(x, y, t.expand(6)))


@pytest.mark.parametrize(("n_fft", "hop", "exponent"), [(510, 128, 0.5), (64, 16, 1.0), (126, 32, 0.3)])
def test_spectra_go_and_come_back(n_fft, hop, exponent):
    wave = state(3, 1000)
    spectrum = complex_stft(wave, n_fft, hop, exponent=exponent, factor=0.15)
    assert spectrum.shape == (3, n_fft // 2 + 1, 1 + 1000 // hop)
    plain = torch.stft(wave, n_fft, hop, window=torch.hann_window(n_fft, dtype=F64), return_complex=True)
    torch.testing.assert_close(spectrum.abs(), 0.15 * plain.abs() ** exponent)
    torch.testing.assert_close(torch.polar(plain.abs(), spectrum.angle()), plain)
    back = complex_stft_inverse(spectrum, 1000, n_fft, hop, exponent=exponent, factor=0.15)
    torch.testing.assert_close(back, wave, rtol=0, atol=1e-9)
    assert float(complex_stft(torch.zeros(1, 1000), n_fft, hop).abs().max()) == 0


@pytest.mark.parametrize("kind", ["real", "complex", "one number a row"])
def test_the_correctors_step_has_the_size_of_the_paper(kind):
    x = state(5, 8) if kind != "one number a row" else state(5, 8)[:, 0]
    x = torch.complex(x, x.flip(0)) if kind == "complex" else x
    snr = 0.3
    found = langevin_step(x, lambda x: -2 * x, snr, torch.Generator().manual_seed(4))
    z = like_noise(x, torch.Generator().manual_seed(4))
    for row, start, noise in zip(found, x, z, strict=True):
        step = 2 * (snr * noise.norm() / (2 * start).norm()) ** 2
        torch.testing.assert_close(row, start - 2 * step * start + (2 * step).sqrt() * noise)
