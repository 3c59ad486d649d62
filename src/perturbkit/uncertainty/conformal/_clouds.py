"""Distances to regions that are known as clouds of points, and their calibration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import qmc
from sklearn.exceptions import NotFittedError

from perturbkit.core import checks
from perturbkit.core.random import Seed, numpy_generator
from perturbkit.core.statistics import conformal_quantile
from perturbkit.uncertainty.conformal import _parts
from perturbkit.uncertainty.conformal._directional import responses

# The resolution of a cloud is such that balls of that radius leave few holes in it: a multiple of the distance within
# which most of some points have their nearest neighbour. The box around a cloud reaches beyond it by a share of its width.
_WITHIN, _TIMES, _PROBES, _MARGIN = 0.95, 2.0, 256, 0.25
# Rows whose clouds are held at once.
_BLOCK = 64


class MultivariateConformalizer:
    r"""Grow or shrink any predicted regions until they hold the response with a stated chance.

    Parameters
    ----------
    region : callable
        Maps inputs of shape (n, features) to n arrays of shape (points, d): points spread over the region of each row.
        They must depend on that row alone, neither on its response nor on chance.
    alpha : float
        Chance of missing the response, in (0, 1).
    scale : array, shape (d,), optional
        Units of each response in which distances are taken, chosen without the calibration rows; ones by default.
    n_candidates : int
        Points around a region, of which those away from its own points stand for its outside.
    generator : torch.Generator, int or None
        Source of these points, drawn once and placed around each region.

    Attributes
    ----------
    radius_ : float
        By how much regions grow, in units of the scale; negative if they shrink.
    n_calibration_ : int
        Rows of calibration data.

    Notes
    -----
    The score of a response is its distance to the nearest point of the region, less the resolution of the cloud, if it is
    outside, and minus its distance to the nearest point of the outside if it is inside; regions are
    :math:`\{y : s(x, y) \leq r\}` with r the :math:`\lceil (n+1)(1-\alpha) \rceil`-th smallest score of n calibration rows.
    The coverage is thus at least 1 - alpha in finite samples and, without ties, below 1 - alpha + 1/(n+1), whatever the
    regions. The signed score grows and shrinks by one rule; the paper chooses between two scores.

    Cost: for each row a tree of its points.

    References
    ----------
    Feldman, Bates and Romano (2023), arXiv:2110.00816, section 4.

    Examples
    --------
    >>> square = np.random.default_rng(0).uniform(-1, 1, (2000, 2))
    >>> y = np.random.default_rng(1).uniform(-2, 2, (99, 2))
    >>> made = MultivariateConformalizer(lambda x: [square] * len(x), generator=0).calibrate(np.zeros((99, 1)), y)
    >>> 0.7 < made.radius_ < 1.1
    True
    """

    def __init__(
        self,
        region: Callable[[Any], Sequence[np.ndarray]],
        *,
        alpha: float = 0.1,
        scale: Any = None,
        n_candidates: int = 1024,
        generator: Seed = None,
    ) -> None:
        self.region = region
        self.alpha = alpha
        self.scale = scale
        self.n_candidates = n_candidates
        self.generator = generator

    def calibrate(self, X: Any, Y: Any) -> Self:
        """Choose the radius.

        Parameters
        ----------
        X : array, shape (n, features)
            Inputs not used to fit the regions.
        Y : array, shape (n, d)
            Their responses; (n,) for one.

        Returns
        -------
        MultivariateConformalizer

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an option or the data are not allowed, or there are fewer than ``ceil(1/alpha - 1)`` rows.
        """
        checks.between("alpha", self.alpha, 0, 1, inclusive="neither")
        checks.integer("n_candidates", self.n_candidates, low=1)
        x = checks.array("X", X, ndim=2)
        y = responses(Y, len(x))
        d, need = y.shape[1], _parts.minimum_size(self.alpha)
        if len(x) < need:
            raise checks.ArgumentError(
                f"there are {len(x)} calibration rows; allowed: at least {need} for alpha {self.alpha:g}. Add rows or raise "
                "alpha."
            )
        self.scale_ = np.ones(d) if self.scale is None else checks.array("scale", self.scale, shape=(d,))
        if not (self.scale_ > 0).all():
            raise checks.ArgumentError(
                f"scale has a smallest entry of {self.scale_.min():g}; allowed: numbers above 0. Leave out constant responses."
            )
        self._unit = qmc.Halton(d, seed=numpy_generator(self.generator)).random(self.n_candidates)
        scores = self._scores(X, y)
        self.radius_ = float(conformal_quantile(scores, self.alpha))
        self.n_calibration_ = len(x)
        return self

    def score(self, X: Any, Y: Any) -> np.ndarray:
        """Return the signed distance of each response to its region, shape (n,)."""
        self._check_calibrated()
        return self._scores(X, responses(Y, len(X), len(self.scale_)))

    def contains(self, X: Any, Y: Any) -> np.ndarray:
        """Return whether each response is in its calibrated region, shape (n,)."""
        return self.score(X, Y) <= self.radius_

    def area(self, X: Any, n_points: int = 2048) -> np.ndarray:
        """Return the area (length, volume) of each calibrated region, from ``n_points`` in a box around it; shape (n,)."""
        return np.array([len(inside) / n_points * volume for inside, volume in self._inside(X, n_points)])

    def sample_region(self, X: Any, n: int) -> list[np.ndarray]:
        """Return, for each row, those of ``n`` points spread evenly over a box that are in its calibrated region."""
        return [inside for inside, _ in self._inside(X, n)]

    def _check_calibrated(self) -> None:
        if not hasattr(self, "radius_"):
            raise NotFittedError(
                _parts.NOT_FITTED.replace("fit ", "calibrate ") % {"name": type(self).__name__}
            )

    def _inside(self, X: Any, n_points: int) -> Iterator[tuple[np.ndarray, float]]:
        self._check_calibrated()
        checks.integer("n_points", n_points, low=1)
        # Other points than those that mark the outside.
        unit = qmc.Halton(len(self.scale_), scramble=False).random(n_points + 1)[1:]
        for around in self._around(X):
            grown = max(self.radius_ - around.margin, 0)
            width = around.high - around.low + 2 * grown
            points = around.low - grown + width * unit
            inside = points[around.distance(points) <= self.radius_]
            yield inside * self.scale_, float(np.prod(width * self.scale_))

    def _scores(self, X: Any, y: np.ndarray) -> np.ndarray:
        pairs = zip(self._around(X), y / self.scale_, strict=True)
        return np.array([float(around.distance(row[None])[0]) for around, row in pairs])

    def _around(self, X: Any) -> Iterator[Surroundings]:
        for start in range(0, len(X), _BLOCK):
            for cloud in self.region(X[start : start + _BLOCK]):
                yield Surroundings(np.asarray(cloud, dtype=np.float64) / self.scale_, self._unit)


class Surroundings:
    """A cloud of points that stands for a region, its resolution, and points outside of it.

    Parameters
    ----------
    cloud : ndarray, shape (m, d)
        Points of the region.
    unit : ndarray, shape (c, d)
        Points of the unit cube, from which those outside are made.
    """

    def __init__(self, cloud: np.ndarray, unit: np.ndarray) -> None:
        self.tree = cKDTree(cloud)
        probes = cloud[:: max(1, len(cloud) // _PROBES)]
        gaps = self.tree.query(probes, k=min(2, len(cloud)))[0].reshape(len(probes), -1)[:, -1]
        self.gap = _TIMES * float(np.quantile(gaps, _WITHIN))
        low, high = cloud.min(0), cloud.max(0)
        self.margin = (_MARGIN * float((high - low).max()) + 2 * self.gap) or 1.0
        self.low, self.high = low - self.margin, high + self.margin
        candidates = self.low + (self.high - self.low) * unit
        # The middles of the faces are outside whatever the cloud.
        faces = np.tile((self.low + self.high) / 2, (2 * len(low), 1))
        faces[np.arange(len(low)), np.arange(len(low))] = self.low
        faces[np.arange(len(low), 2 * len(low)), np.arange(len(low))] = self.high
        beyond = candidates[self.tree.query(candidates)[0] > self.gap]
        self.outside = cKDTree(np.concatenate([beyond, faces]))

    def distance(self, y: np.ndarray) -> np.ndarray:
        """Return the distance to the region of points outside, and minus that to the outside of points in the region."""
        beyond = self.tree.query(y)[0] - self.gap
        inside = beyond <= 0
        found = beyond.copy()
        found[inside] = -self.outside.query(y[inside])[0]
        return found
