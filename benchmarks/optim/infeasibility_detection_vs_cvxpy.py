"""Infeasible linear programs: 50 at once by an anchored Douglas-Rachford iteration, against CVXPY one by one.

All must be found infeasible, ours with a certificate of 1e-3. The floor is a thousand evaluations of the map. The anchor pays in
the worst case and not here, where the plain iteration is several times faster and interior-point solvers faster still.
"""

from __future__ import annotations

import torch
from benchmarks._timing import Row, compare, table

from perturbkit.core.random import randn
from perturbkit.optim import douglas_rachford_operator, solve_fixed_point

PROGRAMS, ROWS, COLUMNS = 50, 10, 20


def main(rounds: int = 2) -> list[Row]:
    """Print the table and return its rows."""
    import cvxpy as cp

    g = torch.Generator().manual_seed(0)
    a = randn((PROGRAMS, ROWS, COLUMNS), generator=g, dtype=torch.float64)
    y = randn((PROGRAMS, ROWS), generator=g, dtype=torch.float64)
    y = y / y.norm(dim=1, keepdim=True)
    # A direction y with y A >= 0 and y b = -1.
    a = a - y[:, :, None] * torch.einsum("pm,pmn->pn", y, a).clamp(max=0)[:, None, :]
    b = randn((PROGRAMS, ROWS), generator=g, dtype=torch.float64)
    b = b - y * ((y * b).sum(1, keepdim=True) + 1)
    inverse = torch.linalg.pinv(a)

    def affine(z: torch.Tensor) -> torch.Tensor:
        return z - torch.einsum("pnm,pm->pn", inverse, torch.einsum("pmn,pn->pm", a, z) - b)

    def certified(displacement: torch.Tensor) -> torch.Tensor:
        u = -torch.einsum("pn,pnm->pm", displacement, inverse)
        image = torch.einsum("pm,pmn->pn", u, a)
        return ((u * b).sum(1) < 0) & ((-image).clamp(min=0).norm(dim=1) <= 1e-3 * image.norm(dim=1))

    operator = douglas_rachford_operator(affine, lambda z: z.clamp(min=0))
    start = torch.zeros(PROGRAMS, COLUMNS, dtype=torch.float64)

    def ours(method: str = "halpern") -> None:
        found = solve_fixed_point(operator, start, method=method, max_iter=2**15, verify=certified)  # type: ignore[arg-type]
        assert set(found.status) == {"infeasible"}, found.status

    def theirs(solver: str) -> None:
        for matrix, right in zip(a.numpy(), b.numpy(), strict=True):
            x = cp.Variable(COLUMNS)
            program = cp.Problem(cp.Minimize(0), [matrix @ x == right, x >= 0])
            program.solve(solver=solver)
            assert "infeasible" in program.status, program.status

    def floor() -> None:
        for _ in range(1000):
            operator(start)

    peers = {f"CVXPY with {s}": (lambda s=s: theirs(s)) for s in ("SCS", "OSQP", "CLARABEL")}
    peers["ours without the anchor"] = lambda: ours("picard")
    ours(), floor()
    for peer in peers.values():
        peer()
    rows = compare(ours, {f"50 infeasible programs, {name}": p for name, p in peers.items()}, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
