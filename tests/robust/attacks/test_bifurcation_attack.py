"""Oracles of the bifurcation attack: linear policies, the loss by hand, masks, limits, and detectors on known series."""

import numpy as np
import pytest
import torch

from _common import Example
from perturbkit.core import Ball, around
from perturbkit.robust import (
    BifurcationLayer,
    bifurcation_attack,
    group_difference_logits,
    stealth_report,
)


def _policy(d=6, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(d, generator=g, dtype=dtype)
    return w, lambda o: 0.3 * o @ w.to(o) + 0.1


def _x(n=20, d=6, seed=1, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _net():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


EXAMPLE = Example(
    model=_net,
    with_model=lambda model, generator, dtype: bifurcation_attack(
        model.to(dtype), _x(4, dtype=dtype), Ball("linf", 0.1), n_steps=4, generator=generator
    ),
    dtypes=(torch.float32,),
    stochastic=True,
    refusals=(
        (lambda: BifurcationLayer(torch.tensor([1.0])), "centres has 1"),
        (lambda: BifurcationLayer(torch.tensor([1.0, 2.0]), 0.0), "temperature"),
        (lambda: group_difference_logits(torch.ones(2, 3), torch.ones(3), torch.ones(2)), "one group only"),
        (lambda: group_difference_logits(torch.ones(2, 3), torch.ones(2), torch.ones(2)), "groups has shape"),
        (lambda: bifurcation_attack(_policy()[1], _x(), "linf"), "perturbation is a str"),
        (lambda: bifurcation_attack(lambda o: o, _x(), Ball("linf", 0.1)), "the policy answers shape"),
        (lambda: bifurcation_attack(_policy()[1], _x(), Ball("linf", 0.1), action_range=(1.0, 1.0)), "action_range"),
        (lambda: bifurcation_attack(_policy()[1], _x(), Ball("linf", 0.1), n_centres=1), "n_centres is 1"),
        (
            lambda: bifurcation_attack(_policy()[1], _x(), Ball("linf", 0.1), feature_mask=torch.ones(4)),
            "feature_mask has shape",
        ),
        (lambda: stealth_report(_x(), _x(19)), "perturbed"),
        (lambda: stealth_report(_x(), _x(), n_lags=20), "n_lags is 20"),
    ),
)  # fmt: skip


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_a_linear_policy_is_flipped_at_the_exact_distance(norm, dual):
    w, policy = _policy()
    x = _x()
    needed = policy(x).abs() / (0.3 * torch.linalg.vector_norm(w, ord=dual))
    for factor, flips in ((1.03, True), (0.97, False)):
        found = bifurcation_attack(policy, x, Ball(norm, factor * needed), n_steps=80, generator=0)
        assert bool((found.success == flips).all())
        assert bool((found.radius <= factor * needed + 1e-9).all())
    torch.testing.assert_close(found.clean_action, policy(x))
    torch.testing.assert_close(found.action, policy(found.x))


def test_beyond_the_middle_it_goes_on():
    w, policy = _policy()
    x = _x()
    found = bifurcation_attack(policy, x, Ball("linf", 0.5), n_steps=60, generator=0)
    furthest = policy(x) - torch.sign(policy(x)) * 0.3 * 0.5 * w.abs().sum()
    # The far group's outermost centre is at the end of the range; a point beyond it is no better.
    reached = torch.where(
        policy(x) > 0,
        found.action <= furthest.clamp_min(-1) + 0.15,
        found.action >= furthest.clamp_max(1) - 0.15,
    )
    assert bool(reached.all())


def test_no_room_leaves_observations_alone():
    _, policy = _policy()
    found = bifurcation_attack(policy, _x(), Ball("linf", 0.0), n_steps=3, generator=0)
    assert torch.equal(found.x, _x())
    assert not bool(found.success.any())
    assert bool((found.radius == 0).all())


def test_features_that_cannot_be_written_stay():
    _, policy = _policy()
    mask = torch.tensor([1, 0, 1, 0, 1, 1])
    inside = around(_x(), "linf", 0.4, (-1.0, 1.0)) if bool((_x().abs() <= 1).all()) else Ball("linf", 0.4)
    found = bifurcation_attack(policy, _x(), inside, feature_mask=mask, generator=0)
    assert bool(((found.x - _x())[:, mask == 0] == 0).all())
    assert bool(((found.x - _x())[:, mask == 1] != 0).any())


def test_observations_stay_in_their_range():
    _, policy = _policy()
    x = _x().clamp(-0.9, 0.9)
    found = bifurcation_attack(policy, x, around(x, "linf", 0.4, (-1.0, 1.0)), generator=0)
    assert float(found.x.abs().max()) <= 1 + 1e-9


def test_a_wanted_half_is_reached_or_kept():
    w, policy = _policy()
    up = torch.ones(20, dtype=torch.bool)
    reachable = policy(_x()) + 0.3 * w.abs().sum() > 0.02
    assert int(reachable.sum()) > 15
    found = bifurcation_attack(policy, _x(), Ball("linf", 1.0), target_group=up, generator=0)
    assert bool((found.action > 0)[reachable].all())
    assert torch.equal(found.success, found.action > 0)


def test_two_classes_give_a_monotone_loss():
    layer, groups = BifurcationLayer(torch.tensor([-1.0, 1.0]), 0.5), torch.tensor([False, True])
    action = torch.linspace(-2, 2, 50)
    lead = group_difference_logits(layer(action), groups, torch.zeros(50, dtype=torch.bool))
    torch.testing.assert_close(lead, 4 * action / 0.5)
    back = group_difference_logits(layer(action), groups, torch.ones(50, dtype=torch.bool))
    torch.testing.assert_close(back, -lead)


def test_the_divisor_has_no_gradient_and_keeps_the_sign():
    layer = BifurcationLayer(torch.linspace(-1, 1, 6, dtype=torch.float64))
    groups = layer.get_buffer("centres") > 0
    action = torch.linspace(-0.95, 0.95, 40, dtype=torch.float64, requires_grad=True)
    current = torch.zeros(40, dtype=torch.bool)
    plain = group_difference_logits(layer(action), groups, current)
    divided = group_difference_logits(layer(action), groups, current, normalize=True)
    z = layer(action.detach()).sort(1, descending=True).values
    torch.testing.assert_close(divided * (z[:, 0] - z[:, 2] + 1e-12), plain)
    (a,) = torch.autograd.grad(plain.sum(), action)
    action = action.detach().requires_grad_()
    (b,) = torch.autograd.grad(
        group_difference_logits(layer(action), groups, current, normalize=True).sum(), action
    )
    assert bool((torch.sign(a) == torch.sign(b)).all())


def test_detectors_on_known_series():
    g = torch.Generator().manual_seed(3)
    clean = torch.randn(400, 2, generator=g, dtype=torch.float64)
    shifted = clean.clone()
    shifted[:, 1] += 1.0
    found = stealth_report(clean, shifted)
    assert found.ks[0] == 0
    assert found.ks[1] == pytest.approx(0.38, abs=0.06)  # 2 Phi(1/2) - 1
    assert found.p_value[1] < 1e-6
    assert found.mmd > 5 * stealth_report(clean, clean + 0.01).mmd
    np.testing.assert_allclose(found.autocorrelation, 0, atol=1e-12)  # a shift is not seen in time
    wave = torch.sin(torch.arange(400, dtype=torch.float64))[:, None] * torch.ones(1, 2)
    assert stealth_report(clean, wave).autocorrelation.min() > 0.5
