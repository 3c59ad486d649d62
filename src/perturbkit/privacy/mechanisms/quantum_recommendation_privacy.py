"""How private the sampling step of a low-rank recommender is by itself: measured, and bounded by the states' overlap.

Use it to find out what a recommendation, drawn in proportion to the squares of a user's row of a low-rank approximation, tells
of one rating. It is an analysis: no mechanism of this module is private for all data. Li, Ying and Guan (2025), Differential
Privacy of Quantum and Quantum-Inspired Classical Recommendation Algorithms, arXiv:2502.04758.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from perturbkit.core import Result, checks
from perturbkit.core.random import Seed, as_generator
from perturbkit.privacy._noise import Noise
from perturbkit.privacy.mechanisms import _lowrank

__all__ = [
    "FKVResult",
    "LowRankRecommender",
    "RecommendationPrivacy",
    "hockey_stick",
    "length_squared_svd",
    "privacy_profile",
    "pure_state_delta",
    "truncated_svd_derivative",
]

Mode = Literal["quantum", "quantum-inspired"]


@dataclass(frozen=True, eq=False)
class FKVResult(Result):
    """An approximate singular value decomposition from sampled rows and columns.

    Attributes
    ----------
    singular_values : Tensor, shape (k,)
        Approximate, largest first.
    right : Tensor, shape (n, k)
        Orthonormal basis of the approximate right singular space.
    rows, cols : Tensor of int64, shape (n_rows,), (n_cols,)
        What was drawn.
    """

    singular_values: Tensor
    right: Tensor
    rows: Tensor
    cols: Tensor


@dataclass(frozen=True, eq=False)
class RecommendationPrivacy(Result):
    """Privacy profiles of one user's recommendation for single changed ratings.

    Attributes
    ----------
    epsilons : Tensor, shape (e,)
        As given.
    delta : Tensor, shape (c, e)
        For each changed rating the smallest delta for each epsilon, the larger of both directions. "quantum": exact.
        "quantum-inspired": estimated, of the recommendation together with the sampled rows and columns, which bounds that of
        the recommendation alone.
    bound : Tensor, shape (c, e)
        :func:`pure_state_delta` of the two states, at least ``delta``; NaN in mode "quantum-inspired".
    standard_error : Tensor, shape (c, e)
        Of an estimated ``delta``; else 0.
    entries : Tensor of int64, shape (c, 2)
        User and product of each changed rating.
    """

    epsilons: Tensor
    delta: Tensor
    bound: Tensor
    standard_error: Tensor
    entries: Tensor

    @property
    def worst(self) -> Tensor:
        """Largest delta over the changed ratings, shape (e,); a lower bound on that over all ratings."""
        return self.delta.amax(0)


class LowRankRecommender:
    r"""Recommend product j to user i with chance proportional to the square of entry (i, j) of a low-rank approximation.

    Parameters
    ----------
    rank : int, optional
        Singular values kept.
    threshold : float, optional
        Or: keep those at least this large. Exactly one of the two.
    mode : {"quantum", "quantum-inspired"}
        "quantum": exact projection, what measuring the quantum algorithm's state gives. "quantum-inspired": projection on the
        space of :func:`length_squared_svd`; with rank only.
    n_rows, n_cols : int
        Samples of "quantum-inspired".
    generator : torch.Generator, int or None
        Source of all draws; ``None``: the secure source of the operating system.

    Attributes
    ----------
    right_ : Tensor, shape (n, k)
        Basis of the right singular space.

    Notes
    -----
    The only randomness of "quantum" is the draw of the product. What this alone does for privacy depends on the data: see
    :func:`privacy_profile`, and nothing is guaranteed for a user whose row the change can turn.

    References
    ----------
    Kerenidis and Prakash (2017), ITCS; Tang (2019), arXiv:1807.04271; Li, Ying and Guan (2025), arXiv:2502.04758.

    Examples
    --------
    >>> ratings = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> LowRankRecommender(rank=1).fit(ratings).distribution(0)
    tensor([0.5000, 0.5000, 0.0000])
    """

    def __init__(
        self,
        *,
        rank: int | None = None,
        threshold: float | None = None,
        mode: Mode = "quantum",
        n_rows: int = 200,
        n_cols: int = 200,
        generator: Seed = None,
    ) -> None:
        self.mode = checks.one_of("mode", mode, ("quantum", "quantum-inspired"))
        if (rank is None) == (threshold is None) or (rank is None and mode != "quantum"):
            raise checks.ArgumentError(
                f"rank is {rank} and threshold is {threshold} for {mode!r}; allowed: exactly one, rank for 'quantum-inspired'. "
                "Pass rank=."
            )
        self.rank = None if rank is None else checks.integer("rank", rank, low=1)
        self.threshold = None if threshold is None else checks.positive("threshold", threshold)
        self.n_rows, self.n_cols = n_rows, n_cols
        # One source for all draws: a seed used anew would draw products with the numbers that drew the rows.
        self.generator = None if generator is None else as_generator(generator)

    def fit(self, A: Tensor) -> Self:
        """Take the preferences, shape (users, products), and find the space."""
        self._A = _lowrank.matrix(A, self.rank or 1)
        if self.mode == "quantum":
            _, s, right = torch.linalg.svd(self._A, full_matrices=False)
            kept = self.rank if self.threshold is None else int((s >= self.threshold).sum())
            self.right_ = right[:kept].mT
        else:
            assert self.rank is not None
            self.right_ = length_squared_svd(
                self._A, self.n_rows, self.n_cols, self.rank, generator=self.generator
            ).right
        return self

    def distribution(self, user: int) -> Tensor:
        """Return the chance of each product for a user, shape (n,)."""
        if not hasattr(self, "right_"):
            raise checks.ArgumentError(
                "nothing is fitted; allowed: recommendations after fit. Call fit first."
            )
        checks.integer("user", user, low=0, high=len(self._A) - 1)
        return _lowrank.squared(_lowrank.projected(self._A[user], self.right_), user)

    def sample(self, user: int, n: int) -> Tensor:
        """Return n products for a user, int64; n of them tell n times as much as one."""
        checks.integer("n", n, low=1)
        return _lowrank.drawn(self.distribution(user), Noise(self.generator).uniform((n,)))


def length_squared_svd(
    A: Tensor, n_rows: int, n_cols: int, rank: int, *, generator: Seed = None
) -> FKVResult:
    r"""Approximate the leading right singular space from rows and columns drawn in proportion to their squared lengths.

    Parameters
    ----------
    A : Tensor, shape (m, n)
        Not zero.
    n_rows, n_cols : int
        Draws, with replacement, at least ``rank``.
    rank : int
        Dimension wanted, at most min(m, n).
    generator : torch.Generator, int or None
        Source of the draws; ``None``: the secure source of the operating system.

    Returns
    -------
    FKVResult

    Notes
    -----
    Rows i have chance :math:`P_i = \|A_i\|^2 / \|A\|_F^2`; with :math:`S_t = A_i / \sqrt{r P_i}` the mean of :math:`S^T S` is
    :math:`A^T A`. Columns are drawn by a random drawn row's entries and scaled likewise to a small matrix W, whose left
    singular vectors u give :math:`S^T u`, orthonormalised here. The error in the Frobenius norm falls as
    :math:`\sqrt{k / r}`.

    References
    ----------
    Frieze, Kannan and Vempala (2004), Journal of the ACM 51(6); Tang (2019), arXiv:1807.04271.

    Examples
    --------
    >>> a = torch.ones(4, 3)
    >>> length_squared_svd(a, 2, 2, 1, generator=0).right.abs()[:, 0]
    tensor([0.5774, 0.5774, 0.5774])
    """
    _lowrank.matrix(A, rank)
    checks.integer("n_rows", n_rows, low=rank)
    checks.integer("n_cols", n_cols, low=rank)
    rows, cols = _lowrank.sampled(A, n_rows, n_cols, Noise(generator))
    values, right = _lowrank.fkv(A, rows, cols, rank)
    return FKVResult(values, right, rows, cols)


def truncated_svd_derivative(A: Tensor, E: Tensor, rank: int) -> Tensor:
    r"""Return the exact first-order change of the best rank-k approximation of A along E.

    Parameters
    ----------
    A, E : Tensor, shape (m, n)
        Matrix and direction; singular value k of A must exceed the next one.
    rank : int
        k, 1..min(m, n).

    Returns
    -------
    Tensor, shape (m, n)

    Raises
    ------
    ArgumentError
        If there is no gap after singular value k, where the approximation is not differentiable.

    Notes
    -----
    With projections P and Q on the leading left and right singular spaces it is :math:`PE + EQ - PEQ` plus, for each pair
    i <= k < j, with :math:`T = U^T E V`,

    .. math:: \frac{s_j^2 T_{ij} + s_i s_j T_{ji}}{s_i^2 - s_j^2} \, u_i v_j^T
        + \frac{s_j^2 T_{ji} + s_i s_j T_{ij}}{s_i^2 - s_j^2} \, u_j v_i^T,

    which compares no singular vectors of two matrices. Cost: one decomposition.

    References
    ----------
    Li, Ying and Guan (2025), arXiv:2502.04758; Daleckii and Krein (1965), on derivatives of spectral functions.

    Examples
    --------
    >>> truncated_svd_derivative(torch.diag(torch.tensor([2.0, 1.0])), torch.ones(2, 2), 2)
    tensor([[1., 1.],
            [1., 1.]])
    """
    _lowrank.matrix(A, rank)
    checks.same_shape("E", checks.tensor("E", E), "A", A)
    u, s, vh = torch.linalg.svd(A, full_matrices=False)
    if rank < len(s) and not bool(s[rank - 1] - s[rank] > 10 * torch.finfo(A.dtype).eps * s[0]):
        raise checks.ArgumentError(
            f"rank is {rank}, where singular values {float(s[rank - 1]):.6g} and {float(s[rank]):.6g} meet; allowed: a rank "
            "with a gap after it. Choose another rank."
        )
    u1, u2, v1, v2 = u[:, :rank], u[:, rank:], vh[:rank].mT, vh[rank:].mT
    left = u1 @ (u1.mT @ E)
    found = left + (E - left) @ v1 @ v1.mT
    big, small = s[:rank, None], s[None, rank:]
    above, below = u1.mT @ E @ v2, (u2.mT @ E @ v1).mT
    scale = 1 / (big**2 - small**2)
    found = found + u1 @ ((small**2 * above + big * small * below) * scale) @ v2.mT
    return found + u2 @ ((small**2 * below + big * small * above) * scale).mT @ v1.mT


def hockey_stick(p: Tensor, q: Tensor, epsilons: Tensor) -> Tensor:
    r"""Return the smallest delta with :math:`P(S) \leq e^\epsilon Q(S) + \delta` for all sets S.

    Parameters
    ----------
    p, q : Tensor, shape (..., n)
        Distributions.
    epsilons : Tensor, shape (e,)
        At least 0.

    Returns
    -------
    Tensor, shape (..., e)

    Notes
    -----
    :math:`\sum_j \max(0, p_j - e^\epsilon q_j)`: the total variation at 0; not increasing, and convex in
    :math:`e^\epsilon`.

    Examples
    --------
    >>> hockey_stick(torch.tensor([0.75, 0.25]), torch.tensor([0.5, 0.5]), torch.tensor([0.0]))
    tensor([0.2500])
    """
    # Infinity times no chance is none.
    scaled = torch.where(q[..., None, :] > 0, epsilons.exp()[:, None] * q[..., None, :], 0)
    return (p[..., None, :] - scaled).clamp_min(0).sum(-1)


def pure_state_delta(u: Tensor, w: Tensor, epsilons: Tensor) -> Tensor:
    r"""Return the largest delta that any measurement of two pure states can show at each epsilon.

    Parameters
    ----------
    u, w : Tensor, shape (..., n)
        Real amplitudes, brought to length one.
    epsilons : Tensor, shape (e,)
        At least 0.

    Returns
    -------
    Tensor, shape (..., e)

    Notes
    -----
    For any event of any measurement :math:`P(S) - e^\epsilon Q(S)` is at most the positive eigenvalue of
    :math:`uu^T - e^\epsilon ww^T`, of rank two, with trace :math:`1 - e^\epsilon` and second invariant
    :math:`-e^\epsilon (1 - F)`, :math:`F = \langle u, w \rangle^2`; hence

    .. math:: \delta(\epsilon) = \tfrac12 \bigl(1 - e^\epsilon + \sqrt{(e^\epsilon - 1)^2 + 4 e^\epsilon (1 - F)}\bigr)
        \leq \min\bigl(\sqrt{1 - F}, (1 - F) / (1 - e^{-\epsilon})\bigr).

    With :math:`1 - F \leq \|u - w\|^2`, two rows a, b give at most
    :math:`4 \|a - b\|^2 / (\|a\| + \|b\|)^2 / (1 - e^{-\epsilon})`.

    References
    ----------
    Helstrom (1976), Quantum Detection and Estimation Theory; Hirche, Rouzé and Stilck França (2023), arXiv:2202.10717, on
    quantum differential privacy.

    Examples
    --------
    >>> pure_state_delta(torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8]), torch.tensor([0.0]))
    tensor([0.8000])
    """
    u, w = u / u.norm(dim=-1, keepdim=True), w / w.norm(dim=-1, keepdim=True)
    # 1 - F of two unit vectors without cancellation: the squared sine of their angle.
    sine = (u - (u * w).sum(-1, keepdim=True) * w).square().sum(-1)[..., None]
    # All divided by exp(epsilon), whose square overflows.
    rise = -(-epsilons).expm1()
    bottom = rise + (rise**2 + 4 * (-epsilons).exp() * sine).sqrt()
    return 2 * sine / bottom.clamp_min(torch.finfo(u.dtype).tiny)


def privacy_profile(
    A: Tensor,
    user: int,
    epsilons: Tensor,
    *,
    rank: int,
    mode: Mode = "quantum",
    entries: Tensor | None = None,
    n_neighbours: int = 8,
    n_rows: int = 200,
    n_cols: int = 200,
    n_draws: int = 20,
    generator: Seed = None,
) -> RecommendationPrivacy:
    r"""Measure how much one recommendation to a user tells of one rating, for ratings changed by as much as may be.

    Parameters
    ----------
    A : Tensor, shape (users, products)
        Ratings in [0, 1].
    user : int
        Whose recommendation is seen.
    epsilons : Tensor, shape (e,)
        At least 0.
    rank : int
        Singular values kept.
    mode : {"quantum", "quantum-inspired"}
        As in :class:`LowRankRecommender`.
    entries : Tensor of int, shape (c, 2), optional
        Ratings to change, to 0 or 1, whichever is further. Default: ``n_neighbours`` random ones, half of them the user's.
    n_neighbours : int
        At least 2.
    n_rows, n_cols, n_draws : int
        "quantum-inspired": samples, and draws of them over which the profile is averaged.
    generator : torch.Generator, int or None
        Source of entries and samples.

    Returns
    -------
    RecommendationPrivacy

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed, or the user has no part in the leading singular space.

    Notes
    -----
    A measured profile is that of these neighbours of these data: it can refute a privacy claim, and supports one only as far as
    data and ratings are typical. What holds exactly is :func:`pure_state_delta` for two given rows. To first order in the
    change E = e_i e_l^T of a matrix of rank k the row of user i moves by :math:`P_{ii} (e_l - Q e_l) + Q e_l` and that of
    another user i' by :math:`P_{i'i} (e_l - Q e_l)`, of squared lengths about :math:`Q_{ll} \leq \mu k / n` and at most
    :math:`(\mu k / m)^2` for coherence :math:`\mu`, while a row itself has a squared length of order n. Hence
    :math:`\delta(\epsilon)` is of order :math:`k / n^2 / (1 - e^{-\epsilon})` and :math:`\delta(0)` of order
    :math:`\sqrt k / n`, for m and n of the same order. The paper's first version states (1/n, 1/min(m, n)), up to logarithms:
    its delta is so large that it holds already at epsilon 0. The second version states
    :math:`(\sqrt{k/n}, k^2 / \min(m, n)^2)`. If reconstructed ratings are bounded away from zero this holds, even at delta 0 and
    epsilon of order 1/n; where they come arbitrarily near to zero the bound above gives delta of order
    :math:`\sqrt k \, n^{-3/2}` only. None of the constants is established, and without incoherence nothing holds.

    "quantum-inspired": with draws :math:`\omega`, of chance P and Q under the two matrices, the recommendation is a function of
    itself and the draws, so :math:`\delta(\epsilon) \leq E_{\omega \sim P} \sum_j \max(0, p(j | \omega) - e^\epsilon
    \tfrac{dQ}{dP}(\omega) q(j | \omega))`, of which the mean over draws is given.

    Cost: one singular value decomposition, and a subspace iteration a neighbour, with its singular values where the rank is
    not low; four small decompositions a draw.

    References
    ----------
    Li, Ying and Guan (2025), arXiv:2502.04758, versions 1 and 2.

    Examples
    --------
    >>> ratings = torch.full((30, 40), 0.5, dtype=torch.float64)
    >>> found = privacy_profile(ratings, 0, torch.tensor([0.0, 0.5]), rank=1, entries=torch.tensor([[0, 3]]))
    >>> bool(found.delta[0, 0] < 0.05), bool((found.delta <= found.bound).all())
    (True, True)
    """
    given = _lowrank.matrix(A, rank)
    if float(A.min()) < 0 or float(A.max()) > 1:
        raise checks.ArgumentError(
            f"A ranges from {float(A.min()):.4g} to {float(A.max()):.4g}; allowed: ratings in [0, 1]. Scale them."
        )
    checks.integer("user", user, low=0, high=len(A) - 1)
    checks.one_of("mode", mode, ("quantum", "quantum-inspired"))
    for name, value, low in (("n_neighbours", n_neighbours, 2), ("n_draws", n_draws, 2)):
        checks.integer(name, value, low=low)
    for name, value in (("n_rows", n_rows), ("n_cols", n_cols)):
        checks.integer(name, value, low=rank)
    if float(checks.tensor("epsilons", epsilons, ndim=1).min()) < 0:
        raise checks.ArgumentError(
            f"epsilons has a smallest value of {float(epsilons.min()):g}; allowed: at least 0. Leave the others out."
        )
    source = Noise(generator)
    places = (
        _lowrank.entries(source, A, user, n_neighbours)
        if entries is None
        else _lowrank.checked_entries(entries, A)
    )
    first, grid = given.double(), epsilons.double().to(A.device)
    right = torch.linalg.svd(first, full_matrices=False)[2][:rank].mT
    deltas, bounds, errors = [], [], []
    for i, j in places.tolist():
        second = first.clone()
        second[i, j] = float(first[i, j] < 0.5)
        if mode == "quantum":
            rows = [
                _lowrank.projected(x[user], v)
                for x, v in ((first, right), (second, _lowrank.subspace(second, right)))
            ]
            p, q = (_lowrank.squared(row, user) for row in rows)
            deltas.append(torch.maximum(hockey_stick(p, q, grid), hockey_stick(q, p, grid)))
            bounds.append(pure_state_delta(rows[0], rows[1], grid))
            errors.append(torch.zeros_like(grid))
        else:
            sizes = n_rows, n_cols, rank
            sides = [
                _inspired(a, b, user, grid, sizes, n_draws, source)
                for a, b in ((first, second), (second, first))
            ]
            larger = sides[0][0] >= sides[1][0]
            deltas.append(torch.where(larger, sides[0][0], sides[1][0]))
            errors.append(torch.where(larger, sides[0][1], sides[1][1]))
            bounds.append(torch.full_like(grid, torch.nan))
    delta, bound, error = (torch.stack(part).to(A) for part in (deltas, bounds, errors))
    return RecommendationPrivacy(epsilons.to(A), delta, bound, error, places)


def _inspired(
    A: Tensor, B: Tensor, user: int, grid: Tensor, sizes: tuple[int, int, int], n_draws: int, source: Noise
) -> tuple[Tensor, Tensor]:
    """Return the mean over draws from A of the profile of A against B given the draws, and its standard error."""
    n_rows, n_cols, rank = sizes
    found = []
    for _ in range(n_draws):
        rows, cols = _lowrank.sampled(A, n_rows, n_cols, source)
        (p_row, p_col), (q_row, q_col) = _lowrank.chances(A, rows), _lowrank.chances(B, rows)
        assert p_col is not None
        assert q_col is not None
        log_ratio = (q_row / p_row)[rows].log().sum() + (q_col / p_col)[cols].log().sum()
        p = _lowrank.squared(_lowrank.projected(A[user], _lowrank.fkv(A, rows, cols, rank)[1]), user)
        if bool(log_ratio.isneginf()):
            # The neighbour never draws these.
            found.append(torch.ones_like(grid))
            continue
        q = _lowrank.squared(_lowrank.projected(B[user], _lowrank.fkv(B, rows, cols, rank)[1]), user)
        found.append(hockey_stick(p, q * log_ratio.exp(), grid))
    values = torch.stack(found)
    return values.mean(0), values.std(0) / n_draws**0.5
