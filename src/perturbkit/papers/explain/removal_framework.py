"""One set of choices covers the known methods: the whole grid runs, and where features hang together the removal matters.

A linear-Gaussian model with six features, independent and with correlation 0.9: conditional and marginal Shapley values
must agree to 0.02 in the first and differ by more than 0.1 in the second. Retrained Shapley values of diabetes must be the
averages of R^2 over orders. Every cell of 6 removals, 5 behaviours and 9 summaries must give finite scores, and Shapley values of a
breast-cancer network must find what lowers its output faster than a random order.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core import Oracle, all_masks
from perturbkit.core.random import randn, seeded_init, uniform
from perturbkit.explain import (
    RBX_METHODS,
    Banzhaf,
    ConditionalGaussian,
    DatasetLoss,
    DefaultRemoval,
    HighValueSubset,
    IncludeIndividual,
    LinearModel,
    LowValueSubset,
    MarginalRemoval,
    MeanLabel,
    MeanWhenIncluded,
    Output,
    PartitionedSubsets,
    Prediction,
    PredictionLoss,
    ProductMarginalRemoval,
    RemovalExplainer,
    RemoveIndividual,
    RetrainRemoval,
    Shapley,
    UniformRemoval,
    deletion_curve,
    insertion_curve,
)
from perturbkit.papers import Comparison, Evidence, Run, paper

_SUMMARIES = (
    RemoveIndividual(), IncludeIndividual(), Shapley(), Banzhaf(), MeanWhenIncluded(), LinearModel(), LowValueSubset(3),
    HighValueSubset(3), PartitionedSubsets(3),
)  # fmt: skip


@paper(
    number=171,
    title="Feature Removal Is a Unifying Principle for Model Explanation Methods",
    authors="Covert, Lundberg, Lee",
    year=2020,
    arxiv="2011.03623",
    claim="Twenty-six explanation methods are combinations of a removal, a behaviour and a summary, which compose freely.",
    method="perturbkit.explain.RemovalExplainer",
    needs="forward",
    input="any",
    cost="2^d removals a row up to 12 parts, n_samples beyond",
    seconds=25,
)
def reproduce(run: Run) -> Evidence:
    """Correlated features, retrained models, the grid, and curves of every summary."""
    apart = {rho: _difference(rho, run) for rho in (0.0, 0.9)}
    finite, total, areas = _tumours(run)
    shapley, chance = areas["Shapley"], areas["random"]
    comparisons = [
        Comparison("conditional less marginal Shapley, L1, correlation 0.9", apart[0.9], 0.1, "higher", n=20),
        Comparison("conditional less marginal Shapley, L1, independent", apart[0.0], 0.02, "lower", n=20),
        Comparison(
            "the difference at correlation 0.9, for independent features", apart[0.0], 0.1, "higher", n=20, control=True,
            note="must fail: without correlation both removals are the same",
        ),
        Comparison(
            "largest gap of Shapley Net Effects from R^2 averaged over orders, diabetes", _net_effects_gap(), 0.0, "equal",
            margin=1e-6,
        ),
        Comparison("cells of the grid with finite scores", finite, total, "equal"),
        Comparison.over_seeds(
            "deletion area, breast cancer, Shapley against a random order", shapley[0].tolist(), chance[0].tolist(),
            "lower", margin=0.02,
        ),
    ]  # fmt: skip
    table = "; ".join(f"{name} {a.mean():.3f}/{b.mean():.3f}" for name, (a, b) in areas.items())
    notes = f"Deletion/insertion area on breast cancer, 8 features, marginal removal: {table}."
    return Evidence(comparisons, _figure(areas), notes)


def _difference(rho: float, run: Run) -> float:
    """Return the mean L1 distance of conditional and marginal Shapley values of a linear model."""
    g = run.generator(f"linear {rho}")
    d, like = 6, torch.zeros((), dtype=torch.float64)
    draws = randn((2000, d), generator=g, like=like)
    # Whitened, so that the background's covariance is the one that is meant.
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(torch.cov(draws.T)), (draws - draws.mean(0)).T, upper=False
    ).T
    root = torch.linalg.cholesky(torch.full((d, d), rho).double() + (1 - rho) * torch.eye(d).double())
    background, x = white @ root.T, randn((20, d), generator=g, like=like) @ root.T
    weight = randn((d,), generator=g, like=like)
    found = [
        RemovalExplainer(removal, Prediction(), Shapley()).attribute(lambda z: z @ weight, x).values
        for removal in (ConditionalGaussian(background, 0), MarginalRemoval(background))
    ]
    return float((found[0] - found[1]).abs().sum(1).mean())


def _net_effects_gap() -> float:
    """Return the largest gap of Shapley Net Effects from the gains of R^2 averaged over orders, with six features."""
    from sklearn.linear_model import LinearRegression

    from perturbkit.data import load_diabetes

    data = load_diabetes("train")
    x, y = data.x[:, :6].double(), data.y.double()
    variance = float(y.var(unbiased=False))
    *_, summary = RBX_METHODS["Shapley Net Effects"]
    explainer = RemovalExplainer(RetrainRemoval(LinearRegression(), x, y), DatasetLoss("squared"), summary)
    ours = explainer.attribute(None, x, y=y).values[0] / variance
    explained = {}
    for mask in all_masks(6):
        kept = mask.nonzero()[:, 0].tolist()
        design = np.column_stack([np.ones(len(x)), x[:, kept].numpy()])
        rest = y.numpy() - design @ np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
        explained[frozenset(kept)] = 1 - float(np.mean(rest**2)) / variance
    gains = np.zeros(6)
    for order in itertools.permutations(range(6)):
        for place, part in enumerate(order):
            gains[part] += explained[frozenset(order[: place + 1])] - explained[frozenset(order[:place])]
    return float(np.abs(ours.numpy() - gains / math.factorial(6)).max())


def _tumours(run: Run) -> tuple[int, int, dict[str, tuple[Tensor, Tensor]]]:
    """Return how many cells of the grid are finite, how many there are, and deletion and insertion areas."""
    from perturbkit.data import load_breast_cancer

    train, test = load_breast_cancer("train"), load_breast_cancer("test")
    mean, spread = train.x[:, :8].mean(0), train.x[:, :8].std(0)
    inputs, x = (train.x[:, :8] - mean) / spread, (test.x[:, :8] - mean) / spread
    finite, total = _grid(inputs[:, :5], train.y, x[:3, :5], test.y[:3], run)
    oracle, background = Oracle(_network(inputs, train.y, run)), inputs[::15]
    rows = x[:50]
    label = oracle(rows).argmax(1)
    scores = {
        type(summary).__name__: RemovalExplainer(MarginalRemoval(background), Prediction(), summary)
        .attribute(oracle, rows, label)
        .values
        for summary in _SUMMARIES
    }
    scores["random"] = uniform(rows.shape, generator=run.generator("random"), like=rows)
    areas = {}
    for name, values in scores.items():
        found = [
            curve(oracle, rows, values, label, baseline=0.0, n_steps=8, output="logit").area
            for curve in (deletion_curve, insertion_curve)
        ]
        areas[name] = (found[0], found[1])
    return finite, total, areas


def _grid(inputs: Tensor, y: Tensor, x: Tensor, labels: Tensor, run: Run) -> tuple[int, int]:
    """Run every combination; return how many gave finite scores, and how many there are."""
    from sklearn.naive_bayes import GaussianNB

    oracle = Oracle(_network(inputs, y, run))
    target = oracle(x).argmax(1)
    removals = (
        DefaultRemoval(0.0), MarginalRemoval(inputs[::15]), UniformRemoval(-2.0, 2.0, 32),
        ProductMarginalRemoval(inputs, 32), ConditionalGaussian(inputs, 32), RetrainRemoval(GaussianNB(), inputs, y),
    )  # fmt: skip
    behaviours = (Prediction(), PredictionLoss(), MeanLabel(), DatasetLoss(), Output())
    finite = total = 0
    for removal, behaviour, summary in itertools.product(removals, behaviours, _SUMMARIES):
        found = RemovalExplainer(removal, behaviour, summary).attribute(
            oracle, x, target, y=labels, generator=run.generator("grid")
        )
        finite += bool(found.values.isfinite().all())
        total += 1
    return finite, total


def _network(x: Tensor, y: Tensor, run: Run) -> nn.Module:
    """Train a small classifier, which answers probabilities."""
    with seeded_init(run.seeds(1)[0]):
        net = nn.Sequential(nn.Linear(x.shape[1], 16), nn.ReLU(), nn.Linear(16, 2))
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(300):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimiser.step()
    return nn.Sequential(net, nn.Softmax(1)).requires_grad_(False)


def _figure(areas: dict[str, tuple[Tensor, Tensor]]) -> Figure:
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    for axes, side, title in zip(
        figure.subplots(1, 2, sharey=True), (0, 1), ("deletion", "insertion"), strict=True
    ):
        axes.barh(list(areas), [float(a[side].mean()) for a in areas.values()], color="#4393c3")
        axes.set_xlabel(f"{title} area")
        axes.tick_params(labelsize=7)
    return figure
