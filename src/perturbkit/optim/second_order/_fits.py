"""Fits of a preconditioner to pairs that groups are compared with, and what all of them descend."""

from __future__ import annotations

import torch
from torch import Tensor

from perturbkit.core import checks

__all__ = ["fit_bfgs", "fit_closed_form", "fit_euclidean_gd", "fit_spd_gd", "fitting_criterion"]


def fitting_criterion(p: Tensor, v: Tensor, h: Tensor) -> Tensor:
    r"""Return the mean of what a fit descends.

    Parameters
    ----------
    p : Tensor, shape (d, d)
        Preconditioner, positive definite.
    v, h : Tensor, shape (n, d)
        Pairs.

    Returns
    -------
    Tensor, shape ()

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the shapes do not fit.

    Notes
    -----
    :math:`h^\top P h + v^\top P^{-1} v`.

    References
    ----------
    Li (2024), arXiv:2402.11858, equation 1.

    Examples
    --------
    >>> float(fitting_criterion(torch.eye(2), torch.ones(1, 2), torch.ones(1, 2)))
    4.0
    """
    checks.tensor("p", p, ndim=2)
    checks.tensor("v", v, shape=(len(v), len(p)))
    checks.same_shape("h", h, "v", v)
    return ((h @ p) * h).sum(1).mean() + (v * torch.linalg.solve(p, v.T).T).sum(1).mean()


def fit_closed_form(h: Tensor) -> Tensor:
    r"""Return the preconditioner of all pairs at once.

    Parameters
    ----------
    h : Tensor, shape (n, d)
        Products of standard normal vectors with the Hessian, at least d of them.

    Returns
    -------
    Tensor, shape (d, d)

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If there are fewer than d.

    Notes
    -----
    :math:`(\frac1n \sum h h^\top)^{-1/2}`; its error falls as the root of n.

    References
    ----------
    Li (2024), arXiv:2402.11858, section 2.

    Examples
    --------
    >>> fit_closed_form(2 * torch.eye(2) * 2 ** 0.5)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])
    """
    checks.tensor("h", h, ndim=2)
    if len(h) < h.shape[1]:
        raise checks.ArgumentError(
            f"h has {len(h)} rows; allowed: at least {h.shape[1]}, the dimension. Take more pairs."
        )
    values, vectors = torch.linalg.eigh(h.T @ h / len(h))
    return vectors @ torch.diag(values.clamp(min=torch.finfo(h.dtype).tiny).rsqrt()) @ vectors.T


def fit_bfgs(v: Tensor, h: Tensor, init_scale: float = 1.0) -> Tensor:
    r"""Return the inverse Hessian of secant updates through the pairs, in order.

    Parameters
    ----------
    v, h : Tensor, shape (n, d)
        Pairs; those with ``v.h <= 0`` are left out, since the update would lose its definiteness.
    init_scale : float
        Multiple of the identity it starts from, above 0.

    Returns
    -------
    Tensor, shape (d, d)

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the shapes do not fit.

    Notes
    -----
    :math:`P \leftarrow (I - \rho v h^\top) P (I - \rho h v^\top) + \rho v v^\top` with :math:`\rho = 1 / v^\top h`.

    References
    ----------
    Nocedal and Wright (2006), Numerical Optimization, equation 6.17.

    Examples
    --------
    >>> v = torch.eye(2)
    >>> fit_bfgs(v, v @ torch.diag(torch.tensor([2.0, 4.0])))
    tensor([[0.5000, 0.0000],
            [0.0000, 0.2500]])
    """
    checks.tensor("v", v, ndim=2)
    checks.same_shape("h", h, "v", v)
    eye = torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    p = checks.positive("init_scale", init_scale) * eye
    for s, y in zip(v, h, strict=True):
        product = s @ y
        if float(product) > 0:
            left = eye - torch.outer(s, y) / product
            p = left @ p @ left.T + torch.outer(s, s) / product
    return p


def fit_euclidean_gd(v: Tensor, h: Tensor, rate: float = 0.1, init_scale: float = 1.0) -> Tensor:
    r"""Return the preconditioner of gradient descent on its entries, a pair a step, in order.

    Parameters
    ----------
    v, h : Tensor, shape (n, d)
        Pairs.
    rate : float
        Step over the gradient's norm, in (0, 1].
    init_scale : float
        Multiple of the identity it starts from, above 0.

    Returns
    -------
    Tensor, shape (d, d)

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`P \leftarrow P - \mu (h h^\top - P^{-1} v v^\top P^{-1}) / |\cdot|`, halved where P would not stay positive definite.

    References
    ----------
    Li (2024), arXiv:2402.11858, section 2.

    Examples
    --------
    >>> v = torch.ones(1, 2)
    >>> fit_euclidean_gd(v, v).shape  # h = v: the pair asks for no change
    torch.Size([2, 2])
    """
    return _descended(v, h, rate, init_scale, flat=True)


def fit_spd_gd(v: Tensor, h: Tensor, rate: float = 0.1, init_scale: float = 1.0) -> Tensor:
    r"""Return the preconditioner of gradient descent on the manifold of positive definite matrices, a pair a step.

    Parameters
    ----------
    v, h, rate, init_scale
        As for :func:`fit_euclidean_gd`.

    Returns
    -------
    Tensor, shape (d, d)

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`P \leftarrow P - \mu (P h h^\top P - v v^\top) / (h^\top P h + v^\top P^{-1} v)`, a first-order retraction.

    References
    ----------
    Li (2024), arXiv:2402.11858, section 2.

    Examples
    --------
    >>> v = torch.ones(1, 2)
    >>> fit_spd_gd(v, v)
    tensor([[1., 0.],
            [0., 1.]])
    """
    return _descended(v, h, rate, init_scale, flat=False)


def _descended(v: Tensor, h: Tensor, rate: float, init_scale: float, *, flat: bool) -> Tensor:
    checks.tensor("v", v, ndim=2)
    checks.same_shape("h", h, "v", v)
    checks.between("rate", rate, 0, 1, inclusive="high")
    p = checks.positive("init_scale", init_scale) * torch.eye(v.shape[1], dtype=v.dtype, device=v.device)
    tiny = torch.finfo(v.dtype).tiny
    for s, y in zip(v, h, strict=True):
        z = torch.linalg.solve(p, s)
        if flat:
            move = torch.outer(y, y) - torch.outer(z, z)
            move = move * (rate / move.norm().clamp(min=tiny))
        else:
            w = p @ y
            move = (torch.outer(w, w) - torch.outer(s, s)) * (rate / (y @ w + s @ z).clamp(min=tiny))
        for _ in range(60):
            if int(torch.linalg.cholesky_ex(p - move).info) == 0:
                p = p - move
                break
            move = move / 2
    return p
