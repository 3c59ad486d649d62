"""How many categories must be swapped: against all combinations, by planted rules, and with frozen columns."""

import csv
import io
import itertools

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin

import perturbkit.audit as audit
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.runner import conduct
from perturbkit.audit.sections.attack import MOST_SWAPS, evaluations

VALUES = {"colour": ["blue", "green", "red"], "site": ["north", "south"], "shape": ["cone", "cube", "disc"]}
NAMES = (*VALUES, "weight")


class Ruled(ClassifierMixin, BaseEstimator):
    """Answers by a rule on the columns of a frame, with the probability of "yes"."""

    def __init__(self, rule=None):
        self.rule = rule

    def fit(self, x, y):
        self.classes_, self.feature_names_in_ = np.array(["no", "yes"]), np.array(x.columns, dtype=object)
        self.n_features_in_ = x.shape[1]
        return self

    def predict_proba(self, x):
        p = np.asarray(self.rule(x), dtype=float)
        return np.stack([1 - p, p], 1)


class Numbered(RegressorMixin, Ruled):
    def predict(self, x):
        return np.asarray(self.rule(x), dtype=float)


def frame(n=40, seed=0):
    g = np.random.default_rng(seed)
    x = pd.DataFrame({name: g.choice(values, n) for name, values in VALUES.items()})
    return x.assign(weight=g.normal(size=n))


def attacked(rule, frozen=()):
    x = frame()
    model = Ruled(rule).fit(x, None)
    y = np.where(model.predict_proba(x)[:, 1] > 0.5, "yes", "no")
    request = AuditRequest(frozen=frozen).selecting(("attack",))
    return x, conduct(lambda: audit.open_subject(model, (x, y)), request, progress=False)


def red(x):
    return np.where(x.colour == "red", 0.9, 0.1)


def two_of_three(x):
    """Two signs make a yes; the more there are, the surer it is."""
    votes = (x.colour == "red").astype(float) + (x.site == "north") + (x.shape == "cube")
    return 0.05 + 0.3 * votes


def weights(seed):
    g = np.random.default_rng(seed)
    by = {name: dict(zip(values, g.normal(size=len(values)), strict=True)) for name, values in VALUES.items()}

    def rule(x):
        return 1 / (1 + np.exp(-sum(x[name].map(by[name]).astype(float) for name in VALUES)))

    return rule


def fewest(rule, x):
    """The fewest swaps by trying all combinations."""
    answers = rule(x) > 0.5
    found = np.full(len(x), np.inf)
    for combination in itertools.product(*VALUES.values()):
        other = x.copy()
        for name, value in zip(VALUES, combination, strict=True):
            other[name] = value
        swaps = (other[list(VALUES)] != x[list(VALUES)]).sum(1).to_numpy()
        changed = (rule(other) > 0.5) != answers
        found = np.where(changed, np.minimum(found, swaps), found)
    return found


def test_one_category_that_decides_is_one_swap():
    x, report = attacked(red)
    finding = report["attack"]
    swaps = np.array(finding.series["swaps"])
    assert (swaps == 1).all()
    for metric in ("categories.changed", "categories.changed.one"):
        found = finding.metric(metric)
        assert found.value == 1.0
        assert found.low < 1.0 == found.high
    median = finding.metric("categories.radius.median")
    assert (median.value, median.low, median.high) == (1.0, 1.0, 1.0)
    # Of red rows 2 of the 5 legal swaps change the answer, of the others 1 of 5.
    share = np.where(x.colour == "red", 2 / 5, 1 / 5).mean()
    assert finding.metric("categories.changed.one").control == pytest.approx(share)
    assert abs(finding.metric("categories.changed").control - share) < 0.25
    assert finding.status == "weak"
    assert "Swapping one category" in finding.headline
    assert all(text.startswith("colour: ") for text in finding.series["swapped"])
    assert len(report.figure("attack").axes) == 2


def test_two_swaps_are_found_where_one_does_not_do():
    x, report = attacked(two_of_three)
    truth = fewest(two_of_three, x)
    assert set(truth) == {1.0, 2.0}
    np.testing.assert_array_equal(report["attack"].series["swaps"], truth)


