"""Results: through JSON and back, costs that add up, tables and plots."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from perturbkit.core import AttackResult, Attribution, Certificate, Cost, Result, SampleResult, checks


@dataclass(frozen=True, eq=False)
class Everything(Result):
    value: Any
    cost: Cost = field(default_factory=Cost)


def through_json(result: Result) -> Result:
    return type(result).from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floating_tensors_come_back(dtype: torch.dtype) -> None:
    value = torch.tensor([[0.1, -0.0, math.nan], [math.inf, -math.inf, 1e-30]], dtype=dtype)
    back = through_json(Everything(value)).value
    assert (back.dtype, back.shape) == (dtype, value.shape)
    torch.testing.assert_close(back, value, atol=0, rtol=0, equal_nan=True)
    assert torch.equal(back.signbit(), value.signbit()) or math.isnan(value[0, 2])


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([1 + 2j, complex(math.nan, -1), complex(math.inf, 0)]),
        torch.zeros(0, 3),
        torch.tensor(2.5),
        torch.tensor([True, False]),
        torch.tensor([2**62, -1]),
        torch.zeros(2, 0, dtype=torch.complex128),
    ],
    ids=["complex", "empty", "scalar", "bool", "int64", "empty complex"],
)
def test_other_tensors_come_back(value: torch.Tensor) -> None:
    back = through_json(Everything(value)).value
    assert (back.dtype, back.shape) == (value.dtype, value.shape)
    torch.testing.assert_close(back, value, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize(
    "value",
    [
        np.array([[1.5, math.nan], [math.inf, -0.0]]),
        np.array([1 + 2j, complex(0, math.nan)]),
        np.array(["nan", "a", ""]),
        np.zeros((0, 2)),
        np.array([True, False]),
        np.array([1, 2], dtype=np.int8),
        np.array([0.1], dtype=np.float32),
        np.array(3.0),
    ],
    ids=["float", "complex", "text", "empty", "bool", "int8", "float32", "scalar"],
)
def test_arrays_come_back(value: np.ndarray) -> None:
    back = through_json(Everything(value)).value
    assert (back.dtype, back.shape) == (value.dtype, value.shape)
    np.testing.assert_array_equal(back, value)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        -2.5,
        "text",
        "nan",
        (1, (2, "a")),
        [1, [None]],
        {"a": 1, 2: {"type": "Cost"}},
        {"tensor": [1], "shape": 0},
        {"float": "x"},
        {"mapping": []},
        {"tuple": 1},
        (),
        [],
        {},
        math.inf,
        -math.inf,
    ],
    ids=repr,
)
def test_plain_values_come_back(value: Any) -> None:
    back = through_json(Everything(value)).value
    assert back == value
    assert type(back) is type(value)


def test_nan_and_numpy_numbers() -> None:
    assert math.isnan(through_json(Everything(math.nan)).value)
    assert through_json(Everything(np.float32(0.5))).value == 0.5
    assert through_json(Everything(np.bool_(True))).value is True
    assert math.isnan(through_json(Everything(np.float64("nan"))).value)


def test_results_nest() -> None:
    inner = Everything(Everything(torch.ones(2), Cost(1, 2, 3)))
    back = through_json(Everything({"k": [inner]}))
    assert isinstance(back.value["k"][0].value, Everything)
    assert back.value["k"][0].value.cost == Cost(1, 2, 3)


@pytest.mark.parametrize(
    "result",
    [
        Attribution(torch.ones(2, 3), torch.tensor([0, 1]), Cost(5), "rise", {"gap": 0.1}),
        AttackResult(torch.ones(2, 3), torch.tensor([True, False]), torch.tensor([0.5, math.inf]), "l2"),
        Certificate(radius=torch.ones(3), confidence=0.999),
        SampleResult(torch.ones(2, 2), extras={"steps": (1, 2)}),
    ],
    ids=lambda r: type(r).__name__,
)
def test_core_results_come_back_and_are_frozen(result: Result) -> None:
    back = through_json(result)
    assert type(back) is type(result)
    assert back.to_dict() == result.to_dict()
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.cost = Cost()


def test_costs_add_up() -> None:
    assert Cost(1, 2, 3) + Cost(10, 20, 30) == Cost(11, 22, 33)
    assert Cost(10, 20, 30) - Cost(1, 2, 3) == Cost(9, 18, 27)


def test_attribution_as_a_table() -> None:
    frame = Attribution(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).to_frame(["age", "sex"])
    assert frame.values.tolist() == [[0, "age", 1.0], [0, "sex", 2.0], [1, "age", 3.0], [1, "sex", 4.0]]
    assert Attribution(torch.ones(1, 2, 2)).to_frame()["part"].tolist() == ["0", "1", "2", "3"]


def test_attribution_plots() -> None:
    values = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
    picture = Attribution(values, method="rise").plot(
        1, x=torch.rand(2, 3, 8, 8, generator=torch.Generator())
    )
    assert picture.get_title() == "rise"
    assert len(picture.images) == 2
    bars = Attribution(torch.tensor([[1.0, -5.0, 2.0]])).plot(names=["a", "b", "c"], top=3)
    assert [t.get_text() for t in bars.get_yticklabels()] == ["a", "c", "b"]
    tokens = Attribution(torch.linspace(-1, 1, 20)[None]).plot(names=[f"w{i}" for i in range(20)])
    assert [t.get_text() for t in tokens.texts] == [f"w{i}" for i in range(20)]
    with pytest.raises(checks.ArgumentError, match="row is 1"):
        Attribution(torch.ones(1, 2)).plot(1)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Certificate.from_dict(Cost().to_dict()), "'Cost'"),
        (lambda: Result.from_dict({"type": "Nothing"}), "not a known result"),
        (lambda: Result.from_dict({"a": 1}), "None"),
        (lambda: AttackResult.from_dict({"type": "AttackResult", "norm": "l2"}), "lacks"),
    ],
)
def test_data_of_another_class_is_refused(call, match: str) -> None:
    with pytest.raises(checks.DataError, match=match):
        call()


def test_what_cannot_be_saved_is_refused() -> None:
    with pytest.raises(checks.ArgumentTypeError, match="a set cannot be saved"):
        Everything({1, 2}).to_dict()
