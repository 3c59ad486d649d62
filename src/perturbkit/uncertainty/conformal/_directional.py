"""Convex regions from directional quantiles of several responses, and the networks behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
import scipy.stats
import torch
from scipy.stats import qmc
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from perturbkit.core import checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, numpy_generator, randn, randperm, uniform
from perturbkit.uncertainty.conformal import _parts

# Share of the rows kept to choose the level of a region.
_HELD_OUT = 0.2
# Directions a row and step.
_DRAWS = 4
# A region whose half-spaces do not meet is given its most central points.
_FEWEST = 16


class DirectionalQuantileRegression(BaseEstimator):
    r"""A convex region for each row: where the response is above a predicted quantile in every direction.

    Parameters
    ----------
    alpha : float
        Chance of missing the response, in (0, 1), approximately: see :class:`MultivariateConformalizer`.
    n_directions : int
        Directions, at least; with all axes among them, both ways. Even spacing for two responses, else random.
    hidden, n_layers : int
        Width and number of hidden layers of the two networks.
    lr : float
        First step of AdamW.
    epochs, batch_size : int
        Passes over the rows, and rows a step.
    n_points : int
        Points in the box around a region, of which those inside stand for it.
    generator : torch.Generator, int or None
        Source of the split, the weights, the directions and the order of rows.
    progress : Progress, bool or None
        Reports epochs.

    Attributes
    ----------
    directions_ : ndarray, shape (m, d)
        Unit vectors; the first 2 d are the axes, forth and then back.
    level_ : float
        Level of the quantiles, chosen so that the region holds 1 - alpha of held-out rows.

    Notes
    -----
    One network gives the quantile of :math:`u^T Y` at any level a, as :math:`q_a(x, u) = u^T m(x) + \Phi^{-1}(a) \|L(x) u\| s(x, u, a)`
    with s > 0, which is 1 for a normal response, trained with the pinball loss over random u and a. The region is
    :math:`\{y : u^T y \geq q_a(x, u) \text{ for all directions}\}`: for a normal response an ellipsoid, for one response
    the interval between two quantiles.

    References
    ----------
    Feldman, Bates and Romano (2023), arXiv:2110.00816; Paindaveine and Šiman (2011), on directional quantiles.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> made = DirectionalQuantileRegression(epochs=20, generator=0).fit(np.zeros((500, 1)), rng.normal(size=(500, 2)))
    >>> made.contains(np.zeros((2, 1)), [[0.0, 0.0], [9.0, 0.0]]).tolist()
    [True, False]
    """

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        n_directions: int = 64,
        hidden: int = 64,
        n_layers: int = 2,
        lr: float = 5e-3,
        epochs: int = 60,
        batch_size: int = 256,
        n_points: int = 2048,
        generator: Seed = None,
        progress: ProgressLike = False,
    ) -> None:
        self.alpha = alpha
        self.n_directions = n_directions
        self.hidden = hidden
        self.n_layers = n_layers
        self.lr = lr
        self.epochs = epochs
        self.batch_size = batch_size
        self.n_points = n_points
        self.generator = generator
        self.progress = progress

    def fit(self, X: Any, Y: Any) -> Self:
        """Train the network and choose the level.

        Parameters
        ----------
        X : array, shape (n, features)
            Inputs, float32 or float64.
        Y : array, shape (n, d)
            Responses; (n,) for one.

        Returns
        -------
        DirectionalQuantileRegression

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an option or the data are not allowed.
        """
        check_training(self)
        generator = as_generator(self.generator)
        inputs, outputs = training_rows(X, Y)
        self._x, self._y = Standard(inputs), Standard(outputs)
        x, y, d = self._x(inputs), self._y(outputs), self._y.d
        order = randperm(len(x), generator=generator)
        held, used = order.tensor_split([int(_HELD_OUT * len(x))])
        low, high = level_range(self.alpha, d)
        self._net = QuantileNet(x.shape[1], d, [self.hidden] * self.n_layers, generator, x.dtype)
        self._directions = directions(self.n_directions, d, generator, x.dtype)
        raw = self._directions.numpy() / self._y.std
        self._length = np.linalg.norm(raw, axis=1)
        self.directions_ = raw / self._length[:, None]
        train(
            self._net, lambda i: self._net.loss(x[used[i]], y[used[i]], low, high, generator), len(used), generator,
            epochs=self.epochs, batch_size=self.batch_size, lr=self.lr, progress=self.progress,
        )  # fmt: skip
        left, right = low, high
        for _ in range(20):
            # The lower the level, the larger the region.
            self._score = (left + right) / 2
            covered = float((self._slack(x[held], y[held]) >= 0).double().mean())
            left, right = (self._score, right) if covered > 1 - self.alpha else (left, self._score)
        self.level_ = float(scipy.stats.norm.cdf(self._score))
        unit = qmc.Halton(d, seed=numpy_generator(generator)).random(self.n_points)
        self._unit = torch.as_tensor(unit, dtype=x.dtype)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the quantile along each direction, shape (n, m)."""
        x = self._inputs(X)
        found = self._net.thresholds(x, self._directions, self._score).numpy()
        return found / self._length + self.directions_ @ self._y.mean

    def contains(self, X: Any, Y: Any) -> np.ndarray:
        """Return whether each response is in its region, shape (n,)."""
        x = self._inputs(X)
        return (self._slack(x, self._y(responses(Y, len(x), self._y.d)).to(x)) >= 0).numpy()

    def cloud(self, X: Any) -> list[np.ndarray]:
        """Return points spread evenly over the region of each row, n arrays of shape (points, d)."""
        return [self._y.back(z.numpy()) for z in self._clouds(self._inputs(X))]

    def inside(self, X: Any, points: Tensor) -> list[Tensor]:
        """Return those of given points that are in the region, the most central ones if there are few, for each row."""
        z = (points - torch.as_tensor(self._y.mean)) / torch.as_tensor(self._y.std)
        thresholds = self._net.thresholds(self._inputs(X), self._directions, self._score)
        return [points[self._kept(z, q)] for q in thresholds]

    def _clouds(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the clouds of standardised inputs, in standardised units."""
        d = self._y.d
        for q in self._net.thresholds(x, self._directions, self._score):
            points = q[:d] + (-q[d : 2 * d] - q[:d]) * self._unit
            yield points[self._kept(points, q)]

    def _kept(self, z: Tensor, q: Tensor) -> Tensor:
        slack = (z @ self._directions.T - q).amin(1)
        return slack >= slack.topk(min(_FEWEST, len(slack))).values[-1].clamp_max(0)

    def _slack(self, x: Tensor, y: Tensor) -> Tensor:
        return (y @ self._directions.T - self._net.thresholds(x, self._directions, self._score)).amin(1)

    def _inputs(self, X: Any) -> Tensor:
        check_is_fitted(self, "level_", msg=_parts.NOT_FITTED)
        return self._x(checks.array("X", X, shape=(None, self._x.d)).astype(self._x.mean.dtype))


class Standard:
    """Columns brought to mean zero and variance one, and back."""

    def __init__(self, values: np.ndarray) -> None:
        self.mean = values.mean(0)
        self.std = np.where(values.std(0) > 0, values.std(0), 1).astype(values.dtype)
        self.d = values.shape[1]

    def __call__(self, values: np.ndarray) -> Tensor:
        """Return standardised rows."""
        return torch.as_tensor((values - self.mean) / self.std)

    def back(self, values: np.ndarray) -> np.ndarray:
        """Return rows in their own units."""
        return self.mean + self.std * values


def training_rows(X: Any, Y: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and responses of one dtype, float32 where the inputs are, or refuse."""
    kind = np.float32 if getattr(X, "dtype", None) in (np.float32, torch.float32) else np.float64
    x = checks.array("X", X, ndim=2).astype(kind)
    y = responses(Y, len(x)).astype(kind)
    if len(x) < 10:
        raise checks.ArgumentError(f"X has {len(x)} rows; allowed: at least 10. Add rows.")
    return x, y


def responses(Y: Any, n: int, d: int | None = None) -> np.ndarray:
    """Return responses of shape (n, d), or refuse; a vector is one response a row."""
    given = checks.array("Y", Y, ndim=(1, 2))
    return checks.array("Y", given[:, None] if given.ndim == 1 else given, shape=(n, d))


def check_training(made: Any) -> None:
    """Check the options that the two estimators share."""
    checks.between("alpha", made.alpha, 0, 1, inclusive="neither")
    checks.positive("lr", made.lr)
    for name in ("n_directions", "hidden", "n_layers", "epochs", "batch_size", "n_points"):
        checks.integer(name, getattr(made, name), low=1)


class QuantileNet(nn.Module):
    """Quantiles of u . y given x for any direction u and normal score nu of the level: those of a normal, corrected."""

    def __init__(
        self, features: int, outputs: int, hidden: list[int], generator: torch.Generator, dtype: torch.dtype
    ):
        super().__init__()
        self.outputs = outputs
        self.normal = _parts.mlp([features, *hidden, outputs + outputs**2], generator, dtype=dtype)
        self.correction = _parts.mlp([features + outputs + 1, *hidden, 1], generator, dtype=dtype)
        for last in (self.normal[-1], self.correction[-1]):
            # Start near the standard normal.
            last.get_parameter("weight").data.mul_(0.1)

    def forward(self, x: Tensor, u: Tensor, nu: Tensor) -> Tensor:
        """Return quantiles of shape (n,) for rows of x, u and nu; below the middle for nu < 0."""
        centre, root = self.normal(x).split([self.outputs, self.outputs**2], 1)
        root = root.view(-1, self.outputs, self.outputs) + torch.eye(self.outputs).to(root)
        spread = (root @ u[..., None])[..., 0].square().sum(1).clamp_min(1e-6).sqrt()
        # Within exp(-2) .. exp(2), so that no step can blow it up.
        log_factor = 2 * self.correction(torch.cat([x, u, nu[:, None]], 1))[:, 0].tanh()
        return (centre * u).sum(1) + nu * spread * log_factor.exp()

    def thresholds(self, x: Tensor, directions: Tensor, nu: float) -> Tensor:
        """Return quantiles of shape (n, m) for m directions at one level."""
        n, m = len(x), len(directions)
        rows, u = x.repeat_interleave(m, 0), directions.repeat(n, 1)
        return self(rows, u, torch.full_like(rows[:, 0], nu)).view(n, m)

    def loss(self, x: Tensor, y: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
        """Return the mean pinball loss at a few random directions and levels a row."""
        x, y = x.repeat(_DRAWS, 1), y.repeat(_DRAWS, 1)
        u = randn(y.shape, generator=generator, like=y)
        # A normal number of single precision may be exactly zero.
        u = u / u.norm(dim=1, keepdim=True).clamp_min(1e-12)
        nu = uniform((len(y),), low, high, generator=generator, like=y)
        level = 0.5 * torch.special.erfc(-nu / math.sqrt(2))
        residual = (u * y).sum(1) - self(x, u, nu)
        # The weight evens out low levels, whose losses are small, without letting their rare large gradients rule.
        return (torch.maximum(level * residual, (level - 1) * residual) / level.sqrt()).mean()


def train(
    net: nn.Module,
    loss: Callable[[Tensor], Tensor],
    n: int,
    generator: torch.Generator,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    progress: ProgressLike,
) -> None:
    """Minimise a loss of row indices by AdamW with a cosine schedule, in place, and freeze the network."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-5, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in track(range(epochs), "st_dqr", progress=progress):
        for rows in randperm(n, generator=generator).split(batch_size):
            optimizer.zero_grad()
            loss(rows).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
        schedule.step()
    net.requires_grad_(False)


def directions(n: int, d: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Return the 2 d axes and further unit vectors, in opposite pairs, at least n together; evenly spaced for d = 2."""
    if d == 2:
        quarter = math.ceil(n / 4)
        angle = math.pi / 2 * torch.arange(4 * quarter, dtype=torch.float64) / quarter
        # The axes +1, +2, -1, -2 come first.
        return (
            torch.stack([angle.cos(), angle.sin()], 1)
            .view(4, quarter, 2)
            .transpose(0, 1)
            .reshape(-1, 2)
            .to(dtype)
        )
    axes = torch.eye(d, dtype=torch.float64)
    more = randn((max(math.ceil(n / 2) - d, 0) if d > 1 else 0, d), generator=generator, dtype=torch.float64)
    half = torch.cat([axes, more / more.norm(dim=1, keepdim=True)])
    return torch.cat([axes, -axes, half[d:], -half[d:]]).to(dtype)


def level_range(alpha: float, d: int) -> tuple[float, float]:
    """Return normal scores of levels around that of a ball that holds 1 - alpha of a standard normal."""
    middle = -math.sqrt(scipy.stats.chi2.ppf(1 - alpha, d))
    return middle - 1.0, max(middle + 1.0, middle / 3)
