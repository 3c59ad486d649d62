"""The ``.pyi`` stubs behind the lazy exports: what each module's ``__all__`` names, one line a module.

A package's ``__init__.py`` hands its stub to ``lazy_loader.attach_stub``; type checkers read the same file.
``perturbkit dev stubs`` writes them, and a test fails when one is stale.
"""

from __future__ import annotations

import ast
from pathlib import Path

__all__ = ["PACKAGE", "exported", "stale_stubs", "stub_texts", "write_stubs"]

PACKAGE = Path(__file__).resolve().parent.parent
_NOT_TOP = {"dev"}
# Its folders hold no public names, but reproductions.
_NO_ROOMS = {"papers"}


def exported(module: Path) -> list[str]:
    """Return the names in a module's ``__all__``, read without importing it."""
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
        ):
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


def stub_texts(top: Path = PACKAGE) -> dict[Path, str]:
    """Return the text that each stub should have, by path.

    A package has a stub if its ``__init__.py`` attaches one; it then exports what its modules, and those of its
    rooms, name in ``__all__``. The top of perturbkit exports its packages.

    Parameters
    ----------
    top : Path
        Folder of the package ``perturbkit``.
    """
    texts: dict[Path, str] = {}
    inits = sorted(top.glob("*/__init__.py"))
    for package in (p.parent for p in inits if "attach_stub" in p.read_text(encoding="utf-8")):
        lines = []
        if package.name == "core":
            lines += [
                f"from . import {m.stem} as {m.stem}\n" for m in _modules(package) if not _public(package, m)
            ]
        for module in _modules(package):
            dotted = ".".join(module.relative_to(package).with_suffix("").parts)
            names = exported(module) if _public(package, module) else []
            lines += [f"from .{dotted} import {name} as {name}\n" for name in names]
        texts[package / "__init__.pyi"] = "".join(lines)
    names = [p.parent.name for p in inits if p.parent.name not in _NOT_TOP]
    texts[top / "__init__.pyi"] = "".join(f"from . import {name} as {name}\n" for name in names)
    return texts


def stale_stubs(top: Path = PACKAGE) -> list[Path]:
    """Return the paths of the stubs that are missing or out of date."""
    return [
        p for p, text in stub_texts(top).items() if not p.exists() or p.read_text(encoding="utf-8") != text
    ]


def write_stubs(top: Path = PACKAGE) -> list[Path]:
    """Write every stub that is stale, and return their paths."""
    stale, texts = stale_stubs(top), stub_texts(top)
    for path in stale:
        path.write_text(texts[path], encoding="utf-8")
    return stale


def _modules(package: Path) -> list[Path]:
    """Return the modules of a package and of its rooms, without those that start with an underscore."""
    folders = [] if package.name in _NO_ROOMS else [*package.glob("*/*.py")]
    return sorted(p for p in [*package.glob("*.py"), *folders] if not p.name.startswith("_"))


def _public(package: Path, module: Path) -> bool:
    # checks and random are used as `checks.positive`, and the names of sampling say little outside it.
    return not (package.name == "core" and module.stem in ("checks", "random", "sampling"))
