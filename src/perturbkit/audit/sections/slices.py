"""Parts of the data on which the model is worse than on the rest, beyond noise: groups, classes, ranges of a column."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import fisher_exact, mannwhitneyu

from perturbkit.audit import _figures
from perturbkit.audit._intervals import median_interval, share_interval
from perturbkit.audit.context import Context
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Subject
from perturbkit.uncertainty import SplitConformalClassifier, SplitConformalRegressor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.0
NEEDS_MODEL = ""
AFTER = ("attack",)
LEVEL = 0.05
# A slice with fewer rows, or a rest with fewer, is not compared.
LEAST = 8
_MOST_VALUES, _SHOWN = 20, 15


@dataclass(frozen=True)
class _Compared:
    """One slice and one quantity: values on the slice and on the rest, and the chance of a gap this large without a cause."""

    slice: str
    quantity: str
    rows: int
    inside: float
    outside: float
    low: float
    high: float
    p: float


def evaluations(subject: Subject, request: AuditRequest) -> int:
    """Rows evaluated for one row of data: none, the scores are known."""
    return 0


def refusal(subject: Subject, request: AuditRequest) -> str:
    """Why the section cannot run, empty if it can."""
    if subject.n < 2 * LEAST:
        return f"{subject.n} rows are given; allowed: at least {2 * LEAST}, {LEAST} in a slice and as many outside. Add rows."
    return ""


def run(context: Context) -> Finding:
    """Compare every slice with the rest, and correct for how many were compared."""
    subject = context.subject
    quantities = _quantities(context)
    slices = [
        (name, inside) for name, inside in _slices(context) if LEAST <= inside.sum() <= subject.n - LEAST
    ]
    pairs = [
        (name, inside, quantity, values)
        for name, inside in slices
        for quantity, values in quantities.items()
        if _enough(values, inside)
    ]
    if not pairs:
        why = f"no group, class or range has {LEAST} rows, with {LEAST} outside it. Add rows with --n, or name a column with --groups."
        return Finding("slices", "not run", "No slice is large enough.", why=why)
    compared = [_compare(*pair, len(pairs)) for pair in pairs]
    corrected = _holm([c.p for c in compared])
    order = sorted(range(len(compared)), key=lambda i: (corrected[i], compared[i].p))
    # Both must say so: a test without assumptions, and an interval that holds with all the others.
    worse = [i for i in order if corrected[i] < LEVEL and compared[i].high < 0]
    table = tuple(
        (c.slice, c.quantity, c.rows, round(c.inside, 4), round(c.outside, 4), f"[{_end(c.low)}, {_end(c.high)}]",
         round(corrected[i], 4), "worse" if i in worse else "")
        for i, c in ((i, compared[i]) for i in order[:_SHOWN])
    )  # fmt: skip
    # Rows near the edge of two classes bear less by nature: a radius alone weighs where a group or class has it.
    grave = [
        i
        for i in worse
        if not compared[i].quantity.endswith("radius")
        or compared[i].slice.startswith(("group is ", "label is "))
    ]
    if worse:
        c = compared[(grave or worse)[0]]
        places = f"{len({compared[i].slice for i in grave or worse})} of {len(slices)} slices"
        told = (
            (
                f"On {places} the model is worse than on the rest beyond noise"
                if grave
                else f"The model is as right everywhere as chance explains; its radius is smaller than elsewhere on {places}"
            )
            + f", first of all where {c.slice}: {c.quantity} {c.inside:.3g} against {c.outside:.3g} ({c.rows} rows)."
        )
    else:
        told = f"On none of {len(slices)} slices is the model worse than on the rest beyond what chance explains in {len(compared)} comparisons."
    metrics = (
        Metric("worse", float(len(worse)), *_worse_between(len(worse), compared), len(compared), f"comparisons with a corrected p below {LEVEL:g} (Holm) and an interval below 0", 0.0),
        Metric("p.least", min(corrected), None, None, len(compared), "smallest p, corrected for all comparisons"),
    )  # fmt: skip
    most = metrics[0].high or 0.0
    covered = "coverage of sets" in quantities
    shown = [compared[i] for i in order[:10]]
    return Finding(
        "slices", "weak" if grave else "ok", told, metrics,
        Table(("slice", "quantity", "rows", "here", "elsewhere", "difference, interval", "p, corrected", ""), table),
        {
            "names": [f"{c.slice}: {c.quantity}" for c in shown], "low": [c.low for c in shown], "high": [c.high for c in shown],
            "difference": [c.inside - c.outside for c in shown], "worse": [i in worse for i in order[:10]],
            "references": ["holm", "conformal_intervals"] if covered and subject.regression else ["holm"],
        },
        f"That the others are as good: on few rows only large gaps stand out, and slices of two columns at once were not tried. "
        f"A slice may be harder rather than the model worse. Intervals hold together for all {len(compared)} comparisons at 95 %: the "
        f"model is truly worse, by however little, in {len(worse)} of them or more, and not in more than {most:.0f}.",
        papers=("split_conformal",) if covered and not subject.regression else (),
    )  # fmt: skip


def draw(finding: Finding) -> Figure:
    """The difference of each slice from the rest, with its interval."""
    s = finding.series
    return _figures.differences(s["names"], s["difference"], s["low"], s["high"], s["worse"])


def _quantities(context: Context) -> dict[str, np.ndarray]:
    """Return what is compared, one value a row: larger is better, NaN where it was not measured."""
    subject = context.subject
    y = subject.y.numpy()
    if subject.regression:
        answers = np.nan_to_num(subject.predictions().double().numpy(), nan=float(y.mean()))
        found = {"error, negative": -np.abs(answers - y)}
    else:
        found = {"accuracy": (subject.predictions().numpy() == y).astype(float)}
    covered = _covered(context)
    if covered is not None:
        found["coverage of sets"] = covered
    attack = context.findings.get("attack")
    if attack is not None and "rows" in attack.series and not attack.why:
        radius = np.full(subject.n, np.nan)
        radius[attack.series["rows"]] = attack.series["radius"]
        found["radius"] = np.where(radius > 0, radius, np.nan)  # rows that are wrong already tell of accuracy
    return found


def _covered(context: Context) -> np.ndarray | None:
    """Return whether each row is in its set, each half calibrated on the other; nothing where there are too few rows."""
    subject, alpha = context.subject, context.request.alpha
    if subject.n < 2 * int(np.ceil(1 / alpha)):
        return None
    first = np.zeros(subject.n, dtype=bool)
    rng = np.random.default_rng(context.generator("halves").initial_seed())
    first[rng.permutation(subject.n)[: subject.n // 2]] = True
    covered, y = np.zeros(subject.n), subject.y.double().numpy()
    for half in (first, ~first):
        if subject.regression:
            answers = subject.predictions().numpy()
            low, high = (
                SplitConformalRegressor(alpha=alpha)
                .fit(answers[half], y[half])
                .predict_interval(answers[~half])
                .T
            )
            covered[~half] = (y[~half] >= low) & (y[~half] <= high)
            continue
        p, labels = subject.probabilities(), subject.y.numpy()
        fitted = SplitConformalClassifier(alpha=alpha, generator=int(rng.integers(2**31))).fit(
            p[half], labels[half]
        )
        sets = fitted.predict_set(p[~half])
        covered[~half] = sets[np.arange(len(sets)), labels[~half]]
    return covered


def _slices(context: Context) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the rows of every slice: groups, classes, and ranges or categories of columns."""
    subject = context.subject
    if subject.groups:
        groups = np.array(subject.groups)
        for name in sorted(set(subject.groups)):
            yield f"group is {name}", groups == name
    if subject.regression:
        yield from _ranges("target", subject.y.double().numpy())
    else:
        labels = subject.y.numpy()
        for c in np.unique(labels).tolist():
            yield f"label is {subject.classes[c]}", labels == c
    names = _values(subject)
    for name, values in _features(subject):
        if np.isnan(values).any():
            yield f"{name} is missing", np.isnan(values)
        found = np.unique(values[~np.isnan(values)])
        if len(found) <= 2 or name in names:
            for v in found.tolist() if len(found) <= _MOST_VALUES else []:
                yield f"{name} is {names[name][int(v)] if name in names else f'{v:g}'}", values == v
        else:
            yield from _ranges(name, values)


