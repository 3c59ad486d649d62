"""Oracles of continual maxima: exact without noise, the tree's variances and privacy, and the batch limit."""

import copy
import math

import numpy as np
import pytest
import torch

from _common import Example
from perturbkit.core import checks
from perturbkit.privacy import (
    BinaryTreeCounter,
    ContinualMaxSum,
    batch_max_sum,
    continual_error_bounds,
    epsilon_lower_bound,
    hard_stream,
    zcdp_epsilon,
)


def stream(n=37, d=3, seed=0):
    return np.random.default_rng(seed).integers(0, 2, (n, d))


def answered(generator, dtype):
    made = ContinualMaxSum(3, 40, 0.5, "tree", generator=generator)
    return {"first": made.update(stream()), "next": made.update(stream()[0])}


EXAMPLE = Example(
    call=answered,
    stochastic=True,
    refusals=(
        (lambda: ContinualMaxSum(0, 8, 1.0), "dimension is 0"),
        (lambda: ContinualMaxSum(2, 0, 1.0), "horizon is 0"),
        (lambda: ContinualMaxSum(2, 8, 0.0), "rho is 0"),
        (lambda: ContinualMaxSum(2, 8, 1.0, "sparse"), "method is 'sparse'"),
        (lambda: ContinualMaxSum(2, 8, 1.0, answer="min"), "answer is 'min'"),
        (lambda: ContinualMaxSum(2, 8, 1.0, period=9), "period is 9"),
        (lambda: ContinualMaxSum(2, 8, 1.0, generator="x"), "generator is 'x'"),
        (lambda: ContinualMaxSum(2, 8, 1.0).update([0, 2]), r"zeros and ones of shape \(2,\)"),
        (lambda: ContinualMaxSum(2, 8, 1.0).update([0, 1, 0]), "rows has shape"),
        (lambda: ContinualMaxSum(2, 3, 1.0).update(np.zeros((4, 2))), "4 rows after 0 pass the horizon"),
        (lambda: BinaryTreeCounter(3, 1.0).update(np.zeros((4, 1))), "pass the horizon"),
        (lambda: BinaryTreeCounter(3, -1.0), "rho is -1"),
        (lambda: batch_max_sum([[0.5]], 1.0), "rows has shape"),
        (lambda: batch_max_sum([[1]], 0.0), "rho is 0"),
        (lambda: continual_error_bounds(0, 1, 1.0), "T is 0"),
        (lambda: hard_stream(4, 0), "d is 0"),
    ),
)


@pytest.mark.parametrize("method", ["auto", "tree", "recompute"])
def test_without_noise_answers_are_exact(method):
    x = stream()
    made = ContinualMaxSum(3, 40, math.inf, method)
    if method == "recompute":
        assert made.period == 1
    sums = x.cumsum(0)
    np.testing.assert_array_equal(made.update(x), sums.max(1))
    chosen = ContinualMaxSum(3, 40, math.inf, method, answer="select").update(x)
    np.testing.assert_array_equal(sums[np.arange(37), chosen], sums.max(1))
    np.testing.assert_array_equal(BinaryTreeCounter(37, math.inf, 3).update(x), sums)
    assert batch_max_sum(x, math.inf) == sums[-1].max()


@pytest.mark.parametrize("made", [
    lambda: BinaryTreeCounter(40, 0.3, 3, generator=4),
    lambda: ContinualMaxSum(3, 40, 0.3, "recompute", period=5, generator=4),
    lambda: ContinualMaxSum(3, 40, 0.3, "recompute", period=5, answer="select", generator=4),
    lambda: ContinualMaxSum(3, 40, 0.3, "zero"),
])  # fmt: skip
def test_rows_one_by_one_or_together_have_the_same_law(made):
    """With the noise replaced by a function of its order, both give the same numbers."""
    x = stream()

    def counting(source):
        state = {"n": 0}

        def gaussian(variance, n):
            state["n"] += n
            return np.arange(state["n"] - n, state["n"])

        source.discrete_gaussian = gaussian
        source.exponential_mechanism = lambda scores, rate: int(scores.argmax())

    results = []
    for pieces in ([37], [1] * 37, [7, 1, 20, 9]):
        one = made()
        for part in (one, getattr(one, "_tree", None)):
            if part is not None and hasattr(part, "_source"):
                counting(part._source)
        ends = np.cumsum(pieces)
        found = [np.atleast_1d(one.update(x[e - p : e])) for p, e in zip(pieces, ends, strict=True)]
        results.append(np.concatenate(found))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_tree_noise_has_variance_popcount_times_that_of_a_block():
    T, d, rho = 13, 4000, 0.4
    # Columns are independent: one wide tree stands for many runs.
    noise = BinaryTreeCounter(T, rho, d, generator=1).update(np.zeros((T, d))).T
    levels = 4
    block = d * levels / (2 * rho)
    assert BinaryTreeCounter(T, rho, d).variance == pytest.approx(block, rel=1e-3)
    for t in range(1, T + 1):
        assert noise[:, t - 1].var() == pytest.approx(t.bit_count() * block, rel=0.12)
    # 12 = 1100 and 13 = 1101 share two blocks of three; 7 and 8 share none.
    corr = np.corrcoef(noise.T)
    assert corr[11, 12] == pytest.approx(math.sqrt(2 / 3), abs=0.06)
    assert abs(corr[6, 7]) < 0.08


