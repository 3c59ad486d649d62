"""Oracles of the deviation bound: quadratics, where the linearisation is exact, corners of the box, and attacks."""

import itertools
import math

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.explain import attack_attribution, attribution_deviation_bound, gradient_attribution


def matrix(d=4, seed=0):
    a = torch.randn(d, d, generator=torch.Generator().manual_seed(seed)).double()
    return (a + a.T) / 2


def quadratic(a):
    return gradient_attribution(lambda x: (x @ a.to(x) * x).sum(1) / 2)


def network(d=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(d, 7), nn.Softplus(beta=3), nn.Linear(7, 3)).to(dtype)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype)
    return net


def rows(n=3, d=4, seed=1, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


G = quadratic(matrix())

EXAMPLE = Example(
    call=lambda generator, dtype: (
        attribution_deviation_bound(G, rows(dtype=dtype), epsilon=0.1, jacobian="power", generator=generator),
        attack_attribution(G, rows(dtype=dtype), epsilon=0.1, steps=3, k=2, generator=generator),
    )[1],
    refusals=(
        (lambda: attribution_deviation_bound(G, rows(), epsilon=-1), "epsilon is -1"),
        (lambda: attribution_deviation_bound(G, rows(), epsilon=1, norm="l1"), "norm is 'l1'"),
        (lambda: attribution_deviation_bound(G, rows(), epsilon=1, distance="l2"), "distance is 'l2'"),
        (lambda: attribution_deviation_bound(G, rows(), epsilon=1, jacobian="svd"), "jacobian is 'svd'"),
        (
            lambda: attribution_deviation_bound(G, rows(), epsilon=1, hessian_lipschitz=-1),
            "hessian_lipschitz is -1",
        ),
        (lambda: attribution_deviation_bound(G, rows(), epsilon=1, n_iter=0), "n_iter is 0"),
        (lambda: attribution_deviation_bound(lambda x: x.sum(1), rows(), epsilon=1), "attribution has shape"),
        (lambda: attack_attribution(G, rows(), epsilon=0), "epsilon is 0"),
        (lambda: attack_attribution(G, rows(), epsilon=1, objective="l2"), "objective is 'l2'"),
        (lambda: attack_attribution(G, rows(), epsilon=1, k=5, objective="topk"), "k is 5"),
        (lambda: attack_attribution(G, rows(), epsilon=1, k=2, steps=0), "steps is 0"),
    ),
    stochastic=True,
)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("jacobian", ["exact", "power"])
def test_the_bound_of_a_quadratic_is_attained(seed, jacobian):
    a, x = matrix(seed=seed), rows(seed=seed)
    g = quadratic(a)
    found = attribution_deviation_bound(g, x, epsilon=0.3, jacobian=jacobian, n_iter=2000, generator=0)
    expected = 0.3 * torch.linalg.matrix_norm(a, 2)
    torch.testing.assert_close(found.value, expected.expand(3), rtol=1e-6, atol=0)
    moved = (g(x + found.direction) - g(x)).norm(dim=1).detach()
    torch.testing.assert_close(moved, expected.expand(3), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.direction.norm(dim=1), torch.full((3,), 0.3).double())
    torch.testing.assert_close(
        found.spectral_norm, torch.linalg.matrix_norm(a, 2).expand(3), rtol=1e-6, atol=0
    )


def test_a_diagonal_in_the_box_is_exact():
    diagonal = torch.tensor([1.0, -2.0, 3.0, 0.5]).double()
    found = attribution_deviation_bound(quadratic(diagonal.diag()), rows(), epsilon=0.2, norm="linf")
    torch.testing.assert_close(found.value, (0.2 * diagonal.norm()).expand(3))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_the_box_bound_covers_every_corner(seed):
    a = matrix(seed=seed)
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4))).double()
    worst = 0.2 * (corners @ a).norm(dim=1).max()
    for jacobian in ("exact", "power"):
        found = attribution_deviation_bound(
            quadratic(a), rows(1), epsilon=0.2, norm="linf", jacobian=jacobian, n_iter=2000, generator=0
        ).value
        assert float(found) >= float(worst) * (1 - 1e-6)
    both = min(0.4 * float(torch.linalg.matrix_norm(a, 2)), 0.2 * float(a.abs().sum(1).norm()))
    exact = attribution_deviation_bound(quadratic(a), rows(1), epsilon=0.2, norm="linf").value
    assert float(exact) == pytest.approx(both)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_zero_radius_and_monotone(norm, distance):
    g, x = gradient_attribution(network(), torch.tensor([0, 1, 2])), rows(d=5)
    values = [
        attribution_deviation_bound(g, x, epsilon=e, norm=norm, distance=distance).value
        for e in (0.0, 0.01, 0.1, 1.0, 10.0)
    ]
    torch.testing.assert_close(values[0], torch.zeros(3).double(), rtol=0, atol=1e-12)
    for a, b in itertools.pairwise(values):
        assert bool((b >= a - 1e-12).all())
    if distance == "cosine":
        assert bool((values[-1] == 2).all())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_cosine_bound_covers_random_and_attacked_changes_of_a_quadratic(seed, norm):
    a, x = matrix(seed=seed), rows(4, seed=seed + 9) * 3
    g, epsilon = quadratic(a), 0.2
    found = attribution_deviation_bound(g, x, epsilon=epsilon, norm=norm, distance="cosine").value
    assert bool((found < 2).any())
    draws = rows(2000, seed=seed + 3)
    draws = draws / draws.norm(dim=1, keepdim=True) if norm == "l2" else draws.sign()
    clean = x @ a
    moved = clean[:, None] + epsilon * (draws @ a)[None]
    worst = (1 - nn.functional.cosine_similarity(moved, clean[:, None], dim=2)).amax(1)
    assert bool((worst <= found + 1e-12).all())
    attack = attack_attribution(g, x, epsilon=epsilon, norm=norm, k=2, generator=0)
    assert bool((attack.cosine <= found + 1e-12).all())
    if norm == "l2":
        assert bool((attack.cosine >= worst - 1e-3).all())


