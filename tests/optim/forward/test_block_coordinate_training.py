"""Oracles of block coordinate training: descent at every block, grid search, ridge regression, autograd, the forward pass."""

import importlib

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import check_estimator

from _common import Example
from perturbkit.core import checks
from perturbkit.optim import BCDClassifier, relu_prox

module = importlib.import_module("perturbkit.optim.forward.block_coordinate_training")
VARIANTS = pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
LOSSES = pytest.mark.parametrize("loss", ["square", "hinge"])


def blobs(seed=0, n=90, dtype=np.float64):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    centres = np.array([[-2.0, 0, 1], [2, 1, 0], [0, -2, -1]])
    return (centres[y] + 0.5 * rng.normal(size=(n, 3))).astype(dtype), y


def quick(**options):
    return BCDClassifier(**({"hidden": (6, 6), "max_iter": 5, "generator": 0, "init_scale": 0.5} | options))


def blocks(**options):
    x, y = blobs()
    made = quick(**options)
    codes = torch.nn.functional.one_hot(torch.as_tensor(y), 3).double()
    return module._Blocks(made, torch.as_tensor(x), codes, [3, *made.hidden, 3])


X, Y = blobs()
EXAMPLE = Example(
    call=lambda generator, dtype: quick(generator=generator).fit(
        *blobs(dtype=np.float64 if dtype == torch.float64 else np.float32)
    ),
    read=lambda made: [*made.weights_, *made.biases_],
    stochastic=True,
    refusals=(
        (lambda: quick(hidden=3).fit(X, Y), "hidden is 3"),
        (lambda: quick(hidden=(3, 0)).fit(X, Y), "hidden is 0"),
        (lambda: quick(gamma=0.0).fit(X, Y), "gamma is 0"),
        (lambda: quick(rho=-1.0).fit(X, Y), "rho is -1"),
        (lambda: quick(prox=0.0).fit(X, Y), "prox is 0"),
        (lambda: quick(weight_decay=-1.0).fit(X, Y), "weight_decay is -1"),
        (lambda: quick(init_scale=-1.0).fit(X, Y), "init_scale is -1"),
        (lambda: quick(loss="logistic").fit(X, Y), "loss is 'logistic'"),
        (lambda: quick(max_iter=0).fit(X, Y), "max_iter is 0"),
        (lambda: quick().fit(X, np.zeros(len(X))), "y has one class"),
        (lambda: relu_prox(torch.ones(2), torch.ones(3), 1.0), "b has shape"),
        (lambda: relu_prox(torch.ones(2), torch.ones(2), 0.0), "gamma is 0"),
    ),
)


@LOSSES
@VARIANTS
@pytest.mark.parametrize("prox", [0.01, 5.0])
def test_no_block_raises_the_objective(loss, residual, prox):
    made = blocks(loss=loss, residual=residual, prox=prox, gamma=0.7, rho=1.3, weight_decay=0.2)
    value, seen = made.objective(), []
    for _ in range(6):
        for name in made.sweep():
            new = made.objective()
            assert new <= value * (1 + 1e-9), name
            value = new
            seen.append(name)
    assert seen[:12] == ["V3", "U3", "W3", "b3", "V2", "U2", "W2", "b2", "V1", "U1", "W1", "b1"]


@LOSSES
@VARIANTS
def test_each_block_is_the_minimiser_of_its_proximal_objective(loss, residual):
    """Changes of a block, in any direction, do not lower the objective plus the proximal term it has."""
    options = {"gamma": 0.7, "rho": 1.3, "prox": 0.4, "weight_decay": 0.2}
    made, g = blocks(loss=loss, residual=residual, **options), torch.Generator().manual_seed(1)
    for _ in range(2):
        for _ in made.sweep():
            pass

    def holder(name):
        kind, i = getattr(made, name[0].lower()), int(name[1:])
        return kind, (i if name[0] in "UV" else i - 1)

    def near(name):
        return name[0] in "Wb" or name == "V3" or name in ("U1", "U2")

    before = {name: holder(name)[0][holder(name)[1]].clone() for name in ("V3", "U3", "W3", "b3", "V2", "U2", "W2", "b2", "V1", "U1", "W1", "b1")}  # fmt: skip
    for name in made.sweep():
        store, i = holder(name)
        best = store[i]

        def value(name=name):
            s, k = holder(name)
            distance = (s[k] - before[name]).square().sum() if near(name) else 0.0
            return made.objective() + 0.4 / 2 * float(distance)

        least = value()
        for size in (1e-3, 0.1, 1.0):
            for _ in range(4):
                store[i] = best + size * torch.randn(best.shape, generator=g, dtype=torch.float64)
                assert value() > least - 1e-9, name
        store[i] = best


