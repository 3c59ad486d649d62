"""One recommendation drawn from a low-rank approximation tells little of one rating, less the larger the matrix.

Incoherent ratings in [0, 1] of rank 3 and 5, 64 to 1,024 users and products, the exact profile of 15 users for 8 changed ratings
each; medians over users of the worst. Claimed beforehand: log-log slopes in the size n of at most -0.7 for the epsilon
needed at delta = 0.5/n and for delta at epsilon = 1/n (the paper's first version states -1), and of at most -1.2 for delta
at epsilon = sqrt(k/n) (its second version states -2, the bound of the states' overlap -1.5); no profile above that bound;
the exact projection below the sampled one in at least 0.8 of the comparisons; a relative error of the first-order
formula of at most 1 / (s_k - s_{k+1}), where that gap is at least 2, twice the change. Control: the total variation of a user with a single rating must not fall.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core.random import as_generator, uniform
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.privacy import RecommendationPrivacy, privacy_profile, truncated_svd_derivative

_SIZES, _USERS = (64, 128, 256, 512, 1024), 15
_GRID = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-5, 1, 241, dtype=torch.float64)])


@paper(
    number=12,
    title="Differential Privacy of Quantum and Quantum-Inspired Classical Recommendation Algorithms",
    authors="Li, Ying, Guan",
    year=2025,
    arxiv="2502.04758",
    claim="Sampling a recommendation from a low-rank approximation is differentially private without added noise for low-rank "
    "incoherent ratings, with losses that fall with the size, and better so for the quantum algorithm.",
    method="perturbkit.privacy.privacy_profile",
    needs="data",
    input="tabular",
    cost="one singular value decomposition, and a subspace iteration a changed rating",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Slopes in the size, the bound, sampled against exact projections, and the first-order formula."""
    comparisons, ratios, second = [], [], {}
    figure: dict[int, dict[int, np.ndarray]] = {}
    for k in (3, 5):
        rows = []
        for n in _SIZES:
            A = _ratings(n, k, run.seeds(1)[0] + n)
            found = [_profile(A, user, k) for user in range(_USERS)]
            ratios += [float((f.delta / f.bound)[f.bound > 1e-12].max()) for f in found]
            curves = np.stack([f.worst.numpy() for f in found])
            figure.setdefault(k, {})[n] = np.median(curves, 0)
            grid = _GRID.numpy()
            at = [np.median([np.interp(e, grid, c) for c in curves]) for e in (0.0, 1 / n, math.sqrt(k / n))]
            needed = np.median([grid[np.argmax(c <= 0.5 / n)] for c in curves])
            rows.append([needed, at[1], at[2]])
            second[k, n] = at[2] * n**2 / k**2
        slopes = np.polyfit(np.log(_SIZES), np.log(np.array(rows)), 1)[0]
        for name, slope, limit in zip(
            ("epsilon at delta 0.5/n", "delta at epsilon 1/n", "delta at epsilon sqrt(k/n)"), slopes, (-0.7, -0.7, -1.2), strict=True
        ):  # fmt: skip
            comparisons.append(Comparison(f"slope of {name}, rank {k}", slope, limit, "lower", n=_USERS))
    alone = [float(_profile(_lone(_ratings(n, 3, run.seeds(1)[0] + n)), 0, 3).worst[0]) for n in _SIZES]
    slope = float(np.polyfit(np.log(_SIZES), np.log(alone), 1)[0])
    share, pairs = _below(run)
    first_order = [_first_order(n, k, run) for n in _SIZES[:4] for k in (3, 5)]
    errors = [error * gap for error, gap in first_order if gap >= 2]
    comparisons += [
        Comparison("slope of the total variation of a user with one rating", slope, -0.7, "lower", control=True,
                   note="must fail: a change turns that user's row"),
        Comparison("largest ratio of a profile and its bound", max(ratios), 1.0, "lower", margin=-1e-9, n=len(ratios)),
        Comparison("share of comparisons with the exact projection below the sampled one", share, 0.8, "higher", n=pairs),
        Comparison("largest relative error of the first-order change times the gap, gaps of 2 and more", max(errors), 1.0, "lower",
                   n=len(errors)),
    ]  # fmt: skip
    small = "; ".join(f"{error:.2g} at a gap of {gap:.2g}" for error, gap in first_order if gap < 2)
    worst = ", ".join(f"{second[k, n]:.2g} at n = {n}" for k, n in ((3, 64), (3, 1024)))
    return Evidence(
        comparisons,
        _figure(figure, alone),
        "The first version's (1/n, 1/n) is measured, but its delta is as large as the total variation, of which 1/n is the size "
        "already at epsilon 0. Of the second version's delta of k^2/n^2 at epsilon sqrt(k/n) the median user has these multiples "
        f"at rank 3: {worst}; users whose ratings are all small have far larger ones. No constant is established, and profiles "
        "are worst cases over eight sampled ratings only. That of the sampled algorithm includes what its samples tell. The "
        "first-order formula was at first claimed at all sizes; below a gap of 2 a change by one may exchange singular values, "
        f"and its relative error is out of range: {small}.",
    )


