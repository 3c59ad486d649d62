"""Sets that hold the right answer with a stated chance: their coverage and their size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from perturbkit.audit import _figures
from perturbkit.audit._intervals import share_interval
from perturbkit.audit.context import Context
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Subject
from perturbkit.uncertainty import SplitConformalClassifier

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
    """Histogram of set sizes, and coverage over the splits."""
    s = finding.series
    return _figures.set_sizes(s["sizes"], s["counts"], s["coverages"], s["alpha"])


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
