"""The joint perceptual index of :mod:`perception_robustness`, and two problems where everything is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from perturbkit.core import checks
from perturbkit.core.random import Seed, as_generator, rademacher, randn

__all__ = ["GaussianProblem", "TwoPointProblem", "joint_perceptual_index"]

# Exact transport between more pairs than this takes minutes.
_MOST_PAIRS = 4000


def joint_perceptual_index(
    x: Tensor,
    y: Tensor,
    x_hat: Tensor,
    *,
    p: float = 2,
    method: Literal["exact", "sliced"] = "exact",
    n_projections: int = 200,
    generator: Seed = None,
) -> float:
    """Return the Wasserstein distance between the true pairs and the restored pairs.

    Parameters
    ----------
    x, x_hat : Tensor, shape (n, ...)
        True signals and restored ones.
    y : Tensor, shape (n, ...)
        What both belong to.
    p : float
        Order of the distance, at least 1.
    method : {"exact", "sliced"}
        Optimal transport between the samples, for up to 4000 pairs; or the p-mean over random directions of that between
        their projections.
    n_projections : int
        Directions of the sliced distance, at least 1.
    generator : torch.Generator, int or None
        Source of the directions.

    Returns
    -------
    float
        Zero for perfect restoration; and with many samples for draws from the posterior, however far they are from x.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If shapes or an option are not allowed, or there are too many pairs.

    Notes
    -----
    ``W_p(p_{X,Y}, p_{Xhat,Y})`` with Euclidean distances of the concatenated pairs. Between samples of equal size an optimal
    plan is an assignment. Samples of one law are apart by about ``n^{-1/d}`` themselves.

    Cost: O(n^3), or n_projections sorts.

    References
    ----------
    Ohayon, Michaeli and Elad (2023), arXiv:2311.09253, section 3.

    Examples
    --------
    >>> x, y = torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 1)
    >>> joint_perceptual_index(x, y, -x), joint_perceptual_index(x, y, 0 * x)
    (0.0, 1.0)
    """
    checks.tensor("x", x)
    checks.same_shape("x_hat", checks.tensor("x_hat", x_hat), "x", x)
    checks.tensor("y", y)
    if len(y) != len(x):
        raise checks.ArgumentError(f"y has {len(y)} rows; allowed: the {len(x)} rows of x. Pass pairs.")
    checks.between("p", p, 1, math.inf)
    checks.one_of("method", method, ("exact", "sliced"))
    checks.integer("n_projections", n_projections, low=1)
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), x_hat.dtype)
    signal, seen, answer = (v.detach().reshape(len(x), -1).to(x.device, dtype) for v in (x, y, x_hat))
    true, restored = torch.cat([signal, seen], 1), torch.cat([answer, seen], 1)
    if method == "exact":
        checks.integer("the number of pairs of the exact index", len(x), high=_MOST_PAIRS)
        return _transport(true, restored, p)
    directions = randn((true.shape[1], n_projections), generator=as_generator(generator), like=true)
    directions = directions / directions.norm(dim=0)
    gaps = ((true @ directions).sort(0).values - (restored @ directions).sort(0).values).abs()
    return _power_mean(gaps.double(), p)


class TwoPointProblem:
    """A sign seen through Gaussian noise, with restorers ``tanh(a y)``.

    Parameters
    ----------
    sigma : float
        Standard deviation of the noise, zero or above.

    Raises
    ------
    ArgumentError
        If it is negative.

    Notes
    -----
    ``X = +-1`` with equal chance, ``Y = X + sigma N``. The Lipschitz constant of ``tanh(a y)`` is a; the mean square restorer
    has ``a = 1 / sigma^2``, and as a grows the restored values become signs.

    References
    ----------
    Ohayon, Michaeli and Elad (2023), arXiv:2311.09253, section 3.

    Examples
    --------
    >>> toy = TwoPointProblem(1.0)
    >>> toy.index(1.0) > toy.index(4.0)
    True
    """

    def __init__(self, sigma: float) -> None:
        self.sigma = checks.nonnegative("sigma", sigma)

    def degrade(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Add the noise to signals."""
        return x + self.sigma * randn(x.shape, generator=generator, like=x)

    def sample(self, n: int, *, generator: Seed = None) -> tuple[Tensor, Tensor]:
        """Draw signals and measurements, float64 of shape (n, 1) each."""
        g = as_generator(generator)
        x = rademacher((checks.integer("n", n, low=1), 1), generator=g, dtype=torch.float64)
        return x, self.degrade(x, g)

    def restorer(self, a: float) -> Callable[[Tensor], Tensor]:
        """Return ``tanh(a y)``; the sign for infinite a."""
        if a == math.inf:
            return torch.sign
        checks.positive("a", a)
        return lambda y: torch.tanh(a * y)

    def index(self, a: float, *, p: float = 2, n: int = 400) -> float:
        """Return the joint perceptual index of a restorer by quadrature: ``n`` points of equal weight for each law."""
        half = checks.integer("n", n, low=2) // 2
        level = (torch.arange(half, dtype=torch.float64) + 0.5) / half
        spread = self.sigma * torch.special.ndtri(level)[:, None]
        x = torch.cat([torch.ones(half, 1), -torch.ones(half, 1)]).double()
        y = x + torch.cat([spread, spread])
        return joint_perceptual_index(x, y, self.restorer(a)(y), p=p)


