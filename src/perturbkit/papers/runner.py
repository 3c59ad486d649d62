"""Running reproductions: each in a process of its own, handed to an executor, saved as soon as it is finished.

A process of its own can be stopped: a reproduction that hangs is killed at its timeout, one that crashes takes nothing
with it, and both work alike on this machine and on a cluster.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perturbkit.core import checks
from perturbkit.core.cluster import on_cluster
from perturbkit.papers.records import PAPERS, PaperRecord, method_source

__all__ = ["fingerprint", "read_outcome", "run_papers"]

Outcome = dict[str, Any]
_LOG_CHARACTERS = 4000


def run_papers(
    records: Sequence[PaperRecord],
    out: Path,
    *,
    seed: int = 0,
    jobs: int = 1,
    timeout: float = 600.0,
    fresh: bool = False,
    cluster: str | None = None,
    executor: Executor | None = None,
    finished: Callable[[Outcome, int, int], None] | None = None,
) -> list[Outcome]:
    """Run reproductions and save what each found under ``out/results``.

    Parameters
    ----------
    records : sequence of PaperRecord
        What to run.
    out : Path
        Folder of the results: ``results/KEY.json`` and, where there is a figure, ``results/KEY.svg``;
        samples stand beside them, as ``results/KEY.NAME.png``.
    seed : int
        Seed of every run.
    jobs : int
        How many at once on this machine; with more than one, each keeps to one core.
    timeout : float
        Seconds after which a reproduction is killed and counts as failed.
    fresh : bool
        Run again what was already finished with the same seed and source.
    cluster : str, optional
        Address of a Dask scheduler, "tcp://HOST:PORT", which runs them instead (extra ``cluster``).
    executor : Executor, optional
        Runs them instead; tasks are picklable, and each starts a process where it runs.
    finished : callable, optional
        Called with each outcome, how many are done and how many there are.

    Returns
    -------
    list of dict
        One outcome a record, in order, with ``key``, ``package``, ``holds``, ``error``, ``seconds``,
        ``comparisons``, ``notes``, ``seed`` and ``fingerprint``.

    Raises
    ------
    KeyboardInterrupt
        If interrupted; all processes are then stopped, and what was finished is saved.
    ArgumentError
        If an argument is not allowed, or no scheduler or worker answers at the address.
    """
    checks.integer("seed", seed, low=0)
    checks.integer("jobs", jobs, low=1)
    checks.positive("timeout", timeout)
    outcomes: dict[str, Outcome] = {}
    todo = []
    for record in records:
        known = None if fresh else read_outcome(out, record.key)
        if record.problem is not None:
            outcomes[record.key] = _failed(record, record.problem, seed)
            _save(out, outcomes[record.key])
        elif (
            known
            and (known["fingerprint"], known["seed"]) == (fingerprint(record), seed)
            and not known["error"]
        ):
            outcomes[record.key] = known
        else:
            todo.append(record)
    report = finished or (lambda outcome, done, total: None)
    for done, outcome in enumerate(outcomes.values(), start=1):
        report(outcome, done, len(records))
    if todo:
        with _executor(executor, cluster, jobs) as (chosen, processes):
            tasks = [_Task.of(record, seed, timeout) for record in todo]
            local = () if processes is None else (processes,)
            futures = {chosen.submit(run_task, t, *local): r for t, r in zip(tasks, todo, strict=True)}
            for outcome in _collected(futures, out, seed):
                outcomes[outcome["key"]] = outcome
                report(outcome, len(outcomes), len(records))
    return [outcomes[record.key] for record in records]


def read_outcome(out: Path, key: str) -> Outcome | None:
    """Return what was saved of a reproduction, or ``None`` where there is nothing readable."""
    try:
        saved = json.loads((out / "results" / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    needed = ("key", "package", "holds", "error", "seconds", "comparisons", "notes", "seed", "fingerprint")
    return saved if isinstance(saved, dict) and all(name in saved for name in needed) else None


def fingerprint(record: PaperRecord) -> str:
    """Return a hash of the sources that a result depends on: reproduction, its folder's parts, and the method."""
    method = method_source(record.method) if record.method else None
    parts = sorted(record.path.parent.glob("_*.py"))
    digest = hashlib.sha256()
    for path in [record.path, *parts, *([method] if method else [])]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@dataclass(frozen=True)
class _Task:
    """What travels to wherever a reproduction runs."""

    path: str
    seed: int
    timeout: float

    @classmethod
    def of(cls, record: PaperRecord, seed: int, timeout: float) -> _Task:
        # Those that ship with perturbkit go by their place in it: on another machine it may be installed elsewhere.
        path = (
            record.path.relative_to(PAPERS) if record.path.is_relative_to(PAPERS) else record.path.resolve()
        )
        return cls(str(path), seed, timeout)


