"""The generated pages of the site: a reference page a package, and the matrix of methods by what they need.

Pages name modules; mkdocstrings draws their docstrings when the site is built. Nothing here imports a method.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from perturbkit.dev.stubs import PACKAGE, exported
from perturbkit.papers.records import PaperRecord, discover

__all__ = ["write_reference"]


def write_reference(out: Path, top: Path = PACKAGE) -> list[Path]:
    """Write the pages into a folder and return their paths.

    Parameters
    ----------
    out : Path
        Folder of the pages; made where it is missing.
    top : Path
        Folder of the package ``perturbkit``.
    """
    out.mkdir(parents=True, exist_ok=True)
    packages = [
        p.parent for p in sorted(top.glob("*/__init__.py")) if "attach_stub" in p.read_text(encoding="utf-8")
    ]
    written = []
    for package in packages:
        page = out / f"{package.name}.md"
        page.write_text("".join(_package_page(package, top)), encoding="utf-8")
        written.append(page)
    matrix = out / "methods.md"
    matrix.write_text("".join(_matrix(discover(top / "papers"))), encoding="utf-8")
    return [*written, matrix]


def _package_page(package: Path, top: Path) -> Iterator[str]:
    yield f"# perturbkit.{package.name}\n\n{_docstring(package / '__init__.py')}\n"
    if package.name != "papers":
        rooms = [package, *sorted(p.parent for p in package.glob("*/__init__.py"))]
    else:
        rooms = [package]
    for room in rooms:
        modules = [m for m in sorted(room.glob("*.py")) if not m.name.startswith("_") and exported(m)]
        if not modules:
            continue
        if room != package:
            yield f"\n## {room.name}\n\n{_docstring(room / '__init__.py')}\n"
        for module in modules:
            dotted = ".".join(module.relative_to(top.parent).with_suffix("").parts)
            yield f"\n::: {dotted}\n"


def _matrix(records: list[PaperRecord]) -> Iterator[str]:
    """Yield the methods as a table a package: what each needs, for what input, at what cost."""
    yield "# Methods by what they need\n\nDrawn from the records of the reproductions; `perturbkit papers list` prints the same.\n"
    for package in sorted({r.package for r in records}):
        yield f"\n## {package}\n\n| Method | Needs | Input | Cost | Paper |\n| --- | --- | --- | --- | --- |\n"
        for r in sorted((r for r in records if r.package == package), key=lambda r: r.key):
            source = (
                f"[{_cell(r.title)}](https://arxiv.org/abs/{r.arxiv}) ({r.year})"
                if r.arxiv
                else _cell(r.title)
            )
            name = r.method.removeprefix("perturbkit.")
            yield f"| `{name}` | {_cell(r.needs)} | {_cell(r.input)} | {_cell(r.cost)} | {source} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
