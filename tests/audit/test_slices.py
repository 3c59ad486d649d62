"""Weakest rows and slices: planted faults are found, noise is not called a fault."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import perturbkit.audit as audit
from perturbkit.audit._papers import METHODS, methods
from perturbkit.audit.sections.slices import _compare, _holm, _worse_between
from perturbkit.papers.records import discover

sys.path.insert(0, str(Path(__file__).parent))
import _subjects


def predictions(n, seed, fault=None):
    """Predictions right in 9 of 10 rows everywhere, and in ``fault`` rows in 2 of 10."""
    g = np.random.default_rng(seed)
    y = g.integers(0, 2, n)
    wrong = g.random(n) < np.where(np.zeros(n, bool) if fault is None else fault(n, g, y), 0.8, 0.1)
    p = np.where(wrong, 0.2, 0.8)
    return np.stack([np.where(y == 0, p, 1 - p), np.where(y == 1, p, 1 - p)], 1), y


def test_a_class_on_which_the_model_is_worse_is_named():
    p, y = predictions(200, 0, lambda n, g, y: y == 1)
    finding = audit.run(predictions=p, labels=y, only=["slices"], progress=False)["slices"]
    assert finding.status == "weak"
    assert "where label is 1: accuracy" in finding.headline
    worst = finding.table.rows[0]
    assert worst[0] == "label is 1"
    assert worst[-1] == "worse"
    assert worst[3] < worst[4]


def test_noise_is_no_fault():
    found = [
        audit.run(predictions=p, labels=y, only=["slices"], progress=False)["slices"].status
        for p, y in (predictions(120, seed) for seed in range(12))
    ]
    assert found.count("weak") <= 1


class Faulty(nn.Module):
    """Right but where the third column is large, where it is wrong."""

    def forward(self, x):
        score = x[:, 0] * torch.where(x[:, 2] > 0.9, -1.0, 1.0)
        return torch.stack([-score, score], 1)


def faulty_data(n=160, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g)
    return x, (x[:, 0] > 0).long()


def test_a_range_of_a_column_is_found():
    x, y = faulty_data()
    report = audit.run(Faulty().eval(), (x, y), only=["slices"], progress=False)
    finding = report["slices"]
    assert finding.status == "weak"
    assert re.search(r"where feature 2 above [\d.]+: accuracy", finding.headline)
    worse = {row[0].split(" ")[1] for row in finding.table.rows if row[-1] == "worse"}
    assert worse == {"2"}
    assert report.figure("slices").axes


def test_a_column_called_like_a_group_is_none():
    """Rows near the edge bear less, and a column that tells of it is no group by its name."""
    g = np.random.default_rng(0)
    score = g.normal(size=160)
    x = pd.DataFrame({"score": score, "group distance": np.abs(score)})
    right = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        right.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    only = ["attack", "slices"]
    finding = audit.run(right.eval(), (x, (score > 0).astype(int)), only=only, progress=False)["slices"]
    assert any(row[0].startswith("group distance below") and row[-1] == "worse" for row in finding.table.rows)
    assert finding.headline.startswith("The model is as right everywhere as chance explains")
    assert finding.status == "ok"


def test_groups_are_slices(tmp_path):
    x, y = faulty_data()
    where = np.where(x[:, 2].numpy() > 0.9, "night", "day")
    frame = pd.DataFrame(x.numpy(), columns=list("abcd")).assign(time=where, label=y.numpy())
    frame.to_csv(tmp_path / "data.csv", index=False)
    found = audit.run(
        Faulty().eval(), tmp_path / "data.csv", label="label", groups="time", only=["slices"], progress=False
    )
    assert "where group is night: accuracy 0 against 1" in found["slices"].headline
    assert found["slices"].status == "weak"


def test_few_rows_are_not_compared():
    p, y = predictions(12, 0)
    finding = audit.run(predictions=p, labels=y, only=["slices"], progress=False)["slices"]
    assert finding.status == "not run"
    assert "at least 16" in finding.why


def test_holm_by_hand():
    assert _holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_weakest_rows_come_in_the_order_they_fail():
    x, y = _subjects.table(n=60, seed=1)
    report = audit.run(
        _subjects.linear().eval(), (x, y), only=["attack", "weakest"], n=40, seed=2, progress=False
    )
    table = report["weakest"].table
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    margin = ((x[:, 0] + x[:, 1]) * (2 * y - 1)).numpy()
    right = [r["row"] for r in rows if r["radius"] != "wrong already"]
    # Numbers are those of the data as given, and the radius of a linear model is in the order of its margin.
    assert list(margin[right]) == sorted(margin[right])
    assert all(rows[i]["label"] == str(int(y[rows[i]["row"]])) for i in range(len(rows)))
    assert "sd)" in rows[0]["unusual values"]
    assert report["weakest"].status == "ok"


def test_texts_and_pictures_are_shown():
    report = audit.run(
        _subjects.image_model().eval(), _subjects.images(n=16), only=["weakest"], progress=False
    )
    finding = report["weakest"]
    assert len(finding.series["pictures"]) == 12
    assert sum(bool(ax.images) for ax in report.figure("weakest").axes) == 12
    page = audit.render_html(report)
    assert 'figure class="pictures"' in page


def test_every_method_is_that_of_its_paper():
    records = {r.key: r for r in discover()}
    for key, method in METHODS.items():
        assert method.limits.endswith(".")
        if method.reproduction:
            record = records[key]
            assert (method.title, method.authors, method.year) == (record.title, record.authors, record.year)
            assert method.link == f"https://arxiv.org/abs/{record.arxiv}"


def test_every_section_links_its_methods_and_their_limits():
    report = audit.run(_subjects.linear().eval(), _subjects.table(), progress=False)
    page = audit.render_html(report)
    for finding in report.findings:
        part = page[page.index(f'<section id="{finding.section}"') :].split("</section>")[0]
        keys = (*finding.papers, *finding.series.get("references", ()))
        assert all(k in METHODS for k in keys), finding.section
        assert bool(keys) == ("their papers and limits" in part)
        for method in methods(keys):
            assert method.link in part
            assert str(method.year) in part
    cited = {f.section for f in report.findings if f.papers or f.series.get("references")}
    assert cited >= set(audit.SECTIONS) - {"sanity", "weakest"}


def grouped(n, seed, accuracies):
    """Predictions of groups of equal size, each right as often as given, with confidence that tells nothing."""
    g = np.random.default_rng(seed)
    group = np.arange(n) % len(accuracies)
    y = g.integers(0, 2, n)
    p = np.where(g.random(n) < np.array(accuracies)[group], 0.8, 0.2)
    return np.stack([np.where(y == 0, p, 1 - p), np.where(y == 1, p, 1 - p)], 1), y, group


def test_the_number_of_worse_comparisons_has_an_interval(tmp_path):
    """Of five groups one is worse than the rest and four are better: one is found, and the four are ruled out."""
    p, y, group = grouped(3000, 0, (0.4, 0.9, 0.9, 0.9, 0.9))
    lines = [f"{a},{b},{t},g{k}" for (a, b), t, k in zip(p.tolist(), y, group, strict=True)]
    (tmp_path / "p.csv").write_text("\n".join(["0,1,label,site", *lines]) + "\n")
    run = {"label": "label", "groups": "site", "only": ["slices"], "progress": False}
    finding = audit.run(str(tmp_path / "p.csv"), n=3000, **run)["slices"]
    found = finding.metric("worse")
    table = [dict(zip(finding.table.columns, row, strict=True)) for row in finding.table.rows]
    assert len(table) == found.n
    ends = [
        -math.inf
        if "open" in row["difference, interval"]
        else float(row["difference, interval"][1:].split(",")[0])
        for row in table
    ]
    assert found.value == found.low == sum(row[""] == "worse" for row in table) >= 1
    assert found.high == sum(low < 0 for low in ends)
    better = [r for r, low in zip(table, ends, strict=True) if low >= 0 and r["quantity"] == "accuracy"]
    assert {row["slice"] for row in better} == {f"group is g{k}" for k in range(1, 5)}
    assert found.high <= found.n - 4
    assert (
        f"in {found.low:.0f} of them or more, and not in more than {found.high:.0f}" in finding.does_not_show
    )
    # On few rows nothing is ruled out.
    few = audit.run(str(tmp_path / "p.csv"), n=60, **run)["slices"].metric("worse")
    assert few.low <= 1 <= few.high
    assert few.high >= few.n - 1


def test_the_interval_holds_the_true_number_in_nearly_all_repeats():
    accuracies = (0.5, 0.75, 0.8, 0.85, 0.95)
    rest = [(sum(accuracies) - a) / 4 for a in accuracies]
    truth = sum(a < r for a, r in zip(accuracies, rest, strict=True))
    held, narrow = 0, 0
    for seed in range(200):
        p, y, group = grouped(1000, seed, accuracies)
        right = (p.argmax(1) == y).astype(float)
        compared = [_compare(str(k), group == k, "accuracy", right, 5) for k in range(5)]
        corrected = _holm([c.p for c in compared])
        found = sum(p < 0.05 and c.high < 0 for c, p in zip(compared, corrected, strict=True))
        low, high = _worse_between(found, compared)
        held += low <= truth <= high
        narrow += high < 5
    assert truth == 2
    assert held >= 190
    assert narrow >= 150
