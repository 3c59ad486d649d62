"""A module's weights as one vector, and perturbations of them in place from a seed.

:func:`functional` turns a module into a function of its weight vector, for derivatives and curvature.
:func:`perturbed` and :func:`step` add seeded noise without holding it or a copy of the weights, as zeroth-order
methods for large models need (Malladi et al., 2023, arXiv:2305.17333).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perturbkit.core import checks, random

__all__ = [
    "Restorer",
    "assign",
    "flatten",
    "functional",
    "keeping_modes",
    "perturbed",
    "seeded_direction",
    "step",
    "unflatten",
]

Direction = Literal["gaussian", "rademacher"]

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
    module: nn.Module, seed: int, distribution: Direction = "gaussian", *, trainable_only: bool = True
) -> Tensor:
    """Return the direction z(seed) that :func:`perturbed` and :func:`step` add, as one vector.

    Parameters
    ----------
    module : nn.Module
        Gives the shapes.
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
    parameters = list(_parameters(module, trainable_only).values())
    return torch.cat([z.reshape(-1) for z in _directions(parameters, seed, distribution)])


def step(
    module: nn.Module,
    seed: int,
    scale: float,
    distribution: Direction = "gaussian",
    *,
    trainable_only: bool = True,
) -> None:
    """Add ``scale * z(seed)`` to a module's parameters, in place and for good.

    Parameters
    ----------
    module : nn.Module
        The module.
    seed : int
        Seed of the direction.
    scale : float
        Its factor, of either sign.
    distribution : {"gaussian", "rademacher"}
        Distribution of the direction.
    trainable_only : bool
        Leave out parameters that do not require a gradient.

    Notes
    -----
    Needs memory for the direction of the largest parameter only.

    Examples
    --------
    >>> net = nn.Linear(3, 2)
    >>> before = flatten(net)
    >>> step(net, 3, -0.1)
    >>> bool(torch.allclose(flatten(net), before - 0.1 * seeded_direction(net, 3)))
    True
    """
    factor = _scale(scale)
    parameters = list(_parameters(module, trainable_only).values())
    with torch.no_grad():
        for p, z in zip(parameters, _directions(parameters, seed, distribution), strict=True):
            p.copy_(_shifted(p, z.mul_(factor)))


