"""What a network learns from adversarial perturbations alone, in closed form.

Use it to see when mislabelled noise with tiny perturbations teaches the true classes: the perturbations hold the features of
the data they were made with. Kumano, Kera and Yamasaki (2024), Theoretical Understanding of Learning from Adversarial
Perturbations, arXiv:2402.10470.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from perturbkit.core import Result, checks
from perturbkit.core.random import Seed, as_generator, randn

__all__ = [
    "LeakyTwoLayer",
    "PerturbationBoundary",
    "agreement_condition",
    "boundary_perturbation",
    "perturbation_boundary",
    "standard_boundary",
]

Norm = Literal["l2", "linf", "l0"]


def standard_boundary(x: Tensor, y: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return the direction whose sign a network trained on nearly orthogonal data answers with.

    Parameters
    ----------
    x : Tensor, shape (n, ...)
        Data, floating point.
    y : Tensor, shape (n,)
        Labels, -1 or 1.
    weights : Tensor of shape (n,), optional
        Positive weights of the rows (dual variables of the margin); ``1 / |x_n|^2`` by default, which is exact for orthogonal
        rows.

    Returns
    -------
    Tensor, shape of one row
        ``q``: the network answers ``sign <q, z>``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If shapes, labels or weights are not allowed.

    Notes
    -----
    ``q = sum_n lambda_n y_n x_n``: gradient flow of a two-layer leaky-ReLU network with fixed outer weights goes to a point
    of the margin problem whose decision boundary is this linear one.

    References
    ----------
    Kumano, Kera and Yamasaki (2024), arXiv:2402.10470; Frei et al. (2023), arXiv:2210.07082.

    Examples
    --------
    >>> standard_boundary(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([1, -1])).tolist()
    [0.5, -1.0]
    """
    lam = _weights(x, y, weights)
    return ((lam * y.to(x)) @ x.flatten(1)).reshape(x.shape[1:])


def boundary_perturbation(
    direction: Tensor, epsilon: float, *, norm: Norm = "l2", share: float = 0.05
) -> Tensor:
    """Return the perturbation towards the positive class of a linear boundary.

    Parameters
    ----------
    direction : Tensor
        ``q`` of :func:`standard_boundary`.
    epsilon : float
        Size, zero or above: the Euclidean norm ("l2"), or the change of each element touched ("linf", "l0").
    norm : {"l2", "linf", "l0"}
        Of the perturbation; "l0" touches the elements of largest ``|q|``.
    share : float
        Of elements touched under "l0", in (0, 1].

    Returns
    -------
    Tensor, shape of ``direction``
        To be multiplied by the label wanted.

    Raises
    ------
    ArgumentError
        If an option is not allowed.

    References
    ----------
    Kumano, Kera and Yamasaki (2024), arXiv:2402.10470.

    Examples
    --------
    >>> boundary_perturbation(torch.tensor([3.0, -4.0]), 0.5).tolist()
    [0.30000001192092896, -0.4000000059604645]
    """
    checks.tensor("direction", direction)
    checks.nonnegative("epsilon", epsilon)
    checks.one_of("norm", norm, ("l2", "linf", "l0"))
    checks.between("share", share, 0, 1, inclusive="high")
    if norm == "l2":
        return epsilon * direction / direction.norm().clamp_min(torch.finfo(direction.dtype).tiny)
    signs = direction.sign()
    if norm == "l0":
        k = max(1, round(share * direction.numel()))
        touched = torch.zeros(direction.numel(), dtype=direction.dtype, device=direction.device)
        touched[direction.abs().flatten().topk(k).indices] = 1
        signs = signs * touched.reshape(direction.shape)
    return epsilon * signs


@dataclass(frozen=True, eq=False)
class PerturbationBoundary(Result):
    """The boundary of a network trained on perturbed inputs alone, as a sum of two linear functions.

    Attributes
    ----------
    noise : Tensor, shape of one row
        What the inputs say themselves: a random sum if their labels are random.
    feature : Tensor, shape of one row
        What the perturbations say: the direction that they were made with, times their number and size.
    """

    noise: Tensor
    feature: Tensor

    def noise_term(self, z: Tensor) -> Tensor:
        """Return the first function at rows, shape (m,)."""
        return z.flatten(1) @ self.noise.flatten().to(z)

    def feature_term(self, z: Tensor) -> Tensor:
        """Return the second function at rows, shape (m,)."""
        return z.flatten(1) @ self.feature.flatten().to(z)

    def predict(self, z: Tensor) -> Tensor:
        """Return the labels, -1 or 1, of rows."""
        return torch.where(self.noise_term(z) + self.feature_term(z) >= 0, 1, -1)


