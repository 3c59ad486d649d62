"""A network trained past its accuracy on noisy labels is overconfident, and the calibration errors say so.

Five networks on digits whose labels are wrong in one of five rows: the expected calibration error on fresh rows is
far above what a calibrated model of the same confidences would show, and above that of the epoch whose likelihood is
best, at about the same accuracy. Controls: the same predictions with labels drawn from them, calibrated by construction. Last, the interval is held
against the true error of a model whose error is known.
"""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure

from perturbkit.core.random import randint, randperm, uniform
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.uncertainty._parts import mlp, train
from perturbkit.uncertainty import calibration_errors

_EPOCHS, _TIMES = 8, 20


@paper(
    number=0,
    title="On Calibration of Modern Neural Networks",
    authors="Guo, Pleiss, Sun, Weinberger",
    year=2017,
    arxiv="1706.04599",
    claim="Networks trained past the point where the likelihood is best keep their accuracy and become overconfident, "
    "which the expected calibration error shows.",
    method="perturbkit.uncertainty.calibration_errors",
    needs="forward",
    input="any",
    cost="the predictions; 1000 resamples of them",
    seconds=20,
)
def reproduce(run: Run) -> Evidence:
    """Calibration of networks at their best epoch and trained on, against labels drawn from their predictions."""
    from perturbkit.data import load_digits8

    digits = load_digits8()
    x = digits.x.flatten(1)
    best, late, drawn, curve = [], [], [], []
    for seed in run.seeds(5):
        g = torch.Generator().manual_seed(seed)
        order = randperm(len(x), generator=g)
        wrong = uniform((len(x),), generator=g) < 0.2
        y = torch.where(wrong, randint(0, 10, (len(x),), generator=g), digits.y)
        fit, held = order[:900], order[900:]
        net = mlp((64, 128, 128, 10), g)
        found = []
        for _ in range(_TIMES):
            train(net, x[fit], y[fit], g, epochs=_EPOCHS)
            p = net(x[held]).softmax(1).detach().double().numpy()
            found.append((calibration_errors(p, y[held], generator=seed), _accuracy(p, y[held])))
        best.append(min(found, key=lambda pair: pair[0].nll))
        late.append(found[-1])
        curve.append([errors.ece for errors, _ in found])
        labels = (p.cumsum(1) > np.random.default_rng(seed).random((len(p), 1))).argmax(1)
        drawn.append(calibration_errors(p, labels, generator=seed))
    ece = [errors.ece for errors, _ in late]
    chance = [errors.ece for errors in drawn]
    comparisons = [
        Comparison.over_seeds("ECE after 160 epochs, against the epoch of best likelihood", ece, [e.ece for e, _ in best], "higher", margin=0.05),
        Comparison.over_seeds(
            "accuracy after 160 epochs, against the epoch of best likelihood", [a for _, a in late], [a for _, a in best], "higher", margin=-0.1
        ),
        Comparison.over_seeds("ECE after 160 epochs, against labels drawn from the predictions", ece, chance, "higher", factor=3),
        Comparison.over_seeds(
            "ECE of labels drawn from the predictions", chance, chance, "higher", factor=3, control=True,
            note="must fail: calibrated by construction",
        ),
        Comparison(
            "networks whose interval stays above 0.05", sum(e.ece_low > 0.05 for e, _ in late), 5, "equal", n=5
        ),
        Comparison(
            "calibrated predictions whose interval stays above 0.05", sum(e.ece_low > 0.05 for e in drawn), 5, "equal", n=5,
            control=True, note="must fail: calibrated by construction",
        ),
        Comparison(
            "coverage of the true error by the 90 % interval", _coverage(run), 0.9, "higher", margin=-0.05, n=500
        ),
    ]  # fmt: skip
    return Evidence(
        comparisons, _figure(np.array(curve), float(np.mean(chance))),
        "With wrong labels in the training data the accuracy falls by some points as they are learned by heart; the "
        "paper's larger data sets keep it. The interval is the bootstrap's and covers a little less than its level.",
    )  # fmt: skip


def _accuracy(p: np.ndarray, y: torch.Tensor) -> float:
    return float((p.argmax(1) == y.numpy()).mean())


def _coverage(run: Run) -> float:
    """Share of draws in which the interval covers the error of a model with confidences 0.62 and 0.9."""
    rng, hits = run.rng("coverage"), 0
    confidence, accuracy = np.repeat([0.62, 0.9], 250), np.repeat([0.55, 0.82], 250)
    p = np.stack([confidence, 1 - confidence], 1)
    for seed in run.seeds(500):
        y = (rng.random(500) >= accuracy).astype(int)
        found = calibration_errors(p, y, confidence=0.9, n_resamples=500, generator=seed)
        hits += found.ece_low <= 0.075 <= found.ece_high
    return hits / 500


def _figure(curve: np.ndarray, chance: float) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    ax.errorbar(
        _EPOCHS * np.arange(1, _TIMES + 1), curve.mean(0), curve.std(0, ddof=1), marker="o", label="network"
    )
    ax.axhline(chance, color="0.4", ls="--", label="calibrated, by chance")
    ax.set_xlabel("epochs")
    ax.set_ylabel("expected calibration error")
    ax.legend(frameon=False)
    return figure
