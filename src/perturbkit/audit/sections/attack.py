"""How far can an input be pushed before the answer changes?"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from perturbkit.audit import _figures
from perturbkit.audit._intervals import median_interval, share_interval
from perturbkit.audit._search import ScoreSearch, directions, nearest_of_another_answer
from perturbkit.audit._text import edits_until_change
from perturbkit.audit.context import MOVED, Context, Question
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Subject
from perturbkit.robust import fast_minimum_norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.25
NEEDS_MODEL = "an attack"
STEPS = {"quick": 16, "standard": 60, "full": 200}
# Questions for scores alone, beside those of the gradient: random directions, neighbours, and turns of the best.
TURNS = {
    "image": {"quick": 12, "standard": 60, "full": 300}, "tabular": {"quick": 40, "standard": 150, "full": 400},
}  # fmt: skip
_SCREENS, _NEIGHBOURS = 4, 3
_DIRECTIONS, _HALVINGS = 24, 8
# A gradient attack misleads on a row where a search without gradients finds a change this much smaller.
_MISLED = 0.5


def evaluations(subject: Subject, request: AuditRequest) -> int:
    """Rows evaluated for one row of data."""
    if subject.task == "text":
        return 60
    sides = 2 if subject.regression else 1
    scores_alone = _SCREENS + 2 * _NEIGHBOURS + 3 * TURNS[subject.task][request.profile] // 2 + 8
    if subject.has_gradient():
        return 3 * sides * STEPS[request.profile] + 1 + scores_alone
    return _DIRECTIONS * _HALVINGS + scores_alone


def run(context: Context) -> Finding:
    """Find the smallest change of the planned rows that changes the answer."""
    if context.subject.task == "text":
        return _text(context)
    subject, request = context.subject, context.request
    assert subject.x is not None
    rows = context.fair_rows(context.rows["attack"])
    done, found = context.chunks(
        "attack",
        rows,
        lambda part, generator: _radii(context, part, generator),
        evaluations(subject, request),
    )
    rows, radius, right = rows[done], found["radius"], found["right"]
    if not bool(right.any()):
        why = "no row that was drawn is answered rightly: there is nothing to change. Add rows with --n."
        return Finding("attack", "not run", "No row is answered rightly.", why=why)
    method = (
        "fast minimum-norm attack, then a search by scores"
        if subject.has_gradient()
        else "random directions, then a search by scores"
    )
    drawn = found["random"][found["random"] >= 0]
    control = (float(drawn.double().mean()) if len(drawn) else math.nan, len(drawn))
    if subject.regression:
        finding = _number_finding(context, radius, method, control, rows)
    else:
        finding = _finding(context, radius, right, method, control, rows)
    misled = _misled(context, radius[right], found["by gradient"][right])
    series = {**finding.series, "rows": rows.tolist(), "norm": request.norm, "references": ["rays"]}
    return _with_misled(replace(finding, series=series), subject, misled)


def draw(finding: Finding) -> Figure:
    """Share of rows still answered rightly against the size of the change."""
    series = finding.series
    figure = _figures.survival(series["radius"], series["unit"], series["eps"])
    figure.axes[0].set_ylabel(series.get("kept", "rows still right"))
    return figure


def _radii(context: Context, rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Attack some rows: their radii, zero where the answer is wrong already, and what a random change of that size does."""
    subject, request = context.subject, context.request
    right = torch.ones(len(rows), dtype=torch.bool)
    if not subject.regression:
        right = subject.predictions()[rows] == subject.y[rows]
    radii, random = torch.zeros(len(rows), dtype=torch.float64), torch.full((len(rows),), -1)
    if not bool(right.any()):
        return {"radius": radii, "right": right, "random": random, "by gradient": radii.clone()}
    asked = context.question(rows[right])
    by_gradient = torch.zeros_like(radii)
    if subject.has_gradient():
        radius, adversarial = _by_gradient(asked, request)
        by_gradient[right] = radius.double()
    else:
        radius, adversarial = _by_direction(asked, asked.z, asked.y, request.norm, generator)
    # A gradient that is flat or leads astray overstates the radius: every row is searched by scores as well.
    search = ScoreSearch(asked, radius, adversarial, request.norm)
    search.towards(nearest_of_another_answer(context, rows[right], asked, _NEIGHBOURS))
    for direction in directions(asked.z, _SCREENS, request.norm, asked.free, generator):
        search.along(direction)
    search.refine(TURNS[subject.task][request.profile], generator)
    search.shorten()
    radius, adversarial = search.radius, search.found
    # A radius counts only if the answer at it, asked for once more, has changed.
    confirmed = asked.oracle(adversarial).argmax(1) != asked.y
    radii[right] = torch.where(confirmed, radius, math.inf).double()
    random[right] = _random_change(asked, radii[right], request.norm, generator)
    return {"radius": radii, "right": right, "random": random, "by gradient": by_gradient}