@pytest.mark.parametrize(("T", "d"), [(1, 1), (2, 3), (13, 1), (64, 5)])
def test_tree_privacy_of_one_changed_row_is_exactly_rho(T, d):
    """Blocks that some prefix uses and that hold the row: at most L, and L for the first row."""
    rho = 0.7
    made = BinaryTreeCounter(T, rho, d)
    used = set()
    for t in range(1, T + 1):
        end = t
        while end:
            low = end & -end
            used.add((end - low, end))
            end -= low
    holding = [sum(a < s <= b for a, b in used) for s in range(1, T + 1)]
    assert max(holding) == holding[0] == made.levels
    total = max(holding) * d / (2 * made.variance)
    assert rho * (1 - 1e-2) < total <= rho * (1 + 1e-12)


def test_recompute_over_the_whole_stream_is_the_batch_answer():
    x = stream(20)
    made = ContinualMaxSum(3, 20, 0.5, "recompute", period=20, generator=3)
    found = made.update(x)
    assert (found[:19] == 0).all()
    # The same stream of words, hence the same noise.
    assert found[19] == batch_max_sum(x, 0.5, generator=3)
    errors = [batch_max_sum(x, 0.5, generator=s) - x.sum(0).max() for s in range(600)]
    assert np.var(errors) == pytest.approx(1.0, rel=0.25)


def test_recompute_holds_and_spends_its_share():
    x = stream(40)
    found = ContinualMaxSum(3, 40, 0.5, "recompute", period=7, generator=5).update(x)
    assert (found[:6] == 0).all()
    for start in range(6, 40, 7):
        assert len(set(found[start : start + 7])) == 1
    sums = x.cumsum(0).max(1)
    errors = []
    for seed in range(200):
        run = ContinualMaxSum(3, 40, 0.5, "recompute", period=7, generator=seed).update(x)
        errors.append((run - sums)[6::7])
    assert np.var(np.concatenate(errors)) == pytest.approx(5 / (2 * 0.5), rel=0.2)


def test_selection_has_the_exponential_mechanism_s_chances():
    x = np.array([[1, 0, 1]] * 3 + [[1, 0, 0]] * 2)
    rho, runs = 0.3, 1000
    source = torch.Generator().manual_seed(2)
    found = [
        ContinualMaxSum(3, 5, rho, "recompute", period=5, answer="select", generator=source).update(x)[-1]
        for _ in range(runs)
    ]
    weights = np.exp(math.sqrt(8 * rho) / 2 * np.array([5, 0, 3]))
    np.testing.assert_allclose(np.bincount(found, minlength=3) / runs, weights / weights.sum(), atol=0.06)


def test_attack_does_not_exceed_the_stated_privacy_of_the_tree():
    T, rho, delta, runs = 6, 0.4, 1e-2, 20000
    sums = []
    for row in (1, 0):
        x = np.ones((T, runs), int)
        x[0] = row
        # Each column of a wide tree of privacy rho * d is a run of the tree of one column and rho.
        sums.append(BinaryTreeCounter(T, rho * runs, runs, generator=row).update(x).sum(0))
    found = epsilon_lower_bound(*sums, delta=delta)
    assert 0.2 < found.epsilon <= zcdp_epsilon(rho, delta)


def test_attack_does_not_exceed_the_stated_privacy_of_recomputing():
    T, rho, delta, runs = 6, 2.0, 1e-2, 300
    sums = []
    for row in (1, 0):
        source = torch.Generator().manual_seed(row)
        x = np.ones((T, 1), int)
        x[0] = row
        sums.append(
            [
                ContinualMaxSum(1, T, rho, "recompute", period=3, generator=source).update(x).sum()
                for _ in range(runs)
            ]
        )
    found = epsilon_lower_bound(*np.array(sums, float), delta=delta)
    assert 0.1 < found.epsilon <= zcdp_epsilon(rho, delta)


def test_zero_and_bounds():
    assert (ContinualMaxSum(2, 5, 1.0, "zero").update(np.ones((5, 2))) == 0).all()
    assert ContinualMaxSum(2, 5, 1e-6).method == "zero"
    for T, d in ((64, 1), (4096, 8), (4096, 256)):
        bounds = continual_error_bounds(T, d, 0.5)
        assert ContinualMaxSum(d, T, 0.5).method == min(("recompute", "tree", "zero"), key=bounds.get)
        assert bounds["lower_order"] <= bounds["best"]
    assert continual_error_bounds(10, 1, 0.5)["batch"] == 1.0
    # The best period is near (T / 8 rho)^(1/3) where logarithms are left out.
    period = ContinualMaxSum(1, 4096, 0.5, "recompute").period
    assert (4096 / 4) ** (1 / 3) <= period <= 3 * (4096 / 4) ** (1 / 3)


def test_hard_stream_reveals_the_hidden_block():
    T, d = 512, 6
    x = hard_stream(T, d, 7)
    n = 8
    best = x.cumsum(0).max(1)
    hidden = x[:n].sum(0)
    for j in range(d):
        # After its turn column j leads: all columns were raised equally before.
        assert best[n + 2 * n * j + n - 1] == hidden[j] + n * (j + 1) or hidden[j] + n < hidden.max()
        np.testing.assert_array_equal(x[n + 2 * n * j : n + 2 * n * (j + 1)].sum(0), np.full(d, n))
    assert set(np.unique(x)) <= {0, 1}
    np.testing.assert_array_equal(x, hard_stream(T, d, 7))


def test_a_passed_horizon_is_refused_and_nothing_is_taken():
    made = ContinualMaxSum(1, 5, 1.0, "tree", generator=0)
    made.update(np.ones((4, 1)))
    before = copy.deepcopy(made._tree._sums)
    with pytest.raises(checks.ArgumentError, match="2 rows after 4 pass the horizon"):
        made.update(np.ones((2, 1)))
    assert made.t == made._tree.t == 4
    np.testing.assert_array_equal(before, made._tree._sums)
    assert isinstance(made.update([1]), int)
