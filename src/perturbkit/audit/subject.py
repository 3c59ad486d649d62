"""The model and data under audit, opened and ready to be queried."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perturbkit.core import Oracle, checks, unwrap_output
from perturbkit.core.watch import paced, timed

__all__ = ["Subject", "TextModel"]


@dataclass(frozen=True)
class TextModel:
    """How a text classifier is read: by whole texts always, by embeddings where it has them.

    Attributes
    ----------
    predict : callable
        A list of n texts to logits or probabilities, Tensor of shape (n, classes).
    tokenize : callable or None
        A list of texts to ``(input_ids, attention_mask)``.
    embed : callable or None
        ``input_ids`` to embeddings, shape (n, tokens, width).
    from_embeddings : callable or None
        ``(embeddings, attention_mask)`` to logits, differentiable.
    decode : callable or None
        One row of ``input_ids`` to its tokens as text.
    unknown : int or None
        The token that stands for what the tokenizer does not know.
    longest : int or None
        Tokens of a text that the model reads; what follows is cut off.
    """

    predict: Callable[[Sequence[str]], Tensor]
    tokenize: Callable[[Sequence[str]], tuple[Tensor, Tensor]] | None = None
    embed: Callable[[Tensor], Tensor] | None = None
    from_embeddings: Callable[[Tensor, Tensor], Tensor] | None = None
    decode: Callable[[Tensor], list[str]] | None = None
    unknown: int | None = None
    longest: int | None = None


@dataclass(eq=False)
class Subject:
    """A model, its data and what is known of both.

    Attributes
    ----------
    name : str
        What the report calls the model.
    data_name : str
        What the report calls the data.
    task : {"image", "tabular", "text", "predictions"}
        Which sections' variants apply.
    oracle : Oracle or None
        The model, answering logits or probabilities of shape (n, classes); ``None`` for predictions only.
    x : Tensor or None
        Inputs: images (n, channels, height, width) or tables (n, features), NaN where a number of a table is missing.
    texts : list of str
        Inputs of a text model.
    y : Tensor of int64, shape (n,)
        Labels; float64 targets of a regression.
    classes : tuple of str
        Names of the classes, in the order of the outputs; empty for a regression.
    bounds : tuple or None
        Lowest and highest valid input value.
    feature_names : tuple of str
        Names of a table's columns.
    groups : tuple of str
        A group a row, for coverage by group and splits that keep groups whole; empty where there is none.
    text_model : TextModel or None
        The text model.
    given_probabilities : ndarray or None
        Predictions from a file, shape (n, classes) or (n, outputs).
    notes : list of str
        What was found odd on opening, for the sanity section.
    remarks : tuple of str
        What a reader should know of the data, without anything being odd.
    point : Tensor or None
        Of a regression, how its outputs are averaged to one answer, shape (outputs,): 1 for one number, the middle of
        quantiles. ``None`` for a classifier.
    no_gradient : str
        Why no gradient reaches the inputs, and what to do; empty where it may.
    operations : float or None
        Floating-point operations of a row, where PyTorch cannot count them.
    held : Tensor of bool
        Columns that hold categories, which only whole steps can change; empty where there are none.
    mark : str
        Hash of the file that the model came from; empty where it came from none.
    numbers : Tensor of int64, shape (n,)
        Where the rows stand in the data as given, from 0.
    """

    name: str
    data_name: str
    task: str
    y: Tensor
    classes: tuple[str, ...]
    oracle: Oracle | None = None
    x: Tensor | None = None
    texts: list[str] = field(default_factory=list)
    bounds: tuple[float, float] | None = None
    feature_names: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    text_model: TextModel | None = None
    given_probabilities: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)
    remarks: tuple[str, ...] = ()
    point: Tensor | None = None
    no_gradient: str = ""
    operations: float | None = None
    held: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    mark: str = ""
    _scores: Tensor | None = None
    numbers: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    _gradient: bool | None = None
    _alive: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.numbers) != len(self.y):
            self.numbers = torch.arange(len(self.y))

    @property
    def legal(self) -> dict[int, Any]:
        """By column of categories, the series of values that its whole numbers stand for; what is missing comes last."""
        return getattr(self.oracle.fun, "categories", {}) if self.oracle is not None else {}

    def missing(self) -> Tensor | None:
        """Return which numbers of a table are missing, a truth value a cell of ``x``; ``None`` where all are there."""
        if self.task != "tabular" or self.x is None:
            return None
        found = torch.isnan(self.x)
        return found if bool(found.any()) else None

    def missing_by_column(self) -> dict[str, int]:
        """Return how many cells of each column of a table are missing, by its name, where some are."""
        if self.task != "tabular" or self.x is None:
            return {}
        return missing_cells(self.x, self.feature_names, self.legal)

    def means(self) -> Tensor:
        """Return the mean of what is there in each column of ``x``, zero where nothing is."""
        assert self.x is not None
        return self.x.nanmean(0).nan_to_num(0.0)

    def filled(self) -> Subject:
        """Return the subject with means in the place of missing numbers; what the model said is kept."""
        absent = self.missing()
        if absent is None:
            return self
        assert self.x is not None
        return replace(self, x=torch.where(absent, self.means(), self.x))

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.y)

    @property
    def regression(self) -> bool:
        """Whether the model answers numbers rather than classes."""
        return self.point is not None

    def take(self, rows: Tensor) -> Subject:
        """Return the subject with only these rows; the model is shared, cached predictions are dropped."""
        index = rows.tolist()
        return replace(
            self, y=self.y[rows],
            x=None if self.x is None else self.x[rows],
            texts=[self.texts[i] for i in index] if self.texts else [],
            groups=tuple(self.groups[i] for i in index) if self.groups else (),
            given_probabilities=None if self.given_probabilities is None else self.given_probabilities[index],
            numbers=self.numbers[rows], _scores=None,
        )  # fmt: skip

    def scores(self) -> Tensor:
        """Return the model's outputs on every row, shape (n, classes); evaluated once."""
        if self._scores is None:
            if self.given_probabilities is not None:
                self._scores = torch.from_numpy(self.given_probabilities)
            elif self.task == "text":
                self._scores = self.predict_texts(self.texts)
            else:
                assert self.oracle is not None
                assert self.x is not None
                self._scores = self.oracle(self.x)
        return self._scores

    @property
    def scores_known(self) -> Tensor | None:
        """The outputs where they were evaluated before, else ``None``."""
        return self._scores

    def probabilities(self) -> np.ndarray:
        """Return class probabilities as float64, shape (n, classes); logits go through a softmax."""
        return to_probabilities(self.scores())

    def predictions(self) -> Tensor:
        """Return the predicted class of every row, -1 where the model answers NaN; of a regression, its number."""
        scores = self.scores()
        if self.point is not None:
            return scores.double() @ self.point
        return torch.where(torch.isnan(scores).any(1), -1, scores.argmax(1))

    def predict_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the outputs on texts, counted as evaluations of the oracle, in batches of at most 64.

        Texts of like length share a batch, since every one is padded to the longest.
        """
        assert self.text_model is not None
        assert self.oracle is not None
        parts, start = [], 0
        each: float | None = None
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        while start < len(texts):
            batch = [texts[i] for i in order[start : start + paced(64, each)]]
            began = time.perf_counter()
            with self.oracle.frozen(), torch.no_grad(), timed():
                out = self.text_model.predict(batch)
            each = (time.perf_counter() - began) / len(batch)
            self.oracle.nfev += len(batch)
            parts.append(torch.as_tensor(out))
            start += len(batch)
        found = torch.cat(parts)
        return torch.empty_like(found).index_copy_(0, torch.tensor(order, device=found.device), found)

    def point_oracle(self) -> Oracle:
        """Return the model as one number a row, shape (n, 1); for regressions."""
        assert self.oracle is not None
        assert self.point is not None
        weights = self.point
        return Derived(self.oracle, after=lambda out, z: out @ weights.to(out)[:, None])

    def left_out(self, *methods: str) -> str:
        """Say which methods were left out for want of a gradient, and what to do; nothing where there is one."""
        if self.has_gradient():
            return ""
        vanishes = (
            "the gradient is zero on every row tried: the model is constant around them, or hides its gradient"
            if self.gradient_vanishes()
            else ""
        )
        why = (self.no_gradient or vanishes) or (
            "no gradient reaches the input. Return the scores of a PyTorch module, without detaching them, to have it"
        )
        return f" Left out: {' and '.join(methods)}, since {why}."

    def answers_probabilities(self) -> bool:
        """Whether the outputs are probabilities rather than logits."""
        return is_probability(self.scores())

    def has_gradient(self) -> bool:
        """Whether gradients reach the inputs: tried once on a few rows, since a row may sit where they vanish."""
        if self._gradient is None:
            self._gradient = self._try_gradient()
        return self._gradient

    def gradient_vanishes(self) -> bool:
        """Whether there is a gradient, and it is zero on every row tried."""
        return not self.has_gradient() and self._alive is not None

    def gradient_alive(self) -> tuple[int, int]:
        """Return on how many rows the gradient was found other than zero, and how many were tried."""
        self.has_gradient()
        return (0, 0) if self._alive is None else (int(self._alive.sum()), len(self._alive))

    def _try_gradient(self) -> bool:
        if self.task == "predictions" or self.oracle is None or self.no_gradient:
            return False
        try:
            if self.task == "text":
                model = self.text_model
                if model is None or not (model.embed and model.from_embeddings and model.tokenize):
                    return False
                ids, mask = model.tokenize(self.texts[:4])
                embedded = model.embed(ids)
                gradient = Oracle(model.from_embeddings, chunk_size=1).gradient(embedded, 0, mask)
            else:
                assert self.x is not None
                few = self.x[torch.linspace(0, self.n - 1, min(8, self.n)).round().long()]
                target = (
                    torch.zeros(len(few), dtype=torch.long) if self.regression else self.oracle(few).argmax(1)
                )
                gradient = self.oracle.gradient(few, target)
        except (RuntimeError, TypeError, SystemExit, checks.PerturbkitError):
            return False
        if not bool(torch.isfinite(gradient).all()):
            return False
        self._alive = (gradient != 0).flatten(1).any(1)
        return bool(self._alive.any())


class Derived(Oracle):
    """An oracle of ``after(fun(before(x)))`` that adds its counts to the one it is derived from.

    Where one row stays one row (``alike``), what it takes of memory is measured once for all that are derived so.
    """

    def __init__(
        self, inner: Oracle, *, before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor, Tensor], Tensor] | None = None, alike: bool = False,
    ) -> None:  # fmt: skip
        self._inner = inner

        def derived(z: Tensor) -> Tensor:
            out = unwrap_output(inner.fun(z if before is None else before(z)))
            return out if after is None else after(out, z)

        super().__init__(derived, memory=inner.memory, chunk_size=inner.chunk_size, device=inner.device)
        if alike:
            self._known = inner._known

    def __call__(self, x: Tensor, *rows: Tensor) -> Tensor:
        with self._inner.frozen():
            out = super().__call__(x, *rows)
        self._inner.nfev += len(x)
        return out

    def value_and_gradient(self, x: Tensor, target: Any = None, *rows: Tensor, **options: Any) -> Any:
        with self._inner.frozen():
            out = super().value_and_gradient(x, target, *rows, **options)
        self._inner.nfev += len(x)
        self._inner.ngrad += len(x)
        return out


def missing_cells(x: Tensor, names: tuple[str, ...], legal: dict[int, Any]) -> dict[str, int]:
    """Return how many cells of each column are missing, where some are: numbers as NaN, categories as their last value."""
    counts = torch.isnan(x).sum(0)
    for place, values in legal.items():
        if len(values) and bool(values.isna().iloc[-1]):
            counts[place] = int((x[:, place] == len(values) - 1).sum())
    return {name: n for name, n in zip(names, counts.tolist(), strict=True) if n}


def point_weights(scores: Tensor) -> Tensor:
    """Return how one, two or three outputs of a regression are averaged to one answer, as float64.

    Examples
    --------
    >>> point_weights(torch.zeros(4, 3))
    tensor([0., 1., 0.], dtype=torch.float64)
    """
    weights = torch.zeros(scores.shape[1], dtype=torch.float64)
    if scores.shape[1] == 2:
        return weights + 0.5
    weights[scores.shape[1] // 2] = 1.0
    return weights


def is_probability(scores: Tensor) -> bool:
    """Whether every row is in [0, 1] and sums to one within 1e-3."""
    return bool((scores >= -1e-6).all()) and bool(((scores.sum(1) - 1).abs() < 1e-3).all())


def to_probabilities(scores: Tensor) -> np.ndarray:
    """Return probabilities from logits or probabilities, as float64.

    Rows that are in [0, 1] and sum to one within 1e-3 are taken for probabilities.
    """
    s = scores.detach().double().cpu()
    if is_probability(s):
        p = s.clamp(0, 1)
        return (p / p.sum(1, keepdim=True)).numpy()
    return s.softmax(1).numpy()
