"""Medians of gradients converge under heavy tails and corruption, where means are thrown out.

A quadratic with Student noise of 1.2 degrees of freedom, fifteen runs at once; and digits with a quarter of the gradients
replaced by large noise. Plain descent and momentum are the baselines, and descent is the control.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import numpy_generator, randn, randperm
from perturbkit.optim import MedianSGD, SampleMedianSGD
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.optim._digits import Digits, accuracy, load

RUNS, STEPS, D = 15, 3000, 10


@paper(
    number=185,
    title="SGD with Clipping is Secretly Estimating the Median Gradient",
    authors="Schaipp, Garrigos, Simsekli, Gower",
    year=2024,
    arxiv="2402.12828",
    claim="Descent along medians of gradients converges under heavy tails, of which clipping is a special case.",
    method="perturbkit.optim.MedianSGD",
    needs="weights",
    input="any",
    cost="a norm a step and a buffer of the weights' size",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Distances to the minimum under heavy tails, and accuracy with corrupted gradients."""
    seeds = run.seeds(RUNS)
    makes: dict[str, Any] = {
        "l1": partial(MedianSGD, lr=0.01, norm="l1", tau=0.1),
        "l2": partial(MedianSGD, lr=0.01, norm="l2", tau=0.1),
        "clipping": partial(MedianSGD, lr=0.01, norm="l2", tau=1.0, reset=True),
        "descent": partial(torch.optim.SGD, lr=0.01),
        "momentum": partial(torch.optim.SGD, lr=0.001, momentum=0.9),
    }
    ends = {name: _heavy(make, seeds) for name, make in makes.items()}
    gauss = {name: _heavy(makes[name], seeds, tails=float("inf")) for name in ("l2", "descent")}
    data = load(run)
    clean, kept, mean = (_train(data, seeds[0], kind) for kind in ("clean", "median", "mean"))
    comparisons = [
        Comparison("distance to the minimum, worst of 15, l1 median", float(ends["l1"].max()), 1.0, "lower", n=RUNS),
        Comparison("distance to the minimum, worst of 15, l2 median", float(ends["l2"].max()), 1.0, "lower", n=RUNS),
        Comparison("distance to the minimum, worst of 15, descent", float(ends["descent"].max()), 10.0, "higher", n=RUNS),
        Comparison("distance to the minimum, worst of 15, momentum", float(ends["momentum"].max()), 10.0, "higher", n=RUNS),
        Comparison("accuracy on digits, 2 of 8 gradients corrupted, against none", kept, clean, "higher", margin=-0.02),
        Comparison("accuracy on digits of the corrupted mean", mean, clean, "lower", margin=0.1),
        Comparison(
            "distance to the minimum, worst of 15, descent against the medians' limit", float(ends["descent"].max()), 1.0, "lower", n=RUNS,
            control=True, note="must fail: single gradients throw it out",
        ),
    ]  # fmt: skip
    return Evidence(
        comparisons, _figure(ends),
        notes=f"Clipping ends {float(ends['clipping'].max()):.2f} away at worst. With Gaussian noise the l2 median ends "
        f"{float(gauss['l2'].median()):.3f} away in the median and descent {float(gauss['descent'].median()):.3f}: the price of robustness.",
    )  # fmt: skip


def _heavy(make: Any, seeds: list[int], tails: float = 1.2) -> Tensor:
    """Return the distances of runs from the minimum; one tensor a run, each with a distance of its own."""
    rng = numpy_generator(seeds[0])
    points = [nn.Parameter(torch.ones(D, dtype=torch.float64)) for _ in seeds]
    optimizer = make(points, **({"per_tensor": True} if make.func is MedianSGD else {}))
    for _ in range(STEPS):
        size = (len(points), D)
        noise = rng.normal(size=size) if tails == float("inf") else rng.standard_t(tails, size=size)
        for p, row in zip(points, torch.as_tensor(noise), strict=True):
            p.grad = p.detach() + row
        optimizer.step()
    return torch.stack([p.detach().norm() for p in points])


def _train(data: Digits, seed: int, kind: str) -> float:
    """Train softmax regression on chunks of each batch, two of which answer noise unless clean."""
    net = nn.Linear(64, 10)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    optimizer = SampleMedianSGD(net.parameters(), lr=0.5, chunks=8)
    weights = list(net.parameters())
    g = torch.Generator().manual_seed(seed)
    for _ in range(5):
        for batch in randperm(len(data.y), generator=g).split(128):
            if len(batch) < 8:
                continue
            losses = [
                nn.functional.cross_entropy(net(data.x[rows]), data.y[rows]) for rows in batch.tensor_split(8)
            ]
            if kind != "clean":
                for i in (0, 1):
                    # A loss whose gradient is 1000 times a standard normal vector.
                    losses[i] = sum(1000 * (randn(p.shape, generator=g) * p).sum() for p in weights)  # type: ignore[assignment]
            if kind == "mean":
                for p, grad in zip(
                    weights, torch.autograd.grad(torch.stack(losses).mean(), weights), strict=True
                ):
                    p.data.sub_(0.5 * grad)
            else:
                optimizer.step([lambda loss=loss: loss for loss in losses])  # type: ignore[misc]
    return accuracy(net, data)


def _figure(ends: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, values) in enumerate(ends.items()):
        axes.scatter([i] * len(values), values, s=12, label=name)
    axes.set_yscale("log")
    axes.set_xticks(range(len(ends)), list(ends))
    axes.set_ylabel("distance to the minimum")
    return figure
