"""OSA-DAS: how far an occlusion turns the subspace that a network's features span under augmentation.

Use it where no class is at hand, or where the answer to one occluded image is too fickle. Valois, Niinuma and Fukui
(2023), Occlusion Sensitivity Analysis with Augmentation Subspace Perturbation in Deep Feature Space, arXiv:2311.15022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Attribution, Oracle, checks, target_rows, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randn, uniform
from perturbkit.explain.removal._parts import covered_windows, expanded_baseline, window_masks

__all__ = ["minimal_size", "osa_das", "random_augmentations", "subspace_distance"]

Augmentation = Callable[[Tensor], Tensor]


def osa_das(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    window: int | tuple[int, int] = 2,
    stride: int | tuple[int, int] | None = 1,
    baseline: Tensor | float = 0.0,
    augmentations: Sequence[Augmentation] | None = None,
    n_augment: int = 16,
    subspace_dim: int = 4,
    top_fraction: float = 1.0,
    generator: Seed = None,
    progress: ProgressLike = False,
) -> Attribution:
    """Attribute a network's features, not a class, to windows of an image.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Maps images to features (n, width): logits, or better the layer before them.
    x : Tensor, shape (n, channels, height, width)
        Images, floating point.
    window, stride : int or (int, int)
        Size of the occluder and step between its places, in pixels, as in :func:`occlusion`.
    baseline : float or Tensor
        What covers: a number, or a tensor that broadcasts to ``x``.
    augmentations : sequence of callable, optional
        Functions from a batch of images to a batch of the same shape, the same for every image; drawn by
        :func:`random_augmentations` by default.
    n_augment : int
        Number of augmentations drawn, at least 1; unused where they are given.
    subspace_dim : int
        Dimension of the subspaces, at most the number of augmentations and the width of the features.
    top_fraction : float
        Share of the windows tried, in (0, 1]: those in which the gradient of the squared norm of the features is
        largest. The others score zero. With 1 no gradient is taken.
    generator : torch.Generator, int or None
        Source of the augmentations. Every occluder sees the same draws.
    progress : Progress, bool or None
        Reports blocks of occluders.

    Returns
    -------
    Attribution
        ``values`` in the shape of ``x``, from 0 to 1, 1 for each image's most important part (all zero where nothing
        matters). ``extras["distances"]``, shape (n, windows), before averaging (NaN where a window was not tried), and
        ``extras["reference_basis"]``, shape (n, width, subspace_dim).

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    The reference basis U holds the leading left singular vectors of the unit-norm features of the augmented image; V_p
    those of the image with window p covered. The distance is ``d_p = 1 - (1/k) ||U^T V_p||_F^2``, that is 1 less the
    mean squared cosine of the canonical angles. A pixel scores the mean over the windows that cover it.

    Cost: ``n_augment (windows + 1)`` evaluations a row and a thin singular value decomposition a window, and with
    ``top_fraction`` one gradient a row.

    References
    ----------
    Valois, Niinuma and Fukui (2023), arXiv:2311.15022.

    Examples
    --------
    >>> x = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> found = osa_das(lambda z: z[:, :, :2].flatten(1), x, window=2, stride=2, generator=0, n_augment=8)
    >>> found.extras["distances"].shape
    torch.Size([1, 4])
    """
    checks.image_batch("x", x)
    checks.between("top_fraction", top_fraction, 0, 1, inclusive="high")
    masks, cover = window_masks(x, window, stride), expanded_baseline(baseline, x)
    if augmentations is None:
        augmentations = random_augmentations(x, n=n_augment, generator=generator)
    checks.integer("subspace_dim", subspace_dim, low=1, high=len(augmentations))
    oracle = Oracle.wrap(model)
    before, n, m = oracle.cost, len(x), len(masks)
    with oracle.frozen():
        reference = _basis(oracle, x, augmentations, subspace_dim)
        tried = _tried(oracle, x, masks, top_fraction)  # [n, kept]
        distances = reference.new_full((n, m), math.nan)
        kept = tried.shape[1]
        block = max(1, next(oracle.chunks(n * kept * len(augmentations), like=x)) // len(augmentations))
        for start in track(range(0, n * kept, block), "OSA-DAS", progress=progress):
            index = torch.arange(start, min(start + block, n * kept), device=x.device)
            row = index // kept
            which = tried[row, index % kept]
            covered = covered_windows(x, cover, masks, row, which)
            basis = _basis(oracle, covered, augmentations, subspace_dim)
            distances[row, which] = subspace_distance(reference[row], basis)
    flat = masks.reshape(m, -1).to(distances.dtype)
    known = (~distances.isnan()).to(distances.dtype)
    weight = known @ flat
    values = torch.where(weight > 0, (distances.nan_to_num() @ flat) / weight.clamp(min=1), weight * 0)
    values = values / values.amax(1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    shaped = values.reshape(n, 1, *x.shape[2:]).expand_as(x).to(x.dtype).contiguous()
    extras = {"distances": distances, "reference_basis": reference}
    return Attribution(shaped, None, oracle.cost - before, "OSA-DAS", extras)


def subspace_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared sine of the canonical angles between subspaces.

    Parameters
    ----------
    a, b : Tensor, shape (..., width, k)
        Orthonormal bases.

    Returns
    -------
    Tensor, shape (...)
        From 0 (the same subspace) to 1 (orthogonal).

    Raises
    ------
    ArgumentError
        If the shapes do not fit.

    Notes
    -----
    ``1 - ||A^T B||_F^2 / k``: the singular values of A^T B are the cosines of the angles.

    References
    ----------
    Valois, Niinuma and Fukui (2023), arXiv:2311.15022.

    Examples
    --------
    >>> one = torch.eye(3)
    >>> subspace_distance(one[:, :2], one[:, 1:])
    tensor(0.5000)
    """
    if a.ndim < 2 or a.shape[-2:] != b.shape[-2:]:
        raise checks.ArgumentError(
            f"b has shape {tuple(b.shape)} for a of shape {tuple(a.shape)}; allowed: bases of one width and dimension, "
            "(..., width, k). Cut the larger one."
        )
    return (1 - (a.mT @ b).square().sum((-2, -1)) / a.shape[-1]).clamp(0, 1)


