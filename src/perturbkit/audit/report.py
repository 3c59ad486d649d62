"""The report: findings, verdicts and what they cost, ready to be read, drawn, judged and saved."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbkit._version import __version__
from perturbkit.audit.compare import AuditComparison
from perturbkit.audit.finding import Finding, Table
from perturbkit.audit.gates import Judgement, judge, read_gates
from perturbkit.audit.plan import section_module
from perturbkit.audit.request import AuditRequest
from perturbkit.core import checks

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Report", "load_report"]

SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """What an audit found.

    Attributes
    ----------
    request : AuditRequest
        What was asked.
    model, data, task : str
        What was audited.
    classes, rows, rows_given : int
        Number of classes, of rows used, and of rows in the data.
    findings : tuple of Finding
        One a section, also those that did not run.
    seconds : float
        Time in all.
    interrupted : bool
        Whether it was stopped before the end.
    judgement : Judgement or None
        The gates judged, where there were any.
    comparison : AuditComparison or None
        What changed since a baseline, where one was given.
    times : dict of str to float
        Seconds of "opening" model and data, "planning", "sections", and of these "inside" the model or a certificate.
    examples : Table or None
        One line a row audited.
    marks : dict of str to str
        Hashes of request, model and data, and the version.
    source : dict
        How the command was called, for ``audit.lock.toml``; empty where the model was an object in Python.
    saved : tuple of Path
        The files that were written.
    """

    request: AuditRequest
    model: str
    data: str
    task: str
    classes: int
    rows: int
    rows_given: int
    findings: tuple[Finding, ...]
    seconds: float
    interrupted: bool = False
    judgement: Judgement | None = None
    comparison: AuditComparison | None = None
    times: dict[str, float] = field(default_factory=dict)
    examples: Table | None = None
    marks: dict[str, str] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    saved: tuple[Path, ...] = ()

    def __getitem__(self, section: str) -> Finding:
        """Return the finding of a section."""
        for finding in self.findings:
            if finding.section == section:
                return finding
        known = ", ".join(f.section for f in self.findings) or "none"
        raise checks.ArgumentError(f"section is {section!r}; allowed: {known}. Name one that was run.")

    @property
    def exit_code(self) -> int:
        """Exit code of the command: 130 interrupted; else 1 a gate failed or worse than the baseline; else 3; else 0."""
        if self.interrupted:
            return 130
        codes = {part.exit_code for part in (self.judgement, self.comparison) if part is not None}
        return 1 if 1 in codes else max(codes, default=0)

    @property
    def share_inside(self) -> float:
        """Share of the time that was spent inside the model or a certificate, not in perturbkit itself; NaN if unknown."""
        total = sum(v for k, v in self.times.items() if k != "inside")
        return self.times.get("inside", math.nan) / total if total > 0 else math.nan

    def to_frame(self) -> pd.DataFrame:
        """Return every number, a line each: section, metric, value, low, high, control, n, method, status, cost."""
        import pandas as pd

        lines = []
        for f in self.findings:
            shared = {"status": f.status, "nfev": f.cost.nfev, "ngrad": f.cost.ngrad}
            for m in f.metrics:
                lines.append(
                    {"section": f.section, "metric": m.name, "value": m.value, "low": m.low, "high": m.high,
                     "control": m.control, "n": m.n, "method": m.method, **shared}
                )  # fmt: skip
            if not f.metrics:
                lines.append({"section": f.section, **shared})
        columns = [
            "section",
            "metric",
            "value",
            "low",
            "high",
            "control",
            "n",
            "method",
            "status",
            "nfev",
            "ngrad",
        ]
        return pd.DataFrame(lines, columns=columns)

    def figure(self, section: str) -> Figure:
        """Return the figure of a section; it is not shown.

        Raises
        ------
        ArgumentError
            If the section was not asked for or did not run.
        """
        finding = self[section]
        if finding.why:
            raise checks.ArgumentError(
                f"section {section!r} did not run: {finding.why}; allowed: a section that ran. Look at report.findings."
            )
        return section_module(section).draw(finding)

    def check(self, gates: str | Path | Mapping[str, Any]) -> Judgement:
        """Return the gates judged; ``.passed`` says whether all hold. See :mod:`perturbkit.audit.gates`."""
        return judge(self.findings, read_gates(gates))

    def compare(self, old: Report) -> AuditComparison:
        """Return what changed since an older report; see :mod:`perturbkit.audit.compare`."""
        from perturbkit.audit.compare import compare

        return compare(old, self)

    def save(self, folder: str | Path, formats: Sequence[str] | None = None) -> Path:
        """Write the files of a report and return the path of the first.

        ``formats`` chooses among "html" (``report.html``), "json" (``audit.json``), "csv" (``metrics.csv`` and
        ``examples.csv``), "junit" (``junit.xml``) and "md" (``summary.md``); all by default. ``audit.lock.toml``, which
        runs the audit again, is always written where a command can.
        """
        written = self.write(folder, formats)
        return written[0] if written else Path(folder)

    def write(self, folder: str | Path, formats: Sequence[str] | None = None) -> tuple[Path, ...]:
        """Write the same files as :meth:`save` and return the paths of all."""
        from perturbkit.audit.writers import save_report

        return save_report(self, Path(folder), formats)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values, with a schema version."""
        request = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.request).items()}
        request["out"] = None if self.request.out is None else str(self.request.out)
        return {
            "schema": SCHEMA, "version": __version__, "request": request, "model": self.model, "data": self.data,
            "task": self.task, "classes": self.classes, "rows": self.rows, "rows_given": self.rows_given,
            "seconds": self.seconds, "interrupted": self.interrupted,
            "findings": [f.to_dict() for f in self.findings],
            "judgement": None if self.judgement is None else self.judgement.to_dict(),
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
            "times": self.times, "examples": None if self.examples is None else self.examples.to_dict(),
            "marks": self.marks, "source": self.source,
        }  # fmt: skip

    def _repr_html_(self) -> str:
        from perturbkit.audit.writers import notebook_summary

        return notebook_summary(self)


