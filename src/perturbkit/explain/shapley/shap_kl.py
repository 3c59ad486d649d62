"""SHAP-KL: Shapley values of how close the prediction from some parts comes to the prediction from all, over all classes.

Use it where an explanation must not favour a class: scores that explain one class pick parts that make it look likelier than it
is. Jethani, Saporta and Ranganath (2023), Don't be fooled: label leakage in explanation methods and the importance of their
quantitative evaluation, arXiv:2302.12893.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from perturbkit.core import Attribution, Oracle, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, uniform
from perturbkit.explain.removal._parts import kernel_masks, orders
from perturbkit.explain.removal._summaries import Shapley
from perturbkit.explain.shapley._evaluation import MaskedCurves, inclusion_exclusion, leakage
from perturbkit.explain.shapley._networks import Training, mlp, moments
from perturbkit.explain.shapley._parts import SubsetPredictor, answers, negative_kl, numbered, whole_answer

__all__ = ["FastSHAPKL", "MaskedCurves", "MaskedPredictor", "inclusion_exclusion", "leakage", "shap_kl"]


def shap_kl(
    model: SubsetPredictor,
    x: Tensor,
    *,
    parts: Tensor | None = None,
    n_samples: int | None = None,
    generator: Seed = None,
    progress: ProgressLike = False,
) -> Attribution:
    """Attribute the whole predicted distribution to the parts of the input, with no class chosen.

    Parameters
    ----------
    model : Oracle, nn.Module or callable (x, mask) -> (n, classes)
        Probabilities from known elements: it is given the rows with unknown elements set to zero, and masks of ones and
        zeros in the same shape. :class:`MaskedPredictor` trains one.
    x : Tensor, shape (n, ...)
        Inputs, floating point.
    parts : Tensor of int, broadcastable to a row of x, optional
        The part of each element, counted from 0: superpixels or groups. By default every element is a part.
    n_samples : int or None
        Subsets drawn, in pairs with their complements; ``None``: all of them up to 12 parts, which is exact, else 2048.
    generator : torch.Generator, int or None
        Source of the subsets.
    progress : Progress, bool or None
        Reports blocks of subsets.

    Returns
    -------
    Attribution
        ``values`` of shape (n, parts), which add up to ``-extras["empty"]``. ``extras["full"]`` (zero) and
        ``extras["empty"]``: the value of all parts and of none, one a row.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an input is not allowed, or the model does not answer probabilities.

    Notes
    -----
    Shapley values of ``v(S) = -KL(p(.|x) || p(.|x_S))``, so that their sum is ``KL(p(.|x) || p(.))``, what the input tells
    of the label. By weighted least squares with the Shapley kernel where subsets are drawn; the error falls as
    1/sqrt(n_samples).

    Cost: one evaluation a subset and row.

    References
    ----------
    Jethani, Saporta and Ranganath (2023), arXiv:2302.12893. Covert and Lee (2021), Improving KernelSHAP, arXiv:2012.01536.

    Examples
    --------
    >>> def model(x, mask):  # the first element decides, if it is known
    ...     p = 0.5 + 0.4 * x[:, 0] * mask[:, 0]
    ...     return torch.stack((1 - p, p), 1)
    >>> shap_kl(model, torch.tensor([[1.0, 1.0]])).values
    tensor([[0.3681, 0.0000]])
    """
    checks.tensor("x", x)
    numbers, source, oracle = numbered(parts, x), as_generator(generator), Oracle.wrap(model)
    d, before = int(numbers.max()) + 1, oracle.cost
    with oracle.frozen():
        whole = whole_answer(oracle, x)

        def value(masks: Tensor) -> Tensor:
            blocks = masks.to(x.device).split(1024)
            found = [
                negative_kl(whole, answers(oracle, x, part[:, numbers]))
                for part in track(blocks, "SHAP-KL", progress=progress)
            ]
            return torch.cat(found).cpu()

        exact = n_samples is None and d <= 12
        scores = Shapley(n_samples, "permutation" if exact else "kernel").scores(value, d, source)
        empty = value(torch.zeros(1, d, dtype=torch.bool))[0].to(x)
    return Attribution(
        scores.to(x), None, oracle.cost - before, "SHAP-KL", {"full": torch.zeros_like(empty), "empty": empty}
    )


class FastSHAPKL:
    r"""A network that answers SHAP-KL scores in one pass.

    Parameters
    ----------
    model : Oracle, nn.Module or callable (x, mask) -> (n, classes)
        As in :func:`shap_kl`.
    hidden, n_layers : int
        Width and number of hidden layers, at least 1.
    n_masks : int
        Subsets a row and step, in pairs, at least 2.
    lr, weight_decay : float
        Step and weight decay of AdamW.
    epochs, batch_size : int
        Passes over the training rows, and rows a step.
    parts : Tensor of int, optional
        As in :func:`shap_kl`; at least 2 parts.
    generator : torch.Generator, int or None
        Source of the weights, the order of rows and the subsets.
    progress : Progress, bool or None
        Reports epochs.

    Notes
    -----
    Minimises :math:`E_x E_S (v(S) - v(\emptyset) - \sum_{i \in S} \phi_i(x))^2` with S drawn from the Shapley kernel; the
    outputs are shifted alike so that they add up to :math:`v(all) - v(\emptyset)` exactly.

    Cost: ``n_masks`` evaluations a row and epoch; to attribute, two a row, for the shift.

    References
    ----------
    Jethani, Saporta and Ranganath (2023), arXiv:2302.12893. Jethani, Sudarshan, Covert, Lee and Ranganath (2022),
    FastSHAP, arXiv:2107.07436.

    Examples
    --------
    >>> def model(x, mask):
    ...     p = torch.sigmoid((x * mask).sum(1))
    ...     return torch.stack((1 - p, p), 1)
    >>> x = torch.tensor([[1.0, -2.0], [2.0, 0.5], [0.0, 1.0]])
    >>> fast = FastSHAPKL(model, hidden=8, epochs=3, generator=0).fit(x).attribute(x)
    >>> exact = shap_kl(model, x)
    >>> bool(torch.allclose(fast.values.sum(1), exact.values.sum(1), atol=1e-6))
    True
    """

    def __init__(
        self,
        model: SubsetPredictor,
        hidden: int = 128,
        *,
        n_layers: int = 2,
        n_masks: int = 8,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        epochs: int = 100,
        batch_size: int = 64,
        parts: Tensor | None = None,
        generator: Seed = None,
        progress: ProgressLike = False,
    ) -> None:
        self._oracle = Oracle.wrap(model)
        self._training = Training(hidden, n_layers, lr, weight_decay, epochs, batch_size)
        self.n_masks = checks.integer("n_masks", n_masks, low=2)
        self.parts, self.generator, self.progress = parts, generator, progress

    def fit(self, x: Tensor) -> Self:
        """Train on inputs, shape (n, ...), floating point; labels are not needed."""
        checks.tensor("x", x)
        oracle, numbers, g = self._oracle, numbered(self.parts, x), as_generator(self.generator)
        d = checks.integer("the number of parts", int(numbers.max()) + 1, low=2)
        self._numbers, self._moments = numbers, moments(x)
        self._net = mlp(self._training.sizes(x[0].numel(), d), g, x)
        with oracle.frozen():
            whole = whole_answer(oracle, x)
            empty = self._empty(x, whole)

            def loss(rows: Tensor) -> Tensor:
                masks = kernel_masks(d, len(rows) * self.n_masks, g).to(x.device)
                many = rows.repeat_interleave(self.n_masks)
                keep = masks[:, numbers].to(x.dtype)
                value = negative_kl(whole[many], oracle(x[many] * keep, keep)).to(x)
                phi = self._scores(x[rows], empty[rows]).repeat_interleave(self.n_masks, 0)
                return (value - empty[many] - (phi * masks).sum(1)).square().mean()

            self._training.minimise(self._net, loss, len(x), g, "FastSHAP-KL", self.progress)
        return self

    def attribute(self, x: Tensor) -> Attribution:
        """Return the scores of inputs, as :func:`shap_kl` does, by one pass of the network.

        Parameters
        ----------
        x : Tensor, shape (n, ...)
            Inputs in the shape of the training rows.

        Returns
        -------
        Attribution

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If the inputs are not allowed, or ``fit`` was not called.
        """
        _fitted(self, "_net", "attribute")
        checks.tensor("x", x, shape=(None, *self._numbers.shape))
        before = self._oracle.cost
        empty = self._empty(x, whole_answer(self._oracle, x))
        values = self._scores(x, empty)
        extras = {"full": torch.zeros_like(empty), "empty": empty}
        return Attribution(values, None, self._oracle.cost - before, "FastSHAP-KL", extras)

    def _empty(self, x: Tensor, whole: Tensor) -> Tensor:
        zero = torch.zeros_like(x)
        return negative_kl(whole, self._oracle(zero, zero)).to(x)

    def _scores(self, x: Tensor, empty: Tensor) -> Tensor:
        mean, spread = self._moments
        phi = self._net(((x - mean) / spread).flatten(1))
        return phi + ((-empty - phi.sum(1)) / phi.shape[1])[:, None]


class MaskedPredictor:
    r"""A network that predicts the label's distribution from any subset of the parts.

    Parameters
    ----------
    hidden, n_layers : int
        Width and number of hidden layers, at least 1.
    lr, weight_decay : float
        Step and weight decay of AdamW.
    epochs, batch_size : int
        Passes over the training rows, and rows a step.
    parts : Tensor of int, optional
        As in :func:`shap_kl`: what is masked together.
    generator : torch.Generator, int or None
        Source of the weights, the order of rows and the masks.
    progress : Progress, bool or None
        Reports epochs.

    Notes
    -----
    Minimises the cross-entropy of ``y`` and the answer to (x * mask, mask) over masks whose size is uniform from none to
    all parts; its optimum is :math:`p(y | x_S)`. Fit it to a model's probabilities to stand for the model (a surrogate), and
    another one to labels to judge explanations (an evaluator).

    References
    ----------
    Jethani, Saporta and Ranganath (2023), arXiv:2302.12893. Frye et al. (2021), Shapley explainability on the data
    manifold, arXiv:2006.01272.

    Examples
    --------
    >>> x = torch.tensor([[0.0], [1.0]]).repeat(50, 1)
    >>> predictor = MaskedPredictor(16, epochs=60, lr=0.01, generator=0).fit(x, x[:, 0].long())
    >>> predictor(x[:1], torch.ones(1, 1))[0, 0] > 0.9, predictor(x[:1], torch.zeros(1, 1))[0, 0] < 0.6
    (tensor(True), tensor(True))
    """

    def __init__(
        self,
        hidden: int = 128,
        *,
        n_layers: int = 2,
        lr: float = 1e-3,
        weight_decay: float = 1e-4,
        epochs: int = 200,
        batch_size: int = 64,
        parts: Tensor | None = None,
        generator: Seed = None,
        progress: ProgressLike = False,
    ) -> None:
        self._training = Training(hidden, n_layers, lr, weight_decay, epochs, batch_size)
        self.parts, self.generator, self.progress = parts, generator, progress

    def fit(self, x: Tensor, y: Tensor) -> Self:
        """Train on inputs (n, ...) and class indices (n,) or class probabilities (n, classes)."""
        checks.tensor("x", x)
        if isinstance(y, Tensor) and y.is_floating_point():
            checks.probabilities("y", y, n=len(x))
            soft = y.detach().to(x)
        else:
            labels = checks.labels("y", y, n=len(x)).to(x.device)
            soft = torch.nn.functional.one_hot(labels).to(x)
        numbers, g = numbered(self.parts, x), as_generator(self.generator)
        d = int(numbers.max()) + 1
        self._shape, self._moments = x.shape[1:], moments(x)
        self._net = mlp(self._training.sizes(2 * x[0].numel(), soft.shape[1]), g, x)

        def loss(rows: Tensor) -> Tensor:
            size = (uniform((len(rows), 1), generator=g) * (d + 1)).floor()
            keep = (orders(d, len(rows), g) < size).to(x.device)[:, numbers].to(x.dtype)
            return -(soft[rows] * self._logits(x[rows], keep).log_softmax(1)).sum(1).mean()

        self._training.minimise(self._net, loss, len(x), g, "masked predictor", self.progress)
        return self

    def __call__(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the probabilities (n, classes) given the elements of x whose mask is one; the others are not looked at."""
        _fitted(self, "_net", "a prediction")
        checks.tensor("x", x, shape=(None, *self._shape))
        return self._logits(x, checks.same_shape("mask", mask, "x", x).to(x.dtype)).softmax(1)

    def _logits(self, x: Tensor, mask: Tensor) -> Tensor:
        mean, spread = self._moments
        known = torch.where(mask > 0, (x - mean) / spread, 0)
        return self._net(torch.cat((known.flatten(1), mask.flatten(1)), 1))


def _fitted(made: object, name: str, what: str) -> None:
    if not hasattr(made, name):
        raise checks.ArgumentError(f"nothing is fitted; allowed: {what} after fit. Call fit first.")
