"""How far a sample is from data: Fréchet distance on a fixed feature map, two-sample tests, energy and sliced distances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from perturbkit.core.random import randn

__all__ = ["digit_features", "energy_distance", "frechet_distance", "sliced_w2", "two_sample_accuracy"]


def frechet_distance(x: Tensor, y: Tensor, features: Callable[[Tensor], Tensor] | None = None) -> float:
    """Squared Wasserstein distance of the Gaussians with the moments of two samples, of features or of flat rows."""
    a, b = (_flat(v if features is None else features(v)) for v in (x, y))
    one, two = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    # tr (A^(1/2) B A^(1/2))^(1/2) by the eigenvalues of two symmetric matrices.
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ two @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + one.trace() + two.trace() - 2 * cross)


def digit_features(size: int = 28) -> Callable[[Tensor], Tensor]:
    """Return the last hidden layer of the bundled classifier of digits, of images in [0, 1]: the fixed feature map."""
    from perturbkit.data import digits_classifier

    layers = list(digits_classifier(size).module.children())
    body = nn.Sequential(*layers[:-1])

    def features(images: Tensor) -> Tensor:
        with torch.no_grad():
            return body(images.float().reshape(-1, 1, size, size).clamp(0, 1))

    return features


def two_sample_accuracy(x: Tensor, y: Tensor, seed: int) -> float:
    """Share of held-out rows that a classifier of "from x or from y" gets right, over five folds; 0.5: it cannot tell."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    n = min(len(x), len(y))
    rows = torch.cat([_flat(x)[:n], _flat(y)[:n]]).numpy()
    labels = np.repeat([0, 1], n)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    judge = HistGradientBoostingClassifier(max_iter=60, random_state=seed)
    return float(cross_val_score(judge, rows, labels, cv=folds).mean())


def sliced_w2(x: Tensor, y: Tensor, generator: torch.Generator, n_directions: int = 200) -> float:
    """Root of the mean squared Wasserstein distance of projections on random directions; samples of equal size."""
    a, b = _flat(x), _flat(y)
    directions = randn((a.shape[1], n_directions), generator=generator, like=a)
    directions = directions / directions.norm(dim=0)
    return float(((a @ directions).sort(0).values - (b @ directions).sort(0).values).square().mean().sqrt())


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Twice the mean distance between samples less those within, without the pairs of a row with itself."""
    a, b = _flat(x), _flat(y)
    within = sum(float(torch.pdist(v).mean()) for v in (a, b))
    return 2 * float(torch.cdist(a, b).mean()) - within


def _flat(x: Tensor) -> Tensor:
    return x.detach().double().flatten(1)
