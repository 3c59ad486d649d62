"""What a section of the audit found: metrics with intervals, a sentence, a table and the data of a figure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from perturbkit.core.results import Cost, Result

__all__ = ["Finding", "Metric", "Table"]


@dataclass(frozen=True)
class Metric(Result):
    """One number with what is known of its error.

    Attributes
    ----------
    name : str
        Dotted name inside its section: "radius.median", "ece".
    value : float
        The estimate; NaN where it could not be measured.
    low, high : float or None
        Confidence interval, 95 % unless the section says otherwise; ``None`` for a number without sampling error.
    n : int
        Rows behind it.
    method : str
        The method that measured it.
    control : float or None
        The same number for a random control, where there is one.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0
    method: str = ""
    control: float | None = None

    @property
    def text(self) -> str:
        """The number as the report prints it."""
        if math.isnan(self.value):
            return "not measured"
        shown = _short(self.value)
        if self.low is not None and self.high is not None:
            shown += f" [{_short(self.low)}, {_short(self.high)}]"
        return shown


@dataclass(frozen=True)
class Table(Result):
    """A small table: column names, and rows of text or numbers."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Finding(Result):
    """What one section found.

    Attributes
    ----------
    section : str
        Name of the section.
    status : str
        "ok", "weak" (it ran and the result calls for attention), "not run" or "failed" (an error, given in
        ``why``).
    headline : str
        The finding in one sentence.
    metrics : tuple of Metric
        Its numbers.
    table : Table or None
        Its details.
    series : dict
        Plain data behind the figure.
    does_not_show : str
        The limits of what was measured.
    why : str
        Why it did not run, where it did not.
    papers : tuple of str
        Keys of the methods used, as in ``perturbkit papers``.
    cost : Cost
        Evaluations spent.
    seconds : float
        Time spent.
    model_seconds : float
        Of these, inside the model or the computation of a certificate.
    cut : str
        What the time budget left out, in one sentence; empty where everything planned was measured.
    """

    section: str
    status: str
    headline: str
    metrics: tuple[Metric, ...] = ()
    table: Table | None = None
    series: dict[str, Any] = field(default_factory=dict)
    does_not_show: str = ""
    why: str = ""
    papers: tuple[str, ...] = ()
    cost: Cost = field(default_factory=Cost)
    seconds: float = 0.0
    model_seconds: float = 0.0
    cut: str = ""

    def metric(self, name: str) -> Metric | None:
        """Return the metric of that name, or ``None``."""
        return next((m for m in self.metrics if m.name == name), None)


def _short(value: float) -> str:
    """Three significant digits, without an exponent for everyday sizes."""
    if math.isinf(value):
        return "beyond reach"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        text = f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
        return text
    return f"{value:.2g}"
