"""Oracles of block coordinate training: descent at every block, grid search, ridge regression, autograd, the forward pass."""

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import check_estimator

from _common import Example
from perturbkit.core import checks
from perturbkit.optim import BCDClassifier, relu_prox
from perturbkit.optim.forward import _blocks

VARIANTS = pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
LOSSES = pytest.mark.parametrize("loss", ["square", "hinge"])
SPLITTINGS = pytest.mark.parametrize("splitting", ["three", "two"])


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
    kind = _blocks.TwoSplitting if made.splitting == "two" else _blocks.ThreeSplitting
    return kind(made, torch.as_tensor(x), codes, [3, *made.hidden, 3])


X, Y = blobs()
EXAMPLE = Example(
    call=lambda generator, dtype: quick(generator=generator).fit(
        *blobs(dtype=np.float64 if dtype == torch.float64 else np.float32)
    ),
    read=lambda made: [*made.weights_, *made.biases_],
    stochastic=True,
    refusals=(
        (lambda: quick(hidden=3).fit(X, Y), "hidden is 3"),
        (lambda: quick(hidden=None).fit(X, Y), "hidden is None"),
        (lambda: quick(hidden=np.int64(3)).fit(X, Y), "hidden is np.int64"),
        (lambda: quick(hidden=(3, 0)).fit(X, Y), "hidden is 0"),
        (lambda: quick(gamma=0.0).fit(X, Y), "gamma is 0"),
        (lambda: quick(rho=-1.0).fit(X, Y), "rho is -1"),
        (lambda: quick(prox=0.0).fit(X, Y), "prox is 0"),
        (lambda: quick(weight_decay=-1.0).fit(X, Y), "weight_decay is -1"),
        (lambda: quick(init_scale=-1.0).fit(X, Y), "init_scale is -1"),
        (lambda: quick(loss="logistic").fit(X, Y), "loss is 'logistic'"),
        (lambda: quick(splitting="one").fit(X, Y), "splitting is 'one'"),
        (lambda: quick(max_iter=0).fit(X, Y), "max_iter is 0"),
        (lambda: quick().fit(X, np.zeros(len(X))), "y has one class"),
        (lambda: relu_prox(torch.ones(2), torch.ones(3), 1.0), "b has shape"),
        (lambda: relu_prox(torch.ones(2), torch.ones(2), 0.0), "gamma is 0"),
    ),
)


@LOSSES
@VARIANTS
@SPLITTINGS
@pytest.mark.parametrize("prox", [0.01, 5.0])
def test_no_block_raises_the_objective(loss, residual, splitting, prox):
    options = {"loss": loss, "residual": residual, "splitting": splitting, "prox": prox}
    made = blocks(gamma=0.7, rho=1.3, weight_decay=0.2, **options)
    value, seen = made.objective(), []
    for _ in range(6):
        for name in made.sweep():
            new = made.objective()
            assert new <= value * (1 + 1e-9), name
            value = new
            seen.append(name)
    order = ["V3", "U3", "W3", "b3", "V2", "U2", "W2", "b2", "V1", "U1", "W1", "b1"]
    assert seen == 6 * [name for name in order if splitting == "three" or name[0] != "U"]


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


@SPLITTINGS
def test_a_linear_network_is_ridge_regression(splitting):
    """Without hidden layers the splittings can be eliminated: they divide the loss by 1 + 1/gamma + 1/rho, or without the last."""
    options = {"gamma": 2.0, "rho": 4.0, "weight_decay": 3.0, "prox": 0.1, "splitting": splitting}
    made = quick(hidden=(), max_iter=1500, **options).fit(X, Y)
    want = Ridge(alpha=3.0 * (1 + 1 / 2 + (1 / 4 if splitting == "three" else 0))).fit(X, np.eye(3)[Y])
    np.testing.assert_allclose(made.weights_[0].numpy(), want.coef_, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(made.biases_[0].numpy(), want.intercept_, rtol=1e-7, atol=1e-8)
    assert made.kkt_residual_[-1] < 1e-6
    np.testing.assert_allclose(made.decision_function(X), want.predict(X), atol=1e-7)


@LOSSES
@VARIANTS
@SPLITTINGS
def test_the_residual_is_the_gradients_norm_where_there_is_one(loss, residual, splitting):
    made = blocks(loss=loss, residual=residual, splitting=splitting, gamma=0.7, weight_decay=0.3)
    g, three = torch.Generator().manual_seed(2), splitting == "three"
    w, b, u, v = made.w, made.b, made.u, made.v
    unknowns = (w, b, u[1:], v[1:]) if three else (w, b, v[1:])
    for store in unknowns:
        for t in store:
            t += torch.randn(t.shape, generator=g, dtype=torch.float64)
            t.requires_grad_(True)
    total = (1 - made.y * v[3]).relu().sum() if loss == "hinge" else (v[3] - made.y).square().sum() / 2
    for i in range(1, 4):
        skip = v[i - 1] if residual and i == 2 else 0
        affine = v[i - 1] @ w[i - 1].T + b[i - 1]
        inner = u[i] if three else affine
        active = inner if i == 3 else inner.relu()
        total = total + 0.7 / 2 * (v[i] - skip - active).square().sum()
        total = total + (1 / 2 * (u[i] - affine).square().sum() if three else 0)
        total = total + 0.3 / 2 * w[i - 1].square().sum()
    leaves = [t for store in unknowns for t in store]
    norm = sum(t.square().sum() for t in torch.autograd.grad(total, leaves)).sqrt()
    with torch.no_grad():
        assert made.objective() == pytest.approx(float(total))
        assert made.kkt() == pytest.approx(float(norm))


def trained(**options):
    """Return two splittings after some sweeps, with hidden outputs that an activation can have."""
    made = blocks(splitting="two", gamma=0.7, prox=0.4, weight_decay=0.2, **options)
    for _ in range(3):
        for _ in made.sweep():
            pass
    made.v[1:3] = [v.abs() for v in made.v[1:3]]
    return made


def least_squares(rows, goals):
    """Return the least squares solution of stacked systems, shape (unknowns, columns)."""
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(goals)).solution


