"""Optimizers without gradients beside those of nevergrad and, as the upper limit, gradients of torch, on the same problems.

The table has the loss after equal evaluations and the seconds that they took, each method at the best of a grid of rates
(nevergrad's are used as they come). A gradient counts as two evaluations. Below stands what a step takes beyond the
evaluations that it makes, on a network and batch at which that matters: the limit is the draws of random numbers, four of
each weight a step.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from benchmarks._timing import Row
from torch import Tensor, nn

from perturbkit.core.checks import ModelError
from perturbkit.core.random import randn
from perturbkit.optim import MeZO, OneByteSPSA, ZeroOrderSGD, ZOAdaMU

BUDGET = 2000
RATES = (1e-4, 1e-3, 1e-2, 1e-1)
Problem = tuple[int, Callable[[Tensor], Tensor]]


def main(rounds: int = 5) -> list[Row]:
    """Print both tables and return the rows of the second."""
    import nevergrad

    print(
        f"{'loss after ' + str(BUDGET) + ' evaluations (seconds)':<44}"
        + "".join(f"{n:>24}" for n in _problems())
    )
    ours: dict[str, Callable[..., Any]] = {
        "MeZO": MeZO,
        "ZeroOrderSGD, 4 pairs": lambda p, lr: ZeroOrderSGD(p, lr, pairs=4),
        "OneByteSPSA": OneByteSPSA,
        "ZOAdaMU": lambda p, lr: ZOAdaMU(p, lr, total_steps=BUDGET // 2),
    }
    for name, make in ours.items():
        each = 8 if "4 pairs" in name else 2
        _line(name, [_best(problem, make, each) for problem in _problems().values()])
    for name in ("SPSA", "OnePlusOne", "CMA"):
        _line(
            f"nevergrad {name}", [_nevergrad(nevergrad, name, *problem) for problem in _problems().values()]
        )
    for name, make in {
        "torch Adam, with gradients": torch.optim.Adam,
        "torch SGD, with gradients": torch.optim.SGD,
    }.items():
        _line(name, [_best(problem, make, 2, gradient=True) for problem in _problems().values()])
    return _overhead(rounds)


def _problems() -> dict[str, Problem]:
    from perturbkit.data import load_digits8

    digits = load_digits8("train")
    x, y = digits.x.flatten(1).double(), digits.y
    scale = torch.logspace(-2, 0, 100, dtype=torch.float64)
    return {
        "quadratic, d 100": (100, lambda w: (scale * (w - 1).square()).sum() / 2),
        "Rosenbrock, d 10": (
            10,
            lambda w: (100 * (w[1:] - w[:-1] ** 2).square() + (1 - w[:-1]).square()).sum(),
        ),
        "digits, d 650": (
            650,
            lambda w: nn.functional.cross_entropy(x @ w[:640].reshape(64, 10) + w[640:], y),
        ),
    }


def _best(
    problem: Problem, make: Callable[..., Any], each: int, *, gradient: bool = False
) -> tuple[float, float]:
    """Return the least loss over the rates after the budget, and the seconds of that run."""
    d, fun = problem
    found = []
    for lr in RATES:
        w = nn.Parameter(torch.zeros(d, dtype=torch.float64))
        optimizer = make([w], lr=lr)

        def closure(w: nn.Parameter = w, optimizer: Any = optimizer) -> Tensor:
            loss = fun(w)
            if gradient:
                optimizer.zero_grad()
                loss.backward()
            return loss

        start = time.perf_counter()
        try:
            for _ in range(BUDGET // each):
                optimizer.step(closure)
        except ModelError:  # the rate is too large
            continue
        found.append((float(fun(w.detach())), time.perf_counter() - start))
    return min((f for f in found if f[0] == f[0]), default=(float("nan"), 0.0))


def _nevergrad(nevergrad: Any, name: str, d: int, fun: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        space = nevergrad.p.Array(init=torch.zeros(d).numpy())
        space.random_state.seed(0)
        optimizer = nevergrad.optimizers.registry[name](parametrization=space, budget=BUDGET)
        start = time.perf_counter()
        best = optimizer.minimize(lambda v: float(fun(torch.as_tensor(v))))
    return float(fun(torch.as_tensor(best.value))), time.perf_counter() - start


def _line(name: str, cells: list[tuple[float, float]]) -> None:
    print(f"{name:<44}" + "".join(f"{f'{loss:.3g} ({seconds:.2f})':>24}" for loss, seconds in cells))


def _overhead(rounds: int) -> list[Row]:
    """Time steps on a network of 0.8 million weights and 8,192 rows against the evaluations that they make."""
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Linear(256, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )
    x, y = randn((8192, 256), generator=g), torch.arange(8192) % 10

    def loss() -> Tensor:
        return nn.functional.cross_entropy(net(x), y)

    def evaluations() -> None:
        with torch.no_grad():
            loss()
            loss()

    runs: dict[str, Callable[[], Any]] = {"two evaluations": evaluations}
    for made in (
        MeZO(net.parameters(), 1e-6),
        ZeroOrderSGD(net.parameters(), 1e-6),
        OneByteSPSA(net.parameters(), 1e-6),
        ZOAdaMU(net.parameters(), 1e-6),
    ):
        runs[type(made).__name__] = lambda made=made: made.step(loss)  # type: ignore[misc]
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, call in runs.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    rows: list[Row] = []
    for name in list(runs)[1:]:
        beyond = best[name] / best["two evaluations"] - 1
        print(f"a step of {name:<16}{best[name]:.3f} s, {beyond:+.1%} beyond its evaluations")
        rows.append(
            {"comparison": name, "ours_s": best[name], "floor_s": best["two evaluations"], "beyond": beyond}
        )
    return rows


if __name__ == "__main__":
    main()
