"""The pointing game tells explanations that find the object from the guess that it is in the middle.

Digits lie at random places of cluttered canvases; integrated gradients and occlusion must point at the digit more often
than the centre of the canvas does, by 0.1 (the centre itself lies on three digits of four). A random map is the control.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import Attribution, Oracle
from perturbkit.core.random import uniform
from perturbkit.explain import integrated_gradients, occlusion, pointing_game
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.explain._canvas import canvas_classifier, draw_canvas

_N = 200


@paper(
    number=0,
    title="Top-down Neural Attention by Excitation Backprop",
    authors="Zhang, Lin, Brandt, Shen, Sclaroff",
    year=2016,
    arxiv="1608.00507",
    claim="In the pointing game explanations localise the object better than the centre of the image does.",
    method="perturbkit.explain.pointing_game",
    needs="data",
    input="any",
    cost="no evaluation",
    seconds=25,
)
def reproduce(run: Run) -> Evidence:
    """Pointing accuracy of two explanations, the centre and a random map."""
    from perturbkit.data import load_digits8

    train, test = load_digits8("train"), load_digits8("test")
    model = canvas_classifier(train.x, train.y, run.seeds(1)[0])
    canvas = draw_canvas(test.x, test.y, _N, run.generator("canvas"))
    oracle = Oracle(model)
    label = oracle(canvas.x).argmax(1)
    line = torch.arange(16.0) - 7.5
    centre = -(line[:, None] ** 2 + line[None] ** 2).expand(_N, 1, -1, -1)
    maps: dict[str, Attribution | Tensor] = {
        "integrated gradients": integrated_gradients(oracle, canvas.x, label, n_steps=32),
        "occlusion": occlusion(oracle, canvas.x, label, window=4, stride=2),
        "centre": centre,
        "random": uniform(canvas.x.shape, generator=run.generator("random"), like=canvas.x),
    }
    hits = {name: pointing_game(values, canvas.inside).values for name, values in maps.items()}
    comparisons = [
        Comparison(
            f"pointing accuracy of {name} against the centre", float(hits[name].mean()), float(hits["centre"].mean()),
            "higher", margin=0.1, n=_N, spread=float((hits[name] - hits["centre"]).std() / _N**0.5),
            control=name == "random", note="must fail: a random map knows nothing" if name == "random" else "",
        )
        for name in ("integrated gradients", "occlusion", "random")
    ]  # fmt: skip
    figure = Figure(figsize=(4, 2.6), layout="constrained")
    ax = figure.subplots()
    ax.bar(list(hits), [float(h.mean()) for h in hits.values()], color="#4393c3")
    ax.set_ylabel("pointing accuracy")
    ax.tick_params(axis="x", labelrotation=20)
    return Evidence(comparisons, figure)
