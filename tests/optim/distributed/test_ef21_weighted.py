"""Oracles of EF21: gradient descent without compression, invariance under weights, the three-worker example, real processes."""

import copy

import pytest
import torch
from torch import nn

from _common import Example
from _distributed_workers import (
    ef21_mismatch,
    ef21_run,
    quadratic,
    quadratic_closure,
    quadratic_gradients,
    split_weights,
)
from perturbkit.core.workers import run_workers
from perturbkit.optim import EF21, TopK, ef21_step_size, simulate_ef21, smoothness_constants

EXACT = torch.float64


class Rounded:
    """A quantiser of fixed step: a message is not multiplied when its vector is."""

    def encode(self, v):
        return (v / 0.25).round().clamp(-127, 127).to(torch.int8).view(torch.uint8)

    def decode(self, message, d):
        return message.view(torch.int8).double() * 0.25

    def nbytes(self, d):
        return d


def run(dtype=EXACT, n=3, steps=20, **options):
    return simulate_ef21(
        quadratic_gradients(n, dtype=dtype), torch.linspace(-1, 1, 6, dtype=dtype), **({"lr": 0.02, "steps": steps} | options)
    )  # fmt: skip


EXAMPLE = Example(
    call=lambda generator, dtype: run(dtype, compressor=TopK(0.3), steps=5, participation=0.7),
    refusals=(
        (lambda: TopK(0.0), "fraction is 0"),
        (lambda: TopK(0.5, torch.int32), "dtype is torch.int32"),
        (lambda: run(compressor=3), "compressor is 3"),
        (lambda: run(lr=-1.0), "lr is -1"),
        (lambda: run(steps=0), "steps is 0"),
        (lambda: run(participation=0.0), "participation is 0"),
        (lambda: run(init="one"), "init is 'one'"),
        (lambda: run(seed=-1), "seed is -1"),
        (lambda: run(weights=[0.5, 0.5]), "weights has 2 numbers with sum 1"),
        (lambda: run(weights=[0.5, 0.5, 0.5]), "weights has 3 numbers with sum 1.5"),
        (lambda: run(weights=[1.5, -0.5, 0.0]), "weights is -0.5"),
        (lambda: simulate_ef21([], torch.ones(2), 0.1, steps=1), r"grads is \[\]"),
        (lambda: simulate_ef21([lambda x: x[:1]], torch.ones(2), 0.1, steps=1), r"a gradient is \(1,\)"),
        (lambda: simulate_ef21([lambda x: x], torch.ones(2, 2), 0.1, steps=1), r"x0 has shape \(2, 2\)"),
        (lambda: EF21([nn.Parameter(torch.ones(1))], -0.1), "lr is -0.1"),
        (lambda: EF21([nn.Parameter(torch.ones(1))], 0.1, compressor=3), "compressor is 3"),
        (lambda: EF21([nn.Parameter(torch.ones(1))], 0.1, participation=2.0), "participation is 2"),
        (lambda: EF21([nn.Parameter(torch.ones(1))], 0.1, weights=[0.5, 0.5]).step(), "weights has 2 numbers"),
        (lambda: EF21([nn.Parameter(torch.ones(1))], 0.1).step(3), "closure is 3"),
        (lambda: ef21_step_size(0.0, [1.0], 0.5), "smoothness is 0"),
        (lambda: ef21_step_size(1.0, [-1.0], 0.5), "workers is -1"),
        (lambda: ef21_step_size(1.0, [1.0], 0.0), "alpha is 0"),
        (lambda: ef21_step_size(1.0, [1.0], 0.5, "median"), "mean is 'median'"),
        (lambda: smoothness_constants([]), r"x_parts is \[\]"),
        (lambda: smoothness_constants([torch.ones(2, 2), torch.ones(2, 3)]), r"x_parts has shape \(2, 3\)"),
        (lambda: smoothness_constants([torch.ones(2, 2)], "hinge"), "kind is 'hinge'"),
        (lambda: smoothness_constants([torch.ones(2, 2)], l2=-1.0), "l2 is -1"),
    ),
)  # fmt: skip


