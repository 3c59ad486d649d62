"""Perturbed two-point descent: gradients from pairs of evaluations, and noise in every step to leave saddle points.

Use it where only values are to be had and the function has strict saddles: near one, two-point estimates vanish like the
gradient does, and the added noise is what moves on. Ren, Tang and Li (2023), Escaping saddle points in zeroth-order
optimization: the power of two-point estimators, arXiv:2209.13555.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from perturbkit.core import Minimum, Oracle, checks, hessian, lanczos, ritz_values
from perturbkit.core.optimizers import Closure
from perturbkit.core.parameters import perturbed
from perturbkit.core.parameters import step as add_direction
from perturbkit.core.progress import ProgressLike, track
from perturbkit.core.random import Seed, as_generator, mixed_seed, randn
from perturbkit.optim.zeroth._parts import SeededOptimizer, slope, two_sided

__all__ = ["ZeroOrderSGD", "is_second_order", "minimize_perturbed_two_point"]


def minimize_perturbed_two_point(
    fun: Oracle | Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    step: float,
    smoothing: float = 1e-4,
    pairs: int = 1,
    noise: float = 1e-2,
    max_iter: int = 1000,
    target: float | None = None,
    generator: Seed = None,
    progress: ProgressLike = None,
) -> Minimum:
    r"""Minimise a function from pairs of its values, with noise in every step.

    Parameters
    ----------
    fun : Oracle or callable
        ``fun(x) -> values``, shapes (n, d) to (n,); each row is a point.
    x0 : Tensor, shape (d,) or (runs, d)
        Start, or one start a run: the runs are independent and share their batches.
    step : float
        Step size, above 0; about ``1 / (L (1 + d / pairs))`` for a gradient of Lipschitz constant L.
    smoothing : float
        Half the distance of a pair over the length of a direction, in units of x; above 0.
    pairs : int
        Random directions a step, at least 1.
    noise : float
        Root mean square length of the noise that is added to the gradient, zero or above; the accuracy that is wanted of
        the gradient is a good value.
    max_iter : int
        Steps, at least 1.
    target : float, optional
        Stop when the value, as the pairs see it, is this or less in every run. A run that got there stays where it is.
    generator : torch.Generator, int or None
        Source of directions and noise.
    progress : optional
        See :func:`~perturbkit.core.progress.track`.

    Returns
    -------
    Minimum
        ``history`` has the mean of the 2 ``pairs`` values of each step, which costs no evaluation of its own.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed, or the values have another shape.

    Notes
    -----
    :math:`x \leftarrow x - \eta (g + \xi)` with

    .. math:: g = \frac1m \sum_i \frac{f(x + u z_i) - f(x - u z_i)}{2 u} z_i, \quad z_i \sim N(0, I), \quad
        \xi \sim N(0, \sigma^2 I / d)

    fresh in every step, not only where the gradient is small. Any number of pairs reaches a second-order stationary point
    in the same number of evaluations, up to logarithms.

    Cost: ``2 pairs`` evaluations a step and run, in one batch.

    References
    ----------
    Ren, Tang and Li (2023), arXiv:2209.13555, algorithm 1.

    Examples
    --------
    >>> saddle = lambda x: (x[:, 0] ** 2 - x[:, 1] ** 2) / 2 + x[:, 1] ** 4 / 4
    >>> found = minimize_perturbed_two_point(saddle, torch.zeros(2), step=0.1, noise=0.1, max_iter=400, generator=0)
    >>> bool(found.fun < -0.2)  # the minimum is -0.25
    True
    """
    checks.tensor("x0", x0, ndim=(1, 2))
    checks.positive("step", step)
    checks.positive("smoothing", smoothing)
    m = checks.integer("pairs", pairs, low=1)
    checks.nonnegative("noise", noise)
    checks.integer("max_iter", max_iter, low=1)
    if target is not None:
        checks.between("target", target, -math.inf, math.inf)
    g = as_generator(generator)
    oracle = Oracle.wrap(fun)
    before = oracle.cost
    x = x0.detach().clone().reshape(-1, x0.shape[-1])
    runs, d = x.shape
    history: list[Tensor] = []
    going = torch.ones(runs, 1, dtype=torch.bool, device=x.device)
    for _ in track(range(max_iter), "two-point descent", progress=progress):
        z = randn((runs, m, d), generator=g, like=x)
        points = x[:, None, None, :] + smoothing * torch.stack([z, -z], 2)
        values = oracle.value(points.reshape(-1, d)).reshape(runs, m, 2)
        history.append(values.mean((1, 2)))
        if target is not None:
            # Not "above the target": a value that is not a number has not reached it.
            going = going & ~(history[-1] <= target)[:, None]
            if not bool(going.any()):
                break
        slope = (values[:, :, 0] - values[:, :, 1]) / (2 * smoothing)
        estimate = (slope[:, :, None] * z).mean(1)
        if noise > 0:
            estimate = estimate + noise / math.sqrt(d) * randn(x.shape, generator=g, like=x)
        x = torch.where(going, x - step * estimate, x)
    met = target is not None and not bool(going.any())
    message = "every run reached the target" if met else f"{max_iter} steps were taken"
    x = x.reshape(x0.shape)
    fun_at = oracle.value(x.reshape(-1, d)).reshape(x0.shape[:-1])
    values_seen = torch.stack(history).reshape(-1, *x0.shape[:-1])
    return Minimum(x, fun_at, met, message, values_seen, cost=oracle.cost - before)


class ZeroOrderSGD(SeededOptimizer):
    """Perturbed two-point descent of a model's weights, without a backward pass.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups.
    lr : float
        Learning rate, zero or above.
    smoothing : float
        As for :func:`minimize_perturbed_two_point`.
    pairs : int
        Directions a step, at least 1.
    noise : float
        As for :func:`minimize_perturbed_two_point`.
    seed : int
        Seed of directions and noise, zero or above.
    model : nn.Module, optional
        Where given, its buffers are moved by the first evaluation of a step only.

    Raises
    ------
    ArgumentError
        If an option is outside its range.
    ModelError
        In ``step``, if a loss is not finite; the weights are then as before.

    Notes
    -----
    ``w <- w - lr (1 / m sum_i c_i z_i + xi)``. Directions and noise are regenerated from seeds, so that nothing of the
    weights' size is held.

    Cost: ``2 pairs`` evaluations a step; three draws of d numbers for one pair, four a pair for more, and one for the noise.

    References
    ----------
    Ren, Tang and Li (2023), arXiv:2209.13555, algorithm 1.

    Examples
    --------
    >>> w = nn.Parameter(torch.tensor([3.0, -1.0]))
    >>> optimizer = ZeroOrderSGD([w], lr=0.05, noise=0.0)
    >>> for _ in range(200):
    ...     loss = optimizer.step(lambda: w.square().sum())
    >>> bool(w.abs().max() < 0.01)
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        smoothing: float = 1e-3,
        pairs: int = 1,
        noise: float = 1e-2,
        seed: int = 0,
        model: nn.Module | None = None,
    ) -> None:
        self._smoothing = checks.positive("smoothing", smoothing)
        self._pairs = checks.integer("pairs", pairs, low=1)
        self._noise = checks.nonnegative("noise", noise)
        self._seed = checks.integer("seed", seed, low=0)
        super().__init__(params, {"lr": lr}, model)

    @torch.no_grad()
    def step(self, closure: Closure) -> float:  # type: ignore[override]
        """Take one step and return the mean of its losses.

        Parameters
        ----------
        closure : callable
            ``closure() -> loss``; no backward pass is needed.
        """
        t, again, weights = self.advance(), self.replay(closure), self.weights
        seeds = [mixed_seed(self._seed, t, i) for i in range(self._pairs + 1)]
        rates = self.per_weight("lr")
        losses: list[float] = []
        slopes: list[float] = []
        for seed in seeds[1:]:
            with perturbed(weights, seed, self._smoothing) as at:
                plus, minus = two_sided(at, again, self._smoothing)
                losses += (plus, minus)
                slopes.append(slope(plus, minus, self._smoothing) / self._pairs)
                if self._pairs == 1:
                    at.settle([-lr * slopes[0] for lr in rates])
        for seed, c in zip(seeds[1:], slopes if self._pairs > 1 else (), strict=False):
            add_direction(weights, seed, [-lr * c for lr in rates])
        if self._noise > 0:
            length = self._noise / math.sqrt(sum(p.numel() for p in weights))
            add_direction(weights, seeds[0], [-lr * length for lr in rates])
        return sum(losses) / (2 * self._pairs)


