"""Opening a model together with its data, as one subject."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from perturbkit.audit.opening import _labels, tables
from perturbkit.audit.opening._opened import OpenedData, OpenedModel, first_line, usable_device
from perturbkit.audit.opening.data import existing, open_data
from perturbkit.audit.opening.models import open_model
from perturbkit.audit.opening.predictions import open_predictions
from perturbkit.audit.subject import Subject, point_weights
from perturbkit.core import Oracle, checks, unwrap_output
from perturbkit.core.watch import DeadlineError

__all__ = ["open_subject"]


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
    model : str, nn.Module, estimator or callable
        ``module:function``, a ``.pt2``, ``.onnx`` or ``.skops`` file, a Hugging Face folder or ``hf:name``,
        ``predictions.csv`` (with ``data`` None), or an object in Python.
    data : str, Path or (x, y)
        A ``.csv``, ``.parquet``, ``.npz`` or ``.jsonl`` file, a folder of images with one folder a class, or arrays.
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
    MissingExtraError
        If a package that reads the file is not installed.
    """
    if isinstance(model, str | Path) and str(model).lower().endswith((".csv", ".parquet")):
        if data is not None:
            raise checks.DataError(
                f"{model} holds predictions, but data is given too ({data}); allowed: predictions alone. "
                "Put the labels into a column of the predictions and leave the data out."
            )
        return open_predictions(existing(Path(model)), label or "label", group)
    if data is None:
        raise checks.DataError(
            "no data is given; allowed: a file, a folder or (x, y). Name the data after the model."
        )
    if isinstance(data, str | Path):
        existing(Path(data))
    usable_device(device)
    opened = open_model(model, device)
    given = open_data(data, label=label, group=group, task=task, model=opened)
    if given.frame is not None:
        given = tables.numbers(given, opened)
    _fit(opened, given)
    oracle = _oracle(opened, given, memory, device)
    two = _first_scores(opened, given, oracle)
    if two.ndim == 1:
        oracle = _oracle(opened, given, memory, device, columns=True)
        two = two[:, None]
    subject = _subject(opened, given, oracle, two, bounds)
    _check_bounds(subject)
    subject.mark = _mark(model)
    return subject


