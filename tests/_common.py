"""What a method's test file names so that the common tests can run it.

Each ``tests/PACKAGE/ROOM/test_METHOD.py`` holds one module-level ``EXAMPLE``; ``tests/test_every_method.py``
collects them by path and runs the same checks on every method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Example:
    """One tiny call of a method (well under a second).

    Attributes
    ----------
    call : callable (generator, dtype) -> result
        Runs the method on inputs of the given dtype, built inside from a fixed seed, with the given generator
        (ignored by deterministic methods). Returns what the method returns: a Result, tensors, a fitted estimator
        (then give ``read``), ...
    refusals : sequence of (callable, match)
        Calls without arguments that must raise a PerturbkitError whose text matches the regular expression;
        at least one a method.
    model : callable () -> nn.Module, optional
        A module that the method is given. ``with_model`` is then called instead of ``call``.
    with_model : callable (model, generator, dtype) -> result, optional
        Like ``call``, for the model: the common tests check that its mode, gradients, hooks, buffers and weights
        are as before. Leave out for methods whose purpose is to train it.
    chunked : callable (chunk_size) -> result, optional
        The same work under a chunk size; results for 1 and 8 must agree.
    read : callable result -> sequence of tensors or arrays, optional
        Takes the numbers out of a result that is not a Result or tensor.
    dtypes : sequence of torch.dtype
        dtypes the method accepts; the floating results must have the same.
    stochastic : bool
        Whether different generators may give different results.
    """

    call: Callable[[torch.Generator, torch.dtype], Any] | None = None
    refusals: tuple[tuple[Callable[[], Any], str], ...] = ()
    model: Callable[[], torch.nn.Module] | None = None
    with_model: Callable[[torch.nn.Module, torch.Generator, torch.dtype], Any] | None = None
    chunked: Callable[[int], Any] | None = None
    read: Callable[[Any], Any] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    stochastic: bool = False
