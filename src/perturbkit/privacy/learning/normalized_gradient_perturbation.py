"""m-NGP: private gradient descent in which each row's gradient is divided by the larger of 1 and its norm.

Use it to train convex models privately when the loss has no known Lipschitz constant. Kang, Liu, Li and Wang (2022),
Sharper Utility Bounds for Differentially Private Models, arXiv:2204.10536.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import brentq
from scipy.special import log_ndtr
from torch import Tensor

from perturbkit.core import Result, checks
from perturbkit.core.random import Seed
from perturbkit.privacy._noise import Noise

__all__ = [
    "NormalizedGradientPerturbation",
    "PrivateModel",
    "excess_risk_bound",
    "gaussian_delta",
    "gaussian_sigma",
    "private_erm",
]

Neighbours = Literal["replace", "add-remove"]


@dataclass(frozen=True, eq=False)
class PrivateModel(Result):
    """Weights released under differential privacy.

    Attributes
    ----------
    w : Tensor, shape (p,)
        The weights.
    sigma : float
        Standard deviation of the noise added to each mean gradient, in the gradient's units.
    epsilon, delta : float
        The guarantee; epsilon is infinite if no noise was asked for.
    n_steps : int
        Gradients released.
    """

    w: Tensor
    sigma: float
    epsilon: float
    delta: float
    n_steps: int


class NormalizedGradientPerturbation(torch.optim.Optimizer):
    r"""Full-batch gradient descent on noisy means of normalised per-row gradients.

    Parameters
    ----------
    params : iterable of Tensor
        What is trained.
    epsilon, delta : float
        Guarantee for all ``n_steps`` steps together; epsilon above 0 or infinity (no noise, no privacy), delta in (0, 1).
    n_samples : int
        Rows of the data set; public.
    n_steps : int
        Steps that the budget pays for; the next one is refused.
    lr : float
        Step size, above 0; about one over the smoothness of the mean loss.
    bound : float
        Norm above which a row's gradient is scaled down, in the gradient's units; 1 in the paper. Set to a Lipschitz
        constant of the loss, this is classical gradient perturbation.
    neighbours : {"replace", "add-remove"}
        Data sets that differ by another row in one place (sensitivity 2 bound/n), or by one row of gradient zero
        (bound/n).
    generator : torch.Generator, int or None
        Source of the noise; ``None``: the secure source of the operating system.

    Attributes
    ----------
    sigma : float
        Standard deviation of the noise in each entry of a mean gradient.
    steps_left : int
        Steps not yet taken.

    Notes
    -----
    :math:`w \leftarrow w - \eta (\frac1n \sum_i g_i / \max\{1, \|g_i\|/B\} + b),\ b \sim N(0, \sigma^2 I)`, the norm over
    all parameters together. Sigma is the exact one of T Gaussian releases, :func:`gaussian_sigma`. Where the paper
    leaves open whether rows or their mean are normalised, it is the rows: only that bounds what one row changes.
    The noise is drawn in float64 by inversion and is not proof against floating-point attacks on the low bits of a
    released weight; release rounded weights where this matters.

    References
    ----------
    Kang, Liu, Li and Wang (2022), arXiv:2204.10536. Balle and Wang (2018), arXiv:1805.06530 (the Gaussian curve).

    Examples
    --------
    >>> w = torch.zeros(2, requires_grad=True)
    >>> private = NormalizedGradientPerturbation([w], math.inf, 1e-5, n_samples=2, n_steps=1, lr=1.0)
    >>> private.step([torch.tensor([[3.0, 4.0], [0.0, -0.5]])])
    >>> w.detach()
    tensor([-0.3000, -0.1500])
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        epsilon: float,
        delta: float,
        n_samples: int,
        n_steps: int,
        lr: float,
        *,
        bound: float = 1.0,
        neighbours: Neighbours = "replace",
        generator: Seed = None,
    ) -> None:
        checks.integer("n_samples", n_samples, low=1)
        checks.integer("n_steps", n_steps, low=1)
        checks.positive("lr", lr)
        checks.positive("bound", bound)
        checks.one_of("neighbours", neighbours, ("replace", "add-remove"))
        sensitivity = (2 if neighbours == "replace" else 1) * bound / n_samples
        self.sigma = gaussian_sigma(epsilon, delta, sensitivity, n_steps)
        self.bound, self.n_samples, self.steps_left = bound, n_samples, n_steps
        self._noise = Noise(generator)
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, per_sample_grads: Sequence[Tensor]) -> None:  # type: ignore[override]
        """Take one step.

        Parameters
        ----------
        per_sample_grads : sequence of Tensor
            For each parameter, in order, the gradients of the rows' losses, shape (n_samples, *parameter.shape).

        Raises
        ------
        ArgumentError
            If the shapes differ, or the budget's steps are used up; nothing is then changed.
        """
        if self.steps_left == 0:
            raise checks.ArgumentError(
                "steps_left is 0; allowed: as many steps as n_steps said. Set n_steps to all steps before the first."
            )
        params = [(p, group["lr"]) for group in self.param_groups for p in group["params"]]
        shapes = [tuple(g.shape) for g in per_sample_grads]
        wanted = [(self.n_samples, *p.shape) for p, _ in params]
        if shapes != wanted:
            raise checks.ArgumentError(
                f"per_sample_grads has shapes {shapes}; allowed: {wanted}. Give one gradient a row and parameter, for "
                "every row."
            )
        scale = _shrinkage(per_sample_grads, self.bound)
        for (p, lr), g in zip(params, per_sample_grads, strict=True):
            mean = torch.tensordot(scale.to(g), g, dims=([0], [0])) / self.n_samples
            if self.sigma > 0:
                drawn = torch.from_numpy(self._noise.normal(tuple(p.shape)))
                mean = mean + (self.sigma * drawn).to(mean)
            p.sub_(lr * mean.to(p))
        self.steps_left -= 1