def perturbation_boundary(
    x: Tensor,
    y: Tensor,
    x_new: Tensor,
    y_new: Tensor,
    epsilon: float,
    *,
    norm: Norm = "l2",
    share: float = 0.05,
    weights: Tensor | None = None,
) -> PerturbationBoundary:
    """Return the boundary that a network learns from ``x_new`` perturbed towards ``y_new``.

    Parameters
    ----------
    x : Tensor, shape (n, ...)
        The data of the first network, against which the perturbations are made.
    y : Tensor, shape (n,)
        Their labels, -1 or 1.
    x_new : Tensor, shape (m, ...)
        What is perturbed: noise, or other data.
    y_new : Tensor, shape (m,)
        The labels that it is perturbed towards and trained with, -1 or 1.
    epsilon, norm, share
        As in :func:`boundary_perturbation`.
    weights : Tensor of shape (m,), optional
        Positive weights of the new rows; the inverse squared norm of the perturbed ones by default.

    Returns
    -------
    PerturbationBoundary

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If shapes, labels or an option are not allowed.

    Notes
    -----
    Trained on ``x_n + epsilon y_n u``, ``u`` the perturbation of size one, the boundary is
    ``sum_n lambda_n y_n <x_n, z> + epsilon (sum_n lambda_n) <u, z>``. The first term is of the order of ``sqrt(m)`` for random
    labels, the second of ``m``. With labels that depend on ``x_new`` the first is not noise.

    References
    ----------
    Kumano, Kera and Yamasaki (2024), arXiv:2402.10470.

    Examples
    --------
    >>> x, y = torch.eye(4), torch.tensor([1, 1, -1, -1])
    >>> found = perturbation_boundary(x, y, torch.eye(4), torch.tensor([1, -1, 1, -1]), 4.0)
    >>> found.predict(x).tolist()
    [1, 1, -1, -1]
    """
    unit = boundary_perturbation(standard_boundary(x, y), 1.0, norm=norm, share=share)
    checks.nonnegative("epsilon", epsilon)
    checks.tensor("x_new", x_new)
    if x_new.shape[1:] != x.shape[1:]:
        raise checks.ArgumentError(
            f"x_new has shape {tuple(x_new.shape)}; allowed: (m, ...) with rows as those of x, {tuple(x.shape[1:])}. "
            "Reshape it."
        )
    _labels("y_new", y_new, len(x_new))
    push = y_new.to(x_new).reshape(-1, *[1] * (x_new.ndim - 1)) * (epsilon * unit)
    lam = _weights(x_new + push, y_new, weights, "y_new")
    noise = ((lam * y_new.to(x_new)) @ x_new.flatten(1)).reshape(x.shape[1:])
    return PerturbationBoundary(noise, epsilon * lam.sum() * unit)


def agreement_condition(boundary: PerturbationBoundary, z: Tensor) -> Tensor:
    """Return where the perturbations outweigh the noise, so that their sign is the network's.

    Parameters
    ----------
    boundary : PerturbationBoundary
        Of the network trained on perturbed inputs.
    z : Tensor, shape (m, ...)
        Rows.

    Returns
    -------
    Tensor of bool, shape (m,)
        Where ``|feature term| > |noise term|``. There, for Euclidean perturbations, the answer is that of the network trained
        on the data.

    References
    ----------
    Kumano, Kera and Yamasaki (2024), arXiv:2402.10470.

    Examples
    --------
    >>> agreement_condition(PerturbationBoundary(torch.tensor([1.0]), torch.tensor([2.0])), torch.ones(1, 1)).tolist()
    [True]
    """
    checks.tensor("z", z)
    return boundary.feature_term(z).abs() > boundary.noise_term(z).abs()


class LeakyTwoLayer(nn.Module):
    """``f(z) = sum_j a_j phi(<w_j, z>)`` with a leaky rectifier and fixed outer weights, half of each sign.

    Parameters
    ----------
    dim, width : int
        Inputs and an even number of neurons.
    slope : float
        Of the rectifier below zero, in (0, 1).
    scale : float
        Standard deviation of the first weights; small, as the theory asks.
    generator : torch.Generator, int or None
        Draws them.

    Raises
    ------
    ArgumentError
        If an argument is not allowed.

    References
    ----------
    Kumano, Kera and Yamasaki (2024), arXiv:2402.10470.

    Examples
    --------
    >>> LeakyTwoLayer(3, 4, generator=0)(torch.zeros(2, 3)).tolist()
    [0.0, 0.0]
    """

    def __init__(
        self, dim: int, width: int, *, slope: float = 0.01, scale: float = 1e-3, generator: Seed = None
    ) -> None:
        super().__init__()
        d, m = checks.integer("dim", dim, low=1), checks.integer("width", width, low=2)
        if m % 2:
            raise checks.ArgumentError(f"width is {m}; allowed: an even number. Take {m + 1}.")
        self.slope = checks.between("slope", slope, 0, 1, inclusive="neither")
        checks.positive("scale", scale)
        self.weight = nn.Parameter(scale * randn((m, d), generator=as_generator(generator)))
        outer = torch.ones(m) / math.sqrt(m)
        outer[m // 2 :] *= -1
        self.register_buffer("outer", outer)

    def forward(self, z: Tensor) -> Tensor:
        """Return the answer of each row, shape (n,)."""
        hidden = nn.functional.leaky_relu(z.flatten(1) @ self.weight.T, self.slope)
        return hidden @ self.get_buffer("outer")


def _weights(x: Tensor, y: Tensor, weights: Tensor | None, name: str = "y") -> Tensor:
    checks.tensor("x", x)
    _labels(name, y, len(x))
    if weights is None:
        return 1 / x.flatten(1).square().sum(1).clamp_min(torch.finfo(x.dtype).tiny)
    checks.tensor("weights", weights, shape=(len(x),))
    if bool((weights <= 0).any()):
        raise checks.ArgumentError(
            f"weights go down to {float(weights.min()):g}; allowed: above zero. Leave out rows without weight."
        )
    return weights.to(x)


def _labels(name: str, y: Tensor, n: int) -> None:
    checks.tensor(name, y, shape=(n,), floating=False)
    if not bool((y.abs() == 1).all()):
        raise checks.ArgumentError(
            f"{name} has values {sorted(set(y.tolist()))[:4]}; allowed: -1 and 1. Write 2 * label - 1 for labels 0 and 1."
        )
