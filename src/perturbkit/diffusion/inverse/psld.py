"""PSLD: answer a linear measurement with a diffusion model in the latent space of an autoencoder.

Use it to fill, sharpen or enlarge images with a latent diffusion model; without an autoencoder it is diffusion posterior
sampling (DPS), which also takes measurements that are not linear. Rout, Raoof, Daras, Caramanis, Dimakis and Shakkottai
(2023), Solving Linear Inverse Problems Provably via Posterior Sampling with Latent Diffusion Models, arXiv:2307.00619.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perturbkit.core import Cost, Denoiser, Oracle, SampleResult, checks
from perturbkit.core.random import Seed, as_generator, randn
from perturbkit.core.sampling import Path, check_noise_left, check_start, weighted
from perturbkit.diffusion.inverse.operators import LinearOperator

__all__ = ["sample_psld"]

Map = Callable[[Tensor], Tensor]
Norm = Literal["plain", "squared"]


def sample_psld(
    denoiser: Denoiser,
    z: Tensor,
    times: Tensor,
    forward: Map,
    y: Tensor,
    *,
    encode: Map | None = None,
    decode: Map | None = None,
    pinv: Map | None = None,
    measurement_weight: float = 1.0,
    gluing_weight: float = 0.1,
    norm: Norm = "plain",
    base: Literal["ddim", "ddpm"] = "ddim",
    generator: Seed = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> SampleResult:
    """Sample latents whose decoded images agree with a measurement, and with themselves.

    Parameters
    ----------
    denoiser : Denoiser
        The prior of the latents; differentiated.
    z : Tensor, shape (n, ...)
        Latent states at ``times[0]``.
    times : Tensor, shape (steps + 1,)
        Decreasing times; noise must be left at all but the last.
    forward : callable
        The measurement, images (n, ...) to (n, ...), differentiable: an operator of this room, or any function.
    y : Tensor, shape of ``forward``'s answer
        What was measured, one row a latent or one for all.
    encode, decode : callable, optional
        The autoencoder: images to latents and back, differentiable. Default: the identity.
    pinv : callable, optional
        ``A^T (A A^T)^+`` of the measurement, for the gluing term; by default that of a
        :class:`~perturbkit.diffusion.LinearOperator`. Where noise makes it useless, pass a multiple of the transpose.
    measurement_weight : float
        Step towards the measurement, 0 or more.
    gluing_weight : float
        Step towards latents on which encoder and decoder agree, 0 or more.
    norm : {"plain", "squared"}
        Of the residuals. The gradient of a plain norm keeps its length near the solution: one weight serves all noise
        levels, but the last steps do not settle. The square is that of the theory; its steps are stable
        while a weight times the square of the largest singular value of what it weighs stays below 1.
    base : {"ddim", "ddpm"}
        The step of the prior: deterministic, or with fresh noise.
    generator : torch.Generator, int or None
        Source of that noise.
    callback : callable, optional
        Called as ``callback(i, z)`` after step ``i``.

    Returns
    -------
    SampleResult
        ``x``, the decoded images; ``extras`` has ``latent`` and ``residual``, the norm of ``y - forward(x)`` a row.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the latents, the times or an option are not allowed, or the gluing term lacks a pseudo-inverse.

    Notes
    -----
    With the predicted clean latent ``z0(z_t)``, its image ``x = D(z0)`` and ``z'`` the step of the prior,

    ``z <- z' - grad_{z_t} [ w_m ||y - A x|| + w_g ||z0 - E(x + A^T (A A^T)^+ (y - A x))|| ]``.

    The first term alone is DPS in latent space. The second asks ``z0`` to be a fixed point of decoding, putting in what was
    measured and encoding: of the many latents that fit, one without seams between measured and imagined parts.
    For a Gaussian prior DPS is biased: the weights stand in for noise levels that it does not know.

    Cost: one call of the denoiser, the decoder and the encoder a step, each with a backward pass.

    References
    ----------
    Rout et al. (2023), arXiv:2307.00619, algorithm 1; Chung et al. (2023), arXiv:2209.14687.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> from perturbkit.diffusion import Inpainting
    >>> schedule = EDMSchedule(10.0)
    >>> prior = Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), schedule, predicts="x0")  # N(0, I)
    >>> first = Inpainting(torch.tensor([True, False]))
    >>> z, times = torch.tensor([[5.0, 5.0]]), schedule.times(100, t_end=0.01)
    >>> found = sample_psld(prior, z, times, first, torch.tensor([[1.5]]), norm="squared")
    >>> round(float(found.x[0, 0]), 2), round(float(found.x[0, 1]), 1)
    (1.5, 0.5)
    """
    check_start(denoiser, z, times)
    check_noise_left(denoiser.schedule, times[:-1], "Only the last time may be without.")
    w_m = checks.nonnegative("measurement_weight", measurement_weight)
    w_g = checks.nonnegative("gluing_weight", gluing_weight)
    checks.one_of("norm", norm, ("plain", "squared"))
    checks.one_of("base", base, ("ddim", "ddpm"))
    back = pinv if pinv is not None else getattr(forward, "pinv", None)
    if w_g > 0 and back is None:
        raise checks.ArgumentError(
            f"gluing_weight is {w_g:g} and forward, a {type(forward).__name__}, has no pseudo-inverse; allowed: 0, or a "
            f"{LinearOperator.__name__}. Pass pinv=, or gluing_weight=0."
        )
    target = checks.tensor("y", y)
    g = as_generator(generator)
    path, calls = Path(denoiser, times), denoiser.nfev

    def objective(z0: Tensor) -> Tensor:
        x = z0 if decode is None else decode(z0)
        residual = _residual(forward, x, target)
        total = w_m * _size(residual, norm)
        if w_g > 0:
            whole = x + back(residual)  # type: ignore[misc]
            again = whole if encode is None else checks.answer("encode", encode(whole), z0)
            total = total + w_g * _size(z0 - again, norm)
        if not total.requires_grad:
            raise checks.ArgumentError(
                "forward answers without a gradient; allowed: functions that can be differentiated. Take torch.no_grad or detach "
                "out of forward and decode, or use sample_enkg."
            )
        return total.sum()

    with _as_it_is(denoiser.network, encode, decode):
        for i in range(path.n_steps):
            s, t = path.points[i], path.points[i + 1]
            with torch.enable_grad():
                leaf = z.detach().requires_grad_(True)
                z0 = denoiser.x0(leaf, s.time)
                if (w_m or w_g) and not z0.requires_grad:
                    raise checks.ArgumentError(
                        "denoiser answers without a gradient; allowed: a network that can be differentiated in its input. Take "
                        "torch.no_grad or detach out of it, or use sample_enkg."
                    )
                # Nothing is asked of the measurement where no weight is on it.
                gradient = torch.autograd.grad(objective(z0), leaf)[0] if w_m or w_g else torch.zeros_like(z)
            z0 = z0.detach()
            noise = t.sigma * max(0.0, 1 - (t.lam / s.lam) ** 2) ** 0.5 if base == "ddpm" else 0.0
            kept = max(0.0, t.sigma**2 - noise**2) ** 0.5
            # alpha_t z0 + kept eps, with eps = (z - alpha_s z0) / sigma_s.
            z = weighted(
                (kept / s.sigma, z.detach()), (t.alpha - kept * s.alpha / s.sigma, z0), (-1.0, gradient)
            )
            if noise > 0:
                z = z + noise * randn(z.shape, generator=g, like=z)
            if callback is not None:
                callback(i, z)
        with torch.no_grad():
            x = z if decode is None else decode(z)
            residual = _residual(forward, x, target).flatten(1).norm(dim=1)
    result = path.result(z, denoiser.nfev - calls)
    extras = {"latent": z, "residual": residual}
    return SampleResult(x, result.times, Cost(nfev=result.cost.nfev, ngrad=result.cost.nfev), extras)


def _as_it_is(*maps: Any) -> ExitStack:
    """Hold modules in evaluation mode with their weights out of the graph."""
    stack = ExitStack()
    for module in maps:
        if isinstance(module, nn.Module):
            stack.enter_context(Oracle(module).frozen())
    return stack


def _residual(forward: Map, x: Tensor, y: Tensor) -> Tensor:
    """Return ``y - forward(x)``, checked for shape."""
    found = forward(x)
    if found.shape[1:] != y.shape[1:] or len(y) not in (1, len(found)):
        raise checks.ArgumentError(
            f"y has shape {tuple(y.shape)}, but forward answered {tuple(found.shape)}; allowed: the same, or one row for all. "
            "Pass y as the operator gives it, with a batch dimension."
        )
    return y.to(found) - found


def _size(residual: Tensor, norm: Norm) -> Tensor:
    """Return the norm of every row, or its square."""
    flat = residual.flatten(1)
    return torch.linalg.vector_norm(flat, dim=1) if norm == "plain" else flat.square().sum(1)
