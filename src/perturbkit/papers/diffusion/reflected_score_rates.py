"""The rate at which the spectral reflected model learns densities of known smoothness, and what walls cost without mirrors."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from perturbkit.diffusion import SpectralReflectedModel, reflected_minimax_rate
from perturbkit.papers import Comparison, Evidence, Run, paper

_GRID = np.linspace(0, 1, 2001)
_SIZES = (200, 632, 2000, 6325, 20000)
_REPEATS = 10


@paper(
    number=58,
    title="Statistical guarantees for denoising reflected diffusion models",
    authors="Holk, Strauch, Trottner",
    year=2024,
    arxiv="2411.01563",
    claim="Reflected denoising models attain the minimax rate n^(-s/(2s+d)) in total variation for densities of Sobolev smoothness s.",
    method="perturbkit.diffusion.SpectralReflectedModel",
    needs="data",
    input="tabular",
    cost="O(n K^d) to fit, O(K^d) a score, K = n^(1/(2s+d))",
    seconds=20,
)
def reproduce(run: Run) -> Evidence:
    """Cosine series with coefficients k^(-s-0.6) on [0, 1], s = 1 and 2, and a density that is largest at a wall."""
    rng = run.rng("densities")
    errors = {s: np.array([[_error(s, n, rng) for _ in range(_REPEATS)] for n in _SIZES]) for s in (1.0, 2.0)}
    comparisons = [
        Comparison(
            f"slope of log total variation in log n, s = {s:g}",
            _slope(errors[s]),
            math.log(reflected_minimax_rate(10, s, 1), 10),
            "equal",
            margin=0.1,
            spread=float(np.std([_slope(errors[s][:, [i]]) for i in range(_REPEATS)]) / math.sqrt(_REPEATS)),
            n=_REPEATS,
        )
        for s in errors
    ]
    stuck = np.array([[_error(2.0, n, rng, n_modes=1) for _ in range(_REPEATS)] for n in _SIZES])
    comparisons.append(
        Comparison(
            "the same slope with one mode at every n, s = 2",
            _slope(stuck),
            -0.4,
            "equal",
            margin=0.1,
            control=True,
        )
    )
    return Evidence([*comparisons, *_walls(rng)], _figure(errors, stuck), _NOTES)


_NOTES = (
    "The paper bounds the error of sparse networks; the series of its first step is what is measured here. "
    "At a wall the baseline is the exact unconstrained diffusion of the data stopped at the bandwidth of Scott's rule, clipped; "
    "what the clip heaps onto the wall counts as error."
)


def _density(s: float, rng: np.random.Generator) -> np.ndarray:
    """A positive cosine series with random signs, on the grid."""
    k = np.arange(1, 200)
    size = k ** (-s - 0.6)
    signs = rng.choice([-1.0, 1.0], len(k))
    return 1 + 0.8 * (size * signs / size.sum()) @ np.cos(np.pi * np.outer(k, _GRID))


def _draw(density: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    cumulative = np.concatenate(([0.0], np.cumsum((density[1:] + density[:-1]) / 2)))
    return np.interp(rng.random(n), cumulative / cumulative[-1], _GRID)[:, None]


def _error(s: float, n: int, rng: np.random.Generator, n_modes: int | str = "auto") -> float:
    """Total variation between the fitted density, where sampling stops, and the truth."""
    truth = _density(s, rng)
    made = SpectralReflectedModel(s, n_modes=n_modes).fit(_draw(truth, n, rng))  # type: ignore[arg-type]
    return 0.5 * float(np.trapezoid(np.abs(made.density(_GRID[:, None]) - truth), _GRID))


def _slope(errors: np.ndarray) -> float:
    return float(np.polyfit(np.log(_SIZES), np.log(errors.mean(1)), 1)[0])


def _walls(rng: np.random.Generator) -> list[Comparison]:
    """Draws for the density 2 (1 - x), against unconstrained diffusion with a clip."""
    ours, theirs, outside, spill = [], [], [], []
    for _ in range(_REPEATS):
        x = _draw(2 * (1 - _GRID), 1000, rng)
        made = SpectralReflectedModel(2.0).fit(x)
        ours.append(0.5 * float(np.trapezoid(np.abs(made.density(_GRID[:, None]) - 2 * (1 - _GRID)), _GRID)))
        drawn = made.sample(1000, 100, int(rng.integers(2**31)))
        outside.append(float(((drawn < 0) | (drawn > 1)).mean()))
        loose = x + x.std() * len(x) ** -0.2 * rng.standard_normal(x.shape)
        spill.append(float(((loose < 0) | (loose > 1)).mean()))
        theirs.append(_clipped_error(x[:, 0]))
    return [
        Comparison.over_seeds("total variation, density largest at a wall", ours, theirs, "lower"),
        Comparison.over_seeds("share of draws outside", outside, [0.0] * _REPEATS, "equal"),
        Comparison.over_seeds(
            "share outside, unconstrained diffusion before the clip",
            spill,
            [0.0] * _REPEATS,
            "equal",
            control=True,
        ),
    ]


def _clipped_error(x: np.ndarray) -> float:
    """Total variation of the Gaussian-smoothed data, clipped, which puts atoms on the walls."""
    from scipy.stats import gaussian_kde

    smooth = gaussian_kde(x)
    atoms = smooth.integrate_box_1d(-np.inf, 0) + smooth.integrate_box_1d(1, np.inf)
    return 0.5 * float(np.trapezoid(np.abs(smooth(_GRID) - 2 * (1 - _GRID)), _GRID) + atoms)


def _figure(errors: dict[float, np.ndarray], stuck: np.ndarray) -> Figure:
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    ax = figure.subplots()
    for s, found in errors.items():
        (line,) = ax.loglog(_SIZES, found.mean(1), "o-", label=f"s = {s:g}")
        rate = np.array([reflected_minimax_rate(n, s, 1) for n in _SIZES])
        ax.loglog(_SIZES, rate / rate[0] * found.mean(1)[0], ":", color=line.get_color())
    ax.loglog(_SIZES, stuck.mean(1), "o--", color="0.5", label="one mode, s = 2")
    ax.set(xlabel="observations", ylabel="total variation (dotted: the minimax slope)")
    ax.legend(frameon=False)
    return figure