@pytest.mark.parametrize("fraction", [0.1, 0.3, 1.0])
def test_top_k_is_a_contraction_that_keeps_the_largest(fraction):
    g = torch.Generator().manual_seed(1)
    for d in (1, 7, 20):
        v, top = torch.randn(d, generator=g, dtype=EXACT), TopK(fraction, EXACT)
        k = top.kept(d)
        message = top.encode(v)
        back = top.decode(message, d)
        assert len(message) == top.nbytes(d) == 12 * k
        assert (back - v).square().sum() <= (1 - top.alpha(d)) * v.square().sum() + 1e-15
        want = torch.zeros_like(v)
        order = v.abs().argsort(descending=True)[:k]
        want[order] = v[order]
        assert torch.equal(back, want)
    assert [TopK(0.3).kept(d) for d in (1, 3, 10, 11)] == [1, 1, 3, 4]
    single = TopK(0.3)
    assert single.nbytes(10) == 24
    torch.testing.assert_close(single.decode(single.encode(v), 20), TopK(0.3, EXACT).decode(TopK(0.3, EXACT).encode(v), 20), rtol=1e-7, atol=0)  # fmt: skip


def test_top_k_makes_the_weights_irrelevant_at_one_rate_and_a_quantiser_does_not():
    uneven = [0.7, 0.1, 0.2]
    for options in ({}, {"participation": 0.6}, {"init": "zero"}):
        one, two = (run(compressor=TopK(0.2, EXACT), weights=w, **options) for w in (None, uneven))
        torch.testing.assert_close(one.x, two.x, rtol=1e-12, atol=1e-12)
    one, two = (run(compressor=Rounded(), weights=w) for w in (None, uneven))
    assert (one.x - two.x).abs().max() > 1e-3


def test_without_compression_it_is_gradient_descent():
    grads, x = quadratic_gradients(3), torch.linspace(-1, 1, 6, dtype=EXACT)
    for _ in range(20):
        x = x - 0.02 * sum(g(x) for g in grads) / 3
    for options in ({}, {"compressor": TopK(1.0, EXACT)}, {"init": "zero"}, {"weights": [0.2, 0.3, 0.5]}):
        torch.testing.assert_close(run(**options).x, x, rtol=1e-12, atol=1e-12)
    assert ef21_step_size(2.5, [1.0, 9.0], 1.0) == 1 / 2.5


def test_one_round_of_the_definition_with_top_one():
    """Two workers, two rounds, written out."""
    grads = [lambda x: torch.tensor([2.0, 1.0]) * x, lambda x: torch.tensor([1.0, 4.0]) * x]
    run = simulate_ef21(grads, torch.tensor([1.0, 1.0]), 0.1, TopK(0.5), steps=2)
    # Gradients (2, 1) and (1, 4), mean (1.5, 2.5): x = (0.85, 0.75). Changes (-0.3, -0.25) and (-0.15, -1).
    g = torch.tensor([1.5 - 0.3 / 2, 2.5 - 1.0 / 2])
    torch.testing.assert_close(run.x, torch.tensor([0.85, 0.75]) - 0.1 * g)
    torch.testing.assert_close(run.gradient_norm, torch.tensor([1.5**2 + 2.5**2, 1.275**2 + 1.875**2]).sqrt())
    assert run.bytes_sent == [8 + 8, 8 + 8]
    assert run.cost.ngrad == 4


def test_the_example_on_which_compressed_gradients_diverge():
    """Beznosikov et al. (2020), arXiv:2002.12410, example 1: Top-1 moves all three workers away from the minimum."""
    rows = torch.tensor([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]], dtype=EXACT)
    grads = [lambda x, a=a: 2 * (a @ x) * a + x / 2 for a in rows]
    start, top, naive = torch.ones(3, dtype=EXACT), TopK(1 / 3, EXACT), torch.ones(3, dtype=EXACT)
    for _ in range(20):
        naive -= 0.02 * sum(top.decode(top.encode(g(naive)), 3) for g in grads) / 3
    assert naive.norm() > 1.8 * start.norm()
    assert simulate_ef21(grads, start, 0.02, top, steps=1500).x.norm() < 1e-5


def test_the_steps_converge_and_the_new_one_is_longer():
    hessians = torch.stack([quadratic(i)[0] for i in range(4)])
    each = torch.linalg.eigvalsh(hessians)[:, -1]
    mean = float(torch.linalg.eigvalsh(hessians.mean(0))[-1])
    alpha = TopK(0.5).alpha(6)
    new, old = (ef21_step_size(mean, each, alpha, kind) for kind in ("arithmetic", "quadratic"))
    assert old < new < 1 / mean
    xi = (1 - alpha) ** 0.5 / (1 - (1 - alpha) ** 0.5)
    assert old == pytest.approx(1 / (mean + float(each.square().mean().sqrt()) * xi))
    run_ = run(n=4, lr=new, compressor=TopK(0.5), weights=(each / each.sum()).tolist(), steps=4000)
    solution = torch.linalg.solve(hessians.mean(0), torch.stack([quadratic(i)[1] for i in range(4)]).mean(0))
    torch.testing.assert_close(run_.x, solution, rtol=1e-6, atol=1e-6)


