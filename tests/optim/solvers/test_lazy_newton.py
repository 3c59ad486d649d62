"""Oracles of lazy Newton: the cubic model against SciPy and its optimality conditions, steps written out, saddles."""

import math

import pytest
import torch

from _common import Example
from perturbkit.optim import cubic_step, minimize_lazy_newton


def logistic(dtype=torch.float64, n=60, d=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(n, d, generator=g, dtype=dtype)
    y = torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0).to(dtype)
    return lambda x: torch.nn.functional.softplus(-y * (x @ a.T)).mean(1) + 0.005 * x.square().sum(1)


def rosenbrock(x):
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)


def saddle(x):
    return x[:, 0] ** 2 - x[:, 1] ** 2 + x[:, 1] ** 4


ZERO = torch.zeros(5, dtype=torch.float64)


def solve(fun=None, x0=ZERO, **options):
    return minimize_lazy_newton(logistic() if fun is None else fun, x0, **options)


EXAMPLE = Example(
    call=lambda generator, dtype: solve(logistic(dtype), torch.zeros(5, dtype=dtype), tol=1e-4),
    refusals=(
        (lambda: solve(x0=torch.zeros(1, 5)), "x0"),
        (lambda: solve(period=0), "period is 0"),
        (lambda: solve(period="all"), "period is 'all'"),
        (lambda: solve(regularization="none"), "regularization is 'none'"),
        (lambda: solve(lipschitz_hessian=0.0), "lipschitz_hessian is 0"),
        (lambda: solve(tol=-1.0), "tol is -1"),
        (lambda: solve(curvature_tol=-1.0), "curvature_tol is -1"),
        (lambda: solve(max_iter=0), "max_iter is 0"),
        (lambda: solve(hess=lambda x: x), r"hess answered shape \(5,\)"),
        (lambda: solve(hess=lambda x: 1.0), "hess answered a float"),
        (lambda: cubic_step(torch.eye(2), torch.eye(2), torch.ones(2), 1.0), "values"),
        (lambda: cubic_step(torch.ones(2), torch.eye(3), torch.ones(2), 1.0), "vectors"),
        (lambda: cubic_step(torch.ones(2), torch.eye(2), torch.ones(3), 1.0), "g has shape"),
        (lambda: cubic_step(torch.ones(2), torch.eye(2), torch.ones(2), 0.0), "weight is 0"),
    ),
)


