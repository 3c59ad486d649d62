"""The frozen dataclasses that methods return, with one way to save, tabulate and plot them.

Every result derives from :class:`Result`: ``to_dict`` gives plain JSON values and ``from_dict`` restores the
object, tensors with their dtype and shape. What a result cost stands in ``cost``, counted by the oracle.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from perturbkit.core import checks

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = ["AttackResult", "Attribution", "Certificate", "Cost", "Minimum", "Result", "SampleResult"]


@dataclass(frozen=True, eq=False)
class Result:
    """Base of every result: a frozen dataclass of numbers, text, tensors, arrays and other results.

    Methods
    -------
    to_dict()
        Plain dictionaries, lists, numbers and text, which ``json.dumps`` accepts.
    from_dict(data)
        The inverse; refuses data of another class.
    """

    _registry: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = Result._registry.get(cls.__name__)
        if known is not None and known.__module__ != cls.__module__:
            # Saved results name their class alone, so that moving a module does not orphan them.
            raise TypeError(f"{cls.__module__} and {known.__module__} both define a result {cls.__name__}")
        Result._registry[cls.__name__] = cls

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        values = {f.name: _encode(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return {"type": type(self).__name__, **values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the result that ``to_dict`` described.

        Raises
        ------
        DataError
            If the data describes another class or lacks a field.
        """
        made = _decode(dict(data))
        if not isinstance(made, cls):
            raise checks.DataError(
                f"the data describes a {data.get('type')!r}; allowed: {cls.__name__}. "
                "Use the from_dict of the class that wrote it."
            )
        return made


