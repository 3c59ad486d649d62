"""What an audit will do before it does it: sections, rows and cost.

A section is a module of :mod:`perturbkit.audit.sections` with

- ``SHARE``: its part of the work, and ``NEEDS_MODEL``: what it needs the model for, empty if predictions will do;
- ``evaluations(subject, request) -> int``: rows evaluated for one row of data, a gradient counted as three;
- ``refusal(subject, request) -> str``, where there is one: why it cannot run, empty if it can;
- ``run(context) -> Finding`` and ``draw(finding) -> Figure``.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from perturbkit.audit.request import PROFILES, AuditRequest
from perturbkit.audit.subject import Subject

__all__ = ["Plan", "PlannedSection", "make_plan", "section_module"]


@dataclass(frozen=True)
class PlannedSection:
    """One section with its rows and cost.

    Attributes
    ----------
    name : str
        The section.
    rows : int
        Rows of data it will use.
    evaluations : int
        Rows it will evaluate, a gradient counted as three.
    refusal : str
        Why it will not run, empty if it will.
    """

    name: str
    rows: int
    evaluations: int
    refusal: str = ""


@dataclass(frozen=True)
class Plan:
    """All sections, in order.

    Attributes
    ----------
    sections : tuple of PlannedSection
        In the order of the report.
    seconds : float
        Estimate of the time, from a few rows timed; nothing depends on it.
    """

    sections: tuple[PlannedSection, ...]
    seconds: float = 0.0

    @property
    def evaluations(self) -> int:
        """Rows evaluated in all."""
        return sum(s.evaluations for s in self.sections if not s.refusal)

    @property
    def rows(self) -> dict[str, int]:
        """Rows by section."""
        return {s.name: s.rows for s in self.sections}


def section_module(name: str) -> Any:
    """Return the module of a section."""
    return importlib.import_module(f"perturbkit.audit.sections.{name}")


def make_plan(subject: Subject, request: AuditRequest) -> Plan:
    """Share the work of the profile among the sections.

    A section's rows are its share of the profile's operations over what one of its rows costs, at least 4 and at
    most all rows. The cost of an evaluation is counted in floating-point operations on one row, not timed, so the
    plan is the same on every machine.
    """
    budget = PROFILES[request.profile].flops / operations(subject)
    planned = []
    # The explanations that faithfulness scores are those of the explain section, planned even when that is skipped.
    for name in request.sections:
        module = section_module(name)
        refusal = _refusal(module, subject, request)
        each = 0 if subject.oracle is None else module.evaluations(subject, request)
        rows = subject.n if each == 0 else int(min(subject.n, max(4, budget * module.SHARE / max(each, 1))))
        planned.append(PlannedSection(name, rows, rows * each, refusal))
    plan = Plan(tuple(planned))
    return replace(plan, seconds=plan.evaluations * _seconds(subject))


def _refusal(module: Any, subject: Subject, request: AuditRequest) -> str:
    if module.NEEDS_MODEL and subject.oracle is None:
        return f"only predictions are given, and {module.NEEDS_MODEL} needs the model. Pass the model and its inputs."
    return module.refusal(subject, request) if hasattr(module, "refusal") else ""


def _seconds(subject: Subject) -> float:
    """Time one evaluation, over a few rows and after a first try."""
    if subject.oracle is None:
        return 0.0
    # A function from outside has a cost a call, which many rows share.
    few = subject.take(torch.arange(min(64 if subject.no_gradient else 4, subject.n)))
    nfev = subject.oracle.nfev
    few.scores()
    started = time.perf_counter()
    few.take(torch.arange(few.n)).scores()
    subject.oracle.nfev = nfev
    return (time.perf_counter() - started) / few.n


def operations(subject: Subject) -> float:
    """Return the floating-point operations of one evaluation, at least a million."""
    from torch.utils.flop_counter import FlopCounterMode

    if subject.oracle is None:
        return 1e6
    if subject.operations is not None or subject.no_gradient:
        return max(1e6, subject.operations or 0.0)
    one = subject.take(torch.arange(1))
    nfev = subject.oracle.nfev
    one.scores()  # the oracle measures the memory of a row on its first call, which must not be counted
    one = subject.take(torch.arange(1))
    with FlopCounterMode(display=False) as counter:
        one.scores()
    subject.oracle.nfev = nfev
    return max(1e6, float(counter.get_total_flops()))
