"""Oracles of the handbook: every theorem against runs, limits of its constants, and problems against scikit-learn."""

import importlib
import math

import numpy as np
import pytest
import torch

from _common import Example
from perturbkit.optim import (
    convergence_handbook,
    convergence_rate,
    expected_smoothness,
    gradient_noise,
    make_abs,
    make_lasso,
    make_least_squares,
    make_logistic,
    theory_step_size,
)

module = importlib.import_module("perturbkit.optim.first_order.convergence_handbook")
PROBLEMS = {
    "least squares": make_least_squares(60, 8, generator=0),
    "logistic": make_logistic(60, 8, generator=1),
    "lasso": make_lasso(60, 8, generator=2),
    "abs": make_abs(60, 8, generator=3),
}
SQUARES = PROBLEMS["least squares"]


def check(method="sgd", assumption="convex", problem=SQUARES, **options):
    return convergence_handbook(
        problem, method, assumption, **({"steps": 60, "runs": 12, "generator": 0} | options)
    )


EXAMPLE = Example(
    call=lambda generator, dtype: check(generator=generator),
    dtypes=(torch.float64,),
    stochastic=True,
    refusals=(
        (lambda: theory_step_size("adam", "convex"), "method and assumption are 'adam' and 'convex'"),
        (lambda: theory_step_size("gd", "convex"), "L is not given"),
        (lambda: convergence_rate("gd", "convex", 0, L=1.0, D=1.0), "t is 0"),
        (lambda: convergence_rate("gd", "convex", 1, L=1.0, D=-1.0), "D is -1"),
        (lambda: convergence_rate("gd", "convex", 1, step=2.0, L=1.0, D=1.0), "step is 2"),
        (lambda: check(problem=3), "problem is a int"),
        (lambda: check(steps=0), "steps is 0"),
        (lambda: check(runs=1), "runs is 1"),
        (lambda: check("minibatch", batch=61), "batch is 61"),
        (lambda: check(x0=torch.ones(3)), "x0"),
        (lambda: check(step=10.0), "step is 10"),
        (lambda: expected_smoothness(1.0, -1.0, 3, 1), "largest is -1"),
        (lambda: gradient_noise(1.0, 3, 4), "batch is 4"),
        (lambda: make_least_squares(0), "n is 0"),
        (lambda: make_lasso(l1=0.0), "l1 is 0"),
        (lambda: make_logistic(ridge=0.0), "ridge is 0"),
        (lambda: make_least_squares(noise=-1.0), "noise is -1"),
    ),
)


def fits(method, assumption, name):
    if "subgradient" in method:
        return name == "abs"
    if name == "abs":
        return False
    return (name == "lasso") == ("proximal" in method)


