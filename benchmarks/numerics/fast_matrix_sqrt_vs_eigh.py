"""The Pade square root with its Lyapunov gradient against ``torch.linalg.eigh`` and autograd, forward and backward.

64 covariance matrices at once, condition number at most 100. The floor is the products of matrices alone: 5 forward and 40
backward. On a CPU ours wins at 32 and loses at 16, where kernels are too small, and at 64, where LAPACK is at its best.
"""

from __future__ import annotations

import torch
from benchmarks._timing import Row, compare, table

from perturbkit.core.random import randn
from perturbkit.numerics import matrix_sqrt


def main(rounds: int = 15) -> list[Row]:
    """Print the table and return its rows."""
    rows: list[Row] = []
    for d in (16, 32, 64):
        samples = randn((64, 4 * d, d), generator=torch.Generator().manual_seed(d))
        values, vectors = torch.linalg.eigh(samples.mT @ samples / (4 * d))
        floor_values = values.amax(1, keepdim=True) / 100
        a = (vectors * values.clamp_min(floor_values)[:, None]) @ vectors.mT

        def ours(a: torch.Tensor = a) -> None:
            leaf = a.clone().requires_grad_(True)
            matrix_sqrt(leaf).square().sum().backward()

        def eigh(a: torch.Tensor = a) -> None:
            leaf = a.clone().requires_grad_(True)
            w, v = torch.linalg.eigh(leaf)
            ((v * w.sqrt()[..., None, :]) @ v.mT).square().sum().backward()

        def floor(a: torch.Tensor = a) -> None:
            b = a / a.norm()
            for _ in range(45):
                b = torch.bmm(b, a)

        ours(), eigh(), floor()
        rows += compare(ours, {f"matrix square root, 64 of {d} x {d}, eigh": eigh}, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
