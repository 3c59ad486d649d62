"""Optimise what a sampler draws while it draws: one loop for sampling and for its parameters.

Use it to tune the parameters of a sampler for a cost of its samples, where sampling to convergence before every gradient
step is too dear. Marion, Korba, Bartlett, Blondel, De Bortoli, Doucet, Llinares-Lopez, Paquette and Berthet (2024),
Implicit Diffusion: Efficient Optimization through Stochastic Sampling, arXiv:2402.05468.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from perturbkit.core import Cost, Denoiser, Result, checks
from perturbkit.core.random import Seed, as_generator, randn
from perturbkit.core.sampling import Path, check_start, weighted

__all__ = ["ImplicitDenoising", "ImplicitDiffusion", "ImplicitDiffusionResult"]

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class ImplicitDiffusionResult(Result):
    """What a single loop reached.

    Attributes
    ----------
    params : list of Tensor
        The parameters after the last step.
    particles : Tensor, shape (n, ...)
        The samples at the end.
    history : Tensor, shape (iterations,)
        The mean cost of the samples seen in each iteration (NaN where there were none, or the cost is a likelihood).
    cost : Cost
        Rows evaluated and differentiated by this call of ``run``.
    """

    params: list[Tensor]
    particles: Tensor
    history: Tensor
    cost: Cost = field(default_factory=Cost)


class ImplicitDiffusion:
    """Single loop for Langevin sampling: the particles and the parameters move by one step each.

    Parameters
    ----------
    potential : callable
        ``V(x, *params)``, shape (n,), for x of shape (n, ...): minus the log-density, up to a constant.
    params : Tensor or sequence of Tensor
        Where to start; copied.
    objective : callable or Tensor
        A cost ``R(x)`` of shape (n,) whose mean under the density is minimised; or data, shape (m, ...), whose likelihood is
        maximised.
    particles : Tensor, shape (n, ...)
        Where the samples start, at least 2.
    step : float
        Step of the Langevin dynamics, above zero.
    lr : float
        Step of the parameters; small against ``step``, so that the particles stay near their density. 0 samples only.
    optimizer : callable, optional
        Takes the list of parameters and returns a torch optimizer, in place of gradient descent with ``lr``.
    generator : torch.Generator, int or None
        Source of the Langevin noise.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``X' = X - step grad_x V(X, theta) + sqrt(2 step) xi`` and ``theta' = theta - lr G``. For ``F = E[R]`` the implicit
    derivative is ``G = -Cov(R, grad_theta V)``, estimated over the particles without bias; for the likelihood of data
    ``G = E_data[grad_theta V] - E[grad_theta V]``, which is persistent contrastive divergence.

    Cost: one evaluation of V and two products with its derivatives an iteration and particle.

    References
    ----------
    Marion et al. (2024), arXiv:2402.05468.

    Examples
    --------
    >>> start = torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    >>> loop = ImplicitDiffusion(
    ...     lambda x, m: 0.5 * (x - m).square().sum(1), torch.zeros(1), lambda x: (x - 2).square().sum(1), start,
    ...     step=0.1, lr=0.02, generator=1,
    ... )
    >>> round(float(loop.run(400).params[0]), 1)
    2.0
    """

    def __init__(
        self,
        potential: Callable[..., Tensor],
        params: Tensor | Sequence[Tensor],
        objective: Objective | Tensor,
        particles: Tensor,
        *,
        step: float = 0.05,
        lr: float = 0.01,
        optimizer: Optimizer | None = None,
        generator: Seed = None,
    ) -> None:
        checks.tensor("particles", particles)
        if len(particles) < 2:
            raise checks.ArgumentError(
                f"particles has {len(particles)} rows; allowed: at least 2, for a covariance. Pass a few hundred."
            )
        self.potential = potential
        self.params = _copied(params)
        self.particles = particles.detach().clone()
        self.step = checks.positive("step", step)
        self._objective = objective
        if isinstance(objective, Tensor):
            checks.tensor("objective", objective, shape=(None, *particles.shape[1:]))
        self._optimizer = _optimizer(self.params, lr, optimizer)
        self._generator = as_generator(generator)

    def run(self, n_iter: int) -> ImplicitDiffusionResult:
        """Go on for some iterations, from where the last run ended.

        Parameters
        ----------
        n_iter : int
            Iterations, at least 1.

        Returns
        -------
        ImplicitDiffusionResult

        Raises
        ------
        ArgumentError
            If ``n_iter`` is not allowed or the potential answers in another shape.
        """
        n = checks.integer("n_iter", n_iter, low=1)
        cost, history = Cost(), []
        for _ in range(n):
            drift, gradients, mean, spent = self._slopes()
            noise = randn(self.particles.shape, generator=self._generator, like=self.particles)
            self.particles = weighted(
                (1.0, self.particles), (-self.step, drift), ((2 * self.step) ** 0.5, noise)
            )
            _take(self._optimizer, self.params, gradients)
            history.append(mean)
            cost = cost + spent
        return ImplicitDiffusionResult(
            [p.detach().clone() for p in self.params], self.particles.clone(), torch.stack(history), cost
        )

    def _slopes(self) -> tuple[Tensor, list[Tensor], Tensor, Cost]:
        x = self.particles.requires_grad_()
        n = len(x)
        energy = _per_row("potential", self.potential(x, *self.params), x)
        (drift,) = torch.autograd.grad(energy.sum(), x, retain_graph=True)
        self.particles = x.detach()
        cost = Cost(nfev=n, ngrad=2 * n)
        if isinstance(self._objective, Tensor):
            data = _per_row("potential", self.potential(self._objective, *self.params), self._objective)
            total, mean = data.mean() - energy.mean(), energy.new_tensor(torch.nan)
            cost = cost + Cost(nfev=len(data), ngrad=len(data))
        else:
            with torch.no_grad():
                reward = _per_row("objective", self._objective(self.particles), x)
            mean = reward.mean()
            # The covariance with dV/dtheta is the derivative of V weighted by the centred cost.
            total = -(energy * (reward - mean)).sum() / (n - 1)
        gradients = torch.autograd.grad(total, self.params, materialize_grads=True)
        return drift, list(gradients), mean, cost


class ImplicitDenoising:
    """Single loop for denoising diffusion: queues hold a batch at every step, and each call moves them all.

    Parameters
    ----------
    denoiser : Denoiser
        The network with its schedule; answers for one time a row.
    params : sequence of Tensor
        What the network depends on and what is to change; trained in place.
    objective : callable
        A cost ``R(x)`` of shape (n,), differentiable, whose mean over the samples is minimised.
    times : Tensor, shape (steps + 1,)
        Decreasing times.
    shape : sequence of int
        Shape of a batch of samples, batch first.
    lr : float
        Step of the parameters. A gradient is up to ``2 steps`` iterations old, so that the rate times the curvature of the
        cost must stay well below ``1 / (2 steps)``, or the loop swings.
    optimizer : callable, optional
        Takes the list of parameters and returns a torch optimizer, in place of gradient descent with ``lr``.
    generator : torch.Generator, int or None
        Source of the initial noise.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    Batch m of the forward queue is at step m: one call moves every batch by a DDIM step, the oldest leaves as samples, and
    fresh noise enters. The batch that left starts in the backward queue with ``a = dR/dx``; one call and one
    vector-Jacobian product move every batch there by a step of the adjoint, at the states that it visited. The gradient of
    an iteration is the sum of what the batches of the queue contribute, so that it is a whole gradient, of as many batches
    as there are steps, once the queues are full.

    Cost: an iteration is one call on ``steps`` batches forward, and one call and product backward, in place of ``steps`` of
    each in turn. Memory: the states that the batches of both queues have visited.

    References
    ----------
    Marion et al. (2024), arXiv:2402.05468.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> mean = torch.zeros(1, requires_grad=True)
    >>> network = lambda x, t: (x + mean * t[:, None] ** 2) / (1 + t[:, None] ** 2)  # data N(mean, 1)
    >>> denoiser = Denoiser(network, EDMSchedule(10.0), predicts="x0")
    >>> times = denoiser.schedule.times(8, t_end=0.1)
    >>> loop = ImplicitDenoising(denoiser, [mean], lambda x: (x - 2).square().sum(1), times, (64, 1), lr=0.02, generator=0)
    >>> abs(float(loop.run(200).particles.mean()) - 2) < 0.5
    True
    """

    def __init__(
        self,
        denoiser: Denoiser,
        params: Sequence[Tensor],
        objective: Objective,
        times: Tensor,
        shape: Sequence[int],
        *,
        lr: float = 0.01,
        optimizer: Optimizer | None = None,
        generator: Seed = None,
    ) -> None:
        self.params = list(params)
        for i, p in enumerate(self.params):
            checks.tensor(f"params[{i}]", p.detach())
        if not self.params or not all(p.requires_grad and p.is_leaf for p in self.params):
            raise checks.ArgumentError(
                f"params has {len(self.params)} tensors, not all leaves with gradients; allowed: at least one, parameters of "
                "the network. Pass list(network.parameters())."
            )
        self._shape = tuple(shape)
        probe = self.params[0].new_ones(self._shape)
        check_start(denoiser, probe, times)
        self.denoiser, self._objective = denoiser, objective
        self._path = Path(denoiser, times)
        points = self._path.points
        # Row m of either queue is at step m: its time and alpha, and the length of its step.
        n, rows = self._path.n_steps, self._shape[0]
        lead = (n * rows, *[1] * (len(self._shape) - 1))
        self._times = probe.new_tensor([p.time for p in points[:-1]]).repeat_interleave(rows)
        self._alpha = probe.new_tensor([p.alpha for p in points[:-1]]).repeat_interleave(rows).reshape(lead)
        length = [b.lam - a.lam for a, b in pairwise(points)]
        self._length = probe.new_tensor(length).repeat_interleave(rows).reshape(lead)
        # The newest batch of the backward queue is at the last step, the oldest at the earliest.
        self._latest_first = torch.arange(n * rows, device=probe.device).reshape(n, rows).flip(0).reshape(-1)
        self._optimizer = _optimizer(self.params, lr, optimizer)
        self._generator = as_generator(generator)
        # Newest first: a batch is the list of the scaled states that it visited, and in the backward queue its adjoint.
        self._forward: deque[list[Tensor]] = deque()
        self._backward: deque[tuple[list[Tensor], Tensor]] = deque()

    def run(self, n_iter: int) -> ImplicitDiffusionResult:
        """Go on for some iterations, from where the last run ended.

        Parameters
        ----------
        n_iter : int
            Iterations, at least 1; the first samples leave after as many as there are steps.

        Returns
        -------
        ImplicitDiffusionResult
            ``particles`` are the last batch that left (empty before the first).

        Raises
        ------
        ArgumentError
            If ``n_iter`` is not allowed or the objective answers in another shape.
        """
        n = checks.integer("n_iter", n_iter, low=1)
        calls, products, history = self.denoiser.nfev, 0, []
        particles = self.params[0].new_zeros((0, *self._shape[1:]))
        for _ in range(n):
            left = self._advance()
            mean = particles.new_tensor(torch.nan)
            if left is not None:
                particles, mean, entry = left
                self._backward.appendleft(entry)
            if self._backward:
                products += len(self._backward) * self._shape[0]
                _take(self._optimizer, self.params, self._retreat())
            history.append(mean)
        return ImplicitDiffusionResult(
            [p.detach().clone() for p in self.params],
            particles,
            torch.stack(history),
            Cost(nfev=self.denoiser.nfev - calls, ngrad=products),
        )

    def _advance(self) -> tuple[Tensor, Tensor, tuple[list[Tensor], Tensor]] | None:
        """Move every batch of the forward queue by a step; return the one that left, its cost and its adjoint."""
        first = self._path.points[0]
        noise = randn(self._shape, generator=self._generator, like=self._alpha)
        # The schedule's own noise, as samples start from it without data.
        self._forward.appendleft([(first.sigma / first.alpha) * noise])
        rows = len(self._forward) * self._shape[0]
        z = torch.cat([batch[-1] for batch in self._forward])
        with torch.no_grad():
            eps = self.denoiser.eps(self._alpha[:rows] * z, self._times[:rows])
            z = torch.addcmul(z, self._length[:rows], eps)
        for batch, state in zip(self._forward, z.split(self._shape[0]), strict=True):
            batch.append(state)
        if len(self._forward) < self._path.n_steps:
            return None
        states = self._forward.pop()
        alpha = self._path.points[-1].alpha
        x = (alpha * states.pop()).requires_grad_()
        reward = _per_row("objective", self._objective(x), x)
        (slope,) = torch.autograd.grad(reward.mean(), x)
        return x.detach(), reward.mean().detach(), (states, alpha * slope)

    def _retreat(self) -> list[Tensor]:
        """Move every batch of the backward queue by a step of the adjoint; return the gradient they give together."""
        batches, rows = list(self._backward), self._shape[0]
        pick = self._latest_first[: len(batches) * rows]
        z = torch.cat([states[-1] for states, _ in batches]).requires_grad_()
        a = torch.cat([adjoint for _, adjoint in batches])
        eps = self.denoiser.eps(self._alpha[pick] * z, self._times[pick])
        slope, *gradients = torch.autograd.grad(
            eps, [z, *self.params], self._length[pick] * a, materialize_grads=True
        )
        self._backward.clear()
        for (states, _), adjoint in zip(batches, (a + slope).split(rows), strict=True):
            states.pop()
            if states:  # a batch that is back at its noise has given all that it has
                self._backward.append((states, adjoint))
        return gradients


def _copied(params: Tensor | Sequence[Tensor]) -> list[Tensor]:
    given = [params] if isinstance(params, Tensor) else list(params)
    for i, p in enumerate(given):
        checks.tensor(f"params[{i}]", p.detach())
    if not given:
        raise checks.ArgumentError("params is empty; allowed: at least one tensor. Pass what to optimise.")
    return [p.detach().clone().requires_grad_() for p in given]


def _optimizer(params: list[Tensor], lr: float, make: Optimizer | None) -> torch.optim.Optimizer:
    rate = checks.nonnegative("lr", lr)
    return torch.optim.SGD(params, lr=rate) if make is None else make(params)


def _take(optimizer: torch.optim.Optimizer, params: list[Tensor], gradients: list[Tensor]) -> None:
    for p, g in zip(params, gradients, strict=True):
        p.grad = g
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _per_row(name: str, values: Tensor, x: Tensor) -> Tensor:
    if values.shape != (len(x),):
        raise checks.ArgumentError(
            f"{name} answers with shape {tuple(values.shape)}; allowed: one number a row, ({len(x)},). Sum over the other axes."
        )
    return values
