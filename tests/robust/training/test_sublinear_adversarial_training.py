"""Oracles of sublinear training: exact reports, backends that agree, autograd, and the limits of the threshold."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import BallTree
from torch.nn import functional

from _common import Example
from perturbkit.core.random import randint, randn, randperm
from perturbkit.robust import (
    HalfSpaceReporter,
    ShiftedReLUNet,
    SublinearAdversarialTrainer,
    expected_active_fraction,
)

F64 = torch.float64


def data(n=30, d=4, dtype=F64, seed=1):
    x = functional.normalize(randn((n, d), generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)
    return x, (x[:, 0] > 0).long()


def call(generator, dtype):
    net = ShiftedReLUNet(4, 64, generator=generator, dtype=dtype)
    return SublinearAdversarialTrainer(net, 0.05).fit(*data(dtype=dtype), n_steps=3)


def fit(x=None, y=None, n_steps=2, **options):
    net = ShiftedReLUNet(4, 64, generator=0, dtype=F64)
    known = data()
    return SublinearAdversarialTrainer(net, **{"epsilon": 0.05, **options}).fit(
        known[0] if x is None else x, known[1] if y is None else y, n_steps=n_steps
    )


EXAMPLE = Example(
    call=call,
    refusals=(
        (lambda: ShiftedReLUNet(0, 8), "d is 0"),
        (lambda: ShiftedReLUNet(2, 1), "m is 1"),
        (lambda: ShiftedReLUNet(2, 8, bias=math.nan), "bias is nan"),
        (lambda: expected_active_fraction(math.inf), "bias is inf"),
        (lambda: HalfSpaceReporter(torch.zeros(3)), "points has shape"),
        (lambda: HalfSpaceReporter(torch.zeros(3, 2), leaf_size=0), "leaf_size is 0"),
        (lambda: HalfSpaceReporter(torch.zeros(3, 2), rebuild_after=0.0), "rebuild_after is 0"),
        (lambda: HalfSpaceReporter(torch.zeros(3, 2)).query(torch.zeros(3), 0.0), "direction has shape"),
        (lambda: HalfSpaceReporter(torch.zeros(3, 2)).query(torch.zeros(2), math.inf), "threshold is inf"),
        (lambda: HalfSpaceReporter(torch.zeros(3, 2)).update(torch.tensor([0]), torch.zeros(2, 2)), "points has shape"),
        (lambda: SublinearAdversarialTrainer(torch.nn.Linear(2, 2), 0.1), "net is a Linear"),
        (lambda: fit(epsilon=2.0), "epsilon is 2"),
        (lambda: fit(lr=0.0), "lr is 0"),
        (lambda: fit(n_attack_steps=0), "n_attack_steps is 0"),
        (lambda: fit(backend="tree"), "backend is 'tree'"),
        (lambda: fit(x=2 * data()[0]), "norm is off by 1"),
        (lambda: fit(x=data(d=5)[0]), "x has shape"),
        (lambda: fit(y=torch.full((30,), 2)), "y holds labels from 2"),
        (lambda: fit(n_steps=0), "n_steps is 0"),
    ),
    stochastic=True,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    m=st.integers(1, 200),
    d=st.integers(1, 6),
    leaf_size=st.integers(1, 20),
    rebuild_after=st.sampled_from([0.3, 20.0]),
    dtype=st.sampled_from([torch.float32, F64]),
)
def test_reports_equal_brute_force_through_updates(seed, m, d, leaf_size, rebuild_after, dtype):
    g = torch.Generator().manual_seed(seed)
    points = randn((m, d), generator=g, dtype=dtype)
    reporter = HalfSpaceReporter(points, leaf_size=leaf_size, rebuild_after=rebuild_after)
    for _ in range(5):
        q, threshold = randn((7, d), generator=g, dtype=dtype), float(randn((1,), generator=g))
        rows, found = reporter.query_batch(q, threshold)
        wanted = (points * q[:, None]).sum(2) > threshold
        assert torch.equal(torch.stack([rows, found], 1), wanted.nonzero())
        assert torch.equal(reporter.query(q[3], threshold), wanted[3].nonzero()[:, 0])
        index = randperm(m, generator=g)[: max(1, m // 3)]
        scale = 3.0 if seed % 2 else 0.1
        points[index] += scale * randn((len(index), d), generator=g, dtype=dtype)
        reporter.update(index, points[index])


def test_equal_points_and_far_clusters_are_reported_too():
    points = torch.cat([torch.ones(50, 2), 1e3 * torch.ones(50, 2), torch.zeros(1, 2)]).double()
    reporter = HalfSpaceReporter(points, leaf_size=4)
    assert len(reporter.query(torch.tensor([1.0, 0.0], dtype=F64), 0.5)) == 100
    assert len(reporter.query(torch.tensor([1.0, 0.0], dtype=F64), 1.0)) == 50
    assert len(reporter.query(torch.zeros(2, dtype=F64), -1.0)) == 101
    assert len(reporter.query(torch.zeros(2, dtype=F64), 0.0)) == 0


def test_reports_agree_with_a_ball_tree_of_points_lifted_to_a_sphere():
    g = torch.Generator().manual_seed(3)
    points, q, b = randn((500, 3), generator=g, dtype=F64), randn((20, 3), generator=g, dtype=F64), 0.7
    square = points.square().sum(1)
    lifted = torch.cat([points, (square.max() - square).sqrt()[:, None]], 1).numpy()
    rows, found = HalfSpaceReporter(points).query_batch(q, b)
    for i in range(20):
        # |q - w|^2 = |q|^2 + M - 2 <w, q> over the lifted points.
        radius = math.sqrt(max(float(q[i].square().sum() + square.max()) - 2 * b, 0))
        near = BallTree(lifted).query_radius(np.append(q[i].numpy(), 0.0)[None], radius)[0]
        assert sorted(near.tolist()) == found[rows == i].tolist()


def test_the_tree_leaves_out_most_nodes_in_few_dimensions():
    points = randn((4096, 3), generator=torch.Generator().manual_seed(4), dtype=F64)
    reporter = HalfSpaceReporter(points)
    found = reporter.query(torch.tensor([1.0, 0.0, 0.0], dtype=F64), 2.0)
    assert 50 < len(found) < 150
    assert len(found) <= reporter.tested < 600
    assert reporter.visited < 0.5 * reporter.nodes


@pytest.mark.parametrize("n_attack_steps", [1, 3])
def test_both_backends_give_the_same_weights(n_attack_steps):
    x, y = data()
    weights, histories = [], []
    for backend in ("halfspace", "dense"):
        net = ShiftedReLUNet(4, 300, generator=0, dtype=F64)
        trainer = SublinearAdversarialTrainer(
            net, 0.1, lr=5.0, backend=backend, n_attack_steps=n_attack_steps
        )
        histories.append(trainer.fit(x, y, n_steps=10))
        weights.append(net.weight.detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(histories[0].loss, histories[1].loss)
    torch.testing.assert_close(histories[0].active_fraction, histories[1].active_fraction)
    assert bool((histories[1].visited_fraction == 1).all())
    assert bool((histories[0].visited_fraction <= 1).all())


def test_a_step_is_gradient_descent_at_the_attacked_inputs():
    x, y = data()
    net, copy = (ShiftedReLUNet(4, 50, generator=0, dtype=F64) for _ in range(2))
    history = SublinearAdversarialTrainer(net, 0.1, lr=2.0).fit(x, y, n_steps=1)
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(functional.cross_entropy(copy(leaf), y, reduction="sum"), leaf)[0]
    along = functional.normalize(gradient - (gradient * x).sum(1, keepdim=True) * x, dim=1)
    angle = 2 * math.asin(0.05)
    attacked = math.cos(angle) * x + math.sin(angle) * along
    torch.testing.assert_close((attacked - x).norm(dim=1), torch.full((30,), 0.1, dtype=F64))
    loss = functional.cross_entropy(copy(attacked), y)
    loss.backward()
    torch.testing.assert_close(history.loss, loss.detach()[None])
    torch.testing.assert_close(net.weight.detach(), (copy.weight - 2.0 * copy.weight.grad).detach())


def test_several_attack_steps_stay_in_the_cap_and_are_no_weaker():
    x, y = data()
    net = ShiftedReLUNet(4, 200, generator=0, dtype=F64)
    signs = 2.0 * y.double() - 1
    losses = {}
    for n_attack_steps in (1, 10):
        trainer = SublinearAdversarialTrainer(net, 0.3, n_attack_steps=n_attack_steps, backend="dense")
        with torch.no_grad():
            at, _ = trainer._attack(x, signs, None)
        torch.testing.assert_close(at.norm(dim=1), torch.ones(30, dtype=F64))
        assert float((at - x).norm(dim=1).max()) <= 0.3 + 1e-12
        losses[n_attack_steps] = float(functional.cross_entropy(net(at), y).detach())
    assert losses[10] >= losses[1] - 1e-3 > float(functional.cross_entropy(net(x), y).detach())


def test_the_active_share_is_that_of_a_normal_variable():
    x, y = data(200)
    for bias, tolerance in ((0.0, 0.02), (1.0, 0.02), (1.7, 0.01)):
        net = ShiftedReLUNet(4, 4000, bias=bias, generator=0, dtype=F64)
        history = SublinearAdversarialTrainer(net, 0.0, lr=1e-12).fit(x, y, n_steps=1)
        assert float(history.active_fraction[0]) == pytest.approx(
            expected_active_fraction(bias), abs=tolerance
        )
    assert ShiftedReLUNet(4, 1000).bias == pytest.approx(math.sqrt(0.4 * math.log(1000)))
    assert expected_active_fraction(math.sqrt(0.4 * math.log(1000))) < 1000**-0.2


def test_where_all_neurons_fire_the_net_is_affine():
    net = ShiftedReLUNet(4, 50, bias=-100.0, generator=0, dtype=F64)
    x, _ = data()
    f = net(x)[:, 1] - net(x)[:, 0]
    slope, offset = net.signs @ net.weight, 100 * net.signs.sum()
    torch.testing.assert_close(f, x @ slope + offset)


def test_work_is_counted_and_training_stands_attacks():
    x, _ = data(60, seed=8)
    y = (x[:, 0] > 0).long()
    keep = x[:, 0].abs() > 0.25
    x, y = x[keep], y[keep]
    counts = {}
    for backend in ("halfspace", "dense"):
        net = ShiftedReLUNet(4, 2048, generator=0, dtype=F64)
        history = SublinearAdversarialTrainer(net, 0.1, lr=20.0, backend=backend).fit(x, y, n_steps=120)
        counts[backend] = float(history.multiply_adds.double().mean())
    assert float(history.loss[-1]) < 0.3 * float(history.loss[0])
    assert counts["halfspace"] < 0.8 * counts["dense"]
    fired = 2048 * len(x) * float(history.active_fraction[-1])
    assert counts["dense"] >= 4 * (2 * len(x) * 2048 + fired)
    shifted = functional.normalize(
        x + 0.05 * (2 * randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)) - 1), dim=1
    )
    assert float((net(shifted).argmax(1) == y).double().mean()) > 0.95
