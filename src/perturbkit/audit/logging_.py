"""Logging an audit as a run of MLflow (extra ``mlflow``) or of Weights & Biases (extra ``wandb``)."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from perturbkit.audit.opening._opened import first_line
from perturbkit.core import checks

if TYPE_CHECKING:
    from perturbkit.audit.report import Report

__all__ = ["LOGS", "log_report", "require_log"]

LOGS = ("mlflow", "wandb")
_LONGEST = 500


def require_log(name: str) -> None:
    """Refuse what cannot be logged to, before anything is spent.

    Raises
    ------
    ArgumentError
        If the name is unknown.
    MissingExtraError
        If the package that it needs is not installed.
    """
    checks.one_of("log", name, LOGS)
    checks.extra(name, name)


def log_report(report: Report, folder: Path, name: str = "mlflow") -> str:
    """Log parameters, numbers with their intervals, verdicts and the files of ``folder``; return where.

    Nothing leaves the machine unless it is asked to. MLflow's run goes where ``MLFLOW_TRACKING_URI`` says, else into the
    folder ``mlruns``, and into the experiment that ``MLFLOW_EXPERIMENT_NAME`` names, else "perturbkit audit". The run of
    Weights & Biases is written into the folder ``wandb``, to be sent by ``wandb sync``, unless ``WANDB_MODE`` says
    otherwise, and belongs to the project that ``WANDB_PROJECT`` names, else "perturbkit-audit".

    Parameters
    ----------
    report : Report
        The audit.
    folder : Path
        Where its files are.
    name : str
        One of ``LOGS``.

    Returns
    -------
    str
        The run and its place.

    Raises
    ------
    ArgumentError, MissingExtraError
        As for :func:`require_log`, or if the service does not take the run.
    """
    require_log(name)
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    verdicts = {f"audit.{f.section}": f.status for f in report.findings}
    log = {"mlflow": _to_mlflow, "wandb": _to_wandb}[name]
    try:
        return log(report.model, _parameters(report), _numbers(report), verdicts, files)
    except Exception as error:
        raise checks.ArgumentError(
            f"the audit could not be logged to {name} ({type(error).__name__}: {first_line(error)}); allowed: a service that "
            f"can be reached and takes the run. The report itself is in {folder}; check the variables "
            f"{'MLFLOW_' if name == 'mlflow' else 'WANDB_'}... of the environment."
        ) from error


def _parameters(report: Report) -> dict[str, str]:
    request = report.request
    parameters = {
        "model": report.model, "data": report.data, "task": report.task, "rows": report.rows,
        "profile": request.profile, "seed": request.seed, "norm": request.norm, "eps": request.eps,
        "alpha": request.alpha, "sections": " ".join(request.sections), "perturbkit": report.marks.get("version", ""),
    }  # fmt: skip
    return {k: str(v)[:_LONGEST] for k, v in parameters.items()}


def _numbers(report: Report) -> dict[str, float]:
    numbers = {}
    for finding in report.findings:
        for m in finding.metrics:
            for end, value in (("", m.value), (".low", m.low), (".high", m.high)):
                if value is not None and math.isfinite(value):
                    numbers[f"{finding.section}.{m.name}{end}"] = float(value)
    return numbers


def _to_mlflow(
    title: str, parameters: dict[str, str], numbers: dict[str, float], verdicts: dict[str, str], files: list[Path]
) -> str:  # fmt: skip
    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        # A folder of files needs no server and no database; newer versions ask for this to be said.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow.set_tracking_uri(Path("mlruns").resolve().as_uri())
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "perturbkit audit"))
    with mlflow.start_run(run_name=title) as run:
        mlflow.log_params(parameters)
        mlflow.log_metrics(numbers)
        mlflow.set_tags(verdicts)
        for path in files:
            mlflow.log_artifact(str(path))
        return f"run {run.info.run_id} at {mlflow.get_tracking_uri()}"


def _to_wandb(
    title: str, parameters: dict[str, str], numbers: dict[str, float], verdicts: dict[str, str], files: list[Path]
) -> str:  # fmt: skip
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "perturbkit-audit"),
        name=title,
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
        config=parameters,
        settings=wandb.Settings(silent=True, console="off"),
    )
    try:
        run.summary.update({**numbers, **verdicts})
        kept = wandb.Artifact("audit", type="audit")
        for path in files:
            kept.add_file(str(path))
        run.log_artifact(kept)
        kept_at = run.url if not run.offline else Path(run.dir).resolve().parent
        place = ", kept nowhere, since WANDB_MODE is disabled" if kept_at is None else f" at {kept_at}"
    finally:
        run.finish()
    return f"run {run.id}{place}"
