"""Opening a model and data from what a user names on the command line.

Files are untrusted: nothing is unpickled, arrays are read without objects, and an image folder is read without
following links out of it. Only ``module:function`` runs code, the user's own.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perturbkit.audit.subject import Subject, TextModel
from perturbkit.core import Oracle, checks

__all__ = ["open_data", "open_model", "open_subject"]

_PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin", ".joblib", ".npy.pkl"}
_MOST_CLASSES = 1_000_000
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def open_subject(
    model: Any,
    data: Any,
    *,
    task: str | None = None,
    label: str | None = None,
    group: str | None = None,
    bounds: tuple[float, float] | None = None,
    device: str | None = None,
    memory: str | int | None = None,
) -> Subject:
    """Open a model and data.

    Parameters
    ----------
    model : str, nn.Module or callable
        ``module:function``, a ``.pt2`` file, ``predictions.csv`` (with ``data`` None), or an object in Python.
    data : str, Path or (x, y)
        A ``.csv``, ``.npz`` or ``.jsonl`` file, a folder of images with one folder a class, or arrays.
    task, label, group, bounds, device, memory
        As in :class:`~perturbkit.audit.request.AuditRequest`; ``label`` and ``group`` name columns.

    Returns
    -------
    Subject

    Raises
    ------
    ModelError
        If the model cannot be opened.
    DataError
        If the data cannot be used.
    """
    if isinstance(model, str | Path) and str(model).lower().endswith(".csv"):
        if data is not None:
            raise checks.DataError(
                f"{model} holds predictions, but data is given too ({data}); allowed: predictions alone. "
                "Put the labels into a column of the predictions and leave the data out."
            )
        return _open_predictions(_existing(Path(model)), label or "label", group)
    if data is None:
        raise checks.DataError(
            "no data is given; allowed: a file, a folder or (x, y). Name the data after the model."
        )
    opened = open_data(data, label=label, group=group, task=task)
    fun, name, notes = open_model(model)
    oracle = fun if isinstance(fun, Oracle) else Oracle(fun, memory=memory, device=device)
    if device is not None and isinstance(fun, nn.Module):
        fun.to(torch.device(device))
    kind = opened["task"]
    classes = opened["classes"]
    subject = Subject(
        name=name, data_name=opened["name"], task=kind, y=opened["y"], classes=classes, oracle=oracle,
        x=opened.get("x"), texts=opened.get("texts", []),
        bounds=bounds if bounds is not None else ((0.0, 1.0) if kind == "image" else None),
        feature_names=opened.get("feature_names", ()), groups=opened.get("groups", ()),
        text_model=TextModel(fun) if kind == "text" and not isinstance(fun, Oracle) else None,
        notes=[*notes, *opened["notes"]],
    )  # fmt: skip
    _match_dtype(subject, fun)
    _preflight(subject)
    return subject


# -- models ---------------------------------------------------------------------------------------------------


def open_model(model: Any) -> tuple[Any, str, list[str]]:
    """Return a callable, its name, and what was odd about it.

    Raises
    ------
    ModelError
        If it cannot be opened, with what to do instead.
    """
    notes: list[str] = []
    if isinstance(model, str | Path):
        text = str(model)
        suffix = Path(text).suffix.lower()
        if suffix == ".pt2":
            return _open_exported(_existing(Path(text), checks.ModelError)), Path(text).name, notes
        if suffix in _PICKLES:
            raise checks.ModelError(
                f"the model is {text}, a pickle, which can run code when opened; allowed: module:function, a .pt2 "
                "file or predictions.csv. Export it with torch.export.save(torch.export.export(model, (x,)), 'm.pt2')."
            )
        module_name, colon, attribute = text.partition(":")
        if not colon or not module_name or not attribute:
            raise checks.ModelError(
                f"the model is {text!r}; allowed: module:function, a .pt2 file or predictions.csv. "
                "Write for instance my_package.models:load."
            )
        fun, name = _import_model(module_name, attribute), text
    else:
        fun, name = (
            model,
            type(model).__name__
            if isinstance(model, nn.Module)
            else getattr(model, "__name__", type(model).__name__),
        )
    if isinstance(fun, Oracle):
        return fun, name, notes
    if not callable(fun):
        raise checks.ModelError(
            f"the model {name} is a {type(fun).__name__}; allowed: an nn.Module or a function of a batch. "
            "Return the model itself."
        )
    if isinstance(fun, nn.Module) and fun.training:
        notes.append(
            "The model was handed over in training mode (dropout and batch statistics active); it was audited in "
            "evaluation mode. Call model.eval() before you deploy it."
        )
    return fun, name, notes


def _import_model(module_name: str, attribute: str) -> Any:
    """Import ``module:attribute`` with the working folder on the path; call it where it takes no argument."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.split(".")[0] and error.name != module_name:
            raise checks.ModelError(
                f"importing {module_name} failed: {error}. Install what it needs first."
            ) from error
        raise checks.ModelError(
            f"there is no module {module_name!r} in {Path.cwd()} or installed; allowed: a module that can be "
            "imported from here. Change into its folder or install it."
        ) from error
    except (Exception, SystemExit) as error:
        raise checks.ModelError(
            f"importing {module_name} failed: {type(error).__name__}: {error}. Make the import work on its own first."
        ) from error
    finally:
        sys.path.pop(0)
    target: Any = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            public = [n for n in dir(target) if not n.startswith("_")][:12]
            raise checks.ModelError(
                f"{module_name} has no {attribute!r}; allowed: one of its names, such as {', '.join(public)}. "
                "Check the spelling after the colon."
            )
        target = getattr(target, part)
    if isinstance(target, nn.Module) or not callable(target) or not _takes_nothing(target):
        return target
    try:
        return target()
    except (Exception, SystemExit) as error:
        raise checks.ModelError(
            f"{module_name}:{attribute} raised {type(error).__name__}: {error}. Make the call work on its own first."
        ) from error


