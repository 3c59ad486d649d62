"""Regressions on tables: every section against what is known of a linear model, and what is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, QuantileRegressor
from sklearn.metrics import mean_absolute_error, r2_score
from torch import nn

import perturbkit.audit as audit
from perturbkit.core import checks

sys.path.insert(0, str(Path(__file__).parent))
import _subjects

WEIGHT = torch.tensor([3.0, -1.0, 0.5, 0.0])
ALL = audit.SECTIONS


def data(n=200, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g) * torch.tensor([1.0, 2.0, 0.5, 1.0])
    return x, x @ WEIGHT + 10 + torch.randn(n, generator=g)


class Linear(nn.Module):
    """The truth without its noise, answering (n,) or (n, 1)."""

    def __init__(self, column=False):
        super().__init__()
        with torch.random.fork_rng():
            self.net = nn.Linear(4, 1)
        with torch.no_grad():
            self.net.weight.copy_(WEIGHT[None])
            self.net.bias.fill_(10.0)
        self.column = column

    def forward(self, x):
        out = self.net(x)
        return out if self.column else out.squeeze(1)


@pytest.fixture(scope="module")
def report():
    return audit.run(Linear().eval(), data(), task="tabular", progress=False)


@pytest.fixture(scope="module")
def opaque():
    x, y = data()
    return audit.run(LinearRegression().fit(x.numpy(), y.numpy()), (x.numpy(), y.numpy()), progress=False)


def test_every_section_but_calibration_runs_and_draws(report, opaque):
    for found in (report, opaque):
        assert tuple(f.section for f in found.findings) == ALL
        for finding in found.findings:
            if finding.section == "calibration":
                assert finding.status == "not run"
                assert "answers numbers and no probabilities" in finding.why
                continue
            if finding.section == "sandwich" and found is opaque:
                assert "not comparable" in finding.why
                continue
            assert finding.status in ("ok", "weak"), (finding.section, finding.why)
            assert finding.headline.endswith(".")
            assert found.figure(finding.section).axes
        assert found.classes == 0
        page = audit.render_html(found)
        assert "one number a row, task tabular" in page
        assert "0 classes" not in page.replace("20 classes", "")


def test_the_error_is_that_of_scikit_learn(report):
    x, y = data()
    answers = Linear().eval()(x).detach().numpy()
    sanity = report["sanity"]
    assert sanity.metric("r2").value == pytest.approx(r2_score(y.numpy(), answers), rel=1e-5)
    assert sanity.metric("mae").value == pytest.approx(mean_absolute_error(y.numpy(), answers), rel=1e-5)
    rmse = sanity.metric("rmse")
    assert rmse.value == pytest.approx(float(np.sqrt(np.mean((y.numpy() - answers) ** 2))), rel=1e-5)
    assert rmse.low < rmse.value < rmse.high < rmse.control
    assert rmse.low <= 1.0 <= rmse.high  # the noise has deviation one
    assert sanity.status == "ok"


def test_a_model_no_better_than_the_mean_needs_a_look():
    x, y = data()
    found = audit.run(lambda z: z[:, 3], (x, y), only=["sanity"], progress=False)["sanity"]
    assert found.status == "weak"
    assert found.metric("r2").low < 0


@pytest.mark.parametrize(("degrees", "status"), [(None, "ok"), (1.0, "weak")])
def test_only_few_rows_that_make_the_error_need_a_look(degrees, status):
    g = np.random.default_rng(0)
    noise = g.laplace(size=60) if degrees is None else g.standard_t(degrees, size=60)
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    y = x @ WEIGHT + 10 + torch.as_tensor(noise, dtype=x.dtype)
    finding = audit.run(Linear().eval(), (x, y), only=["weakest"], progress=False)["weakest"]
    assert finding.status == status


def test_attack_and_certificate_are_exact_on_a_linear_model(report):
    x, y = data()
    scale = x.std(0)
    moved = 0.25 * float(y.double().std())
    truth = moved / float((WEIGHT * scale).abs().sum())
    attack, proof = report["attack"].metric("radius.median"), report["certify"].metric("radius.median")
    assert "linear relaxation" in proof.method
    assert attack.value == pytest.approx(truth, rel=0.02)
    assert proof.value == pytest.approx(truth, rel=0.02)
    assert proof.value <= truth * (1 + 1e-4) <= attack.value * (1 + 1e-3)
    reach = report["certify"].metric("movement.at_eps").value
    assert reach == pytest.approx(0.05 * float((WEIGHT * scale).abs().sum()), rel=1e-3)
    assert f"{moved:.3g}" in report["attack"].headline


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_without_a_gradient_the_truth_is_still_enclosed(norm):
    x, y = data()
    model = LinearRegression().fit(x.numpy(), y.numpy())
    found = audit.run(
        model, (x.numpy(), y.numpy()), only=["attack", "certify"], norm=norm, n=60, progress=False
    )
    # The request's rows decide the scale; the median smoothed model of a linear one is the same linear model.
    attacked, proved = found["attack"].series["radius"], found["certify"].series["radius"]
    assert min(attacked) > 0
    assert "median" in found["certify"].headline
    if norm == "l2":
        assert max(proved) <= min(attacked) * 1.001
        assert max(proved) > 0


def test_explanations_of_a_linear_model(report, opaque):
    for found in (report, opaque):
        assert found["explain"].metric("agreement").value > 0.99
        assert found["explain"].table.rows[0][0] == "feature 0"
        gains = [m for m in found["faithfulness"].metrics if ".gain" in m.name]
        assert len(gains) == 4
        assert all(gain.low > 0 for gain in gains)
    assert "Shapley sampling" in opaque["explain"].headline or "Two methods" in opaque["explain"].headline


def test_intervals_cover(report):
    found = report["conformal"]
    coverage = found.metric("coverage")
    assert coverage.low <= 0.9 <= coverage.high
    assert abs(found.metric("coverage.mean").value - 0.9) < 0.03
    assert found.metric("width.mean").value == pytest.approx(2 * 1.645, rel=0.2)  # of normal noise
    assert {row[0] for row in found.table.rows} >= {"lowest quarter", "highest quarter"}


@pytest.mark.parametrize("outputs", [2, 3])
def test_quantiles_are_conformalised_and_adapt(outputs):
    g = torch.Generator().manual_seed(1)
    x = torch.rand(400, 1, generator=g)
    y = x[:, 0] * torch.randn(400, generator=g)  # noise that grows with x
    levels = (-1.0, 1.0) if outputs == 2 else (-1.0, 0.0, 1.0)  # too narrow for 90 %

    def model(z):
        return torch.stack([level * z[:, 0] for level in levels], 1)

    found = audit.run(model, (x, y), only=["sanity", "conformal"], n=400, progress=False)
    conformal = found["conformal"]
    assert "conformalised quantiles" in conformal.metric("coverage").method
    assert conformal.metric("coverage").control == pytest.approx(0.683, abs=0.06)
    assert abs(conformal.metric("coverage.mean").value - 0.9) < 0.03
    low, high = np.array(conformal.series["low"]), np.array(conformal.series["high"])
    assert np.ptp(high - low) > 0.5
    assert "quantiles" in str(found["sanity"].table.rows)


def test_damage_is_measured_by_the_error(report):
    found = report["corruption"]
    assert found.metric("rmse.clean").value == pytest.approx(report["sanity"].metric("rmse").value, rel=0.3)
    assert found.metric("rmse.worst").low <= found.metric("rmse.worst").value
    errors = np.array(found.series["rmse"])
    assert (errors[:, -1] > errors[:, 0]).mean() >= 0.6


def test_answers_of_either_shape_give_the_same_report(report):
    again = audit.run(Linear(column=True).eval(), data(), progress=False)
    columns = ["section", "metric", "value", "low", "high", "control"]
    assert again.to_frame()[columns].equals(report.to_frame()[columns])


def test_same_seed_same_report():
    x, y = data(60)
    model = LinearRegression().fit(x.numpy(), y.numpy())
    frames = [
        audit.run(model, (x.numpy(), y.numpy()), seed=s, n=30, progress=False).to_frame() for s in (1, 1, 2)
    ]
    columns = ["section", "metric", "value", "low", "high", "control"]
    assert frames[0][columns].equals(frames[1][columns])
    assert not frames[0][columns].equals(frames[2][columns])


def test_scikit_learn_quantiles_in_a_function_and_predictions_in_a_file(tmp_path):
    x, y = data()
    low, high = (
        QuantileRegressor(quantile=q, alpha=0.0).fit(x.numpy(), y.numpy()).predict(x.numpy())
        for q in (0.05, 0.95)
    )
    lines = [f"{a},{b},{c}" for a, b, c in zip(low, high, y.tolist(), strict=True)]
    (tmp_path / "p.csv").write_text("\n".join(["low,high,label", *lines]) + "\n")
    found = audit.run(str(tmp_path / "p.csv"), progress=False)
    ran = {f.section for f in found.findings if not f.why}
    assert ran == {"sanity", "conformal", "weakest", "slices"}
    assert abs(found["conformal"].metric("coverage.mean").value - 0.9) < 0.04


def test_whole_targets_of_a_model_of_one_number():
    x, y = data()
    found = audit.open_subject(Linear(), (x, y.round()))
    assert found.regression
    assert found.y.dtype == torch.float64


def refused(model, given, error, *parts, **options):
    with pytest.raises(error) as caught:
        audit.open_subject(model, given, **options)
    for part in (*parts, "llowed"):
        assert part in str(caught.value), (part, str(caught.value))


def test_refusals(tmp_path):
    x, y = data(40)
    refused(Linear(), (x, (y > 10).long()), checks.ModelError, "labels are 0 and 1", "[1 - p, p]")
    refused(Linear(), (x, ["a", "b"] * 20), checks.ModelError, "labels are names", "[1 - p, p]")
    refused(Linear(), (x, torch.full((40,), 3.0)), checks.DataError, "same target 3")
    refused(Linear(), (x, y.masked_fill(y > 12, torch.inf)), checks.DataError, "infinite targets")
    refused(Linear(), (x, y.masked_fill(y > 12, torch.nan)), checks.DataError, "without a label")
    refused(
        lambda z: z, (x, y), checks.ModelError, "4 numbers a row", "quantiles from low to high", "--label"
    )
    refused(lambda z: -z[:, :2], (x, y), checks.ModelError, "2 numbers a row")
    images, _ = _subjects.images(10)
    refused(lambda z: z.mean((1, 2, 3)), (images, torch.rand(10)), checks.ModelError, "on images", "tables")
    (tmp_path / "p.csv").write_text("a,b,c,d,label\n1,2,3,4,0.5\n1,2,3,4,0.7\n")
    refused(str(tmp_path / "p.csv"), None, checks.DataError, "4 columns of predictions")


def test_a_number_that_only_falls_is_seen_to_move():
    # Below 1 the number falls by 5 a unit, above nothing happens: the way up moves it by 1.5 at most.
    g = torch.Generator().manual_seed(2)
    x = torch.stack([0.7 + 0.2 * torch.rand(60, generator=g), torch.randn(60, generator=g)], 1)
    y = 10 * torch.randn(60, generator=g)

    def model(z):
        return -5 * (1 - z[:, 0]).relu() + 1e-3 * z[:, 1]

    attack = audit.run(model, (x, y), only=["attack"], progress=False)["attack"]
    moved = 0.25 * float(y.double().std())
    radius = np.array(attack.series["radius"]) * float(x[:, 0].std())
    assert moved > 1.5
    np.testing.assert_allclose(radius, moved / 5, rtol=0.03)
