"""The test beds of the samplers: mixtures and digits with exact denoisers and exact probability flows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import Denoiser, EDMSchedule, Schedule
from perturbkit.core.random import randn

SCHEDULE = EDMSchedule(sigma_max=20.0)
END = 0.02


@dataclass(frozen=True)
class Bed:
    """A denoiser, starts at the highest noise, and where the exact flow takes them."""

    denoiser: Denoiser
    start: Tensor
    exact: Tensor

    def error(self, x: Tensor) -> float:
        """Median over starts of the root mean square error: the mean is ruled by starts that change the mode."""
        return float((x - self.exact).square().mean(1).sqrt().median())


def grid(n_steps: int, spacing: Any = "karras") -> Tensor:
    """Return the times of a run on the beds."""
    return SCHEDULE.times(n_steps, t_end=END, spacing=spacing)


def mixture_bed(seed: int, n: int = 200) -> Bed:
    """Five Gaussians in eight dimensions."""
    from perturbkit.data import mixture_8

    world = mixture_8(seed)
    start = 20.0 * randn((n, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Bed(exact_denoiser(world), start, world.probability_flow(start, 20.0, END))


def digits_bed(seed: int, n: int = 60, n_points: int = 500) -> Bed:
    """Digits of 8x8 in [-1, 1], taken as the distribution itself."""
    from perturbkit.data import EmpiricalMeasure, load_digits8

    world = EmpiricalMeasure(load_digits8().x[:n_points].flatten(1).double() * 2 - 1)
    start = 20.0 * randn((n, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Bed(exact_denoiser(world), start, world.probability_flow(start, 20.0, END, rtol=1e-6))


def exact_denoiser(world: Any, schedule: Schedule = SCHEDULE) -> Denoiser:
    """Return the exact denoiser of a world, under the beds' schedule unless another is given."""

    def x0(x: Tensor, t: Tensor) -> Tensor:
        return world.posterior_mean(x, float(schedule.alpha(t[0])), float(schedule.sigma(t[0])))

    return Denoiser(x0, schedule, predicts="x0")


def idle_bed(bed: Bed) -> Bed:
    """The same starts and answers under a denoiser that does nothing: a control that must fail."""
    return Bed(Denoiser(lambda x, t: x, SCHEDULE, predicts="x0"), bed.start, bed.exact)


def error_figure(calls: Sequence[int], lines: Mapping[str, Sequence[float]]) -> Figure:
    """Draw errors against calls of the denoiser."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    for name, values in lines.items():
        ax.loglog(calls, values, marker="o", label=name)
    ax.set_xlabel("calls of the denoiser")
    ax.set_ylabel("median error of the end point")
    ax.legend(frameon=False)
    return figure
