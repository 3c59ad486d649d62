"""Oracles of occlusion: a linear function, a plain loop, and captum."""

import pytest
import torch
from torch import nn

from _common import Example
from perturbkit.core import Oracle
from perturbkit.explain import occlusion


def network(channels=2, side=6, k=3, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * (side - 2) ** 2, k))
    net = net.to(dtype)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype)
    return net


def images(n=3, channels=2, side=6, seed=1, dtype=torch.float64):
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)


EXAMPLE = Example(
    model=network,
    with_model=lambda model, generator, dtype: occlusion(model, images(dtype=dtype), 1, window=2),
    chunked=lambda size: occlusion(Oracle(network(), chunk_size=size), images(), 0, window=3, stride=2),
    refusals=(
        (lambda: occlusion(network(), images(), 0, window=7), "window is 7"),
        (lambda: occlusion(network(), images(), 0, window=0), "window is 0"),
        (lambda: occlusion(network(), images(), 0, window=2, stride=3), "stride is 3"),
        (lambda: occlusion(network(), images(), 0, window=(2, 2, 2)), "window is"),
        (lambda: occlusion(network(), images(), 0, baseline=torch.ones(5)), "baseline has shape"),
        (lambda: occlusion(network(), images(), 5), "target is 5"),
        (lambda: occlusion(network(), images()), "target is None"),
        (lambda: occlusion(network(), images()[0, 0, 0], 0), "dimensions"),
        (lambda: occlusion(network(), images() * torch.inf, 0), "NaN or infinite"),
    ),
)


@pytest.mark.parametrize("seed", [0, 1])
def test_linear_function_gives_weight_times_change(seed):
    g = torch.Generator().manual_seed(seed)
    x, w, b = torch.randn(3, 4, 7, generator=g, dtype=torch.float64).unbind()
    found = occlusion(lambda z: z @ w[0] + 3.0, x, baseline=b)
    torch.testing.assert_close(found.values, w[0] * (x - b), rtol=1e-12, atol=1e-12)
    assert found.cost.nfev == 4 * (1 + 7)
    assert found.cost.ngrad == 0


@pytest.mark.parametrize(("window", "stride"), [(2, 2), (3, 1), ((2, 3), (1, 2)), (4, 3)])
def test_against_a_loop(window, stride):
    net, x, target = network(), images(), torch.tensor([2, 0, 1])
    (h, w), (v, u) = (s if isinstance(s, tuple) else (s, s) for s in (window, stride))
    tops = sorted({min(a, 6 - h) for a in range(0, 6 - h + v, v)})
    lefts = sorted({min(a, 6 - w) for a in range(0, 6 - w + u, u)})
    total, count = torch.zeros_like(x), torch.zeros_like(x)
    rows = torch.arange(3)
    with torch.no_grad():
        whole = net(x)[rows, target]
        for top in tops:
            for left in lefts:
                covered = x.clone()
                covered[:, :, top : top + h, left : left + w] = 0.25
                fall = whole - net(covered)[rows, target]
                total[:, :, top : top + h, left : left + w] += fall[:, None, None, None]
                count[:, :, top : top + h, left : left + w] += 1
    assert bool((count > 0).all())
    found = occlusion(net, x, target, window=window, stride=stride, baseline=0.25)
    torch.testing.assert_close(found.values, total / count, rtol=1e-10, atol=1e-10)
    assert found.extras["n_windows"] == len(tops) * len(lefts)


@pytest.mark.parametrize(("window", "stride"), [(2, 2), (4, 1), ((2, 4), (2, 1)), (6, 6)])
def test_agrees_with_captum(window, stride):
    captum = pytest.importorskip("captum.attr", reason="captum is an extra of the tests")
    net, x, target = network(seed=4), images(seed=5), torch.tensor([1, 1, 0])
    pairs = [s if isinstance(s, tuple) else (s, s) for s in (window, stride)]
    expected = captum.Occlusion(net).attribute(
        x, (2, *pairs[0]), strides=(2, *pairs[1]), baselines=0.1, target=target
    )
    found = occlusion(net, x, target, window=window, stride=stride, baseline=0.1)
    torch.testing.assert_close(found.values, expected.to(x.dtype), rtol=1e-6, atol=1e-6)


def test_a_window_of_a_sequence_covers_whole_vectors():
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 4, generator=g, dtype=torch.float64)
    w = torch.randn(5, 4, generator=g, dtype=torch.float64)
    found = occlusion(lambda z: (z * w).sum((1, 2)), x)
    expected = (x * w).sum(2, keepdim=True).expand(-1, -1, 4)
    torch.testing.assert_close(found.values, expected, rtol=1e-12, atol=1e-12)


def test_one_window_over_everything_gives_the_whole_difference():
    net, x = network(), images()
    found = occlusion(net, x, 2, window=6)
    oracle = Oracle(net)
    change = oracle.value(x, 2) - oracle.value(torch.zeros_like(x), 2)
    torch.testing.assert_close(found.values, change[:, None, None, None].expand_as(x), rtol=1e-12, atol=1e-12)


def test_what_the_model_ignores_scores_zero():
    x = images()
    found = occlusion(lambda z: z[:, :, :3].flatten(1).square().sum(1), x, window=1)
    assert bool((found.values[:, :, 3:] == 0).all())
    assert bool((found.values[:, :, :3] > 0).all())
