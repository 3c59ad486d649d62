"""What the loaders return: a data set or a reference model, each with its provenance.

Both are frozen dataclasses; a data set can be cut into rows, split and shown as a data frame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.random import Seed, as_generator, randperm

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Dataset", "ReferenceModel"]


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Inputs and targets with names, units, value range, licence and source.

    Attributes
    ----------
    name : str
        Short name.
    task : str
        "image", "tabular" or "text".
    x : Tensor or tuple of str
        Images of shape (n, channels, height, width) in [0, 1], a table of shape (n, features), or n texts.
    y : Tensor, shape (n,)
        int64 class indices, or floating-point targets of a regression (``class_names`` is then empty).
    feature_names, units : tuple of str
        One a column of a table, else empty.
    class_names : tuple of str
        In the order of the labels; empty for a regression.
    target_name : str
        What ``y`` is, with its unit.
    value_range : tuple of float or None
        Smallest and largest value an input can take; ``None`` where no bound holds for all of them.
    licence, source, description : str
        Terms of use, where the data come from, and what they are.
    part : str
        "train", "test" or "all": the part of the fixed split that the rows belong to.
    index : Tensor, shape (n,)
        Row numbers in the whole data set, so that two parts can be compared.
    groups : Tensor or None, shape (n,)
        Rows with the same number are not independent (crops of one photograph); splits keep them together.
    group_names : tuple of str
        Name of each group.
    treatment : str
        The feature whose effect on ``y`` is asked for, in causal data sets.
    extras : dict of str to tuple
        Further columns, one entry a row.

    Examples
    --------
    >>> from perturbkit.data import load_wine
    >>> wine = load_wine()
    >>> wine
    Dataset('wine', tabular, 178 rows, x (178, 13), 3 classes, part 'all')
    >>> [len(half) for half in wine.split(0, (0.5, 0.5))]
    [89, 89]
    """

    name: str
    task: str
    x: Any
    y: Tensor
    licence: str
    source: str
    description: str
    feature_names: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    target_name: str = "class"
    value_range: tuple[float, float] | None = None
    part: str = "all"
    index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()
    treatment: str = ""
    extras: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.index) == 0:
            object.__setattr__(self, "index", torch.arange(len(self.y)))

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        shape = "texts" if self.task == "text" else str(tuple(self.x.shape))
        kind = f"{len(self.class_names)} classes" if self.class_names else self.target_name
        return f"Dataset({self.name!r}, {self.task}, {len(self)} rows, x {shape}, {kind}, part {self.part!r})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input; empty for a text."""
        return () if self.task == "text" else tuple(self.x.shape[1:])

    def rows(self, index: Tensor | Sequence[int]) -> Dataset:
        """Return the data set of some rows, in the given order.

        Parameters
        ----------
        index : Tensor or sequence of int
            Row numbers within this data set; at least one.

        Raises
        ------
        ArgumentError
            If a number is not that of a row.
        """
        chosen = checks.labels("index", torch.as_tensor(index), n_classes=len(self))
        numbers = chosen.tolist()
        return dataclasses.replace(
            self,
            x=tuple(self.x[i] for i in numbers) if self.task == "text" else self.x[chosen],
            y=self.y[chosen],
            index=self.index[chosen],
            groups=None if self.groups is None else self.groups[chosen],
            extras={key: tuple(column[i] for i in numbers) for key, column in self.extras.items()},
        )

    def split(self, generator: Seed = None, fractions: Sequence[float] = (0.5, 0.5)) -> tuple[Dataset, ...]:
        """Return disjoint random parts that together hold every row.

        Rows of one group stay together; the fractions then count groups.

        Parameters
        ----------
        generator : torch.Generator, int or None
            Source of the random order.
        fractions : sequence of float
            Share of each part, above zero, summing to one.

        Raises
        ------
        ArgumentError
            If the fractions do not sum to one, or a part would be empty.
        """
        shares = [checks.between("fractions", f, 0, 1, inclusive="high") for f in fractions]
        if abs(sum(shares) - 1) > 1e-9:
            raise checks.ArgumentError(
                f"fractions sum to {sum(shares):.6g}; allowed: a sum of 1. Divide them by their sum."
            )
        units = self.index.new_tensor(range(len(self))) if self.groups is None else torch.unique(self.groups)
        order = units[randperm(len(units), generator=as_generator(generator))]
        ends = [round(sum(shares[: i + 1]) * len(units)) for i in range(len(shares))]
        parts = [order[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        if any(len(part) == 0 for part in parts):
            what = "rows" if self.groups is None else "groups"
            raise checks.ArgumentError(
                f"fractions is {tuple(fractions)}, which leaves a part of {len(units)} {what} empty; allowed: "
                "at least one in each part. Ask for fewer or larger parts."
            )
        if self.groups is None:
            return tuple(self.rows(part) for part in parts)
        return tuple(self.rows(torch.isin(self.groups, part).nonzero()[:, 0]) for part in parts)

    def to_frame(self) -> pd.DataFrame:
        """Return a table or texts as a data frame, with the target (class names where there are) last.

        Raises
        ------
        DataError
            If the data are images.
        """
        import pandas as pd

        if self.task == "image":
            raise checks.DataError(
                f"{self.name!r} holds images; allowed: a table or texts. Use .x and .y instead of a data frame."
            )
        if self.task == "text":
            frame = pd.DataFrame({"text": list(self.x), **{k: list(v) for k, v in self.extras.items()}})
        else:
            frame = pd.DataFrame(self.x.numpy(), columns=list(self.feature_names))
        labels = self.y.tolist()
        frame[self.target_name] = [self.class_names[i] for i in labels] if self.class_names else labels
        return frame


@dataclass(frozen=True, eq=False, repr=False)
class ReferenceModel:
    """A network in evaluation mode with what must be known to use it.

    Attributes
    ----------
    name : str
        Short name.
    module : nn.Module
        Takes inputs as the matching loader gives them and returns logits; any normalisation is inside.
    class_names : tuple of str
        In the order of the logits.
    input_range : tuple of float or None
        Range of valid input values.
    preprocess : str
        What the module does to its inputs, and what it expects done before.
    licence, source : str
        Terms of use and where the weights come from.
    accuracy : float or None
        Share of right answers on rows that the network was not trained on; ``None`` if not measured.
    accuracy_on : str
        Which rows those were.
    """

    name: str
    module: nn.Module
    class_names: tuple[str, ...]
    input_range: tuple[float, float] | None
    preprocess: str
    licence: str
    source: str
    accuracy: float | None = None
    accuracy_on: str = ""

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.module.parameters())
        return f"ReferenceModel({self.name!r}, {len(self.class_names)} classes, {size} parameters)"
