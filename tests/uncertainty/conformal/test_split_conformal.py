"""Oracles of split conformal prediction: coverage over many draws, loops over the definition, scikit-learn's checks."""

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.utils import estimator_checks
from torch import nn

from _common import Example
from perturbkit.core import Oracle, checks, statistics
from perturbkit.uncertainty import SplitConformalClassifier, SplitConformalRegressor

SCORES = ("aps", "lac", "raps")


def draw(rng, n=40, k=4, ties=False):
    """Probabilities and labels that follow others: the model is wrong, which must not matter."""
    p = rng.dirichlet(np.ones(k), n)
    if ties:
        p = np.eye(k)[rng.integers(0, k, n)] * 0.6 + 0.1
    truth = p**2 / (p**2).sum(1, keepdims=True)
    return p, (truth.cumsum(1) > rng.random((n, 1))).argmax(1)


P, Y = draw(np.random.default_rng(0))


def classify(generator, dtype):
    fitted = SplitConformalClassifier(generator=generator).fit(torch.as_tensor(P).to(dtype), Y)
    return fitted.predict_set(torch.as_tensor(P).to(dtype))


EXAMPLE = Example(
    call=classify,
    stochastic=True,
    refusals=(
        (lambda: SplitConformalClassifier(alpha=0.1).fit(P[:8], Y[:8]), "8 calibration rows .* at least 9"),
        (lambda: SplitConformalRegressor(alpha=0.01).fit(Y[:40], Y), "at least 99"),
        (lambda: SplitConformalClassifier(label_conditional=True).fit(P, np.minimum(Y, 2)), "4 calibration rows with label 0"),
        (lambda: SplitConformalRegressor(alpha=0.4).fit(Y, Y, [1] * 39 + [2]), "in group 2"),
        (lambda: SplitConformalClassifier(alpha=0.0).fit(P, Y), "alpha is 0"),
        (lambda: SplitConformalClassifier(score="hps").fit(P, Y), "score is 'hps'"),
        (lambda: SplitConformalRegressor(score="cqr").fit(P[:, 0], Y), "score is 'cqr'"),
        (lambda: SplitConformalClassifier(penalty=-1.0).fit(P, Y), "penalty is -1"),
        (lambda: SplitConformalClassifier(k_reg=-1).fit(P, Y), "k_reg is -1"),
        (lambda: SplitConformalClassifier().fit(np.log(P), Y), "softmax"),
        (lambda: SplitConformalClassifier(LinearRegression()).fit(P, Y), "estimator is a LinearRegression"),
        (lambda: SplitConformalRegressor(object()).fit(P, Y), "estimator is a object"),
        (lambda: SplitConformalClassifier(nn.Linear(4, 3)).fit(P, Y), "X is ndarray"),
        (lambda: SplitConformalClassifier().fit(P, Y[:5]), "y has shape"),
        (lambda: SplitConformalClassifier().fit(P, Y + 1), "y holds labels"),
        (lambda: SplitConformalClassifier().fit(P, Y, groups=[1, 2]), "groups has shape"),
        (lambda: SplitConformalClassifier().fit(P, Y).predict_set(P[:, :3] / P[:, :3].sum(1, keepdims=True)),
         "X has 3 classes"),
        (lambda: SplitConformalClassifier().fit(P, Y).predict_set(P, groups=Y), "groups given, but"),
        (lambda: SplitConformalRegressor().fit(Y, Y, Y > 1).predict_interval(Y), "no groups given"),
        (lambda: SplitConformalRegressor().fit(Y, Y, Y > 1).predict_interval(Y, Y), "groups holds 2"),
        (lambda: SplitConformalRegressor(score="quantile").fit(P[:, :3], Y), "prediction|X has shape"),
        (lambda: SplitConformalRegressor(score="quantile").fit([[1.0, 0.0]] * 40, Y), "40 rows of the predictions"),
        (lambda: SplitConformalRegressor(score="normalized").fit([[1.0, 0.0]] * 40, Y), "positive scales"),
        (lambda: SplitConformalRegressor().fit(Y, Y).drift(Y, level=1.0), "level is 1"),
        (lambda: SplitConformalClassifier(generator=0.5).fit(P, Y), "generator is 0.5"),
    ),
)  # fmt: skip


