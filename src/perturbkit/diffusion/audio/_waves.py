"""What a wave is conditioned on and scored by: mel spectrograms, and a stack of gated dilated convolutions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from perturbkit.core import TimeFeatures, checks
from perturbkit.diffusion.audio._parts import window

__all__ = ["WaveScoreNet", "mel_spectrogram"]


class WaveScoreNet(nn.Module):
    """A stack of gated dilated convolutions that scores a wave given its mel spectrogram.

    Parameters
    ----------
    mel_bands : int
        Bands of the spectrogram, at least 1.
    channels : int
        Channels of the stack.
    layers : int
        Layers; their dilations are 1, 2, 4, ... up to 128 and again.

    Raises
    ------
    ArgumentError
        If a size is not positive.

    Notes
    -----
    ``forward(x, t, mel)`` takes waves (n, length), times (n,) in [0, 1] and log-mel spectra (n, bands, frames), which are
    stretched to the length; it answers (n, length). Each layer adds time and spectrum before its gate; the answers of all are summed.

    References
    ----------
    Kong et al. (2021), arXiv:2009.09761, whose network has this form; Wu and Shi (2021), arXiv:2105.07583, section 4.

    Examples
    --------
    >>> net = WaveScoreNet(4, channels=8, layers=2)
    >>> net(torch.zeros(3, 64), torch.rand(3), torch.zeros(3, 4, 5)).shape
    torch.Size([3, 64])
    """

    def __init__(self, mel_bands: int, channels: int = 32, layers: int = 8) -> None:
        super().__init__()
        for name, value in (("mel_bands", mel_bands), ("channels", channels), ("layers", layers)):
            checks.integer(name, value, low=1)
        self.mel_bands = mel_bands
        self.features = TimeFeatures(32, slow=0.1, fast=100.0)
        self.time = nn.Sequential(
            nn.Linear(32, channels), nn.SiLU(), nn.Linear(channels, channels), nn.SiLU()
        )
        self.first = nn.Conv1d(1, channels, 1)
        dilations = [2 ** (i % 8) for i in range(layers)]
        self.times = nn.ModuleList(nn.Linear(channels, channels) for _ in dilations)
        self.wide = nn.ModuleList(
            nn.Conv1d(channels, 2 * channels, 3, padding=d, dilation=d) for d in dilations
        )
        self.mels = nn.ModuleList(nn.Conv1d(mel_bands, 2 * channels, 1) for _ in dilations)
        self.out = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 1) for _ in dilations)
        self.last = nn.Sequential(
            nn.ReLU(), nn.Conv1d(channels, channels, 1), nn.ReLU(), nn.Conv1d(channels, 1, 1)
        )

    def forward(self, x: Tensor, t: Tensor, mel: Tensor) -> Tensor:
        given = [v if isinstance(v, Tensor) else torch.empty(()) for v in (x, t, mel)]
        shapes = [tuple(v.shape) for v in given]
        n = shapes[0][:1]
        ranks = [len(shape) for shape in shapes]
        if ranks != [2, 1, 3] or shapes[1] != n or shapes[2][:2] != (*n, self.mel_bands):
            raise checks.ArgumentError(
                f"x, t and mel are {shapes[0]}, {shapes[1]} and {shapes[2]}; allowed: waves (n, length), times (n,) and spectra "
                f"(n, {self.mel_bands}, frames). Reshape them to match."
            )
        time = self.time(self.features(t))
        stretched = nn.functional.interpolate(mel, size=x.shape[1], mode="linear", align_corners=False)
        h = nn.functional.relu(self.first(x[:, None]))
        total = torch.zeros_like(h)
        for when, wide, spectrum, out in zip(self.times, self.wide, self.mels, self.out, strict=True):
            content, gate = (wide(h + when(time)[:, :, None]) + spectrum(stretched)).chunk(2, 1)
            kept, skipped = out(content.tanh() * gate.sigmoid()).chunk(2, 1)
            h = (h + kept) / math.sqrt(2)
            total = total + skipped
        return self.last(total / math.sqrt(len(self.times)))[:, 0]


def mel_spectrogram(
    wave: Tensor, rate: int, *, n_fft: int = 256, hop: int = 64, bands: int = 20, floor: float = 1e-5
) -> Tensor:
    """Return the logarithm of power in bands that are even on the mel scale.

    Parameters
    ----------
    wave : Tensor, shape (n, length)
        Real waves, longer than half of ``n_fft``.
    rate : int
        Samples a second, positive.
    n_fft, hop : int
        Window, an even number, and step in samples.
    bands : int
        Bands from 0 to half of the rate.
    floor : float
        Least power.

    Returns
    -------
    Tensor, shape (n, bands, 1 + length // hop)
        Natural logarithms.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a size is not allowed.

    Notes
    -----
    Power of the short-time spectrum (Hann window, reflected ends) under triangles between neighbouring points of the scale
    ``m = 2595 log10(1 + f / 700)``.

    Examples
    --------
    >>> mel_spectrogram(torch.zeros(2, 512), 4000).shape
    torch.Size([2, 20, 9])
    """
    checks.tensor("wave", wave, ndim=2)
    for name, value in (("rate", rate), ("n_fft", n_fft), ("hop", hop), ("bands", bands)):
        checks.integer(name, value, low=1)
    checks.positive("floor", floor)
    if n_fft % 2:
        raise checks.ArgumentError(f"n_fft is {n_fft}; allowed: an even number. Take {n_fft + 1}.")
    if wave.shape[1] <= n_fft // 2:
        raise checks.ArgumentError(
            f"wave has {wave.shape[1]} samples; allowed: more than {n_fft // 2}, half of n_fft. Shorten the window."
        )
    spectrum = torch.stft(wave, n_fft, hop, window=window(n_fft, wave), return_complex=True)
    return (_triangles(rate, n_fft, bands, wave) @ spectrum.abs().square()).clamp_min(floor).log()


def _triangles(rate: int, n_fft: int, bands: int, like: Tensor) -> Tensor:
    """Weights of the frequencies in each band, (bands, n_fft // 2 + 1)."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    points = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, n_fft // 2 + 1, dtype=torch.float64)
    rising = (frequencies - points[:-2, None]) / points.diff()[:-1, None]
    falling = (points[2:, None] - frequencies) / points.diff()[1:, None]
    return torch.minimum(rising, falling).clamp_min(0).to(like)
