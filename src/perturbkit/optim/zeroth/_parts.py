"""What the optimizers of the room share: two evaluations along a seeded direction, and rates by parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its own options if it has some."""
        for name, value in {**self.defaults, **param_group}.items():
            if name in self.defaults:
                checks.nonnegative(name, value)
        super().add_param_group(param_group)

    @property
    def weights(self) -> list[Tensor]:
        """The parameters that are trained, in order."""
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def per_weight(self, option: str) -> list[float]:
        """Return a group option, once for each of :attr:`weights`."""
        return [
            float(group[option]) for group in self.param_groups for p in group["params"] if p.requires_grad
        ]

    def replay(self, closure: Closure | None) -> Replay:
        """Return the closure as one that sees the same batch and masks each time, and records no graph."""
        return Replay(closure, self.weights, self._model, gradients=False)

    def advance(self, counter: str = "step") -> int:
        """Return a counter of the state, from 0, and count on."""
        now = int(self.state.get(counter, 0))  # type: ignore[call-overload]
        self.state[counter] = now + 1  # type: ignore[index]
        return now