@dataclass
class Restorer:
    """What :func:`perturbed` keeps to restore the weights.

    Attributes
    ----------
    nbytes : int
        Bytes kept, all parameters together.
    """

    _kept: list[tuple[Tensor | None, Tensor | None]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes kept, all parameters together."""
        return sum(t.nbytes for pair in self._kept for t in pair if t is not None)


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
    module: nn.Module,
    seed: int,
    scale: float,
    distribution: Direction = "gaussian",
    *,
    trainable_only: bool = True,
) -> Iterator[Restorer]:
    r"""Add ``scale * z(seed)`` to a module's parameters inside a ``with``, and restore them bit for bit after it.

    Parameters
    ----------
    module : nn.Module
        The module. Its parameters must not be changed by others inside the ``with``; perturbations may be
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
        Says how many bytes are kept.

    Notes
    -----
    Subtracting the same direction again, :math:`\mathrm{fl}(\mathrm{fl}(w + \sigma z) - \sigma z)`, gives
    :math:`w` up to the rounding of the two operations, so that weights drift when many perturbations follow one
    another. What is kept is the difference of the two as a count of floating-point numbers in between: zero for
    almost every weight that is larger than its perturbation and does not cross a power of two. Counts that are
    not zero are kept with their positions, or, where they are many, as the narrowest integers that hold them.
    For perturbations of a thousandth of the weights this is about a percent of a copy; for perturbations much
    larger than the weights it approaches a copy, since those destroy the weights' digits. The direction is
    regenerated from its seed, one parameter at a time.

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
    parameters = list(_parameters(module, trainable_only).values())
    restorer = Restorer()
    # Checked here, so that a refusal comes before the first change.
    checks.one_of("distribution", distribution, ("gaussian", "rademacher"))
    try:
        with torch.no_grad():
            for p, z in zip(parameters, _directions(parameters, seed, distribution), strict=True):
                z.mul_(factor)
                target = _shifted(p, z)
                count = _ordered(p) - _ordered(_shifted(target, z.neg_()))
                restorer._kept.append(_compact(count))
                p.copy_(target)
        yield restorer
    finally:
        done = parameters[: len(restorer._kept)]
        with torch.no_grad():
            for p, z, kept in zip(done, _directions(done, seed, distribution), restorer._kept, strict=True):
                count = _ordered(_shifted(p, z.mul_(factor).neg_()))
                p.copy_(_from_ordered(_add_compact(count, kept), p))


def _parameters(module: nn.Module, trainable_only: bool) -> dict[str, nn.Parameter]:
    if not isinstance(module, nn.Module):
        raise checks.ArgumentTypeError(
            f"module is a {type(module).__name__}; allowed: an nn.Module. Pass the model itself."
        )
    found = {
        name: p
        for name, p in module.named_parameters()
        if p.is_floating_point() and (p.requires_grad or not trainable_only)
    }
    if not found:
        raise checks.ArgumentError(
            f"the {type(module).__name__} has no {'trainable ' if trainable_only else ''}parameters; allowed: at "
            "least one of a floating-point dtype. Pass trainable_only=False, or set requires_grad."
        )
    return found


def _scale(scale: float) -> float:
    return checks.between("scale", scale, -float("inf"), float("inf"))


def _directions(parameters: list[nn.Parameter], seed: int, distribution: Direction) -> Iterator[Tensor]:
    """Yield the direction of each parameter, in order, in single precision at least."""
    checks.one_of("distribution", distribution, ("gaussian", "rademacher"))
    generator = random.as_generator(checks.integer("seed", seed))
    draw = random.randn if distribution == "gaussian" else random.rademacher
    for p in parameters:
        wide = torch.promote_types(p.dtype, torch.float32)
        yield draw(p.shape, generator=generator, dtype=wide, device=p.device)


def _shifted(weight: Tensor, shift: Tensor) -> Tensor:
    """Return weight + shift, rounded to the weight's dtype.

    One addition and one rounding, both elementwise: the same numbers always give the same bits.
    """
    return (weight.to(shift.dtype) + shift).to(weight.dtype)


def _ordered(weight: Tensor) -> Tensor:
    """Return floating-point numbers as integers in the same order, neighbours one apart; a bijection of bits."""
    kind = _INTEGERS[weight.element_size()]
    bits = weight.detach().reshape(-1).view(kind)
    return torch.where(bits < 0, bits ^ torch.iinfo(kind).max, bits)


def _from_ordered(order: Tensor, like: Tensor) -> Tensor:
    bits = torch.where(order < 0, order ^ torch.iinfo(order.dtype).max, order)
    return bits.view(like.dtype).reshape(like.shape)


def _compact(count: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return positions and counts that are not zero, or ``None`` and all counts, whichever is smaller."""
    nonzero = count.nonzero()[:, 0]
    if len(nonzero) == 0:
        return None, None
    low, high = int(count.min()), int(count.max())
    narrow = next(
        kind for kind in _INTEGERS.values() if torch.iinfo(kind).min <= low and high <= torch.iinfo(kind).max
    )
    position = torch.int32 if len(count) <= torch.iinfo(torch.int32).max else torch.int64
    if len(nonzero) * (narrow.itemsize + position.itemsize) < len(count) * narrow.itemsize:
        return nonzero.to(position), count[nonzero].to(narrow)
    return None, count.to(narrow)


def _add_compact(order: Tensor, kept: tuple[Tensor | None, Tensor | None]) -> Tensor:
    # Integers wrap around, here as in the difference, so that the sum is exact at any distance.
    positions, counts = kept
    if counts is None:
        return order
    if positions is None:
        return order + counts.to(order.dtype)
    return order.index_add(0, positions, counts.to(order.dtype))
