"""Clipping makes rare large errors as rare as light tails would, where descent's are as heavy as the noise.

A strongly convex quadratic in 20 dimensions under noise of tail index 1.5, five thousand runs at once with one step size;
and a bilinear game. Descent without clipping is the baseline and the control.
"""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.optim import alpha_stable_noise, clip_schedule, solve_clipped_seg, solve_clipped_sgda
from perturbkit.papers import Comparison, Evidence, Run, paper

D, RUNS, ALPHA = 20, 5000, 1.4


@paper(
    number=84,
    title="High-Probability Bounds for Stochastic Optimization and Variational Inequalities: the Case of Unbounded Variance",
    authors="Sadiev, Danilova, Gorbunov, Horvath, Gidel, Dvurechensky, Gasnikov, Richtarik",
    year=2023,
    arxiv="2302.00999",
    claim="Clipped methods converge with high probability under noise of unbounded variance; unclipped ones do not.",
    method="perturbkit.optim.ClippedSGD",
    needs="weights",
    input="any",
    cost="a norm a step",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Quantiles of the last error, its decay in the iterations, and a game."""
    seed = run.seeds(1)[0]
    iters = 400
    errors = {clipped: _errors(iters, seed, clipped) for clipped in (True, False)}
    high = {kind: float(e.quantile(0.999)) for kind, e in errors.items()}
    levels = torch.logspace(-1, -3, 9, dtype=torch.float64)
    fits = {kind: _fit(e, levels) for kind, e in errors.items()}
    medians = {k: float(_errors(k, seed, True)[:1000].median()) for k in (100, 1600)}
    slope = math.log(medians[1600] / medians[100]) / math.log(16)
    game = {clip: float(_game(clip, seed).quantile(0.99)) for clip in (3.0, math.inf)}
    return Evidence(
        [
            Comparison("99.9 % quantile of the squared error, clipped against not", high[True], high[False], "lower", factor=0.1, n=RUNS),
            Comparison("median of the squared error, clipped against not", float(errors[True].median()), float(errors[False].median()), "lower", n=RUNS),
            Comparison("share of the quantiles' variation that the logarithm of the chance explains, clipped", fits[True][0], 0.9, "higher"),
            Comparison("power of the chance that the quantiles grow by, not clipped", fits[False][1], 0.5, "higher"),
            Comparison("slope of the median squared error in the iterations", slope, -2 * (ALPHA - 1) / ALPHA, "lower", margin=-0.1),
            Comparison("99 % quantile of the distance in a bilinear game, clipped extragradient against not", game[3.0], game[math.inf], "lower", factor=0.5),
            Comparison(
                "99.9 % quantile of the squared error, not clipped against clipped", high[False], high[True], "lower", control=True,
                note="must fail: nothing bounds a single step",
            ),
        ],
        _figure(errors),
        notes=f"The 99.9 % quantiles are {high[True]:.3g} and {high[False]:.3g}. The step is the theory's times 3000, whose constants are "
        "far from tight.",
    )  # fmt: skip


def _errors(iters: int, seed: int, clipped: bool) -> Tensor:
    """Return the squared errors of the runs at the end, with the step of the theory for these iterations."""
    g = torch.Generator().manual_seed(seed)
    hessian = torch.linspace(0.2, 1.0, D, dtype=torch.float64)
    # The moment of order 1.4 of the noise's norm, from a large sample.
    sample = alpha_stable_noise(1.5, (200_000, D), generator=seed, dtype=torch.float64)
    sigma = float(sample.norm(dim=1).pow(ALPHA).mean() ** (1 / ALPHA))
    start = torch.ones(RUNS, D, dtype=torch.float64)
    step, levels = clip_schedule(
        "convex",
        alpha=ALPHA,
        sigma=sigma,
        distance=math.sqrt(D),
        lipschitz=1.0,
        iters=iters,
        failure_prob=1e-3,
        factor=3000.0,
    )

    def noisy(x: Tensor) -> Tensor:
        return x * hessian + alpha_stable_noise(1.5, x.shape, generator=g, dtype=x.dtype)

    # The level falls with the factor on the step; the theory's is kept.
    clip = [3000.0 * level for level in levels] if clipped else math.inf
    return solve_clipped_sgda(noisy, start, step=step, clip=clip, iters=iters).x.square().sum(1)


def _fit(errors: Tensor, levels: Tensor) -> tuple[float, float]:
    """Return how much of the quantiles' variation is linear in the log of the chance, and their power of the chance."""
    q = torch.quantile(errors, 1 - levels)
    log = (1 / levels).log()
    linear = float(torch.corrcoef(torch.stack([log, q]))[0, 1] ** 2)
    design = torch.stack([torch.ones_like(log), log], 1)
    return linear, float(torch.linalg.lstsq(design, q.log()[:, None]).solution[1, 0])


def _game(clip: float, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)

    def operator(x: Tensor) -> Tensor:
        turned = torch.cat([x[:, 2:], -x[:, :2]], 1)
        return turned + 0.3 * alpha_stable_noise(1.5, x.shape, generator=g, dtype=x.dtype)

    start = torch.ones(1000, 4, dtype=torch.float64)
    return solve_clipped_seg(operator, start, step=0.05, clip=clip, iters=1500).x.norm(dim=1)


def _figure(errors: dict[bool, Tensor]) -> Figure:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    chance = torch.arange(RUNS, 0, -1) / RUNS
    for kind, label, colour in ((True, "clipped", "tab:blue"), (False, "not clipped", "tab:gray")):
        axes.loglog(errors[kind].sort().values, chance, color=colour, label=label)
    axes.set_xlabel("squared error")
    axes.set_ylabel("chance of more")
    axes.legend(frameon=False)
    return figure
