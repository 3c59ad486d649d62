"""What the conformal predictors share: predictions of any estimator, categories of rows, and thresholds by category."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from perturbkit.core import Oracle, Result, checks
from perturbkit.core.random import randn
from perturbkit.core.statistics import conformal_quantile

NOT_FITTED = "this %(name)s is not fitted; allowed: a predictor whose fit was called. Call fit with calibration data first."


def probabilities(estimator: Any, x: Any) -> np.ndarray:
    """Return class probabilities of shape (n, K): given (no estimator), by predict_proba, or softmax of logits."""
    if estimator is None:
        return checks.probabilities("X", x)
    if hasattr(estimator, "predict_proba"):
        return checks.probabilities("the estimator's predict_proba", estimator.predict_proba(x))
    if isinstance(estimator, nn.Module | Oracle):
        logits = Oracle.wrap(estimator)(checks.tensor("X", x))
        return checks.probabilities("softmax of the model's logits", logits.double().softmax(1))
    raise _not_an_estimator(estimator, "predict_proba")


def predictions(estimator: Any, x: Any, columns: int) -> np.ndarray:
    """Return predictions of shape (n,), or (n, columns) for more than one: given, by predict, or by a module."""
    name = "X"
    if estimator is not None:
        name = "the estimator's prediction"
        if hasattr(estimator, "predict"):
            x = estimator.predict(x)
        elif isinstance(estimator, nn.Module | Oracle):
            x = Oracle.wrap(estimator)(checks.tensor("X", x))
        else:
            raise _not_an_estimator(estimator, "predict")
    found = checks.array(name, x, ndim=(1, 2))
    if columns == 1 and found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    return checks.array(name, found, shape=(None,) if columns == 1 else (None, columns))


def _not_an_estimator(estimator: Any, method: str) -> checks.ArgumentTypeError:
    return checks.ArgumentTypeError(
        f"estimator is a {type(estimator).__name__}; allowed: a fitted estimator with {method}, an nn.Module, an "
        "Oracle, or None for predictions as X. Wrap your model, or pass its predictions."
    )


def adaptive_scores(p: np.ndarray, share: np.ndarray, penalty: float = 0.0, k_reg: int = 0) -> np.ndarray:
    """Return the probability above each label plus a share of its own, and a penalty a rank beyond ``k_reg``.

    ``p`` has shape (..., K), ``share`` one that broadcasts to it.
    """
    order = np.argsort(-p, axis=-1, kind="stable")
    ranked = np.take_along_axis(p, order, -1)
    score = np.cumsum(ranked, -1) - (1 - share) * ranked
    if penalty:
        score += penalty * np.maximum(np.arange(1, p.shape[-1] + 1) - k_reg, 0)
    out = np.empty_like(score)
    np.put_along_axis(out, order, score, -1)
    return out


def cross_entropy(p: np.ndarray) -> np.ndarray:
    """Return -log p, finite where p underflowed."""
    return -np.log(np.maximum(p, np.finfo(np.float32).tiny))


def pinball(residual: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Return the pinball loss of y less the predicted quantile."""
    return np.maximum(level * residual, (level - 1) * residual)


