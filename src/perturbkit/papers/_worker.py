"""One reproduction in a process of its own: ``python -m perturbkit.papers._worker REQUEST ANSWER``.

The request and the answer are JSON files. Standard input is a pipe held open by whoever started the process; when it
closes, because that one died, the process ends itself and all it started.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any


def main(request_path: str, answer_path: str) -> None:
    """Run the reproduction that the request names, and write the answer."""
    _end_with_parent()
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    path = Path(request["path"])
    answer: dict[str, Any] = {
        "holds": False,
        "error": None,
        "comparisons": [],
        "notes": "",
        "svg": None,
        "samples": {},
    }
    began = time.perf_counter()
    try:
        function = _load(path)
        from perturbkit.papers.evidence import Evidence, Run

        began = time.perf_counter()
        evidence = function(Run(seed=request["seed"]))
        answer["seconds"] = time.perf_counter() - began
        if not isinstance(evidence, Evidence):
            raise TypeError(f"the reproduction returned a {type(evidence).__name__}; allowed: Evidence.")
        answer |= {
            "holds": evidence.holds,
            "comparisons": [_row(c) for c in evidence.comparisons],
            "notes": evidence.notes,
            "svg": None if evidence.figure is None else _svg(evidence.figure),
            "samples": {name: base64.b64encode(c).decode() for name, c in evidence.samples.items()},
        }
    except BaseException as error:  # SystemExit too: whatever ends a reproduction is its failure, not ours.
        traceback.print_exc()
        answer |= {"holds": False, "error": _described(error, path)}
    answer.setdefault("seconds", time.perf_counter() - began)
    # Under another name first, so that an answer is never half there.
    unfinished = Path(answer_path + ".part")
    unfinished.write_text(json.dumps(answer, allow_nan=False), encoding="utf-8")
    unfinished.replace(answer_path)


def _end_with_parent() -> None:
    pipe = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)

    def watch() -> None:
        # The raw descriptor: a thread inside sys.stdin's lock would abort the interpreter's own end.
        while os.read(pipe, 1):
            pass
        # Only ever the own group: the process that started this one made it the leader of a new session.
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"_reproduction_{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    here = [f for f in vars(module).values() if getattr(getattr(f, "record", None), "path", None) == path]
    if len(here) != 1:
        raise TypeError(f"{path.name} defines {len(here)} functions under @paper; allowed: one.")
    return here[0]


def _row(comparison: Any) -> dict[str, Any]:
    fields = ("metric", "direction", "n", "control", "note", "holds")
    numbers = ("ours", "baseline", "margin", "factor", "spread")
    row = {name: getattr(comparison, name) for name in fields}
    return row | {name: _finite(getattr(comparison, name)) for name in numbers}


def _finite(value: float | None) -> float | None:
    """Return the number, or ``None`` where JSON has no word for it."""
    return value if value is not None and math.isfinite(value) else None


def _svg(figure: Any) -> str:
    import matplotlib

    text = io.StringIO()
    # Without date and random ids the same figure is the same file.
    with matplotlib.rc_context({"svg.hashsalt": "perturbkit"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _described(error: BaseException, path: Path) -> str:
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    place = f" ({path.name}, line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{place}"


if __name__ == "__main__":
    main(*sys.argv[1:])
