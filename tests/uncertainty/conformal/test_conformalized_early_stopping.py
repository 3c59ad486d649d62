"""Oracles of conformalized early stopping: brute force over y, one snapshot, exact coverage, naive reuse as control."""

import copy

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.utils import estimator_checks
from torch import nn

from _common import Example
from perturbkit.core import checks, statistics
from perturbkit.uncertainty import (
    ConformalizedEarlyStopping,
    IntervalUnion,
    SplitConformalClassifier,
    SplitConformalRegressor,
    train_with_snapshots,
)

CES = ConformalizedEarlyStopping


def random_snapshots(rng, task, n, m=30, k=3):
    """Predictions that know nothing of the response: the adversary of early stopping."""
    if task == "classification":
        return rng.dirichlet(np.ones(k), (m, n))
    if task == "outlier":
        return rng.exponential(size=(m, n))
    found = rng.normal(size=(m, n, 1 + (task == "quantile")))
    return np.sort(found, 2) if task == "quantile" else found[..., 0]


def responses(rng, task, n, k=3):
    if task == "outlier":
        return None
    return rng.integers(0, k, n) if task == "classification" else rng.normal(size=n)


RNG = np.random.default_rng(0)
P, Y = random_snapshots(RNG, "classification", 40, m=4), RNG.integers(0, 3, 40)
F, R = random_snapshots(RNG, "regression", 40, m=4), RNG.normal(size=40)
LINE = nn.Linear(2, 1)

EXAMPLE = Example(
    call=lambda generator, dtype: CES(generator=generator)
    .fit(torch.as_tensor(P).to(dtype), Y)
    .predict_set(torch.as_tensor(P).to(dtype)),
    stochastic=True,
    refusals=(
        (lambda: CES(task="ranking").fit(P, Y), "task is 'ranking'"),
        (lambda: CES(alpha=1.5).fit(P, Y), "alpha is 1.5"),
        (lambda: CES([]).fit(P, Y), "snapshots is empty"),
        (lambda: CES().fit(P[0], Y), "X has shape"),
        (lambda: CES().fit(P + 1, Y), "row sum off"),
        (lambda: CES().fit(P, Y[:5]), "y has shape"),
        (lambda: CES().fit(P, Y + 1), "y holds labels"),
        (lambda: CES().fit(P[:, :8], Y[:8]), "8 calibration rows given; allowed: at least 9"),
        (lambda: CES(alpha=0.05, label_conditional=True).fit(P, Y), "with label"),
        (lambda: CES(task="quantile").fit(np.ones((2, 40, 2)) * [1, 0], R), "80 predictions have a lower"),
        (lambda: CES(task="quantile").fit(np.ones((2, 40, 3)), R), "X has shape"),
        (lambda: CES(task="regression").fit(F, R).p_values(F), "p_values was called for task 'regression'"),
        (lambda: CES(task="outlier").fit(abs(F)).predict_set(F), "predict_set was called for task 'outlier'"),
        (lambda: CES().fit(P, Y).predict_interval(P), "predict_interval was called"),
        (lambda: CES(task="regression").fit(F, R).predict_set(F[:2]), r"shape \(2, 40\)"),
        (lambda: train_with_snapshots(LINE, torch.ones(4, 2), torch.ones(3), loss=nn.functional.mse_loss), "y does not"),
        (lambda: train_with_snapshots(LINE, torch.ones(4, 2), torch.ones(4), loss=nn.functional.mse_loss, every=99), "every is 99"),
    ),
)  # fmt: skip


def test_one_snapshot_is_split_conformal():
    rng = np.random.default_rng(1)
    p, y = rng.dirichlet(np.ones(3), 60), rng.integers(0, 3, 60)
    for conditional in (False, True):
        ours = CES(label_conditional=conditional, generator=3).fit(p[None, :40], y[:40])
        theirs = SplitConformalClassifier(label_conditional=conditional, generator=3).fit(p[:40], y[:40])
        np.testing.assert_array_equal(ours.predict_set(p[None, 40:]), theirs.predict_set(p[40:]))
        np.testing.assert_array_equal(ours.p_values(p[None]), theirs.p_values(p))
    f, r = rng.normal(size=60), rng.normal(size=60)
    ours = CES(task="regression").fit(f[None, :40], r[:40]).predict_interval(f[None, 40:])
    np.testing.assert_allclose(ours, SplitConformalRegressor().fit(f[:40], r[:40]).predict_interval(f[40:]))
    q = np.sort(rng.normal(size=(60, 2)), 1)
    ours = CES(task="quantile").fit(q[None, :40], r[:40])
    theirs = SplitConformalRegressor(score="quantile").fit(q[:40], r[:40])
    np.testing.assert_allclose(ours.predict_interval(q[None, 40:]), theirs.predict_interval(q[40:]))
    score = rng.exponential(size=60)
    p_values = CES(task="outlier").fit(score[None, :40]).p_values(score[None, 40:])
    expected = [(1 + (score[:40] >= s).sum()) / 41 for s in score[40:]]
    np.testing.assert_allclose(p_values, expected)


