"""Oracles of reflected bridges: marginals and scaling of the plan, the Gaussian bridge, mirrors that hold, the wall's term."""

import math

import numpy as np
import pytest
import torch
from matplotlib.path import Path

from _common import Example
from perturbkit.core import TimeMLP
from perturbkit.core.random import seeded_init
from perturbkit.diffusion import (
    ImplicitDomain,
    Polygon,
    ReflectedBridge,
    UnitCube,
    folded_normal_log_prob,
    reflected_bridge_grid,
)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def nets(d=1, hidden=16, dtype=torch.float64, seed=0):
    with seeded_init(seed):
        return TimeMLP(d, hidden=hidden).to(dtype), TimeMLP(d, hidden=hidden).to(dtype)


def call(generator, dtype):
    p0, p1 = rand(6, dtype=dtype), rand(6, seed=1, dtype=dtype)
    plan = reflected_bridge_grid(p0, p1, 0.5)
    x = rand(5, 1, seed=2, dtype=dtype)
    bridge = ReflectedBridge(UnitCube(1), *nets(dtype=dtype), sigma=0.5, n_steps=4)
    bridge.fit(x, 1 - x, n_stages=1, inner_steps=3, n_paths=8, generator=generator, progress=False)
    drawn = [bridge.forward_sample(x, generator=generator), bridge.backward_sample(x, generator=generator)]
    return [plan.plan, plan.sample(x, 5, generator).x, *(d.x for d in drawn)]


def zero_field(x, t):
    return torch.zeros_like(x)


FLAT = torch.ones(8, dtype=torch.float64)
CUBE = ReflectedBridge(UnitCube(1), *nets())
EXAMPLE = Example(
    call=call,
    stochastic=True,
    refusals=(
        (lambda: reflected_bridge_grid(FLAT, FLAT[:4], 1.0), "p1 has shape"),
        (lambda: reflected_bridge_grid(FLAT - 2, FLAT, 1.0), "mass of p0 is -1"),
        (lambda: reflected_bridge_grid(FLAT, 0 * FLAT, 1.0), "sum of p1 is 0"),
        (lambda: reflected_bridge_grid(FLAT, FLAT, 0.0), "sigma is 0"),
        (lambda: reflected_bridge_grid(torch.eye(8)[0], torch.eye(8)[7], 0.01), "cannot be reached"),
        (lambda: reflected_bridge_grid(torch.ones(65, 65), torch.ones(65, 65), 1.0), "cells is 4225"),
        (lambda: reflected_bridge_grid(FLAT, FLAT, 1.0).drift(rand(3, 1), 1.0), "t is 1"),
        (lambda: reflected_bridge_grid(FLAT, FLAT, 1.0).sample(rand(3, 1) + 1), "x0 has values"),
        (lambda: UnitCube(0), "dim is 0"),
        (lambda: Polygon(rand(2, 2)), "vertices has 2"),
        (lambda: Polygon(torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 0]])), "corner 3 twice"),
        (lambda: ImplicitDomain(1.0, 2), "distance is a float"),
        (
            lambda: ImplicitDomain(lambda x: 1 - x.norm(dim=1, keepdim=True), 2).reflect(rand(5, 2)),
            r"answers shape \(5, 1\)",
        ),
        (
            lambda: ImplicitDomain(lambda x: 1 - x.detach().norm(dim=1), 2).reflect(rand(5, 2)),
            "without a gradient",
        ),
        (lambda: CUBE.loss(lambda x, t: x[:, 0], rand(4, 1), rand(4), rand(4, 1)), "net answered shape"),
        (lambda: CUBE.loss(zero_field, rand(4, 1), rand(4), rand(4)), "other has shape"),
        (
            lambda: ImplicitDomain(lambda x: -1 - x.square().sum(1), 2).reflect(rand(5, 2)),
            "leads 5 of 5 rows not back",
        ),
        (lambda: ReflectedBridge("cube", *nets()), "domain is a str"),
        (lambda: ReflectedBridge(UnitCube(1), *nets(), sigma=-1.0), "sigma is -1"),
        (lambda: CUBE.fit(rand(4, 1) + 1, rand(4, 1)), "x0 has 4 of 4 rows outside"),
        (lambda: CUBE.fit(rand(4, 1), rand(4, 1), n_stages=0), "n_stages is 0"),
        (lambda: CUBE.forward_sample(rand(4, 2)), "x0 has shape"),
    ),
)


