"""Argument checks and the error types: what was given, what is allowed, what to do.

Every public function checks its arguments once, at its door, with the functions of this module. Each check
returns the value it accepted, in the form in which the caller wants to use it, and raises an error whose
message has three parts: the name and value that were given, what is allowed, and a remedy.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "DataError",
    "MissingExtraError",
    "ModelError",
    "PerturbkitError",
    "PerturbkitWarning",
    "answer",
    "array",
    "between",
    "extra",
    "image_batch",
    "integer",
    "labels",
    "nonnegative",
    "one_of",
    "positive",
    "probabilities",
    "same_shape",
    "tensor",
]


class PerturbkitError(Exception):
    """Base of every error that perturbkit raises on purpose."""


class ArgumentError(PerturbkitError, ValueError):
    """An argument has a value that is not allowed."""


class ArgumentTypeError(PerturbkitError, TypeError):
    """An argument has a type that is not allowed."""


class DataError(PerturbkitError, ValueError):
    """Data from outside (a file, a table, labels) cannot be used."""


class ModelError(PerturbkitError, RuntimeError):
    """The model under study cannot be opened, failed, or answered something that is not an output."""


class MissingExtraError(PerturbkitError, ImportError):
    """An optional dependency is not installed."""


class PerturbkitWarning(UserWarning):
    """Something worked, but not as asked; the message says what was done instead."""


def _shown(value: object) -> str:
    """Return a short text for a value, safe for tensors and arrays."""
    shape = getattr(value, "shape", None)
    if shape is not None and not isinstance(value, int | float):
        return f"{type(value).__name__} of shape {tuple(shape)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def between(
    name: str,
    value: float,
    low: float,
    high: float,
    *,
    inclusive: Literal["both", "low", "high", "neither"] = "both",
) -> float:
    """Accept a finite number in an interval.

    Parameters
    ----------
    name : str
        Name of the argument, for the message.
    value : float
        What was given.
    low, high : float
        Ends of the interval; infinities are allowed as ends.
    inclusive : {"both", "low", "high", "neither"}
        Which ends belong to the interval.

    Returns
    -------
    float
        The value.

    Raises
    ------
    ArgumentTypeError
        If the value is not a real number.
    ArgumentError
        If it is not finite or outside the interval.

    Examples
    --------
    >>> between("alpha", 0.1, 0, 1, inclusive="neither")
    0.1
    >>> between("alpha", 2, 0, 1)
    Traceback (most recent call last):
        ...
    perturbkit.core.checks.ArgumentError: alpha is 2; allowed: a number in [0, 1]. Pass a value inside it.
    """
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise ArgumentTypeError(f"{name} is {_shown(value)}; allowed: a real number. Pass a float.")
    if getattr(value, "shape", ()) not in ((), None) and getattr(value, "size", 1) != 1:
        raise ArgumentTypeError(f"{name} is {_shown(value)}; allowed: one real number. Pass a float.")
    number = float(value)
    left, right = inclusive in ("both", "low"), inclusive in ("both", "high")
    inside = (low <= number if left else low < number) and (number <= high if right else number < high)
    if not math.isfinite(number) or not inside:
        interval = f"{'[' if left else '('}{low:g}, {high:g}{']' if right else ')'}"
        raise ArgumentError(
            f"{name} is {_shown(value)}; allowed: a number in {interval}. Pass a value inside it."
        )
    return number


def positive(name: str, value: float) -> float:
    """Accept a finite number above zero; see :func:`between`."""
    return between(name, value, 0.0, math.inf, inclusive="neither")


def nonnegative(name: str, value: float) -> float:
    """Accept a finite number that is zero or above; see :func:`between`."""
    return between(name, value, 0.0, math.inf, inclusive="low")


def integer(name: str, value: int, *, low: int | None = None, high: int | None = None) -> int:
    """Accept a whole number in a range.

    Raises
    ------
    ArgumentTypeError
        If the value is not an integer (``True`` and ``2.0`` are not).
    ArgumentError
        If it is outside ``low..high``.

    Examples
    --------
    >>> integer("n_steps", 8, low=1)
    8
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ArgumentTypeError(f"{name} is {_shown(value)}; allowed: an integer. Pass an int.")
    number = value.__index__()
    if (low is not None and number < low) or (high is not None and number > high):
        bounds = f"{'' if low is None else low}..{'' if high is None else high}"
        raise ArgumentError(f"{name} is {number}; allowed: an integer in {bounds}. Pass a value inside it.")
    return number


