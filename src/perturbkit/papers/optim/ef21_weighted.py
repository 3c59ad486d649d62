"""EF21 with the step of the arithmetic mean of the workers' smoothness against that of the quadratic mean.

Twenty quadratics of which one is steep, and logistic regression on tumours sorted by size over ten workers. Both steps run
the same rounds and send the same bytes. Processes and the simulation must agree. Sending the largest entries of gradients
without error feedback is the control.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import run_workers
from perturbkit.core.random import randn
from perturbkit.optim import TopK, ef21_step_size, simulate_ef21, smoothness_constants
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.optim._distributed import ef21_in_process, logistic_gradients

ROUNDS, L2 = 1500, 0.01


@paper(
    number=182,
    title="Error Feedback Reloaded: From Quadratic to Arithmetic Mean of Smoothness Constants",
    authors="Richtarik, Gasanov, Burlachenko",
    year=2024,
    arxiv="2402.10774",
    claim="EF21 converges with a step set by the arithmetic mean of smoothness constants, and faster where workers differ.",
    method="perturbkit.optim.EF21",
    needs="gradient",
    input="any",
    cost="a gradient and k indices and values a worker and round",
    seconds=45,
)
def reproduce(run: Run) -> Evidence:
    """Squared gradient norms and rounds with either step, and equality with processes."""
    top, x0 = TopK(0.1), randn((10,), generator=run.generator("start"), dtype=torch.float64)
    each = torch.tensor([100.0] + [1.0] * 19, dtype=torch.float64)
    centres = randn((20, 10), generator=run.generator("centres"), dtype=torch.float64)
    grads = [lambda x, c=c, b=b: c * (x - b) for c, b in zip(each, centres, strict=True)]
    steps = {
        kind: ef21_step_size(float(each.mean()), each, 0.1, kind) for kind in ("quadratic", "arithmetic")
    }
    shares = (each / each.sum()).tolist()
    old = simulate_ef21(grads, x0, steps["quadratic"], top, steps=ROUNDS).gradient_norm.square()
    new = simulate_ef21(grads, x0, steps["arithmetic"], top, shares, steps=ROUNDS).gradient_norm.square()
    rounds_old, rounds_new = (_rounds(norms, 1e-6) for norms in (old, new))
    end = min(_rounds(new, 1e-20), ROUNDS - 1)
    parts, mean, workers = _tumours(10)
    logistic = logistic_gradients(parts, L2)
    alpha, zero = TopK(0.1).alpha(30), torch.zeros(30, dtype=torch.float64)
    real = {
        kind: simulate_ef21(
            logistic, zero, ef21_step_size(mean, workers, alpha, kind), TopK(0.1),
            (workers / workers.sum()).tolist() if kind == "arithmetic" else None, steps=ROUNDS,
        ).gradient_norm.square()
        for kind in ("quadratic", "arithmetic")
    }  # fmt: skip
    bare = _without_feedback(grads, x0, steps["arithmetic"], top)
    off, sent = zip(*(_processes(n) for n in (2, 4)), strict=True)
    return Evidence(
        [
            Comparison(
                "orders of magnitude between the squared gradient norms",
                math.log10(old[end] / new[end]),
                6,
                "higher",
                note="where the longer step is below 1e-20 first; later, rounding hides the difference",
            ),
            Comparison(
                "ratio of rounds to a squared gradient norm of 1e-6",
                rounds_old / rounds_new,
                steps["arithmetic"] / steps["quadratic"],
                "equal",
                margin=0.25 * steps["arithmetic"] / steps["quadratic"],
                note="the ratio of the steps, to a quarter",
            ),
            Comparison(
                "last squared gradient norm, logistic regression",
                float(real["arithmetic"][-1]),
                float(real["quadratic"][-1]),
                "lower",
            ),
            Comparison(
                "largest difference of weights, 2 and 4 processes and the simulation", max(off), 0, "equal", margin=1e-10
            ),
            Comparison("bytes a worker and round, of k = 3 entries", max(sent), 3 * (4 + 4), "equal"),
            Comparison(
                "last squared gradient norm, without error feedback",
                bare,
                float(old[-1]),
                "lower",
                control=True,
                note="must fail: what was not sent is lost",
            ),
        ],
        _figure(old, new, real),
        notes=f"The workers' constants have the means {float(each.mean()):.3g} and {float(each.square().mean().sqrt()):.3g} "
        f"for the quadratics, {float(workers.mean()):.3g} and {float(workers.square().mean().sqrt()):.3g} for the tumours. The "
        f"rounds to 1e-6 are {rounds_old} and {rounds_new}.",
    )  # fmt: skip


def _rounds(norms: Tensor, level: float) -> int:
    """Return after how many rounds the squared norm is below a level for the first time."""
    below = (norms < level).nonzero()
    return int(below[0]) if len(below) else len(norms)


def _without_feedback(grads: Sequence[Callable[[Tensor], Tensor]], x0: Tensor, lr: float, top: TopK) -> float:
    x = x0.clone()
    for _ in range(ROUNDS):
        x = x - lr * torch.stack([top.decode(top.encode(g(x)), len(x)) for g in grads]).mean(0)
    return float(torch.stack([g(x) for g in grads]).mean(0).square().sum())


def _tumours(n: int) -> tuple[list[tuple[Tensor, Tensor]], float, Tensor]:
    """Return the rows of n workers, sorted by their size, and the constants of the gradients."""
    from perturbkit.data import load_breast_cancer

    data = load_breast_cancer()
    x = data.x.double()
    x = (x - x.mean(0)) / x.std(0)
    order = x.norm(dim=1).argsort()
    parts = [(x[rows], 2.0 * data.y[rows] - 1) for rows in order.chunk(n)]
    found = smoothness_constants([a for a, _ in parts], "logistic", L2)
    return parts, found.mean, found.workers


def _processes(n: int) -> tuple[float, float]:
    """Return how far processes are from the simulation after 50 rounds, and the bytes of a compressed round."""
    parts, mean, workers = _tumours(n)
    lr, top = ef21_step_size(mean, workers, 0.1), TopK(0.1)
    options: dict[str, Any] = {"lr": lr, "compressor": top, "weights": (workers / workers.sum()).tolist()}
    alone = simulate_ef21(
        logistic_gradients(parts, L2), torch.zeros(30, dtype=torch.float64), steps=50, **options
    )
    found = run_workers(ef21_in_process, n, parts, L2, 50, options)
    off = max(float((w - alone.x).abs().max()) for w, _ in found)
    return off, (found[0][1] - 30 * 8) / 49


def _figure(old: Tensor, new: Tensor, real: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(7, 3), layout="constrained")
    pairs = ((old, new, "one steep quadratic of 20"), (*real.values(), "tumours over 10 workers"))
    for axes, (a, b, title) in zip(figure.subplots(1, 2), pairs, strict=True):
        axes.semilogy(a, color="tab:gray", label="step of the quadratic mean")
        axes.semilogy(b, color="tab:blue", label="step of the arithmetic mean, weighted")
        axes.set_xlabel("round")
        axes.set_title(title, fontsize=10)
    figure.axes[0].set_ylabel("squared gradient norm")
    figure.axes[0].legend(frameon=False, fontsize=8)
    return figure
