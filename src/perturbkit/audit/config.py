"""``audit.toml``: the arguments of an audit in a file, and ``audit.lock.toml``: those of one that was run.

Paths in the file are relative to the file; ``module:function`` is imported from the working folder.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perturbkit._version import __version__
from perturbkit.core import checks

if TYPE_CHECKING:
    from perturbkit.audit.plan import Plan
    from perturbkit.audit.report import Report
    from perturbkit.audit.subject import Subject

__all__ = ["NAME", "lock", "read_config", "template"]

NAME = "audit.toml"
_KEYS = {
    "demo": str, "model": str, "data": str, "task": str, "label": str, "groups": str, "frozen": list, "bounds": list, "profile": str,
    "n": int, "seed": int, "only": list, "skip": list, "norm": str, "eps": (str, float), "alpha": float,
    "gates": (str, dict), "out": str, "device": str, "memory": str, "budget": str, "baseline": str, "format": list,
    "log": str, "cluster": str, "locked": dict,
}  # fmt: skip
_PATHS = ("data", "gates", "out", "baseline")


def read_config(path: Path) -> dict[str, Any]:
    """Read a file of arguments; relative paths are turned into ones of the working folder.

    Raises
    ------
    ArgumentError
        If the file is missing, is not TOML, or holds a key that is not known or of another type.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise checks.ArgumentError(
            f"there is no {path}; allowed: a TOML file of arguments. Write one with perturbkit audit init MODEL DATA."
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise checks.ArgumentError(
            f'{path} is not TOML ({error}); allowed: lines such as profile = "quick". Mend the line.'
        ) from error
    for key, value in given.items():
        if key not in _KEYS:
            raise checks.ArgumentError(
                f"{path} holds {key!r}; allowed: {', '.join(k for k in _KEYS if k != 'locked')}. Check the spelling."
            )
        kind = _KEYS[key]
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))  # type: ignore[arg-type]
        if not fits or isinstance(value, bool):
            names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise checks.ArgumentError(f"{path} holds {key} = {value!r}; allowed: a {names}. Write it so.")
    for key in _PATHS:
        if isinstance(given.get(key), str):
            given[key] = _from(path.parent, given[key])
    if isinstance(given.get("model"), str) and _is_path(given["model"]):
        given["model"] = _from(path.parent, given["model"])
    return given


