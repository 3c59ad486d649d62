"""What the optimizers of the room share: two evaluations along a seeded direction, and rates by parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from perturbkit.core import checks
from perturbkit.core.optimizers import BaseOptimizer, Closure, Replay, loss_value
from perturbkit.core.parameters import Restorer

__all__ = ["SeededOptimizer", "slope", "two_sided"]


def two_sided(at: Restorer, closure: Replay, radius: float) -> tuple[float, float]:
    """Return the loss where the weights are moved to, ``w + radius z``, and at ``w - radius z``, where it leaves them."""
    plus = loss_value(closure())
    at.rescale(-radius)
    return plus, loss_value(closure())


def slope(plus: float, minus: float, radius: float) -> float:
    """Return the central difference of two losses, or say that one is not finite, before the weights are changed."""
    c = (plus - minus) / (2 * radius)
    if not math.isfinite(c):
        raise checks.ModelError(
            f"the losses at the two points are {plus:g} and {minus:g}; allowed: finite numbers. Lower lr, or look at the batch; "
            "the weights are as before the step."
        )
    return c


class SeededOptimizer(BaseOptimizer):
    """An optimizer whose directions are regenerated from seeds, over all parameters of all groups together."""

    def __init__(self, params: Any, defaults: Mapping[str, Any], model: Any = None) -> None:
        self._model = model
        super().__init__(params, defaults)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check a group's own options."""
        for name, value in group.items():
            if name in self.defaults:
                checks.nonnegative(name, value)

    def replay(self, closure: Closure | None) -> Replay:
        """Return the closure as one that sees the same batch and masks each time, and records no graph."""
        return Replay(closure, self.weights, self._model, gradients=False)
