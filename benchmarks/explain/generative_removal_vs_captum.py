"""Occlusion and LIME by inpainting on EfficientNet-lite0 at 224x224 against captum, with a constant as inpainter on both sides.

A constant makes the maps the same, so that what is timed is the way there; a real inpainter adds its own time a mask. The floor is as
many evaluations of the bare model in our chunks. Run it with ``python -m benchmarks.explain.generative_removal_vs_captum``; it takes
about a minute.
"""

from __future__ import annotations

import torch
from benchmarks._timing import Row, compare, table
from torch import Tensor, nn

from perturbkit.core import Oracle
from perturbkit.core.random import seeded_init
from perturbkit.explain import GenerativeRemoval

WINDOW, SAMPLES = 32, 49


def main(rounds: int = 3) -> list[Row]:
    """Print the table and return its rows."""
    from captum._utils.models.linear_model import SkLearnRidge
    from captum.attr import Lime, Occlusion

    from perturbkit.data import image_model, load_photographs

    network = image_model().module.requires_grad_(False)
    model = nn.Sequential(network, nn.Softmax(1)).eval()
    x = load_photographs().x[:1]
    label = int(model(x).argmax(1))
    line = torch.arange(224) // WINDOW
    parts = line[:, None] * 7 + line
    chunk = next(Oracle(model).chunks(SAMPLES, like=x))

    def black(images: Tensor, masks: Tensor) -> Tensor:
        return torch.zeros_like(images)

    def patches() -> Tensor:
        return GenerativeRemoval(black, window=WINDOW).attribute(Oracle(model), x, label).values

    def lime() -> Tensor:
        made = GenerativeRemoval(black, "lime", segments=parts, n_samples=SAMPLES)
        return made.attribute(Oracle(model), x, label, generator=0).values

    def captum_patches() -> Tensor:
        with torch.no_grad():
            return Occlusion(model).attribute(
                x, (3, WINDOW, WINDOW), strides=(3, WINDOW, WINDOW), baselines=0.0, target=label, perturbations_per_eval=chunk
            )  # fmt: skip

    def captum_lime() -> Tensor:
        with seeded_init(0):
            return Lime(model, interpretable_model=SkLearnRidge(alpha=1.0)).attribute(
                x, target=label, feature_mask=parts[None, None], n_samples=SAMPLES, baselines=0.0, perturbations_per_eval=chunk
            )  # fmt: skip

    def floor() -> None:
        with torch.no_grad():
            for start in range(0, SAMPLES, chunk):
                model(x.expand(min(chunk, SAMPLES - start), -1, -1, -1).contiguous())

    difference = float((patches() - captum_patches()).abs().max() / patches().abs().max())
    assert difference < 1e-3, f"the attributions differ by {difference:g} of their maximum"
    floor()
    rows = compare(
        patches, {f"SP-G, constant, {SAMPLES} patches, captum Occlusion": captum_patches}, floor, rounds
    )
    rows += compare(lime, {f"LIME-G, constant, {SAMPLES} masks, captum Lime": captum_lime}, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
