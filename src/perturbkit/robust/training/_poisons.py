"""Availability poisons: small perturbations of training images that networks learn instead of the pictures."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Ball, Oracle, around, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, rademacher, randn, randperm, uniform
from perturbkit.robust.attacks._parts import labels_for
from perturbkit.robust.training._loops import checked_data, cross_entropy

__all__ = ["autoregressive_poison", "error_maximising_poison", "error_minimising_poison", "patch_poison"]


def patch_poison(
    x: Tensor, y: Tensor, epsilon: float = 8 / 255, *, cells: int = 4, generator: Seed = None
) -> Tensor:
    """Add a grid of random colours to the images of each class: a poison that needs no network.

    Parameters
    ----------
    x : Tensor, shape (n, channels, height, width), in [0, 1]
        Images.
    y : Tensor of int64, shape (n,)
        Labels.
    epsilon : float
        Change of every value, zero or above.
    cells : int
        Cells of the grid along each side.
    generator : torch.Generator, int or None
        Draws the signs.

    Returns
    -------
    Tensor, shape of ``x``
        In [0, 1].

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    One pattern of signs a class, channel and cell, times ``epsilon``: linearly separable, of low frequency.

    References
    ----------
    Yu et al. (2022), Availability attacks create shortcuts, arXiv:2111.00898.

    Examples
    --------
    >>> grey = torch.full((2, 3, 8, 8), 0.5)
    >>> poisoned = patch_poison(grey, torch.tensor([0, 1]), 0.1, generator=0)
    >>> round(float((poisoned - grey).abs().min()), 3), bool((poisoned[0] != poisoned[1]).any())
    (0.1, True)
    """
    checks.image_batch("x", x)
    labels = checks.labels("y", y, n=len(x)).to(x.device)
    checks.nonnegative("epsilon", epsilon)
    checks.integer("cells", cells, low=1)
    shape = (int(labels.max()) + 1, x.shape[1], cells, cells)
    signs = rademacher(shape, generator=as_generator(generator), like=x).to(x)
    patterns = functional.interpolate(signs, size=tuple(x.shape[-2:]), mode="nearest")
    return x + around(x, "linf", epsilon).project(epsilon * patterns[labels])


def autoregressive_poison(x: Tensor, y: Tensor, epsilon: float = 1.0, *, generator: Seed = None) -> Tensor:
    r"""Add noise to each image that every class's own linear rule continues from pixel to pixel: it needs no network.

    Parameters
    ----------
    x : Tensor, shape (n, channels, height, width), in [0, 1]
        Images, at least 3 pixels wide and high.
    y : Tensor of int64, shape (n,)
        Labels.
    epsilon : float
        Euclidean length of each image's change, before it is cut to the range; zero or above.
    generator : torch.Generator, int or None
        Draws the rules and the noise that they start from.

    Returns
    -------
    Tensor, shape of ``x``
        In [0, 1].

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    The first two rows and columns are standard normal; from there :math:`\delta_{ij} = \sum_k b_k \delta_k` over the other
    eight pixels of the window of three by three that ends at (i, j), with non-negative coefficients that sum to one, drawn
    for each class and channel. No two images have the same noise, but all of a class obey one rule, which a convolution finds.

    References
    ----------
    Sandoval-Segura et al. (2022), Autoregressive Perturbations for Data Poisoning, arXiv:2206.03693.

    Examples
    --------
    >>> grey = torch.full((2, 3, 8, 8), 0.5)
    >>> poisoned = autoregressive_poison(grey, torch.tensor([0, 1]), 0.5, generator=0)
    >>> [round(float(d.norm()), 3) for d in poisoned - grey]
    [0.5, 0.5]
    """
    checks.image_batch("x", x)
    labels = checks.labels("y", y, n=len(x)).to(x.device)
    checks.nonnegative("epsilon", epsilon)
    if min(x.shape[-2:]) < 3:
        raise checks.ArgumentError(
            f"x has shape {tuple(x.shape)}; allowed: images of at least 3 by 3 pixels. Enlarge them first."
        )
    g = as_generator(generator)
    rules = uniform((int(labels.max()) + 1, x.shape[1], 8), generator=g, dtype=torch.float64)
    rules = (rules / rules.sum(2, keepdim=True)).to(x.device)[labels]
    delta = randn(tuple(x.shape), generator=g, dtype=torch.float64).to(x.device)
    for i in range(2, x.shape[2]):
        for j in range(2, x.shape[3]):
            window = delta[:, :, i - 2 : i + 1, j - 2 : j + 1].flatten(2)[:, :, :8]
            delta[:, :, i, j] = (rules * window).sum(2)
    delta = delta * (epsilon / delta.flatten(1).norm(dim=1))[:, None, None, None]
    return (x + delta.to(x)).clamp(0, 1)


def error_minimising_poison(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float = 8 / 255,
    *,
    n_rounds: int = 10,
    weight_steps: int = 10,
    lr: float = 0.1,
    batch_size: int = 128,
    n_steps: int = 20,
    step_size: float | None = None,
    generator: Seed = None,
    progress: ProgressLike = False,
) -> Tensor:
    """Perturb images so that a network finds nothing left to learn in them.

    Parameters
    ----------
    model : nn.Module
        Where training starts, as a rule untrained; a copy is trained, it stays as it is.
    x : Tensor, shape (n, ...), in [0, 1]
        Images.
    y : Tensor of int64, shape (n,)
        Labels.
    epsilon : float
        Largest change of a value, above zero.
    n_rounds : int
        How often weights and perturbations take turns.
    weight_steps, lr, batch_size : int, float, int
        Steps of stochastic gradient descent with momentum 0.9 a round.
    n_steps, step_size : int, float
        Projected gradient steps of all images a round, and their length; ``epsilon / 10`` by default.
    generator : torch.Generator, int or None
        Draws the batches.
    progress : Progress, bool or None
        Reports rounds.

    Returns
    -------
    Tensor, shape of ``x``
        In [0, 1].

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.
    ModelError
        If the model does not answer one score a class.

    Notes
    -----
    ``min_delta min_w L(w, x + delta, y)`` by turns: unlearnable examples.

    Cost: ``n_rounds (n n_steps + weight_steps batch_size)`` gradients.

    References
    ----------
    Huang et al. (2021), Unlearnable examples, arXiv:2101.04898.

    Examples
    --------
    >>> x, y = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    >>> poisoned = error_minimising_poison(nn.Linear(4, 2), x, y, 0.1, n_rounds=2, generator=0)
    >>> round(float((poisoned - x).abs().max()), 3)
    0.1
    """
    checked_data(model, x, y)
    _, labels = _labels(Oracle(model), x, y)
    stride = _stride(epsilon, n_steps, step_size)
    around(x, "linf", epsilon)
    for name, value in (("n_rounds", n_rounds), ("weight_steps", weight_steps), ("batch_size", batch_size)):
        checks.integer(name, value, low=1)
    checks.positive("lr", lr)
    g = as_generator(generator)
    learner = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.SGD(learner.parameters(), lr=lr, momentum=0.9)
    oracle = Oracle(learner)
    delta = torch.zeros_like(x)
    for _ in track(range(n_rounds), "error-minimising poison", progress=progress):
        learner.train()
        for _ in range(weight_steps):
            rows = randperm(len(x), generator=g)[:batch_size].to(x.device)
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(learner, x[rows] + delta[rows], labels[rows]).backward()
            optimizer.step()
        delta = _towards(oracle, x, labels, delta, epsilon, n_steps, stride)
    return x + delta


def error_maximising_poison(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    epsilon: float = 8 / 255,
    *,
    shift: int = 1,
    n_steps: int = 50,
    step_size: float | None = None,
) -> Tensor:
    """Perturb images towards the next class of a trained network: features of a class under the label of another.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Trained classifier, answering logits (n, classes). One behind a differentiable squeezing makes an adaptive poison.
    x : Tensor, shape (n, ...), in [0, 1]
        Images.
    y : Tensor of int64, shape (n,)
        Labels.
    epsilon : float
        Largest change of a value, above zero.
    shift : int
        The target of label ``y`` is ``y + shift``, in a circle.
    n_steps, step_size : int, float
        Projected gradient steps, and their length; ``epsilon / 10`` by default.

    Returns
    -------
    Tensor, shape of ``x``
        In [0, 1].

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.
    ModelError
        If the model does not answer one score a class.

    Notes
    -----
    ``min_delta L(w, x + delta, y + shift)`` for fixed weights: targeted adversarial poisoning.

    Cost: ``n_steps`` gradients a row.

    References
    ----------
    Fowl et al. (2021), Adversarial examples make strong poisons, arXiv:2106.10807.

    Examples
    --------
    >>> w = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    >>> error_maximising_poison(lambda z: z @ w, torch.tensor([[0.6, 0.4]]), torch.tensor([0]), 0.2)
    tensor([[0.4000, 0.6000]])
    """
    checks.tensor("x", x)
    oracle = Oracle.wrap(model)
    classes, labels = _labels(oracle, x, y)
    checks.integer("shift", shift, low=1, high=classes - 1)
    stride = _stride(epsilon, n_steps, step_size)
    return x + _towards(oracle, x, (labels + shift) % classes, torch.zeros_like(x), epsilon, n_steps, stride)


def _labels(oracle: Oracle, x: Tensor, y: Tensor) -> tuple[int, Tensor]:
    """Return how many classes a model answers, asked about one row, and the labels, checked against them."""
    checks.labels("y", y, n=len(x))
    clean, _ = labels_for(oracle, x[:1], torch.zeros(1, dtype=torch.long))
    return clean.shape[1], checks.labels("y", y, n=len(x), n_classes=clean.shape[1]).to(x.device)


def _stride(epsilon: float, n_steps: int, step_size: float | None) -> Ball:
    """Check how far and how often perturbations go, and return a step's set."""
    checks.positive("epsilon", epsilon)
    checks.integer("n_steps", n_steps, low=1)
    return Ball("linf", epsilon / 10 if step_size is None else checks.positive("step_size", step_size))


def _towards(
    oracle: Oracle, x: Tensor, target: Tensor, delta: Tensor, epsilon: float, n_steps: int, stride: Ball
) -> Tensor:
    """Descend the cross-entropy of the target by projected gradient from where the perturbations are."""
    room = around(x, "linf", epsilon)
    with oracle.frozen():
        for _ in range(n_steps):
            _, gradient = oracle.value_and_gradient(x + delta, target, objective=_row_loss)
            delta = room.project(delta - stride.maximiser(gradient))
    return delta


def _row_loss(out: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(out, target, reduction="none")
