"""DDIM beats the ancestral sampler at few steps, on a Gaussian with the covariance of digits.

The denoiser of a Gaussian is exact, so what is measured is the sampler alone: the Frechet distance between samples
and data, as the paper's FID is one between features.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import Denoiser, VPSchedule
from perturbkit.core.random import randn
from perturbkit.diffusion import sample_ddim
from perturbkit.papers import Comparison, Evidence, Run, paper

_STEPS = (10, 20, 50, 100)


@paper(
    number=0,
    title="Denoising Diffusion Implicit Models",
    authors="Song, Meng, Ermon",
    year=2021,
    arxiv="2010.02502",
    claim="Deterministic sampling (eta 0) gives better samples than ancestral sampling (eta 1) at 10 to 100 steps, and "
    "ever better ones with more steps.",
    method="perturbkit.diffusion.sample_ddim",
    needs="forward",
    input="any",
    cost="one call of the denoiser a step",
    seconds=15,
)
def reproduce(run: Run) -> Evidence:
    """Distance to the nearest digit for both samplers, over seeds."""
    from perturbkit.data import load_digits8

    pixels = load_digits8().x.flatten(1).double() * 2 - 1
    variance = torch.linalg.eigvalsh(torch.cov(pixels.T)).clamp_min(1e-6)  # along the principal axes
    schedule = VPSchedule()

    def x0(x: Tensor, t: Tensor) -> Tensor:
        a, s = float(schedule.alpha(t[0])), float(schedule.sigma(t[0]))
        return a * variance / (a**2 * variance + s**2) * x

    denoiser = Denoiser(x0, schedule, predicts="x0")
    found: dict[float, list[list[float]]] = {0.0: [], 1.0: []}
    for seed in run.seeds(3):
        start = randn((4000, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for eta, rows in found.items():
            rows.append([_distance(denoiser, start, n, eta, seed, variance) for n in _STEPS])
    comparisons = [
        Comparison.over_seeds(
            f"Frechet distance, {n} steps, against the ancestral sampler",
            [r[i] for r in found[0.0]],
            [r[i] for r in found[1.0]],
            "lower",
        )
        for i, n in enumerate(_STEPS)
    ]
    comparisons.append(
        Comparison.over_seeds(
            "100 steps against 10, deterministic",
            [r[-1] for r in found[0.0]],
            [r[0] for r in found[0.0]],
            "lower",
            factor=0.8,
        )
    )
    idle = Denoiser(lambda x, t: torch.zeros_like(x), schedule, predicts="eps")
    start = randn((4000, 64), generator=run.generator("noise"), dtype=torch.float64)
    comparisons.append(
        Comparison(
            "a denoiser that predicts no noise, 20 steps",
            _distance(idle, start, 20, 0.0, 0, variance),
            comparisons[1].ours,
            "lower",
            control=True,
            note="must fail: it only rescales the noise",
        )
    )
    return Evidence(comparisons, _figure(found))


def _distance(denoiser: Denoiser, start: Tensor, n: int, eta: float, seed: int, variance: Tensor) -> float:
    """Squared Frechet distance of samples to the Gaussian, along its axes."""
    times = denoiser.schedule.times(n, spacing="time")
    x = sample_ddim(denoiser, start, times, eta=eta, generator=seed).x
    return float(x.mean(0).square().sum() + (x.std(0) - variance.sqrt()).square().sum())


def _figure(found: dict[float, list[list[float]]]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    for eta, rows in found.items():
        ax.loglog(_STEPS, torch.tensor(rows).mean(0), marker="o", label=f"eta {eta:g}")
    ax.set_xlabel("steps")
    ax.set_ylabel("squared Frechet distance")
    ax.legend(frameon=False)
    return figure
