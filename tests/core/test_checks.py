"""Argument checks: what is accepted comes back, what is not is refused with value, range and remedy."""

import math

import numpy as np
import pytest
import torch

from perturbkit.core import checks
from perturbkit.core.checks import ArgumentError, ArgumentTypeError, MissingExtraError, PerturbkitError


def test_accepted_values_come_back() -> None:
    assert checks.between("a", np.float32(0.5), 0, 1) == 0.5
    assert checks.between("a", torch.tensor(0.5), 0, 1) == 0.5
    assert checks.between("a", 0, 0, 1, inclusive="low") == 0.0
    assert checks.between("a", 1, 0, 1, inclusive="high") == 1.0
    assert checks.positive("a", 3) == 3.0
    assert checks.nonnegative("a", 0) == 0.0
    assert isinstance(checks.positive("a", 3), float)
    assert checks.integer("a", np.int32(4), low=4, high=4) == 4
    assert checks.one_of("a", "x", iter("xy")) == "x"
    x = torch.ones(2, 3)
    assert checks.tensor("x", x, ndim=(2, 4), shape=(None, 3)) is x
    assert checks.tensor("x", x.long(), floating=False).dtype == torch.int64
    bad = x / 0
    assert checks.tensor("x", bad, finite=False) is bad
    image = torch.ones(1, 3, 2, 2)
    assert checks.image_batch("x", image) is image
    assert checks.same_shape("a", x, "b", x + 1) is x
    assert checks.labels("y", [0, 2], n=2, n_classes=3).dtype == torch.int64
    assert checks.labels("y", torch.tensor([1], dtype=torch.uint8)).tolist() == [1]
    assert checks.array("a", torch.ones(2, requires_grad=True)).tolist() == [1, 1]
    assert checks.array("a", [1, 2], dtype=int).dtype == int
    assert checks.array("a", [math.inf], finite=False)[0] == math.inf
    p = checks.probabilities("p", torch.tensor([[0.25, 0.75]]), n=1)
    assert p.dtype == np.float64
    assert checks.extra("json", "none").dumps([1]) == "[1]"


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: checks.between("a", 1, 0, 1, inclusive="low"),
            ArgumentError,
            r"a is 1; allowed: .* in \[0, 1\)",
        ),
        (lambda: checks.between("a", 0, 0, 1, inclusive="high"), ArgumentError, r"\(0, 1\]"),
        (lambda: checks.between("a", math.nan, -math.inf, math.inf), ArgumentError, "nan"),
        (lambda: checks.between("a", math.inf, 0, math.inf), ArgumentError, "inf"),
        (lambda: checks.between("a", "0.5", 0, 1), ArgumentTypeError, "real number"),
        (lambda: checks.between("a", True, 0, 1), ArgumentTypeError, "True"),
        (lambda: checks.between("a", None, 0, 1), ArgumentTypeError, "None"),
        (lambda: checks.between("a", np.ones(2), 0, 1), ArgumentTypeError, "one real number"),
        (lambda: checks.between("a", torch.ones(2), 0, 1), ArgumentTypeError, "one real number"),
        (lambda: checks.positive("a", 0), ArgumentError, r"\(0, inf\)"),
        (lambda: checks.nonnegative("a", -1e-9), ArgumentError, r"\[0, inf\)"),
        (lambda: checks.integer("a", 2.0), ArgumentTypeError, "Pass an int"),
        (lambda: checks.integer("a", True), ArgumentTypeError, "True"),
        (lambda: checks.integer("a", 0, low=1), ArgumentError, r"1\.\."),
        (lambda: checks.integer("a", 9, low=1, high=8), ArgumentError, r"1\.\.8"),
        (lambda: checks.one_of("a", "z", ["x", "y"]), ArgumentError, "'x', 'y'"),
        (lambda: checks.one_of("a", True, [1, 2]), ArgumentError, "True"),
        (lambda: checks.one_of("a", 1.0, [1, 2]), ArgumentError, "1.0"),
        (lambda: checks.tensor("x", np.ones(2)), ArgumentTypeError, "ndarray of shape"),
        (lambda: checks.tensor("x", torch.ones(2).long()), ArgumentTypeError, "x.float"),
        (lambda: checks.tensor("x", torch.ones(2), ndim=2), ArgumentError, r"\(2,\); allowed: 2 dimensions"),
        (lambda: checks.tensor("x", torch.ones(2), ndim=(2, 3)), ArgumentError, "2 or 3 dimensions"),
        (lambda: checks.tensor("x", torch.ones(2, 2), shape=(None, 3)), ArgumentError, r"\(any, 3\)"),
        (lambda: checks.tensor("x", torch.ones(2), shape=(2, 1)), ArgumentError, "Reshape"),
        (lambda: checks.tensor("x", torch.ones(0)), ArgumentError, "empty"),
        (lambda: checks.tensor("x", torch.tensor([math.nan, math.inf, 1])), ArgumentError, "2 NaN"),
        (lambda: checks.image_batch("x", torch.ones(3, 2, 2)), ArgumentError, "batch dimension"),
        (lambda: checks.same_shape("a", torch.ones(2), "b", torch.ones(3)), ArgumentError, "shape of b"),
        (lambda: checks.labels("y", torch.tensor([0.0])), ArgumentTypeError, "class indices"),
        (lambda: checks.labels("y", torch.tensor([True])), ArgumentTypeError, "bool"),
        (lambda: checks.labels("y", torch.tensor([[0]])), ArgumentError, "vector"),
        (lambda: checks.labels("y", torch.tensor([0, 1]), n=3), ArgumentError, "3 labels"),
        (lambda: checks.labels("y", torch.tensor([-1, 1])), ArgumentError, "from -1 to 1"),
        (lambda: checks.labels("y", torch.tensor([0, 3]), n_classes=3), ArgumentError, r"0\.\.2"),
        (lambda: checks.labels("y", torch.zeros(0, dtype=torch.long)), ArgumentError, "at least one"),
        (lambda: checks.array("a", [[1], [1, 2]]), ArgumentTypeError, "rectangular"),
        (lambda: checks.array("a", ["x"]), ArgumentTypeError, "numbers"),
        (lambda: checks.array("a", [1.0], ndim=2), ArgumentError, "2 dimensions"),
        (lambda: checks.array("a", [1.0], shape=(2,)), ArgumentError, r"\(2\)"),
        (lambda: checks.array("a", []), ArgumentError, "empty"),
        (lambda: checks.array("a", [math.nan]), ArgumentError, "1 NaN"),
        (lambda: checks.probabilities("p", [[1.0]]), ArgumentError, r"\[1 - p, p\]"),
        (lambda: checks.probabilities("p", [[0.5, 0.6]]), ArgumentError, "softmax"),
        (lambda: checks.probabilities("p", [[-0.5, 1.5]]), ArgumentError, "softmax"),
        (lambda: checks.probabilities("p", [[0.5, 0.5]], n=2), ArgumentError, r"\(2, any\)"),
        (lambda: checks.extra("no_such_module", "cluster"), MissingExtraError, r"perturbkit\[cluster\]"),
    ],
)
def test_refusals(call, error: type, match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        call()
    assert isinstance(caught.value, PerturbkitError)


def test_errors_are_also_the_built_in_ones() -> None:
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(ArgumentTypeError, TypeError)
    assert issubclass(checks.DataError, ValueError)
    assert issubclass(checks.ModelError, RuntimeError)
    assert issubclass(MissingExtraError, ImportError)


def test_an_extra_that_fails_inside_is_not_called_missing(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "present_but_broken.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency") as caught:
        checks.extra("present_but_broken", "cluster")
    assert not isinstance(caught.value, MissingExtraError)


@pytest.mark.parametrize(
    "value", [torch.zeros(3), torch.zeros(3, 2), [0.0, 0.0, 0.0]], ids=["flat", "wide", "list"]
)
def test_answers_have_the_shape_of_their_input(value):
    x = torch.zeros(3, 1)
    assert checks.answer("net", x, x) is x
    with pytest.raises(checks.ModelError, match=r"net answered .*allowed: the shape of its input, \(3, 1\)"):
        checks.answer("net", value, x)
