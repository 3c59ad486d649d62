"""Forward operators of inverse problems: missing pixels, blur, lost resolution, lost phase, or any black box.

Use them to say what was measured of an image; the samplers of this room take them as they are. They are those of
Chung, Kim, McCann, Klasky and Ye (2023), Diffusion Posterior Sampling for General Noisy Inverse Problems,
arXiv:2209.14687.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from perturbkit.core import Oracle, checks

__all__ = ["BlackBox", "Blur", "Downsample", "Inpainting", "LinearOperator", "PhaseRetrieval"]

Boundary = Literal["circular", "reflect", "zero"]


class LinearOperator(ABC):
    """A linear map ``A`` of each row of a batch, with its transpose and its pseudo-inverse.

    A subclass gives ``__call__`` and ``adjoint``; both treat rows independently.

    Attributes
    ----------
    max_iter : int
        Most iterations of the pseudo-inverse, where no closed form is known.

    Notes
    -----
    ``pinv(y) = A^T (A A^T)^+ y``, the shortest of the ``x`` that come nearest to ``y``, by conjugate gradients on the
    normal equations (each iteration one application of A and one of its transpose). All three are differentiable.

    Examples
    --------
    >>> class Sum(LinearOperator):
    ...     def __call__(self, x):
    ...         return x.sum(1, keepdim=True)
    ...
    ...     def adjoint(self, y):
    ...         return y.expand(-1, 4)
    >>> Sum().pinv(torch.tensor([[2.0]]))
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """

    max_iter: int = 1000

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return ``A x`` for every row."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Return ``A^T y`` for every row."""

    def pinv(self, y: Tensor) -> Tensor:
        """Return ``A^T (A A^T)^+ y`` for every row."""
        return _LeastSquares.apply(_batch("y", y), self.__call__, self.adjoint, self.max_iter)  # type: ignore[no-any-return]


class Inpainting(LinearOperator):
    """Keep some of the entries: ``y`` holds the measured ones, in order.

    Parameters
    ----------
    mask : Tensor of bool, shape (height, width), (channels, height, width) or (features,)
        True where something is measured. A mask without channels serves all of them.

    Notes
    -----
    The rows of A are rows of the identity: ``A A^T = I``, so the pseudo-inverse is the transpose, which puts zeros where
    nothing is known. ``x`` of shape (n, ..., *mask) gives ``y`` of shape (n, ..., measured).

    Examples
    --------
    >>> operator = Inpainting(torch.tensor([True, False, True]))
    >>> operator.adjoint(operator(torch.tensor([[1.0, 2.0, 3.0]])))
    tensor([[1., 0., 3.]])
    """

    def __init__(self, mask: Tensor) -> None:
        checks.tensor("mask", mask, ndim=(1, 2, 3), floating=False)
        if mask.dtype != torch.bool or not bool(mask.any()):
            raise checks.ArgumentError(
                f"mask has dtype {mask.dtype} and {int((mask != 0).sum())} measured entries; allowed: a boolean mask with at "
                "least one. Pass True where something is measured."
            )
        self.mask = mask
        self._index = mask.flatten().nonzero()[:, 0]

    def __call__(self, x: Tensor) -> Tensor:
        k = self.mask.ndim
        if _batch("x", x).ndim <= k or x.shape[-k:] != self.mask.shape:
            raise checks.ArgumentError(
                f"x has shape {tuple(x.shape)}; allowed: a batch whose last dimensions are those of the mask, "
                f"{tuple(self.mask.shape)}. Reshape it or the mask."
            )
        return x.flatten(-k).index_select(-1, self._index.to(x.device))

    def adjoint(self, y: Tensor) -> Tensor:
        _last("y", y, len(self._index))
        full = y.new_zeros(*y.shape[:-1], self.mask.numel()).index_copy(-1, self._index.to(y.device), y)
        return full.unflatten(-1, self.mask.shape)

    def pinv(self, y: Tensor) -> Tensor:
        return self.adjoint(y)


