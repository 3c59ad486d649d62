"""Chunks of a section's rows, saved as they are finished: what an audit that was killed goes on from."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perturbkit.core import Oracle
from perturbkit.core.watch import seconds_left

__all__ = ["Parts"]

# About three seconds on two laptop cores, and as long on an accelerator.
_OPERATIONS = {"cpu": 5e10, "other": 1e13}
_ROWS = {"cpu": 32, "other": 512}
_ROWS_NAME = "rows of this chunk"


@dataclass(eq=False)
class Parts:
    """Where chunks are kept and how large they are.

    Attributes
    ----------
    folder : Path or None
        Folder of the files; ``None`` keeps none.
    operations : float
        Floating-point operations of one evaluation.
    seconds : float
        Time of one evaluation. Only a deadline makes a chunk depend on it.
    cut : list of (int, int)
        Rows measured and rows planned, of each measurement that the deadline ended.
    """

    folder: Path | None = None
    operations: float = 1e6
    seconds: float = 0.0
    cut: list[tuple[int, int]] = field(default_factory=list)

    def size(self, each: int, oracle: Oracle | None) -> int:
        """Return how many rows of ``each`` evaluations make one chunk."""
        device = "cpu" if oracle is None or oracle.device is None or oracle.device.type == "cpu" else "other"
        size = min(_ROWS[device], int(_OPERATIONS[device] / (self.operations * max(each, 1))))
        left = seconds_left()
        if math.isfinite(left) and self.seconds > 0:
            size = min(size, int(left / (4 * self.seconds * max(each, 1))))
        return max(1, size)

    def write(self, name: str, rows: Tensor, values: dict[str, Any], cost: tuple[int, int, int]) -> None:
        """Save one chunk, under another name first, so that a file is whole or not there."""
        if self.folder is None:
            return
        from safetensors.torch import save_file

        tensors = {k: v.contiguous() for k, v in values.items() if isinstance(v, Tensor)}
        lists = {k: v for k, v in values.items() if not isinstance(v, Tensor)}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name)
        unfinished = path.with_suffix(".part")
        metadata = {"cost": json.dumps(cost), "lists": json.dumps(lists), "order": json.dumps(list(values))}
        save_file({**tensors, _ROWS_NAME: rows.contiguous()}, unfinished, metadata)
        unfinished.replace(path)

    def read(self, name: str, rows: Tensor) -> tuple[dict[str, Any], tuple[int, int, int]] | None:
        """Return the values and cost of a chunk of exactly these rows, or ``None`` where there is none."""
        if self.folder is None or not self._path(name).exists():
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(name), "pt") as file:
                metadata = file.metadata()
                values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if not torch.equal(values.pop(_ROWS_NAME), rows):
                return None
            values |= json.loads(metadata["lists"])
            nfev, ngrad, njvp = json.loads(metadata["cost"])
            return {key: values[key] for key in json.loads(metadata["order"])}, (nfev, ngrad, njvp)
        except (SafetensorError, KeyError, ValueError, TypeError, OSError):
            return None

    def clear(self) -> None:
        """Remove every chunk."""
        if self.folder is not None and self.folder.is_dir():
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name.replace(' ', '-')}.safetensors"
