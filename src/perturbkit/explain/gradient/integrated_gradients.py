"""Integrated gradients: the only path attribution with completeness, sensitivity and symmetry.

Use it where gradients reach the input and a baseline that means "nothing there" exists. Sundararajan, Taly and
Yan (2017), Axiomatic Attribution for Deep Networks, arXiv:1703.01365.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from perturbkit.core import Attribution, Oracle, Result, checks, target_rows, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randn

__all__ = ["AxiomReport", "adaptive_integrated_gradients", "check_axioms", "integrated_gradients"]

Rule = Literal["gauss-legendre", "trapezoid", "midpoint"]
Method = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]
_RULES = ("gauss-legendre", "trapezoid", "midpoint")


@dataclass(frozen=True)
class AxiomReport(Result):
    """Largest violation of each axiom over the models tried; zero is perfect.

    Attributes
    ----------
    completeness : float
        ``|sum of scores - (F(x) - F(x'))|``, relative to the largest output difference.
    sensitivity_a : float
        Share of one-feature changes that move the output but get a zero score.
    sensitivity_b : float
        Largest score of a feature that the function ignores.
    implementation_invariance : float
        Largest difference of scores between two networks that compute the same function.
    linearity : float
        Largest difference between the scores of a sum and the sum of scores.
    symmetry : float
        Largest difference between the scores of two features that can be swapped and are equal.
    tol : float
        Violations up to this count as rounding or quadrature.
    """

    completeness: float
    sensitivity_a: float
    sensitivity_b: float
    implementation_invariance: float
    linearity: float
    symmetry: float
    tol: float

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the axioms violated by more than ``tol``."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "tol"]
        return tuple(n for n in names if not getattr(self, n) <= self.tol)


def integrated_gradients(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    baseline: Tensor | float = 0.0,
    n_steps: int = 64,
    rule: Rule = "gauss-legendre",
    progress: ProgressLike = False,
) -> Attribution:
    """Attribute an output to the inputs along the straight path from a baseline.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Function of a batch (n, ...), answering (n, outputs) or (n,). Whether it answers logits or probabilities is
        the caller's choice; the scores are in its units.
    x : Tensor, shape (n, ...)
        Inputs, floating point.
    target : Tensor of shape (n,), int or None
        The output explained; ``None`` where there is only one.
    baseline : float or Tensor
        The input that stands for nothing: a number, a tensor that broadcasts to ``x``, or one of shape
        (k, n, ...) (or (k, 1, ...)) whose k baselines are averaged over.
    n_steps : int
        Quadrature nodes, at least 1.
    rule : {"gauss-legendre", "trapezoid", "midpoint"}
        Quadrature. Gauss-Legendre is exact for polynomials of degree 2 n_steps - 1. On ReLU networks, whose
        integrand is piecewise constant, no rule beats first order: judge by the gap.
    progress : Progress, bool or None
        Reports chunks of gradients.

    Returns
    -------
    Attribution
        ``values`` in the shape of ``x``; ``extras["completeness_gap"]``, shape (n,), is the sum of scores less
        F(x) - F(x'), the error of the quadrature.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an input or option is not allowed.

    Notes
    -----
    ``IG_i(x) = (x_i - x'_i) int_0^1 dF(x' + a (x - x')) / dx_i da``.

    Cost: ``k n_steps`` gradients and ``1 + k`` evaluations a row, all nodes in chunks of one size.

    References
    ----------
    Sundararajan, Taly and Yan (2017), arXiv:1703.01365.

    Examples
    --------
    >>> f = lambda x: x[:, 0] * x[:, 1]
    >>> integrated_gradients(f, torch.tensor([[2.0, 3.0]]), n_steps=2).values
    tensor([[3., 3.]])
    """
    checks.tensor("x", x)
    oracle = Oracle.wrap(model)
    baselines = _baselines(baseline, x)
    nodes, weights = _quadrature(
        checks.integer("n_steps", n_steps, low=1), checks.one_of("rule", rule, _RULES), x
    )
    before = oracle.cost
    with oracle.frozen():
        values, gap = _integrate(oracle, x, target, baselines, nodes, weights, progress)
    return Attribution(
        values,
        target_rows(target, x),
        oracle.cost - before,
        "integrated gradients",
        {"completeness_gap": gap},
    )


def adaptive_integrated_gradients(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor | int | None = None,
    *,
    baseline: Tensor | float = 0.0,
    tol: float = 1e-3,
    max_steps: int = 1024,
    rule: Rule = "gauss-legendre",
) -> Attribution:
    """Integrated gradients with as many nodes as each row's completeness asks for.

    The nodes are doubled from 8 until ``|gap| <= tol |F(x) - F(x')|``; rows that are done cost no more.

    Parameters
    ----------
    model, x, target, baseline, rule
        As in :func:`integrated_gradients`.
    tol : float
        Completeness gap allowed, relative to the difference of outputs, above 0.
    max_steps : int
        Nodes at most, at least 8.

    Returns
    -------
    Attribution
        With ``extras["n_steps"]``, the nodes of each row, and ``extras["completeness_gap"]``.

    Notes
    -----
    A row whose outputs at ``x`` and at the baseline are equal goes to ``max_steps`` unless its gap is zero.
    Cost: less than twice the gradients of the final nodes of each row.

    References
    ----------
    Sundararajan, Taly and Yan (2017), arXiv:1703.01365.

    Examples
    --------
    >>> f = lambda x: torch.exp(x).sum(1)
    >>> found = adaptive_integrated_gradients(f, torch.tensor([[1.0, 2.0]]), tol=1e-4)
    >>> found.extras["n_steps"]
    tensor([8])
    """
    checks.tensor("x", x)
    oracle = Oracle.wrap(model)
    baselines = _baselines(baseline, x)
    checks.positive("tol", tol)
    checks.integer("max_steps", max_steps, low=8)
    checks.one_of("rule", rule, _RULES)
    before, rows = oracle.cost, target_rows(target, x)
    values, gap = torch.zeros_like(x), x.new_full((len(x),), torch.inf)
    used = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    open_, n = torch.arange(len(x), device=x.device), 8
    with oracle.frozen():
        while len(open_) and n <= max_steps:
            part = None if rows is None else rows[open_]
            nodes, weights = _quadrature(n, rule, x)
            found, off = _integrate(oracle, x[open_], part, baselines[:, open_], nodes, weights, False)
            values[open_], gap[open_], used[open_] = found, off, n
            difference = found.flatten(1).sum(1) - off
            open_ = open_[off.abs() > tol * difference.abs()]
            n *= 2
    return Attribution(
        values, rows, oracle.cost - before, "adaptive integrated gradients",
        {"completeness_gap": gap, "n_steps": used},
    )  # fmt: skip


def check_axioms(
    method: Method,
    models: Sequence[Callable[[Tensor], Tensor]],
    *,
    n_features: int = 6,
    tol: float = 1e-2,
    generator: Seed = None,
) -> AxiomReport:
    """Test an attribution method against the axioms of the paper, in float64.

    Parameters
    ----------
    method : callable
        ``method(fun, x, baseline) -> scores`` in the shape of ``x``, for a function with one output a row.
    models : sequence of callable
        Functions of (n, n_features) with one output a row, at least one.
    n_features : int
        Width of their inputs, at least 3.
    tol : float
        Violation that still counts as rounding or quadrature, above 0.
    generator : torch.Generator, int or None
        Source of inputs.

    Returns
    -------
    AxiomReport

    Notes
    -----
    Completeness and linearity are tried on the models at random inputs; sensitivity (a) on pairs that differ in
    one feature, among them the saturated ``1 - ReLU(1 - x)`` at 2 from 0, where a gradient is blind; (b) on models
    with a feature added that they ignore; implementation invariance on each model with its input written as
    ``ReLU(x) - ReLU(-x)``; symmetry on ``f(x1 + x2, ...)`` at equal entries.

    References
    ----------
    Sundararajan, Taly and Yan (2017), arXiv:1703.01365, section 2.

    Examples
    --------
    >>> ig = lambda f, x, b: integrated_gradients(f, x, baseline=b, n_steps=256).values
    >>> check_axioms(ig, [lambda x: torch.tanh(x.sum(1))], generator=0).failed
    ()
    """
    if not models:
        raise checks.ArgumentError(
            "models is empty; allowed: at least one function. Pass the functions to try on."
        )
    d = checks.integer("n_features", n_features, low=3)
    checks.positive("tol", tol)
    g = as_generator(generator)
    worst = dict.fromkeys(("completeness", "b", "invariance", "linearity", "symmetry"), 0.0)
    blind, moved = 0, 0
    saturated = torch.zeros(1, d, dtype=torch.float64)
    saturated[0, 0] = 2.0
    pairs = [(lambda x: 1 - torch.relu(1 - x[:, 0]), saturated, torch.zeros_like(saturated))]
    for i, f in enumerate(models):
        x, b = randn((2, 8, d), generator=g, dtype=torch.float64)
        scores, change = method(f, x, b), (_output(f, x) - _output(f, b)).detach()
        scale = float(change.abs().max()) or 1.0
        worst["completeness"] = max(
            worst["completeness"], float((scores.sum(1) - change).abs().max()) / scale
        )
        other = models[(i + 1) % len(models)]
        both = method(_combined(f, other), x, b)
        worst["linearity"] = max(
            worst["linearity"], float((both - scores - 2 * method(other, x, b)).abs().max()) / scale
        )
        twin = method(_after(lambda z: torch.relu(z) - torch.relu(-z), f), x, b)
        worst["invariance"] = max(worst["invariance"], float((twin - scores).abs().max()) / scale)
        wide, wide_b = (torch.cat([z, randn((8, 1), generator=g, like=z)], 1) for z in (x, b))
        ignored = method(_after(lambda z: z[:, :d], f), wide, wide_b)[:, d]
        worst["b"] = max(worst["b"], float(ignored.abs().max()) / scale)
        x_equal, b_equal = x.clone(), b.clone()
        x_equal[:, 1], b_equal[:, 1] = x[:, 0], b[:, 0]
        merged = method(_after(_first_two_added, f), x_equal, b_equal)
        worst["symmetry"] = max(worst["symmetry"], float((merged[:, 0] - merged[:, 1]).abs().max()) / scale)
        one = b.clone()
        one[:, i % d] = x[:, i % d]
        pairs.append((f, one, b))
    for f, x, b in pairs:
        scores = method(f, x, b)
        change = (_output(f, x) - _output(f, b)).detach().abs() > 1e-9
        moved += int(change.sum())
        blind += int((change & (scores.abs().amax(1) < 1e-12)).sum())
    return AxiomReport(
        worst["completeness"], blind / max(moved, 1), worst["b"], worst["invariance"], worst["linearity"],
        worst["symmetry"], tol,
    )  # fmt: skip


def _combined(f: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda z: _output(f, z) + 2 * _output(other, z)


def _after(first: Callable[[Tensor], Tensor], f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda z: _output(f, first(z))


def _first_two_added(z: Tensor) -> Tensor:
    return torch.cat([z[:, :1] + z[:, 1:2], z[:, 1:2] * 0, z[:, 2:]], 1)


def _baselines(baseline: Tensor | float, x: Tensor) -> Tensor:
    """Return the baselines in the shape (k, *x.shape), without copying."""
    given = torch.as_tensor(baseline, dtype=x.dtype, device=x.device)
    try:
        return given.expand(len(given), *x.shape) if given.ndim == x.ndim + 1 else given.expand_as(x)[None]
    except RuntimeError:
        raise checks.ArgumentError(
            f"baseline has shape {tuple(given.shape)}; allowed: a number, a shape that broadcasts to that of x, "
            f"{tuple(x.shape)}, or k such baselines in front. Reshape it."
        ) from None


def _quadrature(n: int, rule: Rule, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes and weights on [0, 1]; the weights sum to one."""
    if rule == "gauss-legendre":
        nodes, weights = np.polynomial.legendre.leggauss(n)
        nodes, weights = (nodes + 1) / 2, weights / 2
    elif rule == "trapezoid" and n > 1:
        nodes, weights = np.linspace(0, 1, n), np.full(n, 1 / (n - 1))
        weights[[0, -1]] /= 2
    else:
        nodes, weights = (np.arange(n) + 0.5) / n, np.full(n, 1 / n)
    return torch.from_numpy(nodes).to(x), torch.from_numpy(weights).to(x)


def _integrate(
    oracle: Oracle, x: Tensor, target: Tensor | int | None, baselines: Tensor, nodes: Tensor, weights: Tensor,
    progress: ProgressLike,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the scores and the completeness gap of every row."""
    k, n, m = len(baselines), len(x), len(nodes)
    rows = target_rows(target, x)
    mean_gradient = torch.zeros_like(x)
    values = torch.zeros_like(x)
    start_value = torch.zeros(n, dtype=x.dtype, device=x.device)
    end_value = oracle.value(x, target)
    for b in baselines:
        path = x - b
        mean_gradient.zero_()
        place = 0
        sizes = list(oracle.chunks(n * m, like=x, gradient=True))
        for size in track(sizes, "integrated gradients", progress=progress):
            index = torch.arange(place, place + size, device=x.device)
            row, node = index // m, index % m
            a = nodes[node].reshape(-1, *[1] * (x.ndim - 1))
            points = torch.addcmul(b[row], path[row], a)
            gradient = oracle.gradient(points, None if rows is None else rows[row])
            shape = (-1, *[1] * (x.ndim - 1))
            mean_gradient.index_add_(0, row, gradient * weights[node].reshape(shape))
            place += size
        values += path * mean_gradient / k
        start_value += oracle.value(b, target) / k
    gap = values.flatten(1).sum(1) - (end_value - start_value)
    return values, gap


def _output(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    out = f(x)
    return out.reshape(len(out))
