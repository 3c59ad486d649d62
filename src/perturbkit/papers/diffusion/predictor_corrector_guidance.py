"""Guidance does not sample the powered density, and ancestral guidance is a predictor-corrector of weight 2 w - 1.

The first on the paper's Gaussian counterexample, where three closed forms can be compared with samples; the second on a
mixture of two classes in the plane, by the sliced Wasserstein distance between the two samplers.
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import Denoiser, EDMSchedule
from perturbkit.core.random import randn
from perturbkit.diffusion import guided_gaussian_variance, sample_guided, sample_pcg
from perturbkit.papers import Comparison, Evidence, Run, paper

_SCHEDULE = EDMSchedule(100.0)
_WEIGHTS = (1.0, 2.0, 3.0, 5.0)


@paper(
    number=179,
    title="Classifier-Free Guidance is a Predictor-Corrector",
    authors="Bradley, Nakkiran",
    year=2024,
    arxiv="2408.09000",
    claim="Guided sampling does not draw from the powered density; with ancestral steps it is a predictor-corrector.",
    method="perturbkit.diffusion.sample_pcg",
    needs="forward",
    input="any",
    cost="1 + 2 langevin_steps calls of the denoisers a step",
    seconds=40,
)
def reproduce(run: Run) -> Evidence:
    """Variances on the counterexample, then the distance between guidance and the predictor-corrector."""
    with_, without = _gaussian(1.0), _gaussian(2.0)
    start = 100.0 * randn((20_000, 1), generator=run.generator("start"), dtype=torch.float64)
    times = _SCHEDULE.times(1000, t_end=1e-3)
    comparisons, found = [], {"ddim": [], "ddpm": []}  # type: ignore[var-annotated]
    for rule, values in found.items():
        sampler: Any = rule
        for w in _WEIGHTS:
            x = sample_guided(
                with_,
                without,
                start,
                times,
                weight=w,
                sampler=sampler,
                generator=run.generator(f"{rule} {w}"),
            ).x  # type: ignore[arg-type]
            values.append(float(x.var()))
            exact = guided_gaussian_variance(w, rule)  # type: ignore[arg-type]
            comparisons.append(
                Comparison(
                    f"variance over the closed form, {rule}, weight {w:g}",
                    values[-1] / exact,
                    1.0,
                    "equal",
                    margin=0.03,
                    n=20_000,
                )
            )
    powered = guided_gaussian_variance(3.0, "gamma_powered")
    comparisons.append(
        Comparison(
            "variance over that of the powered density, ddim, weight 3", found["ddim"][2] / powered, 1.0, "equal",
            margin=0.03, control=True, note="must fail: guidance does not sample the powered density",
        )
    )  # fmt: skip
    gaps = {n: _distance(run, n) for n in (50, 200, 800)}
    floor = _noise_floor(run)
    comparisons += [
        Comparison(
            "sliced W2 between the samplers, 800 steps, over the two-sample floor",
            gaps[800] / floor,
            1.5,
            "lower",
        ),
        Comparison("sliced W2 between the samplers, 800 steps against 50", gaps[800], gaps[50], "lower"),
    ]
    return Evidence(
        comparisons,
        _figure(found),
        notes="The distance between two samplers is ruled by the share of points that each sends to a blob, "
        "so one pair of runs is a rough floor. Stable Diffusion XL is not tried.",
    )


def _gaussian(variance: float) -> Denoiser:
    return Denoiser(lambda x, t: variance * x / (variance + t[:, None] ** 2), _SCHEDULE, predicts="x0")


def _classes() -> tuple[Any, Any]:
    """Return one class of two blobs in the plane, and both classes."""
    from perturbkit.data import GaussianMixture

    means = torch.tensor([[2.0, 0.0], [1.0, 2.0], [-2.0, 0.0], [-1.0, -2.0]], dtype=torch.float64)
    stds = torch.full((4,), 0.5, dtype=torch.float64)
    both = GaussianMixture(means, stds, weights=torch.full((4,), 0.25, dtype=torch.float64))
    one = GaussianMixture(means[:2], stds[:2], weights=torch.full((2,), 0.5, dtype=torch.float64))
    return one, both


def _distance(run: Run, n_steps: int, weight: float = 2.0, n: int = 3000) -> float:
    with_, without = (_exact(w) for w in _classes())
    times = _SCHEDULE.times(n_steps, t_end=0.02)
    starts = 100.0 * randn((2, n, 2), generator=run.generator("plane"), dtype=torch.float64)
    guided = sample_guided(
        with_, without, starts[0], times, weight=weight, sampler="ddpm", generator=run.generator("a")
    ).x
    corrected = sample_pcg(
        with_, without, starts[1], times, weight=2 * weight - 1, generator=run.generator("b")
    ).x
    return _sliced(guided, corrected)


def _noise_floor(run: Run, weight: float = 2.0, n: int = 3000) -> float:
    """Return the distance between two runs of the same sampler."""
    with_, without = (_exact(w) for w in _classes())
    times = _SCHEDULE.times(200, t_end=0.02)
    starts = 100.0 * randn((2, n, 2), generator=run.generator("floor"), dtype=torch.float64)
    pair = [
        sample_guided(
            with_, without, s, times, weight=weight, sampler="ddpm", generator=run.generator(f"floor {i}")
        ).x
        for i, s in enumerate(starts)
    ]
    return _sliced(*pair)


def _exact(world: Any) -> Denoiser:
    return Denoiser(lambda x, t: world.posterior_mean(x, 1.0, float(t[0])), _SCHEDULE, predicts="x0")


def _sliced(a: Tensor, b: Tensor) -> float:
    """Sliced Wasserstein distance over 64 directions."""
    angles = torch.arange(64, dtype=a.dtype) * torch.pi / 64
    directions = torch.stack([angles.cos(), angles.sin()])
    gap = (a @ directions).sort(0).values - (b @ directions).sort(0).values
    return float(gap.square().mean().sqrt())


def _figure(found: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    for rule, color in (("ddim", "C0"), ("ddpm", "C1"), ("gamma_powered", "C2")):
        label = {"ddim": "DDIM", "ddpm": "DDPM", "gamma_powered": "powered density"}[rule]
        exact = [guided_gaussian_variance(w, rule) for w in _WEIGHTS]  # type: ignore[arg-type]
        ax.plot(_WEIGHTS, exact, color=color, label=label)
        if rule in found:
            ax.plot(_WEIGHTS, found[rule], "o", color=color)
    ax.set_yscale("log")
    ax.set_xlabel("guidance weight")
    ax.set_ylabel("variance (dots: sampled)")
    ax.legend(frameon=False)
    return figure
