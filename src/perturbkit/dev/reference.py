"""The generated pages of the site: a reference page a package, and the methods by package, by what they need, and by paper.

Pages name modules; mkdocstrings draws their docstrings when the site is built. Nothing here imports a method.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from perturbkit.core import checks
from perturbkit.dev.stubs import PACKAGE, exported
from perturbkit.papers.records import PaperRecord, discover, words

__all__ = ["undocumented", "write_reference"]

_NEEDS = {
    "forward": "Forward passes",
    "gradient": "Gradients",
    "weights": "Weights and inner layers",
    "training": "A training run",
    "data": "Data or constants alone",
}


def write_reference(out: Path, top: Path = PACKAGE) -> list[Path]:
    """Write the pages into a folder and return their paths.

    Parameters
    ----------
    out : Path
        Folder of the pages; made where it is missing.
    top : Path
        Folder of the package ``perturbkit``.

    Raises
    ------
    ArgumentError
        If a public name has no docstring, since its entry would be missing without a word.
    """
    bare = undocumented(top)
    if bare:
        raise checks.ArgumentError(
            f"{len(bare)} public names have no docstring: {', '.join(bare)}; allowed: none. Document them, or take them out of __all__."
        )
    out.mkdir(parents=True, exist_ok=True)
    packages = [
        p.parent for p in sorted(top.glob("*/__init__.py")) if "attach_stub" in p.read_text(encoding="utf-8")
    ]
    written = []
    for package in packages:
        page = out / f"{package.name}.md"
        page.write_text("".join(_package_page(package, top)), encoding="utf-8")
        written.append(page)
    records = discover(top / "papers")
    for name, lines in (
        ("methods", _matrix(records)),
        ("access", _by_access(records)),
        ("by_paper", _by_paper(records)),
    ):
        page = out / f"{name}.md"
        page.write_text("".join(lines), encoding="utf-8")
        written.append(page)
    return written


def undocumented(top: Path = PACKAGE) -> list[str]:
    """Return the public functions and classes without a docstring, as "perturbkit.room.module.name".

    Parameters
    ----------
    top : Path
        Folder of the package ``perturbkit``.
    """
    found = []
    for path in sorted(top.rglob("*.py")):
        if not path.name.startswith("_"):
            dotted = ".".join(path.relative_to(top.parent).with_suffix("").parts)
            found += [f"{dotted}.{name}" for name in exported(path) if not _documented(path, name, top)]
    return found


def _documented(path: Path, name: str, top: Path) -> bool:
    """Whether a name has a docstring where it is defined; constants and aliases of types need none."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    defined = [n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == name]
    if defined:  # several where it is overloaded
        return any(ast.get_docstring(n) for n in defined)
    for node in body:
        if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
            origin = (top.parent / (node.module or "").replace(".", "/")).with_suffix(".py")
            return not origin.exists() or _documented(origin, name, top)
    return True


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


def _by_access(records: list[PaperRecord]) -> Iterator[str]:
    """Yield the methods by what they need of a model, cheapest access first, then by input."""
    yield (
        "# By access and cost\n\nWhat can be had of the model decides first: forward passes only, gradients, its weights, a training run, or "
        "nothing but data. A method that needs several stands under the dearest.\n"
    )
    order = list(_NEEDS)
    for need in order:
        chosen = [
            r
            for r in records
            if max((order.index(w) for w in words(r.needs) if w in order), default=0) == order.index(need)
        ]
        if not chosen:
            continue
        yield f"\n## {_NEEDS[need]}\n\n| Input | Method | Cost |\n| --- | --- | --- |\n"
        for r in sorted(chosen, key=lambda r: (r.input, r.package, r.key)):
            yield f"| {_cell(r.input)} | {_method(r)} | {_cell(r.cost)} |\n"


def _by_paper(records: list[PaperRecord]) -> Iterator[str]:
    """Yield the papers by title, with the claim that the reproduction tests."""
    yield (
        "# By paper\n\nEvery method comes from a paper and carries a reproduction of its claim: `perturbkit papers reproduce KEY` runs it, "
        "and says whether it holds on your machine.\n\n| Paper | Method | Claim tested | Key |\n| --- | --- | --- | --- |\n"
    )
    for r in sorted(records, key=lambda r: r.title.lower()):
        source = f"[{_cell(r.title)}](https://arxiv.org/abs/{r.arxiv})" if r.arxiv else _cell(r.title)
        yield f"| {source}, {_cell(r.authors)} ({r.year}) | {_method(r)} | {_cell(r.claim)} | `{r.key}` |\n"


def _method(record: PaperRecord) -> str:
    """The method's short name, linked to its page."""
    name = record.method.removeprefix("perturbkit.")
    return f"[`{name}`]({record.package}.md)"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
