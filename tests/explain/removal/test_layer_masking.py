"""Oracles of layer masking: the network itself, exact blindness to what is masked, crops, hand-made fills, and a real network."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn
from torch.nn import functional

from _common import Example
from perturbkit.core import Oracle
from perturbkit.core.checks import ModelError
from perturbkit.explain import (
    BiasReport,
    LayerMasked,
    layer_masking,
    lime_stratified,
    missingness_bias,
    neighbour_pad,
)


class Residual(nn.Module):
    """Skips, strides, dilation, padding of its own, squeeze-and-excite, concatenation, every kind of pooling."""

    def __init__(self, k=3):
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.stem, self.norm = nn.Conv2d(2, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4)
        self.first = nn.Conv2d(4, 4, 3, padding="same", dilation=2)
        self.gate = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect")
        self.pool, self.mean = nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(2)
        self.head = nn.Linear(6, k)

    def forward(self, x):
        x = functional.relu6(self.norm(self.stem(self.pad((255 * x - 127) / 128))))
        y = torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))) * x
        out = functional.silu(self.first(y))
        out += x
        x = out
        z = torch.cat([self.pool(x), x], 1)
        z = self.mean(functional.gelu(self.last(z)))
        return self.head(functional.adaptive_avg_pool2d(z, 1).flatten(1))


def network(seed=0, k=3, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    net = Residual(k).to(dtype)
    for p in net.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=g, dtype=dtype)
    net.norm.running_mean += 0.1
    return net.eval()


def images(n=3, side=12, seed=1, dtype=torch.float64, channels=2):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_masks(n=3, side=12, seed=2, share=0.5):
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed)) < share


def short(model, x=None, target=0, **options):
    return layer_masking(
        model,
        images() if x is None else x,
        target,
        **({"segments": 5, "n_samples": 6, "generator": 0} | options),
    )


EXAMPLE = Example(
    model=lambda: network(dtype=torch.float32),
    with_model=lambda model, generator, dtype: short(
        model, images(2, dtype=dtype), 1, generator=generator, ridge=0.1
    ),
    chunked=lambda size: short(Oracle(network(), chunk_size=size)),
    stochastic=True,
    refusals=(
        (lambda: short(network(), images()[0]), "x has shape"),
        (lambda: short(network(), segments=1), "segments is 1"),
        (lambda: short(network(), n_samples=1), "n_samples is 1"),
        (lambda: short(network(), kernel_width=0.0), "kernel_width is 0"),
        (lambda: short(network(), ridge=-1.0), "ridge is -1"),
        (lambda: short(network(), target=5), "target is 5"),
        (lambda: LayerMasked(Oracle(network())), "model is a Oracle"),
        (lambda: LayerMasked(network())(images(), random_masks()[0]), "mask has shape"),
        (lambda: LayerMasked(network())(images(), random_masks(2)), "mask has shape"),
        (lambda: LayerMasked(network())(images(), 0.5 * random_masks()), "mask goes from"),
        (lambda: LayerMasked(nn.Conv2d(2, 2, 1).double())(images(), random_masks()), "answers a map"),
        (lambda: LayerMasked(lambda z: z.softmax(1))(images(), random_masks()), "calls softmax"),
        (lambda: LayerMasked(nn.Flatten(2))(images(), random_masks()), "calls flatten"),
        (lambda: LayerMasked(lambda z: z.mean(1))(images(), random_masks()), "calls mean"),
        (lambda: LayerMasked(nn.BatchNorm2d(2).double())(images(), random_masks()), "in training mode"),
        (lambda: LayerMasked(nn.MaxPool2d(2, return_indices=True))(images(), random_masks()), "max_pool2d"),
        (
            lambda: LayerMasked(lambda z: torch.cat([z, torch.ones_like(images())], 1))(
                images(), random_masks()
            ),
            "calls ones_like|calls cat",
        ),
        (lambda: neighbour_pad(images(), random_masks(), -1), "iterations is -1"),
        (lambda: missingness_bias(network(), images(), random_masks()), "masks has shape"),
        (
            lambda: missingness_bias(network(), images(), random_masks()[None], masker="blur"),
            "masker is 'blur'",
        ),
        (
            lambda: missingness_bias(network(), images(), random_masks()[None], shapes=[0, 1]),
            "shapes has shape",
        ),
        (lambda: missingness_bias(network(k=1), images(), random_masks()[None]), "two classes"),
        (
            lambda: missingness_bias(network(), images(), random_masks()[None], masker=lambda z, m: z[:1]),
            "the images that masker returns",
        ),
        (
            lambda: missingness_bias(network(), images(), random_masks()[None], masker=torch.ones(5)),
            "baseline has shape",
        ),
    ),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [12, 15])
def test_a_mask_of_ones_gives_the_network(dtype, side):
    net, x = network(dtype=dtype), images(side=side, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for mask in (torch.ones(3, 1, side, side), torch.ones(1, 1, side, side, dtype=torch.bool)):
        torch.testing.assert_close(LayerMasked(net)(x, mask), net(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_masked_pixels_have_no_influence_at_all(share):
    net, x, mask = LayerMasked(network()), images(), random_masks(share=share)
    noise = torch.where(mask, x, 100 * images(seed=9) - 30)
    assert torch.equal(net(x, mask), net(noise, mask))
    changed = torch.where(mask, x + 0.1, x)
    assert not torch.allclose(net(x, mask), net(changed, mask))
    leaf = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(net(leaf, mask).square().sum(), leaf)
    assert bool((slope[~mask.expand_as(x)] == 0).all())
    assert bool((slope[mask.expand_as(x)] != 0).any())


@pytest.mark.parametrize("pool", ["adaptive", "average", "mean"])
def test_a_kept_rectangle_under_single_pixel_filters_is_the_crop(pool):
    g = torch.Generator().manual_seed(3)
    last = {
        "adaptive": [nn.AdaptiveAvgPool2d(1), nn.Flatten()],
        "average": [nn.AvgPool2d(12), nn.Flatten()],
        "mean": [],
    }[pool]
    body = nn.Sequential(nn.Conv2d(2, 5, 1), nn.Sigmoid(), nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1), nn.Tanh())
    for p in body.parameters():
        p.data = torch.randn(p.shape, generator=g)
    body = body.double().eval()
    tail = nn.Sequential(*last)
    net = (lambda z: body(z).mean((2, 3))) if pool == "mean" else (lambda z: tail(body(z)))
    x = images()
    mask = torch.zeros(3, 1, 12, 12)
    mask[:, :, 2:9, 5:11] = 1
    crop = body(x[:, :, 2:9, 5:11]).mean((2, 3))
    torch.testing.assert_close(LayerMasked(net)(x, mask), crop, rtol=1e-12, atol=1e-12)


def test_a_ring_that_only_the_padding_makes_stays():
    net = nn.Sequential(nn.Conv2d(2, 3, 1, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    net[0].bias.data = torch.tensor([1.0, -2.0, 3.0]).double()
    x = images()
    torch.testing.assert_close(LayerMasked(net)(x, torch.ones(3, 1, 12, 12)), net(x), rtol=1e-12, atol=1e-12)


def test_an_image_of_one_colour_is_the_same_under_every_mask():
    g = torch.Generator().manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, (3, 2), stride=2, dilation=(1, 2)), nn.BatchNorm2d(6), nn.SiLU(),
        nn.MaxPool2d(2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).double().eval()  # fmt: skip
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g).double()
    x = torch.rand(3, 2, 1, 1, generator=g).double().expand(3, 2, 14, 14)
    for share in (0.02, 0.3, 0.7):
        mask = random_masks(side=14, share=share)
        mask[:, :, 5, 5] = True
        torch.testing.assert_close(LayerMasked(net)(x, mask), net(x), rtol=1e-10, atol=1e-10)


def test_one_convolution_by_hand():
    g = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(3, 2, 3, 3, generator=g).double(), torch.randn(3, generator=g).double()
    x, mask = images(side=9), random_masks(side=9, share=0.2)

    def net(z):
        return functional.adaptive_avg_pool2d(
            functional.conv2d(z, weight, bias, stride=2, padding=1), 1
        ).flatten(1)

    full = neighbour_pad(x, mask, 3)
    out = functional.conv2d(full, weight, bias, stride=2, padding=1)
    new = functional.max_pool2d(mask.double(), 3, 2, 1)
    expected = (out * new).sum((2, 3)) / new.sum((2, 3))
    torch.testing.assert_close(LayerMasked(net)(x, mask), expected, rtol=1e-12, atol=1e-12)
    # Filling matters: without it the answer is another.
    bare = (functional.conv2d(x * mask, weight, bias, stride=2, padding=1) * new).sum((2, 3)) / new.sum(
        (2, 3)
    )
    assert not torch.allclose(bare, expected, atol=1e-3)


def test_where_branches_meet_a_cell_is_known_if_it_is_in_each():
    weight = torch.ones(2, 2, 3, 3).double() / 18

    def net(z):
        wide = functional.conv2d(z, weight, padding=1)
        return (wide + z).mean((2, 3))

    def side_by_side(z):
        return torch.cat([functional.conv2d(z, weight, padding=1), z], 1).mean((2, 3))

    x, mask = images(), random_masks(share=0.1)
    wide = functional.conv2d(neighbour_pad(x, mask, 2), weight, padding=1)
    expected = ((wide + x) * mask).sum((2, 3)) / mask.sum((2, 3))
    torch.testing.assert_close(LayerMasked(net)(x, mask), expected, rtol=1e-12, atol=1e-12)
    expected = torch.cat([wide * mask, x * mask], 1).sum((2, 3)) / mask.sum((2, 3))
    torch.testing.assert_close(LayerMasked(side_by_side)(x, mask), expected, rtol=1e-12, atol=1e-12)


def test_padding_by_a_layer_or_by_the_convolution_is_the_same():
    g = torch.Generator().manual_seed(6)
    inside = nn.Conv2d(2, 4, 5, stride=2, padding=2).double()
    inside.weight.data = torch.randn(inside.weight.shape, generator=g).double()
    outside = nn.Conv2d(2, 4, 5, stride=2).double()
    outside.load_state_dict(inside.state_dict())
    tail = nn.Sequential(nn.Tanh(), nn.MaxPool2d(2, 2, 1), nn.Flatten())
    x, mask = images(), random_masks(share=0.3)
    a = LayerMasked(nn.Sequential(inside, tail))(x, mask)
    b = LayerMasked(nn.Sequential(nn.ZeroPad2d(2), outside, tail))(x, mask)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    # Padding of another colour is the model's own: it is neither filled nor a neighbour.
    c = LayerMasked(nn.Sequential(nn.ConstantPad2d(2, 0.7), outside, nn.AdaptiveAvgPool2d(1), nn.Flatten()))(
        x, mask
    )
    ring = functional.pad(neighbour_pad(x, mask, 4), (2, 2, 2, 2), value=0.7)
    new = functional.max_pool2d(mask.double(), 5, 2, 2)
    torch.testing.assert_close(c, (outside(ring) * new).sum((2, 3)) / new.sum((2, 3)), rtol=1e-12, atol=1e-12)


def test_averages_and_flattened_maps_count_removed_cells_as_zero():
    x, mask = images(), random_masks(share=0.2)
    seen = torch.sigmoid(x) * mask
    net = nn.Sequential(nn.Sigmoid(), nn.AvgPool2d(3, 2, 1), nn.Flatten())
    torch.testing.assert_close(LayerMasked(net)(x, mask), functional.avg_pool2d(seen, 3, 2, 1).flatten(1))
    net = nn.Sequential(nn.Sigmoid(), nn.Flatten())
    torch.testing.assert_close(LayerMasked(net)(x, mask), seen.flatten(1))
    net = nn.Sequential(nn.Sigmoid(), nn.AvgPool2d(12, divisor_override=1), nn.Flatten())
    torch.testing.assert_close(LayerMasked(net)(x, mask), seen.sum((2, 3)))


@pytest.mark.parametrize("seed", [0, 1])
def test_neighbours_fill_as_a_loop_does(seed):
    x, mask = images(2, 7, seed), random_masks(2, 7, seed + 10, share=0.1)
    for steps in (0, 1, 3):
        expected, known = (x * mask).numpy().copy(), mask.numpy()[:, 0].copy()
        for _ in range(steps):
            values, now = expected.copy(), known.copy()
            for n, i, j in np.argwhere(~known):
                near = [
                    (a, b)
                    for a in range(max(i - 1, 0), min(i + 2, 7))
                    for b in range(max(j - 1, 0), min(j + 2, 7))
                    if known[n, a, b]
                ]
                if near:
                    values[n, :, i, j] = np.mean([expected[n, :, a, b] for a, b in near], axis=0)
                    now[n, i, j] = True
            expected, known = values, now
        found = neighbour_pad(x, mask, steps)
        torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_the_model_may_write_into_its_activations_and_ask_for_their_shape():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.relu = nn.Conv2d(2, 3, 3).double(), nn.ReLU(inplace=True)

        def forward(self, x):
            assert x.dim() == 4
            y = self.relu(self.conv(x))
            y = functional.dropout(y, 0.5, self.training)
            return functional.avg_pool2d(y, y.shape[2:]).view(x.size(0), -1)

    net, x = Asking().eval(), images()
    torch.testing.assert_close(LayerMasked(net)(x, torch.ones(3, 1, 12, 12)), net(x))


def test_lime_of_a_network_without_neighbours_is_lime_of_the_mean_over_the_kept():
    parts = torch.arange(12)[:, None] // 4 * 2 + torch.arange(12) // 6  # six blocks
    x = images(2)
    weight = torch.tensor([1.0, -2.0]).double()
    found = layer_masking(
        lambda z: z.mean((2, 3)) @ weight, x, segments=parts, n_samples=40, ridge=0.5, generator=3
    )
    # The same masks, and the masked mean as a function of their blocks, through LIME with plain removal.
    means = torch.stack([(x * (parts == p)).sum((2, 3)) / 24 for p in range(6)], 1) @ weight

    def blocks(z):
        on = z[:, 0, ::4, ::6].flatten(1)
        return (on @ means[which]) / on.sum(1).clamp(min=1e-30)

    for which in range(2):
        g = torch.Generator().manual_seed(3)
        for _ in range(which):
            torch.rand(40, 6, generator=g, dtype=torch.float64)
        expected = lime_stratified(
            blocks, torch.ones(1, 1, 12, 12).double(), segments=parts, sampling="uniform", hide=0.0, n_samples=40,
            ridge=0.5, generator=g,
        )  # fmt: skip
        torch.testing.assert_close(
            found.extras["coefficients"][which], expected.extras["coefficients"][0], rtol=1e-9, atol=1e-9
        )
    assert found.cost.nfev == 80


def test_an_oracle_counts_what_it_was_asked():
    oracle = Oracle(network(), chunk_size=4)
    oracle(images())
    found = short(oracle)
    assert found.cost.nfev == 18
    assert oracle.nfev == 21
    assert missingness_bias(oracle, images(), random_masks()[None]).cost.nfev == 6
    assert missingness_bias(oracle, images(), random_masks()[None], masker=0.0).cost.nfev == 6
    assert oracle.nfev == 33


def test_bias_report_by_hand():
    net, x = network(), images(4)
    masks = random_masks(4 * 5).unflatten(0, (5, 4))
    report = missingness_bias(net, x, masks, masker=0.3)
    with torch.no_grad():
        whole = net(x)
        out = torch.stack([net(torch.where(m, x, torch.tensor(0.3).double())) for m in masks])
    assert isinstance(report, BiasReport)
    same = (out.argmax(2) == whole.argmax(1)).double().mean(0)
    torch.testing.assert_close(report.unchanged, same)
    change = 0.5 * (out.softmax(2) - whole.softmax(1)).abs().sum(2).mean(0)
    torch.testing.assert_close(report.change, change)
    share = np.bincount(out.argmax(2).flatten().numpy(), minlength=3) / 20
    assert report.class_entropy == pytest.approx(-sum(s * math.log(s) for s in share if s > 0))
    assert math.isnan(report.leakage)
    # The removal by a function, and layer masking itself, are the same numbers by another way.
    other = missingness_bias(net, x, masks, masker=lambda z, m: torch.where(m, z, torch.full_like(z, 0.3)))
    torch.testing.assert_close(other.change, change)
    layered = missingness_bias(net, x, masks)
    with torch.no_grad():
        inner = torch.stack([LayerMasked(net)(x, m) for m in masks])
    torch.testing.assert_close(
        layered.change, 0.5 * (inner.softmax(2) - whole.softmax(1)).abs().sum(2).mean(0)
    )


def test_the_probe_leaves_one_out():
    g = torch.Generator().manual_seed(7)
    x, kinds = images(30), torch.randint(0, 3, (30,), generator=g)
    masks = random_masks(30)[None]
    report = missingness_bias(network(), x, masks, masker=0.0, shapes=kinds[None])
    with torch.no_grad():
        out = network()(x * masks[0]).numpy()
    features = (out - out.mean(0)) / out.std(0, ddof=1)
    features = np.concatenate([features, np.ones((30, 1))], 1)
    right = 0
    for i in range(30):
        others = np.arange(30) != i
        fit = Ridge(alpha=1.0, fit_intercept=False).fit(features[others], np.eye(3)[kinds.numpy()][others])
        right += int(fit.predict(features[i : i + 1])[0].argmax() == int(kinds[i]))
    assert report.leakage == pytest.approx(right / 30)


def test_efficientnet_with_a_mask_of_ones_and_blind_to_the_masked_half():
    pytest.importorskip("efficientnet_lite_pytorch", reason="the image model is an extra")
    from perturbkit.data import image_model, load_photographs

    net, x = image_model().module, load_photographs().x[:1]
    with torch.no_grad():
        layered = LayerMasked(net)
        torch.testing.assert_close(layered(x, torch.ones(1, 1, 224, 224)), net(x), rtol=1e-4, atol=1e-4)
        half = torch.ones(1, 1, 224, 224)
        half[..., :100] = 0
        assert torch.equal(layered(x, half), layered(torch.where(half > 0, x, 1 - x), half))


def test_an_unknown_operation_is_named():
    with pytest.raises(ModelError, match="calls interpolate"):
        LayerMasked(lambda z: functional.interpolate(z, scale_factor=2))(images(), random_masks())
