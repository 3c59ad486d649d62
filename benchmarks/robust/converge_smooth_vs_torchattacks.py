"""One epoch of single-step adversarial training against a plain loop around torchattacks' FFGSM.

The small digits network at 28x28, 2000 rows in batches of 100, with and without the smoothing, which costs nothing. The
floor is two forward and backward passes a batch, one of them for the inputs alone. Run it with ``python -m
benchmarks.robust.converge_smooth_vs_torchattacks``; it takes a minute.
"""

from __future__ import annotations

from importlib import import_module

import torch
from benchmarks._timing import Row, compare, table
from torch.nn import functional

from perturbkit.robust import ConvergeSmooth, fast_adversarial_train

RADIUS = 0.2


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    from perturbkit.data import digits_classifier, load_digits28

    model = digits_classifier(28).module.requires_grad_(True)
    data = load_digits28("train").rows(range(2000))
    batches = list(zip(data.x.split(100), data.y.split(100), strict=True))
    attack = import_module("torchattacks").FFGSM(model, eps=RADIUS, alpha=1.25 * RADIUS)

    def ours(smooth: ConvergeSmooth | None = None) -> object:
        return fast_adversarial_train(
            model, data.x, data.y, RADIUS, epochs=1, smooth=smooth, lr=1e-6, batch_size=100, generator=0
        )

    def smoothed() -> object:
        return ours(ConvergeSmooth(stages=[0, 100]))

    def by_torchattacks() -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=5e-4)
        for x, y in batches:
            found = attack(x, y)
            optimizer.zero_grad()
            functional.cross_entropy(model(found), y).backward()
            optimizer.step()

    def floor() -> None:
        for x, y in batches:
            leaf = x.clone().requires_grad_(True)
            torch.autograd.grad(functional.cross_entropy(model(leaf), y), leaf)
            functional.cross_entropy(model(x), y).backward()

    rows = []
    with torch.random.fork_rng(devices=[]):
        for run, name in ((ours, "single step"), (smoothed, "single step, smoothed")):
            run(), by_torchattacks(), floor()
            rows += compare(run, {f"{name}, 2000 digits, torchattacks": by_torchattacks}, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
