"""Generators: nothing in the library reads or sets a global seed.

Randomness enters a method through one ``generator`` argument. ``None`` means a fresh generator seeded by the
operating system, an ``int`` a generator with that seed, and a ``torch.Generator`` is used (and advanced) as it is.
Draws are made on the generator's device and then moved, to the CPU unless another device is asked for: a CPU generator
gives the same numbers for a model on any device, and one of an accelerator works everywhere too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perturbkit.core import checks

__all__ = [
    "Seed",
    "as_generator",
    "mixed_seed",
    "numpy_generator",
    "rademacher",
    "randint",
    "randn",
    "randperm",
    "seeded_init",
    "seeds",
    "uniform",
]

Seed = torch.Generator | int | None


def as_generator(generator: Seed = None) -> torch.Generator:
    """Return a generator.

    Parameters
    ----------
    generator : torch.Generator, int or None
        A generator is returned as it is; an integer seeds a new CPU generator; ``None`` gives a new CPU
        generator with entropy from the operating system.

    Returns
    -------
    torch.Generator

    Raises
    ------
    ArgumentTypeError
        If it is none of the three.

    Examples
    --------
    >>> a, b = as_generator(7), as_generator(7)
    >>> bool(torch.equal(randn((3,), generator=a), randn((3,), generator=b)))
    True
    """
    if isinstance(generator, torch.Generator):
        return generator
    made = torch.Generator()
    if generator is None:
        made.seed()
        return made
    if isinstance(generator, bool) or not hasattr(generator, "__index__"):
        raise checks.ArgumentTypeError(
            f"generator is {generator!r}; allowed: a torch.Generator, an int or None. "
            "Pass torch.Generator().manual_seed(n)."
        )
    return made.manual_seed(int(generator))


def numpy_generator(generator: Seed | np.random.Generator = None) -> np.random.Generator:
    """Return a NumPy generator; a torch generator is advanced by one draw and seeds it.

    Examples
    --------
    >>> bool(numpy_generator(3).integers(10) == numpy_generator(3).integers(10))
    True
    """
    if isinstance(generator, np.random.Generator):
        return generator
    return np.random.default_rng(seeds(as_generator(generator), 1)[0])


@contextmanager
def seeded_init(seed: int) -> Iterator[None]:
    """Let the modules built inside draw their first weights, which PyTorch takes from its global generator, from a seed.

    The global generator is as it was afterwards, and those of other devices are not touched.

    Examples
    --------
    >>> with seeded_init(3):
    ...     first = torch.nn.Linear(2, 1).weight
    >>> with seeded_init(3):
    ...     second = torch.nn.Linear(2, 1).weight
    >>> bool(torch.equal(first, second))
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def seeds(generator: torch.Generator, n: int) -> list[int]:
    """Draw ``n`` independent 63-bit seeds, for workers and for perturbations that are redrawn later."""
    drawn = torch.randint(0, 2**63 - 1, (n,), generator=generator, device=generator.device)
    return [int(s) for s in drawn]


def mixed_seed(*numbers: int) -> int:
    """Return one 63-bit seed that depends on every number and on their order, the same on every machine.

    Examples
    --------
    >>> mixed_seed(7, 0, 1) == mixed_seed(7, 0, 1), mixed_seed(7, 0, 1) == mixed_seed(7, 1, 0)
    (True, False)
    """
    entropy = [checks.integer("numbers", n, low=0) for n in numbers]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def _like(like: Tensor | None, dtype: torch.dtype | None, device: Any) -> tuple[torch.dtype | None, Any]:
    if like is None:
        return dtype, "cpu" if device is None else device
    return dtype or (like.dtype if like.is_floating_point() else None), like.device


def randn(
    shape: Sequence[int],
    *,
    generator: torch.Generator,
    like: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw standard normal numbers, with the dtype and device of ``like`` (or those given)."""
    dtype, device = _like(like, dtype, device)
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=dtype).to(device)


def uniform(
    shape: Sequence[int],
    low: float = 0.0,
    high: float = 1.0,
    *,
    generator: torch.Generator,
    like: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw uniform numbers in [low, high), with the dtype and device of ``like`` (or those given)."""
    dtype, device = _like(like, dtype, device)
    drawn = torch.rand(tuple(shape), generator=generator, device=generator.device, dtype=dtype)
    return (low + (high - low) * drawn).to(device)


def rademacher(
    shape: Sequence[int],
    *,
    generator: torch.Generator,
    like: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw signs -1 and +1 with equal chance, with the dtype and device of ``like`` (or those given)."""
    dtype, device = _like(like, dtype, device)
    bits = torch.randint(0, 2, tuple(shape), generator=generator, device=generator.device)
    return (2 * bits - 1).to(device=device, dtype=dtype or torch.get_default_dtype())


def randint(
    low: int, high: int, shape: Sequence[int], *, generator: torch.Generator, device: Any = "cpu"
) -> Tensor:
    """Draw integers in low..high-1 as int64."""
    return torch.randint(low, high, tuple(shape), generator=generator, device=generator.device).to(device)


def randperm(n: int, *, generator: torch.Generator, device: Any = "cpu") -> Tensor:
    """Draw a random order of 0..n-1."""
    return torch.randperm(n, generator=generator, device=generator.device).to(device)