def _ratings(n: int, k: int, seed: int) -> Tensor:
    g = as_generator(seed)
    left, right = (uniform((n, k), generator=g, dtype=torch.float64) for _ in range(2))
    return left @ right.T / k


def _lone(A: Tensor) -> Tensor:
    """Leave the first user one rating."""
    A = A.clone()
    A[0] = 0
    A[0, 0] = 1
    return A


def _profile(A: Tensor, user: int, k: int) -> RecommendationPrivacy:
    return privacy_profile(A, user, _GRID, rank=k, n_neighbours=8, generator=user)


def _below(run: Run) -> tuple[float, int]:
    """Return the share of changed ratings and epsilons with a smaller delta of the exact projection, and their number."""
    n, k = 128, 3
    A = _ratings(n, k, run.seeds(1)[0])
    grid = torch.tensor([0.0, 1 / n, 0.1, 0.5], dtype=torch.float64)
    hits = []
    for user in range(6):
        entries = torch.tensor(
            [[user, 3 * user], [user, 100 - user], [user + 20, user], [user + 40, 5 * user]]
        )
        exact = privacy_profile(A, user, grid, rank=k, entries=entries).delta
        sampled = privacy_profile(
            A,
            user,
            grid,
            rank=k,
            entries=entries,
            mode="quantum-inspired",
            n_rows=60,
            n_cols=60,
            generator=user,
        ).delta
        hits.append(exact <= sampled)
    share = torch.stack(hits).double()
    return float(share.mean()), share.numel()


def _first_order(n: int, k: int, run: Run) -> tuple[float, float]:
    """Return the relative error of the first-order change of A_k for one rating changed by one, and the gap."""
    A = _ratings(n, k, run.seeds(2)[1] + n)
    E = torch.zeros_like(A)
    E[0, 1] = 1.0
    s = torch.linalg.svdvals(A)
    predicted = truncated_svd_derivative(A, E, k)
    change = _truncated(A + E, k) - _truncated(A, k)
    return float((change - predicted).norm() / predicted.norm()), float(s[k - 1] - s[k])


def _truncated(A: Tensor, k: int) -> Tensor:
    u, s, vh = torch.linalg.svd(A, full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k]


def _figure(curves: dict[int, dict[int, np.ndarray]], alone: list[float]) -> Figure:
    picture = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = picture.subplots(1, 2)
    for n, curve in curves[3].items():
        left.loglog(_GRID[1:], np.maximum(curve[1:], 1e-8), label=f"n = {n}")
    left.set_xlabel("epsilon")
    left.set_ylabel("delta, median user, rank 3")
    left.set_ylim(1e-6, 1)
    left.legend(frameon=False, fontsize=7)
    for k, found in curves.items():
        right.loglog(list(found), [c[0] for c in found.values()], "o-", label=f"rank {k}")
    right.loglog(_SIZES, alone, "k^--", label="a user with one rating")
    right.set_xlabel("users and products")
    right.set_ylabel("total variation")
    right.legend(frameon=False, fontsize=7)
    return picture
