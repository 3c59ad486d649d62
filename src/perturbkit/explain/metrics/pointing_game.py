"""Pointing game: how often the highest score of an explanation falls on the object that it should explain.

Use it where masks or boxes of the right answer exist. Zhang, Lin, Brandt, Shen and Sclaroff (2016), Top-down Neural
Attention by Excitation Backprop, arXiv:1608.00507.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perturbkit.core import Attribution, checks
from perturbkit.explain.metrics.infidelity import ExplanationScore

__all__ = ["pointing_game"]


def pointing_game(explanation: Attribution | Tensor, mask: Tensor, *, tolerance: int = 0) -> ExplanationScore:
    """Score explanations by whether, and how much of, their weight falls on the object.

    Parameters
    ----------
    explanation : Attribution or Tensor, shape (n, features), (n, length, width) or (n, channels, height, width)
        Scores; summed over channels or width first.
    mask : Tensor of bool, shape (n, features), (n, length) or (n, height, width)
        Which parts belong to the object; at least one a row.
    tolerance : int
        Distance in pixels or positions (the larger of the axes) up to which a miss counts as a hit; 15 in the paper,
        for photographs.

    Returns
    -------
    ExplanationScore
        ``values`` is 1 for a hit and 0 for a miss (a share where the highest score is shared); higher is better.
        ``extras["energy"]`` is the share of the positive scores on the object, ``extras["chance"]`` the share of the
        parts that would count as a hit.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a shape does not fit or a mask is empty.

    Notes
    -----
    ``hit = [argmax_i S_i in M]``, averaged over the parts that share the maximum: a constant map scores its chance
    and not one or zero by position. Costs no evaluation.

    References
    ----------
    Zhang, Lin, Brandt, Shen and Sclaroff (2016), arXiv:1608.00507, section 4.1.

    Examples
    --------
    >>> scores = torch.tensor([[0.1, 0.9, 0.2]])
    >>> pointing_game(scores, torch.tensor([[False, True, False]])).values
    tensor([1.])
    """
    values = explanation.values if isinstance(explanation, Attribution) else explanation
    checks.tensor("explanation", values, ndim=(2, 3, 4))
    checks.integer("tolerance", tolerance, low=0)
    scores = values if values.ndim == 2 else values.sum(-1 if values.ndim == 3 else 1)
    checks.tensor("mask", mask, shape=scores.shape, floating=False)
    inside = mask.bool()
    if not bool(inside.flatten(1).any(1).all()):
        empty = int((~inside.flatten(1).any(1)).sum())
        raise checks.ArgumentError(
            f"mask is empty in {empty} rows; allowed: at least one part of the object a row. Leave those rows out."
        )
    near = _grown(inside, tolerance).flatten(1).to(scores.dtype)
    flat = scores.flatten(1)
    top = (flat == flat.amax(1, keepdim=True)).to(scores.dtype)
    positive = flat.clamp(min=0)
    total = positive.sum(1)
    on_object = (positive * inside.flatten(1)).sum(1)
    energy = torch.where(total > 0, on_object / total, torch.zeros_like(total))
    return ExplanationScore(
        (top * near).sum(1) / top.sum(1), "pointing game", "higher",
        extras={"energy": energy, "chance": near.mean(1)},
    )  # fmt: skip


def _grown(mask: Tensor, by: int) -> Tensor:
    """Grow a mask by a number of parts along each axis."""
    if by == 0:
        return mask
    pool = torch.nn.functional.max_pool2d if mask.ndim == 3 else torch.nn.functional.max_pool1d
    return pool(mask[:, None].float(), 2 * by + 1, stride=1, padding=by)[:, 0] > 0
