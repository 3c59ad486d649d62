"""Numerics of posterior moments: derivatives from a polynomial fit, moments from cumulants, maximum entropy densities."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.polynomial import hermite_e
from scipy.special import logsumexp
from torch import Tensor

from perturbkit.core import Oracle, unwrap_output

Values = tuple[Tensor, ...]

# Half the support of a maximum entropy density, in standard deviations, and its quadrature nodes.
REACH, _NODES = 6.0, 241


def fitted_derivatives(
    oracle: Oracle, rows: Tensor, v: Tensor, order: int, reach: float, n_points: int
) -> Tensor:
    """Return the derivatives 0..order-1 at 0 of g(t) = v . f(y + t v), from a polynomial fitted on (-reach, reach)."""
    points, weights = derivative_weights(n_points, order + 6, order)
    t = reach * torch.as_tensor(points).to(rows)
    moved = rows[:, None] + t.view(1, -1, *[1] * (rows.ndim - 1)) * v[:, None]
    answers = oracle(moved.flatten(0, 1)).view_as(moved)
    along = torch.einsum("apd,ad->ap", answers.flatten(2).double(), v.flatten(1).double())
    scaled = weights / reach ** np.arange(order)[:, None]
    return (along @ torch.as_tensor(scaled.T).to(along)).to(rows)


def exact_derivatives(oracle: Oracle, rows: Tensor, v: Tensor, order: int) -> Tensor:
    """Return the same derivatives, each by differentiating those before forward."""

    def derivatives(y: Tensor, v: Tensor) -> Tensor:
        def g(t: Tensor) -> Values:
            moved = unwrap_output(oracle.fun(y + t.view(-1, *[1] * (y.ndim - 1)) * v))
            return ((moved * v).flatten(1).sum(1),)

        tower: Callable[[Tensor], Values] = g
        for _ in range(order - 1):
            tower = _with_slope(tower)
        return torch.stack(tower(torch.zeros_like(y.flatten(1)[:, 0])), 1)

    inner = Oracle(derivatives, memory=oracle.memory, chunk_size=oracle.chunk_size, device=oracle.device)
    found = inner(rows, v)
    oracle.nfev += len(rows)
    oracle.njvp += (order - 1) * len(rows)
    return found


def _with_slope(f: Callable[[Tensor], Values]) -> Callable[[Tensor], Values]:
    """Return a function of t that gives the values of f and the derivative of the last of them."""

    def longer(t: Tensor) -> Values:
        values, slopes, *_ = torch.func.jvp(f, (t,), (torch.ones_like(t),))
        return (*values, slopes[-1])

    return longer


def derivative_weights(n_points: int, degree: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Return points in (-1, 1), and the weights with which values there give derivatives 0..order-1 at 0."""
    series = np.polynomial.chebyshev
    points = series.chebpts1(n_points)
    fit = np.linalg.pinv(series.chebvander(points, degree))
    at_zero = [series.chebval(0.0, series.chebder(np.eye(degree + 1), j)) for j in range(order)]
    return points, np.stack(at_zero) @ fit


def central_from_cumulants(cumulants: list[Tensor]) -> list[Tensor]:
    """Return central moments 0, 1, ..., order from cumulants 1, ..., order."""
    one = torch.ones_like(cumulants[0])
    central = [one, torch.zeros_like(one)]
    for j in range(2, len(cumulants) + 1):
        terms = [math.comb(j - 1, i - 1) * cumulants[i - 1] * central[j - i] for i in range(2, j + 1)]
        central.append(torch.stack(terms).sum(0))
    return central


def max_entropy(wanted: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, int]:
    """Return densities (n, g) at t with moments 1, 2, ... (n, K) about 0, of variance 1, and how many have none."""
    order = wanted.shape[1]
    x, weights = np.polynomial.legendre.leggauss(_NODES)
    x, weights = REACH * x, REACH * weights
    # Polynomials orthonormal under the Gaussian start, where the Hessian is then the identity.
    scale = np.sqrt([math.factorial(j) for j in range(1, order + 1)])
    change = np.zeros((order, order + 1))
    for j in range(1, order + 1):
        change[j - 1, : j + 1] = hermite_e.herme2poly(np.eye(order + 1)[j])[: j + 1] / scale[j - 1]
    target = np.concatenate([np.ones((len(wanted), 1)), wanted], 1) @ change.T
    gauss = -(x**2) / 2 - math.log(2 * math.pi) / 2
    basis = hermite_e.hermevander(x, order)[:, 1:] / scale
    theta, log_total, solved = _dual(basis, target, gauss + np.log(weights))
    log_density = -(t**2) / 2 - math.log(2 * math.pi) / 2
    rise = (
        np.einsum("ngk,nk->ng", hermite_e.hermevander(t, order)[..., 1:] / scale, theta) - log_total[:, None]
    )
    inside = np.where(np.abs(t) <= REACH, np.exp(np.minimum(log_density + rise, 700)), 0.0)
    return np.where(solved[:, None], inside, np.exp(log_density)), int((~solved).sum())


def _dual(
    basis: np.ndarray, target: np.ndarray, base: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Minimise log sum exp(base + basis theta) - target theta for each row of targets; also say which converged."""

    def log_total(theta: np.ndarray) -> np.ndarray:
        return np.asarray(logsumexp(theta @ basis.T + base, axis=1))

    theta = np.zeros_like(target)
    total = log_total(theta)
    for _ in range(200):
        p = np.exp(theta @ basis.T + base - total[:, None])
        mean = p @ basis
        gradient = mean - target
        if np.abs(gradient).max() < 1e-10:
            break
        hessian = np.einsum("nm,mk,mj->nkj", p, basis, basis) - mean[:, :, None] * mean[:, None]
        # Moments on the edge of the possible make it singular.
        hessian += (
            1e-12 * np.eye(len(mean[0])) * np.maximum(np.trace(hessian, axis1=1, axis2=2), 1)[:, None, None]
        )
        move = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        decrease, length = (move * gradient).sum(1), np.ones((len(theta), 1))
        value = total - (theta * target).sum(1)
        for _ in range(40):
            tried = theta - length * move
            total = log_total(tried)
            better = total - (tried * target).sum(1) <= value - 1e-4 * length[:, 0] * decrease + 1e-13
            if better.all():
                break
            length[~better] /= 2
        theta = tried
    return theta, total, np.abs(gradient).max(1) < 1e-6