def _takes_nothing(fun: Callable[..., Any]) -> bool:
    """Whether a callable makes a model (no required argument) rather than being one."""
    try:
        parameters = inspect.signature(fun).parameters.values()
    except (TypeError, ValueError):
        return False
    return all(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    ) and not any(p.kind == p.VAR_POSITIONAL for p in parameters)


class _Exported(nn.Module):
    """A torch.export program; rows are padded up to its batch size where that is fixed."""

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.program = program.module()
        names = set(program.graph_signature.user_inputs)
        shapes = [node.meta["val"].shape for node in program.graph.nodes if node.name in names]
        first = shapes[0][0] if shapes and len(shapes[0]) else None
        self.batch = first if isinstance(first, int) else None

    def forward(self, x: Tensor) -> Tensor:
        if self.batch is None:
            return self.program(x)
        parts = []
        for start in range(0, len(x), self.batch):
            rows = x[start : start + self.batch]
            short = self.batch - len(rows)
            padded = rows if short == 0 else torch.cat([rows, rows[-1:].expand(short, *rows.shape[1:])])
            parts.append(self.program(padded)[: len(rows)])
        return torch.cat(parts)


def _open_exported(path: Path) -> nn.Module:
    try:
        return _Exported(torch.export.load(path))
    except Exception as error:
        raise checks.ModelError(
            f"{path} could not be read as a torch.export program ({type(error).__name__}: {_first_line(error)}); "
            "allowed: a file written by torch.export.save. Export it again with this version of torch."
        ) from error


# -- data -----------------------------------------------------------------------------------------------------


def open_data(
    data: Any, *, label: str | None = None, group: str | None = None, task: str | None = None
) -> dict[str, Any]:
    """Return data as a dictionary of ``name, task, y, classes, notes`` and ``x`` or ``texts``.

    Raises
    ------
    DataError
        If the data is missing, empty, of an unknown kind, or has values that cannot be used.
    """
    if isinstance(data, tuple | list) and len(data) == 2:
        return _from_arrays(data[0], data[1], "arrays", task)
    if not isinstance(data, str | Path):
        raise checks.DataError(
            f"the data is a {type(data).__name__}; allowed: a path or a pair (x, y). Pass (inputs, labels)."
        )
    path = _existing(Path(data))
    suffix = path.suffix.lower()
    if (group and suffix != ".csv") or (label and suffix not in (".csv", ".jsonl")):
        flag, name = ("--groups", group) if group and suffix != ".csv" else ("--label", label)
        raise checks.DataError(
            f"{flag} names the column {name!r}, but {path} has no columns; allowed: {flag} with a .csv. Leave it out."
        )
    if path.is_dir():
        return _from_folder(path)
    if suffix == ".csv":
        return _from_csv(path, label, group, task)
    if suffix == ".npz":
        return _from_npz(path, task)
    if suffix == ".jsonl":
        return _from_jsonl(path, label or "label")
    if suffix in _PICKLES:
        raise checks.DataError(
            f"the data is {path}, a pickle, which can run code when opened; allowed: .csv, .npz, .jsonl or a folder "
            "of images. Save arrays with numpy.savez(path, x=x, y=y)."
        )
    raise checks.DataError(
        f"the data is {path}, of kind {suffix or 'none'!r}; allowed: .csv, .npz, .jsonl or a folder of images. "
        "Convert it to one of these."
    )


