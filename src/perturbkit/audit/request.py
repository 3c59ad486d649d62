"""What is asked of an audit, in one frozen object."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from perturbkit.core import checks

__all__ = ["PROFILES", "SECTIONS", "AuditRequest", "Profile", "parse_duration"]

SECTIONS = (
    "sanity",
    "explain",
    "faithfulness",
    "attack",
    "certify",
    "sandwich",
    "calibration",
    "conformal",
    "corruption",
    "weakest",
    "slices",
)


@dataclass(frozen=True)
class Profile:
    """How much work an audit may do.

    Attributes
    ----------
    rows : int or None
        Rows of data used; ``None`` for all.
    flops : float
        Floating-point operations of model evaluations, over all sections. A count of operations and not of
        seconds, so that the same request plans the same work on every machine.
    """

    rows: int | None
    flops: float


# On two laptop cores: about a minute, ten minutes, and as long as it takes.
PROFILES = {
    "quick": Profile(rows=200, flops=1.0e12),
    "standard": Profile(rows=1000, flops=1.2e13),
    "full": Profile(rows=None, flops=float("inf")),
}


@dataclass(frozen=True)
class AuditRequest:
    """One audit: what to open, what to measure, how much to spend, where to write.

    Attributes
    ----------
    task : {"image", "tabular", "text"} or None
        ``None``: told from the data.
    profile : {"quick", "standard", "full"}
        How much work to do.
    n : int or None
        Rows, overriding the profile.
    seed : int
        Every random draw follows from it.
    sections : tuple of str
        Sections to run, in the order of the report.
    norm : {"linf", "l2"}
        Norm of the attack and the certificate.
    eps : float or None
        The perturbation size that a model should bear, in input units; ``None``: 1/255 for images (linf),
        0.05 of each feature's standard deviation for tables.
    alpha : float
        Miscoverage allowed to conformal sets, in (0, 1).
    bounds : tuple of float or None
        Range of valid inputs; ``None``: [0, 1] for images, none for tables.
    device : str or None
        Device of the model.
    memory : str or int or None
        Memory budget of a batch.
    out : Path or None
        Folder of the report; findings are saved there as they are finished.
    budget : float or None
        Seconds after which nothing more is measured; ``None``: no limit.
    frozen : tuple of str
        Columns of a table that no attack, proof or damage may change.
    """

    task: str | None = None
    profile: str = "quick"
    n: int | None = None
    seed: int = 0
    sections: tuple[str, ...] = SECTIONS
    norm: Literal["linf", "l2"] = "linf"
    eps: float | None = None
    alpha: float = 0.1
    bounds: tuple[float, float] | None = None
    device: str | None = None
    memory: str | int | None = None
    out: Path | None = None
    budget: float | None = None
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.task is not None:
            checks.one_of("task", self.task, ("image", "tabular", "text"))
        checks.one_of("profile", self.profile, PROFILES)
        if self.n is not None:
            checks.integer("n", self.n, low=2)
        checks.integer("seed", self.seed, low=0, high=2**31 - 1)
        checks.one_of("norm", self.norm, ("linf", "l2"))
        if self.eps is not None:
            checks.positive("eps", self.eps)
        checks.between("alpha", self.alpha, 0, 1, inclusive="neither")
        for section in self.sections:
            checks.one_of("section", section, SECTIONS)
        if isinstance(self.frozen, str):
            raise checks.ArgumentTypeError(
                f"frozen is {self.frozen!r}; allowed: a sequence of names of columns. Write [{self.frozen!r}]."
            )
        names = () if self.frozen is None else self.frozen
        object.__setattr__(self, "frozen", tuple(dict.fromkeys(map(str, names))))
        if self.budget is not None:
            checks.positive("budget", self.budget)
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise checks.ArgumentError(
                f"bounds is {self.bounds}; allowed: low below high. Write for instance --bounds 0,1."
            )

    @property
    def rows(self) -> int | None:
        """Rows of data used at most."""
        return self.n if self.n is not None else PROFILES[self.profile].rows

    def selecting(self, only: tuple[str, ...] = (), skip: tuple[str, ...] = ()) -> AuditRequest:
        """Return the request with only these sections, or without those."""
        for section in (*only, *skip):
            checks.one_of("section", section, SECTIONS)
        chosen = tuple(s for s in SECTIONS if (not only or s in only) and s not in skip)
        if not chosen:
            raise checks.ArgumentError(
                "no section is left to run; allowed: at least one of "
                f"{', '.join(SECTIONS)}. Take one out of --skip or put one into --only."
            )
        return replace(self, sections=chosen)


def parse_duration(text: str | float) -> float:
    """Return a time in seconds.

    Examples
    --------
    >>> parse_duration("90s"), parse_duration("10m"), parse_duration("1.5h"), parse_duration(30)
    (90.0, 600.0, 5400.0, 30.0)
    """
    units = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
    if isinstance(text, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", text.lower())
        try:
            if match is None:
                raise ValueError
            return float(checks.positive("budget", float(match[1]) * units[match[2]]))
        except (KeyError, ValueError):
            raise checks.ArgumentError(
                f"budget is {text!r}; allowed: a time above zero with s, m or h. Write for instance 90s or 10m."
            ) from None
    return float(checks.positive("budget", text))
