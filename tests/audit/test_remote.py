"""An audit on a Dask cluster on the loopback: the same numbers as here."""

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pandas
import pytest

import perturbkit.audit as audit
from perturbkit.core import checks

sys.path.insert(0, str(Path(__file__).parent))
import _subjects

distributed = pytest.importorskip("distributed")

MODEL = """
import os
from pathlib import Path
import torch
from torch import nn

def model():
    (Path(__file__).parent / "trail" / str(os.getpid())).write_text("")
    with torch.random.fork_rng():
        net = nn.Sequential(nn.Linear(4, 2))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[-1.0, -1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]))
        net[0].bias.zero_()
    return net.eval()
"""


def _wait(condition, seconds=90.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.fixture
def cluster(tmp_path):
    """A scheduler and two workers of one thread, each a process, in a folder of their own; yields address and workers."""
    home = tmp_path / "workers"
    home.mkdir()
    with ExitStack() as stack:

        def start(name, *arguments):
            log = stack.enter_context(open(home / f"{name}.log", "wb"))
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *arguments], stdout=log, stderr=log, cwd=home
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        file = home / "scheduler.json"
        start("scheduler", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))  # fmt: skip
        _wait(lambda: file.exists() and file.read_text().rstrip().endswith("}"))
        address = json.loads(file.read_text())["address"]
        common = ("--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", "--no-dashboard")
        workers = [start(n, "worker", address, *common, "--name", n) for n in ("one", "two")]
        with distributed.Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=90)
        yield address, workers


def test_sections_run_on_the_workers_with_the_same_numbers(cluster, tmp_path, monkeypatch):
    address, workers = cluster
    here = tmp_path / "here"
    (here / "trail").mkdir(parents=True)
    (here / "remote_mine.py").write_text(MODEL)
    x, y = _subjects.table(60)
    lines = [",".join(f"{v:.4f}" for v in row) + f",{int(t)}" for row, t in zip(x, y, strict=True)]
    (here / "data.csv").write_text("\n".join(["a,b,c,d,label", *lines]) + "\n")
    monkeypatch.chdir(here)
    given = {"n": 40, "skip": ["slices"], "progress": False}
    there = audit.run("remote_mine:model", "data.csv", cluster=address, out=here / "out", **given)
    local = audit.run("remote_mine:model", "data.csv", **given)
    assert {str(w.pid) for w in workers} & {p.name for p in (here / "trail").iterdir()}
    assert [f.section for f in there.findings] == [f.section for f in local.findings]
    columns = ["section", "metric", "value", "low", "high", "control", "n", "nfev", "ngrad"]
    pandas.testing.assert_frame_equal(there.to_frame()[columns], local.to_frame()[columns], check_exact=True)
    assert all(f.status in ("ok", "weak") for f in there.findings)
    # With a worker gone the rest goes on; a model that only the workers cannot open is refused with its own words.
    workers[0].kill()
    again = audit.run("remote_mine:model", "data.csv", cluster=address, **given)
    assert [(f.section, f.why) for f in again.findings] == [(f.section, "") for f in local.findings]
    pandas.testing.assert_frame_equal(again.to_frame()[columns], local.to_frame()[columns], check_exact=True)


def test_objects_are_refused_and_so_is_no_cluster(tmp_path, monkeypatch):
    with pytest.raises(checks.ArgumentError, match=r"model is a Sequential and cluster.*allowed"):
        audit.run(_subjects.linear(), _subjects.table(), cluster="tcp://127.0.0.1:9", progress=False)
    with pytest.raises(checks.ArgumentError, match=r"data is a tuple and cluster"):
        audit.run("m:f", _subjects.table(), cluster="tcp://127.0.0.1:9", progress=False)
    p, labels = _subjects.calibrated(50)
    lines = [",".join(f"{v:.6f}" for v in row) + f",{t}" for row, t in zip(p, labels, strict=True)]
    (tmp_path / "p.csv").write_text("\n".join(["a,b,c,d,label", *lines]) + "\n")
    monkeypatch.setattr("perturbkit.core.cluster._CONNECT_SECONDS", 1)
    with pytest.raises(checks.ArgumentError, match=r"no scheduler answers.*allowed"):
        audit.run(str(tmp_path / "p.csv"), cluster="tcp://127.0.0.1:9", progress=False)