def mlp(
    sizes: Sequence[int],
    generator: torch.Generator,
    *,
    activation: type[nn.Module] = nn.ReLU,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Return a network of linear layers with an activation between them, drawn from the generator."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        linear = torch.nn.utils.skip_init(nn.Linear, a, b, dtype=dtype)
        linear.weight.data = randn((b, a), generator=generator, dtype=dtype) * math.sqrt(2 / a)
        linear.bias.data = torch.zeros(b, dtype=dtype)
        layers += [linear] + ([activation()] if i < len(sizes) - 2 else [])
    return nn.Sequential(*layers)


def minimum_size(alpha: float) -> int:
    """Return the fewest calibration rows with a finite threshold at that level."""
    return max(1, math.ceil(1 / alpha - 1 - 1e-9))


def group_index(groups: Any, n: int, known: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the index of each row's group and the groups' names; without groups all rows are in one.

    ``known`` are the names seen in calibration; a new name is refused.
    """
    if groups is None:
        return np.zeros(n, dtype=np.int64), None
    if isinstance(groups, torch.Tensor):
        groups = groups.detach().cpu().numpy()
    given = np.asarray(groups)
    if given.shape != (n,):
        raise checks.ArgumentError(
            f"groups has shape {given.shape}; allowed: one group a row, shape ({n},). Pass one name a row."
        )
    names = np.unique(given) if known is None else known
    new = np.setdiff1d(given, names)
    if len(new):
        raise checks.ArgumentError(
            f"groups holds {new[0]}; allowed: the groups of the calibration data, {', '.join(map(str, names))}. "
            "Calibrate with rows of that group, or merge it into another."
        )
    return np.searchsorted(names, given), names


def fitted_groups(groups: Any, n: int, known: np.ndarray | None) -> np.ndarray:
    """Return the index of each row's group among those of calibration; groups come with both or with neither."""
    if (groups is None) != (known is None):
        given, then = ("no groups", "with") if groups is None else ("groups", "without")
        raise checks.ArgumentError(
            f"{given} given, but fit was called {then} them; allowed: groups in both or in neither. "
            "Pass groups to both calls, or to neither."
        )
    return group_index(groups, n, known)[0]


@dataclass(frozen=True, eq=False)
class IntervalUnion(Result):
    """A union of intervals for each row.

    Attributes
    ----------
    low, high : ndarray, shape (n, pieces)
        Ends of the pieces, which share at most end points; NaN for pieces that a row does not have.
    """

    low: np.ndarray
    high: np.ndarray

    def contains(self, y: Any) -> np.ndarray:
        """Return whether each row's y is in its union, ends included, shape (n,)."""
        value = checks.array("y", y, shape=(len(self.low),))[:, None]
        return np.asarray(((self.low <= value) & (value <= self.high)).any(1))

    @property
    def length(self) -> np.ndarray:
        """Total length, shape (n,)."""
        return np.nansum(self.high - self.low, axis=1)

    def pieces(self, row: int) -> list[tuple[float, float]]:
        """Return a row's intervals in order, those that touch joined."""
        joined: list[tuple[float, float]] = []
        for low, high in sorted(zip(self.low[row].tolist(), self.high[row].tolist(), strict=True)):
            if joined and low <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(high, joined[-1][1])
            elif low <= high:
                joined.append((low, high))
        return joined

    @property
    def hull(self) -> np.ndarray:
        """Smallest interval around each union, shape (n, 2); NaN where it is empty."""
        low = np.where(np.isnan(self.low), np.inf, self.low).min(1)
        high = np.where(np.isnan(self.high), -np.inf, self.high).max(1)
        empty = low > high
        return np.stack([np.where(empty, np.nan, low), np.where(empty, np.nan, high)], 1)


class Thresholds:
    """Calibration scores by category, their thresholds, and the p-values of new scores."""

    def __init__(self, scores: np.ndarray, category: np.ndarray, names: list[str], alpha: float) -> None:
        self.sorted = [np.sort(scores[category == c]) for c in range(len(names))]
        need = minimum_size(alpha)
        for name, own in zip(names, self.sorted, strict=True):
            if len(own) < need:
                raise checks.ArgumentError(
                    f"{len(own)} calibration rows {name}; allowed: at least {need} for alpha {alpha:g}, since fewer "
                    "give only the trivial set. Add calibration rows, raise alpha, or merge categories."
                )
        self.values = np.array([conformal_quantile(own, alpha) for own in self.sorted])

    def p_values(self, scores: np.ndarray, category: np.ndarray) -> np.ndarray:
        """Return (1 + number of calibration scores at least as large) / (n + 1), within the category."""
        p = np.empty(scores.shape)
        for c, own in enumerate(self.sorted):
            here = category == c
            p[here] = (1 + len(own) - np.searchsorted(own, scores[here], side="left")) / (len(own) + 1)
        return p


def lowest_lines(slope: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the interval of y on which each line, ``slope y + offset`` of shape (rows, M), is the lowest.

    Of equal lines the first has it; a line that is nowhere the lowest has ends in the wrong order.
    """
    n, m = slope.shape
    first, last = np.full((n, m), np.inf), np.full((n, m), -np.inf)
    # The steepest line is the lowest on the far left; from there the envelope is walked along, all rows at once.
    steepest = slope.max(1, keepdims=True)
    line = np.where(slope == steepest, offset, np.inf).argmin(1)
    rows, place = np.arange(n), np.full(n, -np.inf)
    while len(rows):
        first[rows, line] = place
        s, o, each = slope[rows], offset[rows], np.arange(len(rows))
        fall = s[each, line][:, None] - s
        with np.errstate(divide="ignore", invalid="ignore"):
            meet = np.where(fall > 0, (o - o[each, line][:, None]) / fall, np.inf)
        place = meet.min(1)
        last[rows, line] = place
        # Of lines that are met at once the flattest goes on.
        line = np.where((meet == place[:, None]) & (fall > 0), s, np.inf).argmin(1)
        on = np.isfinite(place)
        rows, place, line = rows[on], place[on], line[on]
    return first, last
