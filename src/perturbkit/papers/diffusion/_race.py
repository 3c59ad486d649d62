"""Every deterministic sampler here and in diffusers on one denoiser: errors at equal calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from perturbkit.core.random import randn
from perturbkit.diffusion import (
    fit_iia,
    sample_bdia,
    sample_ddim,
    sample_deis,
    sample_dpm_solver,
    sample_gradient_estimation,
    sample_iia,
    sample_pndm,
)
from perturbkit.papers.diffusion._beds import END, Bed, grid

CALLS = (5, 6, 8, 10, 14, 20, 30)
# Schedulers of diffusers, those that are ports of k-diffusion's samplers included, and calls a step.
_PEERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "Euler": ("EulerDiscreteScheduler", {}, 1),
    "Heun": ("HeunDiscreteScheduler", {}, 2),
    "LMS": ("LMSDiscreteScheduler", {}, 1),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", {"solver_order": 2}, 1),
    "DPM-Solver++ 3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}, 1),
    "UniPC": ("UniPCMultistepScheduler", {"solver_order": 3}, 1),
    "DEIS": ("DEISMultistepScheduler", {"solver_order": 3}, 1),
}


def ours(seed: int) -> dict[str, Callable[[Bed, int], float]]:
    """Return the error of each of our samplers, as a function of the bed and the calls."""

    def iia(bed: Bed, n: int) -> float:
        calibration = 20.0 * randn(
            (64, bed.start.shape[1]), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        fitted = fit_iia(bed.denoiser, calibration, grid(n))
        return bed.error(sample_iia(bed.denoiser, bed.start, grid(n), fitted).x)

    def plain(sample: Callable[..., Any], per_step: int = 1, extra: int = 0, **options: Any) -> Any:
        return lambda bed, n: bed.error(
            sample(bed.denoiser, bed.start, grid((n - extra) // per_step), **options).x
        )

    return {
        "DDIM": plain(sample_ddim),
        "gradient estimation": plain(sample_gradient_estimation),
        "BDIA": plain(sample_bdia, gamma=0.5),
        "IIA": iia,
        "PNDM": plain(sample_pndm, extra=1, warmup="euler"),
        "PNDM, second order": plain(sample_pndm, extra=1, variant="second", warmup="euler"),
        "DEIS 2": plain(sample_deis, order=2),
        "DEIS 3": plain(sample_deis, order=3),
        "DEIS 3, corrected": plain(sample_deis, order=3, corrector=True),
        "DPM-Solver 2": plain(sample_dpm_solver, 2, order=2),
        "DPM-Solver 3": plain(sample_dpm_solver, 3, order=3),
    }


def theirs() -> dict[str, Callable[[Bed, int], float]]:
    """Return the same for the schedulers of diffusers; nothing if it is not installed."""
    try:
        import diffusers
    except ImportError:
        return {}

    def peer(kind: str, options: dict[str, Any], per_step: int) -> Callable[[Bed, int], float]:
        made = getattr(diffusers, kind)
        return lambda bed, n: _peer(made, options, bed, n // per_step * per_step, per_step)

    return {name: peer(*of) for name, of in _PEERS.items()}


def _peer(kind: Any, options: dict[str, Any], bed: Bed, n: int, per_step: int) -> float:
    """Run a scheduler over the beds' noise levels, up to the last before it jumps to zero."""
    table = torch.logspace(torch.tensor(END).log10(), torch.tensor(20.0).log10(), 1000, dtype=torch.float64)
    scheduler = kind(use_karras_sigmas=True, **options)
    scheduler.alphas_cumprod = 1 / (1 + table**2)
    scheduler.set_timesteps(n // per_step + 1)
    levels = [float(s) for s in scheduler.sigmas]
    preserving = float(scheduler.init_noise_sigma) == 1.0
    alpha = [(1 + lam**2) ** -0.5 if preserving else 1.0 for lam in levels]
    x = alpha[0] * bed.start
    for i, t in enumerate(scheduler.timesteps[:n]):
        scheduler.scale_model_input(
            x, t
        )  # some only keep count by it; the beds' denoiser takes the plain state
        eps = bed.denoiser.eps(x / alpha[i], levels[i])
        x = scheduler.step(eps, t, x).prev_sample
    return bed.error(x / alpha[n])


def race_figure(mine: Mapping[str, Sequence[float]], peers: Mapping[str, Sequence[float]]) -> Figure:
    """Draw errors against calls, ours solid and theirs dashed; the exact solution is the floor at zero."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    ax = figure.subplots()
    ax.set_prop_cycle(color=colormaps["tab20"].colors)  # type: ignore[attr-defined]
    for names, style in ((mine, "-"), (peers, "--")):
        for name, values in names.items():
            label = name if style == "-" else f"{name} (diffusers)"
            ax.loglog(CALLS, values, style, marker="o", markersize=3, label=label)
    ax.set_xticks(CALLS, [str(n) for n in CALLS])
    ax.minorticks_off()
    ax.set_xlabel("calls of the denoiser")
    ax.set_ylim(top=1)
    ax.set_ylabel("median distance to the exact solution")
    ax.legend(frameon=False, fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
