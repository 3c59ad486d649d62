"""Rank-biased overlap of many pairs of lists against the package ``rbo``, which takes one pair at a time.

A thousand pairs of the best 20 of 200 items. The floor is one comparison of all items of the pairs. The two must agree, which
is asserted. Run it with ``python -m benchmarks.robust.finest_vs_rbo``; it takes seconds.
"""

from __future__ import annotations

from importlib import import_module

import torch
from benchmarks._timing import Row, compare, table
from torch import Tensor

from perturbkit.robust import rank_biased_overlap


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    similarity = import_module("rbo").RankingSimilarity
    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(1000, 200, generator=g).topk(20).indices for _ in range(2))

    def ours() -> Tensor:
        return rank_biased_overlap(a, b)

    def peer() -> Tensor:
        pairs = zip(a.tolist(), b.tolist(), strict=True)
        return torch.tensor([similarity(u, v).rbo_ext(p=0.9) for u, v in pairs], dtype=torch.float64)

    def floor() -> Tensor:
        return a[:, :, None] == b[:, None, :]

    torch.testing.assert_close(ours(), peer())
    rows = compare(ours, {"1000 pairs of 20 items, rbo": peer}, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
