"""scikit-learn estimators, in Python and from skops files: what they answer, and what is refused."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.compose import make_column_transformer
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    VotingClassifier,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier

import perturbkit.audit as audit
from perturbkit.core import checks

sys.path.insert(0, str(Path(__file__).parent.parent))
import _subjects


def frame(n=120, seed=0):
    """Two numbers and a city; the number ``a`` and the city decide, by names."""
    rng = np.random.default_rng(seed)
    x = pd.DataFrame(
        {"a": rng.normal(size=n), "b": rng.normal(size=n), "city": rng.choice(["Bern", "Oslo"], n)}
    )
    score = x.a + 1.5 * (x.city == "Oslo") - 0.75
    return x, np.where(score + 0.3 * rng.normal(size=n) > 0, "yes", "no")


def pipeline(x, y, model=None):
    encode = make_column_transformer((OneHotEncoder(), ["city"]), remainder="passthrough")
    return make_pipeline(encode, model or LogisticRegression()).fit(x, y)


def arrays():
    x, y = _subjects.table(80)
    return x.double().numpy(), y.numpy()


MODELS = {
    "logistic": LogisticRegression(),
    "scaled": make_pipeline(StandardScaler(), LogisticRegression()),
    "forest": RandomForestClassifier(10, random_state=0),
    "tree": DecisionTreeClassifier(random_state=0),
    "boosting": GradientBoostingClassifier(n_estimators=5, random_state=0),
    "histogram": HistGradientBoostingClassifier(max_iter=5, min_samples_leaf=5),
}


@pytest.mark.parametrize("name", MODELS)
def test_probabilities_are_those_of_the_estimator(name):
    x, y = arrays()
    model = MODELS[name].fit(x, y)
    found = audit.open_subject(model, (x, y))
    np.testing.assert_array_equal(found.scores().numpy(), model.predict_proba(x))
    assert found.oracle.nfev == len(x) + 2
    assert not found.has_gradient()
    assert found.classes == ("0", "1")


@pytest.mark.parametrize("name", MODELS)
def test_a_skops_file_answers_as_the_estimator(name, tmp_path):
    skops = pytest.importorskip("skops.io", reason="the extra skops")
    x, y = arrays()
    model = MODELS[name].fit(x, np.where(y == 1, "yes", "no"))
    skops.dump(model, tmp_path / "m.skops")
    found = audit.open_subject(str(tmp_path / "m.skops"), (x, np.where(y == 1, "yes", "no")))
    np.testing.assert_array_equal(found.scores().numpy(), model.predict_proba(x))
    assert found.classes == ("no", "yes")
    assert found.y.tolist() == y.tolist()


def test_labels_go_by_the_classes_of_the_estimator():
    x, y = arrays()
    model = LogisticRegression().fit(x, 5 - 3 * y)  # classes 2 and 5, in this order
    found = audit.open_subject(model, (x, 5 - 3 * y))
    assert found.classes == ("2", "5")
    assert float((found.predictions() == found.y).double().mean()) > 0.9
    again = audit.open_subject(model, (x, (5 - 3 * y).astype(float)))
    assert again.y.tolist() == found.y.tolist()


def test_truth_values_and_numbers_stand_for_each_other():
    x, y = arrays()
    of_numbers, of_truths = LogisticRegression().fit(x, y), LogisticRegression().fit(x, y.astype(bool))
    for model in (of_numbers, of_truths):
        for labels in (y, y.astype(bool), y.astype(float)):
            assert audit.open_subject(model, (x, labels)).y.tolist() == y.tolist()


@pytest.mark.parametrize("model", [SVC(), LinearSVC()], ids=["svc", "linear"])
def test_a_decision_is_read_as_the_logit(model):
    x, y = arrays()
    found = audit.open_subject(model.fit(x, y), (x, y))
    p = found.probabilities()[:, 1]
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-model.decision_function(x))), rtol=1e-10)
    assert any("decision_function is read as logits" in r for r in found.remarks)


def test_a_data_frame_with_a_category_through_a_pipeline():
    x, y = frame()
    model = pipeline(x, y)
    shuffled = x[["city", "b", "a"]].assign(noise=1.0)
    found = audit.open_subject(model, (shuffled, y))
    np.testing.assert_allclose(found.scores().numpy(), model.predict_proba(x), rtol=1e-12)
    assert found.feature_names == ("a", "b", "city")
    assert found.held.tolist() == [False, False, True]
    assert any("not fitted on noise" in r for r in found.remarks)


def test_no_attack_and_no_damage_changes_a_category():
    # Only the city counts, so what leaves cities alone changes no answer. Neighbours in the alphabet answer differently,
    # so that noise on the place in it would.
    x, _ = frame()
    cities = ["Bern", "Kiel", "Lyon", "Oslo", "Riga", "Turin"]
    x["city"] = np.array(cities)[np.arange(len(x)) % 6]
    y = np.where(np.arange(len(x)) % 2 == 1, "yes", "no")
    report = audit.run(pipeline(x, y), (x, y), only=["attack", "certify", "corruption"], n=40, progress=False)
    assert report["attack"].metric("radius.median").value == np.inf
    assert report["corruption"].metric("accuracy.worst").value == 1.0
    draws = report["certify"].series["radius"]
    assert min(draws) == max(draws) > 0.1  # every noisy copy agreed


def test_a_column_keeps_its_type():
    x, y = frame()
    x["city"] = x.city.astype("category")
    x["size"] = pd.Series(np.arange(len(x)) % 3, dtype="category")
    model = HistGradientBoostingClassifier(max_iter=5, categorical_features="from_dtype").fit(x, y)
    found = audit.open_subject(model, (x[::-1], y[::-1]))
    np.testing.assert_array_equal(found.scores().numpy(), model.predict_proba(x)[::-1])
    assert found.held.tolist() == [False, False, True, True]


def test_the_commonest_category_stands_for_one_taken_away():
    x, y = frame()
    x["city"] = np.where(np.arange(len(x)) % 4 == 0, "Bern", "Oslo")
    report = audit.run(pipeline(x, y), (x, y), only=["explain"], progress=False)
    names = [row[0] for row in report["explain"].table.rows]
    assert names[0] == "a"
    assert "Shapley sampling" in report["explain"].table.columns[1]


def test_a_frame_from_parquet_and_csv_reaches_the_pipeline(tmp_path):
    x, y = frame()
    skops = pytest.importorskip("skops.io", reason="the extra skops")
    pytest.importorskip("pyarrow", reason="the extra parquet")
    model = pipeline(x, y)
    skops.dump(model, tmp_path / "m.skops")
    table = x.assign(y=y)
    table.to_csv(tmp_path / "d.csv", index=False)
    table.assign(city=table.city.astype("category")).to_parquet(tmp_path / "d.parquet")
    for name in ("d.csv", "d.parquet"):
        found = audit.open_subject(str(tmp_path / "m.skops"), str(tmp_path / name))
        np.testing.assert_allclose(found.scores().numpy(), model.predict_proba(x), rtol=1e-9)


def test_a_group_that_the_model_was_fitted_on_stays_an_input(tmp_path):
    x, y = frame(40)
    model = pipeline(x, y)
    x.assign(y=y, site="north").to_csv(tmp_path / "d.csv", index=False)
    for group, expected in (("city", tuple(x.city)), ("site", ("north",) * 40)):
        found = audit.open_subject(model, str(tmp_path / "d.csv"), group=group)
        assert found.groups == expected
        assert found.feature_names == ("a", "b", "city")
        np.testing.assert_allclose(found.scores().numpy(), model.predict_proba(x), rtol=1e-9)


def test_a_pipeline_of_texts():
    texts = ["good film", "bad film", "good day", "bad day"] * 6
    labels = ["pos", "neg"] * 12
    model = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, labels)
    report = audit.run(model, (texts, labels), progress=False)
    assert report.task == "text"
    assert report["sanity"].metric("accuracy").value == 1.0
    # What is proved of texts and what attacks them are not comparable.
    assert [f.section for f in report.findings if f.why] == ["sandwich"]
    assert "Left out: integrated gradients" in report["explain"].does_not_show


def test_a_regressor_answers_numbers_whatever_the_targets_look_like():
    x, y = arrays()
    found = audit.open_subject(LinearRegression().fit(x, y), (x, y))
    assert found.regression
    assert found.y.dtype == torch.float64


def refused(model, data, error, *parts):
    with pytest.raises(error) as caught:
        audit.open_subject(model, data)
    for part in (*parts, "allowed"):
        assert part in str(caught.value), (part, str(caught.value))


def test_refused_estimators():
    x, y = arrays()
    refused(LogisticRegression(), (x, y), checks.ModelError, "not fitted", "Call fit")
    refused(StandardScaler().fit(x), (x, y), checks.ModelError, "neither a classifier nor a regressor")
    hard = VotingClassifier([("a", LogisticRegression())]).fit(x, y)
    refused(hard, (x, y), checks.ModelError, "labels alone", "CalibratedClassifierCV")
    several = DecisionTreeClassifier().fit(x, np.stack([y, 1 - y], 1))
    refused(several, (x, y), checks.ModelError, "several targets")
    many = LinearRegression().fit(x, np.stack([y, y], 1))
    refused(many, (x, y + 0.5), checks.ModelError, "2 numbers a row", "one target")
    good = LogisticRegression().fit(x, y)
    refused(good, (x[:, :3], y), checks.ModelError, "fitted on 4 columns", "has 3")
    refused(good, (x, y + 1), checks.DataError, "label '2'", "allowed: 0, 1", "fitted with")


def test_refused_frames():
    x, y = frame()
    model = pipeline(x, y)
    refused(model, (x[["a", "city"]], y), checks.DataError, "lacks the column 'b'")
    refused(model, (x.assign(a=np.nan), y), checks.DataError, "120 missing cells", "120 in column 'a'")
    holes = x.assign(city=x.city.where(x.index > 2))
    refused(model, (holes, y), checks.DataError, "3 missing cells", "3 in column 'city'", "takes none")
    refused(
        model,
        (x.assign(a=[f"text {i}" for i in range(120)]), y),
        checks.DataError,
        "120 different texts",
        "'a'",
    )
    dates = x.assign(a=pd.Timestamp("2020-01-01"))
    refused(model, (dates, y), checks.DataError, "dates in column 'a'", "days since")
    refused(
        _subjects.linear(),
        (x, y),
        checks.DataError,
        "text in column 'city'",
        "pipeline fitted on a data frame",
    )
    refused(model, (x, y[:3]), checks.DataError, "120 rows and y 3")


def test_refused_skops_files(tmp_path):
    skops = pytest.importorskip("skops.io", reason="the extra skops")
    x, y = arrays()
    near = KNeighborsClassifier(algorithm="kd_tree").fit(x, y)
    skops.dump(near, tmp_path / "near.skops")
    refused(str(tmp_path / "near.skops"), (x, y), checks.ModelError, "KDTree", "not trusted", "skops.io.load")
    skops.dump(np.zeros(3), tmp_path / "array.skops")
    refused(str(tmp_path / "array.skops"), (x, y), checks.ModelError, "holds a ndarray")
    (tmp_path / "junk.skops").write_bytes(b"PK junk")
    refused(str(tmp_path / "junk.skops"), (x, y), checks.ModelError, "could not be read as a skops file")
    refused(str(tmp_path / "m.joblib"), (x, y), checks.ModelError, "a pickle", "skops.io.dump")


@pytest.mark.parametrize("part", ["left_child", "feature"])
def test_a_tree_that_points_outside_itself_is_refused(tmp_path, part):
    skops = pytest.importorskip("skops.io", reason="the extra skops")
    x, y = arrays()
    model = RandomForestClassifier(3, random_state=0).fit(x, y)
    tree = model.estimators_[1].tree_
    state = tree.__getstate__()
    state["nodes"][part][0] = 10_000
    tree.__setstate__(state)
    skops.dump(model, tmp_path / "bad.skops")
    refused(str(tmp_path / "bad.skops"), (x, y), checks.ModelError, "nodes point outside it")


def test_a_histogram_tree_that_points_outside_itself_is_refused(tmp_path):
    skops = pytest.importorskip("skops.io", reason="the extra skops")
    x, y = arrays()
    model = HistGradientBoostingClassifier(max_iter=2, min_samples_leaf=5).fit(x, y)
    model._predictors[0][0].nodes["left"][0] = 10_000
    skops.dump(model, tmp_path / "bad.skops")
    refused(str(tmp_path / "bad.skops"), (x, y), checks.ModelError, "nodes point outside it")
