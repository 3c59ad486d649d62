"""Logging to the local stores of MLflow and of Weights & Biases."""

import sys
import time
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


def test_a_run_of_wandb_is_written_to_a_folder_and_not_sent(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    p, y = _subjects.calibrated(200)
    report = audit.run(
        predictions=p, labels=y, seed=3, only=["calibration"], out=tmp_path / "out", progress=False
    )
    where = log_report(report, tmp_path / "out", "wandb")
    folder = Path(where.split(" at ")[1])
    assert folder.is_relative_to(tmp_path)
    assert folder.name.startswith("offline-run")
    (kept,) = folder.glob("*.wandb")
    # A process of its own writes the file, and on a busy machine ends after the run.
    until = time.monotonic() + 20
    while b"summary.md" not in (written := kept.read_bytes()) and time.monotonic() < until:
        time.sleep(0.1)
    ece = report["calibration"].metric("ece")
    for text in (
        b"calibration.ece.high",
        repr(ece.value).encode(),
        b"audit.calibration",
        b"report.html",
        b"summary.md",
    ):
        assert text in written, text


@pytest.fixture
def small(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    p, y = _subjects.calibrated(100)
    return audit.run(predictions=p, labels=y, only=["calibration"], out=tmp_path / "out", progress=False)


def test_a_service_that_refuses_is_told_with_where_the_report_is(small, tmp_path, monkeypatch):
    import wandb

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        checks.ArgumentError, match=r"could not be logged to wandb \(UsageError: No API key"
    ) as caught:
        log_report(small, tmp_path / "out", "wandb")
    assert str(tmp_path / "out") in str(caught.value)


def test_a_run_that_is_kept_nowhere_says_so(small, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    where = log_report(small, tmp_path / "out", "wandb")
    assert where.endswith("kept nowhere, since WANDB_MODE is disabled")


def test_a_missing_extra_and_an_unknown_log_are_named(monkeypatch):
    with pytest.raises(checks.ArgumentError, match="log is 'comet'; allowed"):
        require_log("comet")
    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(checks.MissingExtraError, match=rf"perturbkit\[{name}\]"):
            require_log(name)
