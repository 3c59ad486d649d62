"""Sections of an audit on the workers of a Dask cluster.

A worker opens model and data itself, by the same names: files must be there for it to read, and ``module:function`` to
import, from the working folder of the command or as an installed package.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbkit.audit.finding import Finding
from perturbkit.audit.plan import section_module
from perturbkit.audit.request import AuditRequest
from perturbkit.core import Cost, checks
from perturbkit.core.cluster import check_address
from perturbkit.core.cluster import on_cluster as connected

if TYPE_CHECKING:
    from perturbkit.audit.context import Context
    from perturbkit.audit.plan import Plan, PlannedSection
    from perturbkit.audit.subject import Subject

__all__ = ["on_cluster"]

# Explanations are made once for both; the light sections are not worth a task each.
_TOGETHER = (("explain", "faithfulness"), ("sanity", "calibration", "conformal"))
_opened = threading.local()


@dataclass(frozen=True)
class _Task:
    """What travels to a worker."""

    model: str
    data: str | None
    demo: bool
    options: tuple[tuple[str, Any], ...]
    request: AuditRequest
    rows: int
    folder: str
    sections: tuple[str, ...] = ()
    known: tuple[Finding, ...] = ()
    # By the clock of the day, which machines share, unlike the one that counts from their start.
    until: float = math.inf


def on_cluster(
    address: str, model: Any, data: Any, options: dict[str, Any], *, demo: bool = False
) -> Callable[[AuditRequest, Sequence[PlannedSection], float, int, Sequence[Finding]], Iterable[Finding]]:
    """Return what runs the sections of a request on a cluster.

    Parameters
    ----------
    address : str
        "tcp://HOST:PORT".
    model, data : str
        As on the command line.
    options : dict
        Keyword arguments of :func:`~perturbkit.audit.opening.door.open_subject`.
    demo : bool
        Whether ``model`` names a bundled subject.

    Raises
    ------
    ArgumentError
        If model or data is an object, which workers cannot be trusted to see as it is here.
    """
    check_address(address)
    for name, value in (("model", model), ("data", data)):
        if not isinstance(value, str | Path) and not (name == "data" and value is None):
            raise checks.ArgumentError(
                f"{name} is a {type(value).__name__} and cluster is given; allowed: text that a worker can open itself, a "
                "file or module:function. Save it to a file that the workers see, or leave the cluster out."
            )
    there = Path(str(model)).exists()
    source = str(Path(str(model)).resolve()) if there and not demo else str(model)
    place = None if data is None else str(Path(str(data)).resolve())

    def run(
        request: AuditRequest,
        todo: Sequence[PlannedSection],
        deadline: float,
        rows: int,
        known: Sequence[Finding],
    ) -> Iterator[Finding]:
        until = deadline - time.monotonic() + time.time()
        task = _Task(
            source,
            place,
            demo,
            tuple(options.items()),
            replace(request, out=None),
            rows,
            str(Path.cwd()),
            until=until,
        )
        names, findings = [p.name for p in todo], list(known)
        with connected(address) as executor:
            # What puts the findings of other sections together waits for them.
            last = [n for n in names if hasattr(section_module(n), "AFTER")]
            for wave in ([n for n in names if n not in last], last):
                for finding in _collected(executor, address, replace(task, known=tuple(findings)), wave):
                    findings.append(finding)
                    yield finding

    return run


def _collected(executor: Executor, address: str, task: _Task, names: Sequence[str]) -> Iterator[Finding]:
    groups = [tuple(n for n in group if n in names) for group in _TOGETHER]
    alone = [(n,) for n in names if not any(n in group for group in _TOGETHER)]
    futures = {executor.submit(run_sections, replace(task, sections=g)): g for g in (*groups, *alone) if g}
    try:
        for future in as_completed(futures):
            try:
                found = [Finding.from_dict(f) for f in future.result()]
            except (checks.ModelError, checks.DataError) as error:
                raise type(error)(f"on a worker of {address}: {error}") from None
            except Exception as error:
                why = f"the cluster lost it ({type(error).__name__}: {error})."
                found = [Finding(n, "failed", "This section failed.", why=why) for n in futures[future]]
            yield from found
    finally:
        for future in futures:
            future.cancel()


def run_sections(task: _Task) -> list[dict[str, Any]]:
    """Run the sections of a task, where a worker calls it; findings travel as plain values."""
    from perturbkit.audit.runner import run_section
    from perturbkit.core.watch import Watch

    deadline = task.until - time.time() + time.monotonic()
    with Watch(deadline).on():
        plan, context, shared = _context(task)
    found = []
    # Maps that an earlier task of the same audit left here would be free, and the cost would depend on who ran what.
    vars(context).pop("attributions", None)
    context.findings.clear()
    context.findings.update({f.section: f for f in task.known})
    for planned in plan.sections:
        if planned.name in task.sections:
            first = planned.name == plan.sections[0].name
            found.append(run_section(planned, context, deadline, shared if first else Cost()).to_dict())
    return found


def _context(task: _Task) -> tuple[Plan, Context, Cost]:
    """Open, choose and plan as the command does, once a worker's thread: two threads must not share a model's modes."""
    from perturbkit.audit.plan import make_plan
    from perturbkit.audit.runner import choose_rows, make_context, prepare

    key = replace(task, sections=(), known=(), until=math.inf)
    if getattr(_opened, "key", None) != key:
        chosen = choose_rows(_subject(task), task.request, task.rows)
        plan = make_plan(chosen, task.request)
        context = make_context(chosen, task.request, plan)
        shared = prepare(context, {})
        _opened.key, _opened.value = key, (plan, context, shared)
    value: tuple[Plan, Context, Cost] = _opened.value
    return value


def _subject(task: _Task) -> Subject:
    if task.demo:
        from perturbkit.audit.demo import demo_subject

        return demo_subject(task.model, **dict(task.options))
    from perturbkit.audit.opening import open_subject

    if Path(task.folder).is_dir() and task.folder not in sys.path:
        sys.path.append(task.folder)
    return open_subject(task.model, task.data, **dict(task.options))
