"""The code of the tutorials runs as it stands, and prints what the page shows."""

import contextlib
import io
import re
import textwrap
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).parents[2] / "docs").rglob("*.md"))
EXECUTED = re.compile(r'^```python exec="true".*?\n(.*?)^```', re.MULTILINE | re.DOTALL)
TUTORIALS = [p for p in PAGES if EXECUTED.search(p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda p: p.stem)
def test_it_runs(page):
    names = {"__name__": "tutorial"}
    for block in EXECUTED.findall(page.read_text(encoding="utf-8")):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(textwrap.dedent(block), str(page), "exec"), names)
        assert said.getvalue().strip()


def test_there_are_the_five():
    wanted = {
        "explain_an_image",
        "attack_and_certify",
        "calibrate_and_conformalise",
        "train_with_less_memory",
        "sample_in_ten_steps",
    }
    assert wanted <= {p.stem for p in TUTORIALS}
