"""Recommenders of the next item that :mod:`finest` trains: a small one, what they answer, and what they are trained by."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Oracle, checks
from perturbkit.core.random import Seed, as_generator, seeded_init, seeds

__all__ = ["NextItemModel", "best_items", "device_of", "items_of", "next_item_loss", "two_margins"]


class NextItemModel(nn.Module):
    """A small recurrent recommender: what comes next after each interaction.

    Parameters
    ----------
    n_items, dim : int
        Number of items, at least 2, and width of embeddings and state.
    generator : torch.Generator, int or None
        Source of the first weights.

    Raises
    ------
    ArgumentError
        If a size is not allowed.

    Notes
    -----
    A gated recurrent unit over item embeddings; ``scores = h_t E^T + b`` with the same embeddings E.

    References
    ----------
    Hidasi et al. (2016), Session-based recommendations with recurrent neural networks, arXiv:1511.06939.

    Examples
    --------
    >>> NextItemModel(10, 4, generator=0)(torch.tensor([[3, 1, -1]])).shape
    torch.Size([1, 3, 10])
    """

    def __init__(self, n_items: int, dim: int = 32, *, generator: Seed = None) -> None:
        super().__init__()
        self.n_items = checks.integer("n_items", n_items, low=2)
        checks.integer("dim", dim, low=1)
        with seeded_init(seeds(as_generator(generator), 1)[0]):
            self.embedding = nn.Embedding(n_items, dim)
            self.recurrent = nn.GRU(dim, dim, batch_first=True)
        self.embedding.weight.data /= dim**0.5
        self.bias = nn.Parameter(torch.zeros(n_items))

    def forward(self, items: Tensor) -> Tensor:
        """Return scores (n, T, n_items) for items (n, T), -1 after the last of a row."""
        state, _ = self.recurrent(self.embedding(items.clamp_min(0)))
        return state @ self.embedding.weight.T + self.bias


def items_of(model: nn.Module) -> int:
    """Return for how many items a recommender has scores."""
    if not isinstance(model, nn.Module):
        raise checks.ArgumentTypeError(
            f"model is a {type(model).__name__}; allowed: an nn.Module. Pass the trained recommender."
        )
    one = torch.zeros(1, 1, dtype=torch.long, device=device_of(model))
    return checks.tensor("the model's answer", Oracle(model)(one), shape=(1, 1, None), finite=False).shape[2]


def device_of(model: nn.Module) -> torch.device:
    """Return where a recommender is; one without weights, such as a table of counts, may be anywhere."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def best_items(scores: Tensor, k: int) -> Tensor:
    """Return the k items of highest score after each interaction, best first."""
    if bool(scores.isnan().any()):
        raise checks.ModelError(
            f"the model answered {int(scores.isnan().sum())} scores that are not a number; allowed: numbers, or minus "
            "infinity for items that may not be named. Train it at a lower rate."
        )
    return scores.topk(k, dim=2).indices


def two_margins(margins: tuple[float, float]) -> tuple[float, float]:
    """Accept two numbers, zero or above."""
    if not isinstance(margins, Sequence) or len(margins) != 2:
        raise checks.ArgumentTypeError(
            f"margins is {margins!r}; allowed: two numbers. Pass (within the list, below it)."
        )
    return checks.nonnegative("margins", margins[0]), checks.nonnegative("margins", margins[1])


def next_item_loss(model: nn.Module, items: Tensor) -> Tensor:
    """Return the mean cross-entropy of each item after those before it; zero where there is none."""
    if items.shape[1] == 1:
        items = functional.pad(items, (0, 1), value=-1)
    scores, following = model(items[:, :-1]), items[:, 1:]
    total = functional.cross_entropy(
        scores.flatten(0, 1), following.flatten(), ignore_index=-1, reduction="sum"
    )
    return total / (following >= 0).sum().clamp_min(1)
