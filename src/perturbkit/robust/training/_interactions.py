"""Lists of interactions and of ranked items: how :mod:`finest` changes the ones and compares the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.random import Seed, as_generator, randint, uniform

__all__ = [
    "KINDS",
    "Kind",
    "checked_interactions",
    "checked_kinds",
    "padded",
    "perturb_interactions",
    "rank_biased_overlap",
]

Kind = Literal["delete", "replace", "insert"]
KINDS: tuple[Kind, ...] = ("delete", "replace", "insert")


def perturb_interactions(
    interactions: Sequence[Tensor], ratio: float, *, n_items: int | None = None, kinds: Sequence[Kind] = KINDS,
    which: Literal["random", "earliest", "popular"] = "random", generator: Seed = None,
) -> list[Tensor]:  # fmt: skip
    """Change a share of the interactions.

    Parameters
    ----------
    interactions : sequence of Tensor of int64
        The items of each user, in order.
    ratio : float
        Share of all interactions, in [0, 1]; rounded up to a whole number.
    n_items : int, optional
        New items are drawn from 0 to ``n_items - 1``; by default up to the largest that occurs.
    kinds : sequence of {"delete", "replace", "insert"}
        One is drawn for every interaction that is changed: it goes, becomes another item, or is followed by one.
    which : {"random", "earliest", "popular"}
        What is changed: anything, the first interactions of users, or those with the items that occur most.
    generator : torch.Generator, int or None
        Source of the choice and of new items.

    Returns
    -------
    list of Tensor
        Users without a change are the same; one whose every interaction would go keeps the first.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the data or an option are not allowed.

    Notes
    -----
    Ties in the choice are broken at random. Cost: a sort of all interactions.

    References
    ----------
    Oh et al. (2024), arXiv:2402.03481, section 4.2.

    Examples
    --------
    >>> data = [torch.tensor([0, 1, 2]), torch.tensor([2, 3])]
    >>> sum(map(len, perturb_interactions(data, 0.4, kinds=["insert"], generator=0)))
    7
    """
    data = checked_interactions(interactions)
    checks.between("ratio", ratio, 0, 1)
    flat = torch.cat(data)
    top = int(flat.max()) + 1
    count = checks.integer("n_items", top if n_items is None else n_items, low=max(top, 2))
    chosen_kinds = [KINDS.index(kind) for kind in checked_kinds(kinds)]
    checks.one_of("which", which, ("random", "earliest", "popular"))
    g = as_generator(generator)
    n, lengths = len(flat), torch.tensor([len(u) for u in data])
    users = torch.arange(len(data)).repeat_interleave(lengths)
    place = torch.arange(n) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    first = {"random": torch.zeros(n), "earliest": place, "popular": -flat.bincount()[flat].cpu()}[which]
    order = (first.double() + uniform((n,), generator=g, dtype=torch.float64, device="cpu")).argsort()
    # Less what the product is too large by: 0.07 of 100 are 7.
    n_changed = min(n, math.ceil(ratio * n * (1 - 1e-12)))
    changed = torch.zeros(n, dtype=torch.bool).index_fill_(0, order[:n_changed], True)
    kind = torch.tensor(chosen_kinds)[randint(0, len(chosen_kinds), (n,), generator=g, device="cpu")]
    # Another item than the one that is there.
    new = ((flat.cpu() + randint(1, count, (n,), generator=g, device="cpu")) % count).to(flat.device)
    deleted, replaced, followed = (changed & (kind == i) for i in range(3))
    stays = torch.zeros(len(data), dtype=torch.long).index_add_(0, users, (~deleted).long())
    deleted &= ~((stays[users] == 0) & (place == 0))
    items = torch.where(replaced.to(flat.device), new, flat)
    items = torch.cat([items[~deleted], new[followed]])
    owners = torch.cat([users[~deleted], users[followed]])
    position = torch.cat([torch.arange(n)[~deleted].double(), torch.arange(n)[followed] + 0.5])
    items = items[position.argsort().to(items.device)]
    return list(items.split(owners.bincount(minlength=len(data)).tolist()))


def rank_biased_overlap(a: Any, b: Any, *, p: float = 0.9) -> Tensor:
    """Return the extrapolated rank-biased overlap of two rankings of equal length.

    Parameters
    ----------
    a, b : Tensor or sequence of int, shape (k,) or (n, k)
        Items, best first, each at most once.
    p : float
        How deep the lists matter, in (0, 1): the share ``1 - p^d`` of a reader's looks is within the first d, roughly.

    Returns
    -------
    Tensor of float64, shape () or (n,)
        From 0, for lists without a common item, to 1, for equal ones.

    Raises
    ------
    ArgumentError
        If shapes differ or an item occurs twice in a list.

    Notes
    -----
    ``(1 - p) sum_{d=1}^k p^{d-1} A_d + p^k A_k`` with the agreement ``A_d = |a_{1:d} & b_{1:d}| / d``.

    References
    ----------
    Webber, Moffat and Zobel (2010), A similarity measure for indefinite rankings, equation 30.

    Examples
    --------
    >>> round(float(rank_biased_overlap([1, 2, 3], [1, 3, 2], p=0.5)), 3)
    0.875
    """
    left, right = (
        v if isinstance(v, Tensor) else torch.as_tensor(checks.array(name, v, dtype=int))
        for name, v in (("a", a), ("b", b))
    )
    checks.tensor("a", left, ndim=(1, 2), floating=False)
    checks.same_shape("b", right, "a", left)
    checks.between("p", p, 0, 1, inclusive="neither")
    for name, lists in (("a", left), ("b", right)):
        ordered = lists.sort(-1).values
        if bool((ordered[..., 1:] == ordered[..., :-1]).any()):
            raise checks.ArgumentError(
                f"{name} names an item twice; allowed: each item once in a list. Remove the repeats."
            )
    k = left.shape[-1]
    depth = torch.arange(1, k + 1, device=left.device)
    common = (left[..., :, None] == right[..., None, :]).flatten(-2).double()
    # A common item counts from the deeper of its two places on.
    deeper = (torch.maximum(depth[:, None], depth) - 1).flatten().expand(common.shape)
    arrived = torch.zeros(left.shape, dtype=common.dtype, device=left.device).scatter_add_(-1, deeper, common)
    agreement = arrived.cumsum(-1) / depth
    weights = (1 - p) * p ** (depth.double() - 1)
    return (weights * agreement).sum(-1) + p**k * agreement[..., -1]


def checked_kinds(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """Accept at least one kind of change."""
    given = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not given:
        raise checks.ArgumentError("kinds is empty; allowed: 'delete', 'replace', 'insert'. Give one.")
    return tuple(checks.one_of("kinds", kind, KINDS) for kind in given)


def checked_interactions(interactions: Sequence[Tensor], n_items: int | None = None) -> list[Tensor]:
    """Accept at least one user, each with at least one item."""
    if not isinstance(interactions, Sequence | Tensor):
        raise checks.ArgumentTypeError(
            f"the interactions are a {type(interactions).__name__}; allowed: a sequence of tensors. Pass one a user."
        )
    if len(interactions) == 0:
        raise checks.ArgumentError("the interactions are empty; allowed: at least one user. Pass data.")
    return [checks.labels("the items of a user", user, n_classes=n_items) for user in interactions]


def padded(data: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the items in one tensor, -1 after the last of a user."""
    return nn.utils.rnn.pad_sequence(list(data), batch_first=True, padding_value=-1).to(device)
