"""Noise schedules and the converters between what a denoiser may predict.

One convention serves every sampler: ``x_t = alpha(t) x0 + sigma(t) eps`` with ``t = 0`` at the data,
``lam = sigma / alpha`` and ``logsnr = 2 log(alpha / sigma)``. In the scaled state ``z = x / alpha`` the
probability flow is ``dz / dlam = eps`` for every schedule, so a deterministic sampler is one integrator in
``(z, lam)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from perturbkit.core import checks

__all__ = [
    "CosineSchedule",
    "Denoiser",
    "DiscreteSchedule",
    "EDMSchedule",
    "FlowSchedule",
    "OUSchedule",
    "Prediction",
    "Schedule",
    "VESchedule",
    "VPSchedule",
    "convert_prediction",
    "ddim_step",
]

Prediction = Literal["x0", "eps", "v", "score", "velocity"]
_PREDICTIONS = ("x0", "eps", "v", "score", "velocity")
Time = Tensor | float


def _as_time(t: Time) -> Tensor:
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)


class Schedule(ABC):
    """How much signal and noise there is at each time.

    Subclasses give ``log_alpha``, ``sigma``, their time derivatives and the inverse ``time``; everything else
    follows. Times may be floats or tensors; a float gives a float64 scalar, which multiplies a tensor of any
    dtype without changing it.

    Attributes
    ----------
    t_max : float
        The time of most noise.
    """

    t_max: float = 1.0

    @abstractmethod
    def log_alpha(self, t: Time) -> Tensor:
        """Return log alpha(t)."""

    @abstractmethod
    def sigma(self, t: Time) -> Tensor:
        """Return the standard deviation of the noise, sigma(t)."""

    @abstractmethod
    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        """Return the time derivatives of alpha and sigma."""

    @abstractmethod
    def time(self, lam: Time) -> Tensor:
        """Return the time at which sigma / alpha is ``lam``, the inverse of :meth:`lam`."""

    def alpha(self, t: Time) -> Tensor:
        """Return the factor of the data, alpha(t)."""
        return self.log_alpha(t).exp()

    def lam(self, t: Time) -> Tensor:
        """Return sigma(t) / alpha(t), the noise level of the scaled state."""
        return self.sigma(t) / self.alpha(t)

    def logsnr(self, t: Time) -> Tensor:
        """Return 2 log(alpha(t) / sigma(t))."""
        return 2 * (self.log_alpha(t) - self.sigma(t).log())

    def add_noise(self, x0: Tensor, noise: Tensor, t: Time) -> Tensor:
        """Return alpha(t) x0 + sigma(t) noise; ``t`` is one time, or one a row."""
        return _row(self.alpha(t), x0) * x0 + _row(self.sigma(t), x0) * noise

    def times(
        self,
        n_steps: int,
        *,
        t_start: float | None = None,
        t_end: float = 1e-3,
        spacing: Literal["logsnr", "time", "karras"] = "logsnr",
        rho: float = 7.0,
    ) -> Tensor:
        """Return the grid of a sampler.

        Parameters
        ----------
        n_steps : int
            Number of steps, at least 1.
        t_start, t_end : float
            First and last time; the first is ``t_max`` by default.
        spacing : {"logsnr", "time", "karras"}
            Uniform in log-SNR, in time, or in ``lam ** (1 / rho)``.
        rho : float
            Exponent of the Karras spacing.

        Returns
        -------
        Tensor of float64, shape (n_steps + 1,)
            Decreasing times, both ends exact.

        Raises
        ------
        ArgumentError
            If the times are not ordered ``t_start > t_end`` inside the schedule, or a spacing is unknown.
        """
        n = checks.integer("n_steps", n_steps, low=1)
        checks.one_of("spacing", spacing, ("logsnr", "time", "karras"))
        checks.positive("rho", rho)
        first = self.t_max if t_start is None else checks.between("t_start", t_start, 0, self.t_max)
        last = checks.between("t_end", t_end, 0, first, inclusive="low")
        u = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        ends = torch.tensor([first, last], dtype=torch.float64)
        if spacing == "time":
            grid = ends[0] + u * (ends[1] - ends[0])
            grid[-1] = last
            return grid
        low, high = self.lam(ends).flip(0)
        if not (0 < low < high < math.inf):
            raise checks.ArgumentError(
                f"the noise levels at t_start={first:g} and t_end={last:g} are {high:.3g} and {low:.3g}; allowed: "
                "finite and above zero for this spacing. Move the ends inside the schedule or use spacing='time'."
            )
        if spacing == "logsnr":
            levels = (high.log() + u * (low.log() - high.log())).exp()
        else:
            levels = (high ** (1 / rho) + u * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        grid = self.time(levels)
        grid[0], grid[-1] = first, last
        return grid


class _VariancePreserving(Schedule):
    """alpha^2 + sigma^2 = 1, by log alpha and its inverse."""

    @abstractmethod
    def log_alpha_rate(self, t: Tensor) -> Tensor:
        """Return d log alpha / dt."""

    @abstractmethod
    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        """Return the time with this log alpha."""

    def sigma(self, t: Time) -> Tensor:
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        t = _as_time(t)
        alpha, rate = self.alpha(t), self.log_alpha_rate(t)
        return alpha * rate, -(alpha**2) * rate / self.sigma(t)

    def time(self, lam: Time) -> Tensor:
        return self.time_of_log_alpha(-0.5 * torch.log1p(_as_time(lam) ** 2))


class VPSchedule(_VariancePreserving):
    """Variance preserving with a rate linear in time (DDPM in continuous time).

    ``log alpha(t) = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2`` on [0, 1].

    Parameters
    ----------
    beta_min, beta_max : float
        Rates at t = 0 and t = 1, positive and increasing.

    Examples
    --------
    >>> schedule = VPSchedule()
    >>> t = schedule.time(schedule.lam(0.3))
    >>> round(float(t), 12)
    0.3
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        self.beta_min = checks.positive("beta_min", beta_min)
        self.beta_max = checks.between("beta_max", beta_max, self.beta_min, math.inf, inclusive="neither")

    def log_alpha(self, t: Time) -> Tensor:
        t = _as_time(t)
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def log_alpha_rate(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min + t * (self.beta_max - self.beta_min))

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        half = 0.5 * self.beta_min
        return -2 * log_alpha / (half + (half**2 - (self.beta_max - self.beta_min) * log_alpha).sqrt())