def template(
    model: str, data: str | None, options: dict[str, Any], subject: Subject, plan: Plan, folder: Path
) -> str:
    """Return a commented file of arguments for a model and data that were opened, to be written into ``folder``."""
    model = _towards(folder, model) if _is_path(model) else model
    data = None if data is None else _towards(folder, data)

    def line(key: str, value: Any, comment: str, given: bool) -> str:
        text = f"{key} = {_toml(value)}"
        return f"{text if given else '# ' + text:<34} # {comment}"

    def option(key: str, example: Any, comment: str) -> str:
        value = options.get(key)
        return line(key, example if value is None else value, comment, value is not None)

    took = f"{plan.seconds:.0f} s" if plan.seconds < 100 else f"{plan.seconds / 60:.0f} min"
    what = f"{len(subject.classes)} classes" if subject.classes else "a regression"
    lines = [
        "# What `perturbkit audit run` does in this folder; flags of the command line come before what stands here.",
        f"# {_line(subject.name)}: {what}. {_line(subject.data_name)}: {subject.n:,} rows.",
        f"# As it stands: about {plan.evaluations:,} evaluations, {took} on the machine that wrote this.",
        "# Paths are relative to this file; module:function is imported from the working folder.", "",
        f"model = {_toml(model)}",
        *([] if data is None else [f"data = {_toml(data)}"]), "",
        option("label", "label", "column of the label"),
        option("groups", "site", "column of the group of a row: coverage by group, groups kept whole"),
        *([option("frozen", list(subject.feature_names[:1]), "columns that nothing may change")] if subject.feature_names else []),
        option("task", subject.task, "image, tabular or text; told from the data"),
        option("bounds", list(subject.bounds or (0.0, 1.0)), "range of valid inputs"), "",
        line("profile", options.get("profile") or "quick", "quick (a minute), standard (ten), full (all rows)", True),
        line("seed", options.get("seed") or 0, "every random draw follows from it", True),
        option("n", 200, "rows of data at most"),
        option("budget", "10m", "stop measuring after this time"),
        option("memory", "1GB", "memory of one batch"),
        option("device", "cpu", "where the model runs"),
        option("skip", ["certify"], "sections to leave out; or only = [...]"), "",
        option("norm", "linf", "norm of the attack: linf or l2"),
        option("eps", "8/255" if subject.task == "image" else "0.05", "change the model should bear"),
        option("alpha", 0.1, "miscoverage allowed to conformal sets"), "",
        line("out", "audit", "folder of the report", True),
        option("baseline", "baseline/audit.json", "earlier audit to compare with; worse beyond noise is exit code 1"),
        option("format", ["html", "json", "csv", "junit", "md"], "what to write"), "",
        "# Requirements; they decide the exit code. Each tests the end of the confidence interval that speaks against the",
        "# model, unless on = \"estimate\". The numbers below are examples: set what the use needs.",
        "[gates]", *_gate_examples(subject), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _gate_examples(subject: Subject) -> list[str]:
    if subject.regression:
        return ['# "sanity.r2" = ">= 0.5"', '# "conformal.coverage" = ">= 0.85"']
    return [
        '# "sanity.accuracy" = ">= 0.8"', '# "calibration.ece" = "<= 0.1"', '# "conformal.coverage" = ">= 0.85"',
        '# "corruption.accuracy.worst" = {min = 0.5, on = "estimate"}',
    ]  # fmt: skip


def lock(report: Report, folder: Path) -> str:
    """Return a file that runs the same audit again, with what it was run on."""
    import torch

    source = {k: v for k, v in report.source.items() if v not in (None, [], ())}
    for key in ("data", "gates", "baseline", "model"):
        value = source.get(key)
        if isinstance(value, str) and (key != "model" or _is_path(value)):
            source[key] = _towards(folder, value)
    lines = [
        "# Runs this audit again: perturbkit audit run --config audit.lock.toml",
        "# Paths are relative to this file; module:function is imported from the working folder.", "",
        *(f"{k} = {_toml(v)}" for k, v in source.items() if not isinstance(v, dict)), "",
    ]  # fmt: skip
    if isinstance(source.get("gates"), dict):
        lines += ["[gates]", *(f"{_toml(k)} = {_toml(v)}" for k, v in source["gates"].items()), ""]
    lines += [
        "[locked]  # what it was run on; a difference is told, not refused",
        f"perturbkit = {_toml(__version__)}", f"torch = {_toml(torch.__version__)}",
        *(f"{k} = {_toml(v)}" for k, v in report.marks.items() if k in ("model", "data")), "",
    ]  # fmt: skip
    return "\n".join(lines)


def differences(locked: dict[str, Any], report: Report) -> list[str]:
    """Return what differs between what a lock file was written on and what was audited now."""
    import torch

    now = {"perturbkit": __version__, "torch": torch.__version__, **report.marks}
    names = {"model": "the model", "data": "the data"}
    found = []
    for key, value in locked.items():
        if key in now and now[key] != value:
            known = key in names
            found.append(
                f"{names[key]} is not that of the lock file"
                if known
                else f"{key} is {now[key]}, locked {value}"
            )
    return found


def _line(text: str) -> str:
    """Write text so that it stays inside a comment."""
    return "".join(c if c.isprintable() else " " for c in text)


def _is_path(model: str) -> bool:
    if model.startswith("hf:"):
        return False
    return re.fullmatch(r"[\w.]+:[\w.]+", model) is None


def _from(folder: Path, text: str) -> str:
    return text if Path(text).is_absolute() else os.path.normpath(folder / text)


def _towards(folder: Path, text: str) -> str:
    try:
        return Path(os.path.relpath(text, folder)).as_posix()
    except ValueError:  # on Windows, another drive
        return str(Path(text).resolve())


def _toml(value: Any) -> str:
    """Write a value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    # A basic string of TOML is one of JSON, but for the delete character.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
