"""Integrated gradients on EfficientNet-lite0 at 224x224 against captum, at captum's default and at our chunk size.

The floor is the same number of gradients and evaluations of the bare model in our chunks. Both libraries spend their time in
the model, so the limit of the ratio is that of the chunk sizes. Our result always says by how much the attributions miss
completeness, which takes two evaluations more than the gradients; captum makes them where it is asked for its delta. Run it with ``python -m
benchmarks.explain.integrated_gradients_vs_captum``; it takes about a minute.
"""

from __future__ import annotations

import torch
from benchmarks._timing import Row, compare, table

from perturbkit.core import Oracle
from perturbkit.explain import integrated_gradients

STEPS = 20


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    from captum.attr import IntegratedGradients

    from perturbkit.data import image_model, load_photographs

    model = image_model().module.requires_grad_(False)
    x = load_photographs().x[:1]
    label = int(model(x).argmax(1))
    chunk = next(Oracle(model).chunks(STEPS, like=x, gradient=True))
    peer = IntegratedGradients(model)

    def ours() -> torch.Tensor:
        return integrated_gradients(Oracle(model), x, label, n_steps=STEPS).values

    def captum(batch: int | None, *, delta: bool = False) -> torch.Tensor:
        answer = peer.attribute(
            x,
            torch.zeros_like(x),
            target=label,
            n_steps=STEPS,
            method="gausslegendre",
            internal_batch_size=batch,
            return_convergence_delta=delta,
        )
        return answer[0] if delta else answer

    def floor() -> None:
        with torch.no_grad():
            model(x), model(torch.zeros_like(x))
        for start in range(0, STEPS, chunk):
            points = x.expand(min(chunk, STEPS - start), -1, -1, -1).clone().requires_grad_(True)
            torch.autograd.grad(model(points)[:, label].sum(), points)

    difference = float((ours() - captum(chunk)).abs().max() / ours().abs().max())
    assert difference < 1e-3, f"the attributions differ by {difference:g} of their maximum"
    peers = {
        f"integrated gradients, {STEPS} steps, captum default": lambda: captum(None),
        f"integrated gradients, {STEPS} steps, captum in chunks of {chunk}": lambda: captum(chunk),
        "the same with captum's delta: equal evaluations": lambda: captum(chunk, delta=True),
    }
    floor()
    rows = compare(ours, peers, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
