"""The three files of a new method, as starting points that run: method, test and reproduction.

The method is a working one (a response averaged over Gaussian noise), the test's common part passes, its oracle fails
until it is written, and the reproduction runs and does not hold.
"""

from __future__ import annotations

import keyword
import re
import string
from pathlib import Path

from perturbkit.core import checks
from perturbkit.dev.stubs import PACKAGE, write_stubs

__all__ = ["write_skeleton"]

_TEMPLATES = Path(__file__).parent / "templates"
_NOT_METHODS = {"audit", "core", "data", "dev", "papers"}


def write_skeleton(place: str, root: Path | None = None) -> list[Path]:
    """Write the method, its test and its reproduction, and what folders lack.

    Parameters
    ----------
    place : str
        "PACKAGE/ROOM/METHOD", each a name in snake case.
    root : Path, optional
        The checkout, with ``src/perturbkit`` and ``tests``; default: the one that this module belongs to.

    Returns
    -------
    list of Path
        What was written, stubs included.

    Raises
    ------
    ArgumentError
        If a name is not allowed, one of the files exists, or there is no checkout. Nothing is written then.
    """
    package, room, method = _names(place)
    checkout = root if root is not None else PACKAGE.parents[1]
    top = checkout / "src" / "perturbkit"
    if not (top / "__init__.py").exists() or not (checkout / "tests").is_dir():
        raise checks.ArgumentError(
            f"{checkout} is not a checkout; allowed: a folder with src/perturbkit and tests. "
            "Clone the repository, install it with 'pip install -e .', or name it with --root."
        )
    values = {"package": package, "room": room, "method": method, "title": method.replace("_", " ")}
    files = {
        top / package / room / f"{method}.py": "method.py.txt",
        checkout / "tests" / package / room / f"test_{method}.py": "test.py.txt",
        top / "papers" / package / f"{method}.py": "reproduction.py.txt",
    }
    taken = [path for path in files if path.exists()] + [*(top / package).glob(f"*/{method}.py")]
    if taken:
        raise checks.ArgumentError(
            f"{taken[0]} exists; allowed: a method that has no files yet. Choose another name, or remove that file."
        )
    inits = {
        top / package / "__init__.py": "package.py.txt",
        top / package / room / "__init__.py": "room.py.txt",
        top / "papers" / package / "__init__.py": "papers_package.py.txt",
    }
    missing = {path: name for path, name in inits.items() if not path.exists()}
    for path, template in (missing | files).items():
        text = string.Template((_TEMPLATES / template).read_text(encoding="utf-8")).substitute(values)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return [*missing, *files, *write_stubs(top)]


def _names(place: str) -> tuple[str, str, str]:
    parts = place.split("/")
    if len(parts) != 3:
        raise checks.ArgumentError(
            f"place is {place!r}; allowed: PACKAGE/ROOM/METHOD. Write it like explain/masking/rise."
        )
    for part in parts:
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", part) or keyword.iskeyword(part):
            raise checks.ArgumentError(
                f"{part!r} in {place!r} is not a name; allowed: snake case, no Python keyword. "
                "Write the method's public name in small letters, words joined by underscores."
            )
    if parts[0] in _NOT_METHODS:
        raise checks.ArgumentError(
            f"package is {parts[0]!r}, which holds no methods; allowed: a package of methods, old or new. "
            "Choose the package by what the method is for."
        )
    return parts[0], parts[1], parts[2]
