"""Every explanation by every metric, in one table with a random control.

Use it to choose a method for a model: no metric decides alone, and a method that does not beat the random map on it says
nothing. Hedström et al. (2023), Quantus: An Explainable AI Toolkit for Responsible Evaluation of Neural Network
Explanations and Beyond, arXiv:2202.06861.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from perturbkit.core import Attribution, Distribution, Oracle, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randn, seeds
from perturbkit.explain.metrics._parts import Method, Model, explained, repeated
from perturbkit.explain.metrics.deletion_curve import deletion_curve, insertion_curve
from perturbkit.explain.metrics.infidelity import SquareRemoval, SubsetToBaseline, infidelity
from perturbkit.explain.metrics.max_sensitivity import max_sensitivity
from perturbkit.explain.metrics.pointing_game import pointing_game

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["compare"]

_CONTROL = "random"


def compare(
    model: Model,
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    methods: Sequence[Method] | Mapping[str, Method],
    baseline: Tensor | float = 0.0,
    mask: Tensor | None = None,
    perturbation: Distribution | None = None,
    radius: float = 0.05,
    n_samples: int = 200,
    n_points: int = 10,
    n_steps: int = 20,
    long: bool = False,
    generator: Seed = None,
    progress: ProgressLike = None,
) -> pd.DataFrame:
    """Score explanation methods by every metric, beside a random map.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Function of a batch (n, ...), answering (n, outputs) or (n,).
    x : Tensor, shape (n, features), (n, length, width) or (n, channels, height, width)
        Inputs, floating point.
    target : Tensor of shape (n,), int or None
        The output explained.
    methods : sequence or mapping of callable
        ``method(model, x, target)`` answers an Attribution or a tensor in the shape of ``x``, whose scores are **shares
        of the output** (for a gradient: gradient times input). Options are bound with ``functools.partial``. A mapping
        gives the names; else a method has its own.
    baseline : float or Tensor
        What takes the place of removed parts in every metric.
    mask : Tensor of bool, optional
        The right parts, as in :func:`pointing_game`, where they are known.
    perturbation : Distribution, optional
        For :func:`infidelity`. Default: random squares up to half of the side brought to the baseline for images,
        random halves of the features otherwise.
    radius : float
        Of the linf ball of :func:`max_sensitivity`, in units of the input.
    n_samples, n_points, n_steps : int
        Perturbations of the infidelity, points of the max-sensitivity, steps of the curves.
    long : bool
        Return one line for each method, metric and row, instead of means.
    generator : torch.Generator, int or None
        Source of all draws; every method is given the same perturbations.
    progress : Progress, bool or None
        Reports scores, of methods times metrics.

    Returns
    -------
    pandas.DataFrame
        One line a method, the random control last: the means of ``infidelity`` (best scale; lower is better),
        ``max_sensitivity`` (relative; lower), ``deletion`` (lower), ``insertion`` (higher) and, with a mask,
        ``pointing`` and ``energy`` (higher), and ``nfev`` and ``ngrad``, the evaluations of one explanation of ``x``.
        With ``long``: the columns ``method``, ``metric``, ``row``, ``value``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed, or a method answers another shape.

    Notes
    -----
    Cost for each method: ``n_points + 2`` explanations and ``n_samples + 2 n_steps + 3`` evaluations a row.

    References
    ----------
    Hedström et al. (2023), arXiv:2202.06861.

    Examples
    --------
    >>> import torch
    >>> f = lambda x: (x * torch.tensor([1.0, -2.0, 0.5])).sum(1)
    >>> removed = lambda model, x, target: x * torch.tensor([1.0, -2.0, 0.5])
    >>> frame = compare(f, torch.ones(4, 3), methods={"terms": removed}, generator=0, progress=False)
    >>> bool(frame.loc["terms", "infidelity"] < frame.loc["random", "infidelity"])
    True
    """
    import pandas as pd

    checks.tensor("x", x, ndim=(2, 3, 4))
    named = _named(methods)
    oracle, rows = Oracle.wrap(model), repeated(target, x)
    draw = perturbation
    if draw is None and x.ndim == 4:
        draw = SquareRemoval((1, max(1, min(x.shape[2:]) // 2)), baseline)
    elif draw is None:
        draw = SubsetToBaseline(0.5, baseline)
    source = as_generator(generator)
    infidelity_seed, points_seed, random_seed = seeds(source, 3)
    noise = as_generator(random_seed)
    named[_CONTROL] = lambda model, x, target: randn(x.shape, generator=noise, like=x)
    scores: dict[str, dict[str, Tensor]] = {}
    costs: dict[str, dict[str, int]] = {}
    metrics = _metrics(
        oracle,
        x,
        rows,
        baseline,
        mask,
        draw,
        radius,
        n_samples,
        n_points,
        n_steps,
        infidelity_seed,
        points_seed,
    )
    work = [(name, metric) for name in named for metric in metrics]
    for name, metric in track(work, "comparing explanations", progress=progress):
        if name not in scores:
            before = oracle.cost
            values = explained(named[name], oracle, x, rows)
            spent = oracle.cost - before
            scores[name], costs[name] = {}, {"nfev": spent.nfev, "ngrad": spent.ngrad}
        scores[name][metric] = metrics[metric](named[name], values)
    if long:
        lines = [
            {"method": name, "metric": metric, "row": i, "value": value}
            for name, found in scores.items()
            for metric, column in found.items()
            for i, value in enumerate(column.tolist())
        ]
        return pd.DataFrame(lines)
    means = {
        name: {m: float(v.mean()) for m, v in found.items()} | costs[name] for name, found in scores.items()
    }
    return pd.DataFrame.from_dict(means, orient="index").rename_axis("method")


def _named(methods: Sequence[Method] | Mapping[str, Method]) -> dict[str, Method]:
    if isinstance(methods, Mapping):
        named = dict(methods)
    else:
        names = [getattr(getattr(m, "func", m), "__name__", type(m).__name__) for m in methods]
        named = dict(zip(names, methods, strict=True))
        if len(named) < len(names):
            raise checks.ArgumentError(
                f"methods has the names {', '.join(names)}; allowed: different names. Pass a mapping from names to "
                "methods."
            )
    if not named or _CONTROL in named or not all(callable(m) for m in named.values()):
        raise checks.ArgumentError(
            f"methods is {list(named)}; allowed: at least one callable, none named {_CONTROL!r}. Pass functions "
            "method(model, x, target)."
        )
    return named


def _metrics(
    oracle: Oracle, x: Tensor, target: Tensor | None, baseline: Tensor | float, mask: Tensor | None, draw: Distribution,
    radius: float, n_samples: int, n_points: int, n_steps: int, infidelity_seed: int, points_seed: int,
) -> dict[str, Callable[[Method, Tensor], Tensor]]:  # fmt: skip
    """Return, by name, functions of a method and its scores that answer one number a row."""
    curve: dict[str, Any] = {"baseline": baseline, "n_steps": n_steps}
    found: dict[str, Callable[[Method, Tensor], Tensor]] = {
        "infidelity": lambda method, values: infidelity(
            oracle, x, values, target, perturbation=draw, baseline=baseline, n_samples=n_samples, normalize=True,
            generator=infidelity_seed,
        ).values,
        "max_sensitivity": lambda method, values: max_sensitivity(
            oracle, x, method, target, radius=radius, n_samples=n_points, relative=True, generator=points_seed
        ).values,
        "deletion": lambda method, values: deletion_curve(oracle, x, values, target, **curve).area,
        "insertion": lambda method, values: insertion_curve(oracle, x, values, target, **curve).area,
    }  # fmt: skip
    if mask is not None:
        found["pointing"] = lambda method, values: pointing_game(values, mask).values
        found["energy"] = lambda method, values: pointing_game(Attribution(values), mask).extras["energy"]
    return found
