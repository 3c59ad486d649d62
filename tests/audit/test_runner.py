"""The audit on models whose answers are known."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import perturbkit.audit as audit
from perturbkit.core import checks, parse_memory

sys.path.insert(0, str(Path(__file__).parent))
import _subjects

ALL = audit.SECTIONS


@pytest.fixture(scope="module")
def tabular():
    return audit.run(_subjects.linear(), _subjects.table(), progress=False)


@pytest.fixture(scope="module")
def image():
    return audit.run(_subjects.image_model(), _subjects.images(), progress=False)


@pytest.mark.parametrize("report", ["tabular", "image"])
def test_every_section_runs_and_draws(report, request):
    found = request.getfixturevalue(report)
    assert tuple(f.section for f in found.findings) == ALL
    for finding in found.findings:
        assert finding.status in ("ok", "weak"), (finding.section, finding.why)
        assert finding.headline.endswith(".")
        assert finding.does_not_show
        assert finding.table is not None
        figure = found.figure(finding.section)
        assert figure.axes
    assert found.exit_code == 0


def test_explanations_find_the_columns_that_matter(tabular):
    names = [row[0] for row in tabular["explain"].table.rows]
    assert set(names[:2]) == {"feature 0", "feature 1"}
    assert tabular["explain"].metric("agreement").value > 0.8
    assert tabular["faithfulness"].metric("deletion.gain.occlusion").low > 0


def test_attack_and_certificate_enclose_the_true_radius(tabular):
    # A linear margin w.x changes sign at |w.x| / |w s|_1 in standard deviations: exact for attack and certificate.
    x, y = _subjects.table()
    scale = x.std(0)
    margin = (x[:, 0] + x[:, 1]) * (2 * y - 1)
    right = margin > 0
    truth = float(np.median((margin / (scale[0] + scale[1]))[right]))
    attacked = tabular["attack"].metric("radius.median").value
    proved = tabular["certify"].metric("radius.median").value
    assert proved <= truth * 1.001
    assert truth * 0.999 <= attacked <= truth * 1.1
    assert proved > 0.95 * min(truth, 3.0)


def test_an_image_audit_sees_the_bright_half(image):
    first = image["explain"].series
    heat = np.array(first["maps"]["occlusion"][0]).reshape(first["grid"])
    halves = heat[:, :3].sum(), heat[:, 4:].sum()
    assert abs(halves[0] - halves[1]) > 0  # the map is not flat
    assert image["sanity"].metric("accuracy").value == 1.0


def test_predictions_alone():
    p, y = _subjects.calibrated()
    found = audit.run(predictions=p, labels=y, progress=False)
    states = {f.section: f.status for f in found.findings}
    assert {s for s, state in states.items() if state == "not run"} == {
        "explain", "faithfulness", "attack", "certify", "sandwich", "corruption",
    }  # fmt: skip
    assert states["calibration"] == "ok"
    ece = found["calibration"].metric("ece")
    assert ece.low <= ece.control * 1.5
    coverage = found["conformal"].metric("coverage")
    assert coverage.low <= 0.9 <= coverage.high + 0.05
    with pytest.raises(checks.ArgumentError, match="only predictions are given"):
        found.figure("attack")


def test_overconfidence_is_flagged():
    p, y = _subjects.calibrated()
    sharp = p**6 / (p**6).sum(1, keepdims=True)
    found = audit.run(predictions=sharp, labels=y, only=["calibration"], progress=False)["calibration"]
    assert found.status == "weak"
    assert found.metric("overconfidence").low > 0.05


def test_same_seed_same_report_and_another_seed_another():
    runs = [
        audit.run(_subjects.linear(), _subjects.table(200), n=30, seed=s, skip=["certify"], progress=False)
        for s in (3, 3, 4)
    ]
    frames = [r.to_frame()[["section", "metric", "value", "low", "high", "control"]] for r in runs]
    assert frames[0].equals(frames[1])
    assert not frames[0].equals(frames[2])


def test_rows_are_drawn_evenly_from_the_classes():
    x, _ = _subjects.table(300)
    y = (torch.arange(300) % 10 == 0).long()
    found = audit.run(_subjects.linear(), (x, y), n=50, only=["sanity"], progress=False)
    table = found["sanity"].series
    assert found.rows == 50
    assert found.rows_given == 300
    assert set(table["classes"]) == {"0", "1"}


def test_a_section_that_fails_leaves_the_others():
    class Moody(nn.Module):
        """Raises on changed inputs, not on the given ones."""

        def __init__(self, x):
            super().__init__()
            self.known = {tuple(row) for row in x.round(decimals=3).tolist()}
            self.net = _subjects.linear()

        def forward(self, x):
            if not all(tuple(row) in self.known for row in x.detach().round(decimals=3).tolist()):
                raise RuntimeError("unknown row")
            return self.net(x)

    x, y = _subjects.table()
    found = audit.run(Moody(x), (x, y), progress=False)
    states = {f.section: f.status for f in found.findings}
    assert states["corruption"] == "failed"
    assert "unknown row" in found["corruption"].why
    assert states["calibration"] in ("ok", "weak")


def test_a_model_without_gradients_is_attacked_in_random_directions():
    net = _subjects.linear()

    def forward_only(x):
        return torch.from_numpy(net(x).detach().numpy())

    found = audit.run(forward_only, _subjects.table(), only=["explain", "attack", "certify"], progress=False)
    assert "random directions" in found["attack"].metric("radius.median").method
    assert "Two methods agree" in found["explain"].headline
    assert "mean |Shapley sampling|" in found["explain"].table.columns
    assert "Left out: integrated gradients" in found["explain"].does_not_show
    assert "Left out: the white-box attack" in found["attack"].does_not_show
    assert "smoothed model" in found["certify"].headline


def test_training_mode_is_noted_and_left_as_it_was():
    net = _subjects.linear()
    net.train()
    found = audit.run(net, _subjects.table(), only=["sanity"], progress=False)
    assert net.training
    assert any("training mode" in str(row) for row in found["sanity"].table.rows)
    assert found["sanity"].status == "weak"


def test_interrupting_keeps_what_is_finished(monkeypatch, tmp_path):
    import perturbkit.audit.sections.attack as attack

    def interrupt(context):
        raise KeyboardInterrupt

    monkeypatch.setattr(attack, "run", interrupt)
    found = audit.run(_subjects.linear(), _subjects.table(), out=tmp_path, progress=False)
    assert found.interrupted
    assert found.exit_code == 130
    assert [f.section for f in found.findings] == ["sanity", "explain", "faithfulness"]
    assert "Interrupted" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "findings" / "explain.json").read_text())["section"] == "explain"


def test_costs_are_counted(tabular):
    calibration, attack = tabular["calibration"], tabular["attack"]
    assert calibration.cost.nfev == 0
    assert attack.cost.ngrad == 16 * attack.metric("radius.median").n


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"model": None}, "model is None"),
        ({"task": "audio"}, "task is 'audio'"),
        ({"profile": "huge"}, "profile is 'huge'"),
        ({"only": ["attacks"]}, "section is 'attacks'"),
        ({"only": ["attack"], "skip": ["attack"]}, "no section is left"),
        ({"n": 1}, "n is 1"),
        ({"eps": -1.0}, "eps is -1"),
        ({"alpha": 1.0}, "alpha is 1"),
        ({"bounds": (1.0, 0.0)}, "bounds is"),
        ({"norm": "l7"}, "norm is 'l7'"),
    ],
)
def test_refused_options(arguments, match):
    given = {"model": _subjects.linear(), "data": _subjects.table(), "progress": False, **arguments}
    with pytest.raises(checks.ArgumentError, match=match):
        audit.run(**given)


def test_the_plan_names_what_takes_the_place_of_what_is_not_supported():
    from perturbkit.audit.opening import open_subject
    from perturbkit.audit.plan import make_plan, memory_needed, substitutions
    from perturbkit.audit.request import AuditRequest

    net, request = _subjects.linear(), AuditRequest()

    def forward_only(x):
        return torch.from_numpy(net(x).detach().numpy())

    whole = open_subject(net, _subjects.table())
    assert substitutions(whole, request) == {}
    weights, batch, how = memory_needed(whole, make_plan(whole, request))
    assert weights == sum(p.nbytes for p in net.parameters())
    assert batch > 0
    assert "with gradients" in how
    half = substitutions(open_subject(forward_only, _subjects.table()), request)
    assert set(half) == {"explain", "attack", "certify"}
    assert half["certify"].endswith("The smoothed model is certified instead.")
    assert "integrated gradients" in half["explain"]


def test_no_section_asks_the_model_for_more_at_once_than_the_memory_allows():
    class Wide(nn.Module):
        """A network whose answers need 0.5 MB a row, and as much again for a gradient; it notes the most that it was asked."""

        def __init__(self):
            super().__init__()
            self.first, self.last, self.most = nn.Conv2d(1, 512, 3, padding=1), nn.Linear(512, 3), 0

        def forward(self, x):
            self.most = max(self.most, len(x))
            # A hidden layer with an own rule for nothing, so that the proof is of the smoothed model.
            return self.last(nn.functional.softsign(self.first(x)).mean((2, 3)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Wide().eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(8, 1, 16, 16, generator=generator)
    y, row, most = net(x).argmax(1), 512 * 16 * 16 * 4, {}
    for memory in ("3MB", "1GB"):
        net.most = 0
        report = audit.run(net, (x, y), memory=memory, task="image", progress=False)
        assert {f.section for f in report.findings if f.cost.nfev} >= {
            "explain",
            "attack",
            "certify",
            "corruption",
        }
        most[memory] = net.most
    assert 1 < most["3MB"] <= parse_memory("3MB") // row < most["1GB"]
