"""What distributed optimizers share: compressors of messages, mixing matrices, and the trained weights as one double-precision vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, distributed

from perturbkit.core import checks
from perturbkit.core.optimizers import BaseOptimizer, dense_gradients

__all__ = [
    "Compressor",
    "Dense",
    "TopK",
    "VectorOptimizer",
    "as_compressor",
    "check_agreement",
    "check_gradients",
    "check_mixing",
    "gradient_at",
    "metropolis_mixing",
    "ring_mixing",
]


class Compressor(Protocol):
    """Turns a vector into bytes and back; sender and receiver both use what comes back."""

    def encode(self, v: Tensor) -> Tensor:
        """Return the message of a vector of shape (d,): bytes, shape (nbytes(d),)."""

    def decode(self, message: Tensor, d: int) -> Tensor:
        """Return the vector of a message, shape (d,), in double precision."""

    def nbytes(self, d: int) -> int:
        """Return the length of the message of d numbers."""


class Dense:
    """Sends every number, in a given precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def encode(self, v: Tensor) -> Tensor:
        """Return the message of a vector."""
        return v.to(self._dtype).contiguous().view(torch.uint8)

    def decode(self, message: Tensor, d: int) -> Tensor:
        """Return the vector of a message."""
        return message.view(self._dtype).double()

    def nbytes(self, d: int) -> int:
        """Return the length of the message of d numbers."""
        return d * self._dtype.itemsize


