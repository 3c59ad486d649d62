"""Trajectories towards digits and a mixture: how straight they are, when they decide, and where a network departs."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import Denoiser, EDMSchedule
from perturbkit.core.random import randn
from perturbkit.diffusion import (
    EmpiricalDenoiser,
    TrajectoryGeometry,
    sample_ddim,
    sample_ode_jump,
    score_deviation,
    trajectory_geometry,
)
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._beds import SCHEDULE, grid, mixture_bed
from perturbkit.papers.diffusion._networks import train_denoiser

_STEPS = 60


@paper(
    number=216,
    title="A Geometric Perspective on Diffusion Models",
    authors="Chen, Zhou, Mei, Shen, Chen, Wang",
    year=2023,
    arxiv="2305.19947",
    claim="Sampling trajectories are nearly straight, the denoised image settles earlier, and jumping to it saves calls.",
    method="perturbkit.diffusion.trajectory_geometry",
    needs="forward",
    input="any",
    cost="one call of the denoiser a step",
    seconds=30,
)
def reproduce(run: Run) -> Evidence:
    """200 starts on 1797 digits and on mixtures, 60 steps."""
    from perturbkit.data import load_digits8

    digits = load_digits8().x.flatten(1).double() * 2 - 1
    optimal = EmpiricalDenoiser(digits, SCHEDULE)
    starts = 20.0 * randn((200, 64), generator=run.generator("starts"), dtype=torch.float64)
    path, shape = _walk(optimal, starts)
    beds = [mixture_bed(seed) for seed in run.seeds(3)]
    shapes = [_walk(bed.denoiser, bed.start)[1] for bed in beds]
    walk = path.clone()
    walk[1:-1] += 20.0 * randn(walk[1:-1].shape, generator=run.generator("walk"), like=walk) / 8
    levels = EDMSchedule(20.0).times(12, t_end=0.02)
    network = train_denoiser(digits, SCHEDULE, run.seeds(1)[0], t_end=0.02)
    hump = score_deviation(network, digits, levels, generator=run.generator("deviation"))
    middle = float(hump[1:-1].max())
    comparisons = [
        Comparison("largest distance from the chord on digits, median over starts, relative", float(shape.deviation.median()), 0.1, "lower", n=200),
        Comparison.over_seeds("the same on mixtures", [float(s.deviation.median()) for s in shapes], [0.1] * 3, "lower"),
        Comparison("share of starts whose denoised digit grows from first to last", float((shape.denoised_norms[-1] > shape.denoised_norms[0]).double().mean()), 0.95, "higher", n=200),
        Comparison("share of steps in which the denoised digit grows", float((shape.denoised_norms.diff(dim=0) > 0).double().mean()), 0.5, "higher", n=200),
        Comparison("share of jumps after half of the calls that end at the digit of the full run", _same(optimal, starts, path[-1], digits, _STEPS // 2), 0.95, "higher", n=200),
        Comparison.over_seeds("share of jumps after half of the calls that end in the mode of the full run, on mixtures", [_same(bed.denoiser, bed.start, sample_ddim(bed.denoiser, bed.start, grid(_STEPS)).x, _modes(seed), _STEPS // 2) for bed, seed in zip(beds, run.seeds(3), strict=True)], [0.95] * 3, "higher"),
        Comparison("network against optimal denoiser: deviation in the middle, against twice the highest noise", middle, float(hump[0]), "higher", factor=2.0),
        Comparison("network against optimal denoiser: deviation in the middle, against twice the lowest noise", middle, float(hump[-1]), "higher", factor=2.0),
        Comparison("distance from the chord of a path with noise added, relative", float(trajectory_geometry(walk, path).deviation.median()), 0.1, "lower", control=True),
        Comparison("share of jumps at the first call that end at the digit of the full run", _same(optimal, starts, path[-1], digits, 0), 0.95, "higher", control=True),
    ]  # fmt: skip
    return Evidence(
        comparisons,
        _figure(shape, levels, hump),
        notes="Half of the calls are spent at noise above 1.4, where hundreds of digits still share the posterior: the "
        "denoised point is settled among five modes, not among 1797 digits. The paper's claim is of FID, which asks less "
        "than the same digit and is not measured.",
    )


def _walk(denoiser: Denoiser, x: Tensor) -> tuple[Tensor, TrajectoryGeometry]:
    times, states = grid(_STEPS), [x]
    sample_ddim(denoiser, x, times, callback=lambda i, state: states.append(state))
    denoised = [denoiser.x0(state, float(t)) for state, t in zip(states, times, strict=True)]
    path = torch.stack(states)
    return path, trajectory_geometry(path, torch.stack(denoised))


def _same(denoiser: Denoiser, x: Tensor, end: Tensor, points: Tensor, step: int) -> float:
    times = grid(_STEPS)
    jump = sample_ode_jump(denoiser, x, times, jump_at=float(times[step])).x
    return float((torch.cdist(jump, points).argmin(1) == torch.cdist(end, points).argmin(1)).double().mean())


def _modes(seed: int) -> Tensor:
    from perturbkit.data import mixture_8

    return mixture_8(seed).means


def _figure(shape: TrajectoryGeometry, levels: Tensor, hump: Tensor) -> Figure:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    calls = range(_STEPS + 1)
    left.semilogy(calls, shape.distances.median(1).values.clamp_min(1e-3), label="state")
    left.semilogy(calls, shape.denoised_distances.median(1).values.clamp_min(1e-3), label="denoised")
    left.set_xlabel("calls of the denoiser")
    left.set_ylabel("median distance to the end")
    left.legend(frameon=False)
    right.semilogx(levels, hump, marker="o")
    right.set_xlabel("noise level")
    right.set_ylabel("network against optimal denoiser")
    return figure
