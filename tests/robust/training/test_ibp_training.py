"""Oracles of interval bound propagation: elision, verification against attacks, and the training's schedule."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from _common import Example
from perturbkit.core import around
from perturbkit.core.random import randn, uniform
from perturbkit.robust import (
    IBPTrainer,
    elided_worst_logits,
    fast_minimum_norm,
    interval_bounds,
    projected_gradient,
    verified_accuracy,
)

F64 = torch.float64


def network(seed=0, d=5, k=3, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Linear(d, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, k)).to(
            dtype
        )
    for p in net.parameters():
        p.data = 0.4 * randn(p.shape, generator=g, dtype=dtype)
    return net.eval()


def data(n=60, d=5, k=3, dtype=F64):
    x = uniform((n, d), generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x, (k * x[:, 0]).long().clamp(max=k - 1)


def trained(generator, dtype, **options):
    net = network(dtype=dtype)
    x, y = data(dtype=dtype)
    history = IBPTrainer(net, 0.05, batch_size=20, generator=generator, **options).fit(x, y, n_steps=8)
    return net, history


def call(generator, dtype):
    net, _ = trained(generator, dtype)
    x, y = data(dtype=dtype)
    lower, upper = interval_bounds(net, x - 0.1, x + 0.1)
    return {
        "worst": elided_worst_logits(net, x, y, 0.1).detach(),
        "lower": lower.detach(),
        "upper": upper.detach(),
    }


EXAMPLE = Example(
    call=call,
    refusals=(
        (lambda: interval_bounds(lambda z: z, *[torch.zeros(1, 2)] * 2), "model is a function"),
        (lambda: interval_bounds(network(), torch.ones(1, 5), torch.zeros(1, 5)), "lower is above upper"),
        (lambda: interval_bounds(network(), torch.ones(1, 5), torch.ones(1, 4)), "upper has shape"),
        (lambda: elided_worst_logits(network(), *data(), -0.1), "epsilon is -0.1"),
        (lambda: elided_worst_logits(network(), data()[0], torch.full((60,), 5), 0.1), "labels from 5"),
        (lambda: elided_worst_logits(nn.ReLU(), data()[0][None], torch.zeros(1).long(), 0.1), "shape"),
        (lambda: verified_accuracy(network(), *data(), 0.1, batch_size=0), "batch_size is 0"),
        (lambda: IBPTrainer(network(), 0.0), "epsilon is 0"),
        (lambda: IBPTrainer(network(), 0.1, kappa=2.0), "kappa is 2"),
        (lambda: IBPTrainer(network(), 0.1, warmup=0.6, rampup=0.6), "rampup is 0.6"),
        (lambda: IBPTrainer(network(), 0.1).fit(*data(), n_steps=0), "n_steps is 0"),
        (lambda: IBPTrainer(nn.Sequential(nn.Linear(5, 3), nn.Softmin(1)), 0.1).fit(*data(dtype=torch.float32), n_steps=40), "Softmin"),
    ),
    stochastic=True,
)  # fmt: skip


class Wrapped(nn.Module):
    """A network whose last layer no Sequential shows."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("wrap", [lambda net: net, Wrapped])
def test_elision_is_sound_and_tighter_than_comparing_bounds(wrap):
    net = network()
    x, y = data()
    worst = elided_worst_logits(wrap(net), x, y, 0.1, clip=None)
    lower, upper = interval_bounds(net, x - 0.1, x + 0.1)
    loose = (upper - lower.gather(1, y[:, None])).scatter(1, y[:, None], 0.0)
    assert bool((worst <= loose + 1e-12).all())
    assert float((loose - worst).detach().max()) > 0.05
    g = torch.Generator().manual_seed(2)
    for _ in range(200):
        out = net(x + uniform(x.shape, -0.1, 0.1, generator=g, dtype=F64))
        assert bool((out - out.gather(1, y[:, None]) <= worst + 1e-12).all())


def test_elision_of_a_linear_network_is_exact():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    x = randn((6, 4), generator=torch.Generator().manual_seed(3), dtype=F64)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    worst = elided_worst_logits(net, x, y, 0.2, clip=None)
    weight = net[1].weight - net[1].weight[y][:, None]
    corner = x[:, None] + 0.2 * weight.sign()  # one corner for every class
    reached = (weight * corner).sum(2) + net[1].bias - net[1].bias[y][:, None]
    torch.testing.assert_close(worst, reached)


def test_radius_zero_gives_the_clean_differences_and_accuracy():
    net = network()
    x, y = data()
    out = net(x)
    torch.testing.assert_close(elided_worst_logits(net, x, y, 0.0), out - out.gather(1, y[:, None]))
    assert verified_accuracy(net, x, y, 0.0) == float((out.argmax(1) == y).double().mean())


