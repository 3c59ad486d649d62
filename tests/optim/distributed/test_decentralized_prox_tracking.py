"""Oracles of tracking over a graph: the tracker's mean, proximal gradient descent, the algorithm written out, real processes."""

import copy

import pytest
import torch
from torch import nn

from _common import Example
from _distributed_workers import (
    dproxsgt_run,
    quadratic,
    quadratic_closure,
    quadratic_gradients,
    shrink,
    split_weights,
)
from perturbkit.core.workers import run_workers
from perturbkit.optim import (
    DProxSGT,
    TopK,
    metropolis_mixing,
    prox_stationarity,
    ring_mixing,
    simulate_dproxsgt,
)

EXACT = torch.float64
ONE = torch.ones(1, 1)


def start(dtype=EXACT):
    return torch.linspace(-1, 1, 6, dtype=dtype)


def run(dtype=EXACT, n=5, steps=20, mixing=None, lr=0.02, prox=shrink, **options):
    mixing = ring_mixing(n) if mixing is None else mixing
    return simulate_dproxsgt(quadratic_gradients(n, dtype=dtype), start(dtype), mixing, lr, prox, steps=steps, **options)  # fmt: skip


def optimizer(**options):
    return DProxSGT([nn.Parameter(torch.ones(2))], **({"lr": 0.1, "mixing": ONE} | options))


EXAMPLE = Example(
    call=lambda generator, dtype: run(dtype, compressor=TopK(0.3), steps=5),
    refusals=(
        (lambda: optimizer(lr=-1.0), "lr is -1"),
        (lambda: optimizer(mixing=3), "mixing is 3"),
        (lambda: optimizer(mixing=torch.ones(2, 2)), r"mixing of shape \(2, 2\) is not symmetric and stochastic"),
        (lambda: optimizer(mixing=torch.ones(2, 3) / 3), r"mixing of shape \(2, 3\) is not"),
        (lambda: optimizer(mixing=torch.tensor([[1.5, -0.5], [-0.5, 1.5]])), "is not symmetric and stochastic"),
        (lambda: optimizer(mixing=torch.eye(2)), "does not mix all workers"),
        (lambda: optimizer(mixing=torch.tensor([[0.0, 1.0], [1.0, 0.0]])), "does not mix all workers"),
        (lambda: optimizer(mixing=ring_mixing(2)).step(), "mixing is of 2 workers"),
        (lambda: optimizer(prox=3), "prox is 3"),
        (lambda: optimizer(compressor=3), "compressor is 3"),
        (lambda: optimizer(gamma_x=0.0), "gamma_x is 0"),
        (lambda: optimizer(gamma_y=1.5), "gamma_y is 1.5"),
        (lambda: optimizer().step(3), "closure is 3"),
        (lambda: run(steps=0), "steps is 0"),
        (lambda: run(lr=-0.1), "lr is -0.1"),
        (lambda: run(mixing=ring_mixing(4)), "grads has 5 workers, mixing 4"),
        (lambda: simulate_dproxsgt([abs], torch.ones(2, 3), ONE, 0.1, steps=1), r"x0 has shape \(2, 3\)"),
        (lambda: simulate_dproxsgt([], torch.ones(2), ONE, 0.1, steps=1), r"grads is \[\]"),
        (lambda: simulate_dproxsgt([lambda x: 3], torch.ones(2), ONE, 0.1, steps=1), "a gradient is 3"),
        (lambda: ring_mixing(0), "n is 0"),
        (lambda: metropolis_mixing(torch.ones(2, 3)), r"graph has shape \(2, 3\)"),
        (lambda: metropolis_mixing(torch.tensor([[0, 1], [0, 0]])), r"graph of shape \(2, 2\) is not symmetric"),
        (lambda: metropolis_mixing(torch.eye(3)), "does not mix all workers"),
        (lambda: prox_stationarity(torch.ones(2), torch.ones(3), 0.1), "gradient has shape"),
        (lambda: prox_stationarity(torch.ones(2), torch.ones(2), 0.0), "lr is 0"),
    ),
)  # fmt: skip


