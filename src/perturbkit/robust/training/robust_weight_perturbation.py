"""Robust weight perturbation: adversarial training at weights that were made worse where the loss is still small.

Use it against robust overfitting, the fall of accuracy under attack late in adversarial training. Yu, Han, Gong, Shen, Ge,
Du and Liu (2022), Robust Weight Perturbation for Adversarial Training, arXiv:2205.14826; and adversarial weight
perturbation, which it constrains: Wu, Xia and Wang (2020), arXiv:2004.05884.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Norm, Oracle, assign, checks, flatten, unflatten, unwrap_output
from perturbkit.core import functional as functional_of
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator
from perturbkit.robust.training._loops import (
    Attack,
    Schedule,
    TrainingHistory,
    TrainingLoss,
    ascend,
    checked_data,
    cross_entropy,
    run_epochs,
)

__all__ = [
    "RobustWeightPerturbation",
    "TrainingHistory",
    "adversarial_train",
    "adversarial_weight_perturbation",
]


class RobustWeightPerturbation:
    """Perturb weights in the direction that raises the small losses of a batch, for the time of one gradient.

    Parameters
    ----------
    gamma : float
        Size of the perturbation relative to the weights, zero or above.
    loss_threshold : float
        Only rows with a cross-entropy below it are made worse (the loss stationary condition); zero or above, infinity for
        all rows. The authors take 1.7 for ten classes and 4.0 for a hundred.
    n_steps : int
        Steps of the ascent, at least 1; it ends earlier when no row is below the threshold.
    lr : float
        Length of a step relative to the gradient, above 0. It matters for several steps only, by the weight of later
        gradients, taken at weights already perturbed, against earlier ones.
    scaling : {"all", "tensor"}
        Whether the relative size holds for all weights together or for each tensor.

    Notes
    -----
    ``v <- v + lr grad_w 1/n sum_i 1[l_i < c_min] l_i(w + gamma s(v))`` from ``v = 0``, with ``s(v) = v ||w|| / ||v||``.
    Tensors with two dimensions and more are perturbed: no biases and no normalisation layers. The ascent runs in the mode
    that the model is in and leaves its buffers alone.

    Cost: a forward and a backward pass a step, and two copies of the weights.

    References
    ----------
    Yu et al. (2022), arXiv:2205.14826, algorithm 1. Wu et al. (2020), arXiv:2004.05884.

    Examples
    --------
    In a loop of one's own, around whatever loss is descended:

    >>> net, x, y = nn.Linear(2, 2), torch.ones(4, 2), torch.tensor([0, 1, 0, 1])
    >>> before, worse = flatten(net), RobustWeightPerturbation(gamma=0.1)
    >>> with worse(net, x, y):
    ...     moved = flatten(net) - before
    ...     functional.cross_entropy(net(x), y).backward()
    >>> bool(torch.equal(flatten(net), before)), bool(torch.isclose(moved.norm(), 0.1 * before[:4].norm()))
    (True, True)

    Or as a loss of model, inputs and labels:

    >>> worse.loss(net, x, y).backward()
    """

    def __init__(
        self,
        *,
        gamma: float = 0.01,
        loss_threshold: float = 1.7,
        n_steps: int = 10,
        lr: float = 0.01,
        scaling: Literal["all", "tensor"] = "all",
    ) -> None:
        self.gamma = checks.nonnegative("gamma", gamma)
        self.loss_threshold = (
            loss_threshold
            if loss_threshold == math.inf
            else checks.nonnegative("loss_threshold", loss_threshold)
        )
        self.n_steps = checks.integer("n_steps", n_steps, low=1)
        self.lr = checks.positive("lr", lr)
        self.scaling = checks.one_of("scaling", scaling, ("all", "tensor"))

    @contextmanager
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[None]:
        """Hold the perturbation inside a ``with``, and restore the weights bit for bit after it.

        Take the gradient inside and the optimizer's step after it.

        Parameters
        ----------
        model : nn.Module
            Classifier answering logits (n, C).
        x : Tensor, shape (n, ...)
            Inputs, as attacked.
        y : Tensor of int64, shape (n,)
            Labels.
        """
        labels = checked_data(model, x, y)
        shift = self._ascent(model, x, labels)
        if shift is None:
            yield
            return
        before = flatten(model)
        try:
            assign(model, before + shift)
            yield
        finally:
            assign(model, before)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the cross-entropy at the perturbed weights, with the graph to the weights as they are.

        Parameters
        ----------
        model, x, y
            As for a call.

        Returns
        -------
        Tensor, shape ()
        """
        labels = checked_data(model, x, y)
        shift = self._ascent(model, x, labels)
        if shift is None:
            return cross_entropy(model, x, labels)
        trained = dict(model.named_parameters())
        moved = {name: trained[name] + piece for name, piece in unflatten(shift, model).items()}
        out = torch.func.functional_call(model, moved, (x,))
        return functional.cross_entropy(unwrap_output(out), labels)

    def _ascent(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor | None:
        """Return gamma s(v), a number a trainable parameter, or None where no row has a small loss."""
        if self.gamma == 0:
            return None
        evaluate, w = functional_of(model), flatten(model)
        parts = unflatten(w, model).values()
        sizes = [p.numel() for p in parts]
        chosen = torch.cat([torch.full_like(p.reshape(-1), float(p.ndim > 1)) for p in parts])
        v, shift = torch.zeros_like(w), None
        for _ in range(self.n_steps):
            at = (w if shift is None else w + shift).requires_grad_(True)
            losses = functional.cross_entropy(unwrap_output(evaluate(at, x)), y, reduction="none")
            small = losses < self.loss_threshold
            if not bool(small.any()):
                break
            (gradient,) = torch.autograd.grad((losses * small).mean(), at)
            v = v + self.lr * gradient * chosen
            shift = self.gamma * self._scaled(v, w.detach() * chosen, sizes)
        return shift

    def _scaled(self, v: Tensor, w: Tensor, sizes: list[int]) -> Tensor:
        if self.scaling == "all":
            return v * _ratio(w, v)
        pairs = zip(v.split(sizes), w.split(sizes), strict=True)
        return torch.cat([part * _ratio(weight, part) for part, weight in pairs])


def adversarial_weight_perturbation(*, gamma: float = 0.01) -> RobustWeightPerturbation:
    """Return the perturbation of all rows in one step, scaled tensor by tensor.

    Parameters
    ----------
    gamma : float
        Size of each tensor's perturbation relative to the tensor.

    Returns
    -------
    RobustWeightPerturbation
        With ``loss_threshold=inf, n_steps=1, scaling="tensor"``.

    Notes
    -----
    ``w_l + gamma ||w_l|| g_l / ||g_l||`` for the gradient ``g`` of the mean loss.

    References
    ----------
    Wu et al. (2020), arXiv:2004.05884, equations 8 to 10.

    Examples
    --------
    >>> adversarial_weight_perturbation(gamma=0.005).n_steps
    1
    """
    return RobustWeightPerturbation(
        gamma=checks.nonnegative("gamma", gamma), loss_threshold=math.inf, n_steps=1, scaling="tensor"
    )


def adversarial_train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    *,
    epochs: int,
    weight_perturbation: RobustWeightPerturbation | None = None,
    loss: TrainingLoss = cross_entropy,
    attack: Attack | None = None,
    n_attack_steps: int = 10,
    attack_step: float | None = None,
    norm: Norm = "linf",
    clip: tuple[float, float] | None = (0.0, 1.0),
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    drops: Sequence[float] = (0.5, 0.75),
    batch_size: int = 128,
    evaluate: Callable[[nn.Module], float] | None = None,
    generator: Seed = None,
    progress: ProgressLike = False,
) -> TrainingHistory:
    """Train a classifier on attacked inputs.

    Parameters
    ----------
    model : nn.Module
        Classifier answering logits (n, C); trained in place, by SGD with momentum.
    x : Tensor, shape (n, ...)
        Inputs.
    y : Tensor of int64, shape (n,)
        Labels.
    epsilon : float
        Radius of the attack, above 0.
    epochs : int
        Passes over the inputs, at least 1.
    weight_perturbation : RobustWeightPerturbation, optional
        Takes every gradient at perturbed weights.
    loss : callable (model, x, y) -> Tensor
        What is descended on the attacked inputs; for instance the ``loss`` of a regulariser.
    attack : callable (model, x, y) -> Tensor, optional
        Returns attacked inputs. By default projected gradient ascent on the cross-entropy from a random start, with the
        model in evaluation mode.
    n_attack_steps : int
        Its steps, at least 1.
    attack_step : float, optional
        Their length; a quarter of the radius by default.
    norm : {"linf", "l2", "l1"}
        Norm of the radius.
    clip : (float, float) or None
        Range of valid inputs.
    lr, momentum, weight_decay : float
        Of the descent.
    drops : sequence of float
        Shares of the epochs after which the rate falls to a tenth.
    batch_size : int
        Rows a step.
    evaluate : callable (model) -> float, optional
        Called in evaluation mode after each epoch, for ``history.score``.
    generator : torch.Generator, int or None
        Order of the batches and starts of the attack.
    progress : Progress, bool or None
        Reports epochs.

    Returns
    -------
    TrainingHistory

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``min_w sum_i max_{||d_i|| <= epsilon} l(f_w(x_i + d_i), y_i)``; with a weight perturbation, at ``w + v``.

    Cost: a step is ``n_attack_steps`` gradients in the input and one in the weights, and those of the perturbation.

    References
    ----------
    Madry et al. (2018), arXiv:1706.06083. Yu et al. (2022), arXiv:2205.14826.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.rand(64, 2, generator=torch.Generator().manual_seed(0))
    >>> worse = RobustWeightPerturbation(gamma=0.01)
    >>> history = adversarial_train(net, x, (x[:, 0] > 0.5).long(), 0.05, epochs=2, weight_perturbation=worse, generator=0)
    >>> len(history.loss)
    2
    """
    labels = checked_data(model, x, y)
    checks.positive("epsilon", epsilon)
    checks.integer("n_attack_steps", n_attack_steps, low=1)
    checks.one_of("norm", norm, ("linf", "l2", "l1"))
    stride = epsilon / 4 if attack_step is None else checks.positive("attack_step", attack_step)
    schedule = Schedule(epochs, lr, momentum, weight_decay, drops, batch_size)
    g, oracle = as_generator(generator), Oracle(model)

    def step(rows: Tensor, epoch: int) -> tuple[float, None]:
        at, wanted = x[rows], labels[rows]
        if attack is None:
            found = ascend(oracle, at, wanted, epsilon, norm, clip, n_attack_steps, stride, g)
        else:
            found = attack(model, at, wanted).detach()
        with nullcontext() if weight_perturbation is None else weight_perturbation(model, found, wanted):
            value = loss(model, found, wanted)
            value.backward()
        return float(value.detach()), None

    return run_epochs(
        model, len(x), step, schedule, like=x, evaluate=evaluate, generator=g, progress=progress
    )


def _ratio(w: Tensor, v: Tensor) -> Tensor:
    """Return ||w|| / ||v||, zero where v is."""
    length = v.norm()
    return torch.where(length > 0, w.norm() / length, 0.0)
