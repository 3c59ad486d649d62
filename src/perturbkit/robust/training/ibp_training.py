"""Interval bound propagation: boxes through a network, and training a network whose boxes stay apart.

Use it for a proof in the largest-change norm at the price of two forward passes, and to train networks for which
that proof succeeds. Gowal, Dvijotham, Stanforth and others (2018), On the Effectiveness of Interval Bound Propagation
for Training Verifiably Robust Models, arXiv:1810.12715.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from perturbkit.core import Result, checks, keeping_modes, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randperm
from perturbkit.robust.certificates._parts import (
    Interval,
    cut_last_linear,
    evaluating,
    interval_forward,
    trace,
)

__all__ = ["IBPHistory", "IBPTrainer", "elided_worst_logits", "interval_bounds", "verified_accuracy"]


@dataclass(frozen=True, eq=False)
class IBPHistory(Result):
    """The training of a verifiable network, one entry a step.

    Attributes
    ----------
    loss : Tensor
        Training loss.
    epsilon : Tensor
        Radius trained with.
    kappa : Tensor
        Weight of the clean loss.
    """

    loss: Tensor
    epsilon: Tensor
    kappa: Tensor


def interval_bounds(model: nn.Module, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Bound the outputs of a network over a box of inputs.

    Parameters
    ----------
    model : nn.Module
        A network of linear and convolution layers, pooling, normalisation in evaluation mode, monotone activations,
        GELU and SiLU, flattening, sums, products and concatenation. It is bounded as it computes in evaluation mode,
        and left as it is.
    lower, upper : Tensor, shape (n, ...)
        Lowest and highest inputs, elementwise ``lower <= upper``.

    Returns
    -------
    lower, upper : Tensor, shape (n, outputs)
        No input of the box has an output outside. Exact for one linear layer.

    Raises
    ------
    ModelError
        If the network has an operation without a rule; it is named.
    ArgumentError
        If the box is empty somewhere.

    Notes
    -----
    With centre ``mu`` and radius ``r``: a linear map gives ``W mu + b`` and ``|W| r``; a monotone activation is applied
    to both ends. Rounding is not bounded: the proof is one in real arithmetic. Differentiable, with the gradients of
    the weights.

    Cost: two forward passes.

    References
    ----------
    Gowal et al. (2018), arXiv:1810.12715, section 3.

    Examples
    --------
    >>> net = nn.Linear(2, 1)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0, -2.0]])), net.bias.data.zero_()
    >>> low, high = interval_bounds(net, torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    >>> low.tolist(), high.tolist()
    ([[-2.0]], [[1.0]])
    """
    _module(model)
    checks.tensor("lower", lower)
    checks.same_shape("upper", checks.tensor("upper", upper), "lower", lower)
    if bool((lower > upper).any()):
        raise checks.ArgumentError(
            f"lower is above upper by up to {float((lower - upper).max()):.4g}; allowed: lower <= upper. Swap them."
        )
    graph = trace(model, lower)
    with evaluating(model):
        found = interval_forward(graph, lower, upper)
    return found.lower, found.upper


def elided_worst_logits(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float, *, clip: tuple[float, float] | None = (0.0, 1.0)
) -> Tensor:
    """Return the worst logits over a box around each input: the largest lead of every wrong class.

    Parameters
    ----------
    model : nn.Module
        Classifier. Where it ends in a linear layer, that layer is merged with the comparison, which is tighter than
        comparing its bounds.
    x : Tensor, shape (n, ...)
        Inputs.
    y : Tensor of int64, shape (n,)
        Labels.
    epsilon : float
        Largest change of one value, zero or above.
    clip : (float, float) or None
        Range of valid inputs, with which the box is intersected.

    Returns
    -------
    Tensor, shape (n, classes)
        An upper bound of ``z_k - z_y`` over the box; zero at ``k = y``. The row is verified if all others are below 0.

    Raises
    ------
    ModelError
        If the network has an operation without a rule; it is named.
    ArgumentError
        If a label or the radius is not allowed.

    Notes
    -----
    ``upper(z_k - z_y) = (W_k - W_y) mu + |W_k - W_y| r + b_k - b_y`` on the last box.

    References
    ----------
    Gowal et al. (2018), arXiv:1810.12715, equation 11 and section 3 ("elision").

    Examples
    --------
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    >>> worst = elided_worst_logits(net, torch.rand(3, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0]), 0.1)
    >>> worst.shape, worst[0, 0].item()
    (torch.Size([3, 2]), 0.0)
    """
    _module(model)
    checks.tensor("x", x)
    checks.nonnegative("epsilon", epsilon)
    labels = checks.labels("y", y, n=len(x)).to(x.device)
    body, last = cut_last_linear(trace(model, x))
    with evaluating(model):
        return _worst(body, last, _box(x, epsilon, clip), labels)


