"""What a section is given beside the subject: options, random numbers, its share of the work."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Subject, is_probability
from perturbkit.core import Cost, Oracle, unwrap_output

__all__ = ["Attributions", "Context"]


@dataclass(frozen=True, eq=False)
class Attributions:
    """Maps of a few rows by several methods, for the explain and faithfulness sections.

    Attributes
    ----------
    rows : Tensor
        Rows of the subject explained, all predicted correctly where there are enough.
    target : Tensor
        The class explained, the predicted one.
    maps : dict of str to Tensor
        By method, shape (n, cells): image cells, columns or words.
    cells : list of list of str
        Names of the cells, a list a row; empty strings for image cells.
    keep : callable
        ``keep(i, kept)`` gives model inputs for row ``i`` with only the cells where ``kept`` (m, cells) is true.
    grid : tuple or None
        Height and width of the cells of an image.
    papers : dict of str to str
        By method, its key.
    """

    rows: Tensor
    target: Tensor
    maps: dict[str, Tensor]
    cells: list[list[str]]
    keep: Callable[[int, Tensor], Any]
    grid: tuple[int, int] | None
    papers: dict[str, str]


@dataclass(frozen=True, eq=False)
class Context:
    """Options and resources of one section.

    Attributes
    ----------
    request : AuditRequest
        What was asked.
    subject : Subject
        The model and the chosen rows.
    rows : dict of str to int
        Rows planned for each section.
    """

    request: AuditRequest
    subject: Subject
    rows: dict[str, int] = field(default_factory=dict)

    def generator(self, name: str) -> torch.Generator:
        """Return a generator for one purpose, from the seed of the request and the purpose's name."""
        return torch.Generator().manual_seed(self.request.seed * 2**32 + zlib.crc32(name.encode()))

    def fair_rows(self, n: int) -> Tensor:
        """Return ``n`` rows at random, right or wrong, the same for every section that asks for as many."""
        order = torch.randperm(self.subject.n, generator=self.generator("fair rows"))
        return order[:n].sort().values

    def correct_rows(self, n: int) -> Tensor:
        """Return ``n`` rows, spread over the data, those predicted correctly first."""
        right = self.subject.predictions() == self.subject.y
        order = torch.randperm(self.subject.n, generator=self.generator("rows"))
        order = torch.cat([order[right[order]], order[~right[order]]])
        return order[:n].sort().values

    @cached_property
    def scale(self) -> Tensor:
        """Standard deviation of each column of a table, one where a column is constant; one for images."""
        assert self.subject.x is not None
        if self.subject.task == "image":
            return torch.ones((), dtype=self.subject.x.dtype)
        std = self.subject.x.std(0)
        return torch.where(std > 0, std, torch.ones_like(std))

    @cached_property
    def attributions(self) -> Attributions:
        """The maps that the explain and faithfulness sections share, made once."""
        from perturbkit.audit.attributions import attribute

        return attribute(self)

    def scaled_oracle(self) -> Oracle:
        """Return the oracle in units of :attr:`scale`, so that radii of a table are in standard deviations.

        Probabilities are turned into their logarithms: the gradient of a softmax vanishes where the model is sure, and
        an attack that climbs it would report a radius that is not there.
        """
        assert self.subject.oracle is not None
        return _Scaled(self.subject.oracle, self.scale, is_probability(self.subject.scores()))

    @property
    def scaled_bounds(self) -> tuple[Any, Any] | None:
        """The range of valid inputs in units of :attr:`scale`."""
        bounds = self.subject.bounds
        return None if bounds is None else (bounds[0] / self.scale, bounds[1] / self.scale)


class _Scaled(Oracle):
    """An oracle of ``z = x / scale``, in logarithms where it answers probabilities, that adds its counts to the inner one."""

    def __init__(self, inner: Oracle, scale: Tensor, probabilities: bool) -> None:
        self._inner = inner

        def scaled(z: Tensor) -> Tensor:
            out = unwrap_output(inner.fun(z * scale.to(z.device)))
            return out.clamp_min(1e-38).log() if probabilities else out

        super().__init__(scaled, memory=inner.memory, chunk_size=inner.chunk_size, device=inner.device)

    def __call__(self, x: Tensor, *rows: Tensor) -> Tensor:
        with self._inner.frozen():
            out = super().__call__(x, *rows)
        self._inner.nfev += len(x)
        return out

    def value_and_gradient(self, x: Tensor, target: Any = None, *rows: Tensor, **options: Any) -> Any:
        with self._inner.frozen():
            out = super().value_and_gradient(x, target, *rows, **options)
        self._inner.nfev += len(x)
        self._inner.ngrad += len(x)
        return out


def spent(oracle: Oracle | None) -> Cost:
    """Return what an oracle has counted; nothing where there is no model."""
    return Cost() if oracle is None else oracle.cost
