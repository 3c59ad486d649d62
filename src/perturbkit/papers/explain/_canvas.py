"""Digits at random places of a larger canvas, and classifiers of them: where explanations have a right answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perturbkit.core.random import as_generator, randint, seeded_init, seeds, uniform


@dataclass(frozen=True)
class Canvas:
    """Images with a digit each.

    Attributes
    ----------
    x : Tensor, shape (n, 1, 16, 16)
        Images in [0, 1].
    y : Tensor, shape (n,)
        The digits.
    inside : Tensor of bool, shape (n, 16, 16)
        The 8x8 box of the digit.
    ink : Tensor of bool, shape (n, 16, 16)
        Where the digit has ink.
    """

    x: Tensor
    y: Tensor
    inside: Tensor
    ink: Tensor


def draw_canvas(
    digits: Tensor, labels: Tensor, n: int, generator: torch.Generator, *, clutter: int = 3
) -> Canvas:
    """Paste random digits of 8x8 pixels on canvases of 16x16, with 4x4 pieces of other digits beside them.

    Pieces that would fall on the digit's box are cut off, so all of the class is in the box.
    """
    chosen = randint(0, len(digits), (n,), generator=generator)
    place = randint(0, 9, (n, 2), generator=generator)
    x = torch.zeros(n, 1, 16, 16)
    rows = torch.arange(n)
    grid = torch.arange(8)
    for _ in range(clutter):
        piece = digits[randint(0, len(digits), (n,), generator=generator)]
        where = randint(0, 13, (n, 2), generator=generator)
        small = torch.arange(4)
        at = where[:, 0, None, None] + small[None, :, None], where[:, 1, None, None] + small[None, None, :]
        x[rows[:, None, None], 0, at[0], at[1]] = piece[:, 0, 2:6, 2:6]
    at = place[:, 0, None, None] + grid[None, :, None], place[:, 1, None, None] + grid[None, None, :]
    x[rows[:, None, None], 0, at[0], at[1]] = digits[chosen, 0]
    inside = torch.zeros(n, 16, 16, dtype=torch.bool)
    inside[rows[:, None, None], at[0], at[1]] = True
    ink = torch.zeros(n, 16, 16, dtype=torch.bool)
    ink[rows[:, None, None], at[0], at[1]] = digits[chosen, 0] > 0.2
    return Canvas(x, labels[chosen], inside, ink)


def canvas_classifier(
    digits: Tensor, labels: Tensor, seed: int, *, steps: int = 500, pooled: bool = False, clutter: int = 3
) -> nn.Sequential:
    """Train a small convolutional classifier of canvases; ``pooled`` ends in a global average instead of a flat layer."""
    g = as_generator(seed)
    with seeded_init(seeds(g, 1)[0]):
        body = [
            nn.Conv2d(1, 24, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        ]  # fmt: skip
        if pooled:
            head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
        else:
            head = [nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)]
        model = nn.Sequential(*body, *head)

    def loss() -> Tensor:
        batch = draw_canvas(digits, labels, 128, g, clutter=clutter)
        brightness = uniform((128, 1, 1, 1), 0.7, 1.0, generator=g)
        return nn.functional.cross_entropy(model(brightness * batch.x), batch.y)

    return one_cycle(model, loss, steps, 3e-3)


def normalised_network(seed: int, pool: nn.Module) -> nn.Sequential:
    """Return a network of three convolutions with batch normalisation, whose positions a pooling layer sums up."""
    with seeded_init(seed):
        return nn.Sequential(
            nn.Conv2d(1, 24, 5, stride=2, padding=2), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(),
            nn.Conv2d(48, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            pool, nn.Flatten(), nn.Linear(64, 10),
        )  # fmt: skip


def one_cycle(model: nn.Sequential, loss: Callable[[], Tensor], steps: int, lr: float) -> nn.Sequential:
    """Train on fresh draws of a loss with one cycle of the rate, and return the network frozen."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
        schedule.step()
    return model.eval().requires_grad_(False)
