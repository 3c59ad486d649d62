"""Running: saving, resuming, failing, timing out, and stopping."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest
from tests.papers import _samples

from perturbkit.core import checks
from perturbkit.papers import Comparison, Evidence, discover, run_papers
from perturbkit.papers import runner as runner_module
from perturbkit.papers.runner import fingerprint, read_outcome


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_outcomes_come_in_order_and_are_saved(tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    _samples.write(root, "p/a_fails", _samples.FAILS)
    _samples.write(root, "p/b_holds")
    _samples.write(root, "p/c_raises", _samples.RAISES)
    _samples.write(root, "q/d_returns", "return 3")
    _samples.write(root, "q/e_exits", "import os; print('last words'); os._exit(7)")
    _samples.write(root, "q/f_quits", "raise SystemExit(0)")
    (root / "q" / "g_broken.py").write_text("def f(:")
    seen = []
    outcomes = run_papers(
        discover(root), out, jobs=2, finished=lambda o, done, total: seen.append((done, total))
    )
    assert [o["key"] for o in outcomes] == [r.key for r in discover(root)]
    assert [o["holds"] for o in outcomes] == [False, True, False, False, False, False, False]
    assert sorted(seen) == [(i, 7) for i in range(1, 8)]
    by_key = {o["key"]: o for o in outcomes}
    assert by_key["a_fails"]["error"] is None
    assert by_key["b_holds"]["error"] is None
    assert by_key["c_raises"]["error"].startswith("ValueError: no <such> thing (c_raises.py, line ")
    assert "Traceback" in by_key["c_raises"]["log"]
    assert "returned a int" in by_key["d_returns"]["error"]
    assert "ended with code 7" in by_key["e_exits"]["error"]
    assert "SystemExit" in by_key["f_quits"]["error"]
    assert "parsed" in by_key["g_broken"]["error"]
    for outcome in outcomes:
        assert read_outcome(out, outcome["key"]) == outcome
    row = by_key["b_holds"]["comparisons"][0]
    assert (row["metric"], row["n"], row["holds"], row["control"]) == ("error", 3, True, False)
    assert (out / "results" / "b_holds.svg").read_text().startswith("<?xml")
    assert not (out / "results" / "a_fails.svg").exists()
    assert [p.name for p in (out / "results").iterdir() if p.name.startswith(".")] == []


def test_numbers_that_json_lacks_become_null(tmp_path):
    body = 'return Evidence([Comparison("m", float("nan"), float("inf"), "higher")])'
    _samples.write(tmp_path, "p/a", body)
    (outcome,) = run_papers(discover(tmp_path), tmp_path / "out")
    assert (outcome["holds"], outcome["error"]) == (False, None)
    assert (outcome["comparisons"][0]["ours"], outcome["comparisons"][0]["baseline"]) == (None, None)


def test_the_same_seed_gives_the_same_numbers_and_figure(tmp_path):
    _samples.write(tmp_path, "p/a")
    records = discover(tmp_path)
    found = []
    for folder, seed in [("one", 1), ("two", 1), ("three", 2)]:
        (outcome,) = run_papers(records, tmp_path / folder, seed=seed)
        found.append((outcome["comparisons"], (tmp_path / folder / "results" / "a.svg").read_bytes()))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_samples_stand_beside_the_result_until_the_next_run(tmp_path):
    body = 'return Evidence([Comparison("m", 1.0, 0.0, "higher")], samples={"a_b.png": b"\\x89P", "tone.wav": b"RIFF"})'
    path = _samples.write(tmp_path, "p/a", body)
    out = tmp_path / "out"
    (outcome,) = run_papers(discover(tmp_path), out)
    assert outcome["samples"] == ["a_b.png", "tone.wav"]
    assert (out / "results" / "a.a_b.png").read_bytes() == b"\x89P"
    assert (out / "results" / "a.tone.wav").read_bytes() == b"RIFF"
    path.write_text(path.read_text().replace('"tone.wav": b"RIFF"', ""))
    run_papers(discover(tmp_path), out)
    assert sorted(p.name for p in (out / "results").iterdir()) == ["a.a_b.png", "a.json"]


@pytest.mark.parametrize("name", ["../a.png", "a.svg", "A.png", "a b.wav", ".png"])
def test_names_of_samples_are_checked(name):
    claim = Comparison("m", 1.0, 0.0, "higher")
    with pytest.raises(checks.ArgumentError, match="samples has"):
        Evidence([claim], samples={name: b""})
    with pytest.raises(checks.ArgumentError, match="with a str"):
        Evidence([claim], samples={"a.png": "text"})


def test_a_timeout_kills_the_reproduction_and_what_it_started(tmp_path):
    pids = tmp_path / "pids"
    body = f"""