@LOSSES
def test_two_splittings_minimise_what_bends_in_no_activation(loss):
    made = trained(loss=loss)
    eye, g, a = torch.eye(6, dtype=torch.float64), 0.7**0.5, 0.4**0.5
    w, v = made.w, made.v
    before = v[2]
    made.fit_hidden(2)
    known = (v[1] @ w[1].T + made.b[1]).relu()
    goals = [g * known.T, g * (v[3] - made.b[2]).T, a * before.T]
    torch.testing.assert_close(v[2].T, least_squares([g * eye, g * w[2], a * eye], goals))
    before = w[2]
    made.fit_weights(3)
    decayed = 0.2**0.5 * eye
    goals = [g * (v[3] - made.b[2]), a * before.T, torch.zeros_like(before.T)]
    torch.testing.assert_close(w[2].T, least_squares([g * v[2], a * eye, decayed], goals))


def test_two_splittings_minimise_an_upper_bound_of_what_does():
    """Hidden weights and outputs solve the least squares problems that have the bound's targets."""
    made = trained()
    eye, g, a = torch.eye(6, dtype=torch.float64), 0.7**0.5, 0.4**0.5

    def bound(i):
        u = made.v[i - 1] @ made.w[i - 1].T + made.b[i - 1]
        return torch.where(u > 0, made.v[i], u)

    before, goal = made.w[1], bound(2)
    made.fit_weights(2)
    goals = [g * (goal - made.b[1]), a * before.T, torch.zeros_like(before.T)]
    torch.testing.assert_close(made.w[1].T, least_squares([g * made.v[1], a * eye, 0.2**0.5 * eye], goals))
    before, goal = made.b[1], bound(2)
    made.fit_biases(2)
    rows = [g * torch.ones(90, 1, dtype=torch.float64), a * eye[:1, :1]]
    want = least_squares(rows, [g * (goal - made.v[1] @ made.w[1].T), a * before[None]])
    torch.testing.assert_close(made.b[1], want[0])
    before, goal = made.v[1], bound(2)
    made.fit_hidden(1)
    known = (made.v[0] @ made.w[0].T + made.b[0]).relu()
    goals = [g * known.T, g * (goal - made.b[1]).T, a * before.T]
    torch.testing.assert_close(made.v[1].T, least_squares([g * eye, g * made.w[1], a * eye], goals))


def test_the_upper_bound_is_one_for_targets_that_an_activation_can_have():
    g = torch.Generator().manual_seed(4)
    a, start, u = (3 * torch.randn(20_000, generator=g, dtype=torch.float64) for _ in range(3))
    a = a.abs()
    goal = torch.where(start > 0, a, start)

    def value(u):
        return (a - u.relu()).square()

    bound = (goal - u).square() + value(start) - (goal - start).square()
    assert (value(u) <= bound + 1e-12).all()
    assert (value(u) > bound - 0.01).any()


