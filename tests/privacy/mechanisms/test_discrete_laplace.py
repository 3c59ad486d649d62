"""Oracles of the discrete Laplace mechanism: its distribution, its guarantee under attack, and its optimal error."""

import math

import numpy as np
import pytest
import torch

from _common import Example
from perturbkit.core import checks
from perturbkit.privacy import PrivacyBudget, discrete_laplace, epsilon_lower_bound

COUNTS = torch.tensor([[3, 120], [-7, 0]])

EXAMPLE = Example(
    call=lambda generator, dtype: discrete_laplace(COUNTS, epsilon=0.5, sensitivity=2, generator=generator),
    stochastic=True,
    refusals=(
        (lambda: discrete_laplace(COUNTS, epsilon=0.0, sensitivity=1), "epsilon is 0"),
        (lambda: discrete_laplace(COUNTS, epsilon=math.inf, sensitivity=1), "epsilon is inf"),
        (lambda: discrete_laplace(COUNTS, epsilon=1.0, sensitivity=0), "sensitivity is 0"),
        (lambda: discrete_laplace(COUNTS, epsilon=1.0, sensitivity=1.5), "sensitivity is 1.5"),
        (lambda: discrete_laplace(COUNTS.double(), epsilon=1.0, sensitivity=1), "counts has dtype float64"),
        (lambda: discrete_laplace(np.zeros(0, int), epsilon=1.0, sensitivity=1), "0 entries"),
        (lambda: discrete_laplace(COUNTS, epsilon=1.0, sensitivity=1, generator="x"), "generator is 'x'"),
        (lambda: discrete_laplace(COUNTS, epsilon=1.0, sensitivity=1, budget=PrivacyBudget(0.5)), "would raise"),
    ),
)  # fmt: skip


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("generator", [None, 0])
def test_attack_does_not_exceed_the_stated_epsilon(epsilon, generator):
    a, b = (
        discrete_laplace(np.full(30000, v), epsilon=epsilon, sensitivity=1, generator=generator).values
        for v in (10, 11)
    )
    if generator is not None:
        # The same seed would give both inputs the same noise; the second gets its own.
        b = discrete_laplace(np.full(30000, 11), epsilon=epsilon, sensitivity=1, generator=1).values
    found = epsilon_lower_bound(a, b)
    assert 0.6 * epsilon < found.epsilon <= epsilon


def test_privacy_loss_is_exactly_sensitivity_over_scale():
    for epsilon in (0.1, 0.7, 1 / 3, 5.0):
        for sensitivity in (1, 3):
            scale = discrete_laplace([0], epsilon=epsilon, sensitivity=sensitivity, generator=0).scale
            assert sensitivity / scale <= epsilon * (1 + 1e-12)
            # Rounding costs at most one step of 1/1024 in the scale.
            assert scale - sensitivity / epsilon <= 1 / 1024 + 1e-9


def test_error_against_theory():
    s = 2.0
    noise = discrete_laplace(np.zeros(100000, int), epsilon=0.5, sensitivity=1, generator=2).values
    # Mean absolute value 2 r / (1 - r^2) and variance 2 r / (1 - r)^2, r = exp(-1/s).
    r = math.exp(-1 / s)
    assert np.abs(noise).mean() == pytest.approx(2 * r / (1 - r**2), rel=0.02)
    assert noise.var() == pytest.approx(2 * r / (1 - r) ** 2, rel=0.03)
    assert abs(noise.mean()) < 4 * noise.std() / math.sqrt(len(noise))


def test_result_and_kinds_of_input():
    found = discrete_laplace(COUNTS, epsilon=0.5, sensitivity=1, generator=0)
    assert isinstance(found.values, torch.Tensor)
    assert found.values.shape == COUNTS.shape
    assert found.values.dtype == torch.int64
    assert (found.epsilon, found.rho) == (0.5, 0.125)
    scalar = discrete_laplace(7, epsilon=50.0, sensitivity=1, generator=0)
    assert scalar.values.shape == ()
    assert abs(int(scalar.values) - 7) <= 2


def test_budget_is_charged_before_the_draw_and_kept_when_refused():
    budget = PrivacyBudget(1.0)
    generator = torch.Generator().manual_seed(0)
    discrete_laplace(COUNTS, epsilon=0.6, sensitivity=1, generator=generator, budget=budget)
    state = generator.get_state()
    with pytest.raises(checks.ArgumentError, match="would raise"):
        discrete_laplace(COUNTS, epsilon=0.6, sensitivity=1, generator=generator, budget=budget)
    assert torch.equal(state, generator.get_state())
    assert budget.epsilon_spent == 0.6
    with pytest.raises(checks.ArgumentTypeError):
        discrete_laplace(1.5, epsilon=0.1, sensitivity=1, budget=budget)
    assert budget.n_releases == 1
