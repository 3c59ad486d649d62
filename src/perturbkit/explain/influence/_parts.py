"""A module and its loss as functions of the trainable weights, at any checkpoint, with gradients row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perturbkit.core import Oracle, checks
from perturbkit.core.curvature import hessian
from perturbkit.core.oracle import unwrap_output
from perturbkit.core.random import rademacher

# One number a row from outputs (n, ...) and targets (n, ...).
RowFunction = Callable[[Tensor, Tensor], Tensor]
Data = tuple[Tensor, Tensor]
State = Mapping[str, Tensor]

# Numbers held at once by the gradients of a chunk of rows.
_BLOCK = 2**22


class Network:
    """A module as a function of the vector of its trainable weights.

    Parameters
    ----------
    model : nn.Module or Oracle of one
        The weights to be attributed are those that require a gradient.
    loss : callable (outputs, y) -> (n,)
        The training loss of each row.
    chunk_size : int or None
        Rows of which gradients are held at once.
    """

    def __init__(self, model: Oracle | nn.Module, loss: RowFunction, chunk_size: int | None = None) -> None:
        self.oracle = Oracle.wrap(model)
        if not isinstance(self.oracle.fun, nn.Module):
            raise checks.ArgumentTypeError(
                f"model is a {type(self.oracle.fun).__name__}; allowed: an nn.Module, or an Oracle of one. Pass the module: "
                "its weights are differentiated."
            )
        self.module: nn.Module = self.oracle.fun
        self.loss = loss
        self.chunk_size = None if chunk_size is None else checks.integer("chunk_size", chunk_size, low=1)
        self.shapes = {n: p.shape for n, p in self.module.named_parameters() if p.requires_grad}
        if not self.shapes:
            raise checks.ArgumentError(
                f"the {type(self.module).__name__} has no trainable parameters; allowed: at least one that requires a "
                "gradient. Set requires_grad on the weights that were trained."
            )
        self.size = sum(s.numel() for s in self.shapes.values())

    def count(self, rows: int, gradients: int) -> None:
        """Tell the oracle of rows evaluated, and of how many gradients of each were taken."""
        self.oracle.nfev += rows
        self.oracle.ngrad += rows * gradients

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold the module in evaluation mode."""
        with self.oracle.frozen():
            yield

    def point(self, state: State | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return a checkpoint's weights as a vector, and what else of it belongs to the module."""
        known = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        given = dict(known) if state is None else dict(state)
        lacking = [
            n for n, s in self.shapes.items() if getattr(given.get(n), "shape", None) != s
        ]  # fmt: skip
        if lacking:
            raise checks.ArgumentError(
                f"a checkpoint lacks {lacking[0]} of shape {tuple(self.shapes[lacking[0]])}; allowed: state dicts of the model. "
                "Save them by {k: v.clone() for k, v in model.state_dict().items()}."
            )
        vector = torch.cat([given[name].detach().reshape(-1) for name in self.shapes])
        like = known[next(iter(self.shapes))]
        rest = {n: t.detach() for n, t in given.items() if n in known and n not in self.shapes}
        return vector.to(like), rest

    def outputs(self, vector: Tensor, rest: dict[str, Tensor], x: Tensor) -> Tensor:
        """Return the module's outputs at a weight vector."""
        pieces = vector.split([s.numel() for s in self.shapes.values()])
        weights = {n: v.reshape(s) for (n, s), v in zip(self.shapes.items(), pieces, strict=True)}
        return unwrap_output(torch.func.functional_call(self.module, {**rest, **weights}, (x,)))

    def gradients(self, state: State | None, data: Data, function: RowFunction) -> Tensor:
        """Return the gradient of a function of each row's outputs in the weights, shape (n, p)."""
        vector, rest = self.point(state)

        def row(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
            return function(self.outputs(v, rest, x[None]), y[None]).sum()

        found = torch.func.vmap(torch.func.grad(row), in_dims=(None, 0, 0))(vector, *data)
        self.count(len(data[0]), 1)
        return found.detach()

    def pseudo_gradients(
        self, state: State | None, data: Data, n_samples: int | None, generator: torch.Generator
    ) -> Tensor:
        """Return, row by row, vectors whose outer products sum to the Gauss-Newton matrix, shape (n, k, p)."""
        vector, rest = self.point(state)
        roots = self.roots(self.outputs(vector, rest, data[0]), data[1], n_samples, generator)

        def row(x: Tensor, cotangents: Tensor) -> Tensor:
            pull = torch.func.vjp(lambda v: self.outputs(v, rest, x[None])[0].reshape(-1), vector)[1]
            return torch.func.vmap(pull)(cotangents)[0]

        self.count(len(roots), roots.shape[1])
        self.count(len(roots), 0)
        return torch.func.vmap(row)(data[0], roots).detach()

    def roots(self, out: Tensor, y: Tensor, n_samples: int | None, generator: torch.Generator) -> Tensor:
        """Return cotangents r of each row's outputs with sum r r^T (or its mean) the loss's Hessian, shape (n, k, outputs)."""
        flat = out.detach().reshape(len(out), -1)
        n, k = flat.shape
        product = hessian(lambda o: self.loss(o.reshape(out.shape), y).sum(), flat)
        # Rows do not see each other: one product a column gives that column for all rows.
        unit = torch.eye(k, dtype=flat.dtype, device=flat.device)[:, None].expand(k, n, k)
        matrix = product(unit.contiguous()).transpose(0, 1).double()
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        root = (vectors * values.clamp(min=0).sqrt()[:, None]).to(flat.dtype)
        if n_samples is None:
            return root.mT
        signs = rademacher((n, k, n_samples), generator=generator, like=flat) / n_samples**0.5
        return (root @ signs).mT

    def chunks(self, data: Data, copies: int = 1) -> Iterator[tuple[slice, Data]]:
        """Yield rows in chunks whose gradients, ``copies`` a row, fit the block."""
        n = len(data[0])
        size = self.chunk_size or max(1, _BLOCK // (self.size * max(copies, 1)))
        for start in range(0, n, size):
            rows = slice(start, start + size)
            yield rows, (data[0][rows], data[1][rows])


def checked_data(name: str, data: Any) -> Data:
    """Accept inputs and targets with one row each."""
    if not isinstance(data, tuple | list) or len(data) != 2 or not all(isinstance(d, Tensor) for d in data):
        raise checks.ArgumentTypeError(
            f"{name} is a {type(data).__name__}; allowed: a pair of tensors, inputs and targets. Pass (x, y)."
        )
    x = checks.tensor(f"the inputs of {name}", data[0], floating=False)
    y = checks.tensor(f"the targets of {name}", data[1], floating=False)
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise checks.ArgumentError(
            f"{name} has {tuple(x.shape)} inputs and {tuple(y.shape)} targets; allowed: one target a row. Match them."
        )
    return x, y


def checked_function(name: str, function: Any, network: Network, data: Data) -> RowFunction:
    """Accept a function that gives one number a row, tried on one row."""
    if not callable(function):
        raise checks.ArgumentTypeError(
            f"{name} is {function!r}; allowed: a callable (outputs, y) with one number a row. Pass one, with "
            "reduction='none' where it reduces."
        )
    with network.frozen(), torch.no_grad():
        found = function(network.outputs(*network.point(None), data[0][:2]), data[1][:2])
    if not isinstance(found, Tensor) or found.shape != (min(2, len(data[0])),):
        given = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise checks.ArgumentError(
            f"{name} returned {given} for {min(2, len(data[0]))} rows; allowed: one number a row. Use reduction='none'."
        )
    return function


def checked_states(name: str, states: Any) -> list[State]:
    """Accept a sequence of state dicts."""
    found = list(states) if isinstance(states, Sequence) else []
    if not found or not all(isinstance(s, Mapping) for s in found):
        raise checks.ArgumentTypeError(
            f"{name} is a {type(states).__name__}; allowed: a list of state dicts, at least one. Save copies of "
            "model.state_dict() during training."
        )
    return found


def asked(network: Network, test_data: Data, measurement: RowFunction | None) -> tuple[Data, RowFunction]:
    """Accept queries and what is measured of them."""
    queries = checked_data("test_data", test_data)
    return queries, checked_function("measurement", measurement or network.loss, network, queries)


def numbers(name: str, value: Any, n: int, *, share: bool = False) -> list[float]:
    """Return one positive number a segment or step."""
    if isinstance(value, Sequence | np.ndarray | Tensor) and np.ndim(value) > 0:
        if len(value) != n:
            raise checks.ArgumentError(
                f"{name} has {len(value)} numbers; allowed: one number, or {n}, in order. Give one for each."
            )
        return [checks.positive(name, float(v)) for v in value]
    return [checks.positive(name, value) / (n if share else 1)] * n