@pytest.mark.parametrize("compressor", [None, TopK(0.2), TopK(1.0)], ids=["all", "fifth", "indexed"])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_the_mean_tracker_is_the_mean_gradient(compressor, steps):
    """Also where gradients are random and messages rounded to single precision."""
    g, last = torch.Generator().manual_seed(steps), {}

    def noisy(i):
        def grad(x):
            last[i] = x * (i + 1) + torch.randn(6, generator=g, dtype=EXACT)
            return last[i]

        return grad

    found = simulate_dproxsgt([noisy(i) for i in range(5)], start(), ring_mixing(5), 0.05, shrink, compressor=compressor, steps=steps)  # fmt: skip
    want = torch.stack([last[i] for i in range(5)]).mean(0)
    torch.testing.assert_close(found.tracker.mean(0), want, rtol=1e-12, atol=1e-12)
    assert found.cost.ngrad == 5 * steps


def test_on_a_complete_graph_it_is_proximal_gradient_descent():
    grads, x = quadratic_gradients(4), start()
    for _ in range(20):
        x = shrink(x - 0.02 * sum(g(x) for g in grads) / 4, 0.02)
    found = run(n=4, mixing=torch.full((4, 4), 0.25))
    torch.testing.assert_close(found.x, x.expand(4, 6), rtol=1e-12, atol=1e-12)
    assert (found.consensus < 1e-12).all()


