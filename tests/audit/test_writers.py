"""The files of a report: valid, escaped, and with what was measured."""

import csv
import io
import json
import math
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import perturbkit.audit as audit
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.gates import judge, read_gates
from perturbkit.audit.report import Report
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.writers import junit, summary_md
from perturbkit.core import checks

sys.path.insert(0, str(Path(__file__).parent))
import _subjects

NASTY = 'a <b>&"x"</b> | `c` \x00\x1b[31m @you #1 \n ü'


def nasty():
    findings = (
        Finding("sanity", "ok", NASTY, (Metric("accuracy", 0.5, 0.4, 0.6, 9),)),
        Finding("attack", "failed", "Failed.", why=NASTY),
        Finding("certify", "not run", "Not run.", why="no"),
    )
    gates = read_gates({"sanity.accuracy": ">= 0.45", "sanity.accuracy.no": ">= 0", "attack.x": ">= 0"})
    return Report(
        request=AuditRequest(), model=NASTY, data=NASTY, task="image", classes=2, rows=1, rows_given=1,
        findings=findings, seconds=1.0, judgement=judge(findings, gates),
    )  # fmt: skip


def test_junit_counts_and_escapes():
    root = ElementTree.fromstring(junit(nasty()))
    suites = {s.get("name"): s for s in root}
    sections, gates = suites["sections"], suites["gates"]
    assert (sections.get("tests"), sections.get("errors"), sections.get("skipped")) == ("3", "1", "1")
    assert (gates.get("tests"), gates.get("failures"), gates.get("errors")) == ("3", "1", "2")
    failed = sections.find("testcase[@name='attack']/error")
    assert "<b>" in failed.get("message")
    assert "\x00" not in failed.get("message")
    assert "\x1b" not in failed.get("message")


def test_a_name_that_is_no_text_is_written_with_a_mark_in_its_place(tmp_path):
    # What Python makes of a file name of other bytes than UTF-8.
    name = "bad\udcff.csv"
    changed = {"data": name, "source": {"data": name}, "findings": nasty().findings[1:]}
    report = Report(**{**nasty().__dict__, **changed})
    for path in report.write(tmp_path):
        path.read_text(encoding="utf-8")
    assert "bad?.csv" in (tmp_path / "report.html").read_text()
    assert tomllib.loads((tmp_path / "audit.lock.toml").read_text())["data"].endswith("bad?.csv")


def test_summary_shows_text_as_it_is_and_keeps_the_table():
    lines = summary_md(nasty()).splitlines()
    assert "<b>" not in "".join(lines)
    assert "@you" not in "".join(lines)
    for line in lines:
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") in (4, 5)


def test_every_file_is_written_and_can_be_chosen(tmp_path):
    x, y = _subjects.table(30)
    report = audit.run(
        _subjects.linear(), (x, y), n=20, only=["sanity", "attack"], out=tmp_path / "all", progress=False
    )
    names = {p.name for p in (tmp_path / "all").iterdir() if p.is_file()}
    # A model that was an object cannot be named by a lock file.
    assert names == {"report.html", "audit.json", "metrics.csv", "examples.csv", "junit.xml", "summary.md"}
    report.save(tmp_path / "few", formats=["md", "junit"])
    assert {p.name for p in (tmp_path / "few").iterdir()} == {"junit.xml", "summary.md"}
    with pytest.raises(checks.ArgumentError, match="format is 'pdf'"):
        report.save(tmp_path / "few", formats=["pdf"])


def test_examples_name_rows_of_the_data_as_given(tmp_path):
    x, y = _subjects.table(50)
    net = _subjects.linear()
    audit.run(net, (x, y), n=20, only=["sanity", "attack"], out=tmp_path, progress=False)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "examples.csv").read_text())))
    assert len(lines) == 20
    assert max(int(line["row"]) for line in lines) >= 20
    for line in lines:
        row = int(line["row"])
        p = net(x[row : row + 1]).detach().softmax(1)[0]
        assert line["label"] == str(int(y[row]))
        assert line["answer"] == str(int(p.argmax()))
        assert float(line["probability of the label"]) == pytest.approx(float(p[y[row]]), abs=1e-5)
        assert float(line["attack radius"]) >= 0


def test_a_table_of_examples_survives_the_file(tmp_path):
    report = audit.run(_subjects.linear(), _subjects.table(20), only=["attack"], out=tmp_path, progress=False)
    again = audit.load_report(tmp_path / "audit.json")
    assert isinstance(again.examples, Table)
    assert again.examples.columns == report.examples.columns
    assert again.examples.rows == report.examples.rows


