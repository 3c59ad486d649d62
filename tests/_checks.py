"""What the common tests ask of every method: functions that take its ``EXAMPLE`` or its source, and assert."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import math
import random
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests._common import Example
from torch import nn

from perturbkit.core import Cost, Result, checks

MAX_LINES = 200


def run(example: Example, seed: int = 5, dtype: torch.dtype | None = None) -> Any:
    """Call the example with a generator of that seed."""
    generator = torch.Generator().manual_seed(seed)
    kind = dtype or example.dtypes[0]
    if example.with_model is not None:
        assert example.model is not None, "with_model needs model"
        return example.with_model(_fixed(example.model).to(kind), generator, kind)
    assert example.call is not None, "an example has call, or model and with_model"
    return example.call(generator, kind)


def _fixed(factory: Callable[[], nn.Module]) -> nn.Module:
    """Build a module with the same weights every time, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return factory()


def numbers(result: Any, read: Callable[[Any], Any] | None = None) -> list[Any]:
    """Return the tensors, arrays and numbers in a result, costs left out, in order."""
    found = list(_numbers(result if read is None else read(result)))
    assert found, f"no numbers in a {type(result).__name__}; give the example a read"
    return found


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, Cost) or value is None or isinstance(value, str):
        return
    if isinstance(value, torch.Tensor):
        yield value.detach().cpu()
    elif isinstance(value, np.ndarray | np.generic | int | float | complex):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _numbers(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _numbers(getattr(value, field.name))
    else:
        raise AssertionError(f"cannot read a {type(value).__name__}; give the example a read")


def same(a: Any, b: Any) -> bool:
    """Return whether two values are equal to the last bit, with NaN equal to itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b) or _nan_equal(a, b))
    if isinstance(a, np.ndarray | np.generic):
        kinds = a.dtype.kind in "fc"
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=kinds)
    if isinstance(a, float):
        return a == b or (math.isnan(a) and math.isnan(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b)


def _nan_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.is_floating_point() and bool(((a == b) | (a.isnan() & b.isnan())).all())


def check_repeatable(example: Example) -> None:
    """Same generator state, same result; and another generator matters only where the example says so."""
    first = numbers(run(example), example.read)
    assert same(first, numbers(run(example), example.read)), "the same generator state gave another result"
    if not example.stochastic:
        other = numbers(run(example, seed=6), example.read)
        assert same(first, other), "the generator changed the result of an example that is not stochastic"


def check_global_state(example: Example) -> None:
    """The global generators, default dtype, gradient mode and thread count are as before."""
    model = _fixed(example.model).to(example.dtypes[0]) if example.with_model and example.model else None
    generator, kind = torch.Generator().manual_seed(5), example.dtypes[0]

    def state() -> list[Any]:
        legacy = np.random.get_state(legacy=False)
        settings = [torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()]
        errors = sorted(np.geterr().items())
        return [
            torch.get_rng_state(),
            legacy["state"],
            legacy["has_gauss"],
            random.getstate(),
            settings,
            errors,
        ]

    before = state()
    if model is not None and example.with_model is not None:
        example.with_model(model, generator, kind)
    elif example.call is not None:
        example.call(generator, kind)
    names = (
        "torch's generator",
        "NumPy's generator",
        "NumPy's generator",
        "random's generator",
        "torch's settings",
    )
    for name, old, new in zip((*names, "NumPy's error settings"), before, state(), strict=True):
        assert same(old, new), f"{name} changed"


def check_model_restored(example: Example) -> None:
    """Mode, gradients, requires_grad, hooks, buffers, weights and patched methods are as before."""
    assert example.model is not None
    assert example.with_model is not None
    for training in (True, False):
        model = _fixed(example.model).to(example.dtypes[0])
        model.train(training)
        inner = list(model.modules())[1:]
        if inner:
            inner[-1].train(not training)
        parameters = list(model.parameters())
        for i, parameter in enumerate(parameters):
            # One frozen, every second with a gradient: what is restored to one value for all shows.
            parameter.requires_grad_(i != len(parameters) - 1 or len(parameters) == 1)
            parameter.grad = torch.full_like(parameter, 0.5) if i % 2 == 0 else None
        before = _snapshot(model)
        example.with_model(model, torch.Generator().manual_seed(5), example.dtypes[0])
        after = _snapshot(model)
        assert list(before) == list(after), "modules, parameters or attributes came or went"
        for name, value in before.items():
            assert same(value, after[name]), f"{name} changed, training mode {training}"


def _snapshot(model: nn.Module) -> dict[str, Any]:
    out: dict[str, Any] = {}
    hooks = [n for n in vars(nn.Module()) if n.endswith("_hooks") or "_hooks_" in n]
    for name, module in model.named_modules():
        out[f"mode of {name!r}"] = module.training
        out[f"hooks of {name!r}"] = {
            hook: [id(h) for h in getattr(module, hook, {}).values()] for hook in hooks
        }
        out[f"attributes of {name!r}"] = sorted(vars(module))
    for name, parameter in model.named_parameters():
        out[f"identity of {name!r}"] = id(parameter)
        out[f"weights of {name!r}"] = parameter.detach().clone()
        out[f"requires_grad of {name!r}"] = parameter.requires_grad
        out[f"gradient of {name!r}"] = None if parameter.grad is None else parameter.grad.clone()
        out[f"tensor hooks of {name!r}"] = len(parameter._backward_hooks or {})
    for name, buffer in model.named_buffers():
        out[f"buffer {name!r}"] = buffer.clone()
    return out


def check_dtype(example: Example) -> None:
    """Floating results have the dtype of the input."""
    for dtype in example.dtypes:
        for value in numbers(run(example, dtype=dtype), example.read):
            given = _dtype(value)
            assert given in (None, dtype), f"{dtype} in gave {given} out"


def _dtype(value: Any) -> torch.dtype | None:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fc":
        value = torch.as_tensor(np.zeros(1, value.dtype))
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return None
    return value.real.dtype if value.is_complex() else value.dtype


def check_chunks(example: Example) -> None:
    """One row at a time and eight give the same, but for rounding."""
    assert example.chunked is not None
    one, eight = (numbers(example.chunked(size), example.read) for size in (1, 8))
    assert len(one) == len(eight)
    for a, b in zip(one, eight, strict=True):
        left, right = torch.as_tensor(a), torch.as_tensor(b)
        narrow = left.is_floating_point() and left.dtype != torch.float64
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if narrow else {"rtol": 1e-9, "atol": 1e-10}
        torch.testing.assert_close(left, right, equal_nan=True, **tolerance)


def check_refusals(example: Example) -> None:
    """Each refusal names what was given, what is allowed, and what to do."""
    assert example.refusals, "an example has at least one refusal"
    for call, match in example.refusals:
        with pytest.raises(checks.PerturbkitError, match=match) as caught:
            call()
        parts = re.fullmatch(r"\S.*?\ballowed\b.*?\.\s+\S.*", str(caught.value), re.DOTALL)
        assert parts or isinstance(caught.value, checks.MissingExtraError), f"not three parts: {caught.value}"


def check_saving(example: Example) -> None:
    """A result goes through to_dict, JSON and from_dict unchanged."""
    result = run(example)
    if not isinstance(result, Result):
        pytest.skip("the method returns no Result")
    again = type(result).from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    cpu = _on_cpu(result)
    for field in dataclasses.fields(result):
        assert same(_on_cpu(getattr(again, field.name)), getattr(cpu, field.name)), f"{field.name} changed"


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, np.generic):
        return value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: _on_cpu(getattr(value, f.name)) for f in dataclasses.fields(value)}
        )
    if isinstance(value, dict):
        return {k: _on_cpu(v) for k, v in value.items()}
    return type(value)(map(_on_cpu, value)) if type(value) in (list, tuple) else value


def check_docstrings(module: Any) -> None:
    """Every public class and function has the sections that a reader needs."""
    names = getattr(module, "__all__", [])
    assert names, f"{module.__name__} names nothing in __all__"
    for name in names:
        thing = getattr(module, name)
        if not inspect.isclass(thing) and not inspect.isfunction(thing):
            continue
        sections = set(
            re.findall(r"^(\w[\w ]*)\n-{3,}$", inspect.cleandoc(thing.__doc__ or ""), re.MULTILINE)
        )
        for wanted in _wanted(thing):
            assert sections & set(wanted.split(" or ")), (
                f"{name} has no section {wanted}; it has {sorted(sections)}"
            )


def _wanted(thing: Any) -> list[str]:
    if inspect.isclass(thing):
        if dataclasses.is_dataclass(thing) or issubclass(thing, Exception):
            return ["Attributes or Parameters"] if dataclasses.is_dataclass(thing) else []
        return ["Parameters or Attributes", "Notes or References", "Examples"]
    parameters = ["Parameters"] if inspect.signature(thing).parameters else []
    return [*parameters, "Returns or Yields", "Notes or References", "Examples"]


def code_lines(source: str) -> int:
    """Return the number of lines that hold code: no docstrings, comments or blank lines."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                docstrings |= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    nothing = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in nothing:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def check_length(path: Path, longer: dict[str, str]) -> None:
    """A module has at most 200 lines of code, unless it is listed with a reason, and then it has more."""
    lines, name = code_lines(path.read_text(encoding="utf-8")), "/".join(path.parts[-3:])
    if name in longer:
        assert longer[name].strip(), f"{name} is listed without a reason"
        assert lines > MAX_LINES, f"{name} has {lines} lines of code; it need not be listed"
    else:
        assert lines <= MAX_LINES, f"{name} has {lines} lines of code; allowed: {MAX_LINES}"
