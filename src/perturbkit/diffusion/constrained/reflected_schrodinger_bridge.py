"""Reflected Schroedinger bridges: from one law to another inside a bounded domain, along the likeliest reflected paths.

Use :func:`reflected_bridge_grid` in one or two dimensions, where it is exact, and :class:`ReflectedBridge` with networks above or
in domains of other shapes. Deng, Chen, Yang, Du, Feng and Chen (2024), Reflected Schroedinger Bridge for Constrained
Generative Modeling, arXiv:2401.03228.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from perturbkit.core import Cost, SampleResult, checks, fit, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, rademacher, randint, randn
from perturbkit.diffusion.constrained._domains import Domain, ImplicitDomain, Polygon, UnitCube
from perturbkit.diffusion.constrained._grid import BridgePlan, reflected_bridge_grid
from perturbkit.diffusion.constrained._parts import TimeField

__all__ = ["BridgePlan", "ImplicitDomain", "Polygon", "ReflectedBridge", "UnitCube", "reflected_bridge_grid"]


class ReflectedBridge:
    r"""A bridge by two networks, trained in turn on each other's reflected paths.

    Parameters
    ----------
    domain : UnitCube, Polygon or ImplicitDomain
        Where the paths live.
    forward_net, backward_net : nn.Module
        ``net(x, t)`` with t of shape (n,), answers in the shape of ``x``: the drifts over ``sigma``. Trained in place.
    sigma : float
        Noise, above 0.
    horizon : float
        Duration, above 0.
    n_steps : int
        Steps of a path.
    width : float
        Distance to the wall within which the drift across it fades to zero, above 0.

    Attributes
    ----------
    losses : Tensor of float64, shape (2 n_stages, inner_steps)
        Losses of every stage of the last fit, of the backward and the forward network in turn.

    Notes
    -----
    With forward drift :math:`\sigma z_f` the paths, run backward, have the drift :math:`\sigma z_b`,
    :math:`z_b = \sigma \nabla \log p - z_f`, which minimises
    :math:`E [ |z_b|^2 / 2 + z_b \cdot z_f + \sigma \, \mathrm{div}\, z_b ]` over fields with no component across the wall; that is
    what the fading is for, since the integration by parts behind it leaves a term at the wall. The networks take turns, each
    trained on the other's paths (iterative proportional fitting). The first stage, with no forward drift, is a reflected
    diffusion model.

    Cost: a stage is 2 paths a row and ``2 inner_steps`` gradients of the loss, which needs second derivatives.

    References
    ----------
    Deng, Chen, Yang, Du, Feng and Chen (2024), arXiv:2401.03228.

    Examples
    --------
    >>> from perturbkit.core.networks import TimeMLP
    >>> nets = TimeMLP(1, hidden=16), TimeMLP(1, hidden=16)
    >>> bridge = ReflectedBridge(UnitCube(1), *nets, sigma=0.5, n_steps=10)
    >>> x0 = torch.linspace(0.0, 0.3, 64)[:, None]
    >>> bridge = bridge.fit(x0, 1 - x0, n_stages=1, inner_steps=20, generator=0, progress=False)
    >>> drawn = bridge.forward_sample(x0, generator=1)
    >>> bool(((drawn.x >= 0) & (drawn.x <= 1)).all())
    True
    """

    def __init__(
        self,
        domain: Domain,
        forward_net: nn.Module,
        backward_net: nn.Module,
        *,
        sigma: float = 1.0,
        horizon: float = 1.0,
        n_steps: int = 50,
        width: float = 0.05,
    ) -> None:
        if not isinstance(domain, Domain):
            raise checks.ArgumentTypeError(
                f"domain is a {type(domain).__name__}; allowed: UnitCube, Polygon, ImplicitDomain. Pass UnitCube(d)."
            )
        self.domain, self.forward_net, self.backward_net = domain, forward_net, backward_net
        self.sigma = checks.positive("sigma", sigma)
        self.horizon = checks.positive("horizon", horizon)
        self.n_steps = checks.integer("n_steps", n_steps, low=1)
        self.width = checks.positive("width", width)

    def loss(self, net: TimeField, x: Tensor, t: Tensor, other: Tensor, *, generator: Seed = None) -> Tensor:
        """Return the loss of one network on states of the other's paths.

        Parameters
        ----------
        net : callable (x, t) -> Tensor
            The network under training.
        x : Tensor, shape (n, d)
            States.
        t : Tensor, shape (n,)
            Their times.
        other : Tensor, shape (n, d)
            The drift that made the paths, over ``sigma``, at the states.
        generator : torch.Generator, int or None
            Source of the probe of the divergence (Hutchinson).

        Returns
        -------
        Tensor, shape ()
        """
        checks.same_shape("other", other, "x", checks.tensor("x", x))
        probe = rademacher(x.shape, generator=as_generator(generator), device=x.device, dtype=x.dtype)
        with torch.enable_grad():  # a loss is also looked at without training
            rows = x.detach().requires_grad_()
            z = self._field(net)(rows, t)
            (slope,) = torch.autograd.grad((z * probe).sum(), rows, create_graph=True)
        energy = 0.5 * z.square().sum(1) + (z * other).sum(1)
        return (energy + self.sigma * (slope * probe).sum(1)).mean()

    def fit(
        self,
        x0: Tensor,
        x1: Tensor,
        *,
        n_stages: int = 10,
        inner_steps: int = 300,
        n_paths: int = 512,
        batch_size: int = 256,
        lr: float = 1e-3,
        generator: Seed = None,
        progress: ProgressLike = None,
    ) -> Self:
        """Train both networks on draws of the two laws.

        Parameters
        ----------
        x0, x1 : Tensor, shape (n, d)
            Draws of the laws at the start and at the end, inside the domain.
        n_stages : int
            Rounds of both networks, at least 1.
        inner_steps : int
            Steps of a network in a round.
        n_paths : int
            Fresh paths a round and direction.
        batch_size : int
            States a step.
        lr : float
            First learning rate of a round.
        generator : torch.Generator, int or None
            Source of everything random.
        progress : Progress, bool or None
            Reports networks trained.

        Returns
        -------
        ReflectedBridge
        """
        ends = (self.domain.check("x0", x0), self.domain.check("x1", x1))
        for name, value in (("n_stages", n_stages), ("inner_steps", inner_steps), ("n_paths", n_paths)):
            checks.integer(name, value, low=1)
        g, losses = as_generator(generator), []
        for k in track(range(2 * n_stages), "reflected bridge", progress=progress):
            backward = k % 2 == 0
            net, mover = (
                (self.backward_net, self.forward_net) if backward else (self.forward_net, self.backward_net)
            )
            first = ends[0] if backward else ends[1]
            start = first[randint(0, len(first), (n_paths,), generator=g, device=first.device)]
            drive = _still if k == 0 else self._field(mover)
            with torch.no_grad():
                states, times, drifts = self._paths(drive, start, not backward, g)
                # The state that a path ends in is where the reversed one begins.
                last = drive(states[-1], times[-1].expand(n_paths))
            rows = (
                states[1:].flatten(0, 1),
                times[1:].repeat_interleave(n_paths),
                torch.cat((*drifts[1:], last)),
            )
            history = fit(
                net,
                self.loss,
                rows,
                steps=inner_steps,
                batch_size=batch_size,
                lr=lr,
                generator=g,
                progress=False,
            )
            losses.append(history.losses)
        self.losses = torch.stack(losses)
        return self

    def forward_sample(self, x0: Tensor, *, generator: Seed = None) -> SampleResult:
        """Follow the trained paths from rows of the start's law; ``extras["trajectory"]`` has all states."""
        return self._sampled(self.forward_net, self.domain.check("x0", x0), False, generator)

    def backward_sample(self, x1: Tensor, *, generator: Seed = None) -> SampleResult:
        """Follow the trained paths from rows of the end's law back; ``extras["trajectory"]`` has all states."""
        return self._sampled(self.backward_net, self.domain.check("x1", x1), True, generator)

    def _sampled(self, net: nn.Module, x: Tensor, backward: bool, generator: Seed) -> SampleResult:
        with torch.no_grad():
            states, times, drifts = self._paths(self._field(net), x, backward, as_generator(generator))
        h = self.horizon / self.n_steps
        energy = sum(0.5 * h * float((self.sigma * z).square().sum(1).mean()) for z in drifts)
        extras = {"trajectory": states, "energy": energy}
        return SampleResult(states[-1], times.double().cpu(), Cost(nfev=self.n_steps * len(x)), extras)

    def _paths(
        self, field: TimeField, x: Tensor, backward: bool, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return states (steps + 1, n, d), times, and the field at each state but the last."""
        h = self.horizon / self.n_steps
        times = torch.linspace(0, self.horizon, self.n_steps + 1, dtype=x.dtype, device=x.device)
        times = times.flip(0) if backward else times
        states, drifts = [x], []
        for t in times[:-1]:
            z = field(x, t.expand(len(x)))
            noise = randn(x.shape, generator=generator, like=x)
            x = self.domain.reflect(x + self.sigma * (h * z + math.sqrt(h) * noise))
            states.append(x)
            drifts.append(z)
        return torch.stack(states), times, drifts

    def _field(self, net: TimeField) -> TimeField:
        """Return the network with its component across the wall faded."""
        return lambda x, t: self.domain.faded(checks.answer("net", net(x, t), x), x, self.width)


def _still(x: Tensor, t: Tensor) -> Tensor:
    return torch.zeros_like(x)
