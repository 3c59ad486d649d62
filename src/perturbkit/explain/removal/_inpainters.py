"""What paints a removed part of an image from the rest: a Gaussian of the images, and a small convolutional network."""

from __future__ import annotations

import itertools
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from perturbkit.core import checks
from perturbkit.core.random import Seed, as_generator, randint, randn, uniform

# Numbers that the covariances of one block of masks may hold.
_BLOCK = 2**24


class GaussianInpainter:
    """Paint removed pixels with their mean, or a draw, given the kept ones, under a Gaussian of the images.

    Parameters
    ----------
    n_components : int or None
        With a number, the covariance keeps that many leading directions, and the mean of the other variances in all others;
        ``None`` keeps it as it is.
    shrinkage : float or "ledoit-wolf"
        Weight of a multiple of the identity in the covariance, in [0, 1], or the one of Ledoit and Wolf.

    Attributes
    ----------
    mean_ : Tensor, shape (d,)
    covariance_ : Tensor, shape (d, d)
        Of flattened images, in double precision.

    Notes
    -----
    ``mu_u + S_uk S_kk^-1 (x_k - mu_k)`` for removed u and kept k; a draw adds ``z_u - S_uk S_kk^-1 z_k`` with z of the whole Gaussian. It
    minimises the Mahalanobis distance of the image. Cost: one Cholesky factor a mask, O(d^3), shared by images with that mask.

    References
    ----------
    Agarwal and Nguyen (2020), arXiv:1910.04256; Ledoit and Wolf (2004), A well-conditioned estimator for large-dimensional covariance
    matrices.

    Examples
    --------
    >>> flat = torch.arange(8.0)[:, None].expand(8, 2)
    >>> painter = GaussianInpainter(shrinkage=0.0).fit(flat.reshape(8, 1, 1, 2))
    >>> painter(torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[True, False]]]])).round(decimals=3)
    tensor([[[[3., 3.]]]])
    """

    def __init__(self, n_components: int | None = None, *, shrinkage: float | str = "ledoit-wolf") -> None:
        self.n_components = (
            None if n_components is None else checks.integer("n_components", n_components, low=0)
        )
        if isinstance(shrinkage, str):
            self.shrinkage: float | str = checks.one_of("shrinkage", shrinkage, ("ledoit-wolf",))
        else:
            self.shrinkage = checks.between("shrinkage", shrinkage, 0, 1)

    def fit(self, images: Tensor) -> Self:
        """Estimate mean and covariance from images, shape (k, channels, height, width), at least two."""
        from sklearn.covariance import ledoit_wolf

        checks.image_batch("images", images)
        checks.integer("the number of images", len(images), low=2)
        flat = images.flatten(1).double()
        d, centred = flat.shape[1], flat - flat.mean(0)
        covariance = centred.T @ centred / len(flat)
        if self.shrinkage == "ledoit-wolf":
            shrunk = ledoit_wolf(centred.cpu().numpy(), assume_centered=True)[0]
            covariance = torch.from_numpy(np.asarray(shrunk)).to(flat)
        else:
            target = covariance.diagonal().mean() * torch.eye(d, dtype=flat.dtype, device=flat.device)
            covariance = torch.lerp(covariance, target, float(self.shrinkage))
        if self.n_components is not None and self.n_components < d:
            values, vectors = torch.linalg.eigh(covariance)
            rest = d - self.n_components
            values = torch.cat((values[:rest].mean().expand(rest), values[rest:]))
            covariance = (vectors * values) @ vectors.T
        # A pixel that never varies would leave the covariance singular.
        jitter = 1e-8 * covariance.diagonal().mean().clamp(min=torch.finfo(flat.dtype).tiny)
        self.mean_ = flat.mean(0)
        self.covariance_ = covariance + jitter * torch.eye(d, dtype=flat.dtype, device=flat.device)
        self.shape_ = tuple(images.shape[1:])
        return self

    def __call__(
        self, images: Tensor, masks: Tensor, *, sample: bool = False, generator: Seed = None
    ) -> Tensor:
        """Return images (n, channels, height, width) painted where the masks, shape (n, 1, height, width), are 0."""
        kept = _painted_where("images", images, masks, getattr(self, "shape_", None))
        mean, covariance = self.mean_.to(images.device), self.covariance_.to(images.device)
        flat, known = images.flatten(1).double(), kept.expand_as(images).flatten(1)
        base = mean.expand_as(flat)
        if sample:
            root = torch.linalg.cholesky(covariance)
            base = mean + randn(flat.shape, generator=as_generator(generator), like=flat) @ root.T
        alike, which = known.unique(dim=0, return_inverse=True)
        painted, size = torch.empty_like(flat), max(1, _BLOCK // len(mean) ** 2)
        for start in range(0, len(alike), size):
            k = alike[start : start + size].double()
            factors = torch.linalg.cholesky(covariance * k[:, :, None] * k[:, None] + torch.diag_embed(1 - k))
            rows = ((which >= start) & (which < start + size)).nonzero()[:, 0]
            for part in rows.split(size):
                own, seen = which[part] - start, known[part].double()
                error = seen * (flat[part] - base[part])
                solved = torch.cholesky_solve(error[:, :, None], factors[own])[:, :, 0]
                painted[part] = base[part] + solved @ covariance
        return torch.where(kept, images, painted.reshape(images.shape).to(images.dtype))


class ConvInpainter:
    """Paint removed pixels by a convolutional network of three layers that sees the kept pixels and the mask.

    Parameters
    ----------
    hidden : int
        Channels between the layers.
    kernel : int
        Side of the filters, odd.
    steps, batch : int
        Steps of Adam, and images in each.
    lr : float
        Step size.

    Notes
    -----
    Trained by ``min E |N(m x, m) - x|_1`` over removed pixels, with one random rectangle of a quarter to three quarters of each side
    removed. Cost: three convolutions an image.

    References
    ----------
    Agarwal and Nguyen (2020), arXiv:1910.04256.

    Examples
    --------
    >>> flat = torch.linspace(0, 1, 8)[:, None, None, None].expand(8, 1, 6, 6)
    >>> painter = ConvInpainter(hidden=4, steps=5).fit(flat, 0)
    >>> painter(flat[:1], torch.ones(1, 1, 6, 6)).equal(flat[:1])
    True
    """

    def __init__(
        self, *, hidden: int = 32, kernel: int = 5, steps: int = 300, batch: int = 64, lr: float = 3e-3
    ) -> None:
        self.hidden = checks.integer("hidden", hidden, low=1)
        self.kernel = checks.integer("kernel", kernel, low=1)
        if kernel % 2 == 0:
            raise checks.ArgumentError(f"kernel is {kernel}; allowed: an odd number. Add one.")
        self.steps, self.batch = checks.integer("steps", steps, low=1), checks.integer("batch", batch, low=1)
        self.lr = checks.positive("lr", lr)

    def fit(self, images: Tensor, generator: Seed = None) -> Self:
        """Train on images, shape (k, channels, height, width); the generator draws weights, batches and rectangles."""
        checks.image_batch("images", images)
        g, channels = as_generator(generator), images.shape[1]
        widths = (channels + 1, self.hidden, self.hidden, channels)
        self.weights_ = []
        for given, made in itertools.pairwise(widths):
            spread = (2 / (given * self.kernel**2)) ** 0.5
            shape = (made, given, self.kernel, self.kernel)
            self.weights_ += [spread * randn(shape, generator=g, like=images), images.new_zeros(made)]
        self.shape_ = (channels, None, None)
        parameters = [w.requires_grad_(True) for w in self.weights_]
        optimiser = torch.optim.Adam(parameters, self.lr)
        for _ in range(self.steps):
            x = images[randint(0, len(images), (self.batch,), generator=g, device=images.device)]
            kept = ~_rectangles(x, g)
            with torch.enable_grad():
                error = (self._painted(x, kept) - x).abs() * ~kept
                loss = error.sum() / (~kept).expand_as(x).sum()
                slopes = torch.autograd.grad(loss, parameters)
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.grad = slope
            optimiser.step()
        self.weights_ = [w.detach() for w in self.weights_]
        return self

    def __call__(self, images: Tensor, masks: Tensor) -> Tensor:
        """Return images (n, channels, height, width) painted where the masks, shape (n, 1, height, width), are 0."""
        kept = _painted_where("images", images, masks, getattr(self, "shape_", None))
        with torch.no_grad():
            return torch.where(kept, images, self._painted(images, kept))

    def _painted(self, images: Tensor, kept: Tensor) -> Tensor:
        out = torch.cat((images * kept, kept.to(images.dtype)), 1)
        layers = [w.to(images) for w in self.weights_]
        for i in range(0, len(layers), 2):
            out = functional.conv2d(out, layers[i], layers[i + 1], padding=self.kernel // 2)
            out = functional.relu(out) if i + 2 < len(layers) else out
        return out


def _painted_where(name: str, images: Tensor, masks: Tensor, shape: tuple[int | None, ...] | None) -> Tensor:
    """Return the kept pixels as booleans, after checking images and masks against what was fitted."""
    if shape is None:
        raise checks.ArgumentError(
            "the inpainter is not fitted; allowed: one that has seen images. Call fit(images) first."
        )
    checks.tensor(name, images, shape=(None, *shape))
    checks.tensor("masks", masks, shape=(len(images), 1, *images.shape[2:]), floating=False)
    return masks.to(images.device) > 0.5


def _rectangles(x: Tensor, g: torch.Generator) -> Tensor:
    """Draw one rectangle an image, each side a quarter to three quarters of the image's."""
    inside = []
    for side in x.shape[2:]:
        drawn = uniform((2, len(x), 1), generator=g, like=x)
        length = (side * (0.25 + 0.5 * drawn[0])).round().clamp(1, side)
        start = (drawn[1] * (side - length + 1)).floor()
        line = torch.arange(side, dtype=x.dtype, device=x.device)
        inside.append((line >= start) & (line < start + length))
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
