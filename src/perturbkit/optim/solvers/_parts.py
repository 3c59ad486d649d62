"""What several solvers share: one point's value and gradient, descent tests, and counted products with a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from perturbkit.core import Oracle, checks
from perturbkit.core.curvature import Matvec

__all__ = ["Products", "checked_start", "descent", "exact_traces", "value_and_gradient", "why_stuck"]


def value_and_gradient(oracle: Oracle, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return a function's value and gradient at one point, shapes () and (d,)."""
    value, gradient = oracle.value_and_gradient(x[None])
    return value[0], gradient[0]


class Products:
    """Counts the products with a curvature, and refuses another shape."""

    def __init__(self, matvec: Matvec) -> None:
        if not callable(matvec):
            raise checks.ArgumentTypeError(
                f"matvec is a {type(matvec).__name__}; allowed: a callable. Pass lambda v: v @ B for a matrix."
            )
        self.matvec, self.count = matvec, 0

    def __call__(self, rows: Tensor) -> Tensor:
        image = self.matvec(rows)
        if not isinstance(image, Tensor) or image.shape != rows.shape:
            given = (
                f"shape {tuple(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
            )
            raise checks.ArgumentError(
                f"matvec answered {given}; allowed: the shape of its rows, {tuple(rows.shape)}. Return v @ B."
            )
        self.count += len(rows)
        return image.detach()


def checked_start(x0: Tensor, tol: float, max_iter: int) -> int:
    """Refuse what the solvers of this kind refuse, and return the dimension."""
    checks.tensor("x0", x0, ndim=1)
    checks.nonnegative("tol", tol)
    checks.integer("max_iter", max_iter, low=1)
    return len(x0)


def exact_traces(matrix: Tensor, degree: int) -> Tensor:
    """Return the traces of a symmetric matrix's powers, from its eigenvalues."""
    values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
    return torch.stack([(values**k).sum() for k in range(1, degree + 1)])


def descent(
    oracle: Oracle, x: Tensor, value: Tensor, h: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the point ``x - h`` with its value and gradient, or None if it does not decrease the value as wanted.

    Where rounding hides the decrease, the slope along the step decides.
    """
    new, slope = value_and_gradient(oracle, x - h)
    rounding = 16 * torch.finfo(value.dtype).eps * value.abs()
    if bool(wanted > rounding):
        enough = bool(new <= value - wanted * (1 - 1e-10))
    else:
        enough = bool(new <= value + rounding) and bool(slope @ h >= 0)
    return (x - h, new, slope) if enough else None


def why_stuck(positive: bool) -> str:
    """Say why no step was found."""
    if positive:
        return "no step decreases the objective in this precision"
    return "the preconditioner is not positive: its traces are not those of the curvature"
