"""Do the explanations say what the model does? Deletion and insertion curves against a random map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from perturbkit.audit import _figures
from perturbkit.audit._intervals import bootstrap
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


def evaluations(subject: Subject, request: AuditRequest) -> int:
    """Rows evaluated for one row of data."""
    own = 3 * 2 * (STEPS + 1)
    return own if "explain" in request.sections else own + explain.evaluations(subject, request)


def run(context: Context) -> Finding:
    """Take the most important parts away first (deletion) or bring them first (insertion)."""
    found = context.attributions
    curves = {m: _curves(context, found, m) for m in found.maps}
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
    return Finding(
        "faithfulness", status,
        told
        + ("." if status == "ok" else ": no explanation is clearly better than chance."),
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


def draw(finding: Finding) -> Figure:
    """Mean probability of the class, or movement of the number, against the share removed or brought."""
    figure = _figures.curves(finding.series["fractions"], finding.series["curves"])
    figure.axes[0].set_ylabel(finding.series.get("label", "mean probability"))
    return figure


def _curves(context: Context, found: Attributions, method: str) -> dict[str, Tensor]:
    """Return the target's probability along both curves, shape (rows, STEPS + 1); of a regression, how far it moved."""
    subject = context.subject
    results: dict[str, list[Tensor]] = {"deletion": [], "insertion": []}
    for i in range(len(found.rows)):
        n = len(found.cells[i])
        order = torch.argsort(found.maps[method][i][:n], descending=True)
        place = torch.empty(n, dtype=torch.long)
        place[order] = torch.arange(n)
        cut = torch.linspace(0, n, STEPS + 1).round().long()[:, None]
        for mode in results:
            kept = place >= cut if mode == "deletion" else place < cut
            batch = found.keep(i, kept)
            if subject.task == "text":
                scores = subject.predict_texts(batch)
            else:
                assert subject.oracle is not None
                scores = subject.oracle(batch)
            if subject.regression:
                results[mode].append(_movement(context, scores))
            else:
                results[mode].append(_probability(scores, int(found.target[i])))
    return {mode: torch.stack(values) for mode, values in results.items()}


def _movement(context: Context, scores: Tensor) -> Tensor:
    """Return how far each answer is from the first of its curve, in standard deviations of the target."""
    subject = context.subject
    assert subject.point is not None
    answers = scores.double() @ subject.point
    return (answers - answers[0]).abs() / float(subject.y.std())


def _probability(scores: Tensor, target: int) -> Tensor:
    from perturbkit.audit.subject import to_probabilities

    return torch.from_numpy(to_probabilities(scores)[:, target].copy())
