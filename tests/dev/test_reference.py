"""The generated pages name every public module, and the matrix every method."""

import pytest

from perturbkit.core.checks import ArgumentError
from perturbkit.dev.reference import undocumented, write_reference
from perturbkit.dev.stubs import PACKAGE, exported
from perturbkit.papers.records import discover


def test_every_public_module_has_its_place(tmp_path):
    write_reference(tmp_path)
    text = "".join(p.read_text() for p in tmp_path.glob("*.md"))
    rooms = [p for p in PACKAGE.glob("*/*/*.py") if p.parts[-3] not in ("papers", "audit", "dev")]
    for module in rooms:
        if not module.name.startswith("_") and exported(module):
            dotted = ".".join(module.relative_to(PACKAGE.parent).with_suffix("").parts)
            assert f"::: {dotted}\n" in text, dotted


def test_the_matrix_has_every_record(tmp_path):
    write_reference(tmp_path)
    matrix = (tmp_path / "methods.md").read_text()
    for record in discover():
        assert f"`{record.method.removeprefix('perturbkit.')}`" in matrix


def test_pages_by_access_and_by_paper_have_every_record_once(tmp_path):
    write_reference(tmp_path)
    access, papers = ((tmp_path / f"{name}.md").read_text() for name in ("access", "by_paper"))
    for record in discover():
        assert f"| `{record.key}` |" in papers
        assert record.title.replace("|", "\\|") in papers
        assert f"[`{record.method.removeprefix('perturbkit.')}`]({record.package}.md)" in access
    assert access.count("\n| ") == len(discover()) + 2 * access.count("\n## ")


def test_a_public_name_without_a_docstring_fails_the_build(tmp_path):
    top = tmp_path / "perturbkit"
    (top / "room" / "sub").mkdir(parents=True)
    (top / "papers").mkdir()
    (top / "room" / "__init__.py").write_text('"""A room."""\nattach_stub = 1\n')
    (top / "room" / "sub" / "_parts.py").write_text("def bare(): ...\n")
    module = top / "room" / "sub" / "method.py"
    module.write_text(
        'from perturbkit.room.sub._parts import bare\n__all__ = ["bare", "said", "FLAG"]\nFLAG = 1\ndef said():\n    """Say."""\n'
    )
    assert undocumented(top) == ["perturbkit.room.sub.method.bare"]
    with pytest.raises(
        ArgumentError, match=r"1 public names have no docstring: perturbkit\.room\.sub\.method\.bare"
    ):
        write_reference(tmp_path / "out", top)
    assert undocumented() == []
