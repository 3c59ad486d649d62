"""ZO-AdaMU: zeroth-order descent along random directions that lean on where the loss rose before.

Use it to fine-tune a model by forward passes where plain zeroth-order descent oscillates: the momentum is in the
perturbation, not in the gradient. Jiang, Chen, Pan and others (2023), ZO-AdaMU Optimizer: Adapting Perturbation by the
Momentum and Uncertainty in Zeroth-order Optimization, arXiv:2312.15184.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.optimizers import Closure
from perturbkit.core.parameters import Block, blocks, moved, perturbed, seeded_directions
from perturbkit.core.random import mixed_seed
from perturbkit.optim.zeroth._parts import SeededOptimizer, slope, two_sided

__all__ = ["MeZO", "ZOAdaMU"]

_FLOOR = 0.1
"""Least share of fresh noise in the direction and in its variance."""


class MeZO(SeededOptimizer):
    """Zeroth-order descent along one fresh Gaussian direction a step, in the memory of a forward pass.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups.
    lr : float
        Learning rate, zero or above.
    radius : float
        Half the distance of the two evaluations over the length of the direction, above 0.
    weight_decay : float
        Decay of the weights, decoupled from the gradient; zero or above.
    seed : int
        Seed of the directions, zero or above.
    model : nn.Module, optional
        Where given, its buffers are moved by the first evaluation of a step only.

    Raises
    ------
    ArgumentError
        If an option is outside its range.
    ModelError
        In ``step``, if a loss is not finite; the weights are then as before.

    Notes
    -----
    ``w <- w - lr (c z + weight_decay w)`` with ``c = (loss(w + r z) - loss(w - r z)) / (2 r)`` and ``z`` regenerated from its
    seed.

    Cost: two evaluations a step; three draws of d numbers; no memory of the weights' size.

    References
    ----------
    Malladi et al. (2023), arXiv:2305.17333, algorithm 1.

    Examples
    --------
    >>> w = nn.Parameter(torch.tensor([3.0, -1.0]))
    >>> optimizer = MeZO([w], lr=0.05)
    >>> for _ in range(200):
    ...     loss = optimizer.step(lambda: w.square().sum())
    >>> bool(w.abs().max() < 0.01)
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        radius: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        model: nn.Module | None = None,
    ) -> None:
        self._radius = checks.positive("radius", radius)
        self._seed = checks.integer("seed", seed, low=0)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, model)

    @torch.no_grad()
    def step(self, closure: Closure) -> float:  # type: ignore[override]
        """Take one step and return the mean of its two losses.

        Parameters
        ----------
        closure : callable
            ``closure() -> loss``; no backward pass is needed.
        """
        weights, again = self.weights, self.replay(closure)
        options = zip(self.per_weight("lr"), self.per_weight("weight_decay"), strict=True)
        with perturbed(weights, mixed_seed(self._seed, self.advance(), 0), self._radius) as at:
            plus, minus = two_sided(at, again, self._radius)
            c = slope(plus, minus, self._radius)
            rates, keep = zip(*((-lr * c, 1 - lr * decay) for lr, decay in options), strict=True)
            at.settle(rates, keep)
        return (plus + minus) / 2