@pytest.mark.parametrize("offset", [0.0, 100.0], ids=["near", "far"])
def test_narrow_corners_let_nothing_out_in_single_precision(offset):
    angles = 2 * math.pi * torch.arange(10) / 10
    reach = torch.tensor([1.0, 0.35]).repeat(5)
    star = Polygon(offset + reach[:, None] * torch.stack((angles.cos(), angles.sin()), 1))
    for spread in (0.5, 5.0):
        x = offset + spread * torch.randn(20000, 2, generator=torch.Generator().manual_seed(0))
        assert bool((~star.contains(x)).any())
        assert bool(star.contains(star.reflect(x)).all())


def test_the_loss_may_be_looked_at_without_training():
    x, t, other = rand(6, 1), rand(6, seed=1), rand(6, 1, seed=2)
    trained = CUBE.loss(CUBE.forward_net, x, t, other, generator=0)
    with torch.no_grad():
        assert float(CUBE.loss(CUBE.forward_net, x, t, other, generator=0)) == float(trained.detach())


@pytest.mark.parametrize("shape", [(30,), (9, 7)])
def test_the_plan_has_its_marginals_and_scales_the_kernel(shape):
    p0, p1 = rand(*shape), rand(*shape, seed=1)
    p0[0] = 0.0
    a, b = p0 / p0.sum(), p1 / p1.sum()
    found = reflected_bridge_grid(p0, p1, 0.3, 0.7)
    n, axes = a.numel(), tuple(range(len(shape)))
    torch.testing.assert_close(found.plan.sum(tuple(i + len(shape) for i in axes)), a, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.plan.sum(axes), b, rtol=0, atol=1e-8)
    # The plan is the kernel times a factor of the start and one of the end, which with the marginals determines it.
    centres = torch.cartesian_prod(*((torch.arange(m).double() + 0.5) / m for m in shape)).reshape(n, -1)
    logs = folded_normal_log_prob(centres[:, None], centres, 0.3 * math.sqrt(0.7)).sum(2)
    kept = a.flatten() > 0
    rest = (found.plan.reshape(n, n).log() - logs)[kept]
    rest = rest - rest[:1]
    torch.testing.assert_close(rest, rest[:, :1].expand_as(rest), rtol=0, atol=1e-8)
    assert found.n_iter == len(found.errors)
    assert found.error == found.errors[-1]


def test_far_from_the_walls_it_is_the_gaussian_bridge():
    x, (m0, s0), (m1, s1), sigma = (torch.arange(400).double() + 0.5) / 400, (0.45, 0.03), (0.6, 0.05), 0.06
    p0, p1 = ((-0.5 * ((x - m) / s) ** 2).exp() for m, s in ((m0, s0), (m1, s1)))
    found = reflected_bridge_grid(p0, p1, sigma)
    covariance = float(x @ found.plan @ x) - m0 * m1
    expected = 0.5 * (math.sqrt(sigma**4 + 4 * s0**2 * s1**2) - sigma**2)
    assert abs(covariance / expected - 1) < 1e-3
    # The drift at 0 is E[X_1 | X_0 = x] - x, which is linear.
    at = torch.tensor([[0.4], [0.45], [0.5]]).double()
    drift = m1 - at + (expected / s0**2) * (at - m0)
    torch.testing.assert_close(found.drift(at, 0.0), drift, rtol=0, atol=1e-3)


def test_paths_of_the_grid_reach_the_end():
    p0, p1 = rand(20), rand(20, seed=1)
    found = reflected_bridge_grid(p0, p1, 0.5)
    which = torch.multinomial(p0, 3000, replacement=True, generator=torch.Generator().manual_seed(0))
    start = (which + rand(3000, seed=2)) / 20
    drawn = found.sample(start[:, None], 60, generator=3)
    shares = torch.bincount((drawn.x[:, 0] * 20).long().clamp(0, 19), minlength=20) / 3000
    floor = math.sqrt(20 / 3000)
    assert float((shares - p1 / p1.sum()).abs().sum()) < 1.5 * floor
    assert float((shares - p0 / p0.sum()).abs().sum()) > 3 * floor
    assert drawn.cost.nfev == 60 * 3000
    assert drawn.extras["energy"] > 0


def test_uniform_ends_need_no_drift():
    found = reflected_bridge_grid(FLAT, FLAT, 0.4)
    assert float(found.drift(rand(30, 1), 0.3).abs().max()) < 1e-5
    flat = torch.ones(6, 6, dtype=torch.float64)
    assert float(reflected_bridge_grid(flat, flat, 0.6).drift(rand(30, 2), 0.3).abs().max()) < 1e-5


