"""SOInter on 50 rows of the structured rule of its reproduction, trained, against captum's Lime on the target alone.

Lime asks the black box 512 times a row and fits a linear model to each; SOInter asks it during training alone, which is not timed here:
two rows a row of every batch. Its floor is one answer of the black box a row.
"""

from __future__ import annotations

import torch
from benchmarks._timing import Row, compare, table
from torch import Tensor

from perturbkit.core.random import randn
from perturbkit.explain import SOInter


def main(rounds: int = 3) -> list[Row]:
    """Print the table and return its rows."""
    from captum.attr import Lime

    g = torch.Generator().manual_seed(0)
    x, asked = randn((5000, 10), generator=g), randn((50, 10), generator=g)
    made = SOInter(_rule, 1, 3, n_steps=200, generator=g).fit(x)

    def theirs() -> object:
        with torch.random.fork_rng(devices=[]):
            lime = Lime(_rule)
            return [
                lime.attribute(row[None], target=1, n_samples=512, perturbations_per_eval=512)
                for row in asked
            ]

    def ours() -> object:
        return made.attribute(asked)

    def floor() -> None:
        _rule(asked)

    ours(), theirs(), floor()
    rows = compare(ours, {"SOInter, trained; captum Lime, 512 samples a row": theirs}, floor, rounds)
    print(table(rows))
    return rows


def _rule(x: Tensor) -> Tensor:
    first = (x[:, 0] * x[:, 1] > 0).to(x.dtype)
    return torch.stack((first, (x[:, 2] + 2 * first - 1 > 0).to(x.dtype)), 1)


if __name__ == "__main__":
    main()
