"""The steepest pair of noisy labels against the law's bound, and two-layer networks of growing width on noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import rademacher, randn, seeded_init, uniform
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.robust import law_of_robustness, minimal_lipschitz_constant, network_lipschitz

_SIZES, _DIMS, _DRAWS = (50, 200, 800, 3200), (2, 3, 5, 8), 10
_WIDTHS, _ROWS, _DIM = (5, 9, 18, 45, 136, 455), 200, 20


@paper(
    number=83,
    title="A Law of Robustness beyond Isoperimetry",
    authors="Wu, Huang, Wang",
    year=2022,
    arxiv="2202.11592",
    claim="Fitting n noisy labels needs a Lipschitz constant of sqrt(n / p) with p parameters, and of n^(1/d) with any function.",
    method="perturbkit.robust.law_of_robustness",
    needs="data",
    input="any",
    cost="arithmetic; all pairs for the exact constant",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Points in a ball with labels of noise, and networks trained on noise until half of it is fitted."""
    g = run.generator("points")
    steepest = {d: [_mean_log(n, d, g) for n in _SIZES] for d in _DIMS}
    slopes = {d: float(np.polyfit(np.log(_SIZES), [m for m, _ in steepest[d]], 1)[0]) for d in _DIMS}
    margins = [
        low - np.log(max(law_of_robustness(n, 10**12, d).nonparametric, 1e-12))
        for d in _DIMS
        for n, (_, low) in zip(_SIZES, steepest[d], strict=True)
    ]
    fits = [[_trained(width, seed) for width in _WIDTHS] for seed in run.seeds(3)]
    params = [width * (_DIM + 2) for width in _WIDTHS]
    local = [float(np.mean([fit[i][0] for fit in fits])) for i in range(len(_WIDTHS))]
    fitted = [i for i in range(len(_WIDTHS)) if all(fit[i][1] < 0.5 for fit in fits)]
    # The constant is fitted at the narrowest network that reaches the noise, and tested at the others.
    first = fitted[0]
    constant = local[first] / law_of_robustness(_ROWS, params[first], _DIM).parametric
    bounds = [law_of_robustness(_ROWS, p, _DIM, constant=constant).parametric for p in params]
    network_slope = float(
        np.polyfit(np.log([params[i] for i in fitted]), np.log([local[i] for i in fitted]), 1)[0]
    )
    comparisons = [
        c
        for d in _DIMS
        for c in (
            Comparison(f"order of the steepest pair in n, d = {d}, at least 1/d", slopes[d], 1 / d, "higher", n=_DRAWS),
            Comparison(f"order of the steepest pair in n, d = {d}, at most 2/d + 0.15", slopes[d], 2 / d + 0.15, "lower", n=_DRAWS),
        )
    ]  # fmt: skip
    comparisons += [
        Comparison("least log ratio of the steepest pair to the bound for any function", float(min(margins)), 0.0, "higher", n=len(margins)),
        Comparison("order of the local Lipschitz constant of networks in their parameters", network_slope, -0.05, "lower", n=3),
        Comparison("least ratio of a wider network's constant to the bound fitted at the narrowest", min(local[i] / bounds[i] for i in fitted[1:]), 1.0, "higher", n=len(fitted) - 1),
        Comparison("steepest pair of labels from a smooth function over the bound for noise, n = 3200, d = 2", _smooth(g), 1.0, "higher", control=True),
    ]  # fmt: skip
    return Evidence(
        comparisons,
        _figure(params, local, bounds),
        notes=f"Networks of width {[_WIDTHS[i] for i in range(len(_WIDTHS)) if i not in fitted] or 'none'} did not reach half of "
        "the noise. The local constant is the largest gradient at the data: a lower bound of the network's own. The law's "
        "constant is not in the paper, so one is fitted.",
    )


def _ball(n: int, d: int, g: torch.Generator) -> Tensor:
    direction = randn((n, d), generator=g, dtype=torch.float64)
    return (
        direction
        / direction.norm(dim=1, keepdim=True)
        * uniform((n, 1), generator=g, dtype=torch.float64) ** (1 / d)
    )


def _mean_log(n: int, d: int, g: torch.Generator) -> tuple[float, float]:
    """Return the mean and the least logarithm of the least Lipschitz constant over draws."""
    found = [
        np.log(minimal_lipschitz_constant(_ball(n, d, g), rademacher((n,), generator=g, dtype=torch.float64)))
        for _ in range(_DRAWS)
    ]
    return float(np.mean(found)), float(min(found))


def _smooth(g: torch.Generator) -> float:
    x = _ball(3200, 2, g)
    return minimal_lipschitz_constant(x, x[:, 0]) / law_of_robustness(3200, 10**12, 2).nonparametric


def _trained(width: int, seed: int) -> tuple[float, float]:
    """Fit labels of noise until half of their variance is explained; return the local constant and the error."""
    g = torch.Generator().manual_seed(seed)
    x = randn((_ROWS, _DIM), generator=g)
    x = x / x.norm(dim=1, keepdim=True)
    y = rademacher((_ROWS,), generator=g, dtype=torch.float32)
    with seeded_init(seed):
        net = nn.Sequential(nn.Linear(_DIM, width), nn.ReLU(), nn.Linear(width, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    error = float("inf")
    for _ in range(6000):
        loss = (net(x)[:, 0] - y).square().mean()
        error = float(loss.detach())
        if error < 0.5:
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return network_lipschitz(net.requires_grad_(False), x), error


def _figure(params: Sequence[int], local: Sequence[float], bounds: Sequence[float]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    ratio = [p / _ROWS for p in params]
    ax.loglog(ratio, local, marker="o", label="network, local")
    ax.loglog(ratio, bounds, marker="o", label="sqrt(n / p), fitted at one width")
    ax.set_xlabel("parameters a row")
    ax.set_ylabel("Lipschitz constant")
    ax.legend(frameon=False)
    return figure
