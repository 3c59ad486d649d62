"""Oracles of generative PCA: eigenvectors in a subspace, the classical power method, exact recovery in one step."""

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.diffusion import generative_pca, phase_retrieval_matrix, spiked_covariance


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def symmetric(d, seed=0):
    a = draw(d, d, seed=seed)
    return (a + a.T) / 2


def positive(d, seed=0):
    a = draw(d, d, seed=seed)
    return a @ a.T / d


V = positive(5)
EXAMPLE = Example(
    model=lambda: nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5)),
    with_model=lambda model, generator, dtype: generative_pca(
        V.to(dtype), model, 2, n_iter=3, projection_steps=5, generator=generator
    ),
    stochastic=True,
    refusals=(
        (lambda: generative_pca(draw(5, 5), lambda z: z, 5), "not symmetric"),
        (lambda: generative_pca(draw(5, 4), lambda z: z, 5), "not symmetric"),
        (lambda: generative_pca(V), "neither of generator_net"),
        (lambda: generative_pca(V, lambda z: z, 5, project=lambda u: u), "both of generator_net"),
        (lambda: generative_pca(V, lambda z: z), "latent_dim is None"),
        (lambda: generative_pca(V, lambda z: z, 4), "answered 4 entries"),
        (lambda: generative_pca(V, lambda z: z, 5, n_iter=0), "n_iter is 0"),
        (lambda: generative_pca(V, lambda z: z, 5, projection_steps=0), "projection_steps is 0"),
        (lambda: generative_pca(V, lambda z: z, 5, projection_lr=0.0), "projection_lr is 0"),
        (lambda: generative_pca(V, lambda z: z, 5, restarts=0), "restarts is 0"),
        (lambda: generative_pca(V, lambda z: z, 5, init=torch.zeros(5)), "init is zero"),
        (lambda: generative_pca(V, lambda z: z, 5, init=torch.ones(4)), "init has shape"),
        (lambda: generative_pca(V, project=lambda u: u[:3]), r"project\(u\) has shape"),
        (lambda: generative_pca(V, project=lambda u: u, shift=float("inf")), "shift is inf"),
        (lambda: spiked_covariance(draw(5)), "x has shape"),
        (lambda: phase_retrieval_matrix(draw(5, 2), draw(4)), "y has shape"),
    ),
)


def top(matrix):
    return torch.linalg.eigh(matrix)[1][:, -1]


def agree(a, b, tolerance):
    return 1 - abs(float(a @ b)) / float(a.norm() * b.norm()) < tolerance


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_subspace_gives_its_leading_eigenvector(seed):
    matrix, basis = symmetric(12, seed), torch.linalg.qr(draw(12, 4, seed=seed + 10))[0]
    expected = basis @ top(basis.T @ matrix @ basis)
    exact = generative_pca(
        matrix, project=lambda u: basis @ (basis.T @ u), init=draw(12, seed=5), n_iter=3000
    )
    assert float((exact.x - expected * (exact.x @ expected).sign()).norm()) < 1e-6
    assert exact.latent is None
    # The same by searching latents: as exact as the search.
    found = generative_pca(
        positive(12, seed),
        lambda z: z @ basis.T,
        4,
        init=exact.x,
        n_iter=40,
        projection_steps=60,
        generator=seed,
    )
    assert agree(found.x, basis @ top(basis.T @ positive(12, seed) @ basis), 1e-3)
    torch.testing.assert_close(found.x, basis @ found.latent / found.latent.norm())


def test_the_identity_gives_the_power_method():
    matrix = positive(8, 4)
    steps = generative_pca(matrix, project=lambda u: u, n_iter=6, shift=0.0)
    w = matrix[:, matrix.diagonal().argmax()]
    for i in range(6):
        w = matrix @ w
        w = w / w.norm()
        assert float(steps.history[i]) == pytest.approx(float(w @ matrix @ w), rel=1e-12)
    torch.testing.assert_close(steps.x, w)
    converged = generative_pca(matrix, project=lambda u: u, n_iter=3000)
    assert float((converged.x - top(matrix) * (converged.x @ top(matrix)).sign()).norm()) < 1e-8
    assert converged.value == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-12)


