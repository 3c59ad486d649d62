"""Running an audit: open, plan, run section after section, judge."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from perturbkit.audit.compare import compare
from perturbkit.audit.context import Context, spent
from perturbkit.audit.examples import row_examples
from perturbkit.audit.finding import Finding
from perturbkit.audit.gates import judge, read_gates
from perturbkit.audit.kept import Kept, fingerprint, prepare_folder
from perturbkit.audit.opening import open_subject
from perturbkit.audit.partial import Parts
from perturbkit.audit.plan import Plan, PlannedSection, make_plan, section_module
from perturbkit.audit.report import Report, load_report
from perturbkit.audit.request import AuditRequest, parse_duration
from perturbkit.audit.subject import Subject
from perturbkit.core import Cost, checks
from perturbkit.core.progress import ProgressLike, track
from perturbkit.core.watch import DeadlineError, Watch

__all__ = ["conduct", "run"]

_log = logging.getLogger("perturbkit")

# Kept of a budget for drawing and writing the report.
_WRITING_SECONDS, _WRITING_SHARE = 10.0, 0.15
# What a section may take at least, while there is time: light ones are then not lost to an estimate.
_LEAST_SECONDS = 2.0

Elsewhere = Callable[
    [AuditRequest, Sequence[PlannedSection], float, int, Sequence[Finding]], Iterable[Finding]
]


def run(
    model: Any = None,
    data: Any = None,
    *,
    predictions: Any = None,
    labels: Any = None,
    task: str | None = None,
    profile: str = "quick",
    n: int | None = None,
    seed: int = 0,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    norm: Literal["linf", "l2"] = "linf",
    eps: float | None = None,
    alpha: float = 0.1,
    bounds: tuple[float, float] | None = None,
    label: str | None = None,
    groups: str | None = None,
    frozen: Sequence[str] = (),
    gates: str | Path | Mapping[str, Any] | None = None,
    device: str | None = None,
    memory: str | int | None = None,
    out: str | Path | None = None,
    budget: str | float | None = None,
    baseline: str | Path | None = None,
    formats: Sequence[str] | None = None,
    resume: bool = False,
    cluster: str | None = None,
    progress: ProgressLike = None,
) -> Report:
    """Audit a model: what it looks at, how far it can be pushed, what is certain, how far to trust it.

    Parameters
    ----------
    model : nn.Module, scikit-learn estimator, callable or str
        A classifier: batch in, logits or probabilities of shape (n, classes) out; or, on tables, a regression: one
        number a row, or two or three quantiles. Or "module:function", a ".pt2", ".onnx" or ".skops" file, a Hugging
        Face folder, "hf:name", or "predictions.csv".
    data : (x, y), str or Path
        Images (n, channels, height, width) in [0, 1], a table (n, features) or a data frame, or a list of texts, with
        labels 0..classes-1 or the names of the model's classes, or numbers for a regression; or a .csv, .parquet, .npz
        or .jsonl file or a folder of images by class.
    predictions, labels : array
        Instead of model and data: probabilities (n, classes) and labels (n,), for calibration and conformal sets.
    task : {"image", "tabular", "text"}, optional
        Told from the data by default.
    profile : {"quick", "standard", "full"}
        About a minute, ten, or all rows.
    n : int, optional
        Rows of data at most, at least 2.
    seed : int
        Every draw follows from it.
    only, skip : sequence of str
        Sections to run alone, or to leave out.
    norm : {"linf", "l2"}
        Norm of the attack.
    eps : float, optional
        The size of change that the model should bear, in input units (standard deviations for tables).
    alpha : float
        Miscoverage allowed to conformal sets, in (0, 1).
    bounds : (float, float), optional
        Range of valid inputs; [0, 1] for images.
    label, groups : str, optional
        Columns of a file that hold the label and the group of a row.
    frozen : sequence of str
        Columns of a table that no attack, proof or damage may change.
    gates : str, Path or mapping, optional
        Requirements; see :mod:`perturbkit.audit.gates`.
    device, memory : str, optional
        Where the model runs, and the memory of one batch ("2GB").
    out : str or Path, optional
        Folder to save findings in as they are finished, and the report at the end.
    budget : str or float, optional
        Time, in seconds or as "10m". What it does not reach is measured on fewer rows, or not, and the report says so.
    baseline : str or Path, optional
        ``audit.json`` of an earlier audit to compare with; see :mod:`perturbkit.audit.compare`.
    formats : sequence of str, optional
        What to write: "html", "json", "csv", "junit", "md"; all by default.
    resume : bool
        Go on with the audit that was stopped in ``out``. It must have asked the same of the same model and data.
    cluster : str, optional
        Address of a Dask scheduler, "tcp://HOST:PORT", whose workers run the sections. Model and data must then be
        named by text, which the workers can open themselves.
    progress : Progress, bool or None
        See :mod:`perturbkit.core.progress`.

    Returns
    -------
    Report

    Raises
    ------
    ModelError, DataError, ArgumentError
        If the model, the data or an option is refused.

    Notes
    -----
    A section that cannot run says why, and the others go on. An interrupted audit returns the report of what was
    finished, marked as interrupted.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> p = rng.dirichlet(np.ones(3), size=200)
    >>> y = np.array([rng.choice(3, p=row) for row in p])
    >>> report = run(predictions=p, labels=y, only=["calibration", "conformal"], progress=False)
    >>> [finding.section for finding in report.findings]
    ['calibration', 'conformal']
    """
    request = AuditRequest(
        task, profile, n, seed, norm=norm, eps=eps, alpha=alpha, bounds=bounds, device=device, memory=memory,
        out=None if out is None else Path(out), budget=None if budget is None else parse_duration(budget), frozen=frozen,  # type: ignore[arg-type]
    ).selecting(tuple(only), tuple(skip))  # fmt: skip

    def opened() -> Subject:
        if predictions is not None:
            return _from_predictions(predictions, labels)
        if model is None:
            raise checks.ArgumentError(
                "model is None; allowed: a model, or predictions= and labels=. Pass one."
            )
        return open_subject(
            model, data, task=task, label=label, group=groups, bounds=bounds, device=device, memory=memory
        )

    elsewhere = None
    if cluster is not None:
        from perturbkit.audit.remote import on_cluster

        options = {
            "task": task,
            "label": label,
            "group": groups,
            "bounds": bounds,
            "device": device,
            "memory": memory,
        }
        elsewhere = on_cluster(cluster, model, data, options)
    return conduct(
        opened, request, gates=gates, baseline=baseline, formats=formats, resume=resume, elsewhere=elsewhere,
        progress=progress,
    )  # fmt: skip


def conduct(
    opened: Callable[[], Subject],
    request: AuditRequest,
    *,
    gates: str | Path | Mapping[str, Any] | None = None,
    baseline: str | Path | None = None,
    formats: Sequence[str] | None = None,
    resume: bool = False,
    started: float | None = None,
    elsewhere: Elsewhere | None = None,
    source: Mapping[str, Any] | None = None,
    progress: ProgressLike = None,
    announce: Callable[[Subject | Plan | Finding], None] = lambda news: None,
) -> Report:
    """Open a subject, audit it, judge it by gates, and save the report where the request says.

    Parameters
    ----------
    opened : callable
        Opens the subject. It is called once gates are read and the folder is ready, so that a refusal costs nothing
        and leaves no older report behind.
    request : AuditRequest
        What is asked.
    gates, baseline, formats, resume, progress
        As in :func:`run`.
    started : float, optional
        When the budget began to run, by ``time.monotonic``; now by default.
    elsewhere : callable, optional
        Runs sections on a cluster; see :mod:`perturbkit.audit.remote`.
    source : mapping, optional
        The arguments as a file holds them, for ``audit.lock.toml``; without it none is written.
    announce : callable
        Hears the subject, the plan and each finding as it is finished.
    """
    rules = () if gates is None else read_gates(gates)
    before = None if baseline is None else load_report(baseline)
    began = time.monotonic() if started is None else started
    if resume and request.out is None:
        raise checks.ArgumentError(
            "resume is True and out is None; allowed: with out. Name the folder of the report."
        )
    prepare_folder(request.out, keep_findings=resume)
    deadline = math.inf
    if request.budget is not None:
        deadline = began + request.budget - min(_WRITING_SECONDS, _WRITING_SHARE * request.budget)
    watch = Watch(deadline)
    try:
        with watch.on():
            opening = time.perf_counter()
            subject = opened()
            spent_opening = time.perf_counter() - opening
            announce(subject)
            report = _audit(subject, request, watch, resume, elsewhere, progress, announce)
        inside = report.times["inside"] + sum(watch.seconds.values())
    except DeadlineError:
        raise checks.ArgumentError(
            f"the budget of {request.budget:g} s was spent before the first section; allowed: more than opening the model "
            "and a few rows take. Allow more with --budget."
        ) from None
    report = replace(
        report, times={"opening": spent_opening, **report.times, "inside": inside}, source=dict(source or {})
    )
    if rules:
        report = replace(report, judgement=judge(report.findings, rules))
    if before is not None:
        report = replace(report, comparison=compare(before, report))
    if request.out is not None:
        report = replace(report, saved=report.write(request.out, formats))
        if not report.interrupted and not any(f.cut for f in report.findings):
            Parts(request.out / "findings" / "partial").clear()
    return report


def _audit(
    subject: Subject,
    request: AuditRequest,
    watch: Watch,
    resume: bool,
    elsewhere: Elsewhere | None,
    progress: ProgressLike,
    announce: Callable[[Subject | Plan | Finding], None],
) -> Report:
    started = time.perf_counter()
    kept = Kept(request.out)
    marks = fingerprint(subject, request)
    if resume:
        kept.check(marks)
    chosen = choose_rows(subject, request, kept.rows if resume else None)
    plan = make_plan(chosen, request)
    fits = _rows_in_time(plan, chosen, watch)
    if fits < chosen.n and not (resume and kept.rows):
        chosen = choose_rows(subject, request, fits)
        chosen.remarks = (*chosen.remarks, f"The time budget allowed {fits} rows.")
        plan = make_plan(chosen, request)
    kept.begin(marks, chosen.n)
    announce(plan)
    context = make_context(chosen, request, plan)
    planning = time.perf_counter() - started
    known = kept.findings() if resume else {}
    findings: list[Finding] = []
    interrupted = False
    started = time.perf_counter()

    def finished(finding: Finding) -> None:
        findings.append(finding)
        context.findings[finding.section] = finding
        kept.keep(finding)
        announce(finding)

    try:
        first = prepare(context, known)
        todo = [p for p in plan.sections if p.name not in known]
        if elsewhere is not None:
            for finding in known.values():
                finished(finding)
            for finding in elsewhere(request, todo, watch.deadline, chosen.n, tuple(known.values())):
                finished(finding)
        else:
            for planned in track(plan.sections, "audit", progress=progress):
                if planned.name in known:
                    finished(known[planned.name])
                    continue
                slice_ = _slice(planned, todo, watch)
                finished(
                    run_section(planned, context, slice_, first if planned is plan.sections[0] else Cost())
                )
                todo.remove(planned)
    except KeyboardInterrupt:
        interrupted = True
    except DeadlineError:
        findings += [_unreached(p.name) for p in plan.sections if p.name not in {f.section for f in findings}]
    order = {p.name: i for i, p in enumerate(plan.sections)}
    sections = time.perf_counter() - started
    inside = sum(f.model_seconds for f in findings)
    return Report(
        request=request, model=chosen.name, data=chosen.data_name, task=chosen.task, classes=len(chosen.classes),
        rows=chosen.n, rows_given=subject.n, findings=tuple(sorted(findings, key=lambda f: order[f.section])),
        seconds=sections, interrupted=interrupted, marks=marks,
        times={"planning": planning, "sections": sections, "inside": inside},
        examples=row_examples(chosen, findings),
    )  # fmt: skip


def make_context(subject: Subject, request: AuditRequest, plan: Plan) -> Context:
    """Return what the sections are given."""
    folder = None if request.out is None else request.out / "findings" / "partial"
    parts = Parts(folder, plan.operations, plan.each)
    return Context(request, subject, _with_explanations(plan.rows), parts)


def prepare(context: Context, known: Mapping[str, Finding]) -> Cost:
    """Evaluate what several sections share, so that what a section costs does not depend on the ones before it."""
    subject, before = context.subject, spent(context.subject.oracle)
    try:
        subject.scores()
    except DeadlineError:
        raise
    except (Exception, SystemExit):
        _log.debug("no scores", exc_info=True)  # a section that needs them meets the error again, and says so
    cost = spent(subject.oracle) - before
    if "explain" in known and "faithfulness" not in known and "faithfulness" in context.rows:
        with contextlib.suppress(checks.PerturbkitError, RuntimeError):
            _ = context.attributions
    return cost


def run_section(planned: PlannedSection, context: Context, deadline: float, shared: Cost) -> Finding:
    """Run one section until its deadline; ``shared`` is added to its cost."""
    name = planned.name
    if planned.refusal:
        return Finding(name, "not run", "This section did not run.", why=planned.refusal)
    module = section_module(name)
    before, started = spent(context.subject.oracle), time.perf_counter()
    context.parts.cut.clear()
    watch = Watch(deadline)
    try:
        with watch.on():
            finding = module.run(context)
        if context.parts.cut:
            done, wanted = context.parts.cut[-1]
            cut = f"Measured on {done} of {wanted} rows: the time budget was spent."
            finding = replace(finding, headline=f"{finding.headline} {cut}", cut=cut)
    except DeadlineError:
        finding = _unreached(name)
    except (Exception, SystemExit) as error:
        _log.debug("section %s failed", name, exc_info=True)
        why = f"{type(error).__name__}: {error}"
        finding = Finding(name, "failed", "This section failed; the others are not affected.", why=why)
    cost = spent(context.subject.oracle) - before + shared
    took = time.perf_counter() - started
    return replace(finding, cost=cost, seconds=took, model_seconds=sum(watch.seconds.values()))


def _unreached(name: str) -> Finding:
    why = "the time budget was spent before it had a first result. Allow more with --budget, or go on with --resume."
    return Finding(name, "not run", "This section did not run.", why=why, cut=why)


def _slice(planned: PlannedSection, todo: Sequence[PlannedSection], watch: Watch) -> float:
    """Return when a section must end, so that those after it have their share of the time that is left."""
    if math.isinf(watch.deadline):
        return math.inf
    least = 0.02 * max(sum(p.evaluations for p in todo), 50)
    weights = {p.name: 0.0 if p.refusal else p.evaluations + least for p in todo}
    total = sum(weights.values())
    share = weights[planned.name] / total if total else 0.0
    left = max(watch.left, 0.0)
    return time.monotonic() + max(left * share, min(_LEAST_SECONDS, left))


def _rows_in_time(plan: Plan, subject: Subject, watch: Watch) -> int:
    """Return how many rows can be answered once in a quarter of the time left: what every section begins with."""
    if math.isinf(watch.deadline) or plan.each <= 0:
        return subject.n
    return min(subject.n, max(2, int(0.25 * watch.left / plan.each)))


def _with_explanations(rows: dict[str, int]) -> dict[str, int]:
    """Plan rows for the explanations also where only faithfulness asks for them."""
    both = [rows[s] for s in ("explain", "faithfulness") if s in rows]
    return {**rows, "explain": min(both)} if both else rows


def choose_rows(subject: Subject, request: AuditRequest, n: int | None = None) -> Subject:
    """Draw the rows of the request or ``n``, the same share of every class; order as in the data."""
    limit = request.rows if n is None else n
    if limit is None or limit >= subject.n:
        return subject
    generator = torch.Generator().manual_seed(request.seed)
    order = torch.randperm(subject.n, generator=generator)
    # Ranking each row inside its class, by share of the class, takes evenly from all of them.
    place = torch.empty(subject.n)
    labels = subject.y[order]
    for label in labels.unique():
        rows = order[labels == label]
        place[rows] = (torch.arange(len(rows)) + torch.rand(1, generator=generator)) / len(rows)
    return subject.take(place.argsort()[:limit].sort().values)


def _from_predictions(predictions: Any, labels: Any) -> Subject:
    if labels is None:
        raise checks.ArgumentError("labels is None; allowed: one label a row of predictions. Pass labels=.")
    p = checks.probabilities("predictions", predictions)
    y = checks.labels("labels", torch.as_tensor(labels), n=len(p), n_classes=p.shape[1])
    return Subject(
        name="predictions", data_name="labels", task="predictions", y=y,
        classes=tuple(str(i) for i in range(p.shape[1])), given_probabilities=p,
    )  # fmt: skip
