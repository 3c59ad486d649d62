"""Oracles of the discrete Gaussian mechanism: variance, zCDP computed from its masses, and the guarantee under attack."""

import math

import numpy as np
import pytest
import torch

from _common import Example
from perturbkit.core import checks
from perturbkit.privacy import PrivacyBudget, discrete_gaussian, epsilon_lower_bound, zcdp_epsilon, zcdp_rho

COUNTS = torch.tensor([3, 120, -7, 0])

EXAMPLE = Example(
    call=lambda generator, dtype: discrete_gaussian(COUNTS, rho=0.1, sensitivity=2.0, generator=generator),
    stochastic=True,
    refusals=(
        (lambda: discrete_gaussian(COUNTS, rho=0.0, sensitivity=1), "rho is 0"),
        (lambda: discrete_gaussian(COUNTS, rho=0.1, sensitivity=-1.0), "sensitivity is -1"),
        (lambda: discrete_gaussian(COUNTS / 2, rho=0.1, sensitivity=1.0), "counts has dtype float32"),
        (lambda: discrete_gaussian(COUNTS, rho=0.1, sensitivity=1.0, generator=0.5), "generator is 0.5"),
        (lambda: discrete_gaussian(COUNTS, rho=0.1, sensitivity=1.0, budget=PrivacyBudget(1.0)), "zcdp cost"),
        (
            lambda: discrete_gaussian(COUNTS, rho=1.0, sensitivity=1.0, budget=PrivacyBudget(1.0, 1e-6)),
            "would raise the privacy loss from 0 to",
        ),
    ),
)  # fmt: skip


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("shift", [1, 2])
def test_renyi_divergence_of_the_masses_is_at_most_rho(sigma, shift):
    k = np.arange(-300, 301)
    log_p, log_q = -(k**2) / (2 * sigma**2), -((k - shift) ** 2) / (2 * sigma**2)
    log_z = np.logaddexp.reduce(log_p)
    for order in (1.1, 2.0, 5.5, 20.0):
        divergence = np.logaddexp.reduce(order * log_p - (order - 1) * log_q - log_z) / (order - 1)
        assert divergence <= order * shift**2 / (2 * sigma**2) + 1e-9
    # Equality at whole shifts and orders whose minimum lies on the integers: the constant cannot be better.
    assert np.logaddexp.reduce(2 * log_p - log_q - log_z) == pytest.approx(shift**2 / sigma**2, rel=1e-9)


@pytest.mark.parametrize("rho", [0.02, 0.5])
def test_attack_does_not_exceed_the_converted_epsilon(rho):
    a, b = (
        discrete_gaussian(np.full(30000, v), rho=rho, sensitivity=1.0, generator=v).values for v in (10, 11)
    )
    found = epsilon_lower_bound(a, b, delta=1e-3)
    assert 0.1 * zcdp_epsilon(rho, 1e-3) < found.epsilon <= zcdp_epsilon(rho, 1e-3)


@pytest.mark.parametrize("rho", [0.01, 0.5, 4.0])
def test_variance_is_at_most_that_of_the_continuous_mechanism(rho):
    found = discrete_gaussian(np.zeros(60000, int), rho=rho, sensitivity=1.0, generator=3)
    assert found.scale**2 >= 1 / (2 * rho)
    assert found.scale**2 == pytest.approx(1 / (2 * rho), abs=1 / 1024)
    k = np.arange(-500, 501)
    mass = np.exp(-(k**2) / (2 * found.scale**2))
    exact = (mass * k**2).sum() / mass.sum()
    assert exact <= found.scale**2
    assert found.values.var() == pytest.approx(exact, rel=0.1)


def test_entries_are_independent_and_the_secure_source_works():
    found = discrete_gaussian(np.zeros((4000, 2), int), rho=0.05, sensitivity=math.sqrt(2)).values
    assert abs(np.corrcoef(found.T)[0, 1]) < 5 / math.sqrt(4000)
    assert found.std() == pytest.approx(math.sqrt(20), rel=0.06)


def test_budget():
    budget = PrivacyBudget(1.0, 1e-6)
    affordable = int(zcdp_rho(1.0, 1e-6) / 0.005)
    for _ in range(affordable):
        discrete_gaussian(COUNTS, rho=0.005, sensitivity=1.0, generator=0, budget=budget)
    with pytest.raises(checks.ArgumentError, match="would raise"):
        discrete_gaussian(COUNTS, rho=0.005, sensitivity=1.0, generator=0, budget=budget)
    assert affordable > 3
