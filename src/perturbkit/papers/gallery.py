"""The gallery: a static site with one card a paper, drawn from the records and the saved results.

One page, readable without JavaScript, that asks nothing of any other host. Figures stand beside it as SVG files and are
shown as images, in which no script runs.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perturbkit._version import __version__
from perturbkit.papers.records import PACKAGE, PaperRecord, method_source, words
from perturbkit.papers.runner import fingerprint, read_outcome

__all__ = ["write_gallery"]

_VERDICTS = {"holds": "holds", "fails": "does not hold", "error": "failed", "none": "not run"}


def write_gallery(records: Sequence[PaperRecord], out: Path) -> Path:
    """Write the site.

    Parameters
    ----------
    records : sequence of PaperRecord
        The papers, one card each.
    out : Path
        Folder of the site; results are read from ``out/results``.

    Returns
    -------
    Path
        The page, ``out/index.html``.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shown": shown, "asked": asked}
    cards = [_card(record, out) for record in records]
    counts = Counter(card["state"] for card in cards)
    page = environment.get_template("gallery.html").render(
        cards=cards,
        packages=sorted({record.package for record in records}),
        inputs=sorted({word for record in records for word in words(record.input)}),
        needs=sorted({word for record in records for word in words(record.needs)}),
        verdicts=[(state, text, counts[state]) for state, text in _VERDICTS.items()],
        version=__version__,
    )
    out.mkdir(parents=True, exist_ok=True)
    target = out / "index.html"
    unfinished = out / f".index.html.{os.getpid()}"
    unfinished.write_text(page, encoding="utf-8")
    unfinished.replace(target)
    return target


def shown(value: float | None) -> str:
    """Return a number with four significant digits.

    Examples
    --------
    >>> shown(0.123456), shown(120000.0), shown(3.0), shown(None)
    ('0.1235', '1.2e+05', '3', 'not finite')
    """
    return "not finite" if value is None else f"{value:.4g}"


def asked(row: dict[str, Any]) -> str:
    """Return what a comparison asks of the method's number, as an inequality.

    Examples
    --------
    >>> asked({"direction": "lower", "factor": 0.5, "margin": 0.0})
    '≤ 0.5 × baseline'
    >>> asked({"direction": "equal", "factor": 1.0, "margin": 0.1})
    '= baseline ± 0.1'
    """
    baseline = "baseline" if row["factor"] == 1 else f"{row['factor']:.4g} × baseline"
    sign, joined = {"higher": ("≥", "+"), "lower": ("≤", "-"), "equal": ("=", "±")}[row["direction"]]
    margin = row["margin"]
    if margin < 0:
        joined, margin = {"+": "-", "-": "+"}[joined], -margin
    return f"{sign} {baseline}" + (f" {joined.replace('-', '−')} {margin:.4g}" if margin else "")


def _card(record: PaperRecord, out: Path) -> dict[str, Any]:
    outcome = read_outcome(out, record.key)
    if record.problem is not None:
        state = "error"
    elif outcome is None:
        state = "none"
    else:
        state = "error" if outcome["error"] else "holds" if outcome["holds"] else "fails"
    source = method_source(record.method) if record.method else None
    figure = f"results/{record.key}.svg"
    return {
        "record": record,
        "state": state,
        "verdict": _VERDICTS[state],
        "error": record.problem or (outcome or {}).get("error"),
        "outcome": outcome,
        "stale": outcome is not None and outcome["fingerprint"] != fingerprint(record),
        "figure": figure
        if outcome is not None and outcome.get("figure") and (out / figure).exists()
        else None,
        "samples": _samples(outcome, record.key, out),
        "source": _pointer(source),
        "reproduction": _pointer(record.path),
        "needs": words(record.needs),
        "inputs": words(record.input),
    }


def _samples(outcome: dict[str, Any] | None, key: str, out: Path) -> list[dict[str, str]]:
    """Return the samples that a result names and that are there, with what to call them."""
    named = [n for n in (outcome or {}).get("samples", []) if re.fullmatch(r"[a-z0-9_-]+\.(png|wav)", str(n))]
    paths = [(n, f"results/{key}.{n}") for n in named]
    return [
        {"path": path, "kind": n[-3:], "name": n[:-4].replace("_", " ").replace("-", " ")}
        for n, path in paths
        if (out / path).exists()
    ]


def _pointer(path: Path | None) -> str | None:
    """Return a path from the package's folder on, so that the page does not name this machine's folders."""
    if path is None:
        return None
    return (
        str(path.relative_to(PACKAGE.parent))
        if path.is_relative_to(PACKAGE.parent)
        else f"{path.parent.name}/{path.name}"
    )
