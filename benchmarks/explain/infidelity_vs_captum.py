"""Infidelity of one explanation on EfficientNet-lite0 at 224x224 against captum, on as many perturbations.

The floor is the same number of evaluations of the bare model in our chunks.
"""

from __future__ import annotations

import torch
from benchmarks._timing import Row, compare, table

from perturbkit.core import Oracle
from perturbkit.core.perturbation import Gaussian
from perturbkit.explain import infidelity

SAMPLES = 24


def main(rounds: int = 3) -> list[Row]:
    """Print the table and return its rows."""
    from captum.metrics import infidelity as by_captum

    from perturbkit.data import image_model, load_photographs

    model = image_model().module.requires_grad_(False)
    x = load_photographs().x[:1]
    label = int(model(x).argmax(1))
    scores = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    chunk = next(Oracle(model).chunks(SAMPLES, like=x))

    def ours() -> object:
        return infidelity(
            Oracle(model), x, scores, label, perturbation=Gaussian(0.05), n_samples=SAMPLES, generator=0
        )

    def noise(given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = 0.05 * torch.randn(given.shape)
        return drawn, given - drawn

    def theirs(batch: int | None) -> object:
        return by_captum(
            model, noise, x, scores, target=label, n_perturb_samples=SAMPLES, max_examples_per_batch=batch
        )

    def floor() -> None:
        with torch.no_grad():
            for start in range(0, SAMPLES + 1, chunk):
                model(x.expand(min(chunk, SAMPLES + 1 - start), -1, -1, -1).contiguous())

    ours(), floor()
    peers = {
        f"infidelity, {SAMPLES} draws, captum default": lambda: theirs(None),
        f"infidelity, {SAMPLES} draws, captum in chunks of {chunk}": lambda: theirs(chunk),
    }
    rows = compare(ours, peers, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
