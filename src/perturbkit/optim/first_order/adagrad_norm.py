"""Descent with AdaGrad step sizes: one rate for the whole model that finds its own scale.

Use it where neither the smoothness nor the noise is known, and a rate that is far too large must not be fatal. Attia and
Koren (2023), SGD with AdaGrad Stepsizes: Full Adaptivity with High Probability to Unknown Parameters, Unbounded Gradients
and Affine Variance, arXiv:2302.08783.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from perturbkit.core import Result, checks
from perturbkit.core.optimizers import BaseOptimizer, dense_gradients, evaluated
from perturbkit.core.random import Seed, as_generator, randn

__all__ = [
    "AdaGradNorm",
    "HighProbability",
    "adagrad_norm_bound",
    "affine_noise",
    "high_probability_experiment",
]


@dataclass(frozen=True, eq=False)
class HighProbability(Result):
    """What many runs of one experiment came to.

    Attributes
    ----------
    levels : Tensor, shape (levels,)
        Chances.
    quantiles : Tensor, shape (levels, steps)
        Over the runs, of the mean squared gradient up to each step.
    last : Tensor, shape (runs,)
        Squared gradient at each run's end.
    """

    levels: Tensor
    quantiles: Tensor
    last: Tensor


class AdaGradNorm(BaseOptimizer):
    r"""Stochastic gradient descent whose rate falls with the gradients that were seen.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups.
    lr : float
        Rate :math:`\eta`, above 0, in units of the weights.
    initial : float
        First value :math:`b_0` of the root of the sum, above 0, in units of the gradient.
    per_parameter : bool
        Each tensor has a sum of its own; otherwise all of a group share one.

    Raises
    ------
    ArgumentError
        If an option is outside its range.

    Notes
    -----
    :math:`w \leftarrow w - \eta g_t / \sqrt{b_0^2 + \sum_{s \le t} |g_s|^2}`, the current gradient included. Multiplying the
    loss and ``initial`` by one factor changes nothing.

    Cost: a norm, and one number of state.

    References
    ----------
    Ward, Wu and Bottou (2019), arXiv:1806.01811; Attia and Koren (2023), arXiv:2302.08783.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.tensor([3.0]))
    >>> optimizer = AdaGradNorm([w], lr=1.0, initial=1e-6)
    >>> w.square().sum().backward()
    >>> optimizer.step()
    >>> round(w.item(), 4)  # a step of length lr, whatever the gradient
    2.0
    """

    def __init__(
        self, params: Any, lr: float = 1.0, initial: float = 1e-2, per_parameter: bool = False
    ) -> None:
        self._per_parameter = bool(per_parameter)
        super().__init__(params, {"lr": lr, "initial": initial})

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check a group's own options."""
        checks.positive("lr", group["lr"])
        checks.positive("initial", group["initial"])

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
            weights = [p for p in group["params"] if p.grad is not None]
            for own in [[p] for p in weights] if self._per_parameter else [weights]:
                if not own:
                    continue
                # The sum lies with the first parameter, with or without a gradient, so that it is saved and moved with it.
                keeper = own[0] if self._per_parameter else group["params"][0]
                total = self.state[keeper].setdefault(
                    "total", torch.full((), group["initial"] ** 2, dtype=torch.float64, device=keeper.device)
                )
                grads = dense_gradients(own)
                # In double precision without copies of the gradients in it.
                norms = [torch.linalg.vector_norm(g, dtype=torch.float64).to(total.device) for g in grads]
                total += torch.stack(norms).square().sum()
                rate = group["lr"] / total.sqrt()
                for p, g in zip(own, grads, strict=True):
                    wide = torch.promote_types(p.dtype, torch.float32)
                    p.sub_(g.to(wide) * rate.to(device=p.device, dtype=wide))
        return loss

    def state_dtype(self, name: str, saved: torch.dtype, p: Tensor) -> torch.dtype:
        """Return the precision of the sum, whatever that of the weights."""
        return saved


def adagrad_norm_bound(
    kind: Literal["nonconvex", "convex"],
    *,
    smoothness: float,
    gap_or_distance: float,
    lr: float,
    initial: float,
    sigma0: float,
    sigma1: float,
    steps: int,
    failure_prob: float,
) -> float:
    r"""Return a bound of the mean squared gradient, or of the mean iterate's loss, that holds with high probability.

    Parameters
    ----------
    kind : {"nonconvex", "convex"}
        The mean of :math:`|\nabla f(w_t)|^2` over the steps, or :math:`f(\bar w) - f^*`.
    smoothness : float
        Lipschitz constant L of the gradient, above 0.
    gap_or_distance : float
        :math:`f(w_1) - f^*`, or :math:`|w_1 - w^*|`; zero or above.
    lr, initial : float
        Of :class:`AdaGradNorm`.
    sigma0, sigma1 : float
        Of the noise, see :func:`affine_noise`; zero or above.
    steps : int
        Steps T, at least 1.
    failure_prob : float
        Chance that it fails, in (0, 1).

    Returns
    -------
    float

    Raises
    ------
    ArgumentError
        If an argument is outside its range.

    Notes
    -----
    With :math:`\ell = \ln(1 + T \max(L, \sigma_0)^2 / b_0^2) + \ln(1 / \delta)`, :math:`A = F / \eta + (\eta L (1 + \sigma_1^2) +
    \sigma_0) \ell` and :math:`B = D^2 / \eta + \eta (1 + \sigma_1^2) \ell`, it is :math:`8 A (A + b_0) / T + 8 A \sigma_0 / \sqrt T` or
    :math:`8 B (B L + b_0) / T + 8 B \sigma_0 / \sqrt T`. The shape is the theorem's; its constants are not, and 8 was chosen
    so that it bounds what the tests see.

    References
    ----------
    Attia and Koren (2023), arXiv:2302.08783, theorems 1 and 2.

    Examples
    --------
    >>> options = dict(smoothness=1.0, gap_or_distance=1.0, lr=1.0, initial=0.1, sigma1=0.0, failure_prob=0.01)
    >>> fast = [adagrad_norm_bound("nonconvex", sigma0=0.0, steps=n, **options) for n in (1000, 10_000)]
    >>> 5 < fast[0] / fast[1] < 10
    True
    """
    checks.one_of("kind", kind, ("nonconvex", "convex"))
    for name, value in (("smoothness", smoothness), ("lr", lr), ("initial", initial)):
        checks.positive(name, value)
    for name, value in (("gap_or_distance", gap_or_distance), ("sigma0", sigma0), ("sigma1", sigma1)):
        checks.nonnegative(name, value)
    checks.integer("steps", steps, low=1)
    checks.between("failure_prob", failure_prob, 0, 1, inclusive="neither")
    log = math.log(1 + steps * max(smoothness, sigma0) ** 2 / initial**2) + math.log(1 / failure_prob)
    if kind == "nonconvex":
        a = gap_or_distance / lr + (lr * smoothness * (1 + sigma1**2) + sigma0) * log
        fast = a * (a + initial)
    else:
        a = gap_or_distance**2 / lr + lr * (1 + sigma1**2) * log
        fast = a * (a * smoothness + initial)
    return 8 * fast / steps + 8 * a * sigma0 / math.sqrt(steps)


