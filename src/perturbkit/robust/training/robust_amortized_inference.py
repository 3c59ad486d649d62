"""Amortised Bayesian inference whose posteriors do not jump when the data are moved a little: a Fisher penalty.

Use it to train a network from simulations that answers a posterior for any observation, to find the small change of an
observation that alters the posterior most, and to make that change matter less. Gloeckler, Deistler and Macke (2023),
Adversarial robustness of amortized Bayesian inference, arXiv:2305.14984.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from perturbkit.core import Ball, Cost, Norm, Oracle, Result, Sphere, checks, row_norm
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, seeded_init, seeds
from perturbkit.robust.training._densities import DENSITIES, check_density, check_dtype, scaling
from perturbkit.robust.training._fisher import (
    Divergence,
    FisherPenalty,
    exact_root,
    fit_density,
    sampled_root,
    steepest_change,
)

__all__ = [
    "AmortizedPosterior",
    "PosteriorAttack",
    "PosteriorRobustness",
    "fisher_information",
    "fisher_trace",
    "posterior_attack",
    "robustness_report",
]

Simulator = Callable[[Tensor, torch.Generator], Tensor]
Prior = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True, eq=False)
class PosteriorAttack(Result):
    """Changes of observations that alter the posterior.

    Attributes
    ----------
    x : Tensor, shape (n, d_x)
        The changed observations, in their own units.
    kl : Tensor, shape (n,)
        Divergence between the posteriors before and after, in nats; estimated, and then perhaps just below zero, where the
        density is not Gaussian.
    radius : Tensor, shape (n,)
        Norm of the change in standard deviations of the simulator.
    norm : str
        That norm.
    cost : Cost
        Divergences evaluated and differentiated, in rows.
    """

    x: Tensor
    kl: Tensor
    radius: Tensor
    norm: str
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True, eq=False)
class PosteriorRobustness(Result):
    """How far posteriors move with the size of a change.

    Attributes
    ----------
    epsilons : Tensor, shape (E,)
        Euclidean sizes, in standard deviations of the simulator.
    attack, noise, predicted : Tensor, shape (E, n)
        Divergence in nats under attack, under random changes of the same size (mean of several), and by the Fisher
        information's largest eigenvalue, ``epsilon^2 lambda / 2``.
    """

    epsilons: Tensor
    attack: Tensor
    noise: Tensor
    predicted: Tensor


class AmortizedPosterior:
    """A network that answers a posterior for any observation, trained on simulations with a penalty on its sensitivity.

    Parameters
    ----------
    simulator : callable (theta, generator) -> x
        Draws observations (n, d_x) for parameters (n, d).
    prior : callable (n, generator) -> theta
        Draws parameters (n, d), floating point.
    density : {"gaussian", "mdn", "maf"} or nn.Module
        What the network answers: a Gaussian of full covariance, a mixture of eight, a masked autoregressive flow of four
        layers; or a module with ``log_prob(theta, x)`` and ``sample(x, n, generator)`` of shape (rows, n, d), and, if it is
        Gaussian, ``moments(x)``: means, and lower triangular factors W of the precisions ``W^T W``. A module is trained in
        place and sees standardised parameters and observations.
    hidden : int
        Units of a hidden layer, at least 1.
    fisher_weight : float
        Factor of the penalty, zero or above; try 0.001 to 1 and keep the largest that costs no held-out log-density.
    estimator : {"exact", "ema"}, optional
        The penalty in closed form, for Gaussians; or from one draw a row, with a moving average of its gradient over the
        steps. By default the first where there is one.
    generator : torch.Generator, int or None
        Source of simulations, first weights and batches, advanced from call to call.

    Attributes
    ----------
    density_ : nn.Module
        The network.
    history_ : TrainingHistory
        Training loss, mean Fisher trace (``reference_loss``, with a penalty) and held-out log-density (``score``), an entry
        an epoch.
    x_mean_, x_std_, theta_mean_, theta_std_ : Tensor
        What observations and parameters are standardised with.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed, or the estimator is used before it is fitted.

    Notes
    -----
    Minimises ``E_{theta, x} [-log q(theta | x)] + weight E_x tr F(x)``, where
    ``F(x) = E_{theta ~ q(.|x)} [s s^T]`` with ``s = grad_x log q(theta | x)``, since the posteriors of x and x + d diverge by
    ``d^T F(x) d / 2`` for small d. The parameters in F come from q itself; those of the simulation would give another matrix.
    Distances are in standard deviations of the simulated observations. Draws whose trace is above ten medians of the batch
    are scaled down to that.

    The posterior of a bounded prior may leave its bounds: pass a map of the parameters that has none.

    Cost: the exact penalty takes a backward pass an output of the network through which one differentiates, the sampled one
    a double backward pass.

    References
    ----------
    Gloeckler, Deistler and Macke (2023), arXiv:2305.14984, sections 3 and 4.

    Examples
    --------
    >>> from perturbkit.core.random import randn
    >>> def prior(n, generator):
    ...     return randn((n, 1), generator=generator)
    >>> def simulator(theta, generator):
    ...     return theta + 0.5 * randn((len(theta), 3), generator=generator)
    >>> q = AmortizedPosterior(simulator, prior, fisher_weight=0.01, generator=0).fit(500, epochs=3)
    >>> q.log_prob(torch.zeros(1, 1), torch.zeros(1, 3)).shape
    torch.Size([1])
    """

    def __init__(
        self, simulator: Simulator, prior: Prior, *,
        density: Literal["gaussian", "mdn", "maf"] | nn.Module = "gaussian", hidden: int = 64,
        fisher_weight: float = 0.0, estimator: Literal["exact", "ema"] | None = None, generator: Seed = None,
    ) -> None:  # fmt: skip
        for name, value in (("simulator", simulator), ("prior", prior)):
            if not callable(value):
                raise checks.ArgumentTypeError(
                    f"{name} is a {type(value).__name__}; allowed: a callable. Pass the function that draws."
                )
        check_density(density)
        closed = density == "gaussian" or hasattr(density, "moments")
        if estimator is not None:
            checks.one_of("estimator", estimator, ("exact", "ema") if closed else ("ema",))
        self.simulator, self.prior, self.density = simulator, prior, density
        self.hidden = checks.integer("hidden", hidden, low=1)
        self.fisher_weight = checks.nonnegative("fisher_weight", fisher_weight)
        self.estimator = estimator or ("exact" if closed else "ema")
        self.generator = as_generator(generator)

    def simulate(self, n: int) -> tuple[Tensor, Tensor]:
        """Draw ``n`` parameters from the prior and an observation for each; return both."""
        checks.integer("n", n, low=1)
        theta = checks.tensor("the prior's answer", self.prior(n, self.generator), shape=(n, None))
        x = self.simulator(theta, self.generator)
        return theta, checks.tensor("the simulator's answer", x, shape=(n, None)).to(theta.device)

    def fit(
        self, simulations: int | tuple[Tensor, Tensor] = 10_000, *, epochs: int = 20, lr: float = 2e-3,
        batch_size: int = 200, validation_fraction: float = 0.1, progress: ProgressLike = False,
    ) -> Self:  # fmt: skip
        """Train on simulations, with Adam at a rate that falls to zero along half a cosine.

        Parameters
        ----------
        simulations : int or (theta, x)
            How many to draw, at least 10; or parameters (n, d) and observations (n, d_x). Where their dtypes differ, the
            wider is computed in.
        epochs, batch_size : int
            At least 1.
        lr : float
            Rate, above zero.
        validation_fraction : float
            Share of the simulations held out, in (0, 1).
        progress : Progress, bool or None
            Reports epochs.
        """
        checks.integer("epochs", epochs, low=1)
        checks.integer("batch_size", batch_size, low=1)
        checks.positive("lr", lr)
        checks.between("validation_fraction", validation_fraction, 0, 1, inclusive="neither")
        if isinstance(simulations, tuple):
            checks.integer("the number of tensors in simulations", len(simulations), low=2, high=2)
            theta = checks.tensor("theta", simulations[0], ndim=2)
            x = checks.tensor("x", simulations[1], shape=(len(theta), None))
            checks.integer("the number of simulations", len(theta), low=10)
        else:
            theta, x = self.simulate(checks.integer("simulations", simulations, low=10))
        dtype = torch.promote_types(theta.dtype, x.dtype)
        theta, x = theta.detach().to(dtype), x.detach().to(dtype)
        held = max(1, int(validation_fraction * len(x)))
        (self.x_mean_, self.x_std_), (self.theta_mean_, self.theta_std_) = scaling(x), scaling(theta)
        z, t = (x - self.x_mean_) / self.x_std_, (theta - self.theta_mean_) / self.theta_std_
        if isinstance(self.density, nn.Module):
            self.density_: Any = self.density
        else:
            with seeded_init(seeds(self.generator, 1)[0]):
                self.density_ = DENSITIES[self.density](x.shape[1], theta.shape[1], self.hidden).to(theta)
        penalty = FisherPenalty(self.density_, self.fisher_weight, self.estimator == "exact", self.generator)
        units = float(self.theta_std_.log().sum())
        self.history_ = fit_density(
            self.density_, t, z, held, penalty, epochs, lr, batch_size, units, self.generator, progress
        )
        return self

    def log_prob(self, theta: Tensor, x: Tensor) -> Tensor:
        """Return the posterior's log-density at parameters (n, d) given observations (n, d_x), shape (n,)."""
        z = self._standardised(x)
        checks.tensor("theta", theta, shape=(len(x), len(self.theta_mean_)))
        check_dtype("theta", theta, self.theta_mean_)
        with Oracle(self.density_).frozen(), torch.no_grad():
            inner = self.density_.log_prob((theta - self.theta_mean_) / self.theta_std_, z)
        return inner - self.theta_std_.log().sum()

    def sample(self, x: Tensor, n_samples: int = 1000, *, generator: Seed = None) -> Tensor:
        """Draw parameters of shape (rows, n_samples, d) from the posteriors of observations (rows, d_x)."""
        z = self._standardised(x)
        checks.integer("n_samples", n_samples, low=1)
        with Oracle(self.density_).frozen(), torch.no_grad():
            drawn = self.density_.sample(z, n_samples, as_generator(generator))
        return self.theta_mean_ + self.theta_std_ * drawn

    def _standardised(self, x: Tensor) -> Tensor:
        if not hasattr(self, "density_"):
            raise checks.ArgumentError(
                "the estimator is not fitted; allowed: after fit. Call fit(n_simulations) first."
            )
        check_dtype("x", checks.tensor("x", x, shape=(None, len(self.x_mean_))), self.x_mean_)
        return (x.detach() - self.x_mean_) / self.x_std_


