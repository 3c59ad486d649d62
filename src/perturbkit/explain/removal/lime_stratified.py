"""LIME for images with stratified sampling: superpixels weighed by a local linear model, on masks of every size.

Use it for images when only answers of the model are to be had and superpixels are the right parts. Rashid, Amparore,
Ferrari and Verda (2024), Using Stratified Sampling to Improve LIME Image Explanations, arXiv:2403.17742.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from perturbkit.core import Attribution, Oracle, checks, target_rows, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, uniform
from perturbkit.explain.removal._lime import cosine_distance, cosine_kernel, lime_masks, weighted_ridge
from perturbkit.explain.removal._parts import segment_means, segment_numbers

__all__ = ["deficit", "lime_stratified", "stratified_masks"]


def lime_stratified(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    segments: int | Tensor = 50,
    sampling: Literal["stratified", "uniform"] = "stratified",
    n_samples: int = 1000,
    kernel_width: float = 0.25,
    ridge: float = 1.0,
    hide: Literal["mean"] | float = "mean",
    legacy: bool = False,
    masks: Tensor | None = None,
    generator: Seed = None,
    progress: ProgressLike = False,
) -> Attribution:
    """Attribute an output to superpixels by a weighted linear model of the answers to masked images.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Function of a batch of images, answering (n, outputs) or (n,); probabilities, as a rule.
    x : Tensor, shape (n, channels, height, width)
        Images, floating point.
    target : Tensor of shape (n,), int or None
        The output explained.
    segments : int or Tensor of int, shape (height, width) or (n, height, width)
        About how many superpixels to cut each image into (SLIC), or the superpixel of each pixel.
    sampling : {"stratified", "uniform"}
        Masks of every size alike, reweighted to be unbiased, or each superpixel kept with chance one half, as in LIME.
    n_samples : int
        Masks an image, the first of which keeps everything; at least 2.
    kernel_width : float
        Of the exponential kernel of the cosine distance, above 0.
    ridge : float
        Penalty of the coefficients; the intercept has none. With 0 the solution of least norm.
    hide : "mean" or float
        What a hidden superpixel shows: its mean colour or a number.
    legacy : bool
        Multiply the distances instead of the kernel by the weights of the strata, as the authors' program does.
    masks : Tensor, shape (n_samples, superpixels), optional
        Masks of zeros and ones to use instead of drawing them, weighted as under ``sampling``.
    generator : torch.Generator, int or None
        Source of the masks.
    progress : Progress, bool or None
        Reports images.

    Returns
    -------
    Attribution
        ``values`` in the shape of ``x``: the coefficient of each pixel's superpixel. ``extras`` holds, one an image,
        ``coefficients`` (a list of tensors), ``intercept``, ``score`` (the weighted share of variance explained),
        ``effective_samples`` ((sum w)^2 / sum w^2 of the strata's weights) and ``output_std`` over the masks.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``min_b sum_z w(z) k(z) (b_0 + <b, z> - f(x_z))^2 + ridge ||b||^2`` with ``k = sqrt(exp(-d^2 / width^2))``, d the
    cosine distance of z to the full mask (1 for the empty one), and ``w(z) = (S + 1) C(S, |z|) / 2^S``, the ratio of the
    chances of a size under both samplings (1 for uniform). Large S concentrates w near half of the superpixels: see
    ``effective_samples``.

    Cost: ``n_samples`` evaluations an image.

    References
    ----------
    Rashid, Amparore, Ferrari and Verda (2024), arXiv:2403.17742.

    Examples
    --------
    >>> x = torch.ones(1, 1, 2, 2)
    >>> parts = torch.tensor([[0, 0], [1, 1]])
    >>> f = lambda z: z[:, 0, 0, 0] + 3 * z[:, 0, 1, 0]
    >>> found = lime_stratified(f, x, segments=parts, hide=0.0, ridge=0.0, n_samples=50, generator=0)
    >>> found.extras["coefficients"][0].round(decimals=3)
    tensor([1., 3.])
    """
    checks.image_batch("x", x)
    checks.one_of("sampling", sampling, ("stratified", "uniform"))
    checks.integer("n_samples", n_samples, low=2)
    checks.positive("kernel_width", kernel_width)
    checks.nonnegative("ridge", ridge)
    fill = None if hide == "mean" else checks.between("hide", hide, -math.inf, math.inf)  # type: ignore[arg-type]
    oracle, source, n = Oracle.wrap(model), as_generator(generator), len(x)
    rows = target_rows(target, x)
    numbers, before = segment_numbers(segments, x), oracle.cost
    values, coefficients, intercepts, scores, effective, spread = torch.empty_like(x), [], [], [], [], []
    with oracle.frozen():
        for i in track(range(n), "LIME", progress=progress):
            count = int(numbers[i].max()) + 1
            z, w = _masks(masks, count, n_samples, sampling, source, x)
            cover = segment_means(x[i], numbers[i]) if fill is None else torch.full_like(x[i], fill)
            label = None if rows is None else rows[i : i + 1]
            y = _answers(oracle, x[i], cover, z[:, numbers[i]], label)
            b, intercept, score = weighted_ridge(z, y, _kernel(z, w, kernel_width, legacy), ridge)
            values[i] = b[numbers[i]].to(x.dtype)
            coefficients.append(b.to(x.dtype))
            intercepts.append(intercept)
            scores.append(score)
            effective.append(w.sum() ** 2 / w.square().sum())
            spread.append(y.std())
    extras = {
        "coefficients": coefficients,
        "intercept": torch.stack(intercepts).to(x.dtype),
        "score": torch.stack(scores).to(x.dtype),
        "effective_samples": torch.stack(effective).to(x.dtype),
        "output_std": torch.stack(spread).to(x.dtype),
    }
    return Attribution(values, rows, oracle.cost - before, f"LIME, {sampling}", extras)


def stratified_masks(
    n_features: int, n_samples: int, *, generator: Seed = None, like: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw masks whose sizes are uniform, with the weights that make averages those of uniform masks.

    Parameters
    ----------
    n_features : int
        Number of parts, at least 1.
    n_samples : int
        Number of masks, at least 1.
    generator : torch.Generator, int or None
        Source of the masks.
    like : Tensor, optional
        Gives dtype and device.

    Returns
    -------
    masks : Tensor, shape (n_samples, n_features)
        Zeros and ones.
    weights : Tensor, shape (n_samples,)

    Raises
    ------
    ArgumentError
        If a number is below 1.

    Notes
    -----
    ``q ~ U(0, 1)``, then each part is kept with chance q, so that ``P(z) = 1 / ((S + 1) C(S, |z|))``; the weight is
    ``2^-S / P(z)``, whose mean is 1.

    References
    ----------
    Rashid, Amparore, Ferrari and Verda (2024), arXiv:2403.17742.

    Examples
    --------
    >>> masks, weights = stratified_masks(3, 5, generator=0)
    >>> masks.shape, weights.shape
    (torch.Size([5, 3]), torch.Size([5]))
    """
    checks.integer("n_features", n_features, low=1)
    checks.integer("n_samples", n_samples, low=1)
    g, like = as_generator(generator), torch.zeros(()) if like is None else like
    chance = uniform((n_samples, 1), generator=g, dtype=torch.float64)
    kept = uniform((n_samples, n_features), generator=g, dtype=torch.float64) < chance
    return kept.to(like), _weights(kept).to(like)


def deficit(y: Tensor) -> dict[str, float]:
    """Return how far sampled outputs are spread, the first of which is that of the whole image.

    Parameters
    ----------
    y : Tensor, shape (n_samples,)
        Outputs of the masked images; at least 2.

    Returns
    -------
    dict
        ``std``; ``range``, from the smallest to the largest; ``covered``, the share of ten equal bins of that range
        that hold an output; ``gap``, the output of the whole image less the mean of the others.

    Raises
    ------
    ArgumentError
        If there are fewer than two.

    Notes
    -----
    A linear model cannot be fitted to outputs that hardly differ: the paper calls this undersampling of the dependent
    variable.

    References
    ----------
    Rashid, Amparore, Ferrari and Verda (2024), arXiv:2403.17742.

    Examples
    --------
    >>> deficit(torch.tensor([1.0, 0.0, 0.0, 0.0]))["gap"]
    1.0
    """
    checks.tensor("y", y, ndim=1)
    checks.integer("the number of outputs in y", len(y), low=2)
    low, high = float(y.min()), float(y.max())
    bins = ((y - low) / ((high - low) or 1.0) * 10).long().clamp(max=9)
    return {
        "std": float(y.std()),
        "range": high - low,
        "covered": len(bins.unique()) / 10,
        "gap": float(y[0] - y[1:].mean()),
    }


def _masks(
    given: Tensor | None, count: int, n_samples: int, sampling: str, source: torch.Generator, x: Tensor
) -> tuple[Tensor, Tensor]:
    """Return masks with the full one first, and the weights of their strata, in double precision."""
    if given is not None:
        checks.tensor("masks", given, shape=(n_samples, count), floating=False)
        z = given.to(device=x.device, dtype=torch.float64)
        w = _weights(z > 0)
    elif sampling == "stratified":
        z, w = stratified_masks(count, n_samples, generator=source, like=x.double())
        z[0], w[0] = 1, 1
    else:
        z = lime_masks(count, n_samples, source, x)
    if sampling == "uniform":
        w = torch.ones(n_samples, dtype=torch.float64, device=x.device)
    w = torch.where(z.all(1) & (torch.arange(n_samples, device=x.device) == 0), torch.ones_like(w), w)
    return z, w


def _weights(kept: Tensor) -> Tensor:
    count = kept.shape[1]
    size, whole = kept.sum(1).double(), torch.tensor(float(count), dtype=torch.float64)
    log_choose = torch.lgamma(whole + 1) - torch.lgamma(size + 1) - torch.lgamma(whole - size + 1)
    return torch.exp(math.log(count + 1) + log_choose - count * math.log(2))


def _answers(oracle: Oracle, image: Tensor, cover: Tensor, kept: Tensor, target: Tensor | None) -> Tensor:
    """Return the outputs for pixel masks (m, height, width), in double precision."""
    parts, place = [], 0
    for size in oracle.chunks(len(kept), like=image[None]):
        masked = torch.where(kept[place : place + size, None] > 0, image, cover)
        parts.append(oracle.value(masked, None if target is None else target.expand(size)))
        place += size
    return torch.cat(parts).double()


def _kernel(z: Tensor, w: Tensor, width: float, legacy: bool) -> Tensor:
    """Return the weights of the samples."""
    if legacy:
        return torch.exp(-((w * cosine_distance(z)) ** 2) / (2 * width**2))
    return w * cosine_kernel(z, width)