def symmetric(seed, d=6, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(d, d, generator=g, dtype=torch.float64)
    return (h + h.T) / 2 + shift * torch.eye(d, dtype=torch.float64), torch.randn(d, generator=g).double(), g


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_cubic_steps_meet_the_optimality_conditions(seed, scale):
    h, g, _ = symmetric(seed, shift=[-3.0, 0.0, 5.0][seed % 3])
    g, weight = g * scale, [0.01, 1.0, 100.0][seed % 4 % 3]
    values, vectors = torch.linalg.eigh(h)
    step = cubic_step(values, vectors, g, weight)
    r = step.norm()
    torch.testing.assert_close(
        h @ step + weight * r / 2 * step, -g, rtol=1e-9, atol=1e-10 * max(scale, float(r))
    )
    assert values[0] + weight * r / 2 >= -1e-12


@pytest.mark.parametrize("seed", range(6))
def test_cubic_steps_are_those_of_a_general_minimiser(seed):
    optimize = pytest.importorskip("scipy.optimize")
    h, g, _ = symmetric(seed, d=4)
    weight = 1.5
    step = cubic_step(*torch.linalg.eigh(h), g, weight)

    def model(s):
        return float(g.numpy() @ s + s @ h.numpy() @ s / 2 + weight / 6 * (s @ s) ** 1.5)

    starts = (
        torch.randn(12, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy() * 3
    )
    best = min((optimize.minimize(model, s, tol=1e-14) for s in starts), key=lambda found: found.fun)
    assert model(step.numpy()) == pytest.approx(best.fun, abs=1e-8)
    torch.testing.assert_close(step, torch.as_tensor(best.x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("tilt", [0.0, 1e-30, 1e-17, 1e-12, 1e-6])
def test_the_hard_case_and_what_is_next_to_it(tilt):
    h = torch.diag(torch.tensor([-1.0, 2.0, 3.0], dtype=torch.float64))
    g = torch.tensor([tilt, 0.3, -0.2], dtype=torch.float64)
    step = cubic_step(*torch.linalg.eigh(h), g, 2.0)
    torch.testing.assert_close(
        step[1:], torch.tensor([-0.1, 0.05], dtype=torch.float64), atol=2 * tilt, rtol=1e-6
    )
    assert abs(float(step[0])) == pytest.approx(math.sqrt(1 - 0.01 - 0.0025), rel=1e-5)
    assert tilt == 0.0 or tilt < 1e-15 or float(step[0]) < 0
    at_rest = cubic_step(*torch.linalg.eigh(h.abs()), torch.zeros(3, dtype=torch.float64), 1.0)
    assert torch.equal(at_rest, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("regularization", ["cubic", "gradient"])
@pytest.mark.parametrize("period", [1, 3])
def test_a_quadratic_takes_one_step(regularization, period):
    h, b, _ = symmetric(4, shift=6.0)
    found = solve(lambda x: ((x @ h) * x).sum(1) / 2 - x @ b, torch.ones(6, dtype=torch.float64), period=period,
                  regularization=regularization, lipschitz_hessian=1e-22, tol=1e-8)  # fmt: skip
    torch.testing.assert_close(found.x, torch.linalg.solve(h, b))
    assert len(found.history) == 2
    if regularization == "cubic":
        torch.testing.assert_close(found.lowest_curvature, torch.linalg.eigvalsh(h)[0])


@pytest.mark.parametrize("regularization", ["cubic", "gradient"])
def test_steps_written_out_share_a_hessian(regularization):
    fun, x, lipschitz = logistic(seed=2), torch.ones(5, dtype=torch.float64), 0.02
    found = solve(
        fun, x, period=3, regularization=regularization, lipschitz_hessian=lipschitz, max_iter=5, tol=0.0
    )
    one = torch.func.grad(lambda v: fun(v[None])[0])
    for k in range(5):
        if k % 3 == 0:
            h = torch.func.hessian(lambda v: fun(v[None])[0])(x)
        g = one(x)
        if regularization == "cubic":
            x = x + cubic_step(*torch.linalg.eigh(h), g, 6 * 3 * lipschitz)
        else:
            x = x - torch.linalg.solve(h + (9 * lipschitz * g.norm()).sqrt() * torch.eye(5, dtype=x.dtype), g)
    torch.testing.assert_close(found.x, x)
    assert (found.nhess, found.cost.ngrad, len(found.history)) == (2, 6, 6)
    assert not found.converged
    assert "5 steps" in found.message


@pytest.mark.parametrize("period", [1, 2, "dim"])
def test_minima_agree_with_scipy(period):
    optimize = pytest.importorskip("scipy.optimize")
    fun = logistic(seed=7)
    for regularization in ("cubic", "gradient"):
        found = solve(fun, 3 + ZERO, period=period, regularization=regularization, tol=1e-10)
        assert found.converged
        assert found.gradient_norm <= 1e-10
        want = optimize.minimize(lambda v: float(fun(torch.as_tensor(v)[None])), 3 + ZERO.numpy(), tol=1e-12)
        assert float(found.fun) <= want.fun + 1e-12
        torch.testing.assert_close(found.x, torch.as_tensor(want.x), atol=1e-4, rtol=0)
    start = torch.tensor([-1.2, 1.0, -0.5], dtype=torch.float64)
    found = solve(rosenbrock, start, period=period)
    torch.testing.assert_close(found.x, torch.ones(3, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (found.history.diff() < 1e-14).all()


def test_saddles_are_left_and_the_curvature_is_that_at_the_minimum():
    for start in ([0.0, 0.0], [1.0, 0.0]):
        found = solve(saddle, torch.tensor(start, dtype=torch.float64))
        assert found.converged
        want = torch.tensor([0.0, 0.5**0.5], dtype=torch.float64)
        torch.testing.assert_close(found.x.abs(), want, atol=1e-7, rtol=0)
        torch.testing.assert_close(found.lowest_curvature.item(), 2.0)
    at_rest = solve(saddle, torch.zeros(2, dtype=torch.float64), regularization="gradient")
    assert at_rest.converged
    assert at_rest.lowest_curvature is None
    assert at_rest.nhess == 0


def test_the_certified_curvature_is_that_at_the_minimum_however_old_the_hessian():
    fun = logistic(seed=5)
    found = solve(fun, 0.5 + ZERO, period=1000, tol=1e-6)
    hessian = torch.func.hessian(lambda v: fun(v[None])[0])(found.x)
    torch.testing.assert_close(found.lowest_curvature, torch.linalg.eigvalsh(hessian)[0], rtol=1e-10, atol=0)
    assert found.nhess == 2


def test_a_given_hessian_is_used():
    asked = []
    fun = logistic()

    def hess(x):
        asked.append(x.clone())
        return torch.func.hessian(lambda v: fun(v[None])[0])(x)

    found = solve(fun, hess=hess, period=2)
    same = solve(fun, period=2)
    torch.testing.assert_close(found.x, same.x)
    assert found.nhess == len(asked) == same.nhess


def test_laziness_needs_the_regularisation_that_grows_with_the_period():
    fun = logistic(n=200, seed=3)
    start = 6 * torch.randn(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    options = {"regularization": "gradient", "tol": 1e-9, "max_iter": 300}
    assert solve(fun, start, **options).converged
    assert not solve(fun, start, lipschitz_hessian=1e-14, **options).converged


def test_what_rounding_forbids_is_said():
    # The slope is wrong by a constant, as rounding makes it: no step can make the progress that it promises.
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.square().sum(1)

        @staticmethod
        def backward(ctx, out):
            return out[:, None].expand(-1, 2)

    found = solve(Wrong.apply, torch.zeros(2), hess=lambda x: torch.eye(2))
    assert not found.converged
    assert "no step decreases" in found.message
    assert (found.cost.ngrad, len(found.history)) == (61, 1)
