"""The same work on a Dask cluster on the loopback, with a worker that dies half way."""

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.papers import _samples

from perturbkit.core import checks
from perturbkit.papers import discover, run_papers

distributed = pytest.importorskip("distributed")


def _wait(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two workers of one thread, each a process; yields address and workers by name."""
    with ExitStack() as stack:

        def start(*arguments):
            log = stack.enter_context(open(tmp_path / f"{len(started)}.log", "wb"))
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *arguments], stdout=log, stderr=log, cwd=tmp_path
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            started.append(process)
            return process

        started: list[subprocess.Popen[bytes]] = []
        file = tmp_path / "scheduler.json"
        start(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)
        )
        _wait(lambda: file.exists() and file.read_text().rstrip().endswith("}"))
        address = json.loads(file.read_text())["address"]
        common = ("--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", "--no-dashboard")
        workers = {name: start("worker", address, *common, "--name", name) for name in ("one", "two")}
        with distributed.Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        yield address, workers


def test_a_worker_that_is_killed_loses_nothing(cluster, tmp_path):
    address, workers = cluster
    root, trail = tmp_path / "root", tmp_path / "trail"
    trail.mkdir()
    # Each notes which worker started it, and waits a little, so that both are at work when one is killed.
    body = f"""
import os
key = Path(__file__).stem
(Path({str(trail)!r}) / f"{{key}}-{{os.getpid()}}").write_text(str(os.getppid()))
time.sleep(1.0)
return Evidence([Comparison("m", run.rng(key).random(), 2.0, "lower")])
"""
    for i in range(6):
        _samples.write(root, f"p/paper{i}", body)
    _samples.write(root, "p/raises", _samples.RAISES)
    victim = workers["one"]
    killed_at: list[int] = []

    def finished(outcome, done, total):
        # Killed in the middle of a task: after the first result, once the victim has started another.
        if not killed_at:
            _wait(lambda: any(p.read_text() == str(victim.pid) for p in trail.iterdir()))
            victim.kill()
            killed_at.append(done)

    records = discover(root)
    outcomes = run_papers(records, tmp_path / "out", cluster=address, finished=finished, timeout=120)
    assert killed_at == [1]
    assert victim.wait(10) != 0
    assert [o["key"] for o in outcomes] == [r.key for r in records]
    assert all(o["holds"] for o in outcomes[:6])
    assert "ValueError" in outcomes[6]["error"]
    assert {p.stem for p in (tmp_path / "out" / "results").glob("*.json")} == {r.key for r in records}
    started = [p.read_text() for p in trail.iterdir()]
    assert {str(w.pid) for w in workers.values()} == set(started)
    # The same numbers as on this machine.
    local = run_papers(records[:1], tmp_path / "local")
    assert local[0]["comparisons"] == outcomes[0]["comparisons"]


def test_a_cluster_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("perturbkit.core.cluster._CONNECT_SECONDS", 1)
    _samples.write(tmp_path / "root", "p/a")
    with pytest.raises(checks.ArgumentError, match=r"no scheduler answers.*allowed"):
        run_papers(discover(tmp_path / "root"), Path(tmp_path / "out"), cluster="tcp://127.0.0.1:9")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    _samples.write(tmp_path / "root", "p/a")
    with pytest.raises(checks.MissingExtraError, match=r"perturbkit\[cluster\]"):
        run_papers(discover(tmp_path / "root"), Path(tmp_path / "out"), cluster="tcp://127.0.0.1:9")
