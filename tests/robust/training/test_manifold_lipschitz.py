"""Oracles of manifold smoothness: linear functions, the Laplacian's form, equal weights, complementarity, a convex program."""

import numpy as np
import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.robust import (
    ManifoldLipschitzLearner,
    heat_graph,
    point_cloud_gradient_norm,
    weighted_laplacian_penalty,
)


def _points(n=40, d=2, seed=0, dtype=torch.float64):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _squared(out, y):
    return (out[:, 0] - y).square().mean()


def _line(d=2, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(d, 1).to(dtype)


def _fit(dtype=torch.float64, **options):
    x = _points(dtype=dtype)
    learner = ManifoldLipschitzLearner(_line(dtype=dtype), _squared, 0.01, **{"n_epochs": 3, **options})
    return learner.fit(x[:5], x[:5, 0], x[5:])


X = _points()
EXAMPLE = Example(
    call=lambda generator, dtype: [_fit(dtype).weights_, heat_graph(_points(dtype=dtype))],
    read=lambda result: result,
    refusals=(
        (lambda: heat_graph(X[:1]), "x has one row"),
        (lambda: heat_graph(X, bandwidth=0.0), "bandwidth"),
        (lambda: heat_graph(torch.ones(9, 2)), "five copies"),
        (lambda: heat_graph(X, n_neighbors=40), "n_neighbors is 40"),
        (lambda: point_cloud_gradient_norm(torch.ones(3), X, heat_graph(X)), "values has shape"),
        (lambda: point_cloud_gradient_norm(torch.ones(40), X, torch.ones(3, 3).double()), "weights has shape"),
        (lambda: point_cloud_gradient_norm(torch.ones(40), X, -heat_graph(X)), "weights is not symmetric"),
        (lambda: weighted_laplacian_penalty(torch.ones(40), X, heat_graph(X), -torch.ones(40)), "mu goes down to -1"),
        (lambda: ManifoldLipschitzLearner(torch.relu, _squared, 0.1), "model is a"),
        (lambda: ManifoldLipschitzLearner(_line(), _squared, -0.1), "epsilon"),
        (lambda: ManifoldLipschitzLearner(_line(), _squared, 0.1, graph="full"), "graph is 'full'"),
        (lambda: ManifoldLipschitzLearner(_line(), _squared, 0.1).fit(X, X[:3, 0]), "y has 3 rows"),
    ),
)  # fmt: skip


def test_graph_by_hand():
    w = heat_graph(X, bandwidth=0.3)
    expected = np.exp(-((X.numpy()[:, None] - X.numpy()[None]) ** 2).sum(2) / 0.3)
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(w.numpy(), expected, atol=1e-12)
    near = heat_graph(X, bandwidth=0.3, n_neighbors=4)
    assert torch.equal(near, near.T)
    assert bool(((near > 0).sum(1) >= 4).all())
    kept = near > 0
    torch.testing.assert_close(near[kept], w[kept])


def test_gradient_of_linear_functions():
    line = torch.linspace(0, 2, 50, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        point_cloud_gradient_norm(3 * line[:, 0], line, heat_graph(line)),
        torch.full((50,), 9.0, dtype=torch.float64),
    )
    side = torch.linspace(0, 1, 15, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    w = torch.tensor([1.0, -2.0], dtype=torch.float64)
    found = point_cloud_gradient_norm(grid @ w, grid, heat_graph(grid), intrinsic_dim=2)
    inner = ((grid > 0.25) & (grid < 0.75)).all(1)
    torch.testing.assert_close(found[inner], torch.full_like(found[inner], 5.0), rtol=0.05, atol=0)
    both = point_cloud_gradient_norm(
        torch.stack([grid @ w, 2 * grid @ w], 1), grid, heat_graph(grid), intrinsic_dim=2
    )
    torch.testing.assert_close(both, 5 * found)


def test_penalty_is_the_form_of_the_laplacian():
    w, f = heat_graph(X), X[:, 0].sin() - X[:, 1]
    mu = torch.softmax(3 * _points(40, 1, seed=4)[:, 0], 0)
    c = (w * torch.cdist(X, X).square()).sum(1)
    joined = 2 * w * (mu / c)[:, None]
    joined = 0.5 * (joined + joined.T) * 2 / 2
    laplacian = torch.diag(joined.sum(1)) - joined
    found = weighted_laplacian_penalty(f, X, w, mu)
    torch.testing.assert_close(found, f @ laplacian @ f)
    by_points = (mu * point_cloud_gradient_norm(f, X, w)).sum()
    torch.testing.assert_close(found, by_points)


def test_without_a_dual_rate_it_is_manifold_regularisation():
    x, model = _points(), _line()
    learner = ManifoldLipschitzLearner(_line(), _squared, 0.01, dual_lr=0.0, n_epochs=4, steps_per_epoch=3)
    learner.fit(x[:5], x[:5, 0], x[5:])
    optimizer, w = torch.optim.Adam(model.parameters(), lr=1e-3), heat_graph(x)
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 1e-3 * (0.1 + 0.45 * (1 + np.cos(np.pi * (step // 3) / 4)))
        optimizer.zero_grad()
        uniform = torch.full((40,), 1 / 40, dtype=torch.float64)
        total = _squared(model(x[:5]), x[:5, 0]) + weighted_laplacian_penalty(model(x), x, w, uniform)
        total.backward()
        optimizer.step()
    torch.testing.assert_close(learner.model.weight, model.weight)
    torch.testing.assert_close(learner.weights_, torch.full((40,), 1 / 40, dtype=torch.float64))


class Features(nn.Module):
    def __init__(self, centres):
        super().__init__()
        self.centres = centres
        self.weight = nn.Parameter(torch.zeros(len(centres), 1, dtype=torch.float64))

    def forward(self, x):
        return torch.exp(-4 * torch.cdist(x, self.centres).square()) @ self.weight


def test_the_optimum_of_a_convex_problem_and_its_conditions():
    cp = pytest.importorskip("cvxpy", reason="cvxpy is an extra")
    x = torch.linspace(0, 3, 60, dtype=torch.float64)[:, None]
    labelled = [0, 20, 40, 59]
    y = torch.tensor([0.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    centres = torch.linspace(0, 3, 12, dtype=torch.float64)[:, None]
    rest = [i for i in range(60) if i not in labelled]
    order = torch.cat([x[labelled], x[rest]])
    w = heat_graph(order)
    model = Features(centres)
    epsilon = 0.02
    learner = ManifoldLipschitzLearner(
        model, _squared, epsilon, primal_lr=0.03, dual_lr=0.1, n_epochs=2500, steps_per_epoch=3
    ).fit(x[labelled], y, x[rest])
    phi = Features(centres)
    with torch.no_grad():
        design = torch.exp(-4 * torch.cdist(order, centres).square()).numpy()
    assert isinstance(phi, nn.Module)
    theta, rho = cp.Variable(12), cp.Variable()
    f = design @ theta
    c = (w * torch.cdist(order, order).square()).sum(1).numpy()
    steep = []
    for n in range(60):
        half = np.sqrt(w[n].numpy() / c[n])
        steep.append(cp.sum_squares(cp.multiply(half, f[n] - f)) <= rho)
    problem = cp.Problem(cp.Minimize(rho), [*steep, cp.sum_squares(f[:4] - y.numpy()) / 4 <= epsilon])
    problem.solve(solver="CLARABEL")
    assert learner.lipschitz_**2 == pytest.approx(float(rho.value), rel=0.02)
    assert float(learner.history_.loss[-200:].mean()) == pytest.approx(epsilon, rel=0.1)
    with torch.no_grad():
        found = point_cloud_gradient_norm(model(order), order, w)
    heavy = learner.weights_ > 1e-2
    assert float(learner.weights_.sum()) == pytest.approx(1)
    assert bool((found[heavy] > 0.85 * found.max()).all())


def test_uniform_weights_stay_equal_while_the_tolerance_is_kept():
    learner = _fit(uniform=True, n_epochs=5)
    torch.testing.assert_close(learner.weights_, torch.full((40,), 1 / 40, dtype=torch.float64))
    assert learner.lambda_ != 1


def test_history_has_one_entry_an_epoch():
    learner = _fit(n_epochs=7)
    assert learner.history_.loss.shape == learner.history_.steepest.shape == (7,)
    assert learner.history_.multiplier[0] == 1
