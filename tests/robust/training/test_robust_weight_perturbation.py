"""Oracles of weight perturbation and of adversarial training: exact restore, sizes, thresholds, and a step by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from _common import Example
from perturbkit.core import Oracle, around, assign, flatten, unflatten
from perturbkit.core.random import randint, randn, uniform
from perturbkit.robust import (
    JacobianRegularizer,
    RobustWeightPerturbation,
    adversarial_train,
    adversarial_weight_perturbation,
    projected_gradient,
)
from perturbkit.robust.training._loops import ascend

F64 = torch.float64


def network(seed=0, dtype=F64, norm=False):
    middle = [nn.BatchNorm1d(8)] if norm else []
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Linear(5, 8), *middle, nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    assign(net, 0.5 * randn((len(flatten(net)),), generator=torch.Generator().manual_seed(seed), dtype=dtype))
    return net


def data(n=40, seed=1, dtype=F64):
    x = uniform((n, 5), generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x, (3 * x[:, 0]).long().clamp(max=2)


def losses(net, x, y):
    return functional.cross_entropy(net(x), y, reduction="none")


def shift_of(worse, net, x, y):
    before = flatten(net)
    with worse(net, x, y):
        return flatten(net) - before


def is_matrix(net):
    return torch.cat([torch.full((p.numel(),), p.ndim > 1) for p in net.parameters()])


def call(generator, dtype):
    net, (x, y) = network(dtype=dtype), data(dtype=dtype)
    history = adversarial_train(
        net, x, y, 0.05, epochs=2, weight_perturbation=RobustWeightPerturbation(n_steps=2), n_attack_steps=2,
        evaluate=lambda m: 0.5, generator=generator,
    )  # fmt: skip
    assert float(flatten(net).abs().sum()) > 0
    return history


EXAMPLE = Example(
    call=call,
    refusals=(
        (lambda: RobustWeightPerturbation(gamma=-1.0), "gamma is -1"),
        (lambda: RobustWeightPerturbation(loss_threshold=-1.0), "loss_threshold is -1"),
        (lambda: RobustWeightPerturbation(n_steps=0), "n_steps is 0"),
        (lambda: RobustWeightPerturbation(lr=0.0), "lr is 0"),
        (lambda: RobustWeightPerturbation(scaling="layer"), "scaling is 'layer'"),
        (lambda: adversarial_weight_perturbation(gamma=-1.0), "gamma is -1"),
        (lambda: RobustWeightPerturbation().loss(lambda z: z, *data()), "model is a function"),
        (lambda: adversarial_train(network(), *data(), 0.0, epochs=1), "epsilon is 0"),
        (lambda: adversarial_train(network(), *data(), 0.1, epochs=0), "epochs is 0"),
        (lambda: adversarial_train(network(), data()[0], data(39)[1], 0.1, epochs=1), "y has shape"),
        (lambda: adversarial_train(network(), *data(), 0.1, epochs=1, norm="l3"), "norm is 'l3'"),
        (lambda: adversarial_train(network(), *data(), 0.1, epochs=1, n_attack_steps=0), "n_attack_steps is 0"),
        (lambda: adversarial_train(network(), *data(), 0.1, epochs=1, attack_step=0.0), "attack_step is 0"),
        (lambda: adversarial_train(network(), *data(), 0.1, epochs=1, momentum=1.0), "momentum is 1"),
        (lambda: adversarial_train(network(), *data(), 0.1, epochs=1, drops=(2.0,)), "drops is 2"),
        (lambda: adversarial_train(network(), *data(), 0.1, epochs=1, batch_size=0), "batch_size is 0"),
    ),
    stochastic=True,
)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), gamma=st.sampled_from([1e-4, 0.01, 0.5]), n_steps=st.integers(1, 4))
def test_the_perturbation_has_the_relative_size_asked_for_and_leaves_biases(seed, gamma, n_steps):
    net, (x, y) = network(seed), data(seed=seed + 1)
    before, chosen = flatten(net), is_matrix(net)
    worse = RobustWeightPerturbation(gamma=gamma, n_steps=n_steps, loss_threshold=math.inf)
    shift = shift_of(worse, net, x, y)
    assert float(shift.norm() / before[chosen].norm()) == pytest.approx(gamma, rel=1e-9)
    assert not bool(shift[~chosen].any())
    assert torch.equal(flatten(net), before)


def test_weights_come_back_bit_for_bit_also_after_an_error():
    net, (x, y) = network(dtype=torch.float32), data(dtype=torch.float32)
    before = flatten(net)
    moved = []

    def fail():
        moved.append(flatten(net))
        raise KeyError

    with pytest.raises(KeyError), RobustWeightPerturbation(gamma=0.3)(net, x, y):
        fail()
    assert not torch.equal(moved[0], before)
    assert torch.equal(flatten(net), before)


def test_the_ascent_is_the_one_of_the_paper():
    net, (x, y) = network(), data()
    before, chosen = flatten(net), is_matrix(net).double()
    threshold = float(losses(net, x, y).detach().median())
    gamma, lr = 0.05, 0.1
    found = shift_of(
        RobustWeightPerturbation(gamma=gamma, loss_threshold=threshold, n_steps=3, lr=lr), net, x, y
    )
    copy, v, shift = network(), torch.zeros_like(before), torch.zeros_like(before)
    for _ in range(3):
        assign(copy, before + shift)
        copy.zero_grad()
        each = losses(copy, x, y)
        (each[each < threshold].sum() / len(x)).backward()
        v += lr * torch.cat([p.grad.reshape(-1) for p in copy.parameters()]) * chosen
        shift = gamma * v * (before * chosen).norm() / v.norm()
    torch.testing.assert_close(found, shift)


def test_one_step_on_all_rows_is_adversarial_weight_perturbation_but_for_the_scale():
    net, (x, y) = network(), data()
    gradient = torch.autograd.grad(losses(net, x, y).mean(), [net[0].weight, net[2].weight])
    found = shift_of(adversarial_weight_perturbation(gamma=0.02), net, x, y)
    together = shift_of(RobustWeightPerturbation(gamma=0.02, loss_threshold=math.inf, n_steps=1), net, x, y)
    for name, g, weight in (
        ("0.weight", gradient[0], net[0].weight),
        ("2.weight", gradient[1], net[2].weight),
    ):
        torch.testing.assert_close(unflatten(found, net)[name], 0.02 * weight.detach().norm() * g / g.norm())
        ratio = unflatten(together, net)[name] / unflatten(found, net)[name]
        torch.testing.assert_close(ratio[g != 0], ratio[g != 0].mean().expand(int((g != 0).sum())))


def test_small_losses_rise_and_the_ascent_stops_where_none_is_left():
    net, (x, y) = network(), data()
    before = losses(net, x, y).detach()
    small = before < before.median()
    with RobustWeightPerturbation(gamma=0.1, loss_threshold=float(before.median()))(net, x, y):
        assert float(losses(net, x, y)[small].mean().detach()) > float(before[small].mean()) + 0.05
    # One row just below the threshold: the first step takes it above, and no other takes place.
    options = {"gamma": 0.1, "loss_threshold": float(before[0]) + 1e-9}
    one = shift_of(RobustWeightPerturbation(n_steps=1, **options), net, x[:1], y[:1])
    nine = shift_of(RobustWeightPerturbation(n_steps=9, **options), net, x[:1], y[:1])
    assert torch.equal(one, nine)
    all_rows = RobustWeightPerturbation(n_steps=9, gamma=0.1, loss_threshold=math.inf)
    assert not torch.equal(one, shift_of(all_rows, net, x[:1], y[:1]))


@pytest.mark.parametrize("norm", [False, True])
def test_the_loss_has_the_gradient_of_the_context(norm):
    net, (x, y) = network(norm=norm), data()
    worse = RobustWeightPerturbation(gamma=0.2, n_steps=2)
    with worse(net, x, y):
        losses(net, x, y).mean().backward()
    wanted = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    worse.loss(net, x, y).backward()
    for p, g in zip(net.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g)
    plain = torch.autograd.grad(losses(net, x, y).mean(), net[0].weight)[0]
    assert float((plain - wanted[0]).norm()) > 0.01 * float(plain.norm())


def test_the_ascent_moves_no_running_statistics():
    net, (x, y) = network(norm=True), data()
    net.train()
    with RobustWeightPerturbation()(net, x, y):
        pass
    assert int(net[1].num_batches_tracked) == 0
    assert not bool(net[1].running_mean.any())
    assert all(p.grad is None for p in net.parameters())


def trained(worse, **options):
    net, (x, y) = network(), data()
    history = adversarial_train(
        net, x, y, 0.05, epochs=3, weight_perturbation=worse, batch_size=16, n_attack_steps=3, generator=7, **options
    )  # fmt: skip
    return net, history


def test_threshold_zero_is_plain_adversarial_training_bit_for_bit():
    plain, first = trained(None)
    none, second = trained(RobustWeightPerturbation(loss_threshold=0.0))
    some, _ = trained(RobustWeightPerturbation())
    assert torch.equal(flatten(plain), flatten(none))
    assert torch.equal(first.loss, second.loss)
    assert not torch.equal(flatten(plain), flatten(some))


def test_a_step_takes_the_gradient_at_perturbed_weights_from_the_weights_as_they_were():
    net, (x, y) = network(), data()
    start, worse = flatten(net), RobustWeightPerturbation(gamma=0.3, n_steps=1)
    attacked = (x + 0.01).clamp(0, 1)
    history = adversarial_train(
        net, x, y, 0.05, epochs=1, weight_perturbation=worse, attack=lambda m, a, b: (a + 0.01).clamp(0, 1),
        batch_size=40, lr=0.2, weight_decay=0.1, generator=0,
    )  # fmt: skip
    copy = network()
    with worse(copy, attacked, y):
        value = losses(copy, attacked, y).mean()
        value.backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in copy.parameters()])
    torch.testing.assert_close(flatten(net), start - 0.2 * (gradient + 0.1 * start))
    torch.testing.assert_close(history.loss, value.detach()[None])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_attack_stays_in_its_set_and_nears_the_best_corner(norm):
    net, (x, y) = network(), data()
    net.train()
    found = ascend(Oracle(net), x, y, 0.1, norm, (0.0, 1.0), 20, 0.025, torch.Generator().manual_seed(0))
    assert bool(around(x, norm, 0.1).contains(found - x).all())
    assert net.training
    # Nearly linear at this radius: the first-order maximum is the set's support function.
    leaf = x.clone().requires_grad_()
    clean = losses(net, leaf, y)
    gain = around(x, norm, 0.1).support(torch.autograd.grad(clean.sum(), leaf)[0])
    reached = (losses(net, found, y) - clean).detach()
    assert float(reached.mean()) > 0.8 * float(gain.mean())


def test_adversarial_training_stands_where_plain_training_falls_and_takes_any_loss():
    # One feature with a wide gap that is wrong in a tenth of the rows, four that are always right by a hair.
    g = torch.Generator().manual_seed(2)
    y = randint(0, 2, (300,), generator=g)
    sign = 2.0 * y.double()[:, None] - 1
    wide = sign * torch.where(uniform((300, 1), generator=g) < 0.1, -1.0, 1.0)
    x = torch.cat([0.5 + 0.2 * wide, 0.5 + 0.03 * sign + 0.005 * randn((300, 4), generator=g, dtype=F64)], 1)
    standing = {}
    for name, epsilon, loss in (
        ("plain", 1e-9, {}),
        ("attacked", 0.06, {}),
        ("penalised", 0.06, {"loss": JacobianRegularizer(weight=1e-4, generator=0).loss}),
    ):
        net = network()
        adversarial_train(net, x, y, epsilon, epochs=30, n_attack_steps=3, generator=0, batch_size=50, **loss)
        found = projected_gradient(net, x, y, around(x, "linf", 0.06), generator=0)
        standing[name] = 1 - float(found.success.double().mean())
    assert min(standing["attacked"], standing["penalised"]) > 0.85
    assert standing["plain"] < 0.6


def test_the_rate_falls_scores_are_kept_and_modes_come_back():
    net, (x, y) = network(norm=True), data()
    net.eval()
    net[0].train()
    seen = []
    history = adversarial_train(
        net, x, y, 0.05, epochs=4, n_attack_steps=1, drops=(0.5,), lr=0.1, batch_size=40, momentum=0.0,
        weight_decay=0.0, evaluate=lambda m: seen.append((m.training, flatten(m))) or len(seen), generator=0,
    )  # fmt: skip
    assert history.score.tolist() == [1, 2, 3, 4]
    assert len(history.reference_loss) == 0
    assert [training for training, _ in seen] == [False] * 4
    steps = [float((b - a).norm()) for (_, a), (_, b) in itertools.pairwise(seen)]
    assert steps[1] < 0.3 * steps[0]
    assert [m.training for m in net] == [True, False, False, False]
