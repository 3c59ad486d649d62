"""Projected gradient descent on EfficientNet-lite0 at 224x224 against torchattacks and foolbox.

All make 20 steps in the largest-change norm at 4/255; the floor is the same number of gradients and evaluations of the bare
model in our chunks. The attack must not be weaker than its peers, which is asserted. Run it with ``python -m
benchmarks.robust.projected_gradient_vs_foolbox``; it takes about two minutes.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
from benchmarks._timing import Row, compare, table
from torch.nn import functional

from perturbkit.core import Oracle, around
from perturbkit.robust import projected_gradient

STEPS = 20
EPS = 4 / 255


def main(rounds: int = 4) -> list[Row]:
    """Print the table and return its rows."""
    import foolbox

    from perturbkit.data import image_model, load_photographs

    model = image_model().module.requires_grad_(False)
    x = load_photographs().x[:4]
    y = model(x).argmax(1)
    chunk = next(Oracle(model).chunks(len(x), like=x, gradient=True))
    bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")

    def ours() -> torch.Tensor:
        return projected_gradient(Oracle(model), x, y, around(x, "linf", EPS), n_steps=STEPS, generator=0).x

    def by_foolbox() -> torch.Tensor:
        return foolbox.attacks.LinfPGD(steps=STEPS)(bounded, x, y, epsilons=EPS)[1]

    def floor() -> None:
        for part, label in zip(x.split(chunk), y.split(chunk), strict=True):
            for _ in range(STEPS):
                points = part.clone().requires_grad_(True)
                torch.autograd.grad(functional.cross_entropy(model(points), label), points)
            with torch.no_grad():
                model(part), model(part)

    peers = {"foolbox": by_foolbox}
    if find_spec("torchattacks"):  # its wheel asks for torchvision, so no extra of ours brings it
        torchattacks = import_module("torchattacks")
        peers["torchattacks"] = lambda: torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=STEPS)(x, y)
    with torch.random.fork_rng(devices=[]):
        broken = {
            name: int((model(run()).argmax(1) != y).sum()) for name, run in {"ours": ours, **peers}.items()
        }
        assert broken["ours"] >= max(broken.values()), f"rows broken: {broken}"
        floor()
        named = {f"linf attack, {STEPS} steps, 4 images, {name}": run for name, run in peers.items()}
        rows = compare(ours, named, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
