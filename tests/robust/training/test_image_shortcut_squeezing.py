"""Oracles of image shortcut squeezing: the codec, projections, gradients in closed form, and what poisons minimise."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional

from _common import Example
from perturbkit.core import Oracle, assign, flatten
from perturbkit.core.random import rademacher, randn, uniform
from perturbkit.robust import (
    ImageShortcutSqueezing,
    autoregressive_poison,
    error_maximising_poison,
    error_minimising_poison,
    evaluate_poisons,
    grayscale,
    jpeg,
    patch_poison,
    reduce_bits,
)

F64 = torch.float64


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=4, channels=3, height=16, width=16, seed=1, dtype=F64):
    """Return smooth pictures with a little noise, in 8 bits."""
    g = stream(seed)
    coarse = uniform((n, channels, 3, 3), 0.1, 0.9, generator=g, dtype=dtype)
    smooth = functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    noisy = smooth + 0.03 * randn(smooth.shape, generator=g, like=smooth)
    return (255 * noisy.clamp(0, 1)).round() / 255


def by_pillow(x, quality, subsampling):
    """Send one image after the other through the codec."""
    rows = []
    for image in (255 * x).round().byte().permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        picture.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
        rows.append(torch.from_numpy(np.array(Image.open(buffer)).reshape(image.shape)))
    return torch.stack(rows).permute(0, 3, 1, 2).to(x) / 255


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def filled(seed=0):
    with torch.random.fork_rng(devices=[]):
        net = network().double()
    assign(net, 0.3 * randn((len(flatten(net)),), generator=stream(seed), dtype=F64))
    return net


def small(n=12, dtype=F64, seed=2):
    return images(n, 3, 8, 8, seed, dtype), torch.arange(n) % 3


def with_model(model, generator, dtype):
    x, y = small(dtype=dtype)
    table = evaluate_poisons(lambda x, y: model, x, y, x, y, {"patches": patch_poison}, {"bits": reduce_bits})
    return {
        "squeezed": ImageShortcutSqueezing(bits=4)(x),
        "in torch": ImageShortcutSqueezing(differentiable=True)(x),
        "patches": patch_poison(x, y, generator=generator),
        "minimising": error_minimising_poison(
            model, x, y, n_rounds=2, n_steps=2, batch_size=4, generator=generator
        ),
        "maximising": error_maximising_poison(model, x, y, n_steps=2),
        "shape": torch.tensor(table.accuracy.shape),
    }


SAME = {"none": lambda *data: data[0]}

EXAMPLE = Example(
    model=network,
    with_model=with_model,
    refusals=(
        (lambda: ImageShortcutSqueezing(jpeg_quality=0), "quality is 0"),
        (lambda: ImageShortcutSqueezing(bits=9), "bits is 9"),
        (lambda: ImageShortcutSqueezing()(255 * images()), "images has 3 channels and values"),
        (lambda: ImageShortcutSqueezing()(images()[0]), "images has shape"),
        (lambda: grayscale(images(channels=2)), "images has 2 channels"),
        (lambda: reduce_bits(images(), 0), "bits is 0"),
        (lambda: jpeg(images(), 101), "quality is 101"),
        (lambda: jpeg(images(), 10.0), "quality is 10"),
        (lambda: jpeg(images(), subsampling="4:1:1"), "subsampling is '4:1:1'"),
        (lambda: jpeg(images()[:0]), "images is empty"),
        (lambda: jpeg((255 * images()).byte()), "images has dtype"),
        (lambda: autoregressive_poison(small()[0][:, :, :2], small()[1]), "at least 3 by 3"),
        (lambda: autoregressive_poison(small()[0], small()[1][1:]), "y has shape"),
        (lambda: autoregressive_poison(*small(), epsilon=-1.0), "epsilon is -1"),
        (lambda: patch_poison(small()[0], small()[1][1:]), "y has shape"),
        (lambda: patch_poison(*small(), epsilon=-1.0), "epsilon is -1"),
        (lambda: patch_poison(*small(), cells=0), "cells is 0"),
        (lambda: error_minimising_poison(lambda z: z, *small()), "model is a function"),
        (lambda: error_minimising_poison(filled(), *small(), n_rounds=0), "n_rounds is 0"),
        (lambda: error_minimising_poison(filled(), *small(), lr=0.0), "lr is 0"),
        (lambda: error_minimising_poison(filled(), *small(), step_size=0.0), "step_size is 0"),
        (lambda: error_maximising_poison(filled(), *small(), epsilon=0.0), "epsilon is 0"),
        (lambda: error_maximising_poison(filled(), *small(), shift=3), "shift is 3"),
        (lambda: error_maximising_poison(filled(), *small(), n_steps=0), "n_steps is 0"),
        (lambda: error_maximising_poison(filled(), small()[0], small()[1] + 1), "y holds labels"),
        (lambda: error_minimising_poison(filled(), small()[0], small()[1] + 1), "y holds labels"),
        (lambda: error_minimising_poison(filled(), *small(), n_steps=0), "n_steps is 0"),
        (lambda: error_maximising_poison(lambda z: z.flatten(1).sum(1), *small()), "the model answered shape"),
        (lambda: error_minimising_poison(filled(), 255 * small()[0], small()[1]), "clip the inputs"),
        (lambda: jpeg(torch.zeros(1, 1, 65_497, 1)), "the height of images is 65497"),
        (lambda: jpeg(torch.zeros(1, 1, 1, 70_000)), "the width of images is 70000"),
        (lambda: jpeg(torch.full((1, 1, 8, 8), torch.nan)), "images holds 64 NaN"),
        (lambda: evaluate_poisons(filled, *small(), *small(), {}, SAME), "poisons is empty"),
        (lambda: evaluate_poisons(filled, *small(), *small(), SAME, {}), "defences is empty"),
        (lambda: evaluate_poisons(filled, *small(), *small(), SAME, [reduce_bits]), "defences is a list"),
        (lambda: evaluate_poisons(None, *small(), *small(), SAME, SAME), "train is a NoneType"),
        (lambda: evaluate_poisons(filled, *small(), None, small()[1], SAME, SAME), "x_test is None"),
        (
            lambda: evaluate_poisons(filled, *small(), *small(), {"cut": lambda x, y: x[1:]}, SAME),
            "the answer of poison 'cut' has shape",
        ),
        (
            lambda: evaluate_poisons(
                lambda x, y: lambda z: z.flatten(1).sum(1), *small(), *small(), SAME, SAME
            ),
            "the model answered shape",
        ),
        (lambda: evaluate_poisons(filled, *small(), -small()[0], small()[1], SAME, SAME), "x_test has 3 channels"),
    ),
    stochastic=True,
)  # fmt: skip


# -- squeezing ------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), quality=st.integers(1, 100))
def test_stacks_come_through_the_codec_as_single_images_do(seed, quality):
    for channels, subsampling in ((1, "4:2:0"), (3, "4:4:4"), (3, "4:2:0")):
        x = images(3, channels, 13, 21, seed)
        assert torch.equal(jpeg(x, quality, subsampling=subsampling), by_pillow(x, quality, subsampling))


def test_more_rows_than_fit_into_one_file():
    x = images(20, 1, 8, 8).repeat(500, 1, 1, 1)  # 80,000 pixel rows
    assert torch.equal(jpeg(x, 30), by_pillow(x[:20], 30, "4:4:4").repeat(500, 1, 1, 1))


@pytest.mark.parametrize(("channels", "subsampling"), [(1, "4:4:4"), (3, "4:4:4"), (3, "4:2:0")])
@pytest.mark.parametrize("size", [(32, 32), (19, 26)])
def test_the_form_in_torch_is_the_codec(channels, subsampling, size):
    for quality in (5, 10, 25, 50, 75, 90, 100):
        x = images(8, channels, *size, seed=quality)
        error = 255 * (
            jpeg(x, quality, subsampling=subsampling, differentiable=True)
            - by_pillow(x, quality, subsampling)
        )
        # The codec computes in integers, so that what is nearly half a step may be rounded the other way.
        assert float(error.abs().mean()) < (0.8 if subsampling == "4:4:4" else 1.2), quality


def test_quality_100_is_nearly_the_identity_and_10_is_not():
    x = images(height=32, width=32)
    assert float((255 * (jpeg(x, 100, subsampling="4:4:4") - x)).abs().mean()) < 0.7
    assert float((255 * (jpeg(x, 10) - x)).abs().mean()) > 3


def test_the_gradient_of_a_block_is_that_of_its_coefficients():
    """With 8-bit roundings passed, d<w, out>/dx = C' [ 3 (c/q - round(c/q))^2 * (C w C') ] C."""
    from scipy.fft import dctn, idctn

    x = images(1, 1, 8, 8, seed=5).requires_grad_()
    w = randn((8, 8), generator=stream(3), dtype=F64)
    quality = 30
    out = jpeg(x, quality, differentiable=True)
    assert bool(((out > 0) & (out < 1)).all())
    (found,) = torch.autograd.grad((w * out).sum(), x)
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG", quality=quality)
    table = np.reshape(Image.open(buffer).quantization[0], (8, 8))
    scaled = dctn(255 * x.detach().numpy()[0, 0] - 128, norm="ortho") / table
    slope = 3 * (scaled - np.round(scaled)) ** 2
    wanted = idctn(slope * dctn(w.numpy(), norm="ortho"), norm="ortho")
    torch.testing.assert_close(found[0, 0], torch.from_numpy(wanted), rtol=1e-6, atol=1e-9)


def test_an_optimiser_finds_what_survives_the_codec():
    """Descent through the form in torch moves what the codec answers; ignoring the codec does not."""
    x = images(2, 3, 16, 16, seed=7)
    goal = jpeg(images(2, 3, 16, 16, seed=8), 20)
    z = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (jpeg(z.clamp(0, 1), 20, differentiable=True) - goal).square().mean().backward()
        optimizer.step()
    reached = (jpeg(z.detach().clamp(0, 1), 20) - goal).square().mean()
    assert float(reached) < 0.1 * float((jpeg(x, 20) - goal).square().mean())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_grey_levels_are_a_projection_that_keeps_luminance_alone(seed):
    x = images(seed=seed)
    grey = grayscale(x)
    torch.testing.assert_close(grayscale(grey), grey, rtol=0, atol=1e-12)
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=F64)
    torch.testing.assert_close(grey[:, 1], torch.einsum("c,nchw->nhw", luma, x))
    inside = 0.2 + 0.6 * x
    noise = 0.1 * uniform(x.shape, -1, 1, generator=stream(seed), like=x)
    colour = (
        noise
        - torch.einsum("c,nchw->nhw", luma, noise)[:, None] * luma.reshape(3, 1, 1) / luma.square().sum()
    )
    torch.testing.assert_close(grayscale(inside + colour), grayscale(inside), rtol=0, atol=1e-12)
    assert torch.equal(grayscale(x[:, :1]), x[:, :1])


def test_bits():
    x = images()
    torch.testing.assert_close(reduce_bits(x, 8), x, rtol=0, atol=1e-12)
    for bits in (1, 2, 3):
        found = reduce_bits(x, bits)
        levels = torch.linspace(0, 1, 2**bits, dtype=F64)
        nearest = levels[(x[..., None] - levels).abs().argmin(-1)]
        torch.testing.assert_close(found, nearest)
    leaf = x.clone().requires_grad_()
    out = reduce_bits(leaf, 2, differentiable=True)
    torch.testing.assert_close(out.detach(), reduce_bits(x, 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), leaf)[0], torch.ones_like(x))


def test_squeezing_is_its_parts_in_order():
    x = images(height=24, width=32)
    assert torch.equal(ImageShortcutSqueezing(False, None)(x), x)
    assert torch.equal(ImageShortcutSqueezing(False, 10)(x), jpeg(x, 10))
    assert torch.equal(ImageShortcutSqueezing(False, 40, 3)(x), jpeg(reduce_bits(x, 3), 40))
    torch.testing.assert_close(ImageShortcutSqueezing(True, None)(x), grayscale(x))
    # Grey levels go through the codec as one channel, to the pixels of a grey picture in colour.
    grey = (255 * grayscale(x)).round() / 255
    assert torch.equal(ImageShortcutSqueezing(True, 10)(grey), by_pillow(grey, 10, "4:2:0"))
    one = ImageShortcutSqueezing(True, 10, differentiable=True)(x) - ImageShortcutSqueezing(True, 10)(x)
    assert float(one.abs().mean()) < 0.5 / 255


def test_squeezing_takes_out_what_it_is_for():
    """Colour waves of no luminance go with the colours, a chequerboard with JPEG, each only there."""
    grey = torch.full((1, 3, 32, 32), 0.5, dtype=F64)
    sign = (torch.arange(32)[:, None] // 8 + torch.arange(32) // 8) % 2 * 2.0 - 1
    colour = 8 / 255 * sign * torch.tensor([0.587, -0.299, 0.0], dtype=F64).reshape(3, 1, 1) / 0.587
    fine = 4 / 255 * ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1)

    def left(delta, **options):
        squeeze = ImageShortcutSqueezing(**options)
        return float((squeeze(grey + delta) - squeeze(grey)).abs().max())

    assert left(colour, jpeg_quality=None) < 1e-12
    assert left(colour, grayscale=False, jpeg_quality=50) > 4 / 255
    assert left(fine, grayscale=False) == 0 < left(fine, jpeg_quality=None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_go_through_the_form_in_torch(dtype):
    x = images(dtype=F64).to(dtype)
    found = jpeg(x, 50, differentiable=True)
    assert found.dtype == dtype
    assert float((found.double() - jpeg(x.double(), 50)).abs().mean()) < 2 / 255


def test_answers_may_be_written_to():
    x = images()
    for squeeze in (grayscale, ImageShortcutSqueezing(), ImageShortcutSqueezing(False, None)):
        before, out = x.clone(), squeeze(x)
        wanted = 0.5 * out
        assert torch.equal(out.mul_(0.5), wanted)
        assert torch.equal(x, before)


# -- poisons --------------------------------------------------------------------------------------------------


def test_patches_are_one_pattern_a_class_within_the_ball():
    x = uniform((40, 3, 12, 12), 0.3, 0.7, generator=stream(4), dtype=F64)
    y = torch.arange(40) % 4
    delta = patch_poison(x, y, 0.1, cells=3, generator=7) - x
    torch.testing.assert_close(delta.abs(), torch.full_like(delta, 0.1))
    for label in range(4):
        rows = delta[y == label]
        torch.testing.assert_close(rows, rows[:1].expand_as(rows))
        blocks = rows[0].unfold(1, 4, 4).unfold(2, 4, 4)
        torch.testing.assert_close(blocks, blocks[..., :1, :1].expand_as(blocks))
    assert len({tuple(delta[k].sign().flatten().tolist()) for k in range(4)}) == 4
    dark = patch_poison(torch.zeros_like(x), y, 0.1, generator=7)
    assert float(dark.min()) == 0
    assert float(dark.max()) == pytest.approx(0.1)


def test_poisoning_a_linear_network_reaches_the_corner():
    """For a linear model of two classes the best perturbation is -epsilon times the sign of the gradient."""
    w = randn((192, 2), generator=stream(5), dtype=F64)
    x = uniform((6, 3, 8, 8), 0.3, 0.7, generator=stream(6), dtype=F64)
    y = torch.arange(6) % 2
    found = error_maximising_poison(lambda z: z.flatten(1) @ w, x, y, 0.05, n_steps=10)
    away = (w[:, 1] - w[:, 0]).sign().reshape(1, 3, 8, 8) * (1 - 2 * y).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(found, x + 0.05 * away)


def test_error_maximising_goes_to_the_shifted_label_and_minimising_to_the_own():
    net = filled().eval()
    x, y = small(30)
    loss = lambda z, target: functional.cross_entropy(net(z), target, reduction="none")
    for shift in (1, 2):
        found = error_maximising_poison(net, x, y, 0.05, shift=shift)
        target = (y + shift) % 3
        assert float((found - x).abs().max()) <= 0.05 + 1e-12
        assert bool((loss(found, target) < loss(x, target)).all())


def test_error_minimising_takes_turns():
    """Two rounds on a linear model, by hand: momentum steps on all rows, then steps down the sign of the gradient."""
    x, y = uniform((9, 4), 0.3, 0.7, generator=stream(12), dtype=F64), torch.arange(9) % 3
    net = torch.nn.utils.skip_init(nn.Linear, 4, 3, bias=False, dtype=F64)
    net.weight.data = randn((3, 4), generator=stream(13), dtype=F64)
    start = net.weight.detach().clone()
    w, velocity, delta = start, torch.zeros(3, 4, dtype=F64), torch.zeros_like(x)
    wrong = lambda: torch.softmax((x + delta) @ w.T, 1) - functional.one_hot(y, 3)
    for _ in range(2):
        for _ in range(3):
            velocity = 0.9 * velocity + wrong().T @ (x + delta) / 9
            w = w - 0.5 * velocity
        for _ in range(2):
            delta = (delta - 0.02 * (wrong() @ w).sign()).clamp(-0.03, 0.03)
    found = error_minimising_poison(
        net, x, y, 0.03, n_rounds=2, weight_steps=3, lr=0.5, batch_size=9, n_steps=2, step_size=0.02
    )
    torch.testing.assert_close(found, x + delta)
    assert torch.equal(net.weight, start), "a copy is trained"


def test_error_minimising_poison_leaves_nothing_to_learn():
    """After training on poisoned images the loss on them is far below that of training on random signs of that size."""
    x, y = uniform((60, 3, 8, 8), generator=stream(8), dtype=F64), torch.arange(60) % 3
    poisoned = error_minimising_poison(filled(), x, y, 0.1, n_rounds=6, generator=0)
    signs = (x + 0.1 * rademacher(x.shape, generator=stream(9)).to(x)).clamp(0, 1)
    assert float((poisoned - x).abs().max()) == pytest.approx(0.1)
    assert float(poisoned.min()) >= 0
    assert float(poisoned.max()) <= 1
    found = {}
    for name, data in (("poisoned", poisoned), ("signs", signs)):
        net = filled(3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        for _ in range(60):
            optimizer.zero_grad()
            functional.cross_entropy(net(data), y).backward()
            optimizer.step()
        found[name] = float(functional.cross_entropy(net(data), y).detach())
    assert found["poisoned"] < 0.5 * found["signs"]


@pytest.mark.parametrize("squeeze_test", [True, False], ids=["both", "training"])
def test_the_table_trains_on_treated_poisons_and_tests_on_clean_images(squeeze_test):
    x, y = small()
    test, test_y = small(9, seed=11)
    seen, asked = [], []

    def train(data, labels):
        seen.append((data, labels))

        def model(z):
            asked.append(z)
            # Right where the digit of the row's number is below two.
            return functional.one_hot(torch.where(test_y < len(seen), test_y, (test_y + 1) % 3), 3).to(z)

        return Oracle(model, chunk_size=9)

    poisons = {"clean": lambda x, y: x, "dark": lambda x, y: 0.5 * x}
    defences = {"none": lambda x: x, "bits": reduce_bits}
    table = evaluate_poisons(train, x, y, test, test_y, poisons, defences, squeeze_test=squeeze_test)
    for (data, labels), wanted in zip(seen, (x, reduce_bits(x), 0.5 * x, reduce_bits(0.5 * x)), strict=True):
        assert torch.equal(data, wanted)
        assert torch.equal(labels, y)
    assert torch.equal(asked[3], reduce_bits(test) if squeeze_test else test)
    torch.testing.assert_close(table.accuracy, torch.tensor([[1 / 3, 2 / 3], [1.0, 1.0]], dtype=F64))
    assert table.to_frame().loc["clean", "bits"] == pytest.approx(2 / 3)


def test_autoregressive_noise_obeys_one_rule_a_class_and_has_its_length():
    y = torch.tensor([0, 1, 0, 1])
    grey = torch.full((4, 2, 9, 7), 0.5, dtype=torch.float64)
    delta = autoregressive_poison(grey, y, 0.8, generator=3) - grey
    torch.testing.assert_close(delta.flatten(1).norm(dim=1), torch.full((4,), 0.8, dtype=torch.float64))
    assert not torch.equal(delta[0], delta[2])

    def rule(image, channel):
        """Solve for the coefficients from every window of the image."""
        windows = delta[image, channel].unfold(0, 3, 1).unfold(1, 3, 1).reshape(-1, 9)
        found = torch.linalg.lstsq(windows[:, :8], windows[:, 8:])
        return found.solution[:, 0]

    for channel in (0, 1):
        b = rule(0, channel)
        torch.testing.assert_close(b.sum().item(), 1.0, rtol=0, atol=1e-6)
        assert (b > -1e-6).all()
        torch.testing.assert_close(b, rule(2, channel), rtol=0, atol=1e-5)
        assert (b - rule(1, channel)).abs().max() > 1e-2
    assert (rule(0, 0) - rule(0, 1)).abs().max() > 1e-2
    white = autoregressive_poison(torch.ones(2, 1, 5, 5), torch.tensor([0, 0]), generator=0)
    assert white.max() <= 1
