"""Randomized smoothing: a radius proved for the vote of a classifier under Gaussian noise.

Use it for any classifier, however deep, where a certificate of the smoothed model and in the Euclidean norm will do.
Cohen, Rosenfeld and Kolter (2019), Certified Adversarial Robustness via Randomized Smoothing, arXiv:1902.02918.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from scipy.stats import norm as normal
from torch import Tensor, nn

from perturbkit.core import Certificate, Oracle, checks, clopper_pearson, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randn

__all__ = ["SmoothedCertificate", "randomized_smoothing"]

_BLOCK = 2**22  # values of noise at once


@dataclass(frozen=True, eq=False)
class SmoothedCertificate(Certificate):
    """A certificate of the smoothed classifier.

    Attributes
    ----------
    prediction : Tensor of int64, shape (n,)
        The class voted for; -1 where the vote was too close, then ``radius`` is zero.
    share : Tensor, shape (n,)
        Lower confidence bound of the winner's share of the votes.
    """

    prediction: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    share: Tensor = field(default_factory=lambda: torch.empty(0))


def randomized_smoothing(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    sigma: float,
    n_selection: int = 100,
    n_samples: int = 10_000,
    alpha: float = 0.001,
    generator: Seed = None,
    progress: ProgressLike = False,
) -> SmoothedCertificate:
    """Predict by the vote under Gaussian noise, and certify the radius within which it stands.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Classifier of a batch (n, ...), answering scores (n, classes).
    x : Tensor, shape (n, ...)
        Inputs, floating point. The noise is not clipped to a range: the certificate needs it whole.
    sigma : float
        Standard deviation of the noise, in input units, above 0.
    n_selection, n_samples : int
        Draws that choose the class, and draws that bound its share; at least 1.
    alpha : float
        Chance that the certificate of a row is wrong, in (0, 1).
    generator : torch.Generator, int or None
        Source of the noise.
    progress : Progress, bool or None
        Reports rows.

    Returns
    -------
    SmoothedCertificate
        ``radius`` in the Euclidean norm, zero where the model abstains; of the smoothed model, each row with
        confidence ``1 - alpha``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an input or option is not allowed.

    Notes
    -----
    ``R = sigma Phi^{-1}(p)`` with ``p`` the one-sided Clopper-Pearson bound of the share of draws that give the
    class chosen on separate draws, where ``p > 1/2``.

    Cost: ``n_selection + n_samples`` evaluations a row.

    References
    ----------
    Cohen, Rosenfeld and Kolter (2019), arXiv:1902.02918, algorithm "Certify".

    Examples
    --------
    >>> w = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    >>> found = randomized_smoothing(lambda z: z @ w, torch.tensor([[0.5, 0.0]]), sigma=0.25, generator=0)
    >>> int(found.prediction[0]), 0.4 < float(found.radius[0]) < 0.5
    (0, True)
    """
    checks.tensor("x", x)
    checks.positive("sigma", sigma)
    checks.integer("n_selection", n_selection, low=1)
    checks.integer("n_samples", n_samples, low=1)
    checks.between("alpha", alpha, 0, 1, inclusive="neither")
    g = as_generator(generator)
    oracle = Oracle.wrap(model)
    before = oracle.cost
    predictions, shares, radii = [], [], []
    with oracle.frozen():
        for row in track(x, "randomized smoothing", total=len(x), progress=progress):
            winner = int(_votes(oracle, row, sigma, n_selection, g).argmax())
            hits = int(_votes(oracle, row, sigma, n_samples, g)[winner])
            share = float(clopper_pearson(hits, n_samples, 1 - alpha, side="lower").low)
            sure = share > 0.5
            predictions.append(winner if sure else -1)
            shares.append(share)
            radii.append(sigma * float(normal.ppf(share)) if sure else 0.0)
    return SmoothedCertificate(
        radius=x.new_tensor(radii), norm="l2", function=f"the model smoothed by Gaussian noise, sigma {sigma:g}",
        confidence=1 - alpha, cost=oracle.cost - before,
        prediction=torch.tensor(predictions, device=x.device), share=x.new_tensor(shares),
    )  # fmt: skip


def _votes(oracle: Oracle, row: Tensor, sigma: float, n: int, generator: torch.Generator) -> Tensor:
    """Return how often each class is answered to ``n`` noisy copies of one input."""
    total: Tensor | int = 0
    # Blocks of a size of their own: the draws must not depend on how the oracle cuts its batches.
    block = max(1, _BLOCK // row.numel())
    for start in range(0, n, block):
        shape = (min(block, n - start), *row.shape)
        scores = oracle(row + sigma * randn(shape, generator=generator, like=row))
        if scores.ndim != 2 or scores.shape[1] < 2:
            raise checks.ModelError(
                f"the model answered shape {tuple(scores.shape)}; allowed: (n, classes) with at least two classes. "
                "For one logit z, return torch.stack([0 * z, z], 1)."
            )
        total = total + torch.bincount(scores.argmax(1), minlength=scores.shape[1])
    return torch.as_tensor(total)
