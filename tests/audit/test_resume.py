"""An audit that is killed goes on with --resume, to the same numbers; a budget is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import perturbkit.audit as audit
from perturbkit.core import checks

sys.path.insert(0, str(Path(__file__).parent))
import _subjects

MODEL = """
import time
import torch
from torch import nn

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 1.0, 0.1, 0.0]))
    def forward(self, x):
        time.sleep(SLEEP * len(x))
        margin = x @ self.weight
        return torch.stack([-margin, margin], 1)

def model():
    return Slow().eval()
"""
SECTIONS = ("sanity", "explain", "faithfulness", "attack", "certify", "calibration", "corruption")


def folder(path, sleep, rows=70):
    (path / "mine.py").write_text(MODEL.replace("SLEEP", str(sleep)))
    x, y = _subjects.table(rows)
    lines = [",".join(f"{v:.4f}" for v in row) + f",{int(t)}" for row, t in zip(x, y, strict=True)]
    (path / "data.csv").write_text("\n".join(["a,b,c,d,label", *lines]) + "\n")
    return path


def start(cwd, *arguments):
    only = [word for section in SECTIONS for word in ("--only", section)]
    command = [sys.executable, "-m", "perturbkit", "audit", "run", "mine:model", "data.csv", *only]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *arguments], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def end(process, timeout=200):
    out, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0, errors
    return out, errors


def numbers(path):
    """What an audit found, without its times."""

    def timeless(value):
        if isinstance(value, dict):
            left_out = ("seconds", "model_seconds", "times", "out")
            return {k: timeless(v) for k, v in value.items() if k not in left_out}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    return timeless(json.loads((path / "audit.json").read_text()))


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_killed_again_and_again_it_ends_with_the_same_numbers(tmp_path):
    here = folder(tmp_path, 0.001)
    end(start(here, "--out", "whole"))
    out = here / "parts"
    # In the middle of a section, after its first chunk; between two sections; in a section that shares explanations.
    moments = (
        "findings/partial/explain-0",
        "findings/explain.json",
        "findings/partial/attack-1",
        "findings/attack.json",
    )
    resumed = []
    for moment in moments:
        running = start(here, "--out", "parts", "--resume")
        until = time.monotonic() + 120
        while not list(out.glob(f"{moment}*")) and running.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        if running.returncode == -signal.SIGKILL:
            resumed.append(moment)
        assert not (out / "audit.json").exists()
    assert resumed == list(moments)
    chunks = {p.name: p.stat().st_mtime_ns for p in out.glob("findings/partial/*.safetensors")}
    assert "explain-0.safetensors" in chunks
    end(start(here, "--out", "parts", "--resume"))
    assert numbers(out) == numbers(here / "whole")
    assert not (out / "findings" / "partial").exists()


def test_what_is_resumed_must_be_the_same_audit(tmp_path):
    x, y = _subjects.table()
    options = {"out": tmp_path, "only": ["sanity", "calibration"], "progress": False}
    first = audit.run(_subjects.linear(), (x, y), **options)
    again = audit.run(_subjects.linear(), (x, y), resume=True, **options)
    assert [f.seconds for f in again.findings] == [f.seconds for f in first.findings]
    other = _subjects.linear()
    with __import__("torch").no_grad():
        other[0].weight.mul_(1.5)
    for changed, match in (
        ({"seed": 1}, "another request"),
        ({"data": (x * 2, y)}, "another data"),
        ({"model": other}, "another model"),
    ):
        given = {"model": _subjects.linear(), "data": (x, y), **options, **changed}
        with pytest.raises(checks.ArgumentError, match=f"{match}.*allowed.*without --resume"):
            audit.run(**given, resume=True)
    with pytest.raises(checks.ArgumentError, match="out is None"):
        audit.run(_subjects.linear(), (x, y), resume=True, progress=False)


def test_a_damaged_chunk_is_measured_again(tmp_path):
    import torch

    from perturbkit.audit.partial import Parts

    parts, rows = Parts(tmp_path / "partial"), torch.arange(3)
    parts.write("a b", rows, {"x": torch.ones(3), "words": ["u", "v", "w"]}, (1, 2, 3))
    values, cost = parts.read("a b", rows)
    assert values["words"] == ["u", "v", "w"]
    assert cost == (1, 2, 3)
    assert parts.read("a b", rows + 1) is None
    path = next((tmp_path / "partial").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:40])
    assert parts.read("a b", rows) is None
    parts.clear()
    assert not (tmp_path / "partial").exists()


def test_a_damaged_folder_is_refused_or_measured_again(tmp_path):
    import torch
    from safetensors.torch import save_file

    from perturbkit.audit.partial import Parts

    options = {"out": tmp_path, "only": ["sanity", "calibration"], "progress": False}
    first = audit.run(_subjects.linear(), _subjects.table(), **options)
    for text in ("{", "[]", '{"type": "Metric"}', '{"type": "Finding", "metrics": 5}'):
        (tmp_path / "findings" / "calibration.json").write_text(text)
        again = audit.run(_subjects.linear(), _subjects.table(), resume=True, **options)
        assert again["calibration"].metrics == first["calibration"].metrics
    state = tmp_path / "findings" / "state.json"
    for text in ("[]", '{"marks": [], "rows": 3}', '{"marks": 5, "rows": 3}', '{"marks": {}, "rows": "x"}'):
        state.write_text(text)
        with pytest.raises(checks.ArgumentError, match="allowed"):
            audit.run(_subjects.linear(), _subjects.table(), resume=True, **options)
    # Without it, nothing says whose the chunks are.
    state.unlink()
    parts, rows = Parts(tmp_path / "findings" / "partial"), torch.arange(3)
    parts.write("calibration 0", rows, {"x": torch.ones(3)}, (1, 2, 3))
    from perturbkit.audit.kept import Kept

    Kept(tmp_path).check({})
    assert not parts.folder.exists()
    parts.folder.mkdir()
    save_file({"rows of this chunk": rows}, parts.folder / "a.safetensors")
    assert parts.read("a", rows) is None


@pytest.mark.skipif(os.name == "nt", reason="makes a link")
@pytest.mark.parametrize("link", ["findings", "findings/partial"])
def test_nothing_is_removed_through_a_link(tmp_path, link):
    (tmp_path / "mine").mkdir()
    precious = tmp_path / "mine" / "notes.json"
    precious.write_text("{}")
    place = tmp_path / "out" / link
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "mine", target_is_directory=True)
    with pytest.raises(checks.ArgumentError, match="is a link to another folder"):
        audit.run(
            _subjects.linear(), _subjects.table(), out=tmp_path / "out", only=["sanity"], progress=False
        )
    assert precious.exists()


def test_another_file_of_the_same_name_is_another_model(tmp_path, monkeypatch):
    skops = pytest.importorskip("skops.io")
    from sklearn.linear_model import LogisticRegression

    monkeypatch.chdir(tmp_path)
    x, y = (v.numpy() for v in _subjects.table())
    options = {"out": tmp_path / "out", "only": ["calibration"], "progress": False}
    skops.dump(LogisticRegression().fit(x, y), "m.skops")
    audit.run("m.skops", (x, y), **options)
    audit.run("m.skops", (x, y), resume=True, **options)
    skops.dump(LogisticRegression(C=0.01).fit(x, y), "m.skops")
    with pytest.raises(checks.ArgumentError, match="another model"):
        audit.run("m.skops", (x, y), resume=True, **options)


def test_a_failed_section_is_tried_again(tmp_path, monkeypatch):
    import perturbkit.audit.sections.calibration as calibration

    options = {"out": tmp_path, "only": ["sanity", "calibration"], "progress": False}
    good = calibration.run

    def broken(context):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(calibration, "run", broken)
    assert audit.run(_subjects.linear(), _subjects.table(), **options)["calibration"].status == "failed"
    monkeypatch.setattr(calibration, "run", good)
    again = audit.run(_subjects.linear(), _subjects.table(), resume=True, **options)
    assert again["calibration"].status == "ok"


def test_a_budget_is_kept_and_what_it_left_out_is_said_and_can_be_resumed(tmp_path):
    here = folder(tmp_path, 0.02, rows=40)
    began = time.monotonic()
    _, errors = end(start(here, "--budget", "25s", "--out", "one"))
    assert time.monotonic() - began < 25 * 75 / 60
    data = json.loads((here / "one" / "audit.json").read_text())
    findings = {f["section"]: f for f in data["findings"]}
    assert set(findings) == set(SECTIONS)
    cut = [f for f in findings.values() if f["cut"]]
    assert cut
    for finding in cut:
        assert "budget was spent" in (finding["why"] or finding["headline"])
    assert findings["calibration"]["status"] in ("ok", "weak")
    assert "budget was spent" in errors


def test_fewer_rows_are_measured_where_time_ends(tmp_path):
    """The deadline comes in the middle of a section: what was measured counts, over rows drawn at random."""
    import torch

    from perturbkit.audit.context import Context
    from perturbkit.audit.request import AuditRequest
    from perturbkit.core.watch import DeadlineError

    context = Context(AuditRequest(), _subjects.subject())
    rows = torch.arange(100)

    def measured(part, generator, most):
        if len(seen) == most:
            raise DeadlineError
        seen.append(part)
        return {"row": part, "name": [str(int(i)) for i in part]}

    seen: list[torch.Tensor] = []
    done, values = context.chunks("a", rows, lambda p, g: measured(p, g, 2), 1)
    assert len(done) == 64
    assert done.tolist() == sorted(done.tolist()) != list(range(64))
    assert torch.equal(values["row"], rows[done])
    assert values["name"] == [str(int(i)) for i in done]
    assert context.parts.cut == [(64, 100)]
    seen.clear()
    with pytest.raises(DeadlineError):
        context.chunks("a", rows, lambda p, g: measured(p, g, 0), 1)
    seen.clear()
    done, _ = context.chunks("a", rows, lambda p, g: measured(p, g, 99), 1)
    assert torch.equal(done, rows)


@pytest.mark.parametrize("text", ["soon", "-5s", "0", "10 parsecs", ""])
def test_a_budget_that_is_no_time_is_refused(text):
    with pytest.raises(checks.ArgumentError, match="budget"):
        audit.run(_subjects.linear(), _subjects.table(), budget=text)
