"""FINEST: recommendations that stay in order when a few training interactions change, by rank-preserving fine-tuning.

Use it after training a sequential recommender whose lists must not be reshuffled by every small change of its data. Oh, Ustun,
McAuley and Kumar (2024), FINEST: Stabilizing Recommendations by Rank-Preserving Fine-Tuning, arXiv:2402.03481.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from perturbkit.core import Oracle, Result, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randint, randperm
from perturbkit.robust.training._interactions import (
    KINDS,
    Kind,
    checked_interactions,
    checked_kinds,
    padded,
    perturb_interactions,
    rank_biased_overlap,
)
from perturbkit.robust.training._loops import TrainingHistory
from perturbkit.robust.training._recommenders import (
    NextItemModel,
    best_items,
    device_of,
    items_of,
    next_item_loss,
    two_margins,
)

__all__ = [
    "FINEST",
    "NextItemModel",
    "RankStability",
    "ReferenceLists",
    "perturb_interactions",
    "rank_biased_overlap",
    "rank_preserving_loss",
    "rank_stability",
    "reference_lists",
]


@dataclass(frozen=True, eq=False)
class ReferenceLists(Result):
    """What a recommender puts first in every context.

    Attributes
    ----------
    items : Tensor of int64, shape (users, T)
        The interactions, -1 after the last.
    lists : Tensor of int64, shape (users, T, k)
        The best items after each interaction, best first.
    """

    items: Tensor
    lists: Tensor


@dataclass(frozen=True, eq=False)
class RankStability(Result):
    """How alike the lists of recommenders trained on changed data are to those trained on the original data.

    Attributes
    ----------
    rbo, jaccard : Tensor, shape (perturbations, contexts)
        Rank-biased overlap of the lists, and Jaccard index of their sets; 1 for equal lists.
    """

    rbo: Tensor
    jaccard: Tensor


class FINEST:
    """Fine-tune a recommender to keep its top items in order under simulated changes of its training data.

    Parameters
    ----------
    model : nn.Module
        Trained; maps items (n, T), -1 after the last, to scores (n, T, n_items). A copy is trained.
    k : int
        Length of the lists that are kept, at least 2.
    n_negatives : int
        Items drawn a context to stay below the list, at least 1.
    weight : float
        Factor of the rank-preserving loss, zero or above; zero is ordinary training.
    margins : (float, float)
        By how much an item must lead the next one, and the last one all others, zero or above.
    perturb_ratio : float
        Share of the interactions changed afresh each epoch, in [0, 1].
    kinds : sequence of {"delete", "replace", "insert"}
        Of the changes.
    epochs, batch_size : int
        At least 1; a batch is of users.
    lr : float
        Rate of Adam, above zero.
    generator : torch.Generator, int or None
        Source of changes, batches and drawn items.

    Attributes
    ----------
    model_ : nn.Module
        The fine-tuned copy, in evaluation mode.
    reference_ : ReferenceLists
        What was kept in order.
    history_ : TrainingHistory
        Total loss, rank-preserving loss (``reference_loss``, with a weight) and what ``evaluate`` said, an entry an epoch.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option or the data are not allowed.

    Notes
    -----
    Minimises cross-entropy of the next item on the changed data plus ``weight`` times :func:`rank_preserving_loss` on the
    contexts of the reference. To judge it, compare the lists of two whole pipelines, on the original and on changed data:
    agreement with the reference is what is trained for.

    Cost: two forward and backward passes a batch, where one trains with one.

    References
    ----------
    Oh et al. (2024), arXiv:2402.03481, section 4; the paper leaves the margins open.

    Examples
    --------
    >>> data = [torch.tensor([0, 1, 2, 3]), torch.tensor([2, 3, 4])]
    >>> base = FINEST(NextItemModel(6, 4, generator=0), k=3, weight=0, epochs=2, generator=0).fit(data).model_
    >>> stable = FINEST(base, k=3, epochs=2, generator=0).fit(data)
    >>> stable.model_(torch.tensor([[0, 1]])).shape
    torch.Size([1, 2, 6])
    """

    def __init__(
        self, model: nn.Module, *, k: int = 20, n_negatives: int = 100, weight: float = 1.0,
        margins: tuple[float, float] = (0.1, 0.1), perturb_ratio: float = 0.01, kinds: Sequence[Kind] = KINDS,
        epochs: int = 20, lr: float = 1e-3, batch_size: int = 50, generator: Seed = None,
    ) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise checks.ArgumentTypeError(
                f"model is a {type(model).__name__}; allowed: an nn.Module. Pass the trained recommender."
            )
        self.model = model
        self.k = checks.integer("k", k, low=2)
        self.n_negatives = checks.integer("n_negatives", n_negatives, low=1)
        self.weight = checks.nonnegative("weight", weight)
        self.margins = two_margins(margins)
        self.perturb_ratio = checks.between("perturb_ratio", perturb_ratio, 0, 1)
        self.kinds = checked_kinds(kinds)
        self.epochs, self.batch_size = (
            checks.integer("epochs", epochs, low=1),
            checks.integer("batch_size", batch_size, low=1),
        )
        self.lr = checks.positive("lr", lr)
        self.generator = as_generator(generator)

    def fit(
        self,
        interactions: Sequence[Tensor],
        reference: ReferenceLists | None = None,
        *,
        evaluate: Callable[[nn.Module], float] | None = None,
        progress: ProgressLike = False,
    ) -> Self:
        """Fine-tune on interactions.

        Parameters
        ----------
        interactions : sequence of Tensor of int64
            The items of each user, in order; two for one of them at least.
        reference : ReferenceLists, optional
            Lists to keep, of any length, such as those of a model in service; by default the ``k`` best of ``model`` on these
            interactions.
        evaluate : callable, optional
            Called with the model after each epoch.
        progress : Progress, bool or None
            Reports epochs.
        """
        n_items = items_of(self.model)
        data = checked_interactions(interactions, n_items)
        if max(map(len, data)) < 2:
            raise checks.ArgumentError(
                "no user has two interactions; allowed: two of one user at least. Pass longer histories."
            )
        _check_reference(reference, n_items)
        model = copy.deepcopy(self.model)
        if not any(p.requires_grad for p in model.parameters()):
            raise checks.ArgumentError(
                "model has no parameter to train; allowed: at least one that requires a gradient. Unfreeze some."
            )
        device = device_of(model)
        kept = reference_lists(model, data, self.k) if reference is None and self.weight > 0 else reference
        optimizer = torch.optim.Adam(model.parameters(), lr=self.lr)
        losses, ranks, scores = [], [], []
        for _ in track(range(self.epochs), "rank-preserving fine-tuning", progress=progress):
            model.train()
            changed = data
            if self.perturb_ratio > 0:
                changed = perturb_interactions(
                    data, self.perturb_ratio, n_items=n_items, kinds=self.kinds, generator=self.generator
                )
            items = padded(changed, device)
            loss_sum = rank_sum = 0.0
            for rows in randperm(len(data), generator=self.generator).split(self.batch_size):
                optimizer.zero_grad(set_to_none=True)
                loss = next_item_loss(model, items[rows.to(device)])
                if kept is not None and self.weight > 0:
                    others = len(kept.items)
                    # A reference may be of other users: then some of them are drawn.
                    asked = (
                        rows
                        if others == len(data)
                        else randint(0, others, (len(rows),), generator=self.generator)
                    )
                    rank = self._rank_loss(model, kept, asked)
                    loss = loss + self.weight * rank
                    rank_sum += float(rank.detach()) * len(rows) / len(data)
                loss.backward()
                optimizer.step()
                loss_sum += float(loss.detach()) * len(rows) / len(data)
            losses.append(loss_sum)
            ranks += [rank_sum] if self.weight > 0 else []
            model.eval()
            if evaluate is not None:
                scores.append(float(evaluate(model)))
        dtype = next(model.parameters()).dtype
        self.history_ = TrainingHistory(*(torch.tensor(v, dtype=dtype) for v in (losses, ranks, scores)))
        self.model_, self.reference_ = model.eval(), kept
        return self

    def _rank_loss(self, model: nn.Module, kept: ReferenceLists, rows: Tensor) -> Tensor:
        # Where the lists lie, and then where the model does.
        chosen, device = rows.to(kept.items.device), device_of(model)
        items, lists = kept.items[chosen].to(device), kept.lists[chosen].to(device)
        known = items >= 0
        scores = model(items)[known]
        drawn = randint(0, scores.shape[1], (len(scores), self.n_negatives), generator=self.generator)
        return rank_preserving_loss(scores, lists[known], drawn.to(scores.device), self.margins)


def rank_preserving_loss(
    scores: Tensor, reference: Tensor, negatives: Tensor, margins: tuple[float, float] = (0.1, 0.1)
) -> Tensor:
    """Return the mean loss of orders that are not as in the reference, with a graph.

    Parameters
    ----------
    scores : Tensor, shape (n, n_items)
        Of the model that is trained.
    reference : Tensor of int64, shape (n, k)
        The items to keep in order, best first.
    negatives : Tensor of int64, shape (n, m)
        Items to keep below; those that are in the list are left out.
    margins : (float, float)
        Within the list, and between its last item and others.

    Returns
    -------
    Tensor, shape ()

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a shape, an item or a margin is not allowed.

    Notes
    -----
    ``sum_i max(0, s(R_{i+1}) - s(R_i) + margin_1) + mean_r max(0, s(r) - s(R_k) + margin_2)``: zero exactly where the order
    is kept with the margins, and unchanged if a constant is added to a row.

    References
    ----------
    Oh et al. (2024), arXiv:2402.03481, section 4.3.

    Examples
    --------
    >>> s = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    >>> kept, others = torch.tensor([[0, 1]]), torch.tensor([[2, 3]])
    >>> float(rank_preserving_loss(s, kept, others)), float(rank_preserving_loss(-s, kept, others)) > 1
    (0.0, True)
    """
    checks.tensor("scores", scores, ndim=2)
    for name, items in (("reference", reference), ("negatives", negatives)):
        checks.tensor(name, items, shape=(len(scores), None), floating=False)
        checks.labels(f"{name}.flatten()", items.flatten(), n_classes=scores.shape[1])
    two_margins(margins)
    reference, negatives = reference.long(), negatives.long()
    listed = scores.gather(1, reference)
    inside = (listed[:, 1:] - listed[:, :-1] + margins[0]).clamp_min(0).sum(1)
    outside = (negatives[:, :, None] != reference[:, None]).all(2)
    above = (scores.gather(1, negatives) - listed[:, -1:] + margins[1]).clamp_min(0) * outside
    return (inside + above.sum(1) / outside.sum(1).clamp_min(1)).mean()


def reference_lists(model: nn.Module, interactions: Sequence[Tensor], k: int = 20) -> ReferenceLists:
    """Return a recommender's best items after every interaction.

    Parameters
    ----------
    model : nn.Module
        Maps items (n, T), -1 after the last, to scores (n, T, n_items).
    interactions : sequence of Tensor of int64
        The items of each user, in order.
    k : int
        Length of the lists, at least 1 and less than the number of items.

    Returns
    -------
    ReferenceLists

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the data are not allowed or there are too few items.
    ModelError
        If a score is not a number.

    Notes
    -----
    Cost: one forward pass.

    References
    ----------
    Oh et al. (2024), arXiv:2402.03481, section 4.1.

    Examples
    --------
    >>> found = reference_lists(NextItemModel(6, 4, generator=0), [torch.tensor([0, 1]), torch.tensor([2])], k=3)
    >>> found.lists.shape, found.items.tolist()
    (torch.Size([2, 2, 3]), [[0, 1], [2, -1]])
    """
    n_items = items_of(model)
    checks.integer("k", k, low=1, high=n_items - 1)
    items = padded(checked_interactions(interactions, n_items), device_of(model))
    oracle = Oracle(model)
    # Chunk by chunk, since the scores of all items are far more than the lists.
    sizes = list(oracle.chunks(len(items), items))
    return ReferenceLists(items, torch.cat([best_items(oracle(part), k) for part in items.split(sizes)]))


def rank_stability(
    train: Callable[[Sequence[Tensor]], nn.Module],
    interactions: Sequence[Tensor],
    perturbations: Sequence[Sequence[Tensor]],
    contexts: Sequence[Tensor],
    *,
    k: int = 20,
    p: float = 0.9,
) -> RankStability:
    """Train on the original data and on changed data, and compare what the two recommend.

    Parameters
    ----------
    train : callable (interactions) -> nn.Module
        The whole pipeline, with its own seed, so that the data are all that differs.
    interactions : sequence of Tensor of int64
        The original data.
    perturbations : sequence of data
        Changed data, for instance from :func:`perturb_interactions`; at least one.
    contexts : sequence of Tensor of int64
        Items after which lists are compared.
    k : int
        Length of the lists.
    p : float
        Of the rank-biased overlap, in (0, 1).

    Returns
    -------
    RankStability

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the data or an option are not allowed.

    Notes
    -----
    Jaccard's index is ``|a & b| / |a | b|``. Cost: as many trainings as there are perturbations, and one.

    References
    ----------
    Oh et al. (2022), Rank list sensitivity of recommender systems to interaction perturbations, arXiv:2208.13762.

    Examples
    --------
    >>> data = [torch.tensor([0, 1, 2]), torch.tensor([2, 3])]
    >>> found = rank_stability(lambda d: NextItemModel(6, 4, generator=0), data, [data], data, k=3)
    >>> found.rbo.tolist(), found.jaccard.tolist()
    ([[1.0, 1.0]], [[1.0, 1.0]])
    """
    if len(perturbations) == 0:
        raise checks.ArgumentError(
            "perturbations is empty; allowed: at least one data set. Give changed data."
        )
    if not callable(train):
        raise checks.ArgumentTypeError(
            f"train is a {type(train).__name__}; allowed: a callable. Pass the function that trains a recommender."
        )
    checks.between("p", p, 0, 1, inclusive="neither")
    asked = checked_interactions(contexts)
    last = torch.tensor([len(c) - 1 for c in asked])

    def lists(data: Sequence[Tensor]) -> Tensor:
        return reference_lists(train(data), asked, k).lists[torch.arange(len(asked)), last].cpu()

    original = lists(interactions)
    overlaps, jaccards = [], []
    for data in perturbations:
        other = lists(data)
        overlaps.append(rank_biased_overlap(original, other, p=p))
        shared = (original[:, :, None] == other[:, None]).sum((1, 2)).double()
        jaccards.append(shared / (2 * k - shared))
    return RankStability(torch.stack(overlaps), torch.stack(jaccards))


def _check_reference(reference: ReferenceLists | None, n_items: int) -> None:
    if reference is None:
        return
    if not isinstance(reference, ReferenceLists):
        raise checks.ArgumentTypeError(
            f"reference is a {type(reference).__name__}; allowed: ReferenceLists. Make them with reference_lists."
        )
    top = max(int(reference.items.max()), int(reference.lists.max()))
    if top >= n_items:
        raise checks.ArgumentError(
            f"reference names item {top}; allowed: 0..{n_items - 1}, the items of the model. Take lists of the same items."
        )
