"""Oracles of extremal perturbations: the area term, closed-form optima of linear functions, smoothing and blurring limits."""

import sys

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from _common import Example
from perturbkit.core import Oracle
from perturbkit.explain import area_regulariser, extremal_channels, extremal_perturbation, smooth_mask
from perturbkit.explain.removal._extremal import between_levels, blur_pyramid


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
        (
            lambda: short(network(), images(), perturbation="noise"),
            "perturbation is 'noise'; allowed: 'blur'",
        ),
        (
            lambda: extremal_channels(Oracle(network()), nn.ReLU(), images(), 0),
            "not in model, a Oracle",
        ),
        (lambda: short(network(), images(), areas=(1.0,)), "areas is 1"),
        (lambda: short(network(), images(), variant="keep"), "variant is 'keep'"),
        (lambda: short(network(), images(), step=7), "step is 7"),
        (lambda: short(network(), images(), sigma=-1.0), "sigma is -1"),
        (lambda: short(network(), images(), max_blur=0.0), "max_blur is 0"),
        (lambda: short(network(), images(), max_iter=0), "max_iter is 0"),
        (lambda: short(network(), images(), lr=0.0), "lr is 0"),
        (lambda: short(network(), images(), weight=0.0), "weight is 0"),
        (lambda: short(network(), images(), growth=0.0), "growth is 0"),
        (lambda: short(network(), images(), perturbation=float("nan")), "perturbation is nan"),
        (lambda: smooth_mask(images(), 0, 1.0, (6, 6)), "step is 0"),
        (lambda: smooth_mask(images(), 1, -1.0, (6, 6)), "sigma is -1"),
        (lambda: area_regulariser(images(), 1.5), "areas is 1.5"),
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
    found = smooth_mask(p, 1, 2.0, (1, 3))[0, 0, 0]
    for u in range(3):
        z = [
            float(p[0, 0, 0, v]) * 2.718281828459045 ** (-(max(0, abs(u - v) - 1) ** 2) / 2) for v in range(3)
        ]
        e = [2.718281828459045 ** (20 * a) for a in z]
        assert float(found[u]) == pytest.approx(
            sum(a * b for a, b in zip(z, e, strict=True)) / sum(e), rel=1e-9
        )


def test_images_one_after_the_other_are_images_at_once(monkeypatch):
    x, target = images(3), torch.tensor([2, 0, 1])
    at_once = short(network(), x, target, areas=(0.2, 0.5), max_iter=10)
    module = sys.modules["perturbkit.explain.removal.extremal_perturbation"]
    monkeypatch.setattr(module, "_BLOCK", 1)
    found = short(network(), x, target, areas=(0.2, 0.5), max_iter=10)
    for name in ("masks", "scores", "history", "saliency"):
        torch.testing.assert_close(getattr(found, name), getattr(at_once, name))
    assert found.cost.ngrad == at_once.cost.ngrad


@pytest.mark.parametrize("sigma", [2.0, 11.0, 18.0])
def test_a_wide_window_by_its_definition(sigma):
    p = (torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(3)) > 0.9).double()
    found = smooth_mask(p, 7, sigma, (46, 61))
    rows, columns = (torch.arange(n).double() for n in (46, 61))
    centres = [7 * torch.arange(n).double() + 3 for n in (7, 9)]
    apart = (
        (rows[:, None, None, None] - centres[0][:, None]).square()
        + (columns[:, None, None] - centres[1]).square()
    ).sqrt()  # [rows, columns, rows of p, columns of p]
    k = torch.exp(-((2 * apart / sigma - 1).clamp(min=0) ** 2) / 2)
    z = k * p[:, 0, None, None]
    own = (rows.long() // 7)[:, None, None, None] == torch.arange(7)[:, None]
    own = own & ((columns.long() // 7)[:, None, None] == torch.arange(9))
    weight = torch.where((apart <= 1.5 * sigma) | own, (20 * z).exp(), torch.zeros_like(z))
    expected = ((weight * z).sum((3, 4)) / weight.sum((3, 4)))[:, None]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert bool(((found >= 0) & (found <= 1)).all())


def test_every_mask_but_a_clipped_one_has_a_slope_between_the_levels():
    levels = blur_pyramid(images(1), 8, 2.0)
    for value, (a, b) in ((1.0, (0, 1)), (0.5, (3, 4)), (0.0, (6, 7))):
        mask = torch.full((1, 1, 6, 6), value).double().requires_grad_(True)
        (slope,) = torch.autograd.grad(between_levels(levels, mask).sum(), mask)
        torch.testing.assert_close(slope, 7 * (levels[:, a] - levels[:, b]))


def test_rounds_of_masks_go_with_the_images_in_turn():
    x = images(3)
    levels = blur_pyramid(x, 8, 2.0)
    masks = torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(4)).double()
    found = between_levels(levels, masks)
    for i in range(6):
        torch.testing.assert_close(
            found[i : i + 1], between_levels(levels[i % 3 : i % 3 + 1], masks[i : i + 1])
        )


def test_the_history_begins_with_the_whole_mask():
    f = lambda z: z.square().flatten(1).sum(1)
    x = images()
    for variant, expected in (
        ("preserve", -f(x)), ("delete", f(0 * x)), ("dual", f(0 * x) - f(x)),
    ):  # fmt: skip
        found = short(
            f, x, None, variant=variant, perturbation=0.0, areas=(0.25,), step=1, sigma=0.0, max_iter=3
        )
        torch.testing.assert_close(found.history[0, :, 0], expected + 300 * 0.75)
        assert found.history.shape == (1, 2, 3)


def test_areas_are_found_each_for_itself():
    x, net = images(2), network()
    both = short(net, x, areas=(0.2, 0.5), max_iter=20)
    for i, area in enumerate((0.2, 0.5)):
        one = short(net, x, areas=(area,), max_iter=20)
        torch.testing.assert_close(both.masks[i], one.masks[0])
        torch.testing.assert_close(both.scores[i], one.scores[0])
        torch.testing.assert_close(both.history[i], one.history[0])
    found = both.attribution()
    assert torch.equal(found.values, both.saliency)
    assert found.cost.nfev == both.cost.nfev
    blurred = gaussian_filter(
        both.saliency[0, 0].numpy(), 1.2, mode="mirror", radius=4
    )  # the border is reflected, as for other maps
    torch.testing.assert_close(both.attribution(blur=1.2).values[0, 0], torch.from_numpy(blurred))


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
