"""A module's weights as one vector, and perturbations of them in place from a seed.

:func:`functional` turns a module into a function of its weight vector, for derivatives and curvature.
:func:`perturbed` and :func:`step` add seeded noise without holding it or a copy of the weights, as zeroth-order
methods for large models need (Malladi et al., 2023, arXiv:2305.17333).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from perturbkit.core import checks, random

__all__ = [
    "Block",
    "Restorer",
    "Weights",
    "assign",
    "blocks",
    "flatten",
    "functional",
    "keeping_modes",
    "moved",
    "perturbed",
    "seeded_direction",
    "seeded_directions",
    "step",
    "unflatten",
]

Direction = Literal["gaussian", "rademacher"]
Weights = nn.Module | Iterable[Tensor]

# Numbers that are worked on at a time, on accelerators, which wait for work, and on processors, whose caches are small.
_BLOCK = (2**23, 2**16)
# Weights whose places fit into sixteen bits.
_RUN = 2**16
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def flatten(module: nn.Module, *, trainable_only: bool = True) -> Tensor:
    """Return a module's parameters as one vector, a detached copy.

    Parameters
    ----------
    module : nn.Module
        The module. Tied parameters are counted once; buffers are not parameters.
    trainable_only : bool
        Leave out parameters that do not require a gradient.

    Returns
    -------
    Tensor, shape (d,)
        In the order of ``module.named_parameters()``, in the widest of the parameters' dtypes.

    Raises
    ------
    ArgumentError
        If there is no such parameter.

    Examples
    --------
    >>> flatten(nn.Linear(3, 2)).shape
    torch.Size([8])
    """
    return torch.cat([p.detach().reshape(-1) for p in _parameters(module, trainable_only).values()])


def unflatten(vector: Tensor, module: nn.Module, *, trainable_only: bool = True) -> dict[str, Tensor]:
    """Return a vector's pieces in the shapes and dtypes of a module's parameters, by name.

    The inverse of :func:`flatten`; gradients flow through it.

    Raises
    ------
    ArgumentError
        If the vector's length is not the number of parameters.

    Examples
    --------
    >>> {name: tuple(p.shape) for name, p in unflatten(torch.zeros(8), nn.Linear(3, 2)).items()}
    {'weight': (2, 3), 'bias': (2,)}
    """
    parameters = _parameters(module, trainable_only)
    sizes = [p.numel() for p in parameters.values()]
    if not isinstance(vector, Tensor) or vector.shape != (sum(sizes),):
        given = (
            f"of shape {tuple(vector.shape)}" if isinstance(vector, Tensor) else f"a {type(vector).__name__}"
        )
        raise checks.ArgumentError(
            f"vector is {given}; allowed: a tensor of shape ({sum(sizes)},), one number a parameter. "
            "Make it with flatten(module), with the same trainable_only."
        )
    pieces = vector.split(sizes)
    return {
        name: piece.reshape(p.shape).to(dtype=p.dtype, device=p.device)
        for (name, p), piece in zip(parameters.items(), pieces, strict=True)
    }


def assign(module: nn.Module, vector: Tensor, *, trainable_only: bool = True) -> None:
    """Write a vector into a module's parameters, in place; see :func:`unflatten`.

    Examples
    --------
    >>> net = nn.Linear(3, 2)
    >>> assign(net, torch.arange(8.0))
    >>> net.bias.tolist()
    [6.0, 7.0]
    """
    pieces = unflatten(
        vector.detach() if isinstance(vector, Tensor) else vector, module, trainable_only=trainable_only
    )
    parameters = _parameters(module, trainable_only)
    with torch.no_grad():
        for name, piece in pieces.items():
            parameters[name].copy_(piece)


def functional(module: nn.Module, *, trainable_only: bool = True) -> Callable[..., Any]:
    """Return a module as a function ``f(vector, *inputs)`` of its weight vector.

    Parameters
    ----------
    module : nn.Module
        The module; neither its parameters nor its buffers are changed by calls.
    trainable_only : bool
        Which parameters the vector stands for; the others keep their values.

    Returns
    -------
    callable
        Differentiable in the vector, also by ``torch.func``.

    Examples
    --------
    >>> net = nn.Linear(3, 2)
    >>> x = torch.ones(1, 3)
    >>> bool(torch.allclose(functional(net)(flatten(net), x), net(x)))
    True
    """
    _parameters(module, trainable_only)

    def call(vector: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Layers such as batch normalisation write to their buffers in training mode: they write to these copies.
        buffers = {name: b.clone() for name, b in module.named_buffers()}
        weights = unflatten(vector, module, trainable_only=trainable_only)
        return torch.func.functional_call(module, {**buffers, **weights}, args, kwargs)

    return call


def seeded_direction(
    weights: Weights, seed: int, distribution: Direction = "gaussian", *, trainable_only: bool = True
) -> Tensor:
    """Return the direction z(seed) that :func:`perturbed` and :func:`step` add, as one vector.

    Parameters
    ----------
    weights : nn.Module or iterable of Tensor
        Gives the shapes: a module, or its parameters.
    seed : int
        Seed of the direction.
    distribution : {"gaussian", "rademacher"}
        Independent standard normal numbers or random signs.
    trainable_only : bool
        Leave out parameters that do not require a gradient.

    Returns
    -------
    Tensor, shape (d,)
        In single precision at least.

    Examples
    --------
    >>> net = nn.Linear(3, 2)
    >>> bool(torch.equal(seeded_direction(net, 7), seeded_direction(net, 7)))
    True
    """
    parameters = list(_parameters(weights, trainable_only).values())
    return torch.cat(list(seeded_directions(parameters, seed, distribution)))


def step(
    weights: Weights,
    seed: int,
    scale: float | Sequence[float],
    distribution: Direction = "gaussian",
    *,
    trainable_only: bool = True,
) -> None:
    """Add ``scale * z(seed)`` to parameters, in place and for good.

    Parameters
    ----------
    weights : nn.Module or iterable of Tensor
        The module, or its parameters.
    seed : int
        Seed of the direction.
    scale : float or sequence of float
        Its factor, of either sign; or one factor a parameter.
    distribution : {"gaussian", "rademacher"}
        Distribution of the direction.
    trainable_only : bool
        Leave out parameters that do not require a gradient.

    Notes
    -----
    Needs memory for a piece of the direction only, of about a million numbers.

    Examples
    --------
    >>> net = nn.Linear(3, 2)
    >>> before = flatten(net)
    >>> step(net, 3, -0.1)
    >>> bool(torch.allclose(flatten(net), before - 0.1 * seeded_direction(net, 3)))
    True
    """
    parameters = list(_parameters(weights, trainable_only).values())
    factors = _scales("scale", scale, len(parameters))
    _check_writable(parameters)
    directions = seeded_directions(parameters, seed, distribution)
    with torch.no_grad():
        for block, z in zip(blocks(parameters), directions, strict=True):
            shift = _multiplied(block, parameters, z, factors)
            block.write(parameters, _shifted(block.read(parameters), shift, overwrite=True))


@dataclass(frozen=True)
class Block:
    """Some parameters of one dtype and device, or a part of a large one, worked on as one vector.

    Many small parameters cost as much as one large one on an accelerator, and a processor's cache holds a part only.

    Attributes
    ----------
    indices : tuple of int
        Which parameters.
    part : slice or None
        Which entries, of a single large one.
    """

    indices: tuple[int, ...]
    part: slice | None = None

    def read(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the block's entries of tensors in the shapes of the parameters, detached; not to be written to."""
        if self.part is not None:
            return tensors[self.indices[0]].detach().view(-1)[self.part]
        flat = [tensors[i].detach().reshape(-1) for i in self.indices]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def write(self, tensors: Sequence[Tensor], values: Tensor) -> None:
        """Write the block's entries of tensors, in place."""
        if self.part is not None:
            tensors[self.indices[0]].detach().view(-1)[self.part].copy_(values)
            return
        own = [tensors[i].detach() for i in self.indices]
        parts = [v.view(t.shape) for t, v in zip(own, self.split(tensors, values), strict=True)]
        torch._foreach_copy_(own, parts)

    def split(self, tensors: Sequence[Tensor], values: Tensor) -> tuple[Tensor, ...]:
        """Return views of a vector of the block, one a parameter."""
        return (
            (values,) if self.part is not None else values.split([tensors[i].numel() for i in self.indices])
        )


