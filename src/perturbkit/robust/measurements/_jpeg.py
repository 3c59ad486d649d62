"""JPEG on batches of images: through the codec, and the same steps in PyTorch, with gradients."""

from __future__ import annotations

import io
from functools import cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from scipy.fft import dct
from torch import Tensor
from torch.nn import functional

__all__ = ["LARGEST_SIDE", "LUMA", "Subsampling", "by_codec", "coded", "in_torch", "tables", "through"]

Subsampling = Literal["4:2:0", "4:4:4"]
LUMA = (0.299, 0.587, 0.114)
LARGEST_SIDE = 65_496  # of a file, in pixels: a multiple of 8


def by_codec(x: Tensor, quality: int, subsampling: Subsampling) -> Tensor:
    """Send images (n, 1 or 3, height, width) in [0, 1] through Pillow."""
    pixels = (255 * x.detach()).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    n, height, width, channels = pixels.shape
    if channels == 3 and subsampling == "4:2:0":
        # The decoder smooths colour across blocks, so pictures may not touch.
        found = np.stack([_round_trip(image, quality, subsampling) for image in pixels])
    else:
        # Blocks of eight rows know nothing of each other: whole stacks go through at once, to the same pixels.
        padded = np.pad(pixels, ((0, 0), (0, -height % 8), (0, 0), (0, 0)), mode="edge")
        found = np.empty_like(padded)
        many = LARGEST_SIDE // padded.shape[1]
        for start in range(0, n, many):
            stack = padded[start : start + many]
            decoded = _round_trip(stack.reshape(-1, width, channels), quality, "4:4:4")
            found[start : start + many] = decoded.reshape(stack.shape)
    return torch.from_numpy(found[:, :height]).permute(0, 3, 1, 2).to(x) / 255


def _round_trip(image: np.ndarray, quality: int, subsampling: Subsampling) -> np.ndarray:
    buffer = io.BytesIO()
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    picture.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return np.asarray(Image.open(buffer)).reshape(image.shape)


def in_torch(x: Tensor, quality: int, subsampling: Subsampling) -> Tensor:
    """Return what the codec answers, up to its rounding, with a graph; half precisions are computed in single."""
    height, width = x.shape[-2:]
    levels = through(255 * x.to(torch.promote_types(x.dtype, torch.float32)))
    light, colour = (levels.new_tensor(table) for table in tables(quality))
    if x.shape[1] == 1:
        return (coded(levels, light) / 255).to(x.dtype)
    r, g, b = LUMA
    colours = np.array(
        [[r, g, b], [-r / (2 - 2 * b), -g / (2 - 2 * b), 0.5], [0.5, -g / (2 - 2 * r), -b / (2 - 2 * r)]]
    )
    offset = levels.new_tensor([0.0, 128.0, 128.0]).reshape(3, 1, 1)
    planes = through(torch.einsum("kc,nchw->nkhw", levels.new_tensor(colours), levels) + offset)
    luma, chroma = planes[:, :1], planes[:, 1:]
    if subsampling == "4:2:0":
        padded = functional.pad(chroma, (0, -width % 16, 0, -height % 16), mode="replicate")
        half = coded(through(functional.avg_pool2d(padded, 2)), colour)
        half = half[..., : -(-height // 2), : -(-width // 2)]
        chroma = functional.interpolate(half, scale_factor=2, mode="bilinear")[..., :height, :width]
    else:
        chroma = coded(chroma, colour)
    decoded = torch.cat([coded(luma, light), chroma], 1) - offset
    out = torch.einsum("ck,nkhw->nchw", levels.new_tensor(np.linalg.inv(colours)), decoded)
    return (through(out.clamp(0, 255)) / 255).to(x.dtype)


@cache
def tables(quality: int) -> tuple[list[list[float]], list[list[float]]]:
    """Return the steps of luminance and colour, 8x8 each, as the codec writes them."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG", quality=quality)
    written = Image.open(buffer).quantization  # type: ignore[attr-defined]
    light, colour = (np.array(written[k], dtype=float).reshape(8, 8).tolist() for k in (0, 1))
    return light, colour


def coded(plane: Tensor, table: Tensor) -> Tensor:
    """Quantise the cosine coefficients of the 8x8 blocks of planes (n, k, height, width) and go back to 8 bits.

    The rounding of a coefficient has the slope ``3 (c / q - round(c / q))^2``.
    """
    height, width = plane.shape[-2:]
    padded = functional.pad(plane, (0, -width % 8, 0, -height % 8), mode="replicate") - 128
    cosine = plane.new_tensor(dct(np.eye(8), axis=0, norm="ortho"))
    coefficients = (cosine @ padded.unfold(2, 8, 8).unfold(3, 8, 8) @ cosine.T) / table
    whole = coefficients.detach().round()
    cubic = (coefficients - whole) ** 3  # of no value, but with a slope
    blocks = cosine.T @ ((whole + cubic - cubic.detach()) * table) @ cosine
    rows = blocks.permute(0, 1, 2, 4, 3, 5).reshape(padded.shape)[..., :height, :width]
    return through((rows + 128).clamp(0, 255))


def through(x: Tensor) -> Tensor:
    """Round, with the gradient of the identity."""
    return x + (x.round() - x).detach()
