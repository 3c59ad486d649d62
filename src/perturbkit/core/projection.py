"""Projections and proximal maps of simple sets and functions, batched over leading dimensions.

Each treats the last dimension as the vector and all others as a batch. Balls and boxes of perturbations with
one row an example are in :mod:`~perturbkit.core.perturbation`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from perturbkit.core import checks
from perturbkit.core.perturbation import Ball, Box, sum_threshold

__all__ = [
    "moreau_envelope",
    "project_box",
    "project_halfspace",
    "project_l1",
    "project_simplex",
    "prox_l1",
    "prox_l2",
]


def project_simplex(v: Tensor, total: float = 1.0) -> Tensor:
    r"""Return the nearest point of the simplex :math:`\{p \ge 0, \sum_i p_i = s\}`.

    Parameters
    ----------
    v : Tensor, shape (..., d)
        Vectors.
    total : float
        The sum s, above zero.

    Returns
    -------
    Tensor, shape (..., d)

    Raises
    ------
    ArgumentError
        If the total is not positive or v is not finite.

    Notes
    -----
    :math:`p = \max(v - \tau, 0)` with the threshold found by sorting, O(d log d).

    References
    ----------
    J. Duchi, S. Shalev-Shwartz, Y. Singer, T. Chandra (2008). Efficient projections onto the l1-ball for
    learning in high dimensions. ICML.

    Examples
    --------
    >>> project_simplex(torch.tensor([1.5, 1.0, -3.0]))
    tensor([0.7500, 0.2500, 0.0000])
    """
    rows = _vectors("v", v)
    radius = torch.full_like(rows[:, :1], checks.positive("total", total))
    return torch.relu(rows - sum_threshold(rows, radius)).reshape(v.shape)


def project_l1(v: Tensor, radius: float = 1.0) -> Tensor:
    r"""Return the nearest point of the l1 ball :math:`\{\|p\|_1 \le r\}`.

    Parameters
    ----------
    v : Tensor, shape (..., d)
        Vectors.
    radius : float
        The radius r, zero or above.

    Examples
    --------
    >>> project_l1(torch.tensor([1.0, -0.5]))
    tensor([ 0.7500, -0.2500])
    """
    return Ball("l1", radius).project(_vectors("v", v)).reshape(v.shape)


def project_box(v: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Return the nearest point of the box ``low <= p <= high``, whose bounds broadcast against v.

    Examples
    --------
    >>> project_box(torch.tensor([-1.0, 0.5]), 0.0, 1.0)
    tensor([0.0000, 0.5000])
    """
    checks.tensor("v", v)
    # A leading dimension of one keeps the bounds' own broadcasting.
    return Box(low, high).project(v[None])[0]


def project_halfspace(v: Tensor, normal: Tensor, offset: float | Tensor) -> Tensor:
    r"""Return the nearest point of the half-space :math:`\{p : \langle a, p \rangle \le b\}`.

    Parameters
    ----------
    v : Tensor, shape (..., d)
        Vectors.
    normal : Tensor, shape (d,) or (..., d)
        The normal a, not zero.
    offset : float or Tensor of shape (...)
        The offset b.

    Examples
    --------
    >>> project_halfspace(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0]), 1.0)
    tensor([1., 2.])
    """
    checks.tensor("v", v)
    checks.tensor("normal", normal)
    square = normal.square().sum(-1)
    if bool((square == 0).any()):
        raise checks.ArgumentError("normal is zero; allowed: a vector with a direction. Pass another normal.")
    excess = torch.relu((v * normal).sum(-1) - offset) / square
    return v - excess[..., None] * normal


def prox_l1(v: Tensor, step: float | Tensor) -> Tensor:
    r"""Return the proximal map of :math:`t \|p\|_1`: soft thresholding at t.

    Parameters
    ----------
    v : Tensor, shape (..., d)
        Vectors.
    step : float or Tensor that broadcasts against v
        The weight t, zero or above.

    Examples
    --------
    >>> prox_l1(torch.tensor([3.0, -0.5]), 1.0)
    tensor([2., 0.])
    """
    checks.tensor("v", v)
    threshold = _step(step, v)
    return v - torch.clamp(v, -threshold, threshold)


def prox_l2(v: Tensor, step: float | Tensor) -> Tensor:
    r"""Return the proximal map of :math:`t \|p\|_2`: the vector shortened by t, or zero.

    Parameters
    ----------
    v : Tensor, shape (..., d)
        Vectors.
    step : float or Tensor that broadcasts against shape (..., 1)
        The weight t, zero or above.

    Examples
    --------
    >>> prox_l2(torch.tensor([3.0, 4.0]), 1.0)
    tensor([2.4000, 3.2000])
    """
    checks.tensor("v", v)
    length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    longer = length > _step(step, v)
    return (
        torch.where(longer, 1 - _step(step, v) / torch.where(longer, length, torch.ones_like(length)), 0) * v
    )


def moreau_envelope(
    prox: Callable[[Tensor, float], Tensor], f: Callable[[Tensor], Tensor], v: Tensor, step: float
) -> tuple[Tensor, Tensor]:
    r"""Return the Moreau envelope of a function and its gradient.

    Parameters
    ----------
    prox : callable
        ``prox(v, step)``, the proximal map of ``step * f``.
    f : callable
        The function, (..., d) to (...).
    v : Tensor, shape (..., d)
        Vectors.
    step : float
        The step t, above zero.

    Returns
    -------
    value : Tensor, shape (...)
        :math:`\min_p f(p) + \|p - v\|^2 / 2t`.
    gradient : Tensor, shape (..., d)
        :math:`(v - \mathrm{prox}(v)) / t`.

    Examples
    --------
    >>> value, gradient = moreau_envelope(prox_l1, lambda p: p.abs().sum(-1), torch.tensor([3.0, 0.5]), 1.0)
    >>> value, gradient
    (tensor(2.6250), tensor([1.0000, 0.5000]))
    """
    checks.tensor("v", v)
    checks.positive("step", step)
    p = prox(v, step)
    gradient = (v - p) / step
    return f(p) + step / 2 * gradient.square().sum(-1), gradient


def _vectors(name: str, v: Tensor) -> Tensor:
    checks.tensor(name, v)
    if v.ndim == 0:
        raise checks.ArgumentError(f"{name} is a single number; allowed: shape (..., d). Add a dimension.")
    return v.reshape(-1, v.shape[-1])


def _step(step: float | Tensor, v: Tensor) -> Tensor:
    if not isinstance(step, Tensor):
        checks.nonnegative("step", step)
    elif bool((step < 0).any()):
        raise checks.ArgumentError(
            f"step has the value {float(step.min()):.4g}; allowed: zero or above. Correct the negative entries."
        )
    return torch.as_tensor(step, dtype=v.dtype, device=v.device)
