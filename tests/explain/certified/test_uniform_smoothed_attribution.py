"""Oracles of uniformly smoothed attributions: overlaps in closed form, limits, inverses, and no violation for a known mean."""

import math

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import Attribution, Ball, Oracle
from perturbkit.explain import (
    UniformSmoothedAttribution,
    ball_overlap,
    max_certified_epsilon,
    min_smoothing_radius,
)


def network(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype)
    return net


def rows(n=3, d=3, seed=1, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(model):
    oracle = Oracle.wrap(model)
    return lambda x, target: oracle.gradient(x, target)


def constant(x, target=None):
    return torch.tensor([1.0, 2, 2]).to(x).expand_as(x) / 3


EXAMPLE = Example(
    model=lambda: network(torch.float32),
    with_model=lambda model, generator, dtype: UniformSmoothedAttribution(gradients(model), 0.5, 300).certify(
        rows(dtype=dtype), 1, epsilon=0.01, generator=generator
    ),
    chunked=lambda size: UniformSmoothedAttribution(
        gradients(Oracle(network(), chunk_size=size)), 0.5, 20
    ).attribute(rows(), torch.tensor([0, 1, 0]), generator=2),
    refusals=(
        (lambda: UniformSmoothedAttribution(3, 1.0), "attribute_fn is 3"),
        (lambda: UniformSmoothedAttribution(constant, 0.0), "radius is 0"),
        (lambda: UniformSmoothedAttribution(constant, 1.0, 1), "n_samples is 1"),
        (lambda: UniformSmoothedAttribution(constant, 1.0, magnitude_bound=0.0), "magnitude_bound is 0"),
        (
            lambda: UniformSmoothedAttribution(constant, 1.0, magnitude_bound=0.5).attribute(rows()),
            "magnitude_bound is 0.5",
        ),
        (
            lambda: UniformSmoothedAttribution(lambda x, t: x.sum(1), 1.0).attribute(rows()),
            "attribution has shape",
        ),
        (lambda: UniformSmoothedAttribution(constant, 1.0).certify(rows(), epsilon=-1), "epsilon is -1"),
        (
            lambda: UniformSmoothedAttribution(constant, 1.0).certify(rows(), epsilon=1, mode="x"),
            "mode is 'x'",
        ),
        (
            lambda: UniformSmoothedAttribution(constant, 1.0).certify(rows(), epsilon=1, confidence=1),
            "confidence is 1",
        ),
        (lambda: ball_overlap(0, 1.0, 1.0), "dim is 0"),
        (lambda: ball_overlap(1, 1.0, -1.0), "distance is -1"),
        (lambda: max_certified_epsilon(1.0, 1.0, 1.0, 3, 1.0), "cosine is 1"),
        (lambda: min_smoothing_radius(1.0, 1.0, 0.0, 3, 0.5), "epsilon is 0"),
    ),
    stochastic=True,
)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9, 1.0, 1.5])
def test_overlap_in_closed_form(t):
    r = 1.7
    inside = min(t, 1.0)
    lens = (2 * r**2 * math.acos(inside) - r * inside * math.sqrt(4 * r**2 - (2 * r * inside) ** 2)) / (
        math.pi * r**2
    )
    for dim, expected in ((1, 1 - inside), (2, lens), (3, (1 - inside) ** 2 * (1 + inside / 2))):
        assert ball_overlap(dim, r, 2 * r * t) == pytest.approx(expected, abs=1e-12)


def test_overlap_by_counting():
    d, eps = 7, 0.6
    z = Ball("l2", 1.0).sample(torch.zeros(1, d).double(), generator=0, n=200000)
    z[:, 0] -= eps
    share = float((z.norm(dim=1) <= 1).double().mean())
    assert ball_overlap(d, 1.0, eps) == pytest.approx(share, abs=0.005)


def test_limits():
    smoothed = UniformSmoothedAttribution(constant, 1.0, 500)
    for mode in ("safe", "paper"):
        none = smoothed.certify(rows(), epsilon=0.0, mode=mode, generator=0)
        assert bool(none.valid.all())
        torch.testing.assert_close(none.cosine_lower, torch.ones(3).double())
    far = smoothed.certify(rows(), epsilon=2.0, generator=0)
    assert not bool(far.valid.any())
    assert bool((far.cosine_lower == -1).all())


