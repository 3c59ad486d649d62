"""Oracles of the attack: never above the truth, near it on exact mechanisms, and above the claim of a broken one."""

import numpy as np
import pytest
import torch

from _common import Example
from perturbkit.core.statistics import clopper_pearson
from perturbkit.privacy import epsilon_lower_bound


def laplace(n, epsilon, seed):
    rng = np.random.default_rng(seed)
    return rng.laplace(0, 1 / epsilon, n), rng.laplace(1, 1 / epsilon, n)


A, B = laplace(200, 1.0, 0)

EXAMPLE = Example(
    call=lambda generator, dtype: epsilon_lower_bound(A, B),
    dtypes=(torch.float64,),
    refusals=(
        (lambda: epsilon_lower_bound(A[:19], B), "19 and 200 scores"),
        (lambda: epsilon_lower_bound(A[None], B), "first has shape"),
        (lambda: epsilon_lower_bound(A, B * np.nan), "second holds"),
        (lambda: epsilon_lower_bound(A, B, delta=1.0), "delta is 1"),
        (lambda: epsilon_lower_bound(A, B, confidence=1.0), "confidence is 1"),
        (lambda: epsilon_lower_bound(A, B, n_thresholds=0), "n_thresholds is 0"),
    ),
)


@pytest.mark.parametrize("epsilon", [0.2, 1.0, 3.0])
def test_near_the_truth_on_laplace_noise(epsilon):
    found = epsilon_lower_bound(*laplace(60000, epsilon, 1))
    assert 0.7 * epsilon < found.epsilon <= epsilon


def test_validity_of_the_confidence():
    over = sum(epsilon_lower_bound(*laplace(200, 0.5, s), confidence=0.8).epsilon > 0.5 for s in range(150))
    assert clopper_pearson(over, 150, 0.999, side="lower").low <= 0.2
    assert over > 0  # it is not valid by being trivial


def test_equal_inputs_show_nothing():
    rng = np.random.default_rng(2)
    found = [epsilon_lower_bound(rng.normal(size=500), rng.normal(size=500)).epsilon for _ in range(50)]
    assert max(found) < 0.2
    assert sum(e > 0 for e in found) <= 3


def test_delta_is_subtracted():
    rng = np.random.default_rng(3)
    # With chance 0.05 the input is printed: (0, 0.05)-DP.
    a, b = (np.where(rng.random(40000) < 0.05, v, 0.0) for v in (1.0, -1.0))
    assert epsilon_lower_bound(a, b).epsilon > 4
    assert epsilon_lower_bound(a, b, delta=0.05).epsilon == 0


def test_each_tail_and_each_input_can_be_the_likelier():
    rng = np.random.default_rng(4)
    base, rare = rng.random(20000), np.where(rng.random(20000) < 0.1, 2.0, rng.random(20000))
    for sign, above in ((1, True), (-1, False)):
        one = epsilon_lower_bound(sign * rare, sign * base)
        other = epsilon_lower_bound(sign * base, sign * rare)
        assert (one.above, one.likelier) == (above, "first")
        assert (other.above, other.likelier) == (above, "second")
        assert one.epsilon > 3
        assert other.epsilon > 3


def test_bound_in_closed_form():
    a, b = np.repeat([0.0, 1.0], [20, 180]), np.repeat([0.0, 1.0], [180, 20])
    found = epsilon_lower_bound(a, b, confidence=0.99)
    low = clopper_pearson(90, 100, 0.995, side="lower").low
    high = clopper_pearson(10, 100, 0.995, side="upper").high
    assert found.epsilon == pytest.approx(np.log(low / high))
    assert (sorted(found.counts), found.n) == ([10, 90], (100, 100))
