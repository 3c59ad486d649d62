"""Deletion and insertion: the output as the parts that an explanation ranks highest are taken away, or brought.

Use them to compare rankings without a ground truth, always beside a random order. Petsiuk, Das and Saenko (2018), RISE:
Randomized Input Sampling for Explanation of Black-box Models, arXiv:1806.07421.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from perturbkit.core import Attribution, Cost, Oracle, Result, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.explain.metrics._parts import Model, as_scores, repeated
from perturbkit.explain.removal._parts import expanded_baseline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RemovalCurve", "deletion_curve", "insertion_curve"]

Output = Literal["probability", "logit"]


@dataclass(frozen=True, eq=False)
class RemovalCurve(Result):
    """The output along a removal, row by row.

    Attributes
    ----------
    fractions : Tensor, shape (n_steps + 1,)
        Share of the parts removed (deletion) or present (insertion).
    outputs : Tensor, shape (n, n_steps + 1)
        The target's output at each of them.
    area : Tensor, shape (n,)
        Area under each curve by trapezoids, over the range of the fractions.
    metric : str
        "deletion" or "insertion".
    better : str
        "lower" for deletion, "higher" for insertion.
    cost : Cost
        Evaluations spent.
    """

    fractions: Tensor
    outputs: Tensor
    area: Tensor
    metric: str
    better: str
    cost: Cost = field(default_factory=Cost)

    def plot(self, *, ax: Axes | None = None) -> Axes:
        """Draw the mean curve over the rows, and a band of one standard error."""
        from matplotlib.figure import Figure

        ax = ax if ax is not None else Figure(figsize=(4, 3), layout="constrained").subplots()
        share, mean = self.fractions.cpu(), self.outputs.mean(0).cpu()
        ax.plot(share, mean, label=self.metric)
        if len(self.outputs) > 1:
            error = self.outputs.std(0).cpu() / len(self.outputs) ** 0.5
            ax.fill_between(share, mean - error, mean + error, alpha=0.3)
        ax.set_xlabel("share removed" if self.metric == "deletion" else "share present")
        ax.set_ylabel("output of the target")
        return ax


def deletion_curve(
    model: Model,
    x: Tensor,
    explanation: Attribution | Tensor,
    target: Tensor | int | None = None,
    *,
    baseline: Tensor | float = 0.0,
    n_steps: int = 20,
    up_to: float = 1.0,
    output: Output = "probability",
    progress: ProgressLike = False,
) -> RemovalCurve:
    """Take parts away, the highest scores first.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Function of a batch (n, ...), answering (n, outputs) or (n,).
    x : Tensor, shape (n, features), (n, length, width) or (n, channels, height, width)
        Inputs, floating point. A part is a feature, a position of a sequence, or a pixel with all of its channels.
    explanation : Attribution or Tensor, shape of ``x``
        Scores, summed over channels or width. Of equal scores the first in reading order goes first.
    target : Tensor of shape (n,), int or None
        The output followed.
    baseline : float or Tensor
        What takes a part's place: a number, or a tensor that broadcasts to ``x`` (a blurred copy, a mean).
    n_steps : int
        Steps of equal size, at least 1.
    up_to : float
        Share of the parts at the last step, in (0, 1].
    output : {"probability", "logit"}
        Whether several outputs go through a softmax first. A model with one output is taken as it is.
    progress : Progress, bool or None
        Reports steps.

    Returns
    -------
    RemovalCurve
        Lower areas are better.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``area = (1 / u) int_0^u p_target(x with its top share s removed) ds`` with u = ``up_to``.

    Cost: ``n_steps + 1`` evaluations a row.

    References
    ----------
    Petsiuk, Das and Saenko (2018), arXiv:1806.07421, section 4.2.

    Examples
    --------
    >>> f = lambda x: x.sum(1)
    >>> x = torch.tensor([[3.0, 1.0]])
    >>> deletion_curve(f, x, x, n_steps=2).outputs
    tensor([[4., 1., 0.]])
    """
    return _curve(model, x, explanation, target, baseline, n_steps, up_to, output, progress, "deletion")


def insertion_curve(
    model: Model,
    x: Tensor,
    explanation: Attribution | Tensor,
    target: Tensor | int | None = None,
    *,
    baseline: Tensor | float = 0.0,
    n_steps: int = 20,
    up_to: float = 1.0,
    output: Output = "probability",
    progress: ProgressLike = False,
) -> RemovalCurve:
    """Bring parts into the baseline, the highest scores first.

    Parameters
    ----------
    model, x, explanation, target, baseline, n_steps, up_to, output, progress
        As in :func:`deletion_curve`.

    Returns
    -------
    RemovalCurve
        Higher areas are better.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``area = (1 / u) int_0^u p_target(baseline with the top share s of x) ds``; cost as in :func:`deletion_curve`.

    References
    ----------
    Petsiuk, Das and Saenko (2018), arXiv:1806.07421, section 4.2.

    Examples
    --------
    >>> f = lambda x: x.sum(1)
    >>> x = torch.tensor([[3.0, 1.0]])
    >>> insertion_curve(f, x, x, n_steps=2).outputs
    tensor([[0., 3., 4.]])
    """
    return _curve(model, x, explanation, target, baseline, n_steps, up_to, output, progress, "insertion")


def _curve(
    model: Model, x: Tensor, explanation: Attribution | Tensor, target: Tensor | int | None,
    baseline: Tensor | float, n_steps: int, up_to: float, output: Output, progress: ProgressLike, metric: str,
) -> RemovalCurve:  # fmt: skip
    checks.tensor("x", x, ndim=(2, 3, 4))
    scores = as_scores(explanation, x)
    checks.integer("n_steps", n_steps, low=1)
    checks.between("up_to", up_to, 0, 1, inclusive="high")
    checks.one_of("output", output, ("probability", "logit"))
    oracle, rows = Oracle.wrap(model), repeated(target, x)
    before, cover = oracle.cost, expanded_baseline(baseline, x)
    # One score a part, shape (n, parts), and the place of each part in the order.
    axis = {2: None, 3: -1, 4: 1}[x.ndim]
    parts = scores if axis is None else scores.sum(axis, keepdim=True)
    place = parts.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(1).reshape(parts.shape)
    fractions = torch.linspace(0, up_to, n_steps + 1, dtype=x.dtype, device=x.device)
    counts = (fractions * parts[0].numel()).round().long()
    outputs = []
    with oracle.frozen():
        for count in track(counts.tolist(), metric, progress=progress):
            first = place < count
            mixed = torch.where(first, cover, x) if metric == "deletion" else torch.where(first, x, cover)
            outputs.append(_read(oracle, mixed, rows, output))
    curve = torch.stack(outputs, 1)
    area = torch.trapezoid(curve, fractions.to(curve.dtype), dim=1) / up_to
    better = "lower" if metric == "deletion" else "higher"
    return RemovalCurve(fractions, curve, area, metric, better, oracle.cost - before)


def _read(oracle: Oracle, x: Tensor, target: Tensor | None, output: Output) -> Tensor:
    if target is None or output == "logit":
        return oracle.value(x, target)
    answers = oracle(x)
    if answers.ndim != 2 or int(target.max()) >= answers.shape[1]:
        raise checks.ArgumentError(
            f"target is {int(target.max())} for outputs of shape {tuple(answers.shape)}; allowed: the index of an "
            "output of a model that answers (n, outputs). Pass one of these, or leave the target out."
        )
    return answers.softmax(1).gather(1, target[:, None])[:, 0]