def _existing(path: Path, error: type[checks.PerturbkitError] = checks.DataError) -> Path:
    if not path.exists():
        raise error(
            f"there is no {path}; allowed: an existing file. Check the path (working folder: {Path.cwd()})."
        )
    if path.is_file() and path.stat().st_size == 0:
        raise error(f"{path} is empty; allowed: a file with content. Write it again.")
    return path


def _read_csv(path: Path) -> Any:
    import pandas as pd

    try:
        # "None" is a fair name of a class; what is missing is empty or says so in the usual ways.
        missing = ["", "NaN", "nan", "NA", "N/A", "null", "NULL"]
        frame = pd.read_csv(path, keep_default_na=False, na_values=missing)
    except Exception as error:
        raise checks.DataError(
            f"{path} could not be read as CSV ({_first_line(error)}); allowed: a comma-separated table with a header "
            "line. Open it and check the first lines."
        ) from error
    if frame.empty:
        raise checks.DataError(f"{path} has a header but no rows; allowed: at least two rows. Add data.")
    return frame


def _column(frame: Any, name: str, path: Path, flag: str) -> Any:
    if name not in frame.columns:
        raise checks.DataError(
            f"{path} has no column {name!r}; allowed: one of {', '.join(map(str, frame.columns[:20]))}. "
            f"Name it with {flag}."
        )
    return frame[name]


def _encode_labels(values: Any, path: Path, classes: tuple[str, ...] = ()) -> tuple[Tensor, tuple[str, ...]]:
    """Return labels as 0..K-1 and the names of the classes."""
    missing = int(values.isna().sum())
    if missing:
        raise checks.DataError(
            f"{path} has {missing} rows without a label; allowed: none. Remove or label them."
        )
    kind = values.dtype.kind
    if kind == "f":
        if not bool((values == values.round()).all()) or not bool(np.isfinite(values).all()):
            raise checks.DataError(
                f"{path} has labels that are not whole numbers; allowed: class numbers or names. Audits of "
                "regressions are not supported; name the column of the class with --label."
            )
        values, kind = values.astype("int64"), "i"
    if kind in "iub" and not classes:
        y = torch.as_tensor(values.astype("int64").to_numpy().copy())
        if int(y.min()) < 0 or int(y.max()) >= _MOST_CLASSES:
            wrong = int(y.min()) if int(y.min()) < 0 else int(y.max())
            raise checks.DataError(
                f"{path} has the label {wrong}; allowed: 0 to {_MOST_CLASSES - 1}. Number classes from 0; name the column "
                "of the class with --label if another was read."
            )
        return y, tuple(str(i) for i in range(int(y.max()) + 1))
    names = classes or tuple(
        sorted(map(str, values.unique()), key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0, n))
    )
    place = {name: i for i, name in enumerate(names)}
    unknown = sorted({str(v) for v in values} - set(place))
    if unknown:
        raise checks.DataError(
            f"{path} has the label {unknown[0]!r}; allowed: {', '.join(names[:20])}. Use the names of the columns."
        )
    return torch.tensor([place[str(v)] for v in values]), names


def _from_csv(path: Path, label: str | None, group: str | None, task: str | None) -> dict[str, Any]:
    frame = _read_csv(path)
    column = label or next((c for c in ("label", "y", "target", "class") if c in frame.columns), "label")
    y, classes = _encode_labels(_column(frame, column, path, "--label"), path)
    groups = tuple(str(v) for v in _column(frame, group, path, "--groups")) if group else ()
    rest = frame.drop(columns=[column, *([group] if group else [])])
    texts = [c for c in rest.columns if rest[c].dtype.kind not in "iufb"]
    if task == "text" or (task is None and len(texts) == 1 and len(rest.columns) <= 2):
        name = "text" if "text" in rest.columns else (texts[0] if texts else rest.columns[0])
        return {
            "name": path.name, "task": "text", "texts": [str(t) for t in rest[name]], "y": y,
            "classes": classes, "groups": groups, "notes": [],
        }  # fmt: skip
    if texts:
        raise checks.DataError(
            f"{path} has text in column {texts[0]!r}; allowed: numbers in every column but the label. Encode it as "
            "the model expects, or drop it."
        )
    table = torch.as_tensor(rest.to_numpy(dtype=np.float32, copy=True))
    _finite(table, path, [str(c) for c in rest.columns])
    return {
        "name": path.name, "task": task or "tabular", "x": table, "y": y, "classes": classes,
        "feature_names": tuple(map(str, rest.columns)), "groups": groups, "notes": [],
    }  # fmt: skip


