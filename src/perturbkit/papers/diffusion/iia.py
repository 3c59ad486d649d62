"""IIA with coefficients fitted on 64 starts, on fresh starts, against the base samplers at equal calls."""

from __future__ import annotations

from typing import Any

import torch

from perturbkit.core.random import randn
from perturbkit.diffusion import fit_iia, sample_iia
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._beds import Bed, digits_bed, error_figure, grid, mixture_bed


@paper(
    number=123,
    title="On Accelerating Diffusion-Based Sampling Process via Improved Integration Approximation",
    authors="Zhang, Niwa, Kleijn",
    year=2024,
    arxiv="2304.11328",
    claim="A few coefficients a step, fitted once on a small batch, make DDIM and Heun far more accurate below 25 calls.",
    method="perturbkit.diffusion.sample_iia",
    needs="forward",
    input="any",
    cost="that of the base sampler; fitting takes (1 + n_fine) steps on a small batch, once",
    seconds=20,
)
def reproduce(run: Run) -> Evidence:
    """Errors on four mixtures and on digits, for both bases."""
    beds = [mixture_bed(seed) for seed in run.seeds(4)]
    comparisons = []
    lines: dict[str, list[float]] = {}
    calls = (10, 20, 40)
    for base, per_step in (("ddim", 1), ("heun", 2)):
        pairs = [[_pair(b, n // per_step, base, run) for n in calls] for b in beds]
        for i, n in enumerate(calls[:2]):
            corrected, plain = [r[i][0] for r in pairs], [r[i][1] for r in pairs]
            comparisons.append(
                Comparison.over_seeds(
                    f"median error at {n} calls, {base}",
                    corrected,
                    plain,
                    "lower",
                    factor=0.6 if base == "ddim" else 1.0,
                )
            )
        for which, name in ((0, f"IIA-{base}"), (1, base)):
            lines[name] = [sum(r[i][which] for r in pairs) / len(pairs) for i in range(len(calls))]
    digits = digits_bed(run.seeds(1)[0])
    on_digits = _pair(digits, 10, "ddim", run)
    comparisons.append(
        Comparison("median error on digits at 10 calls, ddim", *on_digits, "lower", factor=0.6)
    )
    wrong = fit_iia(beds[0].denoiser, beds[0].start[:64], grid(10)).flip(0)
    reversed_ = beds[0].error(sample_iia(beds[0].denoiser, beds[0].start, grid(10), wrong).x)
    comparisons.append(
        Comparison(
            "coefficients in reverse order", reversed_, lines["ddim"][0], "lower", factor=0.6, control=True,
            note="must fail: each step needs its own",
        )
    )  # fmt: skip
    return Evidence(comparisons, error_figure(calls, lines), notes="The paper's FID is not measured.")


def _pair(bed: Bed, n_steps: int, base: Any, run: Run) -> tuple[float, float]:
    """Return the errors with fitted coefficients and with none."""
    times = grid(n_steps)
    calibration = 20.0 * randn(
        (64, bed.start.shape[1]), generator=run.generator("calibration"), dtype=torch.float64
    )
    fitted = fit_iia(bed.denoiser, calibration, times, base=base)
    return tuple(  # type: ignore[return-value]
        bed.error(sample_iia(bed.denoiser, bed.start, times, c, base=base).x)
        for c in (fitted, torch.zeros_like(fitted))
    )
