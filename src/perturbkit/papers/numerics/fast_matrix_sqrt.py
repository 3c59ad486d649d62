"""The Pade root with its Lyapunov gradient: faster than eigenvalues at small sizes, finite where theirs fails.

Covariance matrices of 64 samples at three sizes, condition number at most 100. Times are of forward and backward
together, the best of several runs in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core.random import randn
from perturbkit.numerics import matrix_sqrt
from perturbkit.papers import Comparison, Evidence, Run, paper

_SIZES = (16, 32, 64)


@paper(
    number=77,
    title="Fast Differentiable Matrix Square Root",
    authors="Song, Sebe, Wang",
    year=2022,
    arxiv="2201.08663",
    claim="A Pade approximant with a Lyapunov gradient is much faster than eigenvalues and Newton-Schulz, and as accurate.",
    method="perturbkit.numerics.matrix_sqrt",
    needs="data",
    input="any",
    cost="5 matrix products and a solve forward, 40 products backward",
    seconds=15,
)
def reproduce(run: Run) -> Evidence:
    """Accuracy, time, and the gradient at equal eigenvalues."""
    comparisons, times = [], {}
    for d in _SIZES:
        a = _covariances(d, run.generator(f"covariances {d}"))
        exact = matrix_sqrt(a.double(), "eigh")
        pade, taylor = (_error(matrix_sqrt(a, m), exact) for m in ("pade", "taylor"))
        comparisons += [
            Comparison(f"relative error, d = {d}", pade, 1e-4, "lower"),
            Comparison(f"relative error against Taylor, d = {d}", pade, taylor, "lower"),
        ]
        times[d] = _race(a, {"Pade": matrix_sqrt, "eigh": _by_eigenvalues, "Newton-Schulz": _unrolled})
        if d <= 32:
            comparisons.append(
                Comparison(
                    f"time of eigh over ours, d = {d}",
                    times[d]["eigh"] / times[d]["Pade"],
                    1.3,
                    "higher",
                    n=64,
                )
            )
    eye = torch.eye(16, requires_grad=True)
    weight = randn((16, 16), generator=run.generator("weight"))
    finite = [
        float(torch.isfinite(torch.autograd.grad((f(eye) * weight).sum(), eye)[0]).double().mean())
        for f in (matrix_sqrt, _by_eigenvalues)
    ]
    comparisons += [
        Comparison("finite share of the gradient at the identity", finite[0], 1.0, "equal"),
        Comparison(
            "finite share, eigenvalues",
            finite[1],
            1.0,
            "equal",
            control=True,
            note="must fail: it divides by zero",
        ),
    ]
    return Evidence(
        comparisons, _figure(times), notes="Times depend on the machine; the other numbers do not."
    )


def _covariances(d: int, generator: torch.Generator) -> Tensor:
    """Return 64 covariances whose condition number is at most 100."""
    samples = randn((64, 4 * d, d), generator=generator)
    values, vectors = torch.linalg.eigh(samples.mT @ samples / (4 * d))
    top = values.amax(1, keepdim=True)
    return (vectors * values.clamp_min(top / 100)[:, None]) @ vectors.mT


def _error(root: Tensor, exact: Tensor) -> float:
    return float(((root.double() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).max())


def _by_eigenvalues(a: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    return (vectors * values.sqrt()[..., None, :]) @ vectors.mT


def _unrolled(a: Tensor) -> Tensor:
    """Five iterations of Newton-Schulz, differentiated through, as in the paper's comparison."""
    norm = a.flatten(-2).norm(dim=-1)[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype)
    y, z = a / norm, eye.expand_as(a)
    for _ in range(5):
        t = 0.5 * (3 * eye - z @ y)
        y, z = y @ t, t @ z
    return y * norm.sqrt()


def _race(a: Tensor, methods: dict[str, Callable[[Tensor], Tensor]], rounds: int = 12) -> dict[str, float]:
    """Return the best time of each, taken in turn."""
    best = dict.fromkeys(methods, float("inf"))
    for _ in range(rounds):
        for name, method in methods.items():
            leaf = a.clone().requires_grad_(True)
            started = time.perf_counter()
            method(leaf).square().sum().backward()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def _figure(times: dict[int, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    for name in next(iter(times.values())):
        ax.loglog(list(times), [1e3 * t[name] for t in times.values()], marker="o", label=name)
    ax.set_xlabel("size of the matrices (64 at once)")
    ax.set_ylabel("forward and backward, ms")
    ax.legend(frameon=False)
    return figure