def blocks(weights: Sequence[Tensor]) -> list[Block]:
    """Return the blocks of parameters, in order: each entry is in one of them.

    Examples
    --------
    >>> [b.indices for b in blocks([torch.zeros(3), torch.zeros(2, 2), torch.zeros(1).double()])]
    [(0, 1), (2,)]
    >>> [b.part for b in blocks([torch.zeros(100_000)])]
    [slice(0, 65536, None), slice(65536, 100000, None)]
    """
    found: list[Block] = []
    group: list[int] = []
    size = 0
    for i, p in enumerate(weights):
        n, limit = p.numel(), _BLOCK[p.device.type == "cpu"]
        same = not group or (p.dtype, p.device) == (weights[group[0]].dtype, weights[group[0]].device)
        if group and (not same or size + n > limit):
            found.append(Block(tuple(group)))
            group, size = [], 0
        if n > limit and p.is_contiguous():
            found += [Block((i,), slice(a, min(a + limit, n))) for a in range(0, n, limit)]
        else:
            group.append(i)
            size += n
    return [*found, Block(tuple(group))] if group else found


@dataclass(frozen=True)
class _Kept:
    """What is kept of a block's weights that do not come back by subtraction; nothing, to begin with.

    Places are the low sixteen bits; where a block is longer than these tell apart, ``counts`` says how many of the places
    each run of 65,536 has. Without places the values are those of all weights.
    """

    values: Tensor | None = None
    places: Tensor | None = None
    counts: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.values, self.places, self.counts) if t is not None)

    def restore(self, weight: Tensor, undo: Tensor) -> Tensor:
        """Return moved weights as they were, given what is to be added."""
        if self.values is not None and self.places is None:
            return self.values
        back = _shifted(weight, undo)
        if self.values is None or self.places is None:
            return back
        where = self.places.to(torch.int64) & (_RUN - 1)
        if self.counts is not None:
            starts = torch.arange(0, _RUN * len(self.counts), _RUN, device=where.device)
            where += starts.repeat_interleave(self.counts, output_size=len(where))
        return back.index_copy_(0, where, self.values)


