"""Small reference networks that know the time: a multilayer perceptron, a U-Net, and the scalings around them.

They are what the bundled denoisers are and what the reproductions train, and a place to start for data of one's own; any
module with the call ``network(x, t)`` or ``network(x, t, condition)`` serves as well.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.noise import Denoiser, Schedule
from perturbkit.core.random import randn, uniform

__all__ = ["Preconditioned", "SmallUNet", "TimeFeatures", "TimeMLP", "edm_scalings"]

_TRACE = 1e-6


class TimeFeatures(nn.Module):
    """Sines and cosines of a time, by which a network tells times apart.

    Parameters
    ----------
    size : int
        Numbers a time, even.
    slow, fast : float
        Least and greatest rate in radians a unit of time, positive; the others are even on a log scale.

    Examples
    --------
    >>> TimeFeatures(8)(torch.rand(3)).shape
    torch.Size([3, 8])
    """

    rates: Tensor

    def __init__(self, size: int, slow: float = math.pi / 16, fast: float = 8 * math.pi) -> None:
        super().__init__()
        rates = torch.logspace(math.log10(slow), math.log10(fast), size // 2)
        self.register_buffer("rates", rates)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.rates
        return torch.cat([angles.sin(), angles.cos()], 1)


class TimeMLP(nn.Module):
    """A multilayer perceptron of flat inputs and a time.

    Parameters
    ----------
    dim : int
        Numbers an input, at least 1.
    out_dim : int, optional
        Numbers an answer; ``dim`` by default.
    hidden : int
        Width of the hidden layers.
    depth : int
        Hidden layers, at least 1.
    condition_dim : int
        Numbers of a condition that comes with each row; 0: none.
    activation : callable
        Class of the activations; smooth ones have usable second derivatives.

    Raises
    ------
    ArgumentError
        If a size is not positive.

    Notes
    -----
    ``forward(x, t, condition=None)`` takes (n, dim), times of shape (n,) or a number, and (n, condition_dim); it answers
    (n, out_dim), without scalings of its own: see :class:`Preconditioned`. The time enters by 16 sines and cosines at
    rates from pi/16 to 8 pi, which tell apart times in [0, 1] as well as log noise levels.

    Examples
    --------
    >>> TimeMLP(2, hidden=8)(torch.zeros(5, 2), torch.rand(5)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        dim: int,
        *,
        out_dim: int | None = None,
        hidden: int = 256,
        depth: int = 2,
        condition_dim: int = 0,
        activation: type[nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        self.dim = checks.integer("dim", dim, low=1)
        checks.integer("hidden", hidden, low=1)
        checks.integer("depth", depth, low=1)
        self.condition_dim = checks.integer("condition_dim", condition_dim, low=0)
        width = dim if out_dim is None else checks.integer("out_dim", out_dim, low=1)
        self.features = TimeFeatures(16)
        sizes = [dim + 16 + condition_dim, *[hidden] * depth]
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Linear(sizes[i], sizes[i + 1]), activation()]
        self.body = nn.Sequential(*layers, nn.Linear(hidden, width))

    def forward(self, x: Tensor, t: Tensor | float, condition: Tensor | None = None) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise checks.ArgumentError(
                f"x has shape {tuple(x.shape)}; allowed: (n, {self.dim}). Flatten the rows, or build the network for their size."
            )
        parts = [x, self.features(_row_times(t, x)), *_given(condition, (len(x), self.condition_dim))]
        return self.body(torch.cat(parts, 1))


class SmallUNet(nn.Module):
    """A small U-Net of images and a time.

    Parameters
    ----------
    channels : int
        Channels of the images.
    out_channels : int, optional
        Channels of the answer; ``channels`` by default.
    width : int
        Channels of the first level, a multiple of 8; each level doubles them.
    levels : int
        Halvings of the image; its sides must be multiples of ``2**levels``.
    condition_channels : int
        Channels of an image that comes with each row, of the same size; 0: none.

    Raises
    ------
    ArgumentError
        If a size is not allowed, or the sides of an image cannot be halved often enough.

    Notes
    -----
    ``forward(x, t, condition=None)`` takes (n, channels, height, width), times of shape (n,) or a number, and
    (n, condition_channels, height, width); it answers (n, out_channels, height, width). Each block is two convolutions with
    group normalisation and SiLU, the time added between them, around a shortcut; levels are joined by strided convolutions
    down and nearest-neighbour doubling up.

    References
    ----------
    Ronneberger, Fischer and Brox (2015), arXiv:1505.04597; Ho, Jain and Abbeel (2020), arXiv:2006.11239, appendix B.

    Examples
    --------
    >>> SmallUNet(1, width=8)(torch.zeros(3, 1, 28, 28), 0.5).shape
    torch.Size([3, 1, 28, 28])
    """

    def __init__(
        self,
        channels: int,
        *,
        out_channels: int | None = None,
        width: int = 32,
        levels: int = 2,
        condition_channels: int = 0,
    ) -> None:
        super().__init__()
        self.channels = checks.integer("channels", channels, low=1)
        self.levels = checks.integer("levels", levels, low=1)
        self.condition_channels = checks.integer("condition_channels", condition_channels, low=0)
        answers = channels if out_channels is None else checks.integer("out_channels", out_channels, low=1)
        if checks.integer("width", width, low=8) % 8:
            raise checks.ArgumentError(
                f"width is {width}; allowed: a multiple of 8. Take {8 * round(width / 8)}."
            )
        time_width = 4 * width
        self.time = nn.Sequential(TimeFeatures(32), nn.Linear(32, time_width), nn.SiLU())
        sizes = [width * 2**k for k in range(levels + 1)]
        self.first = nn.Conv2d(channels + condition_channels, width, 3, padding=1)
        self.down = nn.ModuleList(_Block(s, s, time_width) for s in sizes[:-1])
        self.shrink = nn.ModuleList(nn.Conv2d(s, 2 * s, 3, stride=2, padding=1) for s in sizes[:-1])
        self.middle = _Block(sizes[-1], sizes[-1], time_width)
        self.grow = nn.ModuleList(nn.Conv2d(2 * s, s, 3, padding=1) for s in sizes[:-1])
        self.up = nn.ModuleList(_Block(2 * s, s, time_width) for s in sizes[:-1])
        self.last = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, answers, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor | float, condition: Tensor | None = None) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.channels or any(side % 2**self.levels for side in x.shape[2:]):
            raise checks.ArgumentError(
                f"x has shape {tuple(x.shape)}; allowed: (n, {self.channels}, height, width), sides multiples of "
                f"{2**self.levels}. Pad the images, or build the network with fewer levels."
            )
        time = self.time(_row_times(t, x))
        x = torch.cat([x, *_given(condition, (len(x), self.condition_channels, *x.shape[2:]))], 1)
        h, kept = self.first(x), []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            h = block(h, time)
            kept.append(h)
            h = shrink(h)
        h = self.middle(h, time)
        for block, grow in zip(reversed(self.up), reversed(self.grow), strict=True):
            h = grow(nn.functional.interpolate(h, scale_factor=2.0))
            h = block(torch.cat([h, kept.pop()], 1), time)
        return self.last(h)


