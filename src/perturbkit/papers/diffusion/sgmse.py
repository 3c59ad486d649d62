"""Voices out of noise: exact posterior draws where the score is known, and a small network on synthesised voices."""

from __future__ import annotations

from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import SmallUNet, fit
from perturbkit.core.random import randn, seeded_init, uniform
from perturbkit.diffusion import MeanRevertingDiffusion, complex_stft, complex_stft_inverse
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._audio import coloured_noise, voices
from perturbkit.papers.diffusion._samples import wav

_RATE, _LENGTH = 4000, 2016
_STFT = (126, 32)  # 64 frequencies, 64 frames
_SIZE = 0.1  # of compressed spectra, to which inputs of the network are scaled


@paper(
    number=167,
    title="Speech Enhancement with Score-Based Generative Models in the Complex STFT Domain",
    authors="Welker, Richter, Gerkmann",
    year=2022,
    arxiv="2203.17004",
    claim="Reversing a diffusion that drifts from clean to noisy speech removes noise: at least 3 dB of scale-invariant signal to distortion "
    "ratio, and no less than a Wiener filter minus 1 dB. (The paper's corpora and PESQ are replaced by synthesised voices.)",
    method="perturbkit.diffusion.MeanRevertingDiffusion",
    needs="training",
    input="audio",
    cost="two calls of the network a step",
    seconds=130,
)
def reproduce(run: Run) -> Evidence:
    """Complex Gaussian spectra with exact scores; half-second voices at 4 kHz in coloured noise of 0 to 10 dB."""
    error, expected, blind = _gaussian(run)
    clean, noisy, ours, start = _enhanced(run)
    wiener = _wiener(noisy)
    gains = [_si_sdr(w, clean) - _si_sdr(noisy, clean) for w in (ours, wiener, start)]
    n = len(clean)
    comparisons = [
        Comparison("exact score: squared error of draws, against twice the posterior variance", error, expected, "equal", margin=0.1 * expected),
        Comparison("the same where the score does not see the measurement", blind, expected, "equal", margin=0.1 * expected, control=True),
        Comparison.over_seeds("gain over the noisy voice, decibels", gains[0].tolist(), [3.0] * n, "higher"),
        Comparison.over_seeds("gain against a Wiener filter, decibels", gains[0].tolist(), gains[1].tolist(), "higher", margin=-1.0),
        Comparison.over_seeds("gain of an untrained network, decibels", gains[2].tolist(), [3.0] * n, "higher", control=True),
    ]  # fmt: skip
    notes = f"{n} voices; mean gain {float(gains[0].mean()):.1f} dB, of the Wiener filter {float(gains[1].mean()):.1f} dB."
    samples = {
        name: wav(w[:5], _RATE)
        for name, w in {"clean.wav": clean, "noisy.wav": noisy, "enhanced.wav": ours}.items()
    }
    return Evidence(
        comparisons,
        _figure({"clean": clean, "noisy": noisy, "enhanced": ours, "Wiener": wiener}),
        notes,
        samples,
    )


def _gaussian(run: Run) -> tuple[float, float, float]:
    """Squared error of posterior draws, what it should be, and that of draws from a score that takes the measurement for zero."""
    model, g = MeanRevertingDiffusion(), run.generator("gaussian")
    prior = torch.linspace(0.02, 0.5, 40, dtype=torch.float64)
    noise, n = 0.1, 300

    def draw(power: Tensor | float) -> Tensor:
        parts = torch.view_as_complex(randn((n, 40, 2), generator=g, dtype=torch.float64)) * 0.5**0.5
        return parts * torch.as_tensor(power, dtype=torch.float64).sqrt()

    x0 = draw(prior)
    y = x0 + draw(noise)
    gain = prior / (prior + noise)
    variance = noise * gain

    def score(x: Tensor, y: Tensor, t: Tensor, *, seen: float) -> Tensor:
        kept = torch.exp(-model.stiffness * t)[:, None]
        mean = kept * gain * seen * y + (1 - kept) * y
        return -(x - mean) / (kept**2 * variance + model.std(t)[:, None] ** 2)

    times = model.times(200, t_end=1e-3)
    found = [
        model.sample(partial(score, seen=seen), y, times, corrector_steps=1, snr=0.2, generator=g).x
        for seen in (1.0, 0.0)
    ]
    errors = [float((x - x0).abs().square().mean()) for x in found]
    return errors[0], float(2 * variance.mean()), errors[1]


def _mixture(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    clean = voices(n, _LENGTH, _RATE, generator)
    noise = coloured_noise(n, _LENGTH, generator)
    level = uniform((n, 1), 0.0, 10.0, generator=generator)
    power = clean.square().mean(1, keepdim=True)
    return clean, clean + noise * (power * 10 ** (-level / 10)).sqrt()


def _enhanced(run: Run) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean and noisy voices that were held out, enhanced by the trained network and by an untrained one."""
    model, seed = MeanRevertingDiffusion(), run.seeds(1)[0]
    clean, noisy = _mixture(600, run.generator("train"))
    spectra = tuple(complex_stft(w, *_STFT) for w in (clean, noisy))
    with seeded_init(seed):
        net, untrained = (SmallUNet(2, width=16, condition_channels=2) for _ in range(2))

    def score(net: SmallUNet, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        std = model.std(t)[:, None, None]
        channels = [torch.stack([s.real, s.imag], 1) / _SIZE for s in (x, y)]
        answer = net(channels[0], t, channels[1])
        return -torch.complex(answer[:, 0], answer[:, 1]) / std

    def loss(net: SmallUNet, x0: Tensor, y: Tensor, *, generator: torch.Generator) -> Tensor:
        return model.loss(lambda x, y, t: score(net, x, y, t), x0, y, generator=generator)

    fit(net, loss, spectra, steps=600, batch_size=8, lr=2e-3, average=0.99, generator=seed, progress=False)
    clean, noisy = _mixture(20, run.generator("held"))
    y = complex_stft(noisy, *_STFT)
    waves = []
    for trained in (net, untrained):
        found = model.sample(partial(score, trained), y, model.times(30), generator=run.generator("sample"))
        waves.append(complex_stft_inverse(found.x, _LENGTH, *_STFT))
    return clean, noisy, waves[0], waves[1]


def _wiener(noisy: Tensor) -> Tensor:
    """Spectral subtraction: at each frequency the quietest fifth of the frames is taken for noise."""
    spectrum = complex_stft(noisy, *_STFT, exponent=1.0, factor=1.0)
    power = spectrum.abs().square()
    quiet = power.sort(2).values[:, :, : power.shape[2] // 5].mean(2, keepdim=True)
    # The mean of the lowest fifth of exponential variables is 0.11 of their mean.
    gain = (1 - quiet / 0.11 / power).clamp_min(0.05)
    return complex_stft_inverse(gain * spectrum, _LENGTH, *_STFT, exponent=1.0, factor=1.0)


def _si_sdr(estimate: Tensor, clean: Tensor) -> Tensor:
    """Scale-invariant signal to distortion ratio of each row, in decibels."""
    scale = (estimate * clean).sum(1, keepdim=True) / clean.square().sum(1, keepdim=True)
    target = scale * clean
    return 10 * (target.square().sum(1) / (estimate - target).square().sum(1)).log10()


def _figure(waves: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    for ax, (name, wave) in zip(figure.subplots(1, 4, sharey=True), waves.items(), strict=True):
        ax.specgram(wave[0].numpy(), NFFT=126, noverlap=94, Fs=_RATE, vmin=-90)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("seconds")
    return figure
