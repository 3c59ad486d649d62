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
from perturbkit.audit.context import Context
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Subject
from perturbkit.core import Oracle
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
    return 3 * STEPS[request.profile] + 1 if subject.has_gradient() else _DIRECTIONS * _HALVINGS


def run(context: Context) -> Finding:
    """Find the smallest change of the planned rows that changes the answer."""
    if context.subject.task == "text":
        return _text(context)
    subject, request = context.subject, context.request
    assert subject.x is not None
    rows = context.correct_rows(context.rows["attack"])
    rows = rows[subject.predictions()[rows] == subject.y[rows]]
    if len(rows) == 0:
        return Finding(
            "attack",
            "not run",
            "No row is answered rightly.",
            why="no row is answered rightly: there is nothing to change.",
        )
    oracle, scale = context.scaled_oracle(), context.scale
    z, y = subject.x[rows] / scale, subject.y[rows]
    if subject.has_gradient():
        result = fast_minimum_norm(
            oracle, z, y, norm=request.norm, n_steps=STEPS[request.profile], bounds=subject.bounds
        )  # fmt: skip
        radius, adversarial, method = result.radius, result.x, "fast minimum-norm attack"
    else:
        radius, adversarial = _by_direction(
            oracle, z, y, request.norm, subject.bounds, context.generator("attack")
        )
        method = "random directions"
    # A radius counts only if the answer at it, asked for once more on the model itself, has changed.
    confirmed = oracle(adversarial).argmax(1) != y
    radius = torch.where(confirmed, radius, math.inf).double()
    control = _random_share(oracle, z, y, radius, request.norm, subject.bounds, context.generator("control"))
    return _finding(context, radius, method, control, adversarial, z, rows)


def draw(finding: Finding) -> Figure:
    """Share of rows still answered rightly against the size of the change."""
    series = finding.series
    return _figures.survival(series["radius"], series["unit"], series["eps"])


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
    context: Context,
    radius: Tensor,
    method: str,
    control: float,
    adversarial: Tensor,
    z: Tensor,
    rows: Tensor,
) -> Finding:
    request, subject = context.request, context.subject
    eps = default_eps(request, subject)
    values = radius.numpy()
    median = float(np.median(values))
    low, high = _median_interval(context, values)
    bearing = (values > eps).astype(float)
    share_low, share_high = share_interval(bearing)
    metrics = (
        Metric("radius.median", median, low, high, len(values), method),
        Metric(
            "accuracy.at_eps",
            float(bearing.mean()),
            share_low,
            share_high,
            len(values),
            f"{method}, eps {eps:.4g}",
        ),
        Metric("random.changed", control, None, None, len(values), "random change of the same size"),
    )
    weak = median <= eps
    table = tuple(
        (int(r), subject.classes[int(subject.y[r])], float(v)) for r, v in zip(rows, values, strict=True)
    )[:20]
    series = {"radius": values.tolist(), "unit": unit(request, subject), "eps": eps}
    return Finding(
        "attack", "weak" if weak else "ok",
        f"Half of the rows change their answer within {_shown(median)} ({unit(request, subject)}); a random change of "
        f"the same size changes {control:.0%}.",
        metrics, Table(("row", "class", "radius"), table), series,
        "That nothing smaller works: an attack finds an upper bound of the true radius. "
        + ("Gradients do not reach the input, so only random directions were tried; a real attacker does better."
           if method == "random directions" else "Other norms and natural changes are another matter."),
    )  # fmt: skip


def _shown(value: float) -> str:
    return "no size that was tried" if math.isinf(value) else f"{value:.3g}"


def _median_interval(context: Context, values: np.ndarray) -> tuple[float | None, float | None]:
    """Return the distribution-free interval of the median between order statistics."""
    from scipy.stats import binom

    ordered, n = np.sort(values), len(values)
    k = int(binom.ppf(0.025, n, 0.5))
    if k < 1:
        return (float(ordered[0]), float(ordered[-1])) if n > 1 else (None, None)
    return float(ordered[k - 1]), float(ordered[n - k])


def _random_share(
    oracle: Oracle, z: Tensor, y: Tensor, radius: Tensor, norm: str,
    bounds: tuple[float, float] | None, generator: torch.Generator,
) -> float:  # fmt: skip
    """Return how often a random change of the attack's own size changes the answer."""
    found = torch.isfinite(radius)
    if not bool(found.any()):
        return 0.0
    direction = _directions(z[found], 1, norm, generator)[0]
    moved = z[found] + direction * radius[found].to(z.dtype).reshape(-1, *[1] * (z.ndim - 1))
    moved = moved if bounds is None else moved.clamp(*bounds)
    return float((oracle(moved).argmax(1) != y[found]).double().mean())


def _directions(z: Tensor, n: int, norm: str, generator: torch.Generator) -> Tensor:
    """Draw directions of norm one, shape (n, rows, ...)."""
    if norm == "linf":
        return torch.randint(0, 2, (n, *z.shape), generator=generator).to(z.dtype) * 2 - 1
    flat = Sphere(1.0).sample(z, generator=generator, n=n)
    return flat


def _by_direction(
    oracle: Oracle,
    z: Tensor,
    y: Tensor,
    norm: str,
    bounds: tuple[float, float] | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Bisect the radius along random directions: an attack that needs no gradient."""
    directions = _directions(z, _DIRECTIONS, norm, generator)
    many = z.expand_as(directions)
    largest = float(z.max() - z.min()) * (1.0 if norm == "linf" else math.sqrt(z[0].numel())) or 1.0
    low, high = torch.zeros(directions.shape[:2]), torch.full(directions.shape[:2], largest)
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
    low, high = _median_interval(context, values)
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
        f"Swapping two neighbouring letters in at most 5 words changes the answer on {share:.0%} of the texts; in words "
        f"chosen at random, {control:.0%}.",
        metrics, Table(("text", "edited", "words edited"), tuple(examples)),
        {"radius": [float(v) for v in values], "unit": "words edited", "eps": 0.0},
        "Synonyms, paraphrases and insertions: only swaps of letters inside words were tried, chosen greedily, so "
        "fewer edits may do.",
    )  # fmt: skip
