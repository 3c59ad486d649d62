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

_TIMED_ROWS, _TIMED_SECONDS = 64, 0.1


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
        Estimate of the time, from a few rows timed. Only a time budget makes anything depend on it.
    operations : float
        Floating-point operations of one evaluation.
    each : float
        Seconds of one evaluation.
    """

    sections: tuple[PlannedSection, ...]
    seconds: float = 0.0
    operations: float = 1e6
    each: float = 0.0

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
    one = operations(subject)
    budget = PROFILES[request.profile].flops / one
    planned = []
    # The explanations that faithfulness scores are those of the explain section, planned even when that is skipped.
    for name in request.sections:
        module = section_module(name)
        refusal = _refusal(module, subject, request)
        cost = 0 if subject.oracle is None else module.evaluations(subject, request)
        rows = subject.n if cost == 0 else int(min(subject.n, max(4, budget * module.SHARE / max(cost, 1))))
        planned.append(PlannedSection(name, rows, rows * cost, refusal))
    each = _seconds(subject)
    plan = Plan(tuple(planned), operations=one, each=each)
    return replace(plan, seconds=plan.evaluations * each)


def substitutions(subject: Subject, request: AuditRequest) -> dict[str, str]:
    """Return by section what is not supported for this subject, why, and what takes its place."""
    found = {}
    for name in request.sections:
        why = _refusal(section_module(name), subject, request)
        if why:
            found[name] = f"not run: {why}"
    if subject.oracle is None:
        return found
    for name, methods in (
        ("explain", "integrated gradients"),
        ("attack", "the white-box attack (fast_minimum_norm)"),
    ):
        left_out = subject.left_out(methods).strip()
        if name in request.sections and name not in found and left_out:
            found[name] = left_out
    if "certify" in request.sections and "certify" not in found and subject.task != "text":
        why = section_module("certify").obstacle(subject, request)
        if why:
            found["certify"] = f"{why} The smoothed model is certified instead."
    return found


def memory_needed(subject: Subject, plan: Plan) -> tuple[int, int, str]:
    """Return bytes of the model's weights and of one batch with gradients, and how large that batch is."""
    oracle = subject.oracle
    if oracle is None:
        return 0, 0, "predictions only"
    module = oracle.fun
    weights = sum(t.nbytes for t in module.state_dict().values()) if hasattr(module, "state_dict") else 0
    if subject.x is None:
        return weights, 0, "texts, 64 at a time, whose memory is not known before"
    gradient = subject.has_gradient()
    each = oracle.row_memory(subject.x[:1], gradient=gradient)
    most = max(subject.n, *(s.evaluations for s in plan.sections), 1)
    rows = next(oracle.chunks(most, subject.x[:1], gradient=gradient))
    return weights, each * rows, f"{rows:,} rows{' with gradients' if gradient else ''} at a time"


def _refusal(module: Any, subject: Subject, request: AuditRequest) -> str:
    if module.NEEDS_MODEL and subject.oracle is None:
        return f"only predictions are given, and {module.NEEDS_MODEL} needs the model. Pass the model and its inputs."
    return module.refusal(subject, request) if hasattr(module, "refusal") else ""


def _seconds(subject: Subject) -> float:
    """Time one evaluation after a first try, over so many rows at once that what a call costs by itself is shared."""
    if subject.oracle is None:
        return 0.0
    nfev, n = subject.oracle.nfev, min(4, subject.n)
    subject.take(torch.arange(n)).scores()
    while True:
        few = subject.take(torch.arange(n))
        started = time.perf_counter()
        few.scores()
        seconds = time.perf_counter() - started
        if n == min(subject.n, _TIMED_ROWS) or seconds > _TIMED_SECONDS:
            break
        n = min(4 * n, subject.n, _TIMED_ROWS)
    subject.oracle.nfev = nfev
    return seconds / n


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
