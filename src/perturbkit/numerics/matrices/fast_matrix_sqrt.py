"""Square roots of batches of symmetric positive definite matrices, fast in both directions.

Use it for whitening, decorrelated normalisation and second-order pooling, where an eigendecomposition is slow and its
gradient fails at equal eigenvalues. Song, Sebe and Wang (2022), Fast Differentiable Matrix Square Root,
arXiv:2201.08663.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from scipy.special import binom
from torch import Tensor

from perturbkit.core import checks

__all__ = ["lyapunov_solve", "matrix_sqrt"]

Method = Literal["pade", "taylor", "newton_schulz", "eigh"]
_METHODS = ("pade", "taylor", "newton_schulz", "eigh")


def matrix_sqrt(
    a: Tensor,
    method: Method = "pade",
    *,
    degree: int = 11,
    inverse: bool = False,
    backward_iters: int = 8,
) -> Tensor:
    """Return the symmetric square root, or its inverse, of each matrix of a batch.

    Parameters
    ----------
    a : Tensor, shape (..., d, d)
        Symmetric positive definite matrices, floating point. Add ``eps I`` where the condition number exceeds about 1e2,
        or raise ``degree`` and ``backward_iters``.
    method : {"pade", "taylor", "newton_schulz", "eigh"}
        Diagonal Pade approximant, Taylor polynomial, the coupled Newton-Schulz iteration, or eigenvalues (exact,
        slow, for reference).
    degree : int
        Highest power of the series for "taylor"; for "pade" numerator and denominator have ``(degree - 1) / 2``, so
        it must be odd; iterations for "newton_schulz". At least 3.
    inverse : bool
        Return the inverse root.
    backward_iters : int
        Iterations of the Lyapunov solver in the gradient, at least 1. The relative error of the gradient at 8 is about
        3e-3 at condition number 100 and 0.2 at 1000; 12 suffice there.

    Returns
    -------
    Tensor, shape of ``a``

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the matrices are not square, symmetric and positive definite, or an option is not allowed.

    Notes
    -----
    With ``N = A / s`` and ``Z = I - N``: ``A^(1/2) = s^(1/2) (I - sum_k |binom(1/2, k)| Z^k)``, cut at ``degree``, with
    ``s = ||A||_F``, or turned into the quotient ``Q^-1 P`` with the same first coefficients. The quotient's relative
    error at an eigenvalue ``n`` of N is about ``2 |(1 - n^(1/2)) / (1 + n^(1/2))|^degree``; it is smallest for
    eigenvalues around one, so there ``s = det(A)^(1/d)`` instead of the paper's norm. The gradient does not unroll
    this: for ``G = dL / dA^(1/2)`` it solves ``A^(1/2) X + X A^(1/2) = G``, which has one solution whatever the
    eigenvalues; the gradient of a gradient is not defined.

    Cost: Taylor ``degree - 1`` products of matrices; Pade ``(degree - 1) / 2`` solves, as one batch, and two Cholesky
    factors; backward 5 products an iteration, all batched.

    References
    ----------
    Song, Sebe and Wang (2022), arXiv:2201.08663, equations 4 to 13.

    Examples
    --------
    >>> a = torch.tensor([[[4.0, 0.0], [0.0, 9.0]]], dtype=torch.float64)
    >>> matrix_sqrt(a).round(decimals=4)[0].tolist()
    [[2.0, 0.0], [0.0, 3.0]]
    """
    checks.tensor("a", a)
    if a.ndim < 2 or a.shape[-1] != a.shape[-2]:
        raise checks.ArgumentError(
            f"a has shape {tuple(a.shape)}; allowed: (..., d, d). Pass a square matrix or a batch of them."
        )
    off = float((a - a.mT).detach().abs().amax())
    if off > 1e-4 * float(a.detach().abs().amax()):
        raise checks.ArgumentError(
            f"a is off its transpose by up to {off:.3g}; allowed: symmetric matrices. Pass (a + a.mT) / 2."
        )
    failed = torch.linalg.cholesky_ex(a.detach())[1] != 0
    if bool(failed.any()):
        raise checks.ArgumentError(
            f"a holds {int(failed.sum())} matrices that are not positive definite; allowed: eigenvalues above zero. Add "
            "eps * I with a small eps."
        )
    checks.one_of("method", method, _METHODS)
    checks.integer("degree", degree, low=3)
    if method == "pade" and degree % 2 == 0:
        raise checks.ArgumentError(
            f"degree is {degree}; allowed for 'pade': an odd number. Take {degree + 1}."
        )
    checks.integer("backward_iters", backward_iters, low=1)
    return _MatrixSqrt.apply(a, method, degree, inverse, backward_iters)


def lyapunov_solve(b: Tensor, c: Tensor, *, iters: int = 8) -> Tensor:
    """Solve ``B X + X B = C`` for each pair of a batch.

    Parameters
    ----------
    b : Tensor, shape (..., d, d)
        Symmetric positive definite matrices.
    c : Tensor, shape (..., d, d)
        Right-hand sides.
    iters : int
        Iterations, at least 1; from about ``log2(cond)`` on convergence is quadratic.

    Returns
    -------
    Tensor, shape of ``c``

    Raises
    ------
    ArgumentError
        If the shapes do not match.

    Notes
    -----
    The sign of ``[[B, C], [0, -B]]`` is ``[[I, 2X], [0, -I]]``. The Newton-Schulz iteration for the sign keeps that
    form: ``B <- B (3 I - B^2) / 2`` and ``C <- (-B^2 C + B C B + C (3 I - B^2)) / 2`` with the old ``B``, from
    ``B / ||B||_F`` and ``C / ||B||_F``; ``X = C / 2`` at the end.

    Cost: 5 products of matrices an iteration.

    References
    ----------
    Song, Sebe and Wang (2022), arXiv:2201.08663, equations 16 to 20.

    Examples
    --------
    >>> b = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    >>> lyapunov_solve(b, torch.eye(2, dtype=torch.float64), iters=20).diagonal().round(decimals=6).tolist()
    [0.5, 0.166667]
    """
    checks.tensor("b", b)
    if b.ndim < 2 or b.shape[-1] != b.shape[-2]:
        raise checks.ArgumentError(
            f"b has shape {tuple(b.shape)}; allowed: (..., d, d). Pass square matrices."
        )
    checks.same_shape("c", checks.tensor("c", c), "b", b)
    checks.integer("iters", iters, low=1)
    shape, d = c.shape, c.shape[-1]
    b, c = b.reshape(-1, d, d), c.reshape(-1, d, d)
    # The iteration converges for eigenvalues below sqrt(3); starting at up to 1.6 saves a step over starting at 1.
    size = b.flatten(1).norm(dim=1)[:, None, None] / 1.6
    b, c = b / size, c / size
    thrice = (3 * torch.eye(d, dtype=b.dtype, device=b.device)).expand_as(b)
    for _ in range(iters):
        rest = torch.baddbmm(thrice, b, b, alpha=-1)
        # B^2 C - B C B = B (B C - C B): one product fewer.
        commutator = torch.baddbmm(torch.bmm(b, c), c, b, alpha=-1)
        c = torch.baddbmm(torch.bmm(c, rest), b, commutator, alpha=-0.5, beta=0.5)
        b = torch.bmm(b, rest).mul_(0.5)
    return (c / 2).reshape(shape)


class _MatrixSqrt(torch.autograd.Function):
    """The root with the gradient of its Lyapunov equation."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, method: str, degree: int, inverse: bool, iters: int) -> Tensor:
        ctx.inverse, ctx.iters = inverse, iters
        if method == "eigh":
            values, vectors = torch.linalg.eigh(a)
            values = (
                values.clamp_min(torch.finfo(a.dtype).tiny).rsqrt() if inverse else values.clamp_min(0).sqrt()
            )
            root = (vectors * values[..., None, :]) @ vectors.mT
            ctx.save_for_backward(root, values, vectors)
            return root
        scale = _scale(a, method)
        root = _FORWARD[method](a / scale, degree, inverse)
        root = root / scale.sqrt() if inverse else root * scale.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        root, *eigen = ctx.saved_tensors
        grad = (grad + grad.mT) / 2
        if eigen:
            values, vectors = eigen
            inner = vectors.mT @ grad @ vectors / (values[..., :, None] + values[..., None, :])
            x = vectors @ inner @ vectors.mT
        else:
            x = lyapunov_solve(root, grad, iters=ctx.iters)
        if ctx.inverse:
            # d(A^-1) = -A^-1 dA A^-1, and Z = A^(-1/2) is the root of A^-1 = Z Z.
            a_inverse = root @ root
            x = -a_inverse @ x @ a_inverse
        return x, None, None, None, None


