"""What each reproduction says of its paper, read from the source without running it.

The arguments of ``@paper(...)`` are literals, so the catalogue is read from the syntax tree: listing 200 papers
imports neither torch nor any reproduction.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perturbkit.core import checks

__all__ = ["NEEDS", "PaperRecord", "discover", "read_record"]

PACKAGE = Path(__file__).resolve().parents[1]
PAPERS = Path(__file__).resolve().parent

NEEDS = ("forward", "gradient", "weights", "training", "data")
"""What a method needs: answers, gradients or weights of a model, to train one, or (no model) only data."""

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "number": int,
    "title": str,
    "authors": str,
    "year": int,
    "arxiv": str,
    "claim": str,
    "method": str,
    "needs": str,
    "input": str,
    "cost": str,
    "seconds": (int, float),
}


@dataclass(frozen=True)
class PaperRecord:
    """A reproduction and its paper.

    Attributes
    ----------
    key, package : str
        The file's stem and its folder's name.
    path : Path
        The reproduction's source.
    number : int
        Number in the catalogue.
    title, authors : str
        Of the paper.
    year : int
        Of the paper.
    arxiv : str
        arXiv id; empty where the paper has none.
    claim : str
        The headline claim, in one sentence.
    method : str
        Dotted public name of the method.
    needs : str
        One or more of ``NEEDS``, separated by commas.
    input : str
        Kinds of input, separated by commas: any, image, tabular, text, ...
    cost : str
        What the method costs, in words.
    seconds : float
        About how long the reproduction takes on one core.
    summary : str
        The first paragraph of the reproduction's docstring.
    problem : str or None
        Why the file cannot be read as a reproduction; everything but key, package and path is then empty.
    """

    key: str
    package: str
    path: Path
    number: int = 0
    title: str = ""
    authors: str = ""
    year: int = 0
    arxiv: str = ""
    claim: str = ""
    method: str = ""
    needs: str = ""
    input: str = ""
    cost: str = ""
    seconds: float = 0.0
    summary: str = ""
    problem: str | None = None

    def accepts(self, needs: tuple[str, ...] = (), inputs: tuple[str, ...] = ()) -> bool:
        """Return whether all that the method needs is in ``needs``, and one of ``inputs`` (or any) is its own."""
        own = set(words(self.input))
        return (not needs or set(words(self.needs)) <= set(needs)) and (
            not inputs or "any" in own or bool(own & set(inputs))
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        names = ("key", "package", *_FIELDS, "summary", "problem")
        return {name: getattr(self, name) for name in names} | {"path": str(self.path)}


def words(text: str) -> list[str]:
    """Return the parts of a comma-separated field."""
    return [word.strip() for word in text.split(",") if word.strip()]


def validated(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the arguments of ``@paper``.

    Parameters
    ----------
    values : mapping
        The arguments by name.
    where : str
        The file, for the message.

    Returns
    -------
    dict
        The arguments.

    Raises
    ------
    ArgumentError
        If one is missing, unknown, of the wrong type or not allowed.
    """
    missing = [name for name in _FIELDS if name not in values]
    unknown = [name for name in values if name not in _FIELDS]
    if missing or unknown:
        raise checks.ArgumentError(
            f"@paper of {where} lacks {missing} and has unknown {unknown}; allowed: exactly {', '.join(_FIELDS)}. "
            "Give every one, by keyword."
        )
    for name, kind in _FIELDS.items():
        value = values[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            wanted = "a number" if isinstance(kind, tuple) else kind.__name__
            raise checks.ArgumentError(
                f"{name} in @paper of {where} is {value!r}; allowed: {wanted}. Write a literal of that type."
            )
        if isinstance(value, str) and name != "arxiv" and not words(value):
            raise checks.ArgumentError(
                f"{name} in @paper of {where} is empty; allowed: some text. Fill it in."
            )
    for word in words(values["needs"]):
        checks.one_of(f"needs in @paper of {where}", word, NEEDS)
    if not re.fullmatch(r"perturbkit(\.\w+)+", values["method"]):
        raise checks.ArgumentError(
            f"method in @paper of {where} is {values['method']!r}; allowed: a dotted public name. "
            "Write it like 'perturbkit.explain.rise'."
        )
    checks.positive(f"seconds in @paper of {where}", values["seconds"])
    return dict(values)


def read_record(path: Path) -> PaperRecord:
    """Read the record of one reproduction from its source.

    Parameters
    ----------
    path : Path
        ``.../PACKAGE/KEY.py``.

    Returns
    -------
    PaperRecord

    Raises
    ------
    DataError
        If the source has no readable ``@paper``.
    """
    key, package = path.stem, path.parent.name
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        raise checks.DataError(
            f"{package}/{key}.py cannot be parsed ({error}); allowed: Python source. Correct the file."
        ) from None
    calls = [
        call
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        for call in node.decorator_list
        if isinstance(call, ast.Call) and _called(call.func) == "paper"
    ]
    if len(calls) != 1:
        raise checks.DataError(
            f"{package}/{key}.py has {len(calls)} functions under @paper(...); allowed: exactly one. "
            "Put @paper above the one function that returns the evidence."
        )
    try:
        values = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in calls[0].keywords}
    except ValueError:
        raise checks.DataError(
            f"@paper of {package}/{key}.py has an argument that is computed; allowed: literals. "
            "Write text and numbers out, so that the catalogue can be read without running the file."
        ) from None
    summary = (ast.get_docstring(tree) or "").partition("\n\n")[0].replace("\n", " ")
    return PaperRecord(key, package, path, summary=summary, **validated(values, f"{package}/{key}.py"))


def discover(root: Path | None = None) -> list[PaperRecord]:
    """Return the records of all reproductions, ordered by package and key.

    Parameters
    ----------
    root : Path, optional
        Folder of the package folders; default: the reproductions that ship with perturbkit.

    Returns
    -------
    list of PaperRecord
        A file that cannot be read has a record with its ``problem``, so that one broken file hides no other.

    Examples
    --------
    >>> from pathlib import Path
    >>> discover(Path("/nowhere"))
    []
    """
    records = []
    for path in sorted((root or PAPERS).glob("*/*.py")):
        if path.name.startswith("_") or path.parent.name.startswith(("_", ".")):
            continue
        try:
            records.append(read_record(path))
        except checks.PerturbkitError as error:
            records.append(PaperRecord(path.stem, path.parent.name, path, problem=str(error)))
    return records


def method_source(name: str, package: Path = PACKAGE) -> Path | None:
    """Return the module that defines a public name, found by the stubs, or ``None``.

    Examples
    --------
    >>> method_source("perturbkit.core.Oracle").name
    'oracle.py'
    """
    parts = name.split(".")[1:]
    stub = package.joinpath(*parts[:1], "__init__.pyi")
    if len(parts) == 2 and stub.exists():
        line = rf"^from \.(\S+) import {re.escape(parts[1])} as"
        found = re.search(line, stub.read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return package.joinpath(parts[0], *found[1].split(".")).with_suffix(".py")
    for depth in (len(parts) - 1, len(parts)):
        path = package.joinpath(*parts[:depth]).with_suffix(".py")
        if depth and path.is_file():
            return path
    return None


def _called(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
