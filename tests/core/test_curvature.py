"""Matrix-free curvature against dense matrices."""

import json
import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.curvature import (
    TraceEstimate,
    gauss_newton_vp,
    hessian,
    hutchinson_trace,
    hvp,
    jacobian_vector,
    lanczos,
    power_iteration,
    spectral_density,
    stochastic_lanczos_quadrature,
    vector_jacobian,
)
from perturbkit.core.parameters import flatten, functional

CLOSE = {"atol": 1e-10, "rtol": 1e-10}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric(seed: int, spectrum: Tensor) -> Tensor:
    q = torch.linalg.qr(draw(seed, len(spectrum), len(spectrum))).Q
    return q @ torch.diag(spectrum) @ q.T


def operator(a: Tensor):
    return lambda v: v @ a


@pytest.fixture
def problem():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = draw(1, 10, 4), torch.arange(10) % 3
    call = functional(net)
    outputs = lambda w: call(w, x)
    loss = lambda out: nn.functional.cross_entropy(out, y)
    return flatten(net), outputs, loss


def test_products_agree_with_the_dense_hessian(problem) -> None:
    w, outputs, loss = problem
    full = lambda u: loss(outputs(u))
    dense = torch.autograd.functional.hessian(full, w)
    v = draw(2, 5, len(w))
    torch.testing.assert_close(hvp(full, w, v[0]), dense @ v[0], **CLOSE)
    product = hessian(full, w)
    torch.testing.assert_close(product(v), v @ dense, **CLOSE)
    torch.testing.assert_close(product(v[1]), dense @ v[1], **CLOSE)
    assert not product(v).requires_grad


def test_jacobian_products_agree_with_the_dense_jacobian(problem) -> None:
    w, outputs, _ = problem
    dense = torch.autograd.functional.jacobian(outputs, w)
    v, u = draw(3, len(w)), draw(4, 10, 3)
    torch.testing.assert_close(jacobian_vector(outputs, w, v), dense @ v, **CLOSE)
    torch.testing.assert_close(vector_jacobian(outputs, w, u), torch.einsum("nk,nkd->d", u, dense), **CLOSE)


def test_gauss_newton_is_the_fisher_matrix_of_the_softmax(problem) -> None:
    w, outputs, loss = problem
    jacobian = torch.autograd.functional.jacobian(outputs, w)
    p = outputs(w).softmax(1)
    fisher = (
        torch.einsum("nkd,nkj,nje->de", jacobian, torch.diag_embed(p) - p[:, :, None] * p[:, None], jacobian)
        / 10
    )
    v = draw(5, len(w))
    torch.testing.assert_close(gauss_newton_vp(outputs, loss, w, v), fisher @ v, **CLOSE)


def test_gauss_newton_of_a_linear_model_is_the_hessian() -> None:
    a, w, v = draw(0, 7, 4), draw(1, 4), draw(2, 4)
    fun, loss = (lambda u: a @ u), (lambda out: out.pow(4).sum())
    torch.testing.assert_close(gauss_newton_vp(fun, loss, w, v), hvp(lambda u: loss(fun(u)), w, v), **CLOSE)


def test_inputs_of_any_shape_and_functions_without_curvature() -> None:
    x, v = draw(0, 2, 3), draw(1, 4, 2, 3)
    torch.testing.assert_close(hvp(lambda u: u.pow(3).sum(), x, v), 6 * x * v)
    assert torch.equal(hvp(lambda u: u.sum(), x, v), torch.zeros_like(v))
    assert torch.equal(hvp(lambda u: torch.ones(()), x, v[0]), torch.zeros_like(x))
    with torch.no_grad():
        torch.testing.assert_close(hvp(lambda u: u.pow(3).sum(), x, v[0]), 6 * x * v[0])
    assert hvp(lambda u: u.pow(3).sum(), x.float(), v[0].float()).dtype == torch.float32


