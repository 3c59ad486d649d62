"""Occlusion: how much the output falls when a window of the input is covered.

Use it where only forward passes exist, or as the plainest cross-check of a gradient method. Zeiler and Fergus (2014),
Visualizing and Understanding Convolutional Networks, arXiv:1311.2901.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from perturbkit.core import Attribution, Oracle, checks, target_rows, track
from perturbkit.core.progress import ProgressLike
from perturbkit.explain.removal._parts import covered_windows, expanded_baseline, window_masks

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
    masks = window_masks(x, window, stride)
    cover = expanded_baseline(baseline, x)
    before = oracle.cost
    n, m = len(x), len(masks)
    rows = target_rows(target, x)
    with oracle.frozen():
        whole = oracle.value(x, rows)
        falls = whole.new_empty(n * m)
        place = 0
        for size in track(list(oracle.chunks(n * m, like=x)), "occlusion", progress=progress):
            index = torch.arange(place, place + size, device=x.device)
            row, which = index // m, index % m
            covered = covered_windows(x, cover, masks, row, which)
            falls[index] = whole[row] - oracle.value(covered, None if rows is None else rows[row])
            place += size
    flat = masks.reshape(m, -1).to(whole.dtype)
    values = falls.reshape(n, m) @ flat / flat.sum(0)
    shaped = values.reshape(n, *masks.shape[1:]).expand_as(x)
    return Attribution(
        shaped.to(x.dtype).contiguous(), rows, oracle.cost - before, "occlusion", {"n_windows": m}
    )
