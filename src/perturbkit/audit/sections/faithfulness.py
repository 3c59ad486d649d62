"""Do the explanations say what the model does? Deletion and insertion curves against a random map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from perturbkit.audit import _figures, attributions
from perturbkit.audit._intervals import bootstrap, share_interval
from perturbkit.audit.context import Attributions, Context
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.sections import explain
from perturbkit.audit.subject import Subject

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.2
NEEDS_MODEL = "scoring explanations"
STEPS = 10
# Rows evaluated for one row: both ends of its six curves are the same two inputs.
OWN = 3 * 2 * (STEPS - 1) + 2
# One part is called a shortcut where alone it keeps, and missing it changes, at least these shares of the answers.
_ALONE, _REMOVED = 0.9, 0.3


def evaluations(subject: Subject, request: AuditRequest) -> int:
    """Rows evaluated for one row of data."""
    own = OWN + (0 if subject.task == "text" or subject.regression else 3)
    return own if "explain" in request.sections else own + explain.evaluations(subject, request)


def run(context: Context) -> Finding:
    """Take the most important parts away first (deletion) or bring them first (insertion)."""
    found = context.attributions
    curves = _curves(context, found)
    methods = [m for m in curves if m != "random"]
    regression = context.subject.regression
    random_deletion = curves["random"]["deletion"].mean(1)
    metrics, rows, better = [], [], []
    for m in methods:
        for mode in ("deletion", "insertion"):
            areas, control = curves[m][mode].mean(1), curves["random"][mode].mean(1)
            # Deletion should lower a probability fast; what is deleted or brought should move a number far.
            falls = mode == "deletion" and not regression
            gain = (control - areas if falls else areas - control).numpy()
            low, high = bootstrap(gain, context.generator(f"{m} {mode}"))
            key = f"{mode}.gain.{m.replace(' ', '_')}"
            metrics.append(Metric(key, float(gain.mean()), low, high, len(gain), m, 0.0))
            rows.append(
                (
                    m,
                    mode,
                    float(areas.mean()),
                    float(control.mean()),
                    float(gain.mean()),
                    "" if low is None else f"[{low:.3f}, {high:.3f}]",
                )
            )
            better.append(low is not None and low > 0)
    best = max((k for k in metrics if k.name.startswith("deletion")), key=lambda k: k.value)
    status = "ok" if sum(better) >= 2 else "weak"
    area = float(curves[best.method]["deletion"].mean())
    if regression:
        told = (
            f"Removing what {best.method} calls important first moves the answer by {area:.2f} standard deviations of the "
            f"target in the mean, against {float(random_deletion.mean()):.2f} in random order"
        )
    else:
        told = (
            f"Removing what {best.method} calls important first leaves a mean probability of {area:.2f}, "
            f"against {float(random_deletion.mean()):.2f} in random order"
        )
    told += "." if status == "ok" else ": no explanation is clearly better than chance."
    one, shortcut = _one_part(context, found)
    metrics += one
    return Finding(
        "faithfulness", "weak" if shortcut else status, told + shortcut,
        tuple(metrics),
        Table(("method", "curve", "area", "random area", "gain", "95 % interval"), tuple(rows)),
        {
            "fractions": np.linspace(0, 1, STEPS + 1).tolist(),
            "label": "movement of the answer, in deviations of the target" if context.subject.regression else "mean probability",
            "curves": {m: {k: v.mean(0).tolist() for k, v in c.items()} for m, c in curves.items()},
        },
        "What the model would do on natural inputs: a picture with parts removed is not one it was trained on, and "
        "another way of removing may rank the methods differently."
        + context.subject.left_out("integrated gradients"),
        papers=("deletion_curve", *found.papers.values()),
    )  # fmt: skip


def _one_part(context: Context, found: Attributions) -> tuple[list[Metric], str]:
    """Remove the part that matters most, and keep nothing else: where it decides alone, it may be a shortcut."""
    subject = context.subject
    if subject.task == "text" or subject.regression or len(found.cells[0]) < 2:
        return [], ""
    if all(bool((found.maps[m] == 0).all()) for m in found.maps if m != "random"):
        return [], ""
    assert subject.oracle is not None
    n = len(found.cells[0])
    first = int(attributions.shares(found).argmax())
    drawn = torch.randint(1, n, (len(found.rows),), generator=context.generator("another part"))
    parts = torch.arange(n)
    answers = []
    for i, step in enumerate(drawn.tolist()):
        other = (first + step) % n
        kept = torch.stack([parts != first, parts != other, parts == first])
        answers.append(subject.oracle(found.keep(i, kept)).argmax(1))
    without, without_other, alone = (torch.stack(answers) == found.target[:, None]).T.numpy()
    (low, high), (a, b) = share_interval(~without), share_interval(alone)
    control, several = float((~without_other).mean()), len({int(r[2]) for r in answers}) > 1
    removed, kept_alone, rows = float((~without).mean()), float(alone.mean()), len(alone)
    name = attributions.part_name(found, first)
    metrics = [
        Metric("one_part.removed", removed, low, high, rows, f"answers that change without {name}", control),
        Metric("one_part.alone", kept_alone, a, b, rows, f"answers that stay with {name} alone"),
    ]
    if not (several and kept_alone >= _ALONE and a > _ALONE / 2 and removed >= _REMOVED and low > control):
        return metrics, ""
    return metrics, (
        f" One part decides alone: with nothing but {name}, {kept_alone:.0%} of the answers stay; without it {removed:.0%} change "
        f"(without another part {control:.0%}). If it should not decide, it is a shortcut."
    )


def draw(finding: Finding) -> Figure:
    """Mean probability of the class, or movement of the number, against the share removed or brought."""
    figure = _figures.curves(finding.series["fractions"], finding.series["curves"])
    figure.axes[0].set_ylabel(finding.series.get("label", "mean probability"))
    return figure


def _curves(context: Context, found: Attributions) -> dict[str, dict[str, Tensor]]:
    """Return by method the target's probability along both curves, shape (rows, STEPS + 1); of a regression, how far it moved."""
    names = [(m, mode) for m in found.maps for mode in ("deletion", "insertion")]
    _, values = context.chunks(
        "faithfulness", torch.arange(len(found.rows)),
        lambda part, _: {"curves": torch.stack([_curves_of_row(context, found, i) for i in part.tolist()])}, OWN,
    )  # fmt: skip
    curves: dict[str, dict[str, Tensor]] = {m: {} for m in found.maps}
    for j, (m, mode) in enumerate(names):
        curves[m][mode] = values["curves"][:, j]
    return curves


