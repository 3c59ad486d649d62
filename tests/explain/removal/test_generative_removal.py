"""Oracles of removal by inpainting: captum with constants, the conditional Gaussian by NumPy, and what a mask can and cannot change."""

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf
from torch import nn

from _common import Example
from perturbkit.core import Attribution, Oracle
from perturbkit.explain import ConvInpainter, GaussianInpainter, GenerativeRemoval, occlusion
from perturbkit.explain.removal import _inpainters
from perturbkit.explain.removal._lime import lime_masks


def network(seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3), nn.Softmax(1)).to(
        dtype
    )
    for p in net.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=g, dtype=dtype)
    return net


def images(n=2, seed=1, dtype=torch.float64, channels=2, side=6):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, side, side, generator=g, dtype=dtype)


def masks(n=2, seed=2, side=6, share=0.5):
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed)) < share


def blocks(side=6):
    line = torch.arange(side) // 2
    return line[:, None] * 3 + line


def constant(value):
    return lambda x, m: torch.full_like(x, value)


def shifted(x, m):
    """Paint with the mean of the kept pixels: what is painted depends on the mask."""
    return (x * m).sum((1, 2, 3), keepdim=True) / (x.shape[1] * m.sum((1, 2, 3), keepdim=True)).clamp(
        min=1
    ) + torch.zeros_like(x)


def example(model, generator, dtype):
    x = images(dtype=dtype)
    painter = GaussianInpainter().fit(images(20, 5, dtype))
    found = [
        GenerativeRemoval(
            painter, method, window=2, segments=blocks(), n_samples=12, grid=2, steps=4
        ).attribute(model, x, 1, generator=generator)
        for method in ("occlusion", "lime", "meaningful")
    ]
    values = torch.stack([f.values for f in found], 1)
    cost = found[0].cost + found[1].cost + found[2].cost
    return Attribution(values, found[0].target, cost, "all", found[1].extras)


EXAMPLE = Example(
    model=lambda: network(dtype=torch.float32),
    with_model=example,
    chunked=lambda size: example(
        Oracle(network(), chunk_size=size), torch.Generator().manual_seed(0), torch.float64
    ),
    stochastic=True,
    refusals=(
        (lambda: GenerativeRemoval(0.5), "inpainter is a float"),
        (lambda: GenerativeRemoval(shifted, "shap"), "method is 'shap'"),
        (lambda: GenerativeRemoval(shifted, n_samples=1), "n_samples is 1"),
        (lambda: GenerativeRemoval(shifted, kernel_width=0.0), "kernel_width is 0"),
        (lambda: GenerativeRemoval(shifted, ridge=-1.0), "ridge is -1"),
        (lambda: GenerativeRemoval(shifted, grid=0), "grid is 0"),
        (lambda: GenerativeRemoval(shifted, steps=0), "steps is 0"),
        (lambda: GenerativeRemoval(shifted, lr=0.0), "lr is 0"),
        (lambda: GenerativeRemoval(shifted, l1=-1.0), "l1 is -1"),
        (lambda: GenerativeRemoval(shifted, tv=-1.0), "tv is -1"),
        (lambda: GenerativeRemoval(shifted, value_range=(1.0, 0.0)), "value_range"),
        (lambda: GenerativeRemoval(shifted, window=7).attribute(network(), images(), 0), "window is 7"),
        (
            lambda: GenerativeRemoval(shifted, "lime", segments=1).attribute(network(), images(), 0),
            "segments is 1",
        ),
        (lambda: GenerativeRemoval(shifted).attribute(network(), images()[0], 0), "x has shape"),
        (lambda: GenerativeRemoval(shifted).attribute(network(), images(), 9), "target is 9"),
        (
            lambda: GenerativeRemoval(lambda x, m: x[:1]).attribute(network(), images(), 0),
            "inpainter returns",
        ),
        (lambda: GaussianInpainter(shrinkage=2.0), "shrinkage is 2"),
        (lambda: GaussianInpainter(shrinkage="oas"), "shrinkage is 'oas'"),
        (lambda: GaussianInpainter(-1), "n_components is -1"),
        (lambda: GaussianInpainter().fit(images(1)), "number of images is 1"),
        (lambda: GaussianInpainter()(images(), masks()), "not fitted"),
        (lambda: GaussianInpainter().fit(images())(images(channels=1), masks()), "images has shape"),
        (lambda: GaussianInpainter().fit(images())(images(), masks(3)), "masks has shape"),
        (lambda: ConvInpainter(kernel=4), "kernel is 4"),
        (lambda: ConvInpainter(hidden=0), "hidden is 0"),
        (lambda: ConvInpainter(steps=0), "steps is 0"),
        (lambda: ConvInpainter(batch=0), "batch is 0"),
        (lambda: ConvInpainter(lr=0.0), "lr is 0"),
        (lambda: ConvInpainter()(images(), masks()), "not fitted"),
        (lambda: ConvInpainter().fit(images()[0]), "images has shape"),
    ),
)


