"""Half-space reports of our ball tree against scikit-learn's BallTree on lifted points, and against one product with all.

The points of a half-space are those within a radius of the query once all points are lifted to one sphere, so that a
BallTree can answer. The floor is the dense product, which is what a tree has to beat. The rows are widths of a shifted
ReLU network on 100 inputs in 8 dimensions, at its own threshold; all three must report the same pairs, which is asserted.
Run it with ``python -m benchmarks.robust.sublinear_adversarial_training_vs_sklearn``; it takes a minute.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from benchmarks._timing import Row, compare, table
from torch.nn import functional

from perturbkit.core.random import randn
from perturbkit.robust import HalfSpaceReporter, ShiftedReLUNet


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    from sklearn.neighbors import BallTree

    rows = []
    for d in (3, 8):
        for m in (2**10, 2**13, 2**16):
            net = ShiftedReLUNet(d, m, generator=0)
            points, b = net.weight.detach(), net.bias
            q = functional.normalize(randn((100, d), generator=torch.Generator().manual_seed(1)), dim=1)
            reporter = HalfSpaceReporter(points)
            square = points.double().square().sum(1)
            lifted = torch.cat([points.double(), (square.max() - square).sqrt()[:, None]], 1).numpy()
            tree = BallTree(lifted)
            queries = np.pad(q.double().numpy(), ((0, 0), (0, 1)))
            radius = math.sqrt(1 + float(square.max()) - 2 * b)

            def ours(reporter: HalfSpaceReporter = reporter, q: torch.Tensor = q, b: float = b) -> int:
                return len(reporter.query_batch(q, b)[0])

            def by_sklearn(
                tree: BallTree = tree, queries: np.ndarray = queries, radius: float = radius
            ) -> int:
                return sum(map(len, tree.query_radius(queries, radius)))

            def dense(points: torch.Tensor = points, q: torch.Tensor = q, b: float = b) -> int:
                return len((q @ points.T > b).nonzero())

            counts = ours(), by_sklearn(), dense()
            # Pairs within single precision of the threshold may fall on either side.
            assert max(counts) - min(counts) <= 1 + 1e-5 * max(counts), counts
            rows += compare(
                ours, {f"{m} neurons, {d} dimensions, 100 inputs, BallTree": by_sklearn}, dense, rounds
            )
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
