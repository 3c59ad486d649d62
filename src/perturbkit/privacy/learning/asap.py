"""ASAP: a posterior sample as a private model, with noise that makes up for an approximate sampler.

Use it for small strongly convex problems under pure or Gaussian differential privacy, without a failure probability
delta. Lin, Ma, Wang, Redberg and Bu (2023), Tractable MCMC for Private Learning with Pure and Gaussian Differential
Privacy, arXiv:2310.14661.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.special import gammaincinv, gammaln
from torch import Tensor

from perturbkit.core import Result, checks
from perturbkit.core.random import Seed
from perturbkit.privacy._noise import Noise
from perturbkit.privacy.learning import _parts
from perturbkit.privacy.learning._parts import LogDensity

__all__ = [
    "ApproximateSamplePerturbation",
    "PrivateSample",
    "constrained_mala",
    "private_posterior_erm",
    "required_tv",
    "tv_to_w_inf",
]

# Chance that the ball of the localisation misses the minimiser; it costs accuracy only.
_MISS = 1e-3


@dataclass(frozen=True, eq=False)
class PrivateSample(Result):
    """A private sample and what is known of it.

    Attributes
    ----------
    theta : Tensor, shape (d,)
        The sample.
    w_inf : float
        Bound on the distance of the sampler's draw from an exact one, coupled; the noise is in proportion to it.
    epsilon : float or None
        Pure privacy of the whole, or None under Gaussian privacy.
    gdp_mu : float or None
        Gaussian privacy of the whole, or None under pure privacy.
    certified : bool
        Whether the bound on the sampler's error is proved. If not, the guarantee rests on the chain having mixed.
    steps : int
        Steps of the chain, or proposals of the rejection sampler.
    center : Tensor or None, shape (d,)
        Centre of the ball, itself private, where the problem was localised.
    radius : float
        Radius of the ball.
    """

    theta: Tensor
    w_inf: float
    epsilon: float | None
    gdp_mu: float | None
    certified: bool
    steps: int
    center: Tensor | None
    radius: float


class ApproximateSamplePerturbation:
    r"""Perturb a sample within W-infinity distance of a private one, so that the whole is private.

    Parameters
    ----------
    epsilon : float, optional
        Pure privacy of the whole, above 0; exactly one of the two.
    gdp_mu : float, optional
        Gaussian privacy of the whole, above 0.
    share : float
        Part of the budget (of epsilon, or of the square of mu) for the perturbation, in (0, 1); the rest is for the
        exact sample.

    Attributes
    ----------
    sample_budget : float
        Privacy that the exact sample must have (epsilon or mu).
    noise_budget : float
        Privacy of the perturbation.

    Notes
    -----
    If the sampler's law is within :math:`W_\infty \leq \Delta` of the law of a private sample on each of two
    neighbouring data sets, the draws can be coupled at distance :math:`\Delta`, so noise for a sensitivity of
    :math:`2\Delta` hides the difference: density :math:`\propto e^{-\epsilon' \|z\| / 2\Delta}` (pure, epsilons add up) or
    :math:`N(0, (2\Delta/\mu')^2 I)` (Gaussian, squares of mu add up). Noise is drawn in float64.

    References
    ----------
    Lin et al. (2023), arXiv:2310.14661.

    Examples
    --------
    >>> asap = ApproximateSamplePerturbation(epsilon=1.0, share=0.25)
    >>> asap.sample_budget, asap.noise_budget
    (0.75, 0.25)
    """

    def __init__(self, epsilon: float | None = None, gdp_mu: float | None = None, share: float = 0.5) -> None:
        self.total = _one_budget(epsilon, gdp_mu)
        self.pure = gdp_mu is None
        checks.between("share", share, 0, 1, inclusive="neither")
        if self.pure:
            self.noise_budget, self.sample_budget = share * self.total, (1 - share) * self.total
        else:
            self.noise_budget = math.sqrt(share) * self.total
            self.sample_budget = math.sqrt(1 - share) * self.total

    def perturb(self, theta: Tensor, w_inf: float, *, generator: Seed = None) -> Tensor:
        """Add the noise for a sample that is within ``w_inf`` of a private one; none for 0."""
        checks.tensor("theta", theta, ndim=1)
        checks.nonnegative("w_inf", w_inf)
        if w_inf == 0:
            return theta.clone()
        noise = _parts.radial(Noise(generator), len(theta), 2 * w_inf / self.noise_budget, self.pure)
        return theta + torch.from_numpy(noise).to(theta)

    def sample(
        self,
        log_density: LogDensity,
        center: Tensor,
        radius: float,
        *,
        w_inf: float,
        step: float,
        n_steps: int,
        generator: Seed = None,
    ) -> PrivateSample:
        """Run :func:`constrained_mala` and perturb its last state.

        Parameters
        ----------
        log_density : callable
            As in :func:`constrained_mala`; an exact draw from it must have privacy ``sample_budget``.
        center, radius, step, n_steps
            As in :func:`constrained_mala`.
        w_inf : float
            Distance that the chain is held to have reached, at least 0: :func:`tv_to_w_inf` of its error.
        generator : torch.Generator, int or None
            Source of chain and noise; ``None``: the secure source of the operating system.

        Returns
        -------
        PrivateSample
            Never ``certified``: the error of the chain is the caller's word.
        """
        source = _parts.shared(generator)
        theta = constrained_mala(log_density, center, radius, step=step, n_steps=n_steps, generator=source)[0]
        theta = self.perturb(theta, w_inf, generator=source)
        return PrivateSample(
            theta, float(w_inf), self.total if self.pure else None, None if self.pure else self.total, False, n_steps,
            center, float(radius),
        )  # fmt: skip


def private_posterior_erm(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    X: Tensor,
    y: Tensor,
    *,
    lipschitz: float,
    strong_convexity: float,
    smoothness: float,
    epsilon: float | None = None,
    gdp_mu: float | None = None,
    sampler: Literal["rejection", "mala"] = "rejection",
    curvature: Callable[[Tensor, float], Tensor] | None = None,
    w_inf: float | None = None,
    max_proposals: int = 10**6,
    generator: Seed = None,
) -> PrivateSample:
    r"""Minimise a strongly convex sum of losses privately: output perturbation to find a ball, then a posterior sample.

    Parameters
    ----------
    loss : callable
        ``loss(w, x, y)`` of one row, a scalar, convex in w, differentiable by ``torch.func``.
    X : Tensor, shape (n, d)
        Rows, floating point.
    y : Tensor, shape (n,)
        Targets.
    lipschitz : float
        Constant G of a row's loss in w, for every row that could occur; the guarantee rests on it.
    strong_convexity : float
        lambda of the penalty ``lambda/2 |w|^2`` that is added to the SUM of losses, above 0; public.
    smoothness : float
        Bound on the largest eigenvalue of the Hessian of the sum with the penalty.
    epsilon, gdp_mu : float, optional
        Pure or Gaussian privacy of the whole, for one row added or removed; exactly one of them.
    sampler : {"rejection", "mala"}
        "rejection": exact, hence certified and without further noise; needs a good ``curvature`` beyond a few dimensions.
        "mala": a chain whose length follows from the known order of its mixing time with a constant that is not proved.
    curvature : callable, optional
        ``curvature(center, radius)`` returns a (d, d) matrix that the Hessian of the sum with the penalty dominates
        everywhere in that ball. Default: lambda times the identity.
    w_inf : float, optional
        Distance at which "mala" stops, default 1/n^2 times the radius.
    max_proposals : int
        After so many the rejection sampler gives up.
    generator : torch.Generator, int or None
        Source of all randomness; ``None``: the secure source of the operating system.

    Returns
    -------
    PrivateSample

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an input or option is not allowed.
    ModelError
        If the minimiser is not found to 1e-8 G, or no proposal is accepted.

    Notes
    -----
    Half of the budget finds a ball: the minimiser moves by at most G/lambda when a row comes or goes, and is released with
    noise; R is the noise's 0.999 quantile. The rest is a draw from :math:`e^{-\gamma F}` on that ball, with
    :math:`\gamma = \epsilon / 2GR` (pure) or :math:`\gamma = \lambda \mu^2 / G^2` (Gaussian). The excess of the sum is of order
    :math:`G^2 d^2 / \lambda\epsilon^2`, less than that of output perturbation by the mean curvature over lambda. The
    time taken depends on the data and should not be visible to an adversary. Cost: a Newton iteration, then one
    evaluation of all rows a proposal or two a step.

    References
    ----------
    Lin et al. (2023), arXiv:2310.14661. Dwivedi et al. (2018), arXiv:1801.02309 (mixing of MALA).

    Examples
    --------
    >>> X = torch.linspace(-1, 1, 400, dtype=torch.float64)[:, None]
    >>> found = private_posterior_erm(
    ...     lambda w, x, y: torch.nn.functional.softplus(-y * (x @ w)), X, X[:, 0].sign(), lipschitz=1.0,
    ...     strong_convexity=10.0, smoothness=110.0, epsilon=2.0, generator=0)
    >>> found.certified, found.w_inf, bool(found.theta > 1)
    (True, 0.0, True)
    """
    checks.tensor("X", X, ndim=2)
    checks.tensor("y", y, shape=(len(X),), floating=False)
    total, pure = _one_budget(epsilon, gdp_mu), gdp_mu is None
    g, lam = checks.positive("lipschitz", lipschitz), checks.positive("strong_convexity", strong_convexity)
    checks.between("smoothness", smoothness, lam, math.inf)
    checks.one_of("sampler", sampler, ("rejection", "mala"))
    checks.integer("max_proposals", max_proposals, low=1)
    # The secure noise is made on the CPU, and so is everything that it meets; the answer goes back to X's device.
    data, targets = X.double().cpu(), (y.double() if y.is_floating_point() else y).cpu()
    d = X.shape[1]
    rows = torch.func.vmap(torch.func.vmap(loss, in_dims=(None, 0, 0)), in_dims=(0, None, None))

    def objective(w: Tensor) -> Tensor:
        """Sum of losses with the penalty, for each row of w."""
        return rows(w, data, targets).sum(1) + lam / 2 * w.square().sum(1)

    source = _parts.shared(generator)
    noise = Noise(source)
    local = total / 2 if pure else total / math.sqrt(2)
    # The gradient left at the minimiser found moves it by at most 1e-8 G / lambda on either data set.
    sensitivity = g / lam * (1 + 2e-8)
    best = _parts.newton(objective, torch.zeros(d, dtype=torch.float64), 1e-8 * g)
    scale = sensitivity / local
    center = best + torch.from_numpy(_parts.radial(noise, d, scale, pure))
    quantile = gammaincinv(d, 1 - _MISS) if pure else math.sqrt(2 * gammaincinv(d / 2, 1 - _MISS))
    radius = float(scale * quantile)
    asap = ApproximateSamplePerturbation(*((local, None) if pure else (None, local)))
    budget = local if sampler == "rejection" else asap.sample_budget
    gamma = budget / (2 * g * radius) if pure else lam * budget**2 / g**2
    if sampler == "rejection":
        floor = lam * torch.eye(d, dtype=torch.float64) if curvature is None else curvature(center, radius)
        checks.tensor("curvature(center, radius)", floor, shape=(d, d))
        theta, steps = _parts.rejection(
            objective, gamma, floor.double(), best, center, radius, noise, max_proposals
        )
        reached = 0.0
    else:
        reached = radius / len(X) ** 2 if w_inf is None else checks.positive("w_inf", w_inf)
        spread = float((center - best).norm()) + radius
        # On the ball F exceeds its least value by at most L/2 times the squared distance to the minimiser.
        log_floor = -gamma * smoothness / 2 * spread**2 - d / 2 * math.log(2 * math.pi / (gamma * lam))
        log_tv = _log_tv(math.log(reached), log_floor, d)
        kappa = smoothness / lam
        steps = math.ceil(2 * kappa * math.sqrt(d) * (-log_tv + d / 2 * math.log(kappa) + 1))
        theta = constrained_mala(
            lambda w: -gamma * objective(w), center, radius, step=1 / (gamma * smoothness * math.sqrt(d)),
            n_steps=steps, generator=source,
        )[0]  # fmt: skip
        theta = asap.perturb(theta, reached, generator=source)
    return PrivateSample(
        theta.to(X), reached, total if pure else None, None if pure else total, sampler == "rejection", steps,
        center.to(X), radius,
    )  # fmt: skip


def constrained_mala(
    log_density: LogDensity,
    center: Tensor,
    radius: float,
    *,
    step: float,
    n_steps: int,
    n_chains: int = 1,
    initial: Tensor | None = None,
    generator: Seed = None,
) -> Tensor:
    r"""Sample from a density on a ball by the Metropolis-adjusted Langevin algorithm; moves outside are rejected.

    Parameters
    ----------
    log_density : callable
        Takes (n, d), returns (n,), up to a constant; differentiable.
    center : Tensor, shape (d,)
        Centre of the ball.
    radius : float
        Above 0.
    step : float
        h, above 0; about one over the smoothness and the root of d.
    n_steps : int
        At least 1.
    n_chains : int
        Independent chains, run together.
    initial : Tensor, shape (n_chains, d), optional
        Start inside the ball; the centre by default.
    generator : torch.Generator, int or None
        Source of randomness; ``None``: the secure source of the operating system.

    Returns
    -------
    Tensor, shape (n_chains, d)
        The last states.

    Notes
    -----
    Proposal :math:`x + h \nabla \log p(x) + \sqrt{2h}\, \xi`, accepted with the Metropolis ratio. Cost: one gradient a step
    and chain.

    References
    ----------
    Roberts and Tweedie (1996), Bernoulli 2(4). Lin et al. (2023), arXiv:2310.14661.

    Examples
    --------
    >>> found = constrained_mala(
    ...     lambda x: -x.square().sum(1) / 2, torch.zeros(2), 1.0, step=0.3, n_steps=20, n_chains=5, generator=0)
    >>> bool((found.norm(dim=1) <= 1).all())
    True
    """
    checks.tensor("center", center, ndim=1)
    checks.positive("radius", radius)
    checks.positive("step", step)
    checks.integer("n_steps", n_steps, low=1)
    checks.integer("n_chains", n_chains, low=1)
    noise = Noise(generator)
    d = len(center)
    x = center.expand(n_chains, d).clone() if initial is None else initial.clone()
    checks.tensor("initial", x, shape=(n_chains, d))
    value, slope = _parts.value_and_gradient(log_density, x)
    for _ in range(n_steps):
        xi = torch.from_numpy(noise.normal((n_chains, d))).to(x)
        new = x + step * slope + math.sqrt(2 * step) * xi
        inside = (new - center).norm(dim=1) <= radius
        new_value, new_slope = _parts.value_and_gradient(log_density, torch.where(inside[:, None], new, x))
        back = (x - new - step * new_slope).square().sum(1) / (4 * step)
        log_ratio = new_value - value - back + xi.square().sum(1) / 2
        u = torch.from_numpy(np.log(noise.uniform((n_chains,)))).to(x)
        moved = inside & (u < log_ratio)
        x = torch.where(moved[:, None], new, x)
        value, slope = torch.where(moved, new_value, value), torch.where(moved[:, None], new_slope, slope)
    return x


def tv_to_w_inf(tv: float, density_floor: float, dim: int) -> float:
    r"""Bound the W-infinity distance to a density on a convex body by the distance in total variation.

    Parameters
    ----------
    tv : float
        Total variation distance, in [0, 1].
    density_floor : float
        Least value of the reference density on the body, above 0.
    dim : int
        Dimension, at least 1.

    Returns
    -------
    float
        Delta; meaningful while it is below four times the radius of a ball in the body.

    Notes
    -----
    :math:`W_\infty \leq \Delta` if every set A has :math:`P(A) \leq Q(A^\Delta)`. Unless :math:`A^\Delta` is everything, the part of
    the body between A and :math:`A^\Delta` holds a ball of radius :math:`\Delta/4`, of mass at least
    :math:`p_{\min} V_d (\Delta/4)^d`, so the tv that makes these equal is enough.

    References
    ----------
    Lin et al. (2023), arXiv:2310.14661, the lemma with its constant derived anew.

    Examples
    --------
    >>> tv_to_w_inf(0.0, 0.5, 3), tv_to_w_inf(0.05, 0.5, 1)
    (0.0, 0.2)
    """
    checks.between("tv", tv, 0, 1)
    checks.positive("density_floor", density_floor)
    checks.integer("dim", dim, low=1)
    if tv == 0:
        return 0.0
    return 4 * math.exp((math.log(tv) - math.log(density_floor) - _log_ball(dim)) / dim)


def required_tv(w_inf: float, density_floor: float, dim: int) -> float:
    """Return the total variation distance that ensures a W-infinity distance; the inverse of :func:`tv_to_w_inf`.

    Parameters
    ----------
    w_inf : float
        Above 0.
    density_floor : float
        Least value of the reference density, above 0.
    dim : int
        Dimension, at least 1.

    Returns
    -------
    float
        At most 1.

    Notes
    -----
    ``density_floor * V_d * (w_inf / 4)**d``.

    Examples
    --------
    >>> round(required_tv(0.2, 0.5, 1), 12)
    0.05
    """
    checks.positive("w_inf", w_inf)
    checks.positive("density_floor", density_floor)
    checks.integer("dim", dim, low=1)
    return min(math.exp(_log_tv(math.log(w_inf), math.log(density_floor), dim)), 1.0)


def _one_budget(epsilon: float | None, gdp_mu: float | None) -> float:
    if (epsilon is None) == (gdp_mu is None):
        raise checks.ArgumentError(
            f"epsilon is {epsilon} and gdp_mu is {gdp_mu}; allowed: exactly one of them. Choose pure or Gaussian privacy."
        )
    if epsilon is not None:
        return checks.positive("epsilon", epsilon)
    assert gdp_mu is not None
    return checks.positive("gdp_mu", gdp_mu)


def _log_ball(d: int) -> float:
    """Log volume of the unit ball."""
    return d / 2 * math.log(math.pi) - float(gammaln(d / 2 + 1))


def _log_tv(log_w_inf: float, log_floor: float, d: int) -> float:
    return log_floor + _log_ball(d) + d * (log_w_inf - math.log(4))
