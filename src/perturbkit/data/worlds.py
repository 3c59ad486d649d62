"""Worlds whose answers are known: distributions with exact scores and denoisers, regressions with known truth.

Use them to check a sampler, an estimator or an explanation against the right answer. Noisy marginals are those of
x_t = alpha x_0 + sigma eps with eps standard normal.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from perturbkit.core import checks
from perturbkit.core.random import Seed, as_generator, randn, uniform

__all__ = [
    "EmpiricalMeasure",
    "GaussianMixture",
    "LinearGaussianWorld",
    "LogisticWorld",
    "linear_gaussian",
    "logistic",
    "mixture_8",
]


class _NoisyWorld(ABC):
    """A distribution whose noisy marginals have an exact denoiser."""

    @abstractmethod
    def log_density(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """Return log p_t(x), shape (n,)."""

    @abstractmethod
    def score(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """Return the gradient of log p_t at x, in the shape of x."""

    @abstractmethod
    def posterior_mean(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """Return E[x_0 | x_t = x], in the shape of x."""

    def probability_flow(self, x: Tensor, lam_start: float, lam_end: float, *, rtol: float = 1e-9) -> Tensor:
        """Follow the probability flow from one noise level to another.

        In the scaled state z = x / alpha with lam = sigma / alpha the flow is dz/dlam = eps(z, lam) for every
        noise schedule, with eps = -lam score. Solved by SciPy's DOP853 for all points together.

        Parameters
        ----------
        x : Tensor, shape (n, d)
            Scaled states z at ``lam_start``.
        lam_start, lam_end : float
            Noise levels, at or above zero (above zero for an :class:`EmpiricalMeasure`); either may be larger.
        rtol : float
            Relative tolerance of the solver, 1e-13 to 1e-2.

        Returns
        -------
        Tensor, shape (n, d)
            Scaled states at ``lam_end``, in the dtype of ``x``; computed in float64.

        Raises
        ------
        ArgumentError
            If a level is out of range, x has another dimension or holds NaN, or the solver cannot get there.
        """
        from scipy.integrate import solve_ivp

        checks.tensor("x", x, ndim=2, shape=(None, self._dim()))
        checks.between("rtol", rtol, 1e-13, 1e-2)
        for name, lam in (("lam_start", lam_start), ("lam_end", lam_end)):
            (checks.positive if isinstance(self, EmpiricalMeasure) else checks.nonnegative)(name, lam)
        if lam_start == lam_end:
            return x.clone()

        def field(lam: float, flat: np.ndarray) -> np.ndarray:
            z = torch.from_numpy(flat.reshape(x.shape))
            return (-lam * self.score(z, 1.0, lam)).numpy().reshape(-1)

        start = x.detach().cpu().double().numpy().reshape(-1)
        # The solver's error is a mean over all numbers: the square root keeps a single bad point visible.
        strict = max(rtol / math.sqrt(len(x)), 3e-14)
        solved = solve_ivp(field, (lam_start, lam_end), start, method="DOP853", rtol=strict, atol=strict)
        if not solved.success:
            raise checks.ArgumentError(
                f"lam_end is {lam_end:g}, and the solver stopped at {solved.t[-1]:g}: {solved.message} Allowed: "
                "levels at which the flow can be followed. Choose a lam_end nearer to lam_start, or a larger rtol."
            )
        return torch.from_numpy(solved.y[:, -1].reshape(x.shape)).to(x)

    @abstractmethod
    def _dim(self) -> int:
        """Return the dimension of a point."""

    def _check(self, x: Tensor) -> None:
        # Values are not looked at: that would cost a pass at every step of a sampler, and fail under vmap.
        checks.tensor("x", x, ndim=2, shape=(None, self._dim()), finite=False)


@dataclass(frozen=True, eq=False, init=False)
class GaussianMixture(_NoisyWorld):
    """A mixture of Gaussians: samples, density, score and the exact denoiser at any noise level.

    Parameters
    ----------
    means : Tensor, shape (k, d)
        Floating point; its dtype is that of the samples.
    stds : float or Tensor of shape (k,) or (k, d), optional
        Standard deviations, above zero; give either these or ``covs``.
    covs : Tensor, shape (k, d, d), optional
        Symmetric positive definite covariances.
    weights : Tensor, shape (k,), optional
        Positive; divided by their sum. Equal by default.

    Raises
    ------
    ArgumentError
        If shapes disagree, both or neither of ``stds`` and ``covs`` are given, or a covariance is not positive
        definite.

    Notes
    -----
    Component j of the noisy marginal is N(alpha m_j, S_j), S_j = alpha² C_j + sigma² I, with responsibilities
    r_j(x). The score is -Σ_j r_j S_j⁻¹ (x - alpha m_j) and the posterior mean
    Σ_j r_j [m_j + alpha C_j S_j⁻¹ (x - alpha m_j)]; both satisfy Tweedie's relation
    alpha E[x_0 | x] = x + sigma² score(x). Cost O(n k d²), or O(n k d) with ``stds``.

    Examples
    --------
    >>> import torch
    >>> world = GaussianMixture(torch.tensor([[-2.0], [2.0]]), stds=0.5)
    >>> world.sample(3, 0).shape
    torch.Size([3, 1])
    >>> float(world.posterior_mean(torch.zeros(1, 1), alpha=1.0, sigma=1.0))
    0.0
    """

    means: Tensor
    weights: Tensor
    variances: Tensor  # [k, d], along the principal axes
    axes: Tensor | None  # [k, d, d], columns are the axes; None: the coordinate axes

    def __init__(
        self,
        means: Tensor,
        stds: float | Tensor | None = None,
        covs: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        checks.tensor("means", means, ndim=2)
        k, d = means.shape
        if (stds is None) == (covs is None):
            given = "neither" if stds is None else "both"
            raise checks.ArgumentError(
                f"{given} of stds and covs are given; allowed: exactly one. Pass stds= or covs=."
            )
        axes = None
        if stds is not None:
            s = torch.as_tensor(stds, dtype=means.dtype, device=means.device)
            if s.ndim == 1 and s.shape == (k,):
                s = s[:, None]
            elif s.ndim != 0:
                checks.tensor("stds", s, shape=(k, d))
            if not bool((s > 0).all()) or not bool(torch.isfinite(s).all()):
                raise checks.ArgumentError(
                    f"stds has a smallest value of {float(s.min()):g}; allowed: finite numbers above 0. "
                    "Use EmpiricalMeasure for points without spread."
                )
            variances = (s**2).expand(k, d).clone()
        else:
            checks.tensor("covs", covs, shape=(k, d, d))  # type: ignore[arg-type]
            c = covs.to(means)  # type: ignore[union-attr]
            variances, axes = torch.linalg.eigh((c + c.mT) / 2)
            if not torch.allclose(c, c.mT, atol=1e-6 * float(c.abs().max())) or float(variances.min()) <= 0:
                raise checks.ArgumentError(
                    f"covs has a smallest eigenvalue of {float(variances.min()):g}; allowed: symmetric positive "
                    "definite matrices. Symmetrise them and add a small multiple of the identity."
                )
        w = torch.ones(k).to(means) if weights is None else weights.to(means)
        checks.tensor("weights", w, shape=(k,))
        if not bool((w > 0).all()):
            raise checks.ArgumentError(
                f"weights has a smallest value of {float(w.min()):g}; allowed: numbers above 0. "
                "Leave out components without weight."
            )
        for name, value in (
            ("means", means),
            ("weights", w / w.sum()),
            ("variances", variances),
            ("axes", axes),
        ):
            object.__setattr__(self, name, value)

    def sample(self, n: int, generator: Seed = None) -> Tensor:
        """Draw n independent points, shape (n, d), in the dtype of the means."""
        checks.integer("n", n, low=1)
        rng = as_generator(generator)
        which = torch.multinomial(self.weights.cpu().double(), n, replacement=True, generator=_cpu(rng))
        which = which.to(self.means.device)
        noise = randn((n, self._dim()), generator=rng, like=self.means) * self.variances[which].sqrt()
        if self.axes is not None:
            noise = torch.einsum("nij,nj->ni", self.axes[which], noise)
        return self.means[which] + noise

    def log_density(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """Return log p_t(x), shape (n,).

        Parameters
        ----------
        x : Tensor, shape (n, d)
            Points.
        alpha, sigma : float or Tensor of shape (n,)
            Level of the noisy marginal; the defaults give the clean density.
        """
        self._check(x)
        _, _, logits, _ = self._parts(x, alpha, sigma)
        return torch.logsumexp(logits, 1)

    def score(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """Return the gradient of log p_t at x, shape (n, d); see :meth:`log_density` for the arguments."""
        self._check(x)
        residual, marginal, logits, _ = self._parts(x, alpha, sigma)
        return -self._mix(logits, residual / marginal)

    def posterior_mean(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """Return E[x_0 | x_t = x], shape (n, d): the exact denoiser; see :meth:`log_density` for the arguments."""
        self._check(x)
        residual, marginal, logits, a = self._parts(x, alpha, sigma)
        pulled = a[:, None, None] * self.variances.to(x) * residual / marginal
        return torch.softmax(logits, 1) @ self.means.to(x) + self._mix(logits, pulled)

    def responsibilities(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """Return the probability of each component given x_t = x, shape (n, k)."""
        self._check(x)
        return torch.softmax(self._parts(x, alpha, sigma)[2], 1)

    def _parts(
        self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return, along the axes, residuals and marginal variances [n, k, d]; log r_j + const [n, k]; alpha [n]."""
        a, s = _levels(x, alpha, sigma)
        residual = x[:, None] - a[:, None, None] * self.means.to(x)
        if self.axes is not None:
            residual = torch.einsum("nki,kij->nkj", residual, self.axes.to(x))
        marginal = a[:, None, None] ** 2 * self.variances.to(x) + s[:, None, None] ** 2
        quadratic = (residual**2 / marginal + marginal.log()).sum(-1) + self._dim() * math.log(2 * math.pi)
        return residual, marginal, self.weights.to(x).log() - quadratic / 2, a

    def _mix(self, logits: Tensor, along_axes: Tensor) -> Tensor:
        weighted = torch.softmax(logits, 1)[..., None] * along_axes
        if self.axes is None:
            return weighted.sum(1)
        return torch.einsum("nkj,kij->ni", weighted, self.axes.to(weighted))

    def _dim(self) -> int:
        return self.means.shape[1]


