"""What does the model look at? Two methods, and whether they agree better than chance."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from perturbkit.audit import _figures, attributions
from perturbkit.audit._intervals import bootstrap
from perturbkit.audit.context import Attributions, Context
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.2
NEEDS_MODEL = "explaining"
_SHOWN = 4


def evaluations(subject: Subject, request: AuditRequest) -> int:
    """Rows evaluated for one row of data."""
    return attributions.evaluations(subject)


def run(context: Context) -> Finding:
    """Attribute the planned rows and measure the agreement of the methods."""
    found = context.attributions
    methods = [m for m in found.maps if m != "random"]
    lengths = [len(c) for c in found.cells]
    pairs = {"control": (methods[0], "random")}
    if len(methods) == 2:
        pairs["agreement"] = (methods[0], methods[1])
    ranks = {name: _agreement(found.maps[a], found.maps[b], lengths) for name, (a, b) in pairs.items()}
    metrics: tuple[Metric, ...] = ()
    status = "ok"
    flat = [m for m in methods if bool((found.maps[m] == 0).all())]
    if len(flat) == len(methods):
        status, headline = (
            "weak",
            "Nothing matters to the model: removing any part leaves its answers as they are.",
        )
    elif all(np.isnan(r).all() for r in ranks.values()):
        headline = "There are fewer than three parts to an input, too few to compare two maps."
    elif "agreement" in ranks and np.isnan(ranks["agreement"]).all():
        status = "weak"
        headline = f"Two maps could not be compared on any row: by {' and '.join(flat) or 'one of them'} every part matters as little."
    elif "agreement" in ranks:
        control = float(np.nanmean(ranks["control"]))
        values = ranks["agreement"][~np.isnan(ranks["agreement"])]
        low, high = bootstrap(values, context.generator("agreement"))
        mean = float(values.mean()) if len(values) else math.nan
        metrics = (
            Metric("agreement", mean, low, high, len(values), "rank correlation of the maps", control),
        )
        status = "ok" if low is not None and low > max(control, 0.0) else "weak"
        headline = (
            f"Two methods agree on what matters: rank correlation {mean:.2f}, against {control:.2f} for a random map."
            if status == "ok"
            else f"Two methods do not clearly agree on what matters: rank correlation {mean:.2f}, "
            f"against {control:.2f} for a random map."
        )
    else:
        headline = (
            "One method explains this model, since no gradient reaches its inputs; nothing cross-checks it."
        )
    if len(flat) < len(methods):
        headline += _first(context, found)
    series, table = _details(context, found, methods)
    return Finding(
        "explain", status, headline, metrics, table, series,
        "Why the model answers so, or whether what it looks at is right. Agreement of two methods is no proof that "
        "either is faithful; see the next section."
        + (" What is explained is the answer itself, in its own units." if context.subject.regression else "")
        + context.subject.left_out("integrated gradients"),
        papers=tuple(found.papers.values()),
    )  # fmt: skip


def _first(context: Context, found: Attributions) -> str:
    """Name the part that matters most over all rows, and its share of all that matters."""
    if context.subject.task == "text":
        return ""
    shares = attributions.shares(found)
    first = int(shares.argmax())
    return f" First comes {attributions.part_name(found, first)}, with {float(shares[first]):.0%} of what matters."


def draw(finding: Finding) -> Figure:
    """Heat maps over the images, coloured words, or bars over columns."""
    series = finding.series
    if series["kind"] == "image":
        return _figures.heat_maps(series["pictures"], series["maps"], series["titles"], series["grid"])
    if series["kind"] == "text":
        return _figures.coloured_words(series["cells"], series["maps"], series["titles"])
    return _figures.grouped_bars(series["names"], series["means"])


def _agreement(a: Tensor, b: Tensor, lengths: list[int]) -> np.ndarray:
    found = []
    for left, right, n in zip(a.tolist(), b.tolist(), lengths, strict=True):
        constant = n < 3 or len(set(left[:n])) < 2 or len(set(right[:n])) < 2
        found.append(math.nan if constant else float(spearmanr(left[:n], right[:n]).statistic))
    return np.array(found)


def _details(context: Context, found: Attributions, methods: list[str]) -> tuple[dict[str, Any], Table]:
    subject = context.subject
    shown = range(min(_SHOWN, len(found.rows)))
    titles = (
        []
        if subject.regression
        else [
            f"{subject.classes[int(found.target[i])]} (row {int(subject.numbers[found.rows[i]])})"
            for i in shown
        ]
    )
    series: dict[str, Any] = {"kind": subject.task, "titles": titles}
    if subject.task == "tabular":
        means = {m: found.maps[m].abs().mean(0) for m in methods}
        order = torch.argsort(-means[methods[-1]])[:12].tolist()
        series |= {
            "names": [subject.feature_names[i] for i in order],
            "means": {m: [float(v[i]) for i in order] for m, v in means.items()},
        }
        rows = tuple((subject.feature_names[i], *(float(means[m][i]) for m in methods)) for i in order)
        return series, Table(("column", *(f"mean |{m}|" for m in methods)), rows)
    series["maps"] = {m: [found.maps[m][i].tolist() for i in shown] for m in methods}
    if subject.task == "image":
        assert subject.x is not None
        series["pictures"] = [_figures.encode_picture(subject.x[int(found.rows[i])]) for i in shown]
        series["grid"] = list(found.grid or ())
    else:
        series["cells"] = [found.cells[i] for i in shown]
    rows = tuple((titles[i], *(_strongest(found, m, i, subject.task) for m in methods)) for i in shown)
    return series, Table(("row", *(f"most important by {m}" for m in methods)), rows)


def _strongest(found: Attributions, method: str, i: int, task: str) -> str:
    values = found.maps[method][i][: len(found.cells[i])]
    best = int(values.argmax())
    if task == "text":
        return f"{found.cells[i][best]} ({float(values[best]):+.3f})"
    assert found.grid is not None
    row, column = divmod(best, found.grid[1])
    return f"cell {row + 1} down, {column + 1} across ({float(values[best]):+.3g})"
