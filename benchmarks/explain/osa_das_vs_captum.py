"""OSA-DAS on the digits network against captum's occlusion with the same window.

OSA-DAS evaluates every window under each of its augmentations, so its floor, and its price, is that many times occlusion's.
"""

from __future__ import annotations

import torch
from benchmarks._timing import Row, compare, table

from perturbkit.core import Oracle
from perturbkit.explain import osa_das

AUGMENTATIONS = 8


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    from captum.attr import Occlusion

    from perturbkit.data import digits_classifier, load_digits28

    model = digits_classifier(28).module.requires_grad_(False)
    x = load_digits28("test").x[:1]
    label = int(model(x).argmax(1))
    places = (28 - 4) // 2 + 1
    peer = Occlusion(model)

    def ours() -> object:
        return osa_das(
            Oracle(model), x, window=4, stride=2, n_augment=AUGMENTATIONS, subspace_dim=4, generator=0
        )

    def theirs() -> object:
        return peer.attribute(x, (1, 4, 4), strides=(1, 2, 2), target=label, perturbations_per_eval=64)

    def floor() -> None:
        with torch.no_grad():
            model(x.expand((places**2 + 1) * AUGMENTATIONS, -1, -1, -1))

    ours(), theirs(), floor()
    rows = compare(ours, {f"OSA-DAS, {places**2} windows, captum occlusion": theirs}, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
