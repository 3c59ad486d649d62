"""The reflected bridge on a grid against POT's Sinkhorn: the same plan between two laws on 1000 cells, or 20 by 20.

Method: reflected_schrodinger_bridge (`reflected_bridge_grid`). Both are given the heat kernel of the mirrored process, POT as the cost
`-reg log K`, and stop at 1e-9. Before timing the plans are asserted to agree to 1e-8 of the largest entry. POT's works on the whole kernel;
ours applies the kernel of an axis at a time, and also builds that kernel, which POT is given.

The floor is as many products with the kernels as our iteration took. Times in milliseconds. Needs POT (``pip install POT``); runs in half a minute:
``python -m benchmarks reflected_schrodinger_bridge_vs_pot``.
"""

from __future__ import annotations

import numpy as np
import torch
from benchmarks._timing import Row, compare, table_in_ms
from torch import Tensor

from perturbkit.core.random import as_generator, uniform
from perturbkit.diffusion import folded_normal_log_prob, reflected_bridge_grid

SIGMA = 0.3


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    import ot

    rows: list[Row] = []
    for shape in ((1000,), (20, 20)):
        p0, p1 = (uniform(shape, 0.1, 1.0, generator=as_generator(s), dtype=torch.float64) for s in (0, 1))
        p0, p1 = p0 / p0.sum(), p1 / p1.sum()
        axes = [kernel(m) for m in shape]
        whole = axes[0] if len(shape) == 1 else torch.kron(axes[0], axes[1])
        reg = SIGMA**2
        cost = (-reg * whole.log()).numpy()
        a, b = p0.flatten().numpy(), p1.flatten().numpy()

        def ours(p0: Tensor = p0, p1: Tensor = p1) -> Tensor:
            return reflected_bridge_grid(p0, p1, SIGMA, tol=1e-9).plan

        def theirs(a: np.ndarray = a, b: np.ndarray = b, cost: np.ndarray = cost, reg: float = reg) -> Tensor:
            return torch.from_numpy(ot.sinkhorn(a, b, cost, reg, stopThr=1e-9, numItermax=10_000))

        plan, peer = ours().reshape(whole.shape), theirs()
        assert float((plan - peer).abs().max() / peer.max()) < 1e-8
        n_iter = reflected_bridge_grid(p0, p1, SIGMA, tol=1e-9).n_iter

        def floor(axes: list[Tensor] = axes, u: Tensor = p0, n: int = n_iter) -> Tensor:
            for _ in range(2 * n):
                u = axes[0] @ u
                u = u if u.ndim == 1 else u @ axes[1]
            return u

        floor()
        name = f"{' x '.join(map(str, shape))} cells, {n_iter} iterations, POT"
        rows += compare(ours, {name: theirs}, floor, rounds)
    return table_in_ms(rows)


def kernel(m: int) -> Tensor:
    centres = (torch.arange(m, dtype=torch.float64) + 0.5) / m
    return folded_normal_log_prob(centres[:, None], centres, SIGMA).exp() / m


if __name__ == "__main__":
    main()
