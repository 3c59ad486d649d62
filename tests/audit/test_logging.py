"""Logging to MLflow's local store of files."""

import sys
from pathlib import Path

import pytest

import perturbkit.audit as audit
from perturbkit.audit.logging_ import log_report, require_log
from perturbkit.core import checks

sys.path.insert(0, str(Path(__file__).parent))
import _subjects


def test_parameters_numbers_and_files_are_logged(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    store = (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(store)
    p, y = _subjects.calibrated(200)
    report = audit.run(
        predictions=p,
        labels=y,
        seed=3,
        only=["calibration", "conformal"],
        out=tmp_path / "out",
        progress=False,
    )
    where = log_report(report, tmp_path / "out")
    run = mlflow.get_run(where.split()[1])
    assert run.data.params["seed"] == "3"
    ece = report["calibration"].metric("ece")
    assert run.data.metrics["calibration.ece"] == pytest.approx(ece.value)
    assert run.data.metrics["calibration.ece.high"] == pytest.approx(ece.high)
    assert run.data.tags["audit.calibration"] == report["calibration"].status
    names = {a.path for a in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert {"report.html", "audit.json", "metrics.csv", "junit.xml", "summary.md"} <= names


def test_a_missing_extra_and_an_unknown_log_are_named(monkeypatch):
    with pytest.raises(checks.ArgumentError, match="log is 'wandb'; allowed"):
        require_log("wandb")
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(checks.MissingExtraError, match=r"perturbkit\[mlflow\]"):
        require_log("mlflow")