def _misled(context: Context, radius: Tensor, by_gradient: Tensor) -> np.ndarray:
    """Return on which rows the gradient attack found nothing, or a change much larger than scores alone did."""
    if context.subject.gradient_vanishes():
        return torch.isfinite(radius).numpy()
    if not context.subject.has_gradient():
        return np.zeros(0, dtype=bool)
    return (radius < _MISLED * by_gradient).numpy()


def _with_misled(finding: Finding, subject: Subject, misled: np.ndarray) -> Finding:
    """Say where a gradient attack alone would have called the model more robust than it is."""
    if len(misled) == 0:
        return finding
    low, high = share_interval(misled)
    share = float(misled.mean())
    metric = Metric(
        "gradient.misled", share, low, high, len(misled), "rows that scores alone change much sooner"
    )
    finding = replace(finding, metrics=(*finding.metrics, metric))
    if share < 0.1 or low < 0.02:
        return finding
    how = (
        "The gradient vanishes"
        if subject.gradient_vanishes()
        else f"The gradient misleads on {share:.0%} of the rows"
    )
    said = (
        f" {how} (gradient masking): an attack that follows it would call the model robust, and a search by scores alone "
        "finds these changes nevertheless."
    )
    return replace(finding, status="weak", headline=finding.headline + said)


def _by_gradient(asked: Question, request: AuditRequest) -> tuple[Tensor, Tensor]:
    """Attack every side of the question and keep the nearest of what was found."""
    radius, adversarial = asked.z.new_full((len(asked.z),), math.inf), asked.z.clone()
    for oracle in asked.sides:
        found = fast_minimum_norm(
            oracle, asked.z, asked.y, norm=request.norm, n_steps=STEPS[request.profile], bounds=asked.bounds
        )
        nearer = found.radius < radius
        radius[nearer], adversarial[nearer] = found.radius[nearer], found.x[nearer]
    return radius, adversarial


def default_eps(request: AuditRequest, subject: Subject) -> float:
    """Return the size that the model is asked to bear."""
    if request.eps is not None:
        return request.eps
    if subject.task == "image":
        return 1 / 255 if request.norm == "linf" else 0.5
    return 0.05 if request.norm == "linf" else 0.1


def unit(request: AuditRequest, subject: Subject) -> str:
    """Return the unit of a radius, in words."""
    norm = {"linf": "largest change of one value", "l2": "Euclidean norm of the change"}[request.norm]
    return norm + (", in standard deviations" if subject.task == "tabular" else "")