class Blur(LinearOperator):
    """Convolve images with a kernel; the answer has the size of the image.

    Parameters
    ----------
    kernel : float or Tensor of shape (height, width)
        Odd sides, the middle at the origin; or the standard deviation in pixels of a Gaussian, cut at three.
    boundary : {"circular", "reflect", "zero"}
        What lies beyond the edge: the other side, the mirror image (the edge not repeated), or nothing.
    rcond : float, optional
        Frequencies whose gain is below this share of the largest count as lost in ``pinv`` (circular only). Default: the
        rounding error of the dtype; with noise take about its share of the signal, since ``pinv`` divides by the gain.

    Notes
    -----
    ``(A x)[i] = sum_j kernel[j] x[i - j]``. The transpose correlates, and folds what lies beyond the edge back on where
    it came from: exact for every boundary. ``pinv`` is a division of Fourier coefficients for the circular boundary and
    runs conjugate gradients for the others.

    Examples
    --------
    >>> image = torch.zeros(1, 1, 5, 5)
    >>> image[0, 0, 2, 2] = 1
    >>> blurred = Blur(torch.full((1, 3), 1 / 3))(image)
    >>> blurred[0, 0, 2]
    tensor([0.0000, 0.3333, 0.3333, 0.3333, 0.0000])
    """

    def __init__(
        self, kernel: Tensor | float, *, boundary: Boundary = "circular", rcond: float | None = None
    ) -> None:
        self.kernel = (
            _gaussian(checks.positive("kernel", kernel)) if not isinstance(kernel, Tensor) else kernel
        )
        checks.tensor("kernel", self.kernel, ndim=2)
        if any(s % 2 == 0 for s in self.kernel.shape):
            raise checks.ArgumentError(
                f"kernel has shape {tuple(self.kernel.shape)}; allowed: odd sides, so that there is a middle. Pad it with zeros."
            )
        self.boundary: Boundary = checks.one_of("boundary", boundary, ("circular", "reflect", "zero"))
        self.rcond = None if rcond is None else checks.between("rcond", rcond, 0, 1)

    def __call__(self, x: Tensor) -> Tensor:
        rows, cols = self._sources(x)
        padded = x[..., rows, :][..., cols] if self.boundary != "zero" else self._framed(x)
        return functional.conv2d(padded.flatten(0, 1)[:, None], self._weight(x)).view(x.shape)

    def adjoint(self, y: Tensor) -> Tensor:
        rows, cols = self._sources(y)
        full = functional.conv_transpose2d(y.flatten(0, 1)[:, None], self._weight(y))
        full = full.view(*y.shape[:2], *full.shape[2:])
        a, b = (s // 2 for s in self.kernel.shape)
        if self.boundary == "zero":
            return full[..., a : full.shape[2] - a, b : full.shape[3] - b]
        # What was read twice is added twice.
        full = full.new_zeros(*full.shape[:2], y.shape[2], full.shape[3]).index_add(2, rows, full)
        return full.new_zeros(y.shape).index_add(3, cols, full)

    def pinv(self, y: Tensor) -> Tensor:
        if self.boundary != "circular":
            return super().pinv(y)
        self._sources(y)
        gain = self._gain(y)
        size = gain.abs()
        floor = torch.finfo(y.dtype).eps * max(y.shape[2:]) if self.rcond is None else self.rcond
        kept = size > floor * size.max()
        inverse = torch.where(kept, 1 / torch.where(kept, gain, torch.ones_like(gain)), 0)
        return torch.fft.ifft2(inverse * torch.fft.fft2(y)).real

    def _weight(self, like: Tensor) -> Tensor:
        return self.kernel.to(like).flip(0, 1)[None, None]

    def _framed(self, x: Tensor) -> Tensor:
        a, b = (s // 2 for s in self.kernel.shape)
        return functional.pad(x, (b, b, a, a))

    def _sources(self, x: Tensor) -> list[Tensor]:
        """Return for each row and column of the padded image which of the image it repeats."""
        _images("x", x)
        found = []
        for size, width in zip(x.shape[2:], self.kernel.shape, strict=True):
            place = torch.arange(-(width // 2), size + width // 2, device=x.device)
            if self.boundary == "reflect" and width // 2 >= size:
                raise checks.ArgumentError(
                    f"the kernel reaches {width // 2} pixels beyond an edge of an image of {size}; allowed: less than the image "
                    "for a mirrored boundary. Use a smaller kernel or boundary='circular'."
                )
            mirrored = (size - 1) - ((size - 1) - place.abs()).abs()
            found.append(mirrored if self.boundary == "reflect" else place % size)
        return found

    def _gain(self, like: Tensor) -> Tensor:
        """Return the Fourier coefficients of the kernel, wrapped around an image of this size."""
        h, w = like.shape[2:]
        rows, cols = (torch.arange(s, device=like.device) - s // 2 for s in self.kernel.shape)
        wrapped = like.new_zeros(h, w)
        places = (rows[:, None] % h).expand(-1, len(cols)), (cols[None] % w).expand(len(rows), -1)
        return torch.fft.fft2(wrapped.index_put(places, self.kernel.to(like), accumulate=True))


class Downsample(LinearOperator):
    """Lower the resolution: the mean of each square of ``factor`` by ``factor`` pixels.

    Parameters
    ----------
    factor : int
        At least 1; it must divide height and width.

    Notes
    -----
    ``A A^T = I / factor^2``: the pseudo-inverse repeats each value over its square, and the transpose is that divided by
    ``factor^2``.

    Examples
    --------
    >>> Downsample(2)(torch.arange(4.0).view(1, 1, 2, 2))
    tensor([[[[1.5000]]]])
    """

    def __init__(self, factor: int) -> None:
        self.factor = checks.integer("factor", factor, low=1)

    def __call__(self, x: Tensor) -> Tensor:
        if _images("x", x).shape[2] % self.factor or x.shape[3] % self.factor:
            raise checks.ArgumentError(
                f"x has images of {x.shape[2]} by {x.shape[3]}; allowed: sides that {self.factor} divides. Crop them."
            )
        return functional.avg_pool2d(x, self.factor)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.pinv(y) / self.factor**2

    def pinv(self, y: Tensor) -> Tensor:
        return _images("y", y).repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


class PhaseRetrieval:
    """Magnitudes of an oversampled Fourier transform; the phases are lost.

    Parameters
    ----------
    oversampling : float
        Size of the zero-padded array over that of the image, each side, at least 1. From 2 on the magnitudes determine a
        generic image up to its sign, a point reflection and (for images with an empty frame) a shift.

    Notes
    -----
    ``A(x) = |F P x|`` with ``P`` the padding and ``F`` the unitary transform over the last two dimensions of images and
    the last of flat vectors, so ``||A(x)|| = ||x||``. Not linear: ``A(-x) = A(x)``. :meth:`vjp` is the product of a vector
    with the Jacobian, ``P^T Re F^H (v * z / |z|)`` for ``z = F P x``, zero where z is.

    Examples
    --------
    >>> magnitudes = PhaseRetrieval(2.0)(torch.tensor([[3.0, 4.0]]))
    >>> magnitudes.shape, round(float(magnitudes.norm()), 4)
    (torch.Size([1, 4]), 5.0)
    """

    def __init__(self, oversampling: float = 2.0) -> None:
        self.oversampling = checks.between("oversampling", oversampling, 1, math.inf)

    def __call__(self, x: Tensor) -> Tensor:
        return self._transform(x)[0].abs()

    def vjp(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the vector-Jacobian product at ``x`` with ``v``, a tensor of the shape of the magnitudes."""
        z, dims = self._transform(x)
        if v.shape != z.shape:
            raise checks.ArgumentError(
                f"v has shape {tuple(v.shape)}; allowed: that of the magnitudes, {tuple(z.shape)}. Reshape it."
            )
        product = torch.fft.ifftn(v * torch.sgn(z), dim=dims, norm="ortho").real
        return product[(..., *(slice(x.shape[d]) for d in dims))]

    def _transform(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        dims = (-2, -1) if checks.tensor("x", x, ndim=(2, 4), finite=False).ndim == 4 else (-1,)
        sizes = [math.ceil(self.oversampling * x.shape[d] - 1e-9) for d in dims]
        return torch.fft.fftn(x, s=sizes, dim=dims, norm="ortho"), dims


class BlackBox:
    """A function that is only asked, never differentiated: a simulator, an instrument.

    Parameters
    ----------
    function : callable
        Maps a batch (n, ...) to answers (n, outputs) or (n,).
    chunk_size : int, optional
        Rows at once; all of them by default.

    Attributes
    ----------
    nfev : int
        Rows asked so far.

    Notes
    -----
    A wrapped :class:`~perturbkit.core.Oracle`: rows go in by chunks and are counted. A gradient through it is refused
    rather than taken as zero.

    Examples
    --------
    >>> box = BlackBox(lambda x: (x > 0).sum(1), chunk_size=2)
    >>> box(torch.tensor([[1.0, -1.0], [2.0, 3.0], [-1.0, -2.0]])), box.nfev
    (tensor([1, 2, 0]), 3)
    """

    def __init__(self, function: Callable[[Tensor], Any], *, chunk_size: int | None = None) -> None:
        rows = 2**62 if chunk_size is None else checks.integer("chunk_size", chunk_size, low=1)
        self._oracle = Oracle(function, chunk_size=rows)

    @property
    def nfev(self) -> int:
        """Rows asked so far."""
        return self._oracle.nfev

    def __call__(self, x: Tensor) -> Tensor:
        if checks.tensor("x", x, floating=False, finite=False).requires_grad and torch.is_grad_enabled():
            raise checks.ArgumentError(
                "x asks for a gradient through a black box; allowed: x without one. Use a sampler without derivatives "
                "(sample_enkg), or detach x."
            )
        return self._oracle(x)


class _LeastSquares(torch.autograd.Function):
    """The pseudo-inverse as one differentiable map: its transpose is the pseudo-inverse of the transpose."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, apply: Any, transpose: Any, max_iter: int) -> Tensor:
        ctx.rest = (transpose, apply, max_iter)
        return _cgls(b, apply, transpose, max_iter)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _LeastSquares.apply(grads[0], *ctx.rest), None, None, None


def _cgls(b: Tensor, apply: Any, transpose: Any, max_iter: int) -> Tensor:
    """Return the shortest least-squares solution of ``apply(x) = b``, row by row, by conjugate gradients."""

    def energy(v: Tensor) -> Tensor:
        return v.flatten(1).square().sum(1).view(-1, *[1] * (v.ndim - 1))

    with torch.no_grad():
        r, s = b.clone(), transpose(b)
        x, p, gamma = torch.zeros_like(s), s.clone(), energy(s)
        enough = gamma * (100 * torch.finfo(b.dtype).eps) ** 2
        for _ in range(max_iter):
            active = gamma > enough
            if not bool(active.any()):
                break
            q = apply(p)
            step = torch.where(active, gamma, 0) / energy(q).view(gamma.shape).clamp_min(
                torch.finfo(b.dtype).tiny
            )
            x = x + step * p
            r = r - step.view(-1, *[1] * (r.ndim - 1)) * q
            s = transpose(r)
            last, gamma = gamma, torch.where(active, energy(s), gamma)
            p = torch.where(active, s + gamma / last.clamp_min(torch.finfo(b.dtype).tiny) * p, p)
    return x


def _gaussian(sigma: float) -> Tensor:
    reach = math.ceil(3 * sigma)
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma) ** 2)
    square = line[:, None] * line
    return square / square.sum()


def _batch(name: str, x: Tensor) -> Tensor:
    return checks.tensor(name, x, ndim=(2, 3, 4, 5), finite=False)


def _images(name: str, x: Tensor) -> Tensor:
    return checks.tensor(name, x, ndim=4, finite=False)


def _last(name: str, y: Tensor, size: int) -> None:
    if _batch(name, y).shape[-1] != size:
        raise checks.ArgumentError(
            f"{name} has shape {tuple(y.shape)}; allowed: (n, ..., {size}), one value a measured entry. Pass what the operator gave."
        )
