"""Oracles of the perception-robustness tradeoff: closed distances, known slopes, two toys, and bounds by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from _common import Example
from perturbkit.core import Oracle, Sphere
from perturbkit.core.random import randn, randperm
from perturbkit.robust import (
    GaussianProblem,
    TwoPointProblem,
    estimate_lipschitz,
    explore_posterior,
    fit_lipschitz_bound,
    joint_perceptual_index,
    lipschitz_lower_bound,
    tradeoff_curve,
)

F64 = torch.float64


def rng(seed):
    return torch.Generator().manual_seed(seed)


def network():
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3))


def inputs(n=4, dtype=F64, d=2, seed=1):
    return randn((n, d), generator=rng(seed), dtype=dtype)


def blur(x, generator):
    return x[:, :2] + 0.1 * randn((len(x), 2), generator=generator, like=x)


def with_model(model, generator, dtype):
    y = inputs(dtype=dtype)
    steep = estimate_lipschitz(model, y, [0.1, 1.0], n_steps=3, n_restarts=2, generator=generator)
    explored = explore_posterior(
        model, y, 3, 0.1, degradation=lambda x: x[:, :2], tolerance=5.0, generator=generator
    )
    curve = tradeoff_curve(
        {"net": model, "flat": lambda v: 0.1 * v @ torch.ones(2, 3, dtype=dtype)}, blur, inputs(9, dtype, 3), n_steps=2, generator=generator
    )  # fmt: skip
    return {"steep": steep, "explored": explored, "diversity": explored.diversity, "curve": curve}


def chunked(size):
    y = inputs(10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = network().double()
    oracle = Oracle(net, chunk_size=size)
    found = estimate_lipschitz(oracle, y, 0.1, n_steps=3, generator=0)
    return [found.values, explore_posterior(oracle, y, 3, 0.1, generator=0).samples]


def identity(y):
    return y


EXAMPLE = Example(
    model=network,
    with_model=with_model,
    chunked=chunked,
    refusals=(
        (lambda: joint_perceptual_index(inputs(), inputs(), inputs(3)), "x_hat has shape"),
        (lambda: joint_perceptual_index(inputs(), inputs(3), inputs()), "y has 3 rows"),
        (lambda: joint_perceptual_index(inputs(), inputs(), inputs(), p=0.5), "p is 0.5"),
        (lambda: joint_perceptual_index(inputs(), inputs(), inputs(), method="sinkhorn"), "method is 'sinkhorn'"),
        (lambda: joint_perceptual_index(*[torch.zeros(4001, 1)] * 3), "pairs of the exact index is 4001"),
        (lambda: joint_perceptual_index(inputs(0), inputs(0), inputs(0)), "x is empty"),
        (lambda: joint_perceptual_index(inputs(), inputs(), inputs(), n_projections=0), "n_projections is 0"),
        (lambda: lipschitz_lower_bound(-1.0, 1.0, 1.0), "index is -1"),
        (lambda: lipschitz_lower_bound(1.0, -1.0, 1.0), "m1 is -1"),
        (lambda: fit_lipschitz_bound(torch.ones(1), torch.ones(1)), "the number of restorers is 1"),
        (lambda: fit_lipschitz_bound(-torch.ones(2), torch.ones(2)), "the least index is -1"),
        (lambda: estimate_lipschitz(lambda y: y / 0, inputs(), 0.1), "NaN or infinite values"),
        (lambda: tradeoff_curve([identity, identity], blur, inputs()), "restorers is a list"),
        (lambda: tradeoff_curve({"a": identity, "b": identity}, None, inputs()), "degradation is a NoneType"),
        (lambda: explore_posterior(identity, inputs(), 2, 0.1, degradation=lambda x: x[:, :1]), "degradation answered shape"),
        (lambda: fit_lipschitz_bound(torch.ones(2), torch.ones(3)), "lipschitz has shape"),
        (lambda: estimate_lipschitz(identity, inputs(), 0.0), "radius is 0"),
        (lambda: estimate_lipschitz(identity, inputs(), []), "radius is empty"),
        (lambda: estimate_lipschitz(identity, inputs(), 0.1, n_steps=0), "n_steps is 0"),
        (lambda: estimate_lipschitz(identity, inputs(), 0.1, n_restarts=0), "n_restarts is 0"),
        (lambda: tradeoff_curve({"a": identity}, blur, inputs()), "the number of restorers is 1"),
        (lambda: explore_posterior(identity, inputs(), 0, 0.1), "n_samples is 0"),
        (lambda: explore_posterior(identity, inputs(), 2, -0.1), "scale is -0.1"),
        (lambda: explore_posterior(identity, inputs(), 2, 0.1, tolerance=-1.0), "tolerance is -1"),
        (lambda: TwoPointProblem(-1.0), "sigma is -1"),
        (lambda: TwoPointProblem(1.0).restorer(0.0), "a is 0"),
        (lambda: GaussianProblem(0.0), "sigma is 0"),
        (lambda: GaussianProblem(1.0).restorer(0.5), "k is 0.5"),
    ),
    stochastic=True,
)  # fmt: skip


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_the_exact_index_of_a_few_pairs_is_the_best_of_all_assignments(p):
    from itertools import permutations

    x, y, x_hat = inputs(5, seed=2), inputs(5, seed=3), inputs(5, seed=4)
    true, restored = torch.cat([x, y], 1), torch.cat([x_hat, y], 1)
    best = min(
        float((true - restored[list(order)]).norm(dim=1).pow(p).mean()) for order in permutations(range(5))
    )
    assert joint_perceptual_index(x, y, x_hat, p=p) == pytest.approx(best ** (1 / p))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
@pytest.mark.parametrize("method", ["exact", "sliced"])
def test_equal_laws_have_index_zero_and_the_order_of_pairs_does_not_matter(method, seed):
    x, y, x_hat = inputs(30, d=3, seed=seed), inputs(30, seed=seed + 1), inputs(30, d=3, seed=seed + 2)
    options = {"method": method, "generator": 0}
    assert joint_perceptual_index(x, y, x.clone(), **options) < 1e-9
    found = joint_perceptual_index(x, y, x_hat, **options)
    order = randperm(30, generator=rng(seed))
    assert joint_perceptual_index(x[order], y[order], x_hat[order], **options) == pytest.approx(found)
    assert joint_perceptual_index(x_hat, y, x, **options) == pytest.approx(found)
    # The posterior of a y that occurs twice may be restored in the other order.
    twice = torch.cat([x, x + 1]), torch.cat([y, y]), torch.cat([x + 1, x])
    assert joint_perceptual_index(*twice, **options) < 1e-9


def test_one_shift_is_its_length_and_the_sliced_index_the_mean_of_its_projections():
    x, y = inputs(50), inputs(50, seed=2)
    shift = torch.tensor([3.0, 4.0], dtype=F64)
    assert joint_perceptual_index(x, y, x + shift) == pytest.approx(5.0)
    # E <v, s>^2 = |s|^2 / d for a uniform unit vector in d = 4.
    found = joint_perceptual_index(x, y, x + shift, method="sliced", n_projections=20_000, generator=0)
    assert found == pytest.approx(5 / 2, rel=0.02)
    assert found <= 5


def test_the_index_of_the_mean_restorer_of_gaussians_is_that_of_their_covariances():
    toy = GaussianProblem(0.8)
    x, y = toy.sample(1500, generator=0)
    slope = 1 / (1 + 0.64)

    def root(m):
        values, vectors = torch.linalg.eigh(m)
        return vectors @ values.clamp_min(0).sqrt().diag() @ vectors.T

    a = torch.tensor([[1.0, 1.0], [1.0, 1.64]], dtype=F64)
    b = 1.64 * torch.tensor([[slope**2, slope], [slope, 1.0]], dtype=F64)
    half = root(a)
    wanted = float((a + b - 2 * root(half @ b @ half)).trace()) ** 0.5
    assert joint_perceptual_index(x, y, toy.mean(y)) == pytest.approx(wanted, rel=0.1)


def test_the_bound_by_hand():
    assert lipschitz_lower_bound(0.04, 2.0, 3.0) == pytest.approx(7.0)
    assert lipschitz_lower_bound(0.0, 2.0, 3.0) == math.inf
    assert lipschitz_lower_bound(0.0, 0.0, 3.0) == -3.0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_fitted_bound_is_below_all_and_touches(seed):
    g = rng(seed)
    index = randn((8,), generator=g, dtype=F64).exp()
    steep = randn((8,), generator=g, dtype=F64).exp()
    m1, m2 = fit_lipschitz_bound(index, steep)
    assert m1 >= 0
    assert m2 >= 0
    gap = steep - torch.tensor([lipschitz_lower_bound(float(i), m1, m2) for i in index], dtype=F64)
    assert float(gap.min()) > -1e-7
    assert float(gap.min()) < 1e-7
    # No other line through two restorers is below all of them and nearer to them.
    t = index.rsqrt()
    for i in range(8):
        for j in range(i):
            slope = (steep[i] - steep[j]) / (t[i] - t[j])
            other = steep[i] - slope * t[i]
            if slope < 0 or other > 0 or bool((slope * t + other > steep + 1e-9).any()):
                continue
            assert float((slope * t + other).sum()) <= float((m1 * t - m2).sum()) + 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_the_steepness_of_a_linear_map_is_its_largest_singular_value(seed):
    w = randn((5, 4), generator=rng(seed), dtype=F64)
    found = estimate_lipschitz(
        lambda y: y @ w.T, inputs(6, d=4), 0.3, n_steps=60, n_restarts=2, generator=seed
    )
    top = torch.linalg.matrix_norm(w, 2)
    torch.testing.assert_close(found.values, top.expand(6), rtol=1e-3, atol=0)
    assert bool((found.values <= top + 1e-9).all())
    torch.testing.assert_close(found.delta.norm(dim=1), torch.full((6,), 0.3, dtype=F64))
    torch.testing.assert_close((found.delta @ w.T).norm(dim=1) / 0.3, found.values)


def test_the_search_climbs_a_function_that_is_not_linear():
    """A steep wall at distance 0.2 of the input, in one of twenty directions."""

    def wall(y):
        return torch.cat([10 * torch.tanh(10 * (y[:, :1] - 0.2)), y[:, 1:]], 1)

    y = torch.zeros(3, 20, dtype=F64)
    found = estimate_lipschitz(wall, y, [0.05, 0.3], generator=0)
    line = torch.linspace(1e-3, 0.3, 3000, dtype=F64)
    base = 10 * math.tanh(-2)
    best = float(((10 * torch.tanh(10 * (line - 0.2)) - base) / line).max())
    assert bool((found.values > 0.97 * (10 * math.tanh(1) - base) / 0.3).all())
    assert bool((found.values <= best + 1e-9).all())
    near = estimate_lipschitz(wall, y, 0.05, generator=0)
    assert bool((near.values < 0.3 * found.values).all())


def test_the_search_climbs_from_where_the_gradient_is_zero():
    found = estimate_lipschitz(lambda y: y[:, :1] ** 2, torch.zeros(4, 20, dtype=F64), 0.5, generator=0)
    torch.testing.assert_close(found.values, torch.full((4,), 0.5, dtype=F64), rtol=0.01, atol=0)


def test_cost_is_as_in_the_notes():
    found = estimate_lipschitz(identity, inputs(4), [0.1, 0.2], n_steps=5, n_restarts=3, generator=0)
    assert found.cost.ngrad == 4 * 5 * 6
    assert found.cost.nfev == 4 * (1 + 6 * (6 + 5))
    assert found.values.tolist() == pytest.approx([1.0] * 4)


def test_a_constant_has_no_steepness():
    found = estimate_lipschitz(lambda y: 0 * y, inputs(3), 0.1, n_steps=2, generator=0)
    assert found.values.tolist() == [0.0] * 3


@pytest.mark.parametrize("a", [0.5, 2.0, 7.0])
def test_the_two_point_restorer_has_the_slope_of_its_name(a):
    restorer = TwoPointProblem(1.0).restorer(a)
    found = estimate_lipschitz(restorer, torch.zeros(1, 1, dtype=F64), 1e-5, n_steps=3, generator=0)
    assert float(found.values[0]) == pytest.approx(a, abs=1e-6)


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_the_two_point_index_falls_with_the_slope_to_that_of_the_sign(sigma):
    toy = TwoPointProblem(sigma)
    indices = [toy.index(a) for a in (0.5, 1.0, 2.0, 4.0, 16.0, 64.0, 4096.0)]
    assert indices == sorted(indices, reverse=True)
    limit = toy.index(math.inf)
    assert indices[-1] == pytest.approx(limit, rel=0.02)
    assert limit < indices[-1] + 1e-12
    assert limit > 0.01
    x, y = toy.sample(1500, generator=0)
    assert joint_perceptual_index(x, y, toy.restorer(2.0)(y)) == pytest.approx(indices[2], rel=0.15)


def test_the_two_point_mean_restorer_is_the_posterior_mean():
    sigma = 0.7
    y = torch.linspace(-2, 2, 9, dtype=F64)
    weight = torch.sigmoid(2 * y / sigma**2)
    torch.testing.assert_close(TwoPointProblem(sigma).restorer(1 / sigma**2)(y), 2 * weight - 1)


def test_an_invertible_degradation_has_no_tradeoff():
    toy = TwoPointProblem(0.0)
    x, y = toy.sample(200, generator=0)
    assert torch.equal(x, y)
    assert joint_perceptual_index(x, y, y) == 0
    found = estimate_lipschitz(identity, y[:5], [0.01, 1.0], generator=0)
    torch.testing.assert_close(found.values, torch.ones(5, dtype=F64))


def test_sweeping_the_posterior_lowers_the_index_and_doubles_the_slope():
    toy = GaussianProblem(1.0)
    x, y = toy.sample(1200, generator=0)
    x2, y2 = toy.sample(1200, generator=1)
    # Between independent samples of the truth: what the finite samples alone are apart.
    floor = joint_perceptual_index(torch.cat([x, y], 1), 0 * y, torch.cat([x2, y2], 1))
    restored = [joint_perceptual_index(x, y, toy.restorer(k)(y)) for k in (-1, 0, 2)]
    assert restored[0] > restored[1] > restored[2]
    assert joint_perceptual_index(x, y, toy.mean(y)) > 2 * restored[2]
    assert restored[2] < 1.5 * floor
    line = torch.linspace(-3, 3, 600_001, dtype=F64)[:, None]
    for k in (0, 2):
        answers = toy.restorer(k)(line)
        slope = float(((answers[1:] - answers[:-1]) / (line[1:] - line[:-1])).abs().max())
        assert slope == pytest.approx(toy.lipschitz(k), rel=0.02)
        assert slope <= toy.lipschitz(k) * (1 + 1e-9)


def test_the_gaussian_restorer_has_the_posterior_spread_around_its_mean():
    toy = GaussianProblem(0.5)
    y = torch.linspace(-1, 1, 200_001, dtype=F64)[:, None]
    gap = toy.restorer(4)(y) - toy.mean(y)
    assert float(gap.mean()) == pytest.approx(0, abs=0.01)
    assert float(gap.std()) == pytest.approx(0.5 / math.sqrt(1.25), rel=0.03)


def test_exploration_spreads_where_the_restorer_is_steep():
    toy = GaussianProblem(1.0)
    y = inputs(20, d=1)
    wide = explore_posterior(toy.restorer(6), y, 400, 0.05, generator=0)
    narrow = explore_posterior(toy.mean, y, 400, 0.05, generator=0)
    torch.testing.assert_close(wide.diversity, torch.full((20,), 0.5**0.5, dtype=F64), rtol=0.15, atol=0)
    torch.testing.assert_close(narrow.diversity, torch.full((20,), 0.025, dtype=F64), rtol=0.15, atol=0)
    assert bool(wide.consistent.all())


def test_only_answers_that_degrade_to_the_input_count():
    y = inputs(6)
    found = explore_posterior(identity, y, 500, 0.3, degradation=identity, tolerance=0.2, generator=0)
    noise = found.samples - y[:, None]
    torch.testing.assert_close(found.error, noise.square().mean(2).sqrt())
    assert torch.equal(found.consistent, found.error <= 0.2)
    assert 0.05 < float(found.consistent.double().mean()) < 0.6
    kept = found.samples[0][found.consistent[0]]
    assert float(found.diversity[0]) == pytest.approx(float(kept.var(0).mean().sqrt()))
    default = explore_posterior(identity, y, 500, 0.3, degradation=identity, generator=0)
    assert torch.equal(default.consistent, default.error <= 0.6)
    none = explore_posterior(identity, y, 5, 0.3, degradation=lambda x: x + 9, generator=0)
    assert none.diversity.tolist() == [0.0] * 6


def test_the_curve_holds_what_its_parts_say():
    toy = TwoPointProblem(0.8)
    x, _ = toy.sample(300, generator=0)
    restorers = {"a": toy.restorer(1.0), "b": toy.restorer(3.0), "c": toy.restorer(9.0)}
    found = tradeoff_curve(restorers, toy.degrade, x, radius=0.01, n_probed=100, generator=rng(3))
    y = toy.degrade(x, rng(3))
    for i, (name, restorer) in enumerate(restorers.items()):
        assert found.names[i] == name
        assert float(found.index[i]) == pytest.approx(joint_perceptual_index(x, y, restorer(y)))
        assert float(found.distortion[i]) == pytest.approx(float((restorer(y) - x).square().mean().sqrt()))
        slope = (1, 3, 9)[i]
        assert 0.9 * slope < float(found.lipschitz[i]) <= slope + 1e-9
    assert (found.m1, found.m2) == fit_lipschitz_bound(found.index, found.lipschitz)


def test_a_perfect_restorer_leaves_no_bound():
    assert fit_lipschitz_bound(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])) == (0.0, 0.0)
    toy = TwoPointProblem(0.0)
    x, _ = toy.sample(50, generator=0)
    found = tradeoff_curve({"same": identity, "half": lambda y: 0.5 * y}, toy.degrade, x, generator=0)
    assert found.index[0] == 0
    assert (found.m1, found.m2) == (0.0, 0.0)
    assert lipschitz_lower_bound(0.0, found.m1, found.m2) == 0.0


@pytest.mark.parametrize("method", ["exact", "sliced"])
def test_pairs_may_come_with_graphs_and_in_several_dtypes(method):
    x, y, x_hat = inputs(20, torch.float32, 3), inputs(20, F64), inputs(20, F64, 3, seed=5)
    found = joint_perceptual_index(x, y, x_hat.clone().requires_grad_(), method=method, generator=0)
    wanted = joint_perceptual_index(x.double(), y, x_hat, method=method, generator=0)
    assert found == pytest.approx(wanted, rel=1e-12)


def test_a_radius_may_be_any_number():
    import numpy as np

    for radius in (np.float32(0.5), torch.tensor(0.5), [0.5], torch.tensor([0.5])):
        found = estimate_lipschitz(identity, inputs(2), radius, n_steps=1, n_restarts=1, generator=0)
        assert found.values.tolist() == pytest.approx([1.0] * 2)


def test_answers_that_do_not_count_may_be_infinite():
    y = torch.zeros(1, 1, dtype=F64)
    found = explore_posterior(
        lambda v: torch.where(v > 0, v, torch.inf),
        y,
        50,
        0.1,
        degradation=identity,
        tolerance=1.0,
        generator=0,
    )
    kept = found.samples[0][found.consistent[0]]
    assert 1 < len(kept) < 50
    assert float(found.diversity[0]) == pytest.approx(float(kept.std()))


def test_the_steps_fall_from_four_radii_along_half_a_cosine():
    """Two steps from a known start, by hand: 4 r and 2.1 r up the gradient ``W^T W d`` and back onto the sphere."""
    w, y = randn((5, 4), generator=rng(2), dtype=F64), inputs(6, d=4)
    found = estimate_lipschitz(lambda v: v @ w.T, y, 0.3, n_steps=2, n_restarts=1, generator=9)
    delta = Sphere(0.3).sample(y, generator=rng(9))
    reached = []
    for stride in (4.0, 2.1, None):
        reached.append((delta @ w.T).norm(dim=1) / 0.3)
        if stride is not None:
            uphill = delta @ w.T @ w
            delta = delta + 0.3 * stride * uphill / uphill.norm(dim=1, keepdim=True)
            delta = 0.3 * delta / delta.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.values, torch.stack(reached).amax(0), rtol=1e-9, atol=0)
    assert bool((reached[2] > reached[1]).all())


@pytest.mark.parametrize("method", ["exact", "sliced"])
def test_large_orders_do_not_overflow(method):
    """The order goes to the largest of the distances; of one shift all are the same."""
    x, y = inputs(10), torch.zeros(10, 1, dtype=F64)
    options = {"method": method, "generator": 0}
    found = joint_perceptual_index(x, y, x + torch.tensor([3e4, 4e4], dtype=F64), p=200, **options)
    assert found == pytest.approx(5e4, rel=0.05)
    assert joint_perceptual_index(x, y, x, p=200, **options) == 0
