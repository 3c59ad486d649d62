"""An upper bound on how far an attribution can move within a ball around the input, and attacks that try it.

Use it to compare the stability of explanations of two models without running attacks. Wang and Kong (2023), A Practical Upper
Bound for the Worst-Case Attribution Deviations, arXiv:2303.00340.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Ball, Cost, Oracle, Result, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator, randn

__all__ = [
    "AttributionAttack",
    "DeviationBound",
    "attack_attribution",
    "attribution_deviation_bound",
    "gradient_attribution",
]

Attribute = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class DeviationBound(Result):
    """How far the attribution of each row can move.

    Attributes
    ----------
    value : Tensor, shape (n,)
        Bound on the distance; 2 for the cosine where nothing is proved, its largest value.
    direction : Tensor, shape of ``x``
        A change of the input on the sphere: for "l2" the one that moves the linearised attribution farthest.
    spectral_norm : Tensor, shape (n,)
        Largest singular value of the attribution's Jacobian.
    distance : str
        "euclidean" or "cosine".
    cost : Cost
        Rows of which the attribution was computed, and passes back through it.
    """

    value: Tensor
    direction: Tensor
    spectral_norm: Tensor
    distance: str
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True, eq=False)
class AttributionAttack(Result):
    """What an attack on an attribution found.

    Attributes
    ----------
    x : Tensor
        Changed inputs, in the shape of the clean ones.
    euclidean, cosine : Tensor, shape (n,)
        Distance of the attributions, and one less their cosine.
    cost : Cost
        Rows of which the attribution was computed, and passes back through it.
    """

    x: Tensor
    euclidean: Tensor
    cosine: Tensor
    cost: Cost = field(default_factory=Cost)


def gradient_attribution(
    model: nn.Module | Callable[[Tensor], Tensor], target: Tensor | int | None = None
) -> Attribute:
    """Return the gradient of an output as a function of the input that can itself be differentiated.

    Parameters
    ----------
    model : nn.Module or callable
        Function of a batch, answering (n, outputs) or (n,), smooth: a ReLU network's gradient is piecewise constant, so replace
        ReLU by ``nn.Softplus(beta=10)``. A module should be in evaluation mode.
    target : Tensor of shape (n,), int or None
        The output; ``None`` where there is only one.

    Returns
    -------
    callable
        From (n, ...) to (n, ...).

    Notes
    -----
    ``g(x) = grad f_c(x)``, with the graph kept.

    Examples
    --------
    >>> gradient_attribution(lambda x: x.square().sum(1))(torch.tensor([[1.0, 2.0]])).detach()
    tensor([[2., 4.]])
    """

    def attribute(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x if x.requires_grad else x.detach().requires_grad_(True)
            out = model(leaf)
            if target is not None:
                rows = torch.as_tensor(target, device=x.device)
                out = out.gather(1, rows.expand(len(x))[:, None])
            return torch.autograd.grad(out.sum(), leaf, create_graph=True)[0]

    return attribute


def attribution_deviation_bound(
    attribute: Attribute,
    x: Tensor,
    *,
    epsilon: float,
    norm: Literal["l2", "linf"] = "l2",
    distance: Literal["euclidean", "cosine"] = "euclidean",
    jacobian: Literal["exact", "power"] = "exact",
    hessian_lipschitz: float = 0.0,
    n_iter: int = 100,
    generator: Seed = None,
) -> DeviationBound:
    """Bound the distance of attributions over all inputs within ``epsilon``, by linearising the attribution.

    Parameters
    ----------
    attribute : callable
        Attribution of a batch, in its shape, row by row, differentiable; for instance :func:`gradient_attribution`.
    x : Tensor, shape (n, ...)
        Inputs, floating point.
    epsilon : float
        Radius, at least 0.
    norm : {"l2", "linf"}
        Norm of the ball.
    distance : {"euclidean", "cosine"}
        Distance of attributions, or one less their cosine.
    jacobian : {"exact", "power"}
        All of the Jacobian (inputs of some hundreds of elements), or its largest singular value by power iteration, which
        approaches it from below.
    hessian_lipschitz : float
        Lipschitz constant of the Jacobian in the Euclidean and spectral norm. With it the bound is a certificate; with 0 it is
        the practical bound, which ignores what is not linear.
    n_iter : int
        Power iterations.
    generator : torch.Generator, int or None
        Start of the power iteration.

    Returns
    -------
    DeviationBound

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``g(x + d) = g(x) + J d`` up to ``L |d|^2 / 2``. Euclidean: ``B = eps sigma_max(J)``, attained, under l2, and ``min(eps sqrt(d)
    sigma_max(J), eps || |J| 1 ||)`` under linf, where the maximum itself is hard. Cosine: with P the projection that removes g, the
    angle is at most ``atan(B(P J) / (|g| - max g'Jd / |g|))``, and its sine at most ``B / |g|``.

    That the label must stay is left out, which keeps the bound an upper one; since ``|J d| = |J (-d)|``, one rival class alone can
    never make it tighter.

    Cost: exact, one pass back an element of the attribution; power, three an iteration.

    References
    ----------
    Wang and Kong (2023), arXiv:2303.00340.

    Examples
    --------
    >>> g = gradient_attribution(lambda x: x[:, 0] ** 2 + 3 * x[:, 1] ** 2)
    >>> attribution_deviation_bound(g, torch.ones(1, 2), epsilon=0.5).value
    tensor([3.])
    """
    checks.tensor("x", x)
    epsilon = checks.nonnegative("epsilon", epsilon)
    checks.one_of("norm", norm, ("l2", "linf"))
    checks.one_of("distance", distance, ("euclidean", "cosine"))
    checks.one_of("jacobian", jacobian, ("exact", "power"))
    checks.nonnegative("hessian_lipschitz", hessian_lipschitz)
    checks.integer("n_iter", n_iter, low=1)
    n, d = len(x), x[0].numel()
    products = _Products(attribute, x)
    g = products.out.detach().flatten(1)
    size = g.norm(dim=1)
    unit = g / size.clamp(min=torch.finfo(x.dtype).tiny)[:, None]
    reach = epsilon * (math.sqrt(d) if norm == "linf" else 1.0)
    remainder = hessian_lipschitz * reach**2 / 2
    pulled = products.back(unit)
    along = epsilon * pulled.norm(p=1 if norm == "linf" else 2, dim=1) + remainder
    if jacobian == "exact":
        whole = products.matrix()
        sigma, top = _largest(whole)
        bound, beside = (_over(m, s, reach, epsilon, norm) for m, s in ((whole, sigma), _beside(whole, unit)))
    else:
        start = randn((n, d), generator=as_generator(generator), like=x)
        sigma, top = products.power(start, n_iter, torch.zeros_like(unit))
        bound, beside = reach * sigma, reach * products.power(start, n_iter, unit)[0]
    bound, beside = bound + remainder, beside + remainder
    value = bound
    if distance == "cosine":
        left = size - along
        by_angle = torch.where(left > 0, 1 - torch.cos(torch.atan2(beside, left)), torch.full_like(left, 2.0))
        sine = bound / size.clamp(min=torch.finfo(x.dtype).tiny)
        by_sine = torch.where(sine < 1, 1 - (1 - sine.clamp(max=1) ** 2).sqrt(), torch.full_like(sine, 2.0))
        value = torch.minimum(by_angle, by_sine)
    direction = epsilon * (top.sign() if norm == "linf" else top)
    return DeviationBound(value, direction.reshape(x.shape), sigma, distance, Cost(n, products.passes))


def attack_attribution(
    attribute: Attribute,
    x: Tensor,
    *,
    epsilon: float,
    norm: Literal["l2", "linf"] = "l2",
    objective: Literal["euclidean", "cosine", "topk"] = "cosine",
    steps: int = 200,
    k: int = 8,
    model: nn.Module | Callable[[Tensor], Tensor] | None = None,
    generator: Seed = None,
    progress: ProgressLike = False,
) -> AttributionAttack:
    """Move an attribution by projected gradient ascent in the input.

    Parameters
    ----------
    attribute : callable
        Attribution of a batch, in its shape, row by row, differentiable.
    x : Tensor, shape (n, ...)
        Inputs, floating point.
    epsilon : float
        Radius, above 0.
    norm : {"l2", "linf"}
        Norm of the ball.
    objective : {"euclidean", "cosine", "topk"}
        What is driven up: a distance (PGD), or the share of attribution outside the k largest elements (IFIA).
    steps : int
        At least 1; each of ``2.5 epsilon / steps``, from a random start.
    k : int
        For "topk"; at most the elements of a row.
    model : nn.Module or callable, optional
        Classifier whose label has to stay; changes that alter it are not kept.
    generator : torch.Generator, int or None
        Random start.
    progress : Progress, bool or None
        Reports steps.

    Returns
    -------
    AttributionAttack
        The best step of each row by the objective; the clean input where none kept the label.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``d <- Proj(d + a u)``, u the gradient of the objective at unit norm ("l2") or its signs ("linf").

    Cost: an attribution and a pass back through it, a step.

    References
    ----------
    Ghorbani, Abid and Zou (2019), arXiv:1710.10547; Wang and Kong (2023), arXiv:2303.00340.

    Examples
    --------
    >>> g = gradient_attribution(lambda x: x[:, 0] ** 2 + 3 * x[:, 1] ** 2)
    >>> found = attack_attribution(g, torch.ones(1, 2), epsilon=0.5, objective="euclidean", generator=0)
    >>> found.euclidean.round(decimals=3)
    tensor([3.])
    """
    checks.tensor("x", x)
    epsilon = checks.positive("epsilon", epsilon)
    checks.one_of("norm", norm, ("l2", "linf"))
    checks.one_of("objective", objective, ("euclidean", "cosine", "topk"))
    checks.integer("steps", steps, low=1)
    n_top = checks.integer("k", k, low=1, high=x[0].numel()) if objective == "topk" else 1
    ball, oracle = Ball(norm, epsilon), None if model is None else Oracle.wrap(model)
    label = None if oracle is None else oracle(x).argmax(1)
    clean = attribute(x).detach().flatten(1)
    top = torch.zeros_like(clean).scatter(1, clean.abs().topk(n_top, 1).indices, 1.0)

    def aim(g: Tensor) -> Tensor:
        if objective == "topk":
            share = g.abs() / g.abs().sum(1, keepdim=True).clamp(min=torch.finfo(g.dtype).tiny)
            return 1 - (share * top).sum(1)
        return (
            (g - clean).norm(dim=1)
            if objective == "euclidean"
            else 1 - functional.cosine_similarity(g, clean)
        )

    delta = ball.sample(x, generator=as_generator(generator))
    best, score = x.detach().clone(), torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)
    for _ in track(range(steps + 1), "attack on the attribution", progress=progress):
        with torch.enable_grad():
            leaf = (x + delta).detach().requires_grad_(True)
            value = aim(attribute(leaf).flatten(1))
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        kept = (
            torch.ones_like(value, dtype=torch.bool)
            if oracle is None
            else oracle(leaf.detach()).argmax(1) == label
        )
        better = kept & (value.detach() > score)
        score = torch.where(better, value.detach(), score)
        best[better] = leaf.detach()[better]
        delta = ball.project(delta + 2.5 / steps * ball.maximiser(slope.nan_to_num()))
    moved = attribute(best).detach().flatten(1)
    rows = len(x) * (steps + 3)
    return AttributionAttack(
        best,
        (moved - clean).norm(dim=1),
        1 - functional.cosine_similarity(moved, clean),
        Cost(rows, len(x) * (steps + 1)),
    )


class _Products:
    """The attribution at x with products of its Jacobian, all rows at once."""

    def __init__(self, attribute: Attribute, x: Tensor) -> None:
        with torch.enable_grad():
            self.leaf = x.detach().clone().requires_grad_(True)
            self.out = attribute(self.leaf)
            checks.same_shape("the attribution", self.out, "x", x)
            self.dummy = torch.zeros_like(self.out, requires_grad=True)
            self.linear = self._grad(self.out, self.dummy, create_graph=True)
        self.passes = len(x)

    def back(self, u: Tensor) -> Tensor:
        """Return J' u for each row."""
        self.passes += len(u)
        return self._grad(self.out, u.reshape(self.out.shape)).flatten(1)

    def forward(self, v: Tensor) -> Tensor:
        """Return J v for each row: the derivative of J' u in u."""
        self.passes += 2 * len(v)
        if not self.linear.requires_grad:
            return torch.zeros_like(v)
        (out,) = torch.autograd.grad(self.linear, self.dummy, v.reshape(self.leaf.shape), retain_graph=True)
        return out.flatten(1)

    def matrix(self) -> Tensor:
        """Return J of each row, shape (n, elements of the attribution, elements of x)."""
        n, d = len(self.out), self.out[0].numel()
        self.passes += n * d
        if not self.out.requires_grad:
            return self.out.new_zeros(n, d, d)
        unit = torch.eye(d, dtype=self.out.dtype, device=self.out.device)[:, None].expand(d, n, d)
        (rows,) = torch.autograd.grad(
            self.out, self.leaf, unit.reshape(d, *self.out.shape), retain_graph=True, is_grads_batched=True
        )
        return rows.flatten(2).transpose(0, 1)

    def power(self, v: Tensor, n_iter: int, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest singular value and its right vector of (I - unit unit') J."""
        for _ in range(n_iter):
            u = self.forward(functional.normalize(v))
            u = u - (u * unit).sum(1, keepdim=True) * unit
            v = self.back(u)
        v = functional.normalize(v)
        u = self.forward(v)
        return (u - (u * unit).sum(1, keepdim=True) * unit).norm(dim=1), v

    def _grad(self, out: Tensor, u: Tensor, create_graph: bool = False) -> Tensor:
        if not out.requires_grad:
            return torch.zeros_like(self.leaf)
        return torch.autograd.grad(out, self.leaf, u, retain_graph=True, create_graph=create_graph)[0]


def _largest(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest singular value of each matrix and its right vector, at half the cost of all of them."""
    size = matrix.abs().amax((1, 2)).clamp(min=torch.finfo(matrix.dtype).tiny)
    scaled = matrix / size[:, None, None]
    values, vectors = torch.linalg.eigh(scaled.mT @ scaled)
    return size * values[:, -1].clamp(min=0).sqrt(), vectors[:, :, -1]


def _beside(matrix: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Return (I - unit unit') J and its largest singular value."""
    rest = matrix - unit[:, :, None] * (unit[:, None] @ matrix)
    return rest, _largest(rest)[0]


def _over(matrix: Tensor, sigma: Tensor, reach: float, epsilon: float, norm: str) -> Tensor:
    """Bound |J d| over the ball."""
    if norm == "l2":
        return reach * sigma
    return torch.minimum(reach * sigma, epsilon * matrix.abs().sum(2).norm(dim=1))
