"""Logging an audit as a run of MLflow (extra ``mlflow``)."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from perturbkit.core import checks

if TYPE_CHECKING:
    from perturbkit.audit.report import Report

__all__ = ["LOGS", "log_report", "require_log"]

LOGS = ("mlflow",)
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
    checks.extra("mlflow", "mlflow")


def log_report(report: Report, folder: Path, name: str = "mlflow") -> str:
    """Log parameters, numbers with their intervals, and the files of ``folder``; return where.

    The run goes where ``MLFLOW_TRACKING_URI`` says, else into the folder ``mlruns``, and into the experiment that
    ``MLFLOW_EXPERIMENT_NAME`` names, else "perturbkit audit".
    """
    require_log(name)
    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        # A folder of files needs no server and no database; newer versions ask for this to be said.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow.set_tracking_uri(Path("mlruns").resolve().as_uri())
    mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "perturbkit audit"))
    request = report.request
    with mlflow.start_run(run_name=report.model) as run:
        parameters = {
            "model": report.model, "data": report.data, "task": report.task, "rows": report.rows,
            "profile": request.profile, "seed": request.seed, "norm": request.norm, "eps": request.eps,
            "alpha": request.alpha, "sections": " ".join(request.sections), "perturbkit": report.marks.get("version", ""),
        }  # fmt: skip
        mlflow.log_params({k: str(v)[:_LONGEST] for k, v in parameters.items()})
        numbers = {}
        for finding in report.findings:
            for m in finding.metrics:
                ends = {"": m.value, ".low": m.low, ".high": m.high}
                for end, value in ends.items():
                    if value is not None and math.isfinite(value):
                        numbers[f"{finding.section}.{m.name}{end}"] = float(value)
        mlflow.log_metrics(numbers)
        mlflow.set_tags({f"audit.{f.section}": f.status for f in report.findings})
        for path in sorted(folder.iterdir()):
            if path.is_file():
                mlflow.log_artifact(str(path))
        return f"run {run.info.run_id} at {mlflow.get_tracking_uri()}"
