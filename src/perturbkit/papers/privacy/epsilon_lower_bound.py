"""An attack bounds the privacy loss from below: within half of the truth where it is exact, and it exposes broken mechanisms.

Laplace, Gaussian and randomised-response mechanisms whose epsilon is known, and three well-known mistakes: noise for half of
the sensitivity, the same noise used twice, and no accounting of ten releases. Controls: correct mechanisms must not be
exposed.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.privacy import epsilon_lower_bound, gaussian_sigma

_N = 40_000


@paper(
    number=0,
    title="Auditing Differentially Private Machine Learning: How Private is Private SGD?",
    authors="Jagielski, Ullman, Oprea",
    year=2020,
    arxiv="2006.07709",
    claim="Attacks with exact binomial bounds give lower bounds on epsilon that come within a small factor of the proved "
    "upper bound.",
    method="perturbkit.privacy.epsilon_lower_bound",
    needs="data",
    input="any",
    cost="many runs of the mechanism on two inputs",
    seconds=5,
)
def reproduce(run: Run) -> Evidence:
    """Tightness on known mechanisms, and detection of mistakes."""
    comparisons, shown = [], {}
    for name, (epsilon, delta, draw) in _mechanisms().items():
        found = [_bound(draw, delta, seed) for seed in run.seeds(10)]
        shown[name] = (epsilon, float(np.mean(found)))
        comparisons += [
            Comparison(f"largest bound, {name}", max(found), epsilon, "lower", n=10),
            Comparison.over_seeds(
                f"bound against the truth, {name}", found, [epsilon] * 10, "higher", factor=0.5
            ),
        ]
    for name, (stated, draw) in _mistakes().items():
        found = [_bound(draw, 0.0, seed) for seed in run.seeds(10)]
        comparisons.append(Comparison(f"smallest bound, {name}", min(found), stated, "higher", n=10))
    correct = [_bound(lambda r, c, n: r.laplace(c, 1.0, n), 0.0, seed) for seed in run.seeds(10)]
    comparisons.append(
        Comparison(
            "smallest bound, a correct mechanism", min(correct), 1.0, "higher", n=10, control=True,
            note="must fail: there is nothing to expose",
        )
    )  # fmt: skip
    return Evidence(comparisons, _figure(shown), "40,000 runs on each input, confidence 0.999.")


def _bound(draw: object, delta: float, seed: int) -> float:
    rng = np.random.default_rng(seed)
    return epsilon_lower_bound(draw(rng, 0, _N), draw(rng, 1, _N), delta=delta).epsilon  # type: ignore[operator]


def _randomised_response(rng: np.random.Generator, bit: int, n: int) -> np.ndarray:
    """Tell the truth with the probability that makes epsilon one."""
    truth = math.e / (1 + math.e)
    return np.abs(bit - (rng.random(n) >= truth).astype(float))


def _mechanisms() -> dict[str, tuple[float, float, object]]:
    sigma = gaussian_sigma(1.0, 1e-2)
    return {
        "Laplace, epsilon 0.5": (0.5, 0.0, lambda r, c, n: r.laplace(c, 2.0, n)),
        "Laplace, epsilon 2": (2.0, 0.0, lambda r, c, n: r.laplace(c, 0.5, n)),
        "randomised response, epsilon 1": (
            1.0, 0.0, _randomised_response,
        ),
        "Gaussian, epsilon 1, delta 0.01": (1.0, 1e-2, lambda r, c, n: r.normal(c, sigma, n)),
    }  # fmt: skip


def _mistakes() -> dict[str, tuple[float, object]]:
    def reused(r: np.random.Generator, c: int, n: int) -> np.ndarray:
        noise = r.laplace(0, 2.0, n)
        # Two queries at epsilon 1/2 each, 0 and c, with one noise: the difference is the secret.
        return (c + noise) - noise

    return {
        "noise for half of the sensitivity, stated 1": (1.0, lambda r, c, n: r.laplace(2 * c, 1.0, n)),
        "one noise for two answers, stated 1": (1.0, reused),
        "ten releases paid as one, stated 1": (1.0, lambda r, c, n: c + r.laplace(0, 1.0, (n, 10)).mean(1)),
    }


def _figure(shown: dict[str, tuple[float, float]]) -> Figure:
    figure = Figure(figsize=(5.5, 2.8), layout="constrained")
    ax = figure.subplots()
    place = np.arange(len(shown))
    ax.barh(place - 0.2, [v[0] for v in shown.values()], 0.4, label="true epsilon")
    ax.barh(place + 0.2, [v[1] for v in shown.values()], 0.4, label="shown by the attack")
    ax.set_yticks(place, list(shown))
    ax.legend(frameon=False)
    return figure
