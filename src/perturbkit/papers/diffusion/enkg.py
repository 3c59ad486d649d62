"""EnKG against ensemble Kalman inversion and against choosing among prior samples, at equal calls of the forward model.

A prior of clusters in 16 dimensions whose denoiser is exact, seen through 8 numbers of a linear and of a nonlinear map;
and digits that must be found again from the magnitudes of their Fourier transform, with a trained denoiser.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import Denoiser
from perturbkit.core.random import as_generator, randint, randn, randperm
from perturbkit.diffusion import BlackBox, PhaseRetrieval, sample_ddim, sample_enkg
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._beds import SCHEDULE, exact_denoiser
from perturbkit.papers.diffusion._networks import digits_denoiser8
from perturbkit.papers.diffusion._samples import draw_sheets, png

_J, _STEPS, _DIM, _OBSERVED, _NOISE = 128, 40, 16, 8, 0.05
Forward = Callable[[Tensor], Tensor]


@paper(
    number=240,
    title="Ensemble Kalman Diffusion Guidance: A Derivative-free Method for Inverse Problems",
    authors="Zheng, Chu, Wang, Kovachki, Baptista, Yue",
    year=2025,
    arxiv="2409.20175",
    claim="Among methods that only call the forward model, guiding an ensemble of diffusion samples by its own covariance fits "
    "nonlinear measurements best, and comes nearer to the truth than ensemble Kalman inversion.",
    method="perturbkit.diffusion.sample_enkg",
    needs="forward",
    input="any",
    cost="J (1 + k) rows of the denoiser and J of the forward model a guided step",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Misfit and distance to the truth, over beds and forward models."""
    from perturbkit.data import GaussianMixture

    comparisons = []
    for kind in ("linear", "nonlinear"):
        rows: dict[str, list[tuple[float, float]]] = {"enkg": [], "eki": [], "best": [], "unguided": []}
        for seed in run.seeds(5):
            g = as_generator(seed)
            world = GaussianMixture(1.5 * randn((5, _DIM), generator=g, dtype=torch.float64), stds=0.25)
            matrix = randn((_OBSERVED, _DIM), generator=g, dtype=torch.float64) / _DIM**0.5
            forward = _map(matrix, kind)
            truth = world.sample(1, g)[0]
            y = forward(truth[None])[0]
            y = y + _NOISE * randn(y.shape, generator=g, like=y)
            found = _contest(exact_denoiser(world), partial(world.sample, generator=g), forward, y, _J, g)
            for name, x in found.items():
                misfit = (forward(x) - y).norm(dim=1).mean() / y.norm()
                rows[name].append((float(misfit), float((x - truth).norm(dim=1).mean())))
        for baseline, name in (("eki", "ensemble Kalman inversion"), ("best", "the best of prior samples")):
            comparisons.append(
                Comparison.over_seeds(
                    f"relative misfit, {kind}, against {name}",
                    [r[0] for r in rows["enkg"]],
                    [r[0] for r in rows[baseline]],
                    "lower",
                    factor=0.5,
                )
            )
        comparisons.append(
            Comparison.over_seeds(
                f"distance to the truth, {kind}, against ensemble Kalman inversion",
                [r[1] for r in rows["enkg"]],
                [r[1] for r in rows["eki"]],
                "lower",
            )
        )
        comparisons.append(
            Comparison.over_seeds(
                f"relative misfit, {kind}, without guidance",
                [r[0] for r in rows["unguided"]],
                [r[0] for r in rows["eki"]],
                "lower",
                factor=0.5,
                control=True,
                note="must fail: these are draws from the prior",
            )
        )
    digits, figure, picture = _digits(run)
    notes = (
        f"{_J} particles, {_STEPS} steps, 5 beds; the baselines ask the forward model as often as EnKG does: inversion takes as many "
        f"iterations as there are guided steps, and the {_J} best of as many prior draws as calls are kept. Magnitudes do not tell "
        "a digit from its point reflection, nor (with an empty frame) from a shifted one."
    )
    return Evidence([*comparisons, *digits], figure, notes, {"phase-retrieval.png": picture})