def _mark(model: Any) -> str:
    """Return a hash of the file of a model."""
    if not isinstance(model, str | Path) or not Path(model).is_file():
        return ""
    with open(model, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fit(model: OpenedModel, data: OpenedData) -> None:
    """Suit the function to the data, and the data to the function."""
    if model.fit_inputs is not None and data.task != "text":
        model.fun, remarks = model.fit_inputs(data)
        model.remarks.extend(remarks)
    if data.task == "text" and data.x is None and model.text_model is None:
        raise checks.ModelError(
            f"the model {model.name} takes no texts, but {data.name} holds texts; allowed: a model of texts. Turn the texts "
            "into the numbers that it expects, or pass the model with its tokenizer."
        )
    if data.task != "text" and model.text_model is not None and model.text_model.tokenize is not None:
        raise checks.ModelError(
            f"the model {model.name} reads texts, but {data.name} holds {'images' if data.task == 'image' else 'a table'}; "
            "allowed: texts. Name the file with the texts, or their column with --task text."
        )
    if data.x is None:
        return
    module = model.fun.fun if isinstance(model.fun, Oracle) else model.fun
    wanted = model.dtype
    if wanted is None and isinstance(module, nn.Module):
        wanted = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
    if wanted is None and data.from_file:
        wanted = torch.float32
    if wanted is not None and data.x.dtype != wanted:
        if data.x.dtype == torch.float64 and not data.from_file:
            data.remarks.append(f"The inputs were converted from float64 to the model's {str(wanted)[6:]}.")
        data.x = data.x.to(wanted)


def _oracle(
    model: OpenedModel,
    data: OpenedData,
    memory: str | int | None,
    device: str | None,
    *,
    columns: bool = False,
) -> Oracle:
    if isinstance(model.fun, Oracle):
        inner = model.fun
        return Oracle(_Column(inner.fun), memory=inner.memory, device=inner.device) if columns else inner
    fun = model.fun
    if isinstance(fun, nn.Module) and device is not None:
        fun.to(torch.device(device))
    if columns:
        fun = _Column(fun) if isinstance(fun, nn.Module) else _as_column(fun)
    oracle = Oracle(fun, memory=memory, device=device)
    if data.x is not None and model.no_gradient:
        # PyTorch sees nothing of what such a model holds in memory, so a chunk goes by what is known of one row.
        one = model.row_bytes or 64 * data.x[0].numel() * data.x.element_size()
        oracle.chunk_size = int(max(1, min(8192, oracle.memory // max(1, one))))
    return oracle


class _Column(nn.Module):
    """A model that answers (n,) as one that answers (n, 1)."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        out = self.inner(x)
        # A proxy of a tensor, where the network is traced, is left as it is.
        return (out if isinstance(out, Tensor | fx.Proxy) else unwrap_output(out)).unsqueeze(1)


def _as_column(fun: Any) -> Any:
    return lambda x: unwrap_output(fun(x)).unsqueeze(1)


def _first_scores(model: OpenedModel, data: OpenedData, oracle: Oracle) -> Tensor:
    """Ask the model about two rows, so that what cannot work is refused before anything is spent."""
    n = len(data.targets)
    if n < 2:
        raise checks.DataError(f"{data.name} has {n} row; allowed: at least two. Add data.")
    try:
        if data.task == "text":
            assert model.text_model is not None
            with oracle.frozen(), torch.no_grad():
                scores = torch.as_tensor(unwrap_output(model.text_model.predict(list(data.texts[:2]))))
            oracle.nfev += 2
        else:
            assert data.x is not None
            scores = oracle(data.x[:2])
    except (checks.ModelError, DeadlineError):
        raise
    except (Exception, SystemExit) as error:
        shape = "texts" if data.x is None else f"an input of shape {tuple(data.x[:2].shape)}"
        raise checks.ModelError(
            f"the model {model.name} raised {type(error).__name__} on {shape}: {first_line(error)}. Allowed: a "
            "batch in, one row of class scores an input out. Check that the data has the shape that the model expects."
        ) from error
    if scores.ndim > 2 or scores.ndim == 0:
        raise checks.ModelError(
            f"the model {model.name} answered shape {tuple(scores.shape)}; allowed: (n, classes) with at least two "
            "classes, or one number a row for a regression. Return one row of scores an input."
        )
    if not bool(torch.isfinite(scores).all()):
        raise checks.ModelError(
            f"the model {model.name} answered NaN or infinity; allowed: finite scores. Check its weights and the "
            "range of the inputs."
        )
    return scores


def _subject(
    model: OpenedModel, data: OpenedData, oracle: Oracle, two: Tensor, bounds: tuple[float, float] | None
) -> Subject:
    notes, point = list(model.notes), None
    classes: tuple[str, ...]
    if _is_regression(model, data, oracle, two):
        y, classes = _labels.real_targets(data.targets, data.name), ()
        point = point_weights(two)
        if two.shape[1] > 1:
            data.remarks.append(
                f"The model answers {two.shape[1]} quantiles, from low to high; its "
                + (
                    "middle one is taken for its answer."
                    if two.shape[1] == 3
                    else "mean is taken for its answer."
                )
            )
    else:
        y, classes = _classes(model, data, two.shape[1], notes)
    held = torch.zeros(0, dtype=torch.bool)
    if data.categories and data.x is not None:
        held = torch.zeros(data.x.shape[1], dtype=torch.bool)
        held[list(data.categories)] = True
    return Subject(
        name=model.name, data_name=data.name, task=data.task, y=y, classes=classes, oracle=oracle, x=data.x,
        texts=list(data.texts),
        bounds=bounds if bounds is not None else ((0.0, 1.0) if data.task == "image" else None),
        feature_names=data.feature_names, groups=data.groups,
        text_model=model.text_model if data.task == "text" and not isinstance(model.fun, Oracle) else None,
        notes=notes, remarks=(*model.remarks, *data.remarks), point=point, no_gradient=model.no_gradient,
        operations=model.operations, held=held,
    )  # fmt: skip


def _is_regression(model: OpenedModel, data: OpenedData, oracle: Oracle, two: Tensor) -> bool:
    """Whether numbers are asked for and answered; refuse what is neither a regression nor a classification."""
    outputs, targets = two.shape[1], data.targets
    real = _labels.are_real(targets)
    binary = targets.dtype.kind in "iufb" and set(targets.dropna().unique()) <= {0, 1}
    if model.regression is False or (outputs > 1 and not real and not model.regression):
        return False
    if outputs == 1 and binary and model.regression is None:
        raise checks.ModelError(
            f"the model {model.name} answered shape {tuple(two.shape)} and the labels are 0 and 1; allowed: (n, classes) "
            "with at least two classes. For a binary model return [1 - p, p]."
        )
    if outputs == 1 and targets.dtype.kind not in "iufb":
        raise checks.ModelError(
            f"the model {model.name} answered one number a row and the labels are names; allowed: (n, classes) with at "
            "least two classes. For a binary model return [1 - p, p]."
        )
    if data.task != "tabular":
        raise checks.ModelError(
            f"the model {model.name} answered one number a row on {'texts' if data.task == 'text' else 'images'}; allowed: "
            "regressions on tables, and classes elsewhere with at least two classes. Pass a table, or a classifier."
        )
    if outputs > 3 or (outputs > 1 and not _rising(data, oracle)):
        raise checks.ModelError(
            f"the model {model.name} answered {outputs} numbers a row and the targets are not whole; allowed: one number, or "
            "two or three quantiles from low to high. Name the column of the class with --label if this is a classifier."
        )
    return True


def _rising(data: OpenedData, oracle: Oracle) -> bool:
    """Whether the outputs rise from left to right, as quantiles do, on all but a few of the first rows."""
    assert data.x is not None
    return float((oracle(data.x[:100]).diff(dim=1) >= 0).all(1).double().mean()) >= 0.9


def _classes(
    model: OpenedModel, data: OpenedData, n_classes: int, notes: list[str]
) -> tuple[Tensor, tuple[str, ...]]:
    """Return labels in the order of the outputs, with the names of the outputs."""
    if n_classes < 2:
        raise checks.ModelError(
            f"the model {model.name} answered shape (n, {n_classes}); allowed: (n, classes) with at least two classes. For "
            "a binary model return [1 - p, p]."
        )
    known = model.classes if len(model.classes) == n_classes else ()
    if known and model.regression is False:  # an estimator: its labels are what it was fitted with
        values = data.targets
        if values.dtype.kind == "f" and not _labels.are_real(values) and not bool(values.isna().any()):
            values = values.astype("int64")
        # Truth values and the numbers 0 and 1 stand for each other.
        if values.dtype.kind == "b" and set(known) == {"0", "1"}:
            values = values.astype("int64")
        elif known == ("False", "True") and values.dtype.kind in "iu" and set(values.unique()) <= {0, 1}:
            values = values.astype(bool)
        return _labels.class_labels(
            values.map(str) if not bool(values.isna().any()) else values,
            data.name, known, hint="Use the labels that the model was fitted with, or another column with --label.",
        )  # fmt: skip
    folded = {name.casefold() for name in known}
    if data.classes and not {c.casefold() for c in data.classes} <= folded:
        y, classes = _labels.class_labels(data.targets, data.name, data.classes)
    else:
        y, classes = _labels.class_labels(data.targets, data.name, known=known)
    top = int(y.max())
    if top >= n_classes:
        raise checks.DataError(
            f"{data.name} has the label {top} but the model has {n_classes} outputs; allowed: labels "
            f"0..{n_classes - 1}. Number the classes in the order of the outputs."
        )
    if known and classes != known:
        notes.append(
            f"The labels of the data ({', '.join(classes[:4])}) are not the names of the model's outputs "
            f"({', '.join(known[:4])}); they are taken for the outputs in this order. Check that they are."
        )
    if len(classes) != n_classes:
        if len(classes) > n_classes or not all(c.isdigit() for c in classes):
            notes.append(
                f"The data names {len(classes)} classes and the model has {n_classes} outputs; the first "
                "outputs are taken to be the named ones."
            )
        first = classes[:n_classes]
        classes = (*first, *(str(i) for i in range(len(first), n_classes)))
    return y, classes


def _check_bounds(subject: Subject) -> None:
    if subject.bounds is not None and subject.x is not None:
        there = subject.x[~torch.isnan(subject.x)]
        low, high = (float(there.min()), float(there.max())) if len(there) else subject.bounds
        if low < subject.bounds[0] or high > subject.bounds[1]:
            raise checks.DataError(
                f"{subject.data_name} has values from {low:.4g} to {high:.4g}; allowed: the range "
                f"[{subject.bounds[0]:g}, {subject.bounds[1]:g}]. Scale the inputs (images to [0, 1], with the "
                "normalisation inside the model), or state the range with --bounds LOW,HIGH."
            )