@pytest.mark.parametrize(("method", "assumption", "name"), [
    (m, a, name) for m, a in module._THEOREMS for name in PROBLEMS if fits(m, a, name)
])  # fmt: skip
def test_runs_keep_every_theorem(method, assumption, name):
    start = torch.randn(8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for x0 in (None, 3 * start):
        found = check(method, assumption, PROBLEMS[name], steps=400, runs=40, x0=x0)
        assert found.holds, found.to_frame()
        assert found.tightness > 1e-4
    assert len(found.to_frame()) == len(found.steps) <= 21


def test_a_bound_that_is_too_small_is_told(monkeypatch):
    theorem = module._THEOREMS["sgd", "convex"]
    false = module._Theorem(theorem.quantity, theorem.step, lambda c, g, t: 1e-3 * theorem.bound(c, g, t))
    monkeypatch.setitem(module._THEOREMS, ("sgd", "convex"), false)
    assert not check(steps=300).holds


def test_interpolation_makes_stochastic_descent_linear():
    problem = make_least_squares(60, 8, noise=0.0, ridge=0.0, generator=4)
    assert problem.constants["sigma_star"] < 1e-20
    found = check("sgd", "strongly_convex", problem, steps=3000, runs=20)
    assert found.holds
    assert float(found.observed[-1]) < 1e-6 * float(found.observed[0])


def test_constants_of_batches_and_limits():
    assert (expected_smoothness(1.0, 7.0, 9, 1), expected_smoothness(1.0, 7.0, 9, 9)) == (7.0, 1.0)
    assert (gradient_noise(3.0, 9, 1), gradient_noise(3.0, 9, 9), gradient_noise(3.0, 1, 1)) == (
        3.0,
        0.0,
        0.0,
    )
    assert expected_smoothness(2.0, 5.0, 1, 1) == 2.0
    # A single function without noise: the order of gradient descent.
    ratios = [
        convergence_rate("sgd", "convex", t, L_max=2.0, D=1.5, sigma_star=0.0)
        / convergence_rate("gd", "convex", t, L=2.0, D=1.5)
        for t in (1, 10, 1000)
    ]
    assert ratios == pytest.approx([8.0] * 3)
    own = {"L": 4.0, "mu": 0.5, "D": 2.0, "F": 3.0}
    assert convergence_rate("gd", "strongly_convex", 3, **own) == pytest.approx(4 * (1 - 1 / 8) ** 3)
    assert convergence_rate("gd", "pl", 3, **own) == pytest.approx(3 * (1 - 1 / 8) ** 3)
    assert convergence_rate("gd", "nonconvex", 6, **own) == pytest.approx(4.0)
    assert convergence_rate("subgradient", "convex", 25, D=2.0, G=3.0, T=25) == pytest.approx(2 * 3 / 5)
    assert convergence_rate("sgd_momentum", "convex", 9, L_max=1.0, D=2.0, sigma_star=0.6) == pytest.approx(
        1.6 + 0.3
    )


def test_noise_of_batches_is_that_of_the_formula():
    g = torch.Generator().manual_seed(0)
    x = SQUARES.x_star.expand(40_000, -1)
    index = torch.rand(40_000, 60, generator=g).argsort(1)[:, :5]
    seen = SQUARES.gradient(x, index).square().sum(1).mean().item()
    assert seen == pytest.approx(gradient_noise(SQUARES.constants["sigma_star"], 60, 5), rel=0.03)


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_problems_are_solved_and_their_gradients_right(name):
    problem = PROBLEMS[name]
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf = x.clone().requires_grad_(True)
    smooth = problem.value(leaf) - problem.l1 * leaf.abs().sum(1)
    torch.testing.assert_close(problem.gradient(x), torch.autograd.grad(smooth.sum(), leaf)[0])
    every = torch.arange(60).expand(3, -1)
    torch.testing.assert_close(problem.gradient(x, every), problem.gradient(x))
    star = problem.x_star[None]
    assert (problem.gap(star + 0.01 * x) >= -1e-12).all()
    if name != "abs":
        step = 1 / problem.constants["L"]
        assert (problem.prox(star - step * problem.gradient(star), step) - star).norm() < 1e-10
        curvature = torch.autograd.functional.hessian(
            lambda w: problem.value(w[None])[0] - problem.l1 * w.abs().sum(), x[0]
        )
        values = torch.linalg.eigvalsh(curvature)
        assert problem.constants["mu"] <= values[0] + 1e-9
        assert values[-1] <= problem.constants["L"] * (1 + 1e-9) <= problem.constants["L_max"] * (1 + 1e-9)


def test_the_lasso_is_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    problem = make_lasso(60, 8, l1=0.3, ridge=0.2, generator=2)
    z = (torch.zeros(1, 8, dtype=torch.float64) @ problem.rows.T)[0]
    target = -problem.link(z, torch.arange(60))[1]
    net = linear_model.ElasticNet(alpha=0.5, l1_ratio=0.6, fit_intercept=False, tol=1e-12, max_iter=100_000)
    net.fit(problem.rows.numpy(), target.numpy())
    np.testing.assert_allclose(problem.x_star, net.coef_, atol=1e-7)
    assert math.isinf(PROBLEMS["abs"].constants["L"])
