"""The two ends between which Source lies: the influence function, and the derivative through every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from perturbkit.core import Attribution, Oracle, checks
from perturbkit.core.curvature import hessian
from perturbkit.core.random import Seed, as_generator
from perturbkit.explain.influence._curvature import KINDS, Kind, fitted
from perturbkit.explain.influence._parts import (
    Data,
    Network,
    RowFunction,
    State,
    asked,
    checked_data,
    checked_function,
    checked_states,
    numbers,
)

_MEAN_EIGENVALUE = 0.1  # the damping of Grosse et al. (2023), in mean eigenvalues


@dataclass(frozen=True, eq=False)
class TrainingInfluence(Attribution):
    """What each training row does to a measurement of each query.

    Attributes
    ----------
    values : Tensor, shape (n_queries, n_train)
        First-order change of the measurement when the training row is left out. Positive means that it rises: if the
        measurement is the loss, that the row speaks for the query's target.
    target, cost, method, extras
        As in the base; ``target`` is ``None``.
    """


def influence_function(
    model: Oracle | nn.Module,
    per_sample_loss: RowFunction,
    checkpoints: Sequence[State],
    train_data: Data,
    test_data: Data,
    *,
    measurement: RowFunction | None = None,
    curvature: Kind = "exact",
    damping: float | None = None,
    n_samples: int | None = None,
    chunk_size: int | None = None,
    generator: Seed = None,
) -> TrainingInfluence:
    """Return the influence function at the last checkpoint: the limit of Source for training to convergence.

    Parameters
    ----------
    model, per_sample_loss, curvature, n_samples, chunk_size, generator
        As in :class:`Source`.
    checkpoints : sequence of state dicts
        The last one is used.
    train_data, test_data : (Tensor, Tensor)
        Inputs and targets, a row each.
    measurement : callable (outputs, y) -> (n,), optional
        What is measured of each query; the loss by default.
    damping : float or None
        Added to the eigenvalues; ``None``: a tenth of their mean. With 0 the pseudo-inverse.

    Returns
    -------
    TrainingInfluence
        ``extras["damping"]`` as used.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``grad f(q)^T (G + damping I)^-1 grad loss(z) / N``, with G the Gauss-Newton matrix of the mean loss.

    References
    ----------
    Koh and Liang (2017), arXiv:1703.04730. Grosse et al. (2023), arXiv:2308.03296.

    Examples
    --------
    >>> net, loss = nn.Linear(1, 1, bias=False), lambda out, y: (out[:, 0] - y).square() / 2
    >>> data = torch.tensor([[1.0], [1.0]]), torch.tensor([1.0, 3.0])
    >>> found = influence_function(
    ...     net, loss, [{"weight": torch.tensor([[2.0]])}], data, data, measurement=lambda out, y: out[:, 0], damping=0.0
    ... )
    >>> found.values[0]
    tensor([ 0.5000, -0.5000])
    """
    states: list[State] = list(checked_states("checkpoints", checkpoints))[-1:]
    checks.one_of("curvature", curvature, KINDS)
    given = None if damping is None else checks.nonnegative("damping", damping)
    samples = None if n_samples is None else checks.integer("n_samples", n_samples, low=1)
    network, train = Network(model, per_sample_loss, chunk_size), checked_data("train_data", train_data)
    checked_function("per_sample_loss", network.loss, network, train)
    queries, f = asked(network, test_data, measurement)
    before = network.oracle.cost
    with network.frozen():
        found = fitted(curvature, network, states, train, samples, as_generator(generator))
        spectrum = found.values()
        shift = float(_MEAN_EIGENVALUE * spectrum.mean()) if given is None else given
        least = float(torch.finfo(spectrum.dtype).eps * len(spectrum) * spectrum.max())

        def inverse(s: Tensor) -> Tensor:
            s = s + shift
            return torch.where(s > least, 1 / s.clamp(min=least), 0) if shift == 0 else 1 / s

        pull = found.apply(inverse, network.gradients(states[0], queries, f))
        values = pull.new_zeros(len(queries[0]), len(train[0]))
        for rows, part in network.chunks(train):
            g = network.gradients(states[0], part, network.loss)
            values[:, rows] = pull @ g.T / len(train[0])
    return TrainingInfluence(
        values, None, network.oracle.cost - before, "influence function", {"damping": shift}
    )


def unrolled_influence(
    model: Oracle | nn.Module,
    per_sample_loss: RowFunction,
    checkpoints: Sequence[State],
    train_data: Data,
    test_data: Data,
    *,
    learning_rates: float | Sequence[float],
    measurement: RowFunction | None = None,
    batches: Sequence[Tensor] | None = None,
    weight_decay: float = 0.0,
    chunk_size: int | None = None,
) -> TrainingInfluence:
    r"""Return the derivative through every step of plain gradient descent, which Source approximates.

    Parameters
    ----------
    model, per_sample_loss, chunk_size
        As in :class:`Source`.
    checkpoints : sequence of state dicts
        The weights before every step and after the last: K + 1.
    train_data, test_data : (Tensor, Tensor)
        Inputs and targets, a row each.
    learning_rates : float or sequence of float
        Step size, or one a step.
    measurement : callable (outputs, y) -> (n,), optional
        What is measured of each query; the loss by default.
    batches : sequence of Tensor of int, optional
        The training rows of each step; all by default.
    weight_decay : float
        Coefficient of the squared norm's half, at least 0.

    Returns
    -------
    TrainingInfluence

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``sum_k eta_k / B grad f^T (I - eta_K H_K) ... (I - eta_{k+1} H_{k+1}) g_k(z)`` with the Hessian of each batch's mean
    loss, from the last step to the first. Cost: a Hessian product a query and step, and the gradient of every row.

    References
    ----------
    Bae, Lin, Lorraine and Grosse (2024), arXiv:2405.12186.

    Examples
    --------
    >>> net, loss = nn.Linear(1, 1, bias=False), lambda out, y: (out[:, 0] - y).square() / 2
    >>> states = [{"weight": torch.tensor([[w]])} for w in (0.0, 1.0)]
    >>> data = torch.tensor([[1.0], [1.0]]), torch.tensor([1.0, 3.0])
    >>> unrolled_influence(
    ...     net, loss, states, data, data, learning_rates=0.5, measurement=lambda out, y: out[:, 0]
    ... ).values[0]
    tensor([-0.2500, -0.7500])
    """
    states = checked_states("checkpoints", checkpoints)
    n_steps = checks.integer("the number of checkpoints", len(states), low=2) - 1
    rates = numbers("learning_rates", learning_rates, n_steps)
    decay = checks.nonnegative("weight_decay", weight_decay)
    network, train = Network(model, per_sample_loss, chunk_size), checked_data("train_data", train_data)
    checked_function("per_sample_loss", network.loss, network, train)
    every = torch.arange(len(train[0]))
    rows = (
        [every] * n_steps
        if batches is None
        else [checks.labels("batches", b, n_classes=len(every)) for b in batches]
    )
    if len(rows) != n_steps:
        raise checks.ArgumentError(
            f"batches has {len(rows)} entries for {n_steps} steps; allowed: one a step. Give the rows of each step."
        )
    queries, f = asked(network, test_data, measurement)
    before = network.oracle.cost
    with network.frozen():
        pull = network.gradients(states[-1], queries, f)
        values = pull.new_zeros(len(queries[0]), len(every))
        rows = [r.to(values.device) for r in rows]
        for k in reversed(range(n_steps)):
            batch = train[0][rows[k]], train[1][rows[k]]
            g = network.gradients(states[k], batch, network.loss)
            values.index_add_(1, rows[k], pull @ g.T, alpha=rates[k] / len(rows[k]))
            vector, rest = network.point(states[k])
            product = hessian(partial(_mean_loss, network, rest, batch), vector)
            network.count(len(rows[k]), 1 + len(pull))
            pull = pull - rates[k] * (product(pull) + decay * pull)
    return TrainingInfluence(values, None, network.oracle.cost - before, "unrolled differentiation")


def _mean_loss(network: Network, rest: dict[str, Tensor], data: Data, vector: Tensor) -> Tensor:
    return network.loss(network.outputs(vector, rest, data[0]), data[1]).mean()
