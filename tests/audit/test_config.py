"""audit.toml: what it may hold, and what comes first."""

import pytest

from perturbkit.audit.config import read_config
from perturbkit.core import checks


def test_paths_are_relative_to_the_file_and_modules_are_not(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "sub" / "audit.toml"
    path.write_text('model = "pkg.mine:model"\ndata = "data.csv"\nout = "audit"\n')
    found = read_config(path)
    assert found["model"] == "pkg.mine:model"
    assert found["data"] == str(tmp_path / "sub" / "data.csv")
    assert found["out"] == str(tmp_path / "sub" / "audit")
    path.write_text('model = "m.pt2"\n')
    assert read_config(path)["model"] == str(tmp_path / "sub" / "m.pt2")
    path.write_text('model = "hf:gpt/x"\n')
    assert read_config(path)["model"] == "hf:gpt/x"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("modle = 'x'", "holds 'modle'; allowed: demo, model"),
        ("seed = 'x'", "seed = 'x'; allowed: a int"),
        ("n = true", "n = True"),
        ("alpha = [1]", "alpha"),
        ("a = ", "is not TOML"),
    ],
)
def test_refusals(tmp_path, text, match):
    path = tmp_path / "audit.toml"
    path.write_text(text)
    with pytest.raises(checks.ArgumentError, match=match):
        read_config(path)
    with pytest.raises(checks.ArgumentError, match="there is no"):
        read_config(tmp_path / "gone.toml")


def test_a_name_stays_inside_its_comment(tmp_path):
    import sys
    import tomllib
    from pathlib import Path

    from perturbkit.audit.config import template
    from perturbkit.audit.plan import make_plan
    from perturbkit.audit.request import AuditRequest

    sys.path.insert(0, str(Path(__file__).parent))
    import _subjects

    subject = _subjects.subject()
    subject.name, subject.data_name = 'a\nout = "/elsewhere"', "b\r\x01\nseed = 7"
    text = template(
        'mine"\n.pt2', "d\\'\n.csv", {"label": 'l"\n'}, subject, make_plan(subject, AuditRequest()), tmp_path
    )
    found = tomllib.loads(text)
    assert found["out"] == "audit"
    assert found["seed"] == 0
    assert found["label"] == 'l"\n'
    assert found["model"].endswith('mine"\n.pt2')
