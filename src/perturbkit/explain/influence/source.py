"""Source: what a prediction would be without a training row, by unrolling training in a few segments of constant curvature.

Use it where the network was not trained to convergence or was trained in stages, so that the influence function's optimum does
not exist; it needs a few checkpoints of the run. Bae, Lin, Lorraine and Grosse (2024), Training Data Attribution via Approximate
Unrolled Differentiation, arXiv:2405.12186.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from perturbkit.core import Attribution, Oracle, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator
from perturbkit.explain.influence._curvature import KINDS, Curvature, Kind, fitted
from perturbkit.explain.influence._ends import TrainingInfluence, influence_function, unrolled_influence
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

__all__ = [
    "Source",
    "TrainingInfluence",
    "influence_function",
    "linear_datamodeling_score",
    "unrolled_influence",
]


@dataclass(frozen=True, eq=False)
class _Segment:
    states: list[State]
    rate: float  # step size, with the momentum's factor
    steps: float
    used: Tensor  # which training rows it trains on
    curvature: Curvature


class Source:
    r"""Influence of training rows through segments of training with constant curvature and gradients.

    Parameters
    ----------
    model : nn.Module or Oracle of one
        The network; the weights that require a gradient are attributed, in evaluation mode.
    per_sample_loss : callable (outputs, y) -> (n,)
        The training loss of each row, convex in the outputs.
    segments : int
        Number of segments L, at least 1.
    curvature : {"exact", "kfac", "diag"}
        The Gauss-Newton matrix itself (up to 4000 weights), eigenvalue-corrected Kronecker factors of linear and
        convolutional layers with the diagonal of the rest, or its diagonal.
    damping : float
        Added to the eigenvalues, at least 0: the weight decay of the training, if there was one.
    n_samples : int or None
        Random pseudo-gradients a row; ``None``: one for each output, which leaves no noise.
    chunk_size : int or None
        Rows of which gradients are held at once.
    generator : torch.Generator, int or None
        Source of the pseudo-gradients, where ``n_samples`` is given.
    progress : Progress, bool or None
        Reports segments and chunks of training rows.

    Notes
    -----
    In segment l, with the mean Gauss-Newton matrix :math:`H_l` and gradients :math:`g_l(z)` over its checkpoints, step size
    :math:`\eta_l` and :math:`K_l` steps, let :math:`S_l = e^{-\eta_l K_l H_l}` and
    :math:`F_l = (I - S_l) H_l^{-1}`, which in the eigenbasis is :math:`(1 - e^{-\eta K s}) / s`, or :math:`\eta K` at zero. The
    score is :math:`\nabla f^\top \sum_l S_L \cdots S_{l+1} F_l g_l(z) / N_l`, with the query's gradient averaged over the
    last segment. As :math:`K \to \infty` it becomes the influence function, as :math:`\eta K \to 0` the product of gradients of
    TracIn.

    Pseudo-gradients are the columns of a root of the loss's Hessian in the outputs: the second moment of gradients whose labels
    are drawn from the model, without its noise.

    Cost: a checkpoint costs as many backward passes a training row as there are outputs, to fit (twice for "kfac"), and one
    a row to score.

    References
    ----------
    Bae, Lin, Lorraine and Grosse (2024), arXiv:2405.12186. George et al. (2018), Fast Approximate Natural Gradient Descent
    in a Kronecker-factored Eigenbasis, arXiv:1806.03884.

    Examples
    --------
    >>> net = nn.Linear(1, 1, bias=False).requires_grad_()
    >>> states = [{"weight": torch.tensor([[w]])} for w in (0.0, 0.9)]
    >>> loss = lambda out, y: (out[:, 0] - y).square() / 2
    >>> data = torch.tensor([[1.0], [1.0]]), torch.tensor([1.0, 3.0])
    >>> source = Source(net, loss, segments=1).fit(states, 0.1, 1000, data)
    >>> source.scores((torch.ones(1, 1), torch.tensor([2.0])), lambda out, y: out[:, 0]).values
    tensor([[-0.2750, -1.2750]])
    """

    def __init__(
        self,
        model: Oracle | nn.Module,
        per_sample_loss: RowFunction,
        segments: int = 3,
        curvature: Kind = "exact",
        damping: float = 0.0,
        *,
        n_samples: int | None = None,
        chunk_size: int | None = None,
        generator: Seed = None,
        progress: ProgressLike = False,
    ) -> None:
        self.segments = checks.integer("segments", segments, low=1)
        self.curvature = checks.one_of("curvature", curvature, KINDS)
        self.damping = checks.nonnegative("damping", damping)
        self.n_samples = None if n_samples is None else checks.integer("n_samples", n_samples, low=1)
        self.generator, self.progress = generator, progress
        self._network = Network(model, per_sample_loss, chunk_size)

    def fit(
        self,
        checkpoints: Sequence[State] | Sequence[Sequence[State]],
        learning_rates: float | Sequence[float],
        steps: int | Sequence[int],
        train_data: Data,
        *,
        momentum: float = 0.0,
        used: Tensor | None = None,
    ) -> Self:
        """Take the curvature of each segment from its checkpoints.

        Parameters
        ----------
        checkpoints : sequence of state dicts
            Weights along the run, in order, which are split evenly over the segments; or one sequence a segment.
        learning_rates : float or sequence of float
            Mean step size, of the whole run or one a segment.
        steps : int or sequence of int
            Number of steps, of the whole run (divided evenly) or one a segment.
        train_data : (Tensor, Tensor)
            Inputs and targets, a row each.
        momentum : float
            Of the training, in [0, 1): step sizes are divided by 1 - momentum.
        used : Tensor of bool, shape (segments, n_train), optional
            Which rows each segment trains on, where training has stages; all by default.

        Returns
        -------
        Source

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an argument is not allowed, or there are fewer checkpoints than segments.
        """
        groups = _groups(checkpoints, self.segments)
        rates = numbers("learning_rates", learning_rates, self.segments)
        counts = numbers("steps", steps, self.segments, share=True)
        momentum = checks.between("momentum", momentum, 0, 1, inclusive="low")
        data = checked_data("train_data", train_data)
        rows = _used(used, self.segments, len(data[0]))
        network, source = self._network, as_generator(self.generator)
        checked_function("per_sample_loss", network.loss, network, data)
        made, before = [], network.oracle.cost
        with network.frozen():
            for i in track(range(self.segments), "source: curvature", progress=self.progress):
                part = data[0][rows[i]], data[1][rows[i]]
                found = fitted(self.curvature, network, groups[i], part, self.n_samples, source)
                made.append(_Segment(groups[i], rates[i] / (1 - momentum), counts[i], rows[i], found))
        self._made, self._train, self._fit_cost = made, data, network.oracle.cost - before
        return self

    def scores(self, test_data: Data, measurement: RowFunction | None = None) -> TrainingInfluence:
        """Return the influence of every training row on every query.

        Parameters
        ----------
        test_data : (Tensor, Tensor)
            Queries: inputs and targets, a row each.
        measurement : callable (outputs, y) -> (n,), optional
            What is measured of each query; the loss by default.

        Returns
        -------
        TrainingInfluence
            ``extras["fit_cost"]`` is what ``fit`` has cost.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If the data are not allowed, or ``fit`` was not called.
        """
        if not hasattr(self, "_made"):
            raise checks.ArgumentError("nothing is fitted; allowed: scores after fit. Call fit first.")
        network, made = self._network, self._made
        queries, f = asked(network, test_data, measurement)
        before = network.oracle.cost
        with network.frozen():
            pull = _mean_gradient(network, made[-1].states, queries, f)
            values = pull.new_zeros(len(queries[0]), len(self._train[0]))
            for segment in reversed(made):
                t = segment.rate * segment.steps
                weight = segment.curvature.apply(partial(_filter, t=t, shift=self.damping), pull)
                chunks = list(network.chunks(self._train))
                for rows, part in track(chunks, "source: scores", progress=self.progress):
                    g = _mean_gradient(network, segment.states, part, network.loss)
                    values[:, rows] += weight @ g.T * segment.used[rows].to(g) / segment.used.sum()
                pull = segment.curvature.apply(partial(_decay, t=t, shift=self.damping), pull)
        name = f"source, {len(made)} segment{'s' * (len(made) > 1)}"
        return TrainingInfluence(
            values, None, network.oracle.cost - before, name, {"fit_cost": self._fit_cost}
        )  # fmt: skip


def linear_datamodeling_score(
    scores: TrainingInfluence | Tensor, subsets: Tensor, retrained_outputs: Tensor
) -> float:
    """Return how well scores predict what retraining on subsets does: the mean rank correlation over queries.

    Parameters
    ----------
    scores : TrainingInfluence or Tensor, shape (n_queries, n_train)
        Change of the measurement when a row is left out.
    subsets : Tensor of bool, shape (m, n_train)
        The rows that each retraining kept.
    retrained_outputs : Tensor, shape (m, n_queries)
        The measurement of each query after each retraining.

    Returns
    -------
    float
        In [-1, 1]; a query whose outputs or predictions are all equal counts as 0.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the shapes do not match, or there are fewer than 2 subsets.

    Notes
    -----
    The prediction for a subset is the sum of the scores of the rows left out.

    References
    ----------
    Park, Georgiev, Ilyas, Leclerc and Madry (2023), TRAK, arXiv:2303.14186.

    Examples
    --------
    >>> kept = torch.tensor([[True, False], [False, True], [True, True]])
    >>> linear_datamodeling_score(torch.tensor([[1.0, 2.0]]), kept, torch.tensor([[5.0], [4.0], [3.0]]))
    1.0
    """
    given = scores.values if isinstance(scores, Attribution) else scores
    checks.tensor("scores", given, ndim=2)
    checks.tensor("subsets", subsets, shape=(None, given.shape[1]), floating=False)
    checks.tensor("retrained_outputs", retrained_outputs, shape=(len(subsets), len(given)))
    checks.integer("the number of subsets", len(subsets), low=2)
    left_out = 1 - (subsets > 0).double().cpu()
    predicted = (left_out @ given.detach().cpu().double().T).numpy()
    ranks = [rankdata(v, axis=0) for v in (predicted, retrained_outputs.detach().cpu().numpy())]
    centred = [r - r.mean(0) for r in ranks]
    norm = np.sqrt((centred[0] ** 2).sum(0) * (centred[1] ** 2).sum(0))
    return float(np.mean((centred[0] * centred[1]).sum(0) / np.where(norm > 0, norm, 1)))


def _decay(s: Tensor, t: float, shift: float) -> Tensor:
    return torch.exp(-t * (s + shift))


def _filter(s: Tensor, t: float, shift: float) -> Tensor:
    """Return (1 - exp(-t s)) / s, which is t at zero."""
    s = s + shift
    small = t * s < 1e-8
    return torch.where(small, t, -torch.expm1(-t * s) / torch.where(small, 1, s))


def _mean_gradient(network: Network, states: list[State], data: Data, function: RowFunction) -> Tensor:
    total = network.gradients(states[0], data, function)
    for state in states[1:]:
        total = total + network.gradients(state, data, function)
    return total / len(states)


def _groups(checkpoints: Any, n: int) -> list[list[State]]:
    """Return the checkpoints of each segment."""
    nested = (
        isinstance(checkpoints, Sequence) and len(checkpoints) > 0 and isinstance(checkpoints[0], Sequence)
    )
    if nested and len(checkpoints) == n:
        return [list(checked_states("checkpoints", group)) for group in checkpoints]
    given = [] if nested else checked_states("checkpoints", checkpoints)
    if len(given) < n:
        raise checks.ArgumentError(
            f"checkpoints has {len(checkpoints)} {'groups' if nested else 'state dicts'} for {n} segments; allowed: at least one "
            "state dict a segment, or one group a segment. Save more checkpoints, or lower segments."
        )
    return [[given[i] for i in part] for part in np.array_split(np.arange(len(given)), n)]


def _used(used: Tensor | None, segments: int, n: int) -> Tensor:
    if used is None:
        return torch.ones(segments, n, dtype=torch.bool)
    rows = checks.tensor("used", used, shape=(segments, n), floating=False) > 0
    if not bool(rows.any(1).all()):
        raise checks.ArgumentError(
            "used leaves a segment without rows; allowed: at least one. Mark its rows."
        )
    return rows