@pytest.mark.parametrize("gamma", [0.2, 1.0, 7.0])
def test_the_proximal_map_is_that_of_a_grid_search(gamma):
    g = torch.Generator().manual_seed(3)
    a, b = (3 * torch.randn(40, generator=g, dtype=torch.float64) for _ in range(2))
    found = relu_prox(a, b, gamma)

    def value(u):
        return gamma * (a - u.clamp(min=0)).square() + (u - b).square()

    grid = torch.linspace(-15, 15, 300_001, dtype=torch.float64)[:, None]
    best = value(grid).min(0)
    assert (value(found) <= best.values + 1e-12).all()
    torch.testing.assert_close(value(found), best.values, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, grid[best.indices, 0], rtol=0, atol=1.1e-4)


def test_a_linear_network_is_ridge_regression():
    """Without hidden layers the splittings can be eliminated: they divide the loss by 1 + 1/gamma + 1/rho."""
    made = quick(hidden=(), gamma=2.0, rho=4.0, weight_decay=3.0, prox=0.1, max_iter=1500).fit(X, Y)
    want = Ridge(alpha=3.0 * (1 + 1 / 2 + 1 / 4)).fit(X, np.eye(3)[Y])
    np.testing.assert_allclose(made.weights_[0].numpy(), want.coef_, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(made.biases_[0].numpy(), want.intercept_, rtol=1e-7, atol=1e-8)
    assert made.kkt_residual_[-1] < 1e-6
    np.testing.assert_allclose(made.decision_function(X), want.predict(X), atol=1e-7)


@LOSSES
@VARIANTS
def test_the_residual_is_the_gradients_norm_where_there_is_one(loss, residual):
    made, g = (
        blocks(loss=loss, residual=residual, gamma=0.7, weight_decay=0.3),
        torch.Generator().manual_seed(2),
    )
    for store in (made.w, made.b, made.u[1:], made.v[1:]):
        for t in store:
            t += torch.randn(t.shape, generator=g, dtype=torch.float64)
            t.requires_grad_(True)
    w, b, u, v = made.w, made.b, made.u, made.v
    total = (1 - made.y * v[3]).relu().sum() if loss == "hinge" else (v[3] - made.y).square().sum() / 2
    for i in range(1, 4):
        skip = v[i - 1] if residual and i == 2 else 0
        active = u[i] if i == 3 else u[i].relu()
        total = total + 0.7 / 2 * (v[i] - skip - active).square().sum()
        total = total + 1 / 2 * (u[i] - v[i - 1] @ w[i - 1].T - b[i - 1]).square().sum()
        total = total + 0.3 / 2 * w[i - 1].square().sum()
    leaves = [*w, *b, *u[1:], *v[1:]]
    norm = sum(t.square().sum() for t in torch.autograd.grad(total, leaves)).sqrt()
    with torch.no_grad():
        assert made.objective() == pytest.approx(float(total))
        assert made.kkt() == pytest.approx(float(norm))


def test_at_a_kink_the_least_slope_counts():
    zero = torch.zeros(4)
    left, right = torch.tensor([-1.0, 1.0, 2.0, -3.0]), torch.tensor([2.0, 3.0, -1.0, -1.0])
    # Slopes that rise through zero hold it between them; slopes that fall do not, and only they themselves are limits.
    assert module._kink(zero, left, right).tolist() == [0, 1, 1, 1]
    assert module._kink(zero - 1, left, right).tolist() == left.abs().tolist()
    assert module._kink(zero + 1, left, right).tolist() == right.abs().tolist()


@LOSSES
@VARIANTS
def test_blobs_are_told_apart_by_the_forward_pass(loss, residual):
    names = np.array(["one", "two", "three"])[Y]
    made = quick(hidden=(20, 20), max_iter=60, prox=0.1, loss=loss, residual=residual).fit(X, names)
    test, labels = blobs(7)
    assert made.score(test, np.array(["one", "two", "three"])[labels]) > 0.9
    h = torch.as_tensor(test)
    for i, (w, b) in enumerate(zip(made.weights_, made.biases_, strict=True)):
        new = h @ w.T + b
        h = new if i == 2 else new.relu() + (h if residual and i == 1 else 0)
    np.testing.assert_allclose(made.decision_function(test), h.numpy(), atol=1e-12)
    assert made.objective_.shape == (61,)
    assert (np.diff(made.objective_) <= 1e-9 * made.objective_[:-1]).all()
    squares = made.kkt_residual_**2
    assert squares[-1] < squares[0] / 20


def test_scikit_learn_accepts_the_estimator():
    found = check_estimator(quick(hidden=(20,), max_iter=30, prox=0.1), on_skip=None, on_fail=None)
    failed = [f"{c['check_name']}: {c['exception']!r}" for c in found if c["status"] == "failed"]
    assert failed == []
    with pytest.raises(NotFittedError):
        quick().predict(X)
    with pytest.raises(checks.ArgumentTypeError):
        quick(hidden="3").fit(X, Y)