@pytest.mark.parametrize("task", ["regression", "quantile"])
@pytest.mark.parametrize("seed", [2, 3])
def test_union_against_brute_force_over_the_response(task, seed, monkeypatch):
    rng = np.random.default_rng(seed)
    cal, r = random_snapshots(rng, task, 25, m=6), rng.normal(size=25)
    # A few calibration rows and wide predictions: many changes of snapshot along y.
    new = 3 * random_snapshots(rng, task, 12, m=6)
    new[3] = new[1]
    made = CES(task=task, alpha=0.2).fit(cal, r)
    union = made.predict_set(new)
    grid, changes = np.linspace(-12, 12, 1501) + 1e-7, 0
    for i in range(12):
        if task == "regression":
            loss = (grid[:, None] - new[:, i]) ** 2
            score = np.sqrt(loss)
            own = np.abs(r - cal)
        else:
            low, high = new[:, i, 0], new[:, i, 1]
            y = grid[:, None]
            loss = np.where(y > low, 0.1 * (y - low), 0.9 * (low - y)) + np.where(
                y > high, 0.9 * (y - high), 0.1 * (high - y)
            )
            score = np.maximum(low - y, y - high)
            own = np.maximum(cal[..., 0] - r, r - cal[..., 1])
        best = (made.losses_ + loss).argmin(1)
        reach = np.array([statistics.conformal_quantile(s, 0.2) for s in own])
        expected = score[np.arange(len(grid)), best] <= reach[best]
        found = ((union.low[i] <= grid[:, None]) & (grid[:, None] <= union.high[i])).any(1)
        np.testing.assert_array_equal(found, expected)
        changes += len(np.unique(best)) - 1
        assert union.length[i] == pytest.approx(expected.sum() * 0.016, abs=0.016 * 14)
    assert changes > 3
    inside = made.predict_interval(new)
    np.testing.assert_array_equal(inside, union.hull)
    from perturbkit.uncertainty.conformal import conformalized_early_stopping as module

    monkeypatch.setattr(module, "_BLOCK", 1)
    np.testing.assert_array_equal(made.predict_set(new).low, union.low)


def test_losses_are_those_of_the_task():
    rng = np.random.default_rng(4)
    made = CES(task="regression").fit(F, R)
    np.testing.assert_allclose(made.losses_, ((R - F) ** 2).sum(1))
    np.testing.assert_allclose(CES().fit(P, Y).losses_, -np.log(P[:, np.arange(40), Y]).sum(1))
    q = random_snapshots(rng, "quantile", 40, m=3)
    by_torch = torch.stack([
        (0.95 * torch.relu(a) + 0.05 * torch.relu(-a)).sum(1) + (0.05 * torch.relu(b) + 0.95 * torch.relu(-b)).sum(1)
        for a, b in [(torch.as_tensor(q[..., 0] - R), torch.as_tensor(q[..., 1] - R))]
    ])  # fmt: skip
    np.testing.assert_allclose(CES(task="quantile").fit(q, R).losses_, by_torch[0])


def missed(rng, task, seed, n, conditional=False):
    """Whether the truth of one new row is missed, with random snapshots."""
    found, y = random_snapshots(rng, task, n + 1), responses(rng, task, n + 1)
    made = CES(task=task, alpha=0.2, label_conditional=conditional, generator=seed)
    made.fit(found[:, :n], None if y is None else y[:n])
    if task == "outlier":
        return made.p_values(found[:, n:])[0] <= 0.2
    union = made.predict_set(found[:, n:])
    return not (union[0, y[n]] if task == "classification" else union.contains(y[n:])[0])


@pytest.mark.parametrize("task", ["outlier", "classification", "regression", "quantile"])
def test_coverage_with_random_snapshots(task):
    rng, n, draws = np.random.default_rng(5), 14, 700
    misses = sum(missed(rng, task, seed, n) for seed in range(draws))
    interval = statistics.clopper_pearson(misses, draws, 1 - 1e-4)
    assert interval.low <= 0.2
    # Not far below either: a p-value among 15 values, and no ties.
    assert interval.high >= 0.2 - 1 / (n + 1) - 0.05


def test_coverage_of_each_label():
    rng, draws = np.random.default_rng(6), 500
    hits, total = np.zeros(3), np.zeros(3)
    for seed in range(draws):
        y = np.concatenate([rng.permutation(np.repeat([0, 1, 2], 10)), [seed % 3]])
        found = random_snapshots(rng, "classification", 31, m=10)
        made = CES(alpha=0.2, label_conditional=True, generator=seed).fit(found[:, :30], y[:30])
        total[y[30]] += 1
        hits[y[30]] += made.predict_set(found[:, 30:])[0, y[30]]
    for h, t in zip(hits, total, strict=True):
        assert statistics.clopper_pearson(int(h), int(t), 1 - 1e-4).high >= 0.8


