"""The watch: time inside models, a deadline between chunks, and chunks short enough to keep it."""

import time

import pytest
import torch

from perturbkit.core import Oracle
from perturbkit.core.watch import DeadlineError, Watch, timed


class Slow:
    """Takes a tenth of a second a row and notes how many it was given at once."""

    def __init__(self, each=0.05):
        self.each, self.sizes = each, []

    def __call__(self, x):
        self.sizes.append(len(x))
        time.sleep(self.each * len(x))
        return x.sum(1, keepdim=True)


def test_without_a_watch_nothing_changes():
    slow = Slow(0.0)
    Oracle(slow, chunk_size=4)(torch.ones(8, 2))
    assert slow.sizes == [4, 4]


def test_time_in_the_model_is_counted_once():
    watch = Watch()
    inner = Oracle(Slow(0.02), chunk_size=8)
    outer = Oracle(lambda x: inner(x), chunk_size=8)
    with watch.on():
        outer(torch.ones(5, 2))
        time.sleep(0.2)
    assert 0.1 <= watch.seconds["model"] < 0.25
    with watch.on(), timed("certificate"):
        time.sleep(0.05)
    assert watch.seconds["certificate"] >= 0.05


def test_a_deadline_is_kept_by_a_slow_function():
    slow = Slow()
    watch = Watch(time.monotonic() + 0.6)
    began = time.monotonic()
    with watch.on(), pytest.raises(DeadlineError):
        Oracle(slow)(torch.ones(200, 2))
    assert time.monotonic() - began < 3.0  # ten seconds without it
    assert max(slow.sizes) <= 10


def test_a_deadline_does_not_change_the_answers():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    oracle = Oracle(lambda v: v.square().sum(1, keepdim=True))
    with Watch(time.monotonic() + 60).on():
        value, gradient = oracle.value_and_gradient(x, 0)
    torch.testing.assert_close(value, x.square().sum(1))
    torch.testing.assert_close(gradient, 2 * x)
    assert oracle.nfev == oracle.ngrad == 50


def test_the_watch_is_off_after_the_block():
    with Watch(0.0).on():
        pass
    assert len(Oracle(lambda x: x)(torch.ones(2, 1))) == 2
