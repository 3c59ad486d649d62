"""Oracles of adversarial sparsity: closed forms of a linear classifier in both norms, and the two projections."""

import math

import pytest
import torch
from scipy.integrate import quad
from torch import nn

from _common import Example
from perturbkit.core import Oracle, Sphere, around
from perturbkit.core.random import as_generator, rademacher, randn, randperm, uniform
from perturbkit.robust import adversarial_sparsity, cone_projection, pixel_projection, sparsity_report

F64 = torch.float64


def network(seed=0, d=5, k=3, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, k)).to(dtype)
    for p in net.parameters():
        p.data = randn(p.shape, generator=g, dtype=dtype)
    return net


def inputs(n=6, d=5, dtype=F64):
    return uniform((n, d), generator=torch.Generator().manual_seed(1), dtype=dtype)


def measure(model, generator=0, dtype=F64, **options):
    x = inputs(dtype=dtype)
    inner = model.fun if isinstance(model, Oracle) else model
    y = inner(x).argmax(1) if isinstance(inner, nn.Module) else torch.zeros(6).long()
    options = {"n_directions": 4, "search_steps": 4, "attack_steps": 4} | options
    return adversarial_sparsity(model, x, y, options.pop("epsilon", 0.4), generator=generator, **options)


EXAMPLE = Example(
    model=lambda: network(dtype=torch.float32),
    with_model=lambda model, generator, dtype: measure(model.to(dtype), generator, dtype),
    chunked=lambda size: measure(Oracle(network(), chunk_size=size)),
    refusals=(
        (lambda: measure(network(), epsilon=0.0), "epsilon is 0"),
        (lambda: measure(network(), norm="l1"), "norm is 'l1'"),
        (lambda: measure(network(), n_directions=0), "n_directions is 0"),
        (lambda: measure(network(), search_steps=0), "search_steps is 0"),
        (lambda: measure(network(), attack_steps=0), "attack_steps is 0"),
        (lambda: measure(network(), bounds=(0.0, 0.5)), "intersection is empty"),
        (lambda: measure(lambda z: z[:, :1]), "at least two classes"),
        (lambda: sparsity_report(network(), inputs(), torch.full((6,), 4), 0.1), "labels from 4"),
    ),
    stochastic=True,
)  # fmt: skip


def linear(d, seed=0):
    """Return a classifier with the normal n: class 0 where <n, x> > 0."""
    n = randn((d,), generator=torch.Generator().manual_seed(seed), dtype=F64)
    n = n / n.norm()
    return (lambda z: torch.stack([z @ n, -(z @ n)], 1)), n


@pytest.mark.parametrize("d", [2, 6, 40])
def test_angles_of_a_linear_classifier_are_exact(d):
    f, n = linear(d)
    eps, margin = 1.0, torch.tensor([0.2, 0.7], dtype=F64)
    x = margin[:, None] * n
    found = adversarial_sparsity(
        f, x, torch.tensor([0, 0]), eps, bounds=None, n_directions=50, search_steps=14, generator=3
    )
    # The same directions: the start of the plain attack is drawn first.
    g = as_generator(3)
    around(x, "l2", eps, None).sample(x, generator=g)
    for i, m in enumerate(margin.tolist()):
        u = Sphere(1.0).sample(x[i : i + 1], generator=g, n=50)
        phi = torch.acos((-u @ n).clamp(-1, 1))
        expected = (phi - math.acos(m / eps)).clamp_min(0)
        torch.testing.assert_close(found.per_direction[i], expected, atol=1e-3, rtol=0)
        assert bool((found.per_direction[i] >= expected - 1e-9).all())
    assert found.unit == "radians"


