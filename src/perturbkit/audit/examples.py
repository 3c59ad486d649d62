"""One line a row audited: what the model said of it, and how far it could be pushed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from perturbkit.audit.finding import Finding, Table
from perturbkit.audit.subject import Subject

__all__ = ["row_examples"]

_TEXT = 200


def row_examples(subject: Subject, findings: Sequence[Finding]) -> Table | None:
    """Return a table of the rows audited: place in the data (from 0), label, answer, group, radii where they were measured.

    Where categories were swapped, how many had to be before the answer changed (``inf``: no number tried did), and which.

    ``None`` where the model answered nothing.
    """
    if subject.scores_known is None:
        return None
    numbers = list(range(subject.n)) if subject.numbers is None else subject.numbers.tolist()
    columns: dict[str, list[Any]] = {"row": numbers}
    answers = subject.predictions()
    if subject.regression:
        columns |= {"target": subject.y.tolist(), "answer": answers.tolist()}
        columns["error"] = (answers - subject.y).tolist()
    else:
        p, y = subject.probabilities(), subject.y.numpy()
        columns |= {
            "label": [subject.classes[i] for i in y],
            "answer": [subject.classes[i] if i >= 0 else "" for i in answers.tolist()],
            "right": [int(r) for r in answers.numpy() == y],
            "confidence": p.max(1).tolist(),
            "probability of the label": p[np.arange(len(y)), y].tolist(),
        }
    if subject.groups:
        columns["group"] = list(subject.groups)
    for finding in findings:
        rows = finding.series.get("rows")
        if rows is not None:
            values: list[Any] = [None] * subject.n
            for row, radius in zip(rows, finding.series["radius"], strict=True):
                values[row] = radius
            columns[f"{finding.section} radius"] = values
            if "swaps" in finding.series:
                for name, key in (("swaps", "swaps"), ("swapped", "swapped")):
                    values = [None] * subject.n
                    for row, value in zip(rows, finding.series[key], strict=True):
                        values[row] = value
                    columns[f"{finding.section} {name}"] = values
    if subject.texts:
        columns["text"] = [t[:_TEXT] for t in subject.texts]
    return Table(tuple(columns), tuple(zip(*columns.values(), strict=True)))
