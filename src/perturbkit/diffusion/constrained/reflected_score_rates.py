"""The reflected diffusion model whose score is a truncated cosine series, and the rate at which it learns a density.

Use it for densities on the unit cube of one to three dimensions: the simplest score estimator that attains the best rate for
a smooth density, with nothing to train and no bias at the walls. Holk, Strauch and Trottner (2024), Statistical guarantees
for denoising reflected diffusion models, arXiv:2411.01563.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from perturbkit.core import TimeMLP, checks, fit
from perturbkit.core.random import Seed, as_generator, numpy_generator, randn, seeded_init, seeds, uniform
from perturbkit.diffusion.constrained._parts import folded, log_prob_and_score

__all__ = ["SpectralReflectedModel", "reflected_minimax_rate"]

_FLOOR = 0.05
_MAX_DIM = 3


class SpectralReflectedModel(BaseEstimator):
    r"""Denoising reflected diffusion on [0, 1]^d with the score of a truncated eigenfunction series.

    Parameters
    ----------
    smoothness : float
        Sobolev smoothness ``s`` that the density is thought to have, above 0; sets modes and early stopping.
    n_modes : int or "auto"
        Largest frequency K of a coordinate; ``n^(1/(2s+d))``, rounded up, by default.
    horizon : float
        Last time of the forward process, above 0. Of the data ``exp(-pi^2 horizon)`` is left.
    early_stop : float or "auto"
        First time, at which sampling stops, in (0, horizon); ``n^(-max(s, 2)/(2s+d)) / pi^2`` by default, so early that
        what is smoothed away is no more than the error of the series.
    method : {"spectral", "network"}
        Take the score from the series, or train a small network on denoising targets.
    training_steps : int
        Steps of the network, at least 1.
    random_state : torch.Generator, int or None
        Source of the network's weights and batches.

    Attributes
    ----------
    coefficients_ : ndarray, shape (n_frequencies,)
        Means of the eigenfunctions over the data.
    frequencies_ : ndarray of int, shape (n_frequencies, d)
        Their frequencies, each at most ``n_modes_``.
    n_modes_ : int
        Largest frequency.
    early_stop_ : float
        First time.
    n_features_in_ : int
        Columns of ``X``, at most 3.

    Notes
    -----
    Forward :math:`dX = \sqrt 2 dW + dL`, with generator the Laplacian, eigenfunctions
    :math:`e_k(x) = \prod_i \sqrt{2}^{1[k_i > 0]} \cos(\pi k_i x_i)` and
    :math:`p_t = \sum_k e^{-\pi^2 |k|^2 t} c_k e_k`, :math:`c_k = E e_k(X_0)`. With means over the data for ``c_k`` and
    :math:`|k|_\infty \le K`, the score is :math:`\nabla p_t / \max(p_t, 0.05)`.

    Cost: O(n K^d) to fit, O(K^d) a score.

    References
    ----------
    Holk, Strauch and Trottner (2024), arXiv:2411.01563.

    Examples
    --------
    >>> x = np.random.default_rng(0).beta(1.0, 2.0, (2000, 1))  # density 2 (1 - x)
    >>> model = SpectralReflectedModel().fit(x)
    >>> bool(abs(model.density([[0.25]])[0] - 1.5) < 0.15)
    True
    >>> drawn = model.sample(500, n_steps=100, generator=0)
    >>> bool(((drawn >= 0) & (drawn <= 1)).all()), bool(abs(drawn.mean() - 1 / 3) < 0.05)
    (True, True)
    """

    def __init__(
        self,
        smoothness: float = 2.0,
        n_modes: int | Literal["auto"] = "auto",
        horizon: float = 1.0,
        early_stop: float | Literal["auto"] = "auto",
        *,
        method: Literal["spectral", "network"] = "spectral",
        training_steps: int = 1000,
        random_state: Seed = None,
    ) -> None:
        self.smoothness = smoothness
        self.n_modes = n_modes
        self.horizon = horizon
        self.early_stop = early_stop
        self.method = method
        self.training_steps = training_steps
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> Self:
        """Take the means of the eigenfunctions over the data.

        Parameters
        ----------
        X : array, shape (n, d)
            Data in [0, 1]^d, d at most 3.
        y : ignored

        Returns
        -------
        SpectralReflectedModel

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an option is not allowed or the data leave the cube.
        """
        self._check()
        x = validate_data(self, X, dtype=[np.float64, np.float32])
        self._check_cube(x)
        n, d = x.shape
        rate = 1 / (2 * self.smoothness + d)
        self.n_modes_ = math.ceil(n**rate) if isinstance(self.n_modes, str) else self.n_modes
        # Smoothing moves a density by about t for s >= 2 and t^(s/2) below, which must not exceed n^(-s rate).
        automatic = min(n ** (-max(self.smoothness, 2.0) * rate) / math.pi**2, self.horizon / 2)
        self.early_stop_ = automatic if isinstance(self.early_stop, str) else float(self.early_stop)
        self.dtype_ = x.dtype
        self.frequencies_ = np.indices((self.n_modes_ + 1,) * d).reshape(d, -1).T
        total = sum(_eigenfunctions(part, self.frequencies_).sum(0) for part in _blocks(x, self.frequencies_))
        self.coefficients_ = np.asarray(total) / n
        if self.method == "network":
            self._train(torch.as_tensor(x).float())
        return self

    def density(self, X: Any, t: float | None = None) -> np.ndarray:
        """Return the estimated density.

        Parameters
        ----------
        X : array, shape (n, d)
            Points of the cube.
        t : float, optional
            Time, from 0 to the horizon; by default the first one, at which sampling stops.

        Returns
        -------
        ndarray, shape (n,)
            The series, which may dip below zero.
        """
        x = self._rows(X)
        c = self._faded(self.early_stop_ if t is None else t)
        found = [_eigenfunctions(part, self.frequencies_) @ c for part in _blocks(x, c)]
        return np.concatenate(found).astype(x.dtype)

    def score(self, X: Any, t: float | None = None) -> np.ndarray:
        """Return the estimated score at time ``t``, shape (n, d).

        Parameters
        ----------
        X : array, shape (n, d)
            Points of the cube.
        t : float, optional
            Time, from 0 to the horizon; the first one by default.

        Returns
        -------
        ndarray, shape (n, d)
        """
        x = self._rows(X)
        return self._score(x, self.early_stop_ if t is None else t)

    def sample(self, n: int = 1, n_steps: int = 200, generator: Seed = None) -> np.ndarray:
        """Draw by the reversed process, from the uniform law at the horizon to the first time.

        Parameters
        ----------
        n : int
            Number of draws, at least 1.
        n_steps : int
            Steps, in geometric progression of times, at least 1.
        generator : torch.Generator, int or None
            Source of start and noise.

        Returns
        -------
        ndarray, shape (n, d)
            ``x' = fold(x + 2 h score + sqrt(2 h) xi)`` a step.
        """
        check_is_fitted(self, "coefficients_")
        checks.integer("n", n, low=1)
        checks.integer("n_steps", n_steps, low=1)
        rng = numpy_generator(generator)
        x = rng.random((n, self.n_features_in_))
        times = np.geomspace(self.horizon, self.early_stop_, n_steps + 1)
        for t, h in zip(times, -np.diff(times), strict=False):
            x = x + 2 * h * self._score(x, float(t)) + math.sqrt(2 * h) * rng.standard_normal(x.shape)
            x = 1 - np.abs(1 - x % 2)
        return x.astype(self.dtype_)

    def _score(self, x: np.ndarray, t: float) -> np.ndarray:
        if self.method == "network":
            rows = torch.as_tensor(x).float()
            clock = torch.full((len(rows),), max(t, self.early_stop_))
            with torch.no_grad():
                return _network_score(self._net, rows, clock).numpy().astype(x.dtype)
        c = self._faded(t)
        found = []
        for part in _blocks(x, c):
            values, slopes = _axes(part, self.n_modes_)
            density = _product(values, self.frequencies_) @ c
            # The derivative acts on one coordinate's factor and leaves the others.
            columns = []
            for i in range(x.shape[1]):
                factors = values.copy()
                factors[:, i] = slopes[:, i]
                columns.append(_product(factors, self.frequencies_) @ c)
            found.append(np.stack(columns, 1) / np.maximum(density, _FLOOR)[:, None])
        return np.concatenate(found).astype(x.dtype)

    def _faded(self, t: float) -> np.ndarray:
        checks.between("t", t, 0, self.horizon)
        decay = np.exp(-(math.pi**2) * t * (self.frequencies_**2).sum(1))
        return np.asarray(decay * self.coefficients_)

    def _train(self, data: Tensor) -> None:
        """Fit a network to the score of the folded normal law around the data."""
        g = as_generator(self.random_state)
        with seeded_init(seeds(g, 1)[0]):
            self._net: nn.Module = TimeMLP(data.shape[1], hidden=64)
        ends = math.log(self.early_stop_), math.log(self.horizon)

        def loss(net: nn.Module, x0: Tensor, *, generator: torch.Generator) -> Tensor:
            t = uniform((len(x0),), *ends, generator=generator).exp()
            s = (2 * t).sqrt()[:, None]
            x = folded(x0 + s * randn(x0.shape, generator=generator, like=x0))
            error = _network_score(net, x, t) - log_prob_and_score(x, x0, s)[1]
            return (s * error).square().mean()

        fit(
            self._net,
            loss,
            data,
            steps=self.training_steps,
            lr=2e-3,
            generator=g,
            average=0.99,
            progress=False,
        )
        self._net.eval().requires_grad_(False)

    def _rows(self, X: Any) -> np.ndarray:
        check_is_fitted(self, "coefficients_")
        x = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        self._check_cube(x)
        return x

    def _check_cube(self, x: np.ndarray) -> None:
        checks.integer("the number of columns", x.shape[1], low=1, high=_MAX_DIM)
        if x.min() < 0 or x.max() > 1:
            raise checks.ArgumentError(
                f"X has values from {x.min():.4g} to {x.max():.4g}; allowed: [0, 1]. Scale the data to the unit cube."
            )

    def _check(self) -> None:
        checks.positive("smoothness", self.smoothness)
        checks.positive("horizon", self.horizon)
        checks.one_of("method", self.method, ("spectral", "network"))
        checks.integer("training_steps", self.training_steps, low=1)
        if self.n_modes != "auto":
            checks.integer("n_modes", self.n_modes, low=1)  # type: ignore[arg-type]
        if self.early_stop != "auto":
            checks.between("early_stop", self.early_stop, 0, self.horizon, inclusive="neither")  # type: ignore[arg-type]


def reflected_minimax_rate(n: int, smoothness: float, dim: int) -> float:
    """Return the minimax rate in total variation of a density of Sobolev smoothness s on [0, 1]^dim.

    Parameters
    ----------
    n : int
        Number of observations, at least 1.
    smoothness : float
        ``s``, above 0.
    dim : int
        Dimension, at least 1.

    Returns
    -------
    float
        ``n^(-s / (2 s + dim))``, without constant and logarithms.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    References
    ----------
    Holk, Strauch and Trottner (2024), arXiv:2411.01563, theorem 1.

    Examples
    --------
    >>> round(reflected_minimax_rate(1000, 1.0, 1), 6)
    0.1
    """
    checks.integer("n", n, low=1)
    checks.positive("smoothness", smoothness)
    checks.integer("dim", dim, low=1)
    return float(n ** (-smoothness / (2 * smoothness + dim)))


def _axes(x: np.ndarray, n_modes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the one-dimensional eigenfunctions and their derivatives, shape (n, d, n_modes + 1)."""
    k = math.pi * np.arange(n_modes + 1, dtype=x.dtype)
    scale = np.where(k > 0, math.sqrt(2), 1).astype(x.dtype)
    angle = k * x[:, :, None]
    return scale * np.cos(angle), -scale * k * np.sin(angle)


def _product(factors: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Return the products over coordinates, shape (n, n_frequencies)."""
    out = factors[:, 0, frequencies[:, 0]]
    for i in range(1, frequencies.shape[1]):
        out = out * factors[:, i, frequencies[:, i]]
    return out


def _eigenfunctions(x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    return _product(_axes(x, int(frequencies.max()))[0], frequencies)


def _blocks(x: np.ndarray, frequencies: np.ndarray) -> list[np.ndarray]:
    """Split rows so that a block has at most about four million values of eigenfunctions."""
    size = max(1, 4_000_000 // len(frequencies))
    return [x[i : i + size] for i in range(0, len(x), size)]


def _network_score(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """The network answers the score times the noise; its clock is the logarithm of the time."""
    return net(2 * x - 1, t.log()) / (2 * t).sqrt()[:, None]