def test_angles_of_a_network_are_those_of_a_scan_of_the_circle():
    net, x = network(seed=4, d=2), inputs(30, 2)
    y, eps = net(x).argmax(1), 0.6
    found = adversarial_sparsity(net, x, y, eps, bounds=None, n_directions=30, generator=0)
    g = as_generator(0)
    around(x, "l2", eps, None).sample(x, generator=g)
    angles = 2 * math.pi * torch.arange(4000, dtype=F64) / 4000
    circle = eps * torch.stack([angles.cos(), angles.sin()], 1)
    near = []
    for i in found.vulnerable.nonzero()[:, 0].tolist():
        u = Sphere(1.0).sample(x[i : i + 1], generator=g, n=30)
        adversarial = circle[net(x[i] + circle).argmax(1) != y[i]] / eps
        expected = torch.acos((u @ adversarial.T).clamp(-1, 1)).amin(1)
        assert bool((found.per_direction[i] >= expected - 2e-3).all())
        assert torch.equal(found.per_direction[i] == 0, net(x[i] + eps * u).argmax(1) != y[i])
        near.append(found.per_direction[i] < expected + 0.01)
    assert len(near) > 8
    assert float(torch.cat(near).double().mean()) > 0.9


@pytest.mark.parametrize(("norm", "eps"), [("l2", 1.0), ("linf", 0.2)])
def test_gradients_bring_directions_nearer(norm, eps):
    from perturbkit.data import digits_classifier, load_digits8

    net, digits = digits_classifier(8).module, load_digits8("test").rows(range(12))
    options = {"norm": norm, "n_directions": 20, "generator": 0}
    found = adversarial_sparsity(net, digits.x, digits.y, eps, attack_steps=20, **options)
    one = adversarial_sparsity(net, digits.x, digits.y, eps, attack_steps=1, **options)
    both = found.vulnerable & one.vulnerable
    near, far = (float(s.mean[both].mean()) for s in (found, one))
    assert near < 0.95 * far


def test_the_mean_angle_is_its_quadrature():
    d, m = 5, 0.4
    f, n = linear(d)
    found = adversarial_sparsity(
        f, m * n[None], torch.tensor([0]), 1.0, bounds=None, n_directions=4000, attack_steps=8, generator=1
    )

    def density(phi):
        return math.sin(phi) ** (d - 2)

    total = quad(density, 0, math.pi)[0]
    expected = (
        quad(lambda p: max(0.0, p - math.acos(m)) * density(p), 0, math.pi, points=[math.acos(m)])[0] / total
    )
    error = float(found.per_direction.std()) / math.sqrt(4000)
    assert float(found.mean[0]) == pytest.approx(expected, abs=4 * error + 2e-3)


def test_values_of_a_linear_classifier_are_the_cumulative_sums():
    d, eps = 30, 0.3
    f, n = linear(d)
    x = torch.stack([0.2 * n, 0.9 * n])
    found = adversarial_sparsity(
        f,
        x,
        torch.tensor([0, 0]),
        eps,
        norm="linf",
        bounds=None,
        n_directions=40,
        generator=5,
        attack_steps=5,
    )
    g = as_generator(5)
    around(x, "linf", eps, None).sample(x, generator=g)
    place = torch.stack([randperm(d, generator=g) for _ in range(80)])
    corner = eps * rademacher((80, d), generator=g, like=x)
    gain = n * corner + eps * n.abs()  # what freeing each value takes from the margin
    ordered = torch.zeros_like(gain).scatter(1, place, gain)
    margin = x.repeat_interleave(40, 0) @ n + corner @ n
    left = margin[:, None] - torch.cat([torch.zeros(80, 1, dtype=F64), ordered.cumsum(1)], 1)
    assert bool((left[:, -1] < 0).all())
    expected = (left < 0).double().argmax(1).reshape(2, 40)
    assert torch.equal(found.per_direction, expected.to(F64))
    assert found.unit == "values"
    assert 1 < float(expected.double().mean()) < d - 1


def test_the_cone_projection_is_in_the_cone_on_the_sphere_and_nearest():
    g = torch.Generator().manual_seed(0)
    delta, u = randn((200, 4, 2), generator=g, dtype=F64), randn((200, 4, 2), generator=g, dtype=F64)
    u = u / u.flatten(1).norm(dim=1)[:, None, None]
    angle = math.pi * uniform((200,), generator=g, dtype=F64)
    p = cone_projection(delta, u, angle, 0.7)
    norm = p.flatten(1).norm(dim=1)
    torch.testing.assert_close(norm, torch.full_like(norm, 0.7))
    own = torch.acos(((p * u).flatten(1).sum(1) / 0.7).clamp(-1, 1))
    assert bool((own <= angle + 1e-6).all())
    torch.testing.assert_close(cone_projection(p, u, angle, 0.7), p, atol=1e-9, rtol=0)
    distance = (p - delta).flatten(1).norm(dim=1)
    for _ in range(100):
        other = cone_projection(randn(delta.shape, generator=g, dtype=F64), u, angle, 0.7)
        assert bool(((other - delta).flatten(1).norm(dim=1) >= distance - 1e-9).all())


