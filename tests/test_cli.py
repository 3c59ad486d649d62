"""The command line as a whole."""

import subprocess
import sys

import pytest

from perturbkit import __version__


def _run(*arguments):
    return subprocess.run([sys.executable, "-m", "perturbkit", *arguments], capture_output=True, text=True)


def test_version():
    result = _run("--version")
    assert (result.returncode, result.stdout) == (0, f"perturbkit {__version__}\n")


def test_help_names_the_commands():
    result = _run("--help")
    assert result.returncode == 0
    for name in ("papers", "dev"):
        assert name in result.stdout
    for name in ("list", "search", "show", "reproduce", "gallery"):
        assert name in _run("papers", "--help").stdout


@pytest.mark.parametrize("arguments", [("nothing",), ("papers", "nothing"), ("--nothing",), ()])
def test_usage_errors_have_code_2(arguments):
    assert _run(*arguments).returncode == 2


def test_an_error_is_one_line_without_traceback():
    result = _run("dev", "new", "core/x/y")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("perturbkit: package is 'core', which holds no methods; allowed: ")
    assert result.stderr.count("\n") == 1