def plausible(k, n, low, high=1.0):
    """The exact binomial interval of the share (error 1e-4) meets [low, high]."""
    interval = statistics.clopper_pearson(k, n, 1 - 1e-4)
    assert interval.high >= low, f"{k} of {n} is below {low}"
    assert interval.low <= high, f"{k} of {n} is above {high}"


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("n", [9, 40])
def test_marginal_coverage_is_exact_without_ties(score, n):
    rng, hits, draws = np.random.default_rng(1), 0, 800
    for seed in range(draws):
        p, y = draw(rng, n + 1)
        found = SplitConformalClassifier(score=score, generator=seed).fit(p[:n], y[:n])
        hits += found.predict_set(p[n:])[0, y[n]]
    plausible(hits, draws, 0.9, 0.9 + 1 / (n + 1))


@pytest.mark.parametrize("randomized", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_coverage_with_ties_is_at_least_the_level(score, randomized):
    rng, hits, draws = np.random.default_rng(2), 0, 600
    for seed in range(draws):
        p, y = draw(rng, 31, ties=True)
        found = SplitConformalClassifier(score=score, randomized=randomized, generator=seed).fit(
            p[:30], y[:30]
        )
        hits += found.predict_set(p[30:])[0, y[30]]
    plausible(hits, draws, 0.9)


def test_coverage_in_every_group_and_label():
    rng, draws = np.random.default_rng(3), 500
    hits, total = np.zeros((2, 3)), np.zeros((2, 3))
    for seed in range(draws):
        p, y = draw(rng, 144, k=3)
        group = np.repeat([0, 1], 72)
        # In group 1 the labels are noise, so marginal thresholds would miss there.
        y = np.where(group == 1, rng.integers(0, 3, 144), y)
        new = np.array([70, 71, 142, 143])
        old = np.setdiff1d(np.arange(144), new)
        found = SplitConformalClassifier(alpha=0.2, label_conditional=True, generator=seed)
        sets = found.fit(p[old], y[old], group[old]).predict_set(p[new], group[new])
        np.add.at(hits, (group[new], y[new]), sets[np.arange(4), y[new]])
        np.add.at(total, (group[new], y[new]), 1)
    for g in (0, 1):
        for label in range(3):
            plausible(int(hits[g, label]), int(total[g, label]), 0.8)


def test_without_groups_the_hard_group_is_missed():
    """The control: marginal thresholds do not cover within groups."""
    rng, hits = np.random.default_rng(4), 0
    for _ in range(300):
        m = rng.normal(size=101)
        group = rng.random(101) < 0.2
        group[100] = True
        y = m + np.where(group, 3.0, 0.3) * rng.normal(size=101)
        interval = SplitConformalRegressor().fit(m[:100], y[:100]).predict_interval(m[100:])[0]
        hits += interval[0] <= y[100] <= interval[1]
    assert statistics.clopper_pearson(hits, 300, 1 - 1e-4).high < 0.9


@pytest.mark.parametrize("score", ["absolute", "normalized", "quantile"])
@pytest.mark.parametrize("grouped", [False, True])
def test_regression_coverage(score, grouped):
    rng, draws, n = np.random.default_rng(5), 600, 25
    hits = np.zeros(2, dtype=int)
    for _ in range(draws):
        m, group = rng.normal(size=2 * n + 2), np.repeat([0, 1], n + 1)
        y = np.sin(m) + rng.standard_t(2, size=2 * n + 2) * (1 + 3 * group)
        x = {
            "absolute": m,
            "normalized": np.stack([m, 1 + m**2], 1),
            "quantile": np.stack([m - 1, m + 1], 1),
        }[score]
        new = np.array([n, 2 * n + 1])
        old = np.setdiff1d(np.arange(2 * n + 2), new)
        groups = (group[old], group[new]) if grouped else (None, None)
        ends = (
            SplitConformalRegressor(score=score)
            .fit(x[old], y[old], groups[0])
            .predict_interval(x[new], groups[1])
        )
        hits += (ends[:, 0] <= y[new]) & (y[new] <= ends[:, 1])
    if grouped:
        for k in hits:
            plausible(int(k), draws, 0.9, 0.9 + 1 / (n + 1))
    else:
        assert hits[0] > hits[1]


@pytest.mark.parametrize("alpha", [0.1, 0.05, 0.3, 1 / 3])
def test_smallest_calibration_set_that_is_allowed(alpha):
    least = int(np.ceil(1 / alpha - 1 - 1e-9))
    y = np.arange(float(least))
    found = SplitConformalRegressor(alpha=alpha).fit(np.zeros(least), y)
    assert found.thresholds_[0] == least - 1
    with pytest.raises(checks.ArgumentError, match=f"at least {least}"):
        SplitConformalRegressor(alpha=alpha).fit(np.zeros(least - 1) if least > 1 else np.zeros(0), y[:-1])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("by", ["nothing", "group", "label", "both"])
def test_sets_are_the_labels_with_p_value_above_alpha(score, by):
    p, y = draw(np.random.default_rng(6), 300, k=3)
    group = np.arange(300) % 2 if by in ("group", "both") else None
    made = SplitConformalClassifier(score=score, label_conditional=by in ("label", "both"), generator=7)
    first, second = made.fit(p, y, group), copy.deepcopy(made.fit(p, y, group))
    sets = first.predict_set(p, group)
    second._random = copy.deepcopy(clone(made).fit(p, y, group)._random)
    np.testing.assert_array_equal(sets, second.p_values(p, group) > 0.1 + 1e-12)


def test_scores_against_a_loop():
    p, y = draw(np.random.default_rng(8), 60, k=5)
    found = SplitConformalClassifier(randomized=False).fit(p, y)
    expected = np.array([sum(v for v in row if v > row[c]) + row[c] for row, c in zip(p, y, strict=True)])
    np.testing.assert_allclose(found._calibration_scores, expected, rtol=1e-12)
    assert found.thresholds_[0, 0] == statistics.conformal_quantile(found._calibration_scores, 0.1)
    rank = np.array([1 + sum(v > row[c] for v in row) for row, c in zip(p, y, strict=True)])
    raps = SplitConformalClassifier(score="raps", randomized=False, penalty=0.3, k_reg=2).fit(p, y)
    np.testing.assert_allclose(raps._calibration_scores, expected + 0.3 * np.maximum(rank - 2, 0), rtol=1e-12)
    random = SplitConformalClassifier(generator=0).fit(p, y)._calibration_scores
    own = p[np.arange(60), y]
    assert ((random <= expected) & (random >= expected - own)).all()
    assert np.std((expected - random) / own) == pytest.approx(np.sqrt(1 / 12), rel=0.2)


def test_p_values_count_calibration_scores():
    p = np.array([[0.5, 0.5], [0.7, 0.3], [0.9, 0.1]] * 4)
    found = SplitConformalClassifier(score="lac").fit(p, [0] * 12)
    # Scores 0.1, 0.3 and 0.5, four each; the new row's labels score 0.3 and 0.7.
    np.testing.assert_allclose(found.p_values(p[1:2]), [[9 / 13, 1 / 13]])


def test_intervals_in_closed_form():
    y = np.arange(1.0, 20.0)
    absolute = SplitConformalRegressor(alpha=0.1).fit(np.zeros(19), y)
    np.testing.assert_allclose(absolute.predict_interval([2.0]), [[2 - 18, 2 + 18]])
    scaled = SplitConformalRegressor(alpha=0.1, score="normalized").fit(np.tile([0.0, 2.0], (19, 1)), y)
    np.testing.assert_allclose(scaled.predict_interval([[1.0, 3.0]]), [[1 - 27, 1 + 27]])
    quantile = SplitConformalRegressor(alpha=0.1, score="quantile").fit(np.tile([-30.0, 30.0], (19, 1)), y)
    assert quantile.thresholds_[0] == 18 - 30
    np.testing.assert_allclose(quantile.predict_interval([[-30.0, 30.0], [0.0, 2.0]]), [[-18, 18], [1, 1]])


def test_models_and_bare_predictions_agree():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=g, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(3, 4)).double()
    net[0].weight.data, net[0].bias.data = torch.randn(4, 3, generator=g).double(), torch.zeros(4).double()
    y = (x @ net[0].weight.data.T).argmax(1).numpy()
    given = net(x).softmax(1).detach().numpy()
    results = [
        SplitConformalClassifier(e, generator=3).fit(v, y).predict_set(v)
        for e, v in ((None, given), (net, x), (Oracle(net, chunk_size=7), x))
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
    head, target = nn.Linear(3, 1).double(), x[:, 0].numpy()
    a = SplitConformalRegressor(head).fit(x, target).predict_interval(x)
    b = SplitConformalRegressor().fit(head(x).detach()[:, 0], target).predict_interval(head(x).detach()[:, 0])
    np.testing.assert_allclose(a, b, rtol=1e-12)
    line = LinearRegression().fit(x.numpy(), target + 1)
    np.testing.assert_allclose(
        SplitConformalRegressor(line).fit(x.numpy(), target).thresholds_, [1.0], rtol=1e-9
    )


def test_labels_of_a_scikit_learn_classifier():
    rng = np.random.default_rng(9)
    x = rng.normal(size=(200, 2))
    names = np.array(["cat", "ant", "bee"])[(x[:, 0] > 0).astype(int) + (x[:, 1] > 0)]
    model = LogisticRegression().fit(x[:100], names[:100])
    found = SplitConformalClassifier(model, generator=0).fit(x[100:], names[100:])
    assert list(found.classes_) == ["ant", "bee", "cat"]
    plain = SplitConformalClassifier(generator=0).fit(
        model.predict_proba(x[100:]), np.searchsorted(found.classes_, names[100:])
    )
    np.testing.assert_array_equal(found.thresholds_, plain.thresholds_)
    with pytest.raises(checks.ArgumentError, match="ant, bee, cat"):
        found.fit(x[100:], np.where(names[100:] == "cat", "dog", names[100:]))


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("kind", ["classifier", "regressor"])
def test_drift_is_flagged_and_false_alarms_are_rare(kind, labelled):
    rng, alarms, found_drift, runs = np.random.default_rng(10), 0, 0, 200
    for seed in range(runs):
        if kind == "classifier":
            p, y = draw(rng, 160)
            made = SplitConformalClassifier(generator=seed).fit(p[:80], y[:80])
            flat = p[80:] ** 0.2 / (p[80:] ** 0.2).sum(1, keepdims=True)
            same, moved = (p[80:], y[80:]), (p[80:], rng.integers(0, 4, 80)) if labelled else (flat, y[80:])
        else:
            m = rng.normal(size=160)
            y = m + rng.normal(size=160)
            made = SplitConformalRegressor().fit(m[:80], y[:80])
            same = (m[80:], y[80:])
            moved = (m[80:], y[80:] + 3 * rng.normal(size=80)) if labelled else (m[80:] + 1, y[80:])
        pick = slice(None) if labelled else slice(1)
        quiet, loud = made.drift(*same[pick], level=0.05), made.drift(*moved[pick], level=0.05)
        alarms, found_drift = alarms + quiet.drifted, found_drift + loud.drifted
        assert quiet.scores == ("labelled" if labelled else "unlabelled")
        assert quiet.drifted == (quiet.p_value <= 0.05)
    plausible(alarms, runs, 0.0, 0.05)
    assert found_drift > 0.8 * runs


@pytest.mark.parametrize("made", [SplitConformalClassifier(), SplitConformalRegressor()])
def test_scikit_learn_checks_that_apply(made):
    """Those that need no feature matrix: without an estimator, X is predictions."""
    name = type(made).__name__
    for check in (
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_parameters_default_constructible,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_set_params,
        estimator_checks.check_mixin_order,
    ):
        check(name, made)
    before = copy.deepcopy(made.get_params())
    fitted = made.fit(*((P, Y) if "Classifier" in name else (Y, Y + 0.5)))
    assert fitted is made
    assert before == made.get_params()
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.thresholds_, fitted.thresholds_)
    for call in (
        ("predict_set", "p_values", "drift") if "Classifier" in name else ("predict_interval", "drift")
    ):
        with pytest.raises(NotFittedError, match="not fitted; allowed"):
            getattr(clone(made), call)(P if "Classifier" in name else Y)


def test_an_integer_seed_repeats_the_sets_and_calls_draw_anew():
    made = SplitConformalClassifier(generator=1).fit(P, Y)
    first, second = made.p_values(P), made.p_values(P)
    assert (first != second).any()
    np.testing.assert_array_equal(SplitConformalClassifier(generator=1).fit(P, Y).p_values(P), first)


def test_the_model_is_left_as_it_was():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5)).train()
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    SplitConformalClassifier(net).fit(x, Y).predict_set(x)
    assert net.training
    assert all(p.requires_grad for p in net.parameters())
