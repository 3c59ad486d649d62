"""Oracles of the corruptions: closed forms, invariants, and Pillow for the compression."""

import io
import itertools

import numpy as np
import pytest
import torch

from _common import Example
from perturbkit.core.random import randn, uniform
from perturbkit.data import load_digits28, load_photographs
from perturbkit.robust import IMAGE_CORRUPTIONS, TABLE_CORRUPTIONS, corrupt


def images(n=3, side=12, channels=1, dtype=torch.float64, seed=0):
    return uniform((n, channels, side, side + 2), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def table(n=200, d=3, dtype=torch.float64):
    return 3 * randn((n, d), generator=torch.Generator().manual_seed(0), dtype=dtype) + 5


EXAMPLE = Example(
    call=lambda generator, dtype: {
        **{k: corrupt(images(dtype=dtype), k, 3, generator=generator) for k in IMAGE_CORRUPTIONS},
        **{"table " + k: corrupt(table(dtype=dtype), k, 3, generator=generator) for k in TABLE_CORRUPTIONS},
    },
    refusals=(
        (lambda: corrupt(images(), "fog", 1), "kind is 'fog'"),
        (lambda: corrupt(table(), "blur", 1), "kind is 'blur'"),
        (lambda: corrupt(images(), "noise", 0), "severity is 0"),
        (lambda: corrupt(images(), "noise", 6), "severity is 6"),
        (lambda: corrupt(255 * images(), "noise", 1), "images in"),
        (lambda: corrupt(images()[0], "noise", 1), "2 or 4 dimensions"),
        (lambda: corrupt(table(), "noise", 1, scale=torch.ones(4)), "scale has shape"),
        (lambda: corrupt(table(), "noise", 1, scale=-1.0), "scale has shape"),
    ),
    stochastic=True,
)


@pytest.mark.parametrize("kind", IMAGE_CORRUPTIONS)
@pytest.mark.parametrize("source", ["8 pixels", "28 pixels", "photographs"])
def test_images_stay_images_and_severities_rise(kind, source):
    x = {
        "8 pixels": lambda: torch.nn.functional.interpolate(load_digits28("test").x[:20], 8, mode="area"),
        "28 pixels": lambda: load_digits28("test").x[:20],
        "photographs": lambda: load_photographs().x[:2],
    }[source]()
    change = []
    for severity in range(1, 6):
        damaged = corrupt(x, kind, severity, generator=1)
        assert damaged.shape == x.shape
        assert damaged.dtype == x.dtype
        assert float(damaged.min()) >= 0
        assert float(damaged.max()) <= 1
        change.append(float((damaged - x).square().mean().sqrt()))
    assert change[0] > 1e-4
    # The three last reductions of 8 pixels leave 2 each.
    assert all(b >= a for a, b in itertools.pairwise(change)), change
    assert change[4] > 1.5 * change[0]


@pytest.mark.parametrize("kind", ["blur", "pixelate", "compression", "contrast"])
def test_a_flat_image_is_left_flat(kind):
    flat = torch.full((1, 3, 16, 16), 128 / 255, dtype=torch.float64)
    torch.testing.assert_close(corrupt(flat, kind, 5), flat, atol=1e-12, rtol=0)


def test_contrast_brightness_and_noise_follow_their_equations():
    x = 0.4 + 0.05 * images()
    mean = x.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(corrupt(x, "contrast", 2), mean + 0.6 * (x - mean))
    torch.testing.assert_close(corrupt(x, "brightness", 3), x + 0.24)
    grey = torch.full((4, 1, 50, 50), 0.5, dtype=torch.float64)
    noise = corrupt(grey, "noise", 2, generator=0) - grey
    assert float(noise.std()) == pytest.approx(0.08, rel=0.05)
    assert torch.equal(corrupt(grey, "noise", 2, generator=0), corrupt(grey, "noise", 2, generator=0))


def test_blur_is_the_gaussian_of_scipy():
    from scipy.ndimage import gaussian_filter

    x = images(1, 40)
    found = corrupt(x, "blur", 4)[0, 0]  # sigma 1.2, taps up to 4
    expected = gaussian_filter(x[0, 0].numpy(), 1.2, mode="mirror", radius=4)
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("severity", "quality"), [(1, 60), (3, 25), (5, 8)])
def test_compression_is_that_of_a_jpeg_codec(severity, quality):
    image = pytest.importorskip("PIL.Image", reason="Pillow is an extra of the tests")
    x = load_photographs().x[:1].mean(1, keepdim=True)
    grey = np.rint(255 * x[0, 0].numpy()).astype(np.uint8)
    stream = io.BytesIO()
    image.fromarray(grey).save(stream, "JPEG", quality=quality)
    decoded = np.asarray(image.open(stream), float)
    ours = 255 * corrupt(torch.from_numpy(grey / 255.0)[None, None], "compression", severity)[0, 0].numpy()
    assert np.abs(ours - np.rint(ours)).max() < 1e-9
    assert np.abs(ours - decoded).mean() < 0.4
    assert np.abs(grey - decoded).mean() > 1.0


def test_pixels_are_constant_over_blocks():
    x = images(1, 28)[..., :28]
    damaged = corrupt(x, "pixelate", 4)[0, 0]
    assert len(damaged.unique()) == 7 * 7
    torch.testing.assert_close(damaged.mean(), x.mean())


def test_table_kinds_follow_their_equations():
    x = table()
    unit = x.std(0, correction=0)
    missing = corrupt(x, "missing", 4, generator=0)
    replaced = missing != x
    torch.testing.assert_close(missing[replaced], x.mean(0).expand_as(x)[replaced])
    assert float(replaced.double().mean()) == pytest.approx(0.2, abs=0.04)
    noise = (corrupt(x, "noise", 3, generator=0) - x) / unit
    assert float(noise.std()) == pytest.approx(0.3, rel=0.1)
    step = 0.4 * unit
    torch.testing.assert_close(corrupt(x, "rounded", 2), (x / step).round() * step)
    ratio = corrupt(x, "rescaled", 2, generator=0) / x
    torch.testing.assert_close((ratio - 1).abs(), torch.full_like(x, 0.1))
    assert bool((ratio == ratio[0]).all(0).all() or (ratio - ratio[0]).abs().max() < 1e-12)
    shift = (corrupt(x, "shifted", 5, generator=0) - x) / unit
    torch.testing.assert_close(shift.abs(), torch.full_like(x, 0.5))


def test_scale_replaces_the_columns_own():
    x = table()
    given = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    shift = corrupt(x, "shifted", 1, scale=given, generator=0) - x
    torch.testing.assert_close(shift[0].abs(), 0.1 * given, atol=1e-12, rtol=0)
    assert torch.equal(corrupt(x, "rounded", 5, scale=given)[:, 1], x[:, 1])
    one = corrupt(x, "shifted", 1, scale=2.0, generator=0) - x
    torch.testing.assert_close(one[0].abs(), torch.full((3,), 0.2, dtype=torch.float64))


def test_a_constant_column_is_not_divided_by_zero():
    x = table()
    x[:, 1] = 7.0
    for kind in TABLE_CORRUPTIONS:
        assert bool(corrupt(x, kind, 5, generator=0).isfinite().all())
    assert torch.equal(corrupt(x, "rounded", 5)[:, 1], x[:, 1])
