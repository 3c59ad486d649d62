"""How explanations by subsets are judged: by the label predicted from what they keep or drop, and by leakage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from perturbkit.core import Attribution, Cost, Oracle, Result, checks
from perturbkit.explain.shapley._parts import SubsetPredictor, numbered, part_scores, top_parts, whole_answer


@dataclass(frozen=True, eq=False)
class MaskedCurves(Result):
    """How well the label is predicted from the parts that an explanation ranks highest, and without them.

    Attributes
    ----------
    fractions : tuple of float
        Shares of the parts kept (inclusion) or dropped (exclusion).
    inclusion, exclusion : dict of str to Tensor, shape (len(fractions),)
        "log_loss" (natural logarithm), "accuracy" and "auroc" (mean of one class against the rest).
    cost : Cost
        Evaluations of the evaluator.
    """

    fractions: tuple[float, ...]
    inclusion: dict[str, Tensor]
    exclusion: dict[str, Tensor]
    cost: Cost = field(default_factory=Cost)


def inclusion_exclusion(
    evaluator: SubsetPredictor,
    x: Tensor,
    scores: Attribution | Tensor,
    y: Tensor,
    *,
    fractions: Sequence[float] = (0.1, 0.25, 0.5),
    parts: Tensor | None = None,
) -> MaskedCurves:
    """Score an explanation by an evaluator's predictions from the highest parts alone, and from all others.

    Parameters
    ----------
    evaluator : Oracle, nn.Module or callable (x, mask) -> (n, classes)
        Probabilities from known elements; trained apart from what the explanation was computed with.
    x : Tensor, shape (n, ...)
        Inputs, floating point.
    scores : Attribution or Tensor, shape (n, parts)
        The explanation.
    y : Tensor of int, shape (n,)
        Labels.
    fractions : sequence of float
        Shares of the parts, in (0, 1]; at least one part is kept or dropped.
    parts : Tensor of int, optional
        As in :func:`shap_kl`.

    Returns
    -------
    MaskedCurves

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an input is not allowed.

    Notes
    -----
    Low log loss under inclusion and high log loss under exclusion are good. A method that explains one class should be given a
    class drawn from the model, not the label, which its subset would give away.

    References
    ----------
    Jethani, Saporta and Ranganath (2023), arXiv:2302.12893.

    Examples
    --------
    >>> def evaluator(x, mask):
    ...     return torch.stack((1 - 0.9 * mask[:, 0], 0.9 * mask[:, 0]), 1)
    >>> scores = torch.tensor([[1.0, 0.0]])
    >>> curves = inclusion_exclusion(evaluator, torch.ones(1, 2), scores, torch.tensor([1]), fractions=[0.5])
    >>> curves.inclusion["log_loss"]
    tensor([0.1054])
    """
    checks.tensor("x", x)
    labels = checks.labels("y", y, n=len(x)).to(x.device)
    shares = tuple(checks.between("fractions", f, 0, 1, inclusive="high") for f in fractions)
    numbers, oracle = numbered(parts, x), Oracle.wrap(evaluator)
    values = part_scores("scores", scores, len(x), int(numbers.max()) + 1)
    before = oracle.cost
    checks.labels("y", labels, n_classes=whole_answer(oracle, x).shape[1])
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for share in shares:
        top = top_parts(values, share)[:, numbers.flatten()].reshape(x.shape)
        for keep, rows in ((top, found[0]), (~top, found[1])):
            mask = keep.to(x.dtype)
            rows.append(_judged(oracle(x * mask, mask), labels))
    curves = [torch.stack(rows, 1) if rows else x.new_zeros(3, 0) for rows in found]
    names = ("log_loss", "accuracy", "auroc")
    inclusion, exclusion = (dict(zip(names, c, strict=True)) for c in curves)
    return MaskedCurves(shares, inclusion, exclusion, oracle.cost - before)


def leakage(
    explainer: Callable[[Tensor, Tensor], Attribution | Tensor],
    evaluator: SubsetPredictor,
    x: Tensor,
    *,
    fraction: float = 0.25,
    parts: Tensor | None = None,
) -> float:
    """Return by how much an explanation of a class makes that class look likelier than it is, over all classes alike.

    Parameters
    ----------
    explainer : callable (x, target) -> Attribution or Tensor, shape (n, parts)
        Explains each row's class ``target``, shape (n,).
    evaluator : Oracle, nn.Module or callable (x, mask) -> (n, classes)
        Probabilities from known elements.
    x : Tensor, shape (n, ...)
        Inputs, floating point.
    fraction : float
        Share of the parts that the explanation selects, in (0, 1]; at least one.
    parts : Tensor of int, optional
        As in :func:`shap_kl`.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an input is not allowed.

    Notes
    -----
    The mean over rows and classes c of ``max(0, p(c | x_S) - p(c | x))``, where S holds the highest parts for c. An
    explanation that does not depend on the class has one S for all c.

    References
    ----------
    Jethani, Saporta and Ranganath (2023), arXiv:2302.12893.

    Examples
    --------
    >>> def evaluator(x, mask):  # each element speaks for its own class
    ...     return (2 * mask).softmax(1)
    >>> def for_class(x, target):
    ...     return torch.nn.functional.one_hot(target, 2).float()
    >>> round(leakage(for_class, evaluator, torch.ones(1, 2), fraction=0.5), 3)
    0.381
    """
    checks.tensor("x", x)
    share = checks.between("fraction", fraction, 0, 1, inclusive="high")
    numbers, oracle = numbered(parts, x), Oracle.wrap(evaluator)
    whole, total = whole_answer(oracle, x), 0.0
    for c in range(whole.shape[1]):
        target = torch.full((len(x),), c, device=x.device)
        values = part_scores("the explanation", explainer(x, target), len(x), int(numbers.max()) + 1)
        mask = top_parts(values, share)[:, numbers.flatten()].reshape(x.shape).to(x.dtype)
        total += float((oracle(x * mask, mask)[:, c] - whole[:, c]).clamp(min=0).mean())
    return total / whole.shape[1]


def _judged(p: Tensor, y: Tensor) -> Tensor:
    """Return log loss, accuracy and area under the curve."""
    loss = -p.gather(1, y[:, None]).clamp(min=torch.finfo(p.dtype).tiny).log().mean()
    return torch.stack((loss, (p.argmax(1) == y).to(p).mean(), p.new_tensor(_auroc(p, y))))


def _auroc(p: Tensor, y: Tensor) -> float:
    """Return the mean area under the curve of each class against the rest, of those that occur and do not fill the rows."""
    from scipy.stats import rankdata

    ranks, areas = rankdata(p.detach().cpu().numpy(), axis=0), []
    for c, positive in enumerate((y[:, None] == torch.arange(p.shape[1], device=y.device)).T.cpu().numpy()):
        n, others = int(positive.sum()), int((~positive).sum())
        if n and others:
            areas.append((ranks[positive, c].sum() - n * (n + 1) / 2) / (n * others))
    return float(np.mean(areas)) if areas else float("nan")
