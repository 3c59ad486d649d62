"""How far can an input be pushed before the answer changes?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from perturbkit.audit import _figures
from perturbkit.audit._intervals import share_interval
from perturbkit.audit._text import edits_until_change
from perturbkit.audit.context import MOVED, Context, Question
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Subject
from perturbkit.core.perturbation import Sphere
from perturbkit.robust import fast_minimum_norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.25
NEEDS_MODEL = "an attack"
STEPS = {"quick": 16, "standard": 60, "full": 200}
_DIRECTIONS, _HALVINGS = 24, 8


def evaluations(subject: Subject, request: AuditRequest) -> int:
    """Rows evaluated for one row of data."""
    if subject.task == "text":
        return 60
    sides = 2 if subject.regression else 1
    return 3 * sides * STEPS[request.profile] + 1 if subject.has_gradient() else _DIRECTIONS * _HALVINGS


def run(context: Context) -> Finding:
    """Find the smallest change of the planned rows that changes the answer."""
    if context.subject.task == "text":
        return _text(context)
    subject, request = context.subject, context.request
    assert subject.x is not None
    rows = context.fair_rows(context.rows["attack"])
    if subject.regression:
        right = torch.ones(len(rows), dtype=torch.bool)
    else:
        right = subject.predictions()[rows] == subject.y[rows]
    if not bool(right.any()):
        why = "no row that was drawn is answered rightly: there is nothing to change. Add rows with --n."
        return Finding("attack", "not run", "No row is answered rightly.", why=why)
    asked = context.question(rows[right])
    generator = context.generator("attack")
    if subject.has_gradient():
        radius, adversarial = _by_gradient(asked, request)
        method = "fast minimum-norm attack"
        # Where the gradient leads nowhere, random directions may.
        missed = torch.isinf(radius)
        if bool(missed.any()):
            radius[missed], adversarial[missed] = _by_direction(
                asked, asked.z[missed], asked.y[missed], request.norm, generator
            )  # fmt: skip
    else:
        radius, adversarial = _by_direction(asked, asked.z, asked.y, request.norm, generator)
        method = "random directions"
    # A radius counts only if the answer at it, asked for once more, has changed.
    confirmed = asked.oracle(adversarial).argmax(1) != asked.y
    radius = torch.where(confirmed, radius, math.inf).double()
    control = _random_share(asked, radius, request.norm, context.generator("control"))
    everywhere = torch.zeros(len(rows), dtype=torch.float64)
    everywhere[right] = radius
    if subject.regression:
        return _number_finding(context, everywhere, method, control, rows)
    return _finding(context, everywhere, right, method, control, rows)


def draw(finding: Finding) -> Figure:
    """Share of rows still answered rightly against the size of the change."""
    series = finding.series
    figure = _figures.survival(series["radius"], series["unit"], series["eps"])
    figure.axes[0].set_ylabel(series.get("kept", "rows still right"))
    return figure


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
    low, high = _median_interval(values)
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
        (int(r), subject.classes[int(subject.y[r])], float(v), "" if ok else "wrong already")
        for r, v, ok in zip(rows, all_values, right.tolist(), strict=True)
    )[:20]
    series = {"radius": all_values.tolist(), "unit": unit(request, subject), "eps": eps}
    reach = (
        "No change that was tried changes the answer on half of the rows answered rightly."
        if math.isinf(median)
        else f"Half of the rows answered rightly change their answer within {median:.3g} ({unit(request, subject)})"
        + (f"; a random change of the same size changes {changed:.0%}." if n_changed else ".")
    )
    return Finding(
        "attack", "weak" if median <= eps else "ok", reach,
        metrics, Table(("row", "class", "radius", ""), table), series,
        "That nothing smaller works: an attack finds an upper bound of the true radius. "
        + ("Only random directions were tried; a real attacker does better."
           if method == "random directions" else "Other norms and natural changes are another matter.")
        + subject.left_out("the white-box attack (fast_minimum_norm)"),
        papers=() if method == "random directions" else ("fast_minimum_norm",),
    )  # fmt: skip


def _number_finding(
    context: Context, radius: Tensor, method: str, control: tuple[float, int], rows: Tensor
) -> Finding:
    """Report the smallest change of the input that moves the number by the stated amount."""
    request, subject = context.request, context.subject
    eps, moved = default_eps(request, subject), context.moved
    values = radius.numpy()
    median, (low, high) = float(np.median(values)), _median_interval(values)
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
        (int(r), float(subject.y[r]), float(a), float(v))
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
        {"radius": values.tolist(), "unit": unit(request, subject), "eps": eps, "kept": f"rows moved by less than {moved:.3g}"},
        "That nothing smaller works: an attack finds an upper bound of the true radius. The amount is a convention; what "
        "matters is the use's to say. "
        + ("Only random directions were tried; a real attacker does better."
           if method == "random directions" else "Other norms and natural changes are another matter.")
        + subject.left_out("the white-box attack (fast_minimum_norm)"),
        papers=() if method == "random directions" else ("fast_minimum_norm",),
    )  # fmt: skip


def _median_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the distribution-free 95 % interval of the median between order statistics.

    Below six rows no pair of order statistics covers it, so the interval is everything.
    """
    from scipy.stats import binom

    ordered, n = np.sort(values), len(values)
    k = int(binom.ppf(0.025, n, 0.5))
    if k < 1:
        return 0.0, math.inf
    return float(ordered[k - 1]), float(ordered[n - k])


