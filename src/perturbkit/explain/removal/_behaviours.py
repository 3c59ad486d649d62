"""The behaviours of the framework: which number is watched as features are removed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from perturbkit.core import checks

Loss = Literal["log", "squared"]


class Behaviour(ABC):
    """What a behaviour is: one number for each subset and row, from the outputs (m, n, k) and the whole ones (n, k)."""

    over_data: bool = False
    labelled: bool = False

    @abstractmethod
    def watched(self, out: Tensor, whole: Tensor, target: Tensor | None, y: Tensor | None) -> Tensor:
        """Return the numbers, shape (m, n)."""


@dataclass(frozen=True)
class Prediction(Behaviour):
    """The output of the target, or the only one: ``u(S) = F(x_S)``.

    Parameters
    ----------
    None
    """

    def watched(self, out: Tensor, whole: Tensor, target: Tensor | None, y: Tensor | None) -> Tensor:
        if target is None and out.shape[2] == 1:
            return out[:, :, 0]
        if target is None or int(target.max()) >= out.shape[2]:
            raise checks.ArgumentError(
                f"target is {None if target is None else int(target.max())}, but there are {out.shape[2]} outputs; "
                f"allowed: 0..{out.shape[2] - 1}. Pass the index of an output for each row."
            )
        return out[:, torch.arange(out.shape[1], device=out.device), target]


@dataclass(frozen=True)
class PredictionLoss(Behaviour):
    """The loss against the label, negated: ``u(S) = -l(F(x_S), y)``.

    Attributes
    ----------
    loss : {"log", "squared"}
        Of probabilities and a class, or of a number and a number.
    """

    loss: Loss = "log"
    labelled = True

    def watched(self, out: Tensor, whole: Tensor, target: Tensor | None, y: Tensor | None) -> Tensor:
        assert y is not None
        return _negated_loss(out, _as_output(y, out, self.loss), self.loss)


@dataclass(frozen=True)
class MeanLabel(Behaviour):
    """The loss against a label drawn from the whole output, negated and averaged: ``u(S) = -E_{y ~ F(x)} l(F(x_S), y)``.

    Attributes
    ----------
    loss : {"log", "squared"}
        As in PredictionLoss; with "squared" the label is the whole output.
    """

    loss: Loss = "log"

    def watched(self, out: Tensor, whole: Tensor, target: Tensor | None, y: Tensor | None) -> Tensor:
        return _negated_loss(out, whole, self.loss)


@dataclass(frozen=True)
class DatasetLoss(PredictionLoss):
    """The mean of ``-l(F(x_S), y)`` over all rows: one explanation of the model, not of a row.

    Attributes
    ----------
    loss : {"log", "squared"}
        As in PredictionLoss.
    """

    over_data = True


@dataclass(frozen=True)
class Output(MeanLabel):
    """The mean over all rows of the negated loss against the whole output: which features the model uses.

    Attributes
    ----------
    loss : {"log", "squared"}
        As in PredictionLoss; with "squared", minus the variance that removal leaves unexplained.
    """

    over_data = True


def _as_output(y: Tensor, out: Tensor, loss: str) -> Tensor:
    if loss == "squared":
        return y[:, None].to(out)
    return nn.functional.one_hot(checks.labels("y", y, n_classes=out.shape[2]), out.shape[2]).to(out)


def _negated_loss(out: Tensor, wanted: Tensor, loss: str) -> Tensor:
    if checks.one_of("loss", loss, ("log", "squared")) == "squared":
        return -(out - wanted).square().sum(2)
    if out.shape[2] < 2 or bool((out < 0).any()):
        raise checks.ArgumentError(
            f"the model's outputs reach {float(out.min()):.4g} in {out.shape[2]} columns; allowed: probabilities of two "
            "classes or more under the log loss. Apply a softmax, or use loss='squared'."
        )
    return (wanted * out.clamp(min=torch.finfo(out.dtype).tiny).log()).sum(2)