class _Processes:
    """The processes that run at the moment; stopping them also keeps new ones from starting."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    @contextmanager
    def started(self, *command: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
        with self._lock:
            if self._stopped:
                raise CancelledError
            process = subprocess.Popen(command, **options)
            self._running.add(process)
        try:
            yield process
        finally:
            _kill(process)
            with self._lock:
                self._running.discard(process)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                _kill(process)


def run_task(task: _Task, processes: _Processes | None = None) -> Outcome:
    """Run one reproduction in a process of its own and return its answer; it never raises for what that one did."""
    environment = os.environ | {"MPLBACKEND": "Agg"}
    # A reproduction is sized for one core; threads that wait for each other on a busy machine cost more than they save.
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory(prefix="perturbkit-") as folder:
        request, answer, log = (Path(folder) / name for name in ("request.json", "answer.json", "log.txt"))
        request.write_text(json.dumps({"path": str(PAPERS / task.path), "seed": task.seed}), encoding="utf-8")
        began = time.perf_counter()
        with (
            log.open("wb") as sink,
            (processes or _Processes()).started(
                *(sys.executable, "-P", "-m", "perturbkit.papers._worker", str(request), str(answer)),
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            ) as process,
        ):
            try:
                code = process.wait(task.timeout)
                problem = f"the process ended with code {code} and without an answer"
            except subprocess.TimeoutExpired:
                _kill(process)
                problem = f"timed out after {task.timeout:g} s"
        said = log.read_text(encoding="utf-8", errors="replace")[-_LOG_CHARACTERS:]
        if answer.exists():
            outcome: Outcome = json.loads(answer.read_text(encoding="utf-8"))
        else:
            outcome = _empty(problem) | {"seconds": time.perf_counter() - began}
    return outcome | ({"log": said} if outcome["error"] else {})


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started; nothing happens where it has ended."""
    if process.stdin:
        with suppress(OSError):
            process.stdin.close()
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _executor(
    given: Executor | None, cluster: str | None, jobs: int
) -> Iterator[tuple[Executor, _Processes | None]]:
    """Open what runs the tasks. Threads suffice on this machine, since each only waits for its process."""
    if given is not None:
        yield given, None
        return
    if cluster is not None:
        with on_cluster(cluster) as remote:
            yield remote, None
        return
    pool, processes = ThreadPoolExecutor(jobs), _Processes()
    try:
        yield pool, processes
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        processes.stop()
        pool.shutdown(wait=True)


def _collected(futures: dict[Future[Outcome], PaperRecord], out: Path, seed: int) -> Iterator[Outcome]:
    """Yield the outcomes as they come, each saved before; when interrupted, save what else is finished."""
    waiting = dict(futures)
    try:
        for future in as_completed(futures):
            outcome = _outcome(future, waiting.pop(future), seed)
            _save(out, outcome)
            yield outcome
    except KeyboardInterrupt:
        for future, record in waiting.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                _save(out, _outcome(future, record, seed))
        raise


def _outcome(future: Future[Outcome], record: PaperRecord, seed: int) -> Outcome:
    try:
        found = future.result()
    except (Exception, CancelledError) as error:
        return _failed(record, f"the executor lost it ({type(error).__name__}: {error})", seed)
    return {
        "key": record.key,
        "package": record.package,
        "seed": seed,
        "fingerprint": fingerprint(record),
    } | found


def _failed(record: PaperRecord, error: str, seed: int) -> Outcome:
    known = {"key": record.key, "package": record.package, "seed": seed, "fingerprint": fingerprint(record)}
    return known | _empty(error)


def _empty(error: str) -> Outcome:
    return {
        "holds": False,
        "error": error,
        "seconds": 0.0,
        "comparisons": [],
        "notes": "",
        "svg": None,
        "samples": {},
    }


def _save(out: Path, outcome: Outcome) -> None:
    """Write figure, samples and result, each first under another name so that an interruption leaves no half file."""
    folder = out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    svg = outcome.pop("svg", None)
    outcome["figure"] = svg is not None
    picture = folder / f"{outcome['key']}.svg"
    if svg is None:
        picture.unlink(missing_ok=True)
    else:
        _write(picture, svg.encode())
    key = outcome["key"]
    for kind in ("png", "wav"):
        for old in folder.glob(f"{key}.*.{kind}"):
            old.unlink()
    samples = outcome.pop("samples", {})
    outcome["samples"] = list(samples)
    for name, content in samples.items():
        _write(folder / f"{key}.{name}", base64.b64decode(content))
    _write(folder / f"{key}.json", (json.dumps(outcome, indent=1, allow_nan=False) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(content)
    unfinished.replace(path)
