"""Attributions averaged over a ball around the input, with a proved lower bound on how much their direction can be turned.

Use it where an attribution has to stand small changes of an input of up to about a hundred dimensions; beyond that the bound is
empty unless the change is tiny. Wang and Kong (2024), Certified l2 Attribution Robustness via Uniformly Smoothed
Attributions, arXiv:2405.06361.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from scipy.special import betainc, betaincinv
from torch import Tensor

from perturbkit.core import Attribution, Ball, Certificate, Cost, checks, target_rows, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator

__all__ = [
    "CosineCertificate",
    "UniformSmoothedAttribution",
    "ball_overlap",
    "max_certified_epsilon",
    "min_smoothing_radius",
]

Mode = Literal["safe", "paper"]
_BLOCK = 2**20  # values of noise at once; independent of the attribution's own chunks


@dataclass(frozen=True, eq=False)
class CosineCertificate(Certificate):
    """What is proved of the direction of a smoothed attribution.

    Attributes
    ----------
    cosine_lower : Tensor, shape (n,)
        Lower bound on the cosine of the smoothed attributions of the input and of every input within ``radius``; -1 where
        nothing is proved.
    valid : Tensor of bool, shape (n,)
        Where something is.
    norm_lower : Tensor, shape (n,)
        The lower confidence bound on the norm of the smoothed attribution that it rests on.
    """

    cosine_lower: Tensor = field(default_factory=lambda: torch.empty(0))
    valid: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    norm_lower: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass(frozen=True, eq=False)
class UniformSmoothedAttribution:
    """The mean of an attribution over the ball of a radius around the input.

    Attributes
    ----------
    attribute_fn : callable (x, target) -> Attribution or Tensor
        Attribution of a batch, in its shape, row by row.
    radius : float
        Of the ball, above 0.
    n_samples : int
        Draws a row, at least 2.
    magnitude_bound : float or None
        Bound M on the attribution's norm; ``None`` brings every draw to norm 1, so that M = 1.
    absolute : bool
        Smooth the magnitudes; the bound is then tighter, by the square root of 2.

    Notes
    -----
    ``h(x) = E[g(x + eta)]``, eta uniform in the ball. Two balls at distance eps share the part rho of their volume, so that
    ``|h(x) - h(x')| <= D = 2 M (1 - rho)`` (``sqrt(2) M (1 - rho)`` where g is not negative). "safe":
    ``cos >= sqrt(1 - (D / |h|)^2)`` if D < |h|. "paper": ``cos >= |h| / sqrt(|h|^2 + (2 M (1 - rho))^2)``, the published form, which
    takes the change to be perpendicular to h and is not implied by the norms alone.

    Cost: ``n_samples`` attributions a row; the certificate itself is a formula. The overlap decays as exp(-d eps^2 / (8 r^2)).

    References
    ----------
    Wang and Kong (2024), arXiv:2405.06361.

    Examples
    --------
    >>> smoothed = UniformSmoothedAttribution(lambda x, target: torch.ones_like(x), radius=1.0, n_samples=1000)
    >>> certificate = smoothed.certify(torch.zeros(1, 2), epsilon=0.1, generator=0)
    >>> certificate.cosine_lower.round(decimals=3)
    tensor([0.9890])
    """

    attribute_fn: Callable[..., Attribution | Tensor]
    radius: float
    n_samples: int = 1000
    magnitude_bound: float | None = None
    absolute: bool = False

    def __post_init__(self) -> None:
        if not callable(self.attribute_fn):
            raise checks.ArgumentTypeError(
                f"attribute_fn is {self.attribute_fn!r}; allowed: a callable (x, target). Pass an attribution method."
            )
        checks.positive("radius", self.radius)
        checks.integer("n_samples", self.n_samples, low=2)
        if self.magnitude_bound is not None:
            checks.positive("magnitude_bound", self.magnitude_bound)

    def attribute(
        self,
        x: Tensor,
        target: Tensor | int | None = None,
        *,
        generator: Seed = None,
        progress: ProgressLike = False,
    ) -> Attribution:
        """Return the mean of the attribution over draws from the ball.

        Parameters
        ----------
        x : Tensor, shape (n, ...)
            Inputs, floating point.
        target : Tensor of shape (n,), int or None
            Passed on to the attribution, a row each.
        generator : torch.Generator, int or None
            Source of the draws.
        progress : Progress, bool or None
            Reports blocks of draws.

        Returns
        -------
        Attribution

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an input is not allowed, or an attribution is larger than ``magnitude_bound``.
        """
        checks.tensor("x", x)
        n, source, ball = len(x), as_generator(generator), Ball("l2", self.radius)
        rows = target_rows(target, x)
        total, cost = torch.zeros_like(x), Cost()
        size = max(1, _BLOCK // x.numel())
        blocks = [min(size, self.n_samples - start) for start in range(0, self.n_samples, size)]
        for m in track(blocks, "smoothing", progress=progress):
            many = x.repeat(m, *[1] * (x.ndim - 1)) + ball.sample(x, generator=source, n=m * n)
            found = self.attribute_fn(many, None if rows is None else rows.repeat(m))
            g = found.values if isinstance(found, Attribution) else found
            cost += found.cost if isinstance(found, Attribution) else Cost(ngrad=m * n)
            checks.same_shape("the attribution", g, "x", many)
            total += self._bounded(g.detach()).reshape(m, *x.shape).sum(0)
        return Attribution(total / self.n_samples, rows, cost, "uniformly smoothed attribution")

    def certify(
        self,
        x: Tensor,
        target: Tensor | int | None = None,
        *,
        epsilon: float,
        mode: Mode = "safe",
        confidence: float = 0.99,
        generator: Seed = None,
        progress: ProgressLike = False,
    ) -> CosineCertificate:
        """Bound the cosine of the smoothed attributions of an input and of every input within ``epsilon``.

        Parameters
        ----------
        x, target, generator, progress
            As in ``attribute``.
        epsilon : float
            Euclidean radius of the change, at least 0.
        mode : {"safe", "paper"}
            Which bound; see the notes.
        confidence : float
            Chance with which the bound on the norm holds, for each row, in (0, 1).

        Returns
        -------
        CosineCertificate

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an argument is not allowed.
        """
        epsilon = checks.nonnegative("epsilon", epsilon)
        checks.one_of("mode", mode, ("safe", "paper"))
        confidence = checks.between("confidence", confidence, 0, 1, inclusive="neither")
        found = self.attribute(x, target, generator=generator, progress=progress)
        norms, bound, n = found.values.flatten(1).norm(dim=1), self.magnitude_bound or 1.0, self.n_samples
        # The mean of n vectors of norm up to M is off by more than this with a chance of at most 1 - confidence.
        error = bound * (n**-0.5 + math.sqrt(2 * math.log(1 / (1 - confidence)) / n))
        lower = (norms - error).clamp(min=0)
        change = (
            bound
            * (math.sqrt(2) if self.absolute and mode == "safe" else 2)
            * _crescent(x[0].numel(), self.radius, epsilon)
        )
        if mode == "paper":
            cosine = torch.where(
                lower > 0, lower / (lower**2 + change**2).sqrt(), torch.full_like(lower, -1.0)
            )
            valid = lower > 0
        else:
            valid = lower > change
            share = (change / lower.clamp(min=torch.finfo(lower.dtype).tiny)).clamp(max=1)
            cosine = torch.where(valid, (1 - share**2).sqrt(), torch.full_like(lower, -1.0))
        return CosineCertificate(
            radius=torch.full_like(lower, epsilon),
            norm="l2",
            function=f"the {self.attribute_fn.__class__.__name__}'s attribution smoothed uniformly, radius {self.radius}",
            confidence=confidence,
            cost=found.cost,
            cosine_lower=cosine,
            valid=valid,
            norm_lower=lower,
        )

    def _bounded(self, g: Tensor) -> Tensor:
        g = g.abs() if self.absolute else g
        norms = g.flatten(1).norm(dim=1).reshape(-1, *[1] * (g.ndim - 1))
        if self.magnitude_bound is None:
            return g / norms.clamp(min=torch.finfo(g.dtype).tiny)
        if bool((norms > self.magnitude_bound * (1 + 1e-5)).any()):
            raise checks.ArgumentError(
                f"magnitude_bound is {self.magnitude_bound}, but an attribution has norm {float(norms.max()):.4g}; allowed: a "
                "bound on all of them. Give a larger one, or None to bring each to norm 1."
            )
        return g


def ball_overlap(dim: int, radius: float, distance: float) -> float:
    """Return the part of a ball's volume that it shares with an equal one at a distance.

    Parameters
    ----------
    dim : int
        Dimension, at least 1.
    radius : float
        Above 0.
    distance : float
        Of the centres, at least 0.

    Returns
    -------
    float

    Raises
    ------
    ArgumentError
        If a number is not allowed.

    Notes
    -----
    ``rho = I_{1 - (eps / 2r)^2}((d + 1) / 2, 1 / 2)``, I the regularised incomplete beta function; 0 from 2 r on.

    References
    ----------
    Wang and Kong (2024), arXiv:2405.06361.

    Examples
    --------
    >>> round(ball_overlap(1, 1.0, 0.5), 6)
    0.75
    """
    dim = checks.integer("dim", dim, low=1)
    return 1 - _crescent(dim, checks.positive("radius", radius), checks.nonnegative("distance", distance))


def max_certified_epsilon(
    h_norm: float, bound: float, radius: float, dim: int, cosine: float, *, mode: Mode = "safe"
) -> float:
    """Return the largest change under which a cosine is certified.

    Parameters
    ----------
    h_norm : float
        Norm of the smoothed attribution, above 0.
    bound : float
        Bound M on the norm of the attribution, above 0.
    radius : float
        Of smoothing, above 0.
    dim : int
        Dimension of the input.
    cosine : float
        Wanted, in (0, 1).
    mode : {"safe", "paper"}
        Which bound.

    Returns
    -------
    float
        At most 2 ``radius``.

    Raises
    ------
    ArgumentError
        If a number is not allowed.

    Notes
    -----
    The equation of the bound solved for eps, through the inverse of the incomplete beta function.

    References
    ----------
    Wang and Kong (2024), arXiv:2405.06361.

    Examples
    --------
    >>> round(max_certified_epsilon(1.0, 1.0, 1.0, 1, 0.6), 6)
    0.8
    """
    return 2 * checks.positive("radius", radius) * _half_distance(h_norm, bound, dim, cosine, mode)


def min_smoothing_radius(
    h_norm: float, bound: float, epsilon: float, dim: int, cosine: float, *, mode: Mode = "safe"
) -> float:
    """Return the smallest radius of smoothing under which a cosine is certified, at a given norm.

    Parameters
    ----------
    h_norm, bound, dim, cosine, mode
        As in :func:`max_certified_epsilon`.
    epsilon : float
        Change, above 0.

    Returns
    -------
    float

    Raises
    ------
    ArgumentError
        If a number is not allowed.

    Notes
    -----
    The norm itself falls as the radius grows, so check it at the radius that comes out.

    References
    ----------
    Wang and Kong (2024), arXiv:2405.06361.

    Examples
    --------
    >>> round(min_smoothing_radius(1.0, 1.0, 0.8, 1, 0.6), 6)
    1.0
    """
    return checks.positive("epsilon", epsilon) / (2 * _half_distance(h_norm, bound, dim, cosine, mode))


def _crescent(dim: int, radius: float, distance: float) -> float:
    """Return 1 - rho, the part of a ball outside its shifted copy, without cancellation."""
    return float(betainc(0.5, (dim + 1) / 2, min(1.0, (distance / (2 * radius)) ** 2)))


def _half_distance(h_norm: float, bound: float, dim: int, cosine: float, mode: str) -> float:
    """Return eps / (2 r) at which the bound is the cosine."""
    h_norm, bound = checks.positive("h_norm", h_norm), checks.positive("bound", bound)
    dim = checks.integer("dim", dim, low=1)
    cosine = checks.between("cosine", cosine, 0, 1, inclusive="neither")
    checks.one_of("mode", mode, ("safe", "paper"))
    sine = math.sqrt(1 - cosine**2)
    change = h_norm * (sine if mode == "safe" else sine / cosine)
    return math.sqrt(float(betaincinv(0.5, (dim + 1) / 2, min(1.0, change / (2 * bound)))))