def test_an_older_file_without_the_newer_parts_is_read(tmp_path):
    report = audit.run(_subjects.linear(), _subjects.table(20), only=["sanity"], out=tmp_path, progress=False)
    data = json.loads((tmp_path / "audit.json").read_text())
    for key in ("comparison", "times", "examples", "marks", "source"):
        del data[key]
    (tmp_path / "old.json").write_text(json.dumps(data))
    old = audit.load_report(tmp_path / "old.json")
    assert math.isnan(old.share_inside)
    assert old.findings[0].to_dict() == report.findings[0].to_dict()


def test_the_share_of_time_inside_the_model():
    class Slow(torch.nn.Module):
        def forward(self, x):
            __import__("time").sleep(0.01)
            return torch.stack([-x[:, 0], x[:, 0]], 1)

    slow = audit.run(Slow(), _subjects.table(20), only=["attack"], progress=False)
    assert 0.5 < slow.share_inside <= 1
    assert slow.times["inside"] <= slow.times["opening"] + slow.times["planning"] + slow.times["sections"]


def test_a_lock_file_is_toml_and_holds_what_was_asked(tmp_path):
    from dataclasses import replace

    from perturbkit.audit.config import lock, read_config

    source = {
        "model": str(tmp_path / 'my "best" model.pt2'), "data": str(tmp_path / "data.csv"), "label": NASTY.replace("\x00", ""),
        "only": ["sanity"], "eps": "8/255", "gates": {"calibration.ece": "<= 0.1", "sanity.accuracy": {"min": 0.5}},
    }  # fmt: skip
    report = replace(nasty(), source=source, marks={"model": "m", "data": "d"})
    (tmp_path / "audit").mkdir()
    path = tmp_path / "audit" / "audit.lock.toml"
    path.write_text(lock(report, path.parent))
    assert tomllib.loads(path.read_text())["data"] == "../data.csv"
    again = read_config(path)
    locked = again.pop("locked")
    assert again == source
    assert locked["model"] == "m"


FORMULAS = (
    "=1+1",
    "+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "-",
    "-1_0",
    "+inf",
    "\uff1d1",
)


def test_no_cell_of_the_data_is_a_formula(tmp_path):
    """Text from the data begins with an apostrophe where a spreadsheet would run it; numbers stay numbers."""
    n = len(FORMULAS)
    rows = [(i, text, -0.5, math.inf, None, "-1.5e3") for i, text in enumerate((*FORMULAS, "a\r=1+1"))]
    examples = Table(("row", "group", "error", "attack radius", "empty", "label"), tuple(rows))
    findings = (
        Finding("sanity", "ok", "Fine.", (Metric("accuracy", -0.5, -0.6, 0.6, n, method="=HYPERLINK(1)"),)),
    )
    report = Report(**{**nasty().__dict__, "examples": examples, "findings": findings, "judgement": None})
    report.write(tmp_path, ["csv"])
    with open(tmp_path / "examples.csv", newline="") as file:
        read = list(csv.reader(file))
    assert [line[1] for line in read[1:]] == ["'" + text.replace("\r", "\n") for text in FORMULAS] + [
        "a\n=1+1"
    ]
    assert all(line[2:] == ["-0.5", "inf", "", "-1.5e3"] for line in read[1:])
    with open(tmp_path / "metrics.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["method"], line["value"], line["low"]) == ("'=HYPERLINK(1)", "-0.5", "-0.6")
    assert examples.rows[0][1] == "=1+1"


def test_formulas_in_groups_and_classes_of_a_table_are_defused(tmp_path):
    x, y = _subjects.table(20)
    lines = [
        ",".join([*(f"{v:.4f}" for v in row), "=evil" if t else "+more", '"=cmd()"'])
        for row, t in zip(x, y, strict=True)
    ]
    (tmp_path / "d.csv").write_text("\n".join(["a,b,c,d,label,site", *lines]) + "\n")
    audit.run(
        _subjects.linear(), str(tmp_path / "d.csv"), groups="site", only=["sanity", "attack"], out=tmp_path / "o",
        progress=False,
    )  # fmt: skip
    with open(tmp_path / "o" / "examples.csv", newline="") as file:
        for line in csv.DictReader(file):
            assert line["label"] in ("'=evil", "'+more")
            assert line["group"] == "'=cmd()"
            assert float(line["attack radius"]) >= 0
    for name in ("examples.csv", "metrics.csv"):
        with open(tmp_path / "o" / name, newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not [c for c in cells if c.startswith(("=", "+", "@", "\t", "\r"))]