def verified_accuracy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    clip: tuple[float, float] | None = (0.0, 1.0),
    batch_size: int = 256,
) -> float:
    """Return the share of rows that no change up to ``epsilon`` can take from their label, proved by intervals.

    Parameters
    ----------
    model, x, y, epsilon, clip
        As in :func:`elided_worst_logits`.
    batch_size : int
        Rows at once, at least 1.

    Returns
    -------
    float
        In [0, 1]; never above the accuracy under any attack of that size.

    Notes
    -----
    A row counts if ``max_k upper(z_k - z_y) < 0``.

    References
    ----------
    Gowal et al. (2018), arXiv:1810.12715.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 2))
    >>> _ = net[0].weight.data.copy_(torch.eye(2)), net[0].bias.data.zero_()
    >>> x = torch.tensor([[0.9, 0.1], [0.55, 0.45]])
    >>> verified_accuracy(net, x, torch.tensor([0, 0]), 0.1)
    0.5
    """
    _module(model)
    checks.tensor("x", x)
    checks.nonnegative("epsilon", epsilon)
    checks.integer("batch_size", batch_size, low=1)
    labels = checks.labels("y", y, n=len(x)).to(x.device)
    body, last = cut_last_linear(trace(model, x))
    hits = 0
    with evaluating(model), torch.no_grad():
        for start in range(0, len(x), batch_size):
            rows = slice(start, start + batch_size)
            worst = _worst(body, last, _box(x[rows], epsilon, clip), labels[rows])
            hits += int((worst.scatter(1, labels[rows, None], -torch.inf).amax(1) < 0).sum())
    return hits / len(x)