@pytest.mark.parametrize(("window", "stride"), [(2, 2), (3, 1), ((2, 3), (1, 2))])
def test_a_constant_inpainter_is_occlusion(window, stride):
    captum = pytest.importorskip("captum.attr", reason="captum is an extra of the tests")
    net, x, target = network(), images(3), torch.tensor([2, 0, 1])
    found = GenerativeRemoval(constant(0.3), window=window, stride=stride).attribute(net, x, target)
    plain = occlusion(net, x, target, window=window, stride=stride, baseline=0.3)
    torch.testing.assert_close(found.values, plain.values, rtol=1e-12, atol=1e-12)
    assert found.cost.nfev == plain.cost.nfev
    if window != (2, 3):  # captum leaves out the rest at the border instead of moving the window back
        pairs = [s if isinstance(s, tuple) else (s, s) for s in (window, stride)]
        expected = captum.Occlusion(net).attribute(
            x, (2, *pairs[0]), strides=(2, *pairs[1]), baselines=0.3, target=target
        )
        torch.testing.assert_close(found.values, expected.to(x.dtype), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.5, 1.0])
def test_a_constant_inpainter_is_captums_lime_on_the_same_masks(ridge):
    captum = pytest.importorskip("captum.attr", reason="captum is an extra of the tests")
    from captum._utils.models.linear_model import SkLearnRidge

    net, x, n = network(), images(1), 60
    z = lime_masks(9, n, torch.Generator().manual_seed(3), x)
    draws = iter(z)

    def kernel(original, perturbed, kept, **kwargs):
        distance = (
            1 - torch.cosine_similarity(kept.flatten(), torch.ones(9).double(), 0) if kept.any() else 1.0
        )
        return torch.exp(torch.as_tensor(-(distance**2) / (2 * 0.25**2)))

    peer = captum.LimeBase(
        net,
        SkLearnRidge(alpha=ridge),
        similarity_func=kernel,
        perturb_func=lambda original, **kwargs: next(draws)[None],
        perturb_interpretable_space=True,
        from_interp_rep_transform=lambda kept, original, **kwargs: torch.where(
            kept[0][blocks()] > 0, original, torch.full_like(original, 0.3)
        ),
        to_interp_rep_transform=None,
    )
    expected = peer.attribute(x, target=1, n_samples=n)[0]
    found = GenerativeRemoval(constant(0.3), "lime", segments=blocks(), n_samples=n, ridge=ridge)
    got = found.attribute(Oracle(net, chunk_size=7), x, 1, generator=3)
    # captum's model works in single precision.
    torch.testing.assert_close(got.extras["coefficients"][0], expected.double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got.values, expected.double()[blocks()].expand_as(x), rtol=1e-6, atol=1e-7)
    assert got.cost.nfev == n


def test_what_is_painted_depends_on_the_mask_and_comes_from_the_original():
    net, x = network(), images()
    seen = []

    def painter(z, m):
        seen.append((z.clone(), m.clone()))
        return shifted(z, m)

    found = GenerativeRemoval(painter, window=3, value_range=None).attribute(Oracle(net, chunk_size=3), x, 0)
    with torch.no_grad():
        whole = net(x)[:, 0]
        for top, left in ((0, 0), (0, 3), (3, 0), (3, 3)):
            kept = torch.ones(2, 1, 6, 6, dtype=torch.bool)
            kept[:, :, top : top + 3, left : left + 3] = False
            removed = torch.where(kept, x, shifted(x, kept))
            expected = (whole - net(removed)[:, 0])[:, None, None, None]
            part = found.values[:, :, top : top + 3, left : left + 3]
            torch.testing.assert_close(part, expected.expand_as(part))
    for z, m in seen:
        assert all(any(torch.equal(one, row) for row in x) for one in z)
        assert m.dtype == torch.bool


def test_painted_pixels_are_clipped_and_kept_ones_are_not_touched():
    x, kept = images(2) * 3, masks()
    both = GenerativeRemoval(constant(5.0)).remove(x, kept)
    assert torch.equal(both, torch.where(kept, x, torch.ones_like(x)))
    free = GenerativeRemoval(constant(5.0), value_range=None).remove(x, kept)
    assert torch.equal(free, torch.where(kept, x, torch.full_like(x, 5.0)))


