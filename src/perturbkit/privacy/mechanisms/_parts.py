"""What the two mechanisms for counts share: their result, and the reading of what they are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from perturbkit.core import Result, checks


@dataclass(frozen=True, eq=False)
class NoisyCounts(Result):
    """Counts with exact integer noise.

    Attributes
    ----------
    values : Tensor or ndarray of int64
        The noisy counts, in the shape given; a tensor for a tensor.
    scale : float
        Of the noise: exp(-abs(y)/scale), or the standard deviation parameter sigma; never below what was asked for.
    epsilon : float
        Pure differential privacy of the release; infinity if it has none.
    rho : float
        Zero-concentrated differential privacy of the release.
    """

    values: Any
    scale: float
    epsilon: float
    rho: float


def whole_counts(counts: Any) -> np.ndarray:
    """Return counts as int64, or refuse."""
    given = counts.detach().cpu().numpy() if isinstance(counts, torch.Tensor) else np.asarray(counts)
    if given.dtype.kind not in "iu" or given.size == 0:
        raise checks.ArgumentTypeError(
            f"counts has dtype {given.dtype} and {given.size} entries; allowed: at least one integer. Multiply by the "
            "resolution, round to integers, and give the sensitivity in these units."
        )
    return given.astype(np.int64)


def with_noise(counts: Any, whole: np.ndarray, noise: np.ndarray) -> Any:
    """Add the noise and return what was given: a tensor for a tensor."""
    noisy = whole + noise.reshape(whole.shape)
    return torch.as_tensor(noisy, device=counts.device) if isinstance(counts, torch.Tensor) else noisy
