"""The rows that fail first: wrong with conviction, pushed over by the smallest change, right by the smallest margin."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from perturbkit.audit import _figures
from perturbkit.audit._intervals import bootstrap, share_interval
from perturbkit.audit.context import Context
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.0
NEEDS_MODEL = ""
AFTER = ("attack",)
SHOWN = 12
SURE = 0.9
# More rows than this share, wrong although the model is sure, call for attention.
TOLERATED = 0.02
# A tenth of the rows makes 0.44 of the squared error where errors are normal, and 0.6 where they fall off exponentially.
_FEW = 0.7
_TEXT, _COLUMNS = 140, 3


def evaluations(subject: Subject, request: AuditRequest) -> int:
    """Rows evaluated for one row of data: none, the scores are known."""
    return 0


def run(context: Context) -> Finding:
    """Order the rows by how badly they are answered and by how little they bear."""
    return _numbers(context) if context.subject.regression else _classes(context)


def draw(finding: Finding) -> Figure:
    """Thumbnails of the weakest pictures; elsewhere the loss of every row, the weakest marked."""
    s = finding.series
    if s.get("pictures"):
        return _figures.thumbnails(s["pictures"], s["titles"])
    return _figures.losses(s["loss"], s["shown"], s["label"])


def _classes(context: Context) -> Finding:
    subject = context.subject
    p, y = subject.probabilities(), subject.y.numpy()
    p = np.nan_to_num(p, nan=0.0)
    own = p[np.arange(len(y)), y]
    others = p.copy()
    others[np.arange(len(y)), y] = -1.0
    margin, loss = own - others.max(1), -np.log(np.maximum(own, 1e-38))
    answer = subject.predictions().numpy()
    wrong = answer != y
    radius = _radii(context)
    # Wrong rows first, the surest at the head; then right rows by radius where it is known, by margin where not.
    order = np.lexsort((margin, np.where(np.isnan(radius), np.inf, radius), ~wrong))
    wrong_first = order[: min(int(wrong.sum()), SHOWN // 2)]
    right = order[~wrong[order]]
    shown = np.concatenate([wrong_first, right[: SHOWN - len(wrong_first)]])
    sure = wrong & (p.max(1) >= SURE)
    low, high = share_interval(sure)
    worst = np.sort(loss)[::-1][: max(1, math.ceil(len(loss) / 10))]
    a, b = bootstrap(loss, context.generator("loss"))
    metrics = [
        Metric("wrong.sure", float(sure.mean()), low, high, len(y), f"wrong with a confidence of {SURE:g} or more"),
        Metric("loss.mean", float(loss.mean()), a, b, len(y), "negative log-likelihood, nats"),
        Metric("loss.worst_tenth", float(worst.sum() / max(loss.sum(), 1e-300)), None, None, len(y), "their share of all loss"),
    ]  # fmt: skip
    known = np.isfinite(radius) & ~wrong
    if known.any():
        metrics.append(
            Metric("radius.least", float(radius[known].min()), None, None, int(known.sum()), "of the rows answered rightly")
        )  # fmt: skip
    columns = ("row", *_columns(subject), "label", "answer", "probability of the label", "margin", "radius")
    table = tuple(
        (int(subject.numbers[i]), *_inputs(context, i), subject.classes[y[i]],
         subject.classes[answer[i]] if answer[i] >= 0 else "none",
         float(own[i]), float(margin[i]), _radius(radius[i], bool(wrong[i])))
        for i in shown.tolist()
    )  # fmt: skip
    series: dict[str, Any] = {"loss": loss.tolist(), "shown": shown.tolist(), "label": "loss, nats"}
    if subject.task == "image" and subject.x is not None:
        series["pictures"] = [_figures.encode_picture(subject.x[i]) for i in shown.tolist()]
        series["titles"] = [
            f"row {int(subject.numbers[i])}\n{subject.classes[y[i]]}\n"
            + _fault(subject, i, answer, wrong, radius)
            for i in shown.tolist()
        ]
    weak = bool(sure.any()) and float(sure.mean()) > TOLERATED
    frail = right[0] if len(right) else None
    told = (
        f"{int(wrong.sum())} of {len(y)} rows are answered wrongly, {int(sure.sum())} of them with a confidence of {SURE:g} or more"
        + (f"; the surest mistake is row {int(subject.numbers[shown[0]])}" if wrong.any() else "")
        + (
            f"; of the rows answered rightly, row {int(subject.numbers[frail])} fails first"
            if frail is not None and math.isfinite(radius[frail])
            else ""
        )
        + "."
    )
    return Finding(
        "weakest", "weak" if weak else "ok", told, tuple(metrics), Table(columns, table), series,
        "Why these rows: a mistake may be the model's or the label's, so look at them. Radii are known only of the rows that "
        "the section on attacks drew, and are upper bounds.",
    )  # fmt: skip


def _numbers(context: Context) -> Finding:
    subject = context.subject
    y, answer = subject.y.double().numpy(), subject.predictions().double().numpy()
    error = np.abs(np.nan_to_num(answer, nan=float(y.mean())) - y)
    radius = _radii(context)
    by_error = np.argsort(-error)[: SHOWN // 2]
    by_radius = np.lexsort((-error, np.where(np.isnan(radius), np.inf, radius)))
    rest = [i for i in by_radius.tolist() if i not in set(by_error.tolist())][: SHOWN - len(by_error)]
    shown = np.array([*by_error.tolist(), *rest], dtype=int)
    a, b = bootstrap(error, context.generator("loss"))
    square = np.sort(error**2)[::-1]
    share = float(square[: max(1, math.ceil(len(y) / 10))].sum() / max(square.sum(), 1e-300))
    metrics = (
        Metric("error.mean", float(error.mean()), a, b, len(y), "mean absolute error"),
        Metric(
            "error.largest", float(error.max()), None, None, len(y), f"row {int(subject.numbers[shown[0]])}"
        ),
        Metric(
            "loss.worst_tenth", share, None, None, len(y), "share of a tenth of the rows in all squared error"
        ),
    )
    columns = ("row", *_columns(subject), "target", "answer", "error", "radius")
    table = tuple(
        (int(subject.numbers[i]), *_inputs(context, i), float(y[i]), float(answer[i]), float(answer[i] - y[i]),
         _radius(radius[i], False))
        for i in shown.tolist()
    )  # fmt: skip
    return Finding(
        "weakest", "weak" if share > _FEW else "ok",
        f"The largest error is {error.max():.3g}, on row {int(subject.numbers[shown[0]])}; a tenth of the rows makes {share:.0%} of the "
        "squared error.",
        metrics, Table(columns, table),
        {"loss": error.tolist(), "shown": shown.tolist(), "label": "absolute error"},
        "Why these rows: an error may be the model's or the target's, so look at them. Radii are known only of the rows that "
        "the section on attacks drew, and are upper bounds.",
    )  # fmt: skip


def _radii(context: Context) -> np.ndarray:
    """Return the attack radius of every row, NaN where it was not measured."""
    found = np.full(context.subject.n, np.nan)
    attack = context.findings.get("attack")
    if attack is not None and "rows" in attack.series:
        found[attack.series["rows"]] = attack.series["radius"]
    return found


def _radius(radius: float, wrong: bool) -> str | float:
    if wrong:
        return "wrong already"
    return "not attacked" if math.isnan(radius) else float(radius)


def _fault(subject: Subject, i: int, answer: np.ndarray, wrong: np.ndarray, radius: np.ndarray) -> str:
    if wrong[i]:
        return f"taken for {subject.classes[answer[i]] if answer[i] >= 0 else 'nothing'}"
    return "right" if math.isnan(radius[i]) else f"right, radius {radius[i]:.2g}"


def _columns(subject: Subject) -> tuple[str, ...]:
    return {"text": ("text",), "tabular": ("unusual values",)}.get(subject.task, ())


def _inputs(context: Context, i: int) -> tuple[str, ...]:
    """Return the input of a row for the table: its text, or the columns that lie furthest from their mean."""
    subject = context.subject
    if subject.task == "text":
        text = subject.texts[i]
        return (text if len(text) <= _TEXT else text[: _TEXT - 1] + "…",)
    if subject.task != "tabular" or subject.x is None:
        return ()
    far = ((subject.x[i] - subject.means()) / context.deviation).nan_to_num(0.0)
    if len(subject.held):
        far = torch.where(subject.held, 0.0, far)
    names = far.abs().argsort(descending=True)[:_COLUMNS].tolist()
    gone = torch.isnan(subject.x[i]).nonzero()[:, 0].tolist()
    unusual = ", ".join(
        f"{subject.feature_names[j]} {float(subject.x[i, j]):.3g} ({float(far[j]):+.1f} sd)"
        for j in names
        if far[j] != 0
    )
    more = f" and {len(gone) - _COLUMNS} more" if len(gone) > _COLUMNS else ""
    absent = f"missing: {', '.join(subject.feature_names[j] for j in gone[:_COLUMNS])}{more}" if gone else ""
    return ("; ".join(part for part in (unusual, absent) if part),)