import os, subprocess
child = subprocess.Popen(["sleep", "100"])
Path({str(pids)!r}).write_text(f"{{os.getpid()}} {{child.pid}}")
time.sleep(100)
"""
    root = tmp_path / "root"
    _samples.write(root, "p/a_sleeps", body)
    _samples.write(root, "p/b_holds")
    began = time.monotonic()
    slow, quick = run_papers(discover(root), tmp_path / "out", timeout=6, jobs=2)
    assert time.monotonic() - began < 40
    assert slow["error"] == "timed out after 6 s"
    assert slow["seconds"] >= 6
    assert quick["holds"]
    own, child = map(int, pids.read_text().split())
    _wait(lambda: not _alive(own) and not _alive(child))


class _Recorded:
    """An executor that starts nothing: it notes what it is given and answers as told."""

    def __init__(self, answers):
        self.answers = answers
        self.given = []

    def submit(self, function, task):
        key = Path(task.path).stem
        self.given.append(key)
        future = Future()
        empty = {"holds": False, "seconds": 0.1, "comparisons": [], "notes": "", "svg": None}
        future.set_result(empty | {"error": self.answers[key]})
        return future


def test_a_rerun_skips_what_is_finished(tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    finished = _samples.write(root, "p/finished", _samples.FAILS)
    _samples.write(root, "p/raises", _samples.RAISES)

    def ran(**options):
        executor = _Recorded({"finished": None, "raises": "ValueError"})
        outcomes = run_papers(discover(root), out, executor=executor, **options)
        assert [o["error"] for o in outcomes] == [None, "ValueError"]
        return executor.given

    both = ["finished", "raises"]
    assert ran() == both
    assert ran() == ["raises"]
    assert ran(seed=1) == both
    assert ran(seed=1) == ["raises"]
    assert ran(seed=1, fresh=True) == both
    finished.write_text(finished.read_text() + "# changed\n")
    assert ran(seed=1) == both
    (out / "results" / "finished.json").write_text('{"key": "fin')  # half a file is no result
    assert ran(seed=1) == both
    (root / "p" / "_parts.py").write_text("x = 1\n")
    assert ran(seed=1) == both
    assert ran(seed=1) == ["raises"]


def test_the_fingerprint_covers_the_method(tmp_path, monkeypatch):
    record = discover(_samples.write(tmp_path, "p/a").parents[1])[0]
    before = fingerprint(record)
    source = tmp_path / "method.py"
    source.write_text("x = 1")
    monkeypatch.setattr(runner_module, "method_source", lambda name: source)
    with_method = fingerprint(record)
    source.write_text("x = 2")
    assert len({before, with_method, fingerprint(record)}) == 3


def test_each_keeps_to_one_core(tmp_path):
    body = (
        'import os; return Evidence([Comparison("m", int(os.environ.get("OMP_NUM_THREADS", 0)), 1, "equal")])'
    )
    _samples.write(tmp_path, "p/a", body)
    (outcome,) = run_papers(discover(tmp_path), tmp_path / "out", jobs=2)
    assert outcome["holds"]


def test_any_executor_will_do(tmp_path):
    _samples.write(tmp_path / "root", "p/a")
    _samples.write(tmp_path / "root", "p/b", _samples.RAISES)
    with ProcessPoolExecutor(1) as pool:
        first, second = run_papers(discover(tmp_path / "root"), tmp_path / "out", executor=pool)
    assert first["holds"]
    assert "ValueError" in second["error"]


def test_what_the_executor_loses_is_reported(tmp_path):
    class Losing:
        def submit(self, function, *arguments):
            future = Future()
            future.set_exception(RuntimeError("the machine is gone"))
            return future

    _samples.write(tmp_path / "root", "p/a")
    (outcome,) = run_papers(discover(tmp_path / "root"), tmp_path / "out", executor=Losing())
    assert not outcome["holds"]
    assert "the machine is gone" in outcome["error"]


def test_an_interruption_saves_what_is_finished_and_stops_the_rest(tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    _samples.write(root, "p/a_holds")
    body = f"import os; Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(100)"
    _samples.write(root, "p/b_sleeps", body)
    _samples.write(root, "p/c_holds")
    command = [sys.executable, "-m", "perturbkit", "papers", "reproduce", "--all", "--json"]
    process = subprocess.Popen(
        [*command, "--root", str(root), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert [row["key"] for row in json.loads(printed)] == ["a_holds"]
    assert "interrupted; 1 of 3" in said
    assert read_outcome(out, "a_holds")["holds"]
    assert read_outcome(out, "b_sleeps") is None
    assert read_outcome(out, "c_holds") is None
    pid = int((tmp_path / "pid").read_text())
    _wait(lambda: not _alive(pid))
    _samples.write(root, "p/b_sleeps", _samples.FAILS)
    stamp = os.stat(out / "results" / "a_holds.json").st_mtime_ns
    again = run_papers(discover(root), out)
    assert [o["holds"] for o in again] == [True, False, True]
    assert os.stat(out / "results" / "a_holds.json").st_mtime_ns == stamp


def test_a_reproduction_ends_with_a_parent_that_is_killed(tmp_path):
    root = tmp_path / "root"
    body = f"import os; Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(100)"
    _samples.write(root, "p/a", body)
    command = [sys.executable, "-m", "perturbkit", "papers", "reproduce", "a", "--root", str(root)]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out")])
    _wait(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.kill()
    process.wait()
    pid = int((tmp_path / "pid").read_text())
    _wait(lambda: not _alive(pid))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": -1}, "seed"),
        ({"jobs": 0}, "jobs"),
        ({"timeout": 0.0}, "timeout"),
        ({"cluster": "localhost"}, "cluster"),
        ({"cluster": "tcp://127.0.0.1"}, "cluster"),
    ],
)
def test_refusals(tmp_path, options, match):
    _samples.write(tmp_path, "p/a")
    with pytest.raises(checks.PerturbkitError, match=match) as caught:
        run_papers(discover(tmp_path), tmp_path / "out", **options)
    assert "allowed" in str(caught.value)