def _part(kind: type[Any], data: Any) -> Any:
    return None if data is None else kind.from_dict(data)


def load_report(path: str | Path) -> Report:
    """Read the ``audit.json`` of a report.

    Raises
    ------
    DataError
        If the file is missing, not JSON, or of another schema.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        schema = data["schema"]
    except FileNotFoundError as error:
        raise checks.DataError(f"there is no {path}; allowed: an audit.json. Check the path.") from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise checks.DataError(
            f"{path} is not an audit.json ({error}); allowed: one written by this command."
        ) from error
    if schema != SCHEMA:
        raise checks.DataError(f"{path} has schema {schema!r}; allowed: {SCHEMA}. Run the audit again.")
    try:
        request = dict(data["request"])
        request["out"] = None if request["out"] is None else Path(request["out"])
        for name in ("sections", "bounds"):
            request[name] = None if request[name] is None else tuple(request[name])
        findings = tuple(Finding.from_dict(f) for f in data["findings"])
        for name, *values in ((m.name, m.value, m.low, m.high) for f in findings for m in f.metrics):
            if not all(isinstance(v, int | float) or (v is None and i) for i, v in enumerate(values)):
                raise TypeError(f"{name} is no number")
        return Report(
            request=AuditRequest(**request), findings=findings,
            judgement=_part(Judgement, data["judgement"]), comparison=_part(AuditComparison, data.get("comparison")),
            examples=_part(Table, data.get("examples")),
            times=data.get("times") or {}, marks=data.get("marks") or {}, source=data.get("source") or {},
            **{k: data[k] for k in
               ("model", "data", "task", "classes", "rows", "rows_given", "seconds", "interrupted")},
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise checks.DataError(
            f"{path} is damaged ({error}); allowed: an audit.json as written. Run it again."
        ) from error
