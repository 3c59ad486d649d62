"""May the confidence be believed? Expected calibration error with its interval, and a reliability diagram."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import chi2

from perturbkit.audit import _figures
from perturbkit.audit._intervals import bootstrap, share_interval
from perturbkit.audit.context import Context
from perturbkit.audit.finding import Finding, Metric, Table
from perturbkit.audit.request import AuditRequest
from perturbkit.audit.subject import Subject
from perturbkit.uncertainty import calibration_errors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.0
NEEDS_MODEL = ""
BINS = 15
TOLERATED = 0.05
# Temperatures are sought between exp(-7) and exp(7).
_LIMIT = 7.0


def refusal(subject: Subject, request: AuditRequest) -> str:
    """Why the section cannot run, empty if it can."""
    if subject.regression:
        return (
            "the model answers numbers and no probabilities, so there is no confidence to compare with its accuracy. "
            "Read the conformal section: its intervals hold the target with a stated chance."
        )
    return ""


def evaluations(subject: Subject, request: AuditRequest) -> int:
    """Rows evaluated for one row of data."""
    return 0


def run(context: Context) -> Finding:
    """Compare what the model claims with how often it is right."""
    subject = context.subject
    p, y = subject.probabilities(), subject.y.numpy()
    errors = calibration_errors(p, y, n_bins=BINS, generator=context.generator("calibration"))
    confidence, right = p.max(1), (p.argmax(1) == y).astype(float)
    gap = confidence - right
    gap_low, gap_high = bootstrap(gap, context.generator("gap"))
    # A perfectly calibrated model of the same confidences still has an error, by chance: the control.
    rng = np.random.default_rng(context.generator("control").initial_seed())
    chance = [_ece(confidence, rng.random(len(p)) < confidence) for _ in range(200)]
    control = float(np.mean(chance))
    beyond = float(np.mean(np.array(chance) >= errors.ece))
    # An error that chance alone explains is compatible with zero, whatever the bootstrap says.
    low = 0.0 if beyond >= 0.025 else errors.ece_low
    metrics: tuple[Metric, ...] = (
        Metric("ece", errors.ece, low, errors.ece_high, len(y), f"{BINS} bins", control),
        Metric(
            "overconfidence",
            float(gap.mean()),
            gap_low,
            gap_high,
            len(y),
            "mean confidence less accuracy",
            0.0,
        ),
        Metric("nll", errors.nll, None, None, len(y), "negative log-likelihood, nats"),
        Metric("brier", errors.brier, None, None, len(y), "Brier score"),
    )
    temperature = _temperature(subject)
    if temperature is not None:
        metrics = (*metrics, temperature)
    weak = errors.ece > TOLERATED and beyond < 0.05
    side = "more" if gap.mean() > 0 else "less"
    return Finding(
        "calibration", "weak" if weak else "ok",
        f"The confidence is off by {errors.ece:.3f} in the mean (a calibrated model would show {control:.3f} by chance); "
        f"the model is {abs(gap.mean()):.3f} {side} confident than right."
        + _mended(temperature),
        metrics, Table(("confidence", "rows", "mean confidence", "accuracy", "95 % interval"), _rows(confidence, right)),
        {**_bins(confidence, right), "references": ["temperature"]},
        "Calibration on other data: a shift of the inputs moves it. The error depends on the bins, and is biased "
        "upward on few rows; compare it with the chance value. Its interval covers in nine cases of ten rather than 95 of 100.",
        papers=("calibration_errors",),
    )  # fmt: skip


def _temperature(subject: Subject) -> Metric | None:
    """Return the number that the logits should be divided by, with its interval by likelihood; nothing where any certainty fits."""
    scores = subject.scores().double()
    if subject.given_probabilities is not None or subject.answers_probabilities():
        scores = torch.from_numpy(np.log(np.maximum(subject.probabilities(), 1e-300)))
    scores = scores[~scores.isnan().any(1)]
    y = subject.y[: len(scores)] if len(scores) == subject.n else None
    if y is None:
        return None

    def loss(log_sharpness: float) -> float:
        scaled = scores * math.exp(log_sharpness)
        return float(torch.nn.functional.cross_entropy(scaled, y, reduction="sum"))

    found = minimize_scalar(loss, bounds=(-_LIMIT, _LIMIT), method="bounded", options={"xatol": 1e-6})
    best, least = float(found.x), float(found.fun)
    # Twice the log-likelihood ratio has one degree of freedom, Wilks.
    allowed = least + chi2.ppf(0.95, 1) / 2
    if loss(-_LIMIT) <= allowed or loss(_LIMIT) <= allowed:
        return None
    ends = [brentq(lambda s: loss(s) - allowed, a, b) for a, b in ((-_LIMIT, best), (best, _LIMIT))]
    return Metric(
        "temperature", math.exp(-best), math.exp(-ends[1]), math.exp(-ends[0]), subject.n,
        "what the logits should be divided by; above 1 the model is overconfident", 1.0,
    )  # fmt: skip


def _mended(temperature: Metric | None) -> str:
    if temperature is None or temperature.low is None or temperature.high is None:
        return ""
    if temperature.low <= 1 <= temperature.high:
        return ""
    side = "overconfident" if temperature.low > 1 else "underconfident"
    return f" It is {side}: its logits should be divided by {temperature.value:.2f} [{temperature.low:.2f}, {temperature.high:.2f}]."


def draw(finding: Finding) -> Figure:
    """Accuracy against confidence, with the diagonal."""
    s = finding.series
    return _figures.reliability(s["confidence"], s["accuracy"], s["low"], s["high"], s["count"])


def _bins(confidence: np.ndarray, right: np.ndarray, n_bins: int = 10) -> dict[str, list[float]]:
    index = np.minimum((confidence * n_bins).astype(int), n_bins - 1)
    found: dict[str, list[float]] = {
        "confidence": [],
        "accuracy": [],
        "low": [],
        "high": [],
        "count": [],
        "from": [],
    }
    for b in np.unique(index):
        rows = index == b
        k, n = int(right[rows].sum()), int(rows.sum())
        low, high = share_interval(right[rows])
        values = (confidence[rows].mean(), k / n, low, high, n, b / n_bins)
        for key, value in zip(found, values, strict=True):
            found[key].append(float(value))
    return found


def _rows(confidence: np.ndarray, right: np.ndarray) -> tuple[tuple[object, ...], ...]:
    b = _bins(confidence, right)
    return tuple(
        (f"{start:.1f} to {start + 0.1:.1f}", int(n), round(c, 3), round(a, 3), f"[{low:.2f}, {high:.2f}]")
        for c, a, low, high, n, start in zip(*b.values(), strict=True)
    )


def _ece(confidence: np.ndarray, right: np.ndarray) -> float:
    index = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gap = np.bincount(index, confidence - right, minlength=BINS)
    return float(np.abs(gap).sum() / len(confidence))