def fisher_information(
    model: AmortizedPosterior, x: Tensor, *,
    n_samples: int = 100, exact: bool | None = None, generator: Seed = None,
) -> Tensor:  # fmt: skip
    """Return the Fisher information of the posterior in the observation.

    Parameters
    ----------
    model : AmortizedPosterior
        Fitted.
    x : Tensor, shape (n, d_x)
        Observations.
    n_samples : int
        Draws a row, where it is estimated.
    exact : bool, optional
        Closed form, for Gaussian densities, or an estimate; by default the first where there is one.
    generator : torch.Generator, int or None
        Source of the draws.

    Returns
    -------
    Tensor, shape (n, d_x, d_x)
        In units of the simulator's standard deviations.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a shape or option is not allowed, or the model is not fitted.

    Notes
    -----
    ``F = E_{theta ~ q} [s s^T]``. For a Gaussian of mean m and precision ``W^T W``,
    ``F_ij = (W dm_i)^T (W dm_j) + tr(S_i S_j) / 2`` with ``S_i = B_i + B_i^T, B_i = dW_i W^{-1}``. Its top eigenvector is the
    direction in which the posterior moves most, to first order.

    Cost: a gradient a row and output of the network, or a row and draw.

    References
    ----------
    Gloeckler, Deistler and Macke (2023), arXiv:2305.14984, section 4.

    Examples
    --------
    >>> from perturbkit.core.random import randn
    >>> q = AmortizedPosterior(
    ...     lambda t, g: t + randn(t.shape, generator=g), lambda n, g: randn((n, 2), generator=g), generator=0
    ... ).fit(100, epochs=1)
    >>> fisher_information(q, torch.zeros(5, 2)).shape
    torch.Size([5, 2, 2])
    """
    root = _root(model, x, n_samples, exact, generator)
    return root.mT @ root


