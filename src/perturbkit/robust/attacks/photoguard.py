"""PhotoGuard: small perturbations of an image that make latent-diffusion editors fail on it.

Use it to raise the price of editing a picture with a known model. Salman, Khaddaj, Leclerc, Ilyas and Madry (2023), Raising
the Cost of Malicious AI-Powered Image Editing, arXiv:2302.06588.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from perturbkit.core import Ball, Cost, Oracle, Result, around, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randn
from perturbkit.robust.attacks._latent_editor import LatentEditor, Network
from perturbkit.robust.attacks._parts import labels_for

__all__ = [
    "EditingReport",
    "Immunization",
    "LatentEditor",
    "diffusion_immunize",
    "editing_report",
    "encoder_immunize",
]

_WINDOW = 7  # of structural similarity, in pixels


@dataclass(frozen=True, eq=False)
class Immunization(Result):
    """Immunised images.

    Attributes
    ----------
    x : Tensor, shape (n, channels, height, width)
        The images.
    distance : Tensor, shape (n,)
        What was descended, at the end: squared distance to the target, of the latent or of the edited image.
    cost : Cost
        Rows through the encoder, or through the whole editor.
    """

    x: Tensor
    distance: Tensor
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True, eq=False)
class EditingReport(Result):
    """What an editor makes of immunised images beside what it makes of the clean ones, with the same noise.

    Attributes
    ----------
    clean_edit, immunized_edit : Tensor, shape of the images
        The edits.
    similarity : Tensor, shape (n,)
        Structural similarity of the two edits, 1 where they are the same.
    edit_psnr, image_psnr : Tensor, shape (n,)
        Peak signal-to-noise ratio in decibels of the edits, and of the immunised image against the clean one.
    latent_shift : Tensor, shape (n,)
        Distance of the two latents over the length of the clean one.
    clean_success, immunized_success : Tensor of bool, shape (n,), or None
        Whether the classifier sees what was asked for in the edit.
    """

    clean_edit: Tensor
    immunized_edit: Tensor
    similarity: Tensor
    edit_psnr: Tensor
    image_psnr: Tensor
    latent_shift: Tensor
    clean_success: Tensor | None = None
    immunized_success: Tensor | None = None


def encoder_immunize(
    encoder: Network,
    x: Tensor,
    epsilon: float = 0.06,
    *,
    target_latent: Tensor | None = None,
    n_steps: int = 200,
    step_size: float | None = None,
    norm: Literal["linf", "l2"] = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: Seed = None,
    progress: ProgressLike = False,
) -> Immunization:
    """Move images so that an encoder takes them for something else.

    Parameters
    ----------
    encoder : Oracle, nn.Module or callable
        Images to latents (n, ...), the mean where it is a variational one.
    x : Tensor, shape (n, channels, height, width)
        Images within ``bounds``.
    epsilon : float
        Radius of the perturbation, zero or above; the authors' demonstration has 0.06 of the range.
    target_latent : Tensor, shape (1, ...) or (...), optional
        Where all latents are drawn to; by default the latent of a picture in the middle of ``bounds``.
    n_steps : int
        Projected gradient steps.
    step_size : float, optional
        Length of the first step, ``epsilon / 12`` by default; it falls to a hundredth along a line.
    norm : {"linf", "l2"}
        Of perturbation and steps.
    bounds : (float, float)
        Smallest and largest value of a pixel.
    generator : torch.Generator, int or None
        Draws the start.
    progress : Progress, bool or None
        Reports steps.

    Returns
    -------
    Immunization

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``min_{|d| <= epsilon} ||E(x + d) - z||^2``. It protects against this encoder: others, compression or retraining may undo it.

    Cost: ``n_steps`` gradients and an evaluation of the encoder a row, and two evaluations more.

    References
    ----------
    Salman et al. (2023), arXiv:2302.06588, section 3.1.

    Examples
    --------
    >>> x = torch.full((1, 1, 1, 2), 0.5)
    >>> found = encoder_immunize(lambda z: z.flatten(1), x, 0.1, target_latent=torch.tensor([0.45, 0.9]), generator=0)
    >>> [round(v, 2) for v in found.x.flatten().tolist()]
    [0.45, 0.6]
    """
    x = checks.image_batch("x", x).detach()
    low, high = _range(bounds)
    oracle = Oracle.wrap(encoder)
    before = oracle.cost
    goal = oracle(torch.full_like(x[:1], (low + high) / 2)) if target_latent is None else target_latent
    latent = oracle(x[:1])
    goal = checks.tensor("target_latent", goal).to(latent)
    if goal.shape not in (latent.shape, latent.shape[1:]):
        raise checks.ArgumentError(
            f"target_latent has shape {tuple(goal.shape)}; allowed: one latent for all, {tuple(latent.shape)}. Reshape it."
        )

    def distance(out: Tensor, _: Tensor | None) -> Tensor:
        return (out - goal).square().flatten(1).sum(1)

    def query(z: Tensor) -> Tensor:
        return oracle.value_and_gradient(z, objective=distance)[1]

    with oracle.frozen():
        found = _descend(query, x, epsilon, norm, bounds, n_steps, step_size, None, generator, progress)
        final = distance(oracle(found), None)
    return Immunization(found, final, oracle.cost - before)


def diffusion_immunize(
    editor: LatentEditor,
    x: Tensor,
    condition: Tensor | None = None,
    epsilon: float = 0.06,
    *,
    target_image: Tensor | None = None,
    mask: Tensor | None = None,
    n_steps: int = 200,
    step_size: float | None = None,
    grad_reps: int = 10,
    norm: Literal["linf", "l2"] = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: Seed = None,
    progress: ProgressLike = False,
) -> Immunization:
    """Move images so that their edits become a given picture, end to end through the editor.

    Parameters
    ----------
    editor : LatentEditor
        The editor, with few steps: memory grows with them unless it keeps checkpoints.
    x : Tensor, shape (n, channels, height, width)
        Images within ``bounds``.
    condition : Tensor, shape (n, ...), optional
        What the edits that are feared would ask for.
    epsilon : float
        Radius of the perturbation, zero or above.
    target_image : Tensor, shape (1 or n, channels, height, width), optional
        What edits are drawn to; by default the middle of ``bounds`` everywhere.
    mask : Tensor, shape (n or 1, 1, height, width), optional
        1 where edits would change the images: those pixels are not perturbed, since an editor replaces them.
    n_steps, step_size, norm, bounds
        As in :func:`encoder_immunize`.
    grad_reps : int
        Draws of noise over which a gradient is averaged.
    generator : torch.Generator, int or None
        Draws start and noise.
    progress : Progress, bool or None
        Reports steps.

    Returns
    -------
    Immunization

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``min_{|d| <= epsilon} E_noise ||edit(x + d, noise) - target||^2``.

    Cost: ``n_steps grad_reps`` gradients and ``grad_reps`` evaluations of the editor a row, and one of its encoder.

    References
    ----------
    Salman et al. (2023), arXiv:2302.06588, section 3.2.

    Examples
    --------
    >>> from perturbkit.core import VPSchedule
    >>> editor = LatentEditor(lambda x: x, lambda z: z, lambda z, t: z, VPSchedule(), predicts="x0", n_steps=2)
    >>> x = torch.full((1, 1, 1, 2), 0.5)
    >>> found = diffusion_immunize(editor, x, None, 0.1, target_image=torch.ones_like(x), n_steps=20, generator=0)
    >>> [round(v, 2) for v in found.x.flatten().tolist()]
    [0.6, 0.6]
    """
    if not isinstance(editor, LatentEditor):
        raise checks.ArgumentTypeError(
            f"editor is a {type(editor).__name__}; allowed: a LatentEditor. Make one of encoder, decoder and network."
        )
    x = checks.image_batch("x", x).detach()
    extra = editor.rows(x, condition, mask)
    checks.integer("grad_reps", grad_reps, low=1)
    low, high = _range(bounds)
    target = torch.full_like(x[:1], (low + high) / 2) if target_image is None else target_image
    checks.image_batch("target_image", target)
    checks.tensor("target_image", target, shape=(len(target) if len(target) == 1 else len(x), *x.shape[1:]))
    g = as_generator(generator)
    latent = editor.latent_shape(x)
    run = editor.pipeline(condition, mask)

    def distance(z: Tensor, noise: Tensor, goal: Tensor, *rows: Tensor) -> Tensor:
        return (run(z, noise, *rows) - goal).square().flatten(1).sum(1)

    oracle = Oracle(distance, chunk_size=editor.chunk_size)
    fixed = [_repeated(r, grad_reps) for r in (target.to(x).expand(x.shape), *extra)]

    def query(z: Tensor) -> Tensor:
        rows = _repeated(z, grad_reps)
        _, slope = oracle.value_and_gradient(rows, None, _noise(rows, latent, g), *fixed)
        return slope.unflatten(0, (len(z), grad_reps)).mean(1)

    keep = None if mask is None else 1 - mask.to(x)
    with editor.frozen():
        found = _descend(query, x, epsilon, norm, bounds, n_steps, step_size, keep, g, progress)
        rows = _repeated(found, grad_reps)
        final = oracle(rows, _noise(rows, latent, g), *fixed).unflatten(0, (len(x), grad_reps)).mean(1)
    return Immunization(found, final, oracle.cost)


def editing_report(
    editor: LatentEditor,
    clean: Tensor,
    immunized: Tensor,
    condition: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    classifier: Network | None = None,
    wanted: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: Seed = None,
) -> EditingReport:
    """Edit clean and immunised images with the same noise and compare.

    Parameters
    ----------
    editor : LatentEditor
        The editor, which need not be the one that was protected against.
    clean, immunized : Tensor, shape (n, channels, height, width)
        Images within ``bounds``, sides of 7 pixels at least.
    condition, mask
        As in :meth:`LatentEditor.edit`.
    classifier : Oracle, nn.Module or callable, optional
        Answers (n, classes) to an edit.
    wanted : Tensor of int64, shape (n,), optional
        The classes that the edits ask for; ``condition`` by default.
    bounds : (float, float)
        Smallest and largest value of a pixel, whose distance is the peak of the signal.
    generator : torch.Generator, int or None
        Draws the noise.

    Returns
    -------
    EditingReport

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If shapes do not agree, an image is out of bounds, or a classifier has nothing to look for.
    ModelError
        If the classifier does not answer one score a class.

    Notes
    -----
    Structural similarity with means over 7x7 windows, averaged over pixels and channels (Wang et al., 2004).

    Cost: two edits a row.

    References
    ----------
    Salman et al. (2023), arXiv:2302.06588, section 4.

    Examples
    --------
    >>> from perturbkit.core import VPSchedule
    >>> editor = LatentEditor(lambda x: x, lambda z: z, lambda z, t: z, VPSchedule(), predicts="x0")
    >>> x = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> editing_report(editor, x, x, generator=0).similarity
    tensor([1.])
    """
    low, high = _range(bounds)
    for name, images in (("clean", clean), ("immunized", immunized)):
        checks.image_batch(name, images)
        least, most = float(images.detach().min()), float(images.detach().max())
        slack = 1e-4 * (high - low)
        if least < low - slack or most > high + slack:
            raise checks.ArgumentError(
                f"{name} has values from {least:.4g} to {most:.4g}; allowed: from {low:g} to {high:g}. Scale the images, or pass "
                "their bounds."
            )
    checks.same_shape("immunized", immunized, "clean", clean)
    clean, immunized = clean.detach(), immunized.detach()
    for side in clean.shape[2:]:
        checks.integer("the side of the images", side, low=_WINDOW)
    noise = editor.noise(clean, as_generator(generator))
    edits = [editor.edit(x, condition, mask=mask, noise=noise) for x in (clean, immunized)]
    seen: list[Tensor | None] = [None, None]
    if classifier is not None:
        asked = condition if wanted is None else wanted
        if asked is None:
            raise checks.ArgumentError(
                "wanted is None; allowed: a class a row for the classifier to find. Pass wanted=."
            )
        checks.labels("wanted", asked, n=len(clean))
        answers = [labels_for(Oracle.wrap(classifier), e, asked) for e in edits]
        seen = [scores.argmax(1) == labels for scores, labels in answers]
    latents = [editor.encode(x).flatten(1) for x in (clean, immunized)]
    shift = (latents[1] - latents[0]).norm(dim=1) / latents[0].norm(dim=1)
    shown, pictures = ([(z - low) / (high - low) for z in pair] for pair in (edits, (clean, immunized)))
    return EditingReport(
        edits[0], edits[1], _structural_similarity(*shown), _psnr(*shown), _psnr(*pictures), shift, seen[0], seen[1]
    )  # fmt: skip


def _range(bounds: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise checks.ArgumentTypeError(
            f"bounds is {bounds!r}; allowed: two numbers. Pass (smallest, largest) value of a pixel."
        )
    high = checks.between("bounds[1]", bounds[1], -math.inf, math.inf)
    return checks.between("bounds[0]", bounds[0], -math.inf, high, inclusive="low"), high


def _noise(rows: Tensor, latent: Sequence[int], generator: torch.Generator) -> Tensor:
    return randn((len(rows), *latent), generator=generator, like=rows)


def _descend(
    query: Callable[[Tensor], Tensor], x: Tensor, epsilon: float, norm: Literal["linf", "l2"], bounds: tuple[float, float],
    n_steps: int, step_size: float | None, keep: Tensor | None, generator: Seed, progress: ProgressLike,
) -> Tensor:  # fmt: skip
    """Go down the gradients by projected steps whose length falls along a line; ``keep`` is 1 where pixels may move."""
    checks.nonnegative("epsilon", epsilon)
    checks.one_of("norm", norm, ("linf", "l2"))
    checks.integer("n_steps", n_steps, low=1)
    first = epsilon / 12 if step_size is None else checks.positive("step_size", step_size)
    room = around(x, norm, epsilon, bounds)
    free = 1.0 if keep is None else keep
    delta = free * room.sample(x, generator=as_generator(generator))
    for i in track(range(n_steps), "immunising", progress=progress):
        stride = Ball(norm, first * (1 - 0.99 * i / n_steps))
        delta = room.project(delta - stride.maximiser(free * query(x + delta)))
    return x + delta


def _repeated(rows: Tensor, n: int) -> Tensor:
    return rows.repeat_interleave(n, 0)


def _psnr(a: Tensor, b: Tensor) -> Tensor:
    return -10 * (a - b).square().flatten(1).mean(1).log10()


def _structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    mean_a, mean_b, square_a, square_b, product = (
        functional.avg_pool2d(z, _WINDOW, stride=1) for z in (a, b, a * a, b * b, a * b)
    )
    unbiased = _WINDOW**2 / (_WINDOW**2 - 1)
    spread = unbiased * (square_a + square_b - mean_a**2 - mean_b**2)
    shared = unbiased * (product - mean_a * mean_b)
    low, high = 0.01**2, 0.03**2
    ratio = (
        (2 * mean_a * mean_b + low) * (2 * shared + high) / ((mean_a**2 + mean_b**2 + low) * (spread + high))
    )
    return ratio.flatten(1).mean(1)
