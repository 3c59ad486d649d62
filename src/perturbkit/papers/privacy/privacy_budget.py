"""A concentrated budget pays for quadratically more releases than adding epsilons, and stops before the promise breaks.

Number of Gaussian releases of one noise level that (epsilon, delta) = (1, 1e-6) pays for, against adding up the epsilon
of each (at delta over their number) and against advanced composition; and an attack on all releases together, which must
not show more than the promise, while releasing as if each had the budget to itself must.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import brentq

from perturbkit.core import checks
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.privacy import PrivacyBudget, epsilon_lower_bound, gaussian_delta, gaussian_sigma

_EPSILON, _DELTA = 1.0, 1e-6


@paper(
    number=0,
    title="Concentrated Differential Privacy: Simplifications, Extensions, and Lower Bounds",
    authors="Bun, Steinke",
    year=2016,
    arxiv="1605.02065",
    claim="Under zero-concentrated privacy the losses of k Gaussian releases add up to a loss that grows with the square "
    "root of k, by a sharper bound than advanced composition.",
    method="perturbkit.privacy.PrivacyBudget",
    needs="data",
    input="any",
    cost="a scalar minimisation a release",
    seconds=4,
)
def reproduce(run: Run) -> Evidence:
    """How many releases are paid for, and an attack on all of them."""
    sigmas = (40.0, 80.0, 160.0)
    found: dict[str, list[int]] = {"zCDP": [], "advanced": [], "basic": []}
    for sigma in sigmas:
        found["zCDP"].append(_paid(sigma))
        found["advanced"].append(_most(lambda k, s=sigma: _advanced(s, k) <= _EPSILON))  # type: ignore[misc]
        found["basic"].append(_most(lambda k, s=sigma: k * _gaussian_epsilon(s, _DELTA / k) <= _EPSILON))  # type: ignore[misc]
    slope = {name: float(np.polyfit(np.log(sigmas), np.log(n), 1)[0]) for name, n in found.items()}
    comparisons = [
        Comparison("log-log slope of releases paid for in sigma, zCDP", slope["zCDP"], 2.0, "equal", margin=0.1),
        Comparison(
            "the same when epsilons are added", slope["basic"], 2.0, "equal", margin=0.1, control=True,
            note="must fail: about one",
        ),
        Comparison("releases at sigma 160, against advanced composition", found["zCDP"][-1], found["advanced"][-1],
                   "higher", factor=1.2),
        Comparison("releases at sigma 160, against adding epsilons", found["zCDP"][-1], found["basic"][-1], "higher",
                   factor=5.0),
        Comparison("releases at sigma 160, against the exact Gaussian composition", found["zCDP"][-1],
                   _most(lambda k: gaussian_delta(_EPSILON, math.sqrt(k) / 160.0) <= _DELTA), "lower",
                   note="no valid accountant pays for more"),
    ]  # fmt: skip
    honest, careless = [], []
    for seed in run.seeds(5):
        honest.append(_attack(seed, 40.0, found["zCDP"][0]))
        careless.append(_attack(seed, gaussian_sigma(_EPSILON, _DELTA), 20))
    comparisons += [
        Comparison("largest epsilon shown by an attack on all paid releases", max(honest), _EPSILON, "lower", n=5),
        Comparison(
            "epsilon shown when each of 20 releases spends the whole", min(careless), _EPSILON, "lower", n=5, control=True,
            note="must fail: the losses add up",
        ),
    ]  # fmt: skip
    return Evidence(comparisons, _figure(sigmas, found), "epsilon 1, delta 1e-6, sensitivity 1.")


def _paid(sigma: float) -> int:
    budget = PrivacyBudget(_EPSILON, _DELTA)
    try:
        while True:
            budget.spend_gaussian(sigma, 1.0)
    except checks.ArgumentError:
        return budget.n_releases


def _most(allowed: object) -> int:
    """Return the largest k that is allowed, by doubling and bisection."""
    high = 1
    while allowed(high):  # type: ignore[operator]
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if allowed(middle) else (low, middle)  # type: ignore[operator]
    return low


def _gaussian_epsilon(sigma: float, delta: float) -> float:
    if gaussian_delta(0.0, 1 / sigma) <= delta:
        return 0.0
    return float(
        brentq(lambda e: math.log(max(gaussian_delta(e, 1 / sigma), 1e-300)) - math.log(delta), 0, 3)
    )


def _advanced(sigma: float, k: int) -> float:
    """Dwork, Rothblum and Vadhan (2010), half of delta for the releases and half for the composition."""
    e = _gaussian_epsilon(sigma, _DELTA / (2 * k))
    return e * math.sqrt(2 * k * math.log(2 / _DELTA)) + k * e * math.expm1(e)


def _attack(seed: int, sigma: float, k: int) -> float:
    """The sum of k releases is sufficient for a count of 0 or 1."""
    rng = np.random.default_rng(seed)
    samples = [k * count + math.sqrt(k) * sigma * rng.normal(size=40_000) for count in (0, 1)]
    return epsilon_lower_bound(*samples, delta=_DELTA).epsilon


def _figure(sigmas: tuple[float, ...], found: dict[str, list[int]]) -> Figure:
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    ax = figure.subplots()
    for name, n in found.items():
        ax.loglog(sigmas, n, "o-", label=name)
    ax.set_xlabel("noise sigma of a release")
    ax.set_ylabel("releases paid for")
    ax.legend(frameon=False)
    return figure
