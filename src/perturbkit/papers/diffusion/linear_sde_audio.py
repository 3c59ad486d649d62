"""Waves with the spectrum asked for: exact scores of coloured noise, and a small network that sings at a given pitch."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import fit
from perturbkit.core.random import randn, seeded_init, uniform
from perturbkit.diffusion import LinearSDE, WaveScoreNet, mel_spectrogram
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._audio import harmonic_tones, log_spectral_distance, pitch_of
from perturbkit.papers.diffusion._samples import wav

_RATE, _LENGTH = 2000, 512
_MEL = {"n_fft": 128, "hop": 32, "bands": 20}
_DEVIATION = 0.2  # of the tones


@paper(
    number=207,
    title="ItôTTS and ItôWave: Linear Stochastic Differential Equation Is All You Need For Audio Generation",
    authors="Wu, Shi",
    year=2021,
    arxiv="2105.07583",
    claim="Linear stochastic equations generate audio that follows its condition. (The paper's listening tests cannot be repeated; "
    "spectra and pitch are measured.)",
    method="perturbkit.diffusion.LinearSDE",
    needs="training",
    input="audio",
    cost="one call of the network a step and one a corrector step",
    seconds=200,
)
def reproduce(run: Run) -> Evidence:
    """Coloured noise with exact scores under two equations; harmonic tones by a network trained on 1600 batches."""
    comparisons = []
    lines: dict[str, Tensor] = {}
    presets = {"variance preserving": LinearSDE.vp(), "variance exploding": LinearSDE.ve(0.01, 10.0)}
    for name, sde in presets.items():
        ours, floor, wrong, lines[name] = _coloured(sde, run)
        comparisons += [
            Comparison(
                f"log spectral distance beyond that of true draws, decibels, {name}",
                ours - floor,
                1.0,
                "lower",
                n=4,
            ),
            Comparison(
                f"the same for the condition of another row, {name}",
                wrong - floor,
                1.0,
                "lower",
                n=4,
                control=True,
            ),
        ]
    truth, made, pitch = _sung(run)
    griffin = _griffin_lim(mel_spectrogram(truth, _RATE, **_MEL), run.generator("griffin"))
    right = ((pitch_of(made, _RATE) / pitch - 1).abs() < 0.03).double().mean()
    blind = ((pitch_of(made.roll(1, 0), _RATE) / pitch - 1).abs() < 0.03).double().mean()
    distances = log_spectral_distance(made, truth), log_spectral_distance(griffin, truth)
    comparisons += [
        Comparison(
            "share of tones with the pitch asked for, within 3 %", float(right), 0.8, "higher", n=len(pitch)
        ),
        Comparison(
            "log spectral distance to the tone, against Griffin-Lim, decibels",
            *distances,
            "lower",
            factor=1.1,
            n=len(pitch),
        ),
        Comparison(
            "share with the pitch of another row", float(blind), 0.8, "higher", n=len(pitch), control=True
        ),
    ]
    samples = {
        "tones.wav": wav(truth[:6], _RATE),
        "generated.wav": wav(made[:6], _RATE),
        "griffin-lim.wav": wav(griffin[:6], _RATE),
    }
    return Evidence(
        comparisons, _figure(lines, truth, made, griffin), "Tones of a quarter of a second at 2 kHz.", samples
    )


def _coloured(sde: LinearSDE, run: Run) -> tuple[float, float, float, Tensor]:
    """Distances of mean spectra from those asked for: generated, true draws, generated for another row's condition."""
    g = run.generator("coloured")
    n, draws = 256, 400
    found = []
    for _ in range(4):
        bend = uniform((2,), -1.5, 1.5, generator=g, dtype=torch.float64)
        line = torch.linspace(0, 1, n // 2 + 1, dtype=torch.float64)
        power = (bend[0] * torch.cos(3 * math.pi * line) + bend[1] * torch.cos(math.pi * line)).exp()

        def score(x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
            assert condition is not None
            alpha, sigma = float(sde.alpha(float(t[0]))), float(sde.sigma(float(t[0])))
            return -torch.fft.irfft(torch.fft.rfft(x) / (alpha**2 * condition + sigma**2), n=x.shape[1])

        white = randn((draws, n), generator=g, dtype=torch.float64)
        true = torch.fft.irfft(torch.fft.rfft(white) * power.sqrt(), n=n)
        times = sde.times(100, t_end=2e-3)
        start = sde.prior((draws, n), generator=g, like=white)
        made = sde.reverse_sample(score, start, times, power, generator=g).x
        other = sde.reverse_sample(score, start, times, power.flip(0), generator=g).x
        spectra = [torch.fft.rfft(w).abs().square().mean(0) / n for w in (made, true, other)]
        found.append([float((10 * (s / power).log10()).square().mean().sqrt()) for s in spectra])
    ours, floor, wrong = (sum(column) / len(found) for column in zip(*found, strict=True))
    return ours, floor, wrong, torch.stack([power, spectra[0]])


def _sung(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Tones held out, what the network makes of their mel spectra, and their pitch."""
    sde = LinearSDE.ve(0.005, 2.0)
    seed = run.seeds(1)[0]
    waves, _ = harmonic_tones(1500, _LENGTH, _RATE, run.generator("tones"))
    mel = mel_spectrogram(waves, _RATE, **_MEL)
    centre, spread = mel.mean(), mel.std()
    with seeded_init(seed):
        net = WaveScoreNet(_MEL["bands"], channels=24, layers=8)

    def score(net: WaveScoreNet, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """The network answers minus the noise, from states of unit size."""
        sigma = sde.sigma(t).to(x)[:, None]
        return net(x / (sigma**2 + _DEVIATION**2).sqrt(), t, condition) / sigma

    def loss(net: WaveScoreNet, x0: Tensor, condition: Tensor, *, generator: torch.Generator) -> Tensor:
        return sde.loss(lambda x, t, c: score(net, x, t, c), x0, condition, generator=generator, t_min=0.01)

    fit(
        net,
        loss,
        (waves, (mel - centre) / spread),
        steps=1600,
        batch_size=16,
        lr=2e-3,
        average=0.99,
        generator=seed,
        progress=False,
    )
    truth, pitch = harmonic_tones(40, _LENGTH, _RATE, run.generator("held"))
    asked = (mel_spectrogram(truth, _RATE, **_MEL) - centre) / spread
    g = run.generator("sampling")
    start = sde.prior(tuple(truth.shape), generator=g)
    found = sde.reverse_sample(
        lambda x, t, c: score(net, x, t, c), start, sde.times(40, t_end=0.01), asked, generator=g
    )
    return truth, found.x, pitch


def _griffin_lim(mel: Tensor, generator: torch.Generator, n_iter: int = 60) -> Tensor:
    """Waves with a mel spectrogram by alternating projections, bands spread to frequencies by least squares."""
    n_fft, hop = _MEL["n_fft"], _MEL["hop"]
    # The bands' weights are those of mel_spectrogram, read off from its answers to one frequency at a time.
    eye = torch.eye(n_fft // 2 + 1)
    tone = torch.fft.irfft(eye, n=n_fft).repeat(1, 5)
    shape = (
        torch.stft(tone, n_fft, hop, window=torch.hann_window(n_fft), return_complex=True)[:, :, 8]
        .abs()
        .square()
    )
    bands = mel_spectrogram(tone, _RATE, **_MEL, floor=1e-30)[:, :, 8].exp()
    weights = torch.linalg.lstsq(shape, bands).solution.clamp_min(0)
    magnitude = (torch.linalg.pinv(weights.T) @ mel.exp()).clamp_min(0).sqrt()
    window = torch.hann_window(n_fft)
    spectrum = torch.polar(magnitude, uniform(magnitude.shape, 0, 2 * math.pi, generator=generator))
    for _ in range(n_iter):
        waves = torch.istft(spectrum, n_fft, hop, window=window, length=_LENGTH)
        angle = torch.stft(waves, n_fft, hop, window=window, return_complex=True).angle()
        spectrum = torch.polar(magnitude, angle)
    return torch.istft(spectrum, n_fft, hop, window=window, length=_LENGTH)


def _figure(lines: dict[str, Tensor], truth: Tensor, made: Tensor, griffin: Tensor) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots(1, 4)
    for name, (asked, found) in lines.items():
        axes[0].plot(10 * found.log10(), lw=0.8, label=name)
        axes[0].plot(10 * asked.log10(), color="black", lw=0.6)
    axes[0].set_title("spectrum asked (black)\nand generated, dB", fontsize=8)
    axes[0].legend(frameon=False, fontsize=6)
    for ax, (name, wave) in zip(
        axes[1:], {"tone": truth, "generated": made, "Griffin-Lim": griffin}.items(), strict=True
    ):
        ax.specgram(wave[0].numpy(), NFFT=128, noverlap=112, Fs=_RATE, vmin=-100)
        ax.set_title(name, fontsize=8)
    return figure
