"""The audit on trial: models whose faults are known, and what the audit must say of each."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import perturbkit.audit as audit

sys.path.insert(0, str(Path(__file__).parent))
import _subjects

X, Y = _subjects.table(n=48, seed=3)
SCALE = X.std(0)
# A linear margin 2 (a + b), in units of standard deviations.
WEIGHTS = torch.tensor([2.0, 2.0, 0.0, 0.0]) * SCALE
MARGIN = 2 * (X[:, 0] + X[:, 1]) * (2 * Y - 1)
RIGHT = MARGIN > 0


class Asked(nn.Module):
    """A module around a function of the linear model's logits and the input."""

    def __init__(self, function):
        super().__init__()
        self.net, self.function = _subjects.linear(), function

    def forward(self, x):
        return self.function(self.net, x)


def tried(function, data=(X, Y), **options):
    return audit.run(Asked(function).eval(), data, progress=False, **options)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_model_has_the_radius_of_the_formula(norm):
    report = audit.run(
        _subjects.linear().eval(),
        (X, Y),
        norm=norm,
        only=["sanity", "attack", "certify", "sandwich"],
        progress=False,
    )
    dual = WEIGHTS.abs().sum() if norm == "linf" else WEIGHTS.norm()
    truth = (MARGIN / dual).clamp_min(0).double().numpy()
    found = report["attack"].series
    attacked = np.zeros(len(X))
    attacked[found["rows"]] = found["radius"]
    proved = np.array(report["certify"].series["radius"])
    assert attacked == pytest.approx(truth, rel=0.01, abs=1e-6)
    assert proved == pytest.approx(truth, rel=2e-3, abs=2e-3)
    assert report["sandwich"].status == "ok"
    assert "no certificate exceeds an attack" in report["sandwich"].headline
    assert report["sandwich"].metric("tightness.median").value > 0.985
    assert report["attack"].metric("gradient.misled").value == 0
    assert report["sanity"].status == "ok"


def test_a_linear_model_has_the_attribution_of_the_formula():
    report = audit.run(_subjects.linear().eval(), (X, Y), only=["explain"], progress=False)
    rows = {row[0]: row[1:] for row in report["explain"].table.rows}
    # Every map is w (x - mean), for the class that is answered.
    truth = (X - X.mean(0)).abs().mean(0) * torch.tensor([1.0, 1.0, 0.0, 0.0])
    for i in range(4):
        assert rows[f"feature {i}"] == pytest.approx([float(truth[i])] * 2, abs=1e-4)


@pytest.mark.parametrize("touching", [True, False], ids=["constant", "ignores its input"])
def test_a_model_that_always_answers_the_same(touching):
    report = tried(
        lambda net, x: torch.tensor([1.0, 0.0]).expand(len(x), 2) + (0 * x[:, :1] if touching else 0)
    )
    sanity = report["sanity"]
    assert sanity.status == "weak"
    assert "It ignores its input: every row gets exactly the same scores" in sanity.headline
    assert "not clearly better than answering the same always" in sanity.headline
    assert report["explain"].status == "weak"
    assert "Nothing matters to the model" in report["explain"].headline
    assert report["attack"].status == "weak"
    assert "changes any answer" in report["attack"].headline
    assert all(r in (0.0, float("inf")) for r in report["attack"].series["radius"])
    assert not [f.section for f in report.findings if f.status == "failed"]


def test_a_model_that_answers_at_random():
    g = torch.Generator().manual_seed(0)
    report = tried(lambda net, x: net(x) + torch.randn(len(x), 2, generator=g), only=["sanity"])
    assert report["sanity"].status == "weak"
    assert "It does not answer the same twice" in report["sanity"].headline


@pytest.mark.parametrize(
    "function",
    [lambda net, x: (net(x) / 1e-3).softmax(1), lambda net, x: net(torch.round(4 * x) / 4)],
    ids=["saturated softmax", "quantised input"],
)
def test_a_masked_gradient_is_called_so_and_gone_round(function):
    report = tried(function, only=["sanity", "attack"])
    truth = (MARGIN / WEIGHTS.abs().sum())[RIGHT].double().numpy()
    assert report["sanity"].status == "weak"
    assert "Its gradient vanishes" in report["sanity"].headline
    attack = report["attack"]
    assert attack.status == "weak"
    assert "The gradient vanishes (gradient masking)" in attack.headline
    assert attack.metric("gradient.misled").value == 1.0
    # Rounding moves the edge by at most half a step in each of two columns.
    radii = np.array([r for r in attack.series["radius"] if r > 0])
    assert np.all(np.isfinite(radii))
    assert np.median(radii) == pytest.approx(np.median(truth), rel=0.12)


