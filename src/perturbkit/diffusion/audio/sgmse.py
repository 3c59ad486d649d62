"""Score-based enhancement: a diffusion that drifts from the clean signal to the noisy one, and back.

Use it to draw clean signals given noisy ones without a model of the noise; on waves, on images, or on complex spectra as in the
paper. Welker, Richter and Gerkmann (2022), Speech Enhancement with Score-Based Generative Models in the Complex STFT Domain,
arXiv:2203.17004.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from perturbkit.core import Cost, SampleResult, checks
from perturbkit.core.random import Seed, as_generator, uniform
from perturbkit.core.sampling import weighted
from perturbkit.diffusion.audio._parts import check_grid, langevin_step, like_noise, window

__all__ = ["MeanRevertingDiffusion", "complex_stft", "complex_stft_inverse"]

Score = Callable[[Tensor, Tensor, Tensor], Tensor]


class MeanRevertingDiffusion:
    """The equation ``dx = k (y - x) dt + g(t) dW`` on [0, 1], from clean data ``x`` towards what was measured, ``y``.

    Parameters
    ----------
    stiffness : float
        ``k``, at least 0; 0 leaves the variance-exploding equation.
    sigma_min, sigma_max : float
        Ends of the noise's rate, positive and increasing.

    Raises
    ------
    ArgumentError
        If a number is not allowed.

    Notes
    -----
    With ``r = sigma_max / sigma_min`` and ``g(t) = sigma_min r^t sqrt(2 log r)`` the state at ``t`` is normal with

        mean(t) = e^(-k t) x0 + (1 - e^(-k t)) y,
        var(t) = sigma_min^2 (r^(2 t) - e^(-2 k t)) log r / (k + log r).

    Noise of complex data has real and imaginary parts of half the variance each. The reverse process starts at ``y`` with noise; the
    mean at t = 1 differs from ``y`` by ``e^(-k) (x0 - y)``, the known mismatch of the start.

    References
    ----------
    Welker, Richter and Gerkmann (2022), arXiv:2203.17004, equations 4 to 11.

    Examples
    --------
    >>> diffusion = MeanRevertingDiffusion()
    >>> mean, std = diffusion.marginal(torch.zeros(1, 1), torch.ones(1, 1), 1.0)
    >>> round(float(mean), 3), round(float(std), 3)
    (0.777, 0.389)
    """

    def __init__(self, stiffness: float = 1.5, sigma_min: float = 0.05, sigma_max: float = 0.5) -> None:
        self.stiffness = checks.nonnegative("stiffness", stiffness)
        self.sigma_min = checks.positive("sigma_min", sigma_min)
        self.sigma_max = checks.between("sigma_max", sigma_max, self.sigma_min, math.inf, inclusive="neither")
        self._log_ratio = math.log(self.sigma_max / self.sigma_min)

    def diffusion(self, t: Tensor | float) -> Tensor:
        """Return ``g(t)``."""
        t = torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, Tensor) else t
        return self.sigma_min * (self._log_ratio * t).exp() * math.sqrt(2 * self._log_ratio)

    def std(self, t: Tensor | float) -> Tensor:
        """Return the deviation of the state at time ``t``."""
        t = torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, Tensor) else t
        # r^(2t) - e^(-2kt) without the cancellation near t = 0.
        grown = torch.expm1(2 * self._log_ratio * t) - torch.expm1(-2 * self.stiffness * t)
        return self.sigma_min * (grown * self._log_ratio / (self.stiffness + self._log_ratio)).sqrt()

    def marginal(self, x0: Tensor, y: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return mean (n, ...) and deviation of the state at time ``t``, one for all rows or one a row (then (n, 1, ...))."""
        self._check_pair(x0, y)
        real = x0.real.dtype if x0.is_complex() else x0.dtype
        time = torch.as_tensor(
            t, dtype=torch.float64 if not isinstance(t, Tensor) else t.dtype, device=x0.device
        )
        for end in time.aminmax():
            checks.between("t", float(end), 0, 1)
        if time.ndim:
            checks.tensor("t", time, shape=(len(x0),))
            time = time.reshape(-1, *[1] * (x0.ndim - 1))
        kept = (-self.stiffness * time).exp().to(real)
        return kept * x0 + (1 - kept) * y, self.std(time).to(real)

    def perturb(
        self, x0: Tensor, y: Tensor, t: Tensor | float, *, generator: Seed = None
    ) -> tuple[Tensor, Tensor]:
        """Return a state at time ``t`` and the standard normal noise in it."""
        mean, std = self.marginal(x0, y, t)
        z = like_noise(x0, as_generator(generator))
        return mean + std * z, z

    def loss(
        self, score_net: Score, x0: Tensor, y: Tensor, *, generator: Seed = None, t_min: float = 0.03
    ) -> Tensor:
        """Return the denoising score matching loss of a batch.

        Parameters
        ----------
        score_net : callable
            ``score_net(x, y, t) -> Tensor`` in the shape of ``x``, times of shape (n,).
        x0, y : Tensor, shape (n, ...)
            Clean data and what was measured, real or complex.
        generator : torch.Generator, int or None
            Source of times, uniform from ``t_min`` to 1, and noise.
        t_min : float
            The first time, in (0, 1).

        Returns
        -------
        Tensor
            Mean of ``|std(t) s(x_t, y, t) + z|^2``, with its graph.
        """
        self._check_pair(x0, y)
        checks.between("t_min", t_min, 0, 1, inclusive="neither")
        g = as_generator(generator)
        t = uniform((len(x0),), t_min, 1.0, generator=g, like=x0.real if x0.is_complex() else x0)
        x, z = self.perturb(x0, y, t, generator=g)
        std = self.std(t).reshape(-1, *[1] * (x0.ndim - 1))
        return (std * checks.answer("score_net", score_net(x, y, t), x) + z).abs().square().mean()

    def times(self, n_steps: int, *, t_end: float = 0.03) -> Tensor:
        """Return ``n_steps + 1`` even times from 1 to ``t_end``, in float64."""
        checks.integer("n_steps", n_steps, low=1)
        checks.between("t_end", t_end, 0, 1, inclusive="neither")
        return torch.linspace(1, t_end, n_steps + 1, dtype=torch.float64)

    def start(self, y: Tensor, *, generator: Seed = None) -> Tensor:
        """Draw what the reverse process starts from: what was measured, with the noise of t = 1."""
        return y + float(self.std(1.0)) * like_noise(y, as_generator(generator))

    def sample(
        self,
        score: Score,
        y: Tensor,
        times: Tensor,
        *,
        x: Tensor | None = None,
        corrector_steps: int = 1,
        snr: float = 0.5,
        generator: Seed = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> SampleResult:
        """Follow the reverse equation from what was measured to clean data.

        Parameters
        ----------
        score : callable
            ``score(x, y, t)`` with times of shape (n,).
        y : Tensor, shape (n, ...)
            What was measured, real or complex.
        times : Tensor, shape (steps + 1,)
            Decreasing times from at most 1, as :meth:`times` gives them.
        x : Tensor, shape (n, ...), optional
            Where to start; :meth:`start` by default.
        corrector_steps : int
            Langevin steps before each step, at least 0.
        snr : float
            Their size, positive: noise against score, with the norms of each row.
        generator : torch.Generator, int or None
            Source of the noise.
        callback : callable, optional
            Called as ``callback(i, x)`` after step ``i``.

        Returns
        -------
        SampleResult
            The mean of the last step in ``x``.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If data or times are not allowed.

        Notes
        -----
        ``x <- x - k (y - x) h + g^2 s h + g sqrt(h) z`` for a step of ``h`` down in time.

        Cost: ``1 + corrector_steps`` calls of the score a step.
        """
        _check_signal("y", y)
        check_grid(times, 1.0, "diffusion")
        checks.integer("corrector_steps", corrector_steps, low=0)
        checks.positive("snr", snr)
        g = as_generator(generator)
        if x is None:
            x = self.start(y, generator=g)
        else:
            self._check_pair(x, y)
        grid = times.detach().to("cpu", torch.float64)
        rates = self.diffusion(grid).tolist()
        calls = 0
        with torch.no_grad():
            for i in range(len(grid) - 1):
                h, t = float(grid[i] - grid[i + 1]), torch.full((len(y),), float(grid[i]), device=y.device)
                t = t.to(y.real.dtype if y.is_complex() else y.dtype)

                def scored(x: Tensor, t: Tensor = t) -> Tensor:
                    nonlocal calls
                    calls += 1
                    return checks.answer("score", score(x, y, t), x)

                for _ in range(corrector_steps):
                    x = langevin_step(x, scored, snr, g)
                pull = h * self.stiffness
                parts = [(1 + pull, x), (h * rates[i] ** 2, scored(x)), (-pull, y)]
                if i < len(grid) - 2:
                    parts.append((rates[i] * math.sqrt(h), like_noise(x, g)))
                x = weighted(*parts)
                if callback is not None:
                    callback(i, x)
        return SampleResult(x, grid, Cost(nfev=calls * len(y)))

    def _check_pair(self, x0: Tensor, y: Tensor) -> None:
        _check_signal("x0", x0)
        _check_signal("y", y)
        checks.same_shape("y", y, "x0", x0)
        if x0.is_complex() != y.is_complex():
            raise checks.ArgumentTypeError(
                f"x0 is {x0.dtype} and y {y.dtype}; allowed: both real or both complex. Convert one of them."
            )


def complex_stft(
    wave: Tensor, n_fft: int = 510, hop: int = 128, *, exponent: float = 0.5, factor: float = 0.15
) -> Tensor:
    """Return the complex short-time spectrum with compressed amplitudes.

    Parameters
    ----------
    wave : Tensor, shape (n, length)
        Real waves, longer than half of ``n_fft``.
    n_fft, hop : int
        Window (Hann, ends reflected) and step in samples; ``hop`` at most half of ``n_fft``.
    exponent, factor : float
        Of the amplitude, positive; the defaults are the paper's.

    Returns
    -------
    Tensor, shape (n, n_fft // 2 + 1, 1 + length // hop), complex

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a size is not allowed.

    Notes
    -----
    The entries ``c`` of the short-time Fourier transform become ``factor |c|^exponent e^(i angle c)``: spectra of speech have
    heavy tails.

    Examples
    --------
    >>> complex_stft(torch.ones(2, 4000)).shape
    torch.Size([2, 256, 32])
    """
    checks.tensor("wave", wave, ndim=2)
    _check_window(n_fft, hop, exponent, factor)
    if wave.shape[1] <= n_fft // 2:
        raise checks.ArgumentError(
            f"wave has {wave.shape[1]} samples; allowed: more than {n_fft // 2}, half of n_fft. Shorten the window."
        )
    return _scaled(
        torch.stft(wave, n_fft, hop, window=window(n_fft, wave), return_complex=True), exponent, factor
    )


def complex_stft_inverse(
    spectrum: Tensor,
    length: int,
    n_fft: int = 510,
    hop: int = 128,
    *,
    exponent: float = 0.5,
    factor: float = 0.15,
) -> Tensor:
    """Return the wave of a spectrum of :func:`complex_stft`.

    Parameters
    ----------
    spectrum : Tensor, shape (n, n_fft // 2 + 1, frames), complex
        With compressed amplitudes.
    length : int
        Samples of the wave.
    n_fft, hop, exponent, factor
        As in :func:`complex_stft`.

    Returns
    -------
    Tensor, shape (n, length)

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a size is not allowed.

    Notes
    -----
    Amplitudes are expanded again, and windows overlap and add to the wave of least squared difference.

    Examples
    --------
    >>> wave = torch.linspace(-1, 1, 1000, dtype=torch.float64)[None]
    >>> back = complex_stft_inverse(complex_stft(wave), 1000)
    >>> bool((back - wave).abs().max() < 1e-9)
    True
    """
    _check_window(n_fft, hop, exponent, factor)
    checks.integer("length", length, low=1)
    _check_signal("spectrum", spectrum)
    if not spectrum.is_complex() or spectrum.ndim != 3 or spectrum.shape[1] != n_fft // 2 + 1:
        raise checks.ArgumentError(
            f"spectrum is {spectrum.dtype} of shape {tuple(spectrum.shape)}; allowed: complex of shape (n, {n_fft // 2 + 1}, frames). "
            "Pass what complex_stft gives."
        )
    linear = _scaled(spectrum / factor, 1 / exponent, 1.0)
    return torch.istft(linear, n_fft, hop, window=window(n_fft, linear.real), length=length)


def _scaled(c: Tensor, exponent: float, factor: float) -> Tensor:
    size = c.abs()
    # The phase of nothing is nothing: no power of zero is taken.
    return c * torch.where(size > 0, factor * size.clamp_min(1e-30) ** (exponent - 1), 0.0)


def _check_window(n_fft: int, hop: int, exponent: float, factor: float) -> None:
    checks.integer("n_fft", n_fft, low=2)
    checks.integer("hop", hop, low=1, high=n_fft // 2)
    checks.positive("exponent", exponent)
    checks.positive("factor", factor)


def _check_signal(name: str, value: Tensor) -> None:
    """Accept real or complex tensors of finite numbers."""
    complex_given = isinstance(value, Tensor) and value.is_complex()
    checks.tensor(name, torch.view_as_real(value) if complex_given else value)
