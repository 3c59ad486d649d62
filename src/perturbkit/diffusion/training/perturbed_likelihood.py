"""Perturbed maximum likelihood: fit a generator to noisy copies of data that lie on a curve or surface.

Use it where likelihood would run away: on data of lower dimension than their space, of which the law itself is wanted. Chae, Kim,
Kim and Lin (2023), A Likelihood Approach to Nonparametric Estimation of a Singular Distribution Using Deep Generative Models,
arXiv:2105.04046.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from perturbkit.core import checks, fit
from perturbkit.core.random import Seed, as_generator, randn, randperm, seeded_init, seeds, uniform

__all__ = ["PerturbedLikelihoodGenerator", "perturbation_scale"]

_DRAWS, _DRAWS_TO_SCORE, _CHUNK = 16, 256, 512
#: Multiples of the rate's perturbation that "auto" tries.
_TRIED = (0.125, 0.25, 0.5, 1.0, 2.0)


class PerturbedLikelihoodGenerator(DensityMixin, BaseEstimator):
    """A generator ``f`` of latents, with noise, fitted by likelihood to perturbed data; its law is that without the noise.

    Parameters
    ----------
    generator_net : nn.Module, optional
        ``f``: latents (n, latent_dim) to rows of data (n, features), in units where the data have mean zero and deviation one in
        their widest direction. A
        copy is trained. Default: two hidden layers of 64 rectified units.
    latent_dim : int
        Size of the latents. Up to 2 the likelihood is a sum over a grid; beyond, 16 importance samples of an encoder that is
        trained along bound it from below.
    latent : {"uniform", "normal"}
        Law of the latents: on the unit cube, or standard normal.
    perturbation : float, "rate" or "auto"
        Standard deviation of the noise that is added to the data, in their units; 0 is plain maximum likelihood. "rate" is
        :func:`perturbation_scale` times ``scale_``. "auto" fits five multiples of it and keeps the one under
        which held-out data, perturbed by the smallest, are most likely: likelihoods at different perturbations do not compare.
    n_latent : int
        Points of the grid, at least 1.
    smoothness, intrinsic_dim : float
        For the rate; the dimension is that of the latents by default.
    noise_floor : float
        Least standard deviation of the model's noise in units of ``scale_``, above zero. Only without a perturbation does it bind.
    max_iter : int
        Training steps, each on a batch with fresh perturbations; the model's noise is held at a fifth of ``scale_`` for the
        first third of them.
    lr : float
        Learning rate of Adam, falling along half a cosine; that of the noise's logarithm is ten times as large.
    batch_size : int
        Rows a step.
    generator : torch.Generator, int or None
        Source of the first weights, batches and perturbations.

    Attributes
    ----------
    perturbation_ : float
        The perturbation used.
    noise_ : float
        Fitted standard deviation of the model's noise, at least the perturbation.
    losses_ : ndarray, shape (max_iter,)
        Negative log-likelihood of each batch.
    location_, scale_ : ndarray of shape (features,), float
        What the data were shifted and divided by: their mean, and their standard deviation in the widest direction.

    Notes
    -----
    With ``x' = x + tau N(0, I)`` it maximises ``sum_i log mean_j N(x'_i; f(z_j), s^2 I)`` over f and ``s >= tau``. On data that lie
    on a set of dimension ``t`` below their space's, the likelihood at ``tau = 0`` grows without bound as s falls, wherever f passes
    through the data, and says nothing about the law along the set.

    Cost: a step is O(batch_size n_latent features) and as many calls of f as there are latents.

    References
    ----------
    Chae et al. (2023), arXiv:2105.04046.

    Examples
    --------
    >>> angles = 2 * np.pi * np.random.default_rng(0).random(200)
    >>> circle = np.column_stack([np.cos(angles), np.sin(angles)])
    >>> model = PerturbedLikelihoodGenerator(n_latent=64, max_iter=50, lr=5e-3, generator=0).fit(circle)
    >>> model.sample(3, generator=1).shape, bool(model.noise_ >= model.perturbation_ > 0.05)
    ((3, 2), True)
    """

    def __init__(
        self,
        generator_net: nn.Module | None = None,
        latent_dim: int = 1,
        *,
        latent: Literal["uniform", "normal"] = "uniform",
        perturbation: float | Literal["rate", "auto"] = "rate",
        n_latent: int = 256,
        smoothness: float = 2.0,
        intrinsic_dim: float | None = None,
        noise_floor: float = 1e-3,
        max_iter: int = 2000,
        lr: float = 1e-3,
        batch_size: int = 256,
        generator: Seed = None,
    ) -> None:
        self.generator_net = generator_net
        self.latent_dim = latent_dim
        self.latent = latent
        self.perturbation = perturbation
        self.n_latent = n_latent
        self.smoothness = smoothness
        self.intrinsic_dim = intrinsic_dim
        self.noise_floor = noise_floor
        self.max_iter = max_iter
        self.lr = lr
        self.batch_size = batch_size
        self.generator = generator

    def fit(self, X: Any, y: Any = None) -> Self:
        """Fit the generator to rows.

        Parameters
        ----------
        X : array, shape (n, features)
            Data, at least two rows.
        y : None
            Not used.

        Returns
        -------
        PerturbedLikelihoodGenerator

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an option is not allowed.
        ModelError
            If the generator's answers have not the features of the data.
        """
        self._check()
        rows = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2)
        self.location_ = rows.mean(0)
        # That of the widest direction: a curve is no narrower for lying in a larger space.
        self.scale_ = float(np.linalg.norm(rows - self.location_, 2)) / math.sqrt(len(rows)) or 1.0
        x = torch.from_numpy((rows - self.location_) / rows.dtype.type(self.scale_))
        g = as_generator(self.generator)
        rate = perturbation_scale(
            len(x), self.smoothness, self.latent_dim if self.intrinsic_dim is None else self.intrinsic_dim
        )
        if self.perturbation == "auto":
            tau = self._best(x, [rate * factor for factor in _TRIED], g)
        else:
            tau = rate if self.perturbation == "rate" else float(self.perturbation) / self.scale_
        self._model, self.losses_ = self._fitted(x, tau, g)
        self.perturbation_ = tau * self.scale_
        self.noise_ = float(self._model.noise()) * self.scale_
        self._score_seed = seeds(g, 1)[0]
        return self

    def sample(self, n_samples: int = 1, generator: Seed = None) -> np.ndarray:
        """Draw rows from the law of ``f(Z)``, without the noise, shape (n_samples, features).

        Parameters
        ----------
        n_samples : int
            Rows, at least 1.
        generator : torch.Generator, int or None
            Source of the latents.
        """
        check_is_fitted(self, "noise_")
        n = checks.integer("n_samples", n_samples, low=1)
        with torch.no_grad():
            u = randn(
                (n, self.latent_dim), generator=as_generator(generator), dtype=self._model.log_excess.dtype
            )
            return self._model(u).numpy() * self.location_.dtype.type(self.scale_) + self.location_  # type: ignore[no-any-return]

    def score_samples(self, X: Any) -> np.ndarray:
        """Return the log-density of rows under the model with its noise, shape (n,).

        Parameters
        ----------
        X : array, shape (n, features)
            Rows, in the units of the data.
        """
        check_is_fitted(self, "noise_")
        rows = validate_data(self, X, dtype=[self.location_.dtype], reset=False)
        x = torch.from_numpy((rows - self.location_) / rows.dtype.type(self.scale_))
        g = as_generator(self._score_seed)
        with torch.no_grad():
            parts = [self._model.log_likelihood(part, g, _DRAWS_TO_SCORE) for part in x.split(_CHUNK)]
        return (torch.cat(parts) - x.shape[1] * math.log(self.scale_)).numpy()  # type: ignore[no-any-return]

    def score(self, X: Any, y: Any = None) -> float:
        """Return the mean log-density of rows; see :meth:`score_samples`."""
        return float(self.score_samples(X).mean())

    def _check(self) -> None:
        if self.generator_net is not None and not isinstance(self.generator_net, nn.Module):
            raise checks.ArgumentTypeError(
                f"generator_net is a {type(self.generator_net).__name__}; allowed: an nn.Module or None. Pass a network."
            )
        checks.integer("latent_dim", self.latent_dim, low=1)
        checks.one_of("latent", self.latent, ("uniform", "normal"))
        if isinstance(self.perturbation, str):
            checks.one_of("perturbation", self.perturbation, ("rate", "auto"))
        else:
            checks.nonnegative("perturbation", self.perturbation)
        checks.integer("n_latent", self.n_latent, low=1)
        checks.positive("noise_floor", self.noise_floor)
        for name in ("max_iter", "batch_size"):
            checks.integer(name, getattr(self, name), low=1)
        checks.positive("lr", self.lr)

    def _best(self, x: Tensor, taus: list[float], g: torch.Generator) -> float:
        """Return the perturbation whose fit makes slightly perturbed held-out rows most likely."""
        order = randperm(len(x), generator=g)
        kept = max(1, round(0.8 * len(x)))
        held_out = x[order[kept:]] if kept < len(x) else x
        held_out = held_out + min(taus) * randn(held_out.shape, generator=g, like=held_out)
        scores = []
        for tau in taus:
            model, _ = self._fitted(x[order[:kept]], tau, g)
            with torch.no_grad():
                scores.append(float(model.log_likelihood(held_out, g, _DRAWS_TO_SCORE).mean()))
        return taus[int(np.argmax(scores))]

    def _fitted(self, x: Tensor, tau: float, g: torch.Generator) -> tuple[_Model, np.ndarray]:
        """Return a model fitted to standardised rows."""
        with seeded_init(seeds(g, 1)[0]):
            given = self.generator_net
            net = (
                _spread(_network(self.latent_dim, x.shape[1]), self.latent_dim)
                if given is None
                else copy.deepcopy(given)
            )
            model = _Model(net, self.latent_dim, self.latent, self.n_latent, x, max(tau, self.noise_floor))

        def loss(model: _Model, rows: Tensor, *, generator: torch.Generator) -> Tensor:
            noisy = rows + tau * randn(rows.shape, generator=generator, like=rows)
            return -model.log_likelihood(noisy, generator, _DRAWS).mean()

        def optimizer(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
            # The noise has orders of magnitude to go while the weights stay of order one.
            slow = [w for w in weights if w is not model.log_excess]
            groups: list[dict[str, Any]] = [{"params": [model.log_excess], "lr": 10 * self.lr}]
            return torch.optim.Adam(groups + ([{"params": slow}] if slow else []), lr=self.lr)

        # Free from the start, the noise would explain the data before the generator has spread over them.
        held = self.max_iter // 3
        losses = []
        for steps, free in ((held, False), (self.max_iter - held, True)):
            model.log_excess.requires_grad_(free)
            if steps and any(w.requires_grad for w in model.parameters()):
                history = fit(
                    model, loss, x, steps=steps, batch_size=self.batch_size, lr=self.lr,
                    optimizer=optimizer if free else None, generator=g, progress=False,
                )  # fmt: skip
                losses.append(history.losses)
        return model.eval().requires_grad_(False), torch.cat(losses).numpy()


def perturbation_scale(n: int, smoothness: float, intrinsic_dim: float) -> float:
    """Return the perturbation that balances bias and variance, up to a constant in the data's units.

    Parameters
    ----------
    n : int
        Rows of data, at least 1.
    smoothness : float
        Of the true generator (of its least smooth part, for its dimension), positive.
    intrinsic_dim : float
        Dimension of the data, or of what each part of the true generator depends on, positive.

    Returns
    -------
    float

    Notes
    -----
    ``tau = n^(-b / (2 (b + t)))``; the error in Wasserstein distance is of that order up to logarithms, whatever the dimension
    of the space.

    References
    ----------
    Chae et al. (2023), arXiv:2105.04046.

    Examples
    --------
    >>> round(perturbation_scale(1000, smoothness=2.0, intrinsic_dim=1.0), 12)
    0.1
    """
    checks.integer("n", n, low=1)
    b = checks.positive("smoothness", smoothness)
    t = checks.positive("intrinsic_dim", intrinsic_dim)
    return float(n ** (-b / (2 * (b + t))))


class _Model(nn.Module):
    """A generator of standard normal draws, carried to the latents' law, with isotropic noise around it."""

    grid: Tensor

    def __init__(self, net: nn.Module, k: int, law: str, n_latent: int, x: Tensor, floor: float) -> None:
        super().__init__()
        self.net, self.law, self.floor = net, law, floor
        # s^2 = floor^2 + exp(2 log_excess)
        self.log_excess = nn.Parameter(torch.tensor(math.log(0.2), dtype=x.dtype))
        side = max(1, round(n_latent ** (1 / k)))
        middles = (torch.arange(side, dtype=torch.float64) + 0.5) / side
        line = torch.special.ndtri(middles)
        grid = torch.tensor(list(itertools.product(line.tolist(), repeat=k))) if k <= 2 else torch.empty(0, k)
        self.register_buffer("grid", grid.to(x.dtype))
        self.encoder = _network(x.shape[1], 2 * k) if k > 2 else None
        self.to(x.dtype)
        try:
            with torch.no_grad():
                found = self(torch.zeros(1, k, dtype=x.dtype))
        except RuntimeError as error:
            raise checks.ModelError(
                f"the generator does not take latents of shape (1, {k}) ({error}); allowed: one that does. Change its first layer, or "
                "latent_dim."
            ) from error
        if found.shape != (1, x.shape[1]):
            raise checks.ModelError(
                f"the generator answered shape {tuple(found.shape)} to one latent; allowed: (1, {x.shape[1]}), a row of the "
                "data. Change its last layer."
            )

    def forward(self, u: Tensor) -> Tensor:
        out: Tensor = self.net(torch.special.ndtr(u) if self.law == "uniform" else u)
        return out

    def noise(self) -> Tensor:
        return (self.floor**2 + (2 * self.log_excess).exp()).sqrt()

    def log_likelihood(self, x: Tensor, g: torch.Generator, n_draws: int) -> Tensor:
        """Return log p(x): over the grid, or bounded by importance samples."""
        if self.encoder is None:
            centres, weights = self(self.grid)[None], -math.log(len(self.grid))
        else:
            mean, log_std = self.encoder(x).chunk(2, 1)
            log_std = log_std.clamp(-8, 2)
            e = randn((len(x), n_draws, mean.shape[1]), generator=g, like=x)
            u = mean[:, None] + log_std.exp()[:, None] * e
            # log N(u; 0, I) - log q(u | x), over the number of draws.
            weights = (0.5 * (e**2 - u**2) + log_std[:, None]).sum(2) - math.log(n_draws)
            centres = self(u.flatten(0, 1)).view(len(x), n_draws, -1)
        s = self.noise()
        squares = (x[:, None] - centres).square().sum(2)
        normal = -0.5 * squares / s**2 - x.shape[1] * (s.log() + 0.5 * math.log(2 * math.pi))
        return torch.logsumexp(normal + weights, 1)


def _network(n_in: int, n_out: int, hidden: int = 64) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(n_in, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, n_out)
    )


def _spread(net: nn.Sequential, k: int) -> nn.Sequential:
    """Scale the last layer so that the first curve or surface is as wide as the data: from a point it would spread slowly."""
    last, z = net[-1], uniform((1000, k), generator=as_generator(0))
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.weight /= net(z).std()
        last.bias.copy_(last.bias - net(z).mean(0))
    return net
