"""Occlusion on EfficientNet-lite0 at 224x224 against captum, at captum's default and at our chunk size.

The floor is the same number of evaluations of the bare model in our chunks. Run it with ``python -m
benchmarks.explain.occlusion_vs_captum``; it takes about a minute.
"""

from __future__ import annotations

import torch
from benchmarks._timing import Row, compare, table

from perturbkit.core import Oracle
from perturbkit.explain import occlusion

WINDOW, STRIDE = 32, 32


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    from captum.attr import Occlusion

    from perturbkit.data import image_model, load_photographs

    model = image_model().module.requires_grad_(False)
    x = load_photographs().x[:1]
    label = int(model(x).argmax(1))
    windows = (1 + (224 - WINDOW) // STRIDE) ** 2
    chunk = next(Oracle(model).chunks(windows, like=x))
    peer = Occlusion(model)

    def ours() -> torch.Tensor:
        return occlusion(Oracle(model), x, label, window=WINDOW, stride=STRIDE).values

    def captum(at_once: int) -> torch.Tensor:
        with torch.no_grad():
            return peer.attribute(
                x, (3, WINDOW, WINDOW), strides=(3, STRIDE, STRIDE), baselines=0.0, target=label,
                perturbations_per_eval=at_once,
            )  # fmt: skip

    def floor() -> None:
        with torch.no_grad():
            model(x)
            for start in range(0, windows, chunk):
                model(x.expand(min(chunk, windows - start), -1, -1, -1).contiguous())

    difference = float((ours() - captum(chunk)).abs().max() / ours().abs().max())
    assert difference < 1e-3, f"the attributions differ by {difference:g} of their maximum"
    peers = {
        f"occlusion, {windows} windows, captum default (one at a time)": lambda: captum(1),
        f"occlusion, {windows} windows, captum in chunks of {chunk}": lambda: captum(chunk),
    }
    floor()
    rows = compare(ours, peers, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
