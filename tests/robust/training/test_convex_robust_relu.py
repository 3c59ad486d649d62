"""Oracles of the convex training: the network's own loss, all patterns against many starts, worst cases, limits."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.base import clone

from _common import Example
from perturbkit.robust import ConvexReLUClassifier, ConvexReLURegressor, sample_patterns

pytest.importorskip("cvxpy", reason="cvxpy is an extra")


def _rings(n=40, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (n, 2))
    return x, np.where(np.abs(x).max(1) > 0.6, 1, 0)


def _fit(**options):
    return ConvexReLUClassifier(**{"n_patterns": 15, "generator": 0, **options}).fit(*_rings())


EXAMPLE = Example(
    call=lambda generator, dtype: [_fit().decision_function(_rings(9, 1)[0])],
    read=lambda result: result,
    dtypes=(torch.float64,),
    refusals=(
        (lambda: ConvexReLUClassifier().fit(np.ones((3, 2)), [0, 1, 2]), "y has 3 classes"),
        (lambda: ConvexReLUClassifier().fit(np.ones((3, 2)), [0, 1]), "y has shape"),
        (lambda: _fit(beta=0.0), "beta"),
        (lambda: _fit(epsilon=-1.0), "epsilon"),
        (lambda: _fit(norm="l3"), "norm is 'l3'"),
        (lambda: _fit(loss="squared"), "loss is 'squared'"),
        (lambda: _fit(solver="NONE"), "solver is 'NONE'"),
        (lambda: ConvexReLUClassifier().predict(np.ones((1, 2))), "not fitted"),
        (lambda: ConvexReLURegressor().fit(np.ones((3, 2)), [1.0, 2.0]), "y has shape"),
        (lambda: _fit().predict(np.ones((1, 3))), "X has shape"),
        (lambda: sample_patterns(np.ones((3, 2)), 0), "n_patterns is 0"),
    ),
)


def _penalised(model, x, target, loss):
    network = model.to_network()
    with torch.no_grad():
        answers = network(torch.from_numpy(x))[:, 0].numpy()
    first, last = network[0], network[2]
    size = sum(float(p.detach().square().sum()) for p in (first.weight, first.bias, last.weight))
    return loss(answers, target).mean() + 0.5 * model.beta * size


def _hinge(f, y):
    return np.maximum(0, 1 - y * f)


@pytest.mark.parametrize("beta", [1e-3, 1e-2])
def test_optimum_is_the_loss_of_the_network(beta):
    x, y = _rings()
    model = _fit(beta=beta)
    assert model.objective_ == pytest.approx(_penalised(model, x, 2 * y - 1, _hinge), abs=1e-5)
    np.testing.assert_allclose(model.answers_, model.decision_function(x), atol=1e-5)
    values = x[:, 0] ** 2 - x[:, 1]
    for loss, fun in (("squared", lambda f, t: (f - t) ** 2), ("absolute", lambda f, t: np.abs(f - t))):
        fitted = ConvexReLURegressor(15, beta, loss=loss, generator=0).fit(x, values)
        assert fitted.objective_ == pytest.approx(_penalised(fitted, x, values, fun), abs=1e-5)


def test_all_patterns_of_four_points_are_no_worse_than_many_starts():
    x = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    y, target = np.array([0, 1, 1, 0]), torch.tensor([-1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    model = ConvexReLUClassifier(n_patterns=40, beta=0.02, generator=0).fit(x, y)
    assert model.patterns_.shape[1] == 14  # of 16, the two diagonals cannot be cut off by a line
    g = torch.Generator().manual_seed(0)
    best = np.inf
    rows = torch.from_numpy(np.hstack([x, np.ones((4, 1))]))
    for _ in range(12):
        u = torch.randn(10, 3, generator=g, dtype=torch.float64).requires_grad_()
        a = torch.randn(10, generator=g, dtype=torch.float64).requires_grad_()
        optimizer = torch.optim.Adam([u, a], lr=0.02)
        for step in range(1500):
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 1500)
            loss = torch.relu(1 - target * (torch.relu(rows @ u.T) @ a)).mean()
            total = loss + 0.01 * (u.square().sum() + a.square().sum())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        best = min(best, float(total.detach()))
    assert model.objective_ <= best + 1e-6
    assert model.objective_ == pytest.approx(best, rel=0.02)


def test_patterns_are_different_and_attained():
    x = np.hstack([_rings(12)[0], np.ones((12, 1))])
    masks = sample_patterns(x, 30, generator=1)
    assert masks.shape == (12, 30)
    assert len({m.tobytes() for m in masks.T}) == 30
    again = sample_patterns(x, 30, generator=1)
    assert np.array_equal(masks, again)
    # A line through the plane: changing one point's side at a time leads from any pattern to its complement.
    assert all(np.linalg.lstsq(x, 2.0 * m - 1, rcond=None)[0].shape == (3,) for m in masks.T)


def test_without_perturbations_robust_training_is_plain():
    plain, robust = _fit(), _fit(epsilon=1e-9)
    assert robust.objective_ == pytest.approx(plain.objective_, abs=1e-5)
    assert bool((plain.reach_ == 0).all())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_worst_case_of_training_rows_is_not_crossed(norm):
    x, y = _rings()
    eps = 0.05
    model = _fit(epsilon=eps, norm=norm)
    sign = 2 * y - 1
    proved = _hinge(model.answers_ * sign - model.reach_, 1.0)
    rng = np.random.default_rng(3)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    worst = np.zeros(len(x))
    for step in itertools.chain(
        rng.normal(size=(400, 2)), [(1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)]
    ):
        d = eps * np.asarray(step) / np.linalg.norm(step, ord=order)
        worst = np.maximum(worst, _hinge(model.decision_function(x + d), sign))
    assert bool((worst <= proved + 1e-6).all())
    assert float(np.median(proved - worst)) < 0.1  # and close to it
    assert model.objective_ > _fit().objective_


def test_more_patterns_are_no_worse():
    values = [_fit(n_patterns=n).objective_ for n in (3, 10, 30)]
    assert values[0] > values[2]


def test_regression_in_the_worst_case():
    x = np.linspace(-1, 1, 15)[:, None]
    y = np.abs(x[:, 0])
    model = ConvexReLURegressor(20, 1e-4, epsilon=0.05, generator=0).fit(x, y)
    errors = [np.abs(model.predict(x + d) - y) for d in (-0.05, 0.0, 0.05)]
    assert bool((np.max(errors, 0) <= np.abs(model.answers_ - y) + model.reach_ + 1e-6).all())
    assert model.score(x, y) > 0.9


def test_it_is_an_estimator():
    model = clone(ConvexReLUClassifier(n_patterns=7, beta=0.01))
    assert model.get_params()["n_patterns"] == 7
    x, y = _rings()
    fitted = ConvexReLUClassifier(20, generator=0).fit(x, np.where(y == 1, "out", "in"))
    assert fitted.score(x, np.where(y == 1, "out", "in")) > 0.9
