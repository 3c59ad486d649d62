"""Generative PCA: the leading eigenvector among what a generator can draw.

Use it to find a spike in noisy data, or a signal from magnitudes, with fewer samples than dimensions, where a generator
knows what the signal may look like. Liu, Liu, Ghosh, Han and Scarlett (2022), Generative Principal Component Analysis,
arXiv:2203.09693.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perturbkit.core import Cost, Oracle, Result, checks
from perturbkit.core.random import Seed, as_generator, randn

__all__ = ["GenerativePCAResult", "generative_pca", "phase_retrieval_matrix", "spiked_covariance"]


@dataclass(frozen=True, eq=False)
class GenerativePCAResult(Result):
    """The best vector of a projected power method.

    Attributes
    ----------
    x : Tensor, shape (d,)
        Of unit length. Its sign means nothing unless the generator fixes it.
    latent : Tensor of shape (latent_dim,) or None
        What the generator made it from; ``None`` with a projection of one's own.
    value : float
        ``x^T V x``.
    history : Tensor, shape (n_iter,)
        The value after each iteration.
    cost : Cost
        Evaluations of the generator and gradients through it, in rows.
    """

    x: Tensor
    latent: Tensor | None
    value: float
    history: Tensor
    cost: Cost = field(default_factory=Cost)


def generative_pca(
    matrix: Tensor,
    generator_net: Oracle | nn.Module | Callable[[Tensor], Tensor] | None = None,
    latent_dim: int | None = None,
    *,
    init: Tensor | None = None,
    n_iter: int = 20,
    projection_steps: int = 100,
    projection_lr: float = 0.1,
    restarts: int = 3,
    project: Callable[[Tensor], Tensor] | None = None,
    shift: float | Literal["auto"] = "auto",
    generator: Seed = None,
) -> GenerativePCAResult:
    """Maximise ``w^T V w`` over the directions in the range of a generator.

    Parameters
    ----------
    matrix : Tensor, shape (d, d)
        Symmetric ``V``, as :func:`spiked_covariance` or :func:`phase_retrieval_matrix` makes it.
    generator_net : Oracle, nn.Module or callable, optional
        ``G``: latents (n, latent_dim) to vectors (n, d) or images of d pixels, differentiable.
    latent_dim : int, optional
        Size of its latents, which are searched for from standard normal starts.
    init : Tensor, shape (d,), optional
        First vector; by default the column of V with the largest diagonal entry. One (nearly) orthogonal to the signal
        leads nowhere.
    n_iter : int
        Power steps, each followed by a projection.
    projection_steps : int
        Steps of Adam a projection.
    projection_lr : float
        Their first size; it falls to zero along half a cosine.
    restarts : int
        Fresh starts a projection, beside the last latent.
    project : callable, optional
        The projection itself, ``(d,) -> (d,)``, in place of a generator: onto a subspace, a dictionary, by a denoiser.
    shift : float or "auto"
        Multiple of the identity added to V, which moves no eigenvector: without it a power step follows the eigenvalue of
        largest size. "auto" adds what makes the largest one that by a tenth, and nothing where it is.
    generator : torch.Generator, int or None
        Source of the starts.

    Returns
    -------
    GenerativePCAResult
        The iterate with the largest value.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the matrix is not symmetric, an option is not allowed, or not exactly one of generator and projection is given.
    ModelError
        If the generator's answers have not d entries.

    Notes
    -----
    ``w <- P(V w / ||V w||)`` with ``P(u) = G(z) / ||G(z)||`` at ``z = argmin ||u - G(z) / ||G(z)||||^2``. With a linear G this is
    the power method in its range, with the identity the classical one.

    Cost: ``n_iter (d^2 + (restarts + 1) projection_steps)`` evaluations and gradients of G; ``shift="auto"`` takes one
    eigenvalue decomposition. The error falls as ``sqrt(latent_dim log L / m)`` with m samples behind V and the Lipschitz
    constant L of G.

    References
    ----------
    Liu et al. (2022), arXiv:2203.09693, algorithm 1.

    Examples
    --------
    >>> signal = torch.tensor([0.6, 0.8, 0.0])
    >>> noisy = torch.outer(signal, signal) + torch.diag(torch.tensor([0.0, 0.0, 1.5]))
    >>> plane = torch.eye(3)[:2]  # the generator draws in the plane of the first two coordinates
    >>> found = generative_pca(noisy, lambda z: z @ plane, 2, init=torch.ones(3), generator=0)
    >>> round(float((found.x @ signal).abs()), 3)
    1.0
    """
    checks.tensor("matrix", matrix, ndim=2)
    square = matrix.shape[0] == matrix.shape[1]
    if not square or float((matrix - matrix.mT).abs().max()) > 1e-5 * float(matrix.abs().max()):
        raise checks.ArgumentError(
            f"matrix has shape {tuple(matrix.shape)} and is not symmetric; allowed: a symmetric matrix. Pass (V + V.T) / 2."
        )
    if (generator_net is None) == (project is None):
        raise checks.ArgumentError(
            f"{'neither' if project is None else 'both'} of generator_net and project are given; allowed: exactly one. Pass a "
            "network, or a projection of your own."
        )
    checks.integer("n_iter", n_iter, low=1)
    w = _start(matrix, init)
    added, product = _shift(matrix, shift), matrix @ w
    search = None
    if generator_net is not None:
        search = _Search(generator_net, latent_dim, len(matrix), generator, projection_steps, projection_lr, restarts)  # fmt: skip
    best, values = (-math.inf, w, None), []
    for _ in range(n_iter):
        u = _unit(torch.add(product, w, alpha=added))
        if search is not None:
            w = search(u)
        else:
            w = _unit(checks.tensor("project(u)", project(u), shape=(len(matrix),)))  # type: ignore[misc]
        product = matrix @ w
        values.append(w @ product)
        if float(values[-1]) > best[0]:
            best = (float(values[-1]), w, None if search is None else search.latent)  # type: ignore[assignment]
    cost = Cost() if search is None else search.cost
    return GenerativePCAResult(best[1], best[2], best[0], torch.stack(values), cost)


def spiked_covariance(x: Tensor) -> Tensor:
    """Return the matrix of the spiked covariance model, ``X^T X / m - I``.

    Parameters
    ----------
    x : Tensor, shape (m, d)
        Samples ``sqrt(beta) u_i x* + noise`` with unit noise and signal strengths.

    Returns
    -------
    Tensor, shape (d, d)

    Notes
    -----
    Its expectation is ``beta x* x*^T``.

    Examples
    --------
    >>> spiked_covariance(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    tensor([[0., 1.],
            [1., 1.]])
    """
    checks.tensor("x", x, ndim=2)
    return x.mT @ x / len(x) - torch.eye(x.shape[1], dtype=x.dtype, device=x.device)


def phase_retrieval_matrix(a: Tensor, y: Tensor) -> Tensor:
    """Return the matrix whose leading eigenvector estimates a signal from squared magnitudes.

    Parameters
    ----------
    a : Tensor, shape (m, d)
        Gaussian measurement vectors.
    y : Tensor, shape (m,)
        ``(a_i^T x*)^2``, with noise.

    Returns
    -------
    Tensor, shape (d, d)

    Notes
    -----
    ``V = sum_i y_i (a_i a_i^T - I) / m``, with expectation ``2 x* x*^T``.

    Examples
    --------
    >>> phase_retrieval_matrix(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([4.0, 2.0]))
    tensor([[ 0.,  2.],
            [ 2., -1.]])
    """
    checks.tensor("a", a, ndim=2)
    checks.tensor("y", y, shape=(len(a),))
    return (a.mT * y) @ a / len(a) - y.mean() * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)


class _Search:
    """The projection on the range of a generator, by Adam over latents."""

    def __init__(
        self, net: Any, latent_dim: int | None, d: int, generator: Seed, steps: int, lr: float, restarts: int
    ) -> None:
        if latent_dim is None:
            raise checks.ArgumentError(
                "latent_dim is None; allowed: the size of the generator's latents, at least 1. Pass latent_dim=."
            )
        self.k, self.d = checks.integer("latent_dim", latent_dim, low=1), d
        self.steps = checks.integer("projection_steps", steps, low=1)
        self.lr = checks.positive("projection_lr", lr)
        self.restarts = checks.integer("restarts", restarts, low=1)
        self.oracle, self.generator = Oracle.wrap(net), as_generator(generator)
        self._before = self.oracle.cost
        self.latent: Tensor | None = None

    @property
    def cost(self) -> Cost:
        return self.oracle.cost - self._before

    def __call__(self, u: Tensor) -> Tensor:
        z = randn((self.restarts, self.k), generator=self.generator, like=u)
        if self.latent is not None:
            z = torch.cat([self.latent[None], z])

        def distance(out: Tensor, _: Tensor | None) -> Tensor:
            flat = out.flatten(1)
            if flat.shape[1] != self.d:
                raise checks.ModelError(
                    f"the generator answered {flat.shape[1]} entries a row; allowed: the {self.d} of the matrix. Pass the "
                    "generator of the signal."
                )
            return (u - flat / flat.norm(dim=1, keepdim=True)).square().sum(1)

        optimizer = torch.optim.Adam([z], lr=self.lr)
        with self.oracle.frozen():
            for i in range(self.steps):
                optimizer.param_groups[0]["lr"] = 0.5 * self.lr * (1 + math.cos(math.pi * i / self.steps))
                z.grad = self.oracle.value_and_gradient(z, objective=distance)[1]
                optimizer.step()
            out = self.oracle(z).flatten(1)
        directions = out / out.norm(dim=1, keepdim=True)
        best = (directions @ u).argmax()
        self.latent = z[best].detach().clone()
        return directions[best]


def _start(matrix: Tensor, init: Tensor | None) -> Tensor:
    """Return the first vector, of unit length."""
    w = matrix[:, matrix.diagonal().argmax()] if init is None else init
    w = checks.tensor("init", w, shape=(len(matrix),)).to(matrix)
    if not bool(w.any()):
        raise checks.ArgumentError(
            "init is zero, or the column of the matrix with the largest diagonal entry is; allowed: a vector of some length. "
            "Pass init=."
        )
    return _unit(w)


def _shift(matrix: Tensor, shift: float | str) -> float:
    if shift != "auto":
        return checks.between("shift", shift, -math.inf, math.inf)  # type: ignore[arg-type]
    # Most matrices need none, and a Cholesky decomposition shows it at a tenth of the cost: their eigenvalues are above
    # -0.9 times a Rayleigh quotient, which is at most the largest one.
    w = _unit(matrix @ _unit(matrix[:, matrix.diagonal().argmax()]))
    quotient = float(w @ (matrix @ w))
    moved = matrix + 0.9 * quotient * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    if quotient > 0 and int(torch.linalg.cholesky_ex(moved)[1]) == 0:
        return 0.0
    values = torch.linalg.eigvalsh(matrix)
    least, most = float(values[0]), float(values[-1])
    # The second keeps the two apart by a tenth where they are of about the same size: at a tie no power step converges.
    return max(0.0, -(least + most), -(least + 0.9 * most) / 1.9)


def _unit(w: Tensor) -> Tensor:
    return w / w.norm().clamp_min(torch.finfo(w.dtype).tiny)
