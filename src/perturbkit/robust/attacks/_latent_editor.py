"""An editor of images by diffusion in a latent space, differentiable from end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from perturbkit.core import Denoiser, Oracle, Prediction, Schedule, checks, ddim_step
from perturbkit.core.random import Seed, as_generator, randn

__all__ = ["LatentEditor", "Network"]

Network = Oracle | nn.Module | Callable[..., Tensor]


class LatentEditor:
    """Edit images by a diffusion model of latents: encode, add noise, remove it under another condition, decode.

    Parameters
    ----------
    encode : nn.Module or callable
        Images to latents (n, ...): the mean of a variational encoder, not a sample.
    decode : nn.Module or callable
        Latents to images.
    network : nn.Module or callable
        ``network(z, t, condition)``, or ``network(z, t)`` for edits without condition; answers in the shape of ``z``.
    schedule : Schedule
        What the network was trained with.
    predicts : {"eps", "x0", "v", "score", "velocity"}
        What it answers.
    strength : float
        Share of the schedule's time at which an edit starts, in (0, 1].
    n_steps : int
        Evaluations of the network an edit.
    checkpointing : bool
        Keep nothing of the steps for the gradient and run them again instead.
    chunk_size : int, optional
        Images at once; by default as many as memory allows.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``z_T = alpha_T E(x) + sigma_T noise``, then deterministic steps (DDIM) at even times, the last one to the predicted
    latent. With a mask, what is not to be edited is put back, in the latent after every step and in the image at the end.

    References
    ----------
    Rombach et al. (2022), arXiv:2112.10752; Meng et al. (2022), SDEdit, arXiv:2108.01073.

    Examples
    --------
    >>> from perturbkit.core import VPSchedule
    >>> editor = LatentEditor(lambda x: x, lambda z: z, lambda z, t: torch.zeros_like(z), VPSchedule(), predicts="x0")
    >>> editor.edit(torch.ones(1, 1, 2, 2), generator=0).abs().max().item()
    0.0
    """

    def __init__(
        self,
        encode: Network,
        decode: Network,
        network: Network,
        schedule: Schedule,
        *,
        predicts: Prediction = "eps",
        strength: float = 0.5,
        n_steps: int = 10,
        checkpointing: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        self.encode, self.decode, self.network = (Oracle.wrap(part) for part in (encode, decode, network))
        self.schedule, self.predicts = schedule, predicts
        Denoiser(self.network.fun, schedule, predicts)
        self.strength = checks.between("strength", strength, 0, 1, inclusive="high")
        self.n_steps = checks.integer("n_steps", n_steps, low=1)
        self.checkpointing = bool(checkpointing)
        self.chunk_size = (
            chunk_size if chunk_size is None else checks.integer("chunk_size", chunk_size, low=1)
        )

    def edit(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        noise: Tensor | None = None,
        generator: Seed = None,
    ) -> Tensor:
        """Return edited images, without a graph.

        Parameters
        ----------
        x : Tensor, shape (n, channels, height, width)
            Images.
        condition : Tensor, shape (n, ...), optional
            What to make of each, in the form that the network takes.
        mask : Tensor, shape (n or 1, 1, height, width), optional
            1 where an image is to be edited, 0 where it is kept.
        noise : Tensor, shape of the latents, optional
            Where the noise comes from, else from ``generator``.
        generator : torch.Generator, int or None
            Draws the noise.

        Returns
        -------
        Tensor, shape of ``x``
        """
        rows = self.rows(x, condition, mask)
        if noise is None:
            noise = self.noise(x, as_generator(generator))
        else:
            checks.tensor("noise", noise, shape=(len(x), *self.latent_shape(x)))
        with self.frozen():
            return Oracle(self.pipeline(condition, mask), chunk_size=self.chunk_size)(x, noise, *rows)

    def noise(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Return noise for one edit of each image."""
        return randn((len(x), *self.latent_shape(x)), generator=generator, like=x)

    def latent_shape(self, x: Tensor) -> torch.Size:
        """Return the shape of an image's latent, by an evaluation of the encoder."""
        return self.encode(x[:1]).shape[1:]

    def rows(self, x: Tensor, condition: Tensor | None, mask: Tensor | None) -> list[Tensor]:
        """Check what goes with the images and return it, a row an image."""
        checks.image_batch("x", x)
        found = []
        if condition is not None:
            checks.tensor("condition", condition, floating=False)
            found.append(
                checks.tensor("condition", condition, floating=False, shape=(len(x), *condition.shape[1:]))
            )
        if mask is not None:
            full = (len(x), 1, *x.shape[2:])
            checks.tensor("mask", mask, ndim=4)
            checks.tensor("mask", mask, shape=(full if len(mask) > 1 else (1, *full[1:])))
            checks.between("the least value of mask", float(mask.min()), 0, 1)
            checks.between("the largest value of mask", float(mask.max()), 0, 1)
            latent = self.latent_shape(x)
            if len(latent) != 3:
                raise checks.ArgumentError(
                    f"a mask is given, but latents have shape {tuple(latent)}; allowed: latents (channels, height, "
                    "width) with a mask. Leave the mask out."
                )
            found.append(mask.to(x).expand(full))
        return found

    def pipeline(self, condition: Tensor | None, mask: Tensor | None) -> Callable[..., Tensor]:
        """Return the edit as a function of images, noise and :meth:`rows`, with a graph; enter :meth:`frozen` first."""
        times = self.schedule.times(
            self.n_steps, t_start=self.strength * self.schedule.t_max, t_end=0.0, spacing="time"
        )[:-1]

        def run(x: Tensor, noise: Tensor, *rows: Tensor) -> Tensor:
            given = rows[:1] if condition is not None else ()
            denoiser = Denoiser(lambda z, t: self.network.fun(z, t, *given), self.schedule, self.predicts)
            start = self.encode.fun(x)
            editable = None if mask is None else functional.interpolate(rows[-1], size=start.shape[2:])

            def step(z: Tensor, i: int) -> Tensor:
                if i + 1 == len(times):
                    z, kept = denoiser.x0(z, times[i]), start
                else:
                    z = ddim_step(z, denoiser.eps(z, times[i]), self.schedule, times[i], times[i + 1])
                    kept = self.schedule.add_noise(start, noise, times[i + 1])
                return z if editable is None else editable * z + (1 - editable) * kept

            z = self.schedule.add_noise(start, noise, times[0])
            for i in range(len(times)):
                if self.checkpointing and torch.is_grad_enabled():
                    z = checkpoint(step, z, i, use_reentrant=False, preserve_rng_state=False)
                else:
                    z = step(z, i)
            out = self.decode.fun(z)
            return out if mask is None else rows[-1] * out + (1 - rows[-1]) * x

        return run

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold the three networks in evaluation mode with their weights out of the graph."""
        with ExitStack() as stack:
            for part in (self.encode, self.decode, self.network):
                stack.enter_context(part.frozen())
            yield
