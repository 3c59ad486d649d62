"""Optimizers without gradients beside those of nevergrad and, as the upper limit, gradients of torch, on the same problems.

The table has the loss after equal evaluations and the seconds that they took, each method at the best of a grid of rates
(nevergrad's are used as they come). A gradient counts as two evaluations. Below stands what a step takes beyond the
evaluations that it makes, on a network and batch at which that matters, and how much of it are draws of random numbers, which
nothing can avoid that neither holds the direction nor a copy of the weights: three of each weight a step for one direction.
At 4 ns a number and 300 ns a weight for two evaluations of 8,192 rows, on one core, these are 4 %, and 8 % for ZOAdaMU while it
anneals; at 3,300 rows three draws alone are 10 %, whatever else a step does. As much again takes what brings the weights
back bit for bit: of each move, which weights did not come back is found and kept.

The C library gives memory back to the system between the evaluations of a step, where what a step allocates lies above them,
and takes it anew page by page: 8,000 to 20,000 page faults an evaluation, which are none of two evaluations in a row and cost
another 10 % to 20 % here. The second table is taken with memory kept; for training on a processor, set MALLOC_TRIM_THRESHOLD_
and MALLOC_MMAP_THRESHOLD_ above the batch's largest tensors, as it does.
"""

from __future__ import annotations

import ctypes
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from benchmarks._timing import Row
from torch import Tensor, nn

from perturbkit.core.checks import ModelError
from perturbkit.core.parameters import seeded_directions
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


def _keep_memory() -> None:
    """Let the C library of GNU keep what is freed, as MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ do."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**28)


def _overhead(rounds: int) -> list[Row]:
    """Time steps on a network of 0.7 million weights and 8,192 rows against the evaluations that they make."""
    _keep_memory()
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

    weights = list(net.parameters())

    def draws() -> None:
        for _ in seeded_directions(weights, 0):
            pass

    later = ZOAdaMU(weights, 1e-6, total_steps=1000)
    for _ in range(300):
        later.advance()
    optimizers: dict[str, tuple[int, Any]] = {
        "MeZO": (3, MeZO(weights, 1e-6)),
        "ZeroOrderSGD": (4, ZeroOrderSGD(weights, 1e-6)),
        "OneByteSPSA": (3, OneByteSPSA(weights, 1e-6)),
        "ZOAdaMU": (3, ZOAdaMU(weights, 1e-6)),
        "ZOAdaMU, annealing": (6, later),
    }
    runs: dict[str, Callable[[], Any]] = {"two evaluations": evaluations, "draws": draws}
    for name, (_, made) in optimizers.items():
        runs[name] = lambda made=made: made.step(loss)  # type: ignore[misc]
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(rounds):
        for name, call in runs.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    rows: list[Row] = []
    for name, (n, _) in optimizers.items():
        floor = best["two evaluations"]
        beyond, drawn = best[name] / floor - 1, n * best["draws"] / floor
        print(
            f"a step of {name:<20}{best[name]:.3f} s, {beyond:+.1%} beyond its evaluations, of which {n} draws {drawn:.1%}"
        )
        rows.append(
            {"comparison": name, "ours_s": best[name], "floor_s": floor, "beyond": beyond, "draws": drawn}
        )
    return rows


if __name__ == "__main__":
    main()
