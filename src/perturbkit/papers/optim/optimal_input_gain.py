"""Gains for the inputs train a network of one hidden layer almost as far as Levenberg-Marquardt, for less.

Three tables, the last with columns in units over four decades. The same first weights go to descent with one optimal factor,
to gains, to gains on whitened inputs, and to Levenberg-Marquardt. Gains drawn at random are the control.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import least_squares
from sklearn.datasets import make_friedman1
from sklearn.model_selection import cross_val_score

from perturbkit.optim import OIGRegressor
from perturbkit.papers import Comparison, Evidence, Run, paper

HIDDEN, STEPS = 8, 100
Table = tuple[np.ndarray, np.ndarray]


@paper(
    number=35,
    title="Optimal Input Gain: All You Need to Supercharge a Feed-Forward Neural Network",
    authors="Auddy, Manry, Tyagi, and others",
    year=2023,
    arxiv="2303.17732",
    claim="A gain for each input, found anew in every step, brings first-order training near Levenberg-Marquardt.",
    method="perturbkit.optim.OIGRegressor",
    needs="training",
    input="tabular",
    cost="a solve of as many equations as inputs a step",
    seconds=40,
)
def reproduce(run: Run) -> Evidence:
    """Training errors after 100 steps, against one factor and against Levenberg-Marquardt."""
    seed = run.seeds(1)[0]
    comparisons, errors = [], {}
    for name, (x, y) in _tables(seed).items():
        found = {
            kind: float(_fit(x, y, seed, algorithm, gain).errors_[-1])
            for kind, (algorithm, gain) in {
                "bp": ("bp", False),
                "oig-bp": ("bp", True),
                "oig-hwo": ("hwo", True),
            }.items()
        }
        found["lm"] = _marquardt(x, y, seed)
        errors[name] = found
        comparisons += [
            Comparison(f"training error with gains against one factor, {name}", found["oig-bp"], found["bp"], "lower", factor=0.8),
            Comparison(f"training error with whitened gains against Levenberg-Marquardt, {name}", found["oig-hwo"], found["lm"], "lower", factor=1.1),
        ]  # fmt: skip
    x, y = _tables(seed)["inverse problem, unlike units"]
    shuffled = float(
        _fit(
            x[:, ::-1] * 10 ** np.random.default_rng(seed).uniform(-2, 2, x.shape[1]), y, seed, "bp", False
        ).errors_[-1]
    )
    comparisons.append(
        Comparison(
            "training error with random units and one factor, against gains", shuffled, errors["inverse problem, unlike units"]["oig-bp"], "lower",
            control=True, note="must fail: one factor does not choose the units",
        )
    )  # fmt: skip
    x, y = _tables(seed)["diabetes"]
    test = -cross_val_score(
        OIGRegressor(HIDDEN, algorithm="hwo", max_iter=30, generator=seed),
        x,
        y,
        cv=10,
        scoring="neg_mean_squared_error",
    ).mean()
    return Evidence(
        comparisons, _figure(errors), notes=f"On diabetes the tenfold test error is {test:.2f} of the target's variance {y.var():.2f}, after 30 steps."
    )  # fmt: skip


def _tables(seed: int) -> dict[str, Table]:
    from perturbkit.data import load_diabetes

    table = load_diabetes()
    rng = np.random.default_rng(seed)
    y = table.y.double().numpy()
    source = rng.normal(size=(800, 6))
    mixed = np.tanh(source @ rng.normal(size=(6, 6)) / 2) * 10 ** rng.uniform(-2, 2, 6)
    x, friedman = make_friedman1(1000, noise=0.5, random_state=seed % 2**31)
    return {
        "diabetes": (table.x.double().numpy(), (y - y.mean()) / y.std()),
        "Friedman's first": (x, (friedman - friedman.mean()) / friedman.std()),
        "inverse problem, unlike units": (mixed, source[:, 0]),
    }


def _fit(x: np.ndarray, y: np.ndarray, seed: int, algorithm: Any, gain: bool) -> OIGRegressor:
    return OIGRegressor(HIDDEN, algorithm=algorithm, input_gain=gain, max_iter=STEPS, generator=seed).fit(
        x, y
    )


def _marquardt(x: np.ndarray, y: np.ndarray, seed: int) -> float:
    """Return the error of Levenberg-Marquardt on all weights, from the same first ones, after as many Jacobians."""
    start = OIGRegressor(HIDDEN, max_iter=1, generator=seed).fit(x, y)
    inputs = np.column_stack([(x - x.mean(0)) / x.std(0), np.ones(len(x))])
    # The same function in standardised inputs.
    w = start.input_weights_[:, :-1] * x.std(0)
    w = np.column_stack([w, start.input_weights_[:, -1] + start.input_weights_[:, :-1] @ x.mean(0)])
    hidden = np.tanh(inputs @ w.T)
    out = np.linalg.lstsq(np.column_stack([inputs, hidden]), y, rcond=None)[0]
    n = w.size

    def residual(p: np.ndarray) -> np.ndarray:
        h = np.tanh(inputs @ p[:n].reshape(w.shape).T)
        return np.column_stack([inputs, h]) @ p[n:] - y

    def jacobian(p: np.ndarray) -> np.ndarray:
        h = np.tanh(inputs @ p[:n].reshape(w.shape).T)
        back = (1 - h**2) * p[n + inputs.shape[1] :]
        return np.column_stack([(back[:, :, None] * inputs[:, None]).reshape(len(inputs), -1), inputs, h])

    found = least_squares(residual, np.concatenate([w.ravel(), out]), jacobian, method="lm", max_nfev=STEPS)
    return float((found.fun**2).mean())


def _figure(errors: dict[str, dict[str, float]]) -> Figure:
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, 3), errors.items(), strict=True):
        axes.bar(list(found), list(found.values()), color=["tab:gray", "tab:blue", "tab:blue", "tab:orange"])
        axes.set_title(name, fontsize=9)
        axes.tick_params(axis="x", labelsize=7)
    figure.supylabel("training error", fontsize=9)
    return figure