def test_a_linear_model_is_not_moved_and_the_error_of_sampling_is_counted():
    n, confidence, eps = 400, 0.95, 0.1
    found = UniformSmoothedAttribution(constant, 1.0, n).certify(
        rows(), epsilon=eps, confidence=confidence, generator=0
    )
    lower = 1 - (n**-0.5 + math.sqrt(2 * math.log(20) / n))
    change = 2 * (1 - ball_overlap(3, 1.0, eps))
    assert found.norm_lower.tolist() == pytest.approx([lower] * 3)
    assert found.cosine_lower.tolist() == pytest.approx([math.sqrt(1 - (change / lower) ** 2)] * 3)
    paper = UniformSmoothedAttribution(constant, 1.0, n).certify(
        rows(), epsilon=eps, confidence=confidence, mode="paper", generator=0
    )
    assert paper.cosine_lower.tolist() == pytest.approx([lower / math.hypot(lower, change)] * 3)
    assert bool((paper.cosine_lower > found.cosine_lower).all())
    tighter = UniformSmoothedAttribution(constant, 1.0, n, absolute=True).certify(
        rows(), epsilon=eps, confidence=confidence, generator=0
    )
    assert tighter.cosine_lower.tolist() == pytest.approx([math.sqrt(1 - change**2 / 2 / lower**2)] * 3)


@pytest.mark.parametrize("mode", ["safe", "paper"])
@pytest.mark.parametrize("dim", [1, 3, 30, 200])
def test_inverses_undo_the_bound(mode, dim):
    h, bound, radius = 0.8, 1.3, 2.0
    for cosine in (0.3, 0.9, 0.999):
        eps = max_certified_epsilon(h, bound, radius, dim, cosine, mode=mode)
        assert 0 < eps <= 2 * radius
        assert min_smoothing_radius(h, bound, eps, dim, cosine, mode=mode) == pytest.approx(radius, rel=1e-8)
        if eps < 2 * radius:
            change = 2 * bound * (1 - ball_overlap(dim, radius, eps))
            back = math.sqrt(1 - (change / h) ** 2) if mode == "safe" else h / math.hypot(h, change)
            assert back == pytest.approx(cosine, abs=1e-8)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_violation_on_a_line_where_the_mean_is_known(seed):
    # g = (cos 3x, sin 3x) of a one-dimensional input, in the first of two coordinates: h is known in closed form.
    def attribute(x, target):
        return torch.stack((torch.cos(3 * x[:, 0]), torch.sin(3 * x[:, 0])), 1)

    radius, x = 0.7, rows(4, 2, seed)
    found = UniformSmoothedAttribution(attribute, radius, 100000)
    values = found.attribute(x, generator=seed).values
    # A chord of the disc at height t has length 2 sqrt(r^2 - t^2): the mean of cos 3t is 2 J_1(3r) / (3r).
    from scipy.special import j1

    shrink = 2 * j1(3 * radius) / (3 * radius)
    torch.testing.assert_close(values, shrink * attribute(x, None), rtol=0, atol=0.01)
    for eps in (0.01, 0.05, 0.1, 0.2):
        lower = found.certify(x, epsilon=eps, generator=seed).cosine_lower
        assert bool((lower <= math.cos(3 * eps) + 1e-12).all())
    assert bool((found.certify(x, epsilon=0.01, generator=seed).cosine_lower > 0.9).all())


def test_draws_fill_the_ball_and_an_attribution_s_cost_is_kept():
    seen = []

    def attribute(x, target):
        seen.append(x)
        return Attribution(torch.ones_like(x), target, Oracle(network()).cost)

    x = rows(2)
    UniformSmoothedAttribution(attribute, 0.5, 4000).attribute(x, 1, generator=0)
    distance = (torch.cat(seen).reshape(-1, 2, 3) - x).norm(dim=2).flatten()
    assert float(distance.max()) <= 0.5
    # In three dimensions the cubes of the distances are uniform.
    assert float(((distance / 0.5) ** 3).mean()) == pytest.approx(0.5, abs=0.02)


def test_the_bound_on_norms_is_used_as_given():
    x = rows()
    found = UniformSmoothedAttribution(
        lambda x, t: 0.25 * constant(x), 1.0, 100, magnitude_bound=2.0
    ).attribute(x)
    torch.testing.assert_close(found.values, 0.25 * constant(x))
