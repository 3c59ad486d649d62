"""Digits as rows of pixels, split for training and testing, and how well a network does on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perturbkit.papers import Run

__all__ = ["Digits", "accuracy", "load"]


class Digits(NamedTuple):
    """Training and test images, shape (n, 64), and their labels."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(run: Run) -> Digits:
    """Return the small digits, four fifths for training."""
    from perturbkit.data import load_digits8

    train, test = load_digits8().split(run.generator("split"), (0.8, 0.2))
    return Digits(train.x.flatten(1), train.y, test.x.flatten(1), test.y)


def accuracy(model: Callable[..., Any], data: Digits) -> float:
    """Return the share of test images that are classified rightly."""
    with torch.no_grad():
        return float((model(data.test_x).argmax(1) == data.test_y).double().mean())