def one_of(name: str, value: Any, options: Iterable[Any]) -> Any:
    """Accept one of a few values.

    Examples
    --------
    >>> one_of("norm", "l3", ["l1", "l2", "linf"])
    Traceback (most recent call last):
        ...
    perturbkit.core.checks.ArgumentError: norm is 'l3'; allowed: 'l1', 'l2', 'linf'. Choose one of these.
    """
    allowed = list(options)
    for option in allowed:
        if type(option) is type(value) and option == value:
            return value
    raise ArgumentError(
        f"{name} is {_shown(value)}; allowed: {', '.join(map(repr, allowed))}. Choose one of these."
    )


def tensor(
    name: str,
    value: torch.Tensor,
    *,
    ndim: int | Sequence[int] | None = None,
    shape: Sequence[int | None] | None = None,
    floating: bool = True,
    finite: bool = True,
) -> torch.Tensor:
    """Accept a tensor of a given rank, shape and kind, with at least one element.

    Parameters
    ----------
    name : str
        Name of the argument.
    value : Tensor
        What was given.
    ndim : int or sequence of int, optional
        Allowed numbers of dimensions.
    shape : sequence of int or None, optional
        Required shape; ``None`` stands for any size.
    floating : bool
        Require a floating-point dtype.
    finite : bool
        Require that no element is NaN or infinite.

    Raises
    ------
    ArgumentTypeError
        If it is not a tensor, or not of a floating-point dtype.
    ArgumentError
        If its shape is not allowed, it is empty, or it holds NaN or infinity.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise ArgumentTypeError(
            f"{name} is {_shown(value)}; allowed: a torch.Tensor. Convert it with torch.as_tensor."
        )
    if floating and not value.is_floating_point():
        raise ArgumentTypeError(
            f"{name} has dtype {value.dtype}; allowed: a floating-point dtype. Convert it with {name}.float()."
        )
    ranks = [ndim] if isinstance(ndim, int) else ndim
    if ranks is not None and value.ndim not in ranks:
        allowed = " or ".join(str(r) for r in ranks)
        raise ArgumentError(
            f"{name} has shape {tuple(value.shape)}; allowed: {allowed} dimensions. "
            "Add or remove dimensions (a single item needs a leading batch dimension)."
        )
    if shape is not None and (
        len(shape) != value.ndim
        or any(want is not None and want != got for want, got in zip(shape, value.shape, strict=True))
    ):
        allowed = "(" + ", ".join("any" if s is None else str(s) for s in shape) + ")"
        raise ArgumentError(
            f"{name} has shape {tuple(value.shape)}; allowed: shape {allowed}. Reshape it to match."
        )
    if value.numel() == 0:
        raise ArgumentError(
            f"{name} is empty, of shape {tuple(value.shape)}; allowed: at least one element. Pass data."
        )
    if finite and value.is_floating_point() and not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise ArgumentError(
            f"{name} holds {bad} NaN or infinite values; allowed: finite numbers. Remove or impute them."
        )
    return value


def image_batch(name: str, value: torch.Tensor) -> torch.Tensor:
    """Accept a batch of images, floating point, of shape (n, channels, height, width)."""
    return tensor(name, value, ndim=4)


def same_shape(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> torch.Tensor:
    """Accept a tensor that has another one's shape."""
    if value.shape != other.shape:
        raise ArgumentError(
            f"{name} has shape {tuple(value.shape)}; allowed: the shape of {other_name}, "
            f"{tuple(other.shape)}. Reshape one of them."
        )
    return value


