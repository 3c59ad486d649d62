"""Certificates by randomised smoothing against those of the Adversarial Robustness Toolbox, on as many noisy copies.

Both certify the same digits with the same noise level and draws; the mean certified radius is printed beside the time. The floor is
as many evaluations of the bare classifier in batches.
"""

from __future__ import annotations

import numpy as np
import torch
from benchmarks._timing import Row, compare, table
from torch import nn

from perturbkit.robust import randomized_smoothing

SIGMA, SELECTION, SAMPLES, IMAGES = 0.25, 100, 1000, 10


def main(rounds: int = 3) -> list[Row]:
    """Print the table and return its rows."""
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    from perturbkit.data import digits_classifier, load_digits8

    model = digits_classifier(8).module.requires_grad_(False)
    x = load_digits8("test").x[:IMAGES]
    theirs = PyTorchRandomizedSmoothing(
        model=model, loss=nn.CrossEntropyLoss(), input_shape=(1, 8, 8), nb_classes=10, clip_values=None,
        sample_size=SELECTION, scale=SIGMA, alpha=0.001, device_type="cpu",
    )  # fmt: skip
    found: dict[str, float] = {}

    def ours() -> None:
        certificate = randomized_smoothing(
            model, x, sigma=SIGMA, n_selection=SELECTION, n_samples=SAMPLES, generator=0
        )
        assert certificate.radius is not None
        found["ours"] = float(certificate.radius.mean())

    def peer() -> None:
        _, radius = theirs.certify(x.numpy(), n=SAMPLES)
        found["art"] = float(np.mean(radius))

    def floor() -> None:
        with torch.no_grad():
            for _ in range(IMAGES):
                model(x[:1].expand(SELECTION + SAMPLES, -1, -1, -1).contiguous())

    ours()
    peer()
    floor()
    rows = compare(
        ours, {f"smoothing, {IMAGES} digits, {SELECTION} + {SAMPLES} draws, ART": peer}, floor, rounds
    )
    print(table(rows))
    print(f"mean certified radius: {found['ours']:.4f}, ART's {found['art']:.4f}")
    return rows


if __name__ == "__main__":
    main()
