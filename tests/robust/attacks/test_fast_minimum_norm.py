"""Oracles of the minimum-norm attack: exact distances of linear classifiers, and the same attack elsewhere."""

import math

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import Oracle, row_norm
from perturbkit.core.random import randn, uniform
from perturbkit.robust import fast_minimum_norm

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


def attack(model, dtype, **options):
    x = inputs(dtype=dtype)
    return fast_minimum_norm(model, x, torch.zeros(8, dtype=torch.int64), n_steps=6, **options)


def bad(model=None, y=None, x=None, **options):
    x = inputs() if x is None else x
    return lambda: fast_minimum_norm(
        model or network(), x, torch.zeros(8).long() if y is None else y, **options
    )


EXAMPLE = Example(
    model=lambda: network(dtype=torch.float32),
    with_model=lambda model, generator, dtype: attack(model.to(dtype), dtype),
    chunked=lambda size: attack(Oracle(network(), chunk_size=size), torch.float64, norm="l2"),
    refusals=(
        (bad(norm="l3"), "norm is 'l3'"),
        (bad(n_steps=0), "n_steps is 0"),
        (bad(gamma=1.0), "gamma is 1"),
        (bad(x=inputs() + 1), "intersection is empty"),
        (bad(y=torch.full((8,), 7)), "labels from 7"),
        (bad(y=torch.zeros(3).long()), "y has shape"),
        (bad(model=lambda z: z[:, 0]), "at least two classes"),
        (bad(x=inputs() * math.inf), "infinite"),
    ),
)  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
def test_a_linear_classifier_without_bounds_gives_the_exact_distance(norm):
    w = randn((6, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = inputs(40)
    y = (x @ w).argmax(1)
    gap = (x @ w).gather(1, y[:, None]) - x @ w
    steep = row_norm((w.T[y][:, None] - w.T[None]).flatten(0, 1), DUAL[norm]).reshape(gap.shape)
    distance = (gap / steep).scatter(1, y[:, None], torch.inf).amin(1)
    found = fast_minimum_norm(lambda z: z @ w, x, y, norm=norm, bounds=None, n_steps=60)
    assert bool(found.success.all())
    assert bool((found.radius >= distance - 1e-12).all())
    assert float((found.radius / distance).median()) < 1.005
    assert float((found.radius / distance).max()) < 1.05


@pytest.mark.parametrize("norm", NORMS)
def test_bounds_that_bind_are_kept_and_the_detour_is_found(norm):
    # Two classes, one steep direction that the bounds close after 0.05: the rest must be made of the other one.
    w = torch.tensor([[10.0, -10.0], [1.0, -1.0]], dtype=torch.float64)
    x = torch.tensor([[0.05, 0.9]], dtype=torch.float64)
    found = fast_minimum_norm(
        lambda z: z @ w - torch.tensor([0.2, -0.2]), x, torch.tensor([0]), norm=norm, n_steps=200
    )
    needed = 0.05 * 10 + 0.9 - 0.2  # the logit gap halved; 10 d0 + d1 must reach it with d0 <= 0.05
    d1 = needed - 0.5
    expected = {"l1": 0.05 + d1, "l2": math.hypot(0.05, d1), "linf": d1}[norm]
    assert bool(found.success[0])
    assert float(found.x.min()) >= 0
    assert expected - 1e-9 <= float(found.radius[0]) <= 1.06 * expected


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_found_is_wrong_valid_and_measured(norm):
    net, x = network(), inputs(60)
    y = net(x).argmax(1)
    found = fast_minimum_norm(net, x, y, norm=norm, n_steps=20)
    assert float(found.success.double().mean()) > 0.5
    assert torch.equal(net(found.x).argmax(1) != y, found.success)
    size = row_norm(found.x - x, norm)
    torch.testing.assert_close(found.radius[found.success], size[found.success])
    assert bool(torch.isinf(found.radius[~found.success]).all())
    assert float(found.x.min()) >= 0
    assert float(found.x.max()) <= 1
    assert found.cost.ngrad == 60 * 20
    assert found.cost.nfev <= 60 * (20 + 9)


def test_rows_already_wrong_have_radius_zero():
    net, x = network(), inputs(10)
    y = net(x).argmax(1)
    y[3] = (y[3] + 1) % 3
    found = fast_minimum_norm(net, x, y, n_steps=5)
    assert float(found.radius[3]) == 0.0
    assert torch.equal(found.x[3], x[3])
    assert bool((found.radius[found.success][:3] > 0).all())


def test_a_tie_that_is_answered_wrongly_is_wrong_already():
    x = torch.full((1, 2), 0.5, dtype=torch.float64)
    found = fast_minimum_norm(lambda z: z[:, :1].expand(-1, 2) + 0.0 * z, x, torch.tensor([1]), n_steps=5)
    assert found.success.tolist() == [True]
    assert found.radius.tolist() == [0.0]


def test_sparse_perturbations_are_found_for_every_digit():
    from perturbkit.data import digits_classifier, load_digits8

    net, digits = digits_classifier(8).module, load_digits8("test").rows(range(100))
    found = fast_minimum_norm(net, digits.x, digits.y, norm="l1", n_steps=16)
    assert bool(found.success.all())
    assert float(found.radius.median()) < 1.3


def test_a_gradient_of_zero_is_survived():
    def steps(z):
        hard = (z > 0.5).to(z.dtype).sum(1, keepdim=True) + 0 * z.sum(1, keepdim=True)
        return torch.cat([hard, 2.5 - hard], 1)

    x = torch.full((2, 3), 0.9, dtype=torch.float64)
    for bounds in ((0.0, 1.0), None):
        found = fast_minimum_norm(steps, x, torch.tensor([0, 0]), bounds=bounds, n_steps=5)
        assert not bool(found.success.any())
        assert torch.equal(found.x, x)


def test_scale_of_the_logits_does_not_matter():
    net, x = network(), inputs(20)
    y = net(x).argmax(1)
    a, b = (fast_minimum_norm(lambda z, c=c: c * net(z), x, y, norm="l2", n_steps=20) for c in (1.0, 1e3))
    torch.testing.assert_close(a.radius, b.radius, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_not_weaker_than_a_peer_at_small_budgets(norm):
    foolbox = pytest.importorskip("foolbox", reason="foolbox is an extra of the tests")
    from perturbkit.data import digits_classifier, load_digits8

    net, digits = digits_classifier(8).module, load_digits8("test").rows(range(60))
    x, y = digits.x, digits.y
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    peers = {
        "linf": [foolbox.attacks.LInfFMNAttack],
        "l2": [foolbox.attacks.L2FMNAttack, foolbox.attacks.DDNAttack],
    }[norm]
    for steps in (16, 30):
        ours = fast_minimum_norm(net, x, y, norm=norm, n_steps=steps)
        for peer in peers:
            raw, _, _ = peer(steps=steps)(model, x, y, epsilons=None)
            theirs = torch.where(net(raw).argmax(1) != y, row_norm(raw - x, norm), torch.inf)
            assert float(ours.radius.median()) <= float(theirs.median()), (steps, peer)
            both = torch.isfinite(theirs)
            assert float(ours.radius[both].mean()) <= float(theirs[both].mean()), (steps, peer)