def fisher_trace(
    model: AmortizedPosterior, x: Tensor, *,
    n_samples: int = 1, exact: bool | None = None, generator: Seed = None,
) -> Tensor:  # fmt: skip
    """Return the trace of the Fisher information: twice the mean divergence that unit white noise causes, to second order.

    Parameters
    ----------
    model, x, n_samples, exact, generator
        As in :func:`fisher_information`.

    Returns
    -------
    Tensor, shape (n,)

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a shape or option is not allowed, or the model is not fitted.

    Notes
    -----
    ``tr F = E_{theta ~ q} ||grad_x log q(theta | x)||^2``; the matrix is not formed.

    References
    ----------
    Gloeckler, Deistler and Macke (2023), arXiv:2305.14984, section 4.

    Examples
    --------
    >>> from perturbkit.core.random import randn
    >>> q = AmortizedPosterior(
    ...     lambda t, g: t + randn(t.shape, generator=g), lambda n, g: randn((n, 2), generator=g), generator=0
    ... ).fit(100, epochs=1)
    >>> bool((fisher_trace(q, torch.zeros(5, 2)) > 0).all())
    True
    """
    return _root(model, x, n_samples, exact, generator).square().sum((1, 2))


def posterior_attack(
    model: AmortizedPosterior, x: Tensor, epsilon: float, *, norm: Norm = "l2",
    direction: Literal["forward", "reverse"] = "forward", n_steps: int = 200, n_restarts: int = 5,
    n_samples: int = 100, generator: Seed = None, progress: ProgressLike = False,
) -> PosteriorAttack:  # fmt: skip
    """Find the change of each observation, within a ball, that alters its posterior most.

    Parameters
    ----------
    model : AmortizedPosterior
        Fitted.
    x : Tensor, shape (n, d_x)
        Observations.
    epsilon : float
        Radius in standard deviations of the simulator, zero or above.
    norm : {"l2", "linf", "l1"}
        Of the ball.
    direction : {"forward", "reverse"}
        ``KL(q(.|x) || q(.|x + d))``, or ``KL(q(.|x + d) || q(.|x))``.
    n_steps, n_restarts : int
        Steps of a start, and starts, at least 1. The first two are the top eigenvector of the Fisher information and its
        negative.
    n_samples : int
        Draws for the divergence of densities that are not Gaussian, at least 1, or 2 in the reverse direction; ten times as
        many to compare starts, and as many again, new ones, for the divergence returned.
    generator : torch.Generator, int or None
        Source of starts and draws.
    progress : Progress, bool or None
        Reports steps.

    Returns
    -------
    PosteriorAttack

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a shape or option is not allowed, or the model is not fitted.
    ModelError
        If the Fisher information overflows, far from all simulations.

    Notes
    -----
    Projected gradient ascent, ``d <- P(d + argmax_{|v| <= s} <grad KL, v>)``, s falling from half the radius along half a
    cosine. The divergence is in closed form for Gaussians and a mean of log-ratios over draws otherwise, whose gradient in
    the reverse direction is ``E_q [(log-ratio - mean) grad log q]``. A row whose search finds nothing keeps its observation.

    Cost: a gradient a row, step and start, for the closed form; otherwise one a draw besides, and each draw is drawn and has
    its density under the observation evaluated, which ``cost`` leaves out.

    References
    ----------
    Gloeckler, Deistler and Macke (2023), arXiv:2305.14984, section 3.

    Examples
    --------
    >>> from perturbkit.core.random import randn
    >>> q = AmortizedPosterior(
    ...     lambda t, g: t + randn(t.shape, generator=g), lambda n, g: randn((n, 2), generator=g), generator=0
    ... ).fit(100, epochs=1)
    >>> found = posterior_attack(q, torch.zeros(3, 2), 0.5, n_steps=5, generator=0)
    >>> bool((found.kl > 0).all()), bool((found.radius <= 0.5 + 1e-6).all())
    (True, True)
    """
    z = _inputs(model, x)
    ball = Ball(checks.one_of("norm", norm, ("l1", "l2", "linf")), checks.nonnegative("epsilon", epsilon))
    checks.one_of("direction", direction, ("forward", "reverse"))
    for name, value in (("n_steps", n_steps), ("n_restarts", n_restarts), ("n_samples", n_samples)):
        checks.integer(name, value, low=1)
    g = as_generator(generator)
    divergence = Divergence(model.density_, z, direction == "reverse", n_samples, g)
    if direction == "reverse" and not divergence.closed:
        checks.integer("n_samples in the reverse direction", n_samples, low=2)
    leading = _leading(model, x, g)[1]
    best, kl = steepest_change(divergence, ball, leading, n_steps, n_restarts, g, progress)
    return PosteriorAttack(
        x.detach() + model.x_std_ * best, kl, row_norm(best, norm), norm, divergence.oracle.cost
    )