def _scale(a: Tensor, method: str) -> Tensor:
    """Return what each matrix is divided by.

    The polynomial needs eigenvalues below one, so it gets the Frobenius norm. The Pade quotient converges for all
    positive eigenvalues, fastest where those above and below one are balanced, so it gets the geometric mean of the
    eigenvalues, the determinant's root, from a Cholesky factor.
    """
    if method != "pade":
        return a.flatten(-2).norm(dim=-1)[..., None, None]
    factor = torch.linalg.cholesky_ex(a)[0]
    return (2 * factor.diagonal(dim1=-2, dim2=-1).log().mean(-1)).exp()[..., None, None]


def _taylor(n: Tensor, degree: int, inverse: bool) -> Tensor:
    coefficients = _series(degree)
    eye = torch.eye(n.shape[-1], dtype=n.dtype, device=n.device)
    root = _polynomial(coefficients, eye - n, eye)
    return torch.linalg.inv(root) if inverse else root


def _pade(n: Tensor, degree: int, inverse: bool) -> Tensor:
    """Sum the partial fractions: powers of Z would lose every digit at high degree.

    With ``w_j = j pi / degree`` the quotient is ``1 - sum_j (2 / degree) sin^2 w_j z / (1 - z cos^2 w_j)``, and its inverse
    ``(1 + 2 sum_j 1 / (cos^2 w_j + n sin^2 w_j)) / degree``; each denominator is better conditioned than N.
    """
    m = (degree - 1) // 2
    w = torch.arange(1, m + 1, dtype=torch.float64) * torch.pi / degree
    shape = (m, *[1] * n.ndim)
    sine, cosine = ((f(w) ** 2).to(n).reshape(shape) for f in (torch.sin, torch.cos))
    eye = torch.eye(n.shape[-1], dtype=n.dtype, device=n.device)
    if inverse:
        terms = torch.linalg.inv(cosine * eye + sine * n)
        return (eye + 2 * terms.sum(0)) / degree
    z = eye - n
    terms = torch.linalg.solve(eye - cosine * z, z.expand(m, *z.shape))
    return eye - (2 / degree) * (sine * terms).sum(0)


def _newton_schulz(n: Tensor, degree: int, inverse: bool) -> Tensor:
    eye = torch.eye(n.shape[-1], dtype=n.dtype, device=n.device)
    y, z = n, eye.expand_as(n)
    for _ in range(degree):
        t = 0.5 * (3 * eye - z @ y)
        y, z = y @ t, t @ z
    return z if inverse else y


_FORWARD = {"pade": _pade, "taylor": _taylor, "newton_schulz": _newton_schulz}


def _series(degree: int) -> list[float]:
    """Return the coefficients of (1 - z)^(1/2): 1, then minus |binom(1/2, k)|."""
    return [1.0, *(-abs(float(binom(0.5, k))) for k in range(1, degree + 1))]


def _polynomial(coefficients: list[float], z: Tensor, eye: Tensor) -> Tensor:
    """Return the polynomial by Horner's rule."""
    total = coefficients[-1] * z
    for c in coefficients[-2:0:-1]:
        total = z @ (total + c * eye)
    return total + coefficients[0] * eye
