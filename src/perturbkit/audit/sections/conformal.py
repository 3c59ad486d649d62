"""Sets, or intervals, that hold the right answer with a stated chance: their coverage and their size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import norm

from perturbkit.audit import _figures
from perturbkit.audit._intervals import share_interval
from perturbkit.audit._numbers import intervals
from perturbkit.audit.context import Context
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Subject
from perturbkit.uncertainty import SplitConformalClassifier, SplitConformalRegressor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.0
NEEDS_MODEL = ""
SPLITS = 20
# Groups with fewer rows say nothing of their coverage.
LEAST = 10


def refusal(subject: Subject, request: AuditRequest) -> str:
    """Why the section cannot run, empty if it can."""
    needed = 2 * int(np.ceil(1 / request.alpha - 1)) + 2
    if subject.n < needed:
        return (
            f"{subject.n} rows are given; allowed: at least {needed} for alpha {request.alpha:g}, half to calibrate and "
            "half to test. Add rows or raise --alpha."
        )
    return ""


def evaluations(subject: Subject, request: AuditRequest) -> int:
    """Rows evaluated for one row of data."""
    return 0


def run(context: Context) -> Finding:
    """Calibrate adaptive sets on one half and test them on the other, over several splits."""
    if context.subject.regression:
        return _numbers(context)
    subject, alpha = context.subject, context.request.alpha
    p, y = subject.probabilities(), subject.y.numpy()
    rng = np.random.default_rng(context.generator("splits").initial_seed())
    coverages, sizes, control, first = [], [], [], None
    for _ in range(SPLITS):
        calibrate, test = _split(subject, rng)
        minimum = int(np.ceil(1 / alpha - 1))
        if calibrate.sum() < minimum or not test.any():
            continue
        seed = int(rng.integers(2**31))
        sets = (
            SplitConformalClassifier(alpha=alpha, generator=seed)
            .fit(p[calibrate], y[calibrate])
            .predict_set(p[test])
        )
        covered = sets[np.arange(len(sets)), y[test]]
        coverages.append(covered.mean())
        sizes.append(sets.sum(1))
        control.append(_naive_coverage(p[test], y[test], alpha))
        if first is None:
            first = (
                covered,
                sets.sum(1),
                y[test],
                [subject.groups[i] for i in np.flatnonzero(test)] if subject.groups else [],
            )
    if first is None:
        return Finding(
            "conformal",
            "not run",
            "Too few rows.",
            why="groups leave too few rows on one side of the split. Add rows.",
        )
    covered, size, labels, groups = first
    k, n = int(covered.sum()), len(covered)
    low, high = share_interval(covered)
    mean = float(np.mean(coverages))
    metrics = (
        Metric("coverage", k / n, low, high, n, "adaptive sets, one split", float(np.mean(control))),
        Metric("coverage.mean", mean, None, None, SPLITS, f"mean over {len(coverages)} splits"),
        Metric("size.mean", float(np.mean([s.mean() for s in sizes])), None, None, n, "labels in a set"),
    )
    counts = np.bincount(size, minlength=2)
    by = groups if groups else [subject.classes[c] for c in labels]
    by_group = _by_group(covered, by)
    short = [name for name, rows, _, _, top in by_group if rows >= LEAST and top < 1 - alpha]
    table = tuple((g, rows, round(c, 3), f"[{a:.2f}, {b:.2f}]") for g, rows, c, a, b in by_group[:20])
    return Finding(
        "conformal", "weak" if short else "ok",
        f"Sets of {np.mean([s.mean() for s in sizes]):.1f} labels in the mean hold the right one in {mean:.0%} of the "
        f"rows (asked: {1 - alpha:.0%}); naive sets that trust the probabilities hold it in {np.mean(control):.0%}."
        + (f" The guarantee does not reach {', '.join(short[:3])}." if short else ""),
        metrics, Table(("group" if groups else "class", "rows", "coverage", "95 % interval"), table),
        {"sizes": list(range(len(counts))), "counts": counts.tolist(), "coverages": [float(c) for c in coverages], "alpha": alpha},
        "Coverage within a group or for one input: the guarantee is for the mean over rows like these, and ends when "
        "the data drift.",
        papers=("split_conformal",),
    )  # fmt: skip


def draw(finding: Finding) -> Figure:
    """Histogram of set sizes, or the intervals, and coverage over the splits."""
    s = finding.series
    if "targets" in s:
        return intervals(s["targets"], s["low"], s["high"], s["coverages"], s["alpha"])
    return _figures.set_sizes(s["sizes"], s["counts"], s["coverages"], s["alpha"])


def _numbers(context: Context) -> Finding:
    """Calibrate intervals around the answers, or the model's own quantiles, on one half and test them on the other."""
    subject, alpha = context.subject, context.request.alpha
    scores, y, answers = (
        subject.scores().double().numpy(),
        subject.y.double().numpy(),
        subject.predictions().numpy(),
    )
    quantiles = scores.shape[1] > 1
    p = np.sort(scores, 1)[:, [0, -1]] if quantiles else answers
    rng = np.random.default_rng(context.generator("splits").initial_seed())
    coverages, widths, control, first = [], [], [], None
    for _ in range(SPLITS):
        calibrate, test = _split(subject, rng)
        fitted = SplitConformalRegressor(alpha=alpha, score="quantile" if quantiles else "absolute").fit(
            p[calibrate], y[calibrate]
        )
        low, high = fitted.predict_interval(p[test]).T
        covered = (y[test] >= low) & (y[test] <= high)
        coverages.append(float(covered.mean()))
        widths.append(float((high - low).mean()))
        control.append(_naive_interval(p, y, calibrate, test, alpha))
        if first is None:
            first = covered, low, high, test
    assert first is not None
    covered, low, high, test = first
    k, n = int(covered.sum()), len(covered)
    share_low, share_high = share_interval(covered)
    mean, width = float(np.mean(coverages)), float(np.mean(widths))
    how = "conformalised quantiles" if quantiles else "absolute residuals"
    metrics = (
        Metric("coverage", k / n, share_low, share_high, n, f"{how}, one split", float(np.mean(control))),
        Metric("coverage.mean", mean, None, None, SPLITS, f"mean over {SPLITS} splits"),
        Metric("width.mean", width, None, None, n, f"length of an interval; the targets deviate by {y.std():.3g}"),
    )  # fmt: skip
    by = [subject.groups[i] for i in np.flatnonzero(test)] if subject.groups else _quarters(answers[test])
    by_group = _by_group(covered, by)
    short = [name for name, rows, _, _, top in by_group if rows >= LEAST and top < 1 - alpha]
    table = tuple((g, rows, round(c, 3), f"[{a:.2f}, {b:.2f}]") for g, rows, c, a, b in by_group[:20])
    shown = np.argsort((low + high) / 2)[:: max(1, -(-n // 200))]
    naive = (
        "the model's own quantiles hold" if quantiles else "intervals that take the errors for normal hold"
    )
    return Finding(
        "conformal", "weak" if short else "ok",
        f"Intervals of length {width:.3g} in the mean hold the target in {mean:.0%} of the rows (asked: {1 - alpha:.0%}); "
        f"{naive} it in {np.mean(control):.0%}."
        + (f" The guarantee does not reach {', '.join(short[:3])}." if short else ""),
        metrics, Table(("group" if subject.groups else "answers", "rows", "coverage", "95 % interval"), table),
        {"targets": y[test][shown].tolist(), "low": low[shown].tolist(), "high": high[shown].tolist(),
         "coverages": coverages, "alpha": alpha, "references": ["conformal_intervals"]},
        "Coverage within a group or for one input: the guarantee is for the mean over rows like these, and ends when "
        "the data drift." + ("" if quantiles else " Every interval is as long, also where the model errs more: a model "
        "of quantiles would adapt them."),
        papers=(),
    )  # fmt: skip


def _naive_interval(
    p: np.ndarray, y: np.ndarray, calibrate: np.ndarray, test: np.ndarray, alpha: float
) -> float:
    """Coverage without calibration: of the quantiles as they are, or of normal errors of the deviation seen."""
    if p.ndim == 2:
        return float(((y[test] >= p[test, 0]) & (y[test] <= p[test, 1])).mean())
    reach = norm.ppf(1 - alpha / 2) * np.std(y[calibrate] - p[calibrate])
    return float((np.abs(y[test] - p[test]) <= reach).mean())


def _quarters(answers: np.ndarray) -> list[str]:
    """Name the quarter that each answer falls in, from low to high."""
    names = ("lowest quarter", "second quarter", "third quarter", "highest quarter")
    edges = np.quantile(answers, (0.25, 0.5, 0.75))
    return [names[i] for i in np.searchsorted(edges, answers)]


def _split(subject: Subject, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a random half of the rows and the rest.

    Rows are split one by one even where they have groups: the guarantee needs calibration and test rows to be
    exchangeable, which whole groups on one side are not.
    """
    order = rng.permutation(subject.n)
    first = np.zeros(subject.n, dtype=bool)
    first[order[: (subject.n + 1) // 2]] = True
    return first, ~first


def _naive_coverage(p: np.ndarray, y: np.ndarray, alpha: float) -> float:
    """Coverage of the smallest sets whose probabilities add up to 1 - alpha, without calibration."""
    order = np.argsort(-p, axis=1)
    before = np.cumsum(np.take_along_axis(p, order, 1), 1) - np.take_along_axis(p, order, 1)
    sets = np.zeros(p.shape, dtype=bool)
    np.put_along_axis(sets, order, before < 1 - alpha, 1)
    return float(sets[np.arange(len(y)), y].mean())


def _by_group(covered: np.ndarray, by: list[str]) -> list[tuple[str, int, float, float, float]]:
    """Return name, rows, coverage and its interval of every group, the worst first."""
    found = []
    for name in sorted(set(by)):
        inside = covered[[b == name for b in by]]
        found.append((name, len(inside), float(inside.mean()), *share_interval(inside, among=len(set(by)))))
    return sorted(found, key=lambda row: row[2])
