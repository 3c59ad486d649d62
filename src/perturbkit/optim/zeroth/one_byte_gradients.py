"""One-byte gradients: workers that share a seed train one model by sending a single byte for each sampled direction.

Use it to fine-tune over slow links, or where workers come and go: a worker that knows the bytes knows the weights.
Zelikman, Huang, Liang, Haber and Goodman (2023), Just One Byte (per gradient), arXiv:2306.10015.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed

from perturbkit.core import Cost, Result, checks
from perturbkit.core.optimizers import Closure, Replay
from perturbkit.core.parameters import perturbed
from perturbkit.core.parameters import step as add_direction
from perturbkit.core.random import mixed_seed
from perturbkit.core.workers import connected
from perturbkit.optim.zeroth._parts import SeededOptimizer, two_sided

__all__ = ["OneByteHistory", "OneByteSPSA", "decode_gradient", "encode_gradient", "simulate_one_byte"]

Messages = dict[int, tuple[float, ...]]
"""What each worker sent in a round: codes of one byte, or projected gradients."""

_HIGH, _LOW = 127, 32
"""A round whose largest magnitude is at the one code raises the scale, below the other lowers it."""


@dataclass(frozen=True, eq=False)
class OneByteHistory(Result):
    """A run of the protocol in one process.

    Attributes
    ----------
    loss : Tensor, shape (rounds,)
        Mean over the workers of the loss between the two points of a direction.
    bytes_sent : int
        Bytes that each worker sent, all rounds together.
    digest : str
        SHA-256 of the last weights.
    messages : list of dict
        The log: what each worker sent in each round.
    cost : Cost
        Evaluations of the loss by all workers.
    """

    loss: Tensor
    bytes_sent: int
    digest: str
    messages: list[Messages]
    cost: Cost


def encode_gradient(value: float) -> int:
    """Return a projected gradient as one byte: a sign and seven bits of its logarithm.

    Parameters
    ----------
    value : float
        Finite. Magnitudes from 0.0195 to 51.3 are kept to 3.2 %; larger ones are set to the end, and smaller ones to the
        nearer of the other end and zero.

    Returns
    -------
    int
        In 0..255; zero stands for zero.

    Raises
    ------
    ArgumentError
        If the value is not finite.

    Notes
    -----
    ``code = clip(round(16 ln |c|) + 64, 1, 127)``, plus 128 for negative values; zero below ``exp(-63/16) / 2``.

    References
    ----------
    Zelikman et al. (2023), arXiv:2306.10015. Their code rounds to 255 magnitudes and a sign, which takes nine bits.

    Examples
    --------
    >>> encode_gradient(1.0), encode_gradient(-1.0), encode_gradient(0.0)
    (64, 192, 0)
    """
    c = checks.between("value", value, -math.inf, math.inf)
    if abs(c) < math.exp(-63 / 16) / 2:
        return 0
    return max(1, min(127, round(16 * math.log(abs(c))) + 64)) + (128 if c < 0 else 0)


def decode_gradient(code: int) -> float:
    """Return the projected gradient that a byte stands for.

    Parameters
    ----------
    code : int
        In 0..255; see :func:`encode_gradient`.

    Returns
    -------
    float

    Raises
    ------
    ArgumentError
        If the code is outside.

    Notes
    -----
    ``c = sign exp((magnitude - 64) / 16)``.

    Examples
    --------
    >>> round(decode_gradient(encode_gradient(-3.0)), 2)
    -3.08
    """
    checks.integer("code", code, low=0, high=255)
    magnitude = code & 127
    return 0.0 if magnitude == 0 else math.copysign(math.exp((magnitude - 64) / 16), 127.5 - code)


class OneByteSPSA(SeededOptimizer):
    """Zeroth-order descent over processes that exchange one byte a direction.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups, equal on every worker at the start.
    lr : float
        Learning rate, zero or above.
    radius : float
        Half the distance of the two evaluations, in units of the weights; above 0.
    samples_per_round : int
        Directions that each worker draws a step, at least 1; the same on all.
    one_byte : bool
        Send bytes; otherwise the projected gradients in double precision.
    group : torch.distributed.ProcessGroup, optional
        The workers, of a backend that takes tensors in the processor's memory (gloo); the default group if
        ``torch.distributed`` is initialised, and this process alone if not. Assign another to ``optimizer.group`` when
        workers join or leave.
    worker_id : int, optional
        Zero or above, unique among the workers; the rank unless given.
    seed : int
        Seed of all directions, zero or above; the same on all.
    model : nn.Module, optional
        Where given, its buffers are moved by the first evaluation of a step only. The weights are bit-equal on all
        workers; running statistics are each worker's own.

    Attributes
    ----------
    messages : list of dict
        Log of the rounds since the last :meth:`checkpoint`: what each worker sent.
    bytes_sent : int
        Bytes that this worker sent.

    Raises
    ------
    ArgumentError
        If an option is outside its range.
    ModelError
        In the first :meth:`step` of a group, on every worker, if they do not share seed, options, rates, round or weights.

    Notes
    -----
    Worker m evaluates its own batch at ``w + r z`` and ``w - r z`` with ``z(seed, t, m, j)`` standard normal, and sends the
    byte of ``c = (loss(w + r z) - loss(w - r z)) / (2 r)``. Everyone then applies all messages in one fixed order,
    ``w <- w - lr / n * sum_mj decode(byte_mj) z(seed, t, m, j)``. Directions are regenerated from their seeds; the weights
    after an evaluation are bit for bit those before it. Workers must be machines of one kind, since another processor or
    library may draw or round differently. Messages are scaled by a power of two that follows from earlier messages.
    A worker whose loss is not finite sends zero.

    Learning rates are not sent: schedulers must do the same on all workers in every round. Compare :meth:`digest` now and
    then.

    Cost: two evaluations a direction and one byte; three draws of d numbers a direction and one a message of any worker, three
    together where there is one message only.

    References
    ----------
    Zelikman et al. (2023), arXiv:2306.10015.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.tensor([3.0, -1.0]))
    >>> optimizer = OneByteSPSA([w], lr=0.05)
    >>> for _ in range(200):
    ...     loss = optimizer.step(lambda: w.square().sum())
    >>> bool(w.abs().max() < 0.01), optimizer.bytes_sent
    (True, 200)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        radius: float = 1e-3,
        samples_per_round: int = 1,
        one_byte: bool = True,
        group: Any = None,
        worker_id: int | None = None,
        seed: int = 0,
        model: torch.nn.Module | None = None,
    ) -> None:
        self._radius = checks.positive("radius", radius)
        self._samples = checks.integer("samples_per_round", samples_per_round, low=1)
        self._seed = checks.integer("seed", seed, low=0)
        self._one_byte, self._worker_id = bool(one_byte), worker_id
        if worker_id is not None:
            checks.integer("worker_id", worker_id, low=0)
        self.messages: list[Messages] = []
        self.bytes_sent = 0
        self._workers: list[int] | None = None
        self.group = group
        super().__init__(params, {"lr": lr}, model)

    @property
    def group(self) -> Any:
        """The workers that messages are exchanged with."""
        return self._group

    @group.setter
    def group(self, group: Any) -> None:
        self._group, self._workers = group, None

    @torch.no_grad()
    def step(self, closure: Closure) -> float:  # type: ignore[override]
        """Take one step with all workers, and return this worker's loss between its two points.

        Parameters
        ----------
        closure : callable
            ``closure() -> loss`` on this worker's batch; no backward pass is needed.
        """
        workers = self._meet()
        # What is the only message is applied in the pass that restores the weights.
        only = workers is None and self._samples == 1
        loss, own = self._measure(self.replay(closure), self._me(), only)
        self._apply(self._exchange(own, workers), applied=only)
        return loss

    def digest(self) -> str:
        """Return the SHA-256 of the weights, equal on workers that agree bit for bit and will go on to.

        How weights lie in memory counts too, since directions are drawn in that order.
        """
        digest = hashlib.sha256()
        for p in self.weights:
            digest.update(repr((tuple(p.shape), p.stride())).encode())
            digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def checkpoint(self) -> dict[str, Any]:
        """Return the weights and the place in the protocol, for :meth:`join`; the log begins anew."""
        self.messages, weights = [], [p.detach().clone() for p in self.weights]
        return {"weights": weights, "round": self._round(), "exponent": self._exponent()}

    def join(
        self, checkpoint: Mapping[str, Any], messages: Sequence[Messages], after_round: Closure | None = None
    ) -> None:
        """Come up to date from a checkpoint and the messages sent since; assign ``group`` afterwards.

        Parameters
        ----------
        checkpoint : mapping
            What :meth:`checkpoint` returned on any worker.
        messages : sequence of dict
            That worker's ``messages``.
        after_round : callable, optional
            Called after each of the rounds, as the other workers did: the ``step`` of a scheduler in the state that theirs
            had at the checkpoint.
        """
        if not isinstance(checkpoint, Mapping) or not {"weights", "round", "exponent"} <= set(checkpoint):
            raise checks.ArgumentTypeError(
                f"checkpoint is a {type(checkpoint).__name__}; allowed: a mapping with weights, round, exponent. Pass that of checkpoint()."
            )
        given = checkpoint["weights"]
        if [p.shape for p in given] != [p.shape for p in self.weights]:
            raise checks.ArgumentError(
                "checkpoint has weights of other shapes; allowed: those of the same model. Build the model as the others did."
            )
        with torch.no_grad():
            for p, value in zip(self.weights, given, strict=True):
                p.copy_(value)
            self.state["round"], self.state["exponent"] = checkpoint["round"], checkpoint["exponent"]  # type: ignore[index]
            self.messages = []
            self._opt_called = True  # What a scheduler asks for before its own step.
            for round_ in messages:
                self._apply(dict(round_))
                if after_round is not None:
                    after_round()

    def _round(self) -> int:
        return int(self.state.get("round", 0))  # type: ignore[call-overload]

    def _exponent(self) -> int:
        return int(self.state.get("exponent", 0))  # type: ignore[call-overload]

    def _me(self) -> int:
        if self._worker_id is not None:
            return self._worker_id
        return distributed.get_rank() if connected() else 0

    def _meet(self) -> list[int] | None:
        """Return the workers of the group, after a first check that they agree; None for this process alone."""
        if not connected():
            return None
        if self._workers is None:
            said = {
                "seed": self._seed, "samples_per_round": self._samples, "one_byte": self._one_byte, "lr": self.per_weight("lr"),
                "round": self._round(), "scale": self._exponent(), "weights": self.digest(),
            }  # fmt: skip
            heard: list[Any] = [None] * distributed.get_world_size(self._group)
            distributed.all_gather_object(heard, (self._me(), said), group=self._group)
            workers = [worker for worker, _ in heard]
            differ = [name for name in said if any(each[name] != said[name] for _, each in heard)]
            if differ or len(set(workers)) < len(workers):
                raise checks.ModelError(
                    f"the workers differ in {', '.join(differ) or 'nothing but share a worker_id'}; allowed: equal options and "
                    "weights, and one worker_id each. Bring a late worker up to date with join."
                )
            self._workers = workers
        return self._workers

    def _measure(self, closure: Replay, worker: int, only: bool = False) -> tuple[float, tuple[float, ...]]:
        """Return the mean loss of a worker's pairs of points, and its messages; apply it if it is the only one."""
        scale, losses, sent = 2.0 ** self._exponent(), [], []
        for j in range(self._samples):
            with perturbed(self.weights, self._direction(worker, j), self._radius) as at:
                plus, minus = two_sided(at, closure, self._radius)
                losses.append((plus + minus) / 2)
                c = (plus - minus) / (2 * self._radius)
                if not math.isfinite(c):
                    said = f"worker {worker}'s loss is not finite; it sends zero this round"
                    warnings.warn(said, checks.PerturbkitWarning, 4)
                    c = 0.0
                # Bounded: what is far too large for a byte can leave the range of numbers by the scale.
                size = min(abs(c) / scale, 1e300)
                sent.append(float(encode_gradient(math.copysign(size, c))) if self._one_byte else c)
                if only and self._slope(sent[-1]) != 0:
                    at.settle(self._moves(sent[-1], 1))
        return sum(losses) / len(losses), tuple(sent)

    def _direction(self, worker: int, sample: int) -> int:
        return mixed_seed(self._seed, self._round(), worker, sample)

    def _exchange(self, own: tuple[float, ...], workers: list[int] | None) -> Messages:
        kind = torch.uint8 if self._one_byte else torch.float64
        self.bytes_sent += len(own) * kind.itemsize
        if workers is None:
            return {self._me(): own}
        mine = torch.tensor(own, dtype=kind)
        heard = [torch.empty_like(mine) for _ in workers]
        distributed.all_gather(heard, mine, group=self._group)
        return {w: tuple(map(float, t.tolist())) for w, t in zip(workers, heard, strict=True)}

    def _slope(self, said: float) -> float:
        """Return the projected gradient that a message stands for in this round."""
        return 2.0 ** self._exponent() * decode_gradient(int(said)) if self._one_byte else said

    def _moves(self, said: float, n: int) -> list[float]:
        """Return the factors of the direction, one a parameter, of a message among n."""
        return [-lr / n * self._slope(said) for lr in self.per_weight("lr")]

    def _apply(self, messages: Messages, applied: bool = False) -> None:
        n = sum(map(len, messages.values()))
        # Sums of floating-point numbers depend on their order: by worker and sample, everywhere.
        for worker in () if applied else sorted(messages):
            for j, said in enumerate(messages[worker]):
                if self._slope(said) != 0:
                    add_direction(self.weights, self._direction(worker, j), self._moves(said, n))
        if self._one_byte:
            largest = max(int(said) & 127 for each in messages.values() for said in each)
            change = 4 if largest >= _HIGH else -4 if largest == 0 else -2 if largest < _LOW else 0
            # Bounded, so that gradients that come back after many zeros are in range soon.
            self.state["exponent"] = max(self._exponent() + change, -64)  # type: ignore[index]
        self.state["round"] = self._round() + 1  # type: ignore[index]
        self.messages.append(messages)


