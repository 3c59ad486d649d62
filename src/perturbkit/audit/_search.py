"""A search for small changes that asks for scores alone: what finds a perturbation where the gradient hides it.

It goes from the best change known, towards rows of another answer and in random directions, and then turns parts of
the best direction round: the sign flips of Chen and Gu (2020), RayS, arXiv:2006.12792, for the largest change of a
value, and random turns for the Euclidean norm.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from perturbkit.audit.context import Context, Question
from perturbkit.core.perturbation import Sphere

# Where nothing was found yet, directions are tried at these shares of the widest change.
_SCALES = (1.0, 0.3, 0.1, 0.03, 0.01)
_HALVINGS = 6
# What is tried must be this much smaller than the best change known.
_SMALLER = 0.98
_SHORTEST = 0.95


def directions(z: Tensor, n: int, norm: str, free: Tensor, generator: torch.Generator) -> Tensor:
    """Draw directions of norm one over what may change, shape (n, rows, ...)."""
    if norm == "linf":
        return (torch.randint(0, 2, (n, *z.shape), generator=generator).to(z.dtype) * 2 - 1) * free
    drawn = Sphere(1.0).sample(z, generator=generator, n=n * len(z)).reshape(n, *z.shape)
    if bool((free == 1).all()):
        return drawn
    drawn = drawn * free
    size = drawn.flatten(2).norm(dim=2).clamp_min(torch.finfo(z.dtype).tiny)
    return drawn / size.reshape(*size.shape, *[1] * (z.ndim - 1))


def nearest_of_another_answer(context: Context, rows: Tensor, asked: Question, k: int) -> Tensor:
    """Return for each row the nearest rows of the data that have another answer, shape (k, rows, ...)."""
    subject = context.subject
    assert subject.x is not None
    answers = subject.predictions()
    pool = context.fair_rows(min(subject.n, 400))
    z = subject.x[rows] / context.scale
    others = subject.x[pool] / context.scale
    if subject.regression:
        far = (answers[rows][:, None] - answers[pool][None]).abs() < context.moved
    else:
        far = answers[rows][:, None] == answers[pool][None]
    distance = torch.cdist(z.flatten(1).double(), others.flatten(1).double()).masked_fill(far, math.inf)
    order = distance.argsort(1)[:, :k]
    points = others[order].transpose(0, 1)
    # A row without any such neighbour stays where it is, which changes nothing.
    none = torch.isinf(distance.gather(1, order)).T
    points = torch.where(none.reshape(*none.shape, *[1] * (z.ndim - 1)), z[None], points)
    if subject.regression:
        points = torch.cat([points, asked.z[None, :, -1:].expand(len(points), -1, -1)], 2)
    return points


class ScoreSearch:
    """The smallest change known of each row, made smaller by questions for scores.

    Parameters
    ----------
    asked : Question
        The rows and the model.
    radius, found : Tensor
        The best change known before: its size, infinity where there is none, and the changed rows.
    norm : {"linf", "l2"}
        What is kept small.
    """

    def __init__(self, asked: Question, radius: Tensor, found: Tensor, norm: str) -> None:
        self.asked, self.norm = asked, norm
        self.radius, self.found = radius.clone(), found.clone()
        values = asked.z[:, asked.free.bool()] if asked.free.shape == asked.z.shape[1:] else asked.z
        span = float(values.max() - values.min()) if values.numel() else 0.0
        self.widest = (span or 1.0) * (1.0 if norm == "linf" else float(max(values[:1].numel(), 1)) ** 0.5)

    def towards(self, points: Tensor) -> None:
        """Go straight to other rows, shape (k, rows, ...), for instance neighbours that have another answer."""
        for point in points:
            step = (point - self.asked.z) * self.asked.free
            self.attempt(step, torch.ones(len(step), dtype=step.dtype))
            if self.norm == "linf":
                self.along(step.sign())

    def along(self, direction: Tensor, smaller: float = _SMALLER) -> None:
        """Try one direction a row: a little below the best size known, or at several sizes where none is known."""
        unit = direction / _sizes(direction, self.norm).clamp_min(1e-30).reshape(_shape(direction))
        unknown = torch.isinf(self.radius)
        for scale in _SCALES if bool(unknown.any()) else (1.0,):
            size = torch.where(torch.isinf(self.radius), scale * self.widest, smaller * self.radius)
            self.attempt(unit, size.to(unit), only=None if scale == 1.0 else torch.isinf(self.radius))

    def refine(self, steps: int, generator: torch.Generator) -> None:
        """Turn parts of the best direction round, one question a step and row."""
        z = self.asked.z
        turn = torch.full((len(z),), 0.5, dtype=z.dtype)
        length = z[0].numel()
        blocks = _blocks(length)
        for i in range(steps):
            if not bool(torch.isfinite(self.radius).any()):
                return
            best = torch.where(torch.isfinite(self.radius).reshape(_shape(z)), self.found - z, 0.0)
            before = self.radius.clone()
            if self.norm == "linf" and i < len(blocks):
                start, end = blocks[i]
                flat = torch.where(best == 0, 1.0, best.sign()).flatten(1) * self.asked.free.expand_as(
                    z
                ).flatten(1)
                flat[:, start:end] *= -1
                self.along(flat.reshape(z.shape))
                continue
            drawn = directions(z, 1, "l2", self.asked.free, generator)[0]
            unit = best / _sizes(best, "l2").clamp_min(1e-30).reshape(_shape(z))
            self.along(unit + turn.reshape(_shape(z)) * drawn)
            turn = torch.where(self.radius < before, turn * 1.3, turn * 0.9)

    def shorten(self) -> None:
        """Halve in on the edge along the best change of each row, from just below it."""
        rows = torch.isfinite(self.radius).nonzero()[:, 0]
        step, one = self.found - self.asked.z, torch.ones(len(self.found), dtype=self.found.dtype)
        low, high = _SHORTEST * one, one.clone()
        for _ in range(_HALVINGS if len(rows) else 0):
            middle = (low + high) / 2
            hit = self._changed(rows, step, middle)
            high[rows] = torch.where(hit, middle[rows], high[rows])
            low[rows] = torch.where(hit, low[rows], middle[rows])
        self._take(rows, self._at(rows, step, high))

    def attempt(self, step: Tensor, size: Tensor, *, only: Tensor | None = None) -> None:
        """Change rows by ``size`` times ``step`` and, where the answer changes, halve the size in on the edge."""
        rows = torch.arange(len(step)) if only is None else only.nonzero()[:, 0]
        rows = rows[self._changed(rows, step, size)]
        low, high = torch.zeros_like(size), size.clone()
        for _ in range(_HALVINGS if len(rows) else 0):
            middle = (low + high) / 2
            hit = self._changed(rows, step, middle)
            high[rows] = torch.where(hit, middle[rows], high[rows])
            low[rows] = torch.where(hit, low[rows], middle[rows])
        self._take(rows, self._at(rows, step, high))

    def _take(self, rows: Tensor, moved: Tensor) -> None:
        """Keep what is nearer than the best known."""
        reach = _sizes(moved - self.asked.z[rows], self.norm).to(self.radius)
        nearer = reach < self.radius[rows]
        self.radius[rows[nearer]], self.found[rows[nearer]] = reach[nearer], moved[nearer]

    def _at(self, rows: Tensor, step: Tensor, size: Tensor) -> Tensor:
        moved = self.asked.z[rows] + step[rows] * size[rows].reshape(_shape(step))
        if self.asked.bounds is None:
            return moved
        low, high = (torch.as_tensor(b).to(moved) for b in self.asked.bounds)
        return moved.clamp(low, high)

    def _changed(self, rows: Tensor, step: Tensor, size: Tensor) -> Tensor:
        if len(rows) == 0:
            return torch.zeros(0, dtype=torch.bool)
        return self.asked.oracle(self._at(rows, step, size)).argmax(1) != self.asked.y[rows]


def _sizes(change: Tensor, norm: str) -> Tensor:
    flat = change.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


def _shape(z: Tensor) -> tuple[int, ...]:
    return (-1, *[1] * (z.ndim - 1))


def _blocks(length: int) -> list[tuple[int, int]]:
    """Return the blocks of halves, quarters, eighths ... of a row, the coarse ones first."""
    found: list[tuple[int, int]] = []
    parts = 2
    while len(found) < 512:
        edges = torch.linspace(0, length, min(parts, length) + 1).round().long().tolist()
        found += [(a, b) for a, b in itertools.pairwise(edges) if b > a]
        if parts >= length:
            break
        parts *= 2
    return found
