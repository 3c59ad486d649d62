"""Discrete Gaussian noise gives the privacy of continuous noise with no more variance, and beats discrete Laplace on vectors.

Privacy curve delta(epsilon) from the masses against that of continuous noise; variance; and the error of a histogram of
many attributes, in each of which a person counts, against discrete Laplace noise at the same (epsilon, delta).
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.privacy import discrete_gaussian, discrete_laplace, gaussian_delta, zcdp_rho

_DELTA = 1e-6


@paper(
    number=0,
    title="The Discrete Gaussian for Differential Privacy",
    authors="Canonne, Kamath, Steinke",
    year=2020,
    arxiv="2004.00010",
    claim="Adding discrete Gaussian noise gives essentially the same privacy and accuracy as continuous Gaussian noise, "
    "and can be sampled exactly.",
    method="perturbkit.privacy.discrete_gaussian",
    needs="data",
    input="any",
    cost="3 microseconds a count",
    seconds=6,
)
def reproduce(run: Run) -> Evidence:
    """Privacy curves, variance, and errors of vectors of counts."""
    comparisons = []
    for sigma in (2.0, 10.0):
        worst = max(_delta(sigma, e) / gaussian_delta(e, 1 / sigma) for e in np.linspace(0.2, 4, 20) / sigma)
        comparisons.append(
            Comparison(
                f"largest ratio of delta, discrete to continuous, sigma {sigma:g}", worst, 1.0, "lower",
                margin=-0.25, note="the paper allows a little more than the continuous curve",
            )
        )  # fmt: skip
    for sigma in (0.5, 1.0, 10.0):
        drawn = [
            float(
                discrete_gaussian(
                    np.zeros(20_000, int), rho=0.5 / sigma**2, sensitivity=1.0, generator=s
                ).values.var()
            )
            for s in run.seeds(10)
        ]
        comparisons.append(
            Comparison.over_seeds(
                f"variance, sigma {sigma:g}", drawn, [sigma**2] * 10, "lower", margin=-0.01 * sigma**2
            )
        )
    dimensions, rho, curves = (1, 10, 100, 1000), zcdp_rho(1.0, _DELTA), {"Gaussian": [], "Laplace": []}  # type: ignore[var-annotated]
    for d in dimensions:
        zeros = np.zeros(d, int)
        ours, laplace = [], []
        for seed in run.seeds(10):
            noisy = discrete_gaussian(zeros, rho=rho, sensitivity=math.sqrt(d), generator=seed)
            ours.append(float(np.abs(noisy.values).mean()))
            pure = discrete_laplace(zeros, epsilon=1.0, sensitivity=d, generator=seed)
            laplace.append(float(np.abs(pure.values).mean()))
        curves["Gaussian"].append(float(np.mean(ours)))
        curves["Laplace"].append(float(np.mean(laplace)))
        if d >= 100:
            comparisons.append(
                Comparison.over_seeds(
                    f"mean absolute error of {d} counts at epsilon 1, against discrete Laplace", ours, laplace, "lower",
                    factor=0.8,
                )
            )  # fmt: skip
        if d == 1:
            comparisons.append(
                Comparison.over_seeds(
                    "mean absolute error of one count at epsilon 1, against discrete Laplace", ours, laplace, "lower",
                    factor=0.8, control=True, note="must fail: for one count Laplace noise is the better",
                )
            )  # fmt: skip
    return Evidence(comparisons, _figure(dimensions, curves), f"delta is {_DELTA:g}.")


def _delta(sigma: float, epsilon: float) -> float:
    """Exact delta of a count under discrete noise: the sum of (P - exp(epsilon) Q) where it is positive."""
    k = np.arange(-40 * math.ceil(sigma), 40 * math.ceil(sigma) + 2)
    p = np.exp(-(k**2) / (2 * sigma**2))
    q = np.exp(-((k - 1) ** 2) / (2 * sigma**2))
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum() / p.sum())


def _figure(dimensions: tuple[int, ...], curves: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    ax = figure.subplots()
    for name, errors in curves.items():
        ax.loglog(dimensions, errors, "o-", label=f"discrete {name}")
    ax.set_xlabel("counts in which each person is")
    ax.set_ylabel("mean absolute error of a count")
    ax.legend(frameon=False)
    return figure
