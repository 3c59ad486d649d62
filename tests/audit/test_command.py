"""The command as a user meets it: output, files, exit codes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perturbkit.audit.request import SECTIONS

sys.path.insert(0, str(Path(__file__).parent))
import _subjects


def command(*arguments, cwd):
    environment = {**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "perturbkit", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a model, a table, predictions and gates."""
    here = tmp_path_factory.mktemp("work")
    (here / "mine.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def model():\n"
        "    net = nn.Sequential(nn.Linear(4, 2)).eval()\n"
        "    with torch.no_grad():\n"
        "        net[0].weight.copy_(torch.tensor([[-1., -1., 0, 0], [1., 1., 0, 0]]))\n"
        "        net[0].bias.zero_()\n"
        "    return net\n"
        "class Slow(nn.Module):\n"
        "    def forward(self, x):\n"
        "        import time; time.sleep(0.05)\n"
        "        return torch.stack([-x[:, 0], x[:, 0]], 1)\n"
        "def slow():\n"
        "    return Slow().eval()\n"
    )
    x, y = _subjects.table(40)
    rows = [",".join(f"{v:.4f}" for v in row) + f",{int(t)}" for row, t in zip(x, y, strict=True)]
    (here / "data.csv").write_text("\n".join(["a,b,<script>alert(1)</script>,d,label", *rows]) + "\n")
    p, labels = _subjects.calibrated(200)
    lines = [",".join(f"{v:.6f}" for v in row) + f",{t}" for row, t in zip(p, labels, strict=True)]
    (here / "predictions.csv").write_text("\n".join(["a,b,c,d,label", *lines]) + "\n")
    (here / "good.toml").write_text('"sanity.accuracy" = ">= 0.5"\n')
    (here / "bad.toml").write_text('"sanity.accuracy" = {min = 1.1, on = "estimate"}\n"attack.no" = ">= 0"\n')
    (here / "unknown.toml").write_text('"attack.no" = ">= 0"\n')
    return here


@pytest.fixture(scope="module")
def ran(folder):
    return command(
        "audit", "run", "mine:model", "data.csv", "--gates", "good.toml", "--out", "one", cwd=folder
    )


def test_one_line_a_section_off_a_terminal(ran):
    assert ran.returncode == 0, ran.stderr
    names = [line.split()[0] for line in ran.stderr.splitlines() if line[:1].isalpha()]
    assert names == ["model", "data", "plan", *SECTIONS, "time", "gate"]
    assert ran.stdout.startswith("wrote one/report.html")
    assert "\x1b" not in ran.stderr


def test_files_are_written_and_read_again(ran, folder):
    from perturbkit.audit import load_report

    data = json.loads((folder / "one" / "audit.json").read_text())
    assert data["schema"] == 1
    again = load_report(folder / "one" / "audit.json")
    assert [f.section for f in again.findings] == [f["section"] for f in data["findings"]]
    assert again.to_dict() == data
    assert again.figure("attack").axes
    header = (folder / "one" / "metrics.csv").read_text().splitlines()[0]
    assert header == "section,metric,value,low,high,control,n,method,status,nfev,ngrad"


def test_text_from_data_is_escaped(ran, folder):
    page = (folder / "one" / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert len(page.encode()) <= 5_000_000
    # A link to a paper may stand in it; nothing is fetched.
    assert not re.search(r"""(src|<link[^>]*href)\s*=\s*["']?https?:|url\(\s*["']?https?:""", page)


@pytest.mark.parametrize(("gates", "code"), [("good.toml", 0), ("bad.toml", 1), ("unknown.toml", 3)])
def test_judging_a_saved_audit(ran, folder, gates, code):
    judged = command("audit", "check", "one/audit.json", "--gates", gates, cwd=folder)
    assert judged.returncode == code, judged.stderr


def test_a_failed_gate_decides_the_exit_code_and_the_report_is_written(folder):
    ended = command(
        "audit",
        "run",
        "mine:model",
        "data.csv",
        "--only",
        "sanity",
        "--gates",
        "bad.toml",
        "--out",
        "two",
        cwd=folder,
    )
    assert ended.returncode == 1
    assert "inconclusive" in (folder / "two" / "report.html").read_text()


def test_predictions_only(folder):
    ended = command("audit", "run", "predictions.csv", "--out", "three", "--quiet", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    statuses = {
        f["section"]: f["status"]
        for f in json.loads((folder / "three" / "audit.json").read_text())["findings"]
    }
    assert statuses["attack"] == "not run"
    assert statuses["conformal"] in ("ok", "weak")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("audit", "run", "mine:model", "gone.csv"), 4, "there is no gone.csv"),
        (("audit", "run", "model.pkl", "data.csv"), 4, "a pickle"),
        (("audit", "run", "mine:model", "data.csv", "--label", "price"), 4, "no column 'price'"),
        (("audit", "run", "mine:model", "data.csv", "--profile", "fast"), 2, "profile is 'fast'"),
        (("audit", "run", "mine:model", "data.csv", "--eps", "a/b"), 2, "not a number"),
        (("audit", "run", "mine:model", "data.csv", "--bounds", "1"), 2, "LOW,HIGH"),
        (("audit", "run", "mine:model", "data.csv", "--gates", "none.toml"), 2, "there is no none.toml"),
        (("audit", "run", "mine:model", "data.csv", "--memory", "lots"), 2, "memory is 'lots'"),
        (("audit", "demo", "video"), 2, "demo is 'video'"),
        (("audit", "run", "mine:model", "data.csv", "--budget", "soon"), 2, "budget is 'soon'"),
        (("audit", "run", "mine:model", "data.csv", "--format", "pdf"), 2, "format is 'pdf'"),
        (("audit", "run", "mine:model", "data.csv", "--log", "paper"), 2, "log is 'paper'"),
        (("audit", "run", "mine:model", "data.csv", "--cluster", "here"), 2, "tcp://HOST:PORT"),
        (
            ("audit", "run", "mine:model", "data.csv", "--device", "here"),
            2,
            "device is 'here', which cannot be used",
        ),
        (("audit", "demo", "tabular", "--device", "here"), 2, "device is 'here', which cannot be used"),
        (("audit", "compare", "gone.json", "data.csv"), 4, "there is no gone.json"),
        (("audit", "check", "data.csv", "--gates", "good.toml"), 4, "not an audit.json"),
        (("audit", "run", "mine:model", "data.csv", "--out", "data.csv"), 2, "cannot be written"),
    ],
)
def test_refusals_name_value_range_and_remedy(folder, arguments, code, text):
    ended = command(*arguments, cwd=folder)
    assert ended.returncode == code, (ended.stdout, ended.stderr)
    assert text in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr


