"""Occlusion shows that a classifier looks at the object: covering it, and not its surroundings, takes the class away.

Digits of 8x8 pixels lie at random places of cluttered 16x16 canvases. The largest fall of the class must lie on the digit,
and covering there must cost more probability than covering a random window. Shuffled weights are the control.
"""

from __future__ import annotations

import copy

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core import Oracle
from perturbkit.core.random import randint
from perturbkit.explain import occlusion, pointing_game
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.explain._canvas import Canvas, canvas_classifier, draw_canvas

_WINDOW, _STRIDE = 4, 2


@paper(
    number=0,
    title="Visualizing and Understanding Convolutional Networks",
    authors="Zeiler, Fergus",
    year=2014,
    arxiv="1311.2901",
    claim="A convolutional classifier localises the object: the probability of its class falls when the object is covered "
    "and not when the background is.",
    method="perturbkit.explain.occlusion",
    needs="forward",
    input="any",
    cost="one evaluation a window",
    seconds=25,
)
def reproduce(run: Run) -> Evidence:
    """Pointing accuracy, and the fall of the class on the object against a random window."""
    from perturbkit.data import load_digits8

    train, test = load_digits8("train"), load_digits8("test")
    model = canvas_classifier(train.x, train.y, run.seeds(1)[0])
    canvas = draw_canvas(test.x, test.y, 400, run.generator("canvas"))
    right = (model(canvas.x).argmax(1) == canvas.y).nonzero()[:200, 0]
    x, y, inside = canvas.x[right], canvas.y[right], canvas.inside[right]
    maps = _maps(model, x, y)
    hits = pointing_game(maps, inside)
    chance = float(hits.extras["chance"].mean())
    control = pointing_game(_maps(_shuffled(model, run.generator("shuffled")), x, y), inside)
    covered, random = _covered(model, x, y, maps, run.generator("window"))
    n, gap = len(x), covered - random
    comparisons = [
        Comparison(
            "share of digits that the largest fall lies on, against chance", float(hits.values.mean()), chance, "higher",
            margin=0.5, n=n, spread=float(hits.values.std() / n**0.5),
        ),
        Comparison(
            "probability of the digit with the top window covered, against a random window", float(covered.mean()),
            float(random.mean()), "lower", margin=0.2, n=n, spread=float(gap.std() / n**0.5),
        ),
        Comparison(
            "share of digits that the largest fall lies on, shuffled weights", float(control.values.mean()), chance,
            "higher", margin=0.5, n=n, control=True, note="must fail: such a network has seen no digit",
        ),
    ]  # fmt: skip
    accuracy = float((model(canvas.x).argmax(1) == canvas.y).float().mean())
    return Evidence(
        comparisons, _figure(Canvas(x, y, inside, canvas.ink[right]), maps), f"Test accuracy {accuracy:.2f}."
    )


def _maps(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    probability = Oracle(lambda z: model(z).softmax(1))
    return occlusion(probability, x, y, window=_WINDOW, stride=_STRIDE).values


def _shuffled(model: nn.Sequential, generator: torch.Generator) -> nn.Module:
    """Return a copy whose weights are shuffled within each layer."""
    shuffled = copy.deepcopy(model)
    for p in shuffled.parameters():
        p.data = p.data.flatten()[torch.randperm(p.numel(), generator=generator)].reshape(p.shape)
    return shuffled


def _covered(
    model: nn.Module, x: Tensor, y: Tensor, maps: Tensor, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the class's probability with the window around the top score covered, and with a random one."""
    top = maps.flatten(1).argmax(1)
    places = [torch.stack([top // 16, top % 16], 1) - _WINDOW // 2, randint(0, 13, (len(x), 2), generator=g)]
    found = []
    for place in places:
        corner = place.clamp(0, 16 - _WINDOW)
        line = torch.arange(16)
        rows, columns = ((line >= corner[:, i, None]) & (line < corner[:, i, None] + _WINDOW) for i in (0, 1))
        kept = ~(rows[:, None, :, None] & columns[:, None, None, :])
        found.append(model(x * kept).softmax(1).gather(1, y[:, None])[:, 0])
    return found[0], found[1]


def _figure(canvas: Canvas, maps: Tensor) -> Figure:
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots(2, 6)
    for i in range(6):
        axes[0, i].imshow(canvas.x[i, 0], cmap="gray")
        axes[1, i].imshow(
            maps[i, 0], cmap="RdBu_r", vmin=-float(maps[i].abs().max()), vmax=float(maps[i].abs().max())
        )
    for ax in axes.flat:
        ax.set_axis_off()
    return figure
