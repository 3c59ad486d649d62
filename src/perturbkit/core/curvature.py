"""Curvature without matrices: Hessian-vector products, eigenvalues, traces of functions and spectral densities.

Products come first (:func:`hvp`, :func:`gauss_newton_vp`, or :func:`hessian` for many products at one point).
The rest takes a symmetric operator ``matvec`` that maps a batch of vectors, shape (k, d), to their images; a
dense matrix ``A`` is ``lambda v: v @ A``. For a module's loss, :func:`~perturbkit.core.parameters.functional`
makes a function of the weight vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from perturbkit.core import checks, random
from perturbkit.core.results import Result

__all__ = [
    "Eigenpairs",
    "SpectralDensity",
    "TraceEstimate",
    "gauss_newton_vp",
    "hessian",
    "hutchinson_trace",
    "hvp",
    "jacobian_vector",
    "lanczos",
    "power_iteration",
    "ritz_values",
    "spectral_density",
    "stochastic_lanczos_quadrature",
    "vector_jacobian",
]

Matvec = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Eigenpairs(Result):
    """Eigenvalues of largest magnitude and their vectors.

    Attributes
    ----------
    values : Tensor, shape (k,)
        Eigenvalues, by falling magnitude.
    vectors : Tensor, shape (k, d)
        Orthonormal eigenvectors, one a row.
    residuals : Tensor, shape (k,)
        Norm of A v - lambda v; an eigenvalue of A lies within it of each value.
    converged : bool
        Whether all residuals are within the tolerance.
    n_products : int
        Products of the operator with one vector that were spent.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: bool
    n_products: int


@dataclass(frozen=True, eq=False)
class TraceEstimate(Result):
    """A stochastic estimate of a trace.

    Attributes
    ----------
    value : float
        Mean over the probes.
    standard_error : float
        Standard error of that mean over the probes; NaN for a single probe.
    samples : Tensor, shape (n_probes,)
        The estimate of each probe.
    n_products : int
        Products of the operator with one vector that were spent.
    """

    value: float
    standard_error: float
    samples: Tensor
    n_products: int


@dataclass(frozen=True, eq=False)
class SpectralDensity(Result):
    """An estimate of how an operator's eigenvalues are distributed.

    Attributes
    ----------
    grid : Tensor, shape (m,)
        Where the density is evaluated.
    density : Tensor, shape (m,)
        Density of the eigenvalues, smoothed; it integrates to one.
    nodes, weights : Tensor, shape (n_probes, n_steps)
        The quadrature behind it: Ritz values and weights, which sum to one a probe.
    """

    grid: Tensor
    density: Tensor
    nodes: Tensor
    weights: Tensor


