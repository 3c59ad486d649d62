"""Stochastic interpolants: flows and diffusions between any two laws from one pair of regressions.

Use it to carry one data set to another, or noise to data, and to choose after training how much noise the paths have.
Albergo, Boffi and Vanden-Eijnden (2023), Stochastic Interpolants: A Unifying Framework for Flows and Diffusions,
arXiv:2303.08797.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from perturbkit.core import Cost, SampleResult, checks
from perturbkit.core.random import Seed, as_generator, rademacher, randn, uniform

__all__ = ["StochasticInterpolant"]

Field = Callable[[Tensor, Tensor], Tensor]
_PATHS = ("linear", "trigonometric", "encoding-decoding")
_GAMMAS = ("brownian", "sin2", "zero")


class _Coefficients(NamedTuple):
    """a, b and gamma with their time derivatives."""

    a: Tensor
    b: Tensor
    gamma: Tensor
    a_rate: Tensor
    b_rate: Tensor
    gamma_rate: Tensor


class StochasticInterpolant:
    r"""A random path between two laws, the regressions for its velocity and noise, and the processes that they drive.

    Parameters
    ----------
    path : {"linear", "trigonometric", "encoding-decoding"}
        ``a, b``: ``1 - t, t``; a quarter wave ``cos(pi t / 2), sin(pi t / 2)``; or ``cos(pi t)^2`` before t = 1/2 for a and after it
        for b, which passes through pure noise.
    gamma : {"brownian", "sin2", "zero"}
        Noise on the way: ``sqrt(2 t (1 - t))``, ``sin(pi t)^2`` or none (flow matching).

    Raises
    ------
    ArgumentError
        If a name is unknown, or the path through pure noise is given none.

    Notes
    -----
    :math:`x_t = a x_0 + b x_1 + \gamma z`, z standard normal. The velocity :math:`b(x, t) = E[\dot x_t | x_t = x]` minimises
    :meth:`velocity_loss`, the denoiser :math:`\eta(x, t) = E[z | x_t = x]` minimises :meth:`denoiser_loss`, and the score is
    :math:`-\eta / \gamma`. For every :math:`\epsilon \ge 0` the process :math:`dx = (b + \epsilon s) dt + \sqrt{2 \epsilon}\, dW` has the
    law of :math:`x_t` at every time. The error of the generated law is controlled by the two losses for
    :math:`\epsilon > 0`, not for the flow.

    A network is called ``net(x, t)`` with t of shape (n,).

    References
    ----------
    Albergo, Boffi and Vanden-Eijnden (2023), arXiv:2303.08797.

    Examples
    --------
    >>> path = StochasticInterpolant()
    >>> def velocity(x, t):  # from N(0, 1) to N(4, 1): the variance t^2 + (1 - t)^2 + 2 t (1 - t) stays 1
    ...     return torch.full_like(x, 4.0)
    >>> path.solve(velocity, torch.zeros(2, 1), torch.linspace(0, 1, 5)).x
    tensor([[4.],
            [4.]])
    """

    def __init__(
        self,
        path: Literal["linear", "trigonometric", "encoding-decoding"] = "linear",
        gamma: Literal["brownian", "sin2", "zero"] = "brownian",
    ) -> None:
        self.path = checks.one_of("path", path, _PATHS)
        self.gamma = checks.one_of("gamma", gamma, _GAMMAS)
        if path == "encoding-decoding" and gamma == "zero":
            raise checks.ArgumentError(
                "gamma is 'zero' on the path 'encoding-decoding'; allowed: 'brownian', 'sin2', since nothing else is left at "
                "t = 1/2. Choose one of these."
            )

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return a, b, gamma and their time derivatives, each in the shape of ``t``, in [0, 1]."""
        checks.tensor("t", t)
        checks.between("t", float(t.min()), 0, 1)
        checks.between("t", float(t.max()), 0, 1)
        return self._coefficients(t)

    def sample_path(
        self, x0: Tensor, x1: Tensor, t: Tensor, generator: Seed = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the state of each pair at its time.

        Parameters
        ----------
        x0, x1 : Tensor, shape (n, ...)
            Pairs of start and end.
        t : Tensor, shape (n,)
            Times in (0, 1).
        generator : torch.Generator, int or None
            Source of z.

        Returns
        -------
        tuple of Tensor, shape (n, ...)
            ``x_t``, its time derivative, and ``z``.
        """
        self._check(x0, x1, t)
        z = randn(x0.shape, generator=as_generator(generator), like=x0)
        c = self._rows(t, x0)
        return (
            c.a * x0 + c.b * x1 + c.gamma * z,
            c.a_rate * x0 + c.b_rate * x1 + c.gamma_rate * z,
            z,
        )

    def velocity_loss(
        self,
        net: Field,
        x0: Tensor,
        x1: Tensor,
        *,
        t: Tensor | None = None,
        antithetic: bool = True,
        generator: Seed = None,
    ) -> Tensor:
        """Return the loss whose minimiser is the velocity.

        Parameters
        ----------
        net : callable (x, t) -> Tensor
            The network under training.
        x0, x1 : Tensor, shape (n, ...)
            Draws of the two laws, paired as they come.
        t : Tensor of shape (n,), optional
            Times in (0, 1); uniform by default.
        antithetic : bool
            Take the mean over z and -z. Near both ends ``gamma'`` grows without bound for "brownian", and without pairs so does
            the variance; it costs two calls.
        generator : torch.Generator, int or None
            Source of times and z.

        Returns
        -------
        Tensor, shape ()
            Mean over rows of ``|net|^2 / 2 - x_t' . net``.
        """
        c, z, times, still, rate = self._prepared(x0, x1, t, generator)
        total = torch.zeros((), dtype=x0.dtype, device=x0.device)
        for sign in (1.0, -1.0) if antithetic else (1.0,):
            answer = net(still + sign * c.gamma * z, times)
            total = total + _regression(answer, rate + sign * c.gamma_rate * z)
        return total / 2 if antithetic else total

    def denoiser_loss(
        self, net: Field, x0: Tensor, x1: Tensor, *, t: Tensor | None = None, generator: Seed = None
    ) -> Tensor:
        """Return the loss whose minimiser is ``E[z | x_t]``: the mean over rows of ``|net|^2 / 2 - z . net``.

        The arguments are those of :meth:`velocity_loss`.
        """
        c, z, times, still, _ = self._prepared(x0, x1, t, generator)
        return _regression(net(still + c.gamma * z, times), z)

    def score(self, denoiser: Field) -> Field:
        """Return the score ``-eta / gamma`` of a denoiser, for times inside (0, 1)."""
        if self.gamma == "zero":
            raise checks.ArgumentError(
                "gamma is 'zero', with which a denoiser knows no score; allowed: 'brownian', 'sin2'. Solve with diffusion=0."
            )
        return lambda x, t: -denoiser(x, self._check(x, x, t)) / self._rows(t, x).gamma

    def solve(
        self,
        velocity: Field,
        x: Tensor,
        times: Tensor,
        *,
        score: Field | None = None,
        diffusion: float | Callable[[float], float] = 0.0,
        generator: Seed = None,
    ) -> SampleResult:
        """Follow the flow, or a diffusion of the same laws, forward or backward.

        Parameters
        ----------
        velocity : callable (x, t) -> Tensor
            The velocity.
        x : Tensor, shape (n, ...)
            States at ``times[0]``.
        times : Tensor, shape (steps + 1,)
            Monotone in [0, 1]: increasing from the first law to the second, decreasing back. With noise, keep to about
            [0.001, 0.999], since scores learnt by a denoiser are singular at the ends.
        score : callable (x, t) -> Tensor, optional
            The score, needed with noise.
        diffusion : float or callable t -> float
            ``epsilon``, zero or above.
        generator : torch.Generator, int or None
            Source of the noise.

        Returns
        -------
        SampleResult

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If the times are not monotone, or there is noise without a score.

        Notes
        -----
        Heun's steps with additive noise: two calls of each field a step, of second order for the flow.
        """
        checks.tensor("x", x)
        _check_times(times)
        epsilon = diffusion if callable(diffusion) else _constant(checks.nonnegative("diffusion", diffusion))
        if score is None and (callable(diffusion) or diffusion > 0):
            raise checks.ArgumentError(
                "score is None with diffusion; allowed: a callable (x, t). Pass score=interpolant.score(denoiser), or "
                "diffusion=0."
            )
        g, grid = as_generator(generator), times.detach().double().tolist()
        way = 1.0 if grid[-1] > grid[0] else -1.0

        def drift(x: Tensor, t: float, level: float) -> Tensor:
            out = _asked("velocity", velocity, x, t)
            return out if score is None or level == 0 else out + way * level * _asked("score", score, x, t)

        for s, t in pairwise(grid):
            first, last = (checks.nonnegative("diffusion", epsilon(at)) for at in (s, t))
            spread = math.sqrt((first + last) * abs(t - s))
            noise = spread * randn(x.shape, generator=g, like=x) if spread > 0 else 0.0
            slope = drift(x, s, first)
            ahead = drift(x + (t - s) * slope + noise, t, last)
            x = x + 0.5 * (t - s) * (slope + ahead) + noise
        calls = (2 if score is None else 4) * (len(grid) - 1)
        return SampleResult(x, times.detach().cpu(), Cost(nfev=calls * len(x)))

    def log_prob(
        self,
        velocity: Field,
        x: Tensor,
        times: Tensor,
        *,
        base: Callable[[Tensor], Tensor] | None = None,
        divergence: Literal["exact", "hutchinson"] = "exact",
        generator: Seed = None,
    ) -> Tensor:
        """Return the log density, under the flow, of states at the last time.

        Parameters
        ----------
        velocity : callable (x, t) -> Tensor
            The velocity, differentiable in x.
        x : Tensor, shape (n, d)
            States at ``times[-1]``.
        times : Tensor, shape (steps + 1,)
            Increasing times in [0, 1].
        base : callable, optional
            Log density, (n, d) -> (n,), at ``times[0]``; standard normal by default.
        divergence : {"exact", "hutchinson"}
            d vector-Jacobian products a call, or one with a random probe.
        generator : torch.Generator, int or None
            Source of the probe, one for the whole path.

        Returns
        -------
        Tensor, shape (n,)

        Notes
        -----
        ``log p_1(x_1) = log p_0(x_0) - int div b dt`` along the flow back from ``x``, by Heun's steps.
        """
        checks.tensor("x", x, ndim=2)
        _check_times(times)
        checks.one_of("divergence", divergence, ("exact", "hutchinson"))
        grid = times.detach().double().sort().values.flip(0).tolist()
        if divergence == "exact":
            probes = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)[:, None].expand(-1, len(x), -1)
        else:
            g = as_generator(generator)
            probes = rademacher((1, *x.shape), generator=g, device=x.device, dtype=x.dtype)
        total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for s, t in pairwise(grid):
            slope, first = _with_divergence(velocity, x, s, probes)
            ahead, last = _with_divergence(velocity, x + (t - s) * slope, t, probes)
            x = x + 0.5 * (t - s) * (slope + ahead)
            total = total + 0.5 * (t - s) * (first + last)
        start = -0.5 * (x.square() + math.log(2 * math.pi)).sum(1) if base is None else base(x)
        # The time runs backward here, so that the integral has the other sign already.
        return start + total

    def _coefficients(self, t: Tensor) -> _Coefficients:
        if self.path == "linear":
            a, b, a_rate, b_rate = 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        elif self.path == "trigonometric":
            half = math.pi / 2
            a, b = (half * t).cos(), (half * t).sin()
            a_rate, b_rate = -half * b, half * a
        else:
            wave, rate = (math.pi * t).cos() ** 2, -math.pi * (2 * math.pi * t).sin()
            early, late = (t < 0.5).to(t.dtype), (t >= 0.5).to(t.dtype)
            a, b, a_rate, b_rate = early * wave, late * wave, early * rate, late * rate
        if self.gamma == "brownian":
            gamma = (2 * t * (1 - t)).sqrt()
            gamma_rate = (1 - 2 * t) / gamma
        elif self.gamma == "sin2":
            gamma, gamma_rate = (math.pi * t).sin() ** 2, math.pi * (2 * math.pi * t).sin()
        else:
            gamma, gamma_rate = torch.zeros_like(t), torch.zeros_like(t)
        return _Coefficients(a, b, gamma, a_rate, b_rate, gamma_rate)

    def _rows(self, t: Tensor, x: Tensor) -> _Coefficients:
        shape = (-1, *[1] * (x.ndim - 1))
        return _Coefficients(*(v.to(x).reshape(shape) for v in self._coefficients(t)))

    def _prepared(
        self, x0: Tensor, x1: Tensor, t: Tensor | None, generator: Seed
    ) -> tuple[_Coefficients, Tensor, Tensor, Tensor, Tensor]:
        """Return coefficients, z and times, and the state and its derivative without noise."""
        g = as_generator(generator)
        checks.tensor("x0", x0)
        # A uniform draw may be 0, where gamma' is infinite.
        tiny = torch.finfo(x0.dtype).eps
        times = uniform((len(x0),), generator=g, like=x0).clamp(tiny, 1 - tiny) if t is None else t
        self._check(x0, x1, times)
        c = self._rows(times, x0)
        z = randn(x0.shape, generator=g, like=x0)
        return c, z, times, c.a * x0 + c.b * x1, c.a_rate * x0 + c.b_rate * x1

    @staticmethod
    def _check(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        checks.same_shape("x1", checks.tensor("x1", x1), "x0", checks.tensor("x0", x0))
        checks.tensor("t", t, shape=(len(x0),))
        checks.between("t", float(t.min()), 0, 1, inclusive="neither")
        checks.between("t", float(t.max()), 0, 1, inclusive="neither")
        return t


def _regression(out: Tensor, target: Tensor) -> Tensor:
    return (out.square() / 2 - target * checks.answer("net", out, target)).reshape(len(out), -1).sum(1).mean()


def _asked(name: str, field: Field, x: Tensor, t: float) -> Tensor:
    return checks.answer(name, field(x, x.new_full((len(x),), t)), x)


def _constant(value: float) -> Callable[[float], float]:
    return lambda t: value


def _with_divergence(velocity: Field, x: Tensor, t: float, probes: Tensor) -> tuple[Tensor, Tensor]:
    """Return a velocity and the sum over probes v of v . J v, without a graph."""
    with torch.enable_grad():
        rows = x.detach().requires_grad_()
        out = _asked("velocity", velocity, rows, t)
        trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        if out.requires_grad:  # else it does not depend on x
            for probe in probes:
                (product,) = torch.autograd.grad(out, rows, probe, retain_graph=True)
                trace = trace + (product * probe).sum(1)
    return out.detach(), trace


def _check_times(times: Tensor) -> None:
    checks.tensor("times", times, ndim=1)
    steps = times.diff()
    inside = float(times.min()) >= 0 and float(times.max()) <= 1
    if len(times) < 2 or not (bool((steps > 0).all()) or bool((steps < 0).all())) or not inside:
        raise checks.ArgumentError(
            f"times has {len(times)} values from {float(times[0]):g} to {float(times[-1]):g}; allowed: at least two, strictly "
            "monotone, in [0, 1]. Use torch.linspace."
        )