class GaussianProblem:
    """A Gaussian number seen through Gaussian noise, with restorers that sweep the posterior ever faster.

    Parameters
    ----------
    sigma : float
        Standard deviation of the noise, above zero.

    Raises
    ------
    ArgumentError
        If it is not positive.

    Notes
    -----
    ``X = N(0, 1)``, ``Y = X + sigma N``; given Y, X is Gaussian of mean ``m = y / (1 + sigma^2)`` and variance
    ``t^2 = sigma^2 / (1 + sigma^2)``. Restorer k answers ``m + t Phi^{-1}(u)``, where the level u is a triangle wave of
    ``2^k y`` clipped to [0.01, 0.99]: as k grows the pairs become those of the posterior, while the Lipschitz constant
    ``1 / (1 + sigma^2) + 2^{k + 1} t / phi(Phi^{-1}(0.01))`` doubles.

    References
    ----------
    Ohayon, Michaeli and Elad (2023), arXiv:2311.09253, section 3.

    Examples
    --------
    >>> toy = GaussianProblem(1.0)
    >>> round(toy.lipschitz(0), 1), round(toy.lipschitz(1), 1)
    (53.6, 106.6)
    """

    _CLIP = 0.01

    def __init__(self, sigma: float) -> None:
        self.sigma = checks.positive("sigma", sigma)
        self._slope = 1 / (1 + self.sigma**2)
        self._spread = self.sigma * math.sqrt(self._slope)

    def degrade(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Add the noise to signals."""
        return x + self.sigma * randn(x.shape, generator=generator, like=x)

    def sample(self, n: int, *, generator: Seed = None) -> tuple[Tensor, Tensor]:
        """Draw signals and measurements, float64 of shape (n, 1) each."""
        g = as_generator(generator)
        x = randn((checks.integer("n", n, low=1), 1), generator=g, dtype=torch.float64)
        return x, self.degrade(x, g)

    def mean(self, y: Tensor) -> Tensor:
        """Return the mean square restorer's answers."""
        return self._slope * y

    def restorer(self, k: int) -> Callable[[Tensor], Tensor]:
        """Return the restorer that sweeps the posterior ``2^k`` times a unit of y."""
        checks.integer("k", k)

        def restore(y: Tensor) -> Tensor:
            t = 2.0**k * y
            level = (2 * (t - t.floor()) - 1).abs().clamp(self._CLIP, 1 - self._CLIP)
            return self._slope * y + self._spread * torch.special.ndtri(level)

        return restore

    def lipschitz(self, k: int) -> float:
        """Return the Lipschitz constant of the restorer."""
        checks.integer("k", k)
        quantile = torch.special.ndtri(torch.tensor(self._CLIP, dtype=torch.float64))
        density = math.exp(-0.5 * float(quantile) ** 2) / math.sqrt(2 * math.pi)
        return self._slope + self._spread * 2.0 ** (k + 1) / density


def _transport(a: Tensor, b: Tensor, p: float) -> float:
    """Return W_p between two samples of equal size, exactly."""
    from scipy.optimize import linear_sum_assignment

    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").double().cpu()
    # In units of the largest, whose power is 1.
    unit = float(distance.max()) or 1.0
    rows, columns = linear_sum_assignment((distance / unit).pow(p).numpy())
    return _power_mean(distance[rows, columns], p)


def _power_mean(values: Tensor, p: float) -> float:
    unit = float(values.max()) or 1.0
    return unit * float((values / unit).pow(p).mean()) ** (1 / p)
