"""Split conformal intervals around a fitted regressor against MAPIE's, on the same rows.

The floor is the regressor's own answers on calibration and test rows.
"""

from __future__ import annotations

import numpy as np
from benchmarks._timing import Row, compare, table

from perturbkit.uncertainty import SplitConformalRegressor


def main(rounds: int = 9) -> list[Row]:
    """Print the table and return its rows."""
    from mapie.regression import SplitConformalRegressor as Theirs
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    x = rng.normal(size=(30_000, 20))
    y = x @ rng.normal(size=20) + rng.normal(size=30_000)
    fitted = Ridge().fit(x[:10_000], y[:10_000])
    cal, test = slice(10_000, 20_000), slice(20_000, 30_000)

    def ours() -> np.ndarray:
        return np.asarray(
            SplitConformalRegressor(fitted, alpha=0.1).fit(x[cal], y[cal]).predict_interval(x[test])
        )

    def theirs() -> np.ndarray:
        made = Theirs(fitted, confidence_level=0.9, prefit=True).conformalize(x[cal], y[cal])
        return made.predict_interval(x[test])[1][:, :, 0]

    def floor() -> None:
        fitted.predict(x[cal]), fitted.predict(x[test])

    gap = float(np.abs(ours() - theirs()).max())
    assert gap < 1e-9, f"the intervals differ by {gap:g}"
    floor()
    rows = compare(ours, {"split conformal, 10,000 and 10,000 rows, MAPIE": theirs}, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