def private_erm(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    X: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    delta: float,
    n_steps: int | None = None,
    lr: float = 1.0,
    bound: float = 1.0,
    neighbours: Neighbours = "replace",
    initial: Tensor | None = None,
    generator: Seed = None,
) -> PrivateModel:
    r"""Minimise a mean loss over a weight vector privately.

    Parameters
    ----------
    loss : callable
        ``loss(w, x, y)``, the loss of one row, a scalar; differentiable by ``torch.func``.
    X : Tensor, shape (n, ...)
        Rows, floating point.
    y : Tensor, shape (n,)
        Targets.
    epsilon, delta, lr, bound, neighbours, generator
        As in :class:`NormalizedGradientPerturbation`.
    n_steps : int, optional
        Default: log(n), rounded up, as in the paper; noise grows with its square root.
    initial : Tensor, shape (p,), optional
        Start; by default zeros, one for each entry of a row.

    Returns
    -------
    PrivateModel

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an input or option is not allowed.

    Notes
    -----
    Cost: ``n_steps`` gradients a row. Scaling of the columns, ``bound``, ``lr`` and ``n_steps`` are not private choices:
    fix them beforehand or on public data.

    References
    ----------
    Kang, Liu, Li and Wang (2022), arXiv:2204.10536.

    Examples
    --------
    >>> X = torch.tensor([[1.0], [0.5], [-0.5], [-1.0]]).repeat(500, 1)
    >>> def logistic(w, x, y):
    ...     return torch.nn.functional.softplus(-y * (x @ w))
    >>> found = private_erm(logistic, X, X[:, 0].sign(), epsilon=1.0, delta=1e-5, generator=0)
    >>> found.n_steps, bool(found.w > 0.5)
    (8, True)
    """
    checks.tensor("X", X)
    checks.tensor("y", y, shape=(len(X),), floating=False)
    steps = max(1, math.ceil(math.log(len(X)))) if n_steps is None else n_steps
    start = torch.zeros(X[0].numel()).to(X) if initial is None else checks.tensor("initial", initial, ndim=1)
    w = start.clone().requires_grad_(True)
    optimizer = NormalizedGradientPerturbation(
        [w], epsilon, delta, len(X), steps, lr, bound=bound, neighbours=neighbours, generator=generator
    )
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    for _ in range(steps):
        optimizer.step([gradients(w.detach(), X, y)])
    return PrivateModel(w.detach(), optimizer.sigma, float(epsilon), delta, steps)


