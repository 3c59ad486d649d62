"""What a reproduction is written with: the record of its paper, its run, and the evidence it returns.

The verdict follows from the numbers alone: each comparison states its direction and margin beforehand.
"""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from perturbkit.core import checks
from perturbkit.core.progress import ProgressLike
from perturbkit.core.results import Result
from perturbkit.papers.records import PaperRecord, validated

if TYPE_CHECKING:
    import numpy as np
    import torch
    from matplotlib.figure import Figure

__all__ = ["Comparison", "Evidence", "Run", "paper"]

Direction = Literal["higher", "lower", "equal"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Comparison(Result):
    """One number of the method against the same number of the baseline, on the same work in one run.

    Attributes
    ----------
    metric : str
        What is compared, with its unit.
    ours, baseline : float
        The method's number and the baseline's. NaN never holds.
    direction : {"higher", "lower", "equal"}
        What the claim says of the method's number.
    margin : float
        By how much it must be better ("higher", "lower"; negative: by how much it may be worse), or how far it may
        be off ("equal").
    factor : float
        The baseline is multiplied by this first.
    spread : float or None
        Standard error of the difference over seeds; ``None`` without repetition.
    n : int
        Number of seeds, rows or problems behind the numbers.
    control : bool
        Whether this must *fail*: the same comparison for something that cannot work (a random saliency, untrained
        weights). If it holds, the test proves nothing.
    note : str
        What a reader should know.

    Notes
    -----
    Holds if ours >= factor * baseline + margin ("higher"), ours <= factor * baseline - margin ("lower"), or
    |ours - factor * baseline| <= margin ("equal").

    Examples
    --------
    >>> Comparison("accuracy", ours=0.92, baseline=0.90, direction="higher", margin=0.01).holds
    True
    >>> Comparison("error", ours=0.5, baseline=0.9, direction="lower", factor=0.5).holds
    False
    """

    metric: str
    ours: float
    baseline: float
    direction: Direction
    margin: float = 0.0
    factor: float = 1.0
    spread: float | None = None
    n: int = 1
    control: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.metric, str) or not self.metric.strip():
            raise checks.ArgumentTypeError(
                f"metric is {self.metric!r}; allowed: some text. Name what is compared, with its unit."
            )
        checks.one_of("direction", self.direction, ("higher", "lower", "equal"))
        for name in ("ours", "baseline"):
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        low = 0.0 if self.direction == "equal" else -math.inf
        object.__setattr__(self, "margin", checks.between("margin", self.margin, low, math.inf))
        object.__setattr__(self, "factor", checks.positive("factor", self.factor))
        object.__setattr__(self, "n", checks.integer("n", self.n, low=1))
        if self.spread is not None:
            object.__setattr__(self, "spread", _number("spread", self.spread))

    @property
    def threshold(self) -> float:
        """The number that decides: the baseline with factor and margin (for "equal": with the factor)."""
        sign = {"higher": 1.0, "lower": -1.0, "equal": 0.0}[self.direction]
        return self.factor * self.baseline + sign * self.margin

    @property
    def holds(self) -> bool:
        """Whether the numbers are as the claim says."""
        if self.direction == "higher":
            return self.ours >= self.threshold
        if self.direction == "lower":
            return self.ours <= self.threshold
        return abs(self.ours - self.threshold) <= self.margin

    @property
    def as_wanted(self) -> bool:
        """Whether it holds, or, for a control, fails."""
        return self.holds != self.control

    @classmethod
    def over_seeds(
        cls,
        metric: str,
        ours: Sequence[float],
        baseline: Sequence[float],
        direction: Direction,
        *,
        margin: float = 0.0,
        factor: float = 1.0,
        control: bool = False,
        note: str = "",
    ) -> Self:
        """Compare means over seeds, one number a seed for each side, paired.

        Parameters
        ----------
        metric, direction, margin, factor, control, note
            As in the class.
        ours, baseline : sequence of float
            One number a seed, in the same order of seeds.

        Returns
        -------
        Comparison
            With the means, and the standard error of ours - factor * baseline as ``spread``.

        Raises
        ------
        ArgumentError
            If the two are empty or differ in length.

        Examples
        --------
        >>> c = Comparison.over_seeds("accuracy", [0.9, 0.8], [0.7, 0.7], "higher")
        >>> round(c.ours, 3), c.n, round(c.spread, 3)
        (0.85, 2, 0.05)
        """
        left, right = [_number("ours", v) for v in ours], [_number("baseline", v) for v in baseline]
        if len(left) != len(right) or not left:
            raise checks.ArgumentError(
                f"ours has {len(left)} numbers and baseline {len(right)}; allowed: as many, at least one. "
                "Give one number a seed for each side."
            )
        differences = [a - factor * b for a, b in zip(left, right, strict=True)]
        spread = None
        if len(left) > 1:
            finite = all(map(math.isfinite, differences))
            spread = statistics.stdev(differences) / math.sqrt(len(left)) if finite else math.nan
        return cls(
            metric,
            sum(left) / len(left),
            sum(right) / len(right),
            direction,
            margin=margin,
            factor=factor,
            spread=spread,
            n=len(left),
            control=control,
            note=note,
        )


