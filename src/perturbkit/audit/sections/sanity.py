"""Is the set-up right? Accuracy, evaluation mode, determinism, input range, live gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from perturbkit.audit._figures import bars
from perturbkit.audit._intervals import bootstrap, share_interval
from perturbkit.audit._numbers import answers_against_targets, mean_absolute, r_squared, root_mean_square
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
    if subject.regression:
        return _numbers(context)
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
    """Accuracy by class; of a regression, answers against targets."""
    series = finding.series
    if "targets" in series:
        return answers_against_targets(series["targets"], series["answers"])
    return bars(series["classes"], series["accuracy"], "accuracy", top=1.0)


def _numbers(context: Context) -> Finding:
    """Check the same of a regression: its error against that of always answering the mean."""
    subject = context.subject
    y, answers = subject.y.double().numpy(), subject.predictions().numpy()
    broken = np.isnan(answers)
    # Where the model answers nothing, the mean stands for it.
    answers = np.where(broken, y.mean(), answers)
    pairs = np.stack([y, answers], 1)
    metrics = []
    for name, statistic, method, control in (
        ("r2", r_squared, "share of the variance explained", 0.0),
        ("rmse", root_mean_square, "root mean squared error", float(y.std())),
        ("mae", mean_absolute, "mean absolute error", float(np.abs(y - np.median(y)).mean())),
    ):
        low, high = bootstrap(pairs, context.generator(name), statistic)
        metrics.append(Metric(name, float(statistic(pairs)), low, high, subject.n, method, control))
    r2, rmse, _ = metrics
    worse = r2.low is None or r2.low <= 0
    rows = [
        ("error", f"root mean squared {rmse.text}, R2 {r2.text}", "passed"),
        ("better than the mean of the targets", f"{y.std():.4g} by always answering it", _mark(not worse)),
    ]
    if broken.any():
        found = f"NaN on {int(broken.sum())} of {subject.n} rows, taken for the mean"
        rows.append(("an answer to every row", found, "look"))
    if subject.task != "predictions":
        rows.extend(_model_rows(context))
    rows.extend(("on opening", note, "look") for note in subject.notes)
    rows.extend(("of the data", remark, "noted") for remark in subject.remarks)
    weak = any(mark == "look" for _, _, mark in rows)
    shown = torch.randperm(subject.n, generator=context.generator("shown"))[:500].numpy()
    return Finding(
        "sanity", "weak" if weak else "ok",
        f"The model is off by {rmse.value:.3g} (root mean squared), against {y.std():.3g} by always answering the mean; it "
        f"explains {r2.value:.0%} of the variance"
        + (", and something in the set-up needs a look." if weak else " and the set-up is sound."),
        tuple(metrics), Table(("check", "found", "verdict"), tuple(rows)),
        {"targets": y[shown].tolist(), "answers": answers[shown].tolist()},
        "Whether the rows stand for the data the model will meet. The error on rows that the model was trained on says "
        "nothing.",
    )  # fmt: skip


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
            "yes"
            if subject.has_gradient()
            else f"no: {subject.no_gradient or 'gradient methods are left out'}",
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
