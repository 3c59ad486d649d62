"""Files that ship with the package, the fixed split, and how reference networks are built and read."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources, util
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perturbkit.core import checks

FOLDER = resources.files("perturbkit.data") / "files"
OWN_LICENCE = "Apache-2.0"
Network = TypeVar("Network", bound=nn.Module)


def installed(package: str) -> Path:
    """Return the folder of an installed package, without importing it (import can be slow or need more packages)."""
    spec = util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise checks.DataError(
            f"the package {package!r}, which holds this data, is not installed; allowed: an installation with all "
            "of perturbkit's dependencies. Run: pip install perturbkit"
        )
    return Path(spec.submodule_search_locations[0])


def choose_part(part: str, test: Tensor) -> Tensor:
    """Return the row numbers of a part, given which rows are test rows."""
    checks.one_of("part", part, ["train", "test", "all"])
    keep = torch.ones_like(test) if part == "all" else test if part == "test" else ~test
    return keep.nonzero()[:, 0]


def every_fifth(n: int) -> Tensor:
    """Mark rows 4, 9, 14, … as test rows: spreads over tables that are sorted by class."""
    return torch.arange(n) % 5 == 4


def last(n: int, n_test: int) -> Tensor:
    """Mark the last rows as test rows."""
    return torch.arange(n) >= n - n_test


def build(make: Callable[[], Network]) -> Network:
    """Build a network with uninitialised weights, so that no random number is drawn."""
    with torch.device("meta"):
        module = make()
    return module.to_empty(device="cpu")


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Fill weights with He's uniform draw and biases with zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim < 2:
                parameter.zero_()
            else:
                bound = (6 / parameter[0].numel()) ** 0.5
                parameter.uniform_(-bound, bound, generator=generator)


def save_network(module: nn.Module, name: str, accuracy: float, dtype: torch.dtype | None = None) -> Path:
    """Write a network's weights with its held-out accuracy (of a denoiser: its loss), in another dtype where given."""
    tensors = {key: value.to(dtype or value.dtype).contiguous() for key, value in module.state_dict().items()}
    path = Path(str(FOLDER / f"{name}.safetensors"))
    save_file(tensors, path, metadata={"accuracy": f"{accuracy:.4f}"})
    path.chmod(0o644)
    return path


def load_network(make: Callable[[], Network], name: str) -> tuple[Network, float]:
    """Return a network in evaluation mode and its recorded held-out accuracy."""
    with resources.as_file(FOLDER / f"{name}.safetensors") as path:
        module = build(make)
        module.load_state_dict(load_file(path))
        with safe_open(path, framework="pt") as file:
            accuracy = float(file.metadata()["accuracy"])
    return module.eval(), accuracy
