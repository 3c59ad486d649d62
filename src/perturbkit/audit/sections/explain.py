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
from perturbkit.audit.subject import Derived, Subject
from perturbkit.explain import DefaultRemoval, Prediction, RemovalExplainer, Shapley, occlusion

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
    elif max(lengths) < 3:
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


def attribute_present(context: Context) -> Attributions:
    """Explain rows of a table of which some cells are missing: these stay so, and the others are explained around them.

    A missing cell has no part in an answer that removing it could show, so its attribution is zero.
    """
    subject = context.subject
    rows = context.correct_rows(context.rows["explain"])
    done, maps = context.chunks(
        "explain", rows, lambda part, generator: _present_maps(context, part, generator), evaluations(subject, context.request)
    )  # fmt: skip
    shape = (len(rows), len(subject.feature_names))
    maps["random"] = torch.rand(shape, generator=context.generator("random map"), dtype=torch.float64)[done]
    rows = rows[done]
    assert subject.x is not None
    x, baseline = subject.x[rows], _baseline(subject)

    def keep(i: int, kept: Tensor) -> Tensor:
        return torch.where(kept | torch.isnan(x[i]), x[i], baseline)

    target = torch.zeros_like(rows) if subject.regression else subject.predictions()[rows]
    papers = {"Shapley sampling": "removal_framework", "occlusion": "occlusion"}
    return Attributions(rows, target, maps, [list(subject.feature_names)] * len(rows), keep, None, papers)


def draw(finding: Finding) -> Figure:
    """Heat maps over the images, coloured words, or bars over columns."""
    series = finding.series
    if series["kind"] == "image":
        return _figures.heat_maps(series["pictures"], series["maps"], series["titles"], series["grid"])
    if series["kind"] == "text":
        return _figures.coloured_words(series["cells"], series["maps"], series["titles"])
    return _figures.grouped_bars(series["names"], series["means"])


def _present_maps(context: Context, rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Explain rows that miss the same cells together, as inputs of the cells that are there."""
    subject = context.subject
    assert subject.x is not None
    x, baseline = subject.x[rows], _baseline(subject)
    target = torch.zeros_like(rows) if subject.regression else subject.predictions()[rows]
    maps = {m: torch.zeros(x.shape, dtype=torch.float64) for m in ("Shapley sampling", "occlusion")}
    patterns, which = (~torch.isnan(x)).unique(dim=0, return_inverse=True)
    for number, there in enumerate(patterns):
        if not bool(there.any()):
            continue
        same, columns = (which == number).nonzero()[:, 0], there.nonzero()[:, 0]
        oracle, cells, blank = _around_missing(subject, columns), x[same][:, columns], baseline[columns]
        explainer = RemovalExplainer(
            DefaultRemoval(blank), Prediction(), Shapley(attributions.SHAPLEY_ORDERS)
        )
        sampled = explainer.attribute(oracle, cells, target[same], generator=generator)
        removed = occlusion(oracle, cells, target[same], window=1, baseline=blank.expand_as(cells))
        where = same[:, None], columns[None]
        maps["Shapley sampling"][where] = sampled.values.double()
        maps["occlusion"][where] = removed.values.double()
    return maps


def _around_missing(subject: Subject, columns: Tensor) -> Derived:
    """Return the model as a function of some columns, all others missing."""
    assert subject.oracle is not None
    assert subject.x is not None
    point, width = subject.point, subject.x.shape[1]

    def insert(z: Tensor) -> Tensor:
        whole = z.new_full((len(z), width), torch.nan)
        whole[:, columns] = z
        return whole

    return Derived(
        subject.oracle, before=insert, after=None if point is None else lambda out, _: out @ point.to(out)[:, None]
    )  # fmt: skip


def _baseline(subject: Subject) -> Tensor:
    """Return what stands for "taken away": the mean of what is there in a column; of categories the commonest."""
    assert subject.x is not None
    commonest = subject.x.mode(0).values
    return torch.where(subject.held, commonest, subject.means()) if len(subject.held) else subject.means()


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