class IBPTrainer:
    """Train a classifier so that interval bounds verify it.

    Parameters
    ----------
    model : nn.Module
        Classifier; trained in place. The clean pass moves the running statistics of its batch normalisations, and
        the bounds, for which they are later used, are taken with them.
    epsilon : float
        Radius to train for, above 0; somewhat more than the one to be verified.
    kappa : float
        Final weight of the clean loss, in [0, 1]; it starts at 1.
    warmup, rampup : float
        Shares of the steps spent on the clean loss alone, and on raising the radius; their sum at most 1.
    lr : float
        Learning rate of Adam, above 0; a tenth after 60 % of the steps and a hundredth after 90 %.
    batch_size : int
        Rows a step.
    clip : (float, float) or None
        Range of valid inputs.
    generator : torch.Generator, int or None
        Order of the batches.

    Notes
    -----
    ``loss = kappa CE(z(x), y) + (1 - kappa) CE(z_worst(epsilon_t), y)``. A ramp that is too fast collapses to a
    constant classifier; the default takes half of the steps.

    Cost: a step is two forward passes and a backward pass through both.

    References
    ----------
    Gowal et al. (2018), arXiv:1810.12715, section 4.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.rand(64, 4, generator=torch.Generator().manual_seed(0))
    >>> history = IBPTrainer(net, 0.05, generator=0).fit(x, (x[:, 0] > 0.5).long(), n_steps=20)
    >>> len(history.loss), float(history.epsilon[0]), round(float(history.epsilon[-1]), 3)
    (20, 0.0, 0.05)
    """

    def __init__(
        self,
        model: nn.Module,
        epsilon: float,
        *,
        kappa: float = 0.5,
        warmup: float = 0.05,
        rampup: float = 0.5,
        lr: float = 1e-3,
        batch_size: int = 100,
        clip: tuple[float, float] | None = (0.0, 1.0),
        generator: Seed = None,
    ) -> None:
        self.model = _module(model)
        self.epsilon = checks.positive("epsilon", epsilon)
        self.kappa = checks.between("kappa", kappa, 0, 1)
        self.warmup = checks.between("warmup", warmup, 0, 1)
        self.rampup = checks.between("rampup", rampup, 0, 1 - warmup)
        self.lr = checks.positive("lr", lr)
        self.batch_size = checks.integer("batch_size", batch_size, low=1)
        self.clip = clip
        self.generator = generator

    def fit(self, x: Tensor, y: Tensor, *, n_steps: int, progress: ProgressLike = False) -> IBPHistory:
        """Train on inputs and labels for a number of steps; the model is left in the mode it was in."""
        checks.tensor("x", x)
        labels = checks.labels("y", y, n=len(x)).to(x.device)
        checks.integer("n_steps", n_steps, low=1)
        g = as_generator(self.generator)
        graph, last = cut_last_linear(trace(self.model, x))
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr)
        losses, radii, weights = [], [], []
        rows = _batches(len(x), min(self.batch_size, len(x)), g)
        with keeping_modes(self.model):
            for step in track(range(n_steps), "interval bound training", progress=progress):
                self._decay(optimizer, step / n_steps)
                epsilon, kappa = self._schedule(step, n_steps)
                index = next(rows).to(x.device)
                loss = self._loss(graph, last, x[index], labels[index], epsilon, kappa)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
                radii.append(epsilon)
                weights.append(kappa)
        return IBPHistory(*(torch.tensor(v, dtype=torch.float64) for v in (losses, radii, weights)))

    def _loss(
        self,
        graph: fx.GraphModule,
        last: nn.Linear | None,
        x: Tensor,
        y: Tensor,
        epsilon: float,
        kappa: float,
    ) -> Tensor:
        self.model.train()  # the clean pass moves the running statistics
        loss = functional.cross_entropy(self.model(x), y)
        if epsilon == 0:
            return loss
        self.model.eval()
        worst = _worst(graph, last, _box(x, epsilon, self.clip), y)
        return kappa * loss + (1 - kappa) * functional.cross_entropy(worst, y)

    def _schedule(self, step: int, n_steps: int) -> tuple[float, float]:
        done = step / max(n_steps - 1, 1)
        ramp = (done - self.warmup) / self.rampup if self.rampup > 0 else math.copysign(1, done - self.warmup)
        share = min(max(ramp, 0.0), 1.0)
        return share * self.epsilon, 1 - share * (1 - self.kappa)

    def _decay(self, optimizer: torch.optim.Optimizer, done: float) -> None:
        factor = 1.0 if done < 0.6 else 0.1 if done < 0.9 else 0.01
        for group in optimizer.param_groups:
            group["lr"] = self.lr * factor


def _module(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise checks.ArgumentTypeError(
            f"model is a {type(model).__name__}; allowed: an nn.Module, whose layers can be bounded. Pass the network."
        )
    return model


def _box(x: Tensor, epsilon: float, clip: tuple[float, float] | None) -> Interval:
    lower, upper = x - epsilon, x + epsilon
    return Interval(lower, upper) if clip is None else Interval(lower.clamp(*clip), upper.clamp(*clip))


def _worst(graph: fx.GraphModule, last: nn.Linear | None, box: Interval, y: Tensor) -> Tensor:
    found = interval_forward(graph, box.lower, box.upper)
    classes = found.lower.shape[-1] if last is None else last.out_features
    if found.lower.ndim != 2:
        raise checks.ModelError(
            f"the network answers shape {tuple(found.lower.shape)}; allowed: (n, classes). Return the logits alone."
        )
    checks.labels("y", y, n_classes=classes)
    if last is None:
        lead = found.upper - found.lower.gather(1, y[:, None])
    else:
        weight = last.weight - last.weight[y][:, None]  # [n, k, d]: W_k - W_y
        lead = torch.einsum("nkd,nd->nk", weight, found.centre)
        lead = lead + torch.einsum("nkd,nd->nk", weight.abs(), found.radius)
        if last.bias is not None:
            lead = lead + last.bias - last.bias[y][:, None]
    return lead.scatter(1, y[:, None], 0.0)


def _batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield rows of batches, epoch after epoch."""
    while True:
        order = randperm(n, generator=generator)
        for start in range(0, n - size + 1, size):
            yield order[start : start + size]
