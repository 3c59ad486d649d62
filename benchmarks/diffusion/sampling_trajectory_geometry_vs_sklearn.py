"""Annealed mean shift against scikit-learn's MeanShift: the modes of 2000 points in five clusters of 2 and of 16 dimensions, from 500 starts.

Method: sampling_trajectory_geometry (`annealed_mean_shift`). They do not compute the same: ours has a Gaussian kernel whose width falls over 30
steps, theirs a flat one of one width, until nothing moves, and merges its ends by itself. Asserted is that theirs are five modes, and
that both find each of the five centres, to half of a cluster's standard deviation, ours in the mean over the starts of that cluster; the
means over all are printed.

The floor is the distances and the products of 30 steps. Times in milliseconds. Runs in a minute:
``python -m benchmarks sampling_trajectory_geometry_vs_sklearn``.
"""

from __future__ import annotations

import numpy as np
import torch
from benchmarks._timing import Row, compare, table_in_ms
from sklearn.cluster import MeanShift
from torch import Tensor

from perturbkit.core.random import as_generator, randint, randn
from perturbkit.diffusion import annealed_mean_shift

STEPS = 30


def main(rounds: int = 3) -> list[Row]:
    """Print the table and return its rows."""
    rows: list[Row] = []
    for dim in (2, 16):
        g = as_generator(0)
        centres = 10 * randn((5, dim), generator=g, dtype=torch.float64)
        label = randint(0, 5, (2000,), generator=g)
        points = centres[label] + randn((2000, dim), generator=g, dtype=torch.float64)
        start, at = points[:500], label[:500]
        own = torch.stack([points[label == k].mean(0) for k in range(5)])
        assert float(torch.pdist(own).min()) > 6  # five clusters, none in another
        # A flat kernel must hold a cluster: 1.5 times the typical distance from its centre.
        width = 1.5 * dim**0.5
        end = 0.75 * dim**0.5
        falling = end * torch.logspace(np.log10(3.0), 0, STEPS, dtype=torch.float64)
        bandwidths = torch.cat([falling, falling.new_zeros(1)])  # the last is the whole mean shift step

        def ours(points: Tensor = points, start: Tensor = start, h: Tensor = bandwidths) -> Tensor:
            return annealed_mean_shift(points, start, h)[-1]

        def theirs(points: Tensor = points, start: Tensor = start, width: float = width) -> MeanShift:
            return MeanShift(bandwidth=width, seeds=start.numpy()).fit(points.numpy())

        def floor(points: Tensor = points, x: Tensor = start) -> Tensor:
            for _ in range(STEPS):
                x = torch.softmax(-torch.cdist(x, points).square(), 1) @ points
            return x

        found = torch.from_numpy(theirs().cluster_centers_)
        assert len(found) == 5
        away = (ours() - own[at]).norm(dim=1)
        ends = torch.stack([away[at == k].mean() for k in range(5)])
        nearest = torch.cdist(own, found).min(1).values
        print(
            f"{dim} dimensions, mean distance from the centre, ours {float(away.mean()):.3f}, "
            f"of scikit-learn's nearest mode {float(nearest.mean()):.3f}"
        )
        assert float(torch.cat([ends, nearest]).max()) < 0.5
        rows += compare(
            ours, {f"{dim} dimensions, 2000 points, 500 starts, MeanShift": theirs}, floor, rounds
        )
    return table_in_ms(rows)


if __name__ == "__main__":
    main()
