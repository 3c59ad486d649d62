"""The skeletons of a new method: they import, lint clean and run, and their oracle fails until it is written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from perturbkit.core import checks
from perturbkit.dev import command
from perturbkit.dev.skeleton import write_skeleton
from perturbkit.dev.stubs import PACKAGE, write_stubs

REPOSITORY = PACKAGE.parents[1]
FILES = {
    "src/perturbkit/invented/hall/new_method.py",
    "src/perturbkit/invented/hall/__init__.py",
    "src/perturbkit/invented/__init__.py",
    "tests/invented/hall/test_new_method.py",
    "src/perturbkit/papers/invented/new_method.py",
    "src/perturbkit/papers/invented/__init__.py",
    "src/perturbkit/invented/__init__.pyi",
    "src/perturbkit/__init__.pyi",
}


@pytest.fixture
def checkout(tmp_path):
    """A checkout with perturbkit's core, papers and dev, and the settings of its tools."""
    top = tmp_path / "src" / "perturbkit"
    top.mkdir(parents=True)
    for name in ("core", "papers", "dev"):
        # Only the modules, not the reproductions and rooms that other tests cover.
        shutil.copytree(PACKAGE / name, top / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (top / "papers").glob("*/__init__.py"):
        shutil.rmtree(path.parent)
    for name in ("__init__.py", "__main__.py", "_version.py", "cli.py", "py.typed"):
        shutil.copy(PACKAGE / name, top / name)
    (tmp_path / "tests").mkdir()
    shutil.copy(REPOSITORY / "tests" / "_common.py", tmp_path / "tests")
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    write_stubs(top)
    return tmp_path


def _run(checkout, *arguments):
    # The checkout's perturbkit comes before the installed one.
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    command_line = [sys.executable, "-m", *arguments]
    return subprocess.run(command_line, cwd=checkout, env=environment, capture_output=True, text=True)


def test_the_files_import_lint_clean_and_run(checkout):
    written = {str(p.relative_to(checkout)) for p in write_skeleton("invented/hall/new_method", checkout)}
    assert written == FILES
    sources = sorted(f for f in FILES if f.endswith(".py"))
    typed = [f for f in sources if f.startswith("src")]
    for tool in (("ruff", "check", *sources), ("ruff", "format", "--check", *sources), ("mypy", *typed)):
        result = _run(checkout, *tool)
        assert result.returncode == 0, result.stdout
    result = _run(checkout, "pytest", "-q", "tests/invented", "src/perturbkit/invented")
    assert "1 failed, 4 passed" in result.stdout, result.stdout
    assert "write the oracle: " in result.stdout
    result = _run(checkout, "perturbkit", "papers", "reproduce", "new_method", "--out", "out")
    assert result.returncode == 1, result.stderr
    assert "does not hold  new_method" in result.stdout
    assert _run(checkout, "perturbkit", "dev", "stubs", "--check").returncode == 0


def test_a_second_method_joins_what_is_there(checkout):
    write_skeleton("invented/hall/new_method", checkout)
    init = checkout / "src/perturbkit/invented/__init__.py"
    init.write_text(init.read_text() + "# mine\n")
    written = {str(p.relative_to(checkout)) for p in write_skeleton("invented/hall/other", checkout)}
    assert written == {
        "src/perturbkit/invented/hall/other.py",
        "tests/invented/hall/test_other.py",
        "src/perturbkit/papers/invented/other.py",
        "src/perturbkit/invented/__init__.pyi",
    }
    assert init.read_text().endswith("# mine\n")


@pytest.mark.parametrize("taken", sorted(f for f in FILES if f.endswith("new_method.py")))
def test_nothing_is_overwritten(checkout, taken):
    path = checkout / taken
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    before = sorted(checkout.rglob("*"))
    with pytest.raises(checks.ArgumentError, match="exists; allowed"):
        write_skeleton("invented/hall/new_method", checkout)
    assert path.read_text() == "mine"
    assert sorted(checkout.rglob("*")) == before


def test_a_name_is_taken_by_another_room(checkout):
    write_skeleton("invented/hall/new_method", checkout)
    with pytest.raises(checks.ArgumentError, match="exists; allowed"):
        write_skeleton("invented/kitchen/new_method", checkout)


@pytest.mark.parametrize(
    "place",
    ["rise", "explain/rise", "a/b/c/d", "explain/masking/Rise", "explain/masking/_rise", "explain/masking/ri-se",
     "explain/masking/class", "explain/../rise", "explain//rise", "core/x/y", "papers/x/y", "", "explain/masking/2d",
     "explain/masking/rise_", "explain/masking/rise\n"],
)  # fmt: skip
def test_bad_names_are_refused(checkout, place):
    before = sorted(checkout.rglob("*"))
    with pytest.raises(checks.ArgumentError, match="allowed"):
        write_skeleton(place, checkout)
    assert sorted(checkout.rglob("*")) == before


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(checks.ArgumentError, match="not a checkout; allowed"):
        write_skeleton("a/b/c", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_wrote(checkout):
    result = CliRunner().invoke(command.app, ["new", "invented/hall/new_method", "--root", str(checkout)])
    assert result.exit_code == 0
    said = {line.removeprefix("wrote ") for line in result.stdout.splitlines()}
    assert {str(Path(line).relative_to(checkout)) for line in said} == FILES
