"""The stubs of the lazy exports."""

import subprocess
import sys

from typer.testing import CliRunner

from perturbkit.dev import command, stubs


def _package(top, name, files):
    for place, text in files.items():
        path = top / name / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


LAZY = "import lazy_loader\n__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)\n"


def test_the_committed_stubs_are_not_stale():
    assert stubs.stale_stubs() == []


def test_a_stub_names_what_the_modules_export(tmp_path):
    files = {
        "__init__.py": LAZY,
        "masking/__init__.py": "",
        "masking/rise.py": '__all__ = ["Rise", "rise"]\n',
        "masking/_parts.py": '__all__ = ["hidden"]\n',
        "masking/silent.py": "x = 1\n",
    }
    _package(tmp_path, "explain", files)
    _package(
        tmp_path,
        "papers",
        {"__init__.py": LAZY, "run.py": '__all__ = ["run"]\n', "explain/rise.py": files["masking/rise.py"]},
    )
    _package(
        tmp_path,
        "core",
        {"__init__.py": LAZY, "checks.py": '__all__ = ["one"]\n', "oracle.py": '__all__ = ["Oracle"]\n'},
    )
    _package(tmp_path, "dev", {"__init__.py": ""})
    texts = {str(path.relative_to(tmp_path)): text for path, text in stubs.stub_texts(tmp_path).items()}
    assert texts == {
        "explain/__init__.pyi": "from .masking.rise import Rise as Rise\nfrom .masking.rise import rise as rise\n",
        "papers/__init__.pyi": "from .run import run as run\n",
        "core/__init__.pyi": "from . import checks as checks\nfrom .oracle import Oracle as Oracle\n",
        "__init__.pyi": "from . import core as core\nfrom . import explain as explain\nfrom . import papers as papers\n",
    }


def test_writing_mends_what_is_stale_and_only_that(tmp_path):
    _package(tmp_path, "explain", {"__init__.py": LAZY, "rise.py": '__all__ = ["rise"]\n'})
    stub = tmp_path / "explain" / "__init__.pyi"
    assert stubs.write_stubs(tmp_path) == [stub, tmp_path / "__init__.pyi"]
    assert stubs.write_stubs(tmp_path) == []
    stub.write_text("old")
    assert stubs.stale_stubs(tmp_path) == [stub]
    assert stub.read_text() == "old"
    assert stubs.write_stubs(tmp_path) == [stub]


def test_the_command_checks_and_writes(tmp_path, monkeypatch):
    _package(tmp_path, "explain", {"__init__.py": LAZY})
    monkeypatch.setattr(stubs.stub_texts, "__defaults__", (tmp_path,))
    monkeypatch.setattr(stubs.stale_stubs, "__defaults__", (tmp_path,))
    monkeypatch.setattr(stubs.write_stubs, "__defaults__", (tmp_path,))
    run = CliRunner().invoke
    assert run(command.app, ["stubs", "--check"]).exit_code == 1
    assert not (tmp_path / "__init__.pyi").exists()
    assert run(command.app, ["stubs"]).exit_code == 0
    result = run(command.app, ["stubs", "--check"])
    assert (result.exit_code, result.output) == (0, "")


def test_every_name_in_the_stubs_can_be_had():
    code = """
import ast, importlib, pathlib
from perturbkit.dev.stubs import PACKAGE, stub_texts
for path in stub_texts():
    module = importlib.import_module(".".join(("perturbkit", *path.parent.relative_to(PACKAGE).parts)))
    for node in ast.parse(path.read_text()).body:
        for alias in node.names:
            getattr(module, alias.asname)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