def test_an_exact_projection_recovers_a_spike_in_one_step():
    # The range: unit vectors of one sign pattern, not a subspace; -x* is not in it.
    signal = draw(9, seed=6).abs()
    signal /= signal.norm()
    matrix = torch.outer(signal, signal)
    for seed in range(5):
        start = draw(9, seed=seed)
        start = start * (start @ signal).sign()
        found = generative_pca(matrix, project=lambda u: u.clamp_min(0), init=start, n_iter=1)
        torch.testing.assert_close(found.x, signal)


def test_a_shift_lets_the_largest_eigenvalue_win():
    matrix = torch.diag(torch.tensor([1.0, 0.5, -3.0]).double())
    start = torch.ones(3).double()
    plain = generative_pca(matrix, project=lambda u: u, init=start, n_iter=500, shift=0.0)
    # The best of the path is kept, but the path ends at the wrong end of the spectrum.
    assert float(plain.history[-1]) == pytest.approx(-3.0)
    auto = generative_pca(matrix, project=lambda u: u, init=start, n_iter=500)
    assert agree(auto.x, torch.eye(3).double()[0], 1e-6)
    assert float(auto.history[-1]) == pytest.approx(1.0)  # of the matrix as it was given


def test_the_best_iterate_is_kept():
    matrix, seen = positive(6, 7), iter(draw(5, 6, seed=8))
    found = generative_pca(matrix, project=lambda u: next(seen), n_iter=5)
    assert found.value == pytest.approx(float(found.history.max()))
    assert float(found.x @ matrix @ found.x) == pytest.approx(found.value)
    assert int(found.history.argmax()) != 4


def test_expectations_of_the_two_matrices():
    signal = draw(5, seed=9)
    signal /= signal.norm()
    m = 400_000
    x = 2**0.5 * draw(m, 1, seed=10) * signal + draw(m, 5, seed=11)
    spiked = spiked_covariance(x)
    torch.testing.assert_close(spiked, 2 * torch.outer(signal, signal), rtol=0, atol=0.03)
    a = draw(m, 5, seed=12)
    v = phase_retrieval_matrix(a, (a @ signal) ** 2)
    torch.testing.assert_close(v, 2 * torch.outer(signal, signal), rtol=0, atol=0.05)
    y = draw(7, seed=13)
    by_hand = sum(y[i] * (torch.outer(a[i], a[i]) - torch.eye(5, dtype=torch.float64)) for i in range(7)) / 7
    torch.testing.assert_close(phase_retrieval_matrix(a[:7], y), by_hand)


def test_a_curved_generator_finds_what_pca_does_not():
    # A curve on the sphere in 40 dimensions, 25 samples: the eigenvector drowns, the curve's point does not.
    frequency = draw(40, seed=14) * 2

    def curve(z):
        return (z * frequency + torch.arange(40)).sin()

    signal = curve(torch.tensor([[0.4]]).double())[0]
    signal /= signal.norm()
    x = 2 * draw(25, 1, seed=15) * signal + draw(25, 40, seed=16)
    matrix = spiked_covariance(x)
    found = generative_pca(matrix, curve, 1, n_iter=6, restarts=8, generator=0)
    cosine = abs(float(found.x @ signal))
    assert cosine > 0.99
    assert cosine > abs(float(top(matrix) @ signal)) + 0.05
    assert found.cost.ngrad == 100 * (8 + 5 * 9)


@pytest.mark.parametrize("least", [-1.0, -0.98, -1.02, -4.0])
def test_a_negative_eigenvalue_of_the_same_size_does_not_hold_it_back(least):
    basis = torch.linalg.qr(draw(3, 3, seed=8))[0]
    matrix = basis @ torch.diag(torch.tensor([1.0, least, 0.2], dtype=torch.float64)) @ basis.T
    found = generative_pca(matrix, project=lambda u: u, init=basis.sum(1), n_iter=400)
    assert found.value == pytest.approx(1.0, abs=1e-8)
    assert abs(float(found.x @ basis[:, 0])) == pytest.approx(1.0, abs=1e-8)