def _curves_of_row(context: Context, found: Attributions, i: int) -> Tensor:
    """Return all curves of one row, shape (2 methods, STEPS + 1); inputs that curves share are evaluated once."""
    subject, n = context.subject, len(found.cells[i])
    cut = torch.linspace(0, n, STEPS + 1).round().long()[:, None]
    masks = []
    for scores in found.maps.values():
        order = torch.argsort(scores[i][:n], descending=True)
        place = torch.empty(n, dtype=torch.long)
        place[order] = torch.arange(n)
        masks += [place >= cut, place < cut]
    kept, where = torch.cat(masks).unique(dim=0, return_inverse=True)
    batch = found.keep(i, kept)
    if subject.task == "text":
        answers = subject.predict_texts(batch)
    else:
        assert subject.oracle is not None
        answers = subject.oracle(batch)
    answers = answers[where].reshape(len(masks), STEPS + 1, -1)
    if subject.regression:
        return torch.stack([_movement(context, a) for a in answers])
    return torch.stack([_probability(a, int(found.target[i])) for a in answers])


def _movement(context: Context, scores: Tensor) -> Tensor:
    """Return how far each answer is from the first of its curve, in standard deviations of the target."""
    subject = context.subject
    assert subject.point is not None
    answers = scores.double() @ subject.point
    return (answers - answers[0]).abs() / float(subject.y.std())


def _probability(scores: Tensor, target: int) -> Tensor:
    from perturbkit.audit.subject import to_probabilities

    return torch.from_numpy(to_probabilities(scores)[:, target].copy())