def robustness_report(
    model: AmortizedPosterior, x: Tensor, epsilons: Sequence[float], *,
    n_draws: int = 20, generator: Seed = None, **options: Any,
) -> PosteriorRobustness:  # fmt: skip
    """Compare attacks of several sizes with random changes of the same sizes and with the second-order prediction.

    Parameters
    ----------
    model : AmortizedPosterior
        Fitted.
    x : Tensor, shape (n, d_x)
        Observations.
    epsilons : sequence of float
        Euclidean sizes in standard deviations of the simulator, above zero.
    n_draws : int
        Random changes a row, at least 1.
    generator : torch.Generator, int or None
        Source of everything.
    **options
        Those of :func:`posterior_attack`, without ``norm``.

    Returns
    -------
    PosteriorRobustness

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a shape or option is not allowed, or the model is not fitted.
    ModelError
        If the Fisher information overflows, far from all simulations.

    Notes
    -----
    To second order an attack is ``lambda_max d_x / tr F`` times as strong as a random change of its size.

    References
    ----------
    Gloeckler, Deistler and Macke (2023), arXiv:2305.14984, section 5.

    Examples
    --------
    >>> from perturbkit.core.random import randn
    >>> q = AmortizedPosterior(
    ...     lambda t, g: t + randn(t.shape, generator=g), lambda n, g: randn((n, 2), generator=g), generator=0
    ... ).fit(100, epochs=1)
    >>> robustness_report(q, torch.zeros(3, 2), [0.1, 0.5], n_steps=5, generator=0).attack.shape
    torch.Size([2, 3])
    """
    z = _inputs(model, x)
    sizes = [checks.positive("epsilons", e) for e in checks.array("epsilons", epsilons, ndim=1)]
    checks.integer("n_draws", n_draws, low=1)
    if "norm" in options:
        raise checks.ArgumentError(
            f"norm is {options['norm']!r}; allowed: none, since sizes are Euclidean. Call posterior_attack for other norms."
        )
    g = as_generator(generator)
    top = _leading(model, x, g)[0]
    divergence = Divergence(
        model.density_, z, options.get("direction") == "reverse", options.get("n_samples", 100), g
    )
    attacks, noises = [], []
    for size in sizes:
        attacks.append(posterior_attack(model, x, size, generator=g, **options).kl)
        with divergence.oracle.frozen():
            random = [divergence.value(Sphere(size).sample(z, generator=g)) for _ in range(n_draws)]
        noises.append(torch.stack(random).mean(0))
    grid = torch.tensor(sizes, dtype=z.dtype, device=z.device)
    predicted = 0.5 * grid[:, None].square() * top
    return PosteriorRobustness(grid, torch.stack(attacks), torch.stack(noises), predicted)