def test_naive_reuse_misses_more_than_allowed():
    """The control: choosing on the calibration rows alone, then calibrating on them."""
    rng, misses, draws = np.random.default_rng(7), 0, 400
    for _ in range(draws):
        n = 9
        found, y = random_snapshots(rng, "regression", n + 1, m=200), rng.normal(size=n + 1)
        best = ((y[:n] - found[:, :n]) ** 2).sum(1).argmin()
        reach = statistics.conformal_quantile(np.abs(y[:n] - found[best, :n]), 0.2)
        misses += abs(y[n] - found[best, n]) > reach
    assert statistics.clopper_pearson(misses, draws, 1 - 1e-4).low > 0.2


def test_outlier_p_values_are_super_uniform():
    rng = np.random.default_rng(8)
    found = []
    for _ in range(400):
        scores = random_snapshots(rng, "outlier", 20, m=20)
        found.append(CES(task="outlier").fit(scores[:, :19]).p_values(scores[:, 19:])[0])
    # One-sided: the share of p-values up to u is at most u.
    assert kstest(found, "uniform", alternative="greater").pvalue > 1e-4
    assert min(found) < 0.1


def test_ties_between_snapshots_go_to_the_first():
    scores = np.stack([np.linspace(1, 2, 19), np.linspace(1, 2, 19)[::-1]])
    made = CES(task="outlier").fit(scores)
    assert made.losses_[0] == pytest.approx(made.losses_[1])
    made.losses_ = np.ones(2)
    np.testing.assert_allclose(made.p_values([[1.5], [1.5]]), (1 + 10) / 20)
    f = np.zeros((2, 20))
    union = CES(task="regression").fit(f, np.arange(20.0)).predict_set(np.zeros((2, 1)))
    assert np.isnan(union.low[0, 1])
    assert union.length[0] == 2 * 18


def test_interval_union():
    nan = np.nan
    made = IntervalUnion(np.array([[0.0, 3.0], [nan, nan]]), np.array([[1.0, 5.0], [nan, nan]]))
    np.testing.assert_array_equal(made.length, [3, 0])
    np.testing.assert_array_equal(made.hull, [[0, 5], [nan, nan]])
    for y, inside in ((0.0, True), (1.0, True), (2.0, False), (5.0, True), (5.1, False)):
        np.testing.assert_array_equal(made.contains([y, y]), [inside, False])


def test_models_and_bare_predictions_agree():
    rng = np.random.default_rng(9)
    x, r = rng.normal(size=(80, 3)), rng.normal(size=80)
    models = [Ridge(alpha=a).fit(x[:30], r[:30]) for a in (0.1, 10, 1000)]
    given = np.stack([m.predict(x) for m in models])
    ours = CES(models, task="regression").fit(x[30:60], r[30:60]).predict_interval(x[60:])
    np.testing.assert_allclose(
        ours, CES(task="regression").fit(given[:, 30:60], r[30:60]).predict_interval(given[:, 60:])
    )
    g = torch.Generator().manual_seed(0)
    nets = [nn.Linear(3, 4) for _ in range(3)]
    for net in nets:
        net.weight.data, net.bias.data = torch.randn(4, 3, generator=g), torch.zeros(4)
    t, label = torch.as_tensor(x).float(), rng.integers(0, 4, 80)
    p = np.stack([net(t).double().softmax(1).detach().numpy() for net in nets])
    ours = CES(nets, generator=1).fit(t[:60], label[:60]).p_values(t[60:])
    np.testing.assert_allclose(ours, CES(generator=1).fit(p[:, :60], label[:60]).p_values(p[:, 60:]))


def test_snapshots_of_a_training_run():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(50, 4, generator=g)
    y = x @ torch.ones(4, 1)
    net = nn.Linear(4, 1)
    net.weight.data, net.bias.data = torch.zeros(1, 4), torch.zeros(1)
    before = copy.deepcopy(net.state_dict())
    found = train_with_snapshots(
        net, x, y, loss=nn.functional.mse_loss, epochs=6, every=2, lr=0.05, generator=3
    )
    losses = [float(nn.functional.mse_loss(s(x), y)) for s in found]
    assert len(found) == 3
    assert losses[0] > losses[1] > losses[2]
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    again = train_with_snapshots(
        net, x, y, loss=nn.functional.mse_loss, epochs=4, every=2, lr=0.05, generator=3
    )
    assert torch.equal(again[1].weight, found[1].weight)
    assert not any(p.requires_grad or p.grad is not None for s in found for p in s.parameters())
    # One step of Adam from zero moves every weight by lr.
    one = train_with_snapshots(net, x, y, loss=nn.functional.mse_loss, epochs=1, lr=0.05, batch_size=50)
    torch.testing.assert_close(one[0].weight, torch.full((1, 4), 0.05), rtol=1e-4, atol=0)


def test_scikit_learn_checks_that_apply():
    made = CES()
    for check in (
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_set_params,
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_parameters_default_constructible,
        estimator_checks.check_mixin_order,
    ):
        check("ConformalizedEarlyStopping", made)
    assert made.fit(P, Y) is made
    with pytest.raises(NotFittedError, match="not fitted; allowed"):
        clone(made).p_values(P)
    with pytest.raises(checks.PerturbkitError):
        made.p_values(P[..., :2] / P[..., :2].sum(2, keepdims=True))
