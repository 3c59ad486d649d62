"""Attack a continuous policy across the middle of its action range: targeted in direction, free in value.

Use it on controllers whose action is one number, such as a battery that charges or discharges, where an untargeted attack
stops at any small change and a targeted one needs a large perturbation. Broda-Milian, Al-Mallah and Dagdougui (2024), A
Novel Bifurcation Method for Observation Perturbation Attacks on Reinforcement Learning Agents: Load Altering Attacks on a
Cyber Physical Power System, arXiv:2407.05182.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from perturbkit.core import AttackResult, Ball, BallInBox, Cost, Oracle, Result, checks, row_norm
from perturbkit.core.random import Seed, as_generator
from perturbkit.robust.attacks._parts import steepest

__all__ = [
    "BifurcationLayer",
    "BifurcationResult",
    "StealthReport",
    "bifurcation_attack",
    "group_difference_logits",
    "stealth_report",
]


class BifurcationLayer(nn.Module):
    """A fixed layer that turns an action into logits of classes on a grid.

    Parameters
    ----------
    centres : Tensor, shape (k,)
        Actions that the classes stand for, at least two.
    temperature : float
        Above zero.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``z_k = -(a - c_k)^2 / temperature``. The method's source does not give its layer: this one is a choice.

    References
    ----------
    Broda-Milian et al. (2024), arXiv:2407.05182.

    Examples
    --------
    >>> BifurcationLayer(torch.tensor([-1.0, 1.0]))(torch.tensor([0.5])).tolist()
    [[-2.25, -0.25]]
    """

    def __init__(self, centres: Tensor, temperature: float = 1.0) -> None:
        super().__init__()
        checks.tensor("centres", centres, ndim=1)
        if len(centres) < 2:
            raise checks.ArgumentError(
                f"centres has {len(centres)} values; allowed: at least two. Spread them over the action range."
            )
        self.temperature = checks.positive("temperature", temperature)
        self.register_buffer("centres", centres)

    def forward(self, action: Tensor) -> Tensor:
        """Return the logits, (n, k), of actions, (n,) or (n, 1)."""
        centres = self.get_buffer("centres").to(action)
        return -((action.reshape(-1, 1) - centres) ** 2) / self.temperature


def group_difference_logits(
    logits: Tensor, groups: Tensor, current: Tensor, *, normalize: bool = False
) -> Tensor:
    """Return by how much the best class outside the current group leads the best one inside.

    Parameters
    ----------
    logits : Tensor, shape (n, k)
        Of the classes.
    groups : Tensor of bool, shape (k,)
        Which of the two groups each class is in; both must occur.
    current : Tensor of bool, shape (n,)
        The group of each row.
    normalize : bool
        Divide by the gap between the first and the third logit (k of 3 or more), without a gradient through it.

    Returns
    -------
    Tensor, shape (n,)
        Above zero where the answer is in the other group.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If shapes do not agree or a group is empty.

    References
    ----------
    Broda-Milian et al. (2024), arXiv:2407.05182; Croce and Hein (2020), arXiv:2003.01690 (the divisor).

    Examples
    --------
    >>> groups = torch.tensor([False, True])
    >>> group_difference_logits(torch.tensor([[2.0, 0.5]]), groups, torch.tensor([False])).tolist()
    [-1.5]
    """
    checks.tensor("logits", logits, ndim=2, finite=False)
    n, k = logits.shape
    checks.tensor("groups", groups, shape=(k,), floating=False)
    checks.tensor("current", current, shape=(n,), floating=False)
    if not bool(groups.any()) or bool(groups.all()):
        raise checks.ArgumentError("groups holds one group only; allowed: two. Put classes on both sides.")
    inside = groups.bool()[None] == current.bool()[:, None]
    lead = logits.masked_fill(inside, -torch.inf).amax(1) - logits.masked_fill(~inside, -torch.inf).amax(1)
    if not normalize or k < 3:
        return lead
    ordered = logits.detach().sort(1, descending=True).values
    return lead / (ordered[:, 0] - ordered[:, 2] + 1e-12)


@dataclass(frozen=True, eq=False)
class BifurcationResult(AttackResult):
    """What the attack found; ``success`` is that the action crossed the middle.

    Attributes
    ----------
    clean_action, action : Tensor, shape (n,)
        The policy's answers before and after.
    """

    clean_action: Tensor = None  # type: ignore[assignment]
    action: Tensor = None  # type: ignore[assignment]


def bifurcation_attack(
    policy: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    perturbation: Ball | BallInBox,
    *,
    action_range: tuple[float, float] = (-1.0, 1.0),
    n_centres: int = 10,
    temperature: float = 1.0,
    n_steps: int = 40,
    step_size: float | None = None,
    target_group: Tensor | None = None,
    feature_mask: Tensor | None = None,
    normalize: bool = False,
    random_start: bool = True,
    generator: Seed = None,
) -> BifurcationResult:
    """Push actions across the middle of their range and on.

    Parameters
    ----------
    policy : Oracle, nn.Module or callable
        Function of observations (n, ...), answering one action a row, (n,) or (n, 1): before any squashing, whose saturation
        would stop the gradient.
    x : Tensor, shape (n, ...)
        Observations, floating point.
    perturbation : Ball or BallInBox
        What may be added to them.
    action_range : (float, float)
        Lowest and highest action; the groups are its halves.
    n_centres : int
        Classes, at least 2.
    temperature : float
        Of :class:`BifurcationLayer`.
    n_steps : int
        Steps, at least 1.
    step_size : float, optional
        Length of a step in the norm of the set; a tenth of the radius by default.
    target_group : Tensor of bool, shape (n,), optional
        The half to be reached (True: the upper); the other half than the clean action's by default.
    feature_mask : Tensor of bool, broadcastable to a row, optional
        What may be changed.
    normalize : bool
        As in :func:`group_difference_logits`.
    random_start : bool
        Whether to start from a random point of the set.
    generator : torch.Generator, int or None
        Source of the start.

    Returns
    -------
    BifurcationResult
        Unlike other attacks it returns the perturbed rows that did not cross too, the furthest on their way, with the size of
        their perturbation.

    Raises
    ------
    ArgumentError, ArgumentTypeError, ModelError
        If an argument is not allowed, or the policy answers more than one number a row.

    Notes
    -----
    Projected steepest ascent on ``max_{k not in G} z_k - max_{k in G} z_k``, G the group to leave. Of the points visited the
    one of the highest value is kept.

    Cost: a gradient a row and step, and two evaluations.

    References
    ----------
    Broda-Milian et al. (2024), arXiv:2407.05182.

    Examples
    --------
    >>> w = torch.tensor([[1.0], [1.0]])
    >>> found = bifurcation_attack(lambda o: o @ w, torch.tensor([[0.1, 0.1]]), Ball("linf", 0.3), generator=0)
    >>> bool(found.success), round(float(found.action), 2)
    (True, -0.4)
    """
    checks.tensor("x", x)
    if not isinstance(perturbation, Ball | BallInBox):
        raise checks.ArgumentTypeError(
            f"perturbation is a {type(perturbation).__name__}; allowed: a Ball or BallInBox. Write core.Ball('linf', 0.1)."
        )
    ball = perturbation if isinstance(perturbation, Ball) else perturbation.ball
    low, high = action_range
    checks.between("action_range[1]", high, low, float("inf"), inclusive="neither")
    checks.integer("n_centres", n_centres, low=2)
    checks.integer("n_steps", n_steps, low=1)
    length = 0.1 * ball.radius if step_size is None else checks.positive("step_size", step_size)
    middle = 0.5 * (low + high)
    centres = torch.linspace(low, high, n_centres, dtype=x.dtype, device=x.device)
    # A class in the very middle belongs to neither half.
    centres = centres[(centres - middle).abs() > 1e-9 * (high - low)]
    layer, groups = BifurcationLayer(centres, temperature), centres > middle
    free = None if feature_mask is None else _mask(feature_mask, x)

    def allowed(delta: Tensor) -> Tensor:
        return perturbation.project(delta if free is None else delta * free)

    def objective(out: Tensor, leave: Tensor) -> Tensor:
        return group_difference_logits(layer(out), groups, leave, normalize=normalize)

    oracle = Oracle.wrap(policy)
    before = oracle.cost
    with oracle.frozen():
        clean = _actions(oracle(x))
        leave = clean > middle
        if target_group is not None:
            leave = ~checks.tensor("target_group", target_group, shape=(len(x),), floating=False).bool()
        delta = torch.zeros_like(x)
        if random_start:
            delta = allowed(perturbation.sample(x, generator=as_generator(generator)))
        best, reached = delta, torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        for step in range(n_steps + 1):
            value, slope = oracle.value_and_gradient(x + delta, leave.long(), objective=objective)
            better = value > reached
            reached = torch.where(better, value, reached)
            best = torch.where(better.reshape(-1, *[1] * (x.ndim - 1)), delta, best)
            if step < n_steps:
                slope = slope if free is None else slope * free
                delta = allowed(delta + steepest(slope, Ball(ball.norm, length), None))
        action = _actions(oracle(x + best))
    size = row_norm(best, ball.norm)
    cost: Cost = oracle.cost - before
    return BifurcationResult(x + best, (action > middle) != leave, size, ball.norm, cost, clean, action)


@dataclass(frozen=True, eq=False)
class StealthReport(Result):
    """How much perturbed observations look like clean ones.

    Attributes
    ----------
    ks : array, shape (features,)
        Two-sample Kolmogorov-Smirnov statistic of each feature.
    p_value : array, shape (features,)
        Of equal distributions.
    autocorrelation : array, shape (features,)
        Largest difference of the autocorrelations over the first lags.
    mmd : float
        Maximum mean discrepancy with a Gaussian kernel of the median distance.
    """

    ks: np.ndarray
    p_value: np.ndarray
    autocorrelation: np.ndarray
    mmd: float


def stealth_report(clean: Tensor, perturbed: Tensor, *, n_lags: int = 24) -> StealthReport:
    """Compare two series of observations as a detector would.

    Parameters
    ----------
    clean, perturbed : Tensor, shape (n, features)
        In the order of time.
    n_lags : int
        Lags compared, at least 1 and below n.

    Returns
    -------
    StealthReport

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If shapes or lags are not allowed.

    References
    ----------
    Broda-Milian et al. (2024), arXiv:2407.05182.

    Examples
    --------
    >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    >>> found = stealth_report(x, x)
    >>> float(found.ks.max()), found.mmd
    (0.0, 0.0)
    """
    from scipy.stats import ks_2samp

    checks.tensor("clean", clean, ndim=2)
    checks.same_shape("perturbed", perturbed, "clean", clean)
    lags = checks.integer("n_lags", n_lags, low=1, high=len(clean) - 1)
    a, b = (v.detach().double().cpu() for v in (clean, perturbed))
    tests = [ks_2samp(a[:, j].numpy(), b[:, j].numpy()) for j in range(a.shape[1])]
    scale = a.std(0).clamp_min(1e-12)
    return StealthReport(
        np.array([t.statistic for t in tests]),
        np.array([t.pvalue for t in tests]),
        (_autocorrelation(a, lags) - _autocorrelation(b, lags)).abs().amax(0).numpy(),
        _mmd(a / scale, b / scale),
    )


def _autocorrelation(x: Tensor, lags: int) -> Tensor:
    z = x - x.mean(0)
    power = z.square().sum(0).clamp_min(1e-12)
    return torch.stack([(z[k:] * z[: len(z) - k]).sum(0) / power for k in range(1, lags + 1)])


def _mmd(a: Tensor, b: Tensor) -> float:
    both = torch.cdist(torch.cat([a, b]), torch.cat([a, b])).square()
    width = both[both > 0].median() if bool((both > 0).any()) else both.new_tensor(1.0)
    kernel = torch.exp(-both / width)
    n = len(a)
    squared = kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
    return float(squared.clamp_min(0).sqrt())


def _actions(out: Tensor) -> Tensor:
    if out.ndim not in (1, 2) or (out.ndim == 2 and out.shape[1] != 1):
        raise checks.ModelError(
            f"the policy answers shape {tuple(out.shape)}; allowed: one action a row, (n,) or (n, 1). Attack one action at a "
            "time."
        )
    return out.reshape(-1)


def _mask(mask: Tensor, x: Tensor) -> Tensor:
    try:
        return mask.to(x).expand(x.shape[1:])
    except RuntimeError:
        raise checks.ArgumentError(
            f"feature_mask has shape {tuple(mask.shape)}; allowed: one that broadcasts to a row, {tuple(x.shape[1:])}. "
            "Give one value a feature."
        ) from None