def random_augmentations(x: Tensor, *, n: int = 16, generator: Seed = None) -> list[Augmentation]:
    """Draw fixed augmentations: the identity, and small rotations, shifts, changes of brightness and contrast, and noise.

    Parameters
    ----------
    x : Tensor, shape (m, channels, height, width)
        Images, for their shape, range and dtype.
    n : int
        Number of augmentations, at least 1; the first is the identity.
    generator : torch.Generator, int or None
        Source of the draws.

    Returns
    -------
    list of callable
        Each maps a batch of such images to one of the same shape, always in the same way.

    Raises
    ------
    ArgumentError
        If an argument is not allowed.

    Notes
    -----
    Rotations are uniform up to 15 degrees, shifts up to an eighth of the side, brightness up to a tenth of the range of
    ``x``, contrast from 0.8 to 1.2, and the noise has a standard deviation of 0.03 of that range.

    References
    ----------
    Valois, Niinuma and Fukui (2023), arXiv:2311.15022; the list of augmentations is ours.

    Examples
    --------
    >>> x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> kept, other = random_augmentations(x, n=2, generator=0)
    >>> torch.equal(kept(x), x), torch.equal(other(x), other(x))
    (True, True)
    """
    checks.image_batch("x", x)
    checks.integer("n", n, low=1)
    g, spread = as_generator(generator), float(x.max() - x.min()) or 1.0
    made: list[Augmentation] = [lambda images: images]
    for _ in range(n - 1):
        turn, right, down, bright, contrast = uniform((5,), -1.0, 1.0, generator=g).tolist()
        noise = 0.03 * spread * randn(x.shape[1:], generator=g, like=x)
        made.append(
            _augmentation(
                math.radians(15) * turn, right / 4, down / 4, 0.1 * spread * bright, 1 + 0.2 * contrast, noise
            )
        )
    return made


