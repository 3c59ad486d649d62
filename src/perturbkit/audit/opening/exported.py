"""Programs written by torch.export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perturbkit.audit.opening._layers import NoLayerError, layers_of
from perturbkit.audit.opening._opened import OpenedModel, first_line
from perturbkit.core import checks, unwrap_output


def open_exported(path: Path) -> OpenedModel:
    """Open a ``.pt2`` file.

    Raises
    ------
    ModelError
        If it is not a program of torch.export.
    """
    try:
        program = torch.export.load(path)
        try:
            # With layers the program can be bounded, and takes any number of rows.
            return OpenedModel(layers_of(program), path.name)
        except NoLayerError as error:
            why = str(error)
        except Exception as error:
            why = f"{type(error).__name__}: {first_line(error)}"
        return OpenedModel(_Exported(program, why), path.name)
    except Exception as error:
        raise checks.ModelError(
            f"{path} could not be read as a torch.export program ({type(error).__name__}: {first_line(error)}); "
            "allowed: a file written by torch.export.save. Export it again with this version of torch."
        ) from error


class _Exported(nn.Module):
    """A torch.export program without layers; rows are padded up to its batch size where that is fixed."""

    def __init__(self, program: Any, why: str) -> None:
        super().__init__()
        self.no_layers = (
            f"the exported program cannot be taken apart into layers ({why}). Pass the PyTorch module (module:function) "
            "to have the proof"
        )
        self.training = False  # its mode was fixed when it was exported
        self.program = program.module()
        names = set(program.graph_signature.user_inputs)
        shapes = [node.meta["val"].shape for node in program.graph.nodes if node.name in names]
        first = shapes[0][0] if shapes and len(shapes[0]) else None
        self.batch = first if isinstance(first, int) else None
        args, options = program.example_inputs or ((None,), {})
        # A program that was exported with its input by name takes it by name alone.
        self.keyword = next(iter(options)) if not args and len(options) == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.batch is None:
            return self._answer(x)
        parts = []
        for start in range(0, len(x), self.batch):
            rows = x[start : start + self.batch]
            short = self.batch - len(rows)
            padded = rows if short == 0 else torch.cat([rows, rows[-1:].expand(short, *rows.shape[1:])])
            parts.append(self._answer(padded)[: len(rows)])
        return torch.cat(parts)

    def _answer(self, x: Tensor) -> Tensor:
        return unwrap_output(self.program(x) if self.keyword is None else self.program(**{self.keyword: x}))
