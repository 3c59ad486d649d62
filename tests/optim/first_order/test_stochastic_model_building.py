"""Oracles of stochastic model building: its linear system, the length of its steps, and gradient descent where it holds."""

import copy

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import checks
from perturbkit.optim import SMB, model_building_step

P = nn.Parameter


def valley(dtype=torch.float64, scale=1.0):
    w, v = P(torch.tensor([1.5, -0.5], dtype=dtype)), P(torch.tensor([2.0], dtype=dtype))

    def closure():
        w.grad = v.grad = None
        loss = scale * ((w**4).sum() + 10 * (v - w[0]).square().sum() + w[1])
        loss.backward()
        return loss

    return (w, v), closure


def flat(weights):
    return torch.cat([w.detach() for w in weights])


def trained(dtype):
    weights, closure = valley(dtype)
    optimizer = SMB(weights, lr=0.3)
    for _ in range(4):
        optimizer.step(closure)
    return flat(weights)


ONE = torch.ones(2)
EXAMPLE = Example(
    call=lambda generator, dtype: trained(dtype),
    refusals=(
        (lambda: SMB([P(ONE)], lr=0.0), "lr is 0"),
        (lambda: SMB([P(ONE)], eta=1.0), "eta is 1"),
        (lambda: SMB([P(ONE)], sufficient_decrease=-1.0), "sufficient_decrease is -1"),
        (lambda: SMB([P(ONE)], groups="layer"), "groups is 'layer'"),
        (lambda: SMB([P(ONE)]).step(None), "closure is None"),
        (lambda: SMB([P(ONE)]).step(lambda: 1.0, lambda: 1.0), "closure2 is given"),
        (lambda: SMB([P(ONE)], independent_batch=True).step(lambda: 1.0), "closure2 is not given"),
        (lambda: model_building_step(ONE, torch.ones(3), ONE, 0.5), "y"),
        (lambda: model_building_step(ONE, ONE, ONE, 0.0), "eta is 0"),
    ),
)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bent", [1e-3, 1.0, 1e3])
def test_the_step_solves_its_system_and_is_no_longer_than_a_share_of_the_trial(seed, bent):
    gen = torch.Generator().manual_seed(seed)
    g, y = (torch.randn(5, generator=gen, dtype=torch.float64) for _ in range(2))
    y, s, eta = bent * y, -0.7 * g, 0.9
    step = model_building_step(g, y, s, eta)
    twice = s.norm() * (y.norm() + g.norm() / eta) - y @ s
    matrix = twice * torch.eye(5, dtype=torch.float64) + torch.outer(s, y) + torch.outer(y, s)
    torch.testing.assert_close(matrix @ step, -s.square().sum() * g, rtol=1e-8, atol=1e-8)
    assert float(torch.linalg.eigvalsh(matrix)[0]) >= float(s.norm() * g.norm() / eta) * (1 - 1e-9)
    assert step.norm() <= eta * s.norm() * (1 + 1e-12)


def test_the_length_holds_in_single_precision_at_any_curvature():
    gen = torch.Generator().manual_seed(9)
    for bent in (1e-6, 1.0, 1e6):
        g, y = torch.randn(50, generator=gen), bent * torch.randn(50, generator=gen)
        assert model_building_step(g, y, -g, 0.99).norm() <= 0.99 * g.norm() * (1 + 1e-5)


def test_without_curvature_it_is_a_shorter_trial_and_nothing_where_there_is_no_gradient():
    g = torch.tensor([3.0, -4.0])
    torch.testing.assert_close(model_building_step(g, torch.zeros(2), -0.1 * g, 0.5), -0.05 * g)
    assert (model_building_step(torch.zeros(2), g, torch.zeros(2), 0.5) == 0).all()


def test_small_rates_are_gradient_descent():
    (weights, closure), (others, other) = valley(), valley()
    ours, plain = SMB(weights, lr=1e-3), torch.optim.SGD(others, lr=1e-3)
    for _ in range(10):
        ours.step(closure)
        other()
        plain.step()
    assert ours.models_built == 0
    torch.testing.assert_close(flat(weights), flat(others))


