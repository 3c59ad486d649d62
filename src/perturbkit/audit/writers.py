"""Turning a report into files: one HTML page, JSON, CSV, JUnit XML and Markdown. Writers compute nothing."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2
import markupsafe

from perturbkit._version import __version__
from perturbkit.audit._figures import to_svg
from perturbkit.audit._papers import methods
from perturbkit.audit.compare import AuditComparison, Change
from perturbkit.audit.finding import Finding
from perturbkit.audit.report import Report
from perturbkit.core import checks

__all__ = [
    "FORMATS",
    "examples_csv",
    "junit",
    "notebook_summary",
    "render_html",
    "save_comparison",
    "save_report",
    "summary_md",
]

LIMIT = 5_000_000
TITLES = {
    "sanity": "Is the set-up right?",
    "explain": "What does the model look at?",
    "faithfulness": "Do the explanations say what it does?",
    "attack": "How far can an input be pushed?",
    "certify": "What is proved?",
    "sandwich": "Where is the true radius?",
    "calibration": "May its confidence be believed?",
    "conformal": "Which sets hold the right answer?",
    "corruption": "What does natural damage do?",
    "weakest": "Which rows fail first?",
    "slices": "Is it worse on some of the data?",
}
WORDS = {"ok": "in order", "weak": "needs attention", "not run": "not run", "failed": "failed"}


# What begins a formula, also in full width, and white space that some spreadsheets skip.
_FORMULA = ("=", "+", "-", "@", "\t", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_A_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)

FORMATS = ("html", "json", "csv", "junit", "md")


def save_report(report: Report, folder: Path, formats: Sequence[str] | None = None) -> tuple[Path, ...]:
    """Write the files of a report into a folder; return their paths, that of the page first.

    Raises
    ------
    ArgumentError
        If the folder cannot be written, or a format is unknown.
    """
    chosen = FORMATS if formats is None else tuple(formats)
    for name in chosen:
        checks.one_of("format", name, FORMATS)
    written: list[Path] = []

    def write(name: str, text: str) -> None:
        part = folder / f"{name}.part"
        # The name of a file may hold bytes that are no text.
        part.write_text(text, encoding="utf-8", errors="replace")
        part.replace(folder / name)
        written.append(folder / name)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        if "html" in chosen:
            write("report.html", render_html(report))
        if "json" in chosen:
            write("audit.json", json.dumps(report.to_dict(), indent=1, allow_nan=False))
        if "csv" in chosen:
            write("metrics.csv", metrics_csv(report))
            if report.examples is not None:
                write("examples.csv", examples_csv(report))
        if "junit" in chosen:
            write("junit.xml", junit(report))
        if "md" in chosen:
            write("summary.md", summary_md(report))
        if report.source:
            from perturbkit.audit.config import lock

            write("audit.lock.toml", lock(report, folder))
    except OSError as error:
        raise checks.ArgumentError(
            f"out is {folder}, which cannot be written ({error.strerror}); allowed: a folder of yours. Choose another."
        ) from error
    return tuple(written)


def metrics_csv(report: Report) -> str:
    """Return one line a number; text that a spreadsheet would run is defused, see :func:`examples_csv`."""
    frame = report.to_frame()
    for name in frame.columns:
        if any(isinstance(v, str) for v in frame[name]):
            frame[name] = [_harmless(v) for v in frame[name]]
    return frame.to_csv(index=False)


def examples_csv(report: Report) -> str:
    """Return one line a row audited; a radius that no change reached is ``inf``, one not measured is empty.

    Text from the data that a spreadsheet would take for a formula begins with an apostrophe; numbers are left alone.
    """
    assert report.examples is not None
    with io.StringIO(newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(map(_harmless, report.examples.columns))
        writer.writerows(map(_harmless, row) for row in report.examples.rows)
        return file.getvalue()


def _harmless(value: Any) -> Any:
    """Put an apostrophe before text that a spreadsheet would take for a formula, as OWASP advises; a number is none."""
    if not isinstance(value, str):
        return value
    # A carriage return is not quoted by the writer, and would begin a row.
    text = value.replace("\r\n", "\n").replace("\r", "\n")
    return f"'{text}" if text.startswith(_FORMULA) and not _A_NUMBER.fullmatch(text) else text


def junit(report: Report) -> str:
    """Return sections, gates and the comparison with a baseline as test cases in JUnit's XML.

    A section that failed is an error, one that did not run is skipped; a gate that failed is a failure, one that could
    not be judged an error; a number that got worse than the baseline is a failure.
    """
    root = ElementTree.Element("testsuites", name="perturbkit audit")
    suite = _suite(root, "sections", [(f.section, f.seconds, *_section_result(f)) for f in report.findings])
    for key, value in (("model", report.model), ("data", report.data), ("seed", str(report.request.seed))):
        ElementTree.SubElement(suite[0], "property", name=key, value=_xml(value))
    if report.judgement is not None:
        kinds = {"passed": "", "failed": "failure", "inconclusive": "error"}
        _suite(root, "gates", [(r.gate.key, 0.0, kinds[r.verdict], r.why) for r in report.judgement.results])
    if report.comparison is not None:
        bad = set(report.comparison.worse)
        _suite(
            root, "baseline",
            [(c.key, 0.0, "failure" if c in bad else "", change_text(c)) for c in report.comparison.changes],
        )  # fmt: skip
    ElementTree.indent(root, " ")
    return "<?xml version='1.0' encoding='utf-8'?>\n" + ElementTree.tostring(root, encoding="unicode") + "\n"


def _section_result(finding: Finding) -> tuple[str, str]:
    kind = {"failed": "error", "not run": "skipped"}.get(finding.status, "")
    return kind, finding.why or f"{WORDS[finding.status]}: {finding.headline}"


def _suite(
    root: ElementTree.Element, name: str, cases: Sequence[tuple[str, float, str, str]]
) -> ElementTree.Element:
    counts = {kind: str(sum(c[2] == kind for c in cases)) for kind in ("failure", "error", "skipped")}
    suite = ElementTree.SubElement(
        root, "testsuite", name=name, tests=str(len(cases)), failures=counts["failure"], errors=counts["error"],
        skipped=counts["skipped"], time=f"{sum(c[1] for c in cases):.3f}",
    )  # fmt: skip
    ElementTree.SubElement(suite, "properties")
    for key, seconds, kind, text in cases:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"perturbkit.audit.{name}", name=_xml(key), time=f"{seconds:.3f}"
        )  # fmt: skip
        if kind:
            ElementTree.SubElement(case, kind, message=_xml(text))
        else:
            ElementTree.SubElement(case, "system-out").text = _xml(text)
    return suite


def _xml(text: str) -> str:
    """Leave out the characters that XML 1.0 cannot hold; the rest is escaped by the writer."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)


