"""Jacobian regularisation: a penalty on how fast the logits change with the input, from one random projection.

Use it to widen the margins of a classifier against noise and attacks of no particular kind, at the price of one more
backward pass a step. Hoffman, Roberts and Yaida (2019), Robust Learning with Jacobian Regularization,
arXiv:1908.02729.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import Oracle, checks, unwrap_output
from perturbkit.core.random import Seed, as_generator, randn

__all__ = ["JacobianRegularizer", "jacobian_norm", "margin_bound"]


class JacobianRegularizer:
    """Penalise the squared Frobenius norm of the Jacobian of the logits in the input.

    Parameters
    ----------
    n_projections : int or None
        Random output directions a row, from 1 to the number of outputs; they are orthonormal, so that all of them give
        the exact norm. ``None`` takes the axes instead, which is exact without a draw.
    weight : float
        Factor of the penalty in :meth:`loss`, zero or above.
    generator : torch.Generator, int or None
        Source of the directions, advanced from call to call.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed; at a call, if ``x`` was not in the graph of the logits.

    Notes
    -----
    ``R(x) = 1/2 mean_i ||J(x_i)||_F^2``, and ``||J||_F^2 = C E ||v^T J||^2`` for a unit vector ``v`` drawn uniformly on
    the sphere of the ``C`` outputs. One draw has a standard deviation of at most ``sqrt(2 (C - 1) / (C + 2))`` of the
    norm squared of its row, which the mean over a batch levels out.

    Give it logits and not probabilities. Rows are taken to be independent: batch normalisation in training mode mixes
    them, and what is then penalised is the change of all rows' logits with each row.

    Cost: a backward pass a projection, through which the loss is differentiated again.

    References
    ----------
    Hoffman et al. (2019), arXiv:1908.02729, section 2.

    Examples
    --------
    In a loop of one's own, for any loss:

    >>> net = nn.Linear(3, 2, bias=False)
    >>> penalty = JacobianRegularizer(n_projections=None)
    >>> x = torch.zeros(5, 3, requires_grad=True)
    >>> bool(torch.isclose(penalty(x, net(x)), 0.5 * net.weight.square().sum()))
    True

    Or as a loss of model, inputs and labels:

    >>> JacobianRegularizer(weight=0.01, generator=0).loss(net, torch.zeros(5, 3), torch.zeros(5).long()).shape
    torch.Size([])
    """

    def __init__(
        self, n_projections: int | None = 1, *, weight: float = 0.01, generator: Seed = None
    ) -> None:
        self.n_projections = (
            n_projections if n_projections is None else checks.integer("n_projections", n_projections, low=1)
        )
        self.weight = checks.nonnegative("weight", weight)
        self.generator = as_generator(generator)

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        """Return the penalty, with a graph.

        Parameters
        ----------
        x : Tensor, shape (n, ...)
            Inputs that required a gradient when the logits were computed.
        logits : Tensor, shape (n, C)
            What the model answered to them.

        Returns
        -------
        Tensor, shape ()
            Half the mean squared norm.
        """
        checks.tensor("logits", logits, ndim=2, finite=False)
        if not x.requires_grad or not logits.requires_grad:
            raise checks.ArgumentError(
                "x was not in the graph of the logits; allowed: inputs that required a gradient in the forward pass. "
                "Call x = x.requires_grad_() before model(x), or use loss(model, x, y)."
            )
        directions = _directions(logits, self.n_projections, self.generator)
        return 0.5 * _squared_norm(x, logits, directions).mean()

    def loss(self, model: nn.Module | Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Return cross-entropy plus ``weight`` times the penalty, with a graph, for ``backward()``.

        Parameters
        ----------
        model : nn.Module or callable
            Classifier answering logits (n, C); it runs once, in the mode it is in.
        x : Tensor, shape (n, ...)
            Inputs.
        y : Tensor of int64, shape (n,)
            Labels.

        Returns
        -------
        Tensor, shape ()
        """
        if self.weight == 0:
            return functional.cross_entropy(unwrap_output(model(x)), y)
        leaf = x.detach().requires_grad_(True)
        logits = unwrap_output(model(leaf))
        return functional.cross_entropy(logits, y) + self.weight * self(leaf, logits)