class _Block(nn.Module):
    """Two convolutions with the time between them, around a shortcut."""

    def __init__(self, channels: int, out_channels: int, time_width: int) -> None:
        super().__init__()
        self.one = nn.Sequential(
            nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.time = nn.Linear(time_width, out_channels)
        self.two = nn.Sequential(
            nn.GroupNorm(8, out_channels), nn.SiLU(), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        )
        self.shortcut = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.one(x) + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.two(h)


class Preconditioned(nn.Module):
    """A network between the scalings that keep its inputs, its answers and its loss near one at every noise level.

    Parameters
    ----------
    network : nn.Module
        ``network(x, t)`` or ``network(x, t, condition)`` with answers in the shape of ``x``; it is given the logarithm of
        the noise level as ``t``.
    schedule : Schedule
        Of the states that come in.
    data_std : float
        Standard deviation of the data, positive.

    Notes
    -----
    With ``z = x / alpha(t)``, ``lam = sigma / alpha`` and data of deviation ``s``, the answer is the clean data

        x0 = s^2 / (lam^2 + s^2) z + lam s / sqrt(lam^2 + s^2) network(z / sqrt(lam^2 + s^2), log lam).

    References
    ----------
    Karras, Aittala, Aila and Laine (2022), arXiv:2206.00364, table 1.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> model = Preconditioned(TimeMLP(2, hidden=8), EDMSchedule(), 0.5)
    >>> model(torch.zeros(3, 2), 1.0).shape
    torch.Size([3, 2])
    """

    def __init__(self, network: nn.Module, schedule: Schedule, data_std: float) -> None:
        super().__init__()
        if not isinstance(network, nn.Module) or not isinstance(schedule, Schedule):
            raise checks.ArgumentTypeError(
                f"network is a {type(network).__name__} and schedule a {type(schedule).__name__}; allowed: an nn.Module and "
                "a Schedule. Pass for instance TimeMLP(dim) and EDMSchedule()."
            )
        self.network, self.schedule = network, schedule
        self.data_std = checks.positive("data_std", data_std)

    def forward(self, x: Tensor, t: Tensor | float, condition: Tensor | None = None) -> Tensor:
        inner, level, kept, gain = edm_scalings(x, t, self.schedule, self.data_std)
        given = () if condition is None else (condition,)
        return kept + gain * self.network(inner, level, *given)

    def loss(
        self,
        x0: Tensor,
        condition: Tensor | None = None,
        *,
        generator: torch.Generator,
        t_end: float = 1e-3,
        levels: Literal["log-uniform", "log-normal", "uniform"] = "log-uniform",
    ) -> Tensor:
        """Return the denoising loss of a batch, its noise levels drawn anew.

        Parameters
        ----------
        x0 : Tensor, shape (n, ...)
            Clean data.
        condition : Tensor, optional
            As the network takes it.
        generator : torch.Generator
            Source of the times and the noise.
        t_end : float
            The time of least noise.
        levels : {"log-uniform", "log-normal", "uniform"}
            Law of the noise level: log lambda uniform, or normal with mean -1.2 and deviation 1.2 (which spends the work on
            the levels where images take shape; Karras et al.'s choice for data of deviation 0.5), or the time uniform.

        Returns
        -------
        Tensor
            The mean of ``(1 / lam^2 + 1 / s^2) |x0' - x0|^2`` over rows and coordinates, whose weight makes the network's own
            answer count alike at every level.
        """
        checks.tensor("x0", x0)
        checks.one_of("levels", levels, ("log-uniform", "log-normal", "uniform"))
        checks.between("t_end", t_end, 0, self.schedule.t_max, inclusive="neither")
        n, last = (len(x0),), self.schedule.t_max
        low, high = self.schedule.lam(torch.tensor([t_end, last], dtype=torch.float64)).log().tolist()
        high = min(high, -math.log(_TRACE))
        if levels == "uniform":
            t = uniform(n, t_end, last, generator=generator, dtype=torch.float64)
        elif levels == "log-uniform":
            t = self.schedule.time(uniform(n, low, high, generator=generator, dtype=torch.float64).exp())
        else:
            drawn = 1.2 * randn(n, generator=generator, dtype=torch.float64) - 1.2
            t = self.schedule.time(drawn.clamp(low, high).exp())
        t = t.to(x0.device)
        noisy = self.schedule.add_noise(x0, randn(x0.shape, generator=generator, like=x0), t)
        weight = _along((1 / self.schedule.lam(t) ** 2 + 1 / self.data_std**2).to(x0), x0)
        return (weight * (self(noisy, t, condition) - x0).square()).mean()

    def denoiser(self) -> Denoiser:
        """Return the network as samplers take it."""
        return Denoiser(self, self.schedule, predicts="x0")


def edm_scalings(
    x: Tensor, t: Tensor | float, schedule: Schedule, data_std: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what :class:`Preconditioned` gives its network and does with the answer.

    Parameters
    ----------
    x : Tensor, shape (n, ...)
        States.
    t : Tensor of shape (n,) or float
        Their times.
    schedule : Schedule
        Their schedule.
    data_std : float
        Deviation of the data.

    Returns
    -------
    (Tensor, Tensor, Tensor, Tensor)
        The network's input, the logarithm of its noise level of shape (n,), and two terms of which the clean data is
        ``kept + gain * answer``.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> inner, level, kept, gain = edm_scalings(torch.full((1, 1), 2.0), 1.0, EDMSchedule(), 1.0)
    >>> [round(float(v), 3) for v in (inner, level, kept, gain)]
    [1.414, 0.0, 1.0, 0.707]
    """
    t = _row_times(t, x)
    alpha = schedule.alpha(t).to(x)
    # Where no signal is left, a trace of it; where no noise is, the network's answer has no weight.
    lam = torch.where(alpha > _TRACE, schedule.lam(t).to(x), schedule.sigma(t).to(x) / _TRACE)
    level = _along(lam, x)
    z = x / _along(alpha.clamp_min(_TRACE), x)
    total = level**2 + data_std**2
    log_level = lam.clamp_min(torch.finfo(x.dtype).tiny).log()
    return z / total.sqrt(), log_level, (data_std**2 / total) * z, level * data_std / total.sqrt()


def _row_times(t: Tensor | float, x: Tensor) -> Tensor:
    """One time a row, in the dtype of the rows."""
    times = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if times.ndim and times.shape not in ((1,), (len(x),)):
        raise checks.ArgumentError(
            f"t has shape {tuple(times.shape)}; allowed: one time, or {len(x)}, one a row. Pass t of shape ({len(x)},)."
        )
    return times.expand(len(x))


def _along(values: Tensor, x: Tensor) -> Tensor:
    """Values of shape (n,) with the trailing axes of ``x``."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


def _given(condition: Tensor | None, shape: tuple[int, ...]) -> list[Tensor]:
    """Return the condition, checked, or nothing where the network takes none."""
    if condition is None and not shape[1]:
        return []
    if condition is None or not shape[1] or tuple(condition.shape) != shape:
        shown = "None" if condition is None else f"of shape {tuple(condition.shape)}"
        wanted = (
            f"shape {shape}. Pass one condition a row" if shape[1] else "None. Build the network with one"
        )
        raise checks.ArgumentError(f"condition is {shown}; allowed: {wanted}.")
    return [condition]
