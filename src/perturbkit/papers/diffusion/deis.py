"""Multistep samplers at 5 to 30 calls: ours, and those of diffusers, on one denoiser with an exact solution."""

from __future__ import annotations

from collections.abc import Callable

from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._beds import Bed, digits_bed, idle_bed, mixture_bed
from perturbkit.papers.diffusion._race import CALLS, ours, race_figure, theirs

_FEW = (5, 8, 10, 14, 20)


@paper(
    number=0,
    title="Fast Sampling of Diffusion Models with Exponential Integrator",
    authors="Zhang, Chen",
    year=2023,
    arxiv="2204.13902",
    claim="Polynomials through past predictions, integrated exactly, give in 10 calls what DDIM needs many more for.",
    method="perturbkit.diffusion.sample_deis",
    needs="forward",
    input="any",
    cost="one call of the denoiser a step",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Median errors on three mixtures and on digits taken as the distribution."""
    beds = [mixture_bed(seed) for seed in run.seeds(3)]
    mine = {name: _errors(sampler, beds) for name, sampler in ours(run.seeds(1)[0]).items()}
    peers = {name: _errors(sampler, beds) for name, sampler in theirs().items()}
    ten = CALLS.index(10)
    comparisons = [
        Comparison("median error of order 3 at 10 calls, against DDIM", mine["DEIS 3"][ten], mine["DDIM"][ten], "lower", factor=0.2, n=3),
        Comparison("median error of order 3 at 10 calls, against DDIM at 30", mine["DEIS 3"][ten], mine["DDIM"][-1], "lower", n=3),
    ]  # fmt: skip
    digits = digits_bed(run.seeds(1)[0])
    both = ours(0)
    comparisons += [
        Comparison("median error on digits at 10 calls, order 2 against DDIM", both["DEIS 2"](digits, 10), both["DDIM"](digits, 10), "lower"),
        Comparison("a denoiser that does nothing, 10 calls", both["DEIS 3"](idle_bed(beds[0]), 10), mine["DDIM"][ten], "lower", control=True),
    ]  # fmt: skip
    for n in _FEW if peers else ():
        at = CALLS.index(n)
        best = min(peers, key=lambda name, at=at: peers[name][at])  # type: ignore[misc]
        first = min(mine, key=lambda name, at=at: mine[name][at])  # type: ignore[misc]
        comparisons.append(
            Comparison(
                f"best here at {n} calls against the best of diffusers",
                mine[first][at],
                peers[best][at],
                "lower",
                n=3,
                note=f"{first} here, {best} there",
            )
        )
    return Evidence(
        comparisons,
        race_figure(mine, peers),
        notes="The grids have Karras's spacing throughout. The schedulers of diffusers are stopped at the last level before "
        "they jump to zero, where the exact solution is known; Heun, LMS and the DPM-Solver++ family there are ports of "
        "k-diffusion's samplers."
        + ("" if peers else " diffusers is not installed, so that ours alone were run."),
    )


def _errors(sampler: Callable[[Bed, int], float], beds: list[Bed]) -> list[float]:
    return [sum(sampler(bed, n) for bed in beds) / len(beds) for n in CALLS]
