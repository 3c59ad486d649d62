"""What is proved: a radius within which no change of the input changes the answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from perturbkit.audit import _figures
from perturbkit.audit._intervals import bootstrap, share_interval
from perturbkit.audit._text import ablation_certificate
from perturbkit.audit.context import MOVED, Context, held_everywhere
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.sections.attack import default_eps, unit
from perturbkit.audit.subject import Subject
from perturbkit.core import around, checks
from perturbkit.core.watch import timed
from perturbkit.robust import BoundedModule, randomized_smoothing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.2
NEEDS_MODEL = "a proof"
DRAWS = {"quick": 64, "standard": 1000, "full": 10000}
SIGMA = {"image": 0.1, "tabular": 0.25}
_FAILURE = 0.01
_HALVINGS, _DOUBLINGS = 12, 8
# Outputs times inputs beyond which a bound for each output takes longer than an audit should.
_LARGEST = 100_000


def refusal(subject: Subject, request: AuditRequest) -> str:
    """Why the section cannot run, empty if it can."""
    return held_everywhere(subject, request)


def evaluations(subject: Subject, request: AuditRequest) -> int:
    """Rows evaluated for one row of data."""
    return DRAWS[request.profile]


def run(context: Context) -> Finding:
    """Bound the network by linear relaxation where it can be, and smooth it where it cannot."""
    if context.subject.task == "text":
        return _text(context)
    subject = context.subject
    rows = context.fair_rows(context.rows["certify"])
    if not subject.regression and not bool((subject.predictions()[rows] == subject.y[rows]).any()):
        why = "no row that was drawn is answered rightly: there is nothing to certify. Add rows with --n."
        return Finding("certify", "not run", "No row is answered rightly.", why=why)
    each = evaluations(subject, context.request)
    try:
        done, found = context.chunks(
            "certify", rows, lambda part, _: {"radius": _by_relaxation(context, part)}, each
        )
    except checks.PerturbkitError as error:
        return _smoothed(context, rows, str(error))
    rows, radius = rows[done], found["radius"]
    if subject.regression:
        return _number_finding(
            context, rows, radius, context.request.norm, "the model", "linear relaxation", "lirpa",
            "Movement beyond the bound: relaxations are loose on deep networks, so a radius of zero proves nothing either "
            "way.", reach=_reach_at_eps(context, rows),
        )  # fmt: skip
    return _finding(
        context, rows, radius, context.request.norm, "the model", "linear relaxation", "lirpa",
        "Radii beyond the bound: relaxations are loose on deep networks, so a radius of zero proves nothing either way.",
    )  # fmt: skip


def obstacle(subject: Subject, request: AuditRequest) -> str:
    """Return why the model itself cannot be bounded by linear relaxation; empty where nothing is known against it."""
    assert subject.x is not None
    try:
        module, context = _module(subject), Context(request, subject)
        if len(subject.classes) * subject.x[0].numel() > _LARGEST:
            raise checks.ModelError(_too_many(subject))
        BoundedModule(_InUnits(module, context.scale), subject.x[:1] / context.scale)
    except checks.PerturbkitError as error:
        return str(error)
    return ""


def _too_many(subject: Subject) -> str:
    assert subject.x is not None
    return f"the model has {len(subject.classes)} outputs on inputs of {subject.x[0].numel()} numbers, too many to bound here."


def draw(finding: Finding) -> Figure:
    """Share of rows proved against the radius."""
    series = finding.series
    return _figures.survival(series["radius"], series["unit"], series["eps"], proved=True)


def _by_relaxation(context: Context, rows: Tensor) -> Tensor:
    """Return the largest proved radius of each row, by bisection, in the norm asked for."""
    subject, norm = context.subject, context.request.norm
    assert subject.oracle is not None
    assert subject.x is not None
    module = _module(subject)
    z, y = subject.x[rows] / context.scale, subject.y[rows]
    if subject.regression:
        return _number_radius(context, module, z, subject.predictions()[rows])
    if len(subject.classes) * z[0].numel() > _LARGEST:
        raise checks.ModelError(_too_many(subject))
    bounded = BoundedModule(_InUnits(module, context.scale), z[:1])
    eye = torch.eye(bounded.n_outputs, dtype=z.dtype)
    # The lead of the label over each class; its own row is left out of the proof.
    lead = eye[y][:, None] - eye[None]

    def proved(radius: Tensor) -> Tensor:
        assert subject.oracle is not None
        with subject.oracle.frozen(), torch.no_grad(), timed("certificate"):
            found = bounded.bounds(
                z, around(z, norm, radius.to(z), context.scaled_bounds), method="crown-ibp", C=lead
            )
        subject.oracle.nfev += found.cost.nfev
        assert found.lower is not None
        return (found.lower.scatter(1, y[:, None], torch.inf) > 0).all(1)

    return _largest_proved(proved, len(z), 0.5 if subject.task == "image" else 3.0)


def _largest_proved(proved: Callable[[Tensor], Tensor], n: int, first: float) -> Tensor:
    """Halve in on the largest proved radius, from ``first``, which is doubled while all of it is proved; infinity beyond."""
    low, high = torch.zeros(n), torch.full((n,), first)
    for _ in range(_DOUBLINGS):
        held = proved(high)
        if not bool(held.any()):
            break
        low, high = torch.where(held, high, low), torch.where(held, 2 * high, high)
    else:
        held = proved(high)
        low = torch.where(held, torch.inf, low)
    for _ in range(_HALVINGS):
        middle = torch.where(torch.isinf(low), high, (low + high) / 2)
        held = proved(middle)
        low, high = torch.where(held & torch.isfinite(low), middle, low), torch.where(held, high, middle)
    return low


def _module(subject: Subject) -> torch.nn.Module:
    """Return the network, or refuse what has no layers to bound."""
    assert subject.oracle is not None
    module = subject.oracle.fun
    if subject.no_gradient:
        raise checks.ModelError(
            f"it has no layers that can be bounded (the proof by linear relaxation was left out: {subject.no_gradient})."
        )
    if not isinstance(module, torch.nn.Module):
        raise checks.ModelError("the model is a function, not a module whose layers can be bounded.")
    why = next((str(m.no_layers) for m in module.modules() if hasattr(m, "no_layers")), "")
    if why:
        raise checks.ModelError(f"the proof by linear relaxation was left out, since {why}.")
    coarse = next((p.dtype for p in module.parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
    if coarse is not None:
        raise checks.ModelError(
            f"the proof by linear relaxation was left out, since the model rounds to {str(coarse)[6:]}, which moves its "
            "answers beyond what is proved. Turn it to float32 to have the proof."
        )
    return module


def _number_radius(context: Context, module: torch.nn.Module, z: Tensor, clean: Tensor) -> Tensor:
    """Return the largest radius within which each number is proved to move by less than the stated amount."""
    bounded = BoundedModule(_InUnits(module, context.scale), z[:1])

    def proved(radius: Tensor) -> Tensor:
        lower, upper = _number_bounds(context, bounded, z, radius)
        return torch.maximum(upper - clean, clean - lower) < context.moved

    return _largest_proved(proved, len(z), 3.0)


def _number_bounds(
    context: Context, bounded: BoundedModule, z: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor]:
    """Return proved ends of each number within a radius, float64."""
    subject, norm = context.subject, context.request.norm
    assert subject.oracle is not None
    assert subject.point is not None
    weights = subject.point.to(z).expand(len(z), 1, -1)
    with subject.oracle.frozen(), torch.no_grad(), timed("certificate"):
        found = bounded.bounds(
            z, around(z, norm, radius.to(z), context.scaled_bounds), method="crown-ibp", C=weights
        )
    subject.oracle.nfev += found.cost.nfev
    assert found.lower is not None
    assert found.upper is not None
    return found.lower[:, 0].double(), found.upper[:, 0].double()


def _reach_at_eps(context: Context, rows: Tensor) -> np.ndarray:
    """Return how far each number is proved to move at most, within the size asked for."""
    subject = context.subject
    assert subject.x is not None
    z, clean = subject.x[rows] / context.scale, subject.predictions()[rows]
    bounded = BoundedModule(_InUnits(_module(subject), context.scale), z[:1])
    eps = torch.full((len(z),), default_eps(context.request, subject))
    lower, upper = _number_bounds(context, bounded, z, eps)
    return torch.maximum(upper - clean, clean - lower).clamp_min(0).numpy()


class _InUnits(torch.nn.Module):
    """The model as a function of inputs divided by their scale."""

    scale: Tensor

    def __init__(self, inner: torch.nn.Module, scale: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("scale", scale)

    def forward(self, z: Tensor) -> Tensor:
        return self.inner(z * self.scale)


def _smoothed(context: Context, rows: Tensor, why: str) -> Finding:
    subject, request = context.subject, context.request
    assert subject.x is not None
    sigma = SIGMA[subject.task]
    n = DRAWS[request.profile]

    def smoothed(part: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        asked = context.question(part)
        found = randomized_smoothing(
            asked.oracle, asked.z, sigma=sigma, n_selection=max(10, n // 10), n_samples=n - max(10, n // 10),
            alpha=_FAILURE, generator=generator,
        )  # fmt: skip
        assert found.radius is not None
        return {"radius": torch.where(found.prediction == asked.y, found.radius, 0.0)}

    done, found = context.chunks("certify smoothed", rows, smoothed, evaluations(subject, request))
    rows, radius = rows[done], found["radius"]
    if subject.regression:
        return _number_finding(
            context, rows, radius, "l2", f"the model smoothed by a median, sigma {sigma:g}", "randomized smoothing",
            "randomized_smoothing",
            f"The model itself: {why} So the median of its answers under Gaussian noise was certified instead, which answers "
            f"differently, in the Euclidean norm, each row with confidence {1 - _FAILURE:.0%}.",
        )  # fmt: skip
    return _finding(
        context, rows, radius, "l2", f"the smoothed model, sigma {sigma:g}", "randomized smoothing", "randomized_smoothing",
        f"The model itself: {why} So the model smoothed by Gaussian noise was certified instead, which answers "
        f"differently, in the Euclidean norm, each row with confidence {1 - _FAILURE:.0%}.",
    )  # fmt: skip


def _finding(
    context: Context,
    rows: Tensor,
    radius: Tensor,
    norm: Literal["linf", "l2"],
    function: str,
    method: str,
    paper: str,
    limits: str,
) -> Finding:
    subject, request = context.subject, context.request
    values = radius.double().numpy()
    # A size in another norm is another question: the gate on it is then left unanswered.
    same = norm == request.norm
    eps = default_eps(request, subject) if same else 0.0
    in_unit = unit(context.request.__class__(norm=norm), subject)
    proved = (values > eps).astype(float)
    low, high = bootstrap(values, context.generator("median"), np.median)
    share_low, share_high = share_interval(proved)
    metrics = (
        Metric("radius.median", float(np.median(values)), low, high, len(values), method),
        Metric(
            "accuracy.at_eps" if same else "accuracy.proved",
            float(proved.mean()),
            share_low,
            share_high,
            len(values),
            f"{method}, eps {eps:.3g}" if same else f"{method}, any radius above zero",
        ),
    )
    weak = float(np.median(values)) <= eps
    table = tuple(
        (int(subject.numbers[r]), subject.classes[int(subject.y[r])], float(v))
        for r, v in zip(rows, values, strict=True)
    )[:20]
    series: dict[str, Any] = {
        "rows": rows.tolist(),
        "radius": values.tolist(),
        "unit": in_unit,
        "eps": eps,
        "function": function,
        "norm": norm,
        "of": "model" if function == "the model" else "smoothed",
        "sigma": SIGMA[subject.task],
    }
    return Finding(
        "certify", "weak" if weak else "ok",
        f"Of {function}, {proved.mean():.0%} of the rows are proved beyond {eps:.3g}; the median proved radius is "
        f"{np.median(values):.3g} ({in_unit}).",
        metrics, Table(("row", "class", "proved radius"), table), series, limits, papers=(paper,),
    )  # fmt: skip


def _number_finding(
    context: Context, rows: Tensor, radius: Tensor, norm: Literal["linf", "l2"], function: str, method: str, paper: str,
    limits: str, reach: np.ndarray | None = None,
) -> Finding:  # fmt: skip
    """Report within which change of the input the number is proved to stay."""
    subject, request, moved = context.subject, context.request, context.moved
    values = radius.double().numpy()
    same = norm == request.norm
    eps = default_eps(request, subject) if same else 0.0
    in_unit = unit(request.__class__(norm=norm), subject)
    proved = values > eps
    low, high = bootstrap(values, context.generator("median"), np.median)
    share_low, share_high = share_interval(proved)
    metrics = [
        Metric("radius.median", float(np.median(values)), low, high, len(values), f"{method}, moved by {moved:.3g}"),
        Metric(
            "steady.at_eps" if same else "steady.proved", float(proved.mean()), share_low, share_high, len(values),
            f"{method}, eps {eps:.3g}" if same else f"{method}, any radius above zero",
        ),
    ]  # fmt: skip
    if reach is not None:
        a, b = bootstrap(reach, context.generator("reach"), np.median)
        metrics.append(
            Metric("movement.at_eps", float(np.median(reach)), a, b, len(reach), f"bound, eps {eps:.3g}")
        )
    told = (
        ""
        if reach is None
        else f" At {eps:.3g} no change moves half of them by more than {np.median(reach):.3g}."
    )
    answers = subject.predictions()[rows]
    table = tuple(
        (int(subject.numbers[r]), float(a), float(v)) for r, a, v in zip(rows, answers, values, strict=True)
    )[:20]
    return Finding(
        "certify", "weak" if float(np.median(values)) <= eps else "ok",
        f"Of {function}, {proved.mean():.0%} of the rows are proved beyond {eps:.3g} to move by less than {moved:.3g} "
        f"({MOVED:g} standard deviations of the target); the median proved radius is {np.median(values):.3g} ({in_unit})."
        + told,
        tuple(metrics), Table(("row", "answer", "proved radius"), table),
        {"rows": rows.tolist(), "radius": values.tolist(), "unit": in_unit, "eps": eps, "function": function, "norm": norm,
         "of": "model" if function == "the model" else "smoothed"},
        limits, papers=(paper,),
    )  # fmt: skip


def _text(context: Context) -> Finding:
    subject, request = context.subject, context.request
    rows = context.fair_rows(max(4, context.rows["certify"]))
    done, found = context.chunks(
        "certify", rows,
        lambda part, generator: {"words": ablation_certificate(
            subject, part, n_draws=DRAWS[request.profile], alpha=_FAILURE, generator=generator
        )}, evaluations(subject, request),
    )  # fmt: skip
    rows, values = rows[done], np.array(found["words"], dtype=float)
    low, high = bootstrap(values, context.generator("mean"))
    some = float((values >= 1).mean())
    some_low, some_high = share_interval(values >= 1)
    table = tuple(
        (int(subject.numbers[r]), subject.texts[int(r)][:80], int(v))
        for r, v in zip(rows, values, strict=True)
    )[:20]
    return Finding(
        "certify", "ok" if some > 0 else "weak",
        f"Of the model smoothed by random ablation of words, {some:.0%} of the texts are proved against replacing any "
        f"one word, {values.mean():.2f} words in the mean.",
        (
            Metric("words.mean", float(values.mean()), low, high, len(values), "randomized ablation"),
            Metric("accuracy.one_word", some, some_low, some_high, len(values), "randomized ablation"),
        ),
        Table(("row", "text", "words proved"), table),
        {"rows": rows.tolist(), "radius": values.tolist(), "unit": "words replaced", "eps": 0.0, "function": "the ablated model", "norm": "words", "of": "ablated",
         "references": ["randomized_ablation"]},
        "The model itself: the ablated model, which sees a random part of the words and takes a vote, was certified, "
        f"each text with confidence {1 - _FAILURE:.0%}. Inserted or deleted words are not covered.",
    )  # fmt: skip
