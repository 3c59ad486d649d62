"""ProxyProx: minimise a dear loss by solving a cheap one that is corrected by the dear one's gradients.

Use it where a similar loss costs little: public data beside private ones, a coarse simulation beside a fine one. Woodworth,
Mishchenko and Bach (2023), Two Losses Are Better Than One: Faster Optimization Using a Cheaper Proxy, arXiv:2302.03542.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from perturbkit.core import Minimum, checks, lanczos, ritz_values
from perturbkit.core.optimizers import BaseOptimizer, Closure, dense_gradients
from perturbkit.core.progress import ProgressLike, track
from perturbkit.core.random import Seed, as_generator, randn
from perturbkit.core.results import Cost

__all__ = ["ProxyMinimum", "ProxyProx", "estimate_similarity", "minimize_proxy_prox"]

Inner = Literal["lbfgs", "gd"]


@dataclass(frozen=True, eq=False)
class ProxyMinimum(Minimum):
    """A minimum that was found through a proxy.

    Attributes
    ----------
    target_calls : int
        Gradients of the target.
    proxy_calls : int
        Gradients of the proxy.
    """

    target_calls: int = 0
    proxy_calls: int = 0


def minimize_proxy_prox(
    grad_target: Callable[[Tensor], Tensor],
    proxy: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    similarity: float,
    step: float | None = None,
    inner: Inner = "lbfgs",
    inner_tol: float = 0.1,
    inner_steps: int = 100,
    rounds: int = 100,
    tol: float = 0.0,
    lipschitz: float | None = None,
    progress: ProgressLike = None,
) -> ProxyMinimum:
    r"""Minimise a function from its gradients and a differentiable proxy.

    Parameters
    ----------
    grad_target : callable
        ``grad_target(x) -> gradient``, (d,) to (d,); may be stochastic.
    proxy : callable
        ``proxy(x) -> value``, (d,) to (); differentiable.
    x0 : Tensor, shape (d,)
        Start.
    similarity : float
        Lipschitz constant :math:`\delta` of the gradient of the difference, zero or above: see :func:`estimate_similarity`.
    step : float, optional
        :math:`\eta`, above 0; ``1 / (2 similarity)`` unless given, and infinite for a similarity of zero.
    inner : {"lbfgs", "gd"}
        Solver of the rounds' problems: PyTorch's L-BFGS with a line search, or gradient descent that halves its step.
    inner_tol : float
        A round ends when its model's gradient is at most this times ``|x - x_t| / step``, above 0. Where the step is
        infinite, this times the first gradient.
    inner_steps : int
        Most iterations of a round, at least 1.
    rounds : int
        Most gradients of the target, at least 1.
    tol : float
        Stop when the target's gradient is this or less, zero or above.
    lipschitz : float, optional
        Of the target's gradient; a similarity that is not below it is warned of, since the proxy is then of no use.
    progress : optional
        See :func:`~perturbkit.core.progress.track`.

    Returns
    -------
    ProxyMinimum
        ``fun`` and ``history`` are norms of the target's gradients: its values are not evaluated.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`x_{t+1} \approx \arg\min_x h(x) + \langle g_t - \nabla h(x_t), x - x_t \rangle + |x - x_t|^2 / 2 \eta` with the target's
    gradient :math:`g_t`: the difference of the losses is linearised, the proxy is kept. Any point at which the target's gradient
    vanishes is left as it is. With the zero function as proxy it is gradient descent of step :math:`\eta`. The rate is that of
    gradient descent with :math:`\delta` for the Lipschitz constant.

    Cost: one gradient of the target a round.

    References
    ----------
    Woodworth et al. (2023), arXiv:2302.03542, algorithm 1. The rule that ends a round is chosen here.

    Examples
    --------
    >>> scale = torch.tensor([1.0, 100.0], dtype=torch.float64)
    >>> found = minimize_proxy_prox(lambda x: scale * x + 0.5 * x, lambda x: (scale * x * x).sum() / 2,
    ...                             torch.ones(2, dtype=torch.float64), similarity=0.5, rounds=30)
    >>> bool(found.fun < 1e-6)
    True
    """
    checks.tensor("x0", x0, ndim=1)
    checks.nonnegative("similarity", similarity)
    checks.one_of("inner", inner, ("lbfgs", "gd"))
    checks.positive("inner_tol", inner_tol)
    for name, value in (("inner_steps", inner_steps), ("rounds", rounds)):
        checks.integer(name, value, low=1)
    checks.nonnegative("tol", tol)
    if step is None:
        eta = 1 / (2 * similarity) if similarity > 0 else math.inf
    else:
        eta = math.inf if step == math.inf else checks.positive("step", step)
    if lipschitz is not None and similarity >= checks.positive("lipschitz", lipschitz):
        warnings.warn(
            f"the similarity {similarity:g} is not below the target's constant {lipschitz:g}: the proxy saves nothing",
            checks.PerturbkitWarning,
            2,
        )
    x, history, proxy_calls, met = x0.detach().clone(), [], 0, False
    for _ in track(range(rounds), "ProxyProx", progress=progress):
        g = grad_target(x).detach()
        checks.same_shape("grad_target(x)", g, "x0", x0)
        history.append(g.norm())
        if float(history[-1]) <= tol:
            met = True
            break
        shift = g - _gradient(proxy, x)
        model = _Model(proxy, x, shift, eta)
        x, calls = _solve(model, x, float(g.norm()), inner, inner_tol, inner_steps)
        proxy_calls += calls + 1
    message = "the gradient's tolerance was met" if met else f"{rounds} rounds were taken"
    n = len(history)
    return ProxyMinimum(
        x, history[-1], met, message, torch.stack(history), None, Cost(0, n + proxy_calls), n, proxy_calls
    )


class ProxyProx(BaseOptimizer):
    r"""ProxyProx steps of a model's weights, with gradient descent on the rounds' problems.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups.
    proxy_loss : callable
        ``proxy_loss() -> loss`` with a graph to the parameters; the same batch at each call of a step.
    lr : float
        Step :math:`\eta` of the proximal term, above 0.
    inner_lr : float
        Rate of gradient descent inside, above 0, at most about the inverse of the proxy's Lipschitz constant plus ``1 / lr``.
    inner_steps : int
        Its steps, at least 1.

    Attributes
    ----------
    target_calls, proxy_calls : int
        Gradients that were taken.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    See :func:`minimize_proxy_prox`. One step inside with ``inner_lr`` is one of gradient descent on the target.

    Cost: one gradient of the target and ``inner_steps + 1`` of the proxy a step; two copies of the weights.

    References
    ----------
    Woodworth et al. (2023), arXiv:2302.03542.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.tensor([3.0]))
    >>> optimizer = ProxyProx([w], lambda: (w ** 2).sum() / 2, lr=10.0, inner_lr=0.5, inner_steps=20)
    >>> def target():
    ...     optimizer.zero_grad()
    ...     loss = 0.55 * (w ** 2).sum()
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(10):
    ...     loss = optimizer.step(target)
    >>> abs(w.item()) < 1e-3
    True
    """

    def __init__(
        self,
        params: Any,
        proxy_loss: Closure,
        lr: float,
        inner_lr: float,
        inner_steps: int = 10,
    ) -> None:
        if not callable(proxy_loss):
            raise checks.ArgumentTypeError(
                f"proxy_loss is a {type(proxy_loss).__name__}; allowed: a function without arguments. Pass lambda: loss of the model."
            )
        self._proxy, self._steps = proxy_loss, checks.integer("inner_steps", inner_steps, low=1)
        self.target_calls = self.proxy_calls = 0
        super().__init__(params, {"lr": lr, "inner_lr": inner_lr})

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check a group's own options."""
        checks.positive("lr", group["lr"])
        checks.positive("inner_lr", group["inner_lr"])

    def step(self, closure: Closure) -> Any:  # type: ignore[override]
        """Take one step and return the target's loss before it.

        Parameters
        ----------
        closure : callable
            ``closure() -> loss`` of the target; clears the gradients, evaluates it and calls ``backward``.
        """
        with torch.enable_grad():
            loss = closure()
        self.target_calls += 1
        members = self.trained()
        weights = [p for _, p in members]
        if not weights:
            return loss
        start = [p.detach().clone() for p in weights]
        grads = dense_gradients(weights)
        first = self._gradients(weights)
        shifts = [g - h for g, h in zip(grads, first, strict=True)]
        for i in range(self._steps):
            now = first if i == 0 else self._gradients(weights)
            with torch.no_grad():
                for (group, p), h, shift, origin in zip(members, now, shifts, start, strict=True):
                    p.sub_(h + shift + (p - origin) / group["lr"], alpha=group["inner_lr"])
        return loss

    def _gradients(self, weights: list[Tensor]) -> tuple[Tensor, ...]:
        self.proxy_calls += 1
        with torch.enable_grad():
            loss = self._proxy()
        return torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)


