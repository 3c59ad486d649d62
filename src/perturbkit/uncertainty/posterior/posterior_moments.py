"""Principal components, moments and marginals of the posterior behind a denoiser, from the denoiser alone.

Use it to see in which directions a denoised signal may be wrong, how far, and with what distribution, without training
and without sampling. Manor and Michaeli (2024), On the Posterior Distribution in Denoising: Application to Uncertainty
Quantification, arXiv:2309.13598.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from perturbkit.core import Denoiser, Oracle, Result, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randn
from perturbkit.core.results import Cost
from perturbkit.uncertainty.posterior import _parts

__all__ = [
    "DirectionalMoments",
    "PosteriorPCA",
    "directional_moments",
    "max_entropy_density",
    "posterior_principal_components",
]

Mean = Oracle | nn.Module | Denoiser | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class PosteriorPCA(Result):
    """Principal components of the posterior of each row.

    Attributes
    ----------
    components : Tensor, shape (n, k, ...)
        Orthonormal directions; the entry of largest magnitude is positive.
    eigenvalues : Tensor, shape (n, k)
        Posterior variances along them, largest first.
    mean : Tensor, shape (n, ...)
        Posterior mean: the denoised signal.
    residuals : Tensor, shape (n, k)
        Norm of (covariance - eigenvalue) times component. Large where the iteration has not converged, or where the
        denoiser's derivative is not symmetric, as that of an exact posterior mean is.
    cost : Cost
        Rows through the denoiser.
    """

    components: Tensor
    eigenvalues: Tensor
    mean: Tensor
    residuals: Tensor
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True, eq=False)
class DirectionalMoments(Result):
    """Posterior moments of the signal's coordinate along directions.

    Attributes
    ----------
    mean : Tensor, shape (n,) or (n, k)
        Of the coordinate, the inner product of direction and signal.
    central : Tensor, shape (..., order - 1)
        Central moments 2, 3, ..., order.
    cumulants : Tensor, shape (..., order - 1)
        Cumulants 2, 3, ..., order.
    cost : Cost
        Rows through the denoiser.
    """

    mean: Tensor
    central: Tensor
    cumulants: Tensor
    cost: Cost = field(default_factory=Cost)

    @property
    def variance(self) -> Tensor:
        """Second central moment."""
        return self.central[..., 0]

    @property
    def skewness(self) -> Tensor:
        """Third central moment in standard deviations; of order 3 and above."""
        return self.central[..., 1] / self.variance**1.5

    @property
    def kurtosis(self) -> Tensor:
        """Fourth central moment in standard deviations, 3 for a Gaussian; of order 4 and above."""
        return self.central[..., 2] / self.variance**2


def posterior_principal_components(
    denoiser: Mean,
    y: Tensor,
    sigma: float,
    *,
    n_components: int = 3,
    mask: Tensor | None = None,
    iterations: int = 50,
    tol: float = 1e-3,
    derivative: Literal["difference", "jvp"] = "difference",
    step: float | None = None,
    generator: Seed = None,
    progress: ProgressLike = None,
) -> PosteriorPCA:
    r"""Find the directions in which the clean signal is most uncertain given the noisy one.

    Parameters
    ----------
    denoiser : Oracle, nn.Module, callable or core.Denoiser
        Maps noisy rows to their posterior means, in the same shape. A :class:`~perturbkit.core.Denoiser` of a diffusion
        model is asked at the time whose sigma/alpha is ``sigma``, about alpha times the row.
    y : Tensor, shape (n, ...)
        Noisy signals, clean ones plus Gaussian noise.
    sigma : float
        Standard deviation of the noise, above 0, in units of ``y``.
    n_components : int
        Components k a row, from 1 to the number of entries looked at.
    mask : Tensor, shape (...), optional
        True, or 1, at the entries of a row to look at; components are zero elsewhere. All by default.
    iterations : int
        Most iterations, of n k rows each.
    tol : float
        Stop once all residuals are below this share of a row's largest eigenvalue; 0: never.
    derivative : {"difference", "jvp"}
        Products with the Jacobian: by forward differences, or exact by forward differentiation.
    step : float, optional
        Length of a difference, in units of ``y``. Default: the geometric mean of sigma and the rounding error of a row,
        where truncation and rounding are of equal size.
    generator : torch.Generator, int or None
        Source of the starting directions.
    progress : Progress, bool or None
        Reports iterations.

    Returns
    -------
    PosteriorPCA

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.
    ModelError
        If the denoiser answers another shape.

    Notes
    -----
    For :math:`y = x + \sigma n` with Gaussian n the posterior covariance is

    .. math:: \operatorname{Cov}[x | y] = \sigma^2 \, \partial \mu_1(y) / \partial y,
        \qquad \mu_1(y) = E[x | y],

    so subspace iteration needs only products of the Jacobian with k vectors, each one more row through the denoiser.
    Eigenvalues are those of the symmetric part of the Jacobian on the space found. Cost: n rows for the mean and n k an
    iteration, nothing backward, and no d x d matrix. For a trained network all is as good as the network is a posterior
    mean; eigenvalues may then even be negative.

    References
    ----------
    Manor and Michaeli (2024), arXiv:2309.13598, theorem 2 and algorithm 1.

    Examples
    --------
    >>> prior = torch.tensor([4.0, 1.0])
    >>> found = posterior_principal_components(lambda y: y * prior / (prior + 1), torch.ones(1, 2), 1.0, n_components=2)
    >>> found.eigenvalues
    tensor([[0.8000, 0.5000]])
    """
    checks.tensor("y", y, ndim=range(2, 9))
    support = _support(mask, y)
    k = checks.integer("n_components", n_components, low=1, high=len(support))
    checks.integer("iterations", iterations, low=1)
    checks.nonnegative("tol", tol)
    checks.one_of("derivative", derivative, ("difference", "jvp"))
    with _opened(denoiser, y, sigma) as (oracle, mean, before):
        if step is None:
            size = y.flatten(1).norm(dim=1).clamp_min(sigma)
            length = (torch.finfo(y.dtype).eps * size * sigma).sqrt()
        else:
            length = torch.full_like(y.flatten(1)[:, 0], checks.positive("step", step))

        def product(basis: Tensor) -> Tensor:
            """Return the Jacobian times vectors of the entries looked at, both (n, k, s)."""
            v = _embedded(basis, support, y).flatten(0, 1)
            rows = y.repeat_interleave(basis.shape[1], 0)
            if derivative == "jvp":
                image = oracle.jvp(rows, v)[1]
            else:
                h = length.repeat_interleave(basis.shape[1]).view(-1, *[1] * (y.ndim - 1))
                image = (oracle(rows + h * v) - mean.repeat_interleave(basis.shape[1], 0)) / h
            return image.flatten(1)[:, support].view_as(basis)

        basis = _orthonormal(randn((len(y), k, len(support)), generator=as_generator(generator), like=y))
        for _ in track(range(iterations), "posterior components", progress=progress):
            image = product(basis)
            small = basis @ image.mT
            values, rotation = torch.linalg.eigh((small + small.mT) / 2)
            values, rotation = values.flip(-1), rotation.flip(-1)
            vectors, image = rotation.mT @ basis, rotation.mT @ image
            residuals = (image - values[..., None] * vectors).norm(dim=-1)
            if bool((residuals <= tol * values.abs().amax(1, keepdim=True)).all()):
                break
            basis = _orthonormal(image)
        peak = vectors.gather(-1, vectors.abs().argmax(-1, keepdim=True))
        components = _embedded(vectors * peak.sign(), support, y)
        return PosteriorPCA(components, sigma**2 * values, mean, sigma**2 * residuals, oracle.cost - before)


def directional_moments(
    denoiser: Mean,
    y: Tensor,
    sigma: float,
    direction: Tensor,
    *,
    order: int = 4,
    method: Literal["difference", "jet"] = "difference",
    radius: float = 0.5,
    n_points: int = 21,
) -> DirectionalMoments:
    r"""Return the posterior moments of the signal's coordinate along given directions, to any order.

    Parameters
    ----------
    denoiser, y, sigma
        As in :func:`posterior_principal_components`.
    direction : Tensor, shape (n, ...) or (n, k, ...)
        One direction a row in the shape of ``y``, or k, such as the ``components`` found; brought to length one.
    order : int
        Largest moment, 2..8.
    method : {"difference", "jet"}
        Derivatives along the direction from a polynomial fitted to ``n_points`` answers, or exact by nested forward
        differentiation, for smooth networks.
    radius : float
        "difference": the points lie within this many sigmas. Larger ones average over a rough or single precision
        denoiser, smaller ones over less of a curved one.
    n_points : int
        "difference": points a direction, at least ``order + 8``.

    Returns
    -------
    DirectionalMoments

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.
    ModelError
        If the denoiser answers another shape.

    Notes
    -----
    Given y, the signal's density is an exponential family in :math:`y / \sigma^2`. With :math:`g(t) = v^T \mu_1(y + tv)`
    the cumulants of :math:`v^T x` are therefore derivatives of all orders,

    .. math:: \kappa_{j} = \sigma^{2(j-1)} g^{(j-1)}(0),

    and central moments follow from cumulants, :math:`m_2 = \kappa_2`, :math:`m_3 = \kappa_3`,
    :math:`m_4 = \kappa_4 + 3 \kappa_2^2`, in general :math:`m_j = \sum_{i=2}^{j} \binom{j-1}{i-1} \kappa_i m_{j-i}`; this is
    the recursion :math:`m_{j+1} = \sigma^2 m_j' + j m_{j-1} m_2` of the paper, solved. The fit is by least squares at
    Chebyshev points, of degree ``order + 6``. Cost: ``n_points`` rows a direction; "jet" one row a direction,
    as dear as :math:`2^{order-1}`.

    References
    ----------
    Manor and Michaeli (2024), arXiv:2309.13598, theorems 1 and 2.

    Examples
    --------
    >>> y = torch.zeros(1, 2, dtype=torch.float64)
    >>> found = directional_moments(lambda y: y / 2, y, 1.0, torch.ones(1, 2, dtype=torch.float64))
    >>> [round(float(v), 6) for v in (found.variance, found.skewness, found.kurtosis)]
    [0.5, 0.0, 3.0]
    """
    checks.tensor("y", y, ndim=range(2, 9))
    checks.tensor("direction", direction, ndim=(y.ndim, y.ndim + 1))
    row = tuple(y.shape[1:])
    single = direction.shape == y.shape
    if not single and (direction.shape[:1] != y.shape[:1] or direction.shape[2:] != row):
        raise checks.ArgumentError(
            f"direction has shape {tuple(direction.shape)}; allowed: {tuple(y.shape)}, or {(len(y), 'k', *row)} for k "
            "directions a row. Give each direction the shape of a row of y."
        )  # fmt: skip
    v = direction.to(y).reshape(len(y), -1, *row)
    norm = v.flatten(2).norm(dim=2)
    if not bool((norm > 0).all()):
        raise checks.ArgumentError("direction holds a zero vector; allowed: others. Remove it.")
    checks.integer("order", order, low=2, high=8)
    checks.one_of("method", method, ("difference", "jet"))
    checks.positive("radius", radius)
    checks.integer("n_points", n_points, low=order + 8)
    v = v / norm.view(*norm.shape, *[1] * len(row))
    k = v.shape[1]
    flat, rows = v.flatten(0, 1), y.repeat_interleave(k, 0)
    with _opened(denoiser, y, sigma) as (oracle, _, before):
        if method == "jet":
            derivatives = _parts.exact_derivatives(oracle, rows, flat, order)
        else:
            derivatives = _parts.fitted_derivatives(oracle, rows, flat, order, radius * sigma, n_points)
        cost = oracle.cost - before
    cumulants = [derivatives[:, j] * sigma ** (2 * j) for j in range(order)]
    central = _parts.central_from_cumulants(cumulants)
    shape = (len(y),) if single else (len(y), k)
    return DirectionalMoments(
        cumulants[0].view(shape), torch.stack(central[2:], 1).view(*shape, order - 1),
        torch.stack(cumulants[1:], 1).view(*shape, order - 1), cost,
    )  # fmt: skip


def max_entropy_density(moments: DirectionalMoments, grid: Any) -> Tensor:
    r"""Return the density of largest entropy with given moments, at the points of a grid.

    Parameters
    ----------
    moments : DirectionalMoments
        With positive variances. All of its moments are matched.
    grid : Tensor or array, shape (g,) or (..., g)
        Values of the coordinate, for all directions or for each.

    Returns
    -------
    Tensor, shape (..., g)
        In the dtype of the moments.

    Raises
    ------
    ArgumentError
        If a variance is not positive, or shapes disagree.

    Notes
    -----
    :math:`p(t) = \exp(\sum_j \lambda_j t^j)` within six standard deviations of the mean, zero outside; the
    :math:`\lambda` minimise the convex :math:`\log \int \exp(\sum_j \lambda_j t^j) - \sum_j \lambda_j m_j`, by Newton's
    method in orthogonal polynomials. Where no density within that support has these moments (a kurtosis not above the
    squared skewness plus one, for instance, as derivatives of a network may give) the Gaussian of the first two is
    returned, with a warning.

    References
    ----------
    Manor and Michaeli (2024), arXiv:2309.13598, section 4.

    Examples
    --------
    >>> made = DirectionalMoments(*(torch.tensor([v]) for v in ([0.0], [[1.0, 0.0, 3.0]], [[1.0, 0.0, 0.0]])))
    >>> round(float(max_entropy_density(made, [0.0])), 4)
    0.3989
    """
    central = moments.central.detach().double().cpu().reshape(-1, moments.central.shape[-1]).numpy()
    low = float(central[:, 0].min())
    if not low > 0:
        raise checks.ArgumentError(
            f"moments has a smallest variance of {low:g}; allowed: numbers above 0. Leave out directions that a trained "
            "denoiser gives no variance, or take the components of largest eigenvalues."
        )
    points = checks.array("grid", grid, ndim=(1, moments.mean.ndim + 1))
    if points.ndim > 1 and points.shape[:-1] != tuple(moments.mean.shape):
        raise checks.ArgumentError(
            f"grid has shape {points.shape}; allowed: (g,), or {(*moments.mean.shape, 'g')}. Give a grid a direction."
        )
    mean = moments.mean.detach().double().cpu().reshape(-1, 1).numpy()
    spread = np.sqrt(central[:, :1])
    shape = (*moments.mean.shape, points.shape[-1])
    t = (np.broadcast_to(points, shape).reshape(len(mean), -1) - mean) / spread
    wanted = central / spread ** np.arange(2, central.shape[1] + 2)
    density, failed = _parts.max_entropy(np.concatenate([np.zeros((len(mean), 1)), wanted], 1), t)
    if failed:
        warnings.warn(
            f"{failed} of {len(mean)} directions have moments that no density within {_parts.REACH:g} standard deviations has; the "
            "Gaussian of their mean and variance is returned.", checks.PerturbkitWarning, stacklevel=2,
        )  # fmt: skip
    return torch.as_tensor((density / spread).reshape(shape)).to(moments.mean)


@contextmanager
def _opened(denoiser: Mean, y: Tensor, sigma: float) -> Iterator[tuple[Oracle, Tensor, Cost]]:
    """Yield the posterior mean as an oracle, held in evaluation mode, its answer at y, and its cost before."""
    checks.positive("sigma", sigma)
    inner: Any = denoiser
    if isinstance(denoiser, Denoiser):
        schedule, model = denoiser.schedule, denoiser
        time = float(schedule.time(sigma))
        alpha = float(schedule.alpha(time))
        inner, denoiser = denoiser.fun, lambda rows: model.x0(alpha * rows, time)
    oracle = Oracle.wrap(denoiser)
    before = oracle.cost
    with Oracle.wrap(inner).frozen():
        mean = oracle(y)
        if mean.shape != y.shape:
            raise checks.ModelError(
                f"the denoiser answered shape {tuple(mean.shape)} to {tuple(y.shape)}; allowed: the shape of y. Return the "
                "denoised signal."
            )
        yield oracle, mean, before


def _support(mask: Tensor | None, y: Tensor) -> Tensor:
    """Return the indices of a flattened row's entries to look at."""
    if mask is None:
        return torch.arange(y[0].numel(), device=y.device)
    if mask.shape != y.shape[1:] or not bool(((mask == 0) | (mask == 1)).all()) or not bool(mask.any()):
        raise checks.ArgumentError(
            f"mask has shape {tuple(mask.shape)}; allowed: zeros and ones of shape {tuple(y.shape[1:])}, at least one of them "
            "1. Mark the entries to look at."
        )
    return mask.to(y.device).flatten().nonzero()[:, 0]


def _embedded(basis: Tensor, support: Tensor, y: Tensor) -> Tensor:
    """Return vectors (n, k, s) of the entries looked at as (n, k, ...) in the shape of rows."""
    full = basis.new_zeros(*basis.shape[:2], y[0].numel())
    full[..., support] = basis
    return full.view(*basis.shape[:2], *y.shape[1:])


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.mT)[0].mT.contiguous()
