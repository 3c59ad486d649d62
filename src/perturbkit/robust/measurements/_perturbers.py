"""In what :mod:`foundation_model_robustness` moves images: codes of an autoencoder, pixels, and style."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from perturbkit.core import BallInBox, Norm, Oracle, around, checks

__all__ = ["LatentPerturber", "Perturber", "PixelPerturber", "StylePerturber", "check_render"]


class Perturber(Protocol):
    """In what images are moved."""

    def start(self, x: Tensor) -> Tensor:
        """Return the codes of images, one a row."""

    def render(self, x: Tensor, code: Tensor) -> Tensor:
        """Return the images that codes stand for, with a graph; ``x`` is where they came from."""

    def project(self, x: Tensor, code: Tensor) -> Tensor:
        """Return the nearest codes that are allowed."""


class LatentPerturber:
    """Move images in the code of an autoencoder.

    Parameters
    ----------
    encoder, decoder : nn.Module or callable
        Images (n, ...) to codes (n, ...) and back; the decoder is differentiated.

    Raises
    ------
    ArgumentTypeError
        If one cannot be called.

    Notes
    -----
    ``x' = decoder(encoder(x) + d)``: the images differ from x by what the autoencoder loses as well.

    References
    ----------
    Zhang et al. (2024), arXiv:2308.10632, with VQGAN.

    Examples
    --------
    >>> half = LatentPerturber(lambda x: 2 * x, lambda code: code / 2)
    >>> half.render(torch.ones(1, 2), half.start(torch.ones(1, 2)) + 1)
    tensor([[1.5000, 1.5000]])
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor], decoder: Callable[[Tensor], Tensor]) -> None:
        # The doors of Oracle: what can be called, and modules as they were afterwards.
        self.encoder, self.decoder = Oracle(encoder), Oracle(decoder)

    def start(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def render(self, x: Tensor, code: Tensor) -> Tensor:
        return self.decoder.fun(code)

    def project(self, x: Tensor, code: Tensor) -> Tensor:
        return code


class PixelPerturber:
    """Move the values of images, in a ball.

    Parameters
    ----------
    norm : {"l1", "l2", "linf"}
        Norm of the change.
    epsilon : float
        Its largest size, zero or above.
    bounds : (float, float) or None
        Range of valid images.

    Raises
    ------
    ArgumentError
        If an option is not allowed.

    Notes
    -----
    ``x' = x + d`` with d in the ball and x' within the bounds.

    References
    ----------
    Zhang et al. (2024), arXiv:2308.10632.

    Examples
    --------
    >>> PixelPerturber("linf", 0.1).project(torch.tensor([[0.5, 1.0]]), torch.tensor([[0.8, 1.2]]))
    tensor([[0.6000, 1.0000]])
    """

    def __init__(
        self, norm: Norm = "l2", epsilon: float = 1.0, *, bounds: tuple[float, float] | None = (0.0, 1.0)
    ) -> None:
        self.norm: Norm = checks.one_of("norm", norm, ("l1", "l2", "linf"))
        self.epsilon, self.bounds = checks.nonnegative("epsilon", epsilon), _range(bounds)

    def start(self, x: Tensor) -> Tensor:
        return x

    def render(self, x: Tensor, code: Tensor) -> Tensor:
        return code

    def project(self, x: Tensor, code: Tensor) -> Tensor:
        allowed: BallInBox = around(x, self.norm, self.epsilon, self.bounds)
        return x + allowed.project(code - x)


class StylePerturber:
    """Move the mean and the contrast of each channel, what is shown left alone.

    Parameters
    ----------
    bounds : (float, float) or None
        Range of valid images, to which they are clipped.

    Raises
    ------
    ArgumentError
        If the bounds are not in order.

    Notes
    -----
    ``x' = m + e^a (x - m) + b`` with the mean m of each channel of each image and the code (a, b), from zero.

    References
    ----------
    Zhang et al. (2024), arXiv:2308.10632; Huang and Belongie (2017), arXiv:1703.06868.

    Examples
    --------
    >>> style = StylePerturber(bounds=None)
    >>> style.render(torch.tensor([[[[0.0, 1.0]]]]), torch.tensor([[[0.0], [0.25]]]))
    tensor([[[[0.2500, 1.2500]]]])
    """

    def __init__(self, *, bounds: tuple[float, float] | None = (0.0, 1.0)) -> None:
        self.bounds = _range(bounds)

    def start(self, x: Tensor) -> Tensor:
        return torch.zeros((len(x), 2, checks.image_batch("x", x).shape[1]), dtype=x.dtype, device=x.device)

    def render(self, x: Tensor, code: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        stretch, shift = (part[:, :, None, None] for part in code.unbind(1))
        moved = mean + stretch.exp() * (x - mean) + shift
        return moved if self.bounds is None else moved.clamp(*self.bounds)

    def project(self, x: Tensor, code: Tensor) -> Tensor:
        return code


def _range(bounds: tuple[float, float] | None) -> tuple[float, float] | None:
    if bounds is None:
        return None
    if not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise checks.ArgumentTypeError(
            f"bounds is {bounds!r}; allowed: two numbers, or None. Pass (smallest, largest) value of a pixel."
        )
    high = checks.between("bounds[1]", bounds[1], -math.inf, math.inf)
    return checks.between("bounds[0]", bounds[0], -math.inf, high, inclusive="low"), high


def check_render(perturber: Perturber, x: Tensor) -> None:
    """Refuse a perturber whose images are not of the given shape, or cannot be differentiated; by one row."""
    with torch.enable_grad():
        picture = perturber.render(x, perturber.start(x).detach().requires_grad_(True))
    checks.same_shape("what perturber.render answered", picture, "x", x)
    if not picture.requires_grad:
        raise checks.ArgumentError(
            "what perturber.render answered has no gradient in the code; allowed: images that are differentiable in it. Leave out "
            "detach and no_grad."
        )
