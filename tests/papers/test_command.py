"""``perturbkit papers`` as a user runs it: text, JSON, exit codes."""

import json
import subprocess
import sys

import pytest
from tests.papers import _samples
from typer.testing import CliRunner

from perturbkit.core import checks
from perturbkit.papers.command import app, comparison_text


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    _samples.write(folder, "alpha/holds", number=1, title="Integrated gradients", needs="gradient")
    _samples.write(folder, "alpha/fails", _samples.FAILS, number=2, title="Occlusion", input="image")
    _samples.write(folder, "beta/raises", _samples.RAISES, number=3, title="Café masks", input="tabular")
    return folder


@pytest.fixture
def call(root, tmp_path):
    def run(*arguments):
        extra = ["--root", str(root)]
        if arguments[0] in ("reproduce", "show", "gallery"):
            extra += ["--out", str(tmp_path / "out")]
        return CliRunner().invoke(app, [*map(str, arguments), *extra])

    return run


def _keys(result):
    assert result.exit_code == 0, result.output
    return [row["key"] for row in json.loads(result.stdout)]


def test_list(call):
    result = call("list")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["fails", "holds", "raises"]
    assert "Café masks" in result.stdout
    assert _keys(call("list", "--json")) == ["fails", "holds", "raises"]
    assert _keys(call("list", "--json", "--package", "beta")) == ["raises"]
    assert _keys(call("list", "--json", "--needs", "forward")) == ["fails", "raises"]
    assert _keys(call("list", "--json", "--needs", "forward", "--input", "tabular")) == ["raises"]
    assert _keys(call("list", "--json", "--needs", "forward", "--needs", "gradient")) == [
        "fails",
        "holds",
        "raises",
    ]


def test_list_shows_a_file_that_cannot_be_read(call, root):
    (root / "beta" / "broken.py").write_text("def f(:")
    result = call("list")
    assert result.exit_code == 0
    assert "cannot be read" in result.stdout
    assert len(result.stdout.splitlines()) == 4


def test_search(call):
    assert _keys(call("search", "gradients", "--json"))[0] == "holds"
    rows = json.loads(call("search", "cafe mask", "--json").stdout)
    assert rows[0]["key"] == "raises"
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert _keys(call("search", "paper claim", "--json", "--limit", "1", "--input", "image")) == ["fails"]
    nothing = call("search", "zebra")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "no paper matches" in nothing.stderr
    assert call("search", "zebra", "--json").stdout.strip() == "[]"


def test_reproduce_show_and_gallery(call, tmp_path):
    result = call("reproduce", "holds", "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)
    assert set(row) == {"key", "package", "holds", "error", "seconds", "comparisons"}
    assert (row["key"], row["package"], row["holds"], row["error"]) == ("holds", "alpha", True, None)
    assert row["seconds"] > 0
    assert "[1/1] holds: holds" in result.stderr

    result = call("reproduce", "--all", "--jobs", "2")
    assert result.exit_code == 1
    assert "does not hold  fails" in result.stdout
    assert "ValueError: no <such> thing" in result.stdout
    assert "1 of 3 hold" in result.stdout

    rows = json.loads(call("reproduce", "fails", "holds", "fails", "--json").stdout)
    assert [(row["key"], row["holds"]) for row in rows] == [("fails", False), ("holds", True)]
    assert call("reproduce", "--package", "beta").exit_code == 1

    shown = call("show", "holds")
    assert "holds, seed 0" in shown.stdout
    assert "core/oracle.py" in shown.stdout
    data = json.loads(call("show", "fails", "--json").stdout)
    assert data["result"]["holds"] is False
    assert data["claim"] == "It is better."
    assert "failed, seed 0" in call("show", "raises").stdout
    assert call("gallery").exit_code == 0
    assert (tmp_path / "out" / "index.html").exists()


def test_show_without_and_with_an_old_result(call, root, tmp_path):
    assert "not run; perturbkit papers reproduce fails" in call("show", "fails").stdout
    assert json.loads(call("show", "fails", "--json").stdout)["result"] is None
    call("reproduce", "fails")
    path = root / "alpha" / "fails.py"
    path.write_text(path.read_text() + "# changed\n")
    assert "earlier version" in call("show", "fails").stdout


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("reproduce",), "no paper is named"),
        (("reproduce", "hodls"), "Did you mean holds"),
        (("reproduce", "zzzzzz"), "papers list"),
        (("reproduce", "--package", "gamma"), "--package"),
        (("show", "raise"), "Did you mean raises"),
        (("list", "--needs", "magic"), "--needs"),
        (("list", "--input", "video"), "--input"),
        (("list", "--package", "gamma"), "--package"),
        (("reproduce", "holds", "--cluster", "here"), "tcp://HOST:PORT"),
    ],
)
def test_refusals(call, arguments, match):
    result = call(*arguments)
    assert isinstance(result.exception, checks.PerturbkitError)
    assert match in str(result.exception)
    assert "allowed" in str(result.exception)


@pytest.mark.parametrize(
    "arguments",
    [("reproduce", "holds", "--jobs", "0"), ("reproduce", "--timeout", "x"), ("list", "--colour")],
)
def test_usage_errors_have_code_2(call, arguments):
    assert call(*arguments).exit_code == 2


def test_the_command_turns_an_error_into_one_line_and_code_2(root):
    command = [sys.executable, "-m", "perturbkit", "papers", "reproduce", "hodls", "--root", str(root)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("perturbkit: no paper has the key 'hodls'")


def test_a_comparison_in_one_line():
    row = {
        "metric": "error",
        "ours": 0.5,
        "baseline": None,
        "direction": "lower",
        "factor": 0.5,
        "margin": -0.1,
    }
    row |= {"spread": 0.01, "n": 4, "control": True}
    wanted = "control, must fail: error: 0.5 against not finite (≤ 0.5 × baseline + 0.1, ± 0.01, n = 4)"
    assert comparison_text(row) == wanted


def test_a_bar_with_the_time_left_at_a_terminal(monkeypatch, capsys):
    from perturbkit.papers import command

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with command._reporter(2) as show:
        show({"key": "[bold]odd", "holds": True, "error": None, "seconds": 1.0}, 1, 2)
    said = capsys.readouterr()
    assert said.out == ""
    assert "1/2" in said.err
    assert "left" in said.err
    assert "[bold]odd" in said.err
