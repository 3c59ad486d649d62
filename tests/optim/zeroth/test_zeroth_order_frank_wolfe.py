"""Oracles of zeroth-order Frank-Wolfe: the ordinary method's bound, estimators of linear functions, convex programs."""

import pytest
import torch

from _common import Example
from perturbkit.core import Ball, Box
from perturbkit.optim import NuclearBall, Simplex, Spectrahedron, minimize_zo_frank_wolfe


def problem(dtype=torch.float64, d=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(9, d, generator=g, dtype=dtype)
    b = torch.randn(9, generator=g, dtype=dtype)
    return lambda x: (x @ a.T - b).square().sum(1) / 18, a, b


def solve(fun, x0, constraint=Ball("l1", 1.0), **options):  # noqa: B008
    return minimize_zo_frank_wolfe(fun, x0, constraint, **({"max_iter": 5, "generator": 0} | options))


def small(generator, dtype):
    return solve(problem(dtype)[0], torch.zeros(2, 6, dtype=dtype), generator=generator)


EXAMPLE = Example(
    call=small,
    stochastic=True,
    refusals=(
        (lambda: solve(torch.sum, torch.ones(2), "l1"), "constraint is a str"),
        (lambda: solve(torch.sum, torch.ones(2), estimator="both"), "estimator is 'both'"),
        (lambda: solve(torch.sum, torch.ones(2), directions=0), "directions is 0"),
        (lambda: solve(torch.sum, torch.ones(2), max_iter=0), "max_iter is 0"),
        (lambda: solve(torch.sum, torch.ones(2), exponent=0.0), "exponent is 0"),
        (lambda: solve(torch.sum, torch.ones(2), offset=0), "offset is 0"),
        (lambda: solve(torch.sum, torch.ones(2, 2, 2)), "x0"),
        (lambda: solve(lambda x: x.sum(1), torch.ones(5), NuclearBall(1.0, (2, 3))), r"allowed: \(n, 6\)"),
        (lambda: Simplex(0.0), "total is 0"),
        (lambda: NuclearBall(-1.0, (2, 2)), "radius is -1"),
        (lambda: NuclearBall(1.0, (2, 0)), "shape is 0"),
        (lambda: Spectrahedron(1.0, 0), "side is 0"),
        (lambda: Spectrahedron(0.0, 1), "total is 0"),
    ),
)


def test_with_gradients_it_is_the_ordinary_method_within_its_bound_at_every_step():
    fun, a, _ = problem(seed=1)
    curvature = float(torch.linalg.eigvalsh(a.T @ a)[-1]) / 9
    found = solve(
        fun,
        torch.zeros(6, dtype=torch.float64),
        estimator="gradient",
        averaging=False,
        offset=2,
        max_iter=300,
    )
    best = float(found.fun) - float(found.gap)  # a lower bound of the minimum, by convexity
    t = torch.arange(1, 300, dtype=torch.float64)
    assert (found.history[1:] - best <= 2 * curvature * 2**2 / (t + 2) + float(found.gap)).all()
    assert found.cost.ngrad == 300
    # Two steps written out.
    x = torch.zeros(6, dtype=torch.float64)
    for k in range(2):
        leaf = x.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(fun(leaf[None])[0], leaf)
        v = torch.zeros_like(x)
        v[g.abs().argmax()] = -g[g.abs().argmax()].sign()
        x = x + 2 / (k + 2) * (v - x)
    two = solve(
        fun, torch.zeros(6, dtype=torch.float64), estimator="gradient", offset=2, max_iter=2, averaging=False
    )
    torch.testing.assert_close(two.x, x)


@pytest.mark.parametrize(("estimator", "directions"), [("random", 1), ("averaged", 4), ("coordinate", 1)])
def test_estimates_of_a_linear_function_are_right_in_the_mean(estimator, directions):
    g = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    runs = 20_000

    class Whole:
        """Records what it is asked: the negative of the averaged slope."""

        def maximiser(self, direction):
            self.direction = direction
            return direction

    seen = Whole()
    solve(lambda x: x @ g, torch.zeros(runs, 3, dtype=torch.float64), seen, estimator=estimator,
          directions=directions, max_iter=1, averaging=False)  # fmt: skip
    estimates = -seen.direction
    if estimator == "coordinate":
        torch.testing.assert_close(estimates, g.expand(runs, 3), rtol=1e-9, atol=1e-12)
    else:
        spread = ((3 + 1) * g.square().sum() / directions / runs).sqrt()
        assert (estimates.mean(0) - g).norm() < 4 * spread
        assert (estimates - g).square().sum(1).mean().item() == pytest.approx(4 * 5.25 / directions, rel=0.1)


def test_the_weights_and_lengths_are_those_of_the_paper():
    asked = []

    def fun(x):
        if len(x) > 1:  # a single row is the oracle's own question
            asked.append(x.clone())
        return x.sum(1)

    d, m = 5, 3
    solve(
        fun, torch.zeros(d, dtype=torch.float64), estimator="averaged", directions=m, max_iter=2, generator=4
    )
    g = torch.Generator().manual_seed(4)
    for t, points in zip(range(2), asked[:2], strict=True):
        z = torch.randn(1, m, d, generator=g, dtype=torch.float64)[0]
        length = 2 * m**0.5 / (d**1.5 * (t + 8) ** (1 / 3))
        torch.testing.assert_close(points[1:] - points[:1], length * z)


@pytest.mark.parametrize("estimator", ["random", "averaged", "coordinate"])
@pytest.mark.parametrize(
    "constraint",
    [Ball("l1", 1.0), Ball("l2", 0.5), Ball("linf", 0.2), Box(-0.1, 0.3)],
    ids=["l1", "l2", "linf", "box"],
)
def test_iterates_stay_in_the_set_and_come_near_the_minimum(constraint, estimator):
    fun, _, _ = problem(seed=2)
    start = torch.zeros(3, 6, dtype=torch.float64)
    found = solve(fun, start, constraint, estimator=estimator, directions=8, max_iter=600)
    exact = solve(fun, start[0], constraint, estimator="gradient", averaging=False, offset=2, max_iter=4000)
    assert constraint.contains(found.x, atol=1e-12).all()
    assert (found.fun - exact.fun > -1e-3).all()
    assert (found.fun - exact.fun < 0.05 * (found.history[0] - exact.fun) + 2e-3).all()


def test_random_functions_see_one_sample_a_step():
    samples = []

    def fun(x, generator):
        noise = torch.randn(1, generator=generator, dtype=x.dtype)
        samples.append(float(noise))
        return x.sum(1) * (1 + noise)

    solve(fun, torch.zeros(4, dtype=torch.float64), sampled=True, max_iter=6)
    assert len(set(samples)) == 7
    first = list(samples)
    samples.clear()
    solve(fun, torch.zeros(4, dtype=torch.float64), sampled=True, max_iter=6)
    assert samples == first


def test_linear_problems_agree_with_convex_programs():
    cp = pytest.importorskip("cvxpy")
    g = torch.randn(4, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    for row in g:
        flat, square = row.numpy(), row[:9].reshape(3, 3)
        matrix = row.reshape(3, 4).numpy()
        x, y, z = cp.Variable(12), cp.Variable((3, 4)), cp.Variable((3, 3), PSD=True)
        for constraint, given, objective, limits in (
            (Simplex(2.0), row, flat @ x, [x >= 0, cp.sum(x) == 2]),
            (NuclearBall(1.5, (3, 4)), row, cp.sum(cp.multiply(matrix, y)), [cp.normNuc(y) <= 1.5]),
            (Spectrahedron(2.0, 3), row[:9], cp.sum(cp.multiply(square.numpy(), z)), [cp.trace(z) == 2]),
        ):
            program = cp.Problem(cp.Maximize(objective), limits)
            program.solve(solver="CLARABEL")
            v = constraint.maximiser(given[None])[0]
            assert float(given @ v) == pytest.approx(program.value, abs=1e-6)
        sv = torch.linalg.svdvals(NuclearBall(1.5, (3, 4)).maximiser(row[None])[0].reshape(3, 4))
        assert sv.sum().item() == pytest.approx(1.5)


def test_the_largest_pair_of_a_large_matrix_is_that_of_the_whole_decomposition():
    g = torch.randn(2, 70 * 80, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    v = NuclearBall(1.0, (70, 80)).maximiser(g)
    best = torch.linalg.svdvals(g.reshape(2, 70, 80))[:, 0]
    torch.testing.assert_close((g * v).sum(1), best, rtol=1e-8, atol=0)