def estimate_similarity(
    hvp_target: Callable[[Tensor], Tensor],
    hvp_proxy: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    steps: int = 30,
    generator: Seed = None,
) -> float:
    r"""Return the largest absolute eigenvalue of the difference of two Hessians.

    Parameters
    ----------
    hvp_target, hvp_proxy : callable
        Products with the Hessians at a point, (k, d) to (k, d): see :func:`~perturbkit.core.hessian`.
    x : Tensor, shape (d,)
        The point; gives shape, dtype and device.
    steps : int
        Lanczos steps, at least 1; no more than d are taken.
    generator : torch.Generator, int or None
        Source of the first vector.

    Returns
    -------
    float
        From below: exact with d steps.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`\delta = \max |\lambda(\nabla^2 f - \nabla^2 h)|`.

    References
    ----------
    Woodworth et al. (2023), arXiv:2302.03542, section 2.

    Examples
    --------
    >>> a, b = torch.tensor([1.0, 5.0]), torch.tensor([1.0, 7.0])
    >>> round(estimate_similarity(lambda v: v * a, lambda v: v * b, torch.zeros(2), generator=0), 4)
    2.0
    """
    checks.tensor("x", x, ndim=1)
    n = min(checks.integer("steps", steps, low=1), len(x))
    start = randn(x.shape, generator=as_generator(generator), like=x)
    alpha, beta, _ = lanczos(lambda v: hvp_target(v) - hvp_proxy(v), start, n)
    return float(ritz_values(alpha, beta).abs().max())