def test_drift_is_the_gradient_of_the_potential():
    found = reflected_bridge_grid(rand(12, 9), rand(12, 9, seed=1), 0.4)
    centres = torch.cartesian_prod(
        (torch.arange(12).double() + 0.5) / 12, (torch.arange(9).double() + 0.5) / 9
    )
    x = rand(10, 2, seed=2).requires_grad_()
    logs = folded_normal_log_prob(x[:, None], centres, 0.4 * math.sqrt(1 - 0.6)).sum(2)
    psi = (logs + found.potentials[1].flatten().log()).logsumexp(1)
    (expected,) = torch.autograd.grad(psi.sum(), x)
    torch.testing.assert_close(found.drift(x.detach(), 0.6), 0.4**2 * expected)
    turned = reflected_bridge_grid(rand(12, 9, seed=1), rand(12, 9), 0.4)
    torch.testing.assert_close(
        found.backward_drift(x.detach(), 0.6), turned.drift(x.detach(), 0.4), rtol=1e-6, atol=1e-6
    )


def test_contraction_is_geometric():
    found = reflected_bridge_grid(rand(40) ** 3, rand(40, seed=1) ** 3, 0.4)
    errors = found.errors[1:-1].log().numpy()
    assert np.corrcoef(np.arange(len(errors)), errors)[0, 1] ** 2 > 0.98
    louder = reflected_bridge_grid(rand(40) ** 3, rand(40, seed=1) ** 3, 0.8)
    assert louder.n_iter < found.n_iter


def octagon():
    angle = torch.arange(8).double() * math.pi / 4
    return torch.stack((angle.cos(), angle.sin()), 1)


def star():
    angle = torch.arange(10).double() * math.pi / 5
    radius = torch.tensor([1.0, 0.4]).double().repeat(5)[:, None]
    return radius * torch.stack((angle.cos(), angle.sin()), 1)


DOMAINS = {
    "cube": UnitCube(2),
    "octagon": Polygon(octagon()),
    "clockwise": Polygon(octagon().flip(0)),
    "star": Polygon(star()),
    "disc": ImplicitDomain(lambda x: 1 - x.norm(dim=1), 2),
    "ellipse": ImplicitDomain(lambda x: 1 - (x / torch.tensor([1.0, 0.3]).to(x)).square().sum(1), 2),
}


@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
def test_no_mirror_image_is_outside(name, dtype):
    domain = DOMAINS[name]
    x = 3 * rand(4000, 2, dtype=dtype) - 1.5
    inside = domain.contains(x)
    assert 50 < int(inside.sum()) < 3950
    y = domain.reflect(x)
    assert bool(domain.contains(y).all())
    assert torch.equal(y[inside], x[inside]) or name == "cube"
    assert y.dtype == dtype


@pytest.mark.parametrize("corners", [octagon(), star()], ids=["octagon", "star"])
def test_inside_agrees_with_matplotlib(corners):
    x = 2.4 * rand(3000, 2) - 1.2
    expected = Path(corners.numpy(), closed=False).contains_points(x.numpy())
    assert np.array_equal(Polygon(corners).contains(x).numpy(), expected)


def test_mirrors_keep_the_distance():
    disc, square = DOMAINS["disc"], Polygon(torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1.0]]).double())
    x = torch.tensor([[0.3, 1.2], [1.1, 0.5], [-0.05, 0.7]]).double()
    torch.testing.assert_close(square.reflect(x), UnitCube(2).reflect(x))
    direction = torch.tensor([[0.6, 0.8]]).double()
    torch.testing.assert_close(disc.reflect(1.2 * direction), 0.8 * direction)


@pytest.mark.parametrize("name", ["octagon", "disc", "star"])
def test_fields_fade_across_the_wall_alone(name):
    domain, width = DOMAINS[name], 0.05
    x = domain.reflect(3 * rand(2000, 2) - 1.5)
    field = rand(2000, 2, seed=1) - 0.5
    found = domain.faded(field, x, width)
    if name == "disc":
        inward, distance = -x / x.norm(dim=1, keepdim=True), 1 - x.norm(dim=1)
    else:
        _, distance, inward = domain._nearest(x)
    tangent = torch.stack((-inward[:, 1], inward[:, 0]), 1)
    share = (distance / width).clamp(0, 1)
    torch.testing.assert_close((found * tangent).sum(1), (field * tangent).sum(1))
    torch.testing.assert_close((found * inward).sum(1), share * (field * inward).sum(1))
    assert 20 < int((share < 1).sum()) < 1990


