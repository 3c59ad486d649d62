"""Regions for several responses at once, of any shape, from directional quantiles of a learned latent, then calibrated.

Use it where responses depend on one another and a box of intervals, or a convex set, would be mostly empty. Feldman, Bates
and Romano (2023), Calibrated Multiple-Output Quantile Regression with Representation Learning, arXiv:2110.00816.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from scipy.spatial import cKDTree
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randn
from perturbkit.uncertainty.conformal import _directional, _parts
from perturbkit.uncertainty.conformal._clouds import MultivariateConformalizer
from perturbkit.uncertainty.conformal._directional import DirectionalQuantileRegression

# Share of a decoded cloud that is left out as isolated, by the distance to this neighbour.
_ISOLATED, _NEIGHBOURS = 0.1, 10

__all__ = ["STDQR", "DirectionalQuantileRegression", "MultivariateConformalizer"]


class STDQR(BaseEstimator):
    r"""Regions of any shape: convex ones in the latent space of a conditional autoencoder, decoded and calibrated.

    Parameters
    ----------
    alpha : float
        Chance of missing the response, in (0, 1).
    latent_dim : int
        Dimension of the latent.
    kl_weight : float
        Weight of the latent's divergence from the standard normal, above 0; the larger, the rounder the latent and the
        coarser the decoded region.
    n_directions, hidden, n_layers, lr, epochs, batch_size, n_points
        As in :class:`DirectionalQuantileRegression`; the networks of the autoencoder have the same sizes and training.
    vae_epochs : int
        Passes of the autoencoder over the rows.
    generator : torch.Generator, int or None
        Source of all randomness; drawn once, so that regions are a function of the inputs alone.
    progress : Progress, bool or None
        Reports epochs.

    Attributes
    ----------
    quantiles_ : DirectionalQuantileRegression
        Of the latent.
    conformalizer_ : MultivariateConformalizer
        Distances are in standard deviations of each response.
    radius_ : float
        By how much regions were grown, or shrunk if negative.

    Notes
    -----
    Encoder and decoder minimise :math:`\|Y - D(X, Z)\|^2/d + w \, KL(E(Z|X, Y), N(0, I))`, which makes the latent unimodal,
    where convex regions do well. The region of x is a cloud: normal draws of the latent, the same for all x, that are in the
    latent's region, decoded, less the tenth that lands on isolated points, between parts that the decoder keeps apart. It is
    then grown or shrunk by :class:`MultivariateConformalizer`, so that the coverage is at least 1 - alpha in finite samples
    whatever the networks have learned.

    Cost: training two networks; some milliseconds a row, for the neighbours of ``n_points`` points.

    References
    ----------
    Feldman, Bates and Romano (2023), arXiv:2110.00816.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x, y = rng.normal(size=(400, 1)), rng.normal(size=(400, 2))
    >>> made = STDQR(hidden=16, vae_epochs=10, epochs=5, n_points=256, generator=0)
    >>> made = made.fit(x[:300], y[:300]).calibrate(x[300:], y[300:])
    >>> made.contains(x[:2], [[0.0, 0.0], [0.0, 9.0]]).tolist()
    [True, False]
    """

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        latent_dim: int = 3,
        kl_weight: float = 0.03,
        n_directions: int = 64,
        hidden: int = 64,
        n_layers: int = 2,
        lr: float = 5e-3,
        epochs: int = 60,
        vae_epochs: int = 200,
        batch_size: int = 256,
        n_points: int = 2048,
        generator: Seed = None,
        progress: ProgressLike = False,
    ) -> None:
        self.alpha = alpha
        self.latent_dim = latent_dim
        self.kl_weight = kl_weight
        self.n_directions = n_directions
        self.hidden = hidden
        self.n_layers = n_layers
        self.lr = lr
        self.epochs = epochs
        self.vae_epochs = vae_epochs
        self.batch_size = batch_size
        self.n_points = n_points
        self.generator = generator
        self.progress = progress

    def fit(self, X: Any, Y: Any) -> Self:
        """Train the autoencoder, and the quantiles of its latent.

        Parameters
        ----------
        X : array, shape (n, features)
            Inputs, float32 or float64.
        Y : array, shape (n, d)
            Responses; (n,) for one.

        Returns
        -------
        STDQR

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an option or the data are not allowed.
        """
        _directional.check_training(self)
        checks.integer("latent_dim", self.latent_dim, low=1)
        checks.positive("kl_weight", self.kl_weight)
        checks.integer("vae_epochs", self.vae_epochs, low=1)
        self._generator = as_generator(self.generator)
        inputs, outputs = _directional.training_rows(X, Y)
        self._x, self._y = _directional.Standard(inputs), _directional.Standard(outputs)
        x, y, generator = self._x(inputs), self._y(outputs), self._generator
        hidden = [self.hidden] * self.n_layers
        self._vae = _ConditionalVAE(x.shape[1], self._y.d, self.latent_dim, hidden, generator, x.dtype)
        _directional.train(
            self._vae, lambda i: self._vae.loss(x[i], y[i], self.kl_weight, generator), len(x), generator,
            epochs=self.vae_epochs, batch_size=self.batch_size, lr=self.lr, progress=self.progress,
        )  # fmt: skip
        shared = (
            "alpha",
            "n_directions",
            "hidden",
            "n_layers",
            "lr",
            "epochs",
            "batch_size",
            "n_points",
            "progress",
        )
        options = {name: getattr(self, name) for name in shared}
        z = self._vae.encode(x, y, generator)[0].numpy()
        self.quantiles_ = DirectionalQuantileRegression(**options, generator=generator).fit(inputs, z)
        self._latents = randn((self.n_points, self.latent_dim), generator=generator, dtype=x.dtype)
        return self

    def calibrate(self, X: Any, Y: Any) -> Self:
        """Grow or shrink the regions with rows that were not trained on; see :class:`MultivariateConformalizer`."""
        check_is_fitted(self, "quantiles_", msg=_parts.NOT_FITTED)
        made = MultivariateConformalizer(
            self._cloud, alpha=self.alpha, scale=self._y.std, generator=self._generator
        )
        self.conformalizer_ = made.calibrate(self._rows(X), Y)
        self.radius_ = made.radius_
        return self

    def contains(self, X: Any, Y: Any) -> np.ndarray:
        """Return whether each response is in its region, shape (n,)."""
        return self._calibrated().contains(self._rows(X), Y)

    def area(self, X: Any, n_points: int = 2048) -> np.ndarray:
        """Return the area (length, volume) of each region, from ``n_points`` in a box around it; shape (n,)."""
        return self._calibrated().area(self._rows(X), n_points).astype(self._y.std.dtype)

    def sample_region(self, X: Any, n: int) -> list[np.ndarray]:
        """Return, for each row, those of ``n`` points spread evenly over a box that are in its region."""
        return self._calibrated().sample_region(self._rows(X), n)

    def _calibrated(self) -> MultivariateConformalizer:
        check_is_fitted(self, "conformalizer_", msg=_parts.NOT_FITTED)
        return self.conformalizer_

    def _rows(self, X: Any) -> np.ndarray:
        return checks.array("X", X, shape=(None, self._x.d)).astype(self._x.mean.dtype)

    def _cloud(self, X: np.ndarray) -> list[np.ndarray]:
        """Return the decoded clouds of rows: normal latents in the region, without those that decode to isolated points."""
        found = []
        for row, z in zip(self._x(X), self.quantiles_.inside(X, self._latents), strict=True):
            y = self._vae.decode(row.expand(len(z), -1), z).double().numpy()
            reach = cKDTree(y).query(y, k=min(_NEIGHBOURS, len(y)))[0][:, -1]
            found.append(self._y.back(y[reach <= np.quantile(reach, 1 - _ISOLATED)]))
        return found


class _ConditionalVAE(nn.Module):
    """Encodes a response given x as a latent near the standard normal, and back."""

    def __init__(
        self,
        features: int,
        outputs: int,
        latent: int,
        hidden: list[int],
        generator: torch.Generator,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.encoder = _parts.mlp([features + outputs, *hidden, 2 * latent], generator, dtype=dtype)
        self.decoder = _parts.mlp([features + latent, *hidden, outputs], generator, dtype=dtype)

    def encode(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return a latent of each row, and its divergence from the standard normal."""
        mean, log_variance = self.encoder(torch.cat([x, y], 1)).chunk(2, 1)
        z = mean + (log_variance / 2).exp() * randn(mean.shape, generator=generator, like=mean)
        return z, (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2

    def decode(self, x: Tensor, z: Tensor) -> Tensor:
        """Return responses."""
        return self.decoder(torch.cat([x, z], 1))

    def loss(self, x: Tensor, y: Tensor, kl_weight: float, generator: torch.Generator) -> Tensor:
        """Return the mean reconstruction error plus weighted divergence."""
        z, divergence = self.encode(x, y, generator)
        return (self.decode(x, z) - y).square().mean() + kl_weight * divergence.mean()