def _finding(
    context: Context, radius: Tensor, right: Tensor, method: str, control: tuple[float, int], rows: Tensor
) -> Finding:
    """Report radii of the rows answered rightly, and accuracy over all rows drawn; a wrong row has radius zero."""
    request, subject = context.request, context.subject
    eps = default_eps(request, subject)
    values, all_values = radius[right].numpy(), radius.numpy()
    median = float(np.median(values))
    low, high = median_interval(values)
    bearing = all_values > eps
    share_low, share_high = share_interval(bearing)
    changed, n_changed = control
    metrics = (
        Metric("radius.median", median, low, high, len(values), method),
        Metric(
            "accuracy.at_eps",
            float(bearing.mean()),
            share_low,
            share_high,
            len(rows),
            f"{method}, eps {eps:.4g}",
        ),
        Metric("random.changed", changed, None, None, n_changed, "random change of the same size"),
    )
    table = tuple(
        (int(subject.numbers[r]), subject.classes[int(subject.y[r])], float(v), "" if ok else "wrong already")
        for r, v, ok in zip(rows, all_values, right.tolist(), strict=True)
    )[:20]
    series = {
        "rows": rows.tolist(),
        "radius": all_values.tolist(),
        "unit": unit(request, subject),
        "eps": eps,
    }
    reach = (
        "No change that was tried changes any answer: the model does not seem to depend on its input."
        if np.isinf(values).all()
        else "No change that was tried changes the answer on half of the rows answered rightly."
        if math.isinf(median)
        else f"Half of the rows answered rightly change their answer within {median:.3g} ({unit(request, subject)})"
        + (f"; a random change of the same size changes {changed:.0%}." if n_changed else ".")
    )
    return Finding(
        "attack", "weak" if median <= eps or np.isinf(values).all() else "ok", reach,
        metrics, Table(("row", "class", "radius", ""), table), series,
        "That nothing smaller works: an attack finds an upper bound of the true radius. "
        + ("Only scores were asked for; an attacker who knows the model's insides may do better."
           if not subject.has_gradient() else "Other norms and natural changes are another matter.")
        + subject.left_out("the white-box attack (fast_minimum_norm)"),
        papers=("fast_minimum_norm",) if subject.has_gradient() else (),
    )  # fmt: skip


def _number_finding(
    context: Context, radius: Tensor, method: str, control: tuple[float, int], rows: Tensor
) -> Finding:
    """Report the smallest change of the input that moves the number by the stated amount."""
    request, subject = context.request, context.subject
    eps, moved = default_eps(request, subject), context.moved
    values = radius.numpy()
    median, (low, high) = float(np.median(values)), median_interval(values)
    bearing = values > eps
    share_low, share_high = share_interval(bearing)
    changed, n_changed = control
    amount = f"{moved:.3g}, {MOVED:g} standard deviations of the target"
    metrics = (
        Metric("radius.median", median, low, high, len(values), f"{method}, the answer moved by {amount}"),
        Metric(
            "steady.at_eps", float(bearing.mean()), share_low, share_high, len(values),
            f"{method}, eps {eps:.4g}: share of rows not moved by {moved:.3g}",
        ),
        Metric("random.changed", changed, None, None, n_changed, "random change of the same size"),
    )  # fmt: skip
    answers = subject.predictions()[rows]
    table = tuple(
        (int(subject.numbers[r]), float(subject.y[r]), float(a), float(v))
        for r, a, v in zip(rows, answers, values, strict=True)
    )[:20]
    reach = (
        f"No change that was tried moves the answer by {amount}, on half of the rows."
        if math.isinf(median)
        else f"On half of the rows the answer moves by {amount}, within {median:.3g} ({unit(request, subject)})"
        + (
            f"; a random change of the same size moves {changed:.0%} of the rows so far."
            if n_changed
            else "."
        )
    )
    return Finding(
        "attack", "weak" if median <= eps else "ok", reach,
        metrics, Table(("row", "target", "answer", "radius"), table),
        {"rows": rows.tolist(), "radius": values.tolist(), "unit": unit(request, subject), "eps": eps, "kept": f"rows moved by less than {moved:.3g}"},
        "That nothing smaller works: an attack finds an upper bound of the true radius. The amount is a convention; what "
        "matters is the use's to say. "
        + ("Only scores were asked for; an attacker who knows the model's insides may do better."
           if not subject.has_gradient() else "Other norms and natural changes are another matter.")
        + subject.left_out("the white-box attack (fast_minimum_norm)"),
        papers=("fast_minimum_norm",) if subject.has_gradient() else (),
    )  # fmt: skip


