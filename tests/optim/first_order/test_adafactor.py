"""Oracles of Adafactor: torch's and transformers' own, rank-one moments, preserved marginals, memory, ablations."""

import copy
import math

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import checks
from perturbkit.core.random import seeded_init
from perturbkit.optim import Adafactor, state_bytes

P = nn.Parameter


def problem(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    weights = [P(torch.randn(s, generator=g, dtype=dtype)) for s in ((5, 7), (7,), (2, 3, 4), ())]
    targets = [torch.randn(w.shape, generator=g, dtype=dtype) for w in weights]

    def loss():
        return sum(((w - t) ** 4).sum() + (w * t).sum() for w, t in zip(weights, targets, strict=True))

    return weights, loss


def run(optimizer, weights, loss, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return [w.detach().clone() for w in weights]


def trained(dtype):
    weights, loss = problem(dtype)
    return run(Adafactor(weights), weights, loss)


EXAMPLE = Example(
    call=lambda generator, dtype: trained(dtype),
    refusals=(
        (lambda: Adafactor([P(torch.ones(1))], lr=0.1), "lr is 0.1 and relative_step_size True"),
        (lambda: Adafactor([P(torch.ones(1))], relative_step_size=False), "lr is None"),
        (lambda: Adafactor([P(torch.ones(1))], lr=-1.0, relative_step_size=False), "lr is -1"),
        (
            lambda: Adafactor([P(torch.ones(1))], lr=1.0, relative_step_size=False, warmup=True),
            "warmup is on",
        ),
        (lambda: Adafactor([P(torch.ones(1))], clip_threshold=0.0), "clip_threshold is 0"),
        (lambda: Adafactor([P(torch.ones(1))], decay_power=0.5), "decay_power is 0.5"),
        (lambda: Adafactor([P(torch.ones(1))], eps=1e-30), "eps is 1e-30"),
        (lambda: Adafactor([P(torch.ones(1))], eps=(1e-30, -1.0)), "eps is -1"),
        (lambda: Adafactor([P(torch.ones(1))], beta1=1.0), "beta1 is 1"),
        (lambda: Adafactor([P(torch.ones(1))], weight_decay=-1.0), "weight_decay is -1"),
        (lambda: state_bytes(3), "optimizer is a int"),
    ),
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"warmup": True},
        {"lr": 0.05, "relative_step_size": False, "scale_parameter": False},
        {
            "lr": 0.05,
            "relative_step_size": False,
            "scale_parameter": False,
            "beta1": 0.9,
            "weight_decay": 0.1,
        },
        {"clip_threshold": 0.3, "decay_power": -0.5},
    ],
    ids=["relative", "warmup", "fixed", "momentum", "clipped"],
)
def test_a_hundred_steps_are_those_of_transformers(options):
    optimization = pytest.importorskip("transformers.optimization")
    (weights, loss), (others, other) = problem(torch.float32), problem(torch.float32)
    ours = run(Adafactor(weights, **options), weights, loss, 100)
    theirs = dict(options)
    for name, own in (
        ("relative_step", "relative_step_size"),
        ("warmup_init", "warmup"),
        ("decay_rate", "decay_power"),
    ):
        if own in theirs:
            theirs[name] = theirs.pop(own)
    reference = run(optimization.Adafactor(others, **theirs), others, other, 100)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_rank_one_squares_are_divided_exactly():
    g = torch.outer(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.5, 4.0])).double()
    w = P(torch.ones(3, 2, dtype=torch.float64))
    optimizer = Adafactor(
        [w], lr=1.0, relative_step_size=False, scale_parameter=False, clip_threshold=math.inf
    )
    for t in range(1, 4):
        w.grad = g.clone()
        before = w.detach().clone()
        optimizer.step()
        torch.testing.assert_close(before - w.detach(), g.sign(), rtol=1e-9, atol=0), t


