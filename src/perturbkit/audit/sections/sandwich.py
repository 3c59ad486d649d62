"""Between what is proved and what was found: certified and attack radius of the same rows, function and norm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from perturbkit.audit import _figures
from perturbkit.audit._intervals import bootstrap, share_interval
from perturbkit.audit._search import nearest_of_another_answer
from perturbkit.audit.context import Context, held_everywhere
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.plan import operations
from perturbkit.audit.request import PROFILES, AuditRequest
from perturbkit.audit.subject import Derived, Subject
from perturbkit.core.random import randn
from perturbkit.robust import fast_minimum_norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.1
NEEDS_MODEL = "a comparison of proof and attack"
AFTER = ("attack", "certify")
_FEWEST, _MOST = 4, 48
# Of the attack on a smoothed model: draws of a mean, steps, and votes that confirm a change.
_WORK = {"quick": (4, 8, 40), "standard": (8, 16, 100), "full": (16, 30, 400)}
# The attack on a smoothed model is lengthened until the vote has changed beyond doubt.
_LONGER, _WAY = (1.0, 1.4, 2.0), (0.2, 0.4, 0.6, 0.8, 1.0)
_DOUBT = 0.01
_TOLERANCE = 1e-4


def evaluations(subject: Subject, request: AuditRequest) -> int:
    """Rows evaluated for one row of data: those of an attack on the smoothed model, where that will be certified."""
    if subject.task == "tabular" and subject.has_gradient():
        return 0
    draws, steps, votes = _WORK[request.profile]
    return 0 if subject.task == "text" else 3 * draws * steps + 2 * votes


def refusal(subject: Subject, request: AuditRequest) -> str:
    """Why the section cannot run, empty if it can."""
    missing = [s for s in AFTER if s not in request.sections]
    if missing:
        return f"it compares the sections attack and certify, and {' and '.join(missing)} was left out. Run both."
    if subject.task == "text":
        return (
            "the proof is of the ablated model and counts replaced words, the attack is on the model itself and counts "
            "words with swapped letters: two functions and two sizes, which are not comparable."
        )
    if held := held_everywhere(subject, request):
        return held
    fewest = _FEWEST * evaluations(subject, request) * operations(subject)
    if fewest > 2 * SHARE * PROFILES[request.profile].flops:
        return (
            f"attacking the smoothed model on {_FEWEST} rows takes more than the {request.profile} profile allows. Take --profile "
            f"{'standard' if request.profile == 'quick' else 'full'}."
        )
    return ""


def run(context: Context) -> Finding:
    """Compare radii row by row where attack and proof are of one function and norm; attack the smoothed model where not."""
    attack, certify = (context.findings.get(s) for s in AFTER)
    for finding in (attack, certify):
        if finding is None or finding.why:
            name = "attack or certify" if finding is None else finding.section
            why = f"the section {name} has no radii to compare. See there."
            return Finding("sandwich", "not run", "There is nothing to compare.", why=why)
    assert attack is not None
    assert certify is not None
    proved = dict(zip(certify.series["rows"], certify.series["radius"], strict=True))
    if certify.series["of"] == "model" and certify.series["norm"] == attack.series["norm"]:
        found = dict(zip(attack.series["rows"], attack.series["radius"], strict=True))
        rows = [r for r in proved if r in found]
        radii = [found[r] for r in rows]
        note = ""
        references: tuple[str, ...] = ()
    elif context.subject.regression:
        why = (
            f"the proof is of {certify.series['function']}, the attack on the model itself: two functions, whose radii are "
            "not comparable."
        )
        return Finding("sandwich", "not run", "There is nothing to compare.", why=why)
    else:
        rows = [r for r in proved if proved[r] > 0][: min(context.rows.get("sandwich", _MOST), _MOST)]
        if not rows:
            why = f"of {certify.series['function']} no row is proved, so there is no row to attack."
            return Finding("sandwich", "not run", "There is nothing to compare.", why=why)
        radii = _attack_smoothed(context, torch.tensor(rows), float(certify.series["sigma"])).tolist()
        note = (
            f" Here the smoothed model was attacked, in the Euclidean norm, as what is proved is of {certify.series['function']}: "
            "these radii are not those of the section on attacks, which are the model's own."
        )
        references = ("smoothing_attack",)
    if not rows:
        return Finding(
            "sandwich", "not run", "There is nothing to compare.", why="the sections share no row."
        )
    return _finding(context, rows, np.array([proved[r] for r in rows]), np.array(radii), note, references)


def draw(finding: Finding) -> Figure:
    """Certified and attack radius, row by row, with the gap between shaded."""
    s = finding.series
    return _figures.sandwich(s["certified"], s["attacked"], s["unit"])


def _finding(
    context: Context, rows: list[int], proved: np.ndarray, found: np.ndarray, note: str, references: tuple[str, ...]
) -> Finding:  # fmt: skip
    certify = context.findings["certify"]
    function, in_unit = certify.series["function"], certify.series["unit"]
    above = proved > found * (1 + _TOLERANCE) + 1e-9
    low, high = share_interval(above)
    # A row without a finite attack radius has no upper end, and counts as a gap without end in the median.
    gap, closed = found - proved, np.isfinite(found)
    answered = closed & (found > 0)
    tight = proved[answered] / found[answered]
    metrics = [
        Metric("alarm.share", float(above.mean()), low, high, len(rows), "rows where a certificate exceeds an attack"),
        Metric("gap.median", float(np.median(gap)), *_ends(context, gap[closed], closed), len(rows), "attack radius less certified radius"),
    ]  # fmt: skip
    if len(tight):
        a, b = bootstrap(tight, context.generator("tightness"), np.median)
        metrics.append(
            Metric("tightness.median", float(np.median(tight)), a, b, len(tight), "certified over attack radius")
        )  # fmt: skip
    numbers = context.subject.numbers
    order = np.lexsort((found, ~above))
    table = tuple(
        (int(numbers[rows[i]]), float(proved[i]), float(found[i]), "ALARM: proof above attack" if above[i] else "")
        for i in order[:20]
    )  # fmt: skip
    if above.any():
        told = (
            f"ALARM: on {int(above.sum())} of {len(rows)} rows a certificate exceeds an attack. One of the two is wrong; trust "
            "neither until it is known which."
        )
    else:
        told = (
            f"Of {function}, the median true radius of {len(rows)} rows is {np.median(proved):.3g} or more (proved)"
            + (
                ", without an end above: attacks succeeded on at most half of them"
                if math.isinf(np.median(found))
                else f" and {np.median(found):.3g} or less (attacked)"
            )
            + "; no certificate exceeds an attack."
        )
    return Finding(
        "sandwich", "weak" if above.any() else "ok", told, tuple(metrics),
        Table(("row", "certified radius", "attack radius", ""), table),
        {"certified": proved.tolist(), "attacked": found.tolist(), "unit": in_unit, "references": list(references),
         "numbers": [int(numbers[r]) for r in rows]},
        "Where in the gap the true radius is: a tighter proof or a stronger attack would narrow it." + note,
        papers=certify.papers + (() if references else context.findings["attack"].papers),
    )  # fmt: skip


def _ends(context: Context, gap: np.ndarray, closed: np.ndarray) -> tuple[float | None, float | None]:
    """Return the interval of the median gap; nothing where some gaps have no end."""
    return bootstrap(gap, context.generator("gap"), np.median) if closed.all() else (None, None)


def _attack_smoothed(context: Context, rows: Tensor, sigma: float) -> Tensor:
    """Return the Euclidean size of a change that changes the smoothed model's vote beyond doubt; infinity where none was found."""
    subject, generator = context.subject, context.generator("sandwich")
    asked = context.question(rows)
    z, y = asked.z, asked.y
    radius = torch.full((len(z),), math.inf, dtype=torch.float64)
    # Where the gradient leads nowhere, the way to a neighbour of another answer does.
    nearest = nearest_of_another_answer(context.filled, rows, asked, 1)[0]
    ways: list[tuple[Tensor, tuple[float, ...]]] = [((nearest - z) * asked.free, _WAY)]
    if subject.has_gradient():
        ways.insert(0, (_by_mean_probability(context, z, y, sigma, generator), _LONGER))
    n_votes = _WORK[context.request.profile][2]
    for step, sizes in ways:
        length = step.flatten(1).norm(dim=1).double()
        for size in sizes:
            for i in ((length > 0) & torch.isinf(radius)).nonzero()[:, 0].tolist():
                noise = randn((n_votes, *z.shape[1:]), generator=generator, dtype=z.dtype)
                votes = asked.oracle(z[i] + size * step[i] + sigma * noise).argmax(1).bincount()
                if _outvoted(votes, int(y[i])):
                    radius[i] = size * length[i]
    return radius


