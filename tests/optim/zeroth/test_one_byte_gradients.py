"""Oracles of one-byte gradients: the code, simultaneous perturbation written out, and real processes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from _common import Example
from _workers import (
    one_byte_join_and_drop,
    one_byte_nan_and_batches,
    one_byte_problem,
    one_byte_run,
)
from perturbkit.core import checks, seeded_direction
from perturbkit.core.random import mixed_seed
from perturbkit.core.workers import run_workers
from perturbkit.optim import OneByteSPSA, decode_gradient, encode_gradient, simulate_one_byte


def bowl(dtype=torch.float64, seed=0):
    """A parameter, a frozen one and a quadratic loss of the first with its gradient."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(5, 5, generator=g, dtype=dtype)
    w = nn.Parameter(torch.randn(5, generator=g, dtype=dtype))
    frozen = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)
    return w, frozen, lambda: (a @ w).square().sum() / 2 + (frozen - 1).sum(), lambda: a.T @ (a @ w.detach())


def trained(dtype):
    w, frozen, loss, _ = bowl(dtype)
    optimizer = OneByteSPSA([w, frozen], lr=0.02, samples_per_round=2)
    for _ in range(3):
        optimizer.step(loss)
    return w.detach()


EXAMPLE = Example(
    call=lambda generator, dtype: trained(dtype),
    refusals=(
        (lambda: encode_gradient(math.nan), "value is nan"),
        (lambda: decode_gradient(256), "code is 256"),
        (lambda: OneByteSPSA([torch.ones(1)], radius=0.0), "radius is 0"),
        (lambda: OneByteSPSA([torch.ones(1)], lr=-1.0), "lr is -1"),
        (lambda: OneByteSPSA([torch.ones(1)], samples_per_round=0), "samples_per_round is 0"),
        (lambda: OneByteSPSA([torch.ones(1)], seed=-1), "seed is -1"),
        (lambda: OneByteSPSA([torch.ones(1)], worker_id=-1), "worker_id is -1"),
        (lambda: OneByteSPSA([nn.Parameter(torch.ones(1))]).step(None), "closure is None"),
        (
            lambda: OneByteSPSA([nn.Parameter(torch.ones(1))]).step(lambda: torch.ones(2)),
            r"of shape \(2,\)",
        ),
        (lambda: simulate_one_byte([], [nn.Parameter(torch.ones(1))], 3), "loss_fns"),
        (lambda: simulate_one_byte([abs], [nn.Parameter(torch.ones(1))], 3, worker_id=1), "worker_id is given"),
        (lambda: OneByteSPSA([nn.Parameter(torch.ones(1))]).join({"weights": [], "round": 0, "exponent": 0}, []), "other shapes"),
        (lambda: OneByteSPSA([nn.Parameter(torch.ones(1))]).join({"weights": []}, []), "a mapping with weights, round"),
    ),
)  # fmt: skip


@given(st.floats(math.log(0.0196), math.log(51)).map(math.exp), st.sampled_from([1.0, -1.0]))
def test_a_byte_holds_a_gradient_to_three_percent(size, sign):
    code = encode_gradient(sign * size)
    assert 0 <= code <= 255
    back = decode_gradient(code)
    assert math.copysign(1, back) == sign
    assert abs(back / (sign * size) - 1) <= math.exp(1 / 32) - 1 + 1e-12


def test_every_code_comes_back_and_the_ends_saturate():
    assert encode_gradient(0.0) == 0 == decode_gradient(0) == decode_gradient(128)
    codes = [c for c in range(256) if c not in (0, 128)]
    assert [encode_gradient(decode_gradient(c)) for c in codes] == codes
    assert [encode_gradient(c) for c in (1e9, -0.01, -0.009)] == [127, 129, 0]


def test_one_worker_with_whole_numbers_is_simultaneous_perturbation():
    w, frozen, loss, _ = bowl()
    optimizer = OneByteSPSA([w, frozen], lr=0.01, radius=1e-2, one_byte=False, seed=4)
    want = w.detach().clone()
    for t in range(5):
        z = seeded_direction([w], mixed_seed(4, t, 0, 0))
        start, values = want.clone(), []
        for sign in (1, -1):
            with torch.no_grad():
                w.copy_(start + z * (sign * 1e-2))
                values.append(float(loss()))
        with torch.no_grad():
            w.copy_(start)
        want = start + z * (-0.01 * ((values[0] - values[1]) / 2e-2))
        optimizer.step(loss)
        assert torch.equal(w.detach(), want)
    assert optimizer.bytes_sent == 5 * 8
    assert (frozen == 1).all()


@pytest.mark.parametrize("one_byte", [True, False])
def test_the_mean_message_is_the_gradient(one_byte):
    w, _, loss, gradient = bowl(seed=3)
    before, g, n = w.detach().clone(), gradient(), 3000
    OneByteSPSA([w], lr=1.0, samples_per_round=n, one_byte=one_byte, seed=8).step(loss)
    got = before - w.detach()
    error = ((g.square().sum() + g.square()) / n).sqrt()  # of each coordinate, by Isserlis' theorem
    # Bytes round to nearest in the logarithm: symmetric there, so biased by less than half a step squared.
    assert ((got - g).abs() < 4 * error + 0.002 * g.norm()).all()


