"""Oracles of ProxyProx: a perfect proxy, none at all, fixed points, and the difference of Hessians."""

import copy
import math

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import checks
from perturbkit.optim import ProxyProx, estimate_similarity, minimize_proxy_prox

P = nn.Parameter


def pair(dtype=torch.float64, d=8, delta=1.0, seed=0):
    """A badly conditioned proxy, a target whose Hessian differs by delta, and the target's minimum."""
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q
    h = turn @ torch.diag(torch.logspace(0, 2, d, dtype=torch.float64)) @ turn.T
    more = torch.randn(d, d, generator=g, dtype=torch.float64)
    more = more + more.T
    f = h + delta * more / torch.linalg.eigvalsh(more).abs().max() + delta * torch.eye(d)
    best = torch.randn(d, generator=g, dtype=torch.float64)
    h, f, best = (t.to(dtype) for t in (h, f, best))
    return (lambda x: f @ (x - best)), (lambda x: x @ h @ x / 2), best, f, h


def solve(x0=None, **options):
    grad, proxy, best, _, _ = pair(x0.dtype if x0 is not None else torch.float64)
    return minimize_proxy_prox(
        grad,
        proxy,
        torch.zeros_like(best) if x0 is None else x0,
        **({"similarity": 2.0, "rounds": 5} | options),
    )


ONE = torch.ones(2)
EXAMPLE = Example(
    call=lambda generator, dtype: solve(torch.zeros(8, dtype=dtype)),
    refusals=(
        (lambda: solve(similarity=-1.0), "similarity is -1"),
        (lambda: solve(step=0.0), "step is 0"),
        (lambda: solve(inner="newton"), "inner is 'newton'"),
        (lambda: solve(inner_tol=0.0), "inner_tol is 0"),
        (lambda: solve(inner_steps=0), "inner_steps is 0"),
        (lambda: solve(rounds=0), "rounds is 0"),
        (lambda: solve(tol=-1.0), "tol is -1"),
        (lambda: solve(torch.ones(1, 8)), "x0"),
        (lambda: minimize_proxy_prox(lambda x: x[:1], torch.sum, ONE, similarity=1.0), "grad_target"),
        (lambda: ProxyProx([P(ONE)], 3, lr=1.0, inner_lr=1.0), "proxy_loss is a int"),
        (lambda: ProxyProx([P(ONE)], lambda: 0, lr=0.0, inner_lr=1.0), "lr is 0"),
        (lambda: ProxyProx([P(ONE)], lambda: 0, lr=1.0, inner_lr=0.0), "inner_lr is 0"),
        (lambda: ProxyProx([P(ONE)], lambda: 0, lr=1.0, inner_lr=1.0, inner_steps=0), "inner_steps is 0"),
        (lambda: estimate_similarity(abs, abs, ONE, steps=0), "steps is 0"),
        (lambda: estimate_similarity(abs, abs, ONE[None]), "x"),
    ),
)


@pytest.mark.parametrize("inner", ["lbfgs", "gd"])
def test_a_perfect_proxy_solves_the_target_in_one_round(inner):
    grad, _, best, f, _ = pair(seed=1)
    found = minimize_proxy_prox(
        grad,
        lambda x: x @ f @ x / 2,
        torch.zeros_like(best),
        similarity=0.0,
        rounds=2,
        inner=inner,
        inner_tol=1e-9,
        inner_steps=4000,
    )
    assert float(found.fun) < 1e-7 * float(found.history[0])
    assert (found.x - best).norm() < 1e-7


