"""Tables, labels and encodings: what is read, and what a file that cannot be used is told."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import perturbkit.audit as audit
from perturbkit.core import checks

sys.path.insert(0, str(Path(__file__).parent.parent))
import _subjects


def table(n=20):
    x, y = _subjects.table(n)
    return pd.DataFrame(x.numpy(), columns=["a", "b", "c", "d"]).assign(label=y.numpy())


def refused(data, *parts, error=checks.DataError, model=None):
    with pytest.raises(error) as caught:
        audit.open_subject(model or _subjects.linear(), data)
    for part in (*parts, "llowed"):
        assert part in str(caught.value), (part, str(caught.value))


def test_parquet_and_csv_give_the_same(tmp_path):
    pytest.importorskip("pyarrow", reason="the extra parquet")
    table().to_parquet(tmp_path / "d.parquet")
    table().to_csv(tmp_path / "d.csv", index=False)
    one, two = (audit.open_subject(_subjects.linear(), str(tmp_path / f"d.{k}")) for k in ("parquet", "csv"))
    torch.testing.assert_close(one.x, two.x, rtol=1e-6, atol=1e-6)
    assert one.x.dtype == torch.float32
    assert one.y.tolist() == two.y.tolist()


@pytest.mark.parametrize("kind", ["int8", "bool", "Int64", "boolean", "float32"])
def test_columns_of_any_number_type(tmp_path, kind):
    pytest.importorskip("pyarrow", reason="the extra parquet")
    frame = table()
    frame["c"] = pd.Series([0, 1] * 10).astype(kind)
    frame.to_parquet(tmp_path / "d.parquet")
    found = audit.open_subject(_subjects.linear(), str(tmp_path / "d.parquet"))
    assert found.x[:, 2].tolist() == [0.0, 1.0] * 10


def test_parquet_refusals(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow", reason="the extra parquet")
    path = tmp_path / "d.parquet"
    path.write_bytes(b"PAR1 junk")
    refused(str(path), "could not be read as Parquet", "to_parquet")
    table().iloc[:0].to_parquet(path)
    refused(str(path), "no rows")
    table().drop(columns="label").to_parquet(path)
    refused(str(path), "no column 'label'", "--label")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(checks.MissingExtraError, match=r"perturbkit\[parquet\]"):
        audit.open_subject(_subjects.linear(), str(path))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_in_utf8_with_and_without_a_mark(tmp_path, encoding):
    frame = table().rename(columns={"a": "größe"})
    frame["label"] = np.where(frame.label == 1, "süß", "salzig")
    frame.to_csv(tmp_path / "d.csv", index=False, encoding=encoding)
    found = audit.open_subject(_subjects.linear(), str(tmp_path / "d.csv"))
    assert found.feature_names[0] == "größe"
    assert found.classes == ("salzig", "süß")


def test_other_encodings_and_separators_are_named(tmp_path):
    path = tmp_path / "d.csv"
    table().rename(columns={"a": "größe"}).to_csv(path, index=False, encoding="latin-1")
    refused(str(path), "not in UTF-8", "iconv")
    for mark, spoken in ((";", "semicolons"), ("\\t", "tabs")):
        table().to_csv(path, index=False, sep=mark.encode().decode("unicode_escape"))
        refused(str(path), f"separated by {spoken}", "commas")
    path.write_text("a,a,label\n1,2,0\n3,4,1\n")
    assert audit.open_data(str(path)).frame.shape == (2, 2)  # pandas tells the two apart as a and a.1
    path.write_text("label\n0\n1\n")
    refused(str(path), "no column beside the label")


def test_jsonl_with_a_mark_and_in_another_encoding(tmp_path):
    def predict(texts):
        return torch.tensor([[float("bad" in t), float("good" in t)] for t in texts])

    path = tmp_path / "t.jsonl"
    text = '{"text": "gööd\\u2028 good", "label": "pos"}\n{"text": "bad", "label": "neg"}\n'
    path.write_text(text, encoding="utf-8-sig")
    found = audit.open_subject(predict, str(path))
    assert found.predictions().tolist() == found.y.tolist() == [1, 0]
    path.write_bytes(text.encode("latin-1"))
    refused(str(path), "not in UTF-8", model=predict)
    path.write_text('{"text": "x", "label": null}\n{"text": "y", "label": 1}\n')
    refused(str(path), "1 rows without a label", model=predict)


def test_a_text_that_is_missing(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('text,label\n"good",1\n,0\n')
    refused(str(path), "1 rows without a text", model=lambda t: torch.zeros(len(t), 2))


@pytest.mark.parametrize(
    ("labels", "classes", "y"),
    [
        ([0.0, 1.0, 0.0, 1.0], ("0", "1"), [0, 1, 0, 1]),
        ([True, False, True, False], ("0", "1"), [1, 0, 1, 0]),
        (["b", "a", "b", "a"], ("a", "b"), [1, 0, 1, 0]),
        (["10", "9", "10", "9"], ("9", "10"), [1, 0, 1, 0]),
    ],
    ids=["floats", "bools", "names", "digits"],
)
def test_labels_of_any_kind(labels, classes, y):
    x, _ = _subjects.table(4)
    found = audit.open_subject(
        _subjects.linear(), (x, np.array(labels, dtype=None if labels[0] != "b" else object))
    )
    assert found.classes == classes
    assert found.y.tolist() == y


def test_missing_and_one_hot_labels():
    x, _ = _subjects.table(4)
    refused((x, pd.Series([0, None, 1, 1])), "1 rows without a label")
    refused((x, np.eye(2)[[0, 1, 0, 1]]), "y has shape (4, 2)", "argmax")
    assert audit.open_subject(_subjects.linear(), (x, np.array([[0], [1], [0], [1]]))).y.tolist() == [
        0,
        1,
        0,
        1,
    ]


def test_numbers_in_a_frame_reach_a_torch_model():
    frame = table()
    found = audit.open_subject(_subjects.linear(), (frame.drop(columns="label"), frame.label))
    assert found.feature_names == ("a", "b", "c", "d")
    assert found.x.dtype == torch.float32
    grouped = audit.open_subject(
        _subjects.linear(), (frame.drop(columns="label").assign(site="x"), frame.label), group="site"
    )
    assert grouped.groups == ("x",) * 20
    assert grouped.feature_names == ("a", "b", "c", "d")
    for options in ({"group": "site"}, {"label": "y"}):
        with pytest.raises(checks.DataError, match="given as a pair; allowed"):
            audit.open_subject(_subjects.linear(), _subjects.table(6), **options)
    twice = pd.DataFrame(np.zeros((4, 2)), columns=["a", "a"])
    refused((twice, [0, 1, 0, 1]), "column 'a' twice")


def test_folder_names_are_matched_with_the_names_of_the_model(tmp_path):
    from PIL import Image

    from perturbkit.audit.opening._opened import OpenedModel
    from perturbkit.audit.opening.door import _classes

    for name in ("alpha", "beta"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "photos" / name / "1.png")
    data = audit.open_data(str(tmp_path / "photos"))
    notes = []
    y, classes = _classes(OpenedModel(None, "m", classes=("Beta", "Alpha")), data, 2, notes)
    assert (y.tolist(), classes, notes) == ([1, 0], ("Beta", "Alpha"), [])
    y, classes = _classes(OpenedModel(None, "m", classes=("cat", "dog")), data, 2, notes)
    assert (y.tolist(), classes) == ([0, 1], ("alpha", "beta"))
    assert len(notes) == 1


def test_pairs_that_cannot_be_used():
    x, y = _subjects.table(6)
    images, labels = _subjects.images(6)
    refused((x[:0], y[:0]), "no rows")
    refused((table().drop(columns="label")[:0], []), "no rows")
    refused((x, None), "y is None")
    refused((x.numpy().astype(complex), y), "complex numbers")
    refused(([[1.0, 2.0], [3.0]], [0, 1]), "holds no plain numbers")
    for task, pair in (("image", (x, y)), ("tabular", (images, labels))):
        with pytest.raises(checks.DataError, match=f"the task is '{task}', but x has shape.*allowed"):
            audit.open_subject(_subjects.linear(), pair, task=task)
    with pytest.raises(checks.DataError, match="is a table; allowed"):
        audit.open_subject(_subjects.linear(), (table().drop(columns="label"), table().label), task="image")
    refused((x, y), "the class Linear", error=checks.ModelError, model=torch.nn.Linear)


def test_arrays_of_objects_and_of_texts():
    x, y = _subjects.table(6)
    found = audit.open_subject(_subjects.linear(), (x.numpy().astype(object), y))
    torch.testing.assert_close(found.x, x)

    def predict(texts):
        return torch.tensor([[float("bad" in t), float("good" in t)] for t in texts])

    for texts in (
        np.array(["good", "bad"]),
        np.array(["good", "bad"], dtype=object),
        pd.Series(["good", "bad"]),
    ):
        assert audit.open_subject(predict, (texts, [1, 0])).task == "text"
