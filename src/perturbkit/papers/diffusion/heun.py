"""Heun's steps beat Euler's at equal calls, on digits and mixtures with exact denoisers and exact flows."""

from __future__ import annotations

from perturbkit.diffusion import sample_ddim, sample_heun
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._beds import digits_bed, error_figure, grid, idle_bed, mixture_bed

_CALLS = (10, 20, 40)


@paper(
    number=0,
    title="Elucidating the Design Space of Diffusion-Based Generative Models",
    authors="Karras, Aittala, Aila, Laine",
    year=2022,
    arxiv="2206.00364",
    claim="Heun's second-order steps on the Karras grid end closer to the exact flow than Euler's steps at equal calls.",
    method="perturbkit.diffusion.sample_heun",
    needs="forward",
    input="any",
    cost="two calls of the denoiser a step",
    seconds=30,
)
def reproduce(run: Run) -> Evidence:
    """Median error of the end point for both samplers at 10, 20 and 40 calls."""
    comparisons: list[Comparison] = []
    lines: dict[str, list[float]] = {}
    for name, bed in (("mixture", mixture_bed(run.seed)), ("digits", digits_bed(run.seed))):
        heun = [bed.error(sample_heun(bed.denoiser, bed.start, grid(n // 2)).x) for n in _CALLS]
        euler = [bed.error(sample_ddim(bed.denoiser, bed.start, grid(n)).x) for n in _CALLS]
        lines |= {f"Heun, {name}": heun, f"Euler, {name}": euler}
        comparisons += [
            Comparison(f"error, {name}, {n} calls, against Euler", ours, theirs, "lower", n=len(bed.start))
            for n, ours, theirs in zip(_CALLS[1:], heun[1:], euler[1:], strict=True)
        ]
    idle = idle_bed(bed)
    comparisons.append(
        Comparison(
            "error of a denoiser that does nothing, 20 calls, against Euler",
            idle.error(sample_heun(idle.denoiser, idle.start, grid(10)).x),
            euler[1],
            "lower",
            control=True,
        )
    )
    return Evidence(comparisons, error_figure(_CALLS, lines))
