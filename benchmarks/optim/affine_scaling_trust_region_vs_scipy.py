"""Bounded systems against SciPy's bounded least squares (trf, dogbox), both from the same starts with given Jacobians.

Discretised boundary values in 50 and 100 unknowns, ours to a norm of 1e-8, SciPy's to tolerances with which its answer is right
to 1e-4 (trf stops far from the root with its own). The floor is the evaluations of a run: systems, Jacobians, linear solves.
"""

from __future__ import annotations

import numpy as np
import torch
from benchmarks._timing import Row, compare, table
from scipy.optimize import least_squares

from perturbkit.optim import solve_bounded_system


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    rows: list[Row] = []
    for n in (50, 100):
        h = 1 / (n + 1)
        t = h * torch.arange(1, n + 1, dtype=torch.float64)
        stencil = (
            2 * torch.eye(n) - torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1)
        ).double()

        def fun(x: torch.Tensor, h=h, t=t, stencil=stencil) -> torch.Tensor:
            return x @ stencil + h * h * (x + t + 1) ** 3 / 2

        def jac(x: torch.Tensor, h=h, t=t, stencil=stencil) -> torch.Tensor:
            return stencil + torch.diag(1.5 * h * h * (x + t + 1) ** 2)

        start = torch.full((n,), 0.5, dtype=torch.float64)

        def ours(fun=fun, jac=jac, start=start) -> np.ndarray:
            found = solve_bounded_system(fun, start, (-1.0, 1.0), jac=jac)
            assert found.status == "solved", found.message
            return found.x.numpy()

        def theirs(method: str, fun=fun, jac=jac, start=start) -> np.ndarray:
            return least_squares(
                lambda v: fun(torch.as_tensor(v)[None])[0].numpy(),
                start.numpy(),
                jac=lambda v: jac(torch.as_tensor(v)).numpy(),
                bounds=(-1, 1),
                method=method,
                ftol=1e-14,
                xtol=1e-14,
                gtol=1e-10,
            ).x

        def floor(fun=fun, jac=jac, start=start) -> None:
            for _ in range(5):
                torch.linalg.solve(jac(start), fun(start[None])[0])

        peers = {m: (lambda m=m, f=theirs: f(m)) for m in ("trf", "dogbox")}
        answer = ours()
        for name, peer in peers.items():
            gap = float(np.abs(peer() - answer).max())
            assert gap < 1e-4, f"{name} differs by {gap:g}"
        floor()
        rows += compare(
            ours,
            {f"bounded system, {n} unknowns, SciPy {name}": p for name, p in peers.items()},
            floor,
            rounds,
        )
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
