"""Block coordinate descent against scikit-learn's multilayer perceptron: time and accuracy on digits, the same layers.

The floor is one full pass of gradients a sweep, the least that a method of full batches could do. Ours solves least squares in every
layer instead; peers take many small steps. Ours is the slower and, on digits, the less accurate: its claim is training without gradients or
a learning rate, not speed.
"""

from __future__ import annotations

import warnings
from itertools import pairwise

import torch
from benchmarks._timing import Row, compare, table
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch import nn

from perturbkit.core.random import seeded_init
from perturbkit.data import load_digits8
from perturbkit.optim import BCDClassifier

_SWEEPS = 50


def main(rounds: int = 3) -> list[Row]:
    """Print the table and return its rows."""
    train, test = load_digits8("train"), load_digits8("test")
    x, y, held, answer = train.x.flatten(1), train.y, test.x.flatten(1), test.y
    rows: list[Row] = []
    warnings.simplefilter("ignore", ConvergenceWarning)
    for hidden in ((64, 64, 64), (64,) * 10):
        with seeded_init(0):
            sizes = [64, *hidden]
            layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
            net = nn.Sequential(*layers, nn.Linear(64, 10))

        def adam(hidden: tuple[int, ...] = hidden) -> MLPClassifier:
            return MLPClassifier(hidden, max_iter=_SWEEPS, random_state=0).fit(x.numpy(), y.numpy())

        def gradients(net: nn.Module = net) -> None:
            for _ in range(_SWEEPS):
                nn.functional.cross_entropy(net(x), y).backward()

        right = {"scikit-learn": adam().score(held.numpy(), answer.numpy())}
        for splitting in ("three", "two"):

            def ours(hidden: tuple[int, ...] = hidden, splitting: str = splitting) -> BCDClassifier:
                made = BCDClassifier(hidden, splitting=splitting, prox=0.1, max_iter=_SWEEPS, generator=0)
                return made.fit(x, y)

            name = f"{len(hidden)} layers of 64, {splitting} splittings, {_SWEEPS} sweeps, sklearn's Adam"
            rows += compare(ours, {name: adam}, gradients, rounds)
            found = torch.as_tensor(ours().predict(held)) == answer
            right[f"{splitting} splittings"] = float(found.double().mean())
        print(f"{len(hidden)} layers: accuracy " + ", ".join(f"{v:.3f} ({k})" for k, v in right.items()))
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
