"""Learning the flattest function on the manifold of the data that fits the labels: a Laplacian weighted where it is steep.

Use it with few labels and many inputs, where a plain Laplacian keeps a function flat on average and lets it jump in a few
places. Cervino, Chamon, Haeffele, Vidal and Ribeiro (2023), Learning Globally Smooth Functions on Manifolds,
arXiv:2210.00301.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor, nn

from perturbkit.core import Result, checks

__all__ = [
    "ManifoldHistory",
    "ManifoldLipschitzLearner",
    "heat_graph",
    "point_cloud_gradient_norm",
    "weighted_laplacian_penalty",
]

Loss = Callable[[Tensor, Tensor], Tensor]


def heat_graph(x: Tensor, *, bandwidth: float | None = None, n_neighbors: int | None = None) -> Tensor:
    """Return the weights of a graph on points, near ones joined most.

    Parameters
    ----------
    x : Tensor, shape (n, ...)
        Points, floating point, at least two.
    bandwidth : float, optional
        ``4 t`` in ``exp(-|x_n - x_m|^2 / (4 t))``, above zero; by default the median squared distance to the fifth neighbour.
    n_neighbors : int, optional
        Keep only edges to so many nearest neighbours, of either end; all by default.

    Returns
    -------
    Tensor, shape (n, n)
        Symmetric, zero on the diagonal.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    References
    ----------
    Belkin and Niyogi (2003), Laplacian eigenmaps; Cervino et al. (2023), arXiv:2210.00301.

    Examples
    --------
    >>> heat_graph(torch.tensor([[0.0], [1.0]]), bandwidth=1.0).round(decimals=3).tolist()
    [[0.0, 0.36800000071525574], [0.36800000071525574, 0.0]]
    """
    squared = _squared(x)
    n = len(squared)
    ordered = squared.sort(1).values
    if bandwidth is None:
        width = float(ordered[:, min(5, n - 1)].median())
        if width <= 0:
            raise checks.ArgumentError(
                "most points of x have five copies, so that no bandwidth follows; allowed: points that differ. Pass bandwidth=."
            )
    else:
        width = checks.positive("bandwidth", bandwidth)
    weights = torch.exp(-squared / width)
    weights.fill_diagonal_(0)
    if n_neighbors is not None:
        k = checks.integer("n_neighbors", n_neighbors, low=1, high=n - 1)
        near = squared <= ordered[:, k : k + 1]
        weights = weights * (near | near.T)
    return weights


def point_cloud_gradient_norm(
    values: Tensor, x: Tensor, weights: Tensor, *, intrinsic_dim: int = 1
) -> Tensor:
    """Estimate the squared gradient of a function along the manifold, at each point.

    Parameters
    ----------
    values : Tensor, shape (n,) or (n, outputs)
        The function on the points.
    x : Tensor, shape (n, ...)
        The points.
    weights : Tensor, shape (n, n)
        Of :func:`heat_graph`.
    intrinsic_dim : int
        Dimension of the manifold, at least 1.

    Returns
    -------
    Tensor, shape (n,)
        Summed over outputs; differentiable in the values.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If shapes do not agree.

    Notes
    -----
    ``g_n = k sum_m w_nm |f_n - f_m|^2 / sum_m w_nm |x_n - x_m|^2``: for a linear function and neighbours spread alike over k
    directions, its squared gradient.

    References
    ----------
    Cervino et al. (2023), arXiv:2210.00301; the normalisation is a choice.

    Examples
    --------
    >>> x = torch.linspace(0, 1, 11)[:, None]
    >>> point_cloud_gradient_norm(3 * x[:, 0], x, heat_graph(x)).mean().round().item()
    9.0
    """
    k = checks.integer("intrinsic_dim", intrinsic_dim, low=1)
    weights = _graph(weights, x)
    if values.ndim not in (1, 2) or len(values) != len(x):
        raise checks.ArgumentError(
            f"values has shape {tuple(values.shape)}; allowed: ({len(x)},) or ({len(x)}, outputs). Give one row a point."
        )
    return k * (weights * _changes(values)).sum(1) / _spread(x, weights)


def weighted_laplacian_penalty(
    values: Tensor, x: Tensor, weights: Tensor, mu: Tensor, *, intrinsic_dim: int = 1
) -> Tensor:
    """Return ``sum_n mu_n g_n``, a quadratic form of a weighted Laplacian.

    Parameters
    ----------
    values, x, weights, intrinsic_dim
        As in :func:`point_cloud_gradient_norm`.
    mu : Tensor, shape (n,)
        Weights of the points, none negative. Equal ones give manifold regularisation.

    Returns
    -------
    Tensor, shape ()

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If shapes do not agree or a weight is negative.

    Notes
    -----
    ``f' L f`` with ``L = diag(W 1) - W`` and ``W_nm = k w_nm (mu_n / c_n + mu_m / c_m)``, ``c_n = sum_m w_nm |x_n - x_m|^2``.

    References
    ----------
    Cervino et al. (2023), arXiv:2210.00301.

    Examples
    --------
    >>> x = torch.tensor([[0.0], [1.0]])
    >>> float(weighted_laplacian_penalty(2 * x[:, 0], x, heat_graph(x, bandwidth=1.0), torch.tensor([0.5, 0.5])))
    4.0
    """
    checks.tensor("mu", mu, shape=(len(x),))
    if bool((mu < 0).any()):
        raise checks.ArgumentError(
            f"mu goes down to {float(mu.min()):g}; allowed: none negative. Project it on the simplex."
        )
    return (mu * point_cloud_gradient_norm(values, x, weights, intrinsic_dim=intrinsic_dim)).sum()


@dataclass(frozen=True, eq=False)
class ManifoldHistory(Result):
    """The training, one entry an epoch.

    Attributes
    ----------
    loss : Tensor
        On the labels.
    steepest : Tensor
        The largest squared gradient over the points.
    multiplier : Tensor
        Of the constraint on the loss.
    """

    loss: Tensor
    steepest: Tensor
    multiplier: Tensor


class ManifoldLipschitzLearner:
    """Train a model to the least Lipschitz constant on the manifold that fits the labels to a tolerance.

    Parameters
    ----------
    model : nn.Module
        Trained in place.
    loss : callable
        ``loss(outputs, y)``, a mean over rows.
    epsilon : float
        Loss allowed, zero or above.
    graph : {"heat", "knn"} or Tensor of shape (n, n)
        Weights on labelled and unlabelled points together, in this order; "knn" keeps ten neighbours.
    intrinsic_dim : int
        Dimension of the manifold.
    uniform : bool
        Keep the points' weights equal: manifold regularisation, to the same tolerance.
    primal_lr, dual_lr : float
        Rates of Adam on the model, which falls to a tenth along half a cosine, and of the multipliers; ``dual_lr`` 0 keeps
        all multipliers as they start.
    n_epochs, steps_per_epoch : int
        Updates of the multipliers, and of the model between them.

    Attributes
    ----------
    lipschitz_ : float
        Root of the largest squared gradient at the end.
    weights_ : Tensor, shape (n,)
        Of the points: a distribution, on the steepest ones.
    lambda_ : float
        Multiplier of the loss.
    history_ : ManifoldHistory
        The training.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``min rho`` subject to ``E loss <= epsilon`` and ``|grad f|^2 <= rho`` everywhere has the dual

    ``max_{lambda >= 0, mu in simplex} min_f lambda (E loss - epsilon) + sum_n mu_n g_n``.

    Steps of Adam on f alternate with ``lambda <- [lambda + dual_lr (loss / epsilon - 1)]_+`` and
    ``mu_n <- mu_n exp(dual_lr g_n / sum mu g)``, normalised, of which a share of 0.002 goes to all points.

    Cost: an evaluation and a gradient of all points a step; the graph is n by n.

    References
    ----------
    Cervino, Chamon, Haeffele, Vidal and Ribeiro (2023), arXiv:2210.00301.

    Examples
    --------
    >>> x = torch.linspace(0, 1, 21)[:, None]
    >>> line = nn.Linear(1, 1)
    >>> mean_squared = lambda out, y: (out[:, 0] - y).square().mean()
    >>> learner = ManifoldLipschitzLearner(line, mean_squared, 1e-4, primal_lr=0.02, n_epochs=300)
    >>> fitted = learner.fit(x[[0, -1]], torch.tensor([0.0, 2.0]), x[1:-1])
    >>> abs(fitted.lipschitz_ - 2) < 0.1
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        epsilon: float,
        *,
        graph: Literal["heat", "knn"] | Tensor = "heat",
        intrinsic_dim: int = 1,
        uniform: bool = False,
        primal_lr: float = 1e-3,
        dual_lr: float = 0.1,
        n_epochs: int = 500,
        steps_per_epoch: int = 5,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise checks.ArgumentTypeError(
                f"model is a {type(model).__name__}; allowed: an nn.Module to train. Pass the network."
            )
        self.model, self.loss = model, loss
        self.epsilon = checks.nonnegative("epsilon", epsilon)
        if not isinstance(graph, Tensor):
            checks.one_of("graph", graph, ("heat", "knn"))
        self.graph = graph
        self.intrinsic_dim = checks.integer("intrinsic_dim", intrinsic_dim, low=1)
        self.uniform = uniform
        self.primal_lr = checks.positive("primal_lr", primal_lr)
        self.dual_lr = checks.nonnegative("dual_lr", dual_lr)
        self.n_epochs = checks.integer("n_epochs", n_epochs, low=1)
        self.steps_per_epoch = checks.integer("steps_per_epoch", steps_per_epoch, low=1)

    def fit(self, x: Tensor, y: Tensor, x_unlabelled: Tensor | None = None) -> Self:
        """Train on labelled rows (n, ...) with ``y`` of n rows, and on rows without labels."""
        checks.tensor("x", x)
        if len(y) != len(x):
            raise checks.ArgumentError(
                f"y has {len(y)} rows; allowed: {len(x)}, one for each of x. Pair them."
            )
        points = x if x_unlabelled is None else torch.cat([x, checks.tensor("x_unlabelled", x_unlabelled)])
        if isinstance(self.graph, Tensor):
            weights = _graph(self.graph, points)
        else:
            neighbors = min(10, len(points) - 1) if self.graph == "knn" else None
            weights = heat_graph(points, n_neighbors=neighbors)
        spread = _spread(points, weights)
        mu = torch.full_like(spread, 1 / len(points))
        multiplier, rows = 1.0, []
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.primal_lr)
        for epoch in range(self.n_epochs):
            # A saddle point is circled at a distance of the rates: they fall to let it settle.
            fall = 0.1 + 0.45 * (1 + math.cos(math.pi * epoch / self.n_epochs))
            optimizer.param_groups[0]["lr"] = self.primal_lr * fall
            for _ in range(self.steps_per_epoch):
                out = self.model(points)
                fit = self.loss(out[: len(x)], y)
                steep = self.intrinsic_dim * (weights * _changes(out)).sum(1) / spread
                optimizer.zero_grad(set_to_none=True)
                (multiplier * fit + (mu * steep).sum()).backward()
                optimizer.step()
            loss, steep = float(fit.detach()), steep.detach()
            rows.append((loss, float(steep.max()), multiplier))
            if self.dual_lr > 0:
                multiplier = max(
                    0.0, multiplier + self.dual_lr * (loss - self.epsilon) / max(self.epsilon, 1e-3)
                )
                if self.uniform:
                    continue
                # A share of 0.002 goes to all, so that a point that was flat for long comes back before it is steep.
                mu = mu * torch.exp(self.dual_lr * steep / (mu * steep).sum().clamp_min(1e-12)).clamp_max(1e6)
                mu = 0.998 * mu / mu.sum() + 0.002 / len(points)
        with torch.no_grad():
            steep = self.intrinsic_dim * (weights * _changes(self.model(points))).sum(1) / spread
        self.lipschitz_ = float(steep.max().sqrt())
        self.weights_, self.lambda_ = mu / mu.sum(), multiplier
        self.history_ = ManifoldHistory(*(torch.tensor(column) for column in zip(*rows, strict=True)))
        return self


def _squared(x: Tensor) -> Tensor:
    checks.tensor("x", x)
    if len(x) < 2:
        raise checks.ArgumentError("x has one row; allowed: at least two points. Give more.")
    flat = x.detach().flatten(1)
    return torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square()


def _changes(values: Tensor) -> Tensor:
    rows = values.reshape(len(values), -1)
    return (rows[:, None] - rows[None]).square().sum(2)


def _spread(x: Tensor, weights: Tensor) -> Tensor:
    return (weights * _squared(x)).sum(1).clamp_min(torch.finfo(weights.dtype).tiny)


def _graph(weights: Tensor, x: Tensor) -> Tensor:
    checks.tensor("weights", weights, shape=(len(x), len(x)))
    if bool((weights < 0).any()) or not torch.allclose(weights, weights.T):
        raise checks.ArgumentError("weights is not symmetric, or negative; allowed: a graph. Use heat_graph.")
    return weights
