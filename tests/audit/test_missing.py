"""Missing cells: taken where the estimator takes them, left alone by every section, refused by name elsewhere."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, OrdinalEncoder

import perturbkit.audit as audit
from perturbkit.audit.context import Context
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.sections.corruption import _damaged_scores
from perturbkit.core import checks

sys.path.insert(0, str(Path(__file__).parent))
import _subjects

WEIGHT = np.array([1.0, -0.5, 0.25, 0.0])


def data(n=80, share=0.15, seed=0):
    """Four columns of which some cells are missing, the last column whole, and the side of a linear function."""
    g = np.random.default_rng(seed)
    x = pd.DataFrame(g.normal(size=(n, 4)) * [1.0, 2.0, 0.5, 1.0], columns=list("abcd"))
    y = (x.to_numpy() @ WEIGHT > 0).astype(int)
    gone = g.random(x.shape) < share
    gone[:, 3] = False
    return x.mask(gone), y


def linear(x, y, fill=0.0):
    """A pipeline that puts a constant into missing cells and answers by a known linear function."""
    model = make_pipeline(SimpleImputer(strategy="constant", fill_value=fill), LogisticRegression()).fit(x, y)
    model[-1].coef_, model[-1].intercept_ = WEIGHT[None].copy(), np.zeros(1)
    return model


@pytest.fixture(scope="module")
def report():
    x, y = data(40)
    return audit.run(linear(x, y), (x, y), n=40, progress=False)


def test_every_section_runs_and_is_drawn(report):
    for finding in report.findings:
        assert finding.status in ("ok", "weak"), (finding.section, finding.why)
        assert report.figure(finding.section).axes
    assert "nan" not in audit.render_html(report).lower().replace("nanosecond", "").replace("resonan", "")
    assert report.to_dict()


def test_sanity_says_how_many_cells_are_missing_and_where(report):
    x, _ = data(40)
    rows = {row[0]: row for row in report["sanity"].table.rows}
    counts = x.isna().sum()
    told = rows["missing cells"][1]
    assert told.startswith(f"{int(counts.sum())} of {x.size} cells: ")
    for name in "abc":
        assert f"{counts[name]} in column '{name}'" in told
    assert "'d'" not in told
    there = x.to_numpy()[~x.isna().to_numpy()]
    assert rows["input range"][1].startswith(f"{there.min():.4g} to {there.max():.4g}")
    remarks = " ".join(row[1] for row in report["sanity"].table.rows if row[2] == "noted")
    assert "the attack, the certificate and the explanations change only what is there" in remarks


def test_weakest_rows_say_what_they_miss(report):
    x, _ = data(40)
    table = report["weakest"].table
    places = table.columns.index("row"), table.columns.index("unusual values")
    for row, told in ((line[places[0]], line[places[1]]) for line in table.rows):
        gone = [name for name in "abc" if np.isnan(x[name][row])]
        assert told.endswith(f"missing: {', '.join(gone)}") if gone else "missing" not in told
        assert not any(f"{name} nan" in told for name in gone)


def test_the_attack_moves_only_what_is_there(report):
    """The radius of a linear model around missing cells is known: they add nothing to what a change can do."""
    x, _ = data(40)
    scale = x.std().to_numpy()
    attack = report["attack"].series
    rows, radius = np.array(attack["rows"]), np.array(attack["radius"])
    there = ~x.isna().to_numpy()[rows]
    margin = np.abs(x.fillna(0.0).to_numpy()[rows] @ WEIGHT)
    reach = (there * np.abs(WEIGHT) * scale).sum(1)
    truth = np.where(reach > 0, margin / np.where(reach > 0, reach, 1.0), np.inf)
    found = radius > 0
    assert found.sum() >= 30
    assert (radius[found] >= truth[found] * (1 - 1e-6)).all()
    assert np.isinf(radius[found]).tolist() == np.isinf(truth[found]).tolist()
    finite = found & np.isfinite(truth)
    assert np.median(radius[finite] / truth[finite]) < 1.1


def test_explanations_leave_missing_cells_alone(report):
    x, y = data()
    context = Context(AuditRequest(), audit.open_subject(linear(x, y), (x, y)), {"explain": 20})
    found = context.attributions
    gone = x.isna().to_numpy()[found.rows.numpy()]
    assert gone.any()
    for method in ("occlusion", "Shapley sampling"):
        values = found.maps[method].numpy()
        assert (values[gone] == 0).all()
        assert (values[~gone] != 0).mean() > 0.6
    i = int(gone.any(1).nonzero()[0][0])
    kept = found.keep(i, torch.tensor([[False] * 4, [True] * 4]))
    assert (torch.isnan(kept) == torch.tensor(gone[i].tolist())).all()
    assert torch.equal(kept[1].nan_to_num(9.0), context.subject.x[found.rows[i]].nan_to_num(9.0))


@pytest.mark.parametrize("regression", [False, True])
def test_a_question_holds_missing_cells_through_any_change(regression):
    x, y = data()
    model, target = linear(x, y), y
    if regression:
        target = x["a"].fillna(0.0) + np.linspace(0, 1, len(x))
        model = make_pipeline(SimpleImputer(), LinearRegression()).fit(x, target)
    subject = audit.open_subject(model, (x, target))
    context, rows = Context(AuditRequest(), subject), torch.arange(20)
    gone = torch.tensor(x.isna().to_numpy().tolist())[rows]
    asked = context.question(rows)
    assert torch.isfinite(asked.z).all()
    assert torch.equal(asked.free[:, :4] == 0, gone)
    assert asked.span < 20
    seen = []
    inner = subject.oracle.fun
    subject.oracle.fun = lambda z: seen.append(z.clone()) or inner(z)
    asked.oracle(asked.z + 5.0 * torch.randn(asked.z.shape, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.isnan(torch.cat(seen)), gone)


@pytest.mark.parametrize("kind", ["missing", "noise", "rounded", "rescaled", "shifted"])
def test_damage_keeps_missing_cells_and_empties_only_columns_that_have_some(kind):
    x, y = data()
    subject = audit.open_subject(linear(x, y), (x, y))
    seen = []
    subject.scores()
    inner = subject.oracle.fun
    subject.oracle.fun = lambda z: seen.append(z.clone()) or inner(z)
    context = Context(AuditRequest(), subject)
    _damaged_scores(context, subject, kind, 5, torch.Generator().manual_seed(0))
    damaged, gone = torch.cat(seen), torch.tensor(x.isna().to_numpy().tolist())
    assert torch.isnan(damaged[gone]).all()
    assert not torch.isnan(damaged[:, 3]).any()
    fresh = torch.isnan(damaged) & ~gone
    assert (fresh.sum() > 20) == (kind == "missing")
    assert (damaged != subject.x)[~gone].any()


def test_a_column_that_is_missing_is_a_slice():
    """A model wrong wherever one column is missing is named for that."""
    g = np.random.default_rng(1)
    x = pd.DataFrame(g.normal(size=(200, 2)), columns=["a", "b"])
    y = (x.a > 0).astype(int)
    x["b"] = x["b"].mask(g.random(200) < 0.3)
    swapped = y.where(~x.b.isna(), 1 - y)
    model = HistGradientBoostingClassifier(max_iter=60, min_samples_leaf=3).fit(x, swapped)
    found = audit.run(model, (x, y), n=200, only=["slices"], progress=False)["slices"]
    assert found.status == "weak"
    assert "where b is missing: accuracy" in found.headline


def test_a_model_that_takes_none_is_refused_with_columns_and_counts():
    x, y = data(30)
    whole = LogisticRegression().fit(x.fillna(0.0), y)
    counts = x.isna().sum()
    for given in (x, x.rename(columns={c: f"feature {i}" for i, c in enumerate(x)}).to_numpy()):
        model = whole if given is x else LogisticRegression().fit(np.nan_to_num(given), y)
        with pytest.raises(checks.DataError) as caught:
            audit.open_subject(model, (given, y))
        text = str(caught.value)
        assert f"holds {int(counts.sum())} missing cells" in text
        assert f"{counts['b']} in column '{'b' if given is x else 'feature 1'}'" in text
        assert "llowed: missing cells where the model takes them" in text
        assert "SimpleImputer" in text
    with pytest.raises(checks.DataError, match="scikit-learn pipeline that imputes"):
        audit.open_subject(_subjects.linear(), (torch.tensor(x.to_numpy(), dtype=torch.float32), y))


def test_only_the_column_that_is_not_taken_is_named():
    x, y = data(40)
    half = make_column_transformer((SimpleImputer(), ["a", "b"]), ("passthrough", ["c", "d"]))
    model = make_pipeline(half, LogisticRegression()).fit(x.fillna({"c": 0.0}), y)
    with pytest.raises(checks.DataError, match="takes none in column 'c'"):
        audit.open_subject(model, (x, y))
    x["c"] = x["c"].fillna(0.0)
    assert audit.open_subject(model, (x, y)).missing().sum() == x.isna().to_numpy().sum()


def test_a_model_that_answers_nan_is_refused():
    class Silent(LinearRegression):
        def predict(self, x):
            return np.asarray(x) @ self.coef_ + self.intercept_

    x, _ = data(40)
    model = Silent().fit(x.fillna(0.0).to_numpy(), x["a"].fillna(0.0))
    with pytest.raises(checks.DataError, match="it answers NaN"):
        audit.open_subject(model, (x.to_numpy(), x["a"].fillna(0.0)))


def test_infinity_is_refused_where_missing_cells_are_taken():
    x, y = data(40)
    model = linear(x, y)
    x.iloc[3, 3] = np.inf
    with pytest.raises(checks.DataError, match="1 infinite values: 1 in column 'd'"):
        audit.open_subject(model, (x, y))


def test_bounds_are_those_of_the_values_that_are_there():
    x, y = data(60)
    model = linear(x, y)
    top = float(np.nanmax(np.abs(x.to_numpy())))
    with pytest.raises(checks.DataError, match="allowed: the range"):
        audit.run(model, (x, y), bounds=(-0.5 * top, 0.5 * top), only=["attack"], progress=False)
    found = audit.run(model, (x, y), bounds=(-top, top), only=["attack", "certify"], n=40, progress=False)
    radius = np.array(found["attack"].series["radius"])
    assert np.isfinite(radius).mean() > 0.8
    assert found["certify"].status in ("ok", "weak")


def test_regression_with_missing_cells_is_exact_on_a_linear_model():
    x, _ = data(40)
    y = x.fillna(0.0).to_numpy() @ WEIGHT
    model = make_pipeline(SimpleImputer(strategy="constant", fill_value=0.0), LinearRegression()).fit(x, y)
    found = audit.run(model, (x, y), skip=["explain", "faithfulness"], n=40, progress=False)
    assert not [f.section for f in found.findings if f.status == "failed"]
    attack = found["attack"].series
    there = ~x.isna().to_numpy()[attack["rows"]]
    reach = (there * np.abs(WEIGHT) * x.std().to_numpy()).sum(1)
    truth = 0.25 * y.std(ddof=1) / np.maximum(reach, 1e-300)
    radius = np.array(attack["radius"])
    finite = np.isfinite(radius)
    assert (radius[finite] >= truth[finite] * (1 - 1e-6)).all()
    assert np.median(radius[finite] / truth[finite]) < 1.1


def test_a_missing_category_is_one_of_its_own():
    g = np.random.default_rng(2)
    x = pd.DataFrame({"a": g.normal(size=120), "colour": g.choice(["red", "blue", None], 120)})
    y = (x.a + (x.colour == "red") > 0.3).astype(int)
    encoded = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["colour"]), (SimpleImputer(), ["a"])
    )
    model = make_pipeline(encoded, LogisticRegression()).fit(x, y)
    report = audit.run(model, (x, y), only=["sanity", "attack", "slices"], n=24, progress=False)
    assert not [f for f in report.findings if f.status == "failed"]
    told = str(report["sanity"].table.rows)
    assert "cells: " in told
    assert (
        f"{int(x.colour.isna().sum())} in column 'colour'" in told
    )  # of the data as given, of which 24 rows were drawn
    assert "colour: what is missing is a category of its own" in told
    subject = audit.open_subject(model, (x, y))
    np.testing.assert_allclose(subject.scores().numpy(), model.predict_proba(x))
    strict = make_column_transformer((OrdinalEncoder(), ["colour"]), (SimpleImputer(), ["a"]))
    picky = make_pipeline(strict, LogisticRegression()).fit(x.dropna(), y[x.colour.notna()])
    with pytest.raises(checks.DataError, match="takes none in column 'colour'"):
        audit.open_subject(picky, (x, y))


def test_a_seed_gives_the_same_numbers():
    x, y = data(60)
    frames = [
        audit.run(linear(x, y), (x, y), only=["explain", "attack"], n=20, progress=False).to_frame()
        for _ in range(2)
    ]
    columns = ["section", "metric", "value", "low", "high", "control"]
    assert frames[0][columns].equals(frames[1][columns])


def test_bounds_of_a_table_without_any_number_are_no_error():
    x, y = data(40)
    model = HistGradientBoostingClassifier(max_iter=2).fit(x, y)
    empty = pd.DataFrame(np.nan, index=x.index, columns=x.columns)
    report = audit.run(model, (empty, y), bounds=(-9, 9), only=["sanity", "attack"], progress=False)
    assert "no range" not in str(report["sanity"].table.rows)


def test_no_column_is_blamed_for_what_another_one_does():
    g = np.random.default_rng(0)
    x = pd.DataFrame({"size": g.normal(size=60), "kind": g.choice(["p", "q"], 60)})
    x.loc[:5, "size"] = np.nan
    y = (x["kind"] == "p").astype(int)
    first = make_column_transformer((SimpleImputer(), ["size"]), (OneHotEncoder(), ["kind"]))
    model = make_pipeline(first, LogisticRegression()).fit(x, y)
    # A column of text that is wholly empty is read as numbers, which the encoder of texts refuses whatever is in "size".
    with pytest.raises(checks.DataError, match="takes none") as caught:
        audit.open_subject(model, (x.assign(kind=np.nan), y))
    assert "takes none in column" not in str(caught.value)
