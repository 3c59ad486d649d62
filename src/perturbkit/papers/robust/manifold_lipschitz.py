"""Few labels on two moons with a bridge and on digits: the steepest place of the function learned, against a plain Laplacian."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import randperm, seeded_init, uniform
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.robust import ManifoldLipschitzLearner


@paper(
    number=135,
    title="Learning Globally Smooth Functions on Manifolds",
    authors="Cervino, Chamon, Haeffele, Vidal, Ribeiro",
    year=2023,
    arxiv="2210.00301",
    claim="Weighting the Laplacian where the function is steep makes it smoother everywhere than a plain one, at the same fit.",
    method="perturbkit.robust.ManifoldLipschitzLearner",
    needs="training",
    input="any",
    cost="an evaluation and a gradient of all points a step",
    seconds=120,
)
def reproduce(run: Run) -> Evidence:
    """Two labels a class and 200 unlabelled points on moons; ten labels a class of digits 3, 5 and 8."""
    steep: dict[str, list[tuple[float, float]]] = {"moons": [], "digits": []}
    right: dict[str, list[tuple[float, float]]] = {"moons": [], "digits": []}
    plain: list[float] = []
    for seed in run.seeds(2):
        for name, (x, y, labelled) in (("moons", _moons(seed)), ("digits", _digits(seed))):
            fits = [_fit(x, y, labelled, seed, uniform_weights) for uniform_weights in (False, True)]
            steep[name].append((fits[0][0], fits[1][0]))
            right[name].append((fits[0][1], fits[1][1]))
            if name == "moons":
                plain.append(_fit(x, y, labelled, seed + 1, True)[0])
    comparisons = []
    for name in steep:
        comparisons += [
            Comparison.over_seeds(f"{name}: largest squared gradient, against a plain Laplacian at the same fit", [a for a, _ in steep[name]], [b for _, b in steep[name]], "lower", factor=0.7),
            Comparison.over_seeds(f"{name}: accuracy on rows without labels, against a plain Laplacian", [a for a, _ in right[name]], [b for _, b in right[name]], "higher", margin=-0.005 if name == "digits" else 0.0),
        ]  # fmt: skip
    comparisons.append(
        Comparison.over_seeds("moons: a plain Laplacian from another start against itself, largest squared gradient", plain, [b for _, b in steep["moons"]], "lower", factor=0.7, control=True)
    )  # fmt: skip
    figure = _figure(steep)
    return Evidence(
        comparisons,
        figure,
        notes="Both are trained to the same loss on the labels by the same multiplier. On digits the flatter function is the less right one.",
    )


def _moons(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Two moons joined by a thin bridge of points, which belong to the nearer moon."""
    from sklearn.datasets import make_moons

    x, y = make_moons(180, noise=0.06, random_state=seed % 2**32)
    g = torch.Generator().manual_seed(seed)
    along = uniform((24,), generator=g, dtype=torch.float64)[:, None]
    ends = torch.tensor([[1.0, 0.0], [1.0, -0.5]], dtype=torch.float64)
    bridge = ends[0] + along * (ends[1] - ends[0])
    points = torch.cat([torch.from_numpy(x), bridge])
    classes = torch.cat([torch.from_numpy(y), (along[:, 0] > 0.5).long()])
    chosen = torch.cat([(classes == c).nonzero()[:2, 0] for c in (0, 1)])
    return points, classes, chosen


def _digits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    from perturbkit.data import load_digits8

    data = load_digits8()
    keep = torch.isin(data.y, torch.tensor([3, 5, 8]))
    x, y = data.x[keep].flatten(1).double(), data.y[keep]
    order = randperm(len(x), generator=torch.Generator().manual_seed(seed))[:240]
    x, y = x[order], torch.searchsorted(torch.tensor([3, 5, 8]), y[order])
    return x, y, torch.cat([(y == c).nonzero()[:10, 0] for c in range(3)])


def _fit(x: Tensor, y: Tensor, labelled: Tensor, seed: int, plain: bool) -> tuple[float, float]:
    """Return the largest squared gradient and the accuracy on rows without labels."""
    rest = torch.tensor([i for i in range(len(x)) if i not in set(labelled.tolist())])
    classes = int(y.max()) + 1
    with seeded_init(seed % 2**31):
        net = nn.Sequential(nn.Linear(x.shape[1], 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, classes)).double()  # fmt: skip
    targets = torch.eye(classes, dtype=torch.float64)[y]
    learner = ManifoldLipschitzLearner(
        net, lambda out, t: (out - t).square().mean(), 0.01, graph="knn", uniform=plain, primal_lr=3e-3, dual_lr=0.1,
        n_epochs=400, steps_per_epoch=3,
    )  # fmt: skip
    learner.fit(x[labelled], targets[labelled], x[rest])
    with torch.no_grad():
        right = float((net(x[rest]).argmax(1) == y[rest]).double().mean())
    return learner.lipschitz_**2, right


def _figure(steep: dict[str, list[tuple[float, float]]]) -> Figure:
    figure = Figure(figsize=(5, 3), layout="constrained")
    for ax, (name, pairs) in zip(figure.subplots(1, 2), steep.items(), strict=True):
        ax.bar(["weighted", "plain"], torch.tensor(pairs).mean(0))
        ax.set_title(name, fontsize=9)
        ax.set_ylabel("largest squared gradient")
    return figure
