"""Prox-linear steps bear step sizes over decades in which subgradients fail, and need no tuning for corrupted data.

Phase retrieval in fifty dimensions from a relative distance of a half: all step sizes run at once, each model at each. The
slope of the envelope's gradient is measured for the theory. The start is the control.
"""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.optim import make_phase_retrieval, minimize_model_based, weakly_convex_envelope
from perturbkit.papers import Comparison, Evidence, Run, paper

D, M, EPOCHS = 50, 250, 100
STEPS = torch.logspace(-4, 2, 13, dtype=torch.float64)


@paper(
    number=226,
    title="Stochastic model-based minimization of weakly convex functions",
    authors="Davis, Drusvyatskiy",
    year=2019,
    arxiv="1803.06523",
    claim="Prox-linear and proximal-point steps are far less sensitive to the step size than subgradients.",
    method="perturbkit.optim.minimize_model_based",
    needs="gradient",
    input="any",
    cost="one sample a step",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Step sizes that recover the signal, by model; recovery from corrupted data; and the envelope's slope."""
    seed = run.seeds(1)[0]
    ends = {model: _ends(model, 0.0, seed, EPOCHS) for model in ("subgradient", "prox_linear", "prox_point")}
    good = {model: int((e < 0.02).sum()) for model, e in ends.items()}
    corrupted = _ends("prox_linear", 0.2, seed, EPOCHS)
    tight = _ends("prox_linear", 0.0, seed, EPOCHS, goal=True) < 1e-4
    slopes = [_slope(s) for s in run.seeds(3)]
    problem, start = make_phase_retrieval(M, D, generator=seed)
    return Evidence(
        [
            Comparison("step sizes of 13 that recover the signal to 2 %, prox-linear over subgradients", good["prox_linear"], max(good["subgradient"], 1), "higher", factor=2),
            Comparison("step sizes of 13 that recover the signal to 2 %, proximal point over subgradients", good["prox_point"], max(good["subgradient"], 1), "higher", factor=2),
            Comparison("step sizes of 13 that recover it to 0.01 %, prox-linear", int(tight.sum()), 4, "higher"),
            Comparison("least error with a fifth of the measurements replaced", float(corrupted.min()), 0.05, "lower"),
            Comparison("slope of the envelope's gradient in the steps, mean of 3", sum(slopes) / 3, -0.2, "lower", n=3),
            Comparison(
                "error of the start", float(problem.distance(start)), 0.02, "lower", control=True, note="must fail: nothing was minimised"
            ),
        ],
        _figure(ends),
    )  # fmt: skip


def _ends(model: str, corrupt: float, seed: int, epochs: int, goal: bool = False) -> Tensor:
    """Return the relative errors after the epochs, one a step size."""
    problem, start = make_phase_retrieval(M, D, corrupt=corrupt, generator=seed)
    found = minimize_model_based(
        problem, start.expand(len(STEPS), -1), model=model, step=STEPS, max_iter=epochs * M // (4 if model == "prox_point" else 1),  # type: ignore[arg-type]
        generator=seed,
    )  # fmt: skip
    return problem.distance(found.x).nan_to_num(torch.inf)


def _slope(seed: int) -> float:
    """Return the slope of the envelope's gradient at a drawn iterate, mean over thirty runs, from 200 to 6400 steps."""
    problem, start = make_phase_retrieval(120, 10, corrupt=0.2, generator=seed)
    means = []
    for steps in (200, 6400):
        found = minimize_model_based(
            problem,
            start.expand(30, -1),
            model="subgradient",
            step=0.1,
            schedule="constant",
            max_iter=steps,
            output="random",
            generator=seed,
        )
        norms = [float(weakly_convex_envelope(problem, x, 0.02, steps=200)[1]) for x in found.x[:10]]
        means.append(sum(norms) / len(norms))
    return math.log(means[1] / means[0]) / math.log(6400 / 200)


def _figure(ends: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    for model, errors in ends.items():
        axes.loglog(STEPS, errors.clamp(1e-12, 10), "o-", label=model.replace("_", "-"))
    axes.axhline(0.02, color="black", linewidth=0.7, linestyle=":")
    axes.set_xlabel("first step size")
    axes.set_ylabel("relative error")
    axes.legend(frameon=False, fontsize=8)
    return figure