def _from_npz(path: Path, task: str | None) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:
        raise checks.DataError(
            f"{path} could not be read ({_first_line(error)}); allowed: plain arrays x and y, no objects. Save it with "
            "numpy.savez(path, x=x, y=y)."
        ) from error
    missing = [k for k in ("x", "y") if k not in arrays]
    if missing:
        raise checks.DataError(
            f"{path} has the arrays {', '.join(arrays) or 'none'}; allowed: x (inputs) and y (labels). Save it with "
            "numpy.savez(path, x=x, y=y)."
        )
    return _from_arrays(arrays["x"], arrays["y"], path.name, task)


def _from_arrays(x: Any, y: Any, name: str, task: str | None) -> dict[str, Any]:
    import pandas as pd

    labels, classes = _encode_labels(pd.Series(np.asarray(y).reshape(-1)), Path(name))
    if task == "text" or (isinstance(x, list | tuple) and x and isinstance(x[0], str)):
        texts = [str(t) for t in x]
        if len(texts) != len(labels):
            raise checks.DataError(
                f"there are {len(texts)} texts and {len(labels)} labels; allowed: as many of both. Match them."
            )
        return {"name": name, "task": "text", "texts": texts, "y": labels, "classes": classes, "notes": []}
    values = torch.as_tensor(x)
    values = values if values.is_floating_point() else values.float()
    if values.ndim not in (2, 4):
        raise checks.DataError(
            f"x has shape {tuple(values.shape)}; allowed: (n, features) for tables or (n, channels, height, width) "
            "for images. Reshape it."
        )
    if len(values) != len(labels):
        raise checks.DataError(
            f"x has {len(values)} rows and y {len(labels)}; allowed: as many of both. Match them."
        )
    _finite(values, name, None)
    kind = task or ("image" if values.ndim == 4 else "tabular")
    names = tuple(f"feature {i}" for i in range(values.shape[1])) if kind == "tabular" else ()
    return {
        "name": name, "task": kind, "x": values, "y": labels, "classes": classes, "feature_names": names, "notes": []
    }  # fmt: skip


def _from_jsonl(path: Path, label: str) -> dict[str, Any]:
    import pandas as pd

    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
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
    y, classes = _encode_labels(pd.Series([r[1] for r in rows]), path)
    return {
        "name": path.name,
        "task": "text",
        "texts": [r[0] for r in rows],
        "y": y,
        "classes": classes,
        "notes": [],
    }


def _from_folder(path: Path) -> dict[str, Any]:
    """Read images from one folder a class; links that leave the folder are refused."""
    from PIL import Image

    root = path.resolve()
    folders = sorted(p for p in path.iterdir() if p.is_dir())
    files = [
        (i, f) for i, d in enumerate(folders) for f in sorted(d.iterdir()) if f.suffix.lower() in _IMAGES
    ]
    if not files:
        raise checks.DataError(
            f"{path} holds no images in class folders; allowed: {path}/CLASS/IMAGE.png (or jpg). Sort the images "
            "into one folder a class."
        )
    pictures = []
    for _, file in files:
        if not file.resolve().is_relative_to(root):
            raise checks.DataError(
                f"{file} is a link out of {path}; allowed: files inside it. Copy the image there."
            )
        try:
            with Image.open(file) as image:
                pictures.append(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)
        except Exception as error:
            raise checks.DataError(
                f"{file} could not be read as an image ({_first_line(error)}); allowed: PNG, JPEG, BMP or WebP. "
                "Remove or mend it."
            ) from error
    shapes = {p.shape for p in pictures}
    if len(shapes) > 1:
        some = ", ".join(f"{s[1]}x{s[0]}" for s in sorted(shapes)[:3])
        raise checks.DataError(
            f"{path} holds images of {len(shapes)} sizes ({some}); allowed: one size, the model's. Resize them first."
        )
    return {
        "name": path.name, "task": "image", "x": torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(),
        "y": torch.tensor([i for i, _ in files]), "classes": tuple(d.name for d in folders), "notes": [],
    }  # fmt: skip