class _Model:
    """The problem of a round, and its gradients, which it counts."""

    def __init__(self, proxy: Callable[[Tensor], Tensor], at: Tensor, shift: Tensor, eta: float) -> None:
        self._proxy, self._at, self._shift = proxy, at, shift
        self._curvature = 0.0 if eta == math.inf else 1 / eta
        self.calls = 0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        leaf = x.detach().requires_grad_(True)
        with torch.enable_grad():
            move = leaf - self._at
            value = self._proxy(leaf) + self._shift @ move + self._curvature * move.square().sum() / 2
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    def ended(self, x: Tensor, gradient: Tensor, first: float, tol: float) -> bool:
        scale = self._curvature * float((x - self._at).norm()) if self._curvature > 0 else first
        return float(gradient.norm()) <= tol * scale


def _solve(model: _Model, x: Tensor, first: float, inner: str, tol: float, steps: int) -> tuple[Tensor, int]:
    if inner == "gd":
        value, g = model(x)
        rate = 1.0
        for _ in range(steps):
            while True:
                there, slope = model(x - rate * g)
                # The second part lets steps pass whose decrease is lost in rounding.
                lost = 1e-15 * float(value.abs())
                if bool(there <= value - rate / 2 * g.square().sum() + lost) or rate < 1e-12:
                    break
                rate /= 2
            x, value, g, rate = x - rate * g, there, slope, 2 * rate
            if model.ended(x, g, first, tol):
                break
        return x, model.calls
    leaf = x.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([leaf], max_iter=1, max_eval=30, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=0.0, tolerance_change=0.0)  # fmt: skip

    def closure() -> Tensor:
        value, leaf.grad = model(leaf)
        return value

    for _ in range(steps):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        if model.ended(leaf.detach(), model(leaf)[1], first, tol):
            break
    return leaf.detach(), model.calls


def _gradient(fun: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_(True)
    with torch.enable_grad():
        value = fun(leaf)
    if value.grad_fn is None and not value.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(value, leaf, allow_unused=True, materialize_grads=True)[0]
