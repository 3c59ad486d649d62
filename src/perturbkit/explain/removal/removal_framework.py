"""Removal-based explanations: how features are removed, what is watched, and how the subsets are summed up, chosen freely.

Use it to write down a known method as three choices, or to change one of them and see what it does. Covert, Lundberg and
Lee (2020), Feature Removal Is a Unifying Principle for Model Explanation Methods, arXiv:2011.03623.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perturbkit.core import Attribution, Cost, Oracle, checks, target_rows, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator
from perturbkit.explain.removal._behaviours import (
    Behaviour,
    DatasetLoss,
    MeanLabel,
    Output,
    Prediction,
    PredictionLoss,
)
from perturbkit.explain.removal._removals import (
    Blur,
    ConditionalGaussian,
    DefaultRemoval,
    MarginalRemoval,
    ProductMarginalRemoval,
    Removal,
    RetrainRemoval,
    SurrogateRemoval,
    TreePathRemoval,
    UniformRemoval,
)
from perturbkit.explain.removal._summaries import (
    Banzhaf,
    HighValueSubset,
    IncludeIndividual,
    LinearModel,
    LowValueSubset,
    MeanWhenIncluded,
    PartitionedSubsets,
    RemoveIndividual,
    Shapley,
    Summary,
)

__all__ = [
    "RBX_METHODS",
    "Banzhaf",
    "Blur",
    "ConditionalGaussian",
    "DatasetLoss",
    "DefaultRemoval",
    "HighValueSubset",
    "IncludeIndividual",
    "LinearModel",
    "LowValueSubset",
    "MarginalRemoval",
    "MeanLabel",
    "MeanWhenIncluded",
    "Output",
    "PartitionedSubsets",
    "Prediction",
    "PredictionLoss",
    "ProductMarginalRemoval",
    "RemovalExplainer",
    "RemoveIndividual",
    "RetrainRemoval",
    "Shapley",
    "SurrogateRemoval",
    "TreePathRemoval",
    "UniformRemoval",
]


@dataclass(frozen=True, eq=False)
class RemovalExplainer:
    """An explanation by removal, made of three choices.

    Attributes
    ----------
    removal : DefaultRemoval, MarginalRemoval, ConditionalGaussian, ...
        How the model acts with only some of the features.
    behaviour : Prediction, PredictionLoss, MeanLabel, DatasetLoss or Output
        What is watched.
    summary : RemoveIndividual, IncludeIndividual, Shapley, Banzhaf, MeanWhenIncluded, LinearModel or a subset search
        What is told of the values of all subsets.
    parts : Tensor of int, broadcastable to a row of x, optional
        The part of each element, counted from 0: superpixels or groups. By default every element is a part.

    Notes
    -----
    A removal ``F(x_S)``, a behaviour ``u(S)`` and a summary of the set function u. Random draws of a removal are made once
    and shared by all subsets, so that u is a function.

    Cost: a removal a subset and row: 2^d subsets up to 12 parts, else as many as the summary draws; times the size of the
    background. RetrainRemoval fits one model a subset.

    References
    ----------
    Covert, Lundberg and Lee (2020), arXiv:2011.03623; (2021), Explaining by Removing, arXiv:2011.14878.

    Examples
    --------
    >>> f = lambda x: x[:, 0] * x[:, 1] + x[:, 2]
    >>> explainer = RemovalExplainer(DefaultRemoval(0.0), Prediction(), Shapley())
    >>> explainer.attribute(f, torch.tensor([[2.0, 3.0, 1.0]])).values
    tensor([[3., 3., 1.]])
    """

    removal: Removal
    behaviour: Behaviour
    summary: Summary
    parts: Tensor | None = None

    def attribute(
        self,
        model: Oracle | nn.Module | Callable[[Tensor], Tensor] | None,
        x: Tensor,
        target: Tensor | int | None = None,
        *,
        y: Tensor | None = None,
        generator: Seed = None,
        progress: ProgressLike = False,
    ) -> Attribution:
        """Attribute what is watched to the parts of the input.

        Parameters
        ----------
        model : Oracle, nn.Module, callable or None
            Function of a batch, answering (n, outputs) or (n,): probabilities where a log loss is watched. None under a
            removal that brings its own model (trees, retrained, surrogate).
        x : Tensor, shape (n, ...)
            Inputs, floating point.
        target : Tensor of shape (n,), int or None
            The output explained, for Prediction.
        y : Tensor, shape (n,), optional
            Labels, for PredictionLoss and DatasetLoss: class indices, or numbers under the squared loss.
        generator : torch.Generator, int or None
            Source of the removal's draws and of the subsets.
        progress : Progress, bool or None
            Reports blocks of subsets.

        Returns
        -------
        Attribution
            ``values`` in the shape of ``x``, or (n, parts) where parts are given; one row where the data set is explained. ``extras["full"]`` and
            ``extras["empty"]``: the values u of all parts and of none, one a row.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an input or option is not allowed.
        """
        checks.tensor("x", x)
        for name, kind in (("removal", Removal), ("behaviour", Behaviour), ("summary", Summary)):
            if not isinstance(getattr(self, name), kind):
                raise checks.ArgumentTypeError(
                    f"{name} is {getattr(self, name)!r}; allowed: one of the framework's {name} objects. "
                    "Import it from perturbkit.explain."
                )
        behaviour, source = self.behaviour, as_generator(generator)
        rows = target_rows(target, x)
        if behaviour.labelled and (y is None or y.shape != x.shape[:1]):
            raise checks.ArgumentError(
                f"y is {None if y is None else tuple(y.shape)} under a loss against labels; allowed: one label a row, shape "
                f"({len(x)},). Pass y=."
            )
        numbers = self._numbers(x)
        d = int(numbers.max()) + 1
        oracle = self.removal.oracle(model)
        removal, before = self.removal.drawn(x, source), Cost() if oracle is None else oracle.cost
        with nullcontext() if oracle is None else oracle.frozen():
            whole = removal.answers(oracle, x, torch.ones_like(x[:1], dtype=torch.bool))[0]

            def u(masks: Tensor) -> Tensor:
                blocks = masks.to(x.device).split(4096)
                found = [
                    behaviour.watched(removal.answers(oracle, x, part[:, numbers]), whole, rows, y)
                    for part in track(blocks, "removal", progress=progress)
                ]
                values = torch.cat(found).double().cpu()
                return values.mean(1, keepdim=True) if behaviour.over_data else values

            scores = self.summary.scores(u, d, source)
            ends = u(torch.tensor([[False] * d, [True] * d]))
        spent = Cost() if oracle is None else oracle.cost - before
        choices = (self.removal, self.behaviour, self.summary)
        if self.parts is None:
            scores = scores.reshape(len(scores), *x.shape[1:])
        return Attribution(
            scores.to(x),
            None if behaviour.over_data else rows,
            spent,
            ", ".join(type(choice).__name__ for choice in choices),
            {"full": ends[1].to(x), "empty": ends[0].to(x)},
        )

    def _numbers(self, x: Tensor) -> Tensor:
        """Return the part of every element of a row."""
        if self.parts is None:
            return torch.arange(x[0].numel(), device=x.device).reshape(x.shape[1:])
        checks.tensor("parts", self.parts, floating=False)
        try:
            wide = self.parts.to(x.device).expand(x.shape[1:])
        except RuntimeError:
            wide = None
        if wide is None or wide.is_floating_point() or int(wide.min()) < 0:
            raise checks.ArgumentError(
                f"parts has shape {tuple(self.parts.shape)} and dtype {self.parts.dtype}; allowed: integers from 0 that "
                f"broadcast to a row of x, {tuple(x.shape[1:])}. Number the part of each element."
            )
        return wide


RBX_METHODS: dict[str, tuple[type[Removal], type[Behaviour], Summary]] = {
    "IME": (UniformRemoval, Prediction, Shapley()),
    "QII": (ProductMarginalRemoval, Prediction, Shapley()),
    "SHAP": (ConditionalGaussian, Prediction, Shapley()),
    "KernelSHAP": (MarginalRemoval, Prediction, Shapley(estimator="kernel")),
    "TreeSHAP": (TreePathRemoval, Prediction, Shapley()),
    "LossSHAP": (ConditionalGaussian, PredictionLoss, Shapley()),
    "SAGE": (ConditionalGaussian, DatasetLoss, Shapley()),
    "Shapley Net Effects": (RetrainRemoval, DatasetLoss, Shapley()),
    "SPVIM": (RetrainRemoval, DatasetLoss, Shapley(estimator="kernel")),
    "Shapley Effects": (ConditionalGaussian, Output, Shapley()),
    "Permutation Test": (MarginalRemoval, DatasetLoss, RemoveIndividual()),
    "Conditional Permutation Test": (ConditionalGaussian, DatasetLoss, RemoveIndividual()),
    "Feature Ablation": (RetrainRemoval, DatasetLoss, RemoveIndividual()),
    "Univariate Predictors": (RetrainRemoval, DatasetLoss, IncludeIndividual()),
    "L2X": (SurrogateRemoval, MeanLabel, HighValueSubset()),
    "REAL-X": (SurrogateRemoval, MeanLabel, HighValueSubset()),
    "INVASE": (SurrogateRemoval, MeanLabel, HighValueSubset()),
    "LIME": (ProductMarginalRemoval, Prediction, LinearModel()),
    "LIME for images": (DefaultRemoval, Prediction, LinearModel(ridge=1.0)),
    "PredDiff": (ConditionalGaussian, Prediction, RemoveIndividual()),
    "Occlusion": (DefaultRemoval, Prediction, RemoveIndividual()),
    "CXPlain": (DefaultRemoval, PredictionLoss, RemoveIndividual()),
    "RISE": (DefaultRemoval, Prediction, MeanWhenIncluded()),
    "MM": (DefaultRemoval, Prediction, PartitionedSubsets()),
    "MIR": (DefaultRemoval, Prediction, HighValueSubset()),
    "MP": (Blur, Prediction, LowValueSubset()),
    "EP": (Blur, Prediction, HighValueSubset()),
    "FIDO-CA": (ConditionalGaussian, Prediction, HighValueSubset()),
}
"""Known methods as points: the class of the removal and of the behaviour, and the summary. Where a method learns to
predict its answer (L2X, REAL-X, INVASE, CXPlain), the point computes it."""
