"""Squeezing 512 images of 32x32 against the Adversarial Robustness Toolbox and kornia.

JPEG of quality 10 in grey, in colour at full and at half resolution of colour, 2 bits, and JPEG with gradients, forward and
backward. The floor is one copy of the images, there and back. Answers that should agree are asserted to: both codecs are
Pillow's; kornia's is an approximation of the codec, and the mean error of either form against Pillow is printed. Run it with
``python -m benchmarks.robust.image_shortcut_squeezing_vs_art``; it takes seconds. A peer that is not installed is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from benchmarks._timing import Call, Row, compare, table
from torch import Tensor

from perturbkit.core.random import uniform
from perturbkit.robust import jpeg, reduce_bits

QUALITY = 10


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    x = _pictures(512)
    grey = x[:, :1].contiguous()

    def full(z: Tensor) -> Tensor:
        return jpeg(z, QUALITY, subsampling="4:4:4")

    def half(z: Tensor) -> Tensor:
        return jpeg(z, QUALITY)

    jobs: list[tuple[str, Call, Call]] = []
    if find_spec("art"):
        preprocessor = import_module("art.defences.preprocessor")

        def art_jpeg(z: Tensor) -> Tensor:
            codec = preprocessor.JpegCompression(clip_values=(0, 1), quality=QUALITY, channels_first=True)
            return torch.from_numpy(codec(z.numpy())[0])

        def art_bits(z: Tensor) -> Tensor:
            return torch.from_numpy(
                preprocessor.FeatureSqueezing(clip_values=(0, 1), bit_depth=2)(z.numpy())[0]
            )

        jobs += [
            ("JPEG, grey, against ART", lambda: half(grey), lambda: art_jpeg(grey)),
            ("JPEG, colour 4:2:0, against ART", lambda: half(x), lambda: art_jpeg(x)),
            ("JPEG, colour 4:4:4, against ART (4:2:0)", lambda: full(x), lambda: art_jpeg(x)),
            ("2 bits, against ART", lambda: reduce_bits(x, 2), lambda: art_bits(x)),
        ]
        assert float((half(grey) - art_jpeg(grey)).abs().max()) < 1e-6
        assert float((half(x) - art_jpeg(x)).abs().max()) < 1e-6
        assert float((reduce_bits(x) - art_bits(x)).abs().max()) < 1e-6
    if find_spec("kornia"):
        codec = import_module("kornia.enhance").jpeg_codec_differentiable
        quality = torch.full((len(x),), float(QUALITY))

        def backward(coded: Callable[[Tensor], Tensor]) -> Tensor:
            leaf = x.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(coded(leaf).square().sum(), leaf)
            return gradient

        def ours(z: Tensor) -> Tensor:
            return jpeg(z, QUALITY, differentiable=True)

        def theirs(z: Tensor) -> Tensor:
            return codec(z, quality)

        for name, coded in (("ours", ours), ("kornia's", theirs)):
            print(
                f"mean error against Pillow, {name}: {255 * float((coded(x) - half(x)).abs().mean()):.2f} of 255"
            )
        jobs.append(
            (
                "JPEG 4:2:0 with gradient, against kornia",
                lambda: backward(ours),
                lambda: backward(theirs),
            )
        )
    if not jobs:
        raise ModuleNotFoundError("neither adversarial-robustness-toolbox nor kornia is installed")
    rows = []
    for name, run, peer in jobs:
        run(), peer()
        rows += compare(run, {name: peer}, lambda: torch.from_numpy(x.numpy().copy()), rounds)
    print(table(rows))
    return rows


def _pictures(n: int) -> Tensor:
    """Return smooth random pictures with some noise, in 8 bits."""
    g = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        uniform((n, 3, 5, 5), generator=g), size=(32, 32), mode="bilinear"
    )
    return (255 * (smooth + uniform(smooth.shape, -0.05, 0.05, generator=g)).clamp(0, 1)).round() / 255


if __name__ == "__main__":
    main()
