"""Layer masking: a convolutional network sees only the kept part of an image, by masking its activations too.

Use it where removed pixels would otherwise be filled with a colour whose edge the network sees: in LIME, in deletion, in
measuring how much a region matters. Balasubramanian and Feizi (2022), Towards Improved Input Masking for Convolutional Neural
Networks, arXiv:2211.14646.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perturbkit.core import Attribution, Cost, Oracle, Result, checks, target_rows, track
from perturbkit.core.oracle import unwrap_output
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator
from perturbkit.explain.removal._lime import lime_fit, lime_masks
from perturbkit.explain.removal._masked import Masked, filled, masked
from perturbkit.explain.removal._parts import expanded_baseline, segment_numbers

__all__ = ["BiasReport", "LayerMasked", "layer_masking", "missingness_bias", "neighbour_pad"]

Fill = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class BiasReport(Result):
    """How much a way of removing pixels disturbs a classifier by itself.

    Attributes
    ----------
    unchanged : Tensor, shape (n,)
        Share of the masks under which the predicted class stays.
    change : Tensor, shape (n,)
        Total variation between the class probabilities with and without the mask, averaged over masks.
    class_entropy, whole_entropy : float
        Entropy in nats of the predicted classes under the masks, and of those of the whole images. A biased removal drives
        predictions to few classes.
    leakage : float
        Leave-one-out accuracy with which a linear probe of the masked outputs tells the masks' shapes; NaN without shapes.
    cost : Cost
        Evaluations spent.
    """

    unchanged: Tensor
    change: Tensor
    class_entropy: float
    whole_entropy: float
    leakage: float
    cost: Cost = field(default_factory=Cost)


class LayerMasked(nn.Module):
    """A convolutional network that takes a mask besides its input and uses the kept pixels only.

    Parameters
    ----------
    model : nn.Module or callable
        A network of images in evaluation mode, built of the operations named in the notes. It is not changed.

    Raises
    ------
    ArgumentTypeError
        If it is an oracle or cannot be called.
    ModelError
        When called, if the network uses another operation on activations.

    Notes
    -----
    The pair of activation and mask goes through the network. Before a convolution removed cells are filled by
    :func:`neighbour_pad`; after it the mask is max-pooled with the kernel, stride and padding. Pooling pools both; a removed cell
    is never a maximum, and counts as zero in an average. Functions of single elements and batch norm leave the mask as it is,
    and f(0) does not fill the hole. Where activations meet (sums, products, concatenated channels), a cell is known if it is in
    each. The global average pool, also in squeeze-and-excite, is ``mean(a m) / mean(m)``. Flattening and linear layers see
    zeros where nothing is known, so networks that end in a global pool gain most.

    A mask of ones gives the network itself, and masked pixels have no influence at all. Cost: one forward pass, and for each
    convolution as many sums over 3x3 cells as its kernel reaches; about 3 passes where filters are depthwise, less elsewhere.

    References
    ----------
    Balasubramanian and Feizi (2022), arXiv:2211.14646, section 3.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(1, 1, 3, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> net[0].weight.data.fill_(1 / 9)[0, 0, 0, 0].item()
    0.111...
    >>> x = torch.full((1, 1, 6, 6), 2.0)
    >>> mask = torch.arange(6).lt(3).expand(1, 1, 6, 6)
    >>> LayerMasked(net)(x, mask), net(x * mask)
    (tensor([[2.0000]]...), tensor([[1.0000]]...))
    """

    def __init__(self, model: nn.Module | Callable[[Tensor], Any]) -> None:
        super().__init__()
        if isinstance(model, Oracle) or not callable(model):
            raise checks.ArgumentTypeError(
                f"model is a {type(model).__name__}; allowed: the network itself, whose operations are followed. Pass the module."
            )
        self.model = model

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the outputs for the kept pixels of ``x``: the mask, shape (n, 1, height, width), is 1 where they are."""
        checks.image_batch("x", x)
        kept = _mask(mask, x)
        out = unwrap_output(self.model(masked(x * kept, kept.to(x.dtype))))
        if isinstance(out, Masked):
            raise checks.ModelError(
                f"the model answers a map of shape {tuple(out.shape)}; allowed: outputs (n, outputs) or (n,), whose every row "
                "knows the whole image. Pool or flatten it."
            )
        return out


def layer_masking(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    segments: int | Tensor = 50,
    n_samples: int = 500,
    kernel_width: float = 0.25,
    ridge: float = 1.0,
    generator: Seed = None,
    progress: ProgressLike = False,
) -> Attribution:
    """Attribute an output to superpixels by LIME, with removed superpixels masked in every layer instead of coloured.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Convolutional network, answering (n, outputs) or (n,); probabilities, as a rule. See :class:`LayerMasked`.
    x : Tensor, shape (n, channels, height, width)
        Images, floating point.
    target : Tensor of shape (n,), int or None
        The output explained.
    segments : int or Tensor of int, shape (height, width) or (n, height, width)
        About how many superpixels to cut each image into (SLIC), or the superpixel of each pixel.
    n_samples : int
        Masks an image, each superpixel kept with chance one half; the first keeps everything. At least 2.
    kernel_width : float
        Of the exponential kernel of the cosine distance, above 0.
    ridge : float
        Penalty of the coefficients, at least 0.
    generator : torch.Generator, int or None
        Source of the masks.
    progress : Progress, bool or None
        Reports images.

    Returns
    -------
    Attribution
        ``values`` in the shape of ``x``: the coefficient of each pixel's superpixel. ``extras`` holds ``coefficients`` (a
        list, one tensor an image) and ``score``, the weighted share of variance explained.

    Raises
    ------
    ArgumentError, ArgumentTypeError, ModelError
        If an argument is not allowed, or the network uses an operation that cannot be masked.

    Notes
    -----
    ``min_b sum_z k(z) (b_0 + <b, z> - f(x, m(z)))^2 + ridge ||b||^2``, ``k = exp(-d^2 / (2 width^2))``, d the cosine distance of z to
    the full mask, f the network under :class:`LayerMasked`. Cost: ``n_samples`` masked evaluations an image, 1.5 to 3
    times a plain one each.

    References
    ----------
    Balasubramanian and Feizi (2022), arXiv:2211.14646, section 5.

    Examples
    --------
    >>> net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> x = torch.tensor([[[[1.0, 1.0], [3.0, 3.0]]]])
    >>> found = layer_masking(net, x, segments=torch.tensor([[0, 0], [1, 1]]), ridge=0.0, generator=0)
    >>> bool(found.values[0, 0, 1, 0] > found.values[0, 0, 0, 0])
    True
    """
    checks.image_batch("x", x)
    checks.integer("n_samples", n_samples, low=2)
    checks.positive("kernel_width", kernel_width)
    checks.nonnegative("ridge", ridge)
    oracle, source, n = _oracle(model), as_generator(generator), len(x)
    rows = target_rows(target, x)
    numbers, values = segment_numbers(segments, x), torch.empty_like(x)
    coefficients, scores = [], []
    with oracle.frozen():
        for i in track(range(n), "layer masking", progress=progress):
            z = lime_masks(int(numbers[i].max()) + 1, n_samples, source, x)
            label = None if rows is None else rows[i].expand(n_samples)
            keep = z.bool()[:, numbers[i]][:, None]
            y = oracle.value(x[i].expand(n_samples, -1, -1, -1), label, keep)
            b, _, score = lime_fit(z, y.double(), kernel_width, ridge)
            values[i] = b[numbers[i]].to(x.dtype)
            coefficients.append(b.to(x.dtype))
            scores.append(score.to(x.dtype))
    extras = {"coefficients": coefficients, "score": torch.stack(scores)}
    return Attribution(values, rows, _counted(model, oracle), "LIME, layer masking", extras)


def neighbour_pad(x: Tensor, mask: Tensor, iterations: int) -> Tensor:
    """Fill removed pixels from the edge of the kept ones inwards.

    Parameters
    ----------
    x : Tensor, shape (n, channels, height, width)
    mask : Tensor, shape (n, 1, height, width) or (1, 1, height, width)
        1 where pixels are kept, 0 where they are removed.
    iterations : int
        How many rings of pixels to fill; what is farther away stays zero.

    Returns
    -------
    Tensor, shape of ``x``

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``a += (1 - m) box(a m) / box(m)``, then ``m`` grows by a ring, where box is the sum over 3x3 pixels: each new pixel is the mean
    of its neighbours that are set.

    References
    ----------
    Balasubramanian and Feizi (2022), arXiv:2211.14646, section 3.2.

    Examples
    --------
    >>> x = torch.tensor([[[[1.0, 3.0, 9.0, 9.0, 9.0]]]])
    >>> neighbour_pad(x, torch.tensor([[[[1, 1, 0, 0, 0]]]]), 2)
    tensor([[[[1., 3., 3., 3., 0.]]]])
    """
    checks.image_batch("x", x)
    kept = _mask(mask, x)
    steps = checks.integer("iterations", iterations, low=0)
    return filled(x * kept, kept.to(x.dtype), steps)


def missingness_bias(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    masks: Tensor,
    *,
    masker: Literal["layer"] | float | Tensor | Fill = "layer",
    shapes: Tensor | None = None,
    progress: ProgressLike = False,
) -> BiasReport:
    """Measure what a removal does to a classifier's predictions by itself.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Classifier of images, answering (n, classes) logits.
    x : Tensor, shape (n, channels, height, width)
        Images, floating point.
    masks : Tensor, shape (k, n, 1, height, width)
        Masks, k an image: 1 where pixels are kept, 0 where they are removed. ``n`` may be 1: the same for all images.
    masker : "layer", float, Tensor or callable
        How pixels are removed: by :class:`LayerMasked`, by a colour (a number, or a tensor that broadcasts to ``x``), or by
        a function of images and a mask that returns images.
    shapes : Tensor of int, shape (k, n), optional
        Class of each mask's shape, to measure its leakage. The rows should be independent: neither shapes nor images
        repeated.
    progress : Progress, bool or None
        Reports masks.

    Returns
    -------
    BiasReport

    Raises
    ------
    ArgumentError, ArgumentTypeError, ModelError
        If an argument is not allowed, or the network uses an operation that cannot be masked.

    Notes
    -----
    The probe is ridge regression of the shapes' indicators on standardised outputs, with exact leave-one-out predictions
    ``(yhat_i - h_ii y_i) / (1 - h_ii)``. Cost: ``k + 1`` evaluations an image.

    References
    ----------
    Balasubramanian and Feizi (2022), arXiv:2211.14646, section 4.

    Examples
    --------
    >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> report = missingness_bias(net, torch.ones(3, 1, 4, 4), torch.eye(4).expand(5, 3, 1, 4, 4))
    >>> report.unchanged
    tensor([1., 1., 1.])
    """
    checks.image_batch("x", x)
    checks.tensor("masks", masks, ndim=5, floating=False)
    k, n = len(masks), len(x)
    kept = _mask(masks.flatten(0, 1), x, k * n if masks.shape[1] == n else k).unflatten(0, (k, -1))
    kinds = None if shapes is None else checks.labels("shapes", torch.as_tensor(shapes).flatten(), n=k * n)
    layered = isinstance(masker, str) and checks.one_of("masker", masker, ("layer",)) == "layer"
    oracle = _oracle(model) if layered else Oracle.wrap(model)
    before = oracle.cost
    whole_mask = torch.ones_like(x[:, :1], dtype=torch.bool)
    whole = oracle(x, whole_mask) if layered else oracle(x)
    if whole.ndim != 2 or whole.shape[1] < 2:
        raise checks.ModelError(
            f"the model answers shape {tuple(whole.shape)}; allowed: (n, classes) with two classes at least. Pass a classifier."
        )
    outputs = []
    for mask in track(kept.expand(k, n, -1, -1, -1), "missingness bias", progress=progress):
        outputs.append(oracle(x, mask) if layered else oracle(_removed(masker, x, mask)))
    out, classes = torch.stack(outputs), whole.shape[1]  # [masks, images, classes]
    same = (out.argmax(2) == whole.argmax(1)).to(out.dtype).mean(0)
    change = (out.softmax(2) - whole.softmax(1)).abs().sum(2).mean(0) / 2
    leakage = float("nan") if kinds is None else _probe(out.flatten(0, 1).double(), kinds.to(out.device))
    under, of_whole = (_entropy(v.argmax(-1).flatten(), classes) for v in (out, whole))
    spent = _counted(model, oracle) if layered else oracle.cost - before
    return BiasReport(same, change, under, of_whole, leakage, spent)


def _mask(mask: Tensor, x: Tensor, rows: int | None = None) -> Tensor:
    """Return a mask as booleans, one an image."""
    checks.tensor("mask", mask, ndim=4, floating=False)
    n = len(x) if rows is None else rows
    if mask.shape[1:] != (1, *x.shape[2:]) or (len(mask) != n and (len(mask) != 1 or rows is not None)):
        raise checks.ArgumentError(
            f"mask has shape {tuple(mask.shape)}; allowed: {(n, 1, *x.shape[2:])}, one an image. Reshape or repeat it."
        )
    kept = mask.to(x.device) != 0
    if not bool((kept == mask.to(x.device)).all()):
        raise checks.ArgumentError(
            f"mask goes from {float(mask.min()):.3g} to {float(mask.max()):.3g}; allowed: zeros and ones. Round it, for instance mask > 0.5."
        )
    return kept.expand(n, -1, -1, -1)


def _oracle(model: Any) -> Oracle:
    """Return an oracle of the masked network, under the limits of the one given."""
    if not isinstance(model, Oracle):
        return Oracle(LayerMasked(model))
    return Oracle(
        LayerMasked(model.fun), memory=model.memory, chunk_size=model.chunk_size, device=model.device
    )


def _counted(model: Any, oracle: Oracle) -> Cost:
    """Return what the masked network was asked, counted by the oracle given too."""
    if isinstance(model, Oracle):
        model.nfev += oracle.nfev
    return oracle.cost


def _removed(masker: Any, x: Tensor, mask: Tensor) -> Tensor:
    if callable(masker):
        return checks.same_shape("the images that masker returns", masker(x, mask), "x", x)
    return torch.where(mask, x, expanded_baseline(masker, x))


def _entropy(labels: Tensor, classes: int) -> float:
    share = torch.bincount(labels, minlength=classes).double() / len(labels)
    return float(-torch.xlogy(share, share).sum())


def _probe(outputs: Tensor, kinds: Tensor, ridge: float = 1.0) -> float:
    """Return the leave-one-out accuracy of a linear classifier of the outputs' kinds."""
    spread = outputs.std(0).clamp(min=torch.finfo(outputs.dtype).eps)
    features = torch.cat([(outputs - outputs.mean(0)) / spread, torch.ones_like(outputs[:, :1])], 1)
    indicators = nn.functional.one_hot(kinds).to(outputs.dtype)
    gram = features.T @ features + ridge * torch.eye(
        features.shape[1], dtype=outputs.dtype, device=outputs.device
    )
    hat = features @ torch.linalg.solve(gram, features.T)
    # Times 1 - h_ii, which does not change which is largest.
    left_out = hat @ indicators - hat.diagonal()[:, None] * indicators
    return float((left_out.argmax(1) == kinds).double().mean())