class TopK:
    r"""The compressor that sends a share of the entries of a vector, the largest in magnitude.

    Parameters
    ----------
    fraction : float
        Share of the entries, in (0, 1]; rounded up, so that at least one is sent.
    dtype : torch.dtype
        Precision in which their values travel: ``torch.float32`` or ``torch.float64``.

    Raises
    ------
    ArgumentError
        If an option is not allowed.

    Notes
    -----
    :math:`|C(v) - v|^2 \le (1 - \alpha) |v|^2` with :math:`\alpha = k / d`, but for rounding. A message holds k indices of four
    bytes and k values of four or eight.

    References
    ----------
    Stich, Cordonnier and Jaggi (2018), arXiv:1809.07599.

    Examples
    --------
    >>> top = TopK(0.3)
    >>> top.decode(top.encode(torch.tensor([0.0, -3.0, 1.0, 2.0])), 4), top.nbytes(4), top.alpha(4)
    (tensor([ 0., -3.,  0.,  2.], dtype=torch.float64), 16, 0.5)
    """

    def __init__(self, fraction: float, dtype: torch.dtype = torch.float32) -> None:
        self.fraction = checks.between("fraction", fraction, 0, 1, inclusive="high")
        self.dtype = checks.one_of("dtype", dtype, (torch.float32, torch.float64))

    def kept(self, d: int) -> int:
        """Return how many of d entries are sent."""
        # A share such as 0.3 of 10 is 3.0000000000000004.
        return min(d, max(1, -int(-self.fraction * d * (1 - 1e-12) // 1)))

    def alpha(self, d: int) -> float:
        """Return the contraction factor for vectors of d entries."""
        return self.kept(d) / d

    def encode(self, v: Tensor) -> Tensor:
        """Return the message of a vector of shape (d,): bytes, shape (nbytes(d),)."""
        index = v.abs().topk(self.kept(len(v))).indices
        return torch.cat([index.int().view(torch.uint8), v[index].to(self.dtype).view(torch.uint8)])

    def decode(self, message: Tensor, d: int) -> Tensor:
        """Return the vector of a message, shape (d,), in double precision."""
        # Copies, since a view of another type must start at a multiple of its size.
        index, values = (
            part.clone() for part in message.split([4 * self.kept(d), len(message) - 4 * self.kept(d)])
        )
        v = torch.zeros(d, dtype=torch.float64, device=message.device)
        return v.index_copy_(0, index.view(torch.int32).long(), values.view(self.dtype).double())

    def nbytes(self, d: int) -> int:
        """Return the length of the message of d numbers."""
        return self.kept(d) * (4 + self.dtype.itemsize)


class VectorOptimizer(BaseOptimizer):
    """An optimizer that sees its trained weights as one vector, and keeps vectors of the state in double precision."""

    def __init__(self, params: Any, defaults: Mapping[str, Any], group: Any) -> None:
        self.group = group
        self.bytes_sent = 0
        super().__init__(params, defaults)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check a group's own options."""
        checks.nonnegative("lr", group["lr"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the workers out of copies: processes cannot be copied."""
        return {**super().__getstate__(), "group": None}

    def state_dtype(self, name: str, saved: torch.dtype, p: Tensor) -> torch.dtype:
        """Return the precision of the state, whatever that of the weights."""
        return saved

    def gradient(self) -> Tensor:
        """Return the gradient, shape (d,), in double precision."""
        return self.vector(dense_gradients(self.weights))

    def vector(self, tensors: list[Tensor]) -> Tensor:
        """Return tensors as one vector in double precision, on the first one's device."""
        return torch.cat([t.detach().reshape(-1).to(tensors[0].device, torch.float64) for t in tensors])

    def parts(self, vector: Tensor) -> list[Tensor]:
        """Return a vector's parts in the shapes of the weights."""
        pieces = vector.split([p.numel() for p in self.weights])
        return [v.reshape(p.shape).to(p.device) for v, p in zip(pieces, self.weights, strict=True)]

    def saved(self, name: str) -> Tensor:
        """Return a vector of the state; zeros for weights without one."""
        kept = [self.state[p].get(name) for p in self.weights]
        return self.vector(
            [torch.zeros_like(p) if v is None else v for p, v in zip(self.weights, kept, strict=True)]
        )

    def save(self, name: str, vector: Tensor) -> None:
        """Put a vector into the state, each weight's part with it."""
        for p, part in zip(self.weights, self.parts(vector), strict=True):
            self.state[p][name] = part.clone()


def as_compressor(compressor: Any, dtype: torch.dtype) -> Compressor:
    """Return the compressor, or one that sends every number in the precision of the weights."""
    if compressor is None:
        return Dense(torch.promote_types(dtype, torch.float32))
    if not all(callable(getattr(compressor, name, None)) for name in ("encode", "decode", "nbytes")):
        raise checks.ArgumentTypeError(
            f"compressor is {compressor!r}; allowed: None or an object with encode, decode and nbytes. Pass TopK(0.1)."
        )
    made: Compressor = compressor
    return made


def check_agreement(said: Mapping[str, Any], group: Any) -> None:
    """Refuse, on every worker, options that are not the same on all."""
    heard: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(heard, dict(said), group=group)
    differ = [name for name in said if any(each.get(name) != heard[0][name] for each in heard)]
    if differ:
        raise checks.ModelError(
            f"the workers differ in {', '.join(differ)}; allowed: equal ones. Build model and optimizer alike everywhere."
        )


def check_gradients(grads: Any) -> int:
    """Accept a sequence of functions, one a worker, and return how many."""
    if not isinstance(grads, (list, tuple)) or not grads or not all(map(callable, grads)):
        raise checks.ArgumentTypeError(
            f"grads is {grads!r}; allowed: a list of functions of x, one a worker. Pass at least one."
        )
    return len(grads)


def gradient_at(grad: Any, x: Tensor) -> Tensor:
    """Return a worker's gradient at a point, in double precision."""
    g = grad(x.clone())
    if not isinstance(g, Tensor) or g.shape != x.shape:
        raise checks.ModelError(
            f"a gradient is {tuple(g.shape) if isinstance(g, Tensor) else g!r}; allowed: a tensor of x's shape, {tuple(x.shape)}. "
            "Return the gradient of the worker's objective."
        )
    return g.detach().double()


def ring_mixing(n: int) -> Tensor:
    """Return the mixing matrix of a ring: a third for each neighbour and oneself.

    Parameters
    ----------
    n : int
        Workers, at least 1.

    Returns
    -------
    Tensor, shape (n, n)
        In double precision.

    Raises
    ------
    ArgumentError
        If there is none.

    Notes
    -----
    That of :func:`metropolis_mixing`: halves for two workers.

    Examples
    --------
    >>> ring_mixing(4)[0]
    tensor([0.3333, 0.3333, 0.0000, 0.3333], dtype=torch.float64)
    """
    checks.integer("n", n, low=1)
    place = torch.arange(n)
    gap = (place[:, None] - place).remainder(n)
    return metropolis_mixing((gap == 1) | (gap == n - 1))


def metropolis_mixing(graph: Tensor) -> Tensor:
    r"""Return the mixing matrix of Metropolis weights for a graph.

    Parameters
    ----------
    graph : Tensor, shape (n, n)
        Symmetric; two workers are neighbours where the entry is not zero. The diagonal is ignored.

    Returns
    -------
    Tensor, shape (n, n)
        Symmetric, rows sum to 1, in double precision.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the graph is not symmetric or not connected.

    Notes
    -----
    :math:`W_{ij} = 1 / (1 + \max(\deg_i, \deg_j))` for neighbours, and the rest of 1 for oneself.

    References
    ----------
    Xiao and Boyd (2004), Fast Linear Iterations for Distributed Averaging, Systems and Control Letters 53.

    Examples
    --------
    >>> star = torch.tensor([[0, 1, 1], [1, 0, 0], [1, 0, 0]])
    >>> metropolis_mixing(star)[0]
    tensor([0.3333, 0.3333, 0.3333], dtype=torch.float64)
    """
    checks.tensor("graph", graph, ndim=2, floating=False)
    links = (graph != 0) & ~torch.eye(*graph.shape, dtype=torch.bool, device=graph.device)
    degree = links.sum(1).double()
    if links.shape[0] != links.shape[1]:
        raise checks.ArgumentError(
            f"graph has shape {tuple(graph.shape)}; allowed: (n, n). Pass a square matrix."
        )
    weights = links / (1 + torch.maximum(degree[:, None], degree))
    return check_mixing(weights + torch.diag(1 - weights.sum(1)), "graph")


def check_mixing(mixing: Any, name: str = "mixing") -> Tensor:
    """Accept a symmetric stochastic matrix that mixes all workers, and return it in double precision."""
    w = checks.tensor(name, mixing, ndim=2).detach().double()
    # Single precision rounds thirds to 3e-8.
    fair = w.shape[0] == w.shape[1] and bool((w >= 0).all() and (w - w.T).abs().max() < 1e-6)
    if not fair or bool((w.sum(1) - 1).abs().max() > 1e-6):
        raise checks.ArgumentError(
            f"{name} of shape {tuple(w.shape)} is not symmetric and stochastic; allowed: a symmetric matrix of numbers of zero or "
            "above whose rows sum to 1. Pass ring_mixing(n), or metropolis_mixing of a symmetric graph."
        )
    if len(w) > 1 and float(torch.linalg.eigvalsh(w)[:-1].abs().max()) > 1 - 1e-9:
        raise checks.ArgumentError(
            f"{name} of shape {tuple(w.shape)} does not mix all workers; allowed: a connected graph that is not bipartite without "
            "weights on the diagonal. Add links or weights for oneself."
        )
    return w
