"""The divergence of reverse-diffusion paths: its rate in steps and dimensions, and what decreasing steps save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import Denoiser, OUSchedule
from perturbkit.core.random import randn
from perturbkit.diffusion import decreasing_times, path_kl, sampling_kl_bound
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._beds import exact_denoiser

_SCHEDULE = OUSchedule(6.0)
_STEPS = (20, 40, 80, 160)
_DIMS = (2, 8, 32)
_STOP = 1e-4


@paper(
    number=55,
    title="Improved Analysis of Score-based Generative Modeling: User-Friendly Bounds under Minimal Smoothness Assumptions",
    authors="Chen, Lee, Lu",
    year=2023,
    arxiv="2211.01916",
    claim="About d log(1/delta) / eps steps, decreasing with the time left, reach divergence eps for any data of finite second moment.",
    method="perturbkit.diffusion.sampling_kl_bound",
    needs="forward",
    input="any",
    cost="arithmetic; five calls a step to measure the divergence",
    seconds=30,
)
def reproduce(run: Run) -> Evidence:
    """Mixtures of five Gaussians in 2, 8 and 32 dimensions with exact scores, and a point mass."""
    measured = {d: [_measured(run, d, n) for n in _STEPS] for d in _DIMS}
    slopes = [_slope(_STEPS, measured[d]) for d in _DIMS]
    in_dims = _slope(_DIMS, [measured[d][2] for d in _DIMS])
    ratios = [measured[d][i] / _bound(run, d, n) for d in _DIMS for i, n in enumerate(_STEPS)]
    loose = [measured[d][i] / _bound(run, d, n, 0.1) for d in _DIMS for i, n in enumerate(_STEPS)]
    goal = _point_mass(decreasing_times(100, 6.0, _STOP))
    needed = next(n for n in (2**k for k in range(7, 24)) if _point_mass(_even(n)) <= goal)
    noisy = [_measured(run, 8, n, noise=1.0) for n in _STEPS]
    comparisons = [
        Comparison(f"order in the steps, d = {d}", slope, -1.0, "equal", margin=0.15, n=len(_STEPS))
        for d, slope in zip(_DIMS, slopes, strict=True)
    ]
    comparisons += [
        Comparison("order in the dimension", in_dims, 1.0, "equal", margin=0.15, n=len(_DIMS)),
        Comparison("point mass: even steps for the divergence of 100 decreasing ones", float(needed), 100.0, "higher", factor=5.0),
        Comparison("largest measured divergence over the bound with C = 1", max(ratios), 1.0, "lower", n=len(ratios)),
        Comparison("largest measured divergence over the bound of a score thought ten times smoother", max(loose), 1.0, "lower", control=True),
        Comparison("order in the steps of a score with fresh noise in every call", _slope(_STEPS, noisy), -1.0, "equal", margin=0.15, control=True),
    ]  # fmt: skip
    return Evidence(
        comparisons,
        _figure(measured),
        notes="The bound's constant is not in the paper; with C = 1 it holds here. Even steps are counted in powers of two.",
    )


def _measured(run: Run, dim: int, n: int, noise: float = 0.0) -> float:
    world = _world(run, dim)
    denoiser = exact_denoiser(world, _SCHEDULE)
    if noise:
        g = run.generator("noisy score")
        exact = denoiser

        def score(x: Tensor, t: Tensor) -> Tensor:
            return exact.score(x, float(t[0])) + noise * randn(x.shape, generator=g, like=x)

        denoiser = Denoiser(score, _SCHEDULE, predicts="score")
    times = decreasing_times(n, 6.0, 1e-3)
    return path_kl(
        denoiser, times, world.sample(2000, run.generator("data")), n_mc=2000, generator=run.generator("path")
    ).value


def _bound(run: Run, dim: int, n: int, smoothness: float | None = None) -> float:
    world = _world(run, dim)
    moment = float((world.weights * (world.means.square().sum(1) + world.variances.sum(1))).sum())
    return sampling_kl_bound(
        decreasing_times(n, 6.0, 1e-3), dim=dim, second_moment=moment, smoothness=smoothness
    ).total


def _world(run: Run, dim: int) -> Any:
    from perturbkit.data import GaussianMixture

    means = 2 * randn((5, dim), generator=run.generator("means"), dtype=torch.float64)
    return GaussianMixture(means, stds=0.25)


def _point_mass(times: Tensor) -> float:
    """The divergence in closed form, by Gauss-Legendre: the score is -x / v with v = 1 - e^{-2t}."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(16))
    start, end = times[:-1, None], times[1:, None]
    t = end + 0.5 * (start - end) * (1 + nodes)
    v, v_start = -torch.expm1(-2 * t), -torch.expm1(-2 * start)
    inner = 1 / v + 1 / v_start - 2 * (t - start).exp() / v_start
    return float((0.5 * (start - end) * weights * inner).sum())


def _even(n: int) -> Tensor:
    return torch.linspace(6.0, _STOP, n + 1, dtype=torch.float64)


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def _figure(measured: dict[int, list[float]]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    for d, values in measured.items():
        ax.loglog(_STEPS, values, marker="o", label=f"d = {d}")
    ax.set_xlabel("steps")
    ax.set_ylabel("divergence of the paths")
    ax.legend(frameon=False)
    return figure