def _features(subject: Subject) -> Iterator[tuple[str, np.ndarray]]:
    if subject.task == "text":
        yield "number of words", np.array([len(t.split()) for t in subject.texts], dtype=float)
    elif subject.x is not None and subject.task == "image":
        yield "brightness", subject.x.double().mean((1, 2, 3)).numpy()
        yield "contrast", subject.x.double().flatten(1).std(1).numpy()
    elif subject.x is not None:
        yield from zip(subject.feature_names, subject.x.double().numpy().T, strict=True)


def _values(subject: Subject) -> dict[str, list[str]]:
    """Return the values of each column of categories as text, in the order of their numbers."""
    return {
        subject.feature_names[place]: ["missing" if gone else str(v) for v, gone in zip(values, values.isna(), strict=True)]
        for place, values in subject.legal.items()
    }  # fmt: skip


def _ranges(name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the lowest and highest quarter and the middle half."""
    low, high = np.quantile(values[~np.isnan(values)], (0.25, 0.75))
    if not low < high:
        return
    yield f"{name} below {low:.3g}", values < low
    yield f"{name} from {low:.3g} to {high:.3g}", (values >= low) & (values <= high)
    yield f"{name} above {high:.3g}", values > high


def _enough(values: np.ndarray, inside: np.ndarray) -> bool:
    known = ~np.isnan(values)
    return bool((inside & known).sum() >= LEAST and (~inside & known).sum() >= LEAST)


def _compare(name: str, inside: np.ndarray, quantity: str, values: np.ndarray, among: int) -> _Compared:
    known = ~np.isnan(values)
    a, b = values[inside & known], values[~inside & known]
    if set(np.unique(np.concatenate([a, b]))) <= {0.0, 1.0}:
        table = [[int(a.sum()), int(len(a) - a.sum())], [int(b.sum()), int(len(b) - b.sum())]]
        p = float(fisher_exact(table, alternative="less").pvalue)
        ends = share_interval(a, among=among), share_interval(b, among=among)
        low, high = _difference(float(a.mean()), float(b.mean()), *ends)
        return _Compared(name, quantity, len(a), float(a.mean()), float(b.mean()), low, high, p)
    p = (
        float(mannwhitneyu(a, b, alternative="less").pvalue)
        if len(np.unique(np.concatenate([a, b]))) > 1
        else 1.0
    )
    # A radius beyond reach is larger than all others, which a median bears.
    top = 2 * float(np.max(np.concatenate([a, b])[np.isfinite(np.concatenate([a, b]))], initial=0.0))
    least = 0.0 if quantity == "radius" else -np.inf
    x, y = np.minimum(a, top), np.minimum(b, top)
    middle = float(np.median(x)), float(np.median(y))
    ends = median_interval(x, among=among, least=least), median_interval(y, among=among, least=least)
    return _Compared(name, f"median {quantity}", len(a), *middle, *_difference(*middle, *ends), p)


def _worse_between(found: int, compared: list[_Compared]) -> tuple[float, float]:
    """Return the 95 % interval of the number of comparisons in which the model is truly worse, by however little.

    All intervals of differences hold together at 95 %. Then whatever is below zero as a whole is truly worse, and ``found``
    counts no other; and nothing that is zero or above as a whole can be worse, so that all the others are the most.
    """
    return float(found), float(sum(c.low < 0 for c in compared))


def _difference(
    a: float, b: float, around_a: tuple[float, float], around_b: tuple[float, float]
) -> tuple[float, float]:
    """Return the interval of a - b from those of a and b (Newcombe, 1998): independent errors add as squares."""
    low = math.hypot(a - around_a[0], around_b[1] - b)
    return a - b - low, a - b + math.hypot(around_a[1] - a, b - around_b[0])


def _end(value: float) -> str:
    return f"{value:+.3g}" if np.isfinite(value) else "open"


def _holm(p: list[float]) -> list[float]:
    """Return p values corrected for their number (Holm, 1979)."""
    order, running, corrected = np.argsort(p), 0.0, [1.0] * len(p)
    for rank, i in enumerate(order.tolist()):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = running
    return corrected
