"""Frozen columns: held by attack, proof and damage, on the command line, in files and in the lock."""

import sys
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from typer.testing import CliRunner

import perturbkit.audit as audit
from perturbkit.audit.command import app
from perturbkit.audit.context import Context
from perturbkit.audit.report import load_report
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.runner import conduct
from perturbkit.audit.sections import attack
from perturbkit.audit.sections.corruption import _damaged_scores
from perturbkit.core import checks

sys.path.insert(0, str(Path(__file__).parent))
import _subjects


def audited(model, data, *sections, frozen=("feature 0",), **options):
    return audit.run(model, data, frozen=frozen, only=sections, progress=False, **options)


def truth(x, frozen):
    """Radius of the linear model of ``_subjects``, whose margin is 2 (a + b), when one column cannot move."""
    reach = sum(float(x[:, i].std()) for i in (0, 1) if i not in frozen)
    return ((x[:, 0] + x[:, 1]).abs() / reach).numpy()


def test_attack_and_proof_hold_a_column_and_agree_on_the_rest():
    x, y = _subjects.table(40)
    report = audited(_subjects.linear(), (x, y), "attack", "certify", "sandwich")
    attack, certify = report["attack"].series, report["certify"].series
    radius = np.array(attack["radius"])
    rows = np.array(attack["rows"])[radius > 0]
    np.testing.assert_allclose(radius[radius > 0], truth(x[rows], {0}), rtol=0.05)
    assert (radius[radius > 0] >= truth(x[rows], {0}) * (1 - 1e-4)).all()
    proved = np.array(certify["radius"])
    assert proved.max() > 1.2 * truth(x, set()).max()  # more than with the column free
    assert report["sandwich"].status == "ok"
    assert "alarm" not in report["sandwich"].headline.lower()


def test_a_search_without_gradient_holds_it_too():
    x, y = _subjects.table(40)
    model = LogisticRegression().fit(x.numpy(), y.numpy())
    model.coef_, model.intercept_ = np.array([[2.0, 2.0, 0.0, 0.0]]), np.zeros(1)
    seen = []
    subject = audit.open_subject(model, (x.numpy(), y.numpy()))
    inner = subject.oracle.fun
    subject.oracle.fun = lambda z: seen.append(z.clone()) or inner(z)
    request = AuditRequest(frozen=("feature 0",)).selecting(("attack",))
    report = conduct(lambda: subject, request, progress=False)
    radius = np.array(report["attack"].series["radius"])
    assert (radius[radius > 0] >= truth(x, {0})[radius > 0] * (1 - 1e-5)).all()
    first = torch.cat(seen)[:, 0]
    assert float((first[:, None] - x[None, :, 0]).abs().amin(1).max()) < 1e-5


def test_all_columns_frozen_leaves_nothing_to_attack():
    x, y = _subjects.table(20)
    names = tuple(f"feature {i}" for i in range(4))
    for model in (_subjects.linear(), LogisticRegression().fit(x.numpy(), y.numpy())):
        context = Context(AuditRequest(frozen=names), audit.open_subject(model, (x, y)), {"attack": 20})
        radius = np.array(attack.run(context).series["radius"])
        assert np.isinf(radius[radius > 0]).all()


def test_where_nothing_may_change_nothing_is_said_of_the_model():
    x, y = _subjects.table(40)
    names = tuple(f"feature {i}" for i in range(4))
    report = audited(_subjects.linear(), (x, y), "attack", "certify", "sandwich", "corruption", frozen=names)
    for finding in report.findings:
        assert finding.status == "not run"
    for section in ("attack", "certify", "corruption"):
        assert "no number may change" in report[section].why
    g = np.random.default_rng(0)
    frame = pd.DataFrame({"size": g.normal(size=60), "kind": g.choice(["p", "q"], 60)})
    target = (frame.kind == "p").astype(int)
    first = make_column_transformer((OneHotEncoder(), ["kind"]), remainder="passthrough")
    model = make_pipeline(first, LogisticRegression()).fit(frame, target)
    found = audited(model, (frame, target), "attack", frozen=("size",))["attack"]
    assert found.headline.startswith("No number may change")
    assert "depend" not in found.headline
    assert found.metric("categories.changed.one").value == 1


def test_names_need_not_be_text():
    x, y = _subjects.table(40)
    frame = pd.DataFrame(x.numpy(), columns=[0, 1, 2, 3])
    model = LogisticRegression().fit(frame.rename(columns=str), y.numpy())
    report = audited(model, (frame, y), "sanity", frozen=pd.Index([1, 1, 3]))
    assert report.request.frozen == ("1", "3")
    assert AuditRequest(frozen=None).frozen == ()


