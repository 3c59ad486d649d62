"""EF21 and EF21-W: workers that send only the compressed change of their gradients, and steps as long as the mean worker allows.

Use it where the gradients of all workers are too much to send, above all where the workers' smoothness differs much.
Richtarik, Gasanov and Burlachenko (2024), Error Feedback Reloaded, arXiv:2402.10774.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed

from perturbkit.core import Cost, Result, checks
from perturbkit.core.optimizers import evaluated
from perturbkit.core.random import as_generator, mixed_seed, uniform
from perturbkit.core.workers import connected
from perturbkit.optim.distributed._parts import (
    Compressor,
    Dense,
    TopK,
    VectorOptimizer,
    as_compressor,
    check_agreement,
    check_gradients,
    gradient_at,
)

__all__ = ["EF21", "EF21Run", "Smoothness", "TopK", "ef21_step_size", "simulate_ef21", "smoothness_constants"]


@dataclass(frozen=True, eq=False)
class EF21Run(Result):
    """A run of all workers in one process.

    Attributes
    ----------
    x : Tensor, shape (d,)
        Where it ended.
    gradient_norm : Tensor, shape (steps,)
        Norm of the mean gradient at each point that a step started from.
    bytes_sent : list of int
        Bytes that each worker sent, all rounds together.
    cost : Cost
        Gradients that the workers needed, all together.
    """

    x: Tensor
    gradient_norm: Tensor
    bytes_sent: list[int]
    cost: Cost


@dataclass(frozen=True, eq=False)
class Smoothness(Result):
    """Lipschitz constants of gradients.

    Attributes
    ----------
    mean : float
        That of the mean of the workers' objectives.
    workers : Tensor, shape (n,)
        That of each worker's.
    """

    mean: float
    workers: Tensor


class EF21(VectorOptimizer):
    r"""Gradient descent over processes that send compressed changes of their gradients.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups, equal on every worker at the start.
    lr : float
        Learning rate, zero or above; see :func:`ef21_step_size`.
    compressor : object or None
        ``TopK(fraction)`` or another contraction with ``encode``, ``decode`` and ``nbytes``; None sends all.
    weights : sequence of float, optional
        A weight a worker, above 0, with sum 1: EF21-W takes :math:`L_i / \sum_j L_j`. Equal ones are EF21.
    participation : float
        Chance that a worker takes part in a round, in (0, 1]; the same on all workers.
    init : {"gradient", "zero"}
        Whether the first round sends gradients whole, or workers start from zero.
    seed : int
        Of who takes part, zero or above; the same on all workers.
    group : torch.distributed.ProcessGroup, optional
        The workers; the default group if ``torch.distributed`` is initialised, and this process alone if not.

    Attributes
    ----------
    bytes_sent : int
        Bytes that this worker sent.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.
    ModelError
        In the first :meth:`step`, on every worker, if their weights or options differ.

    Notes
    -----
    Worker i keeps an estimate :math:`g_i` of its gradient over :math:`n w_i`. In each step it sends
    :math:`c_i = C(\nabla f_i(x) / (n w_i) - g_i)`, everyone adds :math:`g_i \leftarrow g_i + c_i`, and

    .. math:: x \leftarrow x - \eta \sum_i w_i g_i.

    With minibatches in the closure this is EF21-SGD. Estimates are kept in double precision, and sums over workers run by
    rank, so that all workers hold the same bits. Each worker saves its own ``state_dict``.

    Cost: a gradient and a message of the compressor a step; two vectors of memory.

    References
    ----------
    Richtarik, Gasanov and Burlachenko (2024), arXiv:2402.10774; Richtarik, Sokolov and Fatkhullin (2021),
    arXiv:2106.05203.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.tensor([3.0, -1.0]))
    >>> optimizer = EF21([w], lr=0.2, compressor=TopK(0.5))
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = w.square().sum()
    ...     loss.backward()
    ...     return loss
    >>> for _ in range(100):
    ...     loss = optimizer.step(closure)
    >>> bool(w.abs().max() < 1e-3), optimizer.bytes_sent
    (True, 800)
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        compressor: Any = None,
        weights: Sequence[float] | None = None,
        participation: float = 1.0,
        init: Literal["gradient", "zero"] = "gradient",
        seed: int = 0,
        group: Any = None,
    ) -> None:
        _check_options(participation, init, seed)
        as_compressor(compressor, torch.float32)
        self._compressor, self._given = compressor, weights
        self._participation, self._init, self._seed = participation, init, seed
        self._shares: list[float] | None = None
        super().__init__(params, {"lr": lr}, group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step with all workers; return the closure's loss, None where this worker does not take part.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the loss of this worker and its gradients; not called in rounds without this worker.
        """
        if not self.weights:
            return evaluated(closure)
        if self._shares is None:
            self._meet()
        shares = self._shares
        assert shares is not None
        me = distributed.get_rank(self.group) if connected() else 0
        round_ = int(self.state.get("round", 0))  # type: ignore[call-overload]
        new = not all("estimate" in self.state[p] for p in self.weights)
        if new and self._init == "gradient":
            compressor: Compressor = Dense(self._dtype())
            who = list(range(len(shares)))
            own, total = (torch.zeros_like(self.saved("estimate")) for _ in range(2))
        else:
            compressor = as_compressor(self._compressor, self._dtype())
            who = _taking_part(len(shares), self._participation, self._seed, round_)
            own, total = self.saved("estimate"), self.saved("total")
        loss, message = None, None
        if me in who:
            loss = evaluated(closure)
            message = compressor.encode(self.gradient() / (len(shares) * shares[me]) - own)
            self.bytes_sent += len(message)
        empty = torch.empty(compressor.nbytes(len(own)), dtype=torch.uint8, device=own.device)
        heard = {i: _broadcast(message if i == me else None, empty, i, self.group) for i in who}
        _settle(heard, compressor, {me: own}, total, shares)
        self.save("estimate", own)
        self.save("total", total)
        self.state["round"] = round_ + 1  # type: ignore[index]
        for p, lr, part in zip(self.weights, self.per_weight("lr"), self.parts(total), strict=True):
            p.sub_((lr * part).to(p.dtype))
        return loss

    def _dtype(self) -> torch.dtype:
        wide = any(p.dtype == torch.float64 for p in self.weights)
        return torch.float64 if wide else torch.float32

    def _meet(self) -> None:
        """Settle the weights of the workers, after a check that they agree."""
        n = distributed.get_world_size(self.group) if connected() else 1
        self._shares = _shares(self._given, n)
        if n == 1:
            return
        length = as_compressor(self._compressor, self._dtype()).nbytes(sum(p.numel() for p in self.weights))
        start = hashlib.sha256(self.vector(self.weights).cpu().numpy().tobytes()).hexdigest()
        options = {"participation": self._participation, "init": self._init, "seed": self._seed}
        check_agreement(
            {"starting weights": start, "compressor": length, "weights": self._shares, **options}, self.group
        )


def simulate_ef21(
    grads: Sequence[Callable[[Tensor], Tensor]],
    x0: Tensor,
    lr: float,
    compressor: Any = None,
    weights: Sequence[float] | None = None,
    *,
    steps: int,
    participation: float = 1.0,
    init: Literal["gradient", "zero"] = "gradient",
    seed: int = 0,
) -> EF21Run:
    r"""Run :class:`EF21` in one process that plays every worker.

    Parameters
    ----------
    grads : list of callable
        One a worker: ``grad(x) -> gradient`` of its objective, shape (d,).
    x0 : Tensor, shape (d,)
        Start.
    lr, compressor, weights, participation, init, seed
        As for :class:`EF21`.
    steps : int
        At least 1.

    Returns
    -------
    EF21Run

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.
    ModelError
        If a gradient has another shape.

    Notes
    -----
    The points are bit for bit those of as many processes. The gradients of workers that do not take part are evaluated for
    the record, and not counted.

    References
    ----------
    Richtarik, Gasanov and Burlachenko (2024), arXiv:2402.10774, algorithms 1 to 3.

    Examples
    --------
    >>> grads = [lambda x: x - 1, lambda x: 3 * (x + 1)]
    >>> run = simulate_ef21(grads, torch.zeros(4), 0.2, TopK(0.25), steps=300)
    >>> bool((run.x + 0.5).abs().max() < 1e-3), run.bytes_sent
    (True, [2408, 2408])
    """
    n = check_gradients(grads)
    checks.tensor("x0", x0, ndim=1)
    checks.nonnegative("lr", lr)
    checks.integer("steps", steps, low=1)
    _check_options(participation, init, seed)
    usual, shares, x = as_compressor(compressor, x0.dtype), _shares(weights, n), x0.detach().clone()
    estimates = {i: torch.zeros_like(x, dtype=torch.float64) for i in range(n)}
    total = torch.zeros_like(x, dtype=torch.float64)
    norms, sent, needed = torch.empty(steps, dtype=x.dtype), [0] * n, 0
    for t in range(steps):
        whole = t == 0 and init == "gradient"
        kind: Compressor = Dense(torch.promote_types(x.dtype, torch.float32)) if whole else usual
        who = list(range(n)) if whole else _taking_part(n, participation, seed, t)
        found = [gradient_at(grad, x) for grad in grads]
        norms[t] = torch.stack(found).mean(0).norm()
        said = {i: kind.encode(found[i] / (n * shares[i]) - estimates[i]) for i in who}
        for i, message in said.items():
            sent[i] += len(message)
        needed += len(who)
        _settle(said, kind, estimates, total, shares)
        x.sub_((lr * total).to(x.dtype))
    return EF21Run(x, norms.to(x.device), sent, Cost(ngrad=needed))


def ef21_step_size(
    smoothness: float,
    workers: Any,
    alpha: float,
    mean: Literal["quadratic", "arithmetic"] = "arithmetic",
) -> float:
    r"""Return the step with which the theory of EF21 grants convergence.

    Parameters
    ----------
    smoothness : float
        Lipschitz constant L of the gradient of the mean objective, above 0.
    workers : Tensor or sequence of float, shape (n,)
        Constants :math:`L_i` of the workers, zero or above.
    alpha : float
        Contraction of the compressor, in (0, 1]; that of :class:`TopK` is k / d.
    mean : {"quadratic", "arithmetic"}
        Of the constants: the older theory, or that of EF21-W and of the paper's new analysis of EF21.

    Returns
    -------
    float

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`1 / (L + \bar L \sqrt{\beta / \theta})` with :math:`\theta = 1 - \sqrt{1 - \alpha}` and
    :math:`\beta = (1 - \alpha) / \theta`. The arithmetic mean is never above the quadratic one.

    References
    ----------
    Richtarik, Gasanov and Burlachenko (2024), arXiv:2402.10774, theorems 1, 3 and 4.

    Examples
    --------
    >>> ef21_step_size(2.0, [1.0, 3.0], 1.0)
    0.5
    >>> ef21_step_size(2.0, [1.0, 3.0], 0.1) > ef21_step_size(2.0, [1.0, 3.0], 0.1, "quadratic")
    True
    """
    checks.positive("smoothness", smoothness)
    each = torch.as_tensor(checks.array("workers", workers, ndim=1))
    for value in each.tolist():
        checks.nonnegative("workers", value)
    checks.between("alpha", alpha, 0, 1, inclusive="high")
    checks.one_of("mean", mean, ("quadratic", "arithmetic"))
    theta = 1 - math.sqrt(1 - alpha)
    xi = math.sqrt((1 - alpha) / theta / theta)
    middle = float(each.mean() if mean == "arithmetic" else each.square().mean().sqrt())
    return 1 / (smoothness + middle * xi)


def smoothness_constants(
    x_parts: Sequence[Tensor], kind: Literal["logistic", "ridge"] = "logistic", l2: float = 0.0
) -> Smoothness:
    r"""Return Lipschitz constants of the gradients of workers that share a linear model.

    Parameters
    ----------
    x_parts : sequence of Tensor, shape (n_i, d)
        Rows of each worker.
    kind : {"logistic", "ridge"}
        The loss of a row: :math:`\log(1 + e^{-y a^T x})` with y = -1 or 1, or :math:`(a^T x - y)^2 / 2`.
    l2 : float
        Factor of :math:`|x|^2 / 2`, zero or above.

    Returns
    -------
    Smoothness

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`L_i = \lambda_{\max}(A_i^T A_i) / (c n_i) + l_2` with c = 4 for the logistic loss and 1 for squares; L is that of
    the mean of the matrices. Objectives are means over a worker's rows, and over the workers.

    References
    ----------
    Richtarik, Gasanov and Burlachenko (2024), arXiv:2402.10774, section 5.

    Examples
    --------
    >>> smoothness_constants([torch.eye(2), 3 * torch.eye(2)], "ridge").mean
    2.5
    """
    checks.one_of("kind", kind, ("logistic", "ridge"))
    checks.nonnegative("l2", l2)
    if not isinstance(x_parts, (list, tuple)) or not x_parts:
        raise checks.ArgumentTypeError(
            f"x_parts is {x_parts!r}; allowed: a list of tensors, one a worker. Pass at least one."
        )
    d = checks.tensor("x_parts", x_parts[0], ndim=2).shape[1]
    rows = [checks.tensor("x_parts", a, shape=(None, d)).double() for a in x_parts]
    matrices = torch.stack([a.T @ a / len(a) for a in rows]) / (4 if kind == "logistic" else 1)
    each = torch.linalg.eigvalsh(matrices)[:, -1] + l2
    return Smoothness(float(torch.linalg.eigvalsh(matrices.mean(0))[-1]) + l2, each.to(x_parts[0].dtype))


def _check_options(participation: float, init: str, seed: int) -> None:
    checks.between("participation", participation, 0, 1, inclusive="high")
    checks.one_of("init", init, ("gradient", "zero"))
    checks.integer("seed", seed, low=0)


def _shares(weights: Sequence[float] | None, n: int) -> list[float]:
    if weights is None:
        return [1 / n] * n
    given = [checks.positive("weights", float(w)) for w in weights]
    if len(given) != n or abs(sum(given) - 1) > 1e-9:
        raise checks.ArgumentError(
            f"weights has {len(given)} numbers with sum {sum(given):g}; allowed: one a worker, {n}, with sum 1. "
            "Divide the workers' constants by their sum."
        )
    return given


def _taking_part(n: int, participation: float, seed: int, round_: int) -> list[int]:
    """Return the workers of a round, the same wherever it is asked."""
    if participation == 1:
        return list(range(n))
    drawn = uniform((n,), generator=as_generator(mixed_seed(seed, round_)), dtype=torch.float64)
    return [i for i in range(n) if drawn[i] < participation]


def _broadcast(own: Tensor | None, empty: Tensor, worker: int, group: Any) -> Tensor:
    """Return a worker's message, on every worker."""
    message = empty.clone() if own is None else own
    if connected():
        distributed.broadcast(message, group=group, group_src=worker)
    return message


def _settle(
    messages: dict[int, Tensor],
    compressor: Compressor,
    estimates: dict[int, Tensor],
    total: Tensor,
    shares: list[float],
) -> None:
    """Add what was sent to the estimates at hand and to the weighted sum of all, by rank."""
    for i in sorted(messages):
        change = compressor.decode(messages[i], len(total))
        if i in estimates:
            estimates[i] += change
        total += shares[i] * change
