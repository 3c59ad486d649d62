"""Oracles of infidelity: linear functions, gradients and Shapley values as limits, and captum."""

import itertools
import math

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import Gaussian, Oracle, Uniform
from perturbkit.explain import (
    NoisyBaseline,
    SquareRemoval,
    SubsetToBaseline,
    infidelity,
    integrated_gradients,
    optimal_infidelity_explanation,
)


def network(seed=0, d=5, k=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, k)).to(dtype)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype)
    return net


def inputs(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*(shape or (4, 5)), generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Coordinate:
    """I = eps e_i: each feature is moved alone."""

    def __init__(self, eps):
        self.eps = eps

    def enumerate(self, like):
        d = like.shape[1]
        moved = self.eps * torch.eye(d, dtype=like.dtype)
        return moved[:, None].expand(d, len(like), d), torch.full((d,), 1 / d, dtype=like.dtype)


def _example(model, generator, dtype):
    x = inputs(dtype=dtype)
    return infidelity(model, x, torch.ones_like(x), 1, n_samples=16, normalize=True, generator=generator)


EXAMPLE = Example(
    model=lambda: network(dtype=torch.float32),
    with_model=_example,
    chunked=lambda size: infidelity(
        Oracle(network(), chunk_size=size), inputs(), inputs(seed=2), 0, n_samples=7, generator=3
    ),
    refusals=(
        (lambda: infidelity(network(), inputs(), inputs(4, 4), 0), "explanation has shape"),
        (lambda: infidelity(network(), inputs(), inputs(), 0, n_samples=0), "n_samples is 0"),
        (lambda: infidelity(network(), inputs(), inputs(), 9), "target is 9"),
        (lambda: infidelity(network(), inputs(), inputs() * torch.nan, 0), "NaN"),
        (
            lambda: infidelity(network(), inputs(), inputs(), 0, perturbation=SquareRemoval()),
            "4 dimensions",
        ),
        (lambda: SquareRemoval((3, 2)), "sizes is 2"),
        (lambda: SubsetToBaseline(1.0), "p is 1"),
        (lambda: SubsetToBaseline(weights="lime"), "weights is 'lime'"),
        (lambda: NoisyBaseline(sigma=-1.0), "sigma is -1"),
        (lambda: optimal_infidelity_explanation(network(), inputs(), 0, n_samples=None), "n_samples is None"),
        (lambda: optimal_infidelity_explanation(network(), inputs(), 0, ridge=-1.0), "ridge is -1"),
    ),
    stochastic=True,
)

PERTURBATIONS = [
    Gaussian(0.3),
    Uniform(-1.0, 2.0),
    NoisyBaseline(0.5, 0.2),
    SubsetToBaseline(0.4, 0.1),
]


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
def test_a_linear_function_has_a_perfect_explanation(perturbation):
    x, w = inputs(), inputs(4, 5, seed=7)[0]

    def f(z):
        return z @ w - 2.0

    slopes = w.expand_as(x)
    score = infidelity(f, x, slopes, perturbation=perturbation, n_samples=50, generator=1)
    assert float(score.values.max()) < 1e-20
    assert score.cost.nfev == 4 * 51
    found = optimal_infidelity_explanation(f, x, perturbation=perturbation, n_samples=200, generator=2)
    torch.testing.assert_close(found.values, slopes, rtol=1e-8, atol=1e-8)


def test_squares_on_a_linear_function_of_images():
    x, w = inputs(2, 2, 4, 5), inputs(2, 4, 5, seed=9)
    found = infidelity(
        lambda z: (z * w).flatten(1).sum(1),
        x,
        w.expand_as(x),
        perturbation=SquareRemoval((1, 3)),
        n_samples=30,
        generator=0,
    )
    assert float(found.values.max()) < 1e-20


def test_squares_are_uniform_in_side_and_place_and_hold_the_image():
    x = inputs(1, 3, 6, 6, seed=3).expand(6000, -1, -1, -1)
    drawn = SquareRemoval((2, 3), baseline=0.5).sample(x, generator=0)
    inside = drawn != 0
    torch.testing.assert_close(drawn[inside], (x - 0.5)[inside])
    assert bool((inside == inside[:, :1]).all())
    sides = inside[:, 0].any(2).sum(1)
    assert sides.unique().tolist() == [2, 3]
    assert bool((inside[:, 0].sum((1, 2)) == sides**2).all())
    assert float((sides == 2).double().mean()) == pytest.approx(0.5, abs=0.03)
    corner = inside[sides == 2][:, 0, 0, 0].double().mean()
    assert float(corner) == pytest.approx(1 / 25, abs=0.012)


def test_a_noisy_baseline_has_its_mean_and_deviation():
    x = inputs(1, 3, seed=3).expand(20000, -1)
    drawn = NoisyBaseline(0.5, 0.2).sample(x, generator=0)
    torch.testing.assert_close(drawn.mean(0), x[0] - 0.5, rtol=0, atol=0.01)
    torch.testing.assert_close(drawn.std(0), torch.full((3,), 0.2).double(), rtol=0.03, atol=0)


def test_a_random_subset_has_its_share():
    x = torch.full((20000, 3), 2.0)
    drawn = SubsetToBaseline(0.3, 0.5).sample(x, generator=0)
    assert drawn.unique().tolist() == [0.0, 1.5]
    torch.testing.assert_close(
        (drawn != 0).double().mean(0), torch.full((3,), 0.3).double(), rtol=0, atol=0.015
    )


def test_small_steps_of_one_feature_give_the_gradient():
    net, x = network(), inputs()
    found = optimal_infidelity_explanation(net, x, 2, perturbation=Coordinate(1e-6), n_samples=None)
    torch.testing.assert_close(found.values, Oracle(net).gradient(x, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_all_subsets_with_the_shapley_kernel_give_shapley_values(seed):
    net, x = network(seed), inputs(seed=seed + 10)
    found = optimal_infidelity_explanation(
        net, x, 1, perturbation=SubsetToBaseline(weights="shapley"), n_samples=None
    )
    d, expected = 5, torch.zeros_like(x)
    with torch.no_grad():
        for i in range(d):
            others = [j for j in range(d) if j != i]
            for size in range(d):
                weight = math.factorial(size) * math.factorial(d - size - 1) / math.factorial(d)
                for subset in itertools.combinations(others, size):
                    kept = torch.zeros(d, dtype=x.dtype)
                    kept[list(subset)] = 1
                    without = net(x * kept)[:, 1]
                    kept[i] = 1
                    expected[:, i] += weight * (net(x * kept)[:, 1] - without)
    torch.testing.assert_close(x * found.values, expected, rtol=1e-8, atol=1e-8)


def test_no_other_explanation_has_less_infidelity():
    net, x = network(), inputs()
    subsets = SubsetToBaseline()
    drawn, _ = subsets.enumerate(x)
    best = optimal_infidelity_explanation(net, x, 0, perturbation=subsets, n_samples=None).values
    oracle = Oracle(net)
    change = oracle.value(x, 0) - torch.stack([oracle.value(x - i, 0) for i in drawn])

    def loss(phi):
        return (((drawn * phi).sum(2) - change) ** 2).mean(0)

    least = loss(best)
    for seed in range(20):
        assert bool((loss(best + 0.1 * inputs(seed=seed)) > least).all())


def test_ridge_shrinks_towards_zero():
    net, x = network(), inputs()
    norms = [
        float(optimal_infidelity_explanation(net, x, 0, ridge=r, n_samples=200, generator=0).values.norm())
        for r in (0.0, 0.1, 10.0)
    ]
    assert norms[0] > norms[1] > norms[2]


def test_shares_of_the_output_are_divided_by_the_change():
    net, x, b = network(), inputs(), 0.3
    shares = integrated_gradients(net, x, 1, baseline=b)
    options = {"perturbation": SubsetToBaseline(0.5, b), "n_samples": 64, "generator": 5}
    as_shares = infidelity(net, x, shares, 1, baseline=b, **options)
    as_slopes = infidelity(net, x, shares.values / (x - b), 1, **options)
    torch.testing.assert_close(as_shares.values, as_slopes.values, rtol=1e-12, atol=1e-12)
    # Removing everything predicts the whole difference exactly: integrated gradients are complete.
    everything = infidelity(net, x, shares, 1, baseline=b, perturbation=NoisyBaseline(b, 0.0), n_samples=1)
    assert float(everything.values.max()) < 1e-8


def test_scale_does_not_decide_when_normalised():
    net, x, phi = network(), inputs(), inputs(seed=8)
    options = {"n_samples": 100, "generator": 3}
    one, other = (infidelity(net, x, c * phi, 1, normalize=True, **options) for c in (1.0, -50.0))
    torch.testing.assert_close(one.values, other.values, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(one.extras["scale"], -50 * other.extras["scale"], rtol=1e-9, atol=1e-12)
    raw = infidelity(net, x, phi, 1, **options)
    assert bool((one.values <= raw.values + 1e-12).all())
    scaled = infidelity(net, x, phi * one.extras["scale"][:, None], 1, **options)
    torch.testing.assert_close(scaled.values, one.values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_agrees_with_captum_on_the_same_draws(normalize):
    metrics = pytest.importorskip("captum.metrics", reason="captum is an extra of the tests")
    net, x, phi, m = network(dtype=torch.float32), inputs(dtype=torch.float32), inputs(seed=4).float(), 40
    drawn = 0.5 * inputs(m, 4, 5, seed=6).float()

    class Given:
        def sample(self, like, *, generator=None, n=None):
            return drawn.reshape(like.shape)

    def perturb(repeated):  # captum repeats each row m times in a run
        given = drawn.transpose(0, 1).reshape(repeated.shape)
        return given, repeated - given

    target = torch.tensor([0, 1, 2, 1])
    expected = metrics.infidelity(
        net, perturb, x, phi, target=target, n_perturb_samples=m, normalize=normalize
    )
    found = infidelity(net, x, phi, target, perturbation=Given(), n_samples=m, normalize=normalize)
    torch.testing.assert_close(found.values, expected, rtol=1e-5, atol=1e-5)