def test_the_jacobian_of_a_network_is_its_hessian():
    net, x = network(), rows(2, 5)
    found = attribution_deviation_bound(gradient_attribution(net, 1), x, epsilon=1.0)
    for row, value in zip(x, found.value, strict=True):
        hessian = torch.autograd.functional.hessian(lambda z: net(z[None])[0, 1], row)
        assert float(value) == pytest.approx(float(torch.linalg.matrix_norm(hessian, 2)), rel=1e-9)
    power = attribution_deviation_bound(
        gradient_attribution(net, 1), x, epsilon=1.0, jacobian="power", n_iter=500, generator=1
    )
    torch.testing.assert_close(power.value, found.value, rtol=1e-5, atol=0)


def test_the_remainder_makes_a_certificate():
    # f = x^3 / 6: g = x^2 / 2, whose Jacobian x has Lipschitz constant 1; the bound is attained.
    g = gradient_attribution(lambda x: (x**3).sum(1) / 6)
    x, epsilon = torch.tensor([[2.0]]).double(), 0.5
    plain = attribution_deviation_bound(g, x, epsilon=epsilon).value
    whole = attribution_deviation_bound(g, x, epsilon=epsilon, hessian_lipschitz=1.0).value
    moved = float(g(x + epsilon).detach() - g(x).detach())
    assert float(plain) == pytest.approx(1.0)
    assert float(whole) == pytest.approx(moved)
    boxed = attribution_deviation_bound(
        g, x.expand(1, 4), epsilon=epsilon, norm="linf", hessian_lipschitz=1.0
    ).value
    assert float(boxed) == pytest.approx(epsilon * 4 + 4 * epsilon**2 / 2)


def test_an_attribution_that_does_not_move():
    w = torch.tensor([1.0, 2, 3, 4]).double()
    for jacobian in ("exact", "power"):
        found = attribution_deviation_bound(
            lambda x: w.expand_as(x), rows(), epsilon=1.0, jacobian=jacobian, generator=0
        )
        assert bool((found.value == 0).all())


def test_attacks_stay_in_the_ball_and_keep_the_label():
    net, x = network(), rows(6, 5, seed=4)
    with torch.no_grad():
        label = net(x).argmax(1)
    g = gradient_attribution(net, label)
    for norm, objective in itertools.product(("l2", "linf"), ("euclidean", "cosine", "topk")):
        found = attack_attribution(
            g, x, epsilon=0.5, norm=norm, objective=objective, steps=30, k=2, model=net, generator=0
        )
        size = (found.x - x).norm(p=2 if norm == "l2" else math.inf, dim=1)
        assert float(size.max()) <= 0.5 + 1e-9
        with torch.no_grad():
            assert bool((net(found.x).argmax(1) == label).all())
        change = (g(found.x) - g(x)).norm(dim=1).detach()
        torch.testing.assert_close(found.euclidean, change)
    assert found.cost.ngrad == 6 * 31


def test_the_attack_on_the_largest_elements_lowers_their_share():
    net, x = network(seed=3), rows(6, 5, seed=4)
    g = gradient_attribution(net, 0)
    found = attack_attribution(g, x, epsilon=1.0, objective="topk", k=2, steps=100, generator=0)
    clean, moved = g(x).detach().abs(), g(found.x).detach().abs()
    top = clean.topk(2, 1).indices
    before, after = ((m / m.sum(1, keepdim=True)).gather(1, top).sum(1) for m in (clean, moved))
    assert bool((after < before).all())
