"""Idempotent generative networks: one network that maps noise to data and leaves data alone, so that applying it again refines.

Use it for generation in one call, and to project corrupted inputs back onto the data. Shocher, Dravid, Gandelsman, Mosseri,
Rubinstein and Efros (2023), Idempotent Generative Network, arXiv:2311.01462.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from perturbkit.core import Cost, Oracle, ProgressLike, SampleResult, checks, fit
from perturbkit.core.random import Seed, as_generator, randn

__all__ = ["IdempotentGenerator", "idempotent_losses"]

Distance = Literal["l1", "mse"]


def idempotent_losses(
    net: nn.Module, x: Tensor, z: Tensor, *, tight_clamp: float | None = 1.5, distance: Distance = "l1"
) -> dict[str, Tensor]:
    """Return the three losses of an idempotent network on a batch.

    Parameters
    ----------
    net : nn.Module
        ``f``, with answers in the shape of its inputs.
    x : Tensor, shape (n, ...)
        Data.
    z : Tensor, shape (n, ...)
        Noise, in the shape of the data.
    tight_clamp : float or None
        ``a``, positive: the tightness counts at most this many times the reconstruction of its row. ``None``: unbounded.
    distance : {"l1", "mse"}
        Mean absolute or mean squared difference of two rows.

    Returns
    -------
    dict of str to Tensor
        "rec", "idem" and "tight", each one number with its graph.

    Raises
    ------
    ArgumentError
        If shapes differ or an option is not allowed.

    Notes
    -----
    With ``f'`` the network with its present weights taken as constants,

        rec = D(f(x), x),    idem = D(f'(f(z)), f(z)),    tight = -D(f(f'(z)), f'(z)).

    The last two are one quantity with opposite signs: ``idem`` moves only the inner application (the output towards what the
    network leaves alone), ``tight`` only the outer one (so that what it leaves alone does not grow). ``tight`` is bounded row by
    row as ``tanh(tight / (a rec)) a rec``, with ``rec`` a constant: it matters only where reconstruction is good.

    Cost: four calls of the network.

    References
    ----------
    Shocher et al. (2023), arXiv:2311.01462, equations 6 to 10.

    Examples
    --------
    >>> found = idempotent_losses(nn.Identity(), torch.ones(2, 3), torch.zeros(2, 3))
    >>> sorted(found), float(sum(found.values()))
    (['idem', 'rec', 'tight'], 0.0)
    """
    checks.tensor("x", x)
    checks.same_shape("z", z, "x", x)
    checks.one_of("distance", distance, ("l1", "mse"))
    if tight_clamp is not None:
        checks.positive("tight_clamp", tight_clamp)

    def apart(a: Tensor, b: Tensor) -> Tensor:
        difference = (a - b).flatten(1)
        return (difference.abs() if distance == "l1" else difference.square()).mean(1)

    frozen = {k: v.detach() for k, v in net.named_parameters()}
    inner = checks.answer("net", net(z), z)
    rec = apart(net(x), x)
    idem = apart(functional_call(net, frozen, (inner,)), inner)
    kept = inner.detach()
    tight = -apart(net(kept), kept)
    if tight_clamp is not None:
        limit = (tight_clamp * rec.detach()).clamp_min(1e-12)
        tight = torch.tanh(tight / limit) * limit
    return {"rec": rec.mean(), "idem": idem.mean(), "tight": tight.mean()}


class IdempotentGenerator:
    """A network trained to be idempotent, with data among what it leaves alone.

    Parameters
    ----------
    net : nn.Module
        Takes and answers batches in the shape of the data; trained in place.
    rec_weight, idem_weight, tight_weight : float
        Weights of the three losses, at least 0.
    tight_clamp, distance
        As in :func:`idempotent_losses`.
    noise : {"gaussian", "fourier"}
        Law of the noise: standard normal, or with the mean and deviation of the data at every frequency.
    lr : float
        Learning rate of Adam, positive.

    Attributes
    ----------
    losses_ : Tensor of float64
        The whole loss of every training step.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    The loss is ``rec_weight rec + idem_weight idem + tight_weight tight``; see :func:`idempotent_losses`.

    Cost: four calls of the network a training step, one a sample and application.

    References
    ----------
    Shocher et al. (2023), arXiv:2311.01462.

    Examples
    --------
    >>> generator = IdempotentGenerator(nn.Linear(2, 2), noise="gaussian")
    >>> line = torch.linspace(-1, 1, 64)[:, None] * torch.tensor([[1.0, 1.0]])
    >>> generator.fit(line, 20, generator=0, progress=False).sample(5, generator=0).x.shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        rec_weight: float = 20.0,
        idem_weight: float = 20.0,
        tight_weight: float = 2.5,
        tight_clamp: float | None = 1.5,
        distance: Distance = "l1",
        noise: Literal["gaussian", "fourier"] = "fourier",
        lr: float = 1e-4,
    ) -> None:
        if not isinstance(net, nn.Module):
            raise checks.ArgumentTypeError(
                f"net is a {type(net).__name__}; allowed: an nn.Module that answers in the shape of its inputs. Wrap it in one."
            )
        self.net = net
        self.weights = {
            "rec": checks.nonnegative("rec_weight", rec_weight),
            "idem": checks.nonnegative("idem_weight", idem_weight),
            "tight": checks.nonnegative("tight_weight", tight_weight),
        }
        self.tight_clamp = tight_clamp if tight_clamp is None else checks.positive("tight_clamp", tight_clamp)
        self.distance: Distance = checks.one_of("distance", distance, ("l1", "mse"))
        self.noise = checks.one_of("noise", noise, ("gaussian", "fourier"))
        self.lr = checks.positive("lr", lr)
        self.losses_: Tensor | None = None
        self._spectrum: tuple[Tensor, Tensor] | None = None
        self._like: Tensor | None = None

    def loss(self, net: nn.Module, x: Tensor, *, generator: torch.Generator) -> Tensor:
        """Return the weighted loss of a batch for any training loop; :meth:`watch` comes before it."""
        self._ready()
        z = self._draw(len(x), generator)
        parts = idempotent_losses(net, x, z, tight_clamp=self.tight_clamp, distance=self.distance)
        return torch.stack([self.weights[name] * parts[name] for name in self.weights]).sum()

    def watch(self, x: Tensor) -> IdempotentGenerator:
        """Take shape and spectrum of the noise from data (n, ...), at least two rows."""
        checks.tensor("x", x)
        if len(x) < 2 or x.ndim < 2:
            raise checks.ArgumentError(
                f"x has shape {tuple(x.shape)}; allowed: (n, ...) with at least 2 rows. Pass the training data."
            )
        self._like = x[:1]
        spectrum = torch.fft.rfftn(x, dim=tuple(range(1, x.ndim)), norm="ortho")
        mean = spectrum.mean(0)
        self._spectrum = mean, (spectrum - mean).abs().square().mean(0).sqrt()
        return self

    def fit(
        self,
        x: Tensor,
        n_steps: int,
        *,
        batch_size: int = 128,
        generator: Seed = None,
        progress: ProgressLike = None,
        **options: Any,
    ) -> IdempotentGenerator:
        """Train the network in place.

        Parameters
        ----------
        x : Tensor, shape (n, ...)
            Data, at least two rows.
        n_steps : int
            Training steps, at least 1.
        batch_size : int
            Rows a step.
        generator : torch.Generator, int or None
            Source of batches and noise.
        progress : Progress, bool or None
            See :mod:`perturbkit.core.progress`.
        **options
            What else :func:`perturbkit.core.fit` takes: ``average``, ``clip``, ``checkpoint``.

        Returns
        -------
        IdempotentGenerator
            Itself.
        """
        self.watch(x)
        adam = partial(torch.optim.Adam, lr=self.lr, betas=(0.5, 0.999))
        history = fit(
            self.net, self.loss, x, steps=n_steps, batch_size=batch_size, optimizer=adam, generator=generator,
            progress=progress, **options,
        )  # fmt: skip
        self.losses_ = history.losses
        return self

    def sample(self, n: int, n_applications: int = 1, *, generator: Seed = None) -> SampleResult:
        """Draw ``n`` samples: noise through ``n_applications`` of the network."""
        checks.integer("n", n, low=1)
        self._ready()
        oracle = Oracle(self.net)
        x = _applied(oracle, self._draw(n, as_generator(generator)), n_applications)
        return SampleResult(x, cost=Cost(nfev=oracle.nfev))

    def project(self, x: Tensor, n_applications: int = 1) -> Tensor:
        """Move inputs (n, ...) towards the data: ``n_applications`` of the network, without gradients."""
        checks.tensor("x", x)
        return _applied(Oracle(self.net), x, n_applications)

    def _ready(self) -> None:
        if self._like is None:
            raise checks.ArgumentError(
                "the generator has seen no data; allowed: after fit or watch, which take the noise's shape from it. Call fit(x, n_steps)."
            )

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        assert self._like is not None
        assert self._spectrum is not None
        white = randn((n, *self._like.shape[1:]), generator=generator, like=self._like)
        if self.noise == "gaussian":
            return white
        # White noise through a filter keeps the symmetry that the spectrum of real data has.
        mean, deviation = self._spectrum
        axes = tuple(range(1, white.ndim))
        coloured = mean + deviation * torch.fft.rfftn(white, dim=axes, norm="ortho")
        return torch.fft.irfftn(coloured, s=white.shape[1:], dim=axes, norm="ortho")


def _applied(oracle: Oracle, x: Tensor, n_applications: int) -> Tensor:
    checks.integer("n_applications", n_applications, low=1)
    for _ in range(n_applications):
        x = checks.answer("net", oracle(x), x)
    return x
