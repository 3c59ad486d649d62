"""Oracles of polynomial preconditioning: elementary symmetric polynomials, Newton's step, conjugate gradients, SciPy."""

import itertools
import math

import pytest
import torch

from _common import Example
from perturbkit.optim import (
    minimize_krylov,
    minimize_preconditioned,
    power_traces,
    symmetric_polynomial_preconditioner,
)


def definite(d=8, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(2 * d, d, generator=g, dtype=dtype)
    return a.T @ a / (2 * d) + 0.1 * torch.eye(d, dtype=dtype)


def logistic(dtype=torch.float64, n=80, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, generator=g, dtype=dtype) * torch.tensor([20.0, 6.0, *[1.0] * (d - 2)], dtype=dtype)
    y = torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0).to(dtype)
    return lambda x: torch.nn.functional.softplus(-y * (x @ a.T)).mean(1), lambda v: (v @ a.T) @ a / n


def quadratic(b, seed=1):
    root = torch.randn(len(b), generator=torch.Generator().manual_seed(seed), dtype=b.dtype)
    return lambda x: 0.5 * ((x - root) @ b * (x - root)).sum(1), root


def elementary(values, k):
    return sum(math.prod(c) for c in itertools.combinations(values, k))


ZERO = torch.zeros(6, dtype=torch.float64)


def solve(x0=ZERO, matvec=None, method=minimize_preconditioned, **options):
    fun, product = logistic()
    return method(fun, x0, product if matvec is None else matvec, **options)


EXAMPLE = Example(
    call=lambda generator, dtype: minimize_preconditioned(
        logistic(dtype)[0], torch.zeros(6, dtype=dtype), logistic(dtype)[1], tol=1e-3
    ),
    refusals=(
        (lambda: solve(x0=torch.zeros(1, 6)), "x0"),
        (lambda: solve(degree=6), "degree is 6"),
        (lambda: solve(tol=-1.0), "tol is -1"),
        (lambda: solve(max_iter=0), "max_iter is 0"),
        (lambda: solve(matvec=torch.eye(6)), "matvec is a Tensor"),
        (lambda: solve(matvec=lambda v: v[0]), r"matvec answered shape \(6,\)"),
        (lambda: solve(matvec=lambda v: 1.0), "matvec answered a float"),
        (lambda: solve(traces=torch.ones(1)), "degree is 2"),
        (lambda: solve(traces=torch.tensor([-1.0, 1.0])), "traces do not belong"),
        (lambda: solve(traces=torch.tensor([0.0, 1.0])), "traces do not belong"),
        (lambda: solve(traces=torch.tensor([1.0, 1.5])), "traces do not belong"),
        (lambda: solve(method=minimize_krylov, degree=6), "degree is 6"),
        (lambda: solve(method=minimize_krylov, tol=-1.0), "tol is -1"),
        (lambda: solve(method=minimize_krylov, max_iter=0), "max_iter is 0"),
        (lambda: symmetric_polynomial_preconditioner(torch.sin, torch.ones(1), -1), "degree is -1"),
        (lambda: power_traces(torch.eye(2), 0), "degree is 0"),
        (lambda: power_traces(torch.ones(2, 3), 1), "matrix has shape"),
        (lambda: power_traces(torch.sin, 1), "like is None"),
        (lambda: power_traces(torch.sin, 1, like=torch.ones(2), n_probes=0), "n_probes is 0"),
        (lambda: power_traces(3.0, 1, like=torch.ones(2)), "matvec is a float"),
    ),
)


@pytest.mark.parametrize("degree", range(8))
def test_eigenvalues_are_elementary_symmetric_polynomials(degree):
    b = definite(seed=degree)
    values, vectors = torch.linalg.eigh(b)
    p = symmetric_polynomial_preconditioner(lambda v: v @ b, power_traces(b, 8), degree)
    numbers = values.tolist()
    want = torch.tensor(
        [elementary(numbers[:j] + numbers[j + 1 :], degree) for j in range(8)], dtype=torch.float64
    )
    want = want / elementary(numbers, degree)
    got = vectors.T @ p(torch.eye(8, dtype=torch.float64)) @ vectors
    torch.testing.assert_close(got, torch.diag(want), rtol=1e-9, atol=1e-10)
    assert ((want > 0) & (want <= 1)).all()