def minimal_size(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    explanation: Attribution | Tensor,
    target: Tensor | int | None = None,
    *,
    baseline: Tensor | float = 0.0,
    n_steps: int = 20,
) -> Tensor:
    """Return the smallest share of each image, its highest scores first, that keeps the prediction.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Classifier of images, answering (n, classes).
    x : Tensor, shape (n, channels, height, width)
        Images.
    explanation : Attribution or Tensor, shape of ``x``
        Scores, summed over channels.
    target : Tensor of shape (n,), int or None
        The class to keep; the model's own prediction by default.
    baseline : float or Tensor
        What the rest is covered with.
    n_steps : int
        Shares tried are multiples of ``1 / n_steps``.

    Returns
    -------
    Tensor, shape (n,)
        From 0 to 1; smaller is better. 1 where even the whole image is classified otherwise.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``min {s : argmax f(baseline with the top share s of x) = target}``. Cost: ``n_steps + 1`` evaluations a row.

    References
    ----------
    Valois, Niinuma and Fukui (2023), arXiv:2311.15022.

    Examples
    --------
    >>> x = torch.tensor([[[[1.0, 0.2]]]])
    >>> minimal_size(lambda z: torch.stack([z.flatten(1).sum(1), 0.5 + 0 * z[:, 0, 0, 0]], 1), x, x, n_steps=2)
    tensor([0.5000])
    """
    checks.image_batch("x", x)
    checks.integer("n_steps", n_steps, low=1)
    scores = explanation.values if isinstance(explanation, Attribution) else explanation
    checks.same_shape("explanation", scores, "x", x)
    oracle, cover = Oracle.wrap(model), expanded_baseline(baseline, x)
    given = target_rows(target, x)
    label = oracle(x).argmax(1) if given is None else given
    order = scores.sum(1, keepdim=True)
    place = order.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1).reshape(order.shape)
    smallest = torch.ones(len(x), dtype=x.dtype, device=x.device)
    for step in range(n_steps, -1, -1):
        kept = place < round(step * order[0].numel() / n_steps)
        same = oracle(torch.where(kept, x, cover)).argmax(1) == label
        smallest[same] = step / n_steps
    return smallest


def _augmentation(
    angle: float, right: float, down: float, brightness: float, contrast: float, noise: Tensor
) -> Augmentation:
    def apply(images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        # Coordinates run from -1 to 1 on both axes, so rotation keeps its angle only with the aspect put in.
        aspect, c, s = height / width, math.cos(angle), math.sin(angle)
        matrix = images.new_tensor([[c, -s * aspect, right], [s / aspect, c, down]])
        grid = functional.affine_grid(matrix[None], [1, 1, height, width], align_corners=False)
        moved = functional.grid_sample(
            images, grid.expand(len(images), -1, -1, -1), padding_mode="border", align_corners=False
        )
        mean = moved.mean((1, 2, 3), keepdim=True)
        return (moved - mean) * contrast + mean + brightness + noise

    return apply


def _basis(oracle: Oracle, x: Tensor, augmentations: Sequence[Augmentation], k: int) -> Tensor:
    """Return orthonormal bases of the leading directions of the features, shape (n, width, k)."""
    views = torch.stack([augment(x) for augment in augmentations], 1)
    features = oracle(views.flatten(0, 1)).flatten(1)
    checks.integer("subspace_dim", k, high=features.shape[1])
    columns = functional.normalize(features, dim=1).reshape(len(x), len(augmentations), -1).mT
    return torch.linalg.svd(columns, full_matrices=False)[0][..., :k]


def _tried(oracle: Oracle, x: Tensor, masks: Tensor, fraction: float) -> Tensor:
    """Return the numbers of the windows with the largest gradient, shape (n, kept)."""
    m = len(masks)
    if fraction == 1.0:
        return torch.arange(m, device=x.device).expand(len(x), m)
    gradient = oracle.gradient(x, objective=lambda out, _: out.flatten(1).square().sum(1) / 2)
    energy = gradient.square().sum(1, keepdim=True).flatten(1) @ masks.reshape(m, -1).to(x.dtype).T
    return energy.topk(max(1, round(fraction * m)), dim=1).indices
