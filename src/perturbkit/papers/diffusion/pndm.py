"""PNDM at 20 and 50 steps against DDIM at 20 and 1000, on mixtures and digits with exact flows."""

from __future__ import annotations

from perturbkit.diffusion import sample_ddim, sample_pndm
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._beds import Bed, digits_bed, error_figure, grid, idle_bed, mixture_bed


@paper(
    number=234,
    title="Pseudo Numerical Methods for Diffusion Models on Manifolds",
    authors="Liu, Ren, Lin, Zhao",
    year=2022,
    arxiv="2202.09778",
    claim="Pseudo linear multistep sampling with 50 steps is better than DDIM with 1000.",
    method="perturbkit.diffusion.sample_pndm",
    needs="forward",
    input="any",
    cost="one call of the denoiser a step, and a few to start",
    seconds=20,
)
def reproduce(run: Run) -> Evidence:
    """Errors on four mixtures and on digits."""
    beds = [mixture_bed(seed) for seed in run.seeds(4)]
    calls = (10, 20, 50, 100)
    ours = [[_error(b, n) for n in calls] for b in beds]
    ddim = [[_ddim(b, n) for n in calls] for b in beds]
    comparisons = [
        Comparison.over_seeds(
            "median error at 20 steps, against DDIM",
            [r[1] for r in ours],
            [r[1] for r in ddim],
            "lower",
            factor=0.2,
        ),
        Comparison.over_seeds(
            "median error at 50 steps, against DDIM at 1000",
            [r[2] for r in ours],
            [_ddim(b, 1000) for b in beds],
            "lower",
        ),
    ]
    digits = digits_bed(run.seeds(1)[0])
    comparisons += [
        Comparison("median error on digits at 20 steps, against DDIM", _error(digits, 20), _ddim(digits, 20), "lower", factor=0.2),
        Comparison(
            "a denoiser that does nothing, 20 steps", _error(idle_bed(beds[0]), 20), ddim[0][1], "lower", control=True,
            note="must fail: the error is that of the sampler only if the denoiser is right",
        ),
    ]  # fmt: skip
    lines = {
        name: [sum(c) / len(c) for c in zip(*rows, strict=True)]
        for name, rows in (("PNDM", ours), ("DDIM", ddim))
    }
    return Evidence(
        comparisons,
        error_figure(calls, lines),
        notes="On digits taken as the distribution, whose flow ends in single points, DDIM contracts onto the right point "
        "and the extrapolation overshoots. The paper's FID is not measured.",
    )


def _error(bed: Bed, n_steps: int) -> float:
    return bed.error(sample_pndm(bed.denoiser, bed.start, grid(n_steps), warmup="euler").x)


def _ddim(bed: Bed, n_steps: int) -> float:
    return bed.error(sample_ddim(bed.denoiser, bed.start, grid(n_steps)).x)
