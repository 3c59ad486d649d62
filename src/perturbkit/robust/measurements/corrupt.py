"""Natural damage of images and tables in five severities, on tensors and reproducible.

Use it to ask what noise, blur or missing values do to a model's accuracy. After Hendrycks and Dietterich (2019),
Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, arXiv:1903.12261.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from perturbkit.core import checks
from perturbkit.core.random import Seed, as_generator, rademacher, randn, uniform
from perturbkit.robust.measurements._jpeg import coded, tables

__all__ = ["IMAGE_CORRUPTIONS", "TABLE_CORRUPTIONS", "corrupt"]

IMAGE_CORRUPTIONS = ("noise", "blur", "contrast", "brightness", "pixelate", "compression")
TABLE_CORRUPTIONS = ("missing", "noise", "rounded", "rescaled", "shifted")


def corrupt(
    x: Tensor, kind: str, severity: int, *, scale: Tensor | float | None = None, generator: Seed = None
) -> Tensor:
    """Damage a batch of images or a table.

    Parameters
    ----------
    x : Tensor, shape (n, channels, height, width) in [0, 1], or (n, features)
        Inputs, floating point.
    kind : str
        One of ``IMAGE_CORRUPTIONS`` or ``TABLE_CORRUPTIONS``.
    severity : int
        1 (light) to 5 (heavy).
    scale : Tensor of shape (features,), float or None
        Unit of each column of a table; by default its standard deviation in ``x``.
    generator : torch.Generator, int or None
        Source of the random kinds.

    Returns
    -------
    Tensor, shape of ``x``
        Images stay in [0, 1].

    Raises
    ------
    ArgumentError
        If the kind, the severity or the range of an image is not allowed.

    Notes
    -----
    Images, by severity s = 1..5: Gaussian noise of deviation 0.04 s; Gaussian blur of 0.3 s % of the width, at least
    0.3 s pixels; contrast multiplied by 0.75, 0.6, 0.45, 0.3, 0.15; brightness raised by 0.08 s; resolution lowered to
    0.5, 0.4, 0.3, 0.25, 0.2; compression that quantises 8x8 cosine coefficients as JPEG does at quality 60, 40, 25, 15,
    8 and rounds to 8 bits. Tables: a share 0.05 s of the cells replaced by the column mean; noise of 0.1 s scales; values rounded to steps of
    0.2 s scales; columns multiplied by 1 +- 0.05 s; columns shifted by +- 0.1 s scales.

    References
    ----------
    Hendrycks and Dietterich (2019), arXiv:1903.12261; the severities here are simpler and scale with the image.

    Examples
    --------
    >>> image = torch.full((1, 1, 4, 4), 0.5)
    >>> float(corrupt(image, "brightness", 5).mean())
    0.9
    """
    image = checks.tensor("x", x, ndim=(2, 4)).ndim == 4
    checks.one_of("kind", kind, IMAGE_CORRUPTIONS if image else TABLE_CORRUPTIONS)
    s = checks.integer("severity", severity, low=1, high=5)
    g = as_generator(generator)
    if image:
        low, high = float(x.min()), float(x.max())
        if low < 0 or high > 1:
            raise checks.ArgumentError(
                f"x has values from {low:.4g} to {high:.4g}; allowed: images in [0, 1]. Scale them first."
            )
        return _IMAGE[kind](x, s, g).clamp(0, 1)
    return _TABLE[kind](x, s, _unit(x, scale), g)


def _unit(x: Tensor, scale: Tensor | float | None) -> Tensor:
    if scale is None:
        return x.std(0, correction=0)
    unit = torch.as_tensor(scale, dtype=x.dtype, device=x.device)
    if unit.shape not in ((), x.shape[1:]) or not bool((unit >= 0).all()) or not bool(unit.isfinite().all()):
        raise checks.ArgumentError(
            f"scale has shape {tuple(unit.shape)} and values from {float(unit.min()):.4g} to {float(unit.max()):.4g}; "
            f"allowed: one finite number, zero or above, for all columns or for each of the {x.shape[1]}. Correct it."
        )
    return unit


# -- images ---------------------------------------------------------------------------------------------------


def _noise(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    return x + 0.04 * s * randn(x.shape, generator=g, like=x)


def _blur(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    sigma = s * max(0.3, 0.003 * x.shape[-1])
    reach = min(math.ceil(3 * sigma), x.shape[-1] - 1, x.shape[-2] - 1)
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype) / sigma) ** 2)
    taps = taps / taps.sum()
    channels = x.shape[1]
    padded = functional.pad(x, (reach, reach, reach, reach), mode="reflect")
    across = functional.conv2d(padded, taps.expand(channels, 1, 1, -1), groups=channels)
    return functional.conv2d(across, taps[:, None].expand(channels, 1, -1, 1), groups=channels)


def _contrast(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (0.9 - 0.15 * s) * (x - mean)


def _brightness(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    return x + 0.08 * s


def _pixelate(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    kept = (0.5, 0.4, 0.3, 0.25, 0.2)[s - 1]
    size = (max(1, round(kept * x.shape[-2])), max(1, round(kept * x.shape[-1])))
    small = functional.adaptive_avg_pool2d(x, size)
    return functional.interpolate(small, size=tuple(x.shape[-2:]), mode="nearest")


def _compression(x: Tensor, s: int, g: torch.Generator) -> Tensor:
    """Quantise the cosine coefficients of 8x8 blocks by the JPEG luminance table, every channel alike."""
    light, _ = tables((60, 40, 25, 15, 8)[s - 1])
    return coded(255 * x, x.new_tensor(light)) / 255


_IMAGE: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "noise": _noise, "blur": _blur, "contrast": _contrast, "brightness": _brightness, "pixelate": _pixelate,
    "compression": _compression,
}  # fmt: skip


# -- tables ---------------------------------------------------------------------------------------------------


def _missing(x: Tensor, s: int, unit: Tensor, g: torch.Generator) -> Tensor:
    return torch.where(uniform(x.shape, generator=g, like=x) < 0.05 * s, x.mean(0), x)


def _table_noise(x: Tensor, s: int, unit: Tensor, g: torch.Generator) -> Tensor:
    return x + 0.1 * s * unit * randn(x.shape, generator=g, like=x)


def _rounded(x: Tensor, s: int, unit: Tensor, g: torch.Generator) -> Tensor:
    step = torch.where(unit > 0, 0.2 * s * unit, torch.ones_like(unit))
    return torch.where(unit > 0, (x / step).round() * step, x)


def _rescaled(x: Tensor, s: int, unit: Tensor, g: torch.Generator) -> Tensor:
    return x * (1 + 0.05 * s * rademacher(x.shape[1:], generator=g, like=x))


def _shifted(x: Tensor, s: int, unit: Tensor, g: torch.Generator) -> Tensor:
    return x + 0.1 * s * unit * rademacher(x.shape[1:], generator=g, like=x)


_TABLE: dict[str, Callable[[Tensor, int, Tensor, torch.Generator], Tensor]] = {
    "missing": _missing, "noise": _table_noise, "rounded": _rounded, "rescaled": _rescaled, "shifted": _shifted,
}  # fmt: skip
