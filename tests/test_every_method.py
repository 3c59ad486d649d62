"""The same checks on every method, collected by path: its module, its test's EXAMPLE and its reproduction."""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import _checks
from tests._common import Example
from torch import nn

from perturbkit.core import Cost, Result, checks

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "perturbkit"
NO_METHODS = {"audit", "core", "data", "dev", "papers"}

# Modules with more than 200 lines of code, by PACKAGE/ROOM/METHOD.py, and why.
LONGER: dict[str, str] = {}

METHODS = [
    "/".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in sorted(SOURCE.glob("*/*/*.py"))
    if not path.name.startswith("_") and path.relative_to(SOURCE).parts[0] not in NO_METHODS
]


def _files(method: str) -> tuple[Path, Path, Path]:
    package, room, name = method.split("/")
    return (
        SOURCE / package / room / f"{name}.py",
        ROOT / "tests" / package / room / f"test_{name}.py",
        SOURCE / "papers" / package / f"{name}.py",
    )


def _names_example(path: Path) -> bool:
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    targets = [t for n in nodes if isinstance(n, ast.Assign) for t in n.targets]
    return any(isinstance(t, ast.Name) and t.id == "EXAMPLE" for t in targets)


@functools.cache
def _example(method: str) -> Example:
    """Load the test file under a name of its own, so that pytest's own import of it is another module."""
    path = _files(method)[1]
    spec = importlib.util.spec_from_file_location("_example_" + method.replace("/", "_"), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    # By name: the class may have been imported a second time under another path.
    assert type(module.EXAMPLE).__name__ == "Example"
    return module.EXAMPLE


every = pytest.mark.parametrize("method", METHODS)


@every
def test_three_files_are_there(method):
    missing = [str(path.relative_to(ROOT)) for path in _files(method) if not path.exists()]
    assert missing == []
    assert _names_example(_files(method)[1]), "the test file names no EXAMPLE"


def test_every_test_and_reproduction_has_its_method():
    tests = [
        path for path in sorted((ROOT / "tests").glob("*/*/test_*.py")) if path.parts[-3] not in NO_METHODS
    ]
    for path in tests:
        stem = path.stem.removeprefix("test_")
        room = SOURCE / path.parts[-3] / path.parts[-2]
        parts = [room / f"{stem}.py", room / f"_{stem.removeprefix('_')}.py"]
        assert any(p.exists() for p in parts), f"{path} tests no module"
    names = {(m.split("/")[0], m.split("/")[2]) for m in METHODS}
    for path in sorted((SOURCE / "papers").glob("*/*.py")):
        if not path.name.startswith("_"):
            assert (path.parent.name, path.stem) in names, f"{path} reproduces no method"


@every
def test_same_generator_state_same_result(method):
    _checks.check_repeatable(_example(method))


@every
def test_global_state_untouched(method):
    _checks.check_global_state(_example(method))


@every
def test_model_restored(method):
    if _example(method).with_model is None:
        pytest.skip("the method is given no model")
    _checks.check_model_restored(_example(method))


@every
def test_dtype_follows_the_input(method):
    _checks.check_dtype(_example(method))


@every
def test_chunk_size_does_not_matter(method):
    if _example(method).chunked is None:
        pytest.skip("the method works without chunks")
    _checks.check_chunks(_example(method))


@every
def test_refusals_have_three_parts(method):
    _checks.check_refusals(_example(method))


@every
def test_result_can_be_saved(method):
    _checks.check_saving(_example(method))


@every
def test_docstring_sections(method):
    _checks.check_docstrings(importlib.import_module("perturbkit." + method.replace("/", ".")))


@every
def test_length(method):
    _checks.check_length(_files(method)[0], LONGER)


def test_listed_exceptions_exist():
    assert set(LONGER) <= {f"{method}.py" for method in METHODS}


# The checks themselves: a good example passes, and each fault is caught by the check that is for it.


@dataclass(frozen=True, eq=False)
class _Found(Result):
    values: torch.Tensor
    count: np.float64 = dataclasses.field(default_factory=lambda: np.float64(1.5))
    nan: float = float("nan")
    pair: tuple[int, str] = (1, "a")
    cost: Cost = dataclasses.field(default_factory=Cost)


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def _call(generator, dtype):
    return _Found(torch.rand(3, generator=generator, dtype=dtype), cost=Cost(3))


def _refuse():
    checks.positive("sigma", -1.0)


GOOD = Example(
    call=_call, refusals=((_refuse, "sigma"),), chunked=lambda n: torch.arange(8.0) / 3, stochastic=True
)
MODEL = Example(model=_net, with_model=lambda model, generator, dtype: torch.ones(1, dtype=dtype))


def _with(act):
    def with_model(model, generator, dtype):
        act(model)
        return torch.ones(1, dtype=dtype)

    return Example(model=_net, with_model=with_model)


@pytest.mark.parametrize(
    "check",
    [
        _checks.check_repeatable,
        _checks.check_global_state,
        _checks.check_dtype,
        _checks.check_chunks,
        _checks.check_refusals,
    ],
)
def test_a_good_example_passes(check):
    check(GOOD)


def test_a_good_result_is_saved_up_to_numpy_scalars():
    _checks.check_saving(Example(call=_call))


def test_a_good_model_passes():
    for check in (_checks.check_model_restored, _checks.check_repeatable, _checks.check_global_state):
        check(MODEL)


def _hook(model):
    model[0].register_forward_hook(lambda *a: None)


def _patch(model):
    model[0].forward = model[0].forward


def _replace(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def _zero(model):
    model.zero_grad(set_to_none=False)


def _buffer(model):
    model[1].running_mean += 1


def _weight(model):
    with torch.no_grad():
        model[2].bias.add_(1e-6)


@pytest.mark.parametrize(
    "act",
    [
        lambda model: model.eval(),
        lambda model: model.train(),
        lambda model: model.requires_grad_(True),
        lambda model: model.requires_grad_(False),
        lambda model: model[0].weight.register_hook(lambda g: g),
        lambda model: model.register_buffer("extra", torch.ones(1)),
        lambda model: model.double(),
        *(_hook, _patch, _replace, _zero, _buffer, _weight),
    ],
)
def test_a_model_left_changed_is_caught(act):
    with pytest.raises(AssertionError):
        _checks.check_model_restored(_with(act))


@pytest.mark.parametrize(
    ("check", "example"),
    [
        (
            _checks.check_repeatable,
            Example(call=lambda g, d: torch.rand(3, generator=_fresh()), stochastic=True),
        ),
        (_checks.check_repeatable, dataclasses.replace(GOOD, stochastic=False)),
        (_checks.check_repeatable, Example(call=lambda g, d: "text")),
        (_checks.check_repeatable, Example(call=lambda g, d: object())),
        (_checks.check_repeatable, Example()),
        (_checks.check_global_state, Example(call=lambda g, d: torch.rand(3))),
        (_checks.check_global_state, Example(call=lambda g, d: np.random.rand(3))),
        (_checks.check_global_state, Example(call=lambda g, d: np.random.randn())),
        (_checks.check_global_state, Example(call=lambda g, d: __import__("random").random())),
        (_checks.check_dtype, Example(call=lambda g, d: torch.ones(2))),
        (_checks.check_dtype, Example(call=lambda g, d: np.ones(2))),
        (_checks.check_dtype, Example(call=lambda g, d: {"a": (torch.ones(2, dtype=torch.complex64),)})),
        (_checks.check_chunks, Example(chunked=lambda n: torch.full((2,), 1.0 + n / 1000))),
        (_checks.check_chunks, Example(chunked=lambda n: torch.ones(n))),
        (_checks.check_refusals, Example()),
    ],
)
def test_a_fault_is_caught(check, example):
    state = torch.get_rng_state(), np.random.get_state()
    try:
        with pytest.raises(AssertionError):
            check(example)
    finally:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])


