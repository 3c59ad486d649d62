"""Comparing two audits: what is called a change, and what is not."""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

import perturbkit.audit as audit
from perturbkit.audit.compare import compare
from perturbkit.audit.finding import Finding, Metric
from perturbkit.audit.report import Report
from perturbkit.audit.request import AuditRequest
from perturbkit.core import checks

sys.path.insert(0, str(Path(__file__).parent))
import _subjects


def report(*metrics, section="calibration", **changes):
    finding = Finding(section, "ok", "Fine.", metrics)
    fields = {
        "request": AuditRequest(sections=(section,)), "model": "m", "data": "d", "task": "predictions", "classes": 2,
        "rows": 10, "rows_given": 10, "findings": (finding,), "seconds": 1.0, **changes,
    }  # fmt: skip
    return Report(**fields)


@pytest.mark.parametrize(
    ("name", "old", "new", "verdict"),
    [
        ("ece", (0.10, 0.08, 0.12), (0.11, 0.09, 0.13), "same"),
        ("ece", (0.10, 0.08, 0.12), (0.20, 0.18, 0.22), "worse"),
        ("ece", (0.20, 0.18, 0.22), (0.10, 0.08, 0.12), "better"),
        ("accuracy", (0.9, 0.88, 0.92), (0.8, 0.78, 0.82), "worse"),
        ("radius.median", (0.1, 0.09, 0.11), (0.3, 0.29, math.inf), "better"),
        ("overconfidence", (0.1, 0.09, 0.11), (0.3, 0.29, 0.31), "changed"),
        ("nll", (0.5, None, None), (0.6, None, None), "no interval"),
        ("nll", (0.5, None, None), (0.5, None, None), "same"),
        ("ece", (0.10, 0.08, 0.12), None, "lost"),
        ("ece", (0.10, 0.08, 0.12), (math.nan, None, None), "lost"),
        ("ece", None, (0.10, 0.08, 0.12), "gained"),
        # Fewer sure mistakes, and a smaller loss or error, are better.
        ("wrong.sure", (0.30, 0.25, 0.35), (0.05, 0.02, 0.10), "better"),
        ("loss.mean", (0.9, 0.8, 1.0), (0.3, 0.2, 0.4), "better"),
        ("error.mean", (0.3, 0.2, 0.4), (0.9, 0.8, 1.0), "worse"),
        ("gradient.misled", (0.0, 0.0, 0.1), (0.9, 0.8, 1.0), "worse"),
        # Ends that touch are one point in common.
        ("ece", (0.10, 0.08, 0.12), (0.13, 0.12, 0.14), "same"),
    ],
)
def test_verdicts(name, old, new, verdict):
    sides = [() if v is None else (Metric(name, *v),) for v in (old, new)]
    found = compare(report(*sides[0]), report(*sides[1]))
    assert [c.verdict for c in found.changes] == [verdict]
    assert found.exit_code == (1 if verdict in ("worse", "changed", "lost") else 0)
    assert len(found.beyond_noise) == (verdict in ("worse", "better", "changed", "lost"))


def test_names_and_words_from_a_file_are_printed_as_they_stand(capsys):
    from perturbkit.audit.command import _print_comparison

    # Brackets with letters inside are marks of style to rich.
    new = Metric("radius.median", math.inf, math.inf, math.inf)
    _print_comparison(compare(report(Metric("[/x]", 0.1)), report(new, Metric("[/x]", 0.1))), every=True)
    shown = capsys.readouterr().out
    assert "beyond reach [beyond reach, beyond reach]" in shown
    assert "calibration.[/x]" in shown


def test_a_section_that_was_not_asked_for_is_no_loss():
    old = report(Metric("ece", 0.1, 0.0, 0.2))
    new = report(Metric("accuracy", 0.1, 0.0, 0.2), section="sanity")
    found = compare(old, new)
    assert [c.key for c in found.changes] == ["sanity.accuracy"]


def test_noise_is_rarely_called_a_change_and_a_real_change_is():
    rng = np.random.default_rng(0)
    only = ["calibration"]
    p, y = _subjects.calibrated(4000, seed=1)
    parts = [rng.permutation(4000)[:400] for _ in range(8)]
    reports = [audit.run(predictions=p[i], labels=y[i], only=only, progress=False) for i in parts]
    changes = [compare(a, b) for a, b in itertools.pairwise(reports)]
    assert sum(len(c.beyond_noise) for c in changes) <= 1
    sharp = p**6 / (p**6).sum(1, keepdims=True)
    spoiled = audit.run(predictions=sharp[parts[0]], labels=y[parts[0]], only=only, progress=False)
    worse = {c.key for c in compare(reports[0], spoiled).worse}
    assert "calibration.ece" in worse


def test_what_else_differs_is_noted():
    found = compare(report(), report(data="e", request=AuditRequest(seed=3, sections=("calibration",))))
    assert found.notes == ("The data differs: d before, e now.", "The seed differs: 0 before, 3 now.")
    marked = compare(report(marks={"data": "a"}), report(marks={"data": "b"}))
    assert marked.notes == ("The data has the same name but other contents.",)


def test_a_baseline_decides_the_exit_code_and_is_saved(tmp_path):
    p, y = _subjects.calibrated()
    only = ["calibration"]
    audit.run(predictions=p, labels=y, only=only, out=tmp_path / "old", progress=False)
    sharp = p**6 / (p**6).sum(1, keepdims=True)
    baseline = tmp_path / "old" / "audit.json"
    new = audit.run(
        predictions=sharp, labels=y, only=only, baseline=baseline, gates={"calibration.ece": ">= 0"},
        out=tmp_path / "new", progress=False,
    )  # fmt: skip
    assert new.exit_code == 1
    assert new.judgement.passed
    again = audit.load_report(tmp_path / "new" / "audit.json")
    assert again.comparison.exit_code == 1
    assert again.to_dict() == json.loads((tmp_path / "new" / "audit.json").read_text())
    assert "changed beyond noise" in (tmp_path / "new" / "summary.md").read_text()
    page = (tmp_path / "new" / "report.html").read_text()
    assert "Against the baseline" in page
    assert ">worse</td>" in page
    assert "Against the baseline" not in (tmp_path / "old" / "report.html").read_text()
    same = audit.run(predictions=p, labels=y, only=only, baseline=baseline, progress=False)
    assert same.exit_code == 0
    with pytest.raises(checks.DataError, match="there is no"):
        audit.run(predictions=p, labels=y, only=only, baseline="gone.json", progress=False)
