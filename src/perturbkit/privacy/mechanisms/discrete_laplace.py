"""Discrete Laplace mechanism: counts under pure differential privacy, with noise that has no floating-point gaps.

Use it for counts and histograms when no failure probability delta is acceptable. Ghosh, Roughgarden and
Sundararajan (2009), Universally Utility-Maximizing Privacy Mechanisms, arXiv:0811.2841; sampler of Canonne, Kamath
and Steinke (2020), The Discrete Gaussian for Differential Privacy, arXiv:2004.00010.
"""

from __future__ import annotations

from typing import Any

from perturbkit.core import checks
from perturbkit.core.random import Seed
from perturbkit.privacy._noise import Noise, rational_above
from perturbkit.privacy.mechanisms._parts import NoisyCounts, whole_counts, with_noise
from perturbkit.privacy.mechanisms.privacy_budget import PrivacyBudget

__all__ = ["discrete_laplace"]


def discrete_laplace(
    counts: Any,
    *,
    epsilon: float,
    sensitivity: int,
    generator: Seed = None,
    budget: PrivacyBudget | None = None,
) -> NoisyCounts:
    r"""Release integers with discrete Laplace noise.

    Parameters
    ----------
    counts : int, ndarray or Tensor of integers
        What is released, any shape.
    epsilon : float
        Privacy loss of this release, above 0.
    sensitivity : int
        By how much one person changes ``counts`` at most, in the l1 norm (summed over entries), at least 1: 1 for a
        histogram when a person is added or removed, 2 when a person is replaced.
    generator : torch.Generator, int or None
        ``None``: the secure source of the operating system. A seeded generator is for tests: who knows the seed
        can subtract the noise.
    budget : PrivacyBudget, optional
        Charged before anything is drawn; refuses what it cannot pay.

    Returns
    -------
    NoisyCounts

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed, the counts are not integers, or the budget is spent.

    Notes
    -----
    :math:`P(y) = \tanh(1/2s)\, e^{-|y|/s}` on the integers, with ``s`` the smallest multiple of 1/1024 that is at
    least sensitivity/epsilon, so the stated epsilon holds exactly. Its variance is :math:`2 e^{1/s} / (e^{1/s}-1)^2`.
    Sampling uses integer arithmetic only; about 3 microseconds an entry. The time depends on the noise drawn.

    References
    ----------
    Ghosh, Roughgarden and Sundararajan (2009), arXiv:0811.2841. Canonne, Kamath and Steinke (2020), arXiv:2004.00010.

    Examples
    --------
    >>> found = discrete_laplace([120, 80], epsilon=1.0, sensitivity=1, generator=0)
    >>> found.scale, found.values.dtype.name
    (1.0, 'int64')
    """
    whole = whole_counts(counts)
    checks.positive("epsilon", epsilon)
    checks.integer("sensitivity", sensitivity, low=1)
    scale = rational_above(sensitivity / epsilon)
    source = Noise(generator)
    if budget is not None:
        budget.spend(epsilon=epsilon)
    noise = source.discrete_laplace(scale, whole.size)
    return NoisyCounts(with_noise(counts, whole, noise), float(scale), float(epsilon), epsilon**2 / 2)
