"""Conditional variational diffusion: the noise schedule is learned with the denoiser, element by element, given a measurement.

Use it for inverse problems where no schedule is known to suit and tuning one is dear. Della Maggiora, Croquevielle, Deshpande,
Horsley, Heinis and Yakimovich (2024), Conditional Variational Diffusion Models, arXiv:2312.02246.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from perturbkit.core import Cost, SampleResult, checks
from perturbkit.core.random import Seed, as_generator, randn, uniform

__all__ = ["LearnedSchedule", "cvdm_loss", "sample_cvdm"]

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# The ends of the signal fraction: its logarithm, and that of what it leaves, stay finite.
_LOW, _HIGH = 1e-6, 0.99999


class ConditionalSchedule(Protocol):
    """What the loss and the sampler ask of a schedule; times are of shape (n, 1), answers broadcast to (n, dim)."""

    def signal_fraction(self, t: Tensor, condition: Tensor | None) -> Tensor:
        """Return ``alpha(t)^2``, from one at t = 0 to zero at t = 1."""
        ...

    def rate(self, t: Tensor, condition: Tensor | None) -> Tensor:
        """Return the rate at which noise comes in, ``-d log alpha^2 / dt``."""
        ...


class LearnedSchedule(nn.Module):
    """A variance-preserving schedule on [0, 1] with a learned course, scaled by a function of the condition.

    Parameters
    ----------
    dim : int
        Numbers a row of data, at least 1.
    condition_dim : int
        Numbers of the condition; 0: none.
    hidden : int
        Width of the networks.
    elementwise : bool
        Whether every element has its own speed; otherwise all of a row share one.

    Raises
    ------
    ArgumentError
        If a size is not allowed.

    Notes
    -----
    With ``L(c) = softplus(net(c)) > 0`` and increasing functions of time,

        G(t, c) = exp(-L(c) tau_G(t)),  clamped to [1e-6, 0.99999],        B(t, c) = L(c) tau_B(t),

    each ``tau(t) = t softplus(a t + b + sum_k w_k sigmoid(u_k t + v_k))`` with ``a, w, u >= 0``, so that ``tau(0) = 0``. Fraction and
    rate are learned apart; :func:`cvdm_loss` draws ``B`` to ``-d log G / dt``. At first ``G(1)`` is about 5e-6.

    References
    ----------
    Della Maggiora et al. (2024), arXiv:2312.02246, section 3.

    Examples
    --------
    >>> schedule = LearnedSchedule(3, condition_dim=2)
    >>> schedule.signal_fraction(torch.rand(5, 1), torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """

    def __init__(
        self, dim: int, condition_dim: int = 0, *, hidden: int = 64, elementwise: bool = True
    ) -> None:
        super().__init__()
        checks.integer("dim", dim, low=1)
        self.condition_dim = checks.integer("condition_dim", condition_dim, low=0)
        checks.integer("hidden", hidden, low=1)
        self.elements = n = dim if elementwise else 1
        self.speed: nn.Module = (
            nn.Sequential(nn.Linear(condition_dim, hidden), nn.SiLU(), nn.Linear(hidden, n))
            if condition_dim
            else _Free(n)
        )
        self.fraction_course, self.rate_course = _Increasing(hidden), _Increasing(hidden)

    def signal_fraction(self, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return (-self._speed(condition) * self.fraction_course(t)).exp().clamp(_LOW, _HIGH)

    def rate(self, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self._speed(condition) * self.rate_course(t)

    def with_slopes(self, t: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the signal fraction and its first two time derivatives."""
        speed, (course, rate, bend) = self._speed(condition), self.fraction_course.with_slopes(t)
        whole = (-speed * course).exp()
        fraction = whole.clamp(_LOW, _HIGH)
        # Where it is clamped it stands still.
        moving = whole * ((whole >= _LOW) & (whole <= _HIGH))
        down = speed * rate
        return fraction, -down * moving, (down.square() - speed * bend) * moving

    def _speed(self, condition: Tensor | None) -> Tensor:
        if not self.condition_dim:
            return softplus(self.speed(None) + 10.0)
        if condition is None or condition.ndim != 2 or condition.shape[1] != self.condition_dim:
            shown = "None" if condition is None else f"of shape {tuple(condition.shape)}"
            raise checks.ArgumentError(
                f"condition is {shown}; allowed: (n, {self.condition_dim}). Pass one condition a row."
            )
        return softplus(self.speed(condition) + 10.0)


def cvdm_loss(
    network: Network,
    schedule: ConditionalSchedule,
    x0: Tensor,
    condition: Tensor | None = None,
    *,
    reg: float = 1e-3,
    taylor_order: int = 3,
    weights: tuple[float, float, float, float] = (1.0, 2.0, 2.0, 2.0),
    generator: Seed = None,
) -> dict[str, Tensor]:
    """Return the parts of the joint loss of a denoiser and its schedule.

    Parameters
    ----------
    network : callable
        ``network(x_t, G, condition) -> noise``; ``x_t`` and the signal fraction ``G`` have shape (n, dim).
    schedule : LearnedSchedule or other ConditionalSchedule
        In training; one without parameters is taken as it is.
    x0 : Tensor, shape (n, dim)
        Clean data, of about unit size.
    condition : Tensor, shape (n, condition_dim), optional
        What is known of each row.
    reg : float
        Weight of the steepness before that of ``weights``, at least 0.
    taylor_order : int
        Terms of the signal-to-noise ratio's series, at least 1.
    weights : four floats
        Of the noise, the consistency, the prior and the steepness, at least 0.
    generator : torch.Generator, int or None
        Source of times and noise.

    Returns
    -------
    dict of str to Tensor
        "noise", "consistency", "prior", "steepness" and their weighted "total", each one number with its graph.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    With ``x_t = sqrt(G) x0 + sqrt(1 - G) eps`` at a uniform time,

        noise       = |eps - eps_theta(x_t, G, c)|^2
        consistency = (dG/dt + B G)^2 + (G(0) - 1)^2 + G(1)^2
        prior       = KL(x_1 | x0 to N(0, 1))
        steepness   = (d^2/dt^2 sum_{k <= order} G^k)^2,

    averaged over rows and elements. The sum is the start of the series of ``G / (1 - G)``: without it the schedule may put all noise
    into one moment. The loss is not weighted by the signal-to-noise ratio.

    Cost: one call of the network; the schedule at three times and two derivatives in time, by hand for a
    :class:`LearnedSchedule` and by automatic differentiation forwards for others.

    References
    ----------
    Della Maggiora et al. (2024), arXiv:2312.02246, equations 10 to 14.

    Examples
    --------
    >>> schedule = LearnedSchedule(3)
    >>> found = cvdm_loss(lambda x, G, c: torch.zeros_like(x), schedule, torch.zeros(2000, 3), generator=0)
    >>> round(float(found["noise"]), 1), sorted(found)
    (1.0, ['consistency', 'noise', 'prior', 'steepness', 'total'])
    """
    checks.tensor("x0", x0, ndim=2)
    if condition is not None:
        checks.tensor("condition", condition, ndim=2, shape=(len(x0), condition.shape[1]))
    if isinstance(schedule, LearnedSchedule) and schedule.elements not in (1, x0.shape[1]):
        raise checks.ArgumentError(
            f"schedule is of {schedule.elements} elements and x0 of {x0.shape[1]}; allowed: as many. Build LearnedSchedule({x0.shape[1]})."
        )
    checks.nonnegative("reg", reg)
    checks.integer("taylor_order", taylor_order, low=1)
    if len(weights) != 4:
        raise checks.ArgumentError(
            f"weights has {len(weights)} numbers; allowed: four. Pass (noise, consistency, prior, steepness)."
        )
    for w in weights:
        checks.nonnegative("weights", w)
    g = as_generator(generator)
    t = uniform((len(x0), 1), generator=g, like=x0)
    eps = randn(x0.shape, generator=g, like=x0)

    def fraction_at(t: Tensor) -> Tensor:
        return schedule.signal_fraction(t, condition).expand(x0.shape)

    # Where a subclass has a fraction of its own, the slopes by hand are those of another.
    if (
        isinstance(schedule, LearnedSchedule)
        and type(schedule).signal_fraction is LearnedSchedule.signal_fraction
    ):
        fraction, slope, bend = (v.expand(x0.shape) for v in schedule.with_slopes(t, condition))
    else:
        fraction, slope, bend = _with_slopes(fraction_at, t)
    # d^2/dt^2 G^k = k G^(k - 1) G'' + k (k - 1) G^(k - 2) G'^2.
    steep = sum(
        (
            k * fraction ** (k - 1) * bend + k * (k - 1) * fraction ** max(k - 2, 0) * slope**2
            for k in range(2, taylor_order + 1)
        ),
        start=bend,
    )
    noisy = fraction.sqrt() * x0 + (1 - fraction).sqrt() * eps
    ends = [fraction_at(torch.full_like(t, end)) for end in (0.0, 1.0)]
    drift = slope + schedule.rate(t, condition) * fraction
    last = ends[1]
    parts = {
        "noise": (checks.answer("network", network(noisy, fraction, condition), x0) - eps).square().mean(),
        "consistency": (drift.square() + (ends[0] - 1).square() + last.square()).mean(),
        "prior": 0.5 * (last * x0.square() - last - torch.log1p(-last)).mean(),
        "steepness": reg * steep.square().mean(),
    }
    return parts | {"total": torch.stack([w * p for w, p in zip(weights, parts.values(), strict=True)]).sum()}


def sample_cvdm(
    network: Network,
    schedule: ConditionalSchedule,
    x: Tensor,
    condition: Tensor | None = None,
    *,
    n_steps: int = 100,
    bounds: tuple[float, float] | None = None,
    generator: Seed = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> SampleResult:
    """Draw from the learned reverse chain.

    Parameters
    ----------
    network, schedule
        As in :func:`cvdm_loss`, trained.
    x : Tensor, shape (n, dim)
        Standard normal noise.
    condition : Tensor, shape (n, condition_dim), optional
        What is known of each row.
    n_steps : int
        Steps, at least 1.
    bounds : (float, float), optional
        Range of the data; guesses of them outside are cut off. While little signal is left a guess divides the network's error
        by ``sqrt(G)``, and an unbounded one can run away.
    generator : torch.Generator, int or None
        Source of the fresh noise.
    callback : callable, optional
        Called as ``callback(i, x)`` after step ``i``.

    Returns
    -------
    SampleResult
        The last guess of the data in ``x``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    Step ``i`` of the forward chain keeps ``a_i = 1 - B(t_i, c) / n`` of the signal, the rate taken in its middle and clamped so that
    ``a_i`` is in [1e-6, 0.99999]; ``G_i`` is the product of the first ``i``. The reverse step is the posterior of that chain at the
    guess ``x0 = (x - sqrt(1 - G_i) eps) / sqrt(G_i)``:

        x_{i-1} = sqrt(G_{i-1}) x0 + sqrt(1 - G_{i-1} - v_i) eps + sqrt(v_i) z,    v_i = (1 - a_i)(1 - G_{i-1}) / (1 - G_i).

    Cost: one call of the network a step.

    References
    ----------
    Della Maggiora et al. (2024), arXiv:2312.02246; the step as in the authors' code.

    Examples
    --------
    >>> sample_cvdm(lambda x, G, c: x, LearnedSchedule(2), torch.zeros(3, 2), n_steps=4, generator=0).x.shape
    torch.Size([3, 2])
    """
    checks.tensor("x", x, ndim=2)
    if condition is not None:
        checks.tensor("condition", condition, ndim=2, shape=(len(x), condition.shape[1]))
    n = checks.integer("n_steps", n_steps, low=1)
    if bounds is not None and not bounds[0] < bounds[1]:
        raise checks.ArgumentError(
            f"bounds is {bounds}; allowed: low below high. Pass for instance (-1.0, 1.0)."
        )
    g = as_generator(generator)
    with torch.no_grad():
        middles = [x.new_full((len(x), 1), (i + 0.5) / n) for i in range(n)]
        kept = torch.stack(
            [(1 - schedule.rate(t, condition) / n).clamp(_LOW, _HIGH).expand(x.shape) for t in middles]
        )
        fractions = kept.cumprod(0).clamp_min(1e-10)
        for i in reversed(range(n)):
            now = fractions[i]
            eps = checks.answer("network", network(x, now, condition), x)
            x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
            if bounds is not None:
                x0 = x0.clamp(*bounds)
                eps = (x - now.sqrt() * x0) / (1 - now).sqrt()
            x = x0
            if i:
                before = fractions[i - 1]
                variance = (1 - kept[i]) * (1 - before) / (1 - now)
                x = before.sqrt() * x + (1 - before - variance).clamp_min(0).sqrt() * eps
                x = x + variance.sqrt() * randn(x.shape, generator=g, like=x)
            if callback is not None:
                callback(n - 1 - i, x)
    times = torch.linspace(1, 0, n + 1, dtype=torch.float64)
    return SampleResult(x, times, Cost(nfev=n * len(x)), {"signal_fractions": fractions})


class _Free(nn.Module):
    """Numbers that depend on nothing."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(1, n))

    def forward(self, condition: Any) -> Tensor:
        return self.values


class _Increasing(nn.Module):
    """An increasing function of time that is zero at zero, element by element."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.slope, self.level = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        # Steps all over [0, 1], of small weight at first; the raw numbers of what must not be negative go through softplus.
        self.place = nn.Parameter(-torch.linspace(-1, 9, hidden))
        self.speed = nn.Parameter(torch.full((hidden,), 8.0))
        self.weight = nn.Parameter(torch.full((hidden,), -6.0))

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.sigmoid(softplus(self.speed) * t[..., None] + self.place) @ softplus(self.weight)
        return t * softplus(softplus(self.slope) * t + self.level + steps)

    def with_slopes(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the function and its first two derivatives, by hand: nested automatic ones take several times as long."""
        u, w, a = softplus(self.speed), softplus(self.weight), softplus(self.slope)
        s = torch.sigmoid(u * t[..., None] + self.place)
        first = s * (1 - s)
        inner = a * t + self.level + s @ w
        inner_rate, inner_bend = a + first @ (w * u), (first * (1 - 2 * s)) @ (w * u**2)
        p, q = softplus(inner), torch.sigmoid(inner)
        p_rate, p_bend = q * inner_rate, q * ((1 - q) * inner_rate**2 + inner_bend)
        return t * p, p + t * p_rate, 2 * p_rate + t * p_bend


def _with_slopes(function: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return values at times (n, 1) and their first two time derivatives, all elements of a row at the price of one."""
    one = torch.ones_like(t)

    def once(t: Tensor) -> tuple[Tensor, Tensor]:
        value, slope, *_ = torch.func.jvp(function, (t,), (one,))
        return value, slope

    (value, slope), (_, bend), *_ = torch.func.jvp(once, (t,), (one,))
    return value, slope, bend
