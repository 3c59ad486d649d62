"""Oracles of m-NGP: bounded sensitivity, clipped descent without noise, the Gaussian curve, and a stationary variance."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from _common import Example
from perturbkit.core import checks
from perturbkit.privacy import (
    NormalizedGradientPerturbation,
    epsilon_lower_bound,
    excess_risk_bound,
    gaussian_delta,
    gaussian_sigma,
    private_erm,
)

F64 = torch.float64


def rows(n=40, p=3, seed=0, dtype=F64):
    x = torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x, (x[:, 0] > 0).to(dtype) * 2 - 1


def logistic(w, x, y):
    return torch.nn.functional.softplus(-y * (x @ w))


def fitted(generator, dtype):
    return private_erm(logistic, *rows(dtype=dtype), epsilon=1.0, delta=1e-5, n_steps=3, generator=generator)


def made(**options):
    given = {"epsilon": 1.0, "delta": 1e-5, "n_samples": 2, "n_steps": 1, "lr": 1.0} | options
    return NormalizedGradientPerturbation([torch.zeros(3, requires_grad=True)], **given)


X, Y = rows()

EXAMPLE = Example(
    call=fitted,
    stochastic=True,
    refusals=(
        (lambda: made(epsilon=0.0), "epsilon is 0"),
        (lambda: made(delta=1.0), "delta is 1"),
        (lambda: made(n_samples=0), "n_samples is 0"),
        (lambda: made(n_steps=0), "n_steps is 0"),
        (lambda: made(lr=0.0), "lr is 0"),
        (lambda: made(bound=-1.0), "bound is -1"),
        (lambda: made(neighbours="swap"), "neighbours is 'swap'"),
        (lambda: made(generator="a"), "generator is 'a'"),
        (lambda: made().step([torch.zeros(3, 3)]), r"shapes \[\(3, 3\)\]"),
        (lambda: made().step([]), r"shapes \[\]"),
        (lambda: private_erm(logistic, X, Y[:3], epsilon=1.0, delta=1e-5), "y has shape"),
        (lambda: private_erm(logistic, X * torch.nan, Y, epsilon=1.0, delta=1e-5), "X holds"),
        (lambda: private_erm(logistic, X, Y, epsilon=1.0, delta=1e-5, initial=X), "initial has shape"),
        (lambda: gaussian_sigma(1.0, 1e-5, 0.0), "sensitivity is 0"),
        (lambda: gaussian_sigma(-1.0, 1e-5), "epsilon is -1"),
        (lambda: gaussian_sigma(1.0, 1e-5, 1.0, 0), "n_compositions is 0"),
        (lambda: gaussian_delta(1.0, 0.0), "mu is 0"),
        (lambda: excess_risk_bound(10, 0, 1.0), "p is 0"),
        (lambda: excess_risk_bound(10, 2, 1.0, alpha=0.0), "alpha is 0"),
    ),
)


def moved(gradients, bound=1.0, **options):
    """Minus the step of size one without noise: the mean of the normalised gradients."""
    w = torch.zeros(gradients.shape[1], dtype=F64, requires_grad=True)
    given = {"epsilon": math.inf, "delta": 0.1, "n_samples": len(gradients), "n_steps": 1, "lr": 1.0}
    NormalizedGradientPerturbation([w], **(given | options), bound=bound).step([gradients])
    return -w.detach()


@pytest.mark.parametrize("bound", [0.3, 1.0, 5.0])
def test_sensitivity_over_neighbours_is_at_most_twice_the_bound_over_n(bound):
    g = torch.Generator().manual_seed(1)
    n, worst = 5, 0.0
    for _ in range(300):
        data = torch.randn(n, 2, generator=g, dtype=F64) * torch.rand(n, 1, generator=g, dtype=F64) * 30
        other = data.clone()
        other[2] = -data[2] * torch.rand(1, generator=g, dtype=F64) * 10
        worst = max(worst, float((moved(data, bound) - moved(other, bound)).norm()))
        assert float(moved(data[:1], bound).norm()) <= bound * (1 + 1e-12)
        removed = torch.cat([data[:2], torch.zeros(1, 2, dtype=F64), data[3:]])
        assert float((moved(data, bound) - moved(removed, bound)).norm()) <= bound / n * (1 + 1e-12)
    assert 1.9 * bound / n < worst <= 2 * bound / n * (1 + 1e-12)


def test_without_noise_it_is_clipped_descent_bit_for_bit():
    x, y = rows(60, 4, 2)
    found = private_erm(logistic, x, y, epsilon=math.inf, delta=1e-5, n_steps=7, lr=0.5, bound=0.4)
    w = torch.zeros(4, dtype=F64)
    for _ in range(7):
        g = torch.func.vmap(torch.func.grad(logistic), in_dims=(None, 0, 0))(w, x, y)
        scale = 1 / (g.square().sum(1).sqrt() / 0.4).clamp(min=1)
        w = w - 0.5 * (torch.tensordot(scale, g, dims=([0], [0])) / 60)
    assert torch.equal(found.w, w)
    again = private_erm(
        logistic, x, y, epsilon=math.inf, delta=1e-5, n_steps=7, lr=0.5, bound=0.4, generator=9
    )
    assert torch.equal(found.w, again.w)
    assert found.sigma == 0


def test_norm_is_over_all_parameters_together():
    a, b = torch.zeros(2, 2, dtype=F64, requires_grad=True), torch.zeros(1, dtype=F64, requires_grad=True)
    opt = NormalizedGradientPerturbation([a, b], math.inf, 0.1, n_samples=1, n_steps=1, lr=1.0)
    opt.step([torch.full((1, 2, 2), 2.0, dtype=F64), torch.full((1, 1), 3.0, dtype=F64)])
    torch.testing.assert_close(a.detach(), torch.full((2, 2), -0.4, dtype=F64))
    torch.testing.assert_close(b.detach(), torch.tensor([-0.6], dtype=F64))


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-8])
def test_sigma_solves_the_analytic_gaussian_condition(epsilon, delta):
    mu = 1 / gaussian_sigma(epsilon, delta)
    exact = norm.cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * norm.cdf(-epsilon / mu - mu / 2)
    assert exact == pytest.approx(delta, rel=1e-5)
    assert gaussian_delta(epsilon, mu) <= delta
    # Releases add up in the square root, and sigma scales with the sensitivity.
    assert gaussian_sigma(epsilon, delta, 3.0, 25) == pytest.approx(15 / mu, rel=1e-9)


def test_extreme_privacy_parameters():
    for epsilon, delta in ((1e-3, 1e-12), (50.0, 1e-12), (1e-3, 0.5), (200.0, 1e-300)):
        sigma = gaussian_sigma(epsilon, delta)
        assert gaussian_delta(epsilon, 1 / sigma) == pytest.approx(delta, rel=1e-4)
    assert gaussian_delta(0.0, 2.0) == pytest.approx(2 * norm.cdf(1) - 1, rel=1e-12)


@pytest.mark.parametrize("n_compositions", [1, 30])
def test_agrees_with_dp_accounting(n_compositions):
    dp = pytest.importorskip("dp_accounting", reason="dp-accounting is the extra privacy")
    from dp_accounting import pld, rdp

    sigma = gaussian_sigma(1.0, 1e-5, 1.0, n_compositions)
    tight, loose = pld.PLDAccountant(), rdp.RdpAccountant()
    for accountant in (tight, loose):
        accountant.compose(dp.GaussianDpEvent(sigma), n_compositions)
    assert tight.get_epsilon(1e-5) == pytest.approx(1.0, abs=2e-3)
    assert 1.0 <= loose.get_epsilon(1e-5) < 1.25


def test_stationary_variance_of_a_quadratic_where_nothing_is_clipped():
    d, lam, lr, steps, n = 400, 2.0, 0.3, 40, 10**6
    sigma = gaussian_sigma(1.0, 1e-5, 2 * 1e3 / n, steps)
    found = []
    for seed in range(30):
        w = torch.zeros(d, dtype=F64, requires_grad=True)
        opt = NormalizedGradientPerturbation([w], 1.0, 1e-5, n, steps, lr, bound=1e3, generator=seed)
        opt.n_samples = 1  # one row stands for a million equal ones
        for _ in range(steps):
            opt.step([lam * w.detach()[None]])
        assert opt.sigma == sigma
        assert float((lam * w.detach()).norm()) < 1e3
        found.append(float(w.detach().square().mean()))
    assert np.mean(found) == pytest.approx(lr * sigma**2 / (lam * (2 - lr * lam)), rel=0.04)


@pytest.mark.parametrize("neighbours", ["replace", "add-remove"])
def test_attack_does_not_exceed_the_stated_epsilon(neighbours):
    epsilon, delta, steps, runs = 1.0, 0.01, 2, 1000
    other = -9.0 if neighbours == "replace" else 0.0
    finals = []
    for j, gradient in enumerate((9.0, other)):
        grads, final = torch.tensor([[gradient], [0.3]], dtype=F64), []
        source = torch.Generator().manual_seed(j)
        for _ in range(runs):
            w = torch.zeros(1, dtype=F64, requires_grad=True)
            opt = NormalizedGradientPerturbation(
                [w], epsilon, delta, 2, steps, 1.0, neighbours=neighbours, generator=source
            )
            for _ in range(steps):
                opt.step([grads])
            final.append(w.item())
        finals.append(final)
    found = epsilon_lower_bound(*finals, delta=delta)
    assert 0.1 * epsilon < found.epsilon <= epsilon


def test_a_spent_budget_is_refused_and_nothing_changes():
    w = torch.zeros(3, requires_grad=True)
    opt = NormalizedGradientPerturbation([w], 1.0, 1e-5, n_samples=2, n_steps=1, lr=1.0, generator=0)
    opt.step([torch.zeros(2, 3)])
    before = w.detach().clone()
    with pytest.raises(checks.ArgumentError, match="steps_left is 0"):
        opt.step([torch.zeros(2, 3)])
    assert torch.equal(before, w.detach())


def test_noise_is_secure_by_default_and_has_its_scale():
    x, y = rows(50, 2000, 4)
    a, b = (
        private_erm(lambda w, x, y: 0 * (w @ x), x, y, epsilon=1.0, delta=1e-5, n_steps=1) for _ in range(2)
    )
    assert not torch.equal(a.w, b.w)
    assert float(a.w.std()) == pytest.approx(gaussian_sigma(1.0, 1e-5, 2 / 50), rel=0.08)


def test_rates():
    assert excess_risk_bound(100, 4, 0.5, constant=3.0) == pytest.approx(3 * 2 / 50)
    assert excess_risk_bound(10**6, 4, 0.5, alpha=0.5, normalized=False) == pytest.approx(10**-1.5)
    assert excess_risk_bound(10**6, 4, 0.5, alpha=0.5) == pytest.approx(2 / 5e5)