def test_power_iteration_finds_the_largest_magnitudes() -> None:
    spectrum = torch.tensor([-9.0, 7.0, 5.0, 1.0, 0.5, -0.3, 0.0], dtype=torch.float64)
    a = symmetric(0, spectrum)
    found = power_iteration(operator(a), torch.zeros(7, dtype=torch.float64), k=3, tol=1e-9, generator=1)
    assert found.converged
    torch.testing.assert_close(found.values, spectrum[:3], atol=1e-8, rtol=0)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(3, dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(found.vectors @ a, found.values[:, None] * found.vectors, atol=1e-7, rtol=0)
    hurried = power_iteration(operator(a), torch.zeros(7, dtype=torch.float64), k=3, max_iter=2, generator=1)
    assert not hurried.converged
    assert hurried.n_products == 6
    # The residual bounds the distance to an eigenvalue.
    gaps = (hurried.values[:, None] - spectrum).abs().amin(1)
    assert (gaps <= hurried.residuals + 1e-12).all()


def test_power_iteration_of_the_zero_operator() -> None:
    found = power_iteration(lambda v: 0 * v, torch.zeros(3), generator=0)
    assert found.values.tolist() == [0]
    assert found.converged


def test_power_iteration_agrees_with_arpack_on_a_hessian(problem) -> None:
    w, outputs, loss = problem
    product = hessian(lambda u: loss(outputs(u)), w)
    linear = scipy.sparse.linalg.LinearOperator(
        (len(w), len(w)),
        matvec=lambda v: product(torch.from_numpy(np.ravel(v).copy())).numpy(),
        dtype=np.float64,
    )
    want = scipy.sparse.linalg.eigsh(linear, k=2, which="LM", return_eigenvectors=False)
    found = power_iteration(product, w, k=2, tol=1e-7, max_iter=5000, generator=0)
    assert sorted(found.values.tolist()) == pytest.approx(sorted(want), abs=1e-7)


@pytest.mark.parametrize("batch", [False, True])
def test_lanczos_tridiagonalises(batch: bool) -> None:
    a = symmetric(1, draw(2, 12))
    v0 = draw(3, 4, 12)
    alpha, beta, q = lanczos(operator(a), v0 if batch else v0[0], 12)
    alpha, beta, q = (t if batch else t[None] for t in (alpha, beta, q))
    t = torch.diag_embed(alpha) + torch.diag_embed(beta, 1) + torch.diag_embed(beta, -1)
    torch.testing.assert_close(q @ a @ q.mT, t, **CLOSE)
    torch.testing.assert_close(q @ q.mT, torch.eye(12, dtype=torch.float64).expand(len(q), -1, -1), **CLOSE)
    torch.testing.assert_close(q[:, 0], torch.nn.functional.normalize(v0[: len(q)], dim=1))
    torch.testing.assert_close(torch.linalg.eigvalsh(t[0]), torch.linalg.eigvalsh(a), **CLOSE)


def test_lanczos_finds_extreme_eigenvalues_early_and_stays_orthogonal() -> None:
    spectrum = torch.cat(
        (torch.linspace(0, 1, 197, dtype=torch.float64), torch.tensor([3.0, 10.0, -6.0]).double())
    )
    a = symmetric(3, spectrum)
    alpha, beta, q = lanczos(operator(a), draw(4, 200), 60)
    ritz = torch.linalg.eigvalsh(torch.diag(alpha) + torch.diag(beta, 1) + torch.diag(beta, -1))
    assert ritz[[0, -2, -1]].tolist() == pytest.approx([-6, 3, 10], abs=1e-9)
    drift = lambda basis: float((basis @ basis.T - torch.eye(60, dtype=torch.float64)).abs().max())
    assert drift(q) < 1e-12
    # Without reorthogonalisation, a converged pair ruins it.
    assert drift(lanczos(operator(a), draw(4, 200), 60, reorthogonalise=False)[2]) > 1e-3


def test_lanczos_ends_on_an_invariant_space() -> None:
    a = torch.diag(torch.tensor([1.0, 1.0, 5.0, 5.0, 5.0], dtype=torch.float64))
    alpha, beta, q = lanczos(operator(a), torch.ones(5, dtype=torch.float64), 5)
    assert (q.norm(dim=1) > 0).tolist() == [True, True, False, False, False]
    assert (alpha[2:] == 0).all()
    assert (beta[1:] == 0).all()
    small = torch.tensor([[alpha[0], beta[0]], [beta[0], alpha[1]]])
    torch.testing.assert_close(torch.linalg.eigvalsh(small), torch.tensor([1.0, 5.0]), check_dtype=False)


def test_hutchinson_is_unbiased_with_the_stated_variance() -> None:
    a = symmetric(5, torch.linspace(1, 3, 20, dtype=torch.float64))
    found = hutchinson_trace(operator(a), torch.zeros(20, dtype=torch.float64), n_probes=4000, generator=0)
    assert abs(found.value - float(a.trace())) < 4 * found.standard_error
    off = a - torch.diag(a.diagonal())
    assert float(found.samples.var()) == pytest.approx(2 * float(off.square().sum()), rel=0.1)
    assert found.n_products == 4000


def test_log_determinant_by_quadrature() -> None:
    # Wide spectrum, fewer steps than dimensions.
    a = symmetric(6, torch.logspace(-1, 2, 80, dtype=torch.float64))
    want = float(torch.linalg.slogdet(a).logabsdet)
    found = stochastic_lanczos_quadrature(
        operator(a), torch.zeros(80, dtype=torch.float64), torch.log, n_probes=100, n_steps=40, generator=0
    )
    assert abs(found.value - want) < 4 * found.standard_error
    assert found.standard_error < 0.05 * abs(want)
    assert found.n_products == 4000


def test_quadrature_is_exact_where_it_should_be() -> None:
    # For a diagonal operator random signs have no variance, and m steps integrate polynomials of degree 2m - 1.
    spectrum = torch.linspace(-1, 2, 30, dtype=torch.float64)
    like = torch.zeros(30, dtype=torch.float64)
    for degree in range(6):
        found = stochastic_lanczos_quadrature(
            lambda v: v * spectrum, like, lambda t, p=degree: t**p, n_probes=3, n_steps=3, generator=degree
        )
        assert found.value == pytest.approx(float((spectrum**degree).sum()), abs=1e-9)
        assert found.standard_error < 1e-9


def test_quadrature_after_an_invariant_space_stays_on_the_spectrum() -> None:
    # Two distinct eigenvalues, five steps: the cut-off part must not contribute log 0.
    spectrum = torch.tensor([2.0, 2.0, 2.0, 8.0, 8.0, 8.0], dtype=torch.float64)
    found = stochastic_lanczos_quadrature(
        lambda v: v * spectrum,
        torch.zeros(6, dtype=torch.float64),
        torch.log,
        n_probes=4,
        n_steps=5,
        generator=0,
    )
    assert found.value == pytest.approx(3 * math.log(16))
    whole = stochastic_lanczos_quadrature(lambda v: 3 * v, torch.zeros(6), torch.log, n_steps=6, generator=0)
    assert whole.value == pytest.approx(6 * math.log(3), rel=1e-5)


def test_spectral_density_of_two_clusters() -> None:
    spectrum = torch.cat((torch.full((75,), -1.0), torch.full((25,), 4.0))).double()
    a = symmetric(7, spectrum)
    found = spectral_density(
        operator(a), torch.zeros(100, dtype=torch.float64), n_probes=200, n_steps=10, generator=0
    )
    mass = torch.trapezoid(found.density, found.grid)
    assert float(mass) == pytest.approx(1, abs=1e-3)
    left = found.grid < 1
    assert float(torch.trapezoid(found.density[left], found.grid[left])) == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(200, dtype=torch.float64))
    coarse = spectral_density(
        operator(a),
        torch.zeros(100, dtype=torch.float64),
        grid=torch.tensor([-1.0, 1.5]).double(),
        sigma=0.1,
        n_steps=10,
        generator=0,
    )
    assert coarse.density[0] > 2.5
    assert coarse.density[1] < 1e-6
    flat = spectral_density(lambda v: 3 * v, torch.zeros(5), n_steps=2, generator=0)
    assert float(flat.grid[flat.density.argmax()]) == pytest.approx(3, abs=0.01)
    # Beyond the one-dimensional Krylov space, no node leaves the spectrum.
    torch.testing.assert_close(flat.nodes, torch.full((16, 2), 3.0))


