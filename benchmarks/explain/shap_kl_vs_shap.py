"""SHAP-KL on 60 digits cut into 10 strips, all 1024 subsets, against shap's KernelExplainer on one class with as many.

Both ask the same surrogate, so that the floor is its answers. KernelExplainer takes a row at a time; it explains a class, SHAP-KL all
of them at once. FastSHAP-KL answers in one forward pass after training. The limit is the 2^n subsets.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from benchmarks._timing import Row, compare, table
from torch import Tensor

from perturbkit.core import all_masks
from perturbkit.explain import MaskedPredictor, shap_kl

_ROWS, _PARTS = 60, 10


def main(rounds: int = 3) -> list[Row]:
    """Print the table and return its rows."""
    import shap

    from perturbkit.data import load_digits8

    train, test = load_digits8("train"), load_digits8("test")
    parts = (torch.arange(64) * _PARTS // 64).reshape(8, 8)
    surrogate = MaskedPredictor(epochs=10, parts=parts, generator=0).fit(train.x, train.y)
    x = test.x[:_ROWS]
    masks = all_masks(_PARTS)

    def asked(rows: Tensor, keep: Tensor) -> Tensor:
        wide = keep[:, parts][:, None].to(rows.dtype)
        return surrogate(rows * wide, wide)

    def ours() -> object:
        return shap_kl(surrogate, x, parts=parts)

    def theirs() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for row in x:

                def log_probability(z: np.ndarray, row: Tensor = row) -> np.ndarray:
                    keep = torch.from_numpy(z)
                    with torch.no_grad():
                        return asked(row.expand(len(z), -1, -1, -1), keep)[:, 0].log().numpy()

                explainer = shap.KernelExplainer(log_probability, np.zeros((1, _PARTS)), silent=True)
                explainer.shap_values(np.ones((1, _PARTS)), nsamples=1024, silent=True)
        return None

    def floor() -> None:
        with torch.no_grad():
            for row in x:
                asked(row.expand(len(masks), -1, -1, -1), masks)

    ours(), theirs(), floor()
    rows = compare(ours, {"SHAP-KL, 1024 subsets; shap KernelExplainer": theirs}, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
