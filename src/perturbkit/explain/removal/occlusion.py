"""Occlusion: how much the output falls when a window of the input is covered.

Use it where only forward passes exist, or as the plainest cross-check of a gradient method. Zeiler and Fergus (2014),
Visualizing and Understanding Convolutional Networks, arXiv:1311.2901.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from perturbkit.core import Attribution, Oracle, checks, track
from perturbkit.core.progress import ProgressLike

__all__ = ["occlusion"]


def occlusion(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    window: int | tuple[int, int] = 1,
    stride: int | tuple[int, int] | None = None,
    baseline: Tensor | float = 0.0,
    progress: ProgressLike = False,
) -> Attribution:
    """Attribute an output to windows of the input by covering them one at a time.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Function of a batch (n, ...), answering (n, outputs) or (n,).
    x : Tensor, shape (n, features), (n, length, width) or (n, channels, height, width)
        Inputs, floating point. A window covers all channels of an image, and all of the last dimension of a sequence
        of vectors.
    target : Tensor of shape (n,), int or None
        The output explained; ``None`` where there is only one.
    window : int or (int, int)
        Size of the window, in pixels, features or positions.
    stride : int or (int, int), optional
        Step between windows; the window by default, so that they tile. At most the window, or parts would never
        be covered. The last window is moved back inside.
    baseline : float or Tensor
        What covers: a number, or a tensor that broadcasts to ``x``.
    progress : Progress, bool or None
        Reports chunks of windows.

    Returns
    -------
    Attribution
        ``values`` in the shape of ``x``: the fall of the output, averaged over the windows that cover a part.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an input or option is not allowed.

    Notes
    -----
    ``S_i = mean over windows w that contain i of F(x) - F(x with w covered)``.

    Cost: one evaluation a window and one more, per row, in chunks.

    References
    ----------
    Zeiler and Fergus (2014), arXiv:1311.2901.

    Examples
    --------
    >>> f = lambda x: 2 * x[:, 0] - x[:, 1]
    >>> occlusion(f, torch.tensor([[3.0, 4.0, 5.0]])).values
    tensor([[ 6., -4.,  0.]])
    """
    checks.tensor("x", x, ndim=(2, 3, 4))
    oracle = Oracle.wrap(model)
    masks = _windows(x, window, stride)
    cover = _expand_baseline(baseline, x)
    before = oracle.cost
    n, m = len(x), len(masks)
    rows = None if target is None else torch.as_tensor(target, device=x.device).expand(n)
    with oracle.frozen():
        whole = oracle.value(x, rows)
        falls = whole.new_empty(n * m)
        place = 0
        for size in track(list(oracle.chunks(n * m, like=x)), "occlusion", progress=progress):
            index = torch.arange(place, place + size, device=x.device)
            row, which = index // m, index % m
            covered = torch.where(masks[which], cover[row], x[row])
            falls[index] = whole[row] - oracle.value(covered, None if rows is None else rows[row])
            place += size
    flat = masks.reshape(m, -1).to(whole.dtype)
    values = falls.reshape(n, m) @ flat / flat.sum(0)
    shaped = values.reshape(n, *masks.shape[1:]).expand_as(x)
    return Attribution(
        shaped.to(x.dtype).contiguous(), rows, oracle.cost - before, "occlusion", {"n_windows": m}
    )


def _windows(x: Tensor, window: int | tuple[int, int], stride: int | tuple[int, int] | None) -> Tensor:
    """Return one mask a window, broadcastable to a row of ``x``: shape (m, 1, h, w), (m, features), (m, length, 1)."""
    image = x.ndim == 4
    sides = x.shape[2:] if image else x.shape[1:2]
    sizes = _pair("window", window, len(sides))
    steps = sizes if stride is None else _pair("stride", stride, len(sides))
    axes = []
    for side, size, step in zip(sides, sizes, steps, strict=True):
        checks.integer("window", size, low=1, high=side)
        checks.integer("stride", step, low=1, high=size)
        starts = torch.arange(0, side - size + step, step, device=x.device).clamp(max=side - size).unique()
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


def _expand_baseline(baseline: Tensor | float, x: Tensor) -> Tensor:
    given = torch.as_tensor(baseline, dtype=x.dtype, device=x.device)
    try:
        return given.expand_as(x)
    except RuntimeError:
        raise checks.ArgumentError(
            f"baseline has shape {tuple(given.shape)}; allowed: a number or a shape that broadcasts to that of x, "
            f"{tuple(x.shape)}. Reshape it."
        ) from None