def _fresh() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def _raise(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "accepted"),
    [
        (checks.ArgumentError("sigma is -1; allowed: a number in (0, inf). Pass a value inside it."), True),
        (checks.ArgumentError("sigma is 1.5; allowed: 0.5, 1.0. Choose one of these."), True),
        (
            checks.ModelError("the model has a GRU; allowed: layers with a rule. Use the smoothed model."),
            True,
        ),
        (checks.ArgumentError("sigma is -1; allowed: a number in (0, inf)."), False),
        (checks.ArgumentError("sigma is bad. Pass another sigma."), False),
        (checks.ArgumentError("allowed: sigma above 0. Pass one."), False),
        (ValueError("sigma is -1; allowed: a number in (0, inf). Pass a value inside it."), False),
    ],
)
def test_what_a_refusal_must_say(error, accepted):
    example = Example(refusals=((_raise(error), "sigma|model"),))
    if accepted:
        _checks.check_refusals(example)
    else:
        with pytest.raises((AssertionError, ValueError)):
            _checks.check_refusals(example)


def test_lines_of_code_are_counted_without_words():
    source = '"""Two\n\nlines."""\n\n# comment\nimport os  # why\n\n\ndef f(\n    a,\n):\n    """Say."""\n    x = """a\n\n    b"""\n    return (\n        # no\n        x\n    )\n'
    assert _checks.code_lines(source) == 1 + 3 + 3 + 3


def test_a_long_module_needs_a_reason_and_a_listed_one_must_be_long(tmp_path):
    path = tmp_path / "p" / "r" / "m.py"
    path.parent.mkdir(parents=True)
    path.write_text("x = 1\n" * 200)
    _checks.check_length(path, {})
    with pytest.raises(AssertionError, match="need not"):
        _checks.check_length(path, {"p/r/m.py": "one table"})
    path.write_text("x = 1\n" * 201)
    with pytest.raises(AssertionError, match="201 lines"):
        _checks.check_length(path, {})
    with pytest.raises(AssertionError, match="without a reason"):
        _checks.check_length(path, {"p/r/m.py": " "})
    _checks.check_length(path, {"p/r/m.py": "one table"})


def test_a_missing_docstring_section_is_caught():
    class Module:
        __name__ = "m"
        __all__ = ("function",)

        @staticmethod
        def function(x):
            """Do.

            Parameters
            ----------
            x : float

            Returns
            -------
            float

            Notes
            -----
            E = m.

            Examples
            --------
            >>> 1
            1
            """

    _checks.check_docstrings(Module)
    whole = Module.function.__doc__
    for section in ("Parameters", "Returns", "Notes", "Examples"):
        Module.function.__doc__ = whole.replace(section, "Said")
        with pytest.raises(AssertionError, match=section):
            _checks.check_docstrings(Module)
