"""Records, comparisons, evidence, runs and search."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.papers import _samples

from perturbkit.core import Result, checks
from perturbkit.papers import Comparison, Evidence, Run, discover, paper, ranking, read_record
from perturbkit.papers.ranking import rank
from perturbkit.papers.records import PACKAGE, method_source, validated

META = {
    "number": 7,
    "title": "T",
    "authors": "A",
    "year": 2020,
    "arxiv": "",
    "claim": "C.",
    "method": "perturbkit.core.Oracle",
    "needs": "forward",
    "input": "any",
    "cost": "c",
    "seconds": 1,
}
finite = st.floats(-1e6, 1e6)


@pytest.mark.parametrize(
    ("direction", "ours", "baseline", "margin", "factor", "holds"),
    [
        ("higher", 0.8, 0.7, 0.1, 1.0, False),  # 0.7 + 0.1 rounds to just above 0.8
        ("higher", 0.81, 0.7, 0.1, 1.0, True),
        ("higher", 0.79, 0.7, 0.1, 1.0, False),
        ("higher", 0.69, 0.7, -0.02, 1.0, True),
        ("higher", 1.0, 2.0, 0.0, 0.5, True),
        ("lower", 0.5, 1.0, 0.5, 1.0, True),
        ("lower", 0.51, 1.0, 0.5, 1.0, False),
        ("lower", 0.51, 1.0, 0.0, 0.5, False),
        ("equal", 1.0, 1.25, 0.25, 1.0, True),
        ("equal", 1.0, 1.5, 0.25, 1.0, False),
        ("equal", 1.0, 2.0, 0.0, 0.5, True),
        ("higher", math.nan, 0.0, 0.0, 1.0, False),
        ("lower", math.nan, 0.0, 0.0, 1.0, False),
        ("equal", math.nan, math.nan, 1.0, 1.0, False),
        ("higher", 1.0, math.nan, 0.0, 1.0, False),
        ("lower", 1.0, math.inf, 0.0, 1.0, True),
    ],
)
def test_a_comparison_holds_as_stated(direction, ours, baseline, margin, factor, holds):
    comparison = Comparison("m", ours, baseline, direction, margin=margin, factor=factor)
    expected = holds or (direction == "higher" and ours >= factor * baseline + margin)
    assert comparison.holds is expected
    assert Comparison("m", ours, baseline, direction, margin, factor, control=True).as_wanted is not expected


@given(finite, finite, st.floats(0, 10), st.floats(0.1, 10))
def test_higher_and_lower_mirror_each_other(ours, baseline, margin, factor):
    up = Comparison("m", ours, baseline, "higher", margin=margin, factor=factor)
    down = Comparison("m", -ours, -baseline, "lower", margin=margin, factor=factor)
    assert up.holds == down.holds


def test_over_seeds_gives_means_and_the_paired_standard_error():
    rng = np.random.default_rng(0)
    ours, baseline = rng.normal(size=8), rng.normal(size=8)
    found = Comparison.over_seeds("m", ours, baseline, "higher", factor=2.0)
    difference = ours - 2.0 * baseline
    assert found.ours == pytest.approx(ours.mean())
    assert found.baseline == pytest.approx(baseline.mean())
    assert found.spread == pytest.approx(difference.std(ddof=1) / np.sqrt(8))
    assert found.n == 8
    assert Comparison.over_seeds("m", [1.0], [2.0], "higher").spread is None
    broken = Comparison.over_seeds("m", [1.0, math.nan], [0.0, 0.0], "higher")
    assert math.isnan(broken.spread)
    assert not broken.holds


def test_a_comparison_is_a_result_that_goes_through_json():
    comparison = Comparison(
        "m", torch.tensor(0.5), np.float32(0.25), "higher", spread=math.nan, n=3, note="é"
    )
    assert type(comparison.ours) is float
    again = Result.from_dict(json.loads(json.dumps(comparison.to_dict())))
    assert repr(again) == repr(comparison)


def test_evidence_holds_when_claims_hold_and_controls_fail():
    good, bad = Comparison("a", 2, 1, "higher"), Comparison("b", 1, 2, "higher")
    failing = Comparison("c", 1, 2, "higher", control=True)
    holding = Comparison("d", 2, 1, "higher", control=True)
    assert Evidence([good, failing]).holds
    assert not Evidence([good, bad]).holds
    assert not Evidence([good, holding]).holds
    assert not Evidence([bad, failing]).holds


def test_a_run_derives_its_streams_from_seed_and_name():
    def draws(run, name):
        return torch.rand(4, generator=run.generator(name)).tolist() + run.rng(name).random(4).tolist()

    assert draws(Run(3), "a") == draws(Run(3), "a")
    assert not set(draws(Run(3), "a")) & set(draws(Run(3), "b"))
    assert not set(draws(Run(3), "a")) & set(draws(Run(4), "a"))
    assert len(set(Run(3).seeds(50))) == 50


def test_a_run_leaves_the_global_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    Run(1).generator("a")
    Run(1).rng("a")
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Comparison("m", 1, 2, "above"), "direction"),
        (lambda: Comparison("", 1, 2, "higher"), "metric"),
        (lambda: Comparison("m", "1", 2, "higher"), "ours"),
        (lambda: Comparison("m", 1, torch.ones(2), "higher"), "baseline"),
        (lambda: Comparison("m", 1, 2, "equal", margin=-1.0), "margin"),
        (lambda: Comparison("m", 1, 2, "higher", margin=math.nan), "margin"),
        (lambda: Comparison("m", 1, 2, "higher", factor=0.0), "factor"),
        (lambda: Comparison("m", 1, 2, "higher", n=0), "n is 0"),
        (lambda: Comparison.over_seeds("m", [], [], "higher"), "ours has 0"),
        (lambda: Comparison.over_seeds("m", [1.0], [1.0, 2.0], "higher"), "baseline 2"),
        (lambda: Evidence([]), "comparisons"),
        (lambda: Evidence([Comparison("m", 1, 2, "higher", control=True)]), "comparisons"),
        (lambda: Evidence([(1, 2)]), "comparisons"),
        (lambda: paper(**META | {"needs": "magic"})(lambda run: None), "needs"),
        (lambda: paper(**META | {"method": "explain.rise"})(lambda run: None), "method"),
        (lambda: paper(**META | {"year": "2020"})(lambda run: None), "year"),
        (lambda: paper(**META | {"number": True})(lambda run: None), "number"),
        (lambda: paper(**META | {"claim": " "})(lambda run: None), "claim"),
        (lambda: paper(**META | {"seconds": 0})(lambda run: None), "seconds"),
        (lambda: validated({"number": 1}, "x"), "lacks"),
        (lambda: validated(META | {"colour": 1}, "x"), "colour"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(checks.PerturbkitError, match=match) as caught:
        call()
    assert "allowed" in str(caught.value)


def test_the_decorator_and_the_syntax_tree_agree(tmp_path):
    path = _samples.write(
        tmp_path, "alpha/good", number=4, title="Größe", summary="One line\nand a second.\n\nMore."
    )
    space = {}
    exec(compile(path.read_text("utf-8"), str(path), "exec"), space)
    read = read_record(path)
    assert read.summary == "One line and a second."
    assert (read.key, read.package, read.number, read.title) == ("good", "alpha", 4, "Größe")
    assert space["reproduce"].record == read.__class__(**vars(read) | {"summary": ""})


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("def f(:", "parsed"),
        ("x = 1", "0 functions"),
        ("@paper(number=1)\ndef a(r): ...\n@paper(number=2)\ndef b(r): ...", "2 functions"),
        ("@paper(number=1 + x)\ndef a(r): ...", "computed"),
        ("@paper(**x)\ndef a(r): ...", "computed"),
        ("@paper(number=1)\ndef a(r): ...", "lacks"),
    ],
)
def test_a_broken_file_is_named_and_hides_no_other(tmp_path, source, match):
    _samples.write(tmp_path, "alpha/good")
    (tmp_path / "alpha" / "broken.py").write_text(source)
    with pytest.raises(checks.PerturbkitError, match=match):
        read_record(tmp_path / "alpha" / "broken.py")
    broken, good = discover(tmp_path)
    assert good.problem is None
    assert "broken.py" in broken.problem


def test_discover_orders_and_leaves_parts_out(tmp_path):
    for place in ("beta/a", "alpha/z", "alpha/b"):
        _samples.write(tmp_path, place)
    (tmp_path / "alpha" / "_parts.py").write_text("x = 1")
    (tmp_path / "templates").mkdir()
    assert [f"{r.package}/{r.key}" for r in discover(tmp_path)] == ["alpha/b", "alpha/z", "beta/a"]


def test_reading_runs_no_reproduction_and_imports_no_torch(tmp_path):
    path = _samples.write(tmp_path, "alpha/loud")
    path.write_text(path.read_text() + '\nraise SystemExit("it was run")\n')
    code = (
        "import sys, pathlib; from perturbkit.papers import discover; from perturbkit.papers.ranking import rank;"
        f"records = discover(pathlib.Path({str(tmp_path)!r})) + discover(); rank('paper', records);"
        "bad = {'torch', 'numpy', 'matplotlib', 'scipy'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_filters(tmp_path):
    place = iter("abcd")
    for needs, kind in [("forward", "any"), ("gradient", "image"), ("forward, training", "tabular, text")]:
        _samples.write(tmp_path, f"p/{next(place)}", needs=needs, input=kind)
    a, b, c = discover(tmp_path)
    assert [r.accepts(("forward",)) for r in (a, b, c)] == [True, False, False]
    assert [r.accepts(("forward", "training")) for r in (a, b, c)] == [True, False, True]
    assert [r.accepts((), ("text",)) for r in (a, b, c)] == [True, False, True]
    assert [r.accepts((), ("image",)) for r in (a, b, c)] == [True, True, False]
    assert all(r.accepts() for r in (a, b, c))


def test_method_source_follows_the_stubs(tmp_path):
    (tmp_path / "explain" / "masking").mkdir(parents=True)
    (tmp_path / "explain" / "__init__.pyi").write_text("from .masking.rise import Rise as Rise\n")
    (tmp_path / "explain" / "masking" / "rise.py").write_text("")
    wanted = tmp_path / "explain" / "masking" / "rise.py"
    assert method_source("perturbkit.explain.Rise", tmp_path) == wanted
    assert method_source("perturbkit.explain.masking.rise.Rise", tmp_path) == wanted
    assert method_source("perturbkit.explain.other", tmp_path) is None
    assert method_source("perturbkit.core.Attribution") == PACKAGE / "core" / "results.py"


def test_search_puts_the_title_first_and_knows_docstrings(tmp_path):
    _samples.write(tmp_path, "p/masks", title="Randomized masks", claim="Occlusion finds pixels.")
    _samples.write(tmp_path, "p/paths", title="Integrated gradients", claim="Masks are worse.")
    _samples.write(tmp_path, "p/other", title="Something else", method="perturbkit.core.Cost")
    records = discover(tmp_path)

    def keys(query):
        return [record.key for record, _ in rank(query, records)]

    assert keys("mask")[0] == "masks"
    assert keys("MASKS") == keys("mask")
    assert set(keys("mask")) == {"masks", "paths"}
    assert keys("occlusion") == ["masks"]
    assert set(keys("chunked device aware")) == {"masks", "paths"}  # only in the docstring of Oracle
    assert keys("zebra") == []
    assert rank("x", []) == []


def test_search_scores_are_those_of_the_formula(tmp_path):
    for key, title in [("a", "zebra zebra"), ("b", "zebra"), ("c", "horse")]:
        _samples.write(tmp_path, f"p/{key}", title=title, method="perturbkit.none.x")
    records = discover(tmp_path)
    ((first, one), (second, two)) = rank("zebra", records)
    assert (first.key, second.key) == ("a", "b")
    # A word in the title counts four times; the three differ in length by one title word.
    lengths = [sum(ranking._counted(record).values()) for record in records]
    assert lengths[0] - 4 == lengths[1] == lengths[2]
    mean, idf = sum(lengths) / 3, math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    for score, tf, length in [(one, 8, lengths[0]), (two, 4, lengths[1])]:
        assert score == pytest.approx(idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * length / mean)))


def test_every_key_is_there_once_and_a_number_is_one_paper():
    records = discover()
    assert [r.problem for r in records if r.problem] == []
    keys = [r.key for r in records]
    assert sorted(set(keys)) == sorted(keys)
    # A paper may have two reproductions; 0 stands for those beyond the catalogue.
    papers = {(r.number, r.arxiv) for r in records if r.number}
    assert len({number for number, _ in papers}) == len(papers)