def _random_change(asked: Question, radius: Tensor, norm: str, generator: torch.Generator) -> Tensor:
    """Return whether a random change of the attack's own size changes each answer, 0 or 1; -1 where it found none."""
    found = torch.isfinite(radius)
    changed = torch.full((len(radius),), -1)
    if bool(found.any()):
        z = asked.z[found]
        direction = directions(z, 1, norm, asked.free, generator)[0]
        moved = z + direction * radius[found].to(z.dtype).reshape(-1, *[1] * (z.ndim - 1))
        moved = moved if asked.bounds is None else moved.clamp(*asked.bounds)
        changed[found] = (asked.oracle(moved).argmax(1) != asked.y[found]).long()
    return changed


def _by_direction(
    asked: Question, z: Tensor, y: Tensor, norm: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Bisect the radius along random directions: an attack that needs no gradient."""
    oracle, bounds = asked.oracle, asked.bounds
    drawn = directions(z, _DIRECTIONS, norm, asked.free, generator)
    many = z.expand_as(drawn)
    movable = z[:, asked.free.bool()] if asked.free.shape == z.shape[1:] else z
    if movable.numel() == 0:
        return z.new_full((len(z),), math.inf), z.clone()
    largest = (
        float(movable.max() - movable.min()) * (1.0 if norm == "linf" else math.sqrt(movable[0].numel()))
        or 1.0
    )
    low, high = z.new_zeros(drawn.shape[:2]), z.new_full(drawn.shape[:2], largest)
    shape = (*drawn.shape[:2], *[1] * (z.ndim - 1))

    def at(size: Tensor) -> Tensor:
        moved = many + drawn * size.reshape(shape).to(z.dtype)
        return moved if bounds is None else moved.clamp(*bounds)

    def changed(size: Tensor) -> Tensor:
        return (oracle(at(size).flatten(0, 1)).argmax(1).reshape(size.shape)) != y

    ever = changed(high)
    for _ in range(_HALVINGS - 1):
        middle = (low + high) / 2
        hit = changed(middle)
        high, low = torch.where(hit, middle, high), torch.where(hit, low, middle)
        ever |= hit
    high = torch.where(ever, high, math.inf)
    best = high.argmin(0)
    columns = torch.arange(len(z))
    radius = high[best, columns]
    moved = at(torch.where(torch.isfinite(high), high, 0.0))[best, columns]
    return radius, moved


def _text(context: Context) -> Finding:
    subject = context.subject
    rows = context.correct_rows(context.rows["attack"])
    rows = rows[subject.predictions()[rows] == subject.y[rows]]
    if len(rows) == 0:
        return Finding(
            "attack",
            "not run",
            "No text is answered rightly.",
            why="no text is answered rightly: there is nothing to change.",
        )

    def attacked(part: Tensor, generator: torch.Generator) -> dict[str, Any]:
        edits, examples, control = edits_until_change(subject, part, generator)
        return {"edits": edits, "examples": examples, "control": control}

    done, found = context.chunks("attack", rows, attacked, evaluations(subject, context.request))
    rows, examples, control = rows[done], found["examples"][:12], float(np.mean(found["control"]))
    values = np.array(found["edits"], dtype=float)
    low, high = median_interval(values)
    broken = np.isfinite(values)
    share = float(broken.mean())
    share_low, share_high = share_interval(broken)
    median = float(np.median(values))
    metrics = (
        Metric(
            "radius.median",
            median,
            low,
            high,
            len(values),
            "greedy swaps of neighbouring letters, in words edited",
        ),
        Metric("changed", share, share_low, share_high, len(values), "at most 5 words edited", control),
    )
    return Finding(
        "attack", "weak" if share > 0.5 else "ok",
        f"Swapping two neighbouring letters in at most 5 words changes the answer on {share:.0%} of the texts answered rightly; in words "
        f"chosen at random, {control:.0%}.",
        metrics, Table(("text", "edited", "words edited"), tuple(map(tuple, examples))),
        {"rows": rows.tolist(), "radius": [float(v) for v in values], "unit": "words edited", "eps": 0.0},
        "Synonyms, paraphrases and insertions: only swaps of letters inside words were tried, chosen greedily, so "
        "fewer edits may do.",
    )  # fmt: skip