def test_the_wall_has_a_term_that_fading_removes():
    # Uniform paths without drift: the answer is 0. The raw loss of c (x - 1/2) is c^2 / 24 + sigma c, least at c = -12 sigma.
    x = ((torch.arange(20000).double() + 0.5) / 20000)[:, None]
    t, still = torch.zeros(len(x)).double(), torch.zeros_like(x)
    raw = ReflectedBridge(UnitCube(1), *nets(), sigma=0.5, width=1e-9)
    held = ReflectedBridge(UnitCube(1), *nets(), sigma=0.5)
    for c in (-6.0, -1.0, 1.0):
        found = float(raw.loss(lambda x, t, c=c: c * (x - 0.5), x, t, still, generator=0).detach())
        assert found == pytest.approx(c**2 / 24 + 0.5 * c, abs=1e-3)
        # Mean of c^2 (x - 1/2)^2 / 2 with the fading; the divergence integrates to nothing.
        faded = (x - 0.5) * (torch.minimum(x, 1 - x) / 0.05).clamp(0, 1)
        value = float(held.loss(lambda x, t, c=c: c * (x - 0.5), x, t, still, generator=0).detach())
        assert value == pytest.approx(c**2 * float(faded.square().mean()) / 2, abs=1e-3)


def test_the_loss_is_least_at_the_reversed_drift():
    noise = torch.randn(40000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, t = 0.5 + 0.06 * noise, torch.zeros(40000).double()
    bridge = ReflectedBridge(UnitCube(2), *nets(2), sigma=0.3)
    other = 0.7 * torch.ones_like(x)

    def exact(x, t):
        return -0.3 * (x - 0.5) / 0.06**2 - 0.7

    best = float(bridge.loss(exact, x, t, other, generator=0).detach())
    for change in (0.8, 1.2):
        worse = bridge.loss(lambda x, t, c=change: c * exact(x, t), x, t, other, generator=0)
        assert float(worse.detach()) > best
    # At the minimum the loss is minus half the mean square.
    assert best == pytest.approx(-0.5 * float(exact(x, t).square().sum(1).mean()), rel=0.03)


def test_networks_come_near_the_exact_bridge():
    x0, x1 = (
        0.05 + 0.3 * rand(400, 1, dtype=torch.float32),
        0.6 + 0.35 * rand(400, 1, seed=1, dtype=torch.float32),
    )
    bridge = ReflectedBridge(UnitCube(1), *nets(1, 48, torch.float32), sigma=0.6, n_steps=20)
    bridge.fit(
        x0, x1, n_stages=2, inner_steps=120, n_paths=256, batch_size=128, lr=5e-3, generator=0, progress=False
    )
    assert bridge.losses.shape == (4, 120)
    drawn = bridge.forward_sample(x0, generator=1)
    quantiles = (drawn.x.sort(0).values - x1.sort(0).values).abs().mean()
    moved = (x0.sort(0).values - x1.sort(0).values).abs().mean()
    assert float(quantiles) < 0.2 * float(moved)
    assert drawn.extras["trajectory"].shape == (21, 400, 1)
    assert torch.equal(drawn.extras["trajectory"][0], x0)
    back = bridge.backward_sample(x1, generator=2).x
    assert float((back.sort(0).values - x0.sort(0).values).abs().mean()) < 0.2 * float(moved)


def test_each_network_learns_from_the_drifts_of_the_others_paths():
    class Watching(ReflectedBridge):
        def loss(self, net, x, t, other, *, generator=None):
            rows.append((net, x, t, other))
            return super().loss(net, x, t, other, generator=generator)

    rows = []
    forward, backward = nets(2)
    bridge = Watching(UnitCube(2), forward, backward, sigma=0.8, n_steps=4)
    bridge.fit(
        rand(20, 2), rand(20, 2, seed=1), n_stages=1, inner_steps=1, n_paths=30, generator=2, progress=False
    )
    (first, x, _, none), (second, y, t, drift) = rows
    assert first is backward
    assert not bool(none.any())  # nothing drives the first paths
    assert second is forward
    # The backward network rests while the forward one is trained.
    torch.testing.assert_close(drift, UnitCube(2).faded(backward(y, t), y, bridge.width).detach())
    assert bool(drift.any())
    assert set(t.tolist()) <= {0.0, 0.25, 0.5, 0.75}
    assert len(x) == len(y) == 256
