"""Oracles of the calibration errors: a loop, scikit-learn, closed forms, and coverage of the interval."""

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss

from _common import Example
from perturbkit.core import statistics
from perturbkit.uncertainty import calibration_errors


def predictions(seed=0, n=200, k=4):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(k) / 2, n)
    return p, (p.cumsum(1) > rng.random((n, 1))).argmax(1)


P, Y = predictions()

EXAMPLE = Example(
    call=lambda generator, dtype: calibration_errors(
        torch.as_tensor(P).to(dtype), Y, n_resamples=20, generator=generator
    ),
    stochastic=True,
    refusals=(
        (lambda: calibration_errors(P * 2, Y), "row sum off by"),
        (lambda: calibration_errors(np.log(P), Y), "softmax"),
        (lambda: calibration_errors(P[:, :1], Y), "1 column"),
        (lambda: calibration_errors(P, Y[:5]), "y has shape"),
        (lambda: calibration_errors(P, Y + 4), "y holds labels"),
        (lambda: calibration_errors(P, Y, n_bins=0), "n_bins is 0"),
        (lambda: calibration_errors(P, Y, confidence=1.0), "confidence is 1"),
        (lambda: calibration_errors(P, Y, n_resamples=0), "n_resamples is 0"),
        (lambda: calibration_errors(P, Y, generator="a"), "generator is 'a'"),
    ),
)


def gap_of(bins, confidence, hit):
    total = 0.0
    for b in set(bins):
        rows = [i for i, own in enumerate(bins) if own == b]
        total += abs(sum(float(hit[i]) for i in rows) - sum(float(confidence[i]) for i in rows))
    return total / len(bins)


@pytest.mark.parametrize(("seed", "n_bins"), [(0, 15), (1, 10), (2, 1)])
def test_against_a_loop(seed, n_bins):
    p, y = predictions(seed)
    found = calibration_errors(p, y, n_bins=n_bins, generator=0)
    confidence, hit = p.max(1), p.argmax(1) == y
    width = [min(int(c * n_bins), n_bins - 1) for c in confidence]
    assert found.ece == pytest.approx(gap_of(width, confidence, hit), abs=1e-12)
    ranks = (np.argsort(np.argsort(confidence)) * n_bins) // len(y)
    # Quantile edges may move a row at an edge to the neighbour: at most one a bin.
    assert found.adaptive_ece == pytest.approx(gap_of(list(ranks), confidence, hit), abs=2 * n_bins / len(y))
    each = [gap_of([min(int(v * n_bins), n_bins - 1) for v in p[:, k]], p[:, k], y == k) for k in range(4)]
    assert found.static_ece == pytest.approx(np.mean(each), abs=1e-12)
    assert found.n == 200


def test_bins_of_equal_count():
    confidence = np.repeat([0.6, 0.7, 0.8, 0.9], 10)
    hit = np.repeat([0.5, 0.9, 0.9, 0.8], 10) > np.tile(np.arange(10) / 10, 4)
    p = np.stack([confidence, 1 - confidence], 1)
    found = calibration_errors(p, 1 - hit.astype(int), n_bins=4, generator=0)
    assert found.adaptive_ece == pytest.approx((0.1 + 0.2 + 0.1 + 0.1) / 4)
    halves = calibration_errors(p, 1 - hit.astype(int), n_bins=2, generator=0)
    assert halves.adaptive_ece == pytest.approx((0.05 + 0.0) / 2)


def test_against_scikit_learn():
    p, y = predictions(3, k=2)
    found = calibration_errors(p, y, generator=0)
    assert found.nll == pytest.approx(log_loss(y, p), abs=1e-12)
    assert found.brier == pytest.approx(2 * brier_score_loss(y, p[:, 1]), abs=1e-12)


def test_closed_forms():
    sure = calibration_errors(np.eye(3), [0, 1, 2], generator=0)
    assert (sure.ece, sure.adaptive_ece, sure.static_ece, sure.nll, sure.brier, sure.entropy) == (0,) * 6
    wrong = calibration_errors(np.eye(3), [1, 2, 0], generator=0)
    assert (wrong.ece, wrong.ece_high, wrong.brier) == (1, 1, 2)
    assert wrong.static_ece == pytest.approx(2 / 3)
    assert wrong.nll == pytest.approx(-np.log(np.finfo(np.float32).tiny))
    uniform = calibration_errors(np.full((8, 4), 0.25), [0, 1, 2, 3] * 2, generator=0)
    assert uniform.ece == uniform.adaptive_ece == uniform.static_ece == 0
    assert uniform.entropy == pytest.approx(np.log(4))
    assert uniform.nll == pytest.approx(np.log(4))


def test_order_of_rows_does_not_matter_even_with_ties():
    rng = np.random.default_rng(4)
    c = rng.choice([0.55, 0.6, 0.8, 1.0], 300)
    p, y = np.stack([c, 1 - c], 1), rng.integers(0, 2, 300)
    order = rng.permutation(300)
    a, b = calibration_errors(p, y, generator=0), calibration_errors(p[order], y[order], generator=0)
    for name in ("ece", "adaptive_ece", "static_ece", "nll", "brier", "entropy"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-12)


@pytest.mark.parametrize(("confidence", "accuracy"), [(0.8, 0.65), (0.8, 0.8), (0.95, 0.9)])
def test_interval_covers_the_true_error(confidence, accuracy):
    """A model of one confidence has the true ECE |confidence - accuracy|; the basic interval covers it."""
    rng, n, draws = np.random.default_rng(5), 400, 300
    p = np.tile([confidence, 1 - confidence], (n, 1))
    covered = 0
    for seed in range(draws):
        y = (rng.random(n) >= accuracy).astype(int)
        found = calibration_errors(p, y, n_resamples=200, confidence=0.9, generator=seed)
        covered += found.ece_low <= abs(confidence - accuracy) + 1e-9 and (
            abs(confidence - accuracy) <= found.ece_high + 1e-9
        )
        assert found.ece_low <= found.ece <= found.ece_high
    # Nominal 0.9; the bootstrap is approximate, so 0.85 must be plausible.
    assert statistics.clopper_pearson(covered, draws, 0.999).high >= 0.87
    assert covered / draws >= 0.83


def test_interval_of_a_calibrated_model_reaches_down_to_chance():
    """Where the plain percentile interval excludes zero, this one comes close to it."""
    rng = np.random.default_rng(6)
    p = rng.dirichlet(np.ones(3), 1000)
    y = (p.cumsum(1) > rng.random((1000, 1))).argmax(1)
    found = calibration_errors(p, y, generator=0)
    assert found.ece_low < found.ece / 2


def test_blocks_of_resamples_cover_the_number_asked(monkeypatch):
    from perturbkit.uncertainty.calibration import calibration_errors as module

    p, y = predictions(7)
    whole = calibration_errors(p, y, n_resamples=50, generator=1)
    monkeypatch.setattr(module, "_BLOCK", 200 * 7)
    parts = calibration_errors(p, y, n_resamples=50, generator=1)
    assert (whole.ece_low, whole.ece_high) == pytest.approx((parts.ece_low, parts.ece_high), abs=1e-12)
