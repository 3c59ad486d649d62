"""ONNX files: scores as PyTorch gives them, whatever the batch size, precision and outputs; and what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import perturbkit.audit as audit
from perturbkit.core import checks

sys.path.insert(0, str(Path(__file__).parent.parent))
import _subjects

onnx = pytest.importorskip("onnx", reason="the extra onnx")
pytest.importorskip("onnxruntime", reason="the extra onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

WEIGHT = np.array([[-1.0, 1.0], [-1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
OPSETS = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
KINDS = {
    "float": (TensorProto.FLOAT, np.float32),
    "float16": (TensorProto.FLOAT16, np.float16),
    "double": (TensorProto.DOUBLE, np.float64),
    "int64": (TensorProto.INT64, np.int64),
    "int32": (TensorProto.INT32, np.int32),
}


def write(path, *, kind="float", batch="n", extra=(), outputs=None, weight=WEIGHT):
    """Write x W as an ONNX file; whole numbers are cast inside."""
    code, dtype = KINDS[kind]
    whole = kind.startswith("int")
    inside = (TensorProto.FLOAT, np.float32) if whole else (code, dtype)
    nodes = [helper.make_node("Cast", ["x"], ["z"], to=TensorProto.FLOAT)] if whole else []
    nodes += [helper.make_node("MatMul", ["z" if whole else "x", "w"], ["logits"]), *extra]
    outs = outputs or [helper.make_tensor_value_info("logits", inside[0], [batch, weight.shape[1]])]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", code, [batch, 4])], outs,
        [numpy_helper.from_array(weight.astype(inside[1]), "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=9)
    onnx.save(model, path)
    return str(path)


@pytest.mark.parametrize("batch", ["n", 1, 7])
@pytest.mark.parametrize("kind", ["float", "float16", "double"])
def test_scores_are_those_of_the_network(tmp_path, batch, kind):
    x, y = _subjects.table(20)
    found = audit.open_subject(write(tmp_path / "m.onnx", kind=kind, batch=batch), (x, y))
    expected = _subjects.linear()(x)
    tolerance = 2e-2 if kind == "float16" else 1e-5
    torch.testing.assert_close(found.scores().float(), expected, rtol=tolerance, atol=tolerance)
    assert found.oracle.nfev == 20 + 2
    assert found.scores().dtype == (torch.float64 if kind == "double" else torch.float32)
    assert not found.has_gradient()


@pytest.mark.parametrize("kind", ["int64", "int32"])
def test_whole_inputs_are_rounded_and_said_so(tmp_path, kind):
    x, y = _subjects.table(20)
    found = audit.open_subject(write(tmp_path / "m.onnx", kind=kind), (x, y))
    torch.testing.assert_close(found.scores(), _subjects.linear()(x.round()), rtol=1e-5, atol=1e-5)
    assert any("whole numbers" in r for r in found.remarks)


def test_of_several_outputs_the_logits_are_read_and_named(tmp_path):
    label = helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0)
    square = helper.make_node("Mul", ["logits", "logits"], ["features"])
    outputs = [
        helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]),
        helper.make_tensor_value_info("features", TensorProto.FLOAT, ["n", 2]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 2]),
    ]
    x, y = _subjects.table(20)
    path = write(tmp_path / "m.onnx", extra=(label, square), outputs=outputs)
    found = audit.open_subject(path, (x, y))
    torch.testing.assert_close(found.scores(), _subjects.linear()(x), rtol=1e-5, atol=1e-5)
    assert "Of the outputs label, features, logits the audit reads 'logits'." in found.remarks


def test_probabilities_in_maps_as_converters_of_scikit_learn_write_them(tmp_path):
    softmax = helper.make_node("Softmax", ["logits"], ["p"], axis=1)
    maps = helper.make_node("ZipMap", ["p"], ["m"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    kind = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    x, y = _subjects.table(9)
    path = write(tmp_path / "m.onnx", extra=(softmax, maps), outputs=[helper.make_value_info("m", kind)])
    found = audit.open_subject(path, (x, y))
    torch.testing.assert_close(found.scores(), _subjects.linear()(x).softmax(1), rtol=1e-5, atol=1e-6)


def images(path, shape, kind=TensorProto.UINT8, last=True):
    """Answer which half of a picture is brighter, from the mean over the rest."""
    cast = helper.make_node("Cast", ["x"], ["z"], to=TensorProto.FLOAT)
    flat = helper.make_node("Flatten", ["z"], ["f"], axis=1)
    width, channels = (shape[2], shape[3]) if last else (shape[3], shape[1])
    mask = np.ones((shape[1], width, channels)) if last else np.ones((channels, shape[2], width))
    (mask[:, width // 2 :] if last else mask[:, :, width // 2 :]).fill(-1.0)
    w = np.stack([mask.ravel(), -mask.ravel()], 1).astype(np.float32) / mask.size
    graph = helper.make_graph(
        [cast, flat, helper.make_node("MatMul", ["f", "w"], ["scores"])], "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [shape[0], 2])],
        [numpy_helper.from_array(w, "w")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=OPSETS, ir_version=9), path)
    return str(path)


def test_pixels_of_0_to_255_with_channels_last(tmp_path):
    x, y = _subjects.images(12)
    found = audit.open_subject(images(tmp_path / "m.onnx", ["n", 16, 16, 3]), (x, y))
    assert bool((found.predictions() == y).all())
    pixels = (x * 255).round()
    left, right = pixels[..., :8].sum((1, 2, 3)), pixels[..., 8:].sum((1, 2, 3))
    expected = (left - right) / pixels[0].numel()
    torch.testing.assert_close(found.scores()[:, 0], expected, rtol=1e-4, atol=1e-3)
    assert any("channels last" in r for r in found.remarks)
    assert any("multiplied by 255" in r for r in found.remarks)


def test_images_of_another_size_are_refused(tmp_path):
    path = images(tmp_path / "m.onnx", ["n", 3, 8, 8], TensorProto.FLOAT, last=False)
    with pytest.raises(checks.ModelError, match=r"rows of shape \(3, 8, 8\).*\(3, 16, 16\); allowed.*Resize"):
        audit.open_subject(path, _subjects.images(4))


def test_a_report_names_what_was_left_out_and_what_to_do(tmp_path):
    report = audit.run(write(tmp_path / "m.onnx"), _subjects.table(), progress=False)
    assert all(f.status in ("ok", "weak") for f in report.findings), [
        (f.section, f.why) for f in report.findings
    ]
    remedy = "Pass the PyTorch module (module:function) or a .pt2 file"
    for section, method in (
        ("explain", "integrated gradients"), ("faithfulness", "integrated gradients"),
        ("attack", "white-box attack (fast_minimum_norm)"), ("certify", "proof by linear relaxation"),
    ):  # fmt: skip
        assert method in report[section].does_not_show
        assert remedy in report[section].does_not_show
    assert report["attack"].metric("radius.median").method.startswith("random directions")
    assert report["attack"].cost.ngrad == 0
    assert remedy in str(report["sanity"].table.rows)
    assert remedy in audit.render_html(report)


def test_the_plan_counts_the_operations_of_the_graph(tmp_path):
    wide = np.tile(WEIGHT, (1, 1_000_000))
    found = audit.open_model(write(tmp_path / "m.onnx", weight=wide))
    assert found.operations == 2 * 4 * 2_000_000


def test_one_number_a_row_is_a_regression(tmp_path):
    x, _ = _subjects.table(60)
    path = write(tmp_path / "m.onnx", weight=np.array([[1.0], [2.0], [0.0], [0.0]]))
    found = audit.open_subject(path, (x, (x[:, 0] + 2 * x[:, 1]).numpy() + 0.1))
    assert found.regression
    torch.testing.assert_close(found.predictions(), (x[:, 0] + 2 * x[:, 1]).double(), rtol=1e-5, atol=1e-5)


def refused(path, match, data=None):
    with pytest.raises(checks.ModelError, match=match) as caught:
        audit.open_subject(str(path), data if data is not None else _subjects.table(10))
    assert "allowed" in str(caught.value)


def test_refusals(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not a protobuf")
    refused(tmp_path / "bad.onnx", "could not be opened by onnxruntime.*Export it again")
    refused(tmp_path / "gone.onnx", "there is no")
    refused(write(tmp_path / "m.onnx"), r"rows of shape \(4,\).*\(3,\)", (torch.zeros(4, 3), [0, 1, 0, 1]))
    refused(write(tmp_path / "m.onnx"), "texts", (["a", "b"], [0, 1]))
    two = helper.make_graph(
        [helper.make_node("Add", ["input_ids", "attention_mask"], ["s"])], "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4]) for n in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("s", TensorProto.FLOAT, ["n", 4])],
    )  # fmt: skip
    onnx.save(
        helper.make_model(two, opset_imports=OPSETS, ir_version=9),
        tmp_path / "two.onnx",
    )
    refused(tmp_path / "two.onnx", "takes 2 inputs.*input_ids.*Hugging Face folder")
    labels = [helper.make_tensor_value_info("label", TensorProto.INT64, ["n"])]
    argmax = helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0)
    refused(write(tmp_path / "l.onnx", extra=(argmax,), outputs=labels), "label tensor.*Export the logits")


def test_the_extra_is_named_where_onnxruntime_is_missing(tmp_path, monkeypatch):
    path = write(tmp_path / "m.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(checks.MissingExtraError, match=r"onnxruntime.*perturbkit\[onnx\]"):
        audit.open_model(path)