def jacobian_norm(
    model: Oracle | nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    n_projections: int | None = None,
    generator: Seed = None,
) -> Tensor:
    """Return the Frobenius norm of the Jacobian of a model's outputs, a row.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Answers (n, C).
    x : Tensor, shape (n, ...)
        Inputs.
    n_projections : int or None
        ``None`` is exact; otherwise estimated from so many random directions, from 1 to C.
    generator : torch.Generator, int or None
        Source of the directions.

    Returns
    -------
    Tensor, shape (n,)

    Raises
    ------
    ArgumentError
        If there are more projections than outputs.

    Notes
    -----
    The square is unbiased, the norm itself is not.

    Cost: a vector-Jacobian product a row and projection, C where exact.

    References
    ----------
    Hoffman et al. (2019), arXiv:1908.02729, equation 5.

    Examples
    --------
    >>> w = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> jacobian_norm(lambda z: z @ w, torch.ones(2, 2)).tolist()
    [5.0, 5.0]
    """
    checks.tensor("x", x)
    if n_projections is not None:
        checks.integer("n_projections", n_projections, low=1)
    oracle = Oracle.wrap(model)
    with oracle.frozen():
        logits = _outputs(oracle, x)
        total = torch.zeros_like(logits[:, 0])
        count = logits.shape[1] if n_projections is None else n_projections
        for v in _directions(logits, n_projections, as_generator(generator)):
            total += oracle.vjp(x, v)[1].flatten(1).square().sum(1)
    return (total * (logits.shape[1] / count)).sqrt()


def margin_bound(model: Oracle | nn.Module | Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the Euclidean distance at which the answer changes, were the model linear around each row.

    Parameters
    ----------
    model : Oracle, nn.Module or callable
        Classifier answering logits (n, C) with at least two classes.
    x : Tensor, shape (n, ...)
        Inputs.

    Returns
    -------
    Tensor, shape (n,)
        Infinite where no logit changes. No certificate: it is exact for linear models and to first order for others.

    Raises
    ------
    ArgumentError
        If there is one class.

    Notes
    -----
    ``min_{k != c} (z_c - z_k) / ||grad (z_c - z_k)||_2`` for the answer ``c``.

    Cost: C vector-Jacobian products a row.

    References
    ----------
    Hoffman et al. (2019), arXiv:1908.02729, section 2.1.

    Examples
    --------
    >>> w = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    >>> margin_bound(lambda z: z @ w, torch.tensor([[0.5, 9.0]])).tolist()
    [0.5]
    """
    checks.tensor("x", x)
    oracle = Oracle.wrap(model)
    with oracle.frozen():
        logits = _outputs(oracle, x)
        n, classes = logits.shape
        checks.integer("the number of classes", classes, low=2)
        answer = logits.argmax(1)
        rows = torch.arange(n, device=logits.device)
        best = torch.full_like(logits[:, 0], torch.inf)
        for k in range(classes):
            difference = torch.zeros_like(logits)
            difference[rows, answer] += 1
            difference[:, k] -= 1  # zero where k is the answer
            gradient = oracle.vjp(x, difference)[1].flatten(1).norm(dim=1)
            lead = (logits * difference).sum(1)
            distance = torch.where(gradient > 0, lead / gradient, torch.inf)
            best = torch.where(answer == k, best, torch.minimum(best, distance))
    return best


def _outputs(oracle: Oracle, x: Tensor) -> Tensor:
    logits = oracle(x)
    return checks.tensor("the model's answer", logits, ndim=2)


def _directions(logits: Tensor, n_projections: int | None, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield output directions of unit length, shape (n, C) each: the axes, or orthonormal random ones."""
    n, outputs = logits.shape
    if n_projections is None:
        for k in range(outputs):
            yield functional.one_hot(torch.full((n,), k, device=logits.device), outputs).to(logits.dtype)
        return
    checks.integer("n_projections", n_projections, high=outputs)
    drawn = randn((n, outputs, n_projections), generator=generator, like=logits.detach())
    if n_projections == 1:
        yield functional.normalize(drawn[..., 0], dim=1)
        return
    # The first vectors of a uniform frame: each is uniform on the sphere, whatever the signs of the factorisation.
    frame = torch.linalg.qr(drawn).Q
    yield from frame.unbind(2)


def _squared_norm(x: Tensor, logits: Tensor, directions: Iterator[Tensor]) -> Tensor:
    """Return C times the mean over the directions of ||v^T J||^2, a row, with a graph."""
    parts = []
    for v in directions:
        (product,) = torch.autograd.grad(logits, x, v, create_graph=True, allow_unused=True)
        if product is None:
            raise checks.ArgumentError(
                "the logits do not depend on x; allowed: the very tensor that the model was given. "
                "Pass x as it went into model(x)."
            )
        parts.append(product.flatten(1).square().sum(1))
    return logits.shape[1] * torch.stack(parts).mean(0)
