"""Forward-forward training whose layers know what the others already tell apart, without a backward pass through them.

Use it where gradients cannot be sent back through the layers. Lorberbom, Gat, Adi, Schwing and Hazan (2023), Layer
Collaboration in the Forward-Forward Algorithm, arXiv:2305.12393.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from perturbkit.core import Result, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randint, randn, randperm

__all__ = [
    "ForwardForwardClassifier",
    "InformationFlow",
    "functional_entropy",
    "information_flow",
    "layer_goodness",
]


@dataclass(frozen=True, eq=False)
class InformationFlow(Result):
    """What each layer adds.

    Attributes
    ----------
    accuracy : Tensor, shape (layers,)
        Of the classifier that uses the goodness of the layers up to this one.
    entropy : Tensor, shape (layers,)
        Mean functional entropy of the layer's goodness over the labels.
    """

    accuracy: Tensor
    entropy: Tensor


class ForwardForwardClassifier(ClassifierMixin, BaseEstimator):
    r"""A network that is trained layer by layer to have a high goodness for right labels and a low one for wrong ones.

    Parameters
    ----------
    hidden : sequence of int
        Units of each layer, at least 1.
    threshold : float
        Goodness of a layer at which both answers are as likely, above 0.
    collaborate : bool
        The chance of a layer counts the goodness of all layers; otherwise its own only (Hinton's algorithm).
    label_scale : float
        Value of the input that is the label's, above 0, in units of standardised inputs' root mean square.
    skip_first : bool
        Leave the first layer's goodness out of the prediction.
    epochs, batch_size : int
        Passes over the rows, and rows a step, at least 1.
    lr : float
        Of Adam, above 0.
    generator : torch.Generator, int or None
        Source of the weights, wrong labels and the order of rows.
    progress : Progress, bool or None
        Reports epochs.

    Attributes
    ----------
    classes_ : ndarray, shape (classes,)
        Labels.
    layers_ : list of nn.Linear
        The trained layers.
    n_features_in_ : int
        Columns of ``X``.

    Notes
    -----
    The input is the row, standardised, and an input a class that is ``label_scale`` for the label. Layer l answers
    :math:`h_l = \operatorname{relu}(W_l h_{l-1} / |h_{l-1}| + b_l)`, and its goodness is the mean of the squares of
    :math:`h_l`. It descends

    .. math:: \operatorname{softplus}(-(G^+ - \theta)) + \operatorname{softplus}(G^- - \theta)

    for right and wrong labels, where G is its goodness and :math:`\theta` the threshold or, in collaboration, the sum of all
    layers' goodness, that of the others held fixed, and :math:`\theta` the threshold times the number of layers. The gradient
    is that of its own goodness times a gate, which closes for rows that the layers together tell apart. No gradient goes
    from one layer to another. The prediction is the label of the largest total goodness.

    Cost: a forward pass for right and one for wrong labels a step, and local gradients; one pass a class to predict.

    References
    ----------
    Hinton (2022), arXiv:2212.13345; Lorberbom et al. (2023), arXiv:2305.12393, equation 6.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = np.concatenate([rng.normal(-2, 1, (60, 2)), rng.normal(2, 1, (60, 2))])
    >>> y = np.repeat(["low", "high"], 60)
    >>> made = ForwardForwardClassifier(hidden=(32, 32), epochs=60, generator=0).fit(x, y)
    >>> made.score(x, y) > 0.95
    True
    """

    def __init__(
        self,
        hidden: Sequence[int] = (200, 200, 200),
        *,
        threshold: float = 2.0,
        collaborate: bool = True,
        label_scale: float = 1.0,
        skip_first: bool = False,
        epochs: int = 100,
        batch_size: int = 100,
        lr: float = 0.03,
        generator: Seed = None,
        progress: ProgressLike = False,
    ) -> None:
        self.hidden = hidden
        self.threshold = threshold
        self.collaborate = collaborate
        self.label_scale = label_scale
        self.skip_first = skip_first
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.generator = generator
        self.progress = progress

    def fit(self, X: Any, y: Any) -> Self:
        """Train on rows and their labels.

        Parameters
        ----------
        X : array, shape (n, features)
            Inputs.
        y : array, shape (n,)
            Labels of at least two classes.

        Returns
        -------
        ForwardForwardClassifier

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If an option is not allowed or there is one class only.
        """
        sizes = self._check()
        x, labels = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(labels)
        self.classes_, index = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise checks.ArgumentError(
                f"y has one class, {self.classes_[0]!r}; allowed: at least two classes. Add rows of another class."
            )
        g = as_generator(self.generator)
        self._mean, self._std = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1)
        inputs, targets = self._standardised(x), torch.as_tensor(index)
        self.layers_ = _layers([x.shape[1] + len(self.classes_), *sizes], g, inputs)
        parameters = [p for layer in self.layers_ for p in layer.parameters()]
        optimizer = torch.optim.Adam(parameters, self.lr)
        for _ in track(range(self.epochs), "forward-forward", progress=self.progress):
            for rows in randperm(len(x), generator=g).split(self.batch_size):
                wrong = targets[rows] + randint(1, len(self.classes_), (len(rows),), generator=g)
                with torch.enable_grad():
                    right = self._goodness(inputs[rows], targets[rows])
                    other = self._goodness(inputs[rows], wrong % len(self.classes_))
                    loss = _loss(right, other, self.threshold, self.collaborate)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for p in parameters:
            p.requires_grad_(False)
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the total goodness of each row with each label, shape (n, classes); for two, their difference, (n,)."""
        total = self._all_goodness(X)[:, :, 1 if self._skips() else 0 :].sum(2).numpy()
        return total[:, 1] - total[:, 0] if total.shape[1] == 2 else total

    def predict(self, X: Any) -> np.ndarray:
        """Return the label of the largest total goodness, shape (n,)."""
        score = self.decision_function(X)
        index = (score > 0).astype(int) if score.ndim == 1 else score.argmax(1)
        return self.classes_[index]

    def _all_goodness(self, X: Any) -> Tensor:
        """Return the goodness of each row with each label in each layer, (n, classes, layers)."""
        check_is_fitted(self, "layers_")
        x = self._standardised(validate_data(self, X, reset=False, dtype=[np.float64, np.float32]))
        n, k = len(x), len(self.classes_)
        labels = torch.arange(k).repeat(n)
        with torch.no_grad():
            return self._goodness(x.repeat_interleave(k, 0), labels).T.reshape(n, k, -1)

    def _goodness(self, x: Tensor, labels: Tensor) -> Tensor:
        """Return each layer's goodness, (layers, n); a layer's answer is detached before the next."""
        coded = self.label_scale * one_hot(labels, len(self.classes_)).to(x.dtype)
        h, found = torch.cat([x, coded], 1), []
        for layer in self.layers_:
            unit = h.detach() / (h.detach().norm(dim=1, keepdim=True) + 1e-8)
            h = torch.relu(layer(unit))
            found.append(layer_goodness(h))
        return torch.stack(found)

    def _standardised(self, x: np.ndarray) -> Tensor:
        return torch.as_tensor((x - self._mean) / self._std)

    def _skips(self) -> bool:
        return self.skip_first and len(self.layers_) > 1

    def _check(self) -> list[int]:
        if isinstance(self.hidden, (str, int)) or len(list(self.hidden)) == 0:
            raise checks.ArgumentTypeError(
                f"hidden is {self.hidden!r}; allowed: a sequence of units, one a layer. Pass (200, 200)."
            )
        for name in ("threshold", "label_scale", "lr"):
            checks.positive(name, getattr(self, name))
        for name in ("epochs", "batch_size"):
            checks.integer(name, getattr(self, name), low=1)
        return [checks.integer("hidden", n, low=1) for n in self.hidden]


def layer_goodness(h: Tensor, reduction: str = "mean") -> Tensor:
    """Return the goodness of a layer's activations.

    Parameters
    ----------
    h : Tensor, shape (n, units)
        Activations.
    reduction : {"mean", "sum"}
        Of the squares. Thresholds of sums grow with the width.

    Returns
    -------
    Tensor, shape (n,)

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``G = mean h^2`` over the units.

    References
    ----------
    Hinton (2022), arXiv:2212.13345, section 2.

    Examples
    --------
    >>> layer_goodness(torch.tensor([[1.0, 3.0]]))
    tensor([5.])
    """
    checks.tensor("h", h, ndim=2, finite=False)
    checks.one_of("reduction", reduction, ("mean", "sum"))
    return h.square().mean(1) if reduction == "mean" else h.square().sum(1)


def functional_entropy(goodness: Tensor, reference: Tensor | None = None) -> Tensor:
    r"""Return the functional entropy of a non-negative function under a measure.

    Parameters
    ----------
    goodness : Tensor, shape (..., n)
        Values of the function, zero or above.
    reference : Tensor, shape (..., n), optional
        Weights of the measure, zero or above and not all zero; equal unless given.

    Returns
    -------
    Tensor, shape (...,)
        Zero or above; zero for a constant function.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a value is negative.

    Notes
    -----
    :math:`E[f \log f] - E[f] \log E[f]`.

    References
    ----------
    Lorberbom et al. (2023), arXiv:2305.12393, section 4; Bakry, Gentil and Ledoux (2014), Analysis and Geometry of Markov
    Diffusion Operators, chapter 5.

    Examples
    --------
    >>> float(functional_entropy(torch.tensor([2.0, 2.0])))
    0.0
    """
    checks.tensor("goodness", goodness)
    weights = torch.ones_like(goodness) if reference is None else checks.tensor("reference", reference)
    for name, value in (("goodness", goodness), ("reference", weights)):
        if bool((value < 0).any()) or bool((value.sum(-1) <= 0).any() and name == "reference"):
            raise checks.ArgumentError(
                f"{name} has the least value {float(value.min()):g}; allowed: numbers of zero or above, weights not all zero. "
                "Pass squares, or a measure."
            )
    share = weights / weights.sum(-1, keepdim=True)
    mean = (share * goodness).sum(-1)
    return ((share * torch.xlogy(goodness, goodness)).sum(-1) - torch.xlogy(mean, mean)).clamp(min=0)


def information_flow(model: ForwardForwardClassifier, X: Any, y: Any) -> InformationFlow:
    """Return what each layer of a trained classifier adds to those before it.

    Parameters
    ----------
    model : ForwardForwardClassifier
        Fitted.
    X, y : array
        Rows and their labels.

    Returns
    -------
    InformationFlow

    Raises
    ------
    ArgumentTypeError
        If the model is another one.

    Notes
    -----
    The accuracy of layers 1..k uses the sum of their goodness; the entropy of a layer is that of its goodness over the
    labels of a row, mean over the rows.

    References
    ----------
    Lorberbom et al. (2023), arXiv:2305.12393, section 5.

    Examples
    --------
    >>> x, y = np.repeat([[-1.0], [1.0]], 20, 0), np.repeat([0, 1], 20)
    >>> made = ForwardForwardClassifier(hidden=(8, 8), epochs=5, generator=0).fit(x, y)
    >>> information_flow(made, x, y).accuracy.shape
    torch.Size([2])
    """
    if not isinstance(model, ForwardForwardClassifier):
        raise checks.ArgumentTypeError(
            f"model is a {type(model).__name__}; allowed: a ForwardForwardClassifier. Fit one first."
        )
    goodness = model._all_goodness(X)
    labels = np.asarray(y)
    if labels.shape != (len(goodness),):
        raise checks.ArgumentError(
            f"y has shape {labels.shape}; allowed: ({len(goodness)},), a label a row of X. Pass one for each."
        )
    best = goodness.cumsum(2).argmax(1).numpy()
    accuracy = (model.classes_[best] == labels[:, None]).mean(0)
    return InformationFlow(torch.as_tensor(accuracy), functional_entropy(goodness.mT).mean(0))


def _layers(sizes: list[int], generator: torch.Generator, like: Tensor) -> list[nn.Linear]:
    layers = []
    for before, after in pairwise(sizes):
        layer = nn.utils.skip_init(nn.Linear, before, after, dtype=like.dtype)
        with torch.no_grad():
            layer.weight.copy_(randn((after, before), generator=generator, dtype=like.dtype) * before**-0.5)
            layer.bias.zero_()
        layers.append(layer)
    return layers


def _loss(right: Tensor, wrong: Tensor, threshold: float, collaborate: bool) -> Tensor:
    """Return the sum of the layers' losses; each has a graph to its own layer only."""
    if collaborate:
        # The value is the sum over all layers, the gradient that of the layer alone.
        right, wrong = (g + (g.sum(0) - g).detach() for g in (right, wrong))
        threshold = threshold * len(right)
    return (softplus(threshold - right) + softplus(wrong - threshold)).mean(1).sum()
