"""DPM-Solver reaches at 20 calls what DDIM needs many more for, with errors of order one, two and three.

On Gaussian mixtures in eight dimensions, whose probability flow is solved to nine digits, and on digits taken as the
distribution. Errors are medians over starts: the mean is ruled by a few starts that change the mode.
"""

from __future__ import annotations

import math
from typing import Any

from perturbkit.diffusion import sample_dpm_solver
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._beds import Bed, digits_bed, error_figure, grid, idle_bed, mixture_bed

_CALLS = (6, 12, 18, 24, 36)


@paper(
    number=194,
    title="DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps",
    authors="Lu, Zhou, Bao, Chen, Li, Zhu",
    year=2022,
    arxiv="2206.00927",
    claim="Exponential integrators of order two and three in log-SNR need 4 to 16 times fewer calls than DDIM.",
    method="perturbkit.diffusion.sample_dpm_solver",
    needs="forward",
    input="any",
    cost="order calls of the denoiser a step",
    seconds=40,
)
def reproduce(run: Run) -> Evidence:
    """Slopes on four mixtures, then errors at equal calls on mixtures and digits."""
    beds = [mixture_bed(seed) for seed in run.seeds(4)]
    comparisons = []
    for order in (1, 2, 3):
        slopes = [math.log2(_error(b, order, 160, "logsnr") / _error(b, order, 320, "logsnr")) for b in beds]
        comparisons.append(
            Comparison.over_seeds(
                f"slope of order {order}, 160 to 320 steps", slopes, [order] * 4, "equal", margin=0.25
            )
        )
    found = {order: [[_error(b, order, n // order) for n in _CALLS] for b in beds] for order in (1, 2, 3)}
    at = _CALLS.index(18)
    ddim = [row[at] for row in found[1]]
    for order, factor in ((2, 1.0), (3, 0.3)):
        ours = [row[at] for row in found[order]]
        comparisons.append(
            Comparison.over_seeds(
                f"median error of order {order} at 18 calls, against DDIM", ours, ddim, "lower", factor=factor
            )
        )
    digits = digits_bed(run.seeds(1)[0])
    comparisons.append(
        Comparison(
            "median error on digits at 36 calls, order 3 against DDIM",
            _error(digits, 3, 12),
            _error(digits, 1, 36),
            "lower",
        )
    )
    comparisons.append(
        Comparison(
            "order 3 with a denoiser that does nothing",
            _error(idle_bed(beds[0]), 3, 6),
            ddim[0],
            "lower",
            control=True,
            note="must fail: the error is that of the sampler only if the denoiser is right",
        )
    )
    lines = {
        "DDIM" if order == 1 else f"order {order}": [sum(c) / len(c) for c in zip(*rows, strict=True)]
        for order, rows in found.items()
    }
    return Evidence(
        comparisons,
        error_figure(_CALLS, lines),
        notes="At 6 to 10 calls the single-step higher orders do not beat DDIM here; the paper's FID is not measured.",
    )


def _error(bed: Bed, order: Any, n_steps: int, spacing: str = "karras") -> float:
    return bed.error(sample_dpm_solver(bed.denoiser, bed.start, grid(n_steps, spacing), order=order).x)