def test_sending_all_through_the_compressor_changes_nothing():
    for n in (1, 2, 5):
        one, two = run(n=n), run(n=n, compressor=TopK(1.0, EXACT), gamma_x=1.0, gamma_y=1.0)
        torch.testing.assert_close(one.x, two.x, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(one.tracker, two.tracker, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("compressor", [None, TopK(0.3, EXACT)], ids=["all", "compressed"])
def test_the_algorithm_written_out_with_matrices(compressor):
    n, w, grads = 5, ring_mixing(5), quadratic_gradients(5)
    g = torch.Generator().manual_seed(2)
    x = x0 = torch.randn(n, 6, generator=g, dtype=EXACT)
    y, before, xh, yh = (torch.zeros_like(x) for _ in range(4))

    def compress(rows):
        kept = torch.zeros_like(rows)
        index = rows.abs().topk(2, dim=1).indices
        return kept.scatter(1, index, rows.gather(1, index))

    for _ in range(12):
        grad = torch.stack([f(row) for f, row in zip(grads, x, strict=True)])
        y, before = y + grad - before, grad
        if compressor is None:
            y = w @ y
            x = w @ shrink(x - 0.02 * y, 0.02)
        else:
            yh = yh + compress(y - yh)
            y = y + 0.6 * (w @ yh - yh)
            half = shrink(x - 0.02 * y, 0.02)
            xh = xh + compress(half - xh)
            x = half + 0.9 * (w @ xh - xh)
    found = simulate_dproxsgt(
        grads, x0, w, 0.02, shrink, compressor=compressor, gamma_x=0.9, gamma_y=0.6, steps=12
    )
    torch.testing.assert_close(found.x, x, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.tracker, y, rtol=1e-11, atol=1e-11)
    spread = (x - x.mean(0)).square().sum(1).mean().sqrt()
    torch.testing.assert_close(found.consensus[-1], spread, rtol=1e-11, atol=1e-11)
    assert found.bytes_sent == [12 * 2 * 2 * (6 * 8 if compressor is None else 2 * 12)] * n


@pytest.mark.parametrize("compressor", [None, TopK(0.5)], ids=["all", "half"])
def test_workers_with_different_objectives_agree_on_the_minimum_of_their_mean(compressor):
    n, gammas = 4, {"gamma_x": 0.5, "gamma_y": 0.5}
    found = run(n=n, lr=0.01, steps=3000, compressor=compressor, **gammas)
    hessian = torch.stack([quadratic(i)[0] for i in range(n)]).mean(0)
    linear = torch.stack([quadratic(i)[1] for i in range(n)]).mean(0)
    x = found.x.mean(0)
    assert prox_stationarity(x, hessian @ x - linear, 0.05, shrink) < 1e-5
    assert found.consensus[-1] < 1e-5 < found.consensus[0]
    # At the minimum of a quadratic with an l1 norm the gradient is minus its slope where x is not zero.
    other = shrink(x - 0.05 * (hessian @ x - linear), 0.05)
    slope = -(hessian @ x - linear)[other != 0]
    torch.testing.assert_close(slope, 0.3 * other[other != 0].sign(), rtol=1e-4, atol=1e-4)


def test_processes_and_the_simulation_agree_bit_for_bit():
    plain = {"mixing": ring_mixing(4)}
    path = torch.diag(torch.ones(3), 1) + torch.diag(torch.ones(3), -1)
    squeezed = {"mixing": metropolis_mixing(path), "compressor": TopK(0.3), "gamma_x": 0.7, "gamma_y": 0.6}
    found = run_workers(dproxsgt_run, 4, 25, [plain, squeezed])
    for i, options in enumerate((plain, squeezed)):
        alone = run(n=4, steps=25, **options)
        for worker, each in enumerate(found):
            x, sent = each[i]
            assert torch.equal(torch.cat([x[:4], x[6:]]), alone.x[worker])
            assert torch.equal(x[4:6], torch.ones(2, dtype=EXACT))
            assert sent == alone.bytes_sent[worker]
    assert alone.bytes_sent == [25 * 2 * k * 2 * 8 for k in (1, 2, 2, 1)]


def test_mixing_matrices():
    for n in (1, 2, 3, 6):
        w = ring_mixing(n)
        torch.testing.assert_close(w.sum(0), torch.ones(n, dtype=EXACT))
        assert torch.equal(w, w.T)
    assert torch.equal(ring_mixing(2), torch.full((2, 2), 0.5, dtype=EXACT))
    w = ring_mixing(6)
    assert w[0].tolist() == pytest.approx([1 / 3, 1 / 3, 0, 0, 0, 1 / 3])
    # A ring's eigenvalues are (1 + 2 cos(2 pi k / n)) / 3.
    values = (1 + 2 * (2 * torch.pi * torch.arange(6) / 6).double().cos()) / 3
    torch.testing.assert_close(torch.linalg.eigvalsh(w), values.sort().values, rtol=1e-6, atol=1e-6)
    star = torch.zeros(4, 4)
    star[0, 1:] = star[1:, 0] = 1
    star[2, 2] = 7
    assert metropolis_mixing(star)[2].tolist() == pytest.approx([0.25, 0, 0.75, 0])


def test_a_single_precision_matrix_and_weights_do():
    found = run(torch.float32, mixing=ring_mixing(5).float())
    torch.testing.assert_close(found.x, run(torch.float64).x.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, EXACT])
@pytest.mark.parametrize("compressor", [None, TopK(0.3)], ids=["all", "compressed"])
def test_training_goes_on_bit_for_bit_from_a_state_dict_and_from_a_copy(dtype, compressor):
    one = split_weights(dtype)
    first = DProxSGT(one, 0.02, ONE, shrink, compressor)
    for _ in range(5):
        first.step(quadratic_closure(one, 1))
    two = [nn.Parameter(p.detach().clone(), p.requires_grad) for p in one]
    second = DProxSGT(two, 0.5, ONE, shrink, compressor)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    three, third = copy.deepcopy((one, first))
    for params, each in ((one, first), (two, second), (three, third)):
        for _ in range(5):
            each.step(quadratic_closure(params, 1))
    for p, q, r in zip(one, two, three, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)


def test_groups_have_their_own_rates_for_step_and_proximal_map():
    params = split_weights()
    made = DProxSGT([{"params": params[:2]}, {"params": params[2:], "lr": 0.2}], 0.02, ONE, shrink)
    x, (h, b) = start(), quadratic(0)
    made.step(quadratic_closure(params, 0))
    rate = torch.tensor([0.02] * 4 + [0.2] * 2, dtype=EXACT)
    want = x - rate * (h @ x - b)
    want = want.sign() * (want.abs() - 0.3 * rate).clamp(min=0)
    torch.testing.assert_close(torch.cat([params[0].reshape(-1), params[2]]).detach(), want)
    assert torch.equal(params[1], torch.ones(2, dtype=EXACT))
    assert made.bytes_sent == 0
    assert DProxSGT([nn.Parameter(torch.ones(1), requires_grad=False)], 0.1, ONE).step(lambda: 2.0) == 2.0