def _root(
    model: AmortizedPosterior, x: Tensor, n_samples: int, exact: bool | None, generator: Seed
) -> Tensor:
    """Return R (n, m, d_x) with F = R^T R, without a graph."""
    z = _inputs(model, x)
    checks.integer("n_samples", n_samples, low=1)
    closed = hasattr(model.density_, "moments")
    checks.one_of("exact", exact, (None, False, True) if closed else (None, False))
    with Oracle(model.density_).frozen():
        if closed and exact is not False:
            return exact_root(model.density_, z, graph=False).detach()
        return sampled_root(model.density_, z, n_samples, as_generator(generator), graph=False)


def _leading(model: AmortizedPosterior, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalue of the information and its eigenvector, a row."""
    information = fisher_information(model, x, generator=generator)
    lost = ~information.flatten(1).isfinite().all(1)
    if bool(lost.any()):
        raise checks.ModelError(
            f"the posterior's information overflows in {int(lost.sum())} of {len(x)} rows; allowed: observations that look like "
            "simulated ones. Leave out those that are many standard deviations away."
        )
    values, vectors = torch.linalg.eigh(information)
    return values[:, -1], vectors[:, :, -1]


def _inputs(model: AmortizedPosterior, x: Tensor) -> Tensor:
    if not isinstance(model, AmortizedPosterior):
        raise checks.ArgumentTypeError(
            f"model is a {type(model).__name__}; allowed: an AmortizedPosterior. Fit one, of your own density if need be."
        )
    return model._standardised(x)
