"""PFGM++: diffusion with the heavier tails of a field of charges in extra dimensions, from Poisson flows to ordinary diffusion.

Use it in place of Gaussian noise where errors of the network at high noise should matter less: everything made for
variance-exploding diffusion, schedules, scalings and samplers, goes on unchanged. Xu, Liu, Tian, Tong, Tegmark and Jaakkola
(2023), PFGM++: Unlocking the Potential of Physics-Inspired Generative Models, arXiv:2302.04265.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from perturbkit.core import Denoiser, EDMSchedule, checks
from perturbkit.core.random import Seed, as_generator, numpy_generator, randn

__all__ = ["PoissonFlow", "mixture_poisson_denoiser"]

_LEVEL_MEAN, _LEVEL_STD = -1.2, 1.2  # log noise levels of training, Karras et al. (2022)


class PoissonFlow:
    r"""The perturbation of PFGM++, its loss and its prior.

    Parameters
    ----------
    extra_dims : float
        Extra dimensions ``D``, above 0: 1 is the Poisson flow, ``math.inf`` is diffusion with Gaussian noise.
    data_dim : int or sequence of int
        Shape of one datum; ``N`` is its size.
    sigma_min, sigma_max : float
        Least and largest noise level of sampling.
    data_std : float
        Standard deviation of the data, above 0; weighs the loss.

    Attributes
    ----------
    schedule : EDMSchedule
        The time is the noise level ``sigma``.
    shape : tuple of int
        Shape of one datum.

    Notes
    -----
    A charge at ``y`` has, at the distance ``r`` in the extra dimensions, the kernel
    :math:`p_r(x | y) \propto (|x - y|^2 + r^2)^{-(N+D)/2}`. With :math:`r = \sigma \sqrt D` it tends to
    :math:`N(y, \sigma^2 I)` as D grows, and the field lines are :math:`dx/d\sigma = (x - E[y | x, \sigma]) / \sigma`, those of
    variance-exploding diffusion with another posterior mean. The kernel is Student's multivariate t with D degrees of freedom
    and scale :math:`\sigma`, drawn as Gaussian noise times :math:`\sqrt{D / \chi^2_D}`. For small D the noise has no variance and may
    be huge.

    References
    ----------
    Xu, Liu, Tian, Tong, Tegmark and Jaakkola (2023), arXiv:2302.04265.

    Examples
    --------
    >>> flow = PoissonFlow(128, 2, sigma_max=20.0)
    >>> denoiser = mixture_poisson_denoiser(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), None, flow)
    >>> from perturbkit.diffusion import sample_heun
    >>> x = sample_heun(denoiser, flow.prior(4, generator=0), flow.times(20)).x
    >>> bool(((x.abs() - torch.tensor([1.0, 0.0])).abs() < 0.02).all())
    True
    """

    def __init__(
        self,
        extra_dims: float = 2048,
        data_dim: int | Sequence[int] = 64,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        data_std: float = 0.5,
    ) -> None:
        if extra_dims != math.inf:
            checks.positive("extra_dims", extra_dims)
        self.extra_dims = float(extra_dims)
        sizes = tuple(data_dim) if isinstance(data_dim, Sequence) else (data_dim,)
        self.shape = tuple(checks.integer("data_dim", size, low=1) for size in sizes)
        self.sigma_min = checks.positive("sigma_min", sigma_min)
        self.sigma_max = checks.between("sigma_max", sigma_max, self.sigma_min, math.inf, inclusive="neither")
        self.data_std = checks.positive("data_std", data_std)
        self.schedule = EDMSchedule(self.sigma_max)

    def sigma_to_radius(self, sigma: float) -> float:
        """Return the distance ``r = sigma sqrt(D)`` in the extra dimensions of a noise level."""
        return checks.nonnegative("sigma", sigma) * math.sqrt(self.extra_dims)

    def times(self, n_steps: int) -> Tensor:
        """Return the noise levels of a sampler, spaced as by Karras et al. from ``sigma_max`` to ``sigma_min``."""
        return self.schedule.times(n_steps, t_end=self.sigma_min, spacing="karras")

    def perturb(self, x0: Tensor, sigma: Tensor | float, generator: Seed = None) -> Tensor:
        """Draw from the kernel around each row.

        Parameters
        ----------
        x0 : Tensor, shape (n, *shape)
            Data.
        sigma : float or Tensor of shape (n,)
            Noise levels, zero or above.
        generator : torch.Generator, int or None
            Source of the noise.

        Returns
        -------
        Tensor, shape (n, *shape)
        """
        checks.tensor("x0", x0, shape=(None, *self.shape))
        level = torch.as_tensor(sigma, dtype=x0.dtype, device=x0.device)
        if level.ndim > 1 or (level.ndim == 1 and len(level) != len(x0)):
            raise checks.ArgumentError(
                f"sigma has shape {tuple(level.shape)}; allowed: one level, or {len(x0)}, one a row. "
                f"Pass sigma of shape ({len(x0)},)."
            )
        checks.nonnegative("sigma", float(level.min()))
        g = as_generator(generator)
        noise = randn(x0.shape, generator=g, like=x0)
        return x0 + _rows(level * self._spread(len(x0), g).to(x0), x0) * noise

    def prior(
        self,
        n: int,
        *,
        generator: Seed = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw ``n`` starts of sampling, from the kernel around zero at ``sigma_max``: not Gaussian unless D is infinite."""
        size = (checks.integer("n", n, low=1), *self.shape)
        return self.perturb(torch.zeros(size, dtype=dtype, device=device), self.sigma_max, generator)

    def loss(
        self, denoiser: torch.nn.Module, x0: Tensor, *, sigma: Tensor | None = None, generator: Seed = None
    ) -> Tensor:
        """Return the denoising loss of a batch.

        Parameters
        ----------
        denoiser : nn.Module or callable (x, sigma) -> Tensor
            Answers the clean data, as :class:`~perturbkit.core.networks.Preconditioned` does.
        x0 : Tensor, shape (n, *shape)
            Data.
        sigma : Tensor of shape (n,), optional
            Noise levels; log-normal by default, with mean -1.2 and deviation 1.2 of the logarithm.
        generator : torch.Generator, int or None
            Source of levels and noise.

        Returns
        -------
        Tensor, shape ()
            Mean of ``(sigma^2 + data_std^2) / (sigma data_std)^2 (denoiser(x, sigma) - x0)^2``.
        """
        checks.tensor("x0", x0, shape=(None, *self.shape))
        g = as_generator(generator)
        if sigma is None:
            sigma = (_LEVEL_MEAN + _LEVEL_STD * randn((len(x0),), generator=g, like=x0)).exp()
        sigma = torch.as_tensor(sigma, dtype=x0.dtype, device=x0.device).expand(len(x0))
        checks.positive("sigma", float(sigma.min()))
        error = (checks.answer("denoiser", denoiser(self.perturb(x0, sigma, g), sigma), x0) - x0).square()
        return (_rows(1 / sigma**2 + 1 / self.data_std**2, x0) * error).mean()

    def _spread(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw sqrt(D / chi^2_D), which turns Gaussian noise into the kernel's, in float64."""
        if self.extra_dims == math.inf:
            return torch.ones(n, dtype=torch.float64)
        half = self.extra_dims / 2
        drawn = numpy_generator(generator).standard_gamma(half, n)
        return torch.as_tensor((half / drawn) ** 0.5)


def mixture_poisson_denoiser(points: Tensor, weights: Tensor | None, flow: PoissonFlow) -> Denoiser:
    r"""Return the exact denoiser of a finite set of points under a Poisson flow.

    Parameters
    ----------
    points : Tensor, shape (k, *shape)
        Where the charges are.
    weights : Tensor of shape (k,) or None
        Charges, above 0; equal by default.
    flow : PoissonFlow
        The perturbation.

    Returns
    -------
    Denoiser
        Of ``flow.schedule``, for noise above 0.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`E[y | x] = \sum_i w_i y_i`, :math:`w_i \propto q_i (|x - y_i|^2 + D \sigma^2)^{-(N+D)/2}`.

    Cost: O(k N) a row.

    References
    ----------
    Xu et al. (2023), arXiv:2302.04265.

    Examples
    --------
    >>> denoiser = mixture_poisson_denoiser(torch.tensor([[0.0], [1.0]]), None, PoissonFlow(1, 1))
    >>> denoiser.x0(torch.tensor([[0.5], [2.0]]), 1.0)  # weights 1 / 5 and 1 / 2 at the second
    tensor([[0.5000],
            [0.7143]])
    """
    checks.tensor("points", points)
    if not isinstance(flow, PoissonFlow):
        raise checks.ArgumentTypeError(
            f"flow is a {type(flow).__name__}; allowed: a PoissonFlow. Pass PoissonFlow(extra_dims, data_dim)."
        )
    checks.tensor("points", points, shape=(None, *flow.shape))
    charge = torch.ones(len(points)).to(points) if weights is None else weights
    checks.tensor("weights", charge, shape=(len(points),))
    checks.positive("weights", float(charge.min()))
    extra, size = flow.extra_dims, points[0].numel()

    def x0(x: Tensor, sigma: Tensor) -> Tensor:
        where = points.to(x).flatten(1)
        far = (torch.cdist(x.flatten(1), where) / sigma[:, None]) ** 2
        # (far sigma^2 + D sigma^2)^-(N+D)/2, without the factor that all points share.
        logs = -far / 2 if extra == math.inf else -(size + extra) / 2 * torch.log1p(far / extra)
        return ((logs + charge.to(x).log()).softmax(1) @ where).reshape(x.shape)

    return Denoiser(x0, flow.schedule, predicts="x0")


def _rows(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 1))
