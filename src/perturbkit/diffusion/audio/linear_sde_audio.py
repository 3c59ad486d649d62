"""Any linear stochastic equation as a noise process, for audio given a condition: text features to spectra, spectra to waves.

Use it where a drift and a diffusion are given rather than a schedule; it is a schedule, too, for every sampler of the library.
Wu and Shi (2021), ItôTTS and ItôWave: Linear Stochastic Differential Equation Is All You Need For Audio Generation,
arXiv:2105.07583.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import numpy as np
import torch
from torch import Tensor

from perturbkit.core import Cost, SampleResult, Schedule, checks
from perturbkit.core.random import Seed, as_generator, randn, uniform
from perturbkit.core.sampling import weighted
from perturbkit.diffusion.audio._parts import check_grid, langevin_step
from perturbkit.diffusion.audio._waves import WaveScoreNet, mel_spectrogram

__all__ = ["LinearSDE", "WaveScoreNet", "mel_spectrogram"]

TimeFunction = Callable[[Tensor], Tensor]
Score = Callable[..., Tensor]
_CELLS, _NODES = 512, 8


class LinearSDE(Schedule):
    """The equation ``dX = f(t) X dt + g(t) dW`` from data at t = 0 to noise at the horizon.

    Parameters
    ----------
    drift, diffusion : callable
        ``f`` and ``g`` of tensors of float64 times; ``g`` is positive after t = 0.
    horizon : float
        The last time, positive.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a function is not one or gives numbers that are not finite.
    ModelError
        If it does not answer one number a time.

    Notes
    -----
    With ``F(t) = int_0^t f`` and ``V(t) = int_0^t e^(-2 F) g^2``, the transition from ``x0`` is

        N(e^F x0, e^(2 F) V),

    so ``alpha = e^F``, ``sigma = e^F sqrt(V)`` and ``lam = sqrt(V)``. The integrals are Gauss-Legendre sums over 512 cells of 8 nodes,
    exact to rounding for smooth functions.

    References
    ----------
    Wu and Shi (2021), arXiv:2105.07583, section 3; Song et al. (2021), arXiv:2011.13456, appendix B.

    Examples
    --------
    >>> sde = LinearSDE(lambda t: -torch.ones_like(t), lambda t: 2**0.5 * torch.ones_like(t), horizon=4.0)
    >>> mean, std = sde.transition(torch.ones(1, 1, dtype=torch.float64), 1.0)
    >>> round(float(mean), 4), round(float(std), 4)
    (0.3679, 0.9298)
    """

    def __init__(self, drift: TimeFunction, diffusion: TimeFunction, *, horizon: float = 1.0) -> None:
        if not callable(drift) or not callable(diffusion):
            raise checks.ArgumentTypeError(
                f"drift is a {type(drift).__name__} and diffusion a {type(diffusion).__name__}; allowed: functions of a tensor of "
                "times. Pass for instance LinearSDE.vp()."
            )
        self.t_max = checks.positive("horizon", horizon)
        self.drift, self.diffusion = drift, diffusion
        for name, function in (("drift", drift), ("diffusion", diffusion)):
            checks.answer(name, function(t := torch.full((2,), self.t_max / 2, dtype=torch.float64)), t)
        nodes, weights = np.polynomial.legendre.leggauss(_NODES)
        self._nodes, self._weights = torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)
        self._edges = torch.linspace(0, horizon, _CELLS + 1, dtype=torch.float64)
        cell = self._edges.diff()
        zero = torch.zeros(1, dtype=torch.float64)
        self._log_alpha = torch.cat([zero, (cell * self._mean(drift, self._edges[:-1], cell)).cumsum(0)])
        self._variance = torch.cat([zero, self._variance_over(torch.arange(_CELLS), cell).cumsum(0)])
        if not bool(torch.isfinite(self._log_alpha).all() & torch.isfinite(self._variance).all()):
            raise checks.ArgumentError(
                f"drift and diffusion are not finite everywhere on [0, {horizon:g}]; allowed: functions whose integrals are finite. "
                "Shorten the horizon."
            )
        if not bool((self._variance.diff() > 0).all()):
            raise checks.ArgumentError(
                "diffusion is zero over a stretch of time; allowed: noise that grows. Change it."
            )

    @classmethod
    def vp(cls, beta_min: float = 0.1, beta_max: float = 20.0) -> Self:
        """Return the variance-preserving equation: ``f = -beta / 2``, ``g^2 = beta`` for a rate linear in time."""
        beta = _line(beta_min, beta_max)
        return cls(lambda t: -beta(t) / 2, lambda t: beta(t).sqrt())

    @classmethod
    def ve(cls, sigma_min: float = 0.01, sigma_max: float = 10.0) -> Self:
        """Return the variance-exploding equation: no drift, total deviation from 0 to nearly ``sigma_max``."""
        low = checks.positive("sigma_min", sigma_min)
        high = checks.between("sigma_max", sigma_max, low, math.inf, inclusive="neither")
        rate = math.log(high / low)
        return cls(torch.zeros_like, lambda t: low * (rate * t).exp() * math.sqrt(2 * rate))

    @classmethod
    def sub_vp(cls, beta_min: float = 0.1, beta_max: float = 20.0) -> Self:
        """Return the equation with ``f = -beta / 2`` and less noise, ``g^2 = beta (1 - e^(-2 int beta))``."""
        beta = _line(beta_min, beta_max)

        def diffusion(t: Tensor) -> Tensor:
            whole = beta_min * t + (beta_max - beta_min) * t**2 / 2
            return (beta(t) * -torch.expm1(-2 * whole)).sqrt()

        return cls(lambda t: -beta(t) / 2, diffusion)

    def log_alpha(self, t: Tensor | float) -> Tensor:
        t, cell, since = self._place(t)
        edge = self._edges.to(t.device)[cell]
        part = since * self._mean(self.drift, edge, since)
        return (self._log_alpha.to(t.device)[cell] + part).to(t.dtype)

    def lam(self, t: Tensor | float) -> Tensor:
        t, cell, since = self._place(t)
        within = self._variance_over(cell, since)
        return (self._variance.to(t.device)[cell] + within).clamp_min(0).sqrt().to(t.dtype)

    def sigma(self, t: Tensor | float) -> Tensor:
        return self.alpha(t) * self.lam(t)

    def rates(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        t = torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, Tensor) else t
        f, g = self.drift(t.double()).to(t.dtype), self.diffusion(t.double()).to(t.dtype)
        alpha, sigma = self.alpha(t), self.sigma(t)
        return f * alpha, f * sigma + g**2 / (2 * sigma)

    def time(self, lam: Tensor | float) -> Tensor:
        wanted = torch.as_tensor(lam, dtype=torch.float64) ** 2
        table = self._variance.to(wanted.device)
        cell = (torch.searchsorted(table, wanted.contiguous()) - 1).clamp(0, _CELLS - 1)
        edge, width = self._edges.to(wanted.device)[cell], self.t_max / _CELLS
        low, high = torch.zeros_like(wanted), torch.full_like(wanted, width)
        since = width * ((wanted - table[cell]) / (table[cell + 1] - table[cell])).clamp(0, 1)
        for _ in range(60):  # Newton, kept between ends that close in
            excess = table[cell] + self._variance_over(cell, since) - wanted
            low, high = torch.where(excess < 0, since, low), torch.where(excess > 0, since, high)
            slope = self._integrand(edge + since)
            newton = since - excess / slope
            found = (
                excess.abs() <= 1e-15 * wanted
            )  # also at the ends of a cell, where no step of Newton's stays inside
            if bool(found.all() | ((high - low) < 1e-15 * self.t_max).all()):
                break
            moved = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
            since = torch.where(found, since, moved)
        return (edge + since).to(lam.dtype if isinstance(lam, Tensor) else torch.float64)

    def transition(self, x0: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return mean (n, ...) and deviation of the state at time ``t``, one for all rows or one a row."""
        checks.tensor("x0", x0)
        if isinstance(t, Tensor) and t.ndim:
            checks.tensor("t", t, shape=(len(x0),))
        shape = (-1, *[1] * (x0.ndim - 1)) if isinstance(t, Tensor) and t.ndim else ()
        alpha, sigma = (v.to(x0.device).reshape(shape) for v in (self.alpha(t), self.sigma(t)))
        return alpha.to(x0.dtype) * x0, sigma.to(x0.dtype)

    def loss(
        self,
        score_net: Score,
        x0: Tensor,
        condition: Tensor | None = None,
        *,
        generator: Seed = None,
        t_min: float = 1e-3,
    ) -> Tensor:
        """Return the denoising score matching loss of a batch.

        Parameters
        ----------
        score_net : callable
            ``score_net(x, t, condition) -> Tensor`` in the shape of ``x``, times of shape (n,).
        x0 : Tensor, shape (n, ...)
            Clean data.
        condition : Tensor, optional
            One a row, as the network takes it.
        generator : torch.Generator, int or None
            Source of times, uniform from ``t_min`` to the horizon, and noise.
        t_min : float
            The first time, positive.

        Returns
        -------
        Tensor
            Mean of ``var(t) (s + (x_t - mean) / var)^2``, with its graph.
        """
        checks.tensor("x0", x0)
        checks.between("t_min", t_min, 0, self.t_max, inclusive="neither")
        g = as_generator(generator)
        t = uniform((len(x0),), t_min, self.t_max, generator=g, like=x0)
        mean, std = self.transition(x0, t)
        z = randn(x0.shape, generator=g, like=x0)
        answer = checks.answer("score_net", score_net(mean + std * z, t, condition), x0)
        return (std * answer + z).square().mean()

    def prior(self, shape: tuple[int, ...], *, generator: Seed = None, like: Tensor | None = None) -> Tensor:
        """Draw what is left of data at the horizon: noise of deviation ``sigma(horizon)``, in float32 unless ``like`` says otherwise."""
        made = randn(shape, generator=as_generator(generator), like=like)
        return float(self.sigma(self.t_max)) * made

    def reverse_sample(
        self,
        score: Score,
        x: Tensor,
        times: Tensor,
        condition: Tensor | None = None,
        *,
        corrector_steps: int = 1,
        snr: float = 0.1,
        deterministic: bool = False,
        generator: Seed = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> SampleResult:
        """Follow the reverse equation from noise to data.

        Parameters
        ----------
        score : callable
            ``score(x, t, condition)`` with times of shape (n,).
        x : Tensor, shape (n, ...)
            State at ``times[0]``, as :meth:`prior` draws it.
        times : Tensor, shape (steps + 1,)
            Decreasing times, as :meth:`times` gives them.
        condition : Tensor, optional
            One a row, the same all along.
        corrector_steps : int
            Langevin steps after each step, at least 0.
        snr : float
            Their size, positive: noise against score, with the norms of each row.
        deterministic : bool
            Whether to follow the probability flow ``dx/dt = f x - g^2 s / 2`` instead.
        generator : torch.Generator, int or None
            Source of the noise.
        callback : callable, optional
            Called as ``callback(i, x)`` after step ``i``.

        Returns
        -------
        SampleResult
            ``x`` at ``times[-1]``, without the noise of the last step.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If the state or the times are not allowed.

        Notes
        -----
        Euler-Maruyama for ``dX = (f X - g^2 s) dt + g dW`` backwards.

        Cost: ``1 + corrector_steps`` calls of the score a step.
        """
        checks.tensor("x", x)
        check_grid(times, self.t_max, "sde")
        checks.integer("corrector_steps", corrector_steps, low=0)
        checks.positive("snr", snr)
        g = as_generator(generator)
        grid = times.detach().to("cpu", torch.float64)
        drift, diffusion = self.drift(grid).tolist(), self.diffusion(grid).tolist()
        calls = 0

        def at(t: float) -> Callable[[Tensor], Tensor]:
            def scored(x: Tensor) -> Tensor:
                nonlocal calls
                calls += 1
                return checks.answer("score", score(x, x.new_full((len(x),), t), condition), x)

            return scored

        with torch.no_grad():
            for i in range(len(grid) - 1):
                h = float(grid[i] - grid[i + 1])
                pull = diffusion[i] ** 2 * (0.5 if deterministic else 1.0)
                parts = [(1 - h * drift[i], x), (h * pull, at(float(grid[i]))(x))]
                last = i == len(grid) - 2
                if not (last or deterministic):
                    parts.append((diffusion[i] * math.sqrt(h), randn(x.shape, generator=g, like=x)))
                x = weighted(*parts)
                if not (last or deterministic):
                    for _ in range(corrector_steps):
                        x = langevin_step(x, at(float(grid[i + 1])), snr, g)
                if callback is not None:
                    callback(i, x)
        return SampleResult(x, grid, Cost(nfev=calls * len(x)))

    def _place(self, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the time, its cell and how far it is inside."""
        time = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
        exact = time.double()
        cell = (exact / self.t_max * _CELLS).floor().long().clamp(0, _CELLS - 1)
        return time, cell, exact - self._edges.to(time.device)[cell]

    def _mean(self, function: TimeFunction, start: Tensor, length: Tensor) -> Tensor:
        """Mean of a function over [start, start + length]."""
        nodes, weights = self._nodes.to(start.device), self._weights.to(start.device)
        return function(start[..., None] + length[..., None] * nodes) @ weights

    def _variance_over(self, cell: Tensor, length: Tensor) -> Tensor:
        """Integral of ``e^(-2 F) g^2`` over the first part of a cell."""
        return length * self._mean(self._integrand, self._edges.to(cell.device)[cell], length)

    def _integrand(self, t: Tensor) -> Tensor:
        return (-2 * self.log_alpha(t)).exp() * self.diffusion(t).square()


def _line(low: float, high: float) -> TimeFunction:
    checks.positive("beta_min", low)
    checks.between("beta_max", high, low, math.inf, inclusive="neither")
    return lambda t: low + t * (high - low)
