"""Lazy Newton against SciPy's second-order minimisers, on logistic regression in 100 and 300 variables.

All reach a gradient of 1e-8 with derivatives by the same differentiation. The floor is one Hessian with its eigendecomposition.
A Hessian costs only a few gradients here, so that renewing it each step (the last peer) is faster than being lazy.
"""

from __future__ import annotations

import numpy as np
import torch
from benchmarks._timing import Row, compare, table
from scipy.optimize import minimize

from perturbkit.core.random import randn
from perturbkit.optim import minimize_lazy_newton


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    rows: list[Row] = []
    for d in (100, 300):
        g = torch.Generator().manual_seed(d)
        a = torch.logspace(0, -1, d, dtype=torch.float64) * randn((1000, d), generator=g, dtype=torch.float64)
        noise = randn((1000,), generator=g, dtype=torch.float64)
        signed = (a @ randn((d,), generator=g, dtype=torch.float64) + noise).sign()[:, None] * a
        start = torch.zeros(d, dtype=torch.float64)

        def fun(x: torch.Tensor, signed: torch.Tensor = signed) -> torch.Tensor:
            return torch.nn.functional.softplus(-x @ signed.T).mean(1) + 5e-4 * x.square().sum(1)

        def hess(x: torch.Tensor, signed: torch.Tensor = signed) -> torch.Tensor:
            p = torch.sigmoid(-signed @ x)
            eye = 1e-3 * torch.eye(len(x), dtype=x.dtype)
            return (signed * (p * (1 - p))[:, None]).T @ signed / len(signed) + eye

        def both(v: np.ndarray, fun=fun) -> tuple[float, np.ndarray]:
            x = torch.as_tensor(v)[None].requires_grad_(True)
            value = fun(x)[0]
            (slope,) = torch.autograd.grad(value, x)
            return float(value.detach()), slope[0].numpy()

        def ours(period: int | str = "dim", fun=fun, hess=hess, start=start) -> np.ndarray:
            return minimize_lazy_newton(
                fun, start, hess=hess, period=period, regularization="gradient"
            ).x.numpy()

        def theirs(method: str, both=both, hess=hess, d: int = d) -> np.ndarray:
            given = {} if method == "BFGS" else {"hess": lambda v: hess(torch.as_tensor(v)).numpy()}
            options = {"xtol": 1e-12} if method == "Newton-CG" else {"gtol": 1e-8}
            return minimize(both, np.zeros(d), jac=True, method=method, options=options, **given).x

        def floor(hess=hess, start=start) -> None:
            torch.linalg.eigh(hess(start))

        peers = {m: (lambda m=m, f=theirs: f(m)) for m in ("trust-exact", "Newton-CG", "BFGS")}
        peers["period 1"] = lambda f=ours: f(1)
        answer = ours()
        for name, peer in peers.items():
            gap = float(np.abs(peer() - answer).max())
            assert gap < 1e-4, f"{name} differs by {gap:g}"
        floor()
        rows += compare(
            ours, {f"lazy Newton, {d} variables, {name}": p for name, p in peers.items()}, floor, rounds
        )
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