def gaussian_sigma(epsilon: float, delta: float, sensitivity: float = 1.0, n_compositions: int = 1) -> float:
    r"""Return the least Gaussian noise that makes repeated releases (epsilon, delta)-private together.

    Parameters
    ----------
    epsilon : float
        Above 0; infinity gives 0.
    delta : float
        In (0, 1).
    sensitivity : float
        What one person changes of each release, in the l2 norm, in the units of the answer.
    n_compositions : int
        Releases, at least 1.

    Returns
    -------
    float
        Standard deviation in each entry, in the units of the sensitivity.

    Notes
    -----
    T releases are mu-Gaussian private with :math:`\mu = \Delta\sqrt T/\sigma`, exactly; mu solves
    :func:`gaussian_delta` = delta and is rounded down.

    References
    ----------
    Balle and Wang (2018), arXiv:1805.06530. Dong, Roth and Su (2019), arXiv:1905.02383.

    Examples
    --------
    >>> round(gaussian_sigma(1.0, 1e-5), 3)
    3.730
    """
    checks.between("delta", delta, 0, 1, inclusive="neither")
    checks.positive("sensitivity", sensitivity)
    checks.integer("n_compositions", n_compositions, low=1)
    if epsilon == math.inf:
        return 0.0
    checks.positive("epsilon", epsilon)
    low, high = 1e-6, 1.0
    while _log_delta(epsilon, high) < math.log(delta):
        high *= 2
    while _log_delta(epsilon, low) > math.log(delta):
        low /= 2
    mu = brentq(lambda m: _log_delta(epsilon, m) - math.log(delta), low, high, xtol=1e-300, rtol=1e-12)
    return sensitivity * math.sqrt(n_compositions) / mu * (1 + 1e-9)


def gaussian_delta(epsilon: float, mu: float) -> float:
    r"""Return the delta of Gaussian noise at a given epsilon.

    Parameters
    ----------
    epsilon : float
        At least 0.
    mu : float
        Sensitivity over standard deviation, times the square root of the number of releases, above 0.

    Returns
    -------
    float

    Notes
    -----
    :math:`\Phi(-\epsilon/\mu + \mu/2) - e^\epsilon \Phi(-\epsilon/\mu - \mu/2)`, without cancellation in the tails.

    References
    ----------
    Balle and Wang (2018), arXiv:1805.06530.

    Examples
    --------
    >>> round(gaussian_delta(0.0, 1.0), 4)
    0.3829
    """
    checks.nonnegative("epsilon", epsilon)
    checks.positive("mu", mu)
    return math.exp(_log_delta(epsilon, mu))


def excess_risk_bound(
    n: int, p: int, epsilon: float, *, alpha: float = 1.0, normalized: bool = True, constant: float = 1.0
) -> float:
    r"""Return the rate that the paper proves for the excess population risk, with probability 1 - delta.

    Parameters
    ----------
    n, p : int
        Rows and parameters, at least 1.
    epsilon : float
        Above 0.
    alpha : float
        Hölder exponent of the gradient, in (0, 1]; 1 is smooth.
    normalized : bool
        Whether gradients are normalised; without it an alpha below 1 gives the slower rate.
    constant : float
        What stands before the rate; the paper gives none.

    Returns
    -------
    float

    Notes
    -----
    :math:`\sqrt p / n\epsilon`, or :math:`n^{-\alpha/(1+2\alpha)}` without normalising for a Hölder gradient (alpha
    below 1; there the paper states the dependence on n only). Logarithms are left out.

    References
    ----------
    Kang, Liu, Li and Wang (2022), arXiv:2204.10536, theorems 1 to 3.

    Examples
    --------
    >>> excess_risk_bound(1000, 25, 0.5)
    0.01
    """
    checks.integer("n", n, low=1)
    checks.integer("p", p, low=1)
    checks.positive("epsilon", epsilon)
    checks.between("alpha", alpha, 0, 1, inclusive="high")
    checks.positive("constant", constant)
    if normalized or alpha == 1:
        return constant * math.sqrt(p) / (n * epsilon)
    return constant * n ** (-alpha / (1 + 2 * alpha))


def _shrinkage(gradients: Sequence[Tensor], bound: float) -> Tensor:
    """Return 1 / max(1, norm / bound) of each row, the norm over all parameters."""
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
    return 1 / (torch.linalg.vector_norm(norms, dim=0) / bound).clamp(min=1)


def _log_delta(epsilon: float, mu: float) -> float:
    first = float(log_ndtr(-epsilon / mu + mu / 2))
    second = epsilon + float(log_ndtr(-epsilon / mu - mu / 2))
    return first + math.log1p(-math.exp(second - first)) if second < first else -math.inf