def _by_mean_probability(
    context: Context, z: Tensor, y: Tensor, sigma: float, generator: torch.Generator
) -> Tensor:
    """Attack the mean probability under fixed noise, a smooth stand-in for the vote (Salman et al., 2019, arXiv:1906.04584)."""
    oracle, scale = context.subject.oracle, context.scale
    assert oracle is not None
    draws, steps, _ = _WORK[context.request.profile]
    noise = sigma * randn((draws, *z.shape[1:]), generator=generator, dtype=z.dtype)
    probabilities = context.subject.answers_probabilities()

    def noisy(v: Tensor) -> Tensor:
        return (v[:, None] + noise.to(v)).flatten(0, 1) * scale.to(v)

    def mean_probability(out: Tensor, v: Tensor) -> Tensor:
        p = out if probabilities else out.softmax(1)
        return p.reshape(len(v), draws, -1).mean(1).clamp_min(1e-38).log()

    smooth = Derived(oracle, before=noisy, after=mean_probability)
    found = fast_minimum_norm(smooth, z, y, norm="l2", n_steps=steps, bounds=None)
    # The oracle counted each mean as one evaluation.
    oracle.nfev += (draws - 1) * smooth.nfev
    oracle.ngrad += (draws - 1) * smooth.ngrad
    return found.x - z


def _outvoted(votes: Tensor, label: int) -> bool:
    """Whether another class has more votes than the label, beyond doubt: the test of Cohen et al. (2019), section 3.2.2."""
    mine = int(votes[label]) if label < len(votes) else 0
    best = int(votes.max())
    return best > mine and float(binomtest(best, best + mine, 0.5).pvalue) <= _DOUBT
