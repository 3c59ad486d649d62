"""What an audit leaves in its folder while it runs, and what a later one may go on from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from perturbkit._version import __version__
from perturbkit.audit.finding import Finding
from perturbkit.audit.partial import Parts
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Subject
from perturbkit.core import checks

__all__ = ["FILES", "Kept", "fingerprint", "prepare_folder"]

FILES = (
    "report.html", "audit.json", "metrics.csv", "examples.csv", "junit.xml", "summary.md", "audit.lock.toml",
)  # fmt: skip
# Where it runs, in which pieces, and for how long, is not what is asked.
_NOT_ASKED = ("out", "budget", "memory", "device")


def prepare_folder(out: Path | None, *, keep_findings: bool = False) -> None:
    """Make the folder of the report before anything is spent, without the files of an earlier audit."""
    if out is None:
        return
    folder = out / "findings"
    # Files in it are removed: those of another folder must not be.
    for link in (folder, folder / "partial"):
        if link.is_symlink():
            raise checks.ArgumentError(
                f"out is {out}, where {link} is a link to another folder; allowed: a folder of its own. Remove the link, or "
                "choose another."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = [out / name for name in FILES]
        if not keep_findings:
            old += [*folder.glob("*.json"), *folder.glob("partial/*")]
        for path in old:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise checks.ArgumentError(
            f"out is {out}, which cannot be written ({error.strerror}); allowed: a folder of yours. Choose another."
        ) from error


def fingerprint(subject: Subject, request: AuditRequest) -> dict[str, str]:
    """Return what findings depend on, as hashes: the request, the model (its name, and its weights or file), the data."""
    asked = {k: v for k, v in asdict(request).items() if k not in _NOT_ASKED}
    module = None if subject.oracle is None else subject.oracle.fun
    weights = list(module.state_dict().values()) if isinstance(module, nn.Module) else [subject.mark]
    data = [
        subject.y,
        subject.x,
        subject.given_probabilities,
        subject.texts,
        subject.groups,
        subject.feature_names,
    ]
    return {
        "request": _hash([json.dumps(asked, sort_keys=True)]),
        "model": _hash([subject.name, subject.classes, *weights]),
        "data": _hash([subject.task, subject.bounds, *data]),
        "version": __version__,
    }


class Kept:
    """Findings and state in ``out/findings``, written as they come; nothing without a folder."""

    def __init__(self, out: Path | None) -> None:
        self._folder = None if out is None else out / "findings"
        self.rows: int | None = None

    def check(self, marks: dict[str, str]) -> None:
        """Read the state of the audit that was stopped here, and refuse one that asked something else.

        Raises
        ------
        ArgumentError
            If the request, the model, the data or the version differs.
        """
        assert self._folder is not None
        try:
            state = json.loads((self._folder / "state.json").read_text(encoding="utf-8"))
            old, rows = dict(state["marks"]), int(state["rows"])
        except FileNotFoundError:
            # Nothing says whose the chunks here are.
            Parts(self._folder / "partial").clear()
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise checks.ArgumentError(
                f"{self._folder / 'state.json'} is damaged ({error}); allowed: the folder of an audit that was stopped. "
                "Start anew without --resume."
            ) from None
        other = [part for part in marks if old.get(part) != marks[part]]
        if other:
            raise checks.ArgumentError(
                f"{self._folder.parent} holds an audit with another {' and another '.join(other)}; allowed: to resume what "
                "asked the same of the same model and data. Repeat its options, or start anew without --resume."
            )
        self.rows = rows

    def begin(self, marks: dict[str, str], rows: int) -> None:
        """Note what the findings to come belong to."""
        self._write("state", json.dumps({"marks": marks, "rows": rows}))

    def keep(self, finding: Finding) -> None:
        """Save a finding as it is finished, so that a crash loses none."""
        self._write(finding.section, json.dumps(finding.to_dict()))

    def findings(self) -> dict[str, Finding]:
        """Return the findings saved; those that failed or that a budget cut short are to be made again."""
        if self._folder is None or self.rows is None:
            return {}
        found = {}
        for path in self._folder.glob("*.json"):
            if path.stem != "state":
                try:
                    finding = Finding.from_dict(json.loads(path.read_text(encoding="utf-8")))
                except (ValueError, TypeError, AttributeError, KeyError, checks.PerturbkitError):
                    continue  # a damaged one is made again
                if finding.status != "failed" and not finding.cut:
                    found[finding.section] = finding
        return found

    def _write(self, name: str, text: str) -> None:
        if self._folder is None:
            return
        part = self._folder / f"{name}.json.part"
        part.write_text(text, encoding="utf-8")
        part.replace(self._folder / f"{name}.json")


def _hash(parts: list[object]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            flat = part.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            quantized = flat.is_quantized or flat.dtype.is_complex
            digest.update(str(flat).encode() if quantized else flat.view(torch.uint8).numpy().tobytes())
        elif hasattr(part, "tobytes"):
            digest.update(part.tobytes())
        else:
            digest.update(json.dumps(part, default=str).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]