def change_text(change: Change) -> str:
    """Return a number before and now, with the verdict."""
    old, new = ("not measured" if m is None else m.text for m in (change.old, change.new))
    return f"{change.verdict}: {old} before, {new} now"


def summary_md(report: Report) -> str:
    """Return the verdicts as Markdown, for a comment on a pull request."""
    lines = [
        f"### Audit of {_md(report.model)}", "",
        f"{report.rows:,} of {report.rows_given:,} rows of {_md(report.data)}, profile {report.request.profile}, "
        f"seed {report.request.seed}." + (" **Interrupted: not all was measured.**" if report.interrupted else ""), "",
    ]  # fmt: skip
    if report.judgement is not None:
        lines += ["| Gate | Asked | Verdict | Why |", "| --- | --- | --- | --- |"]
        marks = {"passed": "passed", "failed": "**failed**", "inconclusive": "**inconclusive**"}
        for r in report.judgement.results:
            asked = f"{r.gate.direction} {r.gate.limit:g}"
            lines.append(f"| {_md(r.gate.key)} | {_md(asked)} | {marks[r.verdict]} | {_md(r.why)} |")
        lines.append("")
    if report.comparison is not None:
        found = report.comparison.beyond_noise
        lines.append(f"**Against the baseline**, {len(found)} numbers changed beyond noise.")
        lines.append("")
        if found:
            lines += ["| Number | Before | Now | Verdict |", "| --- | --- | --- | --- |"]
            for c in found:
                old, new = ("not measured" if m is None else m.text for m in (c.old, c.new))
                lines.append(f"| {_md(c.key)} | {old} | {new} | **{c.verdict}** |")
            lines.append("")
    lines += ["| Question | Verdict | Finding |", "| --- | --- | --- |"]
    for f in report.findings:
        word = WORDS[f.status] if f.status == "ok" else f"**{WORDS[f.status]}**"
        lines.append(f"| {TITLES[f.section]} | {word} | {_md(f.why or f.headline)} |")
    return "\n".join(lines) + "\n"


def _md(text: str) -> str:
    """Write text so that Markdown shows it as it is, on one line."""
    one = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    escaped = one.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An @ would call a person, and a # refer to an issue.
    escaped = re.sub(r"([\\`*_\[\]|~])", r"\\\1", escaped)
    return re.sub("[@#]", lambda c: f"&#{ord(c[0])};", escaped)


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
    if _bytes(page) > LIMIT:
        # Figures are nearly all of the size; the largest go first, and the page says so.
        for section in sorted(sections, key=lambda s: -len(s["figure"] or "")):
            section["figure"], section["figure_note"] = (
                None,
                "The figure was left out to keep the page below 5 MB.",
            )
            page = template.render(**values)
            if _bytes(page) <= LIMIT:
                break
    return page


def _bytes(page: str) -> int:
    return len(page.encode(errors="replace"))


def save_comparison(found: AuditComparison, path: Path) -> None:
    """Write a comparison as a page (``.html``) or as values (``.json``).

    Raises
    ------
    ArgumentError
        If the file is of another kind or cannot be written.
    """
    if path.suffix.lower() not in (".html", ".json"):
        raise checks.ArgumentError(f"out is {path}; allowed: a file that ends in .html or .json. Name one.")
    if path.suffix.lower() == ".json":
        text = json.dumps(found.to_dict(), indent=1, allow_nan=False)
    else:
        text = _environment().get_template("comparison.html.j2").render(found=found, version=__version__)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise checks.ArgumentError(
            f"out is {path}, which cannot be written ({error.strerror}); allowed: a file of yours. Choose another."
        ) from error


def notebook_summary(report: Report) -> str:
    """Return a short HTML table for notebooks."""
    return _environment().get_template("summary.html.j2").render(report=report, titles=TITLES, words=WORDS)


def _section(finding: Finding) -> dict[str, Any]:
    figure = None
    if not finding.why:
        from perturbkit.audit.plan import section_module

        svg = to_svg(section_module(finding.section).draw(finding))
        figure = "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode("ascii")
    used = methods((*finding.papers, *finding.series.get("references", ())))
    return {"finding": finding, "figure": figure, "figure_note": "", "methods": used}


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
