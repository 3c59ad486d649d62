"""Predictions from a table: class probabilities, or the numbers of a regression, with what is true."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from perturbkit.audit.opening import _labels, tables
from perturbkit.audit.subject import Subject, point_weights
from perturbkit.core import checks


def open_predictions(path: Path, label: str, group: str | None) -> Subject:
    """Read predictions and labels from a CSV or Parquet file.

    Raises
    ------
    DataError
        If a column is missing or holds something else than predictions.
    """
    frame = tables.read_table(path)
    labels = tables.column(frame, label, path, "--label")
    groups = tuple(str(v) for v in tables.column(frame, group, path, "--groups")) if group else ()
    table = frame.drop(columns=[label, *([group] if group else [])])
    for column in table.columns:
        if table[column].dtype.kind not in "iufb":
            raise checks.DataError(
                f"{path} has text in column {str(column)!r}; allowed: numbers in every column but the label"
                f"{'' if group else ' and the group'}. Drop the column, or name it with --groups."
            )
    if _labels.are_real(labels):
        return _numbers(path, table.to_numpy(dtype=float), labels, groups)
    try:
        p = checks.probabilities("the predictions", table.to_numpy(dtype=float))
    except checks.PerturbkitError as error:
        raise checks.DataError(f"{path}: {error}") from error
    names = tuple(str(c) for c in table.columns)
    # Labels that are names of columns mean those columns, also where the names are numbers.
    named = {str(v) for v in labels.dropna()} <= set(names)
    y, _ = _labels.class_labels(labels, path, names if named or labels.dtype.kind not in "iufb" else ())
    if int(y.max()) >= len(names):
        raise checks.DataError(
            f"{path} has the label {int(y.max())} but {len(names)} probability columns; allowed: labels "
            f"0..{len(names) - 1}. Give one column a class."
        )
    return Subject(
        name=path.name, data_name=path.name, task="predictions", y=y, classes=names,
        given_probabilities=p, groups=groups,
    )  # fmt: skip


def _numbers(path: Path, p: np.ndarray, labels: object, groups: tuple[str, ...]) -> Subject:
    if not 1 <= p.shape[1] <= 3 or not np.isfinite(p).all():
        raise checks.DataError(
            f"{path} has real labels and {p.shape[1]} columns of predictions; allowed: one finite number a row, or two or "
            "three quantiles from low to high. Drop the other columns, or name them with --groups."
        )
    return Subject(
        name=path.name, data_name=path.name, task="predictions", y=_labels.real_targets(labels, path), classes=(),
        given_probabilities=p, groups=groups, point=point_weights(torch.from_numpy(p)),
    )  # fmt: skip
