"""Oracles of the budget: closed forms, dp-accounting, the exact Gaussian curve, and refusals that spend nothing."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import log_ndtr

from _common import Example
from perturbkit.core import checks
from perturbkit.privacy import PrivacyBudget, zcdp_epsilon, zcdp_rho


def spent(generator, dtype):
    budget = PrivacyBudget(2.0, 1e-6)
    budget.spend_gaussian(20.0, 1.0, count=3)
    budget.spend(epsilon=0.1)
    return {"spent": budget.epsilon_spent, "left": budget.remaining, "n": budget.n_releases}


EXAMPLE = Example(
    call=spent,
    refusals=(
        (lambda: PrivacyBudget(0.0), "epsilon is 0"),
        (lambda: PrivacyBudget(1.0, 1.0), "delta is 1"),
        (lambda: PrivacyBudget(1.0, -0.1), "delta is -0.1"),
        (lambda: PrivacyBudget(1.0, 0.1, accountant="moments"), "accountant is 'moments'"),
        (lambda: PrivacyBudget(1.0, accountant="pld"), "with delta 0"),
        (lambda: PrivacyBudget(1.0).spend(epsilon=1.1), "from 0 to 1.1; allowed: 1"),
        (lambda: PrivacyBudget(1.0).spend(rho=0.01), "zcdp cost"),
        (lambda: PrivacyBudget(1.0).spend(), "epsilon is None and rho is None"),
        (lambda: PrivacyBudget(1.0, 0.1).spend(epsilon=0.1, rho=0.1), "exactly one"),
        (lambda: PrivacyBudget(1.0).spend(epsilon=0.1, count=0), "count is 0"),
        (lambda: PrivacyBudget(1.0).spend(epsilon=-0.1), "epsilon is -0.1"),
        (lambda: PrivacyBudget(1.0, 0.1).spend_gaussian(0.0, 1.0), "sigma is 0"),
        (lambda: PrivacyBudget(1.0, 0.1).spend_laplace(1.0, 0.0), "sensitivity is 0"),
        (lambda: zcdp_epsilon(0.1, 0.0), "delta is 0"),
        (lambda: zcdp_rho(-1.0, 0.1), "epsilon is -1"),
    ),
)


def gaussian_epsilon(mu, delta):
    """The exact privacy curve of the Gaussian mechanism."""

    def excess(e):
        return math.exp(log_ndtr(-e / mu + mu / 2)) - math.exp(e + log_ndtr(-e / mu - mu / 2)) - delta

    return brentq(excess, 0, 60)


def test_pure_losses_are_summed():
    budget = PrivacyBudget(1.0)
    for _ in range(10):
        budget.spend(epsilon=0.1)
    assert budget.epsilon_spent == pytest.approx(1.0)
    assert budget.remaining == pytest.approx(0, abs=1e-12)
    with pytest.raises(checks.ArgumentError, match="cannot be refilled"):
        budget.spend_laplace(1e6, 1.0)
    assert budget.n_releases == 10


def test_refused_releases_cost_nothing():
    budget = PrivacyBudget(1.0, 1e-5)
    budget.spend_gaussian(10.0, 1.0)
    before = budget.epsilon_spent
    with pytest.raises(checks.ArgumentError):
        budget.spend_gaussian(0.1, 1.0)
    assert (budget.epsilon_spent, budget.n_releases) == (before, 1)


@pytest.mark.parametrize("rho", [1e-4, 0.02, 0.5, 8.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-3, 0.3])
def test_conversion_lies_between_the_exact_gaussian_and_the_classic_bound(rho, delta):
    exact = gaussian_epsilon(math.sqrt(2 * rho), delta) if rho > 0.01 and delta < 0.1 else 0.0
    found = zcdp_epsilon(rho, delta)
    assert exact <= found <= rho + 2 * math.sqrt(rho * math.log(1 / delta))
    orders = 1 + np.geomspace(1e-3, 1e6, 20001)
    grid = orders * rho + (math.log(1 / delta) - np.log(orders)) / (orders - 1) + np.log1p(-1 / orders)
    assert found == pytest.approx(max(grid.min(), 0), rel=1e-3, abs=1e-5)
    if found > 0:
        assert zcdp_epsilon(zcdp_rho(found, delta), delta) == pytest.approx(found, rel=1e-6)
        assert zcdp_epsilon(zcdp_rho(found, delta), delta) <= found


def test_zcdp_budget_adds_rho():
    budget = PrivacyBudget(3.0, 1e-6)
    budget.spend(rho=0.01, count=2)
    budget.spend_gaussian(5.0, 1.0)
    budget.spend(epsilon=0.2)
    assert budget.epsilon_spent == pytest.approx(zcdp_epsilon(0.02 + 0.02 + 0.02, 1e-6))
    pure = PrivacyBudget(3.0, 1e-6)
    pure.spend(epsilon=0.2)
    assert pure.epsilon_spent == 0.2


def test_units_cancel():
    a, b = PrivacyBudget(3.0, 1e-6), PrivacyBudget(3.0, 1e-6)
    a.spend_gaussian(5.0, 1.0)
    b.spend_gaussian(5000.0, 1000.0)
    assert a.epsilon_spent == pytest.approx(b.epsilon_spent)


@pytest.mark.parametrize("count", [1, 40])
def test_against_dp_accounting(count):
    pytest.importorskip("dp_accounting", reason="dp-accounting is the extra privacy")
    zcdp, rdp, pld = (PrivacyBudget(50.0, 1e-5, accountant=a) for a in ("zcdp", "rdp", "pld"))
    for budget in (zcdp, rdp, pld):
        budget.spend_gaussian(8.0, 1.0, count=count)
    exact = gaussian_epsilon(math.sqrt(count) / 8, 1e-5)
    assert pld.epsilon_spent == pytest.approx(exact, rel=1e-3)
    assert exact <= rdp.epsilon_spent * (1 + 1e-9)
    # The library has a grid of orders; the built-in conversion minimises over all of them.
    assert exact <= zcdp.epsilon_spent <= rdp.epsilon_spent * (1 + 1e-6)


def test_pure_losses_in_the_tight_accountant():
    pytest.importorskip("dp_accounting", reason="dp-accounting is the extra privacy")
    one = PrivacyBudget(50.0, 1e-9, accountant="pld")
    one.spend(epsilon=0.5)
    assert one.epsilon_spent == pytest.approx(0.5, rel=1e-3)
    many = PrivacyBudget(50.0, 1e-6, accountant="pld")
    many.spend(epsilon=0.05, count=100)
    assert many.epsilon_spent < min(5.0, zcdp_epsilon(100 * 0.05**2 / 2, 1e-6))
    with pytest.raises(checks.ArgumentError, match="zcdp cost"):
        many.spend(rho=0.1)
