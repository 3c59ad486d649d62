"""Programs written by torch.export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perturbkit.audit.opening._opened import OpenedModel, first_line
from perturbkit.core import checks


def open_exported(path: Path) -> OpenedModel:
    """Open a ``.pt2`` file.

    Raises
    ------
    ModelError
        If it is not a program of torch.export.
    """
    try:
        return OpenedModel(_Exported(torch.export.load(path)), path.name)
    except Exception as error:
        raise checks.ModelError(
            f"{path} could not be read as a torch.export program ({type(error).__name__}: {first_line(error)}); "
            "allowed: a file written by torch.export.save. Export it again with this version of torch."
        ) from error


class _Exported(nn.Module):
    """A torch.export program; rows are padded up to its batch size where that is fixed."""

    no_layers = (
        "an exported program is a list of operations without layers that can be bounded. Pass the PyTorch module "
        "(module:function) to have the proof"
    )

    def __init__(self, program: Any) -> None:
        super().__init__()
        self.training = False  # its mode was fixed when it was exported
        self.program = program.module()
        names = set(program.graph_signature.user_inputs)
        shapes = [node.meta["val"].shape for node in program.graph.nodes if node.name in names]
        first = shapes[0][0] if shapes and len(shapes[0]) else None
        self.batch = first if isinstance(first, int) else None

    def forward(self, x: Tensor) -> Tensor:
        if self.batch is None:
            return self.program(x)
        parts = []
        for start in range(0, len(x), self.batch):
            rows = x[start : start + self.batch]
            short = self.batch - len(rows)
            padded = rows if short == 0 else torch.cat([rows, rows[-1:].expand(short, *rows.shape[1:])])
            parts.append(self.program(padded)[: len(rows)])
        return torch.cat(parts)
