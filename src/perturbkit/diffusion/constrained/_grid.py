"""The exact reflected bridge on a grid of cells of the unit interval or square."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perturbkit.core import Cost, Result, SampleResult, checks
from perturbkit.core.random import Seed, as_generator, randn
from perturbkit.diffusion.constrained._parts import check_in_cube, folded, log_prob_and_score

__all__ = ["BridgePlan", "reflected_bridge_grid"]

_CELLS = 4096


@dataclass(frozen=True, eq=False)
class BridgePlan(Result):
    """The exact bridge between two laws on a grid of cells of the unit interval or square.

    Attributes
    ----------
    plan : Tensor, shape (*grid, *grid)
        Probability of each pair of start and end cells.
    potentials : tuple of Tensor
        ``u`` and ``v`` of ``plan = u K v``, each of the grid's shape.
    errors : Tensor of float64, shape (n_iter,)
        Total variation between the start's law and that of the plan after each iteration.
    sigma, horizon : float
        Noise and duration.
    n_iter : int
        Iterations.
    error : float
        The last of the errors.
    """

    plan: Tensor
    potentials: tuple[Tensor, Tensor]
    errors: Tensor
    sigma: float
    horizon: float
    n_iter: int
    error: float

    def drift(self, x: Tensor, t: float) -> Tensor:
        """Return the forward drift ``sigma^2 grad log psi`` at rows (n, d) of the cube and a time before the horizon."""
        checks.between("t", t, 0, self.horizon, inclusive="low")
        return self._drift(x, self.horizon - t, self.potentials[1])

    def backward_drift(self, x: Tensor, t: float) -> Tensor:
        """Return the drift of the reversed paths, ``sigma^2 grad log phi``, at a time after 0."""
        checks.between("t", t, 0, self.horizon, inclusive="high")
        return self._drift(x, t, self.potentials[0])

    def sample(self, x0: Tensor, n_steps: int = 100, generator: Seed = None) -> SampleResult:
        """Follow the bridge from its start, rows (n, d) of the cube, by reflected steps.

        The extras hold ``energy``, the mean of half the squared drift over rows, added up over the time.
        """
        checks.integer("n_steps", n_steps, low=1)
        g, x, energy = as_generator(generator), check_in_cube("x0", x0), 0.0
        # Ever shorter steps: towards the end the drift resolves single cells.
        times = self.horizon * (1 - torch.linspace(1, 0, n_steps + 1, dtype=torch.float64) ** 2)
        for t, h in zip(times.tolist(), times.diff().tolist(), strict=False):
            b = self.drift(x, t)
            energy += 0.5 * h * float(b.square().sum(1).mean())
            x = folded(x + h * b + self.sigma * math.sqrt(h) * randn(x.shape, generator=g, like=x))
        return SampleResult(x, times, Cost(nfev=n_steps * len(x)), {"energy": energy})

    def _drift(self, x: Tensor, left: float, potential: Tensor) -> Tensor:
        axes = potential.ndim
        checks.tensor("x", x, shape=(None, axes))
        check_in_cube("x", x)
        s = torch.full((), self.sigma * math.sqrt(left), dtype=torch.float64, device=x.device)
        logs, slopes = zip(
            *(
                log_prob_and_score(x[:, i, None].double(), _centres(m, x.device), s)
                for i, m in enumerate(potential.shape)
            ),
            strict=True,
        )
        total = sum(log.reshape(len(x), *_spread(i, axes)) for i, log in enumerate(logs))
        weights = (total + potential.double().log()).flatten(1).softmax(1).reshape(total.shape)  # type: ignore[union-attr]
        parts = [
            (weights * slope.reshape(len(x), *_spread(i, axes))).flatten(1).sum(1)
            for i, slope in enumerate(slopes)
        ]
        return self.sigma**2 * torch.stack(parts, 1).to(x.dtype)


def reflected_bridge_grid(
    p0: Tensor,
    p1: Tensor,
    sigma: float,
    horizon: float = 1.0,
    *,
    tol: float = 1e-10,
    max_iter: int = 10_000,
) -> BridgePlan:
    """Solve the bridge between two laws on a grid exactly.

    Parameters
    ----------
    p0, p1 : Tensor, shape (m,) or (m, k)
        Masses of the cells of [0, 1] or [0, 1]^2, not negative, at most 4096; divided by their sums.
    sigma : float
        Noise of the reference, reflected Brownian motion, above 0.
    horizon : float
        Duration, above 0.
    tol : float
        Total variation at which to stop.
    max_iter : int
        Iterations at most.

    Returns
    -------
    BridgePlan

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a law is not allowed, or the noise cannot reach from one to the other in floating point.

    Notes
    -----
    Sinkhorn's iteration ``v = p1 / (K u)``, ``u = p0 / (K v)`` with the heat kernel ``K`` of the mirrored process, the folded normal
    density of deviation ``sigma sqrt(horizon)``; one axis at a time. The drift at ``t`` is ``sigma^2 grad log (K_{T-t} v)``. The
    error falls geometrically, the faster the larger the noise.

    Cost: O(m) a cell and iteration; computed in float64.

    References
    ----------
    Deng et al. (2024), arXiv:2401.03228, section 4.

    Examples
    --------
    >>> flat = torch.ones(20, dtype=torch.float64)
    >>> bridge = reflected_bridge_grid(flat, flat, sigma=0.5)
    >>> float(bridge.drift(torch.tensor([[0.3]]), 0.5).abs()) < 1e-6
    True
    """
    checks.tensor("p0", p0, ndim=(1, 2))
    checks.same_shape("p1", checks.tensor("p1", p1), "p0", p0)
    checks.integer("the number of cells", p0.numel(), low=2, high=_CELLS)
    checks.positive("sigma", sigma)
    checks.positive("horizon", horizon)
    checks.positive("tol", tol)
    checks.integer("max_iter", max_iter, low=1)
    for name, p in (("p0", p0), ("p1", p1)):
        checks.nonnegative(f"the least mass of {name}", float(p.min()))
        checks.positive(f"the sum of {name}", float(p.sum()))
    a, b = (p.double() / p.double().sum() for p in (p0, p1))
    s = torch.full((), sigma * math.sqrt(horizon), dtype=torch.float64, device=a.device)
    kernels = [_kernel(m, s) for m in a.shape]
    u, errors = torch.ones_like(a), []
    for _ in range(max_iter):
        v = _ratio(b, _applied(kernels, u), sigma)
        reached = _applied(kernels, v)
        errors.append(0.5 * float((u * reached - a).abs().sum()))
        # The last pair has the end's law exactly and the start's up to the error.
        if errors[-1] <= tol:
            break
        u = _ratio(a, reached, sigma)
    full = kernels[0] if a.ndim == 1 else torch.einsum("ik,jl->ijkl", *kernels)
    plan = (u.reshape(*u.shape, *[1] * a.ndim) * full).mul_(v)
    return BridgePlan(
        plan.to(p0.dtype),
        (u, v),
        torch.tensor(errors, dtype=torch.float64),
        float(sigma),
        float(horizon),
        len(errors),
        errors[-1],
    )


def _kernel(m: int, s: Tensor) -> Tensor:
    """Return the masses that cells of one axis get from each other.

    The folded density is one function of the difference of two centres and of their sum, even and of period 2: it is evaluated
    at 2 m places rather than at m^2.
    """
    k = torch.arange(2 * m, device=s.device)
    place = torch.minimum(k, 2 * m - k).double() / m
    half = log_prob_and_score(place, torch.zeros_like(place), s)[0].exp() / (2 * m)
    differences = half[torch.arange(1 - m, m, device=s.device).abs()].unfold(0, m, 1).flip(0)
    return differences.add_(half[1:].unfold(0, m, 1))  # a copy since it was flipped


def _centres(m: int, device: torch.device) -> Tensor:
    return (torch.arange(m, dtype=torch.float64, device=device) + 0.5) / m


def _spread(i: int, axes: int) -> list[int]:
    return [-1 if j == i else 1 for j in range(axes)]


def _applied(kernels: list[Tensor], values: Tensor) -> Tensor:
    """Apply the kernel of each axis; they are symmetric."""
    out = kernels[0] @ values
    return out if values.ndim == 1 else out @ kernels[1]


def _ratio(mass: Tensor, reached: Tensor, sigma: float) -> Tensor:
    if bool((reached[mass > 0] <= 0).any()) or not bool(torch.isfinite(reached).all()):
        raise checks.ArgumentError(
            f"sigma is {sigma:g}, by which some mass cannot be reached in floating point; allowed: more noise. "
            "Raise sigma or the horizon."
        )
    return torch.where(mass > 0, mass / reached.clamp_min(torch.finfo(mass.dtype).tiny), 0)
