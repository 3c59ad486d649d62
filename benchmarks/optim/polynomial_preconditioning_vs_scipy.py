"""Krylov and preconditioned gradient steps against SciPy's L-BFGS and scikit-learn's newton-cg, on a gapped logistic regression.

All to a gradient of 1e-6. The floor is a hundred gradients.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from benchmarks._timing import Row, compare, table
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from perturbkit.core.random import randn
from perturbkit.optim import minimize_krylov, minimize_preconditioned


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    n, d = 1000, 50
    g = torch.Generator().manual_seed(0)
    s = torch.cat([torch.tensor([100.0, 90.0, 80.0]), torch.linspace(10, 1, 47)]).double()
    left = torch.linalg.qr(randn((n, d), generator=g, dtype=torch.float64)).Q
    right = torch.linalg.qr(randn((d, d), generator=g, dtype=torch.float64)).Q
    a = left * s @ right.T * (math.sqrt(n) / 100)
    y = (
        a @ randn((d,), generator=g, dtype=torch.float64) + randn((n,), generator=g, dtype=torch.float64)
    ).sign()
    signed, start, ridge = y[:, None] * a, torch.zeros(d, dtype=torch.float64), 1e-5

    def fun(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(-x @ signed.T).mean(1) + ridge / 2 * x.square().sum(1)

    def product(v: torch.Tensor) -> torch.Tensor:
        return (v @ signed.T) @ signed / n + 4 * ridge * v

    def both(v: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.as_tensor(v)[None].requires_grad_(True)
        value = fun(x)[0]
        (slope,) = torch.autograd.grad(value, x)
        return float(value.detach()), slope[0].numpy()

    def ours() -> np.ndarray:
        return minimize_krylov(fun, start, product, degree=4).x.numpy()

    def lbfgs() -> np.ndarray:
        options = {"gtol": 1e-7, "ftol": 1e-16, "maxiter": 10_000, "maxfun": 100_000}
        return minimize(both, start.numpy(), jac=True, method="L-BFGS-B", options=options).x

    def sklearn() -> np.ndarray:
        model = LogisticRegression(
            C=1 / (n * ridge), fit_intercept=False, solver="newton-cg", tol=1e-6, max_iter=1000
        )
        return model.fit(a.numpy(), y.numpy()).coef_[0]

    def floor() -> None:
        for _ in range(100):
            both(start.numpy())

    peers = {
        "SciPy L-BFGS-B": lbfgs,
        "scikit-learn newton-cg": sklearn,
        "ours, accelerated, degree 3": lambda: minimize_preconditioned(
            fun, start, product, degree=3, accelerated=True
        ).x.numpy(),
    }
    least = float(fun(torch.as_tensor(ours())[None])[0])
    for name, peer in peers.items():
        gap = float(fun(torch.as_tensor(peer())[None])[0]) - least
        assert abs(gap) < 1e-7, f"{name} differs by {gap:g}"
    floor()
    rows = compare(ours, {f"Krylov of degree 4, {name}": p for name, p in peers.items()}, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
