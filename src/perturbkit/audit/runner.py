"""Running an audit: open, plan, run section after section, judge."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from perturbkit.audit.context import Context, spent
from perturbkit.audit.finding import Finding
from perturbkit.audit.gates import judge, read_gates
from perturbkit.audit.opening import open_subject
from perturbkit.audit.plan import Plan, make_plan, section_module
from perturbkit.audit.report import Report
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Subject
from perturbkit.core import checks
from perturbkit.core.progress import ProgressLike, track

__all__ = ["conduct", "run"]

_log = logging.getLogger("perturbkit")


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
    gates: str | Path | Mapping[str, Any] | None = None,
    device: str | None = None,
    memory: str | int | None = None,
    out: str | Path | None = None,
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
    gates : str, Path or mapping, optional
        Requirements; see :mod:`perturbkit.audit.gates`.
    device, memory : str, optional
        Where the model runs, and the memory of one batch ("2GB").
    out : str or Path, optional
        Folder to save findings in as they are finished, and the report at the end.
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
        out=None if out is None else Path(out),
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

    return conduct(opened, request, gates=gates, progress=progress)


def conduct(
    opened: Callable[[], Subject],
    request: AuditRequest,
    *,
    gates: str | Path | Mapping[str, Any] | None = None,
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
    gates, progress
        As in :func:`run`.
    announce : callable
        Hears the subject, the plan and each finding as it is finished.
    """
    rules = () if gates is None else read_gates(gates)
    _prepare_folder(request.out)
    subject = opened()
    announce(subject)
    report = _audit(subject, request, progress, announce)
    if rules:
        report = replace(report, judgement=judge(report.findings, rules))
    if request.out is not None:
        report.save(request.out)
    return report


def _audit(
    subject: Subject,
    request: AuditRequest,
    progress: ProgressLike,
    announce: Callable[[Subject | Plan | Finding], None],
) -> Report:
    chosen = _choose_rows(subject, request)
    plan = make_plan(chosen, request)
    announce(plan)
    context = Context(request, chosen, _with_explanations(plan.rows))
    findings: list[Finding] = []
    interrupted = False
    started = time.perf_counter()
    try:
        for planned in track(plan.sections, "audit", progress=progress):
            finding = _run_section(planned.name, planned.refusal, context)
            findings.append(finding)
            _keep(finding, request.out)
            announce(finding)
    except KeyboardInterrupt:
        interrupted = True
    return Report(
        request=request, model=chosen.name, data=chosen.data_name, task=chosen.task, classes=len(chosen.classes),
        rows=chosen.n, rows_given=subject.n, findings=tuple(findings), seconds=time.perf_counter() - started,
        interrupted=interrupted,
    )  # fmt: skip


def _run_section(name: str, refusal: str, context: Context) -> Finding:
    if refusal:
        return Finding(name, "not run", "This section did not run.", why=refusal)
    module = section_module(name)
    before, started = spent(context.subject.oracle), time.perf_counter()
    try:
        finding = module.run(context)
    except (Exception, SystemExit) as error:
        _log.debug("section %s failed", name, exc_info=True)
        why = f"{type(error).__name__}: {error}"
        finding = Finding(name, "failed", "This section failed; the others are not affected.", why=why)
    cost = spent(context.subject.oracle) - before
    return replace(finding, cost=cost, seconds=time.perf_counter() - started)


def _with_explanations(rows: dict[str, int]) -> dict[str, int]:
    """Plan rows for the explanations also where only faithfulness asks for them."""
    both = [rows[s] for s in ("explain", "faithfulness") if s in rows]
    return {**rows, "explain": min(both)} if both else rows


def _choose_rows(subject: Subject, request: AuditRequest) -> Subject:
    """Draw the rows, the same share of every class; order as in the data."""
    limit = request.rows
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


def _prepare_folder(out: Path | None) -> None:
    """Make the folder of the report before anything is spent, without the files of an earlier audit."""
    if out is None:
        return
    folder = out / "findings"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (
            *folder.glob("*.json"),
            *(out / name for name in ("report.html", "audit.json", "metrics.csv")),
        ):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise checks.ArgumentError(
            f"out is {out}, which cannot be written ({error.strerror}); allowed: a folder of yours. Choose another."
        ) from error


def _keep(finding: Finding, out: Path | None) -> None:
    """Save a finding as it is finished, so that a crash loses none."""
    if out is None:
        return
    folder = out / "findings"
    part = folder / f"{finding.section}.json.part"
    part.write_text(json.dumps(finding.to_dict()), encoding="utf-8")
    part.replace(folder / f"{finding.section}.json")