def test_constants_are_those_of_the_hessians():
    g = torch.Generator().manual_seed(2)
    parts = [torch.randn(n, 4, generator=g, dtype=EXACT) * n for n in (5, 9)]
    found = smoothness_constants(parts, "ridge", l2=0.3)
    x = torch.zeros(4, dtype=EXACT)
    hessians = torch.stack(
        [
            torch.autograd.functional.hessian(
                lambda x, a=a: (a @ x).square().mean() / 2 + 0.15 * x.square().sum(), x
            )
            for a in parts
        ]
    )
    torch.testing.assert_close(found.workers, torch.linalg.eigvalsh(hessians)[:, -1])
    assert found.mean == pytest.approx(float(torch.linalg.eigvalsh(hessians.mean(0))[-1]))
    # The logistic loss is steepest at zero.
    hessian = torch.autograd.functional.hessian(lambda x: nn.functional.softplus(-parts[0] @ x).mean(), x)
    torch.testing.assert_close(smoothness_constants(parts[:1]).workers[0], torch.linalg.eigvalsh(hessian)[-1])


@pytest.mark.parametrize("n", [2, 4])
def test_processes_and_the_simulation_agree_bit_for_bit(n):
    weights = [2 * (i + 1) / n / (n + 1) for i in range(n)]
    all_take_part = {"lr": 0.01, "compressor": TopK(0.3), "weights": weights, "seed": 3}
    some_do = all_take_part | {"participation": 0.5, "init": "zero"}
    found = run_workers(ef21_run, n, 30, [all_take_part, some_do])
    for i, options in enumerate((all_take_part, some_do)):
        alone = run(n=n, steps=30, **options)
        for x, _, _ in (each[i] for each in found):
            assert torch.equal(torch.cat([x[:4], x[6:]]), alone.x)
            assert torch.equal(x[4:6], torch.ones(2, dtype=EXACT))
        assert [each[i][1] for each in found] == alone.bytes_sent
        assert any(each[i][2] for each in found) == (i == 1)
    assert run(n=n, steps=30, **all_take_part).bytes_sent == [6 * 8 + 29 * 2 * (4 + 4)] * n
    assert sum(alone.bytes_sent) == alone.cost.ngrad * 16 < 30 * n * 16


def test_workers_that_differ_are_told():
    for said in run_workers(ef21_mismatch, 2):
        assert "differ in starting weights, seed;" in said


@pytest.mark.parametrize("dtype", [torch.float32, EXACT])
def test_training_goes_on_bit_for_bit_from_a_state_dict_and_from_a_copy(dtype):
    one = split_weights(dtype)
    optimizer = EF21(one, 0.02, TopK(0.3), participation=0.8)
    for _ in range(5):
        optimizer.step(quadratic_closure(one, 1))
    two = [nn.Parameter(p.detach().clone(), p.requires_grad) for p in one]
    other = EF21(two, 0.5, TopK(0.3), participation=0.8)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    three, third = copy.deepcopy((one, optimizer))
    for params, each in ((one, optimizer), (two, other), (three, third)):
        for _ in range(5):
            each.step(quadratic_closure(params, 1))
    assert third.bytes_sent == optimizer.bytes_sent > 0
    for p, q, r in zip(one, two, three, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_groups_have_their_own_rates_and_weights_thaw():
    params = split_weights()
    optimizer = EF21([{"params": params[:2]}, {"params": params[2:], "lr": 0.0}], 0.02, TopK(0.3))
    before = [p.detach().clone() for p in params]
    optimizer.step(quadratic_closure(params, 0))
    assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [False, True, True]
    params[1].requires_grad_(True)
    optimizer.step(lambda: params[1].sum().backward())
    assert torch.equal(params[1].detach(), before[1] - 0.02)
    optimizer.zero_grad()
    assert EF21([nn.Parameter(torch.ones(1), requires_grad=False)], 0.1).step(lambda: 2.0) == 2.0