def test_an_inpainter_that_restores_the_image_gives_zeros():
    net, x = network(), images()
    for method in ("occlusion", "lime"):
        found = GenerativeRemoval(lambda z, m: z, method, segments=blocks(), n_samples=20).attribute(
            net, x, 0, generator=0
        )
        torch.testing.assert_close(found.values, torch.zeros_like(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [1, 2])
def test_the_optimised_mask_step_by_step(grid):
    net, x = network(), images(2)
    made = GenerativeRemoval(shifted, "meaningful", grid=grid, steps=5, lr=0.07, l1=0.03, tv=0.4)
    found = made.attribute(net, x, torch.tensor([1, 2]), generator=4)
    side = 6 // grid
    m = torch.rand(2, 1, side, side, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    first, second, history = torch.zeros_like(m), torch.zeros_like(m), []
    for t in range(1, 6):
        leaf = m.clone().requires_grad_(True)
        soft = leaf
        if grid > 1:
            soft = nn.functional.interpolate(leaf, (6, 6), mode="bilinear", align_corners=False)
        hard = (soft > 0.5).double()
        painted = torch.where(hard > 0, x, shifted(x, hard).clamp(0, 1))
        through = hard + soft - soft.detach()
        out = net(through * x + (1 - through) * painted)[torch.arange(2), torch.tensor([1, 2])]
        penalty = 0.03 * (1 - leaf).flatten(1).sum(1)
        penalty = penalty + 0.4 * (leaf[:, :, 1:] - leaf[:, :, :-1]).abs().pow(3).flatten(1).sum(1)
        penalty = penalty + 0.4 * (leaf[..., 1:] - leaf[..., :-1]).abs().pow(3).flatten(1).sum(1)
        (g,) = torch.autograd.grad((out + penalty).sum(), leaf)
        history.append((out + penalty).detach())
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        m = m - 0.07 * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        m = m.clamp(0, 1)
    torch.testing.assert_close(found.extras["history"], torch.stack(history, 1))
    wide = m if grid == 1 else nn.functional.interpolate(m, (6, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found.values, (1 - wide).expand_as(x))
    assert found.cost.ngrad == 10


def test_an_optimised_mask_removes_what_the_output_depends_on():
    x = torch.ones(2, 1, 6, 6).double()
    f = lambda z: z[:, 0, :, :3].mean((1, 2))
    found = GenerativeRemoval(constant(0.0), "meaningful", steps=200, l1=1e-3, tv=1e-3).attribute(
        f, x, generator=0
    )
    assert float(found.values[..., :3].mean()) > 0.9
    assert float(found.values[..., 4:].mean()) < 0.01  # the column between is drawn along by the roughness


def flat_gaussian(seed=0, d=4, k=40):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(d * d, d * d, generator=g).double() / d
    return (torch.randn(k, d * d, generator=g).double() @ root.T + 0.3).reshape(k, 1, d, d)


@pytest.mark.parametrize("shrinkage", [0.2, "ledoit-wolf"])
@pytest.mark.parametrize("channels", [1, 2])
def test_the_conditional_mean_by_numpy(shrinkage, channels):
    data = flat_gaussian().reshape(40, 16)
    data = torch.cat([data, data.roll(1, 0).square()], 1) if channels == 2 else data
    d = 16 * channels
    painter = GaussianInpainter(shrinkage=shrinkage).fit(data.reshape(40, channels, 4, 4))
    centred = data.numpy() - data.numpy().mean(0)
    plain = centred.T @ centred / 40
    if shrinkage == "ledoit-wolf":
        covariance = ledoit_wolf(data.numpy())[0]
    else:
        covariance = 0.8 * plain + 0.2 * np.trace(plain) / d * np.eye(d)
    np.testing.assert_allclose(painter.covariance_.numpy(), covariance, rtol=1e-6, atol=1e-7)
    x, kept = images(5, 7, side=4, channels=channels), masks(5, 8, side=4)
    kept[3] = kept[1]  # two images may share a mask
    found = painter(x, kept)
    for i in range(5):
        k = np.tile(kept[i, 0].numpy().flatten(), channels)
        flat, mean = x[i].numpy().flatten(), data.numpy().mean(0)
        expected = flat.copy()
        gain = np.linalg.solve(covariance[np.ix_(k, k)], flat[k] - mean[k])
        expected[~k] = mean[~k] + covariance[np.ix_(~k, k)] @ gain
        np.testing.assert_allclose(found[i].numpy().flatten(), expected, rtol=1e-5, atol=1e-6)


def test_masks_of_ones_and_zeros():
    data = flat_gaussian()
    painter = GaussianInpainter().fit(data)
    x = images(3, side=4, channels=1)
    ones = torch.ones(3, 1, 4, 4)
    assert torch.equal(painter(x, ones), x)
    torch.testing.assert_close(painter(x, 0 * ones), data.mean(0).expand_as(x))
    drawn = painter(x, ones, sample=True, generator=0)
    assert torch.equal(drawn, x)


def test_draws_have_the_conditional_moments():
    painter = GaussianInpainter(shrinkage=0.1).fit(flat_gaussian(1, d=2))
    x, kept = images(1, 3, side=2, channels=1), torch.tensor([[[[1, 0], [0, 1]]]])
    many = painter(x.expand(200000, -1, -1, -1), kept.expand(200000, -1, -1, -1), sample=True, generator=2)
    s = painter.covariance_
    u, k = [1, 2], [0, 3]
    expected = s[u][:, u] - s[u][:, k] @ torch.linalg.solve(s[k][:, k], s[k][:, u])
    flat = many.flatten(1)[:, u]
    torch.testing.assert_close(torch.cov(flat.T), expected, rtol=0, atol=1e-2 * float(expected.max()) + 1e-3)
    torch.testing.assert_close(flat.mean(0), painter(x, kept).flatten()[u], rtol=0, atol=0.01)
    again = painter(x.expand(3, -1, -1, -1), kept.expand(3, -1, -1, -1), sample=True, generator=2)
    assert torch.equal(
        again, painter(x.expand(3, -1, -1, -1), kept.expand(3, -1, -1, -1), sample=True, generator=2)
    )


def test_few_components_leave_the_rest_isotropic():
    data = flat_gaussian(2)
    whole = GaussianInpainter(shrinkage=0.0).fit(data).covariance_
    few = GaussianInpainter(3, shrinkage=0.0).fit(data).covariance_
    all_values, values = torch.linalg.eigvalsh(whole), torch.linalg.eigvalsh(few)
    torch.testing.assert_close(values[-3:], all_values[-3:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values[:-3], all_values[:-3].mean().expand(13), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(few.trace(), whole.trace())


def test_blocks_of_masks_do_not_matter(monkeypatch):
    painter = GaussianInpainter().fit(flat_gaussian())
    x, kept = images(7, side=4, channels=1), masks(7, side=4)
    kept[5], kept[2] = kept[0], kept[0]
    at_once = painter(x, kept)
    monkeypatch.setattr(_inpainters, "_BLOCK", 1)
    torch.testing.assert_close(painter(x, kept), at_once)


def test_a_constant_pixel_is_painted_with_its_value():
    data, x, kept = flat_gaussian(), images(1, side=4, channels=1), torch.eye(4)[None, None]
    data[:, :, 0, 0] = 0.25
    for shrinkage in (0.0, "ledoit-wolf"):
        assert bool(GaussianInpainter(shrinkage=shrinkage).fit(data)(x, kept).isfinite().all())
    found = GaussianInpainter(shrinkage=0.0).fit(data)(x, kept.roll(1, 3))
    assert float(found[0, 0, 0, 0]) == pytest.approx(0.25, abs=1e-6)


def ramps(n, seed, side=8):
    """Images that any pixel tells: planes of random slope and level."""
    g = torch.Generator().manual_seed(seed)
    a, b, c = torch.rand(3, n, 1, 1, 1, generator=g)
    line = torch.arange(side) / side
    return (0.5 * a * line[:, None] + 0.5 * b * line + 0.5 * c).clamp(0, 1)


def test_the_network_learns_to_paint():
    painter = ConvInpainter(hidden=16, steps=150).fit(ramps(300, 0), 1)
    x, kept = ramps(40, 5), torch.ones(40, 1, 8, 8)
    kept[:, :, 2:6, 3:7] = 0
    painted = painter(x, kept)
    assert torch.equal(painted * kept, x * kept)
    error = (painted - x).abs().sum() / (1 - kept).sum()
    level = (((x * kept).sum((1, 2, 3)) / kept.sum((1, 2, 3)))[:, None, None, None] - x).abs()
    assert float(error) < 0.6 * float((level * (1 - kept)).sum() / (1 - kept).sum())
    # What is removed is not seen, and the same generator makes the same network.
    assert torch.equal(painted, painter(torch.where(kept > 0, x, 1 - x), kept))
    again = ConvInpainter(hidden=16, steps=3).fit(ramps(300, 0), 1)
    assert all(
        map(torch.equal, again.weights_, ConvInpainter(hidden=16, steps=3).fit(ramps(300, 0), 1).weights_)
    )
    assert not any(w.requires_grad for w in again.weights_)


def test_rectangles_lie_inside_and_vary():
    found = _inpainters._rectangles(images(500, side=8), torch.Generator().manual_seed(0))
    rows, columns = found.any(3)[:, 0].sum(1), found.any(2)[:, 0].sum(1)
    assert torch.equal(found.sum((1, 2, 3)), rows * columns)
    assert set(rows.tolist()) == set(columns.tolist()) == {2, 3, 4, 5, 6}
    assert bool(found.any(0).all())
