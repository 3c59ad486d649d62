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
from perturbkit.audit.context import MOVED, Context, Question, frozen_columns, held_everywhere
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Subject
from perturbkit.core.watch import DeadlineError
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
# Categories are swapped one by one for other values seen; beyond one, the best of so many beginnings go on.
MOST_SWAPS = 3
_BEGINNINGS = {"quick": 4, "standard": 8, "full": 16}
_ENDINGS = {"quick": 16, "standard": 32, "full": 64}
# A gradient attack misleads on a row where a search without gradients finds a change this much smaller.
_MISLED = 0.5


def refusal(subject: Subject, request: AuditRequest) -> str:
    """Why the section cannot run, empty if it can."""
    held = held_everywhere(subject, request)
    return "" if held and _swap_evaluations(subject, request) else held


def evaluations(subject: Subject, request: AuditRequest) -> int:
    """Rows evaluated for one row of data."""
    if subject.task == "text":
        return 60
    sides = 2 if subject.regression else 1
    scores_alone = _SCREENS + 2 * _NEIGHBOURS + 3 * TURNS[subject.task][request.profile] // 2 + 8
    if subject.has_gradient():
        return 3 * sides * STEPS[request.profile] + 1 + scores_alone
    return _DIRECTIONS * _HALVINGS + scores_alone + _swap_evaluations(subject, request)


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
    if held_everywhere(subject, request):
        told = "No number may change: every column is frozen or of categories."
        finding = replace(finding, status="ok", headline=told)
    misled = _misled(context, radius[right], found["by gradient"][right])
    series = {**finding.series, "rows": rows.tolist(), "norm": request.norm, "references": ["rays"]}
    finding = _with_misled(replace(finding, series=series), subject, misled)
    return _with_swaps(context, finding, rows, right)


def draw(finding: Finding) -> Figure:
    """Share of rows still answered rightly against the size of the change."""
    series = finding.series
    figure = _figures.survival(series["radius"], series["unit"], series["eps"])
    figure.axes[0].set_ylabel(series.get("kept", "rows still right"))
    if "swaps" in series:
        _draw_swaps(figure, series)
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
    if subject.has_gradient() and bool(asked.free.any()):
        radius, adversarial = _by_gradient(asked, request)
        by_gradient[right] = radius.double()
    else:
        radius, adversarial = _by_direction(asked, asked.z, asked.y, request.norm, generator)
    # A gradient that is flat or leads astray overstates the radius: every row is searched by scores as well.
    search = ScoreSearch(asked, radius, adversarial, request.norm)
    if context.has_missing:
        search.widest = _widest(asked, request.norm)
    search.towards(nearest_of_another_answer(context.filled, rows[right], asked, _NEIGHBOURS))
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
        direction = directions(z, 1, norm, asked.free_of(found), generator)[0]
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
    if not bool(asked.free.any()):
        return z.new_full((len(z),), math.inf), z.clone()
    largest = _widest(asked, norm)
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


def _widest(asked: Question, norm: str) -> float:
    """Return the size of the widest change that makes sense: across all values that may change, in every column."""
    n = int(asked.free.expand_as(asked.z).bool().any(0).sum())
    return (asked.span or 1.0) * (1.0 if norm == "linf" else math.sqrt(max(n, 1)))


# -- categories -------------------------------------------------------------------------------------------------


def _swappable(subject: Subject, frozen: Tensor) -> list[tuple[int, int]]:
    """Return the swaps that are legal: a column of categories that is not frozen, and a value seen in it."""
    found = []
    for column, values in subject.legal.items():
        there = len(values) - int(len(values) > 0 and bool(values.isna().iloc[-1]))
        if there > 1 and not (len(frozen) and bool(frozen[column])):
            found += [(column, value) for value in range(there)]
    return found


def _swap_evaluations(subject: Subject, request: AuditRequest) -> int:
    """Return how many rows are evaluated to find the fewest swaps of one row."""
    n = len(_swappable(subject, frozen_columns(subject, request))) if subject.legal else 0
    more = (MOST_SWAPS - 1) * _BEGINNINGS[request.profile] * min(n, _ENDINGS[request.profile])
    return n + more + 1 if n else 0


