"""Certified against attack radius: only of one function and norm, and an alarm where the order is wrong."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import perturbkit.audit as audit
from perturbkit.audit.context import Context
from perturbkit.audit.finding import Finding
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.sections import sandwich
from perturbkit.core.random import seeded_init

sys.path.insert(0, str(Path(__file__).parent))
import _subjects

BOTH = ["attack", "certify", "sandwich"]


def pair(proved, found, **changes):
    """A context whose attack and certify sections found these radii."""
    rows, unit = list(range(len(proved))), "Euclidean norm of the change"
    certify = {
        "rows": rows,
        "radius": proved,
        "norm": "linf",
        "of": "model",
        "function": "the model",
        "unit": unit,
    }
    attack = {"rows": rows, "radius": found, "norm": "linf"}
    findings = {
        "attack": Finding("attack", "ok", "x.", series=attack),
        "certify": Finding("certify", "ok", "x.", series={**certify, **changes}),
    }
    return Context(AuditRequest(), _subjects.subject(), findings=findings)


def test_a_certificate_above_an_attack_is_an_alarm():
    finding = sandwich.run(pair([0.1, 0.5, 0.0, 0.2], [0.3, 0.4, 0.0, float("inf")]))
    assert finding.status == "weak"
    assert finding.headline.startswith("ALARM: on 1 of 4 rows a certificate exceeds an attack")
    assert finding.metric("alarm.share").value == 0.25
    assert finding.table.rows[0] == (1, 0.5, 0.4, "ALARM: proof above attack")
    assert [row[3] for row in finding.table.rows[1:]] == ["", "", ""]
    figure = sandwich.draw(finding)
    assert any("ALARM" in t.get_text() for t in figure.axes[0].get_legend().get_texts())


def test_rounding_is_no_alarm():
    finding = sandwich.run(pair([0.3, 0.4], [0.3 * (1 - 1e-6), 0.4]))
    assert finding.status == "ok"
    assert "no certificate exceeds an attack" in finding.headline


def test_the_headline_claims_a_median_and_no_more():
    inf = float("inf")
    finding = sandwich.run(pair([0.1, 0.2, 0.3], [inf, 0.4, 0.3]))
    assert (
        "the median true radius of 3 rows is 0.2 or more (proved) and 0.4 or less (attacked)"
        in finding.headline
    )
    finding = sandwich.run(pair([0.1, 0.2, 0.3, 0.4], [0.3, 0.4, inf, inf]))
    assert "without an end above: attacks succeeded on at most half of them" in finding.headline


def test_only_rows_of_both_sections_are_compared():
    context = pair([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    attack = context.findings["attack"]
    context.findings["attack"] = dataclasses.replace(attack, series={**attack.series, "rows": [2, 7, 1]})
    finding = sandwich.run(context)
    assert sorted(zip(finding.series["certified"], finding.series["attacked"], strict=True)) == [
        (0.2, 0.6),
        (0.3, 0.4),
    ]


def test_another_norm_is_not_compared_with_the_models_own_attack():
    finding = sandwich.run(
        pair([0.1] * 4, [1e-9] * 4, norm="l2", of="smoothed", sigma=0.25, function="the smoothed model")
    )
    # The attack radii handed over would be alarms; the smoothed model is attacked anew instead.
    assert finding.status == "ok"
    assert min(finding.series["attacked"]) > 0.1
    assert "the smoothed model was attacked" in finding.does_not_show


def test_the_smoothed_model_is_attacked_where_it_was_certified():
    """Of a linear model the smoothed vote changes where the model does: the attack must lie beyond and not far."""

    class Opaque(nn.Module):
        def forward(self, x):
            return _subjects.linear()(x) + 0 * torch.fft.fft(x).real[:, :2]

    x, y = _subjects.table(n=24, seed=2)
    report = audit.run(Opaque().eval(), (x, y), norm="l2", only=BOTH, progress=False)
    finding = report["sandwich"]
    assert report["certify"].series["of"] == "smoothed"
    assert finding.status == "ok"
    scale = x.std(0)
    margin = ((x[:, 0] + x[:, 1]) * (2 * y - 1) / scale[:2].norm()).double().numpy()
    truth = {int(i): m for i, m in enumerate(margin)}
    attacked = dict(zip(finding.series["numbers"], finding.series["attacked"], strict=True))
    assert len(attacked) >= 12
    for row, radius in attacked.items():
        assert truth[row] * 0.9 < radius < truth[row] * 2.5 + 0.5
    assert np.all(np.array(finding.series["certified"]) <= np.array(finding.series["attacked"]))


@pytest.mark.parametrize("only", [["sandwich"], ["attack", "sandwich"]])
def test_without_both_sections_it_says_what_is_missing(only):
    finding = audit.run(_subjects.linear(), _subjects.table(), only=only, progress=False)["sandwich"]
    assert finding.status == "not run"
    assert "certify was left out" in finding.why


def test_images_share_rows():
    report = audit.run(_subjects.image_model().eval(), _subjects.images(n=24), only=BOTH, progress=False)
    finding = report["sandwich"]
    assert finding.status == "ok", finding.why
    assert len(finding.series["certified"]) >= 4
    assert report.figure("sandwich").axes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_a_model_that_rounds_coarsely_is_not_proved_itself(dtype):
    with seeded_init(1):
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    report = audit.run(net, (x, net(x).argmax(1)), only=["attack", "certify", "sandwich"], progress=False)
    assert report["certify"].series["of"] == "smoothed"
    assert f"rounds to {str(dtype)[6:]}" in report["certify"].does_not_show