class OUSchedule(_VariancePreserving):
    """The Ornstein-Uhlenbeck process ``dx = -x dt + sqrt(2) dW``: ``alpha = e^-t``, in which theory counts time.

    Parameters
    ----------
    horizon : float
        The last time.
    """

    def __init__(self, horizon: float = 8.0) -> None:
        self.t_max = checks.positive("horizon", horizon)

    def log_alpha(self, t: Time) -> Tensor:
        return -_as_time(t)

    def log_alpha_rate(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        return -log_alpha


class CosineSchedule(_VariancePreserving):
    """Variance preserving with alpha a quarter of a cosine wave (Nichol and Dhariwal, 2021).

    ``alpha(t) = cos(pi/2 (t + s) / (1 + s)) / cos(pi/2 s / (1 + s))``.

    Parameters
    ----------
    offset : float
        ``s``, in (0, 1).
    t_max : float
        The last time, below 1, where alpha is zero.
    """

    def __init__(self, offset: float = 0.008, t_max: float = 0.9946) -> None:
        self.offset = checks.between("offset", offset, 0, 1, inclusive="neither")
        self.t_max = checks.between("t_max", t_max, 0, 1, inclusive="neither")
        self._speed = 0.5 * math.pi / (1 + offset)
        self._phase = self._speed * offset

    def log_alpha(self, t: Time) -> Tensor:
        # cos(p + d) / cos(p) = 1 - (2 sin^2(d/2) + tan(p) sin d), without cancellation near t = 0.
        d = self._speed * _as_time(t)
        return torch.log1p(-(2 * torch.sin(d / 2) ** 2 + math.tan(self._phase) * torch.sin(d)))

    def log_alpha_rate(self, t: Tensor) -> Tensor:
        return -self._speed * torch.tan(self._phase + self._speed * t)

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        return (torch.acos(log_alpha.exp() * math.cos(self._phase)) - self._phase) / self._speed


class DiscreteSchedule(_VariancePreserving):
    """A schedule given at whole steps, as pretrained discrete-time models have it.

    ``log alpha`` is interpolated linearly between the steps 0 .. n-1, which are also the times.

    Parameters
    ----------
    alphas_cumprod : Tensor, shape (n,)
        ``alpha(i)^2`` for i = 0 .. n-1, strictly decreasing in (0, 1).
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        values = checks.tensor("alphas_cumprod", alphas_cumprod, ndim=1).double().cpu()
        if len(values) < 2 or not bool((values.diff() < 0).all()) or values[0] >= 1 or values[-1] <= 0:
            raise checks.ArgumentError(
                f"alphas_cumprod has {len(values)} values from {values[0]:.4g} to {values[-1]:.4g}; allowed: at "
                "least two, strictly decreasing, inside (0, 1). Pass cumprod(1 - betas)."
            )
        self._table = 0.5 * values.log()
        self.t_max = float(len(values) - 1)

    @classmethod
    def from_betas(cls, betas: Tensor) -> DiscreteSchedule:
        """Return the schedule with these rates, shape (n,), in (0, 1)."""
        return cls(torch.cumprod(1 - checks.tensor("betas", betas, ndim=1).double(), 0))

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table = self._table.to(t.device)
        index = t.floor().long().clamp(0, len(table) - 2)
        return index, table[index], table[index + 1]

    def log_alpha(self, t: Time) -> Tensor:
        t = _as_time(t)
        index, left, right = self._segment(t)
        return left.to(t.dtype) + (t - index) * (right - left).to(t.dtype)

    def log_alpha_rate(self, t: Tensor) -> Tensor:
        _, left, right = self._segment(t)
        return (right - left).to(t.dtype)

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        table = self._table.to(log_alpha.device, log_alpha.dtype)
        index = (torch.searchsorted(-table, -log_alpha.contiguous()) - 1).clamp(0, len(table) - 2)
        left, right = table[index], table[index + 1]
        return index + (log_alpha - left) / (right - left)


class _UnitAlpha(Schedule):
    """alpha = 1: the noise is added to the data as it is."""

    def log_alpha(self, t: Time) -> Tensor:
        return torch.zeros_like(_as_time(t))

    def lam(self, t: Time) -> Tensor:
        return self.sigma(t)


class VESchedule(_UnitAlpha):
    """Variance exploding, ``sigma(t) = sigma_min (sigma_max / sigma_min)^t`` on [0, 1].

    Parameters
    ----------
    sigma_min, sigma_max : float
        Noise at t = 0 and t = 1.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        self.sigma_min = checks.positive("sigma_min", sigma_min)
        self.sigma_max = checks.between("sigma_max", sigma_max, self.sigma_min, math.inf, inclusive="neither")
        self._rate = math.log(self.sigma_max / self.sigma_min)

    def sigma(self, t: Time) -> Tensor:
        return self.sigma_min * (self._rate * _as_time(t)).exp()

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        sigma = self.sigma(t)
        return torch.zeros_like(sigma), self._rate * sigma

    def time(self, lam: Time) -> Tensor:
        return (_as_time(lam) / self.sigma_min).log() / self._rate


class EDMSchedule(_UnitAlpha):
    """The time is the noise: ``alpha = 1``, ``sigma(t) = t`` (Karras et al., 2022).

    Parameters
    ----------
    sigma_max : float
        The largest noise, and time.
    """

    def __init__(self, sigma_max: float = 80.0) -> None:
        self.t_max = checks.positive("sigma_max", sigma_max)

    def sigma(self, t: Time) -> Tensor:
        return _as_time(t)

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        t = _as_time(t)
        return torch.zeros_like(t), torch.ones_like(t)

    def time(self, lam: Time) -> Tensor:
        return _as_time(lam)


class FlowSchedule(Schedule):
    """Straight lines between data and noise: ``alpha = 1 - t``, ``sigma = t`` (flow matching).

    Parameters
    ----------
    t_max : float
        The last time, at most 1. At 1 the signal is gone and ``lam`` infinite.
    """

    def __init__(self, t_max: float = 0.999) -> None:
        self.t_max = checks.between("t_max", t_max, 0, 1, inclusive="high")

    def log_alpha(self, t: Time) -> Tensor:
        return torch.log1p(-_as_time(t))

    def sigma(self, t: Time) -> Tensor:
        return _as_time(t)

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        t = _as_time(t)
        return -torch.ones_like(t), torch.ones_like(t)

    def time(self, lam: Time) -> Tensor:
        lam = _as_time(lam)
        return lam / (1 + lam)


class Denoiser:
    """A network that answers in one parametrisation, read in any.

    Parameters
    ----------
    fun : callable
        ``fun(x, t)`` with ``x`` of shape (n, ...) and ``t`` of shape (n,) in the dtype of ``x``; answers in the
        shape of ``x``.
    schedule : Schedule
        The schedule that it was trained with.
    predicts : {"x0", "eps", "v", "score", "velocity"}
        What it answers: the data, the noise, ``v = alpha eps - sigma x0``, the score of the noisy marginal
        ``-eps / sigma``, or the velocity ``dx/dt = alpha' x0 + sigma' eps``.

    Attributes
    ----------
    nfev : int
        Rows evaluated so far.
    n_calls : int
        Calls of ``fun`` so far.

    Examples
    --------
    >>> schedule = EDMSchedule()
    >>> denoiser = Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), schedule, predicts="x0")  # data N(0, 1)
    >>> float(denoiser.score(torch.tensor([[2.0]], dtype=torch.float64), 1.0))
    -1.0
    """

    def __init__(
        self, fun: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, predicts: Prediction = "eps"
    ) -> None:
        if not callable(fun):
            raise checks.ArgumentTypeError(
                f"fun is a {type(fun).__name__}; allowed: a callable of (x, t). Pass the network itself."
            )
        if not isinstance(schedule, Schedule):
            raise checks.ArgumentTypeError(
                f"schedule is a {type(schedule).__name__}; allowed: a Schedule. Pass for instance VPSchedule()."
            )
        self.fun = fun
        #: What holds the parameters: the function itself, or the model that it wraps.
        self.network: Callable[..., Any] = fun
        self.schedule = schedule
        self.predicts: Prediction = checks.one_of("predicts", predicts, _PREDICTIONS)
        self.nfev = self.n_calls = 0

    @classmethod
    def from_diffusers(cls, model: Callable[..., Any], scheduler: Any, **inputs: Any) -> Denoiser:
        """Return the denoiser of a pretrained ``diffusers`` model.

        Parameters
        ----------
        model : callable
            ``model(x, timestep, **inputs)``: a ``UNet2DModel``, a transformer, or any callable of that form. It may answer
            with a tensor, a tuple whose first is one, or an object with ``sample``; learned variances, twice the channels,
            are dropped.
        scheduler : scheduler or mapping
            A scheduler of ``diffusers`` or its configuration; read for the betas and for what the model predicts. Those of
            discrete time and of flow matching are known.
        **inputs
            What else the model takes, one row a row of ``x`` or for all: ``encoder_hidden_states``, ``class_labels``.

        Returns
        -------
        Denoiser
            Its times are the timesteps 0 .. n - 1 of training (fractions between), or for flow matching [0, 1].

        Raises
        ------
        ArgumentError
            If the configuration is of another kind.

        Examples
        --------
        >>> config = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
        >>> denoiser = Denoiser.from_diffusers(lambda x, t: x, {**config, "prediction_type": "epsilon"})
        >>> denoiser.predicts, denoiser.schedule.t_max
        ('eps', 999.0)
        """
        config = scheduler if isinstance(scheduler, Mapping) else getattr(scheduler, "config", None)
        if not isinstance(config, Mapping):
            raise checks.ArgumentTypeError(
                f"scheduler is a {type(scheduler).__name__}; allowed: a scheduler of diffusers or its configuration. Pass "
                "pipeline.scheduler."
            )
        steps = int(config.get("num_train_timesteps", 1000))
        if config.get("prediction_type") == "flow_prediction" or (
            "shift" in config and "beta_schedule" not in config
        ):
            return cls._around(
                model,
                lambda x, t: _first_answer(model(x, t * steps, **inputs), x),
                FlowSchedule(1.0),
                "velocity",
            )
        table = getattr(scheduler, "alphas_cumprod", None)
        products = _alphas_cumprod(config, steps) if table is None else table.double().cpu()
        # Rescaled to end without signal (some schedulers put a number of their own there): a little must be left to divide by.
        if products[-1] <= 0 or config.get("rescale_betas_zero_snr", False):
            products = torch.cat([products[:-1], products[-2:-1] / 4])
        schedule = DiscreteSchedule(products)
        predicts = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
        kind = checks.one_of("prediction_type", config.get("prediction_type", "epsilon"), predicts)
        return cls._around(
            model,
            lambda x, t: _first_answer(model(x, t, **inputs), x),
            schedule,
            predicts[kind],  # type: ignore[arg-type]
        )

    @classmethod
    def from_edm(cls, network: Callable[..., Tensor], *, sigma_max: float = 80.0, **inputs: Any) -> Denoiser:
        """Return the denoiser of an EDM-style network, ``D(x, sigma) -> x0`` with its scalings inside.

        Parameters
        ----------
        network : callable
            ``network(x, sigma, **inputs)`` with one sigma a row.
        sigma_max : float
            The largest noise it knows, and the last time.
        **inputs
            What else the network takes, as ``class_labels``.

        Examples
        --------
        >>> Denoiser.from_edm(lambda x, sigma: x / (1 + sigma[:, None] ** 2)).schedule.t_max
        80.0
        """
        return cls._around(network, lambda x, t: network(x, t, **inputs), EDMSchedule(sigma_max), "x0")

    @classmethod
    def _around(
        cls,
        network: Callable[..., Any],
        fun: Callable[[Tensor, Tensor], Tensor],
        schedule: Schedule,
        predicts: Prediction,
    ) -> Denoiser:
        """Return the denoiser of a function that calls a network in its own way."""
        made = cls(fun, schedule, predicts)
        made.network = network
        return made

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """Return the network's own answer at one time, or one time a row."""
        if isinstance(t, Tensor):
            rows = t.to(x.device, x.dtype)
            rows = rows.expand(len(x)) if rows.ndim == 0 else rows
        else:
            # Filled where it is needed: nothing is copied to a device, and nothing waits for it.
            rows = x.new_full((len(x),), t)
        self.nfev += len(x)
        self.n_calls += 1
        return checks.answer("the network", self.fun(x, rows), x)

    def predict(self, x: Tensor, t: Time, what: Prediction) -> Tensor:
        """Return the prediction in the parametrisation ``what``."""
        answer = self(x, t)
        if what == self.predicts:
            return answer
        return convert_prediction(answer, x, t, self.schedule, self.predicts, what)

    def x0(self, x: Tensor, t: Time) -> Tensor:
        """Return the predicted data, E[x0 | x_t]."""
        return self.predict(x, t, "x0")

    def eps(self, x: Tensor, t: Time) -> Tensor:
        """Return the predicted noise."""
        return self.predict(x, t, "eps")

    def v(self, x: Tensor, t: Time) -> Tensor:
        """Return alpha eps - sigma x0."""
        return self.predict(x, t, "v")

    def score(self, x: Tensor, t: Time) -> Tensor:
        """Return the score of the noisy marginal."""
        return self.predict(x, t, "score")

    def velocity(self, x: Tensor, t: Time) -> Tensor:
        """Return the probability-flow velocity dx/dt."""
        return self.predict(x, t, "velocity")


def convert_prediction(
    prediction: Tensor, x: Tensor, t: Time, schedule: Schedule, source: Prediction, to: Prediction
) -> Tensor:
    """Convert a prediction at ``x`` between parametrisations.

    Parameters
    ----------
    prediction, x : Tensor, shape (n, ...)
        The prediction and the noisy state that it belongs to.
    t : float or Tensor of shape () or (n,)
        Time, with sigma(t) > 0 (and alpha(t) > 0 to get ``x0`` from the noise).
    schedule : Schedule
        Gives alpha and sigma.
    source, to : {"x0", "eps", "v", "score", "velocity"}
        From what to what.

    Returns
    -------
    Tensor, shape of ``x``

    Notes
    -----
    Each source is first solved, with ``x = alpha x0 + sigma eps``, for one of x0 and eps.
    """
    checks.one_of("source", source, _PREDICTIONS)
    checks.one_of("to", to, _PREDICTIONS)
    alpha, sigma = _row(schedule.alpha(t), x), _row(schedule.sigma(t), x)
    if source == to:
        return prediction
    if source == "x0":
        x0, eps = prediction, (x - alpha * prediction) / sigma
    elif source == "v":
        norm = alpha**2 + sigma**2
        x0, eps = (alpha * x - sigma * prediction) / norm, (sigma * x + alpha * prediction) / norm
    elif source == "velocity":
        alpha_rate, sigma_rate = (_row(r, x) for r in schedule.rates(t))
        determinant = alpha * sigma_rate - sigma * alpha_rate
        x0 = (sigma_rate * x - sigma * prediction) / determinant
        eps = (alpha * prediction - alpha_rate * x) / determinant
    else:
        eps = prediction if source == "eps" else -sigma * prediction
        x0 = (x - sigma * eps) / alpha
    if to == "x0":
        return x0
    if to == "eps":
        return eps
    if to == "score":
        return -eps / sigma
    if to == "v":
        return alpha * eps - sigma * x0
    alpha_rate, sigma_rate = (_row(r, x) for r in schedule.rates(t))
    return alpha_rate * x0 + sigma_rate * eps


def ddim_step(x: Tensor, eps: Tensor, schedule: Schedule, s: Time, t: Time) -> Tensor:
    """Return the state at ``t`` from that at ``s`` along a constant noise prediction.

    ``x_t = (alpha_t / alpha_s) x + alpha_t (lam_t - lam_s) eps``: one Euler step of ``dz/dlam = eps``.
    """
    alpha_t = schedule.alpha(t)
    return (alpha_t / schedule.alpha(s)) * x + (alpha_t * (schedule.lam(t) - schedule.lam(s))) * eps


def _alphas_cumprod(config: Mapping[str, Any], steps: int) -> Tensor:
    """Return the squared alphas of a configuration of diffusers."""
    if config.get("trained_betas") is not None:
        betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
        return _rescaled(torch.cumprod(1 - betas, 0), config)
    kind = checks.one_of(
        "beta_schedule",
        config.get("beta_schedule", "linear"),
        ("linear", "scaled_linear", "squaredcos_cap_v2"),
    )
    if kind == "squaredcos_cap_v2":
        grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        bar = torch.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
        return _rescaled(torch.cumprod(1 - (1 - bar[1:] / bar[:-1]).clamp_max(0.999), 0), config)
    if not {"beta_start", "beta_end"} <= set(config):
        raise checks.ArgumentError(
            f"the configuration has {', '.join(sorted(map(str, config)))[:200] or 'no entries'}; allowed: one with beta_start and "
            "beta_end, trained_betas, or that of flow matching. Wrap an EDM network with Denoiser.from_edm."
        )
    power = 0.5 if kind == "scaled_linear" else 1.0
    first, last = (float(config[name]) ** power for name in ("beta_start", "beta_end"))
    betas = torch.linspace(first, last, steps, dtype=torch.float64) ** (1 / power)
    return _rescaled(torch.cumprod(1 - betas, 0), config)


def _rescaled(products: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return the squared alphas, moved to end without signal if the configuration asks for it."""
    if not config.get("rescale_betas_zero_snr", False):
        return products
    root = products.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def _first_answer(answer: Any, x: Tensor) -> Tensor:
    """Return the prediction among what a model of diffusers answers."""
    found = answer.sample if hasattr(answer, "sample") else answer
    found = found[0] if isinstance(found, tuple) else found
    if x.ndim > 1 and found.shape[1] == 2 * x.shape[1]:
        found = found[:, : x.shape[1]]
    return found


def _row(values: Tensor, x: Tensor) -> Tensor:
    """Shape one value a row for broadcasting over ``x``; leave a scalar as it is."""
    if values.ndim == 0:
        return values
    return values.to(device=x.device, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
