"""Extremal perturbations on EfficientNet-lite0 at 224x224 against torchray, 20 steps of two areas.

The floor is the same number of gradients of the bare model. Run it with ``python -m
benchmarks.explain.extremal_perturbation_vs_torchray``; it takes about a minute. torchray (2019) is unmaintained, but its attributions run.
"""

from __future__ import annotations

import warnings

import torch
from benchmarks._timing import Row, compare, table

from perturbkit.core import Oracle
from perturbkit.explain import extremal_perturbation, smooth_mask

AREAS, STEPS = (0.05, 0.2), 20


def main(rounds: int = 3) -> list[Row]:
    """Print the table and return its rows."""
    from torchray.attribution.extremal_perturbation import MaskGenerator
    from torchray.attribution.extremal_perturbation import extremal_perturbation as theirs

    from perturbkit.data import image_model, load_photographs

    model = image_model().module.requires_grad_(False)
    x = load_photographs().x[:1]
    label = int(model(x).argmax(1))

    def ours(steps: int = STEPS) -> torch.Tensor:
        return extremal_perturbation(
            Oracle(model), x, label, areas=AREAS, max_iter=steps, growth=1.0035
        ).masks

    def torchray(steps: int = STEPS) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of meshgrid's indexing
            return theirs(model, x, label, areas=list(AREAS), max_iter=steps, jitter=False)[0]

    def floor() -> None:
        rows = x.repeat(len(AREAS), 1, 1, 1)
        for _ in range(STEPS):
            leaf = rows.detach().requires_grad_(True)
            torch.autograd.grad(model(leaf)[:, label].sum(), leaf)

    # The same smooth masks, but for their border and for the place of a parameter: the middle of its cell here, its corner there.
    drawn = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    mine, other = smooth_mask(drawn, 7, 21.0, (112, 112)), MaskGenerator((112, 112), 7, 21).generate(drawn)[0]
    gap = float((mine[..., 40:70, 40:70] - other[..., 37:67, 37:67]).abs().max())
    assert gap < 1e-4, f"the smooth masks differ by {gap:g}"
    ours(), floor()
    rows = compare(
        ours, {f"extremal perturbation, {len(AREAS)} areas, {STEPS} steps, torchray": torchray}, floor, rounds
    )
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
