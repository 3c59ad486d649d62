"""Low-rank projections: rows sampled by length, approximate singular spaces, and products drawn from squared rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from perturbkit.core import checks
from perturbkit.privacy._noise import Noise


def matrix(A: Any, rank: int) -> Tensor:
    """Check a matrix of preferences and the rank asked of it."""
    checks.tensor("A", A, ndim=2)
    checks.integer("rank", rank, low=1, high=min(A.shape))
    if not bool(A.any()):
        raise checks.ArgumentError("A is zero; allowed: a matrix with some preferences. Add ratings.")
    return A  # type: ignore[no-any-return]


def projected(row: Tensor, right: Tensor) -> Tensor:
    """Return a row in the space of right singular vectors."""
    return right @ (right.mT @ row)


def squared(row: Tensor, user: int) -> Tensor:
    """Return squares over their sum, or refuse a row that vanishes."""
    total = row.square().sum()
    if not bool(total > row.shape[0] * torch.finfo(row.dtype).eps ** 2):
        raise checks.ArgumentError(
            f"user is {user}, whose row of the low-rank approximation is zero; allowed: users with a part in the leading "
            "singular space. Choose a larger rank or another user."
        )
    return row.square() / total


def drawn(p: Tensor, uniform: np.ndarray) -> Tensor:
    """Return indices with chances p, by inversion."""
    steps = p.double().cumsum(0).contiguous()
    found = torch.searchsorted(steps, torch.as_tensor(uniform).to(steps) * steps[-1], right=True)
    # Rounding may reach the end; products without chance are then never the last.
    return found.clamp_max(int(p.nonzero()[-1, 0]))


def sampled(A: Tensor, n_rows: int, n_cols: int, source: Noise) -> tuple[Tensor, Tensor]:
    """Return rows and columns drawn in proportion to squared lengths, columns within the drawn rows."""
    row_chance, _ = chances(A, None)
    rows = drawn(row_chance, source.uniform((n_rows,)))
    _, col_chance = chances(A, rows)
    assert col_chance is not None
    return rows, drawn(col_chance, source.uniform((n_cols,)))


def chances(A: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the chance of each row, and that of each column given drawn rows, which may be zero rows in a neighbour."""
    lengths = A.square().sum(1)
    chance = lengths / lengths.sum()
    if rows is None:
        return chance, None
    part = A[rows].square() / lengths[rows].clamp_min(torch.finfo(A.dtype).tiny)[:, None]
    return chance, part.mean(0)


def fkv(A: Tensor, rows: Tensor, cols: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return approximate singular values and right vectors from the given rows and columns."""
    row_chance, col_chance = chances(A, rows)
    assert col_chance is not None
    S = A[rows] / (len(rows) * row_chance[rows]).sqrt()[:, None]
    W = S[:, cols] / (len(cols) * col_chance[cols]).sqrt()
    u, s, _ = torch.linalg.svd(W, full_matrices=False)
    return s[:rank], torch.linalg.qr(S.mT @ u[:, :rank])[0]


def subspace(A: Tensor, start: Tensor) -> Tensor:
    """Return the leading right singular space, from that of a neighbour, by subspace iteration or else decomposition."""
    basis, k = start, start.shape[1]
    for _ in range(100):
        moved = torch.linalg.qr(A.mT @ (A @ basis))[0]
        change = (moved - basis @ (basis.mT @ moved)).norm()
        basis = moved
        if bool(change < 1e-13):
            # A space that the iteration leaves alone need not be the leading one: the change may have made another larger.
            held = torch.linalg.svdvals(A @ basis).square()
            if bool(A.square().sum() - held.sum() < held[-1]):
                return basis
            if bool(held.sum() >= torch.linalg.svdvals(A)[:k].square().sum() * (1 - 1e-12)):
                return basis
            break
    return torch.linalg.svd(A, full_matrices=False)[2][:k].mT


def entries(source: Noise, A: Tensor, user: int, n: int) -> Tensor:
    """Draw places of ratings, half of them the user's own."""
    m, products = A.shape
    own = n // 2
    users = np.concatenate([np.full(own, user), source.below(np.full(n - own, m))])
    return torch.as_tensor(np.stack([users, source.below(np.full(n, products))], 1))


def checked_entries(entries: Tensor, A: Tensor) -> Tensor:
    """Check places of ratings, (n, 2), against the matrix."""
    checks.tensor("entries", entries, shape=(None, 2), floating=False)
    if entries.is_floating_point():
        raise checks.ArgumentTypeError(
            f"entries has dtype {entries.dtype}; allowed: integers, user and product of each rating. Use entries.long()."
        )
    low, high = entries.amin(0), entries.amax(0)
    if int(low.min()) < 0 or bool((high.cpu() >= torch.tensor(A.shape)).any()):
        raise checks.ArgumentError(
            f"entries range from {low.tolist()} to {high.tolist()}; allowed: places in a matrix of shape {tuple(A.shape)}. Count "
            "users and products from 0."
        )
    return entries.long()
