"""Is the set-up right? Accuracy, evaluation mode, determinism, input range, live gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from perturbkit.audit._figures import bars
from perturbkit.audit._intervals import share_interval
from perturbkit.audit.context import Context
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.0
NEEDS_MODEL = ""


def evaluations(subject: Subject, request: AuditRequest) -> int:
    """Rows evaluated for one row of data."""
    return 2


def run(context: Context) -> Finding:
    """Check what must hold before any other number means anything."""
    subject = context.subject
    right = subject.predictions() == subject.y
    k, n = int(right.sum()), subject.n
    low, high = share_interval(right)
    counts = torch.bincount(subject.y, minlength=len(subject.classes))
    majority = float(counts.max()) / n
    rows: list[tuple[str, str, str]] = [("accuracy", f"{k} of {n} rows right", "passed")]
    worse = low <= majority and k / n < 0.999 and (counts > 0).sum() > 1
    rows.append(
        ("better than the commonest class", f"{majority:.2f} by always answering it", _mark(not worse))
    )
    broken = int(torch.isnan(subject.scores()).any(1).sum())
    if broken:
        rows.append(("an answer to every row", f"NaN on {broken} of {n} rows, counted as wrong", "look"))
    if subject.task != "predictions":
        rows.extend(_model_rows(context))
    rows.extend(("on opening", note, "look") for note in subject.notes)
    rows.extend(("of the data", remark, "noted") for remark in subject.remarks)
    weak = any(mark == "look" for _, _, mark in rows)
    accuracy = Metric("accuracy", k / n, low, high, n, "share of right answers", majority)
    several = (counts > 0).nonzero()[:, 0].tolist()[:20]
    by_class = [
        (subject.classes[c], float(right[subject.y == c].double().mean()), int(counts[c])) for c in several
    ]
    return Finding(
        "sanity",
        "weak" if weak else "ok",
        f"The model answers {k} of {n} rows rightly"
        + (", and something in the set-up needs a look." if weak else " and the set-up is sound."),
        (accuracy,),
        Table(("check", "found", "verdict"), tuple(rows)),
        {"classes": [c for c, _, _ in by_class], "accuracy": [a for _, a, _ in by_class]},
        "Whether the rows stand for the data the model will meet. Accuracy on rows that the model was trained on "
        "says nothing.",
    )


def draw(finding: Finding) -> Figure:
    """Accuracy by class."""
    series = finding.series
    return bars(series["classes"], series["accuracy"], "accuracy", top=1.0)


def _model_rows(context: Context) -> list[tuple[str, str, str]]:
    subject = context.subject
    few = subject.take(torch.arange(min(4, subject.n)))
    first, again = few.scores(), few.take(torch.arange(few.n)).scores()
    gap = float((first - again).abs().max())
    alone = few.take(torch.arange(1)).scores()
    batch_gap = float((first[:1] - alone).abs().max())
    size = float(first.abs().max()) or 1.0
    rows = [
        ("same answer twice", f"largest difference {gap:.2g}", _mark(gap <= 1e-5 * size)),
        (
            "same answer alone and in a batch",
            f"largest difference {batch_gap:.2g}",
            _mark(batch_gap <= 1e-3 * size),
        ),
        (
            "gradient reaches the input",
            "yes" if subject.has_gradient() else "no: gradient methods are left out",
            "passed",
        ),
    ]
    if subject.x is not None:
        low, high = float(subject.x.min()), float(subject.x.max())
        allowed = (
            "no range stated"
            if subject.bounds is None
            else f"allowed {subject.bounds[0]:g} to {subject.bounds[1]:g}"
        )
        rows.append(("input range", f"{low:.4g} to {high:.4g}, {allowed}", "passed"))
    return rows


def _mark(passed: bool) -> str:
    return "passed" if passed else "look"
