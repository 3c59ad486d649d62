"""Restoration and degradation under a cubic drift, whose density is solved on a grid, and on a linear process."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.linalg import solve_banded
from torch import Tensor

from perturbkit.core import VPSchedule
from perturbkit.core.random import randn
from perturbkit.diffusion import ForwardSDE, sample_ddim, sample_restoration_degradation
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._beds import exact_denoiser

_HORIZON, _EDGE = 1.0, 4.0
_STEPS = (100, 200, 400, 800, 1600)


@paper(
    number=75,
    title="Restoration-Degradation Beyond Linear Diffusions: A Non-Asymptotic Analysis For DDIM-Type Samplers",
    authors="Chen, Daras, Dimakis",
    year=2023,
    arxiv="2303.03384",
    claim="DDIM-type steps converge for non-linear forward processes too, polynomially in the accuracy.",
    method="perturbkit.diffusion.sample_restoration_degradation",
    needs="forward",
    input="any",
    cost="one score and two drifts a step",
    seconds=30,
)
def reproduce(run: Run) -> Evidence:
    """1000 quantiles of the noisy density under f = -x^3 - x, brought back to a two-mode mixture."""
    from perturbkit.data import mixture_8

    process = CubicProcess()
    start, data = process.quantiles(-1, 1000), process.quantiles(0, 1000)

    def error(n: int, lookback: float | None = None, euler: bool = False) -> float:
        times = torch.linspace(_HORIZON, 0, n + 1, dtype=torch.float64)
        if euler:
            end = _euler(process, start, times)
        else:
            end = sample_restoration_degradation(
                process.score, process.forward, start, times, lookback=lookback
            ).x
        return float((end.sort(0).values - data).abs().mean())

    ours, euler = [error(n) for n in _STEPS], [error(n, euler=True) for n in _STEPS]
    fixed = [error(n, lookback=0.5) for n in (400, 1600)]
    vp, denoiser = VPSchedule(), exact_denoiser(mixture_8(run.seeds(1)[0]), VPSchedule())
    x = randn((50, 8), generator=run.generator("linear"), dtype=torch.float64)
    times = vp.times(20, t_end=0.01)
    to_the_data = sample_restoration_degradation(denoiser.score, vp, x, times, lookback=math.inf).x
    ddim = sample_ddim(denoiser, x, times).x
    default = sample_restoration_degradation(denoiser.score, vp, x, times).x
    comparisons = [
        Comparison("W1 to the data, order of convergence, lookback the root of the step", _order(ours), 0.475, "equal", margin=0.125),
        Comparison("W1 to the data at 1600 steps, against 100", ours[-1], ours[0], "lower", factor=0.5),
        Comparison("Euler on the probability flow, order of convergence", _order(euler), 1.0, "equal", margin=0.15),
        Comparison("W1 to the data at 1600 steps, Euler against ours", euler[-1], ours[-1], "lower", note="the step is a proof device, not a faster solver"),
        Comparison("linear process, looking back to the data: largest difference from DDIM", float((to_the_data - ddim).abs().max()), 1e-8, "lower"),
        Comparison("order of convergence with a lookback that does not shrink", math.log(fixed[0] / fixed[1], 4), 0.35, "higher", control=True),
        Comparison("linear process, default lookback: largest difference from DDIM", float((default - ddim).abs().max()), 1e-8, "lower", control=True),
    ]  # fmt: skip
    return Evidence(
        comparisons,
        _figure(ours, euler),
        notes="From 25 to 400 steps the order is 0.31: the lookback must be short before the expansion rules. "
        "The paper's theorem is polynomial with constants that are not usable in numbers; what is shown is that the "
        "error goes to zero, at the order the expansion of the step gives.",
    )


class CubicProcess:
    """``dx = (-x^3 - x) dt + sqrt(2) dW`` from two modes, its density by finite volumes and implicit steps."""

    def __init__(self, cells: int = 3200, n_times: int = 3200) -> None:
        self.forward = ForwardSDE(lambda x, t: -(x**3) - x, lambda t: math.sqrt(2))
        self.edges = np.linspace(-_EDGE, _EDGE, cells + 1)
        self.x = 0.5 * (self.edges[1:] + self.edges[:-1])
        width, dt = self.edges[1] - self.edges[0], _HORIZON / n_times
        p = 0.4 * np.exp(-((self.x + 1) ** 2) / 0.18) + 0.6 * np.exp(-((self.x - 1) ** 2) / 0.18)
        p = p / (p.sum() * width)
        # Fluxes through the inner edges: f p (upwind by the mean) - p'; none through the ends.
        f = -(self.edges[1:-1] ** 3) - self.edges[1:-1]
        left, right = 0.5 * f / width + 1 / width**2, 0.5 * f / width - 1 / width**2
        generator = np.zeros((3, cells))  # banded rows: above, on and below the diagonal
        generator[1, :-1] -= left
        generator[2, :-1] += left
        generator[0, 1:] -= right
        generator[1, 1:] += right
        identity = np.array([[0.0], [1.0], [0.0]])
        kept, every = [p], n_times // 400
        for k in range(n_times):
            if k < 4:  # two implicit Euler halves damp what Crank-Nicolson would let ring
                for _ in range(2):
                    p = solve_banded((1, 1), identity - 0.5 * dt * generator, p)
            else:
                p = solve_banded((1, 1), identity - 0.5 * dt * generator, p + 0.5 * dt * _apply(generator, p))
            if (k + 1) % every == 0:
                kept.append(p)
        self.density = np.array(kept)
        self._score = np.gradient(np.log(np.clip(self.density, 1e-290, None)), self.x, axis=1)

    def score(self, x: Tensor, t: float) -> Tensor:
        """Return the derivative of the log-density, linear between the times kept and between cells."""
        place = t / _HORIZON * (len(self._score) - 1)
        index = min(int(place), len(self._score) - 2)
        points = x.numpy().ravel().clip(-3.1, 3.1)
        low, high = (np.interp(points, self.x, self._score[i]) for i in (index, index + 1))
        return torch.from_numpy(low + (place - index) * (high - low)).reshape(x.shape)

    def quantiles(self, index: int, n: int) -> Tensor:
        """Return ``n`` equally likely points of the density kept at an index, in increasing order."""
        mass = np.concatenate([[0.0], np.cumsum(self.density[index])])
        levels = (np.arange(n) + 0.5) / n
        return torch.from_numpy(np.interp(levels, mass / mass[-1], self.edges))[:, None]


def _apply(banded: np.ndarray, p: np.ndarray) -> np.ndarray:
    out = banded[1] * p
    out[:-1] += banded[0, 1:] * p[1:]
    out[1:] += banded[2, :-1] * p[:-1]
    return out


def _euler(process: CubicProcess, x: Tensor, times: Tensor) -> Tensor:
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        x = x - (t - t_next) * (process.forward.drift(x, t) - process.score(x, t))
    return x


def _order(errors: Sequence[float]) -> float:
    return float(-np.polyfit(np.log(_STEPS), np.log(errors), 1)[0])


def _figure(ours: Sequence[float], euler: Sequence[float]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    ax.loglog(_STEPS, ours, marker="o", label="restore and degrade")
    ax.loglog(_STEPS, euler, marker="o", label="Euler on the probability flow")
    ax.set_xlabel("steps")
    ax.set_ylabel("W1 to the data")
    ax.legend(frameon=False)
    return figure
