"""Oracles of extremal perturbations: the area term, closed-form optima of linear functions, smoothing and blurring limits."""

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from _common import Example
from perturbkit.core import Oracle
from perturbkit.explain import area_regulariser, extremal_channels, extremal_perturbation, smooth_mask
from perturbkit.explain.removal._parts import between_levels, blur_pyramid


def network(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).to(dtype)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=dtype)
    return net


def images(n=2, seed=1, dtype=torch.float64):
    return torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def short(model, x, target=0, **options):
    return extremal_perturbation(model, x, target, **({"step": 2, "sigma": 1.0, "max_iter": 5} | options))


EXAMPLE = Example(
    model=lambda: network(dtype=torch.float32),
    with_model=lambda model, generator, dtype: short(
        model, images(dtype=dtype), 1, areas=(0.2, 0.5), variant="dual"
    ),
    chunked=lambda size: short(Oracle(network(), chunk_size=size), images(), areas=(0.2, 0.4)),
    refusals=(
        (lambda: short(network(), images()[0]), "x has shape"),
        (lambda: short(network(), images(), areas=()), "areas is empty"),
        (lambda: short(network(), images(), areas=(1.0,)), "areas is 1"),
        (lambda: short(network(), images(), variant="keep"), "variant is 'keep'"),
        (lambda: short(network(), images(), step=7), "step is 7"),
        (lambda: short(network(), images(), sigma=-1.0), "sigma is -1"),
        (lambda: short(network(), images(), max_blur=0.0), "max_blur is 0"),
        (lambda: short(network(), images(), max_iter=0), "max_iter is 0"),
        (lambda: short(network(), images(), lr=0.0), "lr is 0"),
        (lambda: short(network(), images(), weight=0.0), "weight is 0"),
        (lambda: short(network(), images(), growth=0.0), "growth is 0"),
        (lambda: extremal_channels(network(), nn.ReLU(), images(), 0), "layer is ReLU"),
    ),
)


@pytest.mark.parametrize("area", [0.1, 0.25, 0.5])
def test_the_area_term_is_zero_for_the_right_binary_mask_only(area):
    count, g = round(area * 40), torch.Generator().manual_seed(0)
    mask = (torch.arange(40) < count).double()[torch.randperm(40, generator=g)].reshape(1, 1, 5, 8)
    assert float(area_regulariser(mask, area)) == 0
    flipped = mask.clone()
    flipped.view(-1)[int(mask.view(-1).argmin())] = 1
    assert float(area_regulariser(flipped, area)) == pytest.approx(1 / 40)
    grey = torch.full_like(mask, count / 40)
    share = count / 40
    assert float(area_regulariser(grey, area)) == pytest.approx(share * (1 - share))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("variant", ["preserve", "delete", "dual"])
def test_a_linear_function_keeps_its_largest_terms(seed, variant):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(1, 5, 6, generator=g).double()
    x = torch.rand(2, 1, 5, 6, generator=g).double() + 0.5
    areas = (0.2, 0.5)
    found = extremal_perturbation(
        lambda z: (w * z).flatten(1).sum(1),
        x,
        areas=areas,
        variant=variant,
        perturbation=0.0,
        step=1,
        sigma=0.0,
    )
    terms = (w * x).flatten(1)
    for mask, score, area in zip(found.masks, found.scores, areas, strict=True):
        top = terms.topk(round(area * 30), 1)
        expected = torch.zeros_like(terms).scatter(1, top.indices, 1.0)
        torch.testing.assert_close(mask.flatten(1), expected, rtol=0, atol=0.02)
        torch.testing.assert_close(score, top.values.sum(1), rtol=0, atol=0.1)
    torch.testing.assert_close(found.saliency, found.masks.sum(0))
    assert found.cost.ngrad == 800 * 4 * (2 if variant == "dual" else 1)


def test_without_a_window_the_parameters_are_the_mask():
    p = images()
    torch.testing.assert_close(smooth_mask(p, 1, 0.0, (6, 6)), p)
    torch.testing.assert_close(smooth_mask(p, 1, 1e-9, (6, 6)), p)
    large = smooth_mask(p, 2, 0.0, (12, 12))
    torch.testing.assert_close(large, p.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_the_smooth_maximum_by_hand():
    p = torch.tensor([[[[0.2, 0.9, 0.4]]]]).double()
    found = smooth_mask(p, 1, 1.0, (1, 3))[0, 0, 0]
    for u in range(3):
        z = [
            float(p[0, 0, 0, v]) * 2.718281828459045 ** (-(max(0, abs(u - v) - 1) ** 2) / 4) for v in range(3)
        ]
        e = [2.718281828459045 ** (20 * a) for a in z]
        assert float(found[u]) == pytest.approx(
            sum(a * b for a, b in zip(z, e, strict=True)) / sum(e), rel=1e-9
        )


def test_the_pyramid_blurs_and_its_ends_are_the_image_and_the_blur():
    x = images()
    levels = blur_pyramid(x, 8, 2.0)
    for level in (0, 3, 7):
        s = 2.0 * level / 7
        expected = (
            x[0, 0].numpy()
            if s == 0
            else gaussian_filter(x[0, 0].numpy(), s, mode="nearest", radius=int(3 * s) + 1)
        )
        torch.testing.assert_close(levels[0, level, 0], torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    ones = torch.ones_like(x)
    torch.testing.assert_close(between_levels(levels, ones), x)
    torch.testing.assert_close(between_levels(levels, 0 * ones), levels[:, 7])
    middle = between_levels(levels, ones * (1 - 2.5 / 7))
    torch.testing.assert_close(middle, (levels[:, 2] + levels[:, 3]) / 2)


def test_smallest_area_that_reaches_a_threshold():
    found = short(lambda z: z.flatten(1).sum(1), images(), None, areas=(0.5, 0.2), perturbation=0.0)
    scores = found.scores
    assert found.smallest(scores[1] - 1e-9).tolist() == [0.2, 0.2]
    between = torch.stack((scores[:, 0].amin() + 1e-6, scores[:, 1].amax() + 1))
    assert found.smallest(between)[0] == 0.5
    assert bool(found.smallest(between)[1].isnan())


def test_channels_of_a_linear_function_keep_the_largest():
    g = torch.Generator().manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    ).double()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g).double()
    x = images(3)
    found = extremal_channels(net, net[1], x, torch.tensor([0, 1, 1]), areas=(0.25,))
    with torch.no_grad():
        means = net[:4](x)
    terms = means * net[4].weight.data[[0, 1, 1]]
    expected = torch.zeros_like(terms).scatter(1, terms.topk(2, 1).indices, 1.0)
    torch.testing.assert_close(found.masks[0], expected, rtol=0, atol=0.05)
    assert not net[1]._forward_hooks
