"""Gates: what a model must reach, judged on findings alone.

A gates file is TOML with one line a gate::

    "attack.radius.median" = ">= 0.008"
    "calibration.ece" = "<= 0.05"
    "corruption.accuracy.worst" = {min = 0.60, on = "estimate"}

The key is ``SECTION.METRIC``. A gate tests the end of the confidence interval that speaks against the model, the
lower end for ``>=`` and the upper for ``<=``, unless ``on = "estimate"``.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perturbkit.audit.finding import Finding
from perturbkit.audit.request import SECTIONS
from perturbkit.core import checks
from perturbkit.core.results import Result

__all__ = ["Gate", "GateResult", "Judgement", "judge", "read_gates"]

_RULE = re.compile(r"^\s*(>=|<=)\s*([-+0-9.eE]+)\s*$")


@dataclass(frozen=True)
class Gate(Result):
    """One requirement.

    Attributes
    ----------
    key : str
        "SECTION.METRIC".
    direction : {">=", "<="}
        Whether the number must be at least or at most the limit.
    limit : float
        The limit.
    on : {"bound", "estimate"}
        Whether the end of the confidence interval is tested, or the estimate.
    """

    key: str
    direction: str
    limit: float
    on: str = "bound"


@dataclass(frozen=True)
class GateResult(Result):
    """A gate with its verdict: "passed", "failed" or "inconclusive", the number tested and why."""

    gate: Gate
    verdict: str
    tested: float
    why: str


@dataclass(frozen=True)
class Judgement(Result):
    """All gates judged.

    Attributes
    ----------
    results : tuple of GateResult
        One a gate.
    """

    results: tuple[GateResult, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return all(r.verdict == "passed" for r in self.results)

    @property
    def exit_code(self) -> int:
        """0 if every gate passed, 1 if one failed, else 3 if one could not be measured."""
        verdicts = {r.verdict for r in self.results}
        return 1 if "failed" in verdicts else 3 if "inconclusive" in verdicts else 0


def read_gates(source: str | Path | Mapping[str, Any]) -> tuple[Gate, ...]:
    """Read gates from a TOML file or a mapping.

    Raises
    ------
    ArgumentError
        If the file is missing or not TOML, a key names no section, or a rule cannot be read.
    """
    if isinstance(source, Mapping):
        rules = dict(source)
    else:
        try:
            rules = tomllib.loads(Path(source).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise checks.ArgumentError(
                f"there is no {source}; allowed: a TOML file of gates. Check the path."
            ) from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise checks.ArgumentError(
                f"{source} is not a TOML file of gates ({error}); allowed: lines such as "
                '"calibration.ece" = "<= 0.05". Mend the line.'
            ) from error
    flat = _flatten(rules)
    if not flat:
        raise checks.ArgumentError(f"{source} holds no gate; allowed: at least one. Add a line.")
    return tuple(_gate(key, rule) for key, rule in flat.items())


def judge(findings: Sequence[Finding], gates: Sequence[Gate]) -> Judgement:
    """Judge findings by gates; a number that was not measured makes its gate inconclusive."""
    by_name = {f.section: f for f in findings}
    return Judgement(tuple(_judge(gate, by_name) for gate in gates))


def _judge(gate: Gate, findings: Mapping[str, Finding]) -> GateResult:
    section, _, name = gate.key.partition(".")
    finding = findings.get(section)
    metric = None if finding is None else finding.metric(name)
    if finding is None or metric is None:
        if finding is None:
            why = f"the section {section} was not run"
        elif finding.why:
            why = f"the section {section} did not run: {finding.why}"
        else:
            known = ", ".join(m.name for m in finding.metrics) or "no number"
            why = f"the section {section} has no {name}, it has {known}"
        return GateResult(gate, "inconclusive", math.nan, why)
    bound = metric.low if gate.direction == ">=" else metric.high
    tested = metric.value if gate.on == "estimate" or bound is None else bound
    if gate.on == "bound" and bound is None and metric.n < 2:
        return GateResult(
            gate, "inconclusive", math.nan, f"{name} was measured on {metric.n} row, without an interval"
        )
    if math.isnan(tested):
        return GateResult(gate, "inconclusive", math.nan, f"{name} could not be measured")
    passed = tested >= gate.limit if gate.direction == ">=" else tested <= gate.limit
    what = (
        "the estimate"
        if tested is metric.value
        else f"the {'lower' if gate.direction == '>=' else 'upper'} bound"
    )
    return GateResult(
        gate,
        "passed" if passed else "failed",
        float(tested),
        f"{what} is {tested:.4g}, {gate.direction} {gate.limit:g} is asked",
    )


def _flatten(rules: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Undo the nesting of unquoted dotted keys: attack.radius.median = ... is a table in TOML."""
    flat: dict[str, Any] = {}
    for key, value in rules.items():
        if isinstance(value, Mapping) and not {"min", "max"} & set(value):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _gate(key: str, rule: Any) -> Gate:
    section, _, name = key.partition(".")
    if section not in SECTIONS or not name:
        raise checks.ArgumentError(
            f"the gate {key!r} names no section; allowed: SECTION.METRIC with a section of {', '.join(SECTIONS)}. "
            'Write for instance "calibration.ece".'
        )
    if isinstance(rule, Mapping):
        unknown = set(rule) - {"min", "max", "on"}
        on = rule.get("on", "bound")
        given = [(d, rule[k]) for k, d in (("min", ">="), ("max", "<=")) if k in rule]
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for _, v in given)
        if not unknown and len(given) == 1 and numbers and on in ("bound", "estimate"):
            return Gate(key, given[0][0], float(given[0][1]), on)
    elif isinstance(rule, str) and (match := _RULE.match(rule)):
        try:
            return Gate(key, match[1], float(match[2]))
        except ValueError:
            pass
    raise checks.ArgumentError(
        f'the gate {key!r} is {rule!r}; allowed: ">= NUMBER", "<= NUMBER", {{min = NUMBER}} or {{max = NUMBER}}, with '
        'on = "bound" or "estimate". Write one of these.'
    )
