"""Oracles of projected gradient descent: linear classifiers, the set itself, and the same attack elsewhere."""

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import Ball, BallInBox, Box, Oracle, around, row_norm
from perturbkit.core.random import randn, uniform
from perturbkit.robust import projected_gradient

NORMS = ("l1", "l2", "linf")
DUAL = {"l1": "linf", "l2": "l2", "linf": "l1"}


def network(seed=0, d=6, k=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(d, 16), nn.Tanh(), nn.Linear(16, k)).to(dtype)
    for p in net.parameters():
        p.data = randn(p.shape, generator=g, dtype=dtype)
    return net


def inputs(n=8, d=6, seed=1, dtype=torch.float64):
    return uniform((n, d), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labelled(net, x):
    return net(x).argmax(1)


def linear(seed=0, d=6, k=4):
    w = randn((d, k), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (lambda z: z @ w), w


def call(model, generator, dtype):
    x = inputs(dtype=dtype)
    return projected_gradient(model.to(dtype), x, labelled(model, x), around(x, "linf", 0.2), n_steps=4, generator=generator)  # fmt: skip


def bad(**changes):
    net, x = network(), inputs()
    options = {"perturbation": around(x, "linf", 0.1), "y": labelled(net, x), "generator": 0} | changes
    perturbation, y = options.pop("perturbation"), options.pop("y")
    return lambda: projected_gradient(options.pop("model", net), x, y, perturbation, **options)


EXAMPLE = Example(
    model=lambda: network(dtype=torch.float32),
    with_model=call,
    chunked=lambda size: call(Chunked(network(), size), 0, torch.float64),
    refusals=(
        (bad(n_steps=0), "n_steps is 0"),
        (bad(n_restarts=0), "n_restarts is 0"),
        (bad(step_size=0.0), "step_size is 0"),
        (bad(loss="hinge"), "loss is 'hinge'"),
        (bad(perturbation=0.1), "perturbation is a float"),
        (bad(perturbation=Ball("linf", torch.ones(3))), "3 rows"),
        (bad(y=torch.full((8,), 3)), "labels from 3 to 3"),
        (bad(y=torch.zeros(5, dtype=torch.int64)), "y has shape"),
        (bad(y=torch.zeros(8)), "y has dtype"),
        (bad(model=lambda z: z[:, :1]), "at least two classes"),
        (lambda: projected_gradient(network(), inputs() * torch.nan, torch.zeros(8).long(), Ball("l2", 1.0)), "NaN"),
    ),
    stochastic=True,
)  # fmt: skip


class Chunked(Oracle):
    """An oracle that can be cast, for the common call."""

    def __init__(self, net, size):
        super().__init__(net, chunk_size=size)

    def to(self, dtype):
        return self


@pytest.mark.parametrize("loss", ["margin", "cross-entropy"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_classifier_breaks_exactly_beyond_its_distance(norm, loss):
    f, w = linear(k=2)  # with more classes a climb may end at another than the nearest
    x = inputs(40)
    y = f(x).argmax(1)
    gap = f(x).gather(1, y[:, None]) - f(x)
    steep = row_norm((w.T[y][:, None] - w.T[None]).flatten(0, 1), DUAL[norm]).reshape(gap.shape)
    distance = (gap / steep).scatter(1, y[:, None], torch.inf).amin(1)
    for factor, breaks in ((0.98, False), (1.05, True)):
        found = projected_gradient(
            f, x, y, Ball(norm, factor * distance), n_steps=60, loss=loss, n_restarts=3, generator=0
        )
        assert bool((found.success == breaks).all()), factor
    assert bool((found.radius <= 1.05 * distance + 1e-9).all())


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_found_is_wrong_and_in_the_set(norm):
    net, x = network(), inputs(60)
    y = labelled(net, x)
    radius = {"l1": 0.8, "l2": 0.4, "linf": 0.15}[norm]
    found = projected_gradient(net, x, y, around(x, norm, radius), n_steps=10, generator=0)
    assert 0.1 < float(found.success.double().mean()) < 1.0
    assert torch.equal(net(found.x).argmax(1) != y, found.success)
    assert float(found.x.min()) >= 0
    assert float(found.x.max()) <= 1
    size = row_norm(found.x - x, norm)
    assert bool((size <= radius + 1e-9).all())
    torch.testing.assert_close(found.radius[found.success], size[found.success])
    assert torch.equal(found.x[~found.success], x[~found.success])
    assert bool(torch.isinf(found.radius[~found.success]).all())


def test_one_step_from_the_clean_input_is_the_fast_gradient_sign():
    net, x = network(), inputs(20)
    y = labelled(net, x)
    leaf = x.clone().requires_grad_(True)
    nn.functional.cross_entropy(net(leaf), y, reduction="sum").backward()
    expected = x + 0.3 * leaf.grad.sign()
    found = projected_gradient(
        net, x, y, Ball("linf", 0.3), n_steps=1, step_size=0.3, loss="cross-entropy", random_start=False
    )
    wrong = net(expected).argmax(1) != y
    assert torch.equal(found.success, wrong)
    assert int(wrong.sum()) > 3
    torch.testing.assert_close(found.x[wrong], expected[wrong])


def test_radius_zero_changes_nothing_and_wrong_rows_cost_nothing():
    net, x = network(), inputs(10)
    y = labelled(net, x)
    y[:4] = (y[:4] + 1) % 3
    found = projected_gradient(net, x, y, around(x, "l2", 0.0), n_steps=5, generator=0)
    assert torch.equal(found.x, x)
    assert found.success.tolist() == [True] * 4 + [False] * 6
    assert found.radius[:4].tolist() == [0.0] * 4
    assert (found.cost.ngrad, found.cost.nfev) == (6 * 5, 10 + 6 * 5 + 6)


def test_restarts_only_add_and_spare_what_is_broken():
    net, x = network(3), inputs(80)
    y = labelled(net, x)
    one, five = (
        projected_gradient(net, x, y, around(x, "linf", 0.12), n_steps=3, n_restarts=n, generator=1)
        for n in (1, 5)
    )
    assert bool((five.success | ~one.success).all())
    assert int(five.success.sum()) >= int(one.success.sum())
    standing = int((~one.success).sum())
    assert one.cost.ngrad < 80 * 3
    assert 3 * standing <= one.cost.ngrad
    assert five.cost.ngrad <= one.cost.ngrad + 4 * 3 * standing
    assert five.cost.nfev <= five.cost.ngrad + 80 + 80 + 4 * standing
    again = projected_gradient(net, x, y, around(x, "linf", 0.12), n_steps=3, n_restarts=2, generator=7)
    assert torch.equal(net(again.x).argmax(1) != y, again.success)


def test_a_point_on_the_way_counts():
    # Wrong only in a thin shell that the first step enters and the second leaves again.
    def f(z):
        inside = torch.exp(-(((z[:, 0] - 0.5) / 0.1) ** 2))
        return torch.stack([torch.full_like(inside, 0.5) - 0.1 * z[:, 0], inside], 1)

    x = torch.zeros(1, 1, dtype=torch.float64)
    found = projected_gradient(
        f, x, torch.tensor([0]), Ball("linf", 5.0), n_steps=4, step_size=0.5, random_start=False
    )
    assert bool(found.success[0])
    assert 0.4 < float(found.radius[0]) < 0.6


def test_sets_that_broadcast_are_the_same_as_one_a_row():
    net, x = network(), inputs(12)
    y = labelled(net, x)
    low, high = torch.full((6,), -0.2, dtype=torch.float64), torch.full((6,), 0.1, dtype=torch.float64)
    y[0] = (y[0] + 1) % 3  # one row is already wrong, so that rows are picked
    shared = BallInBox(Ball("l2", 0.3), Box(low, high))
    apart = BallInBox(
        Ball("l2", torch.full((12,), 0.3, dtype=torch.float64)), Box(low.expand(12, 6), high.expand(12, 6))
    )
    a, b = (projected_gradient(net, x, y, s, n_steps=5, generator=2) for s in (shared, apart))
    assert torch.equal(a.x, b.x)


@pytest.mark.parametrize("eps", [0.06, 0.09])
def test_not_weaker_than_a_peer_at_equal_gradients(eps):
    torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is an extra of the tests")
    from perturbkit.data import digits_classifier, load_digits8

    net, digits = digits_classifier(8).module, load_digits8("test").rows(range(150))
    ours = projected_gradient(net, digits.x, digits.y, around(digits.x, "linf", eps), n_steps=20, generator=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attack = torchattacks.PGD(net, eps=eps, alpha=eps / 4, steps=20)
        peer = net(attack(digits.x, digits.y)).argmax(1) != digits.y
    assert int(ours.success.sum()) >= int(peer.sum())
    assert ours.cost.ngrad <= 150 * 20
