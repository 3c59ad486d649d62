"""Temperature scaling against scikit-learn's, where it has one, else its sigmoid calibration, on the same logits.

The floor is one evaluation of the likelihood of all rows; a scalar minimisation needs a few dozen.
"""

from __future__ import annotations

import numpy as np
import torch
from benchmarks._timing import Row, compare, table

from perturbkit.uncertainty import TemperatureScaling


def main(rounds: int = 9) -> list[Row]:
    """Print the table and return its rows."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x = rng.normal(size=(5000, 20))
    y = (x @ rng.normal(size=(20, 10)) + 3 * rng.gumbel(size=(5000, 10))).argmax(1)
    fitted = LogisticRegression(C=100.0, max_iter=300).fit(x[:500], y[:500])
    logits = torch.from_numpy(fitted.decision_function(x[500:]))
    labels = torch.from_numpy(y[500:])

    def ours() -> object:
        return TemperatureScaling().fit(logits, labels)

    def theirs() -> object:
        try:
            return CalibratedClassifierCV(FrozenEstimator(fitted), method="temperature").fit(x[500:], y[500:])
        except ValueError:
            return CalibratedClassifierCV(FrozenEstimator(fitted), method="sigmoid").fit(x[500:], y[500:])

    def floor() -> None:
        torch.nn.functional.cross_entropy(logits, labels)

    ours(), theirs(), floor()
    rows = compare(ours, {"temperature scaling, 4,500 rows, scikit-learn": theirs}, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