def test_it_is_the_family_of_the_newton_identities():
    b, eye = definite(seed=11), torch.eye(8, dtype=torch.float64)
    traces = [torch.trace(torch.linalg.matrix_power(b, i)) for i in range(1, 5)]
    family = [eye]
    for t in range(1, 5):
        terms = [
            (-1) ** (i - 1) * family[t - i] @ (traces[i - 1] * eye - torch.linalg.matrix_power(b, i))
            for i in range(1, t + 1)
        ]
        family.append(sum(terms) / t)
        p = symmetric_polynomial_preconditioner(lambda v: v @ b, torch.stack(traces), t)(eye)
        # Ours is divided by the polynomial of all eigenvalues.
        torch.testing.assert_close(p * (family[t][0, 0] / p[0, 0]), family[t], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(family[1], traces[0] * eye - b)


def test_the_condition_numbers_of_a_gapped_spectrum_fall_by_its_gaps():
    s = torch.cat([torch.tensor([100.0, 90.0, 80.0]), torch.linspace(10, 1, 47)]).double()
    b = torch.diag(s**2)
    got = []
    for degree in range(6):
        p = symmetric_polynomial_preconditioner(lambda v: v @ b, power_traces(b, 6), degree)
        spectrum = (p(torch.eye(50, dtype=torch.float64)) @ b).diag()
        got.append(float(spectrum.max() / spectrum.min()))
    assert got == pytest.approx([10000, 6191, 3264, 1257, 729, 498], rel=1e-3)


def test_scale_does_not_matter_even_where_powers_overflow():
    b = definite(d=5, dtype=torch.float32, seed=2)
    p = symmetric_polynomial_preconditioner(lambda v: v @ b, power_traces(b, 4), 3)(torch.eye(5))
    big = b * 1e8
    traces = power_traces(big, 3)
    q = symmetric_polynomial_preconditioner(lambda v: v @ big, traces, 3)(torch.eye(5))
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accelerated", [False, True])
def test_the_last_degree_is_one_exact_newton_step(accelerated):
    b = definite(d=5, seed=3)
    fun, root = quadratic(b)
    found = minimize_preconditioned(
        fun,
        torch.zeros(5, dtype=torch.float64),
        lambda v: v @ b,
        degree=4,
        accelerated=accelerated,
        tol=1e-9,
    )
    torch.testing.assert_close(found.x, root)
    assert (len(found.history), found.cost.ngrad) == (2, 2)


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_krylov_steps_are_restarted_conjugate_gradients(degree):
    linalg = pytest.importorskip("scipy.sparse.linalg")
    b = definite(d=12, seed=degree)
    fun, root = quadratic(b)
    x = torch.zeros(12, dtype=torch.float64).numpy()
    for steps in (1, 2, 3):
        x, _ = linalg.cg(b.numpy(), (b @ root).numpy(), x0=x, maxiter=degree + 1, rtol=0.0)
        found = minimize_krylov(fun, torch.zeros(12, dtype=torch.float64), lambda v: v @ b, degree=degree,
                                max_iter=steps, tol=0.0)  # fmt: skip
        torch.testing.assert_close(found.x, torch.as_tensor(x), rtol=1e-8, atol=1e-8)
        assert found.products == steps * (degree + 1)


def test_krylov_ends_where_the_space_does():
    b = torch.diag(torch.tensor([3.0, 3.0, 1.0, 1.0], dtype=torch.float64))
    fun, root = quadratic(b)
    found = minimize_krylov(fun, torch.zeros(4, dtype=torch.float64), lambda v: v @ b, degree=3)
    torch.testing.assert_close(found.x, root)
    assert len(found.history) == 2


@pytest.mark.parametrize("degree", [0, 2])
def test_steps_written_out(degree):
    b = definite(d=6, seed=4)
    fun, product = logistic(seed=4)
    found = minimize_preconditioned(fun, ZERO, product, degree=degree, max_iter=4, tol=0.0)
    b = product(torch.eye(6, dtype=torch.float64))
    p = symmetric_polynomial_preconditioner(product, power_traces(b, 5), degree)(
        torch.eye(6, dtype=torch.float64)
    )
    one = torch.func.grad(lambda v: fun(v[None])[0])
    x, trials, weight = ZERO, 1, None
    for _ in range(4):
        g = one(x)
        h = p @ g
        weight = float(h @ b @ h / (g @ h)) if weight is None else weight
        trials += 1
        while fun((x - h / weight)[None])[0] > fun(x[None])[0] - g @ h / (2 * weight):
            weight, trials = 2 * weight, trials + 1
        x, weight = x - h / weight, weight / 2
    torch.testing.assert_close(found.x, x)
    assert found.cost.ngrad == trials
    assert found.products == 6 + 1 + 4 * degree
    assert "4 steps" in found.message


def test_accelerated_steps_written_out():
    fun, product = logistic(seed=6)
    b = product(torch.eye(6, dtype=torch.float64))
    p = symmetric_polynomial_preconditioner(product, power_traces(b, 2), 1)(torch.eye(6, dtype=torch.float64))
    one = torch.func.grad(lambda v: fun(v[None])[0])
    x = v = ZERO
    g, total, restarts = one(x), 0.0, 0
    weight = float((p @ g) @ b @ (p @ g) / (g @ p @ g))
    for _ in range(25):
        while True:
            part = (1 + math.sqrt(1 + 4 * weight * total)) / (2 * weight)
            y = (total * x + part * v) / (total + part)
            g = one(y)
            new = y - p @ g / weight
            if fun(new[None])[0] <= fun(y[None])[0] - g @ p @ g / (2 * weight):
                break
            weight *= 2
        if total > 0 and g @ (new - x) > 0:
            v, total, restarts = new, 0.0, restarts + 1
        else:
            v, total = v - part * (p @ g), total + part
        x, weight = new, weight / 2
    assert restarts > 0
    found = minimize_preconditioned(fun, ZERO, product, degree=1, accelerated=True, max_iter=25, tol=0.0)
    torch.testing.assert_close(found.x, x, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("seed", range(2))
def test_minima_agree_with_scipy(seed):
    optimize = pytest.importorskip("scipy.optimize")
    fun, product = logistic(seed=seed)

    def both(v):
        x = torch.as_tensor(v)[None].requires_grad_(True)
        value = fun(x)[0]
        return float(value.detach()), torch.autograd.grad(value, x)[0][0].numpy()

    want = optimize.minimize(
        both, ZERO.numpy(), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}
    )
    runs = [
        minimize_preconditioned(fun, ZERO, product, degree=degree, accelerated=accelerated, tol=1e-8)
        for degree in (0, 1, 3)
        for accelerated in (False, True)
    ]
    runs.append(minimize_krylov(fun, ZERO, product, degree=2, tol=1e-8))
    for found in runs:
        assert found.converged
        assert found.gradient_norm <= 1e-8
        torch.testing.assert_close(found.x, torch.as_tensor(want.x), atol=1e-4, rtol=1e-4)
        assert float(found.fun) == pytest.approx(want.fun, abs=1e-10)
    assert len(runs[4].history) < len(runs[0].history) / 3  # degree 3 against 0


def test_traces_are_exact_or_right_in_the_mean():
    b = definite(d=7, seed=5)
    want = torch.stack([torch.trace(torch.linalg.matrix_power(b, k)) for k in range(1, 6)])
    torch.testing.assert_close(power_traces(b, 5), want)
    like = torch.zeros(7, dtype=torch.float64)
    many = power_traces(lambda v: v @ b, 5, like=like, n_probes=200_000, generator=0)
    torch.testing.assert_close(many, want, rtol=0.01, atol=0)
    diagonal = torch.diag(torch.arange(1.0, 8.0, dtype=torch.float64))
    exact = power_traces(lambda v: v @ diagonal, 4, like=like, n_probes=1, generator=3)
    torch.testing.assert_close(exact, power_traces(diagonal, 4))


def test_traces_of_another_matrix_are_noticed():
    b = torch.diag(torch.tensor([100.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    fun, _ = quadratic(b)
    flat = power_traces(torch.eye(4, dtype=torch.float64), 1)
    found = minimize_preconditioned(
        fun, torch.zeros(4, dtype=torch.float64), lambda v: v @ b, degree=1, traces=flat
    )
    assert not found.converged
    assert "not positive" in found.message


def test_one_variable():
    fun, _ = quadratic(torch.eye(1, dtype=torch.float64))
    for method in (minimize_preconditioned, minimize_krylov):
        found = method(fun, torch.zeros(1, dtype=torch.float64), lambda v: v, degree=0)
        assert found.converged
