"""Synthesised voices with known pitch, spectra of waves, and the distances between them."""

from __future__ import annotations

import torch
from torch import Tensor

from perturbkit.core.random import randn, uniform

__all__ = ["coloured_noise", "harmonic_tones", "log_spectral_distance", "pitch_of", "voices"]


def harmonic_tones(
    n: int, length: int, rate: int, generator: torch.Generator, low: float = 80.0, high: float = 300.0
) -> tuple[Tensor, Tensor]:
    """Draw steady tones (n, length) of random pitch with falling harmonics and random phases, and their pitch in hertz."""
    pitch = uniform((n,), low, high, generator=generator)
    time = torch.arange(length) / rate
    total = torch.zeros(n, length)
    tilt = uniform((n,), 0.6, 1.4, generator=generator)
    for k in range(1, 7):
        phase = uniform((n, 1), 0, 2 * torch.pi, generator=generator)
        audible = (k * pitch < rate / 2).float()[:, None]
        total += audible * k ** -tilt[:, None] * torch.sin(2 * torch.pi * k * pitch[:, None] * time + phase)
    return 0.5 * total / total.abs().amax(1, keepdim=True), pitch


def voices(n: int, length: int, rate: int, generator: torch.Generator) -> Tensor:
    """Draw voices (n, length): a gliding pitch with vibrato, twelve harmonics under two formants, syllables that come and go."""
    time = torch.arange(length) / rate
    start, end = (uniform((n, 1), 90, 220, generator=generator) for _ in range(2))
    vibrato = 1 + 0.02 * torch.sin(2 * torch.pi * 5.5 * time + uniform((n, 1), 0, 6.28, generator=generator))
    pitch = (start + (end - start) * time / time[-1]) * vibrato
    phase = 2 * torch.pi * pitch.cumsum(1) / rate
    formants = [uniform((n, 1), *f, generator=generator) for f in ((350, 750), (900, 1600))]
    total = torch.zeros(n, length)
    for k in range(1, 13):
        f = k * pitch
        loudness = 0.1 + sum(torch.exp(-(((f - c) / 150) ** 2)) for c in formants)
        total += torch.where(f < rate / 2, loudness, 0.0) * torch.sin(k * phase) / k**0.5
    rhythm = uniform((n, 1), 1.5, 3.0, generator=generator)
    syllables = torch.sin(torch.pi * rhythm * time + uniform((n, 1), 0, 6.28, generator=generator)).square()
    spoken = total * syllables
    return 0.5 * spoken / spoken.abs().amax(1, keepdim=True)


def coloured_noise(n: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw noise (n, length) of unit power whose spectrum falls as a power of frequency, the power itself drawn."""
    spectrum = torch.fft.rfft(randn((n, length), generator=generator))
    slope = uniform((n, 1), 0.0, 1.0, generator=generator)
    bins = torch.arange(spectrum.shape[1]).clamp_min(1)
    made = torch.fft.irfft(spectrum * bins ** (-slope), n=length)
    return made / made.square().mean(1, keepdim=True).sqrt()


def pitch_of(waves: Tensor, rate: int, low: float = 70.0, high: float = 350.0) -> Tensor:
    """Estimate pitch in hertz: the strongest frequency of a comb of six falling harmonics on a fine spectrum."""
    n_fft = 8 * waves.shape[1]
    shaped = waves * torch.hann_window(waves.shape[1])
    spectrum = torch.fft.rfft(shaped, n_fft).abs()
    candidates = torch.arange(low, high, 0.5)
    total = torch.zeros(len(waves), len(candidates))
    for k in range(1, 7):
        index = (k * candidates * n_fft / rate).round().long()
        inside = index < spectrum.shape[1]
        total += torch.where(inside, spectrum[:, index.clamp_max(spectrum.shape[1] - 1)], 0.0) * 0.85**k
        # An octave below would match every second harmonic as well: what lies between them counts against it.
        between = ((k - 0.5) * candidates * n_fft / rate).round().long().clamp_max(spectrum.shape[1] - 1)
        total -= spectrum[:, between] * 0.85**k
    return candidates[total.argmax(1)]


def log_spectral_distance(waves: Tensor, others: Tensor, n_fft: int = 128, hop: int = 32) -> float:
    """Root mean square difference of short-time log power in decibels, powers below 1e-4 of each wave's greatest cut off."""

    def power(x: Tensor) -> Tensor:
        window = torch.hann_window(n_fft, dtype=x.dtype)
        p = torch.stft(x, n_fft, hop, window=window, return_complex=True).abs().square()
        return 10 * torch.maximum(p, 1e-4 * p.amax((1, 2), keepdim=True)).log10()

    return float((power(waves) - power(others)).square().mean().sqrt())