def test_a_plan_says_what_it_would_cost_and_writes_nothing(folder):
    before = sorted(folder.rglob("*"))
    planned = command("audit", "plan", "mine:slow", "data.csv", "--budget", "1s", cwd=folder)
    assert planned.returncode == 0, planned.stderr
    words = {line.split()[0]: line for line in planned.stdout.splitlines() if line.strip()}
    assert set(SECTIONS) <= set(words)
    assert "weights" in words["memory"]
    assert "not enough" in words["budget"]
    assert sorted(folder.rglob("*")) == before
    of_predictions = command("audit", "plan", "predictions.csv", cwd=folder)
    assert "needs the model" in of_predictions.stdout


def test_a_file_of_arguments_is_written_run_overridden_and_locked(folder):
    made = command("audit", "init", "mine:model", "data.csv", cwd=folder)
    assert made.returncode == 0, made.stderr
    again = command("audit", "init", "mine:model", "data.csv", cwd=folder)
    assert again.returncode == 2
    assert "exists" in again.stderr
    text = (folder / "audit.toml").read_text()
    (folder / "audit.toml").write_text(
        text.replace("seed = 0", "seed = 5").replace(
            '# "sanity.accuracy" = ">= 0.8"', '"sanity.accuracy" = ">= 0.5"'
        )
    )
    plain = command("audit", "run", "--only", "sanity", "--only", "attack", "--out", "filed", cwd=folder)
    (folder / "audit.toml").rename(folder / "kept.toml")
    assert plain.returncode == 0, plain.stderr
    assert "audit.toml" in plain.stderr.splitlines()[0]
    data = json.loads((folder / "filed" / "audit.json").read_text())
    assert data["request"]["seed"] == 5
    assert data["request"]["sections"] == ["sanity", "attack"]
    assert data["judgement"]["results"]["tuple"][0]["verdict"] == "passed"
    locked = command(
        "audit", "run", "--config", "filed/audit.lock.toml", "--seed", "6", "--out", "locked", cwd=folder
    )
    assert locked.returncode == 0, locked.stderr
    assert "lock " not in locked.stderr
    repeated = json.loads((folder / "locked" / "audit.json").read_text())
    assert repeated["request"]["seed"] == 6
    assert repeated["marks"]["model"] == data["marks"]["model"]
    (folder / "data.csv").rename(folder / "old.csv")
    (folder / "data.csv").write_text("\n".join((folder / "old.csv").read_text().splitlines()[:-3]))
    other = command(
        "audit", "run", "--config", "filed/audit.lock.toml", "--only", "sanity", "--out", "x", cwd=folder
    )
    (folder / "old.csv").replace(folder / "data.csv")
    assert "the data is not that of the lock file" in other.stderr
    nothing = command("audit", "run", cwd=folder)
    assert nothing.returncode == 2
    assert "perturbkit audit init" in nothing.stderr


def test_two_audits_are_compared(ran, folder):
    table = command(
        "audit", "compare", "one/audit.json", "one/audit.json", "--all", "--out", "c.html", cwd=folder
    )
    assert table.returncode == 0, table.stderr
    assert "attack.radius.median" in table.stdout
    assert "0 of" in table.stdout.splitlines()[-2]
    assert "attack.<wbr>radius" in (folder / "c.html").read_text()
    data = json.loads((folder / "one" / "audit.json").read_text())
    for finding in data["findings"]:
        if finding["section"] == "attack":
            metric = finding["metrics"]["tuple"][0]
            metric |= {"value": 0.001, "low": 0.0005, "high": 0.002}
    (folder / "worse.json").write_text(json.dumps(data))
    worse = command("audit", "compare", "one/audit.json", "worse.json", "--out", "c.json", cwd=folder)
    assert worse.returncode == 1
    assert "worse" in worse.stdout
    assert json.loads((folder / "c.json").read_text())["type"] == "AuditComparison"
    refused = command("audit", "compare", "one/audit.json", "worse.json", "--out", "c.txt", cwd=folder)
    assert refused.returncode == 2


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_interrupting_writes_the_partial_report(folder):
    running = subprocess.Popen(
        [sys.executable, "-m", "perturbkit", "audit", "run", "mine:slow", "data.csv", "--out", "four"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    finding = folder / "four" / "findings" / "sanity.json"
    until = time.monotonic() + 120
    while not finding.exists() and time.monotonic() < until:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert "interrupted" in errors
    data = json.loads((folder / "four" / "audit.json").read_text())
    assert data["interrupted"]
    assert data["findings"]
