"""What a section is given beside the subject: options, random numbers, its share of the work."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from perturbkit.audit.finding import Finding
from perturbkit.audit.partial import Parts
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Derived, Subject, is_probability
from perturbkit.core import Cost, Oracle
from perturbkit.core.watch import DeadlineError

__all__ = ["Attributions", "Context", "Question"]

# What a regression is asked to bear: its answer may move by this share of the standard deviation of the targets.
MOVED = 0.25
# Columns that nothing may change are measured in units so small that no step of a sensible size reaches them.
_TINY = 1e-6


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
class Question:
    """Rows in units of their scale, and what an attack or a certificate asks of the model about them.

    Attributes
    ----------
    oracle : Oracle
        Scores of the answers, in units of the scale. Of a regression: those of "moved by less" and of "moved by more".
    z : Tensor
        The rows. Of a regression, with a last column that holds the clean answer, which no gradient reaches.
    y : Tensor of int64
        The answer that should stay.
    free : Tensor
        What may change, 1 or 0, broadcastable to a row.
    bounds : tuple or None
        Range of valid rows.
    sides : tuple of Oracle
        What to climb in the place of the oracle: of a regression, "moved up" and "moved down".
    """

    oracle: Oracle
    z: Tensor
    y: Tensor
    free: Tensor
    bounds: tuple[Any, Any] | None
    sides: tuple[Oracle, ...]


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
    parts : Parts
        Where chunks of a section's rows are kept until the audit is complete.
    findings : dict of str to Finding
        What the sections before found, for those that put it together.
    """

    request: AuditRequest
    subject: Subject
    rows: dict[str, int] = field(default_factory=dict)
    parts: Parts = field(default_factory=Parts)
    findings: dict[str, Finding] = field(default_factory=dict)

    def chunks(
        self,
        name: str,
        rows: Tensor,
        function: Callable[[Tensor, torch.Generator], dict[str, Any]],
        each: int,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Measure rows chunk by chunk, in random order, so that a deadline or a crash costs no more than one chunk.

        Parameters
        ----------
        name : str
            What is measured; it names the random numbers and the files of the chunks.
        rows : Tensor of int64
            The rows.
        function : callable
            ``function(part, generator)`` measures some of the rows: by name a tensor or a list with one entry a row.
        each : int
            Evaluations that one row takes.

        Returns
        -------
        done : Tensor of int64
            Places in ``rows`` of those measured, rising: all of them, or a random part where the deadline came.
        values : dict
            By name, the measurements in the order of ``done``.

        Raises
        ------
        DeadlineError
            If the deadline came before the end of the first chunk.
        """
        order = torch.randperm(len(rows), generator=self.generator(f"order of {name}"))
        done: list[Tensor] = []
        found: list[dict[str, Any]] = []
        for i, places in enumerate(order.split(self.parts.size(each, self.subject.oracle))):
            generator = self.generator(f"{name} {i}")
            try:
                found.append(self._chunk(f"{name} {i}", rows[places], function, generator))
            except DeadlineError:
                if not done:
                    raise
                self.parts.cut.append((sum(len(d) for d in done), len(rows)))
                break
            done.append(places)
        where = torch.cat(done)
        back = where.argsort()
        return where[back], {key: _joined([f[key] for f in found], back) for key in found[0]}

    def _chunk(self, name: str, rows: Tensor, function: Any, generator: torch.Generator) -> dict[str, Any]:
        known = self.parts.read(name, rows)
        oracle = self.subject.oracle
        if known is not None:
            values, cost = known
            if oracle is not None:
                oracle.nfev, oracle.ngrad, oracle.njvp = (
                    a + b for a, b in zip((oracle.nfev, oracle.ngrad, oracle.njvp), cost, strict=True)
                )
            return values
        before = spent(oracle)
        values = function(rows, generator)
        used = spent(oracle) - before
        self.parts.write(name, rows, values, (used.nfev, used.ngrad, used.njvp))
        return values

    def generator(self, name: str) -> torch.Generator:
        """Return a generator for one purpose, from the seed of the request and the purpose's name."""
        return torch.Generator().manual_seed(self.request.seed * 2**32 + zlib.crc32(name.encode()))

    def fair_rows(self, n: int) -> Tensor:
        """Return ``n`` rows at random, right or wrong, the same for every section that asks for as many."""
        order = torch.randperm(self.subject.n, generator=self.generator("fair rows"))
        return order[:n].sort().values

    def correct_rows(self, n: int) -> Tensor:
        """Return ``n`` rows, spread over the data, those predicted correctly first; of a regression any."""
        order = torch.randperm(self.subject.n, generator=self.generator("rows"))
        if not self.subject.regression:
            right = self.subject.predictions() == self.subject.y
            order = torch.cat([order[right[order]], order[~right[order]]])
        return order[:n].sort().values

    @property
    def moved(self) -> float:
        """By how much the answer of a regression may move: a share of the standard deviation of the targets."""
        return MOVED * float(self.subject.y.std())

    @cached_property
    def scale(self) -> Tensor:
        """Standard deviation of each column of a table, one where a column is constant; one for images."""
        assert self.subject.x is not None
        if self.subject.task == "image":
            return torch.ones((), dtype=self.subject.x.dtype)
        std = self.subject.x.std(0)
        std = torch.where(std > 0, std, torch.ones_like(std))
        return torch.where(self.subject.held, _TINY, std) if len(self.subject.held) else std

    @cached_property
    def attributions(self) -> Attributions:
        """The maps that the explain and faithfulness sections share, made once."""
        from perturbkit.audit.attributions import attribute

        return attribute(self)

    def question(self, rows: Tensor) -> Question:
        """Return what is asked about some rows, in units of :attr:`scale`: radii of a table are in standard deviations.

        Probabilities are turned into their logarithms: the gradient of a softmax vanishes where the model is sure, and
        an attack that climbs it would report a radius that is not there.
        """
        subject, scale = self.subject, self.scale
        assert subject.oracle is not None
        assert subject.x is not None
        z, free = subject.x[rows] / scale, torch.ones(subject.x.shape[1:], dtype=subject.x.dtype)
        if len(subject.held):
            free = (~subject.held).to(free)
        if subject.regression:
            return self._number_question(z, free, subject.predictions()[rows])
        probabilities = is_probability(subject.scores())

        def after(out: Tensor, _: Tensor) -> Tensor:
            return out.clamp_min(1e-38).log() if probabilities else out

        oracle = Derived(subject.oracle, before=lambda v: v * scale.to(v), after=after)
        return Question(oracle, z, subject.y[rows], free, self.scaled_bounds, (oracle,))

    def _number_question(self, z: Tensor, free: Tensor, clean: Tensor) -> Question:
        """Ask whether the number moves: the clean one travels along as a last column, out of reach of every change."""
        subject, scale, limit = self.subject, self.scale, self.moved
        assert subject.oracle is not None
        assert subject.point is not None
        weights = subject.point
        # In these units a change of the last column of any sensible size is nothing beside the limit.
        unit = _TINY * limit

        def asked(sign: int) -> Oracle:
            def after(out: Tensor, v: Tensor) -> Tensor:
                shift = out @ weights.to(out) - (v[:, -1].detach().double() * unit + centre).to(out)
                size = sign * shift if sign else shift.abs()
                return torch.stack([size.new_full(size.shape, limit), size], 1)

            inner = Derived(subject.oracle, before=lambda v: v[:, :-1] * scale.to(v), after=after)  # type: ignore[arg-type]
            return inner

        centre = float(clean.mean())
        last = ((clean - centre) / unit).to(z)[:, None]
        bounds = self.scaled_bounds
        if bounds is not None:
            open_ends = (torch.tensor([-torch.inf]).to(z), torch.tensor([torch.inf]).to(z))
            bounds = tuple(  # type: ignore[assignment]
                torch.cat([torch.as_tensor(b).to(z).expand(z.shape[1]), end])
                for b, end in zip(bounds, open_ends, strict=True)
            )
        free = torch.cat([free, torch.zeros(1).to(free)])
        y = torch.zeros(len(z), dtype=torch.long)
        return Question(asked(0), torch.cat([z, last], 1), y, free, bounds, (asked(1), asked(-1)))

    @property
    def scaled_bounds(self) -> tuple[Any, Any] | None:
        """The range of valid inputs in units of :attr:`scale`."""
        bounds = self.subject.bounds
        return None if bounds is None else (bounds[0] / self.scale, bounds[1] / self.scale)


def spent(oracle: Oracle | None) -> Cost:
    """Return what an oracle has counted; nothing where there is no model."""
    return Cost() if oracle is None else oracle.cost


def _joined(parts: list[Any], order: Tensor) -> Any:
    """Put the entries of chunks one after the other, and then into the order asked for."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)[order]
    every = [entry for part in parts for entry in part]
    return [every[i] for i in order.tolist()]
