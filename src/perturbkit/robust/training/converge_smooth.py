"""ConvergeSmooth: single-step adversarial training whose loss may not jump from one epoch to the next.

Use it to train against large budgets at the price of two gradients a step, where single-step training otherwise loses its
robustness within an epoch (catastrophic overfitting). Zhao, Zhang, Kong and Yin (2023), Fast Adversarial Training with
Smooth Convergence, arXiv:2308.12857.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Box, checks, flatten, unwrap_output
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, uniform
from perturbkit.robust.training._loops import Schedule, TrainingHistory, checked_data, run_epochs

__all__ = ["ConvergeSmooth", "WeightCentralization", "fast_adversarial_train"]


class ConvergeSmooth:
    """Add or subtract a reference loss where it is far from its mean over the last epoch.

    Parameters
    ----------
    gamma_max : float
        Largest difference left alone, above 0; infinity for no constraint.
    ratio : float
        ``gamma_max`` over the smallest such difference, at least 1.
    stride : int
        Epochs left free at each end of a stage, zero or more.
    weight : float
        Factor of the reference loss, zero or above.
    stages : sequence of int, optional
        Epochs at which the learning rate changes, with the first and the end, rising; within one stage the loss has no
        reason to jump. None for one endless stage.

    Attributes
    ----------
    previous : float
        Mean reference loss of the last epoch; zero before the first.
    slope : float
        By how much it rose from the epoch before.

    Notes
    -----
    With the reference loss ``l`` of the batch, its mean ``p`` over the last epoch and ``b`` its rise,
    ``L + w sign(l - p) l`` where ``|l - p| > min(max(gamma_max / ratio, b), gamma_max)``, else ``L``. A loss that fell too far
    is thus pushed up, and the gradient should be clipped. Epochs count from zero; ``start + stride < epoch < end - stride``.

    The reference is the loss of the clean inputs, or of those that the attack started from, which costs nothing.

    Cost: none beyond the reference.

    References
    ----------
    Zhao et al. (2023), arXiv:2308.12857, section 3.

    Examples
    --------
    In a loop of one's own:

    >>> smooth = ConvergeSmooth(gamma_max=0.1, stride=0)
    >>> smooth.end_epoch(2.0)
    >>> loss, reference = torch.tensor(1.0), torch.tensor(1.5)
    >>> float(smooth.step(loss, reference, epoch=1))
    -0.5
    """

    def __init__(
        self,
        *,
        gamma_max: float = 0.03,
        ratio: float = 1.0,
        stride: int = 1,
        weight: float = 1.0,
        stages: Sequence[int] | None = None,
    ) -> None:
        self.gamma_max = gamma_max if gamma_max == math.inf else checks.positive("gamma_max", gamma_max)
        self.ratio = checks.between("ratio", ratio, 1, math.inf)
        self.stride = checks.integer("stride", stride, low=0)
        self.weight = checks.nonnegative("weight", weight)
        self.stages = None if stages is None else [checks.integer("stages", s, low=0) for s in stages]
        if self.stages is not None and (
            len(self.stages) < 2 or any(b <= a for a, b in itertools.pairwise(self.stages))
        ):
            raise checks.ArgumentError(
                f"stages is {list(self.stages)}; allowed: two or more rising epochs. Write for instance [0, 100, 105, 110]."
            )
        self.previous = self.slope = 0.0

    def step(self, loss: Tensor, reference_loss: Tensor, epoch: int) -> Tensor:
        """Return the loss to descend on a batch, with its graph.

        Parameters
        ----------
        loss : Tensor, shape ()
            Loss of the attacked inputs.
        reference_loss : Tensor, shape ()
            With a graph to the weights, which the correction needs.
        epoch : int
            From zero.

        Returns
        -------
        Tensor, shape ()
            ``loss`` itself where the constraint is off or kept.
        """
        difference = float(reference_loss.detach()) - self.previous
        if not self.active(epoch) or abs(difference) <= self.threshold or self.weight == 0:
            return loss
        return loss + math.copysign(self.weight, difference) * reference_loss

    def active(self, epoch: int) -> bool:
        """Return whether the constraint holds in an epoch: well inside one stage."""
        stages: Sequence[float] = (0, math.inf) if self.stages is None else self.stages
        pairs = itertools.pairwise(stages)
        return any(start + self.stride < epoch < end - self.stride for start, end in pairs)

    @property
    def threshold(self) -> float:
        """The difference that is left alone now."""
        low = 0.0 if self.gamma_max == math.inf else self.gamma_max / self.ratio
        return self.gamma_max if self.gamma_max == math.inf else min(max(low, self.slope), self.gamma_max)

    def end_epoch(self, mean_reference_loss: float) -> None:
        """Take in the mean reference loss of the epoch that ended."""
        value = checks.nonnegative("mean_reference_loss", mean_reference_loss)
        self.slope, self.previous = value - self.previous, value


class WeightCentralization:
    """Penalise the distance of the weights from the mean of those at the ends of earlier epochs.

    Parameters
    ----------
    model : nn.Module
        Whose trainable weights are held together.
    coefficient : float
        Factor of the squared distance, zero or above.

    Notes
    -----
    ``c ||w - mean_e w_e||^2`` over the epochs since the last :meth:`restart`; zero before the first has ended. Restart it
    where the learning rate changes.

    Cost: two copies of the weights.

    References
    ----------
    Zhao et al. (2023), arXiv:2308.12857, section 3.3.

    Examples
    --------
    >>> net = nn.Linear(1, 1, bias=False)
    >>> centre = WeightCentralization(net, 0.5)
    >>> float(centre.penalty())
    0.0
    >>> centre.end_epoch()
    >>> _ = net.weight.data.add_(2.0)
    >>> float(centre.penalty().detach())
    2.0
    """

    def __init__(self, model: nn.Module, coefficient: float = 0.1) -> None:
        self._zero = torch.zeros_like(flatten(model))
        self.model = model
        self.coefficient = checks.nonnegative("coefficient", coefficient)
        self._count, self._mean = 0, self._zero

    def penalty(self) -> Tensor:
        """Return the penalty, with a graph to the weights."""
        if self._count == 0:
            return self._zero[0]
        weights = torch.cat([p.reshape(-1) for p in self.model.parameters() if p.requires_grad])
        return self.coefficient * (weights - self._mean).square().sum()

    def end_epoch(self) -> None:
        """Take the weights of the epoch that ended into the mean."""
        self._count += 1
        self._mean = self._mean + (flatten(self.model) - self._mean) / self._count

    def restart(self) -> None:
        """Forget the epochs so far, for a new stage."""
        self._count, self._mean = 0, self._zero


def fast_adversarial_train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    epochs: int,
    smooth: ConvergeSmooth | None = None,
    centre: WeightCentralization | None = None,
    init: Literal["random", "previous"] = "random",
    reference: Literal["start", "clean"] = "start",
    attack_step: float | None = None,
    label_smoothing: float = 0.0,
    consistency: float = 0.0,
    reset: int = 40,
    max_norm: float | None = 5.0,
    clip: tuple[float, float] | None = (0.0, 1.0),
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    drops: Sequence[float] = (10 / 11, 21 / 22),
    batch_size: int = 128,
    evaluate: Callable[[nn.Module], float] | None = None,
    generator: Seed = None,
    progress: ProgressLike = False,
) -> TrainingHistory:
    """Train a classifier on inputs attacked by one step of gradient signs.

    Parameters
    ----------
    model : nn.Module
        Classifier answering logits (n, C); trained in place, by SGD with momentum.
    x : Tensor, shape (n, ...)
        Inputs.
    y : Tensor of int64, shape (n,)
        Labels.
    epsilon : float
        Largest change of one value, above 0.
    epochs : int
        Passes over the inputs, at least 1.
    smooth : ConvergeSmooth, optional
        Keeps the loss from jumping. Without ``stages`` of its own it goes by the drops of the rate.
    centre : WeightCentralization, optional
        Keeps the weights together; restarted where the rate drops.
    init : {"random", "previous"}
        Start of the step: a uniform draw (FGSM-RS), or what an earlier epoch reached for the row, moved along a
        decaying mean of its gradients (FGSM-MEP).
    reference : {"start", "clean"}
        Where the reference loss is taken: at the start of the step, for nothing, or at the clean inputs.
    attack_step : float, optional
        Length of the step; 1.25 times the radius by default, the radius itself for ``init="previous"``.
    label_smoothing : float
        Share of the labels' mass that is spread over all classes, in [0, 1).
    consistency : float
        Factor of the mean squared difference of the logits at the end and the start of the step, zero or above.
    reset : int
        Epochs after which ``init="previous"`` draws anew.
    max_norm : float or None
        Largest norm of the gradient.
    clip : (float, float) or None
        Range of valid inputs.
    lr, momentum, weight_decay, drops, batch_size, evaluate, generator, progress
        As in :func:`adversarial_train`.

    Returns
    -------
    TrainingHistory
        With the reference loss a epoch.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``d = P(d_0 + a sign grad l(x + d_0))``, and ``l(x + d)`` is descended, with the terms above. The step is taken in the
    mode of training, as its loss is the reference.

    Cost: two forward and backward passes a step, and a forward and backward pass more for a clean reference.

    References
    ----------
    Zhao et al. (2023), arXiv:2308.12857. Wong, Rice and Kolter (2020), arXiv:2001.03994. Jia et al. (2022), Prior-Guided
    Adversarial Initialization for Fast Adversarial Training, arXiv:2207.08859.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    >>> y = (x[:, 0] > 0.5).long()
    >>> history = fast_adversarial_train(net, x, y, 0.05, epochs=3, smooth=ConvergeSmooth(), generator=0)
    >>> len(history.reference_loss)
    3
    """
    labels = checked_data(model, x, y)
    checks.positive("epsilon", epsilon)
    checks.one_of("init", init, ("random", "previous"))
    checks.one_of("reference", reference, ("start", "clean"))
    checks.between("label_smoothing", label_smoothing, 0, 1, inclusive="low")
    checks.nonnegative("consistency", consistency)
    checks.integer("reset", reset, low=1)
    usual = epsilon * (1.25 if init == "random" else 1.0)
    stride = usual if attack_step is None else checks.positive("attack_step", attack_step)
    schedule = Schedule(epochs, lr, momentum, weight_decay, drops, batch_size, max_norm)
    stages = schedule.stages()
    if smooth is not None and smooth.stages is None:
        smooth.stages = stages
    g = as_generator(generator)
    starts = _Starts(x, epsilon, clip, init == "previous", reset, g)

    def cross_entropy(out: Tensor, wanted: Tensor) -> Tensor:
        return functional.cross_entropy(out, wanted, label_smoothing=label_smoothing)

    def step(rows: Tensor, epoch: int) -> tuple[float, float]:
        at, wanted = x[rows], labels[rows]
        start = starts.draw(rows, epoch).requires_grad_(True)
        before = unwrap_output(model(at + start))
        start_loss = cross_entropy(before, wanted)
        # Kept for the reference and the consistency, which are differentiated in the weights.
        (gradient,) = torch.autograd.grad(start_loss, start, retain_graph=True)
        found = starts.move(rows, start.detach(), gradient, stride)
        after = unwrap_output(model(at + found))
        value = cross_entropy(after, wanted)
        if consistency > 0:
            value = value + consistency * (after - before).square().mean()
        referred = start_loss if reference == "start" else cross_entropy(unwrap_output(model(at)), wanted)
        if smooth is not None:
            value = smooth.step(value, referred, epoch)
        if centre is not None:
            value = value + centre.penalty()
        value.backward()
        return float(value.detach()), float(referred.detach())

    def end_epoch(epoch: int, reference_loss: float | None) -> None:
        if smooth is not None and reference_loss is not None:
            smooth.end_epoch(reference_loss)
        if centre is not None:
            if epoch + 1 in stages[1:-1]:
                centre.restart()
            else:
                centre.end_epoch()

    return run_epochs(
        model, len(x), step, schedule, like=x, end_epoch=end_epoch, evaluate=evaluate, generator=g, progress=progress
    )  # fmt: skip


class _Starts:
    """Where each row's step starts, and, for later epochs, where it goes on from."""

    def __init__(
        self, x: Tensor, epsilon: float, clip: tuple[float, float] | None, keep: bool, reset: int, generator: torch.Generator
    ) -> None:  # fmt: skip
        self.x, self.epsilon, self.clip, self.keep, self.reset = x, epsilon, clip, keep, reset
        self.generator, self.epoch = generator, -1

    def draw(self, rows: Tensor, epoch: int) -> Tensor:
        if not self.keep:
            return self._project(rows, self._uniform(self.x[rows]))
        if epoch != self.epoch and epoch % self.reset == 0:
            self.deltas, self.means = self._uniform(self.x).sign() * self.epsilon, torch.zeros_like(self.x)
        self.epoch = epoch
        return self._project(rows, self.deltas[rows])

    def move(self, rows: Tensor, start: Tensor, gradient: Tensor, stride: float) -> Tensor:
        if self.keep:
            total = gradient.abs().sum()
            self.means[rows] = 0.3 * self.means[rows] + gradient / torch.where(total > 0, total, 1.0)
            self.deltas[rows] = self._project(rows, start + stride * self.means[rows].sign())
        return self._project(rows, start + stride * gradient.sign())

    def _uniform(self, like: Tensor) -> Tensor:
        return uniform(like.shape, -self.epsilon, self.epsilon, generator=self.generator, like=like)

    def _project(self, rows: Tensor, delta: Tensor) -> Tensor:
        low, high = (-math.inf, math.inf) if self.clip is None else self.clip
        at = self.x[rows]
        room = Box((low - at).clamp_min(-self.epsilon), (high - at).clamp_max(self.epsilon))
        return room.project(delta)
