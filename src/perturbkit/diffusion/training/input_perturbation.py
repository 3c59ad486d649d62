"""Input perturbation: train a denoiser on inputs with extra noise that the target does not know of.

Use it where sampled states drift away from those that the network was trained on (exposure bias), and
:func:`exposure_bias` to measure the drift. Ning, Sangineto, Porrello, Calderara and Cucchiara (2023), Input Perturbation
Reduces Exposure Bias in Diffusion Models, arXiv:2301.11706.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from perturbkit.core import Cost, Denoiser, Result, checks
from perturbkit.core.random import Seed, as_generator, randn
from perturbkit.core.sampling import check_start
from perturbkit.diffusion.samplers.ddim import sample_ddim

__all__ = ["ExposureBias", "exposure_bias", "input_perturbation_loss"]

Step = Callable[[Denoiser, Tensor, float, float, torch.Generator], Tensor]


@dataclass(frozen=True)
class ExposureBias(Result):
    """How far generated states are from the noised data of the same time.

    Attributes
    ----------
    times : Tensor of float64, shape (steps + 1,)
        From noise to data.
    variance_gap : Tensor, shape (steps + 1,)
        Variance of the generated states less that of noised data, averaged over coordinates.
    mean_gap : Tensor, shape (steps + 1,)
        Norm of the difference of their means.
    nfev : int
        Rows evaluated.
    """

    times: Tensor
    variance_gap: Tensor
    mean_gap: Tensor
    nfev: int

    @property
    def cost(self) -> Cost:
        """Evaluations of the denoiser."""
        return Cost(nfev=self.nfev)


def input_perturbation_loss(
    denoiser: Denoiser, x0: Tensor, t: Tensor, *, strength: float = 0.1, generator: Seed = None
) -> Tensor:
    """Return the noise-prediction loss with perturbed inputs.

    Parameters
    ----------
    denoiser : Denoiser
        The network in training with its schedule, in any prediction.
    x0 : Tensor, shape (n, ...)
        Clean data.
    t : Tensor, shape (n,)
        A time for each row, with noise left.
    strength : float
        Deviation of the extra noise in units of the noise, at least 0; 0 is the plain loss.
    generator : torch.Generator, int or None
        Source of the noise; the plain noise is drawn first, so that it is the same for every strength.

    Returns
    -------
    Tensor
        The mean over rows and coordinates, with the graph of the network.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    With independent standard normal ``eps`` and ``xi``,

        y = alpha(t) x0 + sigma(t) (eps + strength xi),    loss = mean (eps - eps_theta(y, t))^2.

    ``y`` has the law of more noise, and regressing on all of it would only relabel the level; the target stays ``eps``. The
    population optimum is the plain one at the noise level ``sigma sqrt(1 + strength^2)``, divided by
    ``sqrt(1 + strength^2)``: shrunk and smoother in ``x``. Sampling is as ever.

    Cost: one call of the network and two draws of noise.

    References
    ----------
    Ning et al. (2023), arXiv:2301.11706, algorithm 1.

    Examples
    --------
    >>> from perturbkit.core import VPSchedule
    >>> denoiser = Denoiser(lambda x, t: torch.zeros_like(x), VPSchedule(), predicts="eps")
    >>> x0, t = torch.ones(5000, 2), torch.full((5000,), 0.5)
    >>> round(float(input_perturbation_loss(denoiser, x0, t, generator=0)), 1)
    1.0
    """
    _check(denoiser, x0)
    checks.tensor("t", t, shape=(len(x0),))
    checks.positive("the least noise at t", float(denoiser.schedule.sigma(t).min()))
    checks.nonnegative("strength", strength)
    g = as_generator(generator)
    eps = randn(x0.shape, generator=g, like=x0)
    noise = eps + strength * randn(x0.shape, generator=g, like=x0) if strength else eps
    return (denoiser.eps(denoiser.schedule.add_noise(x0, noise, t), t) - eps).square().mean()


def exposure_bias(
    denoiser: Denoiser, x0: Tensor, times: Tensor, *, step: Step | None = None, generator: Seed = None
) -> ExposureBias:
    """Sample from noised data and compare the states on the way with noised data of their times.

    Parameters
    ----------
    denoiser : Denoiser
        The network with its schedule.
    x0 : Tensor, shape (n, ...)
        Data that the network was not trained on, at least two rows.
    times : Tensor, shape (steps + 1,)
        Decreasing times, as :meth:`~perturbkit.core.noise.Schedule.times` gives them.
    step : callable, optional
        ``step(denoiser, x, s, t, generator)`` moves states from time ``s`` to ``t``; the ancestral step of DDPM by default.
    generator : torch.Generator, int or None
        Source of the noise.

    Returns
    -------
    ExposureBias

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the data or the times are not allowed.

    Notes
    -----
    The states start from the exact marginal ``alpha(T) x0 + sigma(T) eps``. At each time their mean and variance are set
    against those of noised data, ``alpha(t) mean(x0)`` and ``alpha(t)^2 var(x0) + sigma(t)^2``, which are known given the rows:
    only the generated side has sampling error. For an exact denoiser what is left is the error of the steps.

    Cost: one call of the denoiser a step.

    References
    ----------
    Ning et al. (2023), arXiv:2301.11706, section 4.

    Examples
    --------
    >>> from perturbkit.core import VPSchedule
    >>> schedule = VPSchedule()
    >>> gaussian = Denoiser(lambda x, t: schedule.sigma(t).to(x)[:, None] * x, schedule, predicts="eps")  # data N(0, 1)
    >>> x0 = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    >>> found = exposure_bias(gaussian, x0, schedule.times(100), generator=0)
    >>> bool(found.variance_gap.abs().max() < 0.1)
    True
    """
    _check(denoiser, x0)
    if len(x0) < 2:
        raise checks.ArgumentError(
            f"x0 has {len(x0)} rows; allowed: at least 2, for a variance. Pass more data."
        )
    check_start(denoiser, x0, times)
    g = as_generator(generator)
    grid = times.detach().to("cpu", torch.float64)
    schedule, calls = denoiser.schedule, denoiser.nfev
    move = _ancestral if step is None else step
    mean, variance = x0.mean(0), x0.var(0)

    def gaps(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        return (x.var(0) - alpha**2 * variance).mean() - sigma**2, (x.mean(0) - alpha * mean).norm()

    x = schedule.add_noise(x0, randn(x0.shape, generator=g, like=x0), float(grid[0]))
    found = [gaps(x, grid[0])]
    with torch.no_grad():
        for s, t in pairwise(grid):
            x = move(denoiser, x, float(s), float(t), g)
            found.append(gaps(x, t))
    variance_gap, mean_gap = (torch.stack(list(column)) for column in zip(*found, strict=True))
    return ExposureBias(grid, variance_gap, mean_gap, denoiser.nfev - calls)


def _ancestral(denoiser: Denoiser, x: Tensor, s: float, t: float, generator: torch.Generator) -> Tensor:
    times = torch.tensor([s, t], dtype=torch.float64)
    return sample_ddim(denoiser, x, times, eta=1.0, generator=generator).x


def _check(denoiser: Denoiser, x0: Tensor) -> None:
    if not isinstance(denoiser, Denoiser):
        raise checks.ArgumentTypeError(
            f"denoiser is a {type(denoiser).__name__}; allowed: a core.Denoiser. Wrap the network: "
            "Denoiser(network, schedule, predicts='eps')."
        )
    checks.tensor("x0", x0)