def test_the_digest_tells_weights_and_how_they_lie():
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    other = w.clone()
    other[1, 2] += 1e-6
    digests = [
        OneByteSPSA([nn.Parameter(p)], lr=0.1).digest() for p in (w, w.clone(), w.t().contiguous().t(), other)
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_and_the_simulation_agree_bit_for_bit(processes):
    options = {"lr": 0.03, "samples_per_round": 2, "seed": 6}
    run = run_workers(one_byte_run, processes, 30, options)
    net, _ = one_byte_problem(0)
    shared = list(net.parameters())
    losses = []
    for worker in range(processes):
        other, loss = one_byte_problem(worker)
        # Every worker's closure reads the one set of weights.
        other[0].weight, other[0].bias, other[2].weight, other[2].bias = shared
        losses.append(loss)
    alone = simulate_one_byte(losses, shared, 30, **options)
    assert {digest for digest, _, _ in run} == {alone.digest}
    assert {sent for _, sent, _ in run} == {60} == {alone.bytes_sent}
    assert alone.cost.nfev == 2 * 30 * 2 * processes


def test_a_worker_joins_from_the_log_and_another_leaves():
    first, second, third = run_workers(one_byte_join_and_drop, 3)
    assert first[0] == second[0] == third[0]
    assert first[1] == second[1] == third[1] == second[2]
    assert first[2] == third[2] != second[2]


def test_the_scale_follows_gradients_of_any_size():
    for factor in (1e6, 1e-6):
        w, _, loss, _ = bowl(seed=2)
        start = loss().item()
        optimizer = OneByteSPSA([w], lr=0.01 / factor, samples_per_round=4)
        for _ in range(150):
            optimizer.step(lambda loss=loss, factor=factor: factor * loss())
        assert loss().item() < 0.2 * start


def test_training_goes_on_bit_for_bit_from_a_state_dict():
    (w, _, loss, _), (v, _, other, _) = bowl(), bowl()
    one, two = (OneByteSPSA([p], lr=0.02, seed=1) for p in (w, v))
    schedule = torch.optim.lr_scheduler.ExponentialLR(one, 0.9)
    for _ in range(4):
        one.step(lambda: 1e4 * loss())
        schedule.step()
    with torch.no_grad():
        v.copy_(w)
    two.load_state_dict(one.state_dict())
    for _ in range(3):
        one.step(lambda: 1e4 * loss())
        two.step(lambda: 1e4 * other())
    assert torch.equal(w, v)


def test_groups_have_their_own_rates():
    w, v = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = OneByteSPSA([{"params": [w]}, {"params": [v], "lr": 0.0}], lr=0.1)
    optimizer.step(lambda: (w + v).sum())
    assert (w != 1).all()
    assert (v == 1).all()


def test_a_worker_whose_loss_is_not_finite_sends_zero():
    w = nn.Parameter(torch.ones(3))
    optimizer = OneByteSPSA([w])
    with pytest.warns(checks.PerturbkitWarning, match="not finite"):
        optimizer.step(lambda: w.sum() * math.nan)
    assert (w == 1).all()
    assert optimizer.messages == [{0: (0.0,)}]


def test_workers_that_differ_are_told_and_those_with_other_batches_agree_also_without_a_number():
    first, second = run_workers(one_byte_nan_and_batches, 2)
    assert first == second
    said, _, sent = first
    assert "differ in seed, weights;" in said[0]
    assert "differ in lr;" in said[1]
    assert [code == 0 for code in sent] == [False, True, False, True]


def test_a_late_worker_follows_a_schedule():
    def trained(p):
        optimizer = OneByteSPSA([p], lr=0.1, seed=2)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)

    (w, _, loss, _), (v, _, _, _) = bowl(), bowl(seed=1)
    (one, schedule), (late, late_schedule) = trained(w), trained(v)
    for t in range(9):
        if t == 3:
            checkpoint, place = one.checkpoint(), schedule.state_dict()
            late.param_groups[0]["lr"] = one.param_groups[0]["lr"]
        one.step(loss)
        schedule.step()
    late_schedule.load_state_dict(place)
    late.join(checkpoint, one.messages, late_schedule.step)
    assert torch.equal(w, v)
    assert late.param_groups[0]["lr"] == one.param_groups[0]["lr"]


def test_gradients_beyond_the_range_of_the_scale_are_cut():
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = OneByteSPSA([w], lr=0.0)
    optimizer.state["exponent"] = -64
    optimizer.step(lambda: w.sum() * 1e304)
    ((code,),) = optimizer.messages[0].values()
    assert int(code) & 127 == 127


def test_the_scale_falls_no_lower_than_its_bound_and_comes_back():
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = OneByteSPSA([w], lr=0.0)
    for _ in range(30):
        optimizer.step(lambda: 0.0 * w.sum())
    assert optimizer.state["exponent"] == -64
    for _ in range(30):
        optimizer.step(lambda: w.sum())
    assert 32 <= int(optimizer.messages[-1][0][0]) & 127 < 127