@pytest.mark.parametrize("seed", range(3))
def test_one_swap_is_exact_and_more_are_no_fewer_than_the_fewest(seed):
    rule = weights(seed)
    x, report = attacked(rule)
    truth, swaps = fewest(rule, x), np.array(report["attack"].series["swaps"])
    np.testing.assert_array_equal(swaps == 1, truth == 1)
    assert (swaps >= truth).all()
    # Where weights add up, the best first finds the fewest.
    np.testing.assert_array_equal(swaps, truth)
    # What is said to have been swapped changes the answer.
    for row, (text, k) in enumerate(zip(report["attack"].series["swapped"], swaps, strict=True)):
        if np.isfinite(k):
            other = x.iloc[[row]].copy()
            parts = text.split("; ")
            assert len(parts) == k
            for part in parts:
                name, swap = part.split(": ")
                before, after = swap.split(" to ")
                assert other[name].iloc[0] == before
                other[name] = after
            assert (rule(other) > 0.5).item() != (rule(x.iloc[[row]]) > 0.5).item()


def test_a_model_that_ignores_categories_is_not_changed():
    _, report = attacked(lambda x: np.where(x.weight > 0, 0.8, 0.2))
    finding = report["attack"]
    assert np.isinf(finding.series["swaps"]).all()
    assert finding.metric("categories.changed").value == 0.0
    assert finding.metric("categories.changed").control == 0.0
    assert finding.table.rows[0][-1] == f"none of {MOST_SWAPS}"


def test_frozen_categories_are_not_swapped():
    x, report = attacked(two_of_three, frozen=("colour",))
    swapped = report["attack"].series["swapped"]
    assert any("site" in text for text in swapped)
    assert not any("colour" in text for text in swapped)
    # Without the colour a row of no other sign needs both of the rest, and one of all signs cannot lose two by one swap.
    assert (np.array(report["attack"].series["swaps"]) >= fewest(two_of_three, x)).all()


def test_a_missing_category_is_neither_swapped_nor_a_value_to_swap_for():
    x = frame()
    x["colour"] = x.colour.where(x.colour != "green", None)

    def rule(z):
        return np.where(z.colour.isna(), 0.9, 0.1)

    model = Ruled(rule).fit(x, None)
    y = np.where(x.colour.isna(), "yes", "no")
    finding = audit.run(model, (x, y), only=["attack"], progress=False)["attack"]
    assert np.isinf(finding.series["swaps"]).all()


def test_a_regression_counts_what_moves_the_number():
    x = frame()

    def rule(z):
        return 3.0 * (z.colour == "red") + 0.2 * (z.site == "north")

    y = rule(x) + np.linspace(0, 0.01, len(x))
    finding = audit.run(Numbered(rule).fit(x, None), (x, y), only=["attack"], progress=False)["attack"]
    assert 0.25 * y.std(ddof=1) > 0.2
    np.testing.assert_array_equal(finding.series["swaps"], np.ones(len(x)))
    assert all("colour" in text for text in finding.series["swapped"])
    assert "moves the answer as far" in finding.headline


def test_examples_tell_what_was_swapped(tmp_path):
    x = frame()
    model = Ruled(red).fit(x, None)
    y = np.where(x.colour == "red", "yes", "no")
    y[0] = "yes" if y[0] == "no" else "no"  # one wrong row, which is not attacked
    audit.run(model, (x, y), only=["attack"], out=tmp_path, progress=False)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "examples.csv").read_text())))
    assert lines[0]["attack swaps"] == lines[0]["attack swapped"] == ""
    for line, colour in list(zip(lines, x.colour, strict=True))[1:]:
        assert float(line["attack swaps"]) == 1
        assert line["attack swapped"].startswith(f"colour: {colour} to ")


def test_the_plan_counts_the_swaps():
    x = frame()
    y = np.where(red(x) > 0.5, "yes", "no")
    subject = audit.open_subject(Ruled(red).fit(x, None), (x, y))
    names = tuple(VALUES)
    free, held = (evaluations(subject, AuditRequest(frozen=f)) for f in ((), names))
    legal = sum(len(v) for v in VALUES.values())
    assert free - held == legal + 2 * 4 * min(legal, 16) + 1
    report = audit.run(Ruled(red).fit(x, None), (x, y), only=["attack"], progress=False)
    assert report["attack"].cost.nfev <= 40 * free + 40


def test_a_swap_that_gets_no_answer_hides_no_other_one():
    """Green is answered by no number, and red is answered otherwise."""

    def rule(x):
        return np.where(x.colour == "green", np.nan, red(x))

    x = frame()
    model = Ruled(rule).fit(x, None)
    x = x[x.colour != "green"].reset_index(drop=True)
    # One green row keeps the value legal, and stands at the end, where it is not asked about on opening.
    x.loc[len(x)] = {**x.loc[0], "colour": "green"}
    y = np.where(x.colour == "red", "yes", "no")
    report = audit.run(model, (x, y), only=["attack"], progress=False)
    swaps = [k for k in report["attack"].series["swaps"] if k is not None]
    assert len(swaps) >= len(x) - 1
    assert set(swaps) == {1.0}
