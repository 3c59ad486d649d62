"""Restoration and degradation against torchdiffeq's Euler on the probability flow: 400 steps of the same forward process and score.

Methods: restoration_degradation (`sample_restoration_degradation`) and stochastic_interpolant (`StochasticInterpolant.solve` without noise, against
torchdiffeq's Heun, ``heun2``). The first is compared on ``dx = -x dt + sqrt(2) dW`` with Gaussian data of variance 1/4, whose end is known: errors of
both are printed, and ours is asserted to fall by more than 1.4 from 100 to 400 steps (its order is one half, Euler's is one: it is a
proof device). The second is asserted to end where torchdiffeq does, to 1e-12.

The floor is the score and the drifts, called as often. Times in milliseconds. Needs torchdiffeq; runs in half a minute:
``python -m benchmarks restoration_degradation_vs_torchdiffeq``.
"""

from __future__ import annotations

import math

import torch
from benchmarks._timing import Row, compare, table_in_ms
from torch import Tensor

from perturbkit.core.random import as_generator, randn
from perturbkit.diffusion import ForwardSDE, StochasticInterpolant, sample_restoration_degradation

STEPS, HORIZON = 400, 3.0


def main(rounds: int = 3) -> list[Row]:
    """Print the table and return its rows."""
    from torchdiffeq import odeint

    process = ForwardSDE(lambda x, t: -x, lambda t: 2**0.5)
    path = StochasticInterpolant("trigonometric", "zero")

    def variance(t: float) -> float:
        return 1 - 0.75 * math.exp(-2 * t)

    def score(x: Tensor, t: float) -> Tensor:
        return x / -variance(float(t))

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -x - score(x, float(t))

    rows: list[Row] = []
    for shape in ((16, 2), (4, 3, 128, 128)):
        start = math.sqrt(variance(HORIZON)) * randn(shape, generator=as_generator(0), dtype=torch.float64)
        exact = start * math.sqrt(variance(0.0) / variance(HORIZON))

        def ours(n: int = STEPS, x: Tensor = start) -> Tensor:
            times = torch.linspace(HORIZON, 0, n + 1, dtype=torch.float64)
            return sample_restoration_degradation(score, process, x, times).x

        def theirs(n: int = STEPS, x: Tensor = start) -> Tensor:
            return odeint(flow, x, torch.linspace(HORIZON, 0, n + 1, dtype=torch.float64), method="euler")[-1]

        def floor(x: Tensor = start) -> Tensor:
            for _ in range(STEPS):
                x = x + 1e-3 * (score(x, 1.0) + process.drift(x, 1.0) + process.drift(x, 1.0))
            return x

        errors = [
            float((run(n) - exact).abs().max() / exact.abs().max())
            for run in (ours, theirs)
            for n in (100, STEPS)
        ]
        name = "x".join(map(str, shape))
        print(
            f"{name}, relative error at 100 and {STEPS} steps: ours {errors[0]:.4f}, {errors[1]:.4f}, Euler {errors[2]:.4f}, {errors[3]:.4f}"
        )
        assert errors[0] > 1.4 * errors[1]
        rows += compare(ours, {f"restoration and degradation, {name}, torchdiffeq": theirs}, floor, rounds)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return -0.7 * x

        times = torch.linspace(0, 1, 101, dtype=torch.float64)

        def solved(x: Tensor = start, times: Tensor = times) -> Tensor:
            return path.solve(velocity, x, times).x

        def peer(x: Tensor = start, times: Tensor = times) -> Tensor:
            return odeint(lambda t, x: velocity(x, t), x, times, method="heun2")[-1]

        def bare(x: Tensor = start) -> Tensor:
            for _ in range(100):
                slope = -0.7 * x
                x = x + 0.005 * (slope + -0.7 * (x + 0.01 * slope))
            return x

        torch.testing.assert_close(solved(), peer(), rtol=1e-12, atol=1e-12)
        rows += compare(solved, {f"interpolant, 100 Heun steps, {name}, torchdiffeq": peer}, bare, rounds)
    return table_in_ms(rows)


if __name__ == "__main__":
    main()
