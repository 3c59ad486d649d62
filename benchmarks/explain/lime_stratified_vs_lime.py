"""Stratified LIME against the lime package on EfficientNet-lite0 at 224x224: 49 squares, 100 masked images.

The floor is as many evaluations of the bare model in our chunks.
"""

from __future__ import annotations

import numpy as np
import torch
from benchmarks._timing import Row, compare, table
from torch import nn

from perturbkit.core import Oracle
from perturbkit.explain import lime_stratified

SIDE, SAMPLES = 32, 100


def main(rounds: int = 3) -> list[Row]:
    """Print the table and return its rows."""
    from lime.lime_image import LimeImageExplainer

    from perturbkit.data import image_model, load_photographs

    model = nn.Sequential(image_model().module.requires_grad_(False), nn.Softmax(1)).eval()
    x = load_photographs().x[:1]
    label = int(model(x).argmax(1))
    line = torch.arange(224) // SIDE
    parts = line[:, None] * 7 + line
    chunk = next(Oracle(model).chunks(SAMPLES, like=x))
    image = x[0].permute(1, 2, 0).double().numpy()

    def ours() -> torch.Tensor:
        return lime_stratified(
            Oracle(model), x, label, segments=parts, n_samples=SAMPLES, hide=0.0, generator=0
        ).values

    def predict(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(np.asarray(batch)).float().permute(0, 3, 1, 2)).numpy()

    def theirs() -> object:
        return LimeImageExplainer(random_state=0).explain_instance(
            image, predict, labels=(label,), top_labels=None, hide_color=0, num_samples=SAMPLES, batch_size=chunk,
            segmentation_fn=lambda _: parts.numpy(),
        )  # fmt: skip

    def floor() -> None:
        with torch.no_grad():
            for start in range(0, SAMPLES, chunk):
                model(x.expand(min(chunk, SAMPLES - start), -1, -1, -1).contiguous())

    ours(), theirs(), floor()
    rows = compare(ours, {f"LIME, {SAMPLES} masked images, the lime package": theirs}, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
