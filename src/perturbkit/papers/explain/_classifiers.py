"""Two small classifiers with their test inputs, for the metrics: digits of 8x8 pixels and breast cancer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perturbkit.core import Distribution, Oracle
from perturbkit.explain import NoisyBaseline, SquareRemoval


@dataclass(frozen=True)
class Case:
    """A classifier's probabilities, inputs, predicted classes, perturbations that mean something, and the range of a feature."""

    name: str
    oracle: Oracle
    x: Tensor
    label: Tensor
    perturbation: Distribution
    spread: float


def cases(n: int) -> list[Case]:
    """Return both, with ``n`` test inputs each; the table is standardised, so that zero is the mean."""
    from perturbkit.data import digits_classifier, load_breast_cancer, load_digits8, tabular_model

    image, table = digits_classifier(8).module, tabular_model().module
    standardise, network = table[0], table[1:]  # type: ignore[index]
    with torch.no_grad():
        inputs: dict[str, tuple[nn.Module, Tensor, Distribution]] = {
            "digits": (image, load_digits8("test").x[:n], SquareRemoval((1, 4))),
            "breast cancer": (
                network,
                standardise(load_breast_cancer("test").x[:n]),
                NoisyBaseline(0.0, 0.5),
            ),
        }
    made = []
    for name, (module, x, perturbation) in inputs.items():
        oracle = Oracle(nn.Sequential(module, nn.Softmax(1)))
        spread = float((x.amax(0) - x.amin(0)).median()) if name != "digits" else 1.0
        made.append(Case(name, oracle, x, oracle(x).argmax(1), perturbation, spread))
    return made