def _map(matrix: Tensor, kind: str) -> Forward:
    if kind == "linear":
        return lambda x: x @ matrix.T
    return lambda x: (x @ matrix.T).sin() + (x @ matrix.T) ** 2 / 4


def _contest(
    denoiser: Denoiser,
    prior: Callable[[int], Tensor],
    forward: Forward,
    y: Tensor,
    j: int,
    g: torch.Generator,
) -> dict[str, Tensor]:
    """Return the ensembles that each method ends with; all ask the forward model equally often."""
    times = SCHEDULE.times(_STEPS, t_end=0.02, spacing="karras")
    start = float(SCHEDULE.t_max) * randn((j, *prior(1).shape[1:]), generator=g, like=prior(1))
    box = BlackBox(forward)
    enkg = sample_enkg(denoiser, start, times, box, y).x
    budget = box.nfev
    many = prior(budget)
    order = (forward(many) - y).flatten(1).norm(dim=1).argsort()
    return {
        "enkg": enkg,
        "eki": _inversion(prior(j), forward, y, budget // j, g),
        "best": many[order[:j]],
        "unguided": sample_ddim(denoiser, start, times).x,
    }


def _inversion(x: Tensor, forward: Forward, y: Tensor, n_steps: int, g: torch.Generator) -> Tensor:
    """Ensemble Kalman inversion with perturbed measurements, from prior to posterior in equal steps of time."""
    for _ in range(n_steps):
        answers = forward(x).flatten(1)
        dx, dy = (x - x.mean(0)).flatten(1), answers - answers.mean(0)
        noise = n_steps * _NOISE**2 * torch.eye(dy.shape[1]).to(dy)
        gain = torch.linalg.solve(dy.T @ dy / len(x) + noise, dy.T @ dx / len(x))
        target = y.flatten() + n_steps**0.5 * _NOISE * randn(answers.shape, generator=g, like=answers)
        x = x + ((target - answers) @ gain).view(x.shape)
    return x


def _digits(run: Run) -> tuple[list[Comparison], Figure, bytes]:
    """Digits from the magnitudes of their Fourier transform."""
    from perturbkit.data import load_digits8

    train, test = (load_digits8(part).x.flatten(1).double() * 2 - 1 for part in ("train", "test"))
    g = run.generator("digits")
    held_out = test[randperm(len(test), generator=g)[:8]]
    denoiser = digits_denoiser8()
    phases = PhaseRetrieval(2.0)

    def forward(x: Tensor) -> Tensor:
        return phases((x.view(-1, 1, 8, 8) + 1) / 2).flatten(1)

    def prior(n: int) -> Tensor:
        return train[randint(0, len(train), (n,), generator=g)]

    rows: dict[str, list[float]] = {}
    best: dict[str, list[Tensor]] = {"truth": list(held_out)}
    for truth in held_out:
        y = forward(truth[None])[0]
        y = y + 0.01 * randn(y.shape, generator=g, like=y)
        for name, x in _contest(denoiser, prior, forward, y, 2 * _J, g).items():
            misfits = (forward(x) - y).norm(dim=1) / y.norm()
            rows.setdefault(name, []).append(float(misfits.mean()))
            best.setdefault(name, []).append(x[misfits.argmin()])
    titles = {
        "truth": "eight digits that were not trained on",
        "enkg": "found from Fourier magnitudes by EnKG",
        "eki": "by ensemble Kalman inversion",
        "best": "the best of as many digits of the training set",
    }
    figure = Figure(figsize=(6, 4), layout="constrained")
    sheets = {titles[k]: ((torch.stack(best[k]) + 1) / 2).view(-1, 8, 8) for k in titles}
    draw_sheets(figure.subplots(4, 1), sheets, columns=8)
    names = (("eki", "ensemble Kalman inversion"), ("best", "the best of the training digits"))
    return (
        [
            Comparison.over_seeds(
                f"relative misfit, magnitudes of digits, against {name}", rows["enkg"], rows[k], "lower"
            )
            for k, name in names
        ],
        figure,
        png(torch.cat(list(sheets.values())), columns=8),
    )