def is_second_order(
    fun: Callable[[Tensor], Tensor], x: Tensor, epsilon: float, rho: float, *, generator: Seed = None
) -> bool:
    r"""Return whether a point is second-order stationary.

    Parameters
    ----------
    fun : callable
        ``fun(x) -> value``, shapes (d,) to (); twice differentiable.
    x : Tensor, shape (d,)
        The point.
    epsilon : float
        Accuracy, above 0.
    rho : float
        Lipschitz constant of the Hessian, zero or above.
    generator : torch.Generator, int or None
        Source of the first Lanczos vector.

    Returns
    -------
    bool

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`|\nabla f| \le \epsilon` and :math:`\lambda_{\min}(\nabla^2 f) \ge -\sqrt{\rho \epsilon}`, by up to 100 Lanczos steps
    on products with the Hessian.

    References
    ----------
    Ren, Tang and Li (2023), arXiv:2209.13555, definition 2.

    Examples
    --------
    >>> saddle = lambda x: x[0] ** 2 - x[1] ** 2
    >>> is_second_order(saddle, torch.zeros(2), 0.01, 1.0)
    False
    """
    checks.tensor("x", x, ndim=1)
    checks.positive("epsilon", epsilon)
    checks.nonnegative("rho", rho)
    leaf = x.detach().requires_grad_(True)
    with torch.enable_grad():
        value = fun(leaf)
    if not isinstance(value, Tensor) or value.shape != ():
        shown = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise checks.ArgumentError(
            f"fun answered {shown}; allowed: a tensor of shape (). Return one value for one point."
        )
    (gradient,) = torch.autograd.grad(value, leaf)
    if not float(gradient.norm()) <= epsilon:
        return False
    start = randn(x.shape, generator=as_generator(generator), like=x)
    alpha, beta, _ = lanczos(hessian(fun, x.detach()), start, min(len(x), 100))
    return bool(ritz_values(alpha, beta)[0] >= -math.sqrt(rho * epsilon))