def simulate_one_byte(
    loss_fns: Sequence[Callable[[int], Any]], params: Any, rounds: int, **options: Any
) -> OneByteHistory:
    """Run the protocol of :class:`OneByteSPSA` in one process that plays every worker.

    Parameters
    ----------
    loss_fns : sequence of callable
        One a worker: ``loss_fn(round) -> loss`` of its batch at the present weights.
    params : iterable of Tensor, or of dict
        The shared parameters, trained in place.
    rounds : int
        Steps, at least 1.
    **options
        Of :class:`OneByteSPSA`, apart from ``group`` and ``worker_id``.

    Returns
    -------
    OneByteHistory

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    The weights are bit for bit those of as many processes.

    References
    ----------
    Zelikman et al. (2023), arXiv:2306.10015.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> run = simulate_one_byte([lambda t: w[0] ** 2, lambda t: w[1] ** 2], [w], 300, lr=0.05)
    >>> bool(w.abs().max() < 0.05), run.bytes_sent
    (True, 300)
    """
    if not isinstance(loss_fns, Sequence) or not loss_fns:
        raise checks.ArgumentTypeError(
            f"loss_fns is {loss_fns!r}; allowed: a sequence of functions of the round, one a worker. Pass at least one."
        )
    checks.integer("rounds", rounds, low=1)
    for name in ("group", "worker_id"):
        if name in options:
            raise checks.ArgumentError(
                f"{name} is given; allowed: the other options. Leave it out: this process plays every worker."
            )
    optimizer = OneByteSPSA(params, **options)
    losses = torch.empty(rounds, dtype=torch.float64)
    with torch.no_grad():
        for t in range(rounds):
            closures = [optimizer.replay(partial(fn, t)) for fn in loss_fns]
            measured = [optimizer._measure(closure, m) for m, closure in enumerate(closures)]
            losses[t] = sum(loss for loss, _ in measured) / len(measured)
            optimizer._apply({m: sent for m, (_, sent) in enumerate(measured)})
    each = optimizer._samples * (1 if optimizer._one_byte else 8)
    cost = Cost(2 * rounds * len(loss_fns) * optimizer._samples)
    return OneByteHistory(losses, rounds * each, optimizer.digest(), optimizer.messages, cost)
