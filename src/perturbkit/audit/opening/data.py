"""Data, from what a user names or hands over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perturbkit.audit.opening import tables
from perturbkit.audit.opening._opened import PICKLES, OpenedData, OpenedModel, first_line
from perturbkit.audit.opening.images import from_folder
from perturbkit.core import checks

__all__ = ["open_data"]

_TABLES = (".csv", ".parquet")
_ALLOWED = ".csv, .parquet, .npz, .jsonl or a folder of images"


def open_data(
    data: Any, *, label: str | None = None, group: str | None = None, task: str | None = None,
    model: OpenedModel | None = None,
) -> OpenedData:  # fmt: skip
    """Open data from a file, a folder or arrays.

    Parameters
    ----------
    data : str, Path or (x, y)
        A ``.csv``, ``.parquet``, ``.npz`` or ``.jsonl`` file, a folder of images with one folder a class, or inputs
        (array, tensor, data frame or list of texts) and labels.
    label, group : str, optional
        Columns of the label and the group.
    task : str, optional
        "image", "tabular" or "text"; told from the data by default.
    model : OpenedModel, optional
        The model, whose wants decide what a text column is.

    Raises
    ------
    DataError
        If the data is missing, empty, of an unknown kind, or has values that cannot be used.
    """
    if isinstance(data, tuple | list) and len(data) == 2:
        return _from_arrays(data[0], data[1], "arrays", task, model, label, group)
    if not isinstance(data, str | Path):
        raise checks.DataError(
            f"the data is a {type(data).__name__}; allowed: a path or a pair (x, y). Pass (inputs, labels)."
        )
    path = existing(Path(data))
    suffix = path.suffix.lower()
    if (group and suffix not in _TABLES) or (label and suffix not in (*_TABLES, ".jsonl")):
        flag, name = ("--groups", group) if group and suffix not in _TABLES else ("--label", label)
        raise checks.DataError(
            f"{flag} names the column {name!r}, but {path} has no columns; allowed: {flag} with a .csv or .parquet. "
            "Leave it out."
        )
    if path.is_dir():
        return from_folder(path)
    if suffix in _TABLES:
        return tables.from_frame(tables.read_table(path), path.name, label, group, task, model)
    if suffix == ".npz":
        return _from_npz(path, task, model)
    if suffix == ".jsonl":
        return _from_jsonl(path, label or "label")
    if suffix in PICKLES:
        raise checks.DataError(
            f"the data is {path}, a pickle, which can run code when opened; allowed: {_ALLOWED}. Save arrays with "
            "numpy.savez(path, x=x, y=y)."
        )
    raise checks.DataError(
        f"the data is {path}, of kind {suffix or 'none'!r}; allowed: {_ALLOWED}. Convert it to one of these."
    )


def existing(path: Path, error: type[checks.PerturbkitError] = checks.DataError) -> Path:
    """Return a path that exists and is no empty file; refuse any other with the error given."""
    if not path.exists():
        raise error(
            f"there is no {path}; allowed: an existing file. Check the path (working folder: {Path.cwd()})."
        )
    if path.is_file() and path.stat().st_size == 0:
        raise error(f"{path} is empty; allowed: a file with content. Write it again.")
    return path


def _from_npz(path: Path, task: str | None, model: OpenedModel | None) -> OpenedData:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:
        raise checks.DataError(
            f"{path} could not be read ({first_line(error)}); allowed: plain arrays x and y, no objects. Save it with "
            "numpy.savez(path, x=x, y=y)."
        ) from error
    missing = [k for k in ("x", "y") if k not in arrays]
    if missing:
        raise checks.DataError(
            f"{path} has the arrays {', '.join(arrays) or 'none'}; allowed: x (inputs) and y (labels). Save it with "
            "numpy.savez(path, x=x, y=y)."
        )
    x = arrays["x"]
    return _from_arrays(x.tolist() if x.dtype.kind == "U" else x, arrays["y"], path.name, task, model)


def _from_arrays(
    x: Any, y: Any, name: str, task: str | None, model: OpenedModel | None, label: str | None = None,
    group: str | None = None,
) -> OpenedData:  # fmt: skip
    import pandas as pd

    if label or (group and not isinstance(x, pd.DataFrame)):
        what = f"label names the column {label!r}" if label else f"groups names the column {group!r}"
        raise checks.DataError(
            f"{what}, but inputs and labels are given as a pair; allowed: the labels as its second part, and groups as a "
            "column of a data frame. Leave it out, or pass a file."
        )
    targets = _series(y)
    if len(targets) == 0:
        raise checks.DataError(f"{name} holds no rows; allowed: at least two. Add data.")
    if (
        isinstance(x, np.ndarray)
        and x.ndim == 1
        and x.dtype.kind in "UO"
        and all(isinstance(t, str) for t in x)
    ):
        x = x.tolist()
    if isinstance(x, pd.Series) and not pd.api.types.is_numeric_dtype(x):
        x = x.tolist()
    if isinstance(x, pd.DataFrame):
        _same_length(len(x), len(targets), "x has {} rows and y {}")
        names = pd.Index([str(c) for c in x.columns])
        if names.has_duplicates:
            raise checks.DataError(
                f"x has the column {names[names.duplicated()][0]!r} twice; allowed: one of each name. Rename or drop one."
            )
        groups: tuple[str, ...] = ()
        if group:
            groups = tuple(str(v) for v in tables.column(x, group, "x", "groups"))
            if model is None or group not in model.features:
                x = x.drop(columns=[group])
        found = tables.part(x.reset_index(drop=True), targets, "data frame", groups, task, model)
        found.from_file = False
        return found
    if task == "text" or (isinstance(x, list | tuple) and x and isinstance(x[0], str)):
        texts = [str(t) for t in x]
        _same_length(len(texts), len(targets), "there are {} texts and {} labels")
        return OpenedData(name, "text", targets, texts=texts)
    try:
        values = x if isinstance(x, torch.Tensor) else np.asarray(x)
        if isinstance(values, np.ndarray) and values.dtype == object:
            values = values.astype(np.float64)
        if isinstance(values, np.ndarray) and not values.flags.writeable:
            values = values.copy()  # a view that pandas lends, of which PyTorch warns
        values = torch.as_tensor(values)
        if values.is_complex():
            raise TypeError("complex numbers")
    except (TypeError, ValueError) as error:
        raise checks.DataError(
            f"x is a {type(x).__name__} that holds no plain numbers ({first_line(error)}); allowed: numbers, a list of "
            "texts, or a data frame with named columns. Convert it first."
        ) from error
    values = values if values.is_floating_point() else values.float()
    if values.ndim not in (2, 4):
        raise checks.DataError(
            f"x has shape {tuple(values.shape)}; allowed: (n, features) for tables or (n, channels, height, width) "
            "for images. Reshape it."
        )
    _same_length(len(values), len(targets), "x has {} rows and y {}")
    kind = "image" if values.ndim == 4 else "tabular"
    columns = tuple(f"feature {i}" for i in range(values.shape[1])) if kind == "tabular" else ()
    takes = kind == "tabular" and model is not None and model.takes_frames
    tables.finite(values, name, columns or None, missing=takes)
    if task not in (None, kind):
        raise checks.DataError(
            f"the task is {task!r}, but x has shape {tuple(values.shape)}; allowed: {kind!r} for this shape. Leave the task "
            "out, or pass other inputs."
        )
    return OpenedData(name, kind, targets, x=values, feature_names=columns)


def _series(y: Any) -> Any:
    import pandas as pd

    if y is None:
        raise checks.DataError("y is None; allowed: one label or number a row. Pass (inputs, labels).")
    if isinstance(y, torch.Tensor):
        y = y.detach().cpu().numpy()
    values = np.asarray(y)
    if values.ndim > 1 and values.size != len(values):
        raise checks.DataError(
            f"y has shape {values.shape}; allowed: one label or number a row, shape (n,). Turn one-hot labels into numbers "
            "with y.argmax(1); audit one target at a time."
        )
    return pd.Series(values.reshape(-1)).infer_objects()


def _same_length(inputs: int, labels: int, text: str) -> None:
    if inputs != labels:
        raise checks.DataError(f"{text.format(inputs, labels)}; allowed: as many of both. Match them.")


def _from_jsonl(path: Path, label: str) -> OpenedData:
    import pandas as pd

    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeError as error:
        raise checks.DataError(
            f"{path} is not in UTF-8 ({first_line(error)}); allowed: UTF-8 text. Save it again in UTF-8."
        ) from error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((str(row["text"]), row[label]))
        except (ValueError, KeyError, TypeError) as error:
            raise checks.DataError(
                f"line {number} of {path} cannot be used ({type(error).__name__}: {error}); allowed: one JSON object "
                f'a line with "text" and "{label}". Mend that line.'
            ) from error
    if not rows:
        raise checks.DataError(f"{path} has no rows; allowed: at least two. Add data.")
    return OpenedData(
        path.name, "text", pd.Series([r[1] for r in rows]), texts=[r[0] for r in rows], from_file=True
    )