def _with_swaps(context: Context, finding: Finding, rows: Tensor, right: Tensor) -> Finding:
    """Add how many categories must be swapped for other values seen before the answer changes."""
    subject, request = context.subject, context.request
    if not subject.legal or not _swappable(subject, context.frozen):
        return finding
    asked = rows[right]
    try:
        done, found = context.chunks(
            "attack categories", asked, lambda part, generator: _swapped(context, part, generator),
            _swap_evaluations(subject, request),
        )  # fmt: skip
    except DeadlineError:
        limits = " How many categories must be swapped was not measured: the time budget was spent."
        return replace(finding, does_not_show=finding.does_not_show + limits)
    swaps, n = found["swaps"].numpy(), len(done)
    one, some = swaps == 1, np.isfinite(swaps)
    (one_low, one_high), (low, high) = share_interval(one), share_interval(some)
    a, b = median_interval(swaps)
    random, alone = float(found["random"].double().mean()), float(found["alone"].mean())
    how = f"cells of categories swapped for other values seen, best first, at most {MOST_SWAPS}"
    metrics = (
        Metric("categories.radius.median", float(np.median(swaps)), a, b, n, how),
        Metric("categories.changed", float(some.mean()), low, high, n, how, random),
        Metric(
            "categories.changed.one", float(one.mean()), one_low, one_high, n, "one cell swapped, all values tried", alone
        ),
    )  # fmt: skip
    verb = "moves the answer as far" if subject.regression else "changes the answer"
    told = (
        f" Swapping one category for another value seen in the data {verb} on {one.mean():.0%} of the rows (a random swap: "
        f"{alone:.0%}), and at most {MOST_SWAPS} on {some.mean():.0%} (as many at random: {random:.0%})."
    )
    numbers, texts = [math.nan] * len(rows), [""] * len(rows)
    for place, row in enumerate(right.nonzero()[:, 0][done].tolist()):
        numbers[row], texts[row] = float(swaps[place]), found["swapped"][place]
    assert finding.table is not None
    shown = tuple(
        (*line, text if text or math.isnan(k) else f"none of {MOST_SWAPS}")
        for line, text, k in zip(finding.table.rows, texts, numbers, strict=False)
    )
    kept = [None if math.isnan(k) else k for k in numbers]
    series = {
        **finding.series, "swaps": kept, "swapped": texts, "random changed": found["random"].tolist(),
    }  # fmt: skip
    return replace(
        finding, status="weak" if one.mean() > 0.5 else finding.status, headline=finding.headline + told,
        metrics=(*finding.metrics, *metrics), table=Table((*finding.table.columns, "categories swapped"), shown),
        series=series,
        does_not_show=finding.does_not_show + " Of categories, more than one swap was searched for and not tried out, so fewer may "
        "do; whether a combination of values occurs was not asked; numbers were held meanwhile.",
    )  # fmt: skip


