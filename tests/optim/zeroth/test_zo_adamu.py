"""Oracles of ZO-AdaMU: plain zeroth-order descent as a limit, the mean of its steps, its schedule and its memory."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import checks, seeded_direction
from perturbkit.core.random import mixed_seed
from perturbkit.optim import MeZO, ZOAdaMU

P = nn.Parameter
NEVER = (1.0, 1.0)


def bowl(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(6, 6, generator=g, dtype=dtype)
    w = P(torch.randn(6, generator=g, dtype=dtype))
    return w, lambda: (a @ w).square().sum() / 2


def trained(dtype):
    w, loss = bowl(dtype)
    optimizer = ZOAdaMU([w], lr=0.01, total_steps=6, warmup=(0.2, 0.8))
    for _ in range(5):
        optimizer.step(loss)
    return w.detach()


EXAMPLE = Example(
    call=lambda generator, dtype: trained(dtype),
    refusals=(
        (lambda: ZOAdaMU([P(torch.ones(1))], radius=0.0), "radius is 0"),
        (lambda: ZOAdaMU([P(torch.ones(1))], lr=-1.0), "lr is -1"),
        (lambda: ZOAdaMU([P(torch.ones(1))], total_steps=0), "total_steps is 0"),
        (lambda: ZOAdaMU([P(torch.ones(1))], warmup=0.1), "warmup is 0.1"),
        (lambda: ZOAdaMU([P(torch.ones(1))], warmup=(0.5, 0.1)), "warmup is"),
        (lambda: ZOAdaMU([P(torch.ones(1))], weight_decay=-1.0), "weight_decay is -1"),
        (lambda: ZOAdaMU([P(torch.ones(1))]).step(None), "closure is None"),
        (lambda: MeZO([P(torch.ones(1))], radius=0.0), "radius is 0"),
        (lambda: MeZO([P(torch.ones(1))], weight_decay=-1.0), "weight_decay is -1"),
        (lambda: MeZO([P(torch.ones(1))], seed=-1), "seed is -1"),
        (lambda: MeZO([{"params": [P(torch.ones(1))], "weight_decay": -1.0}]), "weight_decay is -1"),
    ),
)


def test_plain_descent_written_out():
    w, loss = bowl(seed=1)
    start = w.detach().clone()
    z = seeded_direction([w], mixed_seed(3, 0, 0))
    g = torch.autograd.grad(loss(), w)[0]
    MeZO([w], lr=0.1, weight_decay=0.2, seed=3).step(loss)
    torch.testing.assert_close(w.detach(), start * (1 - 0.02) - 0.1 * (g @ z) * z)


def test_without_annealing_and_normalising_it_is_plain_descent_bit_for_bit():
    (w, loss), (v, other) = bowl(), bowl()
    ours = ZOAdaMU([w], lr=0.02, warmup=NEVER, normalise=False, seed=5)
    plain = MeZO([v], lr=0.02, seed=5)
    for _ in range(6):
        assert ours.step(loss) == plain.step(other)
    assert torch.equal(w, v)


def test_the_weights_follow_their_schedules():
    optimizer = ZOAdaMU([P(torch.ones(1))], total_steps=1000, warmup=(0.1, 0.5))
    assert optimizer.weights_of(100) == (1.0, 1.0, 1.0)
    assert ZOAdaMU([P(torch.ones(1))], total_steps=10, warmup=NEVER).weights_of(25) == (1.0, 1.0, 1.0)
    a, b1, b2 = optimizer.weights_of(150)
    assert a == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.05)))
    assert b1 == pytest.approx(0.5)
    assert b2 == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.05 / 1.5)))
    assert optimizer.weights_of(300)[1] == 0.1
    assert optimizer.weights_of(500) == optimizer.weights_of(900)
    falling = [optimizer.weights_of(t) for t in range(0, 1000, 20)]
    assert all(x >= y for one, two in pairwise(falling) for x, y in zip(one, two, strict=True))


def test_the_mean_step_on_a_linear_loss_is_the_second_moment_times_the_gradient():
    g = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    n, total = 4000, torch.zeros(4, dtype=torch.float64)
    for seed in range(n):
        w = P(torch.zeros(4, dtype=torch.float64))
        optimizer = ZOAdaMU([w], lr=1.0, total_steps=100, warmup=(0.0, 1.0), normalise=False, seed=seed)
        optimizer.state["step"] = 40
        optimizer.step(lambda w=w: g @ w)
        total -= w.detach()
    a, b1, _ = optimizer.weights_of(40)
    second = b1**2 * a + (1 - b1) ** 2 * (1 - a)
    spread = second * (4 + 1) ** 0.5 * g.norm() / n**0.5
    assert (total / n - second * g).norm() < 3.5 * spread


def test_a_step_with_history_written_out():
    w, loss = bowl(seed=2)
    optimizer = ZOAdaMU(
        [w], lr=0.01, radius=1e-3, total_steps=100, warmup=(0.0, 1.0), weight_decay=0.3, seed=2
    )
    optimizer.step(loss)
    history, start = optimizer.state[w]["history"].clone(), w.detach().clone()
    optimizer.state["step"] = 30
    optimizer.step(loss)
    a, b1, b2 = optimizer.weights_of(30)
    z0, e = (seeded_direction([w], mixed_seed(2, 30, i)) for i in (0, 1))
    z0, z1 = a**0.5 * z0, history + (1 - a) ** 0.5 * e
    m, v = b1 * z0 + (1 - b1) * z1, b2 * z0**2 + (1 - b2) * z1**2
    with torch.no_grad():
        after = w.clone()
        w.copy_(start)
    c = torch.autograd.grad(loss(), w)[0] @ m
    torch.testing.assert_close(
        after, start * (1 - 0.003) - 0.01 * c * m / (v + 1e-8).sqrt(), rtol=1e-6, atol=1e-8
    )
    torch.testing.assert_close(optimizer.state[w]["history"], m * c.sign(), rtol=1e-9, atol=1e-12)


def test_nothing_moves_at_rate_zero_and_frozen_parameters_never():
    w, loss = bowl()
    frozen = P(torch.ones(2, dtype=torch.float64), requires_grad=False)
    before = w.detach().clone()
    optimizer = ZOAdaMU(
        [{"params": [w], "lr": 0.0}, {"params": [frozen]}], lr=1.0, total_steps=4, warmup=(0.0, 1.0)
    )
    for _ in range(4):
        optimizer.step(loss)
    assert torch.equal(w, before)
    assert (frozen == 1).all()


def test_training_goes_on_bit_for_bit_from_a_state_dict():
    (w, loss), (v, other) = bowl(), bowl()
    one, two = (ZOAdaMU([p], lr=0.02, total_steps=10) for p in (w, v))
    schedule = torch.optim.lr_scheduler.StepLR(one, 2, 0.5)
    for _ in range(4):
        one.step(loss)
        schedule.step()
    with torch.no_grad():
        v.copy_(w)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(4):
        one.step(loss)
        two.step(other)
    assert torch.equal(w, v)


def test_half_precision_weights_are_trained():
    w = P(torch.full((3,), 2.0, dtype=torch.bfloat16))
    optimizer = ZOAdaMU([w], lr=0.05, total_steps=100, radius=0.05)
    for _ in range(100):
        optimizer.step(lambda: w.float().square().sum())
    assert w.dtype == torch.bfloat16
    assert float(w.detach().float().abs().max()) < 1


def test_a_loss_that_is_not_finite_is_told_before_the_weights_move():
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(checks.ModelError, match="the losses at the two points are nan"):
        ZOAdaMU([w]).step(lambda: w.sum() * math.nan)
    assert (w == 1).all()