def answer(name: str, value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Accept what a model answered, if it is a tensor in the shape of its input.

    Another shape would often broadcast, and say nothing: (n,) against (n, 1) makes (n, n).

    Raises
    ------
    ModelError
        If it is not.

    Examples
    --------
    >>> import torch
    >>> answer("net", torch.zeros(3), torch.zeros(3, 1))
    Traceback (most recent call last):
        ...
    perturbkit.core.checks.ModelError: net answered shape (3,); allowed: the shape of its input, (3, 1). Reshape what it answers.
    """
    import torch

    if not isinstance(value, torch.Tensor) or value.shape != x.shape:
        shown = (
            f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
        )
        raise ModelError(
            f"{name} answered {shown}; allowed: the shape of its input, {tuple(x.shape)}. Reshape what it answers."
        )
    return value


def labels(
    name: str, value: torch.Tensor, *, n: int | None = None, n_classes: int | None = None
) -> torch.Tensor:
    """Accept a vector of class indices as int64.

    Parameters
    ----------
    name : str
        Name of the argument.
    value : Tensor, array or sequence of int
        Class indices, shape (n,).
    n : int, optional
        Required length.
    n_classes : int, optional
        Labels must lie in ``0 .. n_classes - 1``.
    """
    import torch

    given = torch.as_tensor(value)
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise ArgumentTypeError(
            f"{name} has dtype {given.dtype}; allowed: integer class indices. Convert it with .long()."
        )
    if given.ndim != 1 or (n is not None and len(given) != n) or len(given) == 0:
        want = "at least one label" if n is None else f"{n} labels"
        raise ArgumentError(
            f"{name} has shape {tuple(given.shape)}; allowed: a vector of {want}. Pass one label a row."
        )
    low, high = int(given.min()), int(given.max())
    if low < 0 or (n_classes is not None and high >= n_classes):
        top = "" if n_classes is None else f"..{n_classes - 1}"
        raise ArgumentError(
            f"{name} holds labels from {low} to {high}; allowed: 0{top}. "
            "Number the classes from 0, in the order of the model's outputs."
        )
    return given.long()


def array(
    name: str,
    value: Any,
    *,
    ndim: int | Sequence[int] | None = None,
    shape: Sequence[int | None] | None = None,
    finite: bool = True,
    dtype: Any = float,
) -> np.ndarray:
    """Accept anything NumPy can turn into a numeric array of a given rank and shape; see :func:`tensor`."""
    import numpy as np

    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        out = np.asarray(value, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(
            f"{name} is {_shown(value)}; allowed: numbers in a rectangular array. Convert it first ({error})."
        ) from error
    ranks = [ndim] if isinstance(ndim, int) else ndim
    if ranks is not None and out.ndim not in ranks:
        raise ArgumentError(
            f"{name} has shape {out.shape}; allowed: {' or '.join(map(str, ranks))} dimensions. Reshape it."
        )
    if shape is not None and (
        len(shape) != out.ndim or any(w is not None and w != g for w, g in zip(shape, out.shape, strict=True))
    ):
        allowed = "(" + ", ".join("any" if s is None else str(s) for s in shape) + ")"
        raise ArgumentError(f"{name} has shape {out.shape}; allowed: shape {allowed}. Reshape it to match.")
    if out.size == 0:
        raise ArgumentError(
            f"{name} is empty, of shape {out.shape}; allowed: at least one element. Pass data."
        )
    if finite and np.issubdtype(out.dtype, np.number) and not np.isfinite(out).all():
        bad = int((~np.isfinite(out)).sum())
        raise ArgumentError(
            f"{name} holds {bad} NaN or infinite values; allowed: finite numbers. Remove or impute them."
        )
    return out


def probabilities(name: str, value: Any, *, n: int | None = None, atol: float = 1e-3) -> np.ndarray:
    """Accept class probabilities as a float64 array of shape (n, n_classes) with rows that sum to one."""
    import numpy as np

    p = array(name, value, ndim=2, shape=None if n is None else (n, None))
    if p.shape[1] < 2:
        raise ArgumentError(
            f"{name} has {p.shape[1]} column; allowed: one column a class, at least two. "
            "For a binary problem pass [1 - p, p]."
        )
    worst = float(np.abs(p.sum(1) - 1).max())
    if p.min() < -atol or p.max() > 1 + atol or worst > atol:
        raise ArgumentError(
            f"{name} has values from {p.min():.4g} to {p.max():.4g} and a row sum off by {worst:.3g}; allowed: "
            "values in [0, 1], rows that sum to 1. If these are logits, apply a softmax first."
        )
    return p


def extra(module: str, extra_name: str) -> ModuleType:
    """Import an optional dependency, or say which extra brings it.

    Examples
    --------
    >>> extra("no_such_module", "cluster")
    Traceback (most recent call last):
        ...
    perturbkit.core.checks.MissingExtraError: this needs the package 'no_such_module', which is not installed. Install it with: pip install 'perturbkit[cluster]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise
        raise MissingExtraError(
            f"this needs the package {module!r}, which is not installed. "
            f"Install it with: pip install 'perturbkit[{extra_name}]'"
        ) from error
