"""The function under study, as a counted, chunked and device-aware callable.

Everything that queries a model does so through an :class:`Oracle`, so every result can say what it cost, memory
stays within one budget, and the model is as it was afterwards: training mode, gradients, hooks and buffers.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perturbkit.core import checks
from perturbkit.core.results import Cost
from perturbkit.core.watch import paced, timed

__all__ = ["Oracle", "parse_memory", "target_rows", "unwrap_output"]

_log = logging.getLogger("perturbkit")

# On a CPU a chunk is large enough once its largest activation fills the caches: beyond that time no longer falls and memory
# grows with every row. A backward pass has more to share among the rows of a chunk. Above 32 MiB glibc maps each block
# afresh, so that it pays for its page faults every time.
_CPU_BLOCK = {"forward": 8 * 2**20, "backward": 12 * 2**20}
# What one row of a module keeps alive, by the kind of query and the rows; the next oracle of the module need not run it again.
_measured: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], tuple[int, int]]] = (
    weakref.WeakKeyDictionary()
)
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Oracle:
    """A function under study: rows in, rows out, counted and bounded in memory.

    Parameters
    ----------
    fun : nn.Module or callable
        Maps a batch of shape (n, ...) to outputs of shape (n, outputs) or (n,). A module is evaluated in
        evaluation mode, with its parameters out of the graph, and restored afterwards. Outputs in the style of
        Hugging Face (an object or mapping with ``logits``) are unwrapped; anything else that is not a tensor is
        refused.
    memory : int or str, optional
        Budget for the activations of one chunk, in bytes or as "512MB", "2GiB". Default: 1 GB.
    chunk_size : int, optional
        Rows at once; overrides the memory budget.
    device : torch.device or str, optional
        Where the function runs; inputs are moved there and outputs back. Default: no move.

    Attributes
    ----------
    nfev, ngrad, njvp : int
        Rows evaluated, rows differentiated backward, rows differentiated forward, so far.
    cost : Cost
        The three together.

    Notes
    -----
    The chunk size is measured, not guessed: the first batch of a new row shape is preceded by one unrecorded row
    under a dispatch mode that adds up living activations, once for a module however many oracles it is given. If memory runs out all the same, the chunk is halved,
    the rows are run again and the halving is logged; a retry is not counted, since no row was answered.

    Results do not depend on the chunk size, beyond the rounding of the model's own kernels. Inside a
    :class:`~perturbkit.core.watch.Watch` the time of a query is counted, its deadline is looked at before each chunk,
    and chunks are kept short where there is one.

    Examples
    --------
    >>> oracle = Oracle(lambda x: x.square().sum(1, keepdim=True))
    >>> value, gradient = oracle.value_and_gradient(torch.tensor([[1.0, 2.0]]), target=0)
    >>> value, gradient, oracle.cost
    (tensor([5.]), tensor([[2., 4.]]), Cost(nfev=1, ngrad=1, njvp=0))
    """

    def __init__(
        self,
        fun: nn.Module | Callable[..., Any],
        *,
        memory: int | str | None = None,
        chunk_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not callable(fun):
            raise checks.ArgumentTypeError(
                f"fun is a {type(fun).__name__}; allowed: an nn.Module or a callable. Pass the model itself."
            )
        self.fun = fun
        self.memory = parse_memory(memory) if memory is not None else 10**9
        self.chunk_size = None if chunk_size is None else checks.integer("chunk_size", chunk_size, low=1)
        self.device = None if device is None else torch.device(device)
        self.nfev = self.ngrad = self.njvp = 0
        self._known: dict[tuple[Any, ...], tuple[int, int]] = {}
        self._row_seconds: dict[str, float] = {}
        self._ceiling: int | None = None

    @classmethod
    def wrap(cls, fun: Oracle | nn.Module | Callable[..., Any], **options: Any) -> Oracle:
        """Return ``fun`` itself if it is an oracle, else an oracle of it with the options."""
        return fun if isinstance(fun, Oracle) else cls(fun, **options)

    @property
    def cost(self) -> Cost:
        """Rows evaluated and differentiated so far."""
        return Cost(self.nfev, self.ngrad, self.njvp)

    # -- queries ---------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor, *rows: Tensor) -> Tensor:
        """Return the outputs, without a graph.

        Parameters
        ----------
        x : Tensor, shape (n, ...)
            Inputs.
        *rows : Tensor, shape (n, ...)
            Further arguments of the function that go with the rows (an attention mask).

        Returns
        -------
        Tensor, shape (n, outputs) or (n,)
        """

        def run(*part: Tensor) -> tuple[Tensor]:
            with torch.no_grad():
                return (self._evaluate(*part),)

        (out,) = self._chunked(run, (x, *rows), "forward")
        self.nfev += len(x)
        return out

    def value(self, x: Tensor, target: Tensor | int | None = None, *rows: Tensor) -> Tensor:
        """Return one output a row, shape (n,): that of ``target``, or the only one."""
        return _select(self(x, *rows), target_rows(target, x))

    def value_and_gradient(
        self,
        x: Tensor,
        target: Tensor | int | None = None,
        *rows: Tensor,
        objective: Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return one value a row and its gradient in the input.

        Parameters
        ----------
        x : Tensor, shape (n, ...)
            Floating-point inputs.
        target : Tensor of shape (n,), int or None
            The output whose gradient is wanted, or ``None`` where there is only one.
        *rows : Tensor, shape (n, ...)
            Further arguments of the function that go with the rows.
        objective : callable, optional
            ``objective(outputs, target)`` gives one value a row instead of the selected output, for instance a
            loss. It must treat rows independently.

        Returns
        -------
        value : Tensor, shape (n,)
        gradient : Tensor, shape of ``x``
        """
        chosen = target_rows(target, x)
        extra = () if chosen is None else (chosen,)

        def run(part: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
            labels, model_rows = (others[0], others[1:]) if chosen is not None else (None, others)
            with torch.enable_grad():
                leaf = part.detach().requires_grad_(True)
                out = self._evaluate(leaf, *model_rows)
                value = objective(out, labels) if objective is not None else _select(out, labels)
                (gradient,) = torch.autograd.grad(value.sum(), leaf)
            return value.detach(), gradient

        value, gradient = self._chunked(run, (x, *extra, *rows), "backward", model_rows=(x, *rows))
        self.nfev += len(x)
        self.ngrad += len(x)
        return value, gradient

    def gradient(
        self, x: Tensor, target: Tensor | int | None = None, *rows: Tensor, **options: Any
    ) -> Tensor:
        """Return the gradient of one output a row; see :meth:`value_and_gradient`."""
        return self.value_and_gradient(x, target, *rows, **options)[1]

    def vjp(self, x: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs and the vector-Jacobian product with ``cotangent``, a vector of the outputs' shape."""

        def run(part: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                leaf = part.detach().requires_grad_(True)
                out = self._evaluate(leaf)
                (product,) = torch.autograd.grad(out, leaf, weight)
            return out.detach(), product

        out, product = self._chunked(run, (x, cotangent), "backward", model_rows=(x,))
        self.nfev += len(x)
        self.ngrad += len(x)
        return out, product

    def jvp(self, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs and the Jacobian-vector product with ``tangent``, a vector of the inputs' shape."""
        checks.same_shape("tangent", tangent, "x", x)

        def run(part: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                out, product, *_ = torch.func.jvp(self._evaluate, (part,), (direction,))
            return out, product

        out, product = self._chunked(run, (x, tangent), "forward", model_rows=(x,))
        self.nfev += len(x)
        self.njvp += len(x)
        return out, product

    def chunks(self, n: int, like: Tensor, *, gradient: bool = False) -> Iterator[int]:
        """Yield sizes that add up to ``n``, each at most what the budget allows for rows like those of ``like``.

        For methods that draw perturbations chunk by chunk instead of holding all of them.
        """
        size = self._size((like,), "backward" if gradient else "forward")
        while n > 0:
            yield min(size, n)
            n -= size

    def row_memory(self, like: Tensor, *, gradient: bool = False) -> int:
        """Return the bytes that one row like those of ``like`` keeps alive at the peak, measured once on one row."""
        return self._row_bytes((like,), "backward" if gradient else "forward")[0]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold the model in evaluation mode with parameters out of the graph, and restore it on leaving.

        The queries do this themselves; a method that runs many short queries enters it once.
        """
        with _as_is(self.fun):
            yield

    # -- how a query runs ------------------------------------------------------------------------------------

    def _evaluate(self, x: Tensor, *rows: Tensor) -> Tensor:
        moved = [r if self.device is None else r.to(self.device) for r in (x, *rows)]
        version = _version(moved[0])
        out = unwrap_output(self.fun(*moved))
        if _version(moved[0]) != version:
            raise checks.ModelError(
                "the model writes into its input; allowed: a function that leaves its argument alone, since the same rows "
                "are asked about again. Make it copy what it changes (x = x.clone())."
            )
        if out.ndim == 0 or len(out) != len(x):
            raise checks.ModelError(
                f"the model answered shape {tuple(out.shape)} to {len(x)} rows; allowed: one row an input, "
                "shape (n, outputs) or (n,). Return outputs with the batch dimension first."
            )
        return out if self.device is None else out.to(x.device)

    def _chunked(
        self,
        run: Callable[..., tuple[Tensor, ...]],
        arguments: Sequence[Tensor],
        kind: str,
        model_rows: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, ...]:
        """Run ``run`` over chunks of the arguments' rows and concatenate each of its outputs."""
        n = len(arguments[0])
        for other in arguments[1:]:
            if len(other) != n:
                raise checks.ArgumentError(
                    f"a row argument has {len(other)} rows; allowed: the {n} rows of x. Repeat or cut it to match."
                )
        if n == 0:
            raise checks.ArgumentError("x has no rows; allowed: at least one. Pass data.")
        parts: list[tuple[Tensor, ...]] = []
        with _as_is(self.fun):
            size = self._size(model_rows or arguments, kind)
            start = 0
            while start < n:
                now = min(paced(size, self._row_seconds.get(kind)), n - start)
                began = time.perf_counter()
                try:
                    with timed():
                        parts.append(run(*(a[start : start + now] for a in arguments)))
                except (RuntimeError, MemoryError) as error:
                    if not _out_of_memory(error) or now == 1:
                        raise
                    size = self._ceiling = max(1, now // 2)
                    _log.warning("out of memory: continuing with chunks of %d rows", size)
                    continue
                self._row_seconds[kind] = (time.perf_counter() - began) / now
                start += now
        if len(parts) == 1:
            return parts[0]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def _size(self, rows: Sequence[Tensor], kind: str) -> int:
        """Return how many rows the budget allows at once."""
        if self.chunk_size is not None:
            size = self.chunk_size
        else:
            living, largest = (max(b, 1) for b in self._row_bytes(rows, kind))
            size = self.memory // living
            device = self.device or rows[0].device
            if device.type == "cpu":
                size = min(size, _CPU_BLOCK[kind] // largest)
        if self._ceiling is not None:
            size = min(size, self._ceiling)
        return max(1, int(size))

    def _row_bytes(self, rows: Sequence[Tensor], kind: str) -> tuple[int, int]:
        """Return what :meth:`_measure` found for rows like these, for this oracle or one of the same module in the same form."""
        key = (kind, *((r.shape[1:], r.dtype, r.device) for r in rows))
        if key not in self._known:
            shared, form = self._of_the_module()
            self._known[key] = shared[key, form] = shared.get((key, form)) or self._measure(rows, kind)
        return self._known[key]

    def _of_the_module(self) -> tuple[dict[tuple[Any, ...], tuple[int, int]], tuple[Any, ...]]:
        """Return what all oracles of the module have measured, and its present form; of a function, nothing."""
        if not isinstance(self.fun, nn.Module):
            return {}, ()
        # A layer that was replaced or hooked may hold more; and of modules that call themselves equal each is itself.
        layers = (
            (id(m), type(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in self.fun.modules()
        )
        weights = ((p.shape, p.dtype, p.device) for p in self.fun.parameters())
        return _measured.setdefault(self.fun, {}), (id(self.fun), self.device, *layers, *weights)

    def _measure(self, rows: Sequence[Tensor], kind: str) -> tuple[int, int]:
        """Return the bytes that one row keeps alive at the peak, and its largest activation."""
        one = [r[:1] for r in rows]
        with _as_is(self.fun), timed(), _LivingBytes() as living:
            if kind == "backward":
                with torch.enable_grad():
                    leaf = one[0].detach().requires_grad_(True)
                    out = self._evaluate(leaf, *one[1:])
                    if out.requires_grad:
                        torch.autograd.grad(out.sum(), leaf, allow_unused=True)
            else:
                with torch.no_grad():
                    self._evaluate(*one)
        return living.peak, living.largest


class _LivingBytes(TorchDispatchMode):
    """Adds up the storages that operations create while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What operations take and none of them made was there before: inputs and weights, of which views come out.
        for item in tree_leaves((args, kwargs)):
            if isinstance(item, Tensor):
                self._known.add(item.untyped_storage())
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else (out,):
            if isinstance(item, Tensor):
                self._add(item.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


@contextmanager
def _as_is(fun: Any) -> Iterator[None]:
    """Put a module into evaluation mode with its parameters out of the graph; restore both."""
    if not isinstance(fun, nn.Module):
        yield
        return
    training = [m for m in fun.modules() if m.training]
    graded = [p for p in fun.parameters() if p.requires_grad]
    try:
        for module in training:
            module.training = False
        for parameter in graded:
            parameter.requires_grad_(False)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in graded:
            parameter.requires_grad_(True)


def unwrap_output(out: Any) -> Tensor:
    """Return the tensor of a model's answer: itself, its ``logits``, or the only element of a tuple.

    Raises
    ------
    ModelError
        If the answer is none of these; nothing is guessed.
    """
    if isinstance(out, Tensor):
        return out
    logits = getattr(out, "logits", None)
    if logits is None and isinstance(out, dict):
        logits = out.get("logits")
    if isinstance(logits, Tensor):
        return logits
    if isinstance(out, tuple) and len(out) == 1 and isinstance(out[0], Tensor):
        return out[0]
    raise checks.ModelError(
        f"the model answered a {type(out).__name__}; allowed: a tensor, or an object with .logits. "
        "Wrap the model in a function that returns the tensor you mean."
    )


def parse_memory(memory: int | str) -> int:
    """Return a memory size in bytes.

    Examples
    --------
    >>> parse_memory("512MB"), parse_memory("2 GiB"), parse_memory(1000)
    (512000000, 2147483648, 1000)
    """
    if isinstance(memory, str):
        text = memory.strip().lower()
        digits = text.rstrip("abcdefghijklmnopqrstuvwxyz ").strip()
        unit = text[len(digits) :].strip()
        try:
            size = float(digits) * _UNITS[unit]
        except (ValueError, KeyError):
            raise checks.ArgumentError(
                f"memory is {memory!r}; allowed: bytes, or a number with KB, MB, GB, KiB, MiB or GiB. "
                "Write for instance '4GB'."
            ) from None
        return int(checks.positive("memory", size))
    return checks.integer("memory", memory, low=1)


def _version(x: Tensor) -> int:
    """Return how often a tensor was written to; tensors under a functional transform keep no count."""
    return 0 if torch._C._functorch.is_functorch_wrapped_tensor(x) or x.is_inference() else x._version


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return "not enough memory" in text or "out of memory" in text or "can't allocate memory" in text


@overload
def target_rows(target: Tensor | int, x: Tensor) -> Tensor: ...
@overload
def target_rows(target: Tensor | int | None, x: Tensor) -> Tensor | None: ...
def target_rows(target: Tensor | int | None, x: Tensor) -> Tensor | None:
    """Return the target of every row as int64, or ``None`` where none is given.

    Parameters
    ----------
    target : Tensor of shape (n,) or (), int or None
        An index a row, or one for all.
    x : Tensor, shape (n, ...)
        The rows.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If there is another number of targets than of rows, or they are no indices.

    Examples
    --------
    >>> target_rows(3, torch.zeros(2, 5))
    tensor([3, 3])
    """
    if target is None:
        return None
    rows = torch.as_tensor(target, device=x.device)
    return checks.labels("target", rows.expand(len(x)) if rows.ndim == 0 else rows, n=len(x))


def _select(out: Tensor, target: Tensor | None) -> Tensor:
    """Pick one output a row."""
    if target is None:
        flat = out.reshape(len(out), -1)
        if flat.shape[1] != 1:
            raise checks.ArgumentError(
                f"target is None, but the model has {flat.shape[1]} outputs; allowed: one output without a target. "
                "Pass target=, one index a row."
            )
        return flat[:, 0]
    if out.ndim != 2:
        raise checks.ArgumentError(
            f"a target is given, but the model answered shape {tuple(out.shape)}; allowed: (n, outputs). "
            "Leave the target out for a model with one output."
        )
    if int(target.max()) >= out.shape[1]:
        raise checks.ArgumentError(
            f"target is {int(target.max())}; allowed: 0..{out.shape[1] - 1}. Pass the index of an output."
        )
    return out.gather(1, target[:, None])[:, 0]
