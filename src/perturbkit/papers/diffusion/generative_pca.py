"""Generative PCA finds a digit in fewer noisy samples than PCA, with and without sparsity, and from fewer magnitudes.

The generator is the decoder of a small autoencoder; the spike is what it makes of a digit that it was not trained on.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import as_generator, randn, randperm, seeded_init
from perturbkit.diffusion import generative_pca, phase_retrieval_matrix, spiked_covariance
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._autoencoder import Autoencoder, digits_autoencoder
from perturbkit.papers.diffusion._samples import draw_sheets, png

_SAMPLES, _DRAWS, _LATENT = (50, 100, 200, 400), 10, 8


@paper(
    number=38,
    title="Generative Principal Component Analysis",
    authors="Liu, Liu, Ghosh, Han, Scarlett",
    year=2022,
    arxiv="2203.09693",
    claim="Projecting each power step on the range of a generator recovers a spike, or a signal from magnitudes, better than the power "
    "method and the truncated one, with an error of order m^(-1/2).",
    method="perturbkit.diffusion.generative_pca",
    needs="gradient",
    input="any",
    cost="n_iter (restarts + 1) projection_steps gradients of the generator",
    seconds=90,
)
def reproduce(run: Run) -> Evidence:
    """Cosines between estimate and signal, over numbers of samples."""
    from perturbkit.data import load_digits8

    coder = digits_autoencoder(_LATENT)
    with seeded_init(run.seeds(1)[0]):
        untrained = Autoencoder(_LATENT).double().eval().requires_grad_(False)
    test = load_digits8("test").x.flatten(1).double()
    digits = test[randperm(len(test), generator=run.generator("digits"))[:_DRAWS]]
    signals = coder.decode(coder.encode(digits))
    signals = signals / signals.norm(dim=1, keepdim=True)
    names = ("generative", "power", "truncated")
    cosines: dict[str, dict[int, list[float]]] = {n: {m: [] for m in _SAMPLES} for n in names}
    phases: dict[str, list[float]] = {n: [] for n in names}
    control: list[float] = []
    shown: dict[str, list[Tensor]] = {n: [] for n in names}
    for seed, signal in zip(run.seeds(_DRAWS), signals, strict=True):
        g = as_generator(seed)
        for m in _SAMPLES:
            x = randn((m, 1), generator=g, like=signal) * signal + randn((m, 64), generator=g, like=signal)
            matrix = spiked_covariance(x)
            found = _estimates(matrix, coder.decode, signal, seed)
            for name, w in found.items():
                cosines[name][m].append(float((w @ signal).abs()))
                if m == 100:
                    shown[name].append(w * (w @ signal).sign())
            if m == 100:
                w = generative_pca(matrix, untrained.decode, _LATENT, n_iter=6, generator=seed).x
                control.append(float((w @ signal).abs()))
        a = randn((300, 64), generator=g, like=signal)
        y = (a @ signal) ** 2
        for name, w in _estimates(phase_retrieval_matrix(a, y), coder.decode, signal, seed).items():
            phases[name].append(float((w @ signal).abs()))
    ours = cosines["generative"]
    comparisons = [
        Comparison.over_seeds(
            f"cosine, 100 samples, against the {n} power method",
            ours[100],
            cosines[k][100],
            "higher",
            margin=0.1,
        )
        for k, n in (("power", "classical"), ("truncated", "truncated"))
    ]
    comparisons += [
        Comparison.over_seeds(
            "cosine from 300 squared magnitudes, against the classical power method",
            phases["generative"],
            phases["power"],
            "higher",
            margin=0.1,
        ),
        Comparison("exponent of the error in the number of samples", _slope(ours), -0.5, "equal", margin=0.2, n=_DRAWS),
        Comparison.over_seeds(
            "cosine, 100 samples, generator untrained",
            control,
            cosines["power"][100],
            "higher",
            margin=0.1,
            control=True,
            note="must fail: the digit is not in its range",
        ),
    ]  # fmt: skip
    pictures = {
        "signals": signals,
        "generative PCA, 100 samples": torch.stack(shown["generative"]),
        "power method": torch.stack(shown["power"]),
        "truncated power method": torch.stack(shown["truncated"]),
    }
    pictures = {k: (v / v.amax(1, keepdim=True).clamp_min(1e-9)).view(-1, 8, 8) for k, v in pictures.items()}
    notes = (
        f"{_DRAWS} digits of 64 pixels, strength 1; the truncated method is told how many pixels of the signal exceed a tenth of the brightest. "
        "Errors are distances between unit vectors up to sign."
    )
    samples = {"spikes.png": png(torch.cat(list(pictures.values())), columns=_DRAWS)}
    return Evidence(comparisons, _figure(cosines, pictures), notes, samples)


def _estimates(matrix: Tensor, decode: nn.Module, signal: Tensor, seed: int) -> dict[str, Tensor]:
    """Return the estimate of each method; all start at the same column."""
    kept = int((signal > 0.1 * signal.max()).sum())

    def truncate(u: Tensor) -> Tensor:
        return torch.where(u.abs() >= u.abs().topk(kept).values[-1], u, 0)

    return {
        "generative": generative_pca(matrix, decode, _LATENT, n_iter=6, generator=seed).x,
        "power": generative_pca(matrix, project=lambda u: u, n_iter=200).x,
        "truncated": generative_pca(matrix, project=truncate, n_iter=200).x,
    }


def _slope(cosines: dict[int, list[float]]) -> float:
    """Slope of the log mean error over the log number of samples."""
    errors = [
        math.log(sum(math.sqrt(max(0.0, 2 - 2 * c)) for c in cosines[m]) / len(cosines[m])) for m in _SAMPLES
    ]
    logs = torch.tensor([math.log(m) for m in _SAMPLES], dtype=torch.float64)
    centred = logs - logs.mean()
    return float((centred * torch.tensor(errors, dtype=torch.float64)).sum() / centred.square().sum())


def _figure(cosines: dict[str, dict[int, list[float]]], pictures: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = np.ravel(np.asarray(figure.subfigures(1, 2)))
    ax = left.subplots()
    for name, rows in cosines.items():
        ax.semilogx(_SAMPLES, [sum(r) / len(r) for r in rows.values()], marker="o", label=name)
    ax.set_xlabel("samples")
    ax.set_ylabel("cosine with the signal")
    ax.legend(frameon=False)
    draw_sheets(right.subplots(4, 1), pictures)
    return figure