@pytest.mark.parametrize("inner", ["lbfgs", "gd"])
def test_without_a_proxy_it_is_gradient_descent(inner):
    grad, _, best, f, _ = pair(seed=2)
    step = 0.5 / float(torch.linalg.eigvalsh(f)[-1])
    found = minimize_proxy_prox(
        grad,
        lambda x: 0.0 * x.sum(),
        torch.zeros_like(best),
        similarity=1.0,
        step=step,
        rounds=4,
        inner=inner,
        inner_tol=1e-10,
    )
    x = torch.zeros_like(best)
    for _ in range(4):
        x = x - step * grad(x)
    torch.testing.assert_close(found.x, x, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("inner", ["lbfgs", "gd"])
def test_minima_of_the_target_stay_and_others_are_left_for_any_proxy(inner):
    grad, proxy, best, _, _ = pair(seed=3)
    found = minimize_proxy_prox(grad, proxy, best, similarity=2.0, rounds=3, inner=inner)
    torch.testing.assert_close(found.x, best, rtol=1e-6, atol=1e-7)
    moved = minimize_proxy_prox(
        grad,
        proxy,
        torch.zeros_like(best),
        similarity=2.0,
        rounds=150,
        inner=inner,
        tol=1e-6,
        inner_steps=400,
    )
    assert moved.converged
    assert (moved.x - best).norm() < 2e-6
    assert moved.target_calls == len(moved.history) < 150
    assert moved.cost.ngrad == moved.target_calls + moved.proxy_calls


def test_fewer_target_gradients_than_descent_needs():
    grad, proxy, best, f, _ = pair(seed=4)
    ours = minimize_proxy_prox(grad, proxy, torch.zeros_like(best), similarity=2.0, rounds=25)
    x, step = torch.zeros_like(best), 1 / float(torch.linalg.eigvalsh(f)[-1])
    for _ in range(25):
        x = x - step * grad(x)
    assert float(ours.fun) < 1e-2 * float(grad(x).norm())


def test_a_useless_proxy_is_warned_of():
    with pytest.warns(checks.PerturbkitWarning, match="saves nothing"):
        solve(similarity=5.0, lipschitz=2.0)


def test_similarity_is_the_largest_eigenvalue_of_the_difference():
    _, _, _, f, h = pair(seed=5)
    want = float(torch.linalg.eigvalsh(f - h).abs().max())
    got = estimate_similarity(
        lambda v: v @ f, lambda v: v @ h, torch.zeros(8, dtype=torch.float64), generator=0
    )
    assert got == pytest.approx(want, rel=1e-8)
    assert estimate_similarity(lambda v: v @ f, lambda v: v @ f, torch.zeros(8, dtype=torch.float64)) < 1e-10


def optimizer_of(w, proxy_scale, **options):
    frozen = P(torch.ones(1), requires_grad=False)
    made = ProxyProx(
        [w, frozen], lambda: (proxy_scale * w * w).sum() / 2, **({"lr": 2.0, "inner_lr": 0.1} | options)
    )

    def closure():
        made.zero_grad()
        loss = ((proxy_scale + 0.3) * w * w).sum() / 2 + w.sum()
        loss.backward()
        return loss

    return made, closure


def test_the_optimizers_steps_written_out():
    scale = torch.tensor([1.0, 4.0], dtype=torch.float64)
    start = torch.tensor([2.0, -1.0], dtype=torch.float64)
    w = P(start.clone())
    optimizer, closure = optimizer_of(w, scale, inner_steps=3)
    optimizer.step(closure)
    shift = (scale + 0.3) * start + 1 - scale * start
    x = start
    for _ in range(3):
        x = x - 0.1 * (scale * x + shift + (x - start) / 2)
    torch.testing.assert_close(w.detach(), x)
    assert (optimizer.target_calls, optimizer.proxy_calls) == (1, 3)
    v = P(start.clone())
    once, closure = optimizer_of(v, scale, inner_steps=1)
    once.step(closure)
    torch.testing.assert_close(v.detach(), start - 0.1 * ((scale + 0.3) * start + 1))


def test_training_goes_on_bit_for_bit_and_schedulers_work():
    scale = torch.tensor([1.0, 4.0], dtype=torch.float64)
    w, v = P(torch.tensor([2.0, -1.0], dtype=torch.float64)), P(torch.zeros(2, dtype=torch.float64))
    (one, closure), (two, other) = optimizer_of(w, scale), optimizer_of(v, scale)
    schedule = torch.optim.lr_scheduler.StepLR(one, 1, 0.5)
    one.step(closure)
    schedule.step()
    with torch.no_grad():
        v.copy_(w)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert two.param_groups[0]["lr"] == 1.0
    for _ in range(3):
        one.step(closure)
        two.step(other)
    assert torch.equal(w, v)
    assert math.isfinite(float(w.detach().sum()))
