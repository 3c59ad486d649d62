"""PFGM++ beside diffusion on digits of 8x8: trained denoisers, and what errors of the denoiser do, trained or exact."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import Denoiser, Preconditioned, TimeMLP, fit
from perturbkit.core.random import randn, seeded_init
from perturbkit.data import load_digits8
from perturbkit.diffusion import PoissonFlow, mixture_poisson_denoiser, sample_heun
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._quality import frechet_distance
from perturbkit.papers.diffusion._samples import draw_sheets

_N, _STEPS, _TRAINING = 1500, 18, 2000
_DIMS = (64, 2048, math.inf)
_EXACT_DIMS = (1, 8, 64, 2048, 1e6)
_ERROR = 0.3


@paper(
    number=41,
    title="PFGM++: Unlocking the Potential of Physics-Inspired Generative Models",
    authors="Xu, Liu, Tian, Tong, Tegmark, Jaakkola",
    year=2023,
    arxiv="2302.04265",
    claim="With settings carried over from diffusion, a model with a finite number of extra dimensions samples as well as diffusion or better.",
    method="perturbkit.diffusion.PoissonFlow",
    needs="training",
    input="any",
    cost="that of diffusion: two calls of the denoiser a Heun step",
    seconds=70,
)
def reproduce(run: Run) -> Evidence:
    """The same network and training for 64, 2048 and infinitely many extra dimensions, over two seeds."""
    train, test = (load_digits8(part).x.flatten(1) * 2 - 1 for part in ("train", "test"))
    plain: dict[float, list[float]] = {d: [] for d in _DIMS}
    noisy: dict[float, list[float]] = {d: [] for d in _DIMS}
    untrained, drawn = [], {}
    for seed in run.seeds(2):
        for d in _DIMS:
            flow = _flow(d, train)
            net = _network(flow, seed)
            if d == 2048:
                untrained.append(frechet_distance(_sampled(net.denoiser(), flow, seed), test))
            fit(
                net, flow.loss, train, steps=_TRAINING, lr=2e-3, average=0.995, generator=seed, progress=False
            )
            net.eval().requires_grad_(False)
            drawn[d] = _sampled(net.denoiser(), flow, seed)
            plain[d].append(frechet_distance(drawn[d], test))
            noisy[d].append(frechet_distance(_sampled(_with_errors(net.denoiser(), seed), flow, seed), test))
    best = plain[math.inf]
    comparisons = [
        Comparison.over_seeds(
            "Frechet distance of pixels, D = 2048, against diffusion", plain[2048], best, "lower", factor=1.1
        ),
        Comparison.over_seeds(
            "Frechet distance of pixels, untrained network",
            untrained,
            best,
            "lower",
            factor=1.1,
            control=True,
        ),
    ]
    return Evidence(comparisons, _figure(drawn), _notes(plain, noisy, _exact_table(train[:200], run)))


def _flow(extra_dims: float, train: Tensor) -> PoissonFlow:
    return PoissonFlow(extra_dims, 64, sigma_min=0.01, sigma_max=20.0, data_std=float(train.std()))


def _network(flow: PoissonFlow, seed: int) -> Preconditioned:
    with seeded_init(seed):
        return Preconditioned(TimeMLP(64, hidden=256), flow.schedule, flow.data_std)


def _sampled(denoiser: Denoiser, flow: PoissonFlow, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return sample_heun(denoiser, flow.prior(_N, generator=g), flow.times(_STEPS)).x


def _with_errors(denoiser: Denoiser, seed: int) -> Denoiser:
    """Add fresh noise to every answer, of a deviation that falls with the noise level below 1."""
    g = torch.Generator().manual_seed(seed)

    def x0(x: Tensor, t: Tensor) -> Tensor:
        wrong = _ERROR * t.clamp_max(1)[:, None] * randn(x.shape, generator=g, like=x)
        return denoiser.x0(x, t) + wrong

    return Denoiser(x0, denoiser.schedule, predicts="x0")


def _exact_table(points: Tensor, run: Run) -> dict[float, list[float]]:
    """Median distance of samples to the nearest point, of the exact denoiser with errors, at 10 and 5 steps."""
    table = {}
    for d in _EXACT_DIMS:
        flow = _flow(d, points)
        start = flow.prior(200, generator=run.generator("exact"), dtype=torch.float64)
        exact = mixture_poisson_denoiser(points.double(), None, flow)
        found = []
        for denoiser, steps in ((_with_errors(exact, 0), 10), (exact, 5)):
            x = sample_heun(denoiser, start, flow.times(steps)).x
            found.append(float(torch.cdist(x, points.double()).min(1).values.median()))
        table[d] = found
    return table


def _notes(
    plain: dict[float, list[float]], noisy: dict[float, list[float]], exact: dict[float, list[float]]
) -> str:
    def mean(values: list[float]) -> str:
        return f"{sum(values) / len(values):.2f}"

    trained = ", ".join(f"D = {d:g}: {mean(plain[d])} ({mean(noisy[d])})" for d in _DIMS)
    table = ", ".join(f"D = {d:g}: {a:.2f} ({b:.2f})" for d, (a, b) in exact.items())
    return (
        f"Frechet distances, with noise of deviation {_ERROR} min(sigma, 1) added to every answer in brackets: {trained}. The exact denoiser of "
        f"200 digits, median distance of samples to the nearest digit, with that noise in 10 steps (without, in 5 steps): {table}. "
        "Robustness at small D, a claim about networks on images, is reported and not required."
    )


def _figure(drawn: dict[float, Tensor]) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots(1, len(drawn))
    draw_sheets(axes, {f"D = {d:g}": (x[:30].reshape(-1, 8, 8) + 1) / 2 for d, x in drawn.items()}, columns=6)
    return figure