class ZOAdaMU(SeededOptimizer):
    r"""Zeroth-order descent whose perturbation has momentum and an annealed uncertainty.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups.
    lr : float
        Learning rate, zero or above. Steps are normalised elementwise: use a smaller one than for :class:`MeZO`.
    radius : float
        Half the distance of the two evaluations over the length of the direction, above 0.
    total_steps : int
        Steps that the schedule is made for, at least 1.
    warmup : pair of float
        Shares of the steps after which the annealing begins and ends, ``0 <= begin <= end``; equal ones never anneal.
    weight_decay : float
        Decay of the weights, zero or above.
    normalise : bool
        Divide by the root of the second moment; otherwise the steps are ``c m``.
    seed : int
        Seed of the directions, zero or above.
    model : nn.Module, optional
        Where given, its buffers are moved by the first evaluation of a step only.

    Raises
    ------
    ArgumentError
        If an option is outside its range.
    ModelError
        In ``step``, if a loss is not finite; the weights are then as before.

    Notes
    -----
    With the history h, zero at first, and weights a, b1, b2 in [0, 1],

    .. math:: z_0 \sim N(0, a I), \quad z_1 \sim N(h, (1 - a) I), \quad m = b_1 z_0 + (1 - b_1) z_1, \quad
        v = b_2 z_0^2 + (1 - b_2) z_1^2,

    :math:`c = (L(w + r m) - L(w - r m)) / 2r`, :math:`w \leftarrow w - \eta (c m / \sqrt{v + 10^{-8}} + \lambda w)` and
    :math:`h \leftarrow \operatorname{sign}(c) m`, which points uphill. All three weights are 1 at first, and fall as half
    cosines over the total steps times 1, 0.1 and 1.5; a and b1 to no less than 0.1. The released code anneals
    otherwise in the evaluation than in the update; this is the form of the paper.

    Cost: two evaluations a step; one buffer of the weights' size, the history; directions are regenerated from seeds, with six
    draws of d numbers, and three before the annealing begins.

    References
    ----------
    Jiang et al. (2023), arXiv:2312.15184, algorithm 1.

    Examples
    --------
    >>> w = nn.Parameter(torch.tensor([3.0, -1.0]))
    >>> optimizer = ZOAdaMU([w], lr=0.01, total_steps=400)
    >>> for _ in range(400):
    ...     loss = optimizer.step(lambda: w.square().sum())
    >>> bool(w.abs().max() < 0.1)
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        radius: float = 1e-3,
        total_steps: int = 1000,
        warmup: Sequence[float] = (0.1, 0.5),
        weight_decay: float = 0.0,
        normalise: bool = True,
        seed: int = 0,
        model: nn.Module | None = None,
    ) -> None:
        self._radius = checks.positive("radius", radius)
        self._total = checks.integer("total_steps", total_steps, low=1)
        begin, end = _pair(warmup)
        self._begin, self._end = begin * total_steps, end * total_steps
        self._seed = checks.integer("seed", seed, low=0)
        self._normalise = bool(normalise)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay}, model)

    def weights_of(self, t: int) -> tuple[float, float, float]:
        """Return the weights a, b1 and b2 of step t, counted from 0."""
        since = min(t, self._end) - self._begin
        if since <= 0:
            return 1.0, 1.0, 1.0

        def fallen(factor: float) -> float:
            return 0.5 * (1 + math.cos(math.pi * min(since / (factor * self._total), 1.0)))

        return max(fallen(1.0), _FLOOR), max(fallen(0.1), _FLOOR), fallen(1.5)

    @torch.no_grad()
    def step(self, closure: Closure) -> float:  # type: ignore[override]
        """Take one step and return the mean of its two losses.

        Parameters
        ----------
        closure : callable
            ``closure() -> loss``; no backward pass is needed.
        """
        t, weights, again = self.advance(), self.weights, self.replay(closure)
        a, b1, b2 = self.weights_of(t)
        parts, history = blocks(weights), [self._history(p) for p in weights]
        rates, decays = self.per_weight("lr"), self.per_weight("weight_decay")
        noises: list[Tensor] = []

        def directions() -> Iterator[Tensor]:
            """Yield the direction of each block, and leave what it is mixed from."""
            # Noise about the history has no weight before the annealing begins: it need not be drawn.
            seeds = [mixed_seed(self._seed, t, i) for i in range(2 if a < 1 else 1)]
            streams = zip(*(seeded_directions(weights, s) for s in seeds), strict=True)
            for block, drawn in zip(parts, streams, strict=True):
                z0, z1 = drawn[0].mul_(math.sqrt(a)), block.read(history)
                z1 = drawn[1].mul_(math.sqrt(1 - a)).add_(z1) if a < 1 else z1
                noises[:] = z0, z1
                yield b1 * z0 + (1 - b1) * z1

        def updated(block: Block, weight: Tensor, m: Tensor) -> Tensor:
            """Return new weights, and write the history."""
            z0, z1 = noises
            v = b2 * z0.square() + (1 - b2) * z1.square() if b2 < 1 else z0.square()
            change = m / v.add_(1e-8).sqrt_() if self._normalise else m.clone()
            own = zip(block.indices, block.split(weights, change), block.split(weights, weight), strict=True)
            for i, part, w in own:
                part.mul_(-rates[i] * c).sub_(w, alpha=rates[i] * decays[i])
            block.write(history, m.mul_(math.copysign(1.0, c)))
            return (weight.to(change.dtype) + change).to(weight.dtype)

        with moved(weights, directions, self._radius) as at:
            plus, minus = two_sided(at, again, self._radius)
            c = slope(plus, minus, self._radius)
            at.replace(updated)
        return (plus + minus) / 2

    def _history(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "history" not in state:
            state["history"] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        return state["history"]


def _pair(warmup: Sequence[float]) -> tuple[float, float]:
    if isinstance(warmup, str) or not isinstance(warmup, Sequence) or len(warmup) != 2:
        raise checks.ArgumentTypeError(
            f"warmup is {warmup!r}; allowed: two numbers, begin and end as shares of total_steps. Pass (0.1, 0.5)."
        )
    begin, end = (checks.nonnegative("warmup", w) for w in warmup)
    if begin > end:
        raise checks.ArgumentError(
            f"warmup is {tuple(warmup)}; allowed: a begin that is not after the end. Swap them."
        )
    return begin, end
