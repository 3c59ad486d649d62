"""OSA-DAS against plain occlusion on digits at random places of a cluttered canvas, class-agnostic against class-aware.

The claim holds if the top score lies on the digit more often than that of occlusion by 0.03, or if the insertion area is
higher with a 90 % interval above zero. A random map is the control.
"""

from __future__ import annotations

from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import Oracle, bootstrap_interval
from perturbkit.core.random import uniform
from perturbkit.explain import (
    deletion_curve,
    insertion_curve,
    minimal_size,
    occlusion,
    osa_das,
    pointing_game,
)
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.explain._canvas import Canvas, canvas_classifier, draw_canvas

_WINDOW, _STRIDE, _N = 4, 2, 100


@paper(
    number=2,
    title="Occlusion Sensitivity Analysis with Augmentation Subspace Perturbation in Deep Feature Space",
    authors="Valois, Niinuma, Fukui",
    year=2023,
    arxiv="2311.15022",
    claim="Distances of feature subspaces under augmentation explain better than the output of one occluded image, without "
    "a class.",
    method="perturbkit.explain.osa_das",
    needs="forward",
    input="image",
    cost="n_augment evaluations a window",
    seconds=25,
)
def reproduce(run: Run) -> Evidence:
    """Pointing accuracy and insertion area against occlusion with the same windows."""
    from perturbkit.data import load_digits8

    train, test = load_digits8("train"), load_digits8("test")
    model = canvas_classifier(train.x, train.y, run.seeds(1)[0])
    canvas = draw_canvas(test.x, test.y, _N, run.generator("canvas"))
    label = model(canvas.x).argmax(1)
    features, oracle = model[:-1], Oracle(model)
    maps = {
        "OSA-DAS": osa_das(
            features, canvas.x, window=_WINDOW, stride=_STRIDE, generator=run.generator("augmentations")
        ).values,
        "occlusion": occlusion(oracle, canvas.x, label, window=_WINDOW, stride=_STRIDE).values,
        "random": uniform(canvas.x.shape, generator=run.generator("random"), like=canvas.x),
    }
    pointing = {name: pointing_game(values, canvas.inside).values for name, values in maps.items()}
    insertion = {name: insertion_curve(oracle, canvas.x, v, label).area for name, v in maps.items()}
    deletion = {name: deletion_curve(oracle, canvas.x, v, label).area for name, v in maps.items()}
    smallest = {name: minimal_size(oracle, canvas.x, v, label) for name, v in maps.items()}
    gap = insertion["OSA-DAS"] - insertion["occlusion"]
    interval = bootstrap_interval(gap.numpy(), confidence=0.9, generator=run.generator("bootstrap"))
    points, others = (float(pointing[name].mean()) for name in ("OSA-DAS", "occlusion"))
    met = int(points >= others + 0.03) + int(interval.low > 0)
    comparisons = [
        Comparison(
            "criteria met: pointing accuracy up by 0.03, 90 % interval of the insertion gain above 0", met, 1, "higher",
            n=_N, note=f"pointing {points:.2f} against {others:.2f}; insertion gain {float(gap.mean()):.3f} "
            f"[{interval.low:.3f}, {interval.high:.3f}]",
        ),
        Comparison(
            "pointing accuracy of a random map against occlusion", float(pointing["random"].mean()), others, "higher",
            margin=0.03, n=_N, control=True, note="must fail: a random map knows nothing",
        ),
    ]  # fmt: skip
    lines = [
        f"{name}: pointing {float(pointing[name].mean()):.2f}, insertion {float(insertion[name].mean()):.3f}, "
        f"deletion {float(deletion[name].mean()):.3f}, minimal size {float(smallest[name].mean()):.2f}"
        for name in maps
    ]
    accuracy = float((label == canvas.y).float().mean())
    return Evidence(comparisons, _figure(canvas, maps), "; ".join(lines) + f". Test accuracy {accuracy:.2f}.")


def _figure(canvas: Canvas, maps: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots(3, 6)
    for i in range(6):
        axes[0, i].imshow(canvas.x[i, 0], cmap="gray")
        for line, name in enumerate(("OSA-DAS", "occlusion"), start=1):
            axes[line, i].imshow(maps[name][i, 0], cmap="RdBu_r", vmin=-1, vmax=1 if line == 1 else None)
            axes[line, 0].set_title(name, fontsize=7)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure
