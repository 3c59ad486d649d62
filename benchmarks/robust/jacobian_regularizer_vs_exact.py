"""One step with the Jacobian penalty against the exact Jacobian by ``torch.func``, and the authors' code where it is there.

A network of the size of LeNet on 28x28 digits, batches of 100, ten classes: forward, penalty, backward. The floor is the
same step without the penalty. The authors' code is not on PyPI by itself; the package ``cebra`` carries it. Exact and
exact, one draw and one draw must agree, which is asserted. Run it with ``python -m
benchmarks.robust.jacobian_regularizer_vs_exact``; it takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
from benchmarks._timing import Call, Row, compare, table
from torch import Tensor
from torch.nn import functional

from perturbkit.robust import JacobianRegularizer

WEIGHT = 0.01


def main(rounds: int = 8) -> list[Row]:
    """Print the table and return its rows."""
    from perturbkit.data import digits_classifier, load_digits28

    model = digits_classifier(28).module
    data = load_digits28("train").rows(range(100))
    x, y = data.x, data.y

    def step(loss: Tensor) -> Tensor:
        model.zero_grad()
        loss.backward()
        return loss.detach()

    def ours(n_projections: int | None) -> Tensor:
        return step(JacobianRegularizer(n_projections, weight=WEIGHT, generator=0).loss(model, x, y))

    def by_func() -> Tensor:
        jacobian = torch.func.vmap(torch.func.jacrev(lambda row: model(row[None])[0]))(x)
        penalty = 0.5 * jacobian.square().flatten(1).sum(1).mean()
        return step(functional.cross_entropy(model(x), y) + WEIGHT * penalty)

    def by_authors(n: int) -> Tensor:
        penalty = import_module("cebra.models.jacobian_regularizer").JacobianReg(n=n)
        leaf = x.clone().requires_grad_(True)
        logits = model(leaf)
        return step(functional.cross_entropy(logits, y) + WEIGHT * penalty(leaf, logits))

    def floor() -> Tensor:
        return step(functional.cross_entropy(model(x), y))

    rows = []
    for n_projections, name in ((1, "one projection"), (None, "exact")):
        peers: dict[str, Call] = {f"{name} against torch.func.jacrev, exact": by_func}
        if find_spec("cebra"):

            def authors(n: int = n_projections or -1) -> Tensor:
                return by_authors(n)

            peers[f"{name} against the authors' {name}"] = authors

        def run(n_projections: int | None = n_projections) -> Tensor:
            return ours(n_projections)

        with torch.random.fork_rng(devices=[]):
            run(), floor()
            for peer in peers.values():
                wanted = float(peer())
                if n_projections is None:
                    assert abs(float(run()) - wanted) < 1e-4 * wanted, (float(run()), wanted)
            rows += compare(run, peers, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
