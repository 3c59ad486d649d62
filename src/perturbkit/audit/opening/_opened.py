"""What opening a model and opening data give, before the two are put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from perturbkit.audit.subject import TextModel
from perturbkit.core import checks

PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin", ".joblib", ".npy.pkl"}


@dataclass
class OpenedModel:
    """A model as it was opened.

    Attributes
    ----------
    fun : nn.Module, callable or Oracle
        A batch in, one row of scores an input out.
    name : str
        What the report calls it.
    notes, remarks : list of str
        What is odd about it, and what a reader should know.
    classes : tuple of str
        Names of the outputs, where the model has them.
    regression : bool or None
        Whether it answers numbers rather than classes, where the model itself says so.
    no_gradient : str
        Why gradients cannot reach its input, and what to do; empty where they may.
    text_model : TextModel or None
        How it reads texts.
    features : tuple of str
        Columns it was fitted on, in order, where it names them.
    takes_frames : bool
        Whether it takes a table with named columns, of which some may hold categories.
    dtype : torch.dtype or None
        Precision its inputs should have; ``None``: that of its parameters.
    operations : float or None
        Floating-point operations a row, where PyTorch cannot count them.
    row_bytes : int or None
        Memory of one row inside the model, where PyTorch cannot measure it.
    fit_inputs : callable or None
        Given the inputs, returns the function to ask and what to remark, for models whose wants depend on the data.
    """

    fun: Any
    name: str
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    regression: bool | None = None
    no_gradient: str = ""
    text_model: TextModel | None = None
    features: tuple[str, ...] = ()
    takes_frames: bool = False
    dtype: torch.dtype | None = None
    operations: float | None = None
    row_bytes: int | None = None
    fit_inputs: Callable[[OpenedData], tuple[Any, list[str]]] | None = None


@dataclass
class OpenedData:
    """Data as they were opened.

    Attributes
    ----------
    name, task : str
        What the report calls them, and their kind.
    targets : pandas.Series
        Labels or numbers as they stand in the data.
    classes : tuple of str
        Names of the classes, where the data name them in order (folders).
    x : Tensor or None
        Images, or a table of numbers.
    frame : pandas.DataFrame or None
        A table with named columns, before it is turned into numbers.
    texts : sequence of str
        Texts.
    feature_names, groups : tuple of str
        Names of columns, and a group a row.
    categories : dict of int to pandas.Series
        By column of ``x``, the legal values that its whole numbers stand for.
    from_file : bool
        Whether the precision is the file's and not the user's choice.
    """

    name: str
    task: str
    targets: Any
    classes: tuple[str, ...] = ()
    x: Tensor | None = None
    frame: Any = None
    texts: Sequence[str] = ()
    feature_names: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    categories: dict[int, Any] = field(default_factory=dict)
    from_file: bool = False
    remarks: list[str] = field(default_factory=list)


def usable_device(device: str | None) -> None:
    """Refuse a device that is unknown or not here.

    Raises
    ------
    ArgumentError
        If PyTorch cannot put a tensor there.
    """
    if device is None:
        return
    try:
        torch.empty(1, device=torch.device(device))
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise checks.ArgumentError(
            f"device is {device!r}, which cannot be used ({first_line(error)}); allowed: a device of this machine, such as "
            "cpu or cuda. Name another with --device, or leave it out."
        ) from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
