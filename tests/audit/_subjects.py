"""Small models and data for the tests of the audit, all with known behaviour."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from perturbkit.audit.subject import Subject
from perturbkit.core import Oracle


def table(n=60, seed=0):
    """Two Gaussian blobs in four columns, the first two of which matter."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = torch.randn(n, 4, generator=g)
    x[:, :2] += 3.0 * (2 * y[:, None] - 1)
    return x, y


def linear():
    """A linear classifier that is right on nearly all of ``table``."""
    with torch.random.fork_rng():
        net = nn.Sequential(nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[-1.0, -1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]))
        net[0].bias.zero_()
    return net


def image_model():
    """Answers which half of a picture is brighter, with a small convolution."""

    class Halves(nn.Module):
        def forward(self, x):
            left, right = (
                x[..., : x.shape[-1] // 2].mean((1, 2, 3)),
                x[..., x.shape[-1] // 2 :].mean((1, 2, 3)),
            )
            return 20 * torch.stack([left - right, right - left], 1)

    return Halves()


def images(n=40, seed=0):
    """Noise with one bright half."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = 0.3 + 0.2 * torch.rand(n, 3, 16, 16, generator=g)
    for i, label in enumerate(y.tolist()):
        x[i, :, :, 8 * label : 8 * label + 8] += 0.3
    return x, y


def calibrated(n=600, seed=0):
    """Predictions whose confidence is exactly right."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(4, 0.7), size=n)
    y = np.array([rng.choice(4, p=row) for row in p])
    return p, y


def subject(**changes):
    x, y = table()
    fields = {
        "name": "linear", "data_name": "blobs", "task": "tabular", "y": y, "classes": ("no", "yes"),
        "oracle": Oracle(linear()), "x": x, "feature_names": ("a", "b", "c", "d"),
    }  # fmt: skip
    return Subject(**{**fields, **changes})
