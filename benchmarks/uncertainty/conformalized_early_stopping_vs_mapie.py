"""Intervals around a network stopped early against MAPIE and crepes, which need rows of their own to stop on.

40 snapshots of one training run, which is the same for all and not timed. Ours chooses and calibrates on all 60 rows held
out; the others stop on one half of them and calibrate on the other, which is the three-way split. The coverage and mean
length of intervals of level 0.9 over 200 splits of other rows are printed; that all cover, and that the two others agree
on one split, is asserted. Timed is one split with 5,000 rows to predict, from the rows to the intervals. The floor is the
answers of all snapshots on these rows.

Ours is slower by far: it needs the answers of every snapshot on new rows, the others those of one, the chosen; and on top
of these each new row takes the envelope of the snapshots' losses, three quarters of the time here. It buys intervals that
are shorter from the same rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from benchmarks._timing import Call, Row, compare, table
from torch import nn

from perturbkit.core.random import seeded_init
from perturbkit.uncertainty import ConformalizedEarlyStopping, train_with_snapshots

ALPHA, HELD, SNAPSHOTS, SPLITS = 0.1, 60, 40, 200


def main(rounds: int = 7) -> list[Row]:
    """Print the table and return its rows."""
    from crepes import ConformalRegressor
    from mapie.regression import SplitConformalRegressor
    from sklearn.base import BaseEstimator, RegressorMixin

    class Snapshot(RegressorMixin, BaseEstimator):  # type: ignore[misc]
        """A module as scikit-learn would have it."""

        def __init__(self, net: nn.Module) -> None:
            self.net, self.fitted_ = net, True

        def fit(self, X: Any, y: Any) -> Snapshot:
            return self

        def predict(self, X: Any) -> np.ndarray:
            return self.net(torch.as_tensor(np.asarray(X, dtype=np.float32)))[:, 0].double().numpy()

    x, y = _rows(12_000)
    with seeded_init(0):
        net = nn.Sequential(nn.Linear(10, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))
    inputs, target = torch.from_numpy(x), torch.from_numpy(y).float()[:, None]
    snapshots = train_with_snapshots(
        net, inputs[:200], target[:200], loss=nn.functional.mse_loss, epochs=SNAPSHOTS * 3, every=3, generator=0
    )  # fmt: skip
    held, test = slice(200, 200 + HELD), slice(7000, 12_000)
    one, other = slice(200, 200 + HELD // 2), slice(200 + HELD // 2, 200 + HELD)

    def ours() -> np.ndarray:
        made = ConformalizedEarlyStopping(snapshots, task="regression", alpha=ALPHA)
        return made.fit(inputs[held], y[held]).predict_interval(inputs[test])

    def stopped() -> Snapshot:
        wrapped = [Snapshot(s) for s in snapshots]
        return min(wrapped, key=lambda s: float(np.square(s.predict(x[one]) - y[one]).mean()))

    def mapie() -> np.ndarray:
        made = SplitConformalRegressor(stopped(), confidence_level=1 - ALPHA, prefit=True)
        return made.conformalize(x[other], y[other]).predict_interval(x[test])[1][:, :, 0]

    def crepes() -> np.ndarray:
        chosen = stopped()
        made = ConformalRegressor().fit(y[other] - chosen.predict(x[other]))
        return made.predict_int(chosen.predict(x[test]), confidence=1 - ALPHA)

    def floor() -> None:
        for s in snapshots:
            s(inputs[held]), s(inputs[test])

    gap = float(np.abs(mapie() - crepes()).max())
    assert gap < 1e-6, f"MAPIE's and crepes' intervals differ by {gap:g}"
    found = np.stack([Snapshot(s).predict(x[200:]) for s in snapshots])
    _quality(found, y[200:], ConformalRegressor)
    ours()
    floor()
    peers: dict[str, Call] = {
        f"{HELD} rows held out, {SNAPSHOTS} snapshots, MAPIE": mapie,
        f"{HELD} rows held out, {SNAPSHOTS} snapshots, crepes": crepes,
    }
    rows = compare(ours, peers, floor, rounds)
    print(table(rows))
    return rows


def _rows(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 10)).astype(np.float32)
    return x, np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.5 * rng.normal(size=n)


def _quality(found: np.ndarray, y: np.ndarray, regressor: Any) -> None:
    """Print coverage and mean length of both ways over splits of the rows into held out and new."""
    rng = np.random.default_rng(0)
    cover: dict[str, list[float]] = {"ours": [], "three-way split": []}
    length: dict[str, list[float]] = {"ours": [], "three-way split": []}
    for _ in range(SPLITS):
        order = rng.permutation(len(y))[: HELD + 500]
        held, one, other, new = (
            order[:HELD],
            order[: HELD // 2],
            order[HELD // 2 : HELD],
            order[HELD:],
        )
        made = ConformalizedEarlyStopping(task="regression", alpha=ALPHA).fit(found[:, held], y[held])
        chosen = found[int(np.square(found[:, one] - y[one]).mean(1).argmin())]
        split = regressor().fit(y[other] - chosen[other]).predict_int(chosen[new], confidence=1 - ALPHA)
        for name, ends in (("ours", made.predict_interval(found[:, new])), ("three-way split", split)):
            cover[name].append(float(((ends[:, 0] <= y[new]) & (y[new] <= ends[:, 1])).mean()))
            length[name].append(float((ends[:, 1] - ends[:, 0]).mean()))
    for name in cover:
        mean = float(np.mean(cover[name]))
        print(f"  {name:<16} coverage {mean:.3f}, mean length {float(np.mean(length[name])):.3f}")
        assert mean > 1 - ALPHA - 0.02, f"{name} covers {mean:.3f}"


if __name__ == "__main__":
    main()
