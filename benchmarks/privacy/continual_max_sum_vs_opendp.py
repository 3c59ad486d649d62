"""Streams of counts and of maxima released all along, against the same mechanisms put together from OpenDP's pieces.

OpenDP has no mechanism for streams. Its tree of counts with its exact discrete Gaussian noise makes the binary mechanism
for one count, noise on a vector the recomputation of a maximum now and then; cumulative sums and sums of blocks are
NumPy's. Noise has the same variance in both, and both draw it exactly from the system's secure source; OpenDP's tree draws
it for every block, ours for those that an answer uses, which are half. The mean of the largest error over time of twenty
streams is printed and asserted to be alike. All rows are taken in one call. The floor is the same in plain NumPy with
rounded normal noise, which is neither exact nor from a secure source.

Ours is faster where many draws are made at once, and slower where a few hundred are: it draws by rejection, all of them
together, in rounds whose overhead does not shrink with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from benchmarks._timing import Row, compare, table

from perturbkit.privacy import BinaryTreeCounter, ContinualMaxSum

T, D, RHO, STREAMS = 8192, 8, 0.5, 20


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    import opendp.prelude as dp

    dp.enable_features("contrib")
    rng = np.random.default_rng(0)
    one, many = rng.integers(0, 2, (T, 1)), rng.integers(0, 2, (T, D))
    variance = BinaryTreeCounter(T, RHO).variance
    period = ContinualMaxSum(D, T, RHO, "recompute").period
    assert period is not None
    tree = dp.t.make_b_ary_tree(
        dp.vector_domain(dp.atom_domain(T=dp.i64)), dp.l1_distance(T=dp.i64), leaf_count=T, branching_factor=2
    )

    def noise(deviation: float) -> Callable[[np.ndarray], np.ndarray]:
        made = dp.m.make_gaussian(
            dp.vector_domain(dp.atom_domain(T=dp.i64)), dp.l2_distance(T=dp.f64), scale=deviation
        )
        return lambda values: np.array(made(values.tolist()))

    tree_noise, max_noise = noise(math.sqrt(variance)), noise(math.sqrt(T // period / (2 * RHO)))

    def counts() -> np.ndarray:
        return BinaryTreeCounter(T, RHO).update(one)[:, 0]

    def counts_opendp() -> np.ndarray:
        return _prefixes(tree_noise(np.array(tree(one[:, 0].tolist()))))

    def maxima() -> np.ndarray:
        return ContinualMaxSum(D, T, RHO, "recompute").update(many)

    def maxima_opendp() -> np.ndarray:
        fresh = max_noise(many.cumsum(0).max(1)[period - 1 :: period])
        return np.concatenate([[0], fresh])[np.arange(1, T + 1) // period]

    def counts_floor() -> np.ndarray:
        levels = [one[:, 0].reshape(2**k, -1).sum(1) for k in range(T.bit_length())]
        nodes = np.concatenate(levels)
        return _prefixes(nodes + np.rint(math.sqrt(variance) * rng.normal(size=len(nodes))).astype(np.int64))

    def maxima_floor() -> np.ndarray:
        fresh = many.cumsum(0).max(1)[period - 1 :: period]
        drawn = np.rint(math.sqrt(len(fresh) / (2 * RHO)) * rng.normal(size=len(fresh))).astype(np.int64)
        return np.concatenate([[0], fresh + drawn])[np.arange(1, T + 1) // period]

    rows: list[Row] = []
    jobs = [
        (f"count of {T} rows, tree, OpenDP", counts, counts_opendp, counts_floor, one),
        (f"maximum of {D} counts of {T} rows, OpenDP", maxima, maxima_opendp, maxima_floor, many),
    ]
    for name, ours, theirs, floor, given in jobs:
        exact = given.cumsum(0).max(1)
        error = [
            float(np.mean([np.abs(run() - exact).max() for _ in range(STREAMS)]))
            for run in (ours, theirs, floor)
        ]
        print(f"  {name}: largest error, ours {error[0]:.1f}, OpenDP {error[1]:.1f}, NumPy {error[2]:.1f}")
        assert 0.75 < error[0] / error[1] < 1.33, f"the errors are {error}"
        rows += compare(ours, {name: theirs}, floor, rounds)
    print(table(rows))
    return rows


def _prefixes(nodes: np.ndarray) -> np.ndarray:
    """Return the sum of the first t leaves of a binary tree, level by level from the root, for each t."""
    levels = T.bit_length()
    times, total = np.arange(1, T + 1), np.zeros(T, dtype=np.int64)
    for height in range(levels):
        has = (times >> height) & 1 == 1
        first = 2 ** (levels - 1 - height) - 1
        total[has] += nodes[first + (times[has] >> height) - 1]
    return total


if __name__ == "__main__":
    main()
