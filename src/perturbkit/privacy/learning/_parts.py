"""What posterior sampling is made of: a minimiser, an exact sampler on a ball, and noise with a radial density."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from perturbkit.core import checks
from perturbkit.core.random import Seed
from perturbkit.privacy._noise import Noise

LogDensity = Callable[[Tensor], Tensor]


def shared(generator: Seed) -> torch.Generator | None:
    """Return one generator that all parts advance, or None for the secure source."""
    if isinstance(generator, torch.Generator) or generator is None:
        return generator
    return Noise(generator)._generator


def radial(noise: Noise, d: int, scale: float, pure: bool) -> np.ndarray:
    """Noise of density prop. to exp(-|z| / scale), whose radius is Gamma(d), or normal noise."""
    if not pure:
        return scale * noise.normal((d,))
    return scale * float(noise.exponential((d,)).sum()) * noise.direction(1, d)[0]


def newton(objective: LogDensity, w: Tensor, tol: float) -> Tensor:
    """Minimise a strongly convex function by Newton steps that are halved until they descend."""
    single = lambda v: objective(v[None])[0]
    for _ in range(100):
        gradient = torch.func.grad(single)(w)
        if float(gradient.norm()) <= tol:
            return w
        move = torch.linalg.solve(torch.func.hessian(single)(w), gradient)
        size, value, slope = 1.0, float(single(w)), float(gradient @ move)
        # Near the minimum the descent is below rounding; the full step is then the right one.
        while (
            float(single(w - size * move)) > value - 1e-4 * size * slope + 1e-12 * abs(value) and size > 1e-8
        ):
            size /= 2
        w = w - size * move
    raise checks.ModelError(
        f"the gradient at the minimiser is {float(gradient.norm()):.3g}; allowed: {tol:.3g}. Check that the loss is convex and "
        "twice differentiable, and scale the rows."
    )


def rejection(
    objective: LogDensity, gamma: float, floor: Tensor, best: Tensor, center: Tensor, radius: float, noise: Noise,
    max_proposals: int,
) -> tuple[Tensor, int]:  # fmt: skip
    """Draw exactly from exp(-gamma F) on the ball.

    F(w) >= F(b) + g.(w - b) + (w - b).M.(w - b)/2 on the ball, for its point b nearest to the minimiser; the right side is a
    Gaussian, and a proposal is kept with chance exp(-gamma (F(w) - right side)).
    """
    offset = best - center
    b = center + offset * min(1.0, radius / max(float(offset.norm()), 1e-300))
    value, slope = value_and_gradient(objective, b[None])
    factor = torch.linalg.cholesky(floor)
    mean = b - torch.cholesky_solve(slope[0][:, None], factor)[:, 0]
    tried, size = 0, 64
    while tried < max_proposals:
        z = torch.from_numpy(noise.normal((size, len(b))))
        w = mean + torch.linalg.solve_triangular(factor.T, z.T, upper=True).T / math.sqrt(gamma)
        u = torch.from_numpy(np.log(noise.uniform((size,))))
        inside = (w - center).norm(dim=1) <= radius
        if bool(inside.any()):
            kept, move = w[inside], w[inside] - b
            bound = value + move @ slope[0] + ((move @ floor) * move).sum(1) / 2
            good = u[inside] < -gamma * (objective(kept) - bound)
            if bool(good.any()):
                return kept[good][0], tried + int(inside.nonzero()[good][0]) + 1
        tried += size
    raise checks.ModelError(
        f"none of {tried} proposals was accepted; allowed: at most max_proposals of them. Give a sharper curvature, or use "
        "sampler='mala'."
    )


def value_and_gradient(log_density: LogDensity, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        at = x.detach().requires_grad_(True)
        value = log_density(at)
        (gradient,) = torch.autograd.grad(value.sum(), at)
    return value.detach(), gradient
