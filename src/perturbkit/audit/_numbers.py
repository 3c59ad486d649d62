"""What the sections share about regressions: errors of pairs of target and answer, and their drawings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from perturbkit.audit._figures import ACCENT, MUTED, SECOND, _axes, _tidy

# Statistics as the bootstrap wants them: pairs (target, answer) in the last dimension, rows reduced along ``axis``.


def root_mean_square(pairs: np.ndarray, axis: int = 0) -> Any:
    """Return the root mean squared error of pairs (target, answer), shape (..., n, 2)."""
    return np.sqrt(np.mean((pairs[..., 0] - pairs[..., 1]) ** 2, axis=axis))


def mean_absolute(pairs: np.ndarray, axis: int = 0) -> Any:
    """Return the mean absolute error."""
    return np.mean(np.abs(pairs[..., 0] - pairs[..., 1]), axis=axis)


def r_squared(pairs: np.ndarray, axis: int = 0) -> Any:
    """Return the share of the variance of the targets that the answers explain; 0 where the targets are all alike."""
    left = np.mean((pairs[..., 0] - pairs[..., 1]) ** 2, axis=axis)
    total = np.var(pairs[..., 0], axis=axis)
    return np.where(total > 0, 1 - left / np.where(total > 0, total, 1.0), 0.0)


def answers_against_targets(targets: Sequence[float], answers: Sequence[float]) -> Figure:
    """Answers against targets, with the diagonal."""
    figure, ax = _axes(4.6, 3.8)
    ends = [min(*targets, *answers), max(*targets, *answers)]
    ax.plot(ends, ends, color=MUTED, ls="--", lw=1)
    ax.scatter(targets, answers, s=9, color=ACCENT, alpha=0.6, linewidths=0)
    ax.set_xlabel("target")
    ax.set_ylabel("answer")
    return figure


def intervals(
    targets: Sequence[float], low: Sequence[float], high: Sequence[float], coverages: Sequence[float], alpha: float
) -> Figure:  # fmt: skip
    """Intervals in the order of their middles with the targets, and coverage over random splits."""
    figure = Figure(figsize=(7.2, 2.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    place = np.arange(len(targets))
    inside = (np.array(targets) >= low) & (np.array(targets) <= high)
    left.fill_between(place, low, high, color=ACCENT, alpha=0.25, linewidth=0, label="interval")
    left.scatter(place[inside], np.array(targets)[inside], s=8, color=ACCENT, label="target inside")
    left.scatter(place[~inside], np.array(targets)[~inside], s=12, color=SECOND, marker="x", label="outside")
    left.set_xlabel("rows, by answer")
    left.set_ylabel("target")
    left.legend(frameon=False, fontsize=7)
    right.hist(coverages, bins=10, color=ACCENT, alpha=0.8)
    right.axvline(1 - alpha, color=SECOND, ls="--", lw=1, label=f"asked: {1 - alpha:.2f}")
    right.set_xlabel("coverage over random splits")
    right.set_ylabel("splits")
    right.legend(frameon=False, fontsize=7)
    for ax in (left, right):
        _tidy(ax)
    return figure


def error_by_damage(
    kinds: Sequence[str],
    severities: Sequence[int],
    errors: Sequence[Sequence[float]],
    clean: float,
    mean: float,
) -> Figure:
    """Root mean squared error against severity, one line a kind, with the clean error and that of the mean."""
    figure, ax = _axes(6.4, 3.2)
    for i, (kind, line) in enumerate(zip(kinds, errors, strict=True)):
        ax.plot(severities, line, marker="o", ms=3.5, label=kind, color=f"C{i}")
    ax.axhline(clean, color=MUTED, lw=1, label="no damage")
    ax.axhline(mean, color=SECOND, ls="--", lw=1, label="answering the mean")
    ax.set_xticks(list(severities))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("severity")
    ax.set_ylabel("root mean squared error")
    ax.legend(frameon=False, fontsize=7, ncols=2)
    return figure
