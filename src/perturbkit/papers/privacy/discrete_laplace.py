"""Discrete Laplace noise is the least wrong for counts, and has no gaps that give the input away.

Mean error of the closest count, absolute and as a chance of missing, against continuous Laplace noise that is rounded,
at the same epsilon; and the attack of Mironov (2012) on the low bits of textbook Laplace noise, which must break it and
must not break this mechanism.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure

from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.privacy import discrete_laplace, epsilon_lower_bound

_N = 40_000


@paper(
    number=0,
    title="Universally Utility-Maximizing Privacy Mechanisms",
    authors="Ghosh, Roughgarden, Sundararajan",
    year=2009,
    arxiv="0811.2841",
    claim="For every loss that grows with the distance and every prior, discrete Laplace noise on a count does as well as "
    "the best private mechanism for that loss and prior.",
    method="perturbkit.privacy.discrete_laplace",
    needs="data",
    input="any",
    cost="3 microseconds a count",
    seconds=6,
)
def reproduce(run: Run) -> Evidence:
    """Errors at equal epsilon, and the attack on low bits."""
    comparisons = []
    epsilons = (0.3, 1.0, 3.0)
    losses: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "absolute error": np.abs,
        "chance of missing": lambda e: (e != 0) * 1.0,
    }
    curves: dict[str, list[float]] = {"discrete": [], "rounded": []}
    for epsilon in epsilons:
        ours, rounded = [], []
        for seed in run.seeds(20):
            ours.append(
                discrete_laplace(np.zeros(_N, int), epsilon=epsilon, sensitivity=1, generator=seed).values
            )
            rounded.append(np.round(np.random.default_rng(seed).laplace(0, 1 / epsilon, _N)))
        for name, loss in losses.items():
            left, right = ([float(np.mean(loss(e))) for e in errors] for errors in (ours, rounded))
            comparisons.append(
                Comparison.over_seeds(
                    f"{name} at epsilon {epsilon:g}, against rounded Laplace", left, right, "lower"
                )
            )
            if name == "absolute error":
                curves["discrete"].append(float(np.mean(left)))
                curves["rounded"].append(float(np.mean(right)))
            r = math.exp(-epsilon)
            exact = 2 * r / (1 - r**2) if name == "absolute error" else 2 * r / (1 + r)
            comparisons.append(
                Comparison(f"{name} at epsilon {epsilon:g}, theory", float(np.mean(left)), exact, "equal",
                           margin=0.02 * exact, n=20)
            )  # fmt: skip
    ours_attacked = max(_attack(run, seed, exact=True) for seed in run.seeds(3))
    naive_attacked = min(_attack(run, seed, exact=False) for seed in run.seeds(3))
    comparisons += [
        Comparison("epsilon shown by an attack, stated 1", ours_attacked, 1.0, "lower", n=3),
        Comparison(
            "epsilon shown by the attack on low bits of textbook Laplace noise, stated 1", naive_attacked, 1.0, "lower",
            n=3, control=True, note="must fail: most doubles can come from only one of two neighbouring counts",
        ),
    ]  # fmt: skip
    return Evidence(comparisons, _figure(epsilons, curves))


def _attack(run: Run, seed: int, exact: bool) -> float:
    """Bound epsilon from below by 40,000 outputs on each of the counts 0 and 1."""
    scores = []
    for count in (0, 1):
        if exact:
            noisy = discrete_laplace(
                np.full(_N, count), epsilon=1.0, sensitivity=1, generator=seed + count
            ).values
            scores.append(noisy.astype(float))
        else:
            rng = np.random.default_rng(seed + count)
            u, sign = rng.random(_N), 1 - 2.0 * rng.integers(0, 2, _N)
            noisy = count + sign * np.log(1 - u)
            scores.append(_reachable(noisy, 0).astype(float) - _reachable(noisy, 1))
    return epsilon_lower_bound(*scores).epsilon


def _reachable(outputs: np.ndarray, count: int) -> np.ndarray:
    """Return whether a double can be count + log(u) or count - log(u) for a multiple u of 2**-53."""
    distance = np.abs(outputs - count)
    middle = np.round(np.exp(-distance) * 2.0**53)
    found = np.zeros(len(outputs), dtype=bool)
    for step in range(-6, 7):
        u = (middle + step) * 2.0**-53
        with np.errstate(divide="ignore", invalid="ignore"):
            noise = np.log(u)
        found |= (count + noise == outputs) | (count - noise == outputs)
    return found


def _figure(epsilons: tuple[float, ...], curves: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    ax = figure.subplots()
    for name, errors in curves.items():
        ax.loglog(epsilons, errors, "o-", label=f"{name} Laplace")
    ax.set_xlabel("epsilon")
    ax.set_ylabel("mean absolute error of a count")
    ax.legend(frameon=False)
    return figure
