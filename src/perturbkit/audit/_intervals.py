"""The two intervals that the sections state, as pairs of floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from perturbkit.core.statistics import bootstrap_interval, clopper_pearson


def share_interval(hits: Any, *, among: int = 1) -> tuple[float, float]:
    """Return the exact 95 % interval of the share of true values, for all of ``among`` intervals together."""
    flags = np.asarray(hits, dtype=bool)
    found = clopper_pearson(int(flags.sum()), len(flags), 1 - 0.05 / among)
    return float(found.low), float(found.high)


def median_interval(values: Any, *, among: int = 1, least: float = 0.0) -> tuple[float, float]:
    """Return the distribution-free 95 % interval of the median between order statistics, for ``among`` intervals together.

    Below six rows no pair of order statistics covers it, so the interval is everything from ``least`` on.
    """
    from scipy.stats import binom

    ordered, n = np.sort(np.asarray(values, dtype=float)), len(values)
    k = int(binom.ppf(0.025 / among, n, 0.5))
    if k < 1:
        return least, float("inf")
    return float(ordered[k - 1]), float(ordered[n - k])


def bootstrap(
    values: Any, generator: torch.Generator, statistic: Callable[..., Any] = np.mean
) -> tuple[float | None, float | None]:
    """Return the 95 % bootstrap interval of a statistic over rows; nothing for fewer than two rows."""
    data = np.asarray(values, dtype=float)
    if len(data) < 2:
        return None, None
    if np.ptp(data) == 0:
        return float(data[0]), float(data[0])
    method = "bca" if statistic is np.mean else "percentile"
    found = bootstrap_interval(data, statistic, method=method, generator=generator)  # type: ignore[arg-type]
    return float(found.low), float(found.high)