@pytest.mark.parametrize("kind", ["missing", "noise", "shifted"])
def test_damage_leaves_it_alone(kind):
    subject = _subjects.subject()
    seen = []
    inner = subject.oracle.fun
    subject.oracle.fun = lambda z: seen.append(z.clone()) or inner(z)
    context = Context(AuditRequest(frozen=("b",)), subject)
    _damaged_scores(context, subject, kind, 5, torch.Generator().manual_seed(0))
    damaged = torch.cat(seen)[-subject.n :]
    assert torch.equal(damaged[:, 1], subject.x[:, 1])
    assert not torch.equal(damaged[:, 0], subject.x[:, 0])


def test_the_weakest_rows_are_described_in_true_deviations():
    x, y = _subjects.table(30)
    report = audited(_subjects.linear(), (x, y), "sanity", "weakest")
    table = report["weakest"].table
    told = " ".join(str(row[table.columns.index("unusual values")]) for row in table.rows)
    sizes = [abs(float(part.split(" sd")[0].split("(")[1])) for part in told.split(",") if " sd" in part]
    assert max(sizes) < 6
    assert ("frozen columns", "feature 0", "noted") in report["sanity"].table.rows


def test_unknown_columns_and_other_tasks_are_refused():
    x, y = _subjects.table(20)
    with pytest.raises(checks.ArgumentError, match=r"frozen names 'age'; allowed: one of feature 0"):
        audited(_subjects.linear(), (x, y), "attack", frozen=("age",))
    with pytest.raises(checks.ArgumentError, match="the task is image"):
        audited(_subjects.image_model(), _subjects.images(8), "attack", frozen=("age",))
    with pytest.raises(checks.PerturbkitError, match="a sequence of names"):
        AuditRequest(frozen="age")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = _subjects.table(30)
    lines = [",".join([*(f"{v:.4f}" for v in row), str(int(t))]) for row, t in zip(x, y, strict=True)]
    (tmp_path / "d.csv").write_text("\n".join(["a,b,c,d,label", *lines]) + "\n")
    (tmp_path / "own_frozen_model.py").write_text(
        "import torch\ndef predict(x):\n    s = x[:, 0] + x[:, 1]\n    return torch.stack([-s, s], 1)\n"
    )
    yield tmp_path
    sys.modules.pop("own_frozen_model", None)


def test_the_flag_the_file_and_the_lock_say_the_same(here):
    given = ["run", "own_frozen_model:predict", "d.csv", "--only", "attack", "--quiet"]
    ran = CliRunner().invoke(app, [*given, "--frozen", "a", "--frozen", "c", "--out", "one"])
    assert ran.exit_code == 0, ran.output
    assert tomllib.loads((here / "one" / "audit.lock.toml").read_text())["frozen"] == ["a", "c"]
    (here / "audit.toml").write_text(
        'model = "own_frozen_model:predict"\ndata = "d.csv"\nonly = ["attack"]\nfrozen = ["a", "c"]\n'
    )
    filed = CliRunner().invoke(app, ["run", "--quiet", "--out", "two"])
    locked = CliRunner().invoke(app, ["run", "--quiet", "--config", "one/audit.lock.toml", "--out", "three"])
    assert (filed.exit_code, locked.exit_code) == (0, 0), filed.output + locked.output
    free = CliRunner().invoke(app, [*given, "--out", "four"])
    assert free.exit_code == 0, free.output
    reports = [load_report(here / name / "audit.json") for name in ("one", "two", "three", "four")]
    radii = [r["attack"].series["radius"] for r in reports]
    assert radii[0] == radii[1] == radii[2] != radii[3]
    assert reports[0].request.frozen == ("a", "c")


def test_the_command_refuses_an_unknown_column(here):
    for command in ("run", "plan", "init"):
        ran = CliRunner().invoke(app, [command, "own_frozen_model:predict", "d.csv", "--frozen", "age"])
        assert ran.exit_code not in (0, 70)
        assert isinstance(ran.exception, checks.ArgumentError | SystemExit)
    written = CliRunner().invoke(app, ["init", "own_frozen_model:predict", "d.csv", "--frozen", "a"])
    assert written.exit_code == 0, written.output
    assert tomllib.loads((here / "audit.toml").read_text())["frozen"] == ["a"]