@dataclass(frozen=True)
class Evidence:
    """What a reproduction found.

    Attributes
    ----------
    comparisons : sequence of Comparison
        At least one that is not a control.
    figure : matplotlib Figure, optional
        The finding at a glance.
    notes : str
        What a reader should know: the scale, what was left out, what did not reproduce.
    samples : mapping of str to bytes
        What came out, to look at and listen to: PNG and WAV files by name, as "digits.png"; the gallery shows them.

    Examples
    --------
    >>> claim = Comparison("accuracy", 0.9, 0.8, "higher")
    >>> Evidence([claim, Comparison("accuracy, shuffled labels", 0.5, 0.8, "higher", control=True)]).holds
    True
    """

    comparisons: Sequence[Comparison]
    figure: Figure | None = None
    notes: str = ""
    samples: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = tuple(self.comparisons)
        if not all(isinstance(c, Comparison) for c in given) or all(c.control for c in given):
            raise checks.ArgumentError(
                f"comparisons is {given!r}; allowed: Comparison objects, at least one not a control. "
                "State the claim as a comparison of numbers."
            )
        object.__setattr__(self, "comparisons", given)
        for name, content in self.samples.items():
            if not re.fullmatch(r"[a-z0-9_-]+\.(png|wav)", name) or not isinstance(content, bytes):
                raise checks.ArgumentError(
                    f"samples has {name!r} with a {type(content).__name__}; allowed: bytes under names of small letters, "
                    "digits, - and _ that end in .png or .wav. Rename it."
                )

    @property
    def holds(self) -> bool:
        """Whether every comparison of the claim holds and every control fails."""
        return all(c.as_wanted for c in self.comparisons)


@dataclass(frozen=True)
class Run:
    """What a reproduction is given: a seed, generators derived from it by name, and where progress goes.

    Attributes
    ----------
    seed : int
        Seed of the whole run.
    progress : Progress, bool or None
        Passed on to long work.

    Examples
    --------
    >>> import torch
    >>> run = Run(seed=3)
    >>> bool(torch.equal(torch.rand(2, generator=run.generator("a")), torch.rand(2, generator=run.generator("a"))))
    True
    >>> run.seeds(2) == run.seeds(3)[:2]
    True
    """

    seed: int = 0
    progress: ProgressLike = False

    def generator(self, name: str) -> torch.Generator:
        """Return a new torch generator for a purpose; the same name gives the same stream."""
        import torch

        return torch.Generator().manual_seed(self._derived(name))

    def rng(self, name: str) -> np.random.Generator:
        """Return a new NumPy generator for a purpose; the same name gives the same stream."""
        import numpy as np

        return np.random.default_rng(self._derived(name))

    def seeds(self, n: int) -> list[int]:
        """Return ``n`` seeds for repetitions, in 0 .. 2**32 - 1."""
        return [self._derived(f"seed {i}") % 2**32 for i in range(n)]

    def _derived(self, name: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:8], "big") >> 1


def paper(
    *,
    number: int,
    title: str,
    authors: str,
    year: int,
    arxiv: str,
    claim: str,
    method: str,
    needs: str,
    input: str,
    cost: str,
    seconds: float,
) -> Callable[[F], F]:
    """Say which paper a function reproduces; every argument is a literal.

    Parameters
    ----------
    number, title, authors, year, arxiv, claim, method, needs, input, cost, seconds
        The attributes of :class:`~perturbkit.papers.records.PaperRecord`.

    Returns
    -------
    callable
        A decorator that leaves the function as it is, with the record in its ``record``.

    Raises
    ------
    ArgumentError
        If an argument is empty, of the wrong type or not allowed.
    """
    values: dict[str, Any] = {
        "number": number,
        "title": title,
        "authors": authors,
        "year": year,
        "arxiv": arxiv,
        "claim": claim,
        "method": method,
        "needs": needs,
        "input": input,
        "cost": cost,
        "seconds": seconds,
    }

    def decorate(function: F) -> F:
        path = Path(function.__code__.co_filename)
        checked = validated(values, f"{path.parent.name}/{path.name}")
        function.record = PaperRecord(path.stem, path.parent.name, path, **checked)  # type: ignore[attr-defined]
        return function

    return decorate


def _number(name: str, value: Any) -> float:
    several = getattr(value, "shape", ()) != ()
    if isinstance(value, bool | str) or several or not hasattr(value, "__float__"):
        raise checks.ArgumentTypeError(f"{name} is {value!r}; allowed: one number. Pass a float.")
    return float(value)
