"""LIME by layer masking on EfficientNet-lite0 at 224x224 against captum's Lime with a black fill, on 49 squares.

No package masks layers, so the peer is what a user would run instead: the same number of images, filled. The floor is as many
evaluations of the bare model in our chunks; our ratio to it is what masking every layer costs. Run it with ``python -m
benchmarks.explain.layer_masking_vs_captum``; it takes about a minute.
"""

from __future__ import annotations

import torch
from benchmarks._timing import Row, compare, table
from torch import nn

from perturbkit.core import Oracle
from perturbkit.core.random import seeded_init
from perturbkit.explain import LayerMasked, layer_masking

SIDE, SAMPLES = 32, 40


def main(rounds: int = 3) -> list[Row]:
    """Print the table and return its rows."""
    from captum._utils.models.linear_model import SkLearnRidge
    from captum.attr import Lime

    from perturbkit.data import image_model, load_photographs

    network = image_model().module.requires_grad_(False)
    model = nn.Sequential(network, nn.Softmax(1)).eval()
    x = load_photographs().x[:1]
    label = int(model(x).argmax(1))
    line = torch.arange(224) // SIDE
    parts = line[:, None] * 7 + line
    chunk = next(Oracle(model).chunks(SAMPLES, like=x))
    peer = Lime(model, interpretable_model=SkLearnRidge(alpha=1.0))

    def ours() -> torch.Tensor:
        return layer_masking(Oracle(model), x, label, segments=parts, n_samples=SAMPLES, generator=0).values

    def captum(at_once: int) -> torch.Tensor:
        with seeded_init(0):
            return peer.attribute(
                x, target=label, feature_mask=parts[None, None], n_samples=SAMPLES, baselines=0.0, perturbations_per_eval=at_once
            )  # fmt: skip

    def floor() -> None:
        with torch.no_grad():
            for start in range(0, SAMPLES, chunk):
                model(x.expand(min(chunk, SAMPLES - start), -1, -1, -1).contiguous())

    with torch.no_grad():
        gap = float((LayerMasked(model)(x, torch.ones(1, 1, 224, 224)) - model(x)).abs().max())
    assert gap < 1e-5, f"a mask of ones changes the probabilities by {gap:g}"
    peers = {
        f"layer masking, {SAMPLES} masks, captum Lime default (one at a time)": lambda: captum(1),
        f"layer masking, {SAMPLES} masks, captum Lime in chunks of {chunk}": lambda: captum(chunk),
    }
    ours(), floor()
    rows = compare(ours, peers, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
