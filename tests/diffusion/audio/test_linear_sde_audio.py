"""Oracles of linear equations: closed transitions, the schedule they are, exact reverse covariance; and of the spectra."""

import math

import numpy as np
import pytest
import torch

from _common import Example
from perturbkit.core import Denoiser, VPSchedule
from perturbkit.core.random import randn, seeded_init
from perturbkit.diffusion import LinearSDE, WaveScoreNet, mel_spectrogram, sample_ddim

F64 = torch.float64
VP, VE, SUB = LinearSDE.vp(0.2, 12.0), LinearSDE.ve(0.02, 5.0), LinearSDE.sub_vp(0.2, 12.0)


def state(n=6, dim=4, dtype=F64, seed=1):
    return randn((n, dim), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian(sde, deviation=0.7):
    """The exact score of N(0, deviation^2)."""

    def score(x, t, condition):
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        return -x / (alpha**2 * deviation**2 + sigma**2)[:, None]

    return score


EXAMPLE = Example(
    call=lambda generator, dtype: VP.reverse_sample(
        gaussian(VP), state(dtype=dtype), VP.times(5, t_end=0.02), generator=generator
    ),
    stochastic=True,
    read=lambda result: [result.x],
    refusals=(
        (lambda: LinearSDE(-1.0, torch.ones_like), "drift is a float"),
        (lambda: LinearSDE(lambda t: 1 / (t - t), torch.ones_like), "not finite"),
        (lambda: LinearSDE(torch.zeros_like, torch.zeros_like), "diffusion is zero"),
        (lambda: LinearSDE.vp(3.0, 2.0), "beta_max is 2"),
        (lambda: LinearSDE.ve(3.0, 2.0), "sigma_max is 2"),
        (lambda: VP.reverse_sample(gaussian(VP), state(), VP.times(5).flip(0)), "strictly decreasing"),
        (
            lambda: VP.reverse_sample(gaussian(VP), state(), VP.times(5), corrector_steps=-1),
            "corrector_steps is -1",
        ),
        (lambda: VP.reverse_sample(gaussian(VP), state(), VP.times(5), snr=0.0), "snr is 0"),
        (lambda: VP.loss(gaussian(VP), state(), t_min=2.0), "t_min is 2"),
        (lambda: LinearSDE(lambda t: 0.0, torch.ones_like), "drift answered a float"),
        (lambda: VP.transition(state(), torch.ones(4)), "t has shape"),
        (lambda: VP.loss(lambda x, t, c: x[:, :1], state()), "score_net answered shape"),
        (lambda: VP.reverse_sample(lambda x, t, c: x[:, :1], state(), VP.times(5)), "score answered shape"),
        (lambda: WaveScoreNet(3)(state(2, 64), state(1, 2)[0], state(4, 5)), "x, t and mel are"),
        (lambda: mel_spectrogram(state(2, 1000), 4000, n_fft=255), "n_fft is 255"),
        (lambda: WaveScoreNet(0), "mel_bands is 0"),
        (lambda: mel_spectrogram(state(2, 100), 4000), "wave has 100 samples"),
    ),
)


def test_presets_have_their_closed_transitions():
    t = torch.tensor([1e-4, 0.03, 0.4, 0.77, 1.0], dtype=F64)
    whole = 0.2 * t + 11.8 * t**2 / 2
    expected = {
        VP: ((-whole / 2).exp(), (-torch.expm1(-whole)).sqrt()),
        VE: (torch.ones_like(t), 0.02 * torch.expm1(2 * t * math.log(250)).sqrt()),
        SUB: ((-whole / 2).exp(), -torch.expm1(-whole)),
    }
    for sde, (alpha, sigma) in expected.items():
        torch.testing.assert_close(sde.alpha(t), alpha, rtol=1e-11, atol=0)
        torch.testing.assert_close(sde.sigma(t), sigma, rtol=1e-8, atol=0)
    schedule = VPSchedule(0.2, 12.0)
    for a, b in zip(VP.rates(t[1:]), schedule.rates(t[1:]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sde", [VP, VE, SUB], ids=["vp", "ve", "sub-vp"])
def test_time_inverts_the_noise_level(sde):
    t = torch.tensor([0.001, 0.2, 0.5, 0.99], dtype=F64)
    torch.testing.assert_close(sde.time(sde.lam(t)), t, rtol=1e-9, atol=1e-12)
    # One by one, also at edges of the table's cells and at both ends.
    for at in (0.0, 3 / 512, 0.25, 0.5, 0.7, 1.0):
        assert float(sde.time(float(sde.lam(at)))) == pytest.approx(at, rel=1e-9, abs=1e-12)
    grid = sde.times(7, t_end=0.01)
    levels = sde.lam(grid).log()
    torch.testing.assert_close(levels.diff(), levels.diff().mean().expand(7))


def test_any_equation_against_paths():
    # Nothing closed: a rate that swings, a horizon of 2.
    sde = LinearSDE(lambda t: -0.3 + torch.sin(3 * t), lambda t: 0.5 + 0.4 * torch.cos(t), horizon=2.0)
    rng, n, h = np.random.default_rng(0), 40000, 1 / 400
    x = np.full(n, 1.5)
    for i in range(800):
        t = (i + 0.5) * h
        x = (
            x
            + (-0.3 + math.sin(3 * t)) * x * h
            + (0.5 + 0.4 * math.cos(t)) * math.sqrt(h) * rng.standard_normal(n)
        )
    mean, std = sde.transition(torch.full((1, 1), 1.5, dtype=F64), 2.0)
    assert float(mean) == pytest.approx(x.mean(), rel=0.02)
    assert float(std) == pytest.approx(x.std(), rel=0.02)
    assert float(sde.log_alpha(2.0)) == pytest.approx(-0.6 + (1 - math.cos(6)) / 3, abs=1e-12)


def test_transition_takes_a_time_a_row():
    x0 = state(3)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    mean, std = VP.transition(x0, t)
    for i in range(3):
        one, deviation = VP.transition(x0[i : i + 1], float(t[i]))
        torch.testing.assert_close(mean[i : i + 1], one)
        torch.testing.assert_close(std[i, 0], deviation)


@pytest.mark.parametrize("sde", [VP, VE], ids=["vp", "ve"])
def test_loss_is_least_for_the_exact_score(sde):
    x0 = 0.7 * state(30000, 2, seed=4)
    exact = gaussian(sde)
    losses = [
        float(sde.loss(lambda x, t, c, f=f: f * exact(x, t, c), x0, generator=5)) for f in (0.9, 1.0, 1.1)
    ]
    assert losses[1] < min(losses[0], losses[2])
    # E var (s + z/std)^2 at the exact score: the share of noise that cannot be told from data.
    t = torch.linspace(1e-3, 1, 20001, dtype=F64)
    a, s = sde.alpha(t), sde.sigma(t)
    assert losses[1] == pytest.approx(float((0.49 * a**2 / (0.49 * a**2 + s**2)).mean()), rel=0.03)


@pytest.mark.parametrize("sde", [VP, VE, SUB], ids=["vp", "ve", "sub-vp"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["equation", "flow"])
def test_reverse_covariance_of_gaussian_data(sde, deterministic):
    g, deviation = torch.Generator().manual_seed(6), 0.7
    start = state(8000, 2, seed=7)
    start = start / start.std() * float(sde.alpha(1.0) ** 2 * deviation**2 + sde.sigma(1.0) ** 2) ** 0.5
    times = sde.times(500, t_end=2e-3)
    found = sde.reverse_sample(
        gaussian(sde), start, times, corrector_steps=0, deterministic=deterministic, generator=g
    )
    expected = float(sde.alpha(2e-3)) ** 2 * deviation**2 + float(sde.sigma(2e-3)) ** 2
    # Sampling error of the variance is 1 %; that of the steps 3 %.
    assert float(found.x.var()) == pytest.approx(expected, rel=0.05 if deterministic else 0.04)
    assert found.cost.nfev == 500 * 8000


def test_the_corrector_leaves_the_law_and_counts():
    start = 0.9 * state(1000, 30, seed=8)

    def score(x, t, condition):
        return -x / 0.81

    found = VE.reverse_sample(
        score,
        start,
        torch.tensor([0.5, 0.4999, 0.4998], dtype=F64),
        corrector_steps=60,
        snr=0.02,
        generator=3,
    )
    assert found.cost.nfev == (2 + 60) * 1000
    assert float(found.x.std()) == pytest.approx(0.9, rel=0.02)


def test_conditions_are_kept_for_every_call():
    condition = state(6, 3, seed=9)
    seen = []

    def score(x, t, c):
        seen.append(c)
        return -x

    VP.reverse_sample(score, state(), VP.times(3, t_end=0.1), condition, generator=1)
    assert all(c is condition for c in seen)
    assert len(seen) == 3 + 2


def test_it_is_a_schedule_for_other_samplers():
    exact = gaussian(VP)
    denoiser = Denoiser(lambda x, t: exact(x, t, None), VP, predicts="score")
    x = state(50)
    found = sample_ddim(denoiser, x, VP.times(300, t_end=0.01)).x
    scale = [(float(VP.alpha(t)) ** 2 * 0.49 + float(VP.sigma(t)) ** 2) ** 0.5 for t in (0.01, 1.0)]
    torch.testing.assert_close(found, x * scale[0] / scale[1], rtol=0.02, atol=0)


def test_score_network():
    with seeded_init(0):
        net = WaveScoreNet(5, channels=8, layers=9).double()
    x, mel = state(3, 70), randn((3, 5, 6), generator=torch.Generator().manual_seed(2), dtype=F64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    out = net(x, t, mel)
    assert out.shape == x.shape
    torch.testing.assert_close(net(x[1:2], t[1:2], mel[1:2]), out[1:2])
    assert not torch.allclose(net(x, t.flip(0), mel), out)
    assert not torch.allclose(net(x, t, 2 * mel), out)
    assert max(conv.dilation[0] for conv in net.wide) == 128


def test_mel_bands_of_a_tone():
    rate, n = 8000, 4096
    time = torch.arange(n, dtype=F64) / rate
    pitch = torch.tensor([300.0, 1200.0, 3000.0], dtype=F64)
    waves = torch.sin(2 * torch.pi * pitch[:, None] * time)
    mel = mel_spectrogram(waves, rate, n_fft=512, hop=128, bands=30)
    assert mel.shape == (3, 30, 33)
    top = 2595 * math.log10(1 + 4000 / 700)
    expected = 2595 * np.log10(1 + pitch.numpy() / 700) / top * 31 - 1
    loudest = mel[:, :, 10].argmax(1).numpy()
    assert np.abs(loudest - expected).max() <= 1
    # Twice the wave is four times the power.
    torch.testing.assert_close(
        mel_spectrogram(2 * waves, rate, n_fft=512, hop=128, bands=30, floor=1e-30)
        - mel_spectrogram(waves, rate, n_fft=512, hop=128, bands=30, floor=1e-30),
        torch.full_like(mel, math.log(4)),
        rtol=1e-6,
        atol=1e-6,
    )
    assert float(mel_spectrogram(0 * waves, rate).max()) == pytest.approx(math.log(1e-5))
