"""Image shortcut squeezing: training images compressed until what poisons hid in them is gone.

Use it to train on images that someone may have perturbed so that networks learn the perturbation and not the picture; it
costs one compression of the data. Liu, Zhao and Larson (2023), Image Shortcut Squeezing: Countering Perturbative
Availability Poisons with Compression, arXiv:2301.13838.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perturbkit.core import Oracle, Result, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.robust.attacks._parts import labels_for
from perturbkit.robust.measurements._jpeg import LARGEST_SIDE, LUMA, Subsampling, by_codec, in_torch, through
from perturbkit.robust.training._poisons import (
    autoregressive_poison,
    error_maximising_poison,
    error_minimising_poison,
    patch_poison,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ImageShortcutSqueezing",
    "PoisonTable",
    "autoregressive_poison",
    "error_maximising_poison",
    "error_minimising_poison",
    "evaluate_poisons",
    "grayscale",
    "jpeg",
    "patch_poison",
    "reduce_bits",
]


@dataclass(frozen=True, eq=False)
class PoisonTable(Result):
    """Accuracy on test images after training on poisoned ones, for each poison and each treatment of the images.

    Attributes
    ----------
    poisons, defences : tuple of str
        Names of rows and columns.
    accuracy : Tensor, shape (poisons, defences)
        Shares of right answers.
    """

    poisons: tuple[str, ...]
    defences: tuple[str, ...]
    accuracy: Tensor

    def to_frame(self) -> pd.DataFrame:
        """Return a line a poison, a column a defence."""
        import pandas as pd

        return pd.DataFrame(self.accuracy.cpu().numpy(), list(self.poisons), list(self.defences))


class ImageShortcutSqueezing:
    """Squeeze batches of images: grey levels, fewer bits, JPEG, in this order and each only if asked for.

    Parameters
    ----------
    grayscale : bool
        Replace colours by their luminance: against poisons of low frequency, which differ by colour.
    jpeg_quality : int or None
        1 to 100: against poisons of high frequency, those made with well-trained networks.
    bits : int or None
        Bits of each channel, 1 to 8. The weakest of the three.
    differentiable : bool
        Compute everything in a form that passes gradients, for attacks that know of the squeezing.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed; at a call, if the images are not.

    Notes
    -----
    Squeeze the training images, and the images that are answered later alike (the paper's tables leave those as they are).
    It costs accuracy where nothing is poisoned: choose the one kind where the kind of poison is known.

    Blocks of JPEG have 8x8 pixels: enlarge images below 16x16 to 32x32 first.

    Cost: one pass of the codec over the data, before training. Grey images go through it as one tall picture, many times
    faster than one by one.

    References
    ----------
    Liu et al. (2023), arXiv:2301.13838.

    Examples
    --------
    >>> images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> squeezed = ImageShortcutSqueezing(jpeg_quality=10)(images)
    >>> squeezed.shape, bool((squeezed[:, 0] == squeezed[:, 2]).all())
    (torch.Size([2, 3, 32, 32]), True)
    """

    def __init__(
        self,
        grayscale: bool = True,
        jpeg_quality: int | None = 10,
        bits: int | None = None,
        *,
        differentiable: bool = False,
    ) -> None:
        self.grayscale = bool(grayscale)
        self.jpeg_quality = None if jpeg_quality is None else _quality(jpeg_quality)
        self.bits = None if bits is None else _bits(bits)
        self.differentiable = bool(differentiable)

    def __repr__(self) -> str:
        return (
            f"ImageShortcutSqueezing(grayscale={self.grayscale}, jpeg_quality={self.jpeg_quality}, bits={self.bits}, "
            f"differentiable={self.differentiable})"
        )

    def __call__(self, images: Tensor) -> Tensor:
        """Return the squeezed images.

        Parameters
        ----------
        images : Tensor, shape (n, 1 or 3, height, width), in [0, 1]
            Images, floating point.

        Returns
        -------
        Tensor, shape of ``images``
        """
        out = _images(images)
        if self.grayscale:
            out = _luminance(out)  # one channel for now: of grey pictures JPEG keeps no other
        if self.bits is not None:
            out = reduce_bits(out, self.bits, differentiable=self.differentiable)
        if self.jpeg_quality is not None:
            out = jpeg(out, self.jpeg_quality, differentiable=self.differentiable)
        return out.expand(images.shape).contiguous()


def grayscale(images: Tensor) -> Tensor:
    """Replace colours by their luminance.

    Parameters
    ----------
    images : Tensor, shape (n, 1 or 3, height, width), in [0, 1]
        Images, floating point.

    Returns
    -------
    Tensor, shape of ``images``
        Every channel ``0.299 R + 0.587 G + 0.114 B``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the images are not allowed.

    Notes
    -----
    A linear projection: whatever has no luminance is gone, and nothing else.

    Examples
    --------
    >>> grayscale(torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)).flatten().tolist()
    [0.29899999499320984, 0.29899999499320984, 0.29899999499320984]
    """
    return _luminance(_images(images)).expand(images.shape).contiguous()


def reduce_bits(images: Tensor, bits: int = 2, *, differentiable: bool = False) -> Tensor:
    """Round to the ``2 ** bits`` levels that are evenly spaced from 0 to 1.

    Parameters
    ----------
    images : Tensor, shape (n, 1 or 3, height, width), in [0, 1]
        Images, floating point.
    bits : int
        1 to 8.
    differentiable : bool
        Pass gradients as if nothing were rounded.

    Returns
    -------
    Tensor, shape of ``images``

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    Levels hold both ends, as in feature squeezing; the authors' code cuts bits off instead, which darkens.

    Examples
    --------
    >>> reduce_bits(torch.tensor([0.1, 0.4, 0.9]).reshape(1, 3, 1, 1), bits=1).flatten().tolist()
    [0.0, 0.0, 1.0]
    """
    top = 2 ** _bits(bits) - 1
    x = _images(images)
    return (through(top * x) if differentiable else (top * x.detach()).round()) / top


def jpeg(
    images: Tensor,
    quality: int = 10,
    *,
    subsampling: Subsampling = "4:2:0",
    differentiable: bool = False,
) -> Tensor:
    """Compress and decompress images as JPEG.

    Parameters
    ----------
    images : Tensor, shape (n, 1 or 3, height, width), in [0, 1]
        Images, floating point; read in 8 bits. Sides are of at most 65,496 pixels.
    quality : int
        1 to 100, as libjpeg counts it.
    subsampling : {"4:2:0", "4:4:4"}
        Whether colour has half the resolution, the habit of most programs, or the full one.
    differentiable : bool
        The same steps in PyTorch, with gradients, instead of the codec.

    Returns
    -------
    Tensor, shape of ``images``
        In [0, 1], whole multiples of 1/255.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    Colours to luminance and two colour differences; 8x8 blocks to their cosine coefficients ``c``; each to
    ``q round(c / q)``, where the steps ``q`` grow with frequency; and back.

    Gradients pass the roundings to 8 bits as if they were not there, and the rounding of coefficients with the slope
    ``3 (c / q - round(c / q))^2`` of Shin and Song: near zero where a coefficient is small beside its step. Without that the
    whole would have the derivative of the identity.

    Cost: about 0.2 ms an image of 32x32 in colour; those at 4:4:4 share calls of the codec and take a third, grey ones a tenth.

    References
    ----------
    Wallace (1991), The JPEG still picture compression standard; Shin and Song (2017), JPEG-resistant adversarial images.

    Examples
    --------
    Of a flat grey of 102, quality 10 keeps the nearest multiple of 10 off 128:

    >>> float(255 * jpeg(torch.full((1, 1, 8, 8), 0.4), quality=10).mean())
    98.0
    """
    x = _images(images)
    _quality(quality)
    checks.one_of("subsampling", subsampling, ("4:2:0", "4:4:4"))
    for name, side in (("height", x.shape[2]), ("width", x.shape[3])):
        checks.integer(f"the {name} of images", side, low=1, high=LARGEST_SIDE)
    return (in_torch if differentiable else by_codec)(x, quality, subsampling)


def evaluate_poisons(
    train: Callable[[Tensor, Tensor], Oracle | Callable[..., Any]],
    x: Tensor,
    y: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    poisons: Mapping[str, Callable[[Tensor, Tensor], Tensor]],
    defences: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    squeeze_test: bool = True,
    progress: ProgressLike = False,
) -> PoisonTable:
    """Train on each poisoned set under each defence and count right answers on clean test images.

    Parameters
    ----------
    train : callable
        ``train(x, y)`` returns a new classifier, answering (n, classes); it brings its own randomness.
    x, y : Tensor, shapes (n, channels, height, width) and (n,)
        Clean training images in [0, 1] and their labels.
    x_test, y_test : Tensor
        Clean test images and labels.
    poisons : mapping of str to callable
        ``poison(x, y)`` returns poisoned images; the identity for a clean row.
    defences : mapping of str to callable
        ``defence(images)`` returns treated images.
    squeeze_test : bool
        Treat test images alike. Defences that only augment training (cutout) want ``False``.
    progress : Progress, bool or None
        Reports trainings.

    Returns
    -------
    PoisonTable

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If data are not allowed, a mapping is empty, or a poison changes the shape of images.
    ModelError
        If a classifier does not answer one score a class.

    Notes
    -----
    Cost: a training a cell; each poison is made once.

    Examples
    --------
    >>> x, y = torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
    >>> train = lambda x, y: lambda z: torch.tensor([[1.0, 0.0]]).expand(len(z), 2)
    >>> same = {"none": lambda x, y: x}, {"none": lambda x: x}
    >>> evaluate_poisons(train, x, y, x, y, *same).to_frame().loc["none", "none"].item()
    0.5
    """
    _images(x, "x")
    _images(x_test, "x_test")
    labels = checks.labels("y", y, n=len(x)).to(x.device)
    test_labels = checks.labels("y_test", y_test, n=len(x_test)).to(x_test.device)
    if not callable(train):
        raise checks.ArgumentTypeError(
            f"train is a {type(train).__name__}; allowed: a callable. Pass the function that trains a classifier."
        )
    for name, given in (("poisons", poisons), ("defences", defences)):
        if not isinstance(given, Mapping):
            raise checks.ArgumentTypeError(
                f"{name} is a {type(given).__name__}; allowed: a mapping of names to callables. Pass a dict."
            )
        if not given:
            raise checks.ArgumentError(f"{name} is empty; allowed: at least one by name. Add one.")
    made = {
        name: checks.same_shape(f"the answer of poison {name!r}", poison(x, labels), "x", x)
        for name, poison in poisons.items()
    }
    cells = [(p, d) for p in poisons for d in defences]
    shares = []
    for poison, defence in track(cells, "training on poisons", progress=progress):
        treat = defences[defence]
        model = Oracle.wrap(train(treat(made[poison]), labels))
        answers, right = labels_for(model, treat(x_test) if squeeze_test else x_test, test_labels)
        shares.append(float((answers.argmax(1) == right.to(answers.device)).double().mean()))
    accuracy = torch.tensor(shares, dtype=x.dtype).reshape(len(poisons), len(defences))
    return PoisonTable(tuple(poisons), tuple(defences), accuracy)


def _images(images: Tensor, name: str = "images") -> Tensor:
    """Check images and return them with what an optimiser's rounding put outside [0, 1] cut off."""
    checks.image_batch(name, images)
    low, high = float(images.detach().min()), float(images.detach().max())
    if images.shape[1] not in (1, 3) or low < -1e-4 or high > 1 + 1e-4:
        raise checks.ArgumentError(
            f"{name} has {images.shape[1]} channels and values from {low:.4g} to {high:.4g}; allowed: 1 or 3 channels in "
            "[0, 1]. Scale the images first (divide 8-bit ones by 255)."
        )
    return images.clamp(0, 1)


def _quality(quality: int) -> int:
    return checks.integer("quality", quality, low=1, high=100)


def _bits(bits: int) -> int:
    return checks.integer("bits", bits, low=1, high=8)


def _luminance(x: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x
    return (x * x.new_tensor(LUMA).reshape(3, 1, 1)).sum(1, keepdim=True)