def test_the_box_is_cut_to_the_valid_range():
    net = nn.Sequential(nn.Linear(1, 2)).double()
    net[0].weight.data, net[0].bias.data = torch.tensor([[0.0], [1.0]], dtype=F64), torch.zeros(2, dtype=F64)
    x, y = torch.tensor([[0.9]], dtype=F64), torch.tensor([0])
    assert float(elided_worst_logits(net, x, y, 0.5)[0, 1].detach()) == pytest.approx(1.0)
    assert float(elided_worst_logits(net, x, y, 0.5, clip=None)[0, 1].detach()) == pytest.approx(1.4)


def test_verified_rows_resist_the_attack_and_the_bound_matches_batch_by_batch():
    net = network()
    x, y = data()
    y = net(x).argmax(1)
    for eps in (0.01, 0.05):
        share = verified_accuracy(net, x, y, eps, batch_size=7)
        worst = elided_worst_logits(net, x, y, eps)
        proved = worst.scatter(1, y[:, None], -torch.inf).amax(1) < 0
        assert share == pytest.approx(float(proved.double().mean()))
        found = projected_gradient(net, x, y, around(x, "linf", eps), n_steps=40, generator=0)
        assert not bool((found.success & proved).any())
        assert 0 < share < 1


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.sampled_from([0.5, 1.0, 3.0]))
def test_the_proved_radius_never_exceeds_the_radius_of_an_attack(seed, scale):
    net = network(seed)
    for p in net.parameters():
        p.data *= scale
    x = uniform((6, 5), generator=torch.Generator().manual_seed(seed + 1), dtype=F64)
    y = net(x).argmax(1)
    attacked = fast_minimum_norm(net, x, y, n_steps=30).radius
    for row in range(6):
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            proved = verified_accuracy(net, x[row : row + 1], y[row : row + 1], middle) == 1.0
            low, high = (middle, high) if proved else (low, middle)
        assert low <= float(attacked[row]) + 1e-9


def test_the_loss_follows_its_schedule():
    _, history = trained(0, F64, warmup=0.25, rampup=0.5, kappa=0.25)
    done = torch.arange(8, dtype=F64) / 7
    share = ((done - 0.25) / 0.5).clamp(0, 1)
    torch.testing.assert_close(history.epsilon, 0.05 * share)
    torch.testing.assert_close(history.kappa, 1 - 0.75 * share)


def test_the_first_loss_is_cross_entropy_and_the_last_mixes_in_the_worst_logits():
    net = network()
    x, y = data()
    history = IBPTrainer(net, 0.05, batch_size=60, warmup=0.0, rampup=0.0, kappa=0.3, lr=1e-30).fit(
        x, y, n_steps=2
    )
    clean = functional.cross_entropy(net(x), y)
    worst = functional.cross_entropy(elided_worst_logits(net, x, y, 0.05), y)
    torch.testing.assert_close(history.loss[-1], (0.3 * clean + 0.7 * worst).detach())
    plain = IBPTrainer(network(), 0.05, batch_size=60, warmup=1.0, rampup=0.0, lr=1e-30).fit(x, y, n_steps=2)
    torch.testing.assert_close(plain.loss[0], clean.detach())


def test_training_with_intervals_verifies_where_plain_training_does_not():
    x, y = data(400)
    keep = ((3 * x[:, 0]) % 1 - 0.5).abs() < 0.25  # leave a gap between the classes
    x, y = x[keep], y[keep]
    share = {}
    for name, options in {"plain": {"warmup": 1.0, "rampup": 0.0}, "intervals": {}}.items():
        net = network()
        history = IBPTrainer(net, 0.06, batch_size=50, lr=1e-2, generator=0, **options).fit(x, y, n_steps=400)
        share[name] = verified_accuracy(net, x, y, 0.06)
        assert bool(history.loss.isfinite().all())
    assert share["intervals"] > 0.6
    assert share["plain"] < share["intervals"] - 0.3


def test_batch_normalisation_is_trained_on_clean_batches_and_modes_come_back():
    net = nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3)
    ).double()
    net.train()
    net[3].eval()
    x, y = data()
    IBPTrainer(net, 0.05, batch_size=60, warmup=0.0, rampup=0.0, lr=1e-30, generator=0).fit(x, y, n_steps=1)
    assert [m.training for m in net] == [True, True, True, False, True]
    torch.testing.assert_close(net[1].running_mean, 0.1 * net[0](x).mean(0))
    torch.testing.assert_close(net[1].running_var, 0.9 + 0.1 * net[0](x).var(0))


def test_agrees_with_a_plain_loop_over_layers():
    net = network()
    x, _ = data()
    mu, r = x, torch.full_like(x, 0.1)
    for layer in net:
        if isinstance(layer, nn.Linear):
            mu, r = mu @ layer.weight.T + layer.bias, r @ layer.weight.abs().T
        else:
            low, high = (mu - r).relu(), (mu + r).relu()
            mu, r = (low + high) / 2, (high - low) / 2
    lower, upper = interval_bounds(net, x - 0.1, x + 0.1)
    torch.testing.assert_close(lower, mu - r)
    torch.testing.assert_close(upper, mu + r)


def test_history_is_frozen():
    _, history = trained(0, F64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        history.loss = None
