"""Reflected diffusion: noise that is mirrored at the walls of the unit cube, and its reversal.

Use it for data with bounds (pixels, shares, probabilities), above all under strong guidance: no sample leaves the cube, and
none is clipped. Lou and Ermon (2023), Reflected Diffusion Models, arXiv:2304.04740.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from perturbkit.core import Cost, SampleResult, VESchedule, checks
from perturbkit.core.random import Seed, as_generator, randn, uniform
from perturbkit.core.sampling import weighted
from perturbkit.diffusion.constrained._parts import (
    TimeField,
    check_in_cube,
    folded,
    folded_normal_log_prob,
    folded_normal_score,
    log_prob_and_score,
    reflect,
)

__all__ = ["ReflectedDiffusion", "folded_normal_log_prob", "folded_normal_score", "reflect"]


class ReflectedDiffusion:
    """Variance-exploding noise with mirrors at the walls of [0, 1]^dim, whose limit is the uniform law.

    Parameters
    ----------
    dim : int or sequence of int
        Shape of one state: a number of coordinates, or that of an image.
    sigma_min, sigma_max : float
        Noise at t = 0 and t = 1. From about 1 on nothing is left of the data.

    Attributes
    ----------
    schedule : VESchedule
        ``sigma(t) = sigma_min (sigma_max / sigma_min)^t``.
    shape : tuple of int
        Shape of one state.

    Notes
    -----
    Forward ``dx = g(t) dW + dL`` with ``g^2 = d sigma^2 / dt`` and ``L`` the push at the walls; given ``x0`` its state is
    the fold of ``x0 + sigma(t) eps``, so that noise of any level is drawn in one step and the target of denoising score
    matching, the score of the folded normal law, is known. A score network is any ``score(x, t) -> Tensor`` with ``t`` of
    shape (n,).

    References
    ----------
    Lou and Ermon (2023), arXiv:2304.04740.

    Examples
    --------
    >>> model = ReflectedDiffusion(2, sigma_min=0.02)
    >>> score = model.empirical_score(torch.tensor([[0.0, 1.0]]))  # all data in a corner
    >>> start = model.prior(5, generator=0)
    >>> x = model.sample(score, start, model.schedule.times(200, t_end=0.0), generator=1).x
    >>> bool((x - torch.tensor([0.0, 1.0])).abs().max() < 0.1), bool(((x >= 0) & (x <= 1)).all())
    (True, True)
    """

    def __init__(self, dim: int | Sequence[int], sigma_min: float = 0.01, sigma_max: float = 5.0) -> None:
        sizes = tuple(dim) if isinstance(dim, Sequence) else (dim,)
        self.shape = tuple(checks.integer("dim", size, low=1) for size in sizes)
        self.schedule = VESchedule(sigma_min, sigma_max)

    def perturb(self, x0: Tensor, t: Tensor | float, generator: Seed = None) -> Tensor:
        """Draw the noisy state of each row at its time.

        Parameters
        ----------
        x0 : Tensor, shape (n, *shape)
            Data in [0, 1].
        t : float or Tensor of shape (n,)
            Times in [0, 1].
        generator : torch.Generator, int or None
            Source of the noise.

        Returns
        -------
        Tensor, shape (n, *shape)
        """
        self._check_state("x0", x0)
        return _folded_noise(x0, self._sigma(t, x0), as_generator(generator))

    def transition_score(self, x: Tensor, x0: Tensor, t: Tensor | float) -> Tensor:
        """Return the gradient in ``x`` of the log density of the state ``x`` given the data ``x0``, row by row."""
        self._check_state("x", x)
        self._check_state("x0", x0)
        return log_prob_and_score(x, x0, self._sigma(t, x))[1]

    def loss(
        self, score: TimeField, x0: Tensor, *, t: Tensor | None = None, generator: Seed = None
    ) -> Tensor:
        """Return the loss of denoising score matching in the cube.

        Parameters
        ----------
        score : callable (x, t) -> Tensor
            The network under training.
        x0 : Tensor, shape (n, *shape)
            Data in [0, 1].
        t : Tensor of shape (n,), optional
            Times in [0, 1]; uniform by default.
        generator : torch.Generator, int or None
            Source of times and noise.

        Returns
        -------
        Tensor, shape ()
            Mean over rows and coordinates of ``sigma(t)^2 (score(x_t, t) - grad log q(x_t | x0))^2``.
        """
        self._check_state("x0", x0)
        g = as_generator(generator)
        times = uniform((len(x0),), generator=g, like=x0) if t is None else t
        sigma = self._sigma(times, x0)
        x = _folded_noise(x0, sigma, g)
        error = checks.answer("score", score(x, times), x) - log_prob_and_score(x, x0, sigma)[1]
        return (sigma * error).square().mean()

    def prior(
        self,
        n: int,
        *,
        generator: Seed = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw ``n`` states of the uniform law, the limit of the noise and the start of sampling."""
        size = (checks.integer("n", n, low=1), *self.shape)
        return uniform(size, generator=as_generator(generator), dtype=dtype, device=device)

    def sample(
        self,
        score: TimeField,
        x: Tensor,
        times: Tensor,
        *,
        corrector_steps: int = 0,
        snr: float = 0.16,
        unconditional: TimeField | None = None,
        weight: float = 1.0,
        boundary: Literal["reflect", "project"] = "reflect",
        generator: Seed = None,
    ) -> SampleResult:
        """Follow the reversed reflected process from noise to data.

        Parameters
        ----------
        score : callable (x, t) -> Tensor
            Score of the noisy law.
        x : Tensor, shape (n, *shape)
            States in [0, 1] at ``times[0]``, as :meth:`prior` draws them for the last time.
        times : Tensor, shape (steps + 1,)
            Decreasing times in [0, 1], as ``schedule.times(steps, t_end=0.0)`` gives them.
        corrector_steps : int
            Reflected Langevin steps after each step.
        snr : float
            Their size: ``eps = 2 (snr sigma)^2`` in ``x + eps score + sqrt(2 eps) xi``.
        unconditional : callable (x, t) -> Tensor, optional
            A second score, for guidance: ``s = s_u + weight (s - s_u)``.
        weight : float
            Weight of the guidance, zero or above.
        boundary : {"reflect", "project"}
            Fold what leaves the cube, or clip it: both discretise the same process, the fold more accurately.
        generator : torch.Generator, int or None
            Source of the noise.

        Returns
        -------
        SampleResult

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an argument is not allowed.

        Notes
        -----
        ``x' = fold(x + v score(x, t) + sqrt(v) xi)`` with ``v = sigma(t)^2 - sigma(t')^2``. Cost: one call of each score a
        step and corrector step.
        """
        self._check_state("x", x)
        checks.integer("corrector_steps", corrector_steps, low=0)
        checks.positive("snr", snr)
        checks.nonnegative("weight", weight)
        checks.one_of("boundary", boundary, ("reflect", "project"))
        self._check_times(times)
        g, confine = as_generator(generator), folded if boundary == "reflect" else _clipped
        field, per_call = _guided(score, unconditional, weight)
        levels = self.schedule.sigma(times.double()).tolist()

        def move(x: Tensor, t: Tensor, drift: float, spread: float) -> Tensor:
            noise = randn(x.shape, generator=g, like=x)
            slope = checks.answer("score", field(x, t.to(x).expand(len(x))), x)
            return confine(weighted((1.0, x), (drift, slope), (math.sqrt(spread), noise)))

        for i in range(len(times) - 1):
            v = levels[i] ** 2 - levels[i + 1] ** 2
            x = move(x, times[i], v, v)
            for _ in range(corrector_steps):
                eps = 2 * (snr * levels[i + 1]) ** 2
                x = move(x, times[i + 1], eps, 2 * eps)
        calls = (len(times) - 1) * (1 + corrector_steps) * per_call
        return SampleResult(x, times.detach().cpu(), Cost(nfev=calls * len(x)))

    def flow(self, score: TimeField, x: Tensor, times: Tensor) -> SampleResult:
        """Follow the probability flow through the cube, with no noise.

        Parameters
        ----------
        score : callable (x, t) -> Tensor
            Score of the noisy law.
        x : Tensor, shape (n, *shape)
            States in [0, 1] at ``times[0]``: uniform draws at the last time, or data at the first.
        times : Tensor, shape (steps + 1,)
            Monotone times in [0, 1], from noise to data or back.

        Returns
        -------
        SampleResult

        Notes
        -----
        ``dx / dsigma = -sigma score`` by Heun's steps in sigma, two calls each. The score has no component across the walls,
        so folding corrects no more than the step's error.
        """
        self._check_state("x", x)
        checks.tensor("times", times, ndim=1)
        self._check_times(times.flip(0) if times[0] < times[-1] else times)
        levels = self.schedule.sigma(times.double()).tolist()
        for i in range(len(times) - 1):
            h = levels[i + 1] - levels[i]
            now, later = times[i].to(x).expand(len(x)), times[i + 1].to(x).expand(len(x))
            slope = -levels[i] * checks.answer("score", score(x, now), x)
            ahead = folded(x + h * slope)
            x = folded(x + 0.5 * h * (slope - levels[i + 1] * score(ahead, later)))
        return SampleResult(x, times.detach().cpu(), Cost(nfev=2 * (len(times) - 1) * len(x)))

    def empirical_score(self, points: Tensor, weights: Tensor | None = None) -> TimeField:
        """Return the exact score of a finite set of points under this noise.

        Parameters
        ----------
        points : Tensor, shape (k, *shape)
            In [0, 1].
        weights : Tensor of shape (k,), optional
            Above 0; equal by default.

        Returns
        -------
        callable (x, t) -> Tensor
            Of cost 10 k a coordinate; all rows of one call share one time or have their own.
        """
        self._check_state("points", points)
        share = torch.ones(len(points)) if weights is None else weights
        share = checks.tensor("weights", share, shape=(len(points),)).to(points)
        checks.positive("weights", float(share.min()))

        def score(x: Tensor, t: Tensor) -> Tensor:
            where = points.to(x)
            s = self._sigma(t, x)
            s = s if s.ndim == 0 else s[:, None]
            logs, slopes = log_prob_and_score(x[:, None], where, s)
            weights = (logs.flatten(2).sum(2) + share.to(x).log()).softmax(1)
            return torch.einsum("nk,nkd->nd", weights, slopes.flatten(2)).reshape(x.shape)

        return score

    def _sigma(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the noise, one value or one a row, ready to broadcast over the rows of ``x``."""
        times = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        if times.ndim > 1 or (times.ndim == 1 and len(times) != len(x)):
            raise checks.ArgumentError(
                f"t has shape {tuple(times.shape)}; allowed: one time, or {len(x)}, one a row. Pass t of shape ({len(x)},)."
            )
        checks.between("t", float(times.min()), 0, 1)
        checks.between("t", float(times.max()), 0, 1)
        sigma = self.schedule.sigma(times)
        return sigma if sigma.ndim == 0 else sigma.reshape(-1, *[1] * (x.ndim - 1))

    def _check_state(self, name: str, x: Tensor) -> None:
        check_in_cube(name, x)
        checks.tensor(name, x, shape=(None, *self.shape))

    @staticmethod
    def _check_times(times: Tensor) -> None:
        checks.tensor("times", times, ndim=1)
        inside = float(times.min()) >= 0 and float(times.max()) <= 1
        if len(times) < 2 or not bool((times.diff() < 0).all()) or not inside:
            raise checks.ArgumentError(
                f"times has {len(times)} values from {float(times[0]):g} to {float(times[-1]):g}; allowed: at least two, "
                "strictly monotone, in [0, 1]. Use schedule.times(n_steps, t_end=0.0)."
            )


def _folded_noise(x0: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    return folded(x0 + sigma * randn(x0.shape, generator=generator, like=x0))


def _clipped(x: Tensor) -> Tensor:
    return x.clamp(0, 1)


def _guided(score: TimeField, unconditional: TimeField | None, weight: float) -> tuple[TimeField, int]:
    """Return the field that is followed, and its calls."""
    if unconditional is None:
        return score, 1

    def guided(x: Tensor, t: Tensor) -> Tensor:
        without = unconditional(x, t)
        return without + weight * (score(x, t) - without)

    return guided, 2