@pytest.mark.parametrize("groups", ["tensor", "all"])
def test_a_failed_trial_is_rebuilt_from_both_ends(groups):
    weights, closure = valley()
    before = flat(weights)
    closure()
    g = [w.grad.clone() for w in weights]
    s = [-0.5 * v for v in g]
    with torch.no_grad():
        for w, shift in zip(weights, s, strict=True):
            w.add_(shift)
    closure()
    y = [w.grad - a for w, a in zip(weights, g, strict=True)]
    with torch.no_grad():
        for w, value in zip(weights, before.split([2, 1]), strict=True):
            w.copy_(value)
    optimizer = SMB(weights, lr=0.5, groups=groups)
    optimizer.step(closure)
    assert optimizer.models_built == 1
    if groups == "all":
        want = model_building_step(*(torch.cat(v) for v in (g, y, s)), 0.99)
    else:
        want = torch.cat([model_building_step(*parts, 0.99) for parts in zip(g, y, s, strict=True)])
    torch.testing.assert_close(flat(weights) - before, want)


def test_an_independent_batch_gives_the_model():
    weights, closure = valley()
    before = flat(weights)

    def second():
        for w in weights:
            w.grad = None
        loss = sum((3 * w**2).sum() for w in weights)
        loss.backward()
        return loss

    closure()
    g = [w.grad.clone() for w in weights]
    s = [-0.5 * v for v in g]
    optimizer = SMB(weights, lr=0.5, independent_batch=True)
    optimizer.step(closure, second)
    want = torch.cat([model_building_step(a, 6 * b, b, 0.99) for a, b in zip(g, s, strict=True)])
    torch.testing.assert_close(flat(weights) - before, want)


def test_rates_grow_and_shrink_by_the_trials():
    weights, closure = valley()
    optimizer = SMB(weights, lr=1e-4, autoschedule=True)
    optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.05e-4)
    optimizer.param_groups[0]["lr"] = 100.0
    optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(90)


def test_weights_come_back_when_the_second_evaluation_fails():
    weights, closure = valley()
    before = flat(weights)
    calls = []

    def failing():
        calls.append(1)
        if len(calls) == 2:
            raise checks.ModelError("lost")
        return closure()

    with pytest.raises(checks.ModelError):
        SMB(weights).step(failing)
    assert torch.equal(flat(weights), before)


def test_frozen_parameters_states_and_schedulers():
    (weights, closure), (others, other) = valley(), valley()
    frozen = P(torch.ones(2), requires_grad=False)
    one, two = SMB([*weights, frozen], lr=0.2), SMB([*others, P(torch.ones(2), requires_grad=False)], lr=0.2)
    schedule = torch.optim.lr_scheduler.StepLR(one, 2, 0.5)
    for _ in range(3):
        one.step(closure)
        schedule.step()
    with torch.no_grad():
        for a, b in zip(others, weights, strict=True):
            a.copy_(b)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(3):
        one.step(closure)
        two.step(other)
    assert torch.equal(flat(weights), flat(others))
    assert (frozen == 1).all()


def test_a_trial_that_leaves_the_range_of_numbers_moves_nothing():
    w = nn.Parameter(torch.ones(1))
    optimizer = SMB([w], lr=1e30, autoschedule=True)

    def closure():
        optimizer.zero_grad()
        loss = (w**4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert w.item() == 1.0
    assert optimizer.param_groups[0]["lr"] == pytest.approx(9e29)
    g = torch.tensor([1.0])
    assert model_building_step(g, torch.tensor([torch.inf]), -g, 0.5).item() == 0


def test_half_precision_steps_are_those_of_single():
    g = torch.randn(6, generator=torch.Generator().manual_seed(0)) * 3e-4
    y, s = 0.3 * g.flip(0), -0.5 * g
    half = model_building_step(*(v.half() for v in (g, y, s)), 0.9)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), model_building_step(g, y, s, 0.9), rtol=2e-2, atol=2e-6)
