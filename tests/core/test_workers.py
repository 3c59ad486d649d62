"""Processes of one group: they see one another, and failures end them all."""

import time

import pytest

from _workers import one_dies, one_fails, one_fails_one_sleeps, sleeps, summed_ranks
from perturbkit.core import checks
from perturbkit.core.workers import run_workers


def test_processes_see_one_another() -> None:
    assert run_workers(summed_ranks, 3, 10) == [(0, 33.0), (1, 33.0), (2, 33.0)]


@pytest.mark.parametrize("function", [one_fails, one_dies])
def test_a_failure_is_told_and_ends_the_others(function) -> None:
    with pytest.raises(checks.ModelError, match="a worker failed"):
        run_workers(function, 2, timeout=60)


def test_the_time_is_kept() -> None:
    start = time.perf_counter()
    with pytest.raises(checks.ModelError, match="did not end in 8 s"):
        run_workers(sleeps, 1, timeout=8)
    assert time.perf_counter() - start < 30


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: run_workers(3, 2), "function is a int"),
        (lambda: run_workers(summed_ranks, 0), "n is 0"),
        (lambda: run_workers(summed_ranks, 1, timeout=0.0), "timeout"),
    ],
    ids=["function", "n", "timeout"],
)
def test_refusals(call, match: str) -> None:
    with pytest.raises(checks.PerturbkitError, match=match):
        call()


def test_a_failure_is_told_while_another_process_works_on() -> None:
    with pytest.raises(checks.ModelError, match="a worker failed: 'lost'"):
        run_workers(one_fails_one_sleeps, 2, timeout=60)