class Restorer:
    """What :func:`perturbed` keeps to restore the weights, and moves them with.

    Attributes
    ----------
    scale : float
        The direction's present factor.
    """

    def __init__(self, weights: Sequence[Tensor], draw: Callable[[], Iterable[Tensor]]) -> None:
        self.scale = 0.0
        _check_writable(weights)
        self._weights, self._draw, self._blocks = weights, draw, blocks(weights)
        self._kept = [_Kept()] * len(self._blocks)
        self._scales = [0.0] * len(self._blocks)

    @property
    def nbytes(self) -> int:
        """Bytes kept, all parameters together."""
        return sum(kept.nbytes for kept in self._kept)

    @property
    def moved(self) -> bool:
        """Whether any weight is not where it was."""
        return any(scale != 0 for scale in self._scales)

    def rescale(self, scale: float) -> None:
        """Move the weights to ``w + scale * z``, in one pass over the direction.

        Parameters
        ----------
        scale : float
            New factor of the direction, of either sign; zero puts the weights back.
        """
        self.scale = factor = _scale(scale)
        with torch.no_grad():
            for i, (block, z) in enumerate(zip(self._blocks, self._draw(), strict=True)):
                undo = -self._scales[i]
                # Between the two evaluations of a pair, what undoes one move makes the other.
                shift = z * factor if undo not in (0.0, factor) else z.mul_(factor)
                weight, kept = self._restored(i, z if undo in (0.0, factor) else z.mul_(undo)), _Kept()
                if factor != 0:
                    target = _shifted(weight, shift)
                    # The same bits as of the addition of what undoes it, in one pass less.
                    kept = _lost(weight, torch.sub(target, shift, out=shift).to(weight.dtype))
                    weight = target
                # From here to the next block nothing can fail, so that every one is whole.
                block.write(self._weights, weight)
                self._scales[i], self._kept[i] = factor, kept

    def settle(self, scale: float | Sequence[float], keep: float | Sequence[float] = 1.0) -> None:
        """Leave the weights at ``keep * w + scale * z`` for good, in one pass over the direction.

        Parameters
        ----------
        scale : float or sequence of float
            Factor of the direction, or one a parameter.
        keep : float or sequence of float
            Factor of the weights, or one a parameter.
        """
        factors = _scales("scale", scale, len(self._weights))
        kept = _scales("keep", keep, len(self._weights))

        def settled(block: Block, weight: Tensor, z: Tensor) -> Tensor:
            if any(kept[j] != 1 for j in block.indices):
                weight = _multiplied(block, self._weights, weight.clone(), kept)
            return _shifted(weight, _multiplied(block, self._weights, z, factors), overwrite=True)

        self.replace(settled)

    def replace(self, values: Callable[[Block, Tensor, Tensor], Tensor]) -> None:
        """Leave the weights at what a function makes of them for good, in one pass over the direction.

        Parameters
        ----------
        values : callable
            ``values(block, weight, z)`` returns the new weights of one of :func:`blocks` from those before they were moved,
            not to be written to, and the direction.
        """
        with torch.no_grad():
            for i, (block, z) in enumerate(zip(self._blocks, self._draw(), strict=True)):
                block.write(self._weights, values(block, self._restored(i, z * -self._scales[i]), z))
                self._scales[i], self._kept[i] = 0.0, _Kept()
        self.scale = 0.0

    def _restored(self, i: int, undo: Tensor) -> Tensor:
        """Return a block's weights as they were before they were moved, given what undoes the move."""
        weight = self._blocks[i].read(self._weights)
        return weight if self._scales[i] == 0 else self._kept[i].restore(weight, undo)


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Put every part of a module back into its own mode, of training or evaluation, on leaving.

    Examples
    --------
    >>> net = nn.Sequential(nn.Dropout())
    >>> with keeping_modes(net):
    ...     _ = net.eval()
    >>> net.training
    True
    """
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def perturbed(
    weights: Weights,
    seed: int,
    scale: float,
    distribution: Direction = "gaussian",
    *,
    trainable_only: bool = True,
) -> Iterator[Restorer]:
    r"""Add ``scale * z(seed)`` to parameters inside a ``with``, and restore them bit for bit after it.

    Parameters
    ----------
    weights : nn.Module or iterable of Tensor
        The module, or its parameters, which must not be changed by others inside the ``with``; perturbations may be
        nested.
    seed : int
        Seed of the direction.
    scale : float
        Its factor, of either sign.
    distribution : {"gaussian", "rademacher"}
        Distribution of the direction.
    trainable_only : bool
        Leave out parameters that do not require a gradient.

    Yields
    ------
    Restorer
        Its ``rescale`` moves the weights to another multiple of the same direction; says how many bytes are kept.

    Raises
    ------
    ArgumentError
        If weights cannot be written to, or lie in the memory of others without being the same tensor.

    Notes
    -----
    Subtracting the same direction again, :math:`\mathrm{fl}(\mathrm{fl}(w + \sigma z) - \sigma z)`, gives
    :math:`w` back for almost every weight that is larger than its perturbation and does not cross a power of two.
    The others would drift when many perturbations follow one another: they are kept, with their positions. For
    perturbations of a thousandth of the weights that is a few percent of a copy; for perturbations as large as the
    weights it is a copy, since those destroy the weights' digits. The direction is regenerated from its seed, on the
    parameters' device, one block at a time.

    Examples
    --------
    >>> net = nn.Linear(100, 10)
    >>> before = flatten(net)
    >>> with perturbed(net, seed=3, scale=1e-3) as kept:
    ...     moved = flatten(net)
    >>> bool(torch.equal(flatten(net), before)), bool(torch.equal(moved, before)), kept.nbytes < before.nbytes
    (True, False, True)
    """
    factor = _scale(scale)
    # Checked here, so that a refusal comes before the first change.
    checks.one_of("distribution", distribution, ("gaussian", "rademacher"))
    parameters = list(_parameters(weights, trainable_only).values())
    checks.integer("seed", seed)
    with moved(parameters, lambda: seeded_directions(parameters, seed, distribution), factor) as restorer:
        yield restorer


@contextmanager
def moved(
    weights: Sequence[Tensor], directions: Callable[[], Iterable[Tensor]], scale: float
) -> Iterator[Restorer]:
    """Add ``scale`` times a direction that can be made again to parameters inside a ``with``; see :func:`perturbed`.

    Parameters
    ----------
    weights : sequence of Tensor
        Parameters.
    directions : callable
        ``directions()`` yields one vector for each of :func:`blocks`, the same numbers every time, in tensors of its own:
        they are overwritten.
    scale : float
        The direction's factor, of either sign.

    Yields
    ------
    Restorer
        Its ``rescale`` moves the weights to another multiple of the direction.

    Examples
    --------
    >>> w = torch.tensor([1.0])
    >>> with moved([w], lambda: [torch.tensor([2.0])], 0.5) as at:
    ...     print(float(w))
    ...     at.rescale(-0.5)
    ...     print(float(w))
    2.0
    0.0
    >>> float(w)
    1.0
    """
    restorer = Restorer(weights, directions)
    try:
        restorer.rescale(scale)
        yield restorer
    finally:
        if restorer.moved:
            restorer.rescale(0.0)


def _parameters(weights: Weights, trainable_only: bool) -> dict[str, Tensor]:
    if isinstance(weights, nn.Module):
        named: Iterable[tuple[str, Tensor]] = weights.named_parameters()
    elif isinstance(weights, Iterable) and not isinstance(weights, (Tensor, str)):
        # As in a module, what is given twice counts once.
        named = ((str(i), p) for i, p in enumerate({id(p): p for p in weights}.values()))
    else:
        raise checks.ArgumentTypeError(
            f"module is a {type(weights).__name__}; allowed: an nn.Module, or an iterable of its parameters where a "
            "direction is added. Pass the model itself."
        )
    found = {
        name: p for name, p in named if p.is_floating_point() and (p.requires_grad or not trainable_only)
    }
    if not found:
        raise checks.ArgumentError(
            f"the {type(weights).__name__} has no {'trainable ' if trainable_only else ''}parameters; allowed: at "
            "least one of a floating-point dtype. Pass trainable_only=False, or set requires_grad."
        )
    return found


def _check_writable(weights: Sequence[Tensor]) -> None:
    """Refuse, before the first change, what PyTorch writes to in part and then refuses, and what would be moved twice."""
    owners: dict[int, int] = {}
    outside = not torch.is_inference_mode_enabled()
    for i, p in enumerate(weights):
        start = p.data_ptr()  # zero where nothing is held
        if outside and p.is_inference():
            given = "was made in inference mode"
        elif (
            0 in p.stride()
            and p.numel()
            and any(n > 1 and s == 0 for n, s in zip(p.shape, p.stride(), strict=True))
        ):
            given = "is expanded, with entries that share memory"
        elif start and owners.setdefault(start, i) != i:
            given = f"lies in the memory of weight {owners[start]}, as another tensor"
        else:
            continue
        raise checks.ArgumentError(
            f"weight {i} {given}; allowed: weights that can be written to, each in memory of its own. Clone it, or tie layers by "
            "one and the same nn.Parameter."
        )


def _scale(scale: float) -> float:
    return checks.between("scale", scale, -float("inf"), float("inf"))


def _scales(name: str, scale: float | Sequence[float], n: int) -> list[float]:
    if not isinstance(scale, Sequence):
        return [_scale(scale)] * n
    if len(scale) != n:
        raise checks.ArgumentError(
            f"{name} has {len(scale)} factors; allowed: one, or {n}, one a parameter. Leave out those of frozen parameters."
        )
    return [_scale(s) for s in scale]


def seeded_directions(
    parameters: Sequence[Tensor], seed: int, distribution: Direction = "gaussian"
) -> Iterator[Tensor]:
    """Yield the direction z(seed) of each of :func:`blocks`, in order, in single precision at least.

    Drawn where the parameters lie: numbers drawn on another device would cost more to move than the step.

    Examples
    --------
    >>> weights = [torch.zeros(2), torch.zeros(3)]
    >>> [len(z) for z in seeded_directions(weights, 1)]
    [5]
    """
    checks.one_of("distribution", distribution, ("gaussian", "rademacher"))
    number = checks.integer("seed", seed)
    draw = random.randn if distribution == "gaussian" else random.rademacher
    generators: dict[torch.device, torch.Generator] = {}
    for block in blocks(parameters):
        p = parameters[block.indices[0]]
        if p.device not in generators:
            generators[p.device] = torch.Generator(device=p.device).manual_seed(number)
        n = sum(parameters[i].numel() for i in block.indices)
        n = n if block.part is None else block.part.stop - block.part.start
        wide = torch.promote_types(p.dtype, torch.float32)
        yield draw((n,), generator=generators[p.device], dtype=wide, device=p.device)


def _multiplied(block: Block, tensors: Sequence[Tensor], values: Tensor, factors: Sequence[float]) -> Tensor:
    """Multiply a vector of the block in place, each parameter's part by its own factor."""
    own = [factors[i] for i in block.indices]
    if len(set(own)) == 1:
        return values.mul_(own[0])
    for part, factor in zip(block.split(tensors, values), own, strict=True):
        part.mul_(factor)
    return values


def _shifted(weight: Tensor, shift: Tensor, *, overwrite: bool = False) -> Tensor:
    """Return weight + shift, rounded to the weight's dtype.

    One addition and one rounding, both elementwise: the same numbers always give the same bits.
    """
    return torch.add(weight, shift, out=shift if overwrite else None).to(weight.dtype)


def _lost(weight: Tensor, back: Tensor) -> _Kept:
    """Return what brings the weights back that did not come back; or all of them, if that is less to hold."""
    kind = _INTEGERS[weight.element_size()]
    # Bits are compared, so that zeros keep their sign and what is not a number comes back too.
    own, again = weight.view(kind), back.view(kind)
    if weight.device.type == "cpu":
        # A third of the time that PyTorch takes to compare and search, which was the most of a pass.
        places = torch.from_numpy(np.flatnonzero(own.numpy() != again.numpy()))
    else:
        places = (own != again).nonzero()[:, 0]
    if len(places) * (weight.element_size() + torch.int16.itemsize) >= weight.nbytes:
        return _Kept(weight.clone())
    counts = torch.bincount(places // _RUN) if len(weight) > _RUN else None
    return _Kept(weight[places], places.to(torch.int16), counts)
