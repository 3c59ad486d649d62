"""The generated pages name every public module, and the matrix every method."""

from perturbkit.dev.reference import write_reference
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