def _encode(value: Any) -> Any:
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, Tensor):
        flat = value.detach().cpu().reshape(-1)
        return {"tensor": _numbers(flat.tolist()), "shape": list(value.shape), "dtype": str(value.dtype)[6:]}
    if isinstance(value, np.ndarray):
        return {
            "array": _numbers(value.reshape(-1).tolist()),
            "shape": list(value.shape),
            "dtype": str(value.dtype),
        }
    if isinstance(value, np.generic):
        return _encode(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, Mapping):
        return {"mapping": [[_encode(k), _encode(v)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise checks.ArgumentTypeError(
        f"a {type(value).__name__} cannot be saved in a result; allowed: numbers, text, tensors, arrays, results."
    )


def _numbers(values: list[Any]) -> list[Any]:
    """Replace what JSON cannot hold (NaN, infinities, complex numbers) by text."""
    return [
        str(v) if isinstance(v, complex) or (isinstance(v, float) and not math.isfinite(v)) else v
        for v in values
    ]


def _restore(values: list[Any], complex_: bool) -> list[Any]:
    return [(complex(v) if complex_ else float(v)) if isinstance(v, str) else v for v in values]


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "type" in value:
        cls = Result._registry.get(value["type"])
        if cls is None:
            raise checks.DataError(f"the data describes a {value['type']!r}, which is not a known result.")
        names = {f.name for f in dataclasses.fields(cls)}
        lacking = [
            f.name
            for f in dataclasses.fields(cls)
            if f.name not in value
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        if lacking:
            raise checks.DataError(
                f"the data of a {value['type']} lacks {', '.join(lacking)}; allowed: all fields without a default. "
                "Use data written by to_dict."
            )
        return cls(**{k: _decode(v) for k, v in value.items() if k in names})
    if "tensor" in value:
        dtype = getattr(torch, value["dtype"])
        numbers = _restore(value["tensor"], dtype.is_complex)
        return torch.tensor(numbers, dtype=dtype).reshape(value["shape"])
    if "array" in value:
        kind = np.dtype(value["dtype"])
        numbers = value["array"] if kind.kind in "US" else _restore(value["array"], kind.kind == "c")
        return np.array(numbers, dtype=kind).reshape(value["shape"])
    if "float" in value:
        return float(value["float"])
    if "mapping" in value:
        return {_decode(k): _decode(v) for k, v in value["mapping"]}
    if "tuple" in value:
        return tuple(_decode(v) for v in value["tuple"])
    return {k: _decode(v) for k, v in value.items()}


@dataclass(frozen=True)
class Cost(Result):
    """What a result cost, in rows: one row is one example through the function once.

    Attributes
    ----------
    nfev : int
        Rows evaluated (forward passes, those inside a gradient included).
    ngrad : int
        Rows of which a gradient or vector-Jacobian product was taken.
    njvp : int
        Rows of which a Jacobian-vector product was taken.
    """

    nfev: int = 0
    ngrad: int = 0
    njvp: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.nfev + other.nfev, self.ngrad + other.ngrad, self.njvp + other.njvp)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.nfev - other.nfev, self.ngrad - other.ngrad, self.njvp - other.njvp)


@dataclass(frozen=True, eq=False)
class Minimum(Result):
    """Where a solver ended, why, and what it cost.

    Attributes
    ----------
    x : Tensor, shape (..., d)
        Solution, one row a run where several were started.
    fun : Tensor, shape (...,)
        Objective there.
    converged : bool
        Whether the stopping rule was met, by all runs.
    message : str
        Why it stopped.
    history : Tensor, shape (iterations, ...)
        What the solver knew of the objective, or of its stopping statistic, at each iteration; see the solver.
    gap : Tensor, shape (...,), or None
        Certificate: the objective at ``x`` is at most this much above the minimum, where the solver has one.
    cost : Cost
        Evaluations and gradients of the objective, all runs together.
    """

    x: Tensor
    fun: Tensor
    converged: bool
    message: str
    history: Tensor
    gap: Tensor | None = None
    cost: Cost = Cost()


@dataclass(frozen=True, eq=False)
class Attribution(Result):
    """How much each part of an input matters to an output.

    Attributes
    ----------
    values : Tensor
        Scores in the input's shape, or in the shape of a coarser grid that the method states; positive means
        that the part speaks for the target.
    target : Tensor or None
        The output explained, one index a row; ``None`` where the method needs none.
    cost : Cost
        Evaluations spent.
    method : str
        Name of the method.
    extras : dict
        What the method adds: a completeness gap, a baseline's output, a standard error.
    """

    values: Tensor
    target: Tensor | None = None
    cost: Cost = field(default_factory=Cost)
    method: str = ""
    extras: dict[str, Any] = field(default_factory=dict)

    def to_frame(self, names: Sequence[str] | None = None) -> pd.DataFrame:
        """Return one line a row and part: ``row``, ``part``, ``value``."""
        import pandas as pd

        flat = self.values.detach().cpu().reshape(len(self.values), -1)
        parts = list(names) if names is not None else [str(i) for i in range(flat.shape[1])]
        return pd.DataFrame(
            {
                "row": np.repeat(np.arange(len(flat)), flat.shape[1]),
                "part": parts * len(flat),
                "value": flat.numpy().reshape(-1),
            }
        )

    def plot(
        self,
        row: int = 0,
        *,
        x: Tensor | None = None,
        names: Sequence[str] | None = None,
        ax: Axes | None = None,
        top: int = 12,
    ) -> Axes:
        """Draw one row: a heat map over an image, coloured tokens, or bars for a table.

        Parameters
        ----------
        row : int
            Which row of the batch.
        x : Tensor, optional
            The inputs, to draw an image under the heat map; shape (n, channels, height, width), in [0, 1].
        names : sequence of str, optional
            Tokens or feature names. Tokens are drawn in reading order if ``values`` is a sequence of more
            than ``top`` parts, else as bars.
        ax : matplotlib Axes, optional
            Where to draw; a new figure by default.
        top : int
            Number of bars, the largest in magnitude.

        Returns
        -------
        matplotlib.axes.Axes
        """
        from matplotlib.figure import Figure

        index = checks.integer("row", row, low=0, high=len(self.values) - 1)
        ax = ax if ax is not None else Figure(figsize=(4, 4), layout="constrained").subplots()
        values = self.values[index].detach().cpu().float()
        if values.ndim >= 2 and names is None:
            heat = values.sum(0) if values.ndim == 3 else values
            picture = None if x is None else x[index].detach().cpu().float().clamp(0, 1)
            _draw_heat(ax, heat.numpy(), picture)
        elif names is not None and len(names) > top:
            _draw_tokens(ax, [str(n) for n in names], values.reshape(len(names), -1).sum(1).numpy())
        else:
            flat = values.reshape(-1).numpy()
            _draw_bars(
                ax, list(names) if names is not None else [str(i) for i in range(len(flat))], flat, top
            )
        ax.set_title(self.method)
        return ax


def _draw_heat(ax: Axes, heat: np.ndarray, picture: Tensor | None) -> None:
    limit = float(np.abs(heat).max()) or 1.0
    height, width = heat.shape
    if picture is not None:
        gray = picture.mean(0).numpy()
        ax.imshow(gray, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    ax.imshow(
        heat,
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        alpha=0.6 if picture is not None else 1.0,
        extent=(0, width, height, 0),
    )
    ax.set_axis_off()


def _draw_bars(ax: Axes, names: list[str], values: np.ndarray, top: int) -> None:
    order = np.argsort(-np.abs(values))[:top][::-1]
    ax.barh(
        [names[i] for i in order],
        values[order],
        color=["#b2182b" if values[i] > 0 else "#2166ac" for i in order],
    )
    ax.axvline(0, color="0.3", lw=0.8)


def _draw_tokens(ax: Axes, tokens: list[str], values: np.ndarray) -> None:
    """Lay tokens out in lines, red where they speak for the target and blue where against."""
    from matplotlib import colormaps

    limit = float(np.abs(values).max()) or 1.0
    column, line, width = 0, 0, 48
    for token, value in zip(tokens, values, strict=True):
        if column + len(token) > width:
            column, line = 0, line + 1
        color = colormaps["RdBu_r"](0.5 + 0.5 * value / limit)
        ax.text(
            column,
            -line,
            token.replace("$", r"\$"),
            family="monospace",
            fontsize=8,
            va="center",
            bbox={"facecolor": color, "alpha": 0.6, "edgecolor": "none", "pad": 1.5},
        )
        column += len(token) + 1
    ax.set_xlim(-1, width + 1)
    ax.set_ylim(-line - 1, 1)
    ax.set_axis_off()


@dataclass(frozen=True, eq=False)
class AttackResult(Result):
    """What an attack found, row by row.

    Attributes
    ----------
    x : Tensor
        Perturbed inputs, in the shape of the clean ones; the clean input where the attack failed.
    success : Tensor of bool, shape (n,)
        Whether the prediction at ``x`` is wrong, re-evaluated after the attack.
    radius : Tensor, shape (n,)
        Norm of the perturbation; infinity where the attack failed, zero where the clean input is already wrong.
    norm : str
        The norm of the radius: "l1", "l2" or "linf".
    cost : Cost
        Evaluations spent.
    """

    x: Tensor
    success: Tensor
    radius: Tensor
    norm: str
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True, eq=False)
class Certificate(Result):
    """What is proved, row by row: bounds on outputs over a perturbation set, or a radius without change.

    Attributes
    ----------
    lower, upper : Tensor or None
        Bounds on the outputs over the set, shape (n, outputs).
    radius : Tensor or None
        Largest radius proved, shape (n,).
    norm : str
        The norm of the set or radius.
    function : str
        Of which function this is proved ("the model", "the smoothed model, sigma 0.25").
    confidence : float
        1 for a proof, less where the certificate holds with a probability.
    cost : Cost
        Evaluations spent.
    """

    lower: Tensor | None = None
    upper: Tensor | None = None
    radius: Tensor | None = None
    norm: str = "linf"
    function: str = "the model"
    confidence: float = 1.0
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True, eq=False)
class SampleResult(Result):
    """Draws of a sampler.

    Attributes
    ----------
    x : Tensor
        The draws, batch first.
    times : Tensor or None
        The times visited, from noise to data.
    cost : Cost
        Evaluations of the denoiser or log-density, in rows.
    extras : dict
        What the sampler adds (rejections, a trajectory).
    """

    x: Tensor
    times: Tensor | None = None
    cost: Cost = field(default_factory=Cost)
    extras: dict[str, Any] = field(default_factory=dict)
