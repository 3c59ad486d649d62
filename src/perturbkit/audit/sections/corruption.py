"""What natural damage does: noise, blur, missing values, typing errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from perturbkit.audit import _figures
from perturbkit.audit._intervals import bootstrap, share_interval
from perturbkit.audit._numbers import error_by_damage, root_mean_square
from perturbkit.audit._text import TEXT_CORRUPTIONS, corrupt_text
from perturbkit.audit.context import Context, held_everywhere
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Subject
from perturbkit.robust import IMAGE_CORRUPTIONS, TABLE_CORRUPTIONS, corrupt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.15
NEEDS_MODEL = "damaging inputs"
SEVERITIES = {"quick": (1, 3, 5), "standard": (1, 2, 3, 4, 5), "full": (1, 2, 3, 4, 5)}


def kinds(task: str) -> tuple[str, ...]:
    """Return the kinds of damage for a task."""
    return {"image": IMAGE_CORRUPTIONS, "tabular": TABLE_CORRUPTIONS, "text": TEXT_CORRUPTIONS}[task]


def refusal(subject: Subject, request: AuditRequest) -> str:
    """Why the section cannot run, empty if it can."""
    return held_everywhere(subject, request)


def evaluations(subject: Subject, request: AuditRequest) -> int:
    """Rows evaluated for one row of data."""
    return len(kinds(subject.task)) * len(SEVERITIES[request.profile])


def run(context: Context) -> Finding:
    """Measure the accuracy under each kind of damage and severity."""
    subject, severities = context.subject, SEVERITIES[context.request.profile]
    rows = context.correct_rows(min(subject.n, context.rows["corruption"]))
    if len(rows) < subject.n:
        # correct_rows prefers rows answered rightly; accuracy needs a fair sample.
        rows = (
            torch.randperm(subject.n, generator=context.generator("corruption rows"))[: len(rows)]
            .sort()
            .values
        )
    done, found = context.chunks(
        "corruption", rows,
        lambda part, generator: {"answers": _damaged_answers(context, subject.take(part), generator)},
        evaluations(subject, context.request),
    )  # fmt: skip
    rows = rows[done]
    chosen, answers = subject.take(rows), found["answers"]
    if subject.regression:
        return _numbers(context, chosen, answers)
    clean = int((subject.predictions()[rows] == chosen.y).sum())
    names = kinds(subject.task)
    grid = (answers == chosen.y[:, None, None]).sum(0).tolist()
    n = chosen.n
    worst = min((k, i, j) for i, line in enumerate(grid) for j, k in enumerate(line))
    low, high = share_interval(np.arange(n) < worst[0])
    clean_low, clean_high = share_interval(np.arange(n) < clean)
    mean = sum(map(sum, grid)) / (n * len(names) * len(severities))
    metrics = [
        Metric("accuracy.clean", clean / n, clean_low, clean_high, n, "no damage"),
        Metric(
            "accuracy.worst",
            worst[0] / n,
            low,
            high,
            n,
            f"{names[worst[1]]}, severity {severities[worst[2]]}",
        ),
        Metric("accuracy.mean", mean, None, None, n, "over kinds and severities"),
    ]
    table = tuple((name, *(round(k / n, 3) for k in line)) for name, line in zip(names, grid, strict=True))
    weak = high < 0.6 * clean / n or worst[0] / n < 0.6 * clean / n
    return Finding(
        "corruption", "weak" if weak else "ok",
        f"Accuracy falls from {clean / n:.2f} to {worst[0] / n:.2f} at worst ({names[worst[1]]}, severity "
        f"{severities[worst[2]]} of 5) and to {mean:.2f} in the mean.",
        tuple(metrics), Table(("damage", *(f"severity {s}" for s in severities)), table),
        {"kinds": list(names), "severities": list(severities), "accuracy": [[k / n for k in line] for line in grid]},
        "Damage of other kinds, and how often each occurs where the model is used.",
        papers=() if context.subject.task == "text" else ("corrupt",),
    )  # fmt: skip


def draw(finding: Finding) -> Figure:
    """Heat map of accuracy by kind and severity; of a regression, lines of the error."""
    s = finding.series
    if "rmse" in s:
        return error_by_damage(s["kinds"], s["severities"], s["rmse"], s["clean"], s["mean"])
    return _figures.heat_table(s["kinds"], s["severities"], s["accuracy"])


def _numbers(context: Context, chosen: Subject, damaged: Tensor) -> Finding:
    """Measure the root mean squared error under each kind of damage and severity."""
    severities, names, y = SEVERITIES[context.request.profile], kinds(chosen.task), chosen.y.double().numpy()

    def pairs(answers: Tensor) -> np.ndarray:
        return np.stack([y, np.nan_to_num(answers.double().numpy(), nan=float(y.mean()))], 1)

    clean = pairs(chosen.predictions())
    grid = [
        [pairs(damaged[:, i, j]) for j in range(len(severities))] for i in range(len(names))
    ]  # fmt: skip
    errors = [[root_mean_square(p) for p in line] for line in grid]
    worst, i, j = max((e, i, j) for i, line in enumerate(errors) for j, e in enumerate(line))
    base, mean, n = root_mean_square(clean), float(y.std()), len(y)
    how = f"{names[i]}, severity {severities[j]}"
    low, high = bootstrap(grid[i][j], context.generator("worst"), root_mean_square)
    clean_low, clean_high = bootstrap(clean, context.generator("clean"), root_mean_square)
    average = float(np.mean(errors))
    metrics = (
        Metric("rmse.clean", base, clean_low, clean_high, n, "no damage", mean),
        Metric("rmse.worst", worst, low, high, n, how, mean),
        Metric("rmse.mean", average, None, None, n, "over kinds and severities", mean),
    )
    table = tuple(
        (name, *(float(f"{e:.4g}") for e in line)) for name, line in zip(names, errors, strict=True)
    )
    return Finding(
        "corruption", "weak" if worst > mean else "ok",
        f"The error (root mean squared) grows from {base:.3g} to {worst:.3g} at worst ({how} of 5) and to {average:.3g} in "
        f"the mean; always answering the mean of the targets is off by {mean:.3g}.",
        metrics, Table(("damage", *(f"severity {s}" for s in severities)), table),
        {"kinds": list(names), "severities": list(severities), "rmse": errors, "clean": base, "mean": mean},
        "Damage of other kinds, and how often each occurs where the model is used.", papers=("corrupt",),
    )  # fmt: skip


def _damaged_answers(context: Context, chosen: Subject, generator: torch.Generator) -> Tensor:
    """Return the answers under every kind and severity, shape (rows, kinds, severities)."""
    columns = []
    for kind in kinds(chosen.task):
        for severity in SEVERITIES[context.request.profile]:
            scores = _damaged_scores(context, chosen, kind, severity, generator)
            columns.append(scores.argmax(1) if chosen.point is None else scores.double() @ chosen.point)
    return torch.stack(columns, 1).reshape(chosen.n, len(kinds(chosen.task)), -1)


def _damaged_scores(
    context: Context, chosen: Subject, kind: str, severity: int, generator: torch.Generator
) -> Tensor:
    if chosen.task == "text":
        return chosen.predict_texts([corrupt_text(t, kind, severity, generator) for t in chosen.texts])
    assert chosen.oracle is not None
    assert chosen.x is not None
    scale = None if chosen.task == "image" else context.scale
    absent = context.subject.missing()
    if absent is None:
        damaged = corrupt(chosen.x, kind, severity, scale=scale, generator=generator)
    else:
        there = torch.isfinite(chosen.x)
        whole = torch.where(there, chosen.x, context.subject.means())
        damaged = corrupt(whole, kind, severity, scale=scale, generator=generator)
        if kind == "missing":
            # A model that takes empty cells in a column meets them there, and no mean in their place.
            damaged = damaged.masked_fill((damaged != whole) & absent.any(0), torch.nan)
        damaged = damaged.masked_fill(~there, torch.nan)
    if len(context.fixed):
        damaged = torch.where(context.fixed, chosen.x, damaged)
    return chosen.oracle(damaged)
