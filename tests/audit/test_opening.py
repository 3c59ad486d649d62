"""Opening models and data: what is accepted, and what every bad file is told."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import perturbkit.audit as audit
from perturbkit.audit import open_subject
from perturbkit.core import checks

sys.path.insert(0, str(Path(__file__).parent))
import _subjects


def write_csv(path, extra=""):
    x, y = _subjects.table(20)
    lines = [
        "a,b,c,d,label",
        *(",".join(f"{v:.4f}" for v in row) + f",{int(t)}" for row, t in zip(x, y, strict=True)),
    ]
    path.write_text("\n".join(lines) + "\n" + extra)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_model_for_tests.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build():\n    net = nn.Linear(4, 2)\n    return net.eval()\n"
        "def predict(x):\n    return torch.stack([-x[:, 0], x[:, 0]], 1)\n"
        "def broken():\n    raise RuntimeError('no weights')\n"
        "number = 3\n"
        "def flat(x):\n    return x[:, 0]\n"
        "def nan(x):\n    return torch.full((len(x), 2), float('nan'))\n"
        "def picky(x):\n    raise ValueError('expected 7 columns')\n"
    )
    yield tmp_path
    sys.modules.pop("own_model_for_tests", None)


def test_csv_and_a_function(here):
    found = open_subject("own_model_for_tests:predict", str(write_csv(here / "d.csv")))
    assert (found.task, found.n, found.feature_names) == ("tabular", 20, ("a", "b", "c", "d"))
    assert found.scores().shape == (20, 2)


def test_a_function_without_arguments_makes_the_model(here):
    found = open_subject("own_model_for_tests:build", str(write_csv(here / "d.csv")))
    assert isinstance(found.oracle.fun, nn.Linear)


def test_npz_images(here):
    x, y = _subjects.images(6)
    np.savez(here / "d.npz", x=x.numpy(), y=y.numpy())
    found = open_subject(_subjects.image_model(), str(here / "d.npz"))
    assert found.task == "image"
    assert found.bounds == (0.0, 1.0)


def test_image_folder(here):
    from PIL import Image

    x, y = _subjects.images(4)
    for i, (picture, label) in enumerate(zip(x, y, strict=True)):
        folder = here / "photos" / ("left", "right")[int(label)]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(folder / f"{i}.png")
    (here / "photos" / ".ipynb_checkpoints").mkdir()
    (here / "photos" / "__MACOSX").mkdir()
    found = open_subject(_subjects.image_model(), str(here / "photos"))
    assert found.classes == ("left", "right")
    assert bool((found.predictions() == found.y).all())


def test_texts_as_jsonl_and_csv(here):
    (here / "t.jsonl").write_text(
        '{"text": "good day", "label": "pos"}\n\n{"text": "bad, really", "label": "neg"}\n'
    )
    (here / "t.csv").write_text('text,label\n"good day",pos\n"bad, really",neg\n')

    def predict(texts):
        return torch.tensor([[float("bad" in t), float("good" in t)] for t in texts])

    for name in ("t.jsonl", "t.csv"):
        found = open_subject(predict, str(here / name))
        assert found.task == "text"
        assert found.classes == ("neg", "pos")
        assert found.predictions().tolist() == found.y.tolist()


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_exported_program(here, dynamic):
    net = _subjects.linear().eval()
    example = (torch.zeros(3, 4),)
    shapes = ({0: torch.export.Dim("n")},) if dynamic else None
    torch.export.save(torch.export.export(net, example, dynamic_shapes=shapes), here / "m.pt2")
    found = open_subject(str(here / "m.pt2"), str(write_csv(here / "d.csv")))
    torch.testing.assert_close(found.oracle(found.x), net(found.x), rtol=1e-6, atol=1e-6)
    assert found.has_gradient()


def test_predictions(here):
    (here / "p.csv").write_text("cat,dog,label,site\n0.9,0.1,cat,x\n0.2,0.8,dog,y\n0.4,0.6,cat,x\n")
    found = open_subject(str(here / "p.csv"), None, group="site")
    assert found.task == "predictions"
    assert found.y.tolist() == [0, 1, 0]
    assert found.groups == ("x", "y", "x")


def refused(call, error, *parts):
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    for part in (*parts, "llowed"):
        assert part in text, (part, text)


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("model.pkl", ["a pickle"]),
        ("weights.pth", ["a pickle", "torch.export"]),
        ("gone.pt2", ["there is no gone.pt2"]),
        ("just_a_name", ["module:function"]),
        ("no_such_module_here:f", ["no module"]),
        ("own_model_for_tests:missing", ["has no 'missing'", "predict"]),
        ("own_model_for_tests:number", ["is a int"]),
        ("own_model_for_tests:flat", ["at least two classes"]),
        ("own_model_for_tests:nan", ["NaN"]),
        ("own_model_for_tests:picky", ["expected 7 columns"]),
    ],
)
def test_refused_models(here, model, parts):
    refused(lambda: open_subject(model, str(write_csv(here / "d.csv"))), checks.ModelError, *parts)


def test_a_factory_that_raises(here):
    with pytest.raises(checks.ModelError, match="no weights"):
        open_subject("own_model_for_tests:broken", str(write_csv(here / "d.csv")))


def test_damaged_program(here):
    (here / "m.pt2").write_bytes(b"PK not a program")
    refused(lambda: open_subject("m.pt2", str(write_csv(here / "d.csv"))), checks.ModelError, "torch.export")


def test_refused_data(here):
    net = _subjects.linear()
    (here / "empty.csv").write_text("")
    (here / "header.csv").write_text("a,b,label\n")
    (here / "nolabel.csv").write_text("a,b\n1,2\n3,4\n")
    (here / "words.csv").write_text("a,b,c,label\n1,red,1,0\n2,blue,1,1\n")
    (here / "half.csv").write_text("a,b,c,d,label\n1,1,0,0,0.5\n-2,-2,0,0,1\n")
    (here / "odd.txt").write_text("x")
    (here / "p.pkl").write_bytes(b"x")
    np.savez(here / "objects.npz", x=np.array([{}], dtype=object), y=[0])
    np.savez(here / "names.npz", data=[1.0])
    (here / "bad.jsonl").write_text('{"text": "fine", "label": 0}\nnot json\n')
    (here / "blank").mkdir()
    cases = {
        "gone.csv": "there is no",
        "empty.csv": "is empty",
        "header.csv": "no rows",
        "nolabel.csv": "no column 'label'",
        "words.csv": "text in column 'b'",
        "odd.txt": "of kind '.txt'",
        "p.pkl": "a pickle",
        "objects.npz": "could not be read",
        "names.npz": "has the arrays data",
        "bad.jsonl": "line 2",
        "blank": "no images in class folders",
    }
    for name, part in cases.items():
        refused(lambda n=name: open_subject(net, n), checks.DataError, part)
    refused(lambda: open_subject(net, "half.csv"), checks.ModelError, "the targets are not whole", "--label")


def test_a_nan_is_named_by_its_column(here):
    write_csv(here / "d.csv", "1,,2,3,0\n")
    refused(lambda: open_subject(_subjects.linear(), "d.csv"), checks.DataError, "column 'b'", "1 NaN")


def test_labels_beyond_the_outputs(here):
    write_csv(here / "d.csv", "1,2,3,4,7\n")
    refused(lambda: open_subject(_subjects.linear(), "d.csv"), checks.DataError, "label 7", "2 outputs")


def test_negative_label(here):
    write_csv(here / "d.csv", "1,2,3,4,-1\n")
    refused(lambda: open_subject(_subjects.linear(), "d.csv"), checks.DataError, "-1")


def test_images_out_of_range(here):
    x, y = _subjects.images(4)
    refused(lambda: open_subject(_subjects.image_model(), (255 * x, y)), checks.DataError, "--bounds")
    assert open_subject(_subjects.image_model(), (255 * x, y), bounds=(0.0, 255.0)).bounds == (0.0, 255.0)


def test_wrong_shapes():
    x, y = _subjects.table(6)
    refused(lambda: open_subject(_subjects.linear(), (x[0], y)), checks.DataError, "x has shape")
    refused(lambda: open_subject(_subjects.linear(), (x, y[:3])), checks.DataError, "6 rows and y 3")
    refused(lambda: open_subject(_subjects.linear(), (x[:, :3], y)), checks.ModelError, "shape (2, 3)")
    refused(lambda: open_subject(_subjects.linear(), 3), checks.DataError, "the data is a int")
    refused(lambda: open_subject(_subjects.linear(), None), checks.DataError, "no data is given")


def test_a_link_out_of_the_folder_is_refused(here):
    from PIL import Image

    outside = here / "secret.png"
    Image.new("RGB", (16, 16)).save(outside)
    folder = here / "photos" / "left"
    folder.mkdir(parents=True)
    (folder / "a.png").symlink_to(outside)
    refused(lambda: open_subject(_subjects.image_model(), "photos"), checks.DataError, "link out of")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a,b,label\n0.9,0.3,0\n", "rows that sum to 1"),
        ("a,label\n0.9,0\n", "at least two"),
        ("a,b,label\n0.9,0.1,2\n", "label 2"),
        ("a,b,label\n0.9,0.1,zebra\n", "zebra"),
        ("a,b,label\n0.9,x,0\n", "column 'b'"),
    ],
)
def test_refused_predictions(here, text, part):
    (here / "p.csv").write_text(text)
    refused(lambda: open_subject("p.csv", None), checks.DataError, part)


def test_predictions_with_data_beside_them(here):
    (here / "p.csv").write_text("a,b,label\n0.9,0.1,0\n")
    refused(lambda: open_subject("p.csv", "d.csv"), checks.DataError, "predictions alone")


def test_a_budget_spent_while_opening_is_said_to_be_spent(here):
    def slow(x):
        time.sleep(0.3)
        return x

    path = str(write_csv(here / "d.csv"))
    with pytest.raises(checks.ArgumentError, match="spent before the first section"):
        audit.run(slow, path, budget=0.2, progress=False)
