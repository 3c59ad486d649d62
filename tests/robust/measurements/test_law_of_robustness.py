"""Oracles of the law of robustness: pairs by hand, extensions, known slopes, and the bound against the exact constant."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from torch import nn

from _common import Example
from perturbkit.core import checks
from perturbkit.robust import (
    LipschitzInterpolator,
    law_of_robustness,
    minimal_lipschitz_constant,
    network_lipschitz,
)


def _data(n=40, d=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, d, generator=g, dtype=dtype), torch.randn(n, generator=g, dtype=dtype)


def _net(*sizes, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    parts = [part for layer in layers for part in (layer, nn.ReLU())][:-1]
    return nn.Sequential(*parts).to(dtype)


EXAMPLE = Example(
    model=lambda: _net(3, 5, 2, dtype=torch.float32),
    with_model=lambda model, generator, dtype: torch.tensor(
        [network_lipschitz(model.to(dtype), _data(dtype=dtype)[0]), minimal_lipschitz_constant(*_data(dtype=dtype))],
        dtype=dtype,
    ),
    dtypes=(torch.float32,),
    refusals=(
        (lambda: law_of_robustness(0, 1, 1), "n_samples is 0"),
        (lambda: law_of_robustness(9, 1, 1, chance=0.0), "chance"),
        (lambda: minimal_lipschitz_constant(torch.ones(1, 2), torch.ones(1)), "x has one row"),
        (lambda: minimal_lipschitz_constant(torch.ones(3, 2), torch.ones(2)), "y has shape"),
        (lambda: minimal_lipschitz_constant(*_data(), norm="l3"), "norm is 'l3'"),
        (lambda: LipschitzInterpolator(*_data(), constant=1e-3), "constant is 0.001"),
        (lambda: LipschitzInterpolator(torch.ones(2, 1), torch.tensor([0.0, 1.0])), "constant is inf"),
        (lambda: network_lipschitz(_net(2, 2)), "x is None"),
        (lambda: network_lipschitz(nn.Sequential(nn.Conv2d(1, 1, 1)), method="product"), "holds a Conv2d"),
        (lambda: network_lipschitz(nn.ReLU(), method="product"), "no linear layer"),
        (lambda: network_lipschitz(_net(2, 2, 2, 1), method="lipsdp"), "3 linear layers"),
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("norm", "metric"), [("l2", "euclidean"), ("l1", "cityblock"), ("linf", "chebyshev")]
)
def test_constant_is_the_steepest_pair(norm, metric):
    x, y = _data()
    expected = (pdist(y[:, None].numpy()) / pdist(x.numpy(), metric)).max()
    assert minimal_lipschitz_constant(x, y, norm=norm) == pytest.approx(expected)


def test_blocks_see_every_pair():
    x, y = _data(2100, 2, seed=3)
    x[2099] = x[5] + 1e-6
    expected = (pdist(y[:, None].numpy()) / pdist(x.numpy())).max()
    assert minimal_lipschitz_constant(x, y) == pytest.approx(expected)


def test_repeated_inputs():
    x = torch.tensor([[1.0], [1.0], [3.0]])
    assert minimal_lipschitz_constant(x, torch.tensor([2.0, 2.0, 3.0])) == 0.5
    assert minimal_lipschitz_constant(x, torch.tensor([2.0, 2.5, 3.0])) == math.inf


def test_values_of_a_lipschitz_function_need_no_more():
    x, _ = _data(200, 4)
    assert minimal_lipschitz_constant(x, 3 * x.norm(dim=1)) <= 3 + 1e-12


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_interpolators_go_through_the_data_as_flat_as_can_be(norm):
    x, y = _data()
    between = LipschitzInterpolator(x, y, norm=norm)
    for values in between.predict(x):
        torch.testing.assert_close(values, y)
    z, _ = _data(300, 3, seed=5)
    low, middle, high = between.predict(2 * z - 0.5)
    assert bool((low <= high + 1e-12).all())
    for values in (low, middle, high):
        steepest = minimal_lipschitz_constant(torch.cat([x, 2 * z - 0.5]), torch.cat([y, values]), norm=norm)
        assert steepest <= between.constant * (1 + 1e-9)


def test_a_larger_constant_leaves_more_room():
    x, y = _data()
    least = LipschitzInterpolator(x, y)
    wide = LipschitzInterpolator(x, y, constant=2 * least.constant)
    z, _ = _data(50, 3, seed=2)
    assert bool((wide.predict(z)[0] <= least.predict(z)[0]).all())
    assert bool((wide.predict(z)[2] >= least.predict(z)[2]).all())


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("n", [20, 200, 2000])
def test_no_data_are_below_the_bound(n, d):
    bound = law_of_robustness(n, 10**9, d)
    rng = np.random.default_rng(n + d)
    for spread in (1.0, 0.1):  # also where the points are far from uniform
        z = rng.normal(size=(n, d)) * rng.choice([1.0, spread], size=(n, 1))
        x = torch.from_numpy(z / np.maximum(1, np.linalg.norm(z, axis=1, keepdims=True)))
        y = torch.from_numpy(rng.choice([-1.0, 1.0], size=n))
        assert minimal_lipschitz_constant(x, y) >= bound.nonparametric


def test_rates_and_regimes():
    base = law_of_robustness(10_000, 100, 3)
    assert law_of_robustness(40_000, 100, 3).parametric == pytest.approx(2 * base.parametric)
    assert law_of_robustness(10_000, 400, 3).parametric == pytest.approx(base.parametric / 2)
    big = [law_of_robustness(n, 100, 3).nonparametric for n in (2 * 10**9, 16 * 10**9)]
    assert big[1] / big[0] == pytest.approx(2, rel=1e-2)
    assert law_of_robustness(1000, 10, 50).regime == "parameters"
    assert law_of_robustness(1000, 10**6, 1).regime == "dimension"
    assert base.bound == max(base.parametric, base.nonparametric)
    assert law_of_robustness(8, 1, 1, chance=0.25).probability == pytest.approx(1 - 0.75**2)


def test_measures_of_a_network_are_ordered():
    pytest.importorskip("cvxpy", reason="cvxpy is an extra")
    net = _net(4, 12, 2)
    x = 3 * torch.randn(500, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    local = network_lipschitz(net, x)
    sdp, product = (network_lipschitz(net, method=m) for m in ("lipsdp", "product"))
    assert local <= sdp * (1 + 1e-6)
    assert sdp <= product * (1 + 1e-6)
    assert sdp < 0.95 * product
    patterns = torch.randint(0, 2, (4000, 12), generator=torch.Generator().manual_seed(1)).double()
    w0, w1 = net[0].weight.detach(), net[2].weight.detach()
    steepest = torch.linalg.matrix_norm(w1[None] * patterns[:, None] @ w0, ord=2).max()
    assert float(steepest) <= sdp * (1 + 1e-6)


def test_local_is_the_largest_jacobian():
    net = _net(3, 6, 1)
    x, _ = _data(20)
    slopes = [torch.autograd.functional.jacobian(lambda v: net(v[None])[0], row).norm() for row in x]
    assert network_lipschitz(net, x) == pytest.approx(float(max(slopes)))


def test_unknown_methods():
    with pytest.raises(checks.ArgumentError, match="method is 'global'"):
        network_lipschitz(_net(2, 1), method="global")
