"""Densities of sets and cubes against scikit-learn and scipy: what they cost and how good they are.

Methods: reflected_score_rates (`SpectralReflectedModel`) against `KernelDensity` and `gaussian_kde` on the unit interval and square, whose
walls these do not know, fitted and read at 1000 points; perturbed_likelihood (`PerturbedLikelihoodGenerator`) against `KernelDensity` and
probabilistic PCA on a noisy circle, read at 1000 points.

Before timing it is asserted that the generator, where it is linear with normal latents, has the mean log-likelihood of
`sklearn.decomposition.PCA` to 1e-2, and that the cosine series errs less in total variation than either kernel estimate; errors and
held-out log-likelihoods are printed. Nothing of perturbed likelihood has a peer to train: its fit, ten seconds of gradients where a kernel
estimate only stores the data, is left out of the table and printed.

The floor is, for the cube, the table of cosines that any series needs, and for the generator the distances to its 256 centres. Runs in
a minute: ``python -m benchmarks density_vs_sklearn``.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from benchmarks._timing import Row, compare, table_in_ms
from scipy.stats import gaussian_kde
from sklearn.decomposition import PCA
from sklearn.neighbors import KernelDensity
from torch import nn

from perturbkit.core.random import seeded_init
from perturbkit.diffusion import PerturbedLikelihoodGenerator, SpectralReflectedModel

N, POINTS = 2000, 1000


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    rows = [row for dim in (1, 2) for row in cube(dim, rounds)] + curve(rounds)
    return table_in_ms(rows)


def cube(dim: int, rounds: int) -> list[Row]:
    rng = np.random.default_rng(dim)
    x, at = rng.beta(1.0, 2.0, (N, dim)), rng.random((POINTS, dim))
    exact = np.prod(2 * (1 - at), 1)

    def ours() -> np.ndarray:
        return SpectralReflectedModel().fit(x).density(at)

    def tree() -> np.ndarray:
        width = N ** (-1 / (dim + 4)) * x.std()
        return np.exp(KernelDensity(bandwidth=width).fit(x).score_samples(at))

    def scipy() -> np.ndarray:
        return gaussian_kde(x.T)(at.T)

    errors = [0.5 * float(np.abs(run() - exact).mean()) for run in (ours, tree, scipy)]
    print(
        f"total variation on the cube of {dim}: ours {errors[0]:.3f}, KernelDensity {errors[1]:.3f}, gaussian_kde {errors[2]:.3f}"
    )
    assert errors[0] < min(errors[1:])
    modes = np.arange(SpectralReflectedModel().fit(x).n_modes_ + 1)

    def floor() -> np.ndarray:
        return np.cos(np.pi * x[:, :, None] * modes), np.cos(np.pi * at[:, :, None] * modes)  # type: ignore[return-value]

    names = {"KernelDensity": tree, "gaussian_kde": scipy}
    return compare(ours, {f"cube of {dim}, {N} rows, {k}": v for k, v in names.items()}, floor, rounds)


def curve(rounds: int) -> list[Row]:
    rng = np.random.default_rng(0)

    def drawn(n: int) -> np.ndarray:
        angle = 2 * np.pi * rng.random(n)
        return np.column_stack([np.cos(angle), np.sin(angle)]) + 0.1 * rng.standard_normal((n, 2))

    x, at = drawn(500), drawn(POINTS)
    linear(x)
    start = time.perf_counter()
    model = PerturbedLikelihoodGenerator(generator=0).fit(x)
    seconds = time.perf_counter() - start
    kernel, pca = KernelDensity(bandwidth="scott").fit(x), PCA(1).fit(x)
    print(
        f"held-out log-likelihood on the circle: ours {model.score(at):.3f}, KernelDensity {kernel.score_samples(at).mean():.3f}, "
        f"PCA {pca.score(at):.3f}; our fit took {seconds:.1f} s"
    )
    assert model.score(at) > max(kernel.score_samples(at).mean(), pca.score(at))
    centres, rows = torch.from_numpy(model.sample(256)), torch.from_numpy(at)

    def ours() -> np.ndarray:
        return model.score_samples(at)

    def floor() -> torch.Tensor:
        return torch.logsumexp(-torch.cdist(rows, centres).square(), 1)

    peers = {
        "circle, KernelDensity": lambda: kernel.score_samples(at),
        "circle, PCA": lambda: pca.score_samples(at),
    }
    return compare(ours, peers, floor, rounds)


def linear(x: np.ndarray) -> None:
    """Assert that a linear generator of normal latents is probabilistic PCA."""
    mixed = np.hstack([x, x @ np.array([[1.0, 0.5], [-0.3, 2.0]])])
    with seeded_init(0):
        net = nn.Linear(1, 4)
    model = PerturbedLikelihoodGenerator(
        net, latent="normal", perturbation=0.0, max_iter=1500, lr=1e-2, batch_size=500, generator=0
    ).fit(mixed)
    found, expected = model.score(mixed), PCA(1).fit(mixed).score(mixed)
    assert abs(found - expected) < 1e-2, (found, expected)


if __name__ == "__main__":
    main()
