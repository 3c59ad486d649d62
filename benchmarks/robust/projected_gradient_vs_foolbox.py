"""Projected gradient descent on EfficientNet-lite0 at 224x224 against torchattacks and foolbox.

All may make 20 steps in the largest-change norm: at 4/255, where the network soon falls, and at 1e-6, where it does not
and nothing can be spared. The floor is as many gradients and evaluations of the bare model as our attack made. The attack
must not be weaker than its peers, which is asserted. Run it with ``python -m
benchmarks.robust.projected_gradient_vs_foolbox``; it takes about three minutes.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
from benchmarks._timing import Call, Row, compare, table
from torch import Tensor
from torch.nn import functional

from perturbkit.core import AttackResult, Oracle, around
from perturbkit.robust import projected_gradient

STEPS = 20


def main(rounds: int = 3) -> list[Row]:
    """Print the table and return its rows."""
    import foolbox

    from perturbkit.data import image_model, load_photographs

    model = image_model().module.requires_grad_(False)
    x = load_photographs().x[:4]
    y = model(x).argmax(1)
    oracle = Oracle(model)
    chunk = next(oracle.chunks(len(x), like=x, gradient=True))
    bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    rows = []
    for eps, name in ((4 / 255, "4/255"), (1e-6, "1e-6")):

        def attack(eps: float = eps) -> AttackResult:
            return projected_gradient(oracle, x, y, around(x, "linf", eps), n_steps=STEPS, generator=0)

        def by_torchattacks(eps: float = eps) -> Tensor:
            return import_module("torchattacks").PGD(model, eps=eps, alpha=eps / 4, steps=STEPS)(x, y)

        def by_foolbox(eps: float = eps) -> Tensor:
            return foolbox.attacks.LinfPGD(steps=STEPS)(bounded, x, y, epsilons=eps)[1]

        with torch.random.fork_rng(devices=[]):
            found = attack()
            gradients, evaluations = found.cost.ngrad, found.cost.nfev - found.cost.ngrad

            def floor(gradients: int = gradients, evaluations: int = evaluations) -> None:
                for done in range(0, gradients, chunk):
                    points = x[: min(chunk, gradients - done)].clone().requires_grad_(True)
                    torch.autograd.grad(functional.cross_entropy(model(points), y[: len(points)]), points)
                with torch.no_grad():
                    for done in range(0, evaluations, chunk):
                        model(x[: min(chunk, evaluations - done)])

            peers: dict[str, Call] = {"foolbox": by_foolbox}
            if find_spec("torchattacks"):  # its wheel asks for torchvision, so no extra of ours brings it
                peers["torchattacks"] = by_torchattacks
            broken = {peer: int((model(run()).argmax(1) != y).sum()) for peer, run in peers.items()}
            assert int(found.success.sum()) >= max(broken.values()), (
                f"rows broken: ours {found.success}, {broken}"
            )
            floor()
            named = {f"linf {name}, {STEPS} steps, 4 images, {peer}": run for peer, run in peers.items()}
            rows += compare(attack, named, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