def mixture_8(generator: Seed = None, *, dtype: torch.dtype = torch.float64) -> GaussianMixture:
    """Return the test bed "mixture-8": 5 Gaussians in 8 dimensions, means N(0, 4 I), standard deviation 0.25.

    Parameters
    ----------
    generator : torch.Generator, int or None
        Draws the means.
    dtype : torch.dtype
        dtype of the mixture.

    Examples
    --------
    >>> mixture_8(0).means.shape
    torch.Size([5, 8])
    """
    checks.one_of("dtype", dtype, [torch.float64, torch.float32])
    means = 2 * randn((5, 8), generator=as_generator(generator), dtype=dtype)
    return GaussianMixture(means, stds=0.25)


@dataclass(frozen=True, eq=False)
class EmpiricalMeasure(_NoisyWorld):
    """Point masses on given points: what a diffusion model that has learned its data by heart would do.

    Parameters
    ----------
    points : Tensor, shape (m, d)
        Where the mass sits, equally.

    Notes
    -----
    p_t(x) = (1/m) Σ_i N(x; alpha p_i, sigma² I), so the denoiser is Σ_i r_i(x) p_i with
    r = softmax(-‖x - alpha p_i‖² / 2 sigma²). There is no density at sigma = 0. Cost O(n m d).

    Examples
    --------
    >>> import torch
    >>> world = EmpiricalMeasure(torch.tensor([[-1.0], [1.0]]))
    >>> round(float(world.posterior_mean(torch.tensor([[0.5]]), 1.0, 1.0)), 4)   # tanh(1/2)
    0.4621
    """

    points: Tensor

    def __post_init__(self) -> None:
        checks.tensor("points", self.points, ndim=2)

    def sample(self, n: int, generator: Seed = None) -> Tensor:
        """Draw n points with replacement, shape (n, d)."""
        checks.integer("n", n, low=1)
        rng = as_generator(generator)
        return self.points[
            torch.randint(len(self.points), (n,), generator=rng, device=rng.device).to(self.points.device)
        ]

    def log_density(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """Return log p_t(x), shape (n,); ``sigma`` must be above zero.

        Parameters
        ----------
        x : Tensor, shape (n, d)
            Points.
        alpha, sigma : float or Tensor of shape (n,)
            Level of the noisy marginal.
        """
        logits, _, s = self._parts(x, alpha, sigma)
        constant = self._dim() * (s.log() + math.log(2 * math.pi) / 2) + math.log(len(self.points))
        return torch.logsumexp(logits, 1).to(x) - constant

    def score(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """Return (alpha E[x_0 | x] - x) / sigma², shape (n, d); see :meth:`log_density` for the arguments."""
        logits, a, s = self._parts(x, alpha, sigma)
        mean = torch.softmax(logits, 1).to(x) @ self.points.to(x)
        return (a[:, None] * mean - x) / s[:, None] ** 2

    def posterior_mean(self, x: Tensor, alpha: float | Tensor = 1.0, sigma: float | Tensor = 0.0) -> Tensor:
        """Return E[x_0 | x_t = x], shape (n, d): the exact denoiser; see :meth:`log_density` for the arguments."""
        return torch.softmax(self._parts(x, alpha, sigma)[0], 1).to(x) @ self.points.to(x)

    def _parts(
        self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        self._check(x)
        a, s = _levels(x, alpha, sigma)
        if not bool((s > 0).all()):
            raise checks.ArgumentError(
                f"sigma has a smallest value of {float(s.min()):g}; allowed: above 0, as point masses have no "
                "density. Use a small positive sigma."
            )
        return -_squared(x, a, self.points.to(x)) / (2 * s.double()[:, None] ** 2), a, s

    def _dim(self) -> int:
        return self.points.shape[1]


@dataclass(frozen=True, eq=False)
class LinearGaussianWorld:
    """Regression with a known truth: y = intercept + x·coef + noise · N(0, 1), x ~ N(0, covariance).

    Attributes
    ----------
    coef : Tensor, shape (d,)
        True coefficients.
    covariance : Tensor, shape (d, d)
        Covariance of the features.
    intercept, noise : float
        Intercept, and standard deviation of the noise.
    """

    coef: Tensor
    covariance: Tensor
    intercept: float
    noise: float

    def sample(self, n: int, generator: Seed = None) -> tuple[Tensor, Tensor]:
        """Draw features, shape (n, d), and targets, shape (n,)."""
        rng = as_generator(generator)
        x = _features(self.covariance, n, rng)
        return x, self.mean(x) + self.noise * randn((n,), generator=rng, like=x)

    def mean(self, x: Tensor) -> Tensor:
        """Return E[y | x], shape (n,)."""
        checks.tensor("x", x, ndim=2, shape=(None, len(self.coef)))
        return x @ self.coef.to(x) + self.intercept


@dataclass(frozen=True, eq=False)
class LogisticWorld:
    """Binary classification with known probabilities: P(y = 1 | x) = 1 / (1 + exp(-intercept - x·coef)).

    Attributes
    ----------
    coef : Tensor, shape (d,)
        True coefficients.
    covariance : Tensor, shape (d, d)
        Covariance of the features, x ~ N(0, covariance).
    intercept : float
        Intercept.
    """

    coef: Tensor
    covariance: Tensor
    intercept: float

    def sample(self, n: int, generator: Seed = None) -> tuple[Tensor, Tensor]:
        """Draw features, shape (n, d), and labels 0 or 1, int64 of shape (n,)."""
        rng = as_generator(generator)
        x = _features(self.covariance, n, rng)
        return x, (uniform((n,), generator=rng, like=x) < self.probability(x)).long()

    def probability(self, x: Tensor) -> Tensor:
        """Return P(y = 1 | x), shape (n,)."""
        checks.tensor("x", x, ndim=2, shape=(None, len(self.coef)))
        return torch.sigmoid(x @ self.coef.to(x) + self.intercept)


def linear_gaussian(
    n_features: int = 5,
    *,
    n_informative: int | None = None,
    noise: float = 1.0,
    intercept: float = 0.0,
    correlation: float = 0.0,
    generator: Seed = None,
    dtype: torch.dtype = torch.float64,
) -> LinearGaussianWorld:
    """Return a random linear regression whose coefficients are known.

    Parameters
    ----------
    n_features : int
        Features, at least 1.
    n_informative : int, optional
        How many have a coefficient other than zero, the first ones; all by default.
    noise : float
        Standard deviation of the noise, at or above zero.
    intercept : float
        Intercept.
    correlation : float
        Correlation of features i and j is ``correlation ** |i - j|``; in (-1, 1).
    generator : torch.Generator, int or None
        Draws the coefficients, N(0, 1).
    dtype : torch.dtype
        float64 or float32.

    Examples
    --------
    >>> world = linear_gaussian(4, n_informative=2, generator=0)
    >>> x, y = world.sample(100, 1)
    >>> x.shape, y.shape, world.coef[2:].tolist()
    (torch.Size([100, 4]), torch.Size([100]), [0.0, 0.0])
    """
    coef, covariance = _truth(n_features, n_informative, correlation, 1.0, generator, dtype)
    checks.between("intercept", intercept, -math.inf, math.inf)
    return LinearGaussianWorld(coef, covariance, float(intercept), checks.nonnegative("noise", noise))


def logistic(
    n_features: int = 5,
    *,
    n_informative: int | None = None,
    scale: float = 1.0,
    intercept: float = 0.0,
    correlation: float = 0.0,
    generator: Seed = None,
    dtype: torch.dtype = torch.float64,
) -> LogisticWorld:
    """Return a random binary classification whose probabilities are known.

    Parameters
    ----------
    n_features : int
        Features, at least 1.
    n_informative : int, optional
        How many have a coefficient other than zero, the first ones; all by default.
    scale : float
        Standard deviation of the coefficients, above zero: larger makes the classes easier to tell apart.
    intercept : float
        Intercept.
    correlation : float
        Correlation of features i and j is ``correlation ** |i - j|``; in (-1, 1).
    generator : torch.Generator, int or None
        Draws the coefficients.
    dtype : torch.dtype
        float64 or float32.

    Examples
    --------
    >>> world = logistic(3, generator=0)
    >>> x, y = world.sample(100, 1)
    >>> sorted(set(y.tolist())), world.probability(x).shape
    ([0, 1], torch.Size([100]))
    """
    checks.positive("scale", scale)
    coef, covariance = _truth(n_features, n_informative, correlation, scale, generator, dtype)
    checks.between("intercept", intercept, -math.inf, math.inf)
    return LogisticWorld(coef, covariance, float(intercept))


def _cpu(rng: torch.Generator) -> torch.Generator:
    """Return a CPU generator: this one, or one seeded from it."""
    if rng.device.type == "cpu":
        return rng
    seed = torch.randint(2**62, (1,), generator=rng, device=rng.device)
    return torch.Generator().manual_seed(int(seed))


def _levels(x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma as one number a row."""
    levels = []
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        given = torch.as_tensor(value, dtype=x.dtype, device=x.device)
        if given.ndim > 1 or (given.ndim == 1 and len(given) not in (1, len(x))):
            raise checks.ArgumentError(
                f"{name} has shape {tuple(given.shape)}; allowed: one number, or shape ({len(x)},). "
                "Pass one level a row."
            )
        low = float(given.detach().min())
        if not bool(torch.isfinite(given).all()) or low < 0 or (name == "alpha" and low == 0):
            raise checks.ArgumentError(
                f"{name} has a smallest value of {low:g}; allowed: finite, "
                f"{'above' if name == 'alpha' else 'at or above'} 0. x_t = alpha x_0 + sigma eps."
            )
        levels.append(given.expand(len(x)) if given.ndim == 0 or len(given) == 1 else given)
    return levels[0], levels[1]


def _squared(x: Tensor, alpha: Tensor, points: Tensor) -> Tensor:
    """Return ‖x_i - alpha_i p_j‖², shape (n, m), without holding (n, m, d) numbers.

    The square is expanded, which cancels badly at small noise in float32: done in float64, about the points' mean.
    """
    center = points.double().mean(0)
    p = points.double() - center
    z = x.double() - alpha.double()[:, None] * center
    a = alpha.double()[:, None]
    return (z**2).sum(1, keepdim=True) - 2 * a * (z @ p.mT) + a**2 * (p**2).sum(1)


def _features(covariance: Tensor, n: int, rng: torch.Generator) -> Tensor:
    checks.integer("n", n, low=1)
    draws = randn((n, len(covariance)), generator=rng, like=covariance)
    return draws @ torch.linalg.cholesky(covariance).mT


def _truth(
    n_features: int,
    n_informative: int | None,
    correlation: float,
    scale: float,
    generator: Seed,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Check the arguments that both regressions share; return coefficients and the covariance of the features."""
    d = checks.integer("n_features", n_features, low=1)
    informative = (
        d if n_informative is None else checks.integer("n_informative", n_informative, low=0, high=d)
    )
    checks.between("correlation", correlation, -1, 1, inclusive="neither")
    checks.one_of("dtype", dtype, [torch.float64, torch.float32])
    coef = scale * randn((d,), generator=as_generator(generator), dtype=dtype)
    coef[informative:] = 0
    place = torch.arange(d, dtype=dtype)
    return coef, float(correlation) ** (place[:, None] - place).abs()
