"""Is the set-up right? Accuracy, evaluation mode, determinism, input range, live gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from perturbkit.audit._figures import bars
from perturbkit.audit._intervals import bootstrap, share_interval
from perturbkit.audit._numbers import answers_against_targets, mean_absolute, r_squared, root_mean_square
from perturbkit.audit.context import Context
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.opening.tables import counted
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.0
NEEDS_MODEL = ""
TWICE, ALONE, GRADIENT = "same answer twice", "same answer alone and in a batch", "gradient reaches the input"
ANSWERED, DEPENDS, SEVERAL = "an answer to every row", "answers depend on the input", "more than one answer"
ORDER, COMMONEST = "labels in the order of the outputs", "better than one answer for all"
KNOWN, WHOLE = "words known to the tokenizer", "texts read to their end"
_MOST_CLASSES = 1000
# Of tokens that a tokenizer does not know: subwords and bytes leave next to none, and a list of words a few.
_UNKNOWN = 0.1


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
        (
            COMMONEST,
            f"accuracy {k / n:.2f}, and {majority:.2f} by always answering the commonest class",
            _mark(not worse),
        )
    )
    broken = int(torch.isnan(subject.scores()).any(1).sum())
    if broken:
        rows.append((ANSWERED, f"NaN on {broken} of {n} rows, counted as wrong", "look"))
    rows.append(_dependence(subject))
    swapped = _swapped(subject)
    if swapped:
        rows.append((ORDER, swapped, "look"))
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
        + (
            ", and something in the set-up needs a look." + _told(rows)
            if weak
            else " and the set-up is sound."
        ),
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
        (COMMONEST, f"{y.std():.4g} by always answering it", _mark(not worse)),
    ]
    if broken.any():
        found = f"NaN on {int(broken.sum())} of {subject.n} rows, taken for the mean"
        rows.append((ANSWERED, found, "look"))
    rows.append(_dependence(subject))
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
        + (", and something in the set-up needs a look." + _told(rows) if weak else " and the set-up is sound."),
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
        (TWICE, f"largest difference {gap:.2g}", _mark(gap <= 1e-5 * size)),
        (
            ALONE,
            f"largest difference {batch_gap:.2g}",
            _mark(batch_gap <= 1e-3 * size),
        ),
        _gradient(subject),
        *_reading(subject),
    ]
    if subject.x is not None:
        there = subject.x[torch.isfinite(subject.x)]
        low, high = (float(there.min()), float(there.max())) if len(there) else (0.0, 0.0)
        allowed = (
            "no range stated"
            if subject.bounds is None
            else f"allowed {subject.bounds[0]:g} to {subject.bounds[1]:g}"
        )
        rows.append(("input range", f"{low:.4g} to {high:.4g}, {allowed}", "passed"))
        rows.extend(_missing(subject))
        if context.request.frozen:
            rows.append(("frozen columns", ", ".join(context.request.frozen), "noted"))
    return rows


def _missing(subject: Subject) -> list[tuple[str, str, str]]:
    """Say how many cells of a table are missing, and in which columns."""
    counts = subject.missing_by_column()
    if not counts:
        return []
    assert subject.x is not None
    found = f"{sum(counts.values())} of {subject.x.numel()} cells: {counted(counts)}"
    return [("missing cells", found, "noted")]


def _reading(subject: Subject) -> list[tuple[str, str, str]]:
    """Say what of the texts reaches the model: tokens it knows, and texts that it reads to their end."""
    reader = subject.text_model
    if reader is None or reader.tokenize is None:
        return []
    unknown, tokens, full = 0, 0, 0
    texts = subject.texts or []
    for start in range(0, len(texts), 256):
        ids, mask = reader.tokenize(texts[start : start + 256])
        if reader.unknown is not None:
            unknown += int(((ids == reader.unknown) & mask.bool()).sum())
        tokens += int(mask.sum())
        if reader.longest is not None:
            full += int((mask.sum(1) >= reader.longest).sum())
    rows = []
    if reader.unknown is not None:
        share = unknown / max(tokens, 1)
        rows.append((KNOWN, f"{share:.0%} of the tokens are unknown", _mark(share <= _UNKNOWN)))
    if reader.longest is not None:
        cut = f"{full} of {len(texts)} texts fill all {reader.longest} tokens that are read; what follows is cut off"
        rows.append((WHOLE, cut if full else "yes", "noted" if full else "passed"))
    return rows


def _gradient(subject: Subject) -> tuple[str, str, str]:
    alive, tried = subject.gradient_alive()
    if subject.gradient_vanishes():
        return (
            GRADIENT,
            f"zero on all {tried} rows tried: gradient methods would be blind, and are left out",
            "look",
        )
    if not subject.has_gradient():
        return GRADIENT, f"no: {subject.no_gradient or 'gradient methods are left out'}", "passed"
    if 0 < alive < tried:
        return GRADIENT, f"zero on {tried - alive} of {tried} rows tried", "look"
    return GRADIENT, "yes", "passed"


def _dependence(subject: Subject) -> tuple[str, str, str]:
    """Check that the answers depend on the input at all."""
    scores = torch.nan_to_num(subject.scores().double())
    spread = float((scores - scores[:1]).abs().max())
    if spread <= 1e-7 * max(float(scores.abs().max()), 1e-30):
        return DEPENDS, "every row gets exactly the same scores", "look"
    answers = subject.predictions()
    if not subject.regression and len(answers.unique()) == 1 and int(answers[0]) >= 0:
        return SEVERAL, f"every row is answered {subject.classes[int(answers[0])]}", "look"
    return DEPENDS, "yes", "passed"


def _swapped(subject: Subject) -> str:
    """Say which reading of the outputs would be far better, where one is: a sign that labels are in another order."""
    answers, k = subject.predictions(), len(subject.classes)
    if k > _MOST_CLASSES or bool((answers < 0).any()):
        return ""
    table = torch.zeros(k, k).index_put_((answers, subject.y), torch.ones(subject.n), accumulate=True)
    outputs, labels = linear_sum_assignment(-table.numpy())
    now, best = int(table.diagonal().sum()), int(table[outputs, labels].sum())
    flags = np.arange(subject.n)
    # As many intervals as pairs of outputs and labels, of which the best pairing was picked.
    if share_interval(flags < best, among=k * k)[0] <= share_interval(flags < now, among=k * k)[1]:
        return ""
    moved = [
        (subject.classes[i], subject.classes[j])
        for i, j in zip(outputs, labels, strict=True)
        if i != j and table[i, j] > 0
    ]
    pairs = ", ".join(f"{a} as {b}" for a, b in moved[:4])
    return f"reading {pairs} would make {best} of {subject.n} rows right instead of {now}"


def _told(rows: list[tuple[str, str, str]]) -> str:
    """Say in sentences what needs a look."""
    said = {
        DEPENDS: "It ignores its input: {}.",
        SEVERAL: "It never changes its answer: {}.",
        ORDER: "The labels look swapped: {}.",
        TWICE: "It does not answer the same twice: {}; every number below has noise of its own.",
        ALONE: "Its answer depends on the other rows of a batch: {}.",
        GRADIENT: "Its gradient vanishes: {}.",
        ANSWERED: "Some rows have no answer: {}.",
        KNOWN: "Much of the texts does not reach it: {}; is this the tokenizer that it was trained with?",
        COMMONEST: "It is not clearly better than answering the same always: {}.",
    }
    return "".join(
        " " + said[name].format(found) for name, found, mark in rows if mark == "look" and name in said
    )


def _mark(passed: bool) -> str:
    return "passed" if passed else "look"
