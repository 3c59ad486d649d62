"""DProxSGT and CDProxSGT: workers on a graph that talk to neighbours only, and track the mean gradient of all.

Use it where no server or all-reduce is to be had and workers own different data, with an l1 or other proximable regulariser
or none. Yan, Chen, Chen, Cui and Xu (2023), Compressed Decentralized Proximal Stochastic Gradient Method for Nonconvex
Composite Problems with Heterogeneous Data, arXiv:2302.14252.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from perturbkit.core import Cost, Result, checks
from perturbkit.core.optimizers import evaluated
from perturbkit.core.workers import connected
from perturbkit.optim.distributed._parts import (
    Compressor,
    VectorOptimizer,
    as_compressor,
    check_gradients,
    check_mixing,
    gradient_at,
    metropolis_mixing,
    ring_mixing,
)

__all__ = [
    "DProxSGT",
    "DecentralizedRun",
    "metropolis_mixing",
    "prox_stationarity",
    "ring_mixing",
    "simulate_dproxsgt",
]

Prox = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True, eq=False)
class DecentralizedRun(Result):
    """A run of all workers in one process.

    Attributes
    ----------
    x : Tensor, shape (n, d)
        Where each worker ended; use the mean of the rows.
    tracker : Tensor, shape (n, d)
        What each worker takes for the mean gradient; their mean is that of the last gradients.
    consensus : Tensor, shape (steps,)
        Root mean square distance of the workers from their mean, after each step.
    bytes_sent : list of int
        Bytes that each worker sent to its neighbours, all steps together.
    cost : Cost
        Gradients of all workers.
    """

    x: Tensor
    tracker: Tensor
    consensus: Tensor
    bytes_sent: list[int]
    cost: Cost


class DProxSGT(VectorOptimizer):
    r"""Proximal stochastic gradient descent with gradient tracking, over processes that send to neighbours only.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups; the workers' may differ at the start.
    lr : float
        Learning rate :math:`\eta`, zero or above.
    mixing : Tensor, shape (n, n)
        Symmetric, with entries of zero or above whose rows sum to 1, of a connected graph; see :func:`ring_mixing`. Worker i
        talks to those j with :math:`W_{ij} > 0`.
    prox : callable, optional
        ``prox(v, step)``, the proximal map of ``step`` times the regulariser, called on each parameter.
    compressor : object or None
        ``TopK(fraction)`` or another contraction with ``encode``, ``decode`` and ``nbytes``; None sends all.
    gamma_x, gamma_y : float
        How far points and trackers move to their neighbours', in (0, 1]; with a compressor only. Less for harsher ones.
    group : torch.distributed.ProcessGroup, optional
        The workers; the default group if ``torch.distributed`` is initialised, and this process alone if not.

    Attributes
    ----------
    bytes_sent : int
        Bytes that this worker sent, each neighbour's message counted.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed, or, in :meth:`step`, the group has another size than ``mixing``.

    Notes
    -----
    With the fresh gradient :math:`g_i` at the worker's own point and the one before, :math:`g_i^-` (zero at first),

    .. math:: y_i \leftarrow \sum_j W_{ij} (y_j + g_j - g_j^-), \quad
        x_i \leftarrow \sum_j W_{ij} \operatorname{prox}_{\eta r}(x_j - \eta y_j).

    A compressor C acts on the difference from what the neighbours know: for v the bracket or the proximal point, everyone
    adds :math:`C(v_i - \hat v_i)` to :math:`\hat v_i`, and the new value is
    :math:`v_i + \gamma (\sum_j W_{ij} \hat v_j - \hat v_i)`. Both keep the mean of all trackers equal to that of the last
    gradients. Mixing follows the proximal map, so points lose exact zeros: apply ``prox`` once more to report them. Trackers
    are kept in double precision. Each worker saves its own ``state_dict``.

    Cost: a gradient and two messages to each neighbour a step; two vectors of memory, six with a compressor.

    References
    ----------
    Yan et al. (2023), arXiv:2302.14252, algorithms 1 and 2.

    Examples
    --------
    >>> from perturbkit.core import prox_l1
    >>> w = torch.nn.Parameter(torch.tensor([3.0, -0.2]))
    >>> optimizer = DProxSGT([w], 0.1, torch.ones(1, 1), lambda v, step: prox_l1(v, step))
    >>> target = w.detach().clone()
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (w - target).square().sum() / 2
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(200):
    ...     loss = optimizer.step(closure)
    >>> [round(v, 3) for v in w.tolist()]
    [2.0, 0.0]
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        mixing: Tensor,
        prox: Prox | None = None,
        compressor: Any = None,
        gamma_x: float = 0.8,
        gamma_y: float = 0.8,
        group: Any = None,
    ) -> None:
        self._mixing = check_mixing(mixing)
        self._gammas = _check_options(prox, compressor, gamma_x, gamma_y)
        self._prox, self._compressor = prox, compressor
        super().__init__(params, {"lr": lr}, group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step with the neighbours; return the closure's loss, if one is given.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the loss of this worker and its gradients.
        """
        n, me = (
            (distributed.get_world_size(self.group), distributed.get_rank(self.group))
            if connected()
            else (1, 0)
        )
        if n != len(self._mixing):
            raise checks.ArgumentError(
                f"mixing is of {len(self._mixing)} workers; allowed: {n}, the size of the group. Pass the matrix of this group, "
                "and start as many processes."
            )
        loss = evaluated(closure)
        if not self.weights:
            return loss
        gradient = self.gradient()
        tracker = self._mix("y", self.saved("tracker") + gradient - self.saved("gradient"), me)
        self.save("tracker", tracker)
        self.save("gradient", gradient)
        halves = [
            _proximal(self._prox, p.detach().double() - lr * y, lr)
            for p, lr, y in zip(self.weights, self.per_weight("lr"), self.parts(tracker), strict=True)
        ]
        for p, new in zip(self.weights, self.parts(self._mix("x", self.vector(halves), me)), strict=True):
            p.copy_(new)
        return loss

    def _mix(self, name: str, v: Tensor, me: int) -> Tensor:
        """Return a vector mixed with the neighbours', and keep what they know of it."""
        kept = (f"public_{name}", f"sum_{name}")
        known = torch.stack(
            [torch.zeros_like(v) if self._compressor is None else self.saved(k) for k in kept]
        )
        wide = any(p.dtype == torch.float64 for p in self.weights)
        compressor = as_compressor(self._compressor, torch.float64 if wide else torch.float32)
        heard = self._exchange(compressor.encode(v - known[0]), me)
        mixed = _mixed(v, known, heard, compressor, me, self._mixing[me].tolist(), self._gammas[name])
        if self._compressor is not None:
            for k, value in zip(kept, known, strict=True):
                self.save(k, value)
        return mixed

    def _exchange(self, message: Tensor, me: int) -> dict[int, Tensor]:
        """Send a message to the neighbours, and return theirs and the own."""
        heard, pending = {me: message}, []
        for j in self._mixing[me].nonzero()[:, 0].tolist():
            if j != me:
                heard[j] = torch.empty_like(message)
                pending.append(distributed.irecv(heard[j], group=self.group, group_src=j))
                pending.append(distributed.isend(message, group=self.group, group_dst=j))
                self.bytes_sent += len(message)
        for request in pending:
            assert request is not None
            request.wait()
        return heard


def simulate_dproxsgt(
    grads: Sequence[Callable[[Tensor], Tensor]],
    x0: Tensor,
    mixing: Tensor,
    lr: float,
    prox: Prox | None = None,
    *,
    compressor: Any = None,
    gamma_x: float = 0.8,
    gamma_y: float = 0.8,
    steps: int,
) -> DecentralizedRun:
    r"""Run :class:`DProxSGT` in one process that plays every worker.

    Parameters
    ----------
    grads : list of callable
        One a worker: ``grad(x) -> gradient``, shape (d,), of its objective or of a fresh batch.
    x0 : Tensor, shape (d,) or (n, d)
        Start of all workers, or of each.
    mixing, lr, prox, compressor, gamma_x, gamma_y
        As for :class:`DProxSGT`.
    steps : int
        At least 1.

    Returns
    -------
    DecentralizedRun

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.
    ModelError
        If a gradient has another shape.

    Notes
    -----
    The points are bit for bit those of as many processes, for maps that act on each number.

    References
    ----------
    Yan et al. (2023), arXiv:2302.14252, algorithms 1 and 2.

    Examples
    --------
    >>> grads = [lambda x, c=c: x - c for c in range(5)]
    >>> run = simulate_dproxsgt(grads, torch.zeros(3), ring_mixing(5), 0.1, steps=400)
    >>> bool((run.x - 2).abs().max() < 1e-4)
    True
    """
    n = check_gradients(grads)
    weights = check_mixing(mixing)
    checks.tensor("x0", x0, ndim=(1, 2))
    if len(weights) != n or (x0.ndim == 2 and len(x0) != n):
        raise checks.ArgumentError(
            f"grads has {n} workers, mixing {len(weights)} and x0 has shape {tuple(x0.shape)}; allowed: as many of each. "
            "Pass one function a row of mixing, and one start or one a worker."
        )
    checks.nonnegative("lr", lr)
    checks.integer("steps", steps, low=1)
    gammas = _check_options(prox, compressor, gamma_x, gamma_y)
    made = as_compressor(compressor, x0.dtype)
    x = x0.detach().expand(n, x0.shape[-1]).clone()
    tracker, before = (torch.zeros_like(x, dtype=torch.float64) for _ in range(2))
    known = {name: torch.zeros(n, 2, *x.shape[1:], dtype=torch.float64, device=x.device) for name in "xy"}
    consensus = torch.empty(steps, dtype=x.dtype)
    for t in range(steps):
        gradient = torch.stack([gradient_at(g, row) for g, row in zip(grads, x, strict=True)])
        tracker = _mix_all(tracker + gradient - before, known["y"], compressor, made, weights, gammas["y"])
        before = gradient
        half = torch.stack(
            [_proximal(prox, row.double() - lr * y, lr) for row, y in zip(x, tracker, strict=True)]
        )
        x.copy_(_mix_all(half, known["x"], compressor, made, weights, gammas["x"]))
        consensus[t] = (x - x.mean(0)).square().sum(1).mean().sqrt()
    links = [int((row > 0).sum()) - int(row[i] > 0) for i, row in enumerate(weights)]
    sent = [2 * steps * k * made.nbytes(x.shape[1]) for k in links]
    return DecentralizedRun(x, tracker.to(x.dtype), consensus.to(x.device), sent, Cost(ngrad=n * steps))


def prox_stationarity(x: Tensor, gradient: Tensor, lr: float, prox: Prox | None = None) -> float:
    r"""Return how far a point is from a stationary point of smooth loss plus regulariser.

    Parameters
    ----------
    x : Tensor, shape (d,)
        Such as the mean of the workers' points.
    gradient : Tensor, shape (d,)
        Of the smooth part there, all data of all workers.
    lr : float
        Step, above 0.
    prox : callable, optional
        As for :class:`DProxSGT`.

    Returns
    -------
    float

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`|x - \operatorname{prox}_{\eta r}(x - \eta \nabla f(x))| / \eta`; without a regulariser the norm of the gradient.

    References
    ----------
    Yan et al. (2023), arXiv:2302.14252, definition 1.

    Examples
    --------
    >>> prox_stationarity(torch.zeros(2), torch.tensor([3.0, 4.0]), 0.1)
    5.0
    """
    checks.tensor("x", x, ndim=1)
    checks.same_shape("gradient", checks.tensor("gradient", gradient), "x", x)
    checks.positive("lr", lr)
    point = x.double()
    return float((point - _proximal(prox, point - lr * gradient.double(), lr)).norm() / lr)


def _check_options(prox: Any, compressor: Any, gamma_x: float, gamma_y: float) -> dict[str, float]:
    """Check options, and return the share of each mixing."""
    if prox is not None and not callable(prox):
        raise checks.ArgumentTypeError(
            f"prox is {prox!r}; allowed: a function of a tensor and a step, or None. Pass lambda v, step: prox_l1(v, 1e-4 * step)."
        )
    as_compressor(compressor, torch.float32)
    given = {"x": gamma_x, "y": gamma_y}
    for name, gamma in given.items():
        checks.between(f"gamma_{name}", gamma, 0, 1, inclusive="high")
    return given if compressor is not None else {"x": 1.0, "y": 1.0}


def _proximal(prox: Prox | None, v: Tensor, step: float) -> Tensor:
    return v if prox is None else prox(v, step)


def _mixed(
    v: Tensor,
    known: Tensor,
    heard: dict[int, Tensor],
    compressor: Compressor,
    me: int,
    row: list[float],
    gamma: float,
) -> Tensor:
    """Add what was sent to the public copy and the neighbours' sum, in place, and return the mixed vector."""
    for j in sorted(heard):
        change = compressor.decode(heard[j], len(v))
        if j == me:
            known[0] += change
        known[1] += row[j] * change
    # Where all is sent, the sum alone would do; this form keeps the mean although messages are rounded.
    return v + gamma * (known[1] - known[0])


def _mix_all(
    values: Tensor, known: Tensor, compressor: Any, made: Compressor, weights: Tensor, gamma: float
) -> Tensor:
    if compressor is None:
        known.zero_()
    said = [made.encode(v - k[0]) for v, k in zip(values, known, strict=True)]
    rows = weights.tolist()
    return torch.stack(
        [
            _mixed(
                v,
                known[i],
                {j: said[j] for j in range(len(rows)) if rows[i][j] or j == i},
                made,
                i,
                rows[i],
                gamma,
            )
            for i, v in enumerate(values)
        ]
    )
