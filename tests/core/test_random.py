"""Generators: reproducible draws of the right law, and no global state."""

import random as python_random

import numpy as np
import pytest
import scipy.stats
import torch

from perturbkit.core import checks, random


def test_generators_are_made_and_passed_on() -> None:
    made = torch.Generator().manual_seed(1)
    assert random.as_generator(made) is made
    assert random.as_generator(5).initial_seed() == 5
    assert random.as_generator(np.int64(5)).initial_seed() == 5
    assert random.as_generator().initial_seed() != random.as_generator().initial_seed()
    for wrong in (1.0, "1", True, np.random.default_rng(0)):
        with pytest.raises(checks.ArgumentTypeError, match="generator is"):
            random.as_generator(wrong)


def test_numpy_generators_follow() -> None:
    made = np.random.default_rng(0)
    assert random.numpy_generator(made) is made
    torch_one = torch.Generator().manual_seed(3)
    first, second = (random.numpy_generator(torch_one).integers(2**40) for _ in range(2))
    assert first != second
    assert first == random.numpy_generator(torch.Generator().manual_seed(3)).integers(2**40)
    assert first == random.numpy_generator(3).integers(2**40)


def test_seeds_are_distinct_and_reproducible() -> None:
    drawn = random.seeds(random.as_generator(0), 100)
    assert len(set(drawn)) == 100
    assert all(0 <= s < 2**63 for s in drawn)
    assert drawn == random.seeds(random.as_generator(0), 100)


def test_laws() -> None:
    g = random.as_generator(0)
    n = 5000
    assert scipy.stats.kstest(random.randn((n,), generator=g).numpy(), "norm").pvalue > 1e-3
    flat = random.uniform((n,), -2.0, 3.0, generator=g)
    assert scipy.stats.kstest(flat.numpy(), scipy.stats.uniform(-2, 5).cdf).pvalue > 1e-3
    signs = random.rademacher((n,), generator=g)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.06
    whole = random.randint(2, 5, (n,), generator=g)
    assert scipy.stats.chisquare(whole.bincount()[2:].numpy()).pvalue > 1e-3
    assert whole.dtype == torch.int64
    assert random.randperm(50, generator=g).sort().values.tolist() == list(range(50))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_follows(dtype: torch.dtype) -> None:
    for draw in (random.randn, random.uniform, random.rademacher):
        like = torch.zeros(1, dtype=dtype)
        assert draw((2, 3), generator=random.as_generator(0), like=like).dtype == dtype
        assert draw((2, 3), generator=random.as_generator(0), dtype=dtype).dtype == dtype
        assert draw((2, 3), generator=random.as_generator(0), dtype=dtype).shape == (2, 3)
        # An integer example says nothing about the precision.
        whole = draw((2,), generator=random.as_generator(0), like=torch.zeros(1, dtype=torch.long))
        assert whole.dtype == torch.get_default_dtype()


def test_no_global_state_is_touched() -> None:
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy(), python_random.getstate()
    for seed in (None, 3):
        g = random.as_generator(seed)
        random.randn((3,), generator=g)
        random.uniform((3,), generator=g)
        random.rademacher((3,), generator=g)
        random.randint(0, 3, (3,), generator=g)
        random.randperm(3, generator=g)
        random.numpy_generator(g).normal()
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == python_random.getstate()


def test_first_weights_follow_a_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    drawn = []
    for seed in (5, 5, 6, 2**63 - 1):
        with random.seeded_init(seed):
            drawn.append(torch.nn.Linear(3, 2).weight.detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert torch.equal(drawn[0], torch.nn.Linear(3, 2).weight)
    assert torch.equal(torch.get_rng_state(), before)