def test_a_gradient_that_leads_astray_is_found_out():
    # A fine wiggle along columns that hardly matter is nearly all of the gradient: following it leads nowhere.
    report = tried(
        lambda net, x: net(x) + 0.3 * torch.stack([torch.sin(300 * x[:, 2]), torch.sin(170 * x[:, 3])], 1),
        norm="l2",
        only=["attack"],
    )
    attack = report["attack"]
    truth = float((MARGIN / WEIGHTS.norm())[RIGHT].double().median())
    assert attack.metric("radius.median").value == pytest.approx(truth, rel=0.1)
    assert attack.metric("gradient.misled").low > 0.3
    assert attack.status == "weak"
    assert "The gradient misleads on" in attack.headline


def test_a_gradient_that_is_flat_on_nearly_every_row_is_found_out():
    g = torch.Generator().manual_seed(1)
    w, x = torch.randn(16, generator=g), torch.randn(48, 16, generator=g)
    margin = x @ w
    report = tried(
        lambda net, x: (1e3 * torch.stack([-x @ w, x @ w], 1)).softmax(1),
        (x, (margin > 0).long()),
        only=["sanity", "attack"],
    )
    truth = float((margin.abs() / (w * x.std(0)).abs().sum()).double().median())
    attack = report["attack"]
    assert attack.metric("radius.median").value == pytest.approx(truth, rel=0.1)
    assert attack.metric("gradient.misled").value > 0.9
    assert "gradient masking" in attack.headline
    assert "Its gradient vanishes" in report["sanity"].headline


def test_swapped_labels_are_recognised():
    report = tried(lambda net, x: net(x).flip(1), only=["sanity", "attack", "weakest"])
    sanity = report["sanity"]
    assert sanity.status == "weak"
    assert "The labels look swapped: reading 0 as 1, 1 as 0" in sanity.headline
    assert report["attack"].status == "not run"
    assert report["weakest"].status == "weak"
    assert report["weakest"].metric("wrong.sure").value > 0.9


def shortcut_table():
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(60, 5, generator=g), torch.arange(60) % 2
    x[:, 3] = 2.0 * y - 1
    return x, y


def shortcut_images():
    g = torch.Generator().manual_seed(6)
    x, y = 0.6 * torch.rand(30, 1, 28, 28, generator=g), torch.arange(30) % 2
    x[:, :, :4, :4] = y[:, None, None, None].float()
    return x, y


@pytest.mark.parametrize(
    ("data", "function", "name"),
    [
        (
            shortcut_table(),
            lambda net, x: 5 * torch.stack([-x[:, 3], x[:, 3]], 1) + 0.1 * x[:, :2],
            "feature 3",
        ),
        (
            shortcut_images(),
            lambda net, x: (x[:, :, :4, :4].mean((1, 2, 3)) - 0.5)[:, None] * torch.tensor([-10.0, 10.0]) + 0.2 * x.mean((1, 2, 3))[:, None],
            "the cell 1 down, 1 across",
        ),
    ],
    ids=["column", "patch"],
)  # fmt: skip
def test_a_shortcut_comes_first_and_its_removal_shows(data, function, name):
    report = tried(function, data, only=["explain", "faithfulness"])
    assert f"First comes {name}" in report["explain"].headline
    if name.startswith("feature"):
        assert report["explain"].table.rows[0][0] == name
    faithful = report["faithfulness"]
    assert faithful.status == "weak"
    assert "One part decides alone" in faithful.headline
    assert name in faithful.headline
    assert faithful.metric("one_part.alone").value == 1.0
    removed = faithful.metric("one_part.removed")
    assert removed.low > removed.control
    assert removed.value > 0.3


def test_a_model_without_a_shortcut_is_not_accused():
    report = audit.run(_subjects.linear().eval(), (X, Y), only=["faithfulness"], progress=False)
    assert "One part decides alone" not in report["faithfulness"].headline


@pytest.mark.parametrize(("temperature", "side"), [(0.4, "overconfident"), (2.5, "underconfident")])
def test_a_known_temperature_is_recovered(temperature, side):
    p, y = _subjects.calibrated(n=800, seed=4)
    logits = np.log(p) / temperature
    made = np.exp(logits - logits.max(1, keepdims=True))
    report = audit.run(
        predictions=made / made.sum(1, keepdims=True), labels=y, only=["calibration"], progress=False
    )
    finding = report["calibration"]
    found = finding.metric("temperature")
    # Dividing by 1 / temperature gives the calibrated probabilities back.
    assert found.low <= 1 / temperature <= found.high
    assert found.high / found.low < 1.6
    assert finding.status == "weak"
    assert f"It is {side}: its logits should be divided by" in finding.headline
    assert (finding.metric("overconfidence").low > 0) == (side == "overconfident")


def test_a_calibrated_model_is_not_accused():
    p, y = _subjects.calibrated(n=800, seed=8)
    finding = audit.run(predictions=p, labels=y, only=["calibration"], progress=False)["calibration"]
    assert finding.status == "ok"
    assert "overconfident" not in finding.headline
    assert finding.metric("temperature").low <= 1 <= finding.metric("temperature").high
