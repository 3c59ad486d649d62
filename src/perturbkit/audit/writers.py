"""Turning a report into files: one HTML page, JSON and CSV. Writers compute nothing."""

from __future__ import annotations

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from perturbkit._version import __version__
from perturbkit.audit._figures import to_svg
from perturbkit.audit.finding import Finding
from perturbkit.audit.report import Report
from perturbkit.core import checks

__all__ = ["notebook_summary", "render_html", "save_report"]

LIMIT = 5_000_000
TITLES = {
    "sanity": "Is the set-up right?",
    "explain": "What does the model look at?",
    "faithfulness": "Do the explanations say what it does?",
    "attack": "How far can an input be pushed?",
    "certify": "What is proved?",
    "calibration": "May its confidence be believed?",
    "conformal": "Which sets hold the right answer?",
    "corruption": "What does natural damage do?",
}
WORDS = {"ok": "in order", "weak": "needs attention", "not run": "not run", "failed": "failed"}


def save_report(report: Report, folder: Path) -> Path:
    """Write ``report.html``, ``audit.json`` and ``metrics.csv`` into a folder; return the path of the page.

    Raises
    ------
    ArgumentError
        If the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report.to_dict(), indent=1, allow_nan=False)
        (folder / "audit.json").write_text(text, encoding="utf-8")
        report.to_frame().to_csv(folder / "metrics.csv", index=False)
        page = folder / "report.html"
        page.write_text(render_html(report), encoding="utf-8")
    except OSError as error:
        raise checks.ArgumentError(
            f"out is {folder}, which cannot be written ({error.strerror}); allowed: a folder of yours. Choose another."
        ) from error
    return page


def render_html(report: Report) -> str:
    """Return the report as one page without outside parts, at most 5 MB."""
    template = _environment().get_template("report.html.j2")
    sections = [_section(f) for f in report.findings]
    values: dict[str, Any] = {
        "report": report, "sections": sections, "titles": TITLES, "words": WORDS, "version": __version__,
        "counts": {w: sum(f.status == w for f in report.findings) for w in WORDS},
        "nfev": sum(f.cost.nfev for f in report.findings), "ngrad": sum(f.cost.ngrad for f in report.findings),
    }  # fmt: skip
    page = template.render(**values)
    if len(page.encode()) > LIMIT:
        # Figures are nearly all of the size; the largest go first, and the page says so.
        for section in sorted(sections, key=lambda s: -len(s["figure"] or "")):
            section["figure"], section["figure_note"] = (
                None,
                "The figure was left out to keep the page below 5 MB.",
            )
            page = template.render(**values)
            if len(page.encode()) <= LIMIT:
                break
    return page


def notebook_summary(report: Report) -> str:
    """Return a short HTML table for notebooks."""
    return _environment().get_template("summary.html.j2").render(report=report, titles=TITLES, words=WORDS)


def _section(finding: Finding) -> dict[str, Any]:
    figure = None
    if not finding.why:
        from perturbkit.audit.plan import section_module

        svg = to_svg(section_module(finding.section).draw(finding))
        figure = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")
    return {"finding": finding, "figure": figure, "figure_note": ""}


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("perturbkit.audit"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["number"] = _number
    environment.filters["breakable"] = _breakable
    environment.filters["duration"] = lambda s: f"{s:.0f} s" if s < 100 else f"{s / 60:.1f} min"
    return environment


def _number(value: Any) -> str:
    """Write a number for reading; text stays as it is."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value):
        return "not measured"
    if math.isinf(value):
        return "beyond reach"
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2g}"


def _breakable(name: str) -> markupsafe.Markup:
    """Let a long dotted name break after a dot or an underscore."""
    parts = re.split(r"(?<=[._])", name)
    return markupsafe.Markup("<wbr>").join(markupsafe.escape(p) for p in parts)