def test_marginals_of_the_moving_mean_are_kept():
    g = torch.Generator().manual_seed(3)
    w = P(torch.ones(4, 6, dtype=torch.float64))
    optimizer = Adafactor([w])
    exact = torch.zeros(4, 6, dtype=torch.float64)
    for t in range(1, 8):
        w.grad = torch.randn(4, 6, generator=g, dtype=torch.float64)
        beta = 1 - t**-0.8
        exact = beta * exact + (1 - beta) * w.grad**2
        optimizer.step()
    rows, columns = optimizer.state[w]["rows"], optimizer.state[w]["columns"]
    v = rows[:, None] * columns / rows.mean()
    torch.testing.assert_close(v.sum(0), exact.sum(0))
    torch.testing.assert_close(v.sum(1), exact.sum(1))


def test_updates_are_clipped_by_their_root_mean_square_and_steps_scaled_by_the_parameters():
    w, v = P(torch.full((3, 3), 2.0)), P(torch.zeros(4))
    optimizer = Adafactor([w, v], lr=0.1, relative_step_size=False, clip_threshold=0.5)
    w.grad, v.grad = torch.rand(3, 3, generator=torch.Generator().manual_seed(0)) + 0.1, torch.ones(4)
    optimizer.step()
    assert ((2 - w.detach()) / (0.1 * 2)).square().mean().sqrt().item() == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(v.detach(), torch.full((4,), -0.1 * 1e-3 * 0.5))


def test_memory_is_that_of_rows_and_columns():
    for shape, numbers in (((1024, 1024), 2048), ((10,), 10), ((3, 8, 5), 3 * 8 + 3 * 5)):
        w = P(torch.ones(shape))
        optimizer, adam = Adafactor([w]), torch.optim.Adam([w])
        w.grad = torch.ones(shape)
        optimizer.step()
        adam.step()
        assert state_bytes(optimizer) == 4 * numbers
        assert state_bytes(adam) == 8 * w.numel()


def test_half_precision_frozen_and_sparse_parameters():
    w, frozen = P(torch.ones(4, 4, dtype=torch.bfloat16)), P(torch.ones(2), requires_grad=False)
    with seeded_init(0):
        table = nn.Embedding(6, 3, sparse=True)
    optimizer = Adafactor([w, frozen, *table.parameters()], lr=0.1, relative_step_size=False)
    before = table.weight.detach().clone()
    (w.float().square().sum() + table(torch.tensor([2])).square().sum() + frozen.sum()).backward()
    optimizer.step()
    assert w.dtype == torch.bfloat16
    assert (w < 1).all()
    assert (table.weight != before).any(1).tolist() == [False, False, True, False, False, False]
    assert optimizer.state[w]["rows"].dtype == torch.float32


def test_training_goes_on_bit_for_bit_and_schedulers_work():
    (weights, loss), (others, other) = problem(), problem()
    one, two = (Adafactor(w, lr=0.1, relative_step_size=False, beta1=0.5) for w in (weights, others))
    schedule = torch.optim.lr_scheduler.StepLR(one, 1, 0.5)
    run(one, weights, loss, 3)
    schedule.step()
    with torch.no_grad():
        for a, b in zip(others, weights, strict=True):
            a.copy_(b)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert two.param_groups[0]["lr"] == 0.05
    for a, b in zip(run(one, weights, loss), run(two, others, other), strict=True):
        assert torch.equal(a, b)


def test_a_closure_is_evaluated_with_gradients():
    w = P(torch.ones(2))
    optimizer = Adafactor([w])

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    assert (w < 1).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"decay_power": 0.0}, "decay_power is 0"),
        ({"eps": None}, "eps is None"),
        ({"eps": (0.0, 1e-3)}, "eps is 0"),
    ],
    ids=["decay", "eps", "first"],
)
def test_options_at_the_edge_are_refused(options, match):
    with pytest.raises(checks.PerturbkitError, match=match):
        Adafactor([nn.Parameter(torch.ones(2))], **options)
