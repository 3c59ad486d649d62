"""Leading directions against `scipy.sparse.linalg.eigsh` and scikit-learn's PCA and SparsePCA: the same vector, and a better one.

Method: generative_pca. With the identity as projection it is the power method, and is asserted to find the eigenvector of `eigsh` to
1e-5; with a linear generator, and with the projection on its range, it is asserted to find the top eigenvector within that range to
1e-5, from a start that knows neither. Then, for a spike in the range of a small network of 4 latents among 64 coordinates and 100
samples, the cosines with the truth are printed: the generator's must be above PCA's, SparsePCA's and the eigenvector's, which do not
know the range.

The floor is the matrix products of the power method. The slower ones: without a shift given, a Cholesky decomposition shows that no
negative eigenvalue can win, which `eigsh` need not; every call checks that the matrix is finite and symmetric; Lanczos needs fewer
products than the power method; and with a network the search in its latents, `n_iter * projection_steps` calls and gradients, is all of
the time and the price of the better vector. Times in milliseconds. Runs in half a minute:
``python -m benchmarks generative_pca_vs_scipy``.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from benchmarks._timing import Row, compare, table_in_ms
from scipy.sparse.linalg import eigsh
from sklearn.decomposition import PCA, SparsePCA
from torch import Tensor, nn

from perturbkit.core.random import as_generator, randn, seeded_init
from perturbkit.diffusion import generative_pca, spiked_covariance


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    rows = [row for d in (64, 512) for row in power(d, rounds)] + spike(rounds)
    return table_in_ms(rows)


def samples(signal: Tensor, m: int, strength: float, seed: int) -> Tensor:
    g = as_generator(seed)
    u = randn((m, 1), generator=g, like=signal)
    return strength**0.5 * u * signal + randn((m, len(signal)), generator=g, like=signal)


def power(d: int, rounds: int) -> list[Row]:
    signal = nn.functional.normalize(randn((d,), generator=as_generator(1), dtype=torch.float64), dim=0)
    matrix = spiked_covariance(samples(signal, 20 * d, 10.0, 2))
    start = torch.ones(d, dtype=torch.float64)

    def ours(shift: float | str = "auto") -> Tensor:
        return generative_pca(matrix, project=lambda u: u, init=start, n_iter=20, shift=shift).x  # type: ignore[arg-type]

    def peer() -> np.ndarray:
        return eigsh(matrix.numpy(), k=1, which="LA", v0=start.numpy())[1][:, 0]

    assert abs(float(ours() @ torch.from_numpy(peer()))) > 1 - 1e-10  # an angle of 1e-5
    basis = torch.linalg.qr(randn((d, 5), generator=as_generator(3), dtype=torch.float64))[0]
    best = basis @ torch.linalg.eigh(basis.mT @ matrix @ basis)[1][:, -1]
    projected = generative_pca(matrix, project=lambda u: basis @ (basis.mT @ u), init=start, n_iter=2000)
    generated = generative_pca(
        matrix, lambda z: z @ basis.mT, 5, init=start, n_iter=40, projection_steps=200, generator=0
    )
    for found in (projected, generated):
        assert abs(float(found.x @ best)) > 1 - 1e-10

    def floor() -> Tensor:
        w = start
        for _ in range(20):
            w = nn.functional.normalize(matrix @ w, dim=0)
        return w

    rows = []
    for name, run in (("20 steps", ours), ("20 steps, shift known", lambda: ours(0.0))):
        rows += compare(run, {f"power method, {d} coordinates, {name}, eigsh": peer}, floor, rounds)
    return rows


def spike(rounds: int) -> list[Row]:
    with seeded_init(4):
        net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 64)).requires_grad_(False)
    with torch.no_grad():
        signal = nn.functional.normalize(net(randn((4,), generator=as_generator(5))), dim=0)
    x = samples(signal, 100, 1.0, 6)
    matrix = spiked_covariance(x)

    def ours() -> Tensor:
        return generative_pca(matrix, net, 4, n_iter=5, projection_steps=50, generator=0).x

    def floor() -> Tensor:
        z = torch.zeros(4, 4).requires_grad_()
        for _ in range(5 * 50):
            torch.autograd.grad(net(z).square().sum(), z)
        return z

    def sparse() -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return SparsePCA(1, alpha=1.0, random_state=0, max_iter=100).fit(x.numpy()).components_[0]

    peers = {
        "eigsh": lambda: eigsh(matrix.numpy(), k=1, which="LA")[1][:, 0],
        "PCA": lambda: PCA(1).fit(x.numpy()).components_[0],
        "SparsePCA": sparse,
    }
    cosines = {name: abs(float(np.dot(run(), signal))) for name, run in {"ours": ours, **peers}.items()}
    print("cosine with the spike:", ", ".join(f"{name} {value:.3f}" for name, value in cosines.items()))
    assert cosines["ours"] > max(value for name, value in cosines.items() if name != "ours")
    return compare(
        ours, {f"network of 4 latents, 64 coordinates, {k}": v for k, v in peers.items()}, floor, rounds
    )


if __name__ == "__main__":
    main()