def affine_noise(gradient: Tensor, sigma0: float, sigma1: float, *, generator: Seed = None) -> Tensor:
    r"""Return gradients with noise whose size grows with theirs, bounded almost surely.

    Parameters
    ----------
    gradient : Tensor, shape (..., d)
        True gradients.
    sigma0, sigma1 : float
        Zero or above.
    generator : torch.Generator, int or None
        Source of the directions.

    Returns
    -------
    Tensor, shape (..., d)

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`g + \sqrt{\sigma_0^2 + \sigma_1^2 |g|^2}\, u` with u uniform on the sphere: unbiased, and the error's square is
    exactly :math:`\sigma_0^2 + \sigma_1^2 |g|^2`, the most that the theory allows.

    References
    ----------
    Attia and Koren (2023), arXiv:2302.08783, equation 1.

    Examples
    --------
    >>> g = torch.tensor([3.0, 4.0])
    >>> round(float((affine_noise(g, 0.0, 0.5, generator=0) - g).norm()), 4)
    2.5
    """
    checks.tensor("gradient", gradient)
    checks.nonnegative("sigma0", sigma0)
    checks.nonnegative("sigma1", sigma1)
    u = randn(gradient.shape, generator=as_generator(generator), like=gradient)
    u = u / u.norm(dim=-1, keepdim=True)
    size = (sigma0**2 + sigma1**2 * gradient.square().sum(-1, keepdim=True)).sqrt()
    return gradient + size * u


def high_probability_experiment(
    gradient: Callable[[Tensor], Tensor],
    x0: Tensor,
    *,
    runs: int,
    steps: int,
    lr: float,
    initial: float = 1e-2,
    sigma0: float = 0.0,
    sigma1: float = 0.0,
    levels: tuple[float, ...] = (0.5, 0.99),
    generator: Seed = None,
) -> HighProbability:
    """Run the method many times at once under affine noise, and return quantiles of the mean squared gradient.

    Parameters
    ----------
    gradient : callable
        True gradient, (runs, d) to (runs, d).
    x0 : Tensor, shape (d,)
        Start of every run.
    runs, steps : int
        At least 1.
    lr, initial : float
        Of :class:`AdaGradNorm`.
    sigma0, sigma1 : float
        Of :func:`affine_noise`.
    levels : tuple of float
        Chances of the quantiles, in [0, 1].
    generator : torch.Generator, int or None
        Source of the noise.

    Returns
    -------
    HighProbability

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``w <- w - lr g / sqrt(initial^2 + sum |g|^2)``, each run with a sum of its own.

    References
    ----------
    Attia and Koren (2023), arXiv:2302.08783.

    Examples
    --------
    >>> found = high_probability_experiment(lambda x: x, torch.ones(3), runs=5, steps=50, lr=1.0, generator=0)
    >>> bool(found.last.max() < 1e-3)
    True
    """
    checks.tensor("x0", x0, ndim=1)
    checks.integer("runs", runs, low=1)
    checks.integer("steps", steps, low=1)
    checks.positive("lr", lr)
    checks.positive("initial", initial)
    for level in levels:
        checks.between("levels", level, 0, 1)
    g = as_generator(generator)
    x = x0.detach().expand(runs, -1).clone()
    total = torch.full((runs, 1), initial**2, dtype=x.dtype, device=x.device)
    seen = torch.zeros(runs, dtype=x.dtype, device=x.device)
    at = torch.tensor(levels, dtype=x.dtype, device=x.device)
    quantiles = []
    for t in range(steps):
        true = gradient(x)
        if not isinstance(true, Tensor) or true.shape != x.shape:
            shown = f"shape {tuple(true.shape)}" if isinstance(true, Tensor) else f"a {type(true).__name__}"
            raise checks.ArgumentError(
                f"gradient answered {shown}; allowed: a tensor of shape {tuple(x.shape)}. Return one row a run."
            )
        seen = seen + true.square().sum(1)
        quantiles.append(torch.quantile(seen / (t + 1), at))
        noisy = affine_noise(true, sigma0, sigma1, generator=g)
        total = total + noisy.square().sum(1, keepdim=True)
        x = x - lr * noisy / total.sqrt()
    return HighProbability(at, torch.stack(quantiles, 1), gradient(x).square().sum(1))
