"""Comparing two audits: which numbers changed by more than both their intervals allow.

A number counts as changed where the two 95 % intervals have no point in common. That is stricter than a test of the
difference: of two audits of one model on fresh rows, fewer than one number in a hundred is called changed. Where the
rows are the same, differences cancel part of the noise, and a real change may still go unnoticed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from perturbkit.audit.finding import Metric
from perturbkit.core.results import Result

if TYPE_CHECKING:
    from perturbkit.audit.report import Report

__all__ = ["Change", "AuditComparison", "compare"]

# What a number means for the model when it grows, by the first part of its name that is listed.
_HIGHER = {"accuracy", "r2", "agreement", "radius", "deletion", "insertion", "coverage", "steady", "words"}
_LOWER = {
    "ece",
    "mce",
    "rmse",
    "mae",
    "brier",
    "nll",
    "size",
    "width",
    "changed",
    "movement",
    "ace",
    "log_loss",
    "wrong",
    "loss",
    "error",
    "misled",
    "alarm",
    "worse",
}


@dataclass(frozen=True)
class Change(Result):
    """One number before and after.

    Attributes
    ----------
    key : str
        "SECTION.METRIC".
    old, new : Metric or None
        The numbers; ``None`` where it was not measured.
    verdict : str
        "same", "better", "worse", "changed" (neither is better), "no interval" (nothing says whether it is noise),
        "lost" (measured before only) or "gained" (measured now only).
    """

    key: str
    old: Metric | None
    new: Metric | None
    verdict: str

    @property
    def difference(self) -> float:
        """New less old; NaN where one is missing."""
        return math.nan if self.old is None or self.new is None else self.new.value - self.old.value


@dataclass(frozen=True)
class AuditComparison(Result):
    """All numbers of two audits side by side.

    Attributes
    ----------
    changes : tuple of Change
        In the order of the report.
    old, new : str
        What was audited.
    notes : tuple of str
        What else differs between the two: data, seed, profile, options.
    """

    changes: tuple[Change, ...]
    old: str
    new: str
    notes: tuple[str, ...] = ()

    @property
    def beyond_noise(self) -> tuple[Change, ...]:
        """The numbers that changed beyond noise, and those that were lost."""
        return tuple(c for c in self.changes if c.verdict in ("better", "worse", "changed", "lost"))

    @property
    def worse(self) -> tuple[Change, ...]:
        """Those that got worse or were lost, or of which nobody can say whether they got better."""
        return tuple(c for c in self.changes if c.verdict in ("worse", "changed", "lost"))

    @property
    def exit_code(self) -> int:
        """1 where something got worse beyond noise or was lost, else 0."""
        return 1 if self.worse else 0


def compare(old: Report, new: Report) -> AuditComparison:
    """Compare two audits number by number.

    Parameters
    ----------
    old, new : Report
        As :func:`~perturbkit.audit.report.load_report` reads them.

    Returns
    -------
    AuditComparison
    """
    before, after = _numbers(old), _numbers(new)
    keys = [*before, *(k for k in after if k not in before)]
    asked = set(new.request.sections)
    changes = [
        Change(k, before.get(k), after.get(k), _verdict(k, before.get(k), after.get(k)))
        for k in keys
        # A section that was not asked for is no loss.
        if k in after or k.partition(".")[0] in asked
    ]
    return AuditComparison(tuple(changes), old.model, new.model, tuple(_notes(old, new)))


def _numbers(report: Report) -> dict[str, Metric]:
    return {f"{f.section}.{m.name}": m for f in report.findings for m in f.metrics if not math.isnan(m.value)}


def _verdict(key: str, old: Metric | None, new: Metric | None) -> str:
    if old is None:
        return "gained"
    if new is None:
        return "lost"
    if old.value == new.value:
        return "same"
    if old.low is None or old.high is None or new.low is None or new.high is None:
        return "no interval"
    if new.low <= old.high and old.low <= new.high:
        return "same"
    grew = new.value > old.value
    parts = key.split(".")[1:]
    kind = next((p for p in parts if p in _HIGHER | _LOWER), "")
    if not kind or parts[0] == "random":
        return "changed"
    return "better" if grew == (kind in _HIGHER) else "worse"


def _notes(old: Report, new: Report) -> list[str]:
    notes = []
    for name, a, b in (
        ("model", old.model, new.model), ("data", old.data, new.data), ("task", old.task, new.task),
        ("rows", old.rows, new.rows), ("seed", old.request.seed, new.request.seed),
        ("profile", old.request.profile, new.request.profile), ("norm", old.request.norm, new.request.norm),
        ("eps", old.request.eps, new.request.eps), ("alpha", old.request.alpha, new.request.alpha),
    ):  # fmt: skip
        if a != b:
            notes.append(f"The {name} differs: {a} before, {b} now.")
    if old.marks.get("data") != new.marks.get("data") and old.data == new.data and old.marks and new.marks:
        notes.append("The data has the same name but other contents.")
    return notes


def read_both(old: str | Path, new: str | Path) -> AuditComparison:
    """Compare two files ``audit.json``."""
    from perturbkit.audit.report import load_report

    return compare(load_report(old), load_report(new))
