"""What the room shares: folding into the unit cube, and the normal law folded there with its score."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from perturbkit.core import checks

__all__ = [
    "TimeField",
    "centres",
    "check_in_cube",
    "folded",
    "folded_normal_log_prob",
    "folded_normal_score",
    "images",
    "log_prob_and_score",
    "modes",
    "reflect",
]

TimeField = Callable[[Tensor, Tensor], Tensor]

_IMAGES, _MODES = (
    2,
    10,
)  # images on either side, and cosines: what is left out is below 1e-13 on its side of the switch
_SWITCH = 0.5


def reflect(x: Tensor) -> Tensor:
    """Fold real coordinates into [0, 1], as a path that is mirrored at both walls ends.

    Parameters
    ----------
    x : Tensor
        Any shape, floating point, finite.

    Returns
    -------
    Tensor
        In the shape of ``x``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If ``x`` is not a finite floating-point tensor.

    Notes
    -----
    ``1 - |1 - (x mod 2)|``. If ``x`` is Brownian motion on the line, its fold is reflected Brownian motion, exactly.

    Examples
    --------
    >>> reflect(torch.tensor([0.25, 1.25, -0.5, 2.5]))
    tensor([0.2500, 0.7500, 0.5000, 0.5000])
    """
    return folded(checks.tensor("x", x))


def folded_normal_log_prob(x: Tensor, mean: Tensor, sigma: Tensor | float) -> Tensor:
    """Return the log density of a normal variable folded into [0, 1], element by element.

    Parameters
    ----------
    x, mean : Tensor
        In [0, 1], broadcastable to each other.
    sigma : float or Tensor
        Standard deviation before folding, above 0, broadcastable.

    Returns
    -------
    Tensor
        One value an element; add up the coordinates for that of a vector.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a point is outside [0, 1] or a deviation not positive.

    Notes
    -----
    Images of the mean, ``q = sum_m N(x; mean + 2m, sigma^2) + N(x; -mean + 2m, sigma^2)``, for ``sigma < 0.5``, and its
    cosine series ``q = 1 + 2 sum_k exp(-k^2 pi^2 sigma^2 / 2) cos(k pi x) cos(k pi mean)`` above: equal, and each
    converges fast where the other does not.

    Cost: 10 exponentials or 20 cosines and sines an element.

    Examples
    --------
    >>> half = torch.tensor(0.5)
    >>> bool(folded_normal_log_prob(half, half, 5.0).abs() < 1e-6)  # as good as uniform
    True
    """
    return log_prob_and_score(*_checked(x, mean, sigma))[0]


def folded_normal_score(x: Tensor, mean: Tensor, sigma: Tensor | float) -> Tensor:
    """Return the derivative in ``x`` of :func:`folded_normal_log_prob`, element by element.

    Parameters
    ----------
    x, mean : Tensor
        In [0, 1], broadcastable to each other.
    sigma : float or Tensor
        Standard deviation before folding, above 0, broadcastable.

    Returns
    -------
    Tensor

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a point is outside [0, 1] or a deviation not positive.

    Notes
    -----
    ``-sum_i w_i (x - c_i) / sigma^2`` over the images ``c_i`` with their posterior weights, or the quotient of the two
    cosine series. It is zero at both walls.

    Examples
    --------
    >>> folded_normal_score(torch.tensor([0.0, 0.4]), torch.tensor(0.3), 0.1)
    tensor([  0.0000, -10.0000])
    """
    return log_prob_and_score(*_checked(x, mean, sigma))[1]


def check_in_cube(name: str, x: Tensor) -> Tensor:
    """Accept a tensor whose elements are in [0, 1]."""
    low, high = (float(v) for v in checks.tensor(name, x).detach().aminmax())
    if low < 0 or high > 1:
        raise checks.ArgumentError(
            f"{name} has values from {low:.4g} to {high:.4g}; allowed: [0, 1]. "
            "Scale the data to the unit cube."
        )
    return x


def folded(x: Tensor) -> Tensor:
    """Fold without a check."""
    # The distance to the next even number, which is exact; a remainder takes several times as long.
    return torch.sub(x, (x / 2).round_(), alpha=2).abs_()


def log_prob_and_score(x: Tensor, mean: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log density of the folded normal law and its derivative, without checks."""
    small = s < _SWITCH
    if bool(small.all()):
        return _by_images(x, mean, s)
    if not bool(small.any()):
        return _by_modes(x, mean, s)
    # Each branch sees only deviations that it is good for, so that gradients through torch.where are finite.
    near, far = _by_images(x, mean, s.clamp_max(_SWITCH)), _by_modes(x, mean, s.clamp_min(_SWITCH))
    return torch.where(small, near[0], far[0]), torch.where(small, near[1], far[1])


def centres(mean: Tensor, reach: int = _IMAGES) -> Tensor:
    """Return the images of a mean, along a new last axis."""
    shift = 2.0 * torch.arange(-reach, reach + 1, device=mean.device).to(mean.dtype)
    return torch.cat((mean[..., None] + shift, shift - mean[..., None]), -1)


def images(x: Tensor, mean: Tensor, s: Tensor, reach: int = _IMAGES) -> Tensor:
    """Return the log density at ``x`` of the normal law around each image, along a new last axis."""
    wide = s[..., None]
    z = (x[..., None] - centres(mean, reach)) / wide
    return -0.5 * z**2 - wide.log() - 0.5 * math.log(2 * math.pi)


def modes(x: Tensor, mean: Tensor, s: Tensor, n_modes: int = _MODES) -> tuple[Tensor, Tensor]:
    """Return the cosine series of the folded density and of its derivative in ``x``."""
    k = math.pi * torch.arange(1, n_modes + 1, device=x.device).to(x.dtype)
    weight = 2 * (-0.5 * (k * s[..., None]) ** 2).exp() * (k * mean[..., None]).cos()
    angle = k * x[..., None]
    return 1 + (weight * angle.cos()).sum(-1), -(weight * k * angle.sin()).sum(-1)


def _by_images(x: Tensor, mean: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    logs = images(x, mean, s)
    total = logs.logsumexp(-1)
    weights = (logs - total[..., None]).exp()
    return total, ((weights * centres(mean)).sum(-1) - x) / s**2


def _by_modes(x: Tensor, mean: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    density, slope = modes(x, mean, s)
    return density.log(), slope / density


def _checked(x: Tensor, mean: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    check_in_cube("x", x)
    check_in_cube("mean", mean)
    s = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    checks.positive("sigma", float(s.detach().min()))
    return x, mean.to(x), s
