"""AdaGrad step sizes bear rates over four decades, and have the two regimes and thin tails that the theory says.

Logistic regression and least squares with noisy gradients, and a sum of bounded non-convex functions. Constant rates are the
baseline, and their survival at every rate the control.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core.random import randn
from perturbkit.optim import adagrad_norm_bound, high_probability_experiment
from perturbkit.papers import Comparison, Evidence, Run, paper

RATES = (0.1, 1.0, 10.0, 100.0, 1000.0)
STEPS, LONG = 2000, 20_000


@paper(
    number=110,
    title="SGD with AdaGrad Stepsizes: Full Adaptivity with High Probability to Unknown Parameters, Unbounded Gradients and Affine Variance",
    authors="Attia, Koren",
    year=2023,
    arxiv="2302.08783",
    claim="AdaGrad step sizes need no knowledge of smoothness or noise, with rates that hold with high probability.",
    method="perturbkit.optim.AdaGradNorm",
    needs="weights",
    input="any",
    cost="a norm a step and one number of state",
    seconds=40,
)
def reproduce(run: Run) -> Evidence:
    """Sensitivity to the rate, slopes in the steps, tails over runs, and the bound."""
    g = run.generator("problems")
    seed = run.seeds(1)[0]
    beds = _beds(g)
    comparisons = []
    overflow = {}
    for name in ("logistic regression", "least squares"):
        gradient = beds[name][0]
        ends = [
            float(
                high_probability_experiment(
                    gradient,
                    torch.zeros(20, dtype=torch.float64),
                    runs=1,
                    steps=STEPS,
                    lr=lr,
                    sigma0=0.1,
                    generator=seed,
                ).last[0]
            )
            for lr in RATES
        ]
        overflow[name] = sum(not math.isfinite(_constant(gradient, lr)) for lr in RATES)
        comparisons.append(
            Comparison(
                f"largest over least last squared gradient, rates 0.1 to 1000, {name}",
                max(ends) / min(ends),
                100.0,
                "lower",
                n=len(RATES),
            )
        )
    comparisons.append(
        Comparison(
            "constant rates that overflow on least squares, of 5", overflow["least squares"], 3, "higher"
        )
    )
    gradient, smoothness, start = beds["sum of squared tangents"]
    curves = {
        (s0, s1): high_probability_experiment(
            # Noise of constant size is seen at the minimum: elsewhere the way there outweighs it.
            gradient,
            start if s0 == 0 else 0 * start,
            runs=300,
            steps=LONG,
            lr=0.1,
            sigma0=s0,
            sigma1=s1,
            generator=seed,
        ).quantiles
        for s0, s1 in ((0.0, 0.0), (0.0, 1.0), (0.1, 0.5))
    }
    comparisons += [
        Comparison("slope in the steps without noise", _slope(curves[0.0, 0.0][0]), -1.0, "equal", margin=0.2),
        Comparison("slope in the steps, noise in proportion to the gradient", _slope(curves[0.0, 1.0][0]), -1.0, "equal", margin=0.2),
        Comparison("slope in the steps, noise of constant size", _slope(curves[0.1, 0.5][0]), -0.5, "equal", margin=0.2),
    ]  # fmt: skip
    tail = curves[0.1, 0.5][:, -1]
    bound = adagrad_norm_bound(
        "nonconvex",
        smoothness=smoothness,
        gap_or_distance=0.0,
        lr=0.1,
        initial=1e-2,
        sigma0=1.0,
        sigma1=0.5,
        steps=STEPS,
        failure_prob=0.01,
    )
    comparisons += [
        Comparison("99 % quantile over the median of 300 runs", float(tail[1] / tail[0]), 5.0, "lower", n=300),
        Comparison("99 % quantile of 300 runs against the bound", float(tail[1]), bound, "lower", n=300),
        Comparison(
            "constant rates that overflow on least squares, of 5, against none", overflow["least squares"], 0, "equal", control=True,
            note="must fail: constant rates do not bear large values",
        ),
    ]  # fmt: skip
    return Evidence(comparisons, _figure(curves))


Gradient = Callable[[Tensor], Tensor]


def _beds(g: torch.Generator) -> dict[str, tuple[Gradient, float, Tensor]]:
    x = randn((200, 20), generator=g, dtype=torch.float64)
    truth = randn((20,), generator=g, dtype=torch.float64)
    y = x @ truth + 0.1 * randn((200,), generator=g, dtype=torch.float64)
    label = (y > 0).double()
    zero = torch.zeros(20, dtype=torch.float64)
    return {
        "logistic regression": (lambda w: (torch.sigmoid(w @ x.T) - label) @ x / 200, 1.0, zero),
        "least squares": (lambda w: (w @ x.T - y) @ x / 200, 1.0, zero),
        # tanh^2 has a second derivative of at most 2.
        "sum of squared tangents": (lambda w: 2 * torch.tanh(w) * (1 - torch.tanh(w) ** 2), 2.0, torch.full((20,), 1.0, dtype=torch.float64)),
    }  # fmt: skip


def _constant(gradient: Gradient, lr: float) -> float:
    w = torch.zeros(1, 20, dtype=torch.float64)
    for _ in range(STEPS):
        w = w - lr * gradient(w)
    return float(gradient(w).square().sum())


def _slope(curve: Tensor) -> float:
    """Return the slope over the last decade of steps."""
    t = torch.arange(LONG // 10, LONG, dtype=torch.float64) + 1
    design = torch.stack([torch.ones_like(t), t.log()], 1)
    return float(torch.linalg.lstsq(design, curve[LONG // 10 :].log()[:, None]).solution[1, 0])


def _figure(curves: dict[tuple[float, float], Tensor]) -> Figure:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    for (s0, s1), curve in curves.items():
        axes.loglog(curve[0], label=f"noise {s0:g} + {s1:g} |grad f|")
    axes.set_xlabel("step")
    axes.set_ylabel("mean squared gradient, median")
    axes.legend(frameon=False, fontsize=8)
    return figure
