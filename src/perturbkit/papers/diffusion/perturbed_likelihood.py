"""Perturbing data before a likelihood fit of a generator, on curves without noise, against the fit to the data as they are.

A circle and a spiral, in the plane and in ten dimensions: the distance between what the generator draws and the truth, exactly,
by an optimal assignment.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from perturbkit.diffusion import PerturbedLikelihoodGenerator, perturbation_scale
from perturbkit.papers import Comparison, Evidence, Run, paper

_N, _DRAWN = 500, 1000
_MULTIPLES = (0.0, 0.25, 1.0, 4.0)


@paper(
    number=21,
    title="A likelihood approach to nonparametric estimation of a singular distribution using deep generative models",
    authors="Chae, Kim, Kim, Lin",
    year=2023,
    arxiv="2105.04046",
    claim="Likelihood fits of deep generators to data on a low-dimensional set come markedly nearer to the truth in Wasserstein "
    "distance when the data are perturbed first, by the right amount.",
    method="perturbkit.diffusion.PerturbedLikelihoodGenerator",
    needs="training",
    input="tabular",
    cost="O(batch n_latent features) a step",
    seconds=120,
)
def reproduce(run: Run) -> Evidence:
    """Wasserstein distances with and without perturbation, and over its size."""
    comparisons, shown = [], {}
    sweep: dict[float, list[float]] = {m: [] for m in _MULTIPLES}
    for shape in ("circle", "spiral"):
        for d in (2, 10):
            rows: dict[float, list[float]] = {0.0: [], 1.0: []}
            for seed in run.seeds(3):
                rng = np.random.default_rng(seed)
                basis = np.linalg.qr(rng.normal(size=(d, 2)))[0].T
                x = _curve(shape, rng.random(_N)) @ basis
                # Evenly along the curve: the truth itself, without the noise of another sample.
                truth = _curve(shape, (np.arange(_DRAWN) + 0.5) / _DRAWN) @ basis
                tried = _MULTIPLES if (shape, d) == ("circle", 2) else (0.0, 1.0)
                for multiple in tried:
                    drawn = _drawn(x, multiple, seed)
                    distance = _wasserstein(drawn, truth)
                    if multiple in rows:
                        rows[multiple].append(distance)
                    if len(tried) > 2:
                        sweep[multiple].append(distance)
                    if d == 2 and multiple in rows:
                        shown[shape, multiple] = drawn
            comparisons.append(
                Comparison.over_seeds(
                    f"W1, {shape} in {d} dimensions, against no perturbation",
                    rows[1.0],
                    rows[0.0],
                    "lower",
                    factor=0.8,
                )
            )
    comparisons.append(
        Comparison.over_seeds(
            "W1, circle in the plane, the rate against four times it", sweep[1.0], sweep[4.0], "lower"
        )
    )
    comparisons.append(
        Comparison.over_seeds(
            "W1, circle in the plane, four times the rate against no perturbation",
            sweep[4.0],
            sweep[0.0],
            "lower",
            factor=0.8,
            control=True,
            note="must fail: more noise than signal",
        )
    )
    means = ", ".join(f"{m:g}: {np.mean(v):.3f}" for m, v in sweep.items())
    notes = (
        f"{_N} points, 1500 steps, 128 latents on a grid, 3 seeds; W1 between {_DRAWN} draws and as many points evenly along the curve, of "
        "which the draws' own randomness is about 0.04. The fifth that was expected is not reached: on the circle the perturbation takes off "
        "about a tenth; the spiral is fitted badly with and without it, since training stops at a curve that is not wound up. On the "
        "circle four times as many latents change nothing. "
        f"Circle in the plane by multiple of the rate {perturbation_scale(_N, 2.0, 1):.3f}: {means}."
    )
    return Evidence(comparisons, _figure(sweep, shown), notes)


def _curve(shape: str, u: np.ndarray) -> np.ndarray:
    """Return points of the plane at these shares of the curve's parameter."""
    if shape == "circle":
        return np.column_stack([np.cos(2 * np.pi * u), np.sin(2 * np.pi * u)])
    angle = 1.5 * np.pi * (1 + 2 * u)
    return angle[:, None] / 10 * np.column_stack([np.cos(angle), np.sin(angle)])


def _drawn(x: np.ndarray, multiple: float, seed: int) -> np.ndarray:
    """Fit to the data perturbed by this multiple of the rate, and draw."""
    widest = float(np.linalg.norm(x - x.mean(0), 2)) / len(x) ** 0.5
    tau = multiple * perturbation_scale(len(x), 2.0, 1) * widest
    model = PerturbedLikelihoodGenerator(
        perturbation=tau, n_latent=128, max_iter=1500, lr=3e-3, batch_size=64, generator=seed
    )
    return model.fit(x.astype(np.float32)).sample(_DRAWN, generator=seed + 1)


def _wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """Return W1 between samples of equal size: the mean distance under the best assignment."""
    costs = cdist(a, b)
    return float(costs[linear_sum_assignment(costs)].mean())


def _figure(sweep: dict[float, list[float]], shown: dict[tuple[str, float], np.ndarray]) -> Figure:
    figure = Figure(figsize=(10, 3), layout="constrained")
    left, *rest = figure.subplots(1, 5)
    left.plot([str(m) for m in sweep], [np.mean(v) for v in sweep.values()], marker="o")
    left.set_xlabel("perturbation, multiples of the rate")
    left.set_ylabel("W1, circle")
    for ax, ((shape, multiple), points) in zip(rest, shown.items(), strict=True):
        ax.scatter(*points.T, s=2)
        ax.set_title(f"{shape}, {'perturbed' if multiple else 'as it is'}", fontsize=9)
        ax.set_aspect("equal")
        ax.set_axis_off()
    return figure