def test_results_are_reproducible_plain_and_follow_dtype() -> None:
    a = symmetric(8, torch.linspace(1, 2, 6, dtype=torch.float64))
    first, second, third = (
        hutchinson_trace(operator(a), torch.zeros(6, dtype=torch.float64), n_probes=2, generator=g)
        for g in (0, 0, 5)
    )
    assert torch.equal(first.samples, second.samples)
    assert not torch.equal(first.samples, third.samples)
    assert TraceEstimate.from_dict(json.loads(json.dumps(first.to_dict()))).value == first.value
    assert math.isnan(hutchinson_trace(operator(a), torch.zeros(6).double(), n_probes=1).standard_error)
    assert power_iteration(operator(a.float()), torch.zeros(6), generator=0).vectors.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: hvp(lambda x: x**2, torch.ones(2), torch.ones(2)), "single number"),
        (lambda: hvp(lambda x: x.sum(), torch.ones(2), torch.ones(3)), "shape of x"),
        (lambda: hvp(lambda x: x.sum(), torch.ones(2), [1.0]), "a list"),
        (lambda: hvp(lambda x: x.sum(), [1.0], torch.ones(1)), "torch.Tensor"),
        (lambda: gauss_newton_vp(lambda x: x, lambda o: o, torch.ones(2), torch.ones(2)), "single number"),
        (lambda: jacobian_vector(lambda x: x, torch.ones(2), torch.ones(3)), "shape of x"),
        (lambda: vector_jacobian(lambda x: x, torch.ones(2), torch.ones(3)), "the output"),
        (lambda: power_iteration(lambda v: v, torch.ones(2), k=3), "k is 3"),
        (lambda: power_iteration(lambda v: v[0], torch.ones(2)), "vmap"),
        (lambda: power_iteration(lambda v: v, torch.ones(2), tol=0.0), "tol"),
        (lambda: power_iteration(lambda v: v, torch.ones(2, 2)), "1 dimensions"),
        (lambda: power_iteration(lambda v: v, torch.ones(2), max_iter=0), "max_iter"),
        (lambda: lanczos(lambda v: v, torch.zeros(3), 2), "v0 is zero"),
        (lambda: lanczos(lambda v: v, torch.ones(3), 4), "n_steps is 4"),
        (lambda: hutchinson_trace(lambda v: v, torch.ones(3), n_probes=0), "n_probes"),
        (
            lambda: stochastic_lanczos_quadrature(lambda v: -v, torch.ones(3), torch.log, n_steps=2),
            "not finite at the eigenvalue estimate -1",
        ),
        (lambda: stochastic_lanczos_quadrature(lambda v: v, torch.ones(3), torch.log), "n_steps is 30"),
        (lambda: spectral_density(lambda v: v, torch.ones(3), n_steps=2, sigma=0.0), "sigma"),
    ],
)
def test_refusals(call, match: str) -> None:
    with pytest.raises(checks.PerturbkitError, match=match):
        call()