def test_repeated_updates_of_a_hidden_units_weights_reach_the_least_of_a_grid():
    """The subproblem of two weights, from several starts, against its values on a grid."""
    rng = np.random.default_rng(5)
    x = torch.as_tensor(rng.normal(size=(60, 2)))
    made = _blocks.TwoSplitting(
        quick(hidden=(1,), splitting="two", prox=1e-3, weight_decay=0.1), x, torch.eye(2, dtype=torch.float64)[[0, 1] * 30], [2, 1, 2]
    )  # fmt: skip
    made.v[1] = (x @ torch.tensor([[1.5], [-0.8]], dtype=torch.float64) + 0.2).relu() + 0.3 * x[:, :1].abs()
    axis = torch.linspace(-3, 3, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    values = ((grid @ x.T).relu() - made.v[1].T).square().sum(1) / 2 + 0.1 / 2 * grid.square().sum(1)
    found = []
    for start in ([1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]):
        made.w[0] = torch.tensor([start], dtype=torch.float64)
        for _ in range(100):
            made.fit_weights(1)
        found.append((float(made._by_unit(1)), made.w[0][0]))
    least, weights = min(found, key=lambda pair: pair[0])
    assert least <= float(values.min()) <= least + 1e-2
    torch.testing.assert_close(weights, grid[values.argmin()], rtol=0, atol=0.015)


def test_steps_that_the_bound_does_not_cover_are_halved():
    """The first row's target is below zero and its activation at zero: the whole step would raise it to 3.5."""
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    options = quick(hidden=(1,), splitting="two", prox=1e-6)
    made = _blocks.TwoSplitting(options, x, torch.eye(2, dtype=torch.float64), [1, 1, 2])
    made.w[0], made.b[0], made.v[1] = (
        x.new_tensor([[1.0]]),
        x.new_tensor([-1.1]),
        x.new_tensor([[-20.0], [10.0]]),
    )
    before = float(made._by_unit(1))
    made.fit_weights(1)
    # The least is at the kink, weight 1.1; the second row alone asks for 4.64.
    assert float(made._by_unit(1)) < before - 0.5
    assert float(made.w[0]) == pytest.approx(1 + 3.64 / 8)


def test_what_skips_a_layer_is_in_the_bound():
    """A layer that doubles its input and bends nowhere: the bound is the problem itself, and its whole step is taken."""
    x = torch.rand(8, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    options = quick(hidden=(3, 3), splitting="two", residual=True, prox=0.4, gamma=0.7)
    made = _blocks.TwoSplitting(options, x, torch.eye(2, dtype=torch.float64)[[0, 1] * 4], [3, 3, 3, 2])
    made.w[1], made.b[1], made.v[2] = torch.eye(3, dtype=torch.float64), x.new_ones(3), 4 + x
    known, before = x + (x @ made.w[0].T + made.b[0]).relu(), made.v[1]
    made.fit_hidden(1)
    torch.testing.assert_close(made.v[1], (0.7 * known + 0.7 * 2 * (3 + x) + 0.4 * before) / (0.7 * 5 + 0.4))


def test_at_a_kink_the_least_slope_counts():
    zero = torch.zeros(4)
    left, right = torch.tensor([-1.0, 1.0, 2.0, -3.0]), torch.tensor([2.0, 3.0, -1.0, -1.0])
    # Slopes that rise through zero hold it between them; slopes that fall do not, and only they themselves are limits.
    assert _blocks._kink(zero, left, right).tolist() == [0, 1, 1, 1]
    assert _blocks._kink(zero - 1, left, right).tolist() == left.abs().tolist()
    assert _blocks._kink(zero + 1, left, right).tolist() == right.abs().tolist()


@LOSSES
@VARIANTS
@SPLITTINGS
def test_blobs_are_told_apart_by_the_forward_pass(loss, residual, splitting):
    names = np.array(["one", "two", "three"])[Y]
    options = {"loss": loss, "residual": residual, "splitting": splitting}
    made = quick(hidden=(20, 20), max_iter=60, prox=0.1, **options).fit(X, names)
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


@SPLITTINGS
def test_penalties_too_unequal_for_the_precision_are_refused(splitting):
    x, y = blobs(dtype=np.float32)
    twice = np.concatenate([x, x], 1)
    options = {"hidden": (20, 20), "splitting": splitting, "prox": 1e-10}
    with pytest.raises(checks.ArgumentError, match=r"singular in torch\.float32"):
        quick(**options).fit(twice, y)
    made = quick(**options).fit(twice.astype(np.float64), y)
    assert np.isfinite(made.objective_).all()
    assert (np.diff(made.objective_) <= 0).all()


def test_scikit_learn_accepts_the_estimator():
    found = check_estimator(quick(hidden=(20,), max_iter=30, prox=0.1), on_skip=None, on_fail=None)
    failed = [f"{c['check_name']}: {c['exception']!r}" for c in found if c["status"] == "failed"]
    assert failed == []
    with pytest.raises(NotFittedError):
        quick().predict(X)
    with pytest.raises(checks.ArgumentTypeError):
        quick(hidden="3").fit(X, Y)
