"""Many small projected steps find wrong answers that one step and random noise of the same size do not.

Accuracy of a digits network under attack in the same ball: 20 steps against one step of gradient signs and against random
corners; and ten starts, which add little to one, since their ends have nearly the same loss.
"""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from perturbkit.core import Oracle, around
from perturbkit.core.random import rademacher
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.robust import projected_gradient

_RADII = (0.0, 0.02, 0.04, 0.06, 0.08, 0.1, 0.12)
_RADIUS = 0.08


@paper(
    number=0,
    title="Towards Deep Learning Models Resistant to Adversarial Attacks",
    authors="Madry, Makelov, Schmidt, Tsipras, Vladu",
    year=2018,
    arxiv="1706.06083",
    claim="Projected gradient descent finds far more wrong answers than a single step, and its starts end at nearly the same "
    "loss: it is close to the best that first-order methods find.",
    method="perturbkit.robust.projected_gradient",
    needs="gradient",
    input="any",
    cost="n_steps gradients a row and start",
    seconds=15,
)
def reproduce(run: Run) -> Evidence:
    """Accuracy under three attacks over the radius."""
    from perturbkit.data import digits_classifier, load_digits28

    test = load_digits28("test").rows(range(400))
    oracle = Oracle(digits_classifier(28).module)
    x, y = test.x, test.y

    def standing(radius: float, n_steps: int, **options: Any) -> float:
        found = projected_gradient(
            oracle,
            x,
            y,
            around(x, "linf", radius),
            n_steps=n_steps,
            generator=run.generator("starts"),
            **options,
        )
        return 1 - float(found.success.double().mean())

    def under_noise(radius: float) -> float:
        moved = (x + radius * rademacher(x.shape, generator=run.generator("noise"), like=x)).clamp(0, 1)
        return float((oracle(moved).argmax(1) == y).double().mean())

    one_step: dict[str, Any] = {"n_steps": 1, "loss": "cross-entropy", "random_start": False}
    curves = {
        "20 steps": [standing(r, 20) for r in _RADII],
        "one step": [standing(r, step_size=max(r, 1e-9), **one_step) for r in _RADII],
        "random corners": [under_noise(r) for r in _RADII],
    }
    at = {name: curve[_RADII.index(_RADIUS)] for name, curve in curves.items()}
    ten = standing(_RADIUS, 20, n_restarts=10)
    n = len(test)
    comparisons = [
        Comparison("accuracy at 0.08, 20 steps against one step", at["20 steps"], at["one step"], "lower", margin=0.1, n=n),
        Comparison(
            "accuracy at 0.08, 20 steps against random corners", at["20 steps"], at["random corners"], "lower", margin=0.5, n=n
        ),
        Comparison("accuracy at 0.08, ten starts within 5 points of one", ten, at["20 steps"], "equal", margin=0.05, n=n),
        Comparison(
            "accuracy at 0.08, random corners against one step", at["random corners"], at["one step"], "lower", margin=0.1,
            control=True, n=n, note="must fail: noise has no direction",
        ),
    ]  # fmt: skip
    return Evidence(
        comparisons, _figure(curves), notes="Steps fall from twice the radius, on a softened margin."
    )


def _figure(curves: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    for name, curve in curves.items():
        ax.plot(_RADII, curve, marker="o", label=name)
    ax.set_xlabel("largest change of a pixel")
    ax.set_ylabel("accuracy")
    ax.legend(frameon=False)
    return figure