def jacobian_vector(fun: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """Return the Jacobian of ``fun`` at x times v, by forward differentiation.

    Examples
    --------
    >>> jacobian_vector(lambda x: x**2, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    tensor([2., 4.])
    """
    checks.same_shape("v", checks.tensor("v", v), "x", checks.tensor("x", x))
    return torch.func.jvp(fun, (x.detach(),), (v,))[1].detach()


def vector_jacobian(fun: Callable[[Tensor], Tensor], x: Tensor, u: Tensor) -> Tensor:
    """Return u times the Jacobian of ``fun`` at x, by backward differentiation; u has the shape of the output.

    Examples
    --------
    >>> vector_jacobian(lambda x: x.sum()[None], torch.tensor([1.0, 2.0]), torch.tensor([3.0]))
    tensor([3., 3.])
    """
    checks.tensor("u", u)
    leaf, out = _graph(fun, x)
    checks.same_shape("u", u, "the output", out)
    return _pull(out, leaf, u)


def hessian(fun: Callable[[Tensor], Tensor], x: Tensor) -> Matvec:
    """Return the Hessian of a scalar function at x as an operator, for many products at one point.

    Parameters
    ----------
    fun : callable
        Maps a tensor of the shape of x to a single number.
    x : Tensor
        The point, of any shape.

    Returns
    -------
    callable
        Maps a vector of the shape of x, or a batch of them of shape (k, *x.shape), to its image.

    Raises
    ------
    ArgumentError
        If the function does not return a single number.

    Notes
    -----
    The function and its gradient are evaluated once and their graph is kept; each product is one more backward
    pass, batched over vectors.

    Examples
    --------
    >>> product = hessian(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
    >>> product(torch.eye(2))
    tensor([[ 6.,  0.],
            [ 0., 12.]])
    """
    leaf, value = _graph(fun, x)
    _one_number("fun", value)
    gradient = torch.zeros_like(x)
    if value.requires_grad:
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(
                value.sum(), leaf, create_graph=True, allow_unused=True, materialize_grads=True
            )

    def product(v: Tensor) -> Tensor:
        return _pull(gradient, leaf, _direction(v, x))

    return product


def hvp(fun: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """Return the Hessian of a scalar function at x times a vector, or a batch of vectors (k, *x.shape).

    See :func:`hessian`, which also serves many products at one point.

    Examples
    --------
    >>> hvp(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    tensor([ 6., 12.])
    """
    return hessian(fun, x)(v)


def gauss_newton_vp(
    fun: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor], x: Tensor, v: Tensor
) -> Tensor:
    r"""Return the generalised Gauss-Newton matrix of ``loss(fun(x))`` times a vector.

    Parameters
    ----------
    fun : callable
        Maps x to outputs of any shape.
    loss : callable
        Maps the outputs to a single number; convex, for a positive semi-definite matrix.
    x, v : Tensor
        The point and the vector, of one shape.

    Returns
    -------
    Tensor, shape of x

    Raises
    ------
    ArgumentError
        If the loss does not return a single number.

    Notes
    -----
    :math:`G v = J^\top H_L J v` with the Jacobian J of ``fun`` and the Hessian of ``loss`` in the outputs. For a
    cross-entropy of logits this is the Fisher information matrix. One forward-mode, two backward passes.

    References
    ----------
    N. N. Schraudolph (2002). Fast curvature matrix-vector products for second-order gradient descent. Neural
    Computation 14(7).

    Examples
    --------
    >>> x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
    >>> gauss_newton_vp(lambda x: x**2, lambda out: 0.5 * out.square().sum(), x, v)
    tensor([4., 0.])
    """
    pushed = jacobian_vector(fun, x, v)
    leaf, out = _graph(fun, x)
    curved = hessian(loss, out.detach())(pushed)
    return _pull(out, leaf, curved)


def power_iteration(
    matvec: Matvec,
    like: Tensor,
    k: int = 1,
    *,
    tol: float = 1e-6,
    max_iter: int = 1000,
    generator: random.Seed = None,
) -> Eigenpairs:
    """Return the k eigenvalues of largest magnitude of a symmetric operator, by subspace iteration.

    Parameters
    ----------
    matvec : callable
        The operator, (k, d) to (k, d).
    like : Tensor, shape (d,)
        Gives the dimension, the dtype and the device.
    k : int
        Number of eigenpairs, 1..d.
    tol : float
        Residuals wanted, relative to the largest magnitude.
    max_iter : int
        Most iterations, of k products each.
    generator : torch.Generator, int or None
        Source of the start vectors.

    Returns
    -------
    Eigenpairs
        Not converged where ``max_iter`` came first.

    Notes
    -----
    Each iteration multiplies a basis, takes Rayleigh-Ritz pairs and orthonormalises. The error falls as the
    ratio of the (k+1)-th to the k-th magnitude; use :func:`lanczos` where that is close to one.

    Examples
    --------
    >>> matrix = torch.diag(torch.tensor([1.0, -5.0, 2.0]))
    >>> power_iteration(lambda v: v @ matrix, torch.zeros(3), generator=0).values
    tensor([-5.0000])
    """
    dim = _dimension(like)
    checks.integer("k", k, low=1, high=dim)
    checks.positive("tol", tol)
    checks.integer("max_iter", max_iter, low=1)
    basis = _orthonormal(random.randn((k, dim), generator=random.as_generator(generator), like=like))
    n_products = 0
    for _ in range(max_iter):
        n_products += k
        image = _apply(matvec, basis)
        small = basis @ image.T
        values, rotation = torch.linalg.eigh((small + small.T) / 2)
        order = values.abs().argsort(descending=True)
        values, rotation = values[order], rotation[:, order]
        vectors, image = rotation.T @ basis, rotation.T @ image
        residuals = torch.linalg.vector_norm(image - values[:, None] * vectors, dim=1)
        converged = bool((residuals <= tol * values[0].abs()).all())
        if converged or not bool(image.any()):
            break
        basis = _orthonormal(image)
    return Eigenpairs(values, vectors, residuals, converged, n_products)


def lanczos(
    matvec: Matvec, v0: Tensor, n_steps: int, *, reorthogonalise: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the tridiagonal matrix of a symmetric operator on the Krylov space of a vector.

    Parameters
    ----------
    matvec : callable
        The operator, (k, d) to (k, d).
    v0 : Tensor, shape (d,) or (k, d)
        Start vector, not zero, or a batch of them, each with its own Krylov space.
    n_steps : int
        Dimension m of the space, 1..d.
    reorthogonalise : bool
        Keep the basis orthogonal to working precision, at the cost of O(d m^2) operations. Without it, copies
        of converged eigenvalues appear.

    Returns
    -------
    alpha : Tensor, shape (m,) or (k, m)
        The diagonal.
    beta : Tensor, shape (m - 1,) or (k, m - 1)
        The off-diagonal.
    Q : Tensor, shape (m, d) or (k, m, d)
        Orthonormal basis, one vector a row.

    Notes
    -----
    :math:`Q A Q^\top = T`. Where the Krylov space is smaller than m, the rows after its dimension are zero, in
    all three.

    Examples
    --------
    >>> matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    >>> alpha, beta, Q = lanczos(lambda v: v @ matrix, torch.ones(3), 3)
    >>> T = torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1)
    >>> torch.linalg.eigvalsh(T)
    tensor([1.0000, 2.0000, 4.0000])
    """
    checks.tensor("v0", v0, ndim=(1, 2))
    start = v0.reshape(-1, v0.shape[-1])
    k, dim = start.shape
    m = checks.integer("n_steps", n_steps, low=1, high=dim)
    length = torch.linalg.vector_norm(start, dim=1, keepdim=True)
    if bool((length == 0).any()):
        raise checks.ArgumentError("v0 is zero; allowed: a vector with a direction. Draw a random one.")
    alpha, beta = start.new_zeros(k, m), start.new_zeros(k, m)
    basis = start.new_zeros(k, m, dim)
    q, previous, size = start / length, torch.zeros_like(start), torch.zeros_like(length)
    for j in range(m):
        basis[:, j] = q
        w = _apply(matvec, q)
        size = torch.maximum(size, torch.linalg.vector_norm(w, dim=1, keepdim=True))
        alpha[:, j] = (w * q).sum(1)
        if j == m - 1:
            break
        w = w - alpha[:, j : j + 1] * q - beta[:, j - 1 : j] * previous if j else w - alpha[:, j : j + 1] * q
        if reorthogonalise:
            # Twice is enough (Kahan and Parlett).
            for _ in range(2):
                w = w - torch.einsum("kjd,kj->kd", basis, torch.einsum("kjd,kd->kj", basis, w))
        length = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        # What is left below the rounding of the products has no direction: the space is invariant.
        ended = length <= 4 * math.sqrt(dim) * torch.finfo(w.dtype).eps * size
        length = torch.where(ended, torch.zeros_like(length), length)
        beta[:, j : j + 1] = length
        previous, q = q, torch.where(ended, torch.zeros_like(w), w / torch.where(ended, 1, length))
    beta = beta[:, : m - 1]
    return (alpha[0], beta[0], basis[0]) if v0.ndim == 1 else (alpha, beta, basis)


def ritz_values(alpha: Tensor, beta: Tensor) -> Tensor:
    """Return the eigenvalues of :func:`lanczos`' tridiagonal matrix, ascending: from inside, those of the operator.

    Examples
    --------
    >>> ritz_values(torch.tensor([1.0, 1.0]), torch.tensor([1.0]))
    tensor([0., 2.])
    """
    return torch.linalg.eigvalsh(
        torch.diag_embed(alpha) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
    )


def hutchinson_trace(
    matvec: Matvec, like: Tensor, *, n_probes: int = 32, generator: random.Seed = None
) -> TraceEstimate:
    r"""Estimate the trace of an operator from random signs, :math:`E[z^\top A z] = \mathrm{tr} A`.

    Parameters
    ----------
    matvec : callable
        The operator, (k, d) to (k, d); need not be symmetric.
    like : Tensor, shape (d,)
        Gives the dimension, the dtype and the device.
    n_probes : int
        Number of probes, multiplied in one batch.
    generator : torch.Generator, int or None
        Source of the probes.

    Notes
    -----
    Exact for diagonal operators; else a probe's variance is twice the squared off-diagonal of the symmetric part.

    References
    ----------
    M. F. Hutchinson (1990). A stochastic estimator of the trace of the influence matrix. Communications in
    Statistics 19(2).

    Examples
    --------
    >>> hutchinson_trace(lambda v: 2 * v, torch.zeros(5), n_probes=3, generator=0).value
    10.0
    """
    z = _probes(like, n_probes, generator)
    return _estimate((z * _apply(matvec, z)).sum(1), n_probes)


def stochastic_lanczos_quadrature(
    matvec: Matvec,
    like: Tensor,
    f: Callable[[Tensor], Tensor],
    *,
    n_probes: int = 16,
    n_steps: int = 30,
    generator: random.Seed = None,
) -> TraceEstimate:
    r"""Estimate the trace of a function of a symmetric operator, such as its log-determinant.

    Parameters
    ----------
    matvec : callable
        The operator A, (k, d) to (k, d).
    like : Tensor, shape (d,)
        Gives the dimension, the dtype and the device.
    f : callable
        Elementwise function of eigenvalues, finite on the operator's spectrum.
    n_probes : int
        Number of random probes, run as one batch.
    n_steps : int
        Lanczos steps a probe, at most d.
    generator : torch.Generator, int or None
        Source of the probes.

    Returns
    -------
    TraceEstimate

    Raises
    ------
    ArgumentError
        If f is not finite at a Ritz value.

    Notes
    -----
    :math:`\mathrm{tr} f(A) = d\, E[u^\top f(A) u] \approx d \sum_j \tau_j^2 f(\theta_j)`, where u is a random
    sign vector of unit length, :math:`\theta` the eigenvalues of its Lanczos matrix and :math:`\tau` the first
    components of their eigenvectors. Costs ``n_probes * n_steps`` products.

    References
    ----------
    S. Ubaru, J. Chen, Y. Saad (2017). Fast estimation of tr(f(A)) via stochastic Lanczos quadrature. SIAM Journal
    on Matrix Analysis and Applications 38(4).

    Examples
    --------
    >>> spectrum = torch.tensor([1.0, 2.0, 4.0, 8.0])
    >>> log_det = stochastic_lanczos_quadrature(lambda v: v * spectrum, torch.zeros(4), torch.log, n_steps=4)
    >>> round(log_det.value, 3)   # log 64
    4.159
    """
    nodes, weights = _quadrature(matvec, like, n_probes, n_steps, generator)
    values = f(nodes)
    # A weight of zero is no part of the spectrum that the probe sees.
    values = torch.where(weights > 0, values, torch.zeros_like(values))
    if not bool(torch.isfinite(values).all()):
        bad = float(nodes[~torch.isfinite(values)][0])
        raise checks.ArgumentError(
            f"f is not finite at the eigenvalue estimate {bad:.4g}; allowed: a function that is finite on the "
            "spectrum. Shift the operator, or use another function."
        )
    return _estimate(len(like) * (weights * values).sum(1), nodes.numel())


def spectral_density(
    matvec: Matvec,
    like: Tensor,
    *,
    n_probes: int = 16,
    n_steps: int = 60,
    grid: Tensor | None = None,
    sigma: float | None = None,
    generator: random.Seed = None,
) -> SpectralDensity:
    """Estimate the density of a symmetric operator's eigenvalues.

    Parameters
    ----------
    matvec : callable
        The operator, (k, d) to (k, d).
    like : Tensor, shape (d,)
        Gives the dimension, the dtype and the device.
    n_probes, n_steps : int
        Random probes and Lanczos steps of each, at most d.
    grid : Tensor, shape (m,), optional
        Where to evaluate the density; by default 512 points over the spectrum and four widths beyond.
    sigma : float, optional
        Width of the Gaussian that smooths each eigenvalue; by default a hundredth of the spectrum's range.
    generator : torch.Generator, int or None
        Source of the probes.

    Returns
    -------
    SpectralDensity

    References
    ----------
    B. Ghorbani, S. Krishnan, Y. Xiao (2019). An investigation into neural net optimization via Hessian
    eigenvalue density. arXiv:1901.10159.

    Examples
    --------
    >>> spectrum = torch.linspace(0, 1, 50)
    >>> found = spectral_density(lambda v: v * spectrum, torch.zeros(50), n_steps=30, generator=0)
    >>> round(float(torch.trapezoid(found.density, found.grid)), 2)
    1.0
    """
    nodes, weights = _quadrature(matvec, like, n_probes, n_steps, generator)
    low, high = float(nodes.min()), float(nodes.max())
    if sigma is None:
        # Without a range (a multiple of the identity) the width follows the value itself.
        sigma = 0.01 * (high - low) or 0.01 * abs(high) or 0.01
    width = checks.positive("sigma", sigma)
    if grid is None:
        grid = torch.linspace(low - 4 * width, high + 4 * width, 512, dtype=like.dtype, device=like.device)
    checks.tensor("grid", grid, ndim=1)
    kernel = torch.exp(-((grid[:, None, None] - nodes) ** 2) / (2 * width**2)) / (
        width * math.sqrt(2 * math.pi)
    )
    return SpectralDensity(grid, (kernel * weights).sum(2).mean(1), nodes, weights)


# -- graphs ------------------------------------------------------------------------------------------------------


def _graph(fun: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    checks.tensor("x", x)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        return leaf, fun(leaf)


def _pull(out: Tensor, leaf: Tensor, u: Tensor) -> Tensor:
    """Return u times the Jacobian of ``out``, also for a batch of u; zero where nothing depends on the leaf."""
    batched = u.ndim > out.ndim
    if not out.requires_grad:
        return leaf.new_zeros((len(u), *leaf.shape) if batched else leaf.shape)
    (product,) = torch.autograd.grad(
        out, leaf, u, retain_graph=True, is_grads_batched=batched, allow_unused=True, materialize_grads=True
    )
    return product


def _one_number(name: str, value: Tensor) -> None:
    if value.numel() != 1:
        raise checks.ArgumentError(
            f"{name} returned shape {tuple(value.shape)}; allowed: a single number. Sum or average it."
        )


def _direction(v: Tensor, x: Tensor) -> Tensor:
    if not isinstance(v, Tensor) or v.shape not in (x.shape, (len(v) if v.ndim else 0, *x.shape)):
        given = f"of shape {tuple(v.shape)}" if isinstance(v, Tensor) else f"a {type(v).__name__}"
        raise checks.ArgumentError(
            f"v is {given}; allowed: the shape of x, {tuple(x.shape)}, or a batch of it. Reshape it."
        )
    return v


# -- operators ---------------------------------------------------------------------------------------------------


def _dimension(like: Tensor) -> int:
    return len(checks.tensor("like", like, ndim=1, finite=False))


def _apply(matvec: Matvec, vectors: Tensor) -> Tensor:
    image = matvec(vectors)
    if not isinstance(image, Tensor) or image.shape != vectors.shape:
        given = f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
        raise checks.ArgumentError(
            f"matvec returned {given}; allowed: the shape of its argument, {tuple(vectors.shape)}, a batch of "
            "vectors. Wrap a function of one vector in torch.func.vmap."
        )
    return image.detach()


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.T).Q.T


def _probes(like: Tensor, n_probes: int, generator: random.Seed) -> Tensor:
    shape = (checks.integer("n_probes", n_probes, low=1), _dimension(like))
    return random.rademacher(shape, generator=random.as_generator(generator), like=like)


def _quadrature(
    matvec: Matvec, like: Tensor, n_probes: int, n_steps: int, generator: random.Seed
) -> tuple[Tensor, Tensor]:
    """Return nodes and weights, (n_probes, n_steps), of Gauss quadrature for each probe's spectral measure."""
    probes = _probes(like, n_probes, generator)
    alpha, beta, basis = lanczos(matvec, probes, checks.integer("n_steps", n_steps, low=1, high=len(like)))
    # Past the end of a probe's space, the diagonal repeats its first element: an eigenvalue of the part cut off
    # would otherwise be zero, outside the spectrum. Its eigenvectors have no first component.
    alpha = torch.where(basis.any(2), alpha, alpha[:, :1])
    matrix = torch.diag_embed(alpha) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    return nodes, vectors[:, 0].square()


def _estimate(samples: Tensor, n_products: int) -> TraceEstimate:
    n = len(samples)
    error = float(samples.std()) / math.sqrt(n) if n > 1 else math.nan
    return TraceEstimate(float(samples.mean()), error, samples, n_products)