def _random_share(
    asked: Question, radius: Tensor, norm: str, generator: torch.Generator
) -> tuple[float, int]:
    """Return how often a random change of the attack's own size changes the answer, and over how many rows."""
    found = torch.isfinite(radius)
    if not bool(found.any()):
        return math.nan, 0
    z = asked.z[found]
    direction = _directions(z, 1, norm, asked.free, generator)[0]
    moved = z + direction * radius[found].to(z.dtype).reshape(-1, *[1] * (z.ndim - 1))
    moved = moved if asked.bounds is None else moved.clamp(*asked.bounds)
    return float((asked.oracle(moved).argmax(1) != asked.y[found]).double().mean()), int(found.sum())


def _directions(z: Tensor, n: int, norm: str, free: Tensor, generator: torch.Generator) -> Tensor:
    """Draw directions of norm one over what may change, shape (n, rows, ...)."""
    if norm == "linf":
        return (torch.randint(0, 2, (n, *z.shape), generator=generator).to(z.dtype) * 2 - 1) * free
    drawn = Sphere(1.0).sample(z, generator=generator, n=n * len(z)).reshape(n, *z.shape)
    if bool((free == 1).all()):
        return drawn
    drawn = drawn * free
    size = drawn.flatten(2).norm(dim=2).clamp_min(torch.finfo(z.dtype).tiny)
    return drawn / size.reshape(*size.shape, *[1] * (z.ndim - 1))


def _by_direction(
    asked: Question, z: Tensor, y: Tensor, norm: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Bisect the radius along random directions: an attack that needs no gradient."""
    oracle, bounds = asked.oracle, asked.bounds
    directions = _directions(z, _DIRECTIONS, norm, asked.free, generator)
    many = z.expand_as(directions)
    movable = z[:, asked.free.bool()] if asked.free.shape == z.shape[1:] else z
    if movable.numel() == 0:
        return z.new_full((len(z),), math.inf), z.clone()
    largest = (
        float(movable.max() - movable.min()) * (1.0 if norm == "linf" else math.sqrt(movable[0].numel()))
        or 1.0
    )
    low, high = z.new_zeros(directions.shape[:2]), z.new_full(directions.shape[:2], largest)
    shape = (*directions.shape[:2], *[1] * (z.ndim - 1))

    def at(size: Tensor) -> Tensor:
        moved = many + directions * size.reshape(shape).to(z.dtype)
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
    edits, examples, control = edits_until_change(subject, rows, context.generator("attack"))
    values = np.array(edits, dtype=float)
    low, high = _median_interval(values)
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
        metrics, Table(("text", "edited", "words edited"), tuple(examples)),
        {"radius": [float(v) for v in values], "unit": "words edited", "eps": 0.0},
        "Synonyms, paraphrases and insertions: only swaps of letters inside words were tried, chosen greedily, so "
        "fewer edits may do.",
    )  # fmt: skip
