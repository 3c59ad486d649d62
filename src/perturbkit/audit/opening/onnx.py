"""ONNX files through onnxruntime: scores without gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perturbkit.audit.opening._opened import OpenedData, OpenedModel, first_line
from perturbkit.core import checks

_FLOATS = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(double)": np.float64}
_INTEGERS = {
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int16)": np.int16, "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8, "tensor(uint16)": np.uint16,
}  # fmt: skip
_SCORES = ("logits", "probabilities", "probability", "probs", "scores", "softmax")
NO_GRADIENT = "an ONNX file answers scores and no gradients. Pass the PyTorch module (module:function) or a .pt2 file to have it"


def open_onnx(path: Path) -> OpenedModel:
    """Open an ``.onnx`` file on the CPU.

    Raises
    ------
    ModelError
        If it is no ONNX model, takes more than one input, or answers nothing that can be scores.
    MissingExtraError
        If onnx and onnxruntime are not installed.
    """
    onnx, runtime = checks.extra("onnx", "onnx"), checks.extra("onnxruntime", "onnx")
    try:
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(
            str(path), sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise checks.ModelError(
            f"{path} could not be opened by onnxruntime ({type(error).__name__}: {first_line(error)}); allowed: an ONNX "
            "model with its weights beside it. Export it again, or update onnxruntime."
        ) from error
    inputs = session.get_inputs()
    if len(inputs) != 1:
        raise checks.ModelError(
            f"{path} takes {len(inputs)} inputs ({', '.join(i.name for i in inputs)}); allowed: one. For a text model "
            "pass the Hugging Face folder with its tokenizer; else export a model of one input."
        )
    if inputs[0].type not in _FLOATS | _INTEGERS:
        raise checks.ModelError(
            f"the input {inputs[0].name!r} of {path} is a {inputs[0].type}; allowed: numbers. Export the model from after "
            "the step that turns them into numbers."
        )
    output, remark = _choose_output(session.get_outputs(), path)
    fun = _Session(session, inputs[0], output)
    operations, row_bytes = _work(onnx, path)
    found = OpenedModel(
        fun, path.name, remarks=[remark] if remark else [], no_gradient=NO_GRADIENT, operations=operations,
        row_bytes=row_bytes, fit_inputs=fun.fit,
    )  # fmt: skip
    if inputs[0].type == "tensor(double)":
        found.dtype = torch.float64
    return found


class _Session:
    """Rows through a session, in its precision and layout, padded up to its batch size where that is fixed."""

    def __init__(self, session: Any, given: Any, output: str) -> None:
        self.session, self.name, self.output = session, given.name, output
        self.dtype: Any = (_FLOATS | _INTEGERS)[given.type]
        self.shape = list(given.shape)
        self.batch = self.shape[0] if self.shape and isinstance(self.shape[0], int) else None
        self.scale, self.channels_last, self.rounds = 1.0, False, given.type in _INTEGERS

    def fit(self, data: OpenedData) -> tuple[Any, list[str]]:
        """Choose layout and scale for the data, and refuse another shape."""
        remarks = []
        x = data.x
        assert x is not None
        wanted = self.shape[1:]
        if x.ndim == 4 and len(wanted) == 3 and wanted[2] in (1, 3) and wanted[0] not in (1, 3):
            self.channels_last = True
            remarks.append("The model takes images with channels last; they are turned round for it.")
        given = tuple(x.shape[1:]) if not self.channels_last else (*x.shape[2:], x.shape[1])
        fits = len(given) == len(wanted) and all(
            not isinstance(w, int) or w == g for w, g in zip(wanted, given, strict=True)
        )
        if not fits:
            raise checks.ModelError(
                f"the ONNX model takes rows of shape {tuple(wanted)}, but {data.name} has rows of shape {given}; allowed: "
                "rows of its shape. Resize or select the inputs to match."
            )
        if self.rounds:
            if self.dtype == np.uint8 and x.ndim == 4 and float(x.min()) >= 0 and float(x.max()) <= 1:
                self.scale = 255.0
                remarks.append(
                    "The model takes whole pixels of 0 to 255; images in [0, 1] are multiplied by 255 and rounded for it."
                )
            else:
                remarks.append("The model takes whole numbers; its inputs are rounded for it.")
        return self, remarks

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.detach().cpu().numpy()
        if self.channels_last:
            rows = rows.transpose(0, 2, 3, 1)
        if self.rounds:
            limits = np.iinfo(self.dtype)
            rows = np.clip(np.rint(rows * self.scale), limits.min, limits.max)
        rows = np.ascontiguousarray(rows.astype(self.dtype))
        size = self.batch or len(rows)
        parts = []
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            short = size - len(some)
            if short:
                some = np.concatenate([some, np.repeat(some[-1:], short, 0)])
            parts.append(self._answer(some)[: size - short])
        out = torch.from_numpy(np.concatenate(parts))
        return out if out.dtype == torch.float64 else out.float()

    def _answer(self, rows: np.ndarray) -> np.ndarray:
        (out,) = self.session.run([self.output], {self.name: rows})
        if isinstance(
            out, list
        ):  # a mapping of class to probability a row, as converters of scikit-learn write it
            names = sorted(out[0])
            return np.array([[row[name] for name in names] for row in out], dtype=np.float32)
        return np.asarray(out)


def _choose_output(outputs: Any, path: Path) -> tuple[str, str]:
    """Return the output to read and, where there was a choice, a remark that names it."""
    usable = [o for o in outputs if o.type in _FLOATS or o.type.startswith("seq(map(")]
    flat = [o for o in usable if o.type.startswith("seq") or len(o.shape or [0]) <= 2]
    if not flat:
        shown = ", ".join(f"{o.name} {o.type} {o.shape}" for o in outputs)
        raise checks.ModelError(
            f"{path} answers {shown}; allowed: an output of scores, floating point, of shape (n, classes), or (n, 1) for a "
            "regression. Export the logits."
        )
    named = [o for word in _SCORES for o in flat if word in o.name.lower()]
    chosen = (named or flat)[0]
    if len(outputs) == 1:
        return chosen.name, ""
    return chosen.name, (
        f"Of the outputs {', '.join(o.name for o in outputs)} the audit reads {chosen.name!r}."
    )


def _work(onnx: Any, path: Path) -> tuple[float | None, int | None]:
    """Count operations and bytes of one row from the shapes of the graph; nothing where they are not known."""
    try:
        model = onnx.load(str(path), load_external_data=False)
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # too large or of a newer version: the plan then goes by its least cost
        return None, None
    shapes = {t.name: list(t.dims) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        # The batch, and what else is free, counts as one.
        shapes.setdefault(value.name, [d.dim_value or 1 for d in dims])
    batch = max(1, shapes.get(graph.input[0].name, [1])[0] if graph.input else 1)
    total, held = 0.0, 0
    for node in graph.node:
        out = math.prod(shapes.get(node.output[0], [0])) / batch
        held += int(8 * out)
        weights = shapes.get(node.input[1], []) if len(node.input) > 1 else []
        if node.op_type in ("Conv", "ConvTranspose") and len(weights) > 1:
            total += 2 * out * math.prod(weights[1:])
        elif node.op_type in ("MatMul", "Gemm") and weights:
            inner = shapes.get(node.input[0], [1])[-1]
            total += 2 * out * inner
    return (total or None), (held or None)