def _swapped(context: Context, rows: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Find the fewest swaps of each row: one by trying all, more by going on from the best.

    Returns, by name: the number of swaps, infinity where ``MOST_SWAPS`` did not do; what was swapped, in words; whether
    as many random swaps change the answer, 0 or 1; and the share of all single swaps that change it.
    """
    subject, profile = context.subject, context.request.profile
    assert subject.x is not None
    x = subject.x[rows]
    legal = _swappable(subject, context.frozen)
    column, value = torch.tensor(legal).T
    there = {c: v for c, v in legal}  # noqa: C416  # the last value of a column that is there
    last = torch.tensor([there[c] for c in column.tolist()])
    # What is missing is no value to swap, and a value for itself no swap.
    allowed = (x[:, column] != value) & (x[:, column] <= last)
    best, words = torch.full((len(rows),), math.inf, dtype=torch.float64), [""] * len(rows)
    state, margins = x[:, None], torch.full(allowed.shape, math.inf, dtype=torch.float64)
    used = torch.zeros(len(rows), 1, x.shape[1], dtype=torch.bool)
    choice = torch.arange(len(legal)).expand(len(rows), -1)
    alone = torch.zeros(len(rows), dtype=torch.float64)
    for n in range(1, MOST_SWAPS + 1):
        open_ = torch.isinf(best).nonzero()[:, 0]
        swap = choice[open_]
        # Every state of an open row with every swap of a column that it has not swapped yet: (rows, states, swaps).
        fits = allowed[open_].gather(1, swap)[:, None] & ~used[open_].gather(
            2, column[swap][:, None].expand(-1, state.shape[1], -1)
        )
        tried = state[open_][:, :, None].expand(-1, -1, swap.shape[1], -1).clone()
        tried.scatter_(
            3, column[swap][:, None, :, None].expand(*fits.shape, 1),
            value[swap][:, None, :, None].expand(*fits.shape, 1).to(tried),
        )  # fmt: skip
        found = torch.full(fits.shape, math.inf, dtype=torch.float64)
        if bool(fits.any()):
            which = rows[open_][:, None, None].expand(fits.shape)[fits]
            found[fits] = _lead(context, tried[fits], which)
        lead, place = found.flatten(1).min(1)
        if n == 1:
            margins, alone = found[:, 0], ((found < 0) & fits).sum((1, 2)) / fits.sum((1, 2)).clamp_min(1)
        for i, k in zip((lead < 0).nonzero()[:, 0].tolist(), place[lead < 0].tolist(), strict=True):
            row, (s, t) = int(open_[i]), divmod(k, swap.shape[1])
            best[row], words[row] = n, _in_words(subject, x[row], tried[i, s, t])
        if n == MOST_SWAPS or not bool(torch.isinf(best).any()):
            break
        # The states that lead least go on, with the swaps that led least alone.
        order = found.flatten(1).argsort(1)[:, : _BEGINNINGS[profile]]
        s, t = order // swap.shape[1], order % swap.shape[1]
        lines = torch.arange(len(open_))[:, None]
        next_state = x[:, None].expand(-1, order.shape[1], -1).clone()
        next_used = torch.ones(len(rows), order.shape[1], x.shape[1], dtype=torch.bool)
        next_state[open_] = tried[lines, s, t]
        gone = used[open_][lines, s].scatter(2, column[swap.gather(1, t)][..., None], True)
        next_used[open_] = gone | torch.isinf(found.flatten(1).gather(1, order))[..., None]
        state, used = next_state, next_used
        choice = margins.argsort(1)[:, : _ENDINGS[profile]] if n == 1 else choice
    wanted = torch.where(torch.isfinite(best), best, MOST_SWAPS).long()
    random = _lead(context, _random_swaps(x, column, value, allowed, wanted, generator), rows) < 0
    return {"swaps": best, "swapped": words, "random": random.long(), "alone": alone}


def _lead(context: Context, x: Tensor, rows: Tensor) -> Tensor:
    """Return by how much each answer is still that of its row, in scores; below zero where it has changed."""
    subject = context.subject
    assert subject.oracle is not None
    scores = subject.oracle(x).double()
    if subject.point is not None:
        lead = context.moved - (scores @ subject.point - subject.predictions()[rows]).abs()
        lead = torch.where(torch.isnan(lead), -1e-300, lead)
        return torch.where(lead < 0, lead, lead.clamp_min(1e-300))
    label = subject.y[rows][:, None]
    others = scores.scatter(1, label, -math.inf).amax(1)
    lead = scores.gather(1, label)[:, 0] - others
    # Of equal scores the first is the answer, and a score that is no number is none.
    broken = torch.isnan(scores).any(1)
    changed = broken | (scores.argmax(1) != label[:, 0])
    tiny = torch.finfo(torch.float64).tiny
    lead = torch.where(broken, -tiny, lead)
    return torch.where(changed, lead.clamp_max(-tiny), lead.clamp_min(tiny))


def _random_swaps(
    x: Tensor, column: Tensor, value: Tensor, allowed: Tensor, wanted: Tensor, generator: torch.Generator
) -> Tensor:
    """Swap as many columns as wanted, drawn at random with their new values, in each row."""
    order = torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, 2.0).argsort(1)
    changed, count = x.clone(), torch.zeros_like(wanted)
    taken = torch.zeros(x.shape, dtype=torch.bool)
    lines = torch.arange(len(x))
    for k in range(order.shape[1]):
        swap = order[:, k]
        where = column[swap]
        take = allowed[lines, swap] & ~taken[lines, where] & (count < wanted)
        changed[lines[take], where[take]] = value[swap[take]].to(x)
        taken[lines[take], where[take]] = True
        count += take
    return changed


def _in_words(subject: Subject, before: Tensor, after: Tensor) -> str:
    """Say which categories were swapped for which."""
    said = []
    for column, values in subject.legal.items():
        a, b = int(before[column]), int(after[column])
        if a != b:
            said.append(f"{subject.feature_names[column]}: {values.iloc[a]} to {values.iloc[b]}")
    return "; ".join(said)


def _draw_swaps(figure: Figure, series: dict[str, Any]) -> None:
    """Add the share of rows still right against the categories swapped."""
    grid = figure.add_gridspec(1, 2, width_ratios=(3, 2))
    figure.set_size_inches(7.2, figure.get_size_inches()[1])
    figure.axes[0].set_subplotspec(grid[0])
    ax = figure.add_subplot(grid[1])
    swaps = np.array([k for k in series["swaps"] if k is not None], dtype=float)
    steps = np.arange(MOST_SWAPS + 1)
    ax.plot(
        steps,
        [(swaps > k).mean() for k in steps],
        color=_figures.ACCENT,
        marker="o",
        ms=4,
        label="best first",
    )
    kept = 1 - float(np.mean(series["random changed"]))
    ax.axhline(kept, color=_figures.MUTED, ls="--", lw=1, label="as many at random")
    ax.set_xticks(steps)
    ax.set_ylim(0, 1.05)
    ax.set_xlabel("categories swapped")
    ax.legend(frameon=False, fontsize=7)
    _figures._tidy(ax)


# -- texts ------------------------------------------------------------------------------------------------------


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
