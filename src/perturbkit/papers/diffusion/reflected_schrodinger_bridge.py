"""Reflected bridges on a grid and by networks: contraction, draws of the end's law, and how far the paths move."""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import TimeMLP
from perturbkit.core.random import randint, randn, seeded_init, uniform
from perturbkit.diffusion import Polygon, ReflectedBridge, reflected_bridge_grid
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._quality import sliced_w2

_CELLS, _N = 48, 800
_ANGLES = torch.arange(8) * math.pi / 4
_OCTAGON = Polygon(torch.stack((_ANGLES.cos(), _ANGLES.sin()), 1))


@paper(
    number=211,
    title="Reflected Schrödinger Bridge for Constrained Generative Modeling",
    authors="Deng, Chen, Yang, Du, Feng, Chen",
    year=2024,
    arxiv="2401.03228",
    claim="Reflected bridges generate inside bounded domains of any shape, their iteration converges linearly, and their paths move less than those of reflected diffusion.",
    method="perturbkit.diffusion.ReflectedBridge",
    needs="training",
    input="any",
    cost="on a grid O(cells) a cell and iteration; two networks' paths and second derivatives a stage",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Two densities on an interval, moons to a spiral in the square, a checkerboard in an octagon."""
    line, line_r2 = _interval(run)
    plane, drawn = _square(run)
    shaped, inside = _octagon(run)
    return Evidence([*line, *plane, *shaped], _figure(line_r2, drawn, inside), _NOTES)


_NOTES = (
    "The networks are small and trained for seconds: their draws are compared with those of reflected noise that no network "
    "drives. Images, as in the paper, are out of reach here. A reflected diffusion model is the bridge from the uniform law whose "
    "noise, sigma 1, mixes; the energy is half the squared drift, added up over the path."
)


def _interval(run: Run) -> tuple[list[Comparison], Tensor]:
    """Two peaks each on [0, 1], exact."""
    x = (torch.arange(200).double() + 0.5) / 200
    p0, p1 = (_peaks(x, *at) for at in ((0.05, 0.4), (0.6, 0.95)))
    bridge = reflected_bridge_grid(p0, p1, 0.4)
    errors = bridge.errors[bridge.errors > 1e-9].log().numpy()
    r2 = float(np.corrcoef(np.arange(len(errors)), errors)[0, 1] ** 2)
    g = run.generator("interval")
    start, goal = _from_grid(p0, 2000, g), _from_grid(p1, 2000, g)
    end = bridge.sample(start, 60, g).x
    return [
        Comparison("R^2 of the log error of Sinkhorn in the iterations", r2, 0.98, "higher", n=len(errors)),
        Comparison("W1 of the exact bridge's draws to the end's law", _w1(end, goal), 0.02, "lower"),
        Comparison("W1 of the start to the end's law", _w1(start, goal), 0.02, "lower", control=True),
    ], bridge.errors


def _square(run: Run) -> tuple[list[Comparison], list[Tensor]]:
    """Moons to a spiral in the unit square, exact, and the energy from the uniform law at little and at mixing noise."""
    g = run.generator("square")
    moons, spiral = (draw(40_000, g) for draw in (_moons, _spiral))
    p0, p1 = _histogram(moons), _histogram(spiral)
    bridge = reflected_bridge_grid(p0, p1, 0.3)
    start = _from_grid(p0, _N, g)
    end = bridge.sample(start, 60, g).x
    floor = sum(sliced_w2(_from_grid(p1, _N, g), _from_grid(p1, _N, g), g) for _ in range(5)) / 5
    flat = torch.ones_like(p1)
    energies = []
    for sigma in (0.3, 1.0):
        made = reflected_bridge_grid(flat, p1, sigma)
        energies.append(made.sample(_from_grid(flat, 400, g), 60, g).extras["energy"])
    return [
        Comparison("share of draws outside, square", _outside(end), 0.0, "equal"),
        Comparison(
            "sliced W2 to the spiral, exact bridge, against two samples",
            sliced_w2(end, _from_grid(p1, _N, g), g),
            floor,
            "lower",
            factor=1.5,
        ),
        Comparison(
            "sliced W2 to the spiral of the moons, against two samples",
            sliced_w2(start, _from_grid(p1, _N, g), g),
            floor,
            "lower",
            factor=1.5,
            control=True,
        ),
        Comparison(
            "energy of the paths, against a reflected diffusion model", energies[0], energies[1], "lower"
        ),
    ], [start, end]


def _octagon(run: Run) -> tuple[list[Comparison], list[Tensor]]:
    """From uniform to a checkerboard inside an octagon, by networks."""
    ours, still, outside, drawn = [], [], [], []
    for seed in run.seeds(2):
        g = torch.Generator().manual_seed(seed)
        x0, x1 = _uniform(4 * _N, g), _checkerboard(4 * _N, g)
        with seeded_init(seed):
            networks = TimeMLP(2, hidden=96), TimeMLP(2, hidden=96)
        bridge = ReflectedBridge(_OCTAGON, *networks, sigma=0.7, n_steps=40)
        bridge.fit(x0, x1, n_stages=2, inner_steps=250, lr=3e-3, generator=g, progress=False)
        end = bridge.forward_sample(x0[:_N], generator=g).x
        ours.append(sliced_w2(end, _checkerboard(_N, g), g))
        still.append(sliced_w2(_uniform(_N, g), _checkerboard(_N, g), g))
        outside.append(float((~_OCTAGON.contains(end)).double().mean()))
        drawn = [x0[:_N], end]
    loose = x0[:_N] + 0.7 * randn((_N, 2), generator=g)
    return [
        Comparison.over_seeds("share of draws outside, octagon", outside, [0.0] * len(outside), "equal"),
        Comparison(
            "share outside the octagon without mirrors",
            float((~_OCTAGON.contains(loose)).double().mean()),
            0.0,
            "equal",
            control=True,
        ),
        Comparison.over_seeds(
            "sliced W2 to the checkerboard, networks, against reflected noise alone",
            ours,
            still,
            "lower",
            factor=0.7,
        ),
    ], drawn


def _peaks(x: Tensor, *at: float) -> Tensor:
    return sum((-0.5 * ((x - m) / 0.05) ** 2).exp() for m in at) + torch.full_like(x, 0.02)


def _from_grid(masses: Tensor, n: int, g: torch.Generator) -> Tensor:
    """Draw points, uniform within their cells."""
    which = torch.multinomial(masses.flatten(), n, replacement=True, generator=g)
    cells = torch.stack(torch.unravel_index(which, masses.shape), 1)
    return (cells + uniform(cells.shape, generator=g, dtype=torch.float64)) / masses.shape[0]


def _histogram(x: Tensor) -> Tensor:
    cells = (x * _CELLS).long().clamp(0, _CELLS - 1)
    flat = torch.bincount(cells[:, 0] * _CELLS + cells[:, 1], minlength=_CELLS**2)
    return flat.double().reshape(_CELLS, _CELLS)


def _moons(n: int, g: torch.Generator) -> Tensor:
    angle, upper = math.pi * uniform((n,), generator=g), uniform((n,), generator=g) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    points = torch.stack(((x + 1.3) / 3.6, (y + 0.9) / 2.4), 1)
    return (points + 0.02 * randn((n, 2), generator=g)).clamp(0, 1)


def _spiral(n: int, g: torch.Generator) -> Tensor:
    angle = 3 * math.pi * uniform((n,), generator=g).sqrt()
    points = 0.5 + 0.045 * angle[:, None] * torch.stack((angle.cos(), angle.sin()), 1)
    return (points + 0.015 * randn((n, 2), generator=g)).clamp(0, 1)


def _uniform(n: int, g: torch.Generator) -> Tensor:
    x = uniform((4 * n, 2), -1, 1, generator=g)
    return x[_OCTAGON.contains(x)][:n]


def _checkerboard(n: int, g: torch.Generator) -> Tensor:
    """Draw from two of four squares of side 0.6 around the centre, those on a diagonal."""
    side = randint(0, 2, (n, 1), generator=g)
    return 0.6 * uniform((n, 2), generator=g) - 0.6 * torch.cat((side, side), 1)


def _w1(x: Tensor, y: Tensor) -> float:
    return float((x.sort(0).values - y.sort(0).values).abs().mean())


def _outside(x: Tensor) -> float:
    return float(((x < 0) | (x > 1)).any(1).double().mean())


def _figure(errors: Tensor, square: list[Tensor], octagon: list[Tensor]) -> Figure:
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 3)
    axes[0].semilogy(errors)
    axes[0].set(xlabel="iteration", ylabel="total variation", title="Sinkhorn on an interval")
    for ax, (start, end), title in (
        (axes[1], square, "moons to spiral, exact"),
        (axes[2], octagon, "checkerboard in an octagon, networks"),
    ):
        ax.plot(start[:, 0], start[:, 1], ".", markersize=1, color="0.7")
        ax.plot(end[:, 0], end[:, 1], ".", markersize=1.5)
        ax.set(aspect="equal", title=title)
        ax.title.set_fontsize(9)
    return figure
