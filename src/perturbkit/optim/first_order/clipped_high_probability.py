"""Clipped stochastic methods whose errors hold with high probability under heavy-tailed noise.

Use them where single gradients may be arbitrarily large: the noise needs a moment of order between one and two only. Sadiev,
Danilova, Gorbunov, Horvath, Gidel, Dvurechensky, Gasnikov and Richtarik (2023), High-Probability Bounds for Stochastic
Optimization and Variational Inequalities: the Case of Unbounded Variance, arXiv:2302.00999.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from perturbkit.core import Cost, Minimum, checks
from perturbkit.core.optimizers import BaseOptimizer, dense_gradients, evaluated, global_norm
from perturbkit.core.random import Seed, as_generator, rademacher, uniform

__all__ = [
    "ClippedSGD",
    "alpha_stable_noise",
    "clip_schedule",
    "minimize_clipped_sstm",
    "solve_clipped_seg",
    "solve_clipped_sgda",
]

Gradient = Callable[[Tensor], Tensor]
Setting = Literal["convex", "strongly_convex", "accelerated"]


class ClippedSGD(BaseOptimizer):
    r"""Gradient descent whose gradient's norm is clipped.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups.
    lr : float
        Learning rate, zero or above.
    clip : float or sequence of float
        Largest norm of the gradient of a group, above 0; or one a step, the last of which is kept. Infinite for none.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    :math:`w \leftarrow w - \eta \min(1, \lambda / |g|) g`: no step is longer than ``lr * clip``. Choose both by
    :func:`clip_schedule`: clipping biases, so the level must grow as the step falls.

    Cost: a norm.

    References
    ----------
    Sadiev et al. (2023), arXiv:2302.00999, algorithm 1.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = ClippedSGD([w], lr=0.1, clip=5.0)
    >>> (w @ torch.tensor([30.0, 40.0])).backward()
    >>> optimizer.step()
    >>> [round(v, 4) for v in w.tolist()]
    [-0.3, -0.4]
    """

    def __init__(self, params: Any, lr: float, clip: float | Sequence[float]) -> None:
        super().__init__(params, {"lr": lr, "clip": clip})

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check a group's own options."""
        checks.nonnegative("lr", group["lr"])
        _levels(group["clip"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; return the closure's loss, if one is given.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the loss and its gradients.
        """
        loss = evaluated(closure)
        for group in self.param_groups:
            levels = group["clip"] if isinstance(group["clip"], Sequence) else [group["clip"]]
            t = group["step"] = group.get("step", 0) + 1
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            grads = dense_gradients(weights)
            size = global_norm(grads)
            factor = (levels[min(t, len(levels)) - 1] / size).clamp(max=1.0).nan_to_num(1.0)
            for p, g in zip(weights, grads, strict=True):
                p.sub_(g.to(size.dtype) * (group["lr"] * factor.to(p.device)))
        return loss


def minimize_clipped_sstm(
    grad: Gradient,
    x0: Tensor,
    *,
    lipschitz: float,
    clip: float | Sequence[float],
    a: float = 1.0,
    iters: int = 100,
) -> Minimum:
    r"""Minimise a smooth convex function by clipped similar triangles, an accelerated method.

    Parameters
    ----------
    grad : callable
        ``grad(x) -> gradients``, (runs, d) to (runs, d); may be stochastic.
    x0 : Tensor, shape (d,) or (runs, d)
        Start.
    lipschitz : float
        Of the gradient, above 0.
    clip : float or sequence of float
        Level times the step size, that is, the longest move of z: above 0; or one an iteration. Infinite for none.
    a : float
        How much smaller the steps are than without noise, at least 1.
    iters : int
        Iterations, at least 1.

    Returns
    -------
    Minimum
        ``fun`` and ``history`` are of the norms of the gradients that were seen: values are not evaluated.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    With :math:`\alpha_{k+1} = (k + 2) / (2 a L)` and :math:`A_{k+1} = A_k + \alpha_{k+1}`,

    .. math:: x_{k+1} = \frac{A_k y_k + \alpha_{k+1} z_k}{A_{k+1}}, \quad
        z_{k+1} = z_k - \alpha_{k+1} \operatorname{clip}(g(x_{k+1}), \lambda_{k+1}), \quad
        y_{k+1} = \frac{A_k y_k + \alpha_{k+1} z_{k+1}}{A_{k+1}},

    and :math:`\lambda_{k+1}` is ``clip`` over :math:`\alpha_{k+1}`. Without noise and clipping
    :math:`f(y_K) - f^* \le 2 a L R^2 / (K (K + 3))`.

    References
    ----------
    Sadiev et al. (2023), arXiv:2302.00999, algorithm 2.

    Examples
    --------
    >>> found = minimize_clipped_sstm(lambda x: x, torch.tensor([3.0, 4.0]), lipschitz=1.0, clip=math.inf, iters=50)
    >>> bool(found.x.norm() < 0.1)
    True
    """
    x0 = checks.tensor("x0", x0, ndim=(1, 2))
    smooth = checks.positive("lipschitz", lipschitz) * checks.between("a", a, 1, math.inf)
    checks.integer("iters", iters, low=1)
    reach = _levels(clip)
    z = x0.detach().clone().reshape(-1, x0.shape[-1])
    y, total, history = z.clone(), 0.0, []
    for k in range(iters):
        alpha = (k + 2) / (2 * smooth)
        x = (total * y + alpha * z) / (total + alpha)
        g = _values(grad, x, "grad")
        history.append(g.norm(dim=1))
        z = z - alpha * _clipped(g, reach[min(k, len(reach) - 1)] / alpha)
        y = (total * y + alpha * z) / (total + alpha)
        total += alpha
    return _result(y, history, iters, 1, x0)


def solve_clipped_seg(
    operator: Gradient, x0: Tensor, *, step: float, clip: float | Sequence[float], iters: int = 100
) -> Minimum:
    r"""Solve a variational inequality by clipped stochastic extragradient steps.

    Parameters
    ----------
    operator : callable
        ``operator(x) -> values``, (runs, d) to (runs, d); may be stochastic, each call a new sample.
    x0 : Tensor, shape (d,) or (runs, d)
        Start.
    step : float
        Step size, above 0.
    clip : float or sequence of float
        Largest norm of the operator's value, above 0; or one an iteration. Infinite for none.
    iters : int
        Iterations, at least 1.

    Returns
    -------
    Minimum
        ``x`` is the last iterate; ``fun`` and ``history`` are of the norms of the values seen.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`\tilde x = x - \gamma \operatorname{clip}(F(x), \lambda)` and :math:`x \leftarrow x - \gamma \operatorname{clip}(F(\tilde x),
    \lambda)`.

    References
    ----------
    Sadiev et al. (2023), arXiv:2302.00999, algorithm 3.

    Examples
    --------
    >>> game = lambda x: torch.stack([x[:, 1], -x[:, 0]], 1)  # min over the first, max over the second, of their product
    >>> bool(solve_clipped_seg(game, torch.ones(2), step=0.3, clip=math.inf, iters=200).x.norm() < 1e-3)
    True
    """
    x, levels = _start(x0, step, clip, iters)
    history = []
    for k in range(iters):
        level = levels[min(k, len(levels) - 1)]
        value = _values(operator, x, "operator")
        history.append(value.norm(dim=1))
        there = _values(operator, x - step * _clipped(value, level), "operator")
        x = x - step * _clipped(there, level)
    return _result(x, history, iters, 2, x0)


def solve_clipped_sgda(
    operator: Gradient, x0: Tensor, *, step: float, clip: float | Sequence[float], iters: int = 100
) -> Minimum:
    r"""Solve a variational inequality by clipped stochastic descent-ascent steps.

    Parameters
    ----------
    operator, x0, step, clip, iters
        As for :func:`solve_clipped_seg`.

    Returns
    -------
    Minimum
        ``x`` is the last iterate; ``fun`` and ``history`` are of the norms of the values seen.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`x \leftarrow x - \gamma \operatorname{clip}(F(x), \lambda)`, for cocoercive operators: on a bilinear game it circles
    away.

    References
    ----------
    Sadiev et al. (2023), arXiv:2302.00999, algorithm 4.

    Examples
    --------
    >>> bool(solve_clipped_sgda(lambda x: x, torch.ones(2), step=0.3, clip=math.inf).x.norm() < 1e-3)
    True
    """
    x, levels = _start(x0, step, clip, iters)
    history = []
    for k in range(iters):
        value = _values(operator, x, "operator")
        history.append(value.norm(dim=1))
        x = x - step * _clipped(value, levels[min(k, len(levels) - 1)])
    return _result(x, history, iters, 1, x0)


def clip_schedule(
    setting: Setting,
    *,
    alpha: float,
    sigma: float,
    distance: float,
    lipschitz: float,
    iters: int,
    failure_prob: float,
    strong_convexity: float | None = None,
    factor: float = 1.0,
) -> tuple[float, list[float]]:
    r"""Return the step size and the levels of the theory.

    Parameters
    ----------
    setting : {"convex", "strongly_convex", "accelerated"}
        Descent on convex or strongly convex functions; or similar triangles, whose step is then the factor ``a`` and whose
        level is the longest move.
    alpha : float
        Order of the noise's moment, in (1, 2].
    sigma : float
        The noise has :math:`E |\xi|^\alpha \le \sigma^\alpha`; zero or above.
    distance : float
        Bound R of the distance from the start to the solution, above 0.
    lipschitz : float
        Of the gradient, above 0.
    iters : int
        Iterations K, at least 1.
    failure_prob : float
        Chance that the bound fails, in (0, 1).
    strong_convexity : float, optional
        For "strongly_convex", above 0.
    factor : float
        Multiplies the step, above 0: the theory's constants are far from tight, its scaling is what counts.

    Returns
    -------
    step : float
    levels : list of float
        One, or one an iteration.

    Raises
    ------
    ArgumentError
        If an argument is outside its range.

    Notes
    -----
    With :math:`A = \ln(4 K / \beta)`: :math:`\gamma = \min(1 / 80 L A, R / (27^{1/\alpha} 20 \sigma K^{1/\alpha}
    A^{(\alpha-1)/\alpha}))` and :math:`\lambda = R / 40 \gamma A`; in the strongly convex case :math:`\gamma = \min(1 / 400 L A,
    \ln B / \mu (K + 1))` and :math:`\lambda_k = e^{-\gamma \mu (1 + k/2)} R / 120 \gamma A`, with B the larger of 2 and
    :math:`(\mu R / \sigma)^2 K^{2 (\alpha - 1) / \alpha} A^{-2 (\alpha - 1) / \alpha}`; accelerated, the longest move is
    :math:`R / 30 A`. The constants are as remembered from the theorems.

    References
    ----------
    Sadiev et al. (2023), arXiv:2302.00999, theorems 3.1 to 3.3.

    Examples
    --------
    >>> step, levels = clip_schedule("convex", alpha=1.5, sigma=1.0, distance=1.0, lipschitz=1.0, iters=1000, failure_prob=0.01)
    >>> round(step * levels[0] * 40 * math.log(4 * 1000 / 0.01), 6)
    1.0
    """
    checks.one_of("setting", setting, ("convex", "strongly_convex", "accelerated"))
    checks.between("alpha", alpha, 1, 2, inclusive="high")
    checks.nonnegative("sigma", sigma)
    for name, value in (("distance", distance), ("lipschitz", lipschitz), ("factor", factor)):
        checks.positive(name, value)
    k = checks.integer("iters", iters, low=1)
    checks.between("failure_prob", failure_prob, 0, 1, inclusive="neither")
    log = math.log(4 * k / failure_prob)
    share = (alpha - 1) / alpha
    if setting == "convex":
        noisy = (
            distance / (27 ** (1 / alpha) * 20 * sigma * k ** (1 / alpha) * log**share)
            if sigma > 0
            else math.inf
        )
        step = factor * min(1 / (80 * lipschitz * log), noisy)
        return step, [distance / (40 * step * log)]
    if setting == "accelerated":
        noise = sigma * k ** ((alpha + 1) / alpha) * log**share / (lipschitz * distance)
        return max(1.0, max(48600 * log**2, 1800 * noise) / factor), [distance / (30 * log)]
    if strong_convexity is None:
        raise checks.ArgumentError(
            "strong_convexity is None; allowed: a number above 0 for 'strongly_convex'. Pass it, or use 'convex'."
        )
    mu = checks.positive("strong_convexity", strong_convexity)
    ratio = (mu * distance / sigma) ** 2 * (k / log) ** (2 * share) if sigma > 0 else math.inf
    rate = math.log(max(2.0, ratio)) / (mu * (k + 1)) if math.isfinite(ratio) else math.inf
    step = factor * min(1 / (400 * lipschitz * log), rate)
    return step, [math.exp(-step * mu * (1 + i / 2)) * distance / (120 * step * log) for i in range(k)]


def alpha_stable_noise(
    alpha: float, size: Sequence[int], *, generator: Seed = None, dtype: torch.dtype | None = None
) -> Tensor:
    r"""Draw symmetric noise with the tails of a stable law: no moment of order ``alpha`` or above.

    Parameters
    ----------
    alpha : float
        Tail index, above 1.
    size : sequence of int
        Shape.
    generator : torch.Generator, int or None
        Source of the numbers.
    dtype : torch.dtype, optional
        PyTorch's default unless given.

    Returns
    -------
    Tensor

    Raises
    ------
    ArgumentError
        If the index is not above 1.

    Notes
    -----
    A random sign times :math:`U^{-1/\alpha} - 1`, U uniform: Pareto (Lomax), which has the tails without the stable law's
    series. Moments of order below ``alpha`` exist.

    References
    ----------
    Sadiev et al. (2023), arXiv:2302.00999, section 4.

    Examples
    --------
    >>> alpha_stable_noise(1.5, (2, 3), generator=0).shape
    torch.Size([2, 3])
    """
    checks.between("alpha", alpha, 1, math.inf, inclusive="neither")
    g = as_generator(generator)
    u = 1 - uniform(size, generator=g, dtype=dtype)
    return rademacher(size, generator=g, dtype=u.dtype) * (u ** (-1 / alpha) - 1)


def _levels(clip: float | Sequence[float]) -> list[float]:
    levels = list(clip) if isinstance(clip, Sequence) else [clip]
    if not levels:
        raise checks.ArgumentError(
            "clip is empty; allowed: a level above 0, or one a step. Pass math.inf for no clipping."
        )
    return [
        math.inf if isinstance(level, float) and level == math.inf else checks.positive("clip", level)
        for level in levels
    ]


def _values(function: Gradient, x: Tensor, name: str) -> Tensor:
    """Ask for one value a row, and check that the answer is one."""
    values = function(x)
    if not isinstance(values, Tensor) or values.shape != x.shape:
        shown = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise checks.ArgumentError(
            f"{name} answered {shown}; allowed: a tensor of shape {tuple(x.shape)}. Return one row a run."
        )
    return values


def _clipped(value: Tensor, level: float) -> Tensor:
    size = value.norm(dim=1, keepdim=True)
    return value * (level / size).clamp(max=1.0).nan_to_num(1.0) if math.isfinite(level) else value


def _start(x0: Tensor, step: float, clip: float | Sequence[float], iters: int) -> tuple[Tensor, list[float]]:
    checks.tensor("x0", x0, ndim=(1, 2))
    checks.positive("step", step)
    checks.integer("iters", iters, low=1)
    return x0.detach().clone().reshape(-1, x0.shape[-1]), _levels(clip)


def _result(x: Tensor, history: list[Tensor], iters: int, calls: int, x0: Tensor) -> Minimum:
    shape = x0.shape[:-1]
    seen = torch.stack(history).reshape(-1, *shape)
    message = f"{iters} iterations were taken"
    return Minimum(x.reshape(x0.shape), seen[-1], False, message, seen, cost=Cost(0, iters * calls * len(x)))
