"""What a section is given beside the subject: options, random numbers, its share of the work."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from perturbkit.audit.finding import Finding
from perturbkit.audit.partial import Parts
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Derived, Subject, is_probability
from perturbkit.core import Cost, Oracle, checks
from perturbkit.core.watch import DeadlineError

__all__ = ["Attributions", "Context", "Question"]

# What a regression is asked to bear: its answer may move by this share of the standard deviation of the targets.
MOVED = 0.25
# Columns that nothing may change are measured in units so small that no step of a sensible size reaches them.
_TINY = 1e-6
# What stands for a missing number in units of the scale: methods want finite numbers, and no noise reaches from here to
# one that is there.
_ABSENT = 2.0**100


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
        What may change, 1 or 0: shape of a row, or of all rows where some have missing numbers.
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

    @property
    def span(self) -> float:
        """Difference of the largest and the smallest number that may change."""
        values = self.z[self.free.expand_as(self.z) > 0]
        return float(values.max() - values.min()) if values.numel() else 0.0

    def free_of(self, rows: Tensor) -> Tensor:
        """Return what may change of some rows, given by a truth value a row."""
        return self.free[rows] if self.free.shape == self.z.shape else self.free


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

    def __post_init__(self) -> None:
        frozen_columns(self.subject, self.request)

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
        """Unit of a change: standard deviation of each column of a table, one where it is constant; one for images."""
        assert self.subject.x is not None
        if self.subject.task == "image":
            return torch.ones((), dtype=self.subject.x.dtype)
        std = self.deviation
        if len(self.subject.held):
            std = torch.where(self.subject.held, 1.0, std)
        return torch.where(self.fixed, _TINY * std, std) if len(self.fixed) else std

    @cached_property
    def deviation(self) -> Tensor:
        """Standard deviation of each column of a table, one where a column is constant."""
        assert self.subject.x is not None
        std = _deviation(self.subject.x) if self.has_missing else self.subject.x.std(0)
        return torch.where(std > 0, std, torch.ones_like(std))

    @cached_property
    def has_missing(self) -> bool:
        """Whether some number of the table is missing."""
        return self.subject.missing() is not None

    @cached_property
    def fixed(self) -> Tensor:
        """Columns that nothing may change, categories and frozen ones, as truth values; empty where there are none."""
        return _fixed(self.subject, self.frozen)

    @cached_property
    def frozen(self) -> Tensor:
        """Columns that the request holds, as truth values; empty where there are none."""
        return frozen_columns(self.subject, self.request)

    @cached_property
    def filled(self) -> Context:
        """The same with means in the place of missing numbers, in the same units."""
        if not self.has_missing:
            return self
        found = replace(self, subject=self.subject.filled())
        found.__dict__["scale"] = self.scale
        return found

    @cached_property
    def attributions(self) -> Attributions:
        """The maps that the explain and faithfulness sections share, made once."""
        from perturbkit.audit.attributions import attribute
        from perturbkit.audit.sections.explain import attribute_present

        return attribute(self) if not self.has_missing else attribute_present(self)

    def question(self, rows: Tensor) -> Question:
        """Return what is asked about some rows, in units of :attr:`scale`: radii of a table are in standard deviations.

        Probabilities are turned into their logarithms: the gradient of a softmax vanishes where the model is sure, and
        an attack that climbs it would report a radius that is not there. Missing numbers travel as a number of their own,
        which is turned back before the model is asked.
        """
        subject, scale = self.subject, self.scale
        assert subject.oracle is not None
        assert subject.x is not None
        z, free = subject.x[rows] / scale, torch.ones(subject.x.shape[1:], dtype=subject.x.dtype)
        if len(self.fixed):
            free = (~self.fixed).to(free)
        if self.has_missing:
            absent = torch.isnan(z)
            z, free = z.masked_fill(absent, _ABSENT), free * (~absent)
        if subject.regression:
            return self._number_question(z, free, subject.predictions()[rows])
        probabilities = is_probability(subject.scores())

        def after(out: Tensor, _: Tensor) -> Tensor:
            return out.clamp_min(1e-38).log() if probabilities else out

        oracle = Derived(subject.oracle, before=self._inputs, after=after, alike=True)
        return Question(oracle, z, subject.y[rows], free, self._bounds_of(z), (oracle,))

    def _inputs(self, v: Tensor) -> Tensor:
        """Turn rows in units of the scale into those that the model knows."""
        x = v * self.scale.to(v)
        if not self.has_missing:
            return x
        if self.subject.bounds is not None:
            x = x.clamp(*self.subject.bounds)
        return x.masked_fill(v > _ABSENT / 2, torch.nan)

    def _bounds_of(self, z: Tensor) -> tuple[Any, Any] | None:
        """Return the range of valid rows; what stands for a missing number is beyond it, so that end is open there."""
        bounds = self.scaled_bounds
        if bounds is None or not self.has_missing:
            return bounds
        low, high = (torch.as_tensor(b).to(z).expand(z.shape[1]) for b in bounds)
        return low, torch.where((z > _ABSENT / 2).any(0), torch.inf, high)

    def _number_question(self, z: Tensor, free: Tensor, clean: Tensor) -> Question:
        """Ask whether the number moves: the clean one travels along as a last column, out of reach of every change."""
        subject, limit = self.subject, self.moved
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

            inner = Derived(subject.oracle, before=lambda v: self._inputs(v[:, :-1]), after=after, alike=True)  # type: ignore[arg-type]
            return inner

        centre = float(clean.mean())
        last = ((clean - centre) / unit).to(z)[:, None]
        bounds = self._bounds_of(z)
        if bounds is not None:
            open_ends = (torch.tensor([-torch.inf]).to(z), torch.tensor([torch.inf]).to(z))
            bounds = tuple(  # type: ignore[assignment]
                torch.cat([torch.as_tensor(b).to(z).expand(z.shape[1]), end])
                for b, end in zip(bounds, open_ends, strict=True)
            )
        free = torch.cat([free, torch.zeros(*free.shape[:-1], 1).to(free)], -1)
        y = torch.zeros(len(z), dtype=torch.long)
        return Question(asked(0), torch.cat([z, last], 1), y, free, bounds, (asked(1), asked(-1)))

    @property
    def scaled_bounds(self) -> tuple[Any, Any] | None:
        """The range of valid inputs in units of :attr:`scale`."""
        bounds = self.subject.bounds
        return None if bounds is None else (bounds[0] / self.scale, bounds[1] / self.scale)


def frozen_columns(subject: Subject, request: AuditRequest) -> Tensor:
    """Return which columns the request holds, as truth values; empty where there are none.

    Raises
    ------
    ArgumentError
        If a name is none of a column that the model is asked with.
    """
    names = subject.feature_names
    for name in request.frozen:
        if name not in names:
            columns = (
                f"one of {', '.join(names[:20])}"
                if names
                else f"columns of a table, and the task is {subject.task}"
            )
            raise checks.ArgumentError(
                f"frozen names {name!r}; allowed: {columns}. Correct it, or leave it out."
            )
    if not request.frozen:
        return torch.zeros(0, dtype=torch.bool)
    return torch.tensor([name in request.frozen for name in names])


def held_everywhere(subject: Subject, request: AuditRequest) -> str:
    """Return why no number of a table may change, empty where some may."""
    fixed = _fixed(subject, frozen_columns(subject, request))
    if not len(fixed) or not bool(fixed.all()):
        return ""
    return "no number may change, since every column is frozen or of categories. Free a column of numbers, or leave this out."


def _fixed(subject: Subject, frozen: Tensor) -> Tensor:
    held = subject.held
    return held | frozen if len(held) and len(frozen) else held if len(held) else frozen


def _deviation(x: Tensor) -> Tensor:
    """Return the standard deviation of what is there in each column, zero where fewer than two numbers are."""
    n = (~torch.isnan(x)).sum(0)
    return ((x - x.nanmean(0)).square().nansum(0) / (n - 1).clamp_min(1)).sqrt()


def spent(oracle: Oracle | None) -> Cost:
    """Return what an oracle has counted; nothing where there is no model."""
    return Cost() if oracle is None else oracle.cost


def _joined(parts: list[Any], order: Tensor) -> Any:
    """Put the entries of chunks one after the other, and then into the order asked for."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)[order]
    every = [entry for part in parts for entry in part]
    return [every[i] for i in order.tolist()]