def test_the_cone_projection_at_its_edges():
    u = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=F64)
    along = cone_projection(torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 0.0]], dtype=F64), u, 0.5, 1.0)
    torch.testing.assert_close(along[0], u[0])
    for row, axis in zip(along[1:2], u[1:2], strict=True):
        assert float(torch.acos(row @ axis)) == pytest.approx(0.5)
    torch.testing.assert_close(along.norm(dim=1), torch.ones(3, dtype=F64))
    torch.testing.assert_close(cone_projection(-u, u, 0.0, 2.0), 2 * u)
    torch.testing.assert_close(cone_projection(-u, u, math.pi, 2.0), -2 * u, atol=1e-9, rtol=0)


def test_the_pixel_projection_frees_only_what_is_free():
    delta = torch.tensor([[2.0, -3.0, 0.1]])
    vertex = torch.tensor([[1.0, 1.0, -1.0]])
    free = torch.tensor([[True, True, False]])
    assert pixel_projection(delta, vertex, free, 1.0).tolist() == [[1.0, -1.0, -1.0]]


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_only_vulnerable_rows_are_measured_and_the_report_counts_the_rest(norm):
    net, x = network(), inputs(40)
    y = net(x).argmax(1)
    y[:5] = (y[:5] + 1) % 3
    eps = {"l2": 0.3, "linf": 0.12}[norm]
    options = {"norm": norm, "n_directions": 8, "attack_steps": 8}
    found = adversarial_sparsity(net, x, y, eps, generator=0, **options)
    report = sparsity_report(net, x, y, eps, generator=0, **options)
    assert not bool(found.correct[:5].any())
    assert not bool(found.vulnerable[:5].any())
    assert 3 < int(found.vulnerable.sum()) < 32
    assert torch.equal(found.mean.isnan(), ~found.vulnerable)
    assert torch.equal(found.per_direction.isnan().all(1), ~found.vulnerable)
    assert report.adversarial_accuracy == pytest.approx(
        float((found.correct & ~found.vulnerable).double().mean())
    )
    values = found.mean[found.vulnerable]
    assert report.mean_sparsity == pytest.approx(float(values.mean()))
    assert report.standard_error == pytest.approx(float(values.std() / len(values) ** 0.5))
    assert report.n_vulnerable == len(values)


def test_nothing_vulnerable_gives_nan_not_an_error():
    report = sparsity_report(network(), inputs(), network()(inputs()).argmax(1), 1e-6, n_directions=2)
    assert report.adversarial_accuracy == 1.0
    assert math.isnan(report.mean_sparsity)


def test_a_larger_radius_is_less_sparse():
    f, n = linear(8)
    x = 0.3 * n[None]
    means = [
        float(
            adversarial_sparsity(f, x, torch.tensor([0]), e, bounds=None, n_directions=60, generator=0).mean
        )
        for e in (0.31, 0.5, 3.0)
    ]
    assert means[0] > means[1] > means[2]
    assert means[0] == pytest.approx(math.pi / 2 - math.acos(0.3 / 0.31), abs=0.15)


def test_inputs_are_clipped_to_their_bounds():
    seen = []

    def f(z):
        seen.append((float(z.detach().min()), float(z.detach().max())))
        return torch.stack([z.sum(1), 1.0 + 0 * z.sum(1)], 1)

    x = torch.full((1, 4), 0.4, dtype=F64)
    for norm in ("l2", "linf"):
        adversarial_sparsity(
            f, x, torch.tensor([0]), 0.6, norm=norm, n_directions=5, search_steps=3, generator=0
        )
    assert min(low for low, _ in seen) >= 0
    assert max(high for _, high in seen) <= 1
