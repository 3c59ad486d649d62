"""Oracles of the Jacobian penalty: linear models, exact Jacobians, the spread of one draw, and training."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from _common import Example
from perturbkit.core import Oracle, assign, flatten
from perturbkit.core.random import randn
from perturbkit.robust import JacobianRegularizer, jacobian_norm, margin_bound

F64 = torch.float64


def network():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 4))


def filled(seed=0):
    with torch.random.fork_rng(devices=[]):
        net = network().double()
    assign(net, 0.5 * randn((len(flatten(net)),), generator=torch.Generator().manual_seed(seed), dtype=F64))
    return net


def data(n=6, seed=1, dtype=F64):
    x = randn((n, 5), generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x, torch.arange(n) % 4


def jacobians(net, x):
    return torch.func.vmap(torch.func.jacrev(net))(x)  # [n, C, d]


def with_model(model, generator, dtype):
    x, y = data(dtype=dtype)
    penalty = JacobianRegularizer(2, weight=0.1, generator=generator)
    return {
        "loss": penalty.loss(model, x, y).detach(),
        "norm": jacobian_norm(model, x),
        "estimate": jacobian_norm(model, x, n_projections=1, generator=generator),
        "margin": margin_bound(model, x),
    }


def chunked(size):
    oracle = Oracle(filled(), chunk_size=size)
    return [jacobian_norm(oracle, data()[0]), margin_bound(oracle, data()[0])]


EXAMPLE = Example(
    model=network,
    with_model=with_model,
    chunked=chunked,
    refusals=(
        (lambda: JacobianRegularizer(0), "n_projections is 0"),
        (lambda: JacobianRegularizer(weight=-1.0), "weight is -1"),
        (lambda: JacobianRegularizer(5).loss(filled(), *data()), "n_projections is 5"),
        (lambda: JacobianRegularizer()(data()[0], filled()(data()[0])), "not in the graph"),
        (lambda: JacobianRegularizer()(data()[0].requires_grad_(), filled()(data()[0])), "do not depend on x"),
        (lambda: JacobianRegularizer()(data()[0].requires_grad_(), data()[0][0]), "logits has shape"),
        (lambda: jacobian_norm(filled(), torch.zeros(2, 5).long()), "x has dtype"),
        (lambda: jacobian_norm(filled(), data()[0], n_projections=0), "n_projections is 0"),
        (lambda: jacobian_norm(filled(), data()[0], n_projections=9), "n_projections is 9"),
        (lambda: jacobian_norm(lambda z: z.sum(1), data()[0]), "the model's answer has shape"),
        (lambda: margin_bound(lambda z: z[:, :1], data()[0]), "the number of classes is 1"),
    ),
    stochastic=True,
)  # fmt: skip


def test_a_linear_model_gives_the_norm_of_its_weights():
    w = randn((4, 5), generator=torch.Generator().manual_seed(2), dtype=F64)
    x = data()[0].requires_grad_()
    assert float(JacobianRegularizer(None)(x, x @ w.T)) == pytest.approx(0.5 * float(w.square().sum()))
    torch.testing.assert_close(
        jacobian_norm(lambda z: z @ w.T, x.detach()), w.norm().expand(6), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("n_projections", [1, 2, 3])
def test_the_estimate_is_unbiased_and_as_noisy_as_the_notes_say(n_projections):
    w = randn((4, 5), generator=torch.Generator().manual_seed(3), dtype=F64)
    exact = float(w.square().sum())
    draws = jacobian_norm(
        lambda z: z @ w.T, torch.zeros(10_000, 5, dtype=F64), n_projections=n_projections, generator=0
    ).square()
    assert abs(float(draws.mean()) - exact) < 3 * float(draws.std()) / 100
    assert float(draws.std()) / exact <= math.sqrt(2 * 3 / 6) / math.sqrt(n_projections)
    penalty = JacobianRegularizer(n_projections, generator=1)
    x = torch.zeros(10_000, 5, dtype=F64, requires_grad=True)
    assert abs(2 * float(penalty(x, x @ w.T).detach()) - exact) < 4 * float(draws.std()) / 100


def test_the_spread_reaches_the_bound_for_a_jacobian_of_rank_one():
    w = torch.zeros(4, 5, dtype=F64)
    w[0, 0] = 1.0
    draws = jacobian_norm(lambda z: z @ w.T, torch.zeros(20_000, 5, dtype=F64), n_projections=1, generator=0)
    assert float(draws.square().std()) == pytest.approx(math.sqrt(2 * 3 / 6), rel=0.05)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_all_projections_give_the_exact_norm_and_its_gradient(seed):
    net = filled(seed)
    x, _ = data(seed=seed + 1)
    exact = 0.5 * jacobians(net, x).square().sum((1, 2)).mean()
    wanted = torch.autograd.grad(exact, net[0].weight)[0]
    for n_projections in (None, 4):
        leaf = x.clone().requires_grad_()
        found = JacobianRegularizer(n_projections, generator=seed)(leaf, net(leaf))
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(found, net[0].weight)[0], wanted)
        norms = jacobian_norm(net, x, n_projections=n_projections, generator=seed)
        torch.testing.assert_close(norms, jacobians(net, x).square().sum((1, 2)).sqrt().detach())


def test_the_loss_is_cross_entropy_plus_the_weighted_penalty():
    net, (x, y) = filled(), data()
    exact = 0.5 * jacobians(net, x).square().sum((1, 2)).mean()
    found = JacobianRegularizer(None, weight=0.3).loss(net, x, y)
    torch.testing.assert_close(found, functional.cross_entropy(net(x), y) + 0.3 * exact)
    assert x.grad is None
    assert not x.requires_grad


def fit(loss, n_steps=30):
    net, (x, y) = filled(), data(40)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss(net, x, y).backward()
        optimizer.step()
    return net, float(jacobian_norm(net, x).mean())


def test_without_weight_training_is_bit_for_bit_the_same():
    plain, _ = fit(lambda net, x, y: functional.cross_entropy(net(x), y))
    zero, _ = fit(JacobianRegularizer(weight=0.0, generator=0).loss)
    assert torch.equal(flatten(plain), flatten(zero))


def test_training_with_the_penalty_shrinks_the_jacobian():
    _, plain = fit(JacobianRegularizer(weight=0.0).loss)
    _, penalised = fit(JacobianRegularizer(weight=0.3, generator=0).loss)
    assert penalised < 0.5 * plain


def test_the_margin_of_a_linear_model_is_the_distance_to_the_nearest_boundary():
    g = torch.Generator().manual_seed(4)
    w, b = randn((4, 5), generator=g, dtype=F64), randn((4,), generator=g, dtype=F64)
    x, _ = data(30)
    found = margin_bound(lambda z: z @ w.T + b, x)
    z = x @ w.T + b
    answer = z.argmax(1)
    for row in range(30):
        c = int(answer[row])
        others = [k for k in range(4) if k != c]
        steps = [(z[row, c] - z[row, k]) / (w[c] - w[k]).norm() for k in others]
        k = others[int(torch.stack(steps).argmin())]
        direction = (w[k] - w[c]) / (w[k] - w[c]).norm()
        for factor, same in ((0.999, True), (1.001, False)):
            moved = x[row] + factor * found[row] * direction
            assert (int((moved @ w.T + b).argmax()) == c) is same


def test_logits_that_do_not_change_leave_an_infinite_margin():
    found = margin_bound(lambda z: 0 * z[:, :2] + torch.tensor([1.0, 0.0], dtype=F64), data()[0])
    assert bool((found == torch.inf).all())
