"""Oracles of the matrix square root: diagonals, identities, SciPy and gradcheck."""

import pytest
import scipy.linalg
import torch

from _common import Example
from perturbkit.numerics import lyapunov_solve, matrix_sqrt


def spd(shape=(3, 6), cond=20.0, seed=0, dtype=torch.float64):
    *batch, d = shape
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(*batch, d, d, generator=g, dtype=torch.float64))[0]
    values = torch.logspace(0, 1, d, base=cond, dtype=torch.float64) * (
        0.5 + torch.rand(1, generator=g).item()
    )
    return ((q * values) @ q.mT).to(dtype)


EXAMPLE = Example(
    call=lambda generator, dtype: matrix_sqrt(spd(dtype=dtype)),
    refusals=(
        (lambda: matrix_sqrt(torch.ones(2, 3)), "a has shape"),
        (lambda: matrix_sqrt(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), "off its transpose"),
        (lambda: matrix_sqrt(torch.diag(torch.tensor([1.0, -1.0]))), "not positive definite"),
        (lambda: matrix_sqrt(torch.zeros(2, 2)), "not positive definite"),
        (lambda: lyapunov_solve(torch.ones(3, 2), torch.ones(3, 2)), "b has shape"),
        (lambda: matrix_sqrt(spd(), "schur"), "method is 'schur'"),
        (lambda: matrix_sqrt(spd(), degree=10), "degree is 10"),
        (lambda: matrix_sqrt(spd(), backward_iters=0), "backward_iters is 0"),
        (lambda: lyapunov_solve(spd(), spd((2, 6))), "c has shape"),
        (lambda: lyapunov_solve(spd() * torch.nan, spd()), "NaN"),
    ),
)
METHODS = {"pade": 41, "taylor": 601, "newton_schulz": 25, "eigh": 3}
methods = pytest.mark.parametrize(("method", "degree"), METHODS.items())


@methods
@pytest.mark.parametrize("shape", [(5,), (4, 7), (2, 3, 4)])
def test_the_square_of_the_root(method, degree, shape):
    a = spd(shape, seed=sum(shape))
    root = matrix_sqrt(a, method, degree=degree)
    torch.testing.assert_close(root @ root, a, rtol=1e-8, atol=1e-8)
    inverse = matrix_sqrt(a, method, degree=degree, inverse=True)
    eye = torch.eye(a.shape[-1], dtype=a.dtype).expand_as(a)
    torch.testing.assert_close(inverse @ root, eye, rtol=1e-7, atol=1e-7)


@methods
def test_diagonal(method, degree):
    values = torch.tensor([[0.5, 1.0, 4.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    found = matrix_sqrt(torch.diag_embed(values), method, degree=degree)
    torch.testing.assert_close(found, torch.diag_embed(values.sqrt()), rtol=1e-9, atol=1e-9)


def test_pade_is_closer_than_taylor_at_the_same_degree():
    a = spd((16, 24), cond=50.0)
    exact = matrix_sqrt(a, "eigh")
    errors = {m: float((matrix_sqrt(a, m) - exact).norm() / exact.norm()) for m in ("pade", "taylor")}
    assert errors["pade"] < 0.5 * errors["taylor"]


@pytest.mark.parametrize("degree", [21, 41, 61])
@pytest.mark.parametrize("inverse", [False, True])
def test_high_degree_keeps_the_digits_of_single_precision(degree, inverse):
    a = spd((4, 6), cond=20.0, seed=9)
    exact = matrix_sqrt(a, "eigh", inverse=inverse)
    found = matrix_sqrt(a.float(), degree=degree, inverse=inverse).double()
    assert float((found - exact).norm() / exact.norm()) < 2e-6


def test_pade_matches_the_series_it_is_made_of():
    # [m, m] agrees with the Taylor series up to z^(2m): on a matrix near the identity they differ only beyond.
    n = torch.eye(3, dtype=torch.float64) - 0.01 * spd((3,), cond=2.0) / 3
    a = n / n.norm() * 1.7
    torch.testing.assert_close(matrix_sqrt(a, degree=41), matrix_sqrt(a, "eigh"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("inverse", [False, True])
@methods
def test_gradcheck(method, degree, inverse):
    factor = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    eye = 2 * torch.eye(4, dtype=torch.float64)

    def root(f):
        return matrix_sqrt(f @ f.mT + eye, method, degree=degree, inverse=inverse, backward_iters=20)

    assert torch.autograd.gradcheck(root, (factor.requires_grad_(True),), atol=1e-8, rtol=1e-6)


def test_gradient_at_equal_eigenvalues_is_finite_where_that_of_eigh_is_not():
    a = torch.eye(4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    (ours,) = torch.autograd.grad((matrix_sqrt(a, degree=61, backward_iters=20) * weight).sum(), a)
    # At the identity X = G / 2, symmetrised.
    torch.testing.assert_close(ours, (weight + weight.T) / 4, rtol=1e-8, atol=1e-8)
    values, vectors = torch.linalg.eigh(a)
    (theirs,) = torch.autograd.grad((((vectors * values.sqrt()) @ vectors.mT) * weight).sum(), a)
    assert not bool(torch.isfinite(theirs).all())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lyapunov_against_scipy(seed):
    b = spd((6,), cond=30.0, seed=seed)
    c = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed + 9), dtype=torch.float64)
    expected = torch.from_numpy(scipy.linalg.solve_continuous_lyapunov(b.numpy(), c.numpy()))
    torch.testing.assert_close(lyapunov_solve(b, c, iters=20), expected, rtol=1e-8, atol=1e-8)


def test_rows_of_a_batch_do_not_mix():
    a = spd((5, 6), seed=4)
    a[2] *= 1e3
    together = matrix_sqrt(a)
    for row, alone in zip(together, a, strict=True):
        torch.testing.assert_close(row, matrix_sqrt(alone), rtol=1e-10, atol=1e-10)
