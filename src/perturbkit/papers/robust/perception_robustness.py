"""Restorers that are asked for more realism grow steeper, and then have more than one answer.

Digits of 8x8 pixels seen as four numbers with noise, and a Gaussian number seen through noise; networks of one shape a problem,
trained on the squared error and, with a weight from 0 to 30, a sliced distance between true and restored pairs; and for the
number restorers that sweep its posterior, built by hand. The control is a degradation that loses nothing: there the same
pressure has no reason to make a network steep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core.random import randn, randperm, seeded_init
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.robust._digits import stream
from perturbkit.robust import (
    GaussianProblem,
    TradeoffCurve,
    explore_posterior,
    joint_perceptual_index,
    lipschitz_lower_bound,
    tradeoff_curve,
)

_WEIGHTS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_NOISE = 0.05
_EPOCHS = 150
_TOY = GaussianProblem(1.0)

Degradation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class _Problem:
    """Signals, what is seen of them, and how noise is put to it to explore."""

    train: Tensor
    test: Tensor
    degrade: Degradation
    clean: Callable[[Tensor], Tensor]
    noise: float
    scale: float
    method: Literal["exact", "sliced"]
    radii: tuple[float, float]


@paper(
    number=66,
    title="The Perception-Robustness Tradeoff in Deterministic Image Restoration",
    authors="Ohayon, Michaeli, Elad",
    year=2023,
    arxiv="2311.09253",
    claim="The nearer the pairs of input and output of a deterministic restorer are to the true pairs, the larger its Lipschitz "
    "constant must be; a steep restorer can be used to explore the posterior.",
    method="perturbkit.robust.tradeoff_curve",
    needs="gradient",
    input="image",
    cost="an assignment of the pairs, and two evaluations and a gradient a row, step and start",
    seconds=90,
)
def reproduce(run: Run) -> Evidence:
    """Train seven restorers a problem with two seeds; bound the second seed's by the first's."""
    from perturbkit.data import load_digits8

    train, test = load_digits8("train").x.flatten(1), load_digits8("test").x.flatten(1)
    numbers = _TOY.sample(2000, generator=run.generator("numbers"))[0].float()
    problems = {
        "digits": _Problem(train, test, _downsampled, _pooled, _NOISE, _NOISE, "sliced", (0.02, 0.1)),
        "number": _Problem(
            numbers[:1000], numbers[1000:], _TOY.degrade, lambda x: x, _TOY.sigma, 0.1, "exact", (0.02, 0.1)
        ),
    }
    over = Comparison.over_seeds
    comparisons, notes = [], []
    curves: dict[str, list[TradeoffCurve]] = {}
    for name, problem in problems.items():
        ranks, spread, plain_spread, error, growth = [], [], [], [], []
        for seed in run.seeds(2):
            nets = {f"{w:g}": _restorer(problem.train, problem.degrade, w, seed) for w in _WEIGHTS}
            curve = tradeoff_curve(
                nets, problem.degrade, problem.test, radius=problem.radii, method=problem.method, generator=stream(seed, 3)
            )  # fmt: skip
            curves.setdefault(name, []).append(curve)
            ranks.append(float(spearmanr(curve.index, curve.lipschitz).statistic))
            growth.append(float(curve.lipschitz[-1] / curve.lipschitz[0]))
            y = problem.degrade(problem.test[:100], stream(seed, 4))
            found = [
                explore_posterior(
                    nets[w], y, 50, problem.scale, degradation=problem.clean, tolerance=2 * problem.noise,
                    generator=stream(seed, 5),
                )
                for w in ("0", "30")
            ]  # fmt: skip
            plain_spread.append(float(found[0].diversity.mean()))
            spread.append(float(found[1].diversity.mean()))
            error.append(float(found[1].error.median()))
        fitted, held_out = curves[name]
        bounds = [lipschitz_lower_bound(float(i), fitted.m1, fitted.m2) for i in held_out.index]
        comparisons += [
            over(f"{name}, Spearman correlation of index and Lipschitz constant, seven restorers: at most -0.8", ranks, [-0.8] * 2, "lower"),
            over(f"{name}, Lipschitz constant, weight 30 over weight 0: twofold", growth, [1.0] * 2, "higher", factor=2),
            Comparison(
                f"{name}, least Lipschitz constant less the bound fitted to the other seed's restorers: not below zero",
                float((held_out.lipschitz - torch.tensor(bounds)).min()), 0.0, "higher", n=len(bounds),
            ),
            over(f"{name}, spread of explored answers, weight 30: five times that of weight 0", spread, plain_spread, "higher", factor=5),
            over(f"{name}, median measurement error of explored answers: within the tolerance", error, [2 * problem.noise] * 2, "lower"),
        ]  # fmt: skip
        notes.append(
            f"{name}: m1 {fitted.m1:.2f}, m2 {fitted.m2:.2f}, index from {float(fitted.index.max()):.3f} to "
            f"{float(fitted.index.min()):.3f}, Lipschitz constants from {float(fitted.lipschitz.min()):.1f} to "
            f"{float(fitted.lipschitz.max()):.1f}. "
        )
    swept, free = _swept(run)
    comparisons += [
        Comparison("number, swept ever faster, Spearman correlation of index and Lipschitz constant: at most -0.8", swept, -0.8, "lower", n=6),
        Comparison("number, spread of explored answers, sweep 4: five times that of the mean", *free, "higher", factor=5, n=100),
    ]  # fmt: skip
    growth = []
    for seed in run.seeds(2):
        kept = {f"{w:g}": _restorer(train, _unchanged, w, seed) for w in (0.0, 30.0)}
        easy = tradeoff_curve(
            kept, _unchanged, test, radius=(0.02, 0.1), method="sliced", generator=stream(seed, 3)
        )
        growth.append(float(easy.lipschitz[1] / easy.lipschitz[0]))
    comparisons.append(
        over(
            "digits, Lipschitz constant, weight 30 over weight 0, nothing lost in the degradation: twofold", growth, [1.0] * 2,
            "higher", factor=2, control=True, note="must fail: without a loss there is no tradeoff",
        )
    )  # fmt: skip
    return Evidence(
        comparisons,
        _figure(curves),
        notes="".join(notes)
        + "Training finds little of the steepness that is possible, and with nothing lost networks grow as steep: the swept restorers of the number have constants of up to "
        f"{_TOY.lipschitz(4):.0f}. The index of the digits is the sliced one: the exact distance between 360 pairs of 68 numbers, tried first, rises with the "
        "realism (correlation 0.77), since even samples of one law are further apart than blurred digits are from the true ones.",
    )


def _swept(run: Run) -> tuple[float, tuple[float, float]]:
    """Measure the restorers that sweep the posterior, which no training has to find."""
    x, y = _TOY.sample(1000, generator=run.generator("swept"))
    indices = [joint_perceptual_index(x, y, _TOY.restorer(k)(y)) for k in range(-1, 5)]
    steepness = [_TOY.lipschitz(k) for k in range(-1, 5)]
    steep, flat = (
        explore_posterior(f, y[:100], 50, 0.1, generator=run.generator("noise")).diversity.mean()
        for f in (_TOY.restorer(4), _TOY.mean)
    )
    return float(spearmanr(indices, steepness).statistic), (float(steep), float(flat))


def _restorer(x: Tensor, degradation: Degradation, weight: float, seed: int) -> nn.Module:
    """Train on the squared error and the weighted squared sliced distance of pairs."""
    draws = stream(seed, 1)
    inputs, outputs = degradation(x[:1], draws).shape[1], x.shape[1]
    with seeded_init(seed):
        net = nn.Sequential(
            nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, outputs)
        )
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(_EPOCHS):
        for rows in randperm(len(x), generator=draws).split(250)[:5]:
            true = x[rows]
            y = degradation(true, draws)
            restored = net(y)
            loss = functional.mse_loss(restored, true)
            if weight > 0:
                directions = functional.normalize(
                    randn((outputs + inputs, 64), generator=draws, like=true), dim=0
                )
                projected, wanted = (torch.cat([v, y], 1) @ directions for v in (restored, true))
                gap = projected.sort(0).values - wanted.sort(0).values
                loss = loss + weight * gap.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


def _pooled(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x.reshape(-1, 1, 8, 8), 4).flatten(1)


def _downsampled(x: Tensor, generator: torch.Generator) -> Tensor:
    y = _pooled(x)
    return y + _NOISE * randn(y.shape, generator=generator, like=y)


def _unchanged(x: Tensor, generator: torch.Generator) -> Tensor:
    return x


def _figure(curves: dict[str, list[TradeoffCurve]]) -> Figure:
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    for ax, (name, pair) in zip(figure.subplots(1, 2), curves.items(), strict=True):
        for i, curve in enumerate(pair):
            ax.plot(curve.index, curve.lipschitz, "o", color=f"C{i}", label=("fitted", "held out")[i])
        every = torch.cat([curve.index for curve in pair])
        grid = torch.linspace(float(every.min()), float(every.max()), 50)
        ax.plot(grid, pair[0].m1 * grid.rsqrt() - pair[0].m2, "0.3", lw=1, label="bound")
        ax.set_title(name)
        ax.set_xlabel("joint perceptual index")
        ax.set_ylabel("largest Lipschitz constant found")
    ax.legend(frameon=False)
    return figure
