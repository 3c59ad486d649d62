"""Gates: which end of the interval is tested, and every bad rule."""

import math

import pytest

from perturbkit.audit import Finding, Metric, judge, read_gates
from perturbkit.core import checks

FINDINGS = (
    Finding("attack", "ok", "x.", (Metric("radius.median", 0.02, 0.01, 0.03, 10),)),
    Finding(
        "calibration", "ok", "x.", (Metric("ece", 0.04, 0.02, 0.07, 10), Metric("nll", 0.5, None, None, 10))
    ),
    Finding("corruption", "ok", "x.", (Metric("accuracy.worst", math.nan, None, None, 0),)),
    Finding("certify", "not run", "x.", why="no model"),
)


def verdict(**gates):
    return judge(FINDINGS, read_gates(gates))


@pytest.mark.parametrize(
    ("key", "rule", "expected"),
    [
        ("attack.radius.median", ">= 0.01", "passed"),
        ("attack.radius.median", ">= 0.015", "failed"),  # the lower bound decides
        ("attack.radius.median", {"min": 0.015, "on": "estimate"}, "passed"),
        ("calibration.ece", "<= 0.05", "failed"),  # the upper bound decides
        ("calibration.ece", {"max": 0.05, "on": "estimate"}, "passed"),
        ("calibration.nll", "<= 0.5", "passed"),  # no interval: the estimate
        ("corruption.accuracy.worst", ">= 0.1", "inconclusive"),
        ("certify.radius.median", ">= 0.1", "inconclusive"),
        ("attack.radius.mean", ">= 0.1", "inconclusive"),
        ("explain.agreement", ">= 0.1", "inconclusive"),
    ],
)
def test_verdicts(key, rule, expected):
    judged = verdict(**{key: rule})
    assert judged.results[0].verdict == expected
    assert judged.results[0].why
    assert judged.passed == (expected == "passed")


def test_exit_codes_rank_failure_above_inconclusive():
    good, bad, unknown = ("attack.radius.median", ">= 0"), ("calibration.ece", "<= 0"), ("certify.x", ">= 0")
    assert verdict(**dict([good])).exit_code == 0
    assert verdict(**dict([good, unknown])).exit_code == 3
    assert verdict(**dict([good, unknown, bad])).exit_code == 1


def test_a_file_with_quoted_and_dotted_keys(tmp_path):
    path = tmp_path / "gates.toml"
    path.write_text('"attack.radius.median" = ">= 0.01"\ncalibration.ece = {max = 0.1}\n')
    assert [(g.key, g.direction, g.limit) for g in read_gates(path)] == [
        ("attack.radius.median", ">=", 0.01),
        ("calibration.ece", "<=", 0.1),
    ]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "holds no gate"),
        ("x = [", "not a TOML file"),
        ('"nonsense" = ">= 1"', "names no section"),
        ('"attacks.radius" = ">= 1"', "names no section"),
        ('"attack.radius" = "> 1"', "allowed"),
        ('"attack.radius" = ">= e"', "allowed"),
        ('"attack.radius" = 3', "allowed"),
        ('"attack.radius" = {min = 1, max = 2}', "allowed"),
        ('"attack.radius" = {min = 1, on = "mean"}', "allowed"),
        ('"attack.radius" = {min = "1"}', "allowed"),
        ('"attack.radius" = {min = 1, often = 2}', "allowed"),
    ],
)
def test_refused_files(tmp_path, text, match):
    path = tmp_path / "gates.toml"
    path.write_text(text)
    with pytest.raises(checks.ArgumentError, match=match):
        read_gates(path)


def test_missing_file(tmp_path):
    with pytest.raises(checks.ArgumentError, match="there is no"):
        read_gates(tmp_path / "none.toml")
