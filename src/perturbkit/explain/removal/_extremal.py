"""What extremal perturbations are made of: an image at growing blurs, and masks without holes or specks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_TEMPERATURE = 1 / 20


def blur_pyramid(x: Tensor, levels: int, largest: float) -> Tensor:
    """Return blurs from none to the largest, shape (n, levels, channels, height, width)."""
    sigmas = [largest * level / (levels - 1) for level in range(1, levels)]
    return torch.stack([x, *(_blurred(x, sigma) for sigma in sigmas)], 1)


def between_levels(levels: Tensor, mask: Tensor) -> Tensor:
    """Interpolate between levels: the first where the mask is 1, the last where it is 0.

    The masks, shape (k n, 1, height, width), are k rounds of the n images.
    """
    n, last = len(levels), levels.shape[1] - 1
    place = ((1 - mask) * last).reshape(-1, n, 1, 1, *mask.shape[2:])
    # The lower level is never the last one, so that a mask of 0 has a slope too.
    lower = place.detach().floor().clamp(0, last - 1)
    wide = levels.expand(len(place), *levels.shape)
    index = lower.long().expand(-1, -1, -1, *levels.shape[2:])
    near, far = wide.gather(2, index), wide.gather(2, index + 1)
    return torch.lerp(near, far, (place - lower).expand_as(near)).flatten(0, 1)[:, 0]


def window_of(parameters: Tensor, step: int, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the kernel between the pixels of a cell and the cells around, what bars pairs out of reach, and which cells.

    The first two have the axes (taps, rows, step, columns, step), a pixel being ``step`` times its cell and the rest; the last
    picks the taps from the square of cells around.
    """
    cut = 1.5 * sigma
    reach = int((cut + (step - 1) / 2) / step)  # a cell farther away has no pixel within the cut
    line = torch.arange(-reach, reach + 1, dtype=parameters.dtype, device=parameters.device)
    inside = torch.arange(step, dtype=parameters.dtype, device=parameters.device) - (step - 1) / 2
    apart = (inside - step * line[:, None]).square()
    distance = (
        (apart[:, None, None, :, None, None] + apart[None, :, None, None, None, :]).sqrt().flatten(0, 1)
    )
    near = distance <= cut
    near[len(near) // 2] = True  # a pixel's own cell
    taps = near.flatten(1).any(1).nonzero()[:, 0]
    far = (2 * distance[taps] / sigma - 1).clamp(min=0) if sigma > 0 else torch.zeros_like(distance[taps])
    there = _around(torch.ones_like(parameters[:1]), reach, taps)[0] > 0
    barred = distance.new_zeros(()).masked_fill(~(near[taps] & there), -torch.inf)
    return torch.exp(-(far**2) / 2), barred, taps


def smoothed(
    parameters: Tensor, kernel: Tensor, barred: Tensor, taps: Tensor, size: tuple[int, int]
) -> Tensor:
    """Return the smooth maximum of the parameters around each pixel, weighed by the kernel."""
    rows, columns = parameters.shape[2:]
    step, reach = kernel.shape[2], (math.isqrt(2 * int(taps[len(taps) // 2]) + 1) - 1) // 2
    z = kernel * _around(parameters, reach, taps)  # [masks, taps, rows, step, columns, step]
    weight = torch.add(barred, z, alpha=1 / _TEMPERATURE).softmax(1)
    return (weight * z).sum(1).reshape(-1, 1, rows * step, columns * step)[:, :, : size[0], : size[1]]


def _around(parameters: Tensor, reach: int, taps: Tensor) -> Tensor:
    """Return the parameters within ``reach`` cells of each cell, zero beyond the border: (n, taps, rows, 1, columns, 1)."""
    n, _, rows, columns = parameters.shape
    square = functional.unfold(parameters, 2 * reach + 1, padding=reach)
    return square[:, taps].reshape(n, -1, rows, 1, columns, 1)


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """Return images under a Gaussian cut off beyond three standard deviations, the border repeated outwards."""
    reach = int(3 * sigma) + 1
    line = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-(line**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    wide = functional.pad(x.flatten(0, 1)[:, None], (reach, reach, reach, reach), mode="replicate")
    rows = functional.conv2d(wide, kernel.reshape(1, 1, 1, -1))
    return functional.conv2d(rows, kernel.reshape(1, 1, -1, 1)).reshape(x.shape)
