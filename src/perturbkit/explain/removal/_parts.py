"""What the removal methods share: what takes the place of a removed part, and subsets with their weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from perturbkit.core import checks
from perturbkit.core.random import uniform


def expanded_baseline(baseline: Tensor | float, x: Tensor) -> Tensor:
    """Return a baseline in the shape of ``x``, without copying."""
    given = torch.as_tensor(baseline, dtype=x.dtype, device=x.device)
    try:
        return given.expand_as(x)
    except RuntimeError:
        raise checks.ArgumentError(
            f"baseline has shape {tuple(given.shape)}; allowed: a number or a shape that broadcasts to that of x, "
            f"{tuple(x.shape)}. Reshape it."
        ) from None


def covered_windows(x: Tensor, cover: Tensor, masks: Tensor, row: Tensor, which: Tensor) -> Tensor:
    """Return copies of the rows of ``x`` with a window each taken from ``cover``."""
    return torch.where(masks[which], cover[row], x[row])


def window_masks(x: Tensor, window: int | tuple[int, int], stride: int | tuple[int, int] | None) -> Tensor:
    """Return one mask a window, broadcastable to a row of ``x``: shape (m, 1, h, w), (m, features), (m, length, 1)."""
    image = x.ndim == 4
    sides = x.shape[2:] if image else x.shape[1:2]
    sizes = _pair("window", window, len(sides))
    steps = sizes if stride is None else _pair("stride", stride, len(sides))
    axes = []
    for side, size, step in zip(sides, sizes, steps, strict=True):
        checks.integer("window", size, low=1, high=side)
        checks.integer("stride", step, low=1, high=size)
        starts = torch.arange(0, side - size + step, step, device=x.device).clamp(max=side - size)
        place = torch.arange(side, device=x.device)
        axes.append((place >= starts[:, None]) & (place < starts[:, None] + size))
    if image:
        return (axes[0][:, None, :, None] & axes[1][None, :, None, :]).flatten(0, 1)[:, None]
    return axes[0][..., None] if x.ndim == 3 else axes[0]


def _pair(name: str, value: int | tuple[int, int], n: int) -> tuple[int, ...]:
    given = value if isinstance(value, tuple) else (value,) * n
    if len(given) != n:
        raise checks.ArgumentError(f"{name} is {value}; allowed: one number, or {n}. Give one a side.")
    return given


def segment_numbers(segments: int | Tensor, x: Tensor) -> Tensor:
    """Return the superpixel of every pixel, counted from 0, shape (n, height, width)."""
    if isinstance(segments, Tensor):
        wide = segments if segments.ndim == 3 else segments[None]
        checks.tensor("segments", wide, ndim=3, floating=False)
        if wide.shape[1:] != x.shape[2:] or len(wide) not in (1, len(x)) or wide.is_floating_point():
            raise checks.ArgumentError(
                f"segments has shape {tuple(segments.shape)} and dtype {segments.dtype}; allowed: integers of shape "
                f"{tuple(x.shape[2:])} or {(len(x), *x.shape[2:])}. Give one number a pixel."
            )
        wide = wide.to(x.device).expand(len(x), -1, -1)
        return torch.stack([one.unique(return_inverse=True)[1] for one in wide])
    wanted = checks.integer("segments", segments, low=2, high=x.shape[2] * x.shape[3])
    from skimage.segmentation import slic

    cut = []
    for image in x.detach().cpu().float():
        # Colours go into SLIC's own space; a grey image stays one channel.
        pixels = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-12)
        colours = pixels.permute(1, 2, 0).numpy()
        found = slic(
            colours, n_segments=wanted, compactness=10.0 if len(image) == 3 else 0.1, sigma=1.0, start_label=0,
            channel_axis=-1,
        )  # fmt: skip
        cut.append(torch.from_numpy(found.astype("int64")).unique(return_inverse=True)[1])
    return torch.stack(cut).to(x.device)


def segment_means(image: Tensor, numbers: Tensor) -> Tensor:
    """Return an image (channels, height, width) with every superpixel in its mean colour."""
    flat, index = image.flatten(1), numbers.flatten()
    count = int(index.max()) + 1
    sums = image.new_zeros(len(image), count).index_add_(1, index, flat)
    sizes = image.new_zeros(count).index_add_(0, index, torch.ones_like(flat[0]))
    return (sums / sizes)[:, index].reshape(image.shape)


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Return images (n, channels, height, width) under a Gaussian cut off beyond three standard deviations."""
    reach = min(int(3 * sigma) + 1, min(x.shape[2:]) - 1)
    line = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-(line**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    wide = functional.pad(x.flatten(0, 1)[:, None], (reach, reach, reach, reach), mode="reflect")
    rows = functional.conv2d(wide, kernel.reshape(1, 1, 1, -1))
    return functional.conv2d(rows, kernel.reshape(1, 1, -1, 1)).reshape(x.shape)


def shapley_coefficients(masks: Tensor) -> Tensor:
    """Return the matrix that takes the values of all subsets (their masks, one a row) to Shapley values."""
    d = masks.shape[1]
    size = masks.sum(1).double()
    log_orders = _log_factorial(torch.tensor(float(d), dtype=torch.float64, device=masks.device))
    with_part = torch.exp(_log_factorial(size - 1) + _log_factorial(d - size) - log_orders)
    without = torch.exp(_log_factorial(size) + _log_factorial(d - size - 1) - log_orders)
    return torch.where(masks > 0, with_part[:, None], -without[:, None])


def shapley_kernel(masks: Tensor) -> Tensor:
    """Return the Shapley kernel of each mask, zero for the empty and the full one, whose weight is infinite."""
    d, size = masks.shape[1], masks.sum(1).double()
    inside = (size > 0) & (size < d)
    size = torch.where(inside, size, torch.ones_like(size))
    whole = torch.tensor(float(d), dtype=torch.float64, device=masks.device)
    log_choose = _log_factorial(whole) - _log_factorial(size) - _log_factorial(d - size)
    weight = (d - 1) / (torch.exp(log_choose) * size * (d - size).clamp(min=1))
    return torch.where(inside, weight, torch.zeros_like(weight))


def kernel_masks(d: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw masks with chances as the Shapley kernel, each followed by its complement; none is empty or full."""
    size = torch.arange(1, d, dtype=torch.float64)
    edges = (1 / (size * (d - size))).cumsum(0)
    drawn = uniform(((n + 1) // 2,), generator=generator, dtype=torch.float64) * edges[-1]
    chosen = torch.searchsorted(edges, drawn).clamp(max=d - 2) + 1
    half = orders(d, len(chosen), generator) < chosen[:, None]
    return torch.stack((half, ~half), 1).flatten(0, 1)[:n]


def order_masks(d: int, n: int, generator: torch.Generator) -> Tensor:
    """Return the masks (n, d + 1, d) that arise as parts come in random orders, from none to all."""
    return orders(d, n, generator)[:, None] < torch.arange(d + 1)[:, None]


def orders(d: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw random orders: the place of each part, shape (n, d)."""
    return uniform((n, d), generator=generator, dtype=torch.float64).argsort(1).argsort(1)


def _log_factorial(n: Tensor) -> Tensor:
    return torch.lgamma(n.clamp(min=0) + 1)
