"""Images that other models still read and a plain model does not: what a test set leaves out, found by the model's own loss.

Four networks for 8x8 digits, trained on one part of the data; three classifiers of other kinds on another part are the
oracles, and three on a third the judges. Images move in the principal components of the digits. The control is the same
climb without oracles, whose images need not show their digit any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Oracle, around
from perturbkit.core.random import randn, randperm, uniform
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.robust._digits import accuracy, fill, fit, small_network
from perturbkit.robust import (
    FMRReport,
    LatentPerturber,
    PixelPerturber,
    foundation_model_robustness,
    oracle_vote,
    projected_gradient,
)

_ROWS, _PLAIN, _TRAINED = 200, ("perceptron", "convolution"), ("noise", "attack")
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@paper(
    number=87,
    title="Foundation Model-oriented Robustness: Robust Image Model Evaluation with Pretrained Models",
    authors="Zhang, Liu, Li, Xie, Kim, Wang",
    year=2024,
    arxiv="2308.10632",
    claim="Images moved uphill in a model's loss as far as oracles still recognise them fool models that do well on the test "
    "set, stay what they were, and rank models by how they generalise.",
    method="perturbkit.robust.foundation_model_robustness",
    needs="gradient",
    input="image",
    cost="max_iter gradients a row, and as many evaluations of every oracle",
    seconds=45,
)
def reproduce(run: Run) -> Evidence:
    """Measure four models beside oracles, and ask judges."""
    from perturbkit.data import load_digits8

    train, test = load_digits8("train"), load_digits8("test")
    order = randperm(len(train), generator=run.generator("parts"))
    parts = [(train.x[rows], train.y[rows]) for rows in order.split([600, 480, len(train) - 1080])]
    rows = randperm(len(test), generator=run.generator("rows"))[:_ROWS]
    x, y = test.x[rows], test.y[rows]
    models = _models(*parts[0], run)
    zoo, jury = (
        _zoo(*part, run.generator(name)) for part, name in zip(parts[1:], ("zoo", "jury"), strict=True)
    )
    latent = _principal(train.x)

    def measured(model: nn.Module, oracles: list[Oracle], max_iter: int = 50) -> FMRReport:
        return foundation_model_robustness(
            model, oracles, x, y, perturber=latent, judges=jury, max_iter=max_iter, progress=run.progress
        )

    reports = {name: measured(model, zoo) for name, model in models.items()}
    free = {name: measured(models[name], []) for name in _PLAIN}
    shorter = {k: measured(models["convolution"], zoo, k) for k in (5, 10, 20)}
    shifted = {name: _under_shift(model, test.x, test.y, run) for name, model in models.items()}
    fmr = {name: report.fmr for name, report in reports.items()}
    best = max(fmr[name] for name in _TRAINED), max(fmr[name] for name in _PLAIN)
    rank = float(spearmanr([fmr[n] for n in models], [shifted[n] for n in models]).statistic)
    pixels = {name: _attacked(models[name], reports[name], jury, x, y, run) for name in _PLAIN}
    n = _ROWS
    comparisons = [
        *(
            Comparison(f"{name}: accuracy on the images generated, 20 points below that on the test set", reports[name].perturbed_accuracy, reports[name].standard_accuracy, "lower", margin=0.2, n=n)
            for name in _PLAIN
        ),
        *(
            Comparison(f"{name}: changed images that held-out judges still read", reports[name].validity, 0.85, "higher", n=int((reports[name].steps > 0).sum()))
            for name in models
        ),
        Comparison("FMR, the better of training under noise and under attack against the better plain model", best[0], best[1], "higher", n=n),
        Comparison("rank correlation of FMR with accuracy under shifts and turns, four models", rank, 0.6, "higher", n=4),
        *(
            Comparison(f"{name}: changed images that judges still read, without oracles", free[name].validity, 0.85, "higher", control=True, n=n, note="must fail: nothing holds the images to their digit")
            for name in _PLAIN
        ),
    ]  # fmt: skip
    table = "; ".join(
        f"{name} {r.standard_accuracy:.2f}, {r.perturbed_accuracy:.2f}, {r.fmr:.2f}, under shifts {shifted[name]:.2f}"
        for name, r in reports.items()
    )
    return Evidence(
        comparisons,
        _figure(x, reports["convolution"], free["convolution"]),
        notes=f"Standard and perturbed accuracy and FMR: {table}. The judges read {_vote_accuracy(jury, x, y):.2f} of the test "
        "images, and of pixel attacks without oracles as long as what was generated "
        + ", ".join(f"{pixels[name]:.2f} ({name})" for name in _PLAIN)
        + ". Fifty steps of 0.1 lead to where the oracles, small classifiers themselves, are about to give in, and there judges "
        "differ from them; sooner they agree more. For the convolution, accuracy and validity after "
        + "; ".join(f"{k} steps {r.perturbed_accuracy:.2f}, {r.validity:.2f}" for k, r in shorter.items())
        + ". Principal components for VQGAN, and neighbours, a kernel machine and a network for foundation models.",
    )


def _models(x: Tensor, y: Tensor, run: Run) -> dict[str, nn.Module]:
    noise = run.generator("noise")

    def noisy(net: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return _plain(net, a + 0.25 * randn(a.shape, generator=noise, like=a), b)

    def attacked(net: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        found = projected_gradient(net, a, b, around(a, "linf", 0.15), n_steps=5, generator=noise)
        return _plain(net, found.x, b)

    losses: dict[str, Loss] = dict(zip((*_PLAIN, *_TRAINED), (_plain, _plain, noisy, attacked), strict=True))
    models: dict[str, nn.Module] = {}
    for name, loss in losses.items():
        net = _perceptron(run) if name == "perceptron" else small_network(run.generator("weights"))
        fit(net, x, y, loss, 40, run.generator("order"), lr=0.05)
        models[name] = net
    return models


def _perceptron(run: Run) -> nn.Sequential:
    layers = (
        nn.Flatten(),
        nn.utils.skip_init(nn.Linear, 64, 64),
        nn.ReLU(),
        nn.utils.skip_init(nn.Linear, 64, 10),
    )
    return fill(nn.Sequential(*layers), run.generator("weights"))


def _zoo(x: Tensor, y: Tensor, generator: torch.Generator) -> list[Oracle]:
    """Return neighbours, a kernel machine and a network trained on moved digits, as oracles."""
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC

    def loss(net: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return _plain(net, _moved(a, generator, 0.5, 10.0), b)

    net = small_network(generator, width=16)
    fit(net, x, y, loss, 40, generator, lr=0.05)
    flat = x.flatten(1).numpy()
    others: list[Any] = [KNeighborsClassifier(3), SVC(C=10)]
    return [Oracle(net), *(Oracle(_scores(model.fit(flat, y.numpy()))) for model in others)]


def _scores(model: Any) -> Callable[[Tensor], Tensor]:
    """Return the answers of a classifier of scikit-learn as scores."""

    def scores(x: Tensor) -> Tensor:
        labels = torch.from_numpy(model.predict(x.flatten(1).numpy()))
        return functional.one_hot(labels, 10).to(x.dtype)

    return scores


def _principal(x: Tensor, n_components: int = 32) -> LatentPerturber:
    """Return the projection on principal components as an autoencoder, its answers cut to [0, 1]."""
    flat = x.flatten(1)
    mean = flat.mean(0)
    basis = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:n_components]
    return LatentPerturber(
        lambda z: (z.flatten(1) - mean) @ basis.T,
        lambda code: (mean + code @ basis).clamp(0, 1).reshape(-1, 1, 8, 8),
    )


def _moved(x: Tensor, generator: torch.Generator, pixels: float, degrees: float) -> Tensor:
    """Shift each image by up to so many pixels a side and turn it by up to so many degrees."""
    turn, right, down = uniform((3, len(x)), -1, 1, generator=generator)
    angle = torch.deg2rad(degrees * turn)
    first = torch.stack([angle.cos(), -angle.sin(), pixels / 4 * right], 1)
    second = torch.stack([angle.sin(), angle.cos(), pixels / 4 * down], 1)
    grid = functional.affine_grid(torch.stack([first, second], 1), list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, align_corners=False)


def _under_shift(model: nn.Module, x: Tensor, y: Tensor, run: Run) -> float:
    """Return the accuracy on test images shifted by up to a pixel and turned by up to twenty degrees."""
    return accuracy(model, _moved(x, run.generator("shift"), 1.0, 20.0), y)


def _attacked(
    model: nn.Module, report: FMRReport, jury: list[Oracle], x: Tensor, y: Tensor, run: Run
) -> float:
    """Return how often judges still read pixel attacks of the Euclidean length of the changes that were generated."""
    moved = report.steps > 0
    length = float((report.images - x)[moved].flatten(1).norm(dim=1).mean())
    found = foundation_model_robustness(
        model, [], x[moved], y[moved], perturber=PixelPerturber("l2", length), judges=jury
    )
    return found.validity


def _vote_accuracy(jury: list[Oracle], x: Tensor, y: Tensor) -> float:
    """Return the accuracy of a vote."""
    return float((oracle_vote(jury, x) == y).double().mean())


def _plain(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return functional.cross_entropy(net(x), y)


def _figure(x: Tensor, held: FMRReport, free: FMRReport) -> Figure:
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots(3, 8)
    chosen = (held.steps > 0).nonzero()[:8, 0]
    for line, (images, name) in zip(axes, ((x, "given"), (held.images, "with oracles"), (free.images, "without")), strict=True):  # fmt: skip
        for ax, row in zip(line, chosen.tolist(), strict=False):
            ax.imshow(images[row, 0], cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, fontsize=7)
    return figure