def _open_predictions(path: Path, label: str, group: str | None) -> Subject:
    """Read class probabilities and labels from a CSV file."""
    frame = _read_csv(path)
    labels = _column(frame, label, path, "--label")
    groups = tuple(str(v) for v in _column(frame, group, path, "--groups")) if group else ()
    table = frame.drop(columns=[label, *([group] if group else [])])
    for column in table.columns:
        if table[column].dtype.kind not in "iufb":
            raise checks.DataError(
                f"{path} has text in column {str(column)!r}; allowed: probabilities in every column but the label"
                f"{'' if group else ' and the group'}. Drop the column, or name it with --groups."
            )
    try:
        p = checks.probabilities("the predictions", table.to_numpy(dtype=float))
    except checks.PerturbkitError as error:
        raise checks.DataError(f"{path}: {error}") from error
    names = tuple(str(c) for c in table.columns)
    # Labels that are names of columns mean those columns, also where the names are numbers.
    named = {str(v) for v in labels.dropna()} <= set(names)
    y, _ = _encode_labels(labels, path, names if named or labels.dtype.kind not in "iufb" else ())
    if int(y.max()) >= len(names):
        raise checks.DataError(
            f"{path} has the label {int(y.max())} but {len(names)} probability columns; allowed: labels "
            f"0..{len(names) - 1}. Give one column a class."
        )
    return Subject(
        name=path.name, data_name=path.name, task="predictions", y=y, classes=names,
        given_probabilities=p, groups=groups,
    )  # fmt: skip


# -- preflight ------------------------------------------------------------------------------------------------


def _preflight(subject: Subject) -> None:
    """Ask the model about two rows, so that what cannot work is refused before anything is spent."""
    if subject.n < 2:
        raise checks.DataError(f"{subject.data_name} has {subject.n} row; allowed: at least two. Add data.")
    two = subject.take(torch.arange(2))
    try:
        scores = two.scores()
    except checks.ModelError:
        raise
    except (Exception, SystemExit) as error:
        shape = "texts" if subject.task == "text" else f"an input of shape {tuple(two.x.shape)}"  # type: ignore[union-attr]
        raise checks.ModelError(
            f"the model {subject.name} raised {type(error).__name__} on {shape}: {_first_line(error)}. Allowed: a "
            "batch in, one row of class scores an input out. Check that the data has the shape that the model expects."
        ) from error
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise checks.ModelError(
            f"the model {subject.name} answered shape {tuple(scores.shape)}; allowed: (n, classes) with at least two "
            "classes. For a binary model return [1 - p, p]."
        )
    if not bool(torch.isfinite(scores).all()):
        raise checks.ModelError(
            f"the model {subject.name} answered NaN or infinity; allowed: finite scores. Check its weights and the "
            "range of the inputs."
        )
    n_classes, top = scores.shape[1], int(subject.y.max())
    if top >= n_classes:
        raise checks.DataError(
            f"{subject.data_name} has the label {top} but the model has {n_classes} outputs; allowed: labels "
            f"0..{n_classes - 1}. Number the classes in the order of the outputs."
        )
    if len(subject.classes) != n_classes:
        if len(subject.classes) > n_classes or not all(c.isdigit() for c in subject.classes):
            subject.notes.append(
                f"The data names {len(subject.classes)} classes and the model has {n_classes} outputs; the first "
                "outputs are taken to be the named ones."
            )
        known = subject.classes[:n_classes]
        subject.classes = (*known, *(str(i) for i in range(len(known), n_classes)))
    if subject.bounds is not None and subject.x is not None:
        low, high = float(subject.x.min()), float(subject.x.max())
        if low < subject.bounds[0] or high > subject.bounds[1]:
            raise checks.DataError(
                f"{subject.data_name} has values from {low:.4g} to {high:.4g}; allowed: the range "
                f"[{subject.bounds[0]:g}, {subject.bounds[1]:g}]. Scale the inputs (images to [0, 1], with the "
                "normalisation inside the model), or state the range with --bounds LOW,HIGH."
            )


def _match_dtype(subject: Subject, fun: Any) -> None:
    """Give the inputs the precision of the model's parameters, and say so where that lowers theirs."""
    module = fun.fun if isinstance(fun, Oracle) else fun
    if subject.x is None or not isinstance(module, nn.Module):
        return
    wanted = next((p.dtype for p in module.parameters() if p.is_floating_point()), subject.x.dtype)
    if subject.x.dtype != wanted:
        if subject.x.dtype == torch.float64:
            subject.remarks = (
                *subject.remarks,
                f"The inputs were converted from float64 to the model's {str(wanted)[6:]}.",
            )
        subject.x = subject.x.to(wanted)


def _finite(values: Tensor, where: Any, columns: list[str] | None) -> None:
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        place = ""
        if columns is not None:
            place = f", the first in column {columns[int(bad.any(0).nonzero()[0, 0])]!r}"
        raise checks.DataError(
            f"{where} holds {int(bad.sum())} NaN, missing or infinite values{place}; allowed: finite numbers. "
            "Remove or impute them as you do before the model."
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
