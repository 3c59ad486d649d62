"""Max-sensitivity: how much an explanation changes when its input changes a little.

Use it beside infidelity, since a constant explanation is perfectly stable; :func:`smooth_explanation` lowers it for any
method. Yeh, Hsieh, Suggala, Inouye and Ravikumar (2019), On the (In)fidelity and Sensitivity for Explanations,
arXiv:1901.09392.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from perturbkit.core import Attribution, Ball, Distribution, Gaussian, Oracle, checks, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import Seed, as_generator
from perturbkit.explain.metrics._parts import Method, Model, blocks, explained, repeated
from perturbkit.explain.metrics.infidelity import ExplanationScore

__all__ = ["max_sensitivity", "smooth_explanation"]


def max_sensitivity(
    model: Model,
    x: Tensor,
    method: Method,
    target: Tensor | int | None = None,
    *,
    radius: float = 0.1,
    norm: Literal["linf", "l2", "l1"] = "linf",
    n_samples: int = 50,
    relative: bool = False,
    generator: Seed = None,
    progress: ProgressLike = False,
) -> ExplanationScore:
    """Score an explanation method by its largest change in a small ball around each input.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Function of a batch (n, ...), answering (n, outputs) or (n,).
    x : Tensor, shape (n, ...)
        Inputs, floating point.
    target : Tensor of shape (n,), int or None
        The output explained.
    progress : Progress, bool or None
        Reports blocks of points.
    method : callable
        ``method(model, x, target)`` answers an Attribution or a tensor in the shape of ``x``; the same for the same
        input, whatever rows are beside it, or the noise of the method counts as sensitivity.
    radius : float
        Of the ball, in units of the input, above 0.
    norm : {"linf", "l2", "l1"}
        Of the ball.
    n_samples : int
        Points of the ball tried a row.
    relative : bool
        Divide by the norm of the explanation at ``x``.
    generator : torch.Generator, int or None
        Source of the points.

    Returns
    -------
    ExplanationScore
        Lower is better: ``max_y ||phi(y) - phi(x)||_2`` over the points tried, a lower bound of the true maximum.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    Cost: ``n_samples + 1`` explanations a row.

    References
    ----------
    Yeh et al. (2019), arXiv:1901.09392, definition 3.1.

    Examples
    --------
    >>> constant = lambda model, x, target: torch.ones_like(x)
    >>> max_sensitivity(lambda x: x.sum(1), torch.ones(1, 2), constant, generator=0).values
    tensor([0.])
    """
    oracle = Oracle.wrap(model)
    checks.tensor("x", x)
    checks.integer("n_samples", n_samples, low=1)
    ball, source = Ball(norm, checks.positive("radius", radius)), as_generator(generator)
    before = oracle.cost
    centre = explained(method, oracle, x, target)
    worst = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for size in track(blocks(x, n_samples), "max-sensitivity", progress=progress):
        rows = x.repeat(size, *[1] * (x.ndim - 1))
        moved = explained(
            method, oracle, rows + ball.sample(rows, generator=source), repeated(target, x, size)
        )
        change = (moved.reshape(size, *x.shape) - centre).flatten(2).norm(dim=2)
        worst = torch.maximum(worst, change.amax(0))
    if relative:
        worst = worst / centre.flatten(1).norm(dim=1)
    return ExplanationScore(worst, "max-sensitivity", "lower", oracle.cost - before)


def smooth_explanation(
    model: Model,
    x: Tensor,
    method: Method,
    target: Tensor | int | None = None,
    *,
    kernel: Distribution | None = None,
    n_samples: int = 50,
    generator: Seed = None,
    progress: ProgressLike = False,
) -> Attribution:
    """Average an explanation over a neighbourhood of each input.

    Parameters
    ----------
    model, x, method, target, progress
        As in :func:`max_sensitivity`.
    kernel : Distribution, optional
        Displacements; ``Gaussian(0.15)`` by default. With the gradient as method this is SmoothGrad.
    n_samples : int
        Points a row.
    generator : torch.Generator, int or None
        Source of the points, which are the same for every row.

    Returns
    -------
    Attribution

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``phi_k(x) = E_z[phi(x + z)]``. Smoothing cannot raise the sensitivity to a shift beyond the mean of the
    sensitivities around, and lowers infidelity too where the explanation is noisier than the function.

    Cost: ``n_samples`` explanations a row.

    References
    ----------
    Yeh et al. (2019), arXiv:1901.09392, section 4.

    Examples
    --------
    >>> constant = lambda model, x, target: torch.ones_like(x)
    >>> smooth_explanation(lambda x: x.sum(1), torch.zeros(1, 2), constant, n_samples=4, generator=0).values
    tensor([[1., 1.]])
    """
    oracle = Oracle.wrap(model)
    checks.tensor("x", x)
    checks.integer("n_samples", n_samples, low=1)
    near, before = kernel or Gaussian(0.15), oracle.cost
    # Every row is moved by the same draws, so that an input's explanation does not depend on the rows beside it.
    moves = near.sample(x[:1], generator=as_generator(generator), n=n_samples)
    total, start = torch.zeros_like(x), 0
    for size in track(blocks(x, n_samples), "smoothing", progress=progress):
        rows = (x + moves[start : start + size, None]).flatten(0, 1)
        found = explained(method, oracle, rows, repeated(target, x, size))
        total += found.reshape(size, *x.shape).sum(0) / n_samples
        start += size
    return Attribution(total, repeated(target, x), oracle.cost - before, "smoothed explanation")
