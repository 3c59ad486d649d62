"""Median-gradient descent: step along a running median of the gradients, which heavy tails and corruption do not move.

Use it where single gradients are off by orders of magnitude; clipping is the special case that forgets. Schaipp, Garrigos,
Simsekli and Gower (2024), SGD with Clipping is Secretly Estimating the Median Gradient, arXiv:2402.12828.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from perturbkit.core import checks
from perturbkit.core.optimizers import (
    BaseOptimizer,
    Closure,
    Replay,
    dense_gradients,
    evaluated,
    global_norm,
    loss_value,
)

__all__ = ["MedianSGD", "SampleMedianSGD", "geometric_median"]

Norm = Literal["l2", "l1", "huber", "squared"]
_NORMS = ("l2", "l1", "huber", "squared")


class MedianSGD(BaseOptimizer):
    r"""Descent along a median of the gradients across iterations.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups.
    lr : float
        Learning rate, zero or above.
    norm : {"l2", "l1", "huber", "squared"}
        Of the distance whose mean the median minimises.
    tau : float
        How far an iteration moves the median, above 0, in units of the gradient ("l2", "l1", "huber"); a share
        :math:`\tau / (1 + \tau)` of the way for "squared", which is a mean.
    huber : float
        Distance up to which "huber" is squared, zero or above.
    per_tensor : bool
        Each tensor has a distance of its own; otherwise all of a group share one.
    reset : bool
        Begin from zero in every step: "l2" is then clipping of the gradient's norm, and "l1" of its entries.
    relative : bool
        ``tau`` in units of a running median of the residuals' size instead.

    Raises
    ------
    ArgumentError
        If an option is outside its range.

    Notes
    -----
    :math:`m \leftarrow \arg\min_z D(z - g) + |z - m|^2 / 2 \tau`, in closed form with the residual :math:`r = g - m`: add
    :math:`\min(1, \tau / |r|) r` for the l2 norm, r clipped to :math:`\pm \tau` for the l1 norm,
    :math:`\tau r / \max(\tau + \mu, |r|)` for Huber's function and :math:`\tau r / (1 + \tau)` for half the square. Then
    :math:`w \leftarrow w - \eta m`. A median is not a mean: where gradients are skewed, the point that is approached is not
    the minimum of the mean loss.

    Cost: a norm, and a buffer of the weights' size (none with ``reset``).

    References
    ----------
    Schaipp et al. (2024), arXiv:2402.12828, section 3.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = MedianSGD([w], lr=1.0, tau=0.5)
    >>> (1000 * w).sum().backward()
    >>> optimizer.step()
    >>> w.item()  # a gradient of 1000 moves the median by 0.5
    -0.5
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        norm: Norm = "l2",
        tau: float = 0.1,
        huber: float = 1.0,
        per_tensor: bool = False,
        reset: bool = False,
        relative: bool = False,
    ) -> None:
        self._norm = checks.one_of("norm", norm, _NORMS)
        self._huber = checks.nonnegative("huber", huber)
        self._per_tensor, self._reset, self._relative = bool(per_tensor), bool(reset), bool(relative)
        super().__init__(params, {"lr": lr, "tau": tau})

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check a group's own options."""
        checks.nonnegative("lr", group["lr"])
        checks.positive("tau", group["tau"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; return the closure's loss, if one is given.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the loss and its gradients.
        """
        loss = evaluated(closure)
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            for own in [[p] for p in weights] if self._per_tensor else [weights]:
                if own:
                    self._move(group, own)
        return loss

    def _move(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        """Move the medians of parameters that share a distance, and the parameters along them."""
        # Moves of the median are small against it, and would be lost in half precision.
        zeros = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in weights]
        medians = [
            zero if self._reset else self.state[p].setdefault("median", zero)
            for p, zero in zip(weights, zeros, strict=True)
        ]
        residuals = [g.to(m.dtype) - m for g, m in zip(dense_gradients(weights), medians, strict=True)]
        size = global_norm(residuals)
        tau = torch.as_tensor(group["tau"], dtype=size.dtype, device=size.device)
        if self._relative:
            state = self.state[weights[0] if self._per_tensor else group["params"][0]]
            middle = state.setdefault("middle", torch.zeros_like(size))
            # A running median in the logarithm: up or down by a tenth, as often as not; it begins at a residual that is not zero.
            middle.copy_(torch.where(middle > 0, middle * torch.where(size > middle, 1.1, 1 / 1.1), size))
            tau = tau * middle
        for p, m, r in zip(weights, medians, residuals, strict=True):
            m.add_(_moved(r, size.to(r), tau.to(r), self._norm, self._huber))
            p.sub_(m, alpha=group["lr"])


class SampleMedianSGD(BaseOptimizer):
    """Descent along the geometric median of the gradients of several chunks of a batch.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups.
    lr : float
        Learning rate, zero or above.
    chunks : int
        Gradients a step, at least 1; fewer than half of them may be arbitrary.

    Raises
    ------
    ArgumentError
        If an option is outside its range.

    Notes
    -----
    ``w <- w - lr argmin_m sum_k |m - g_k|``, over all parameters as one vector.

    Cost: the gradients of the batch, and ``chunks`` copies of them.

    References
    ----------
    Schaipp et al. (2024), arXiv:2402.12828, section 2; Minsker (2015), Geometric median and robust estimation in Banach
    spaces.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = SampleMedianSGD([w], lr=1.0, chunks=3)
    >>> losses = optimizer.step([lambda: w.sum(), lambda: 1e6 * w.sum(), lambda: w.sum()])
    >>> round(w.item(), 4)
    -1.0
    """

    def __init__(self, params: Any, lr: float, chunks: int = 8) -> None:
        self._chunks = checks.integer("chunks", chunks, low=1)
        super().__init__(params, {"lr": lr})

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check a group's own options."""
        checks.nonnegative("lr", group["lr"])

    def step(self, closures: Sequence[Closure]) -> list[float]:  # type: ignore[override]
        """Take one step and return the chunks' losses.

        Parameters
        ----------
        closures : sequence of callable
            One a chunk, ``closure() -> loss`` with a graph; without ``backward``.
        """
        if not isinstance(closures, Sequence) or len(closures) != self._chunks:
            given = len(closures) if isinstance(closures, Sequence) else f"a {type(closures).__name__}"
            raise checks.ArgumentError(
                f"closures is {given}; allowed: a sequence of {self._chunks} functions. Give the loss of each chunk of the batch."
            )
        weights = self.weights
        losses, rows = [], []
        for closure in (Replay(each, weights) for each in closures):
            with torch.enable_grad():
                loss = closure()
                losses.append(loss_value(loss))
                if not isinstance(loss, Tensor) or loss.grad_fn is None:
                    raise checks.ModelError(
                        f"a closure's loss is a {type(loss).__name__} without a graph; allowed: a loss that can be differentiated. "
                        "Return the loss itself, without backward."
                    )
                grads = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([g.reshape(-1) for g in grads]))
        median = geometric_median(torch.stack(rows))
        parts = iter(median.split([p.numel() for p in weights]))
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.requires_grad:
                        p.sub_(next(parts).view(p.shape).to(p), alpha=group["lr"])
        return losses


def geometric_median(points: Tensor, tol: float = 1e-8, max_iter: int = 100) -> Tensor:
    r"""Return the point of least mean distance to points.

    Parameters
    ----------
    points : Tensor, shape (k, d)
        At least one; those that are not finite are left out.
    tol : float
        Relative length of the last move, zero or above.
    max_iter : int
        Iterations, at least 1.

    Returns
    -------
    Tensor, shape (d,)

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    Weiszfeld's iteration, :math:`m \leftarrow \sum_k x_k / |x_k - m| / \sum_k 1 / |x_k - m|`, with Vardi and Zhang's rule where it
    meets one of the points. It starts at the coordinates' medians.

    Cost: O(k d) an iteration.

    References
    ----------
    Vardi and Zhang (2000), The multivariate L1-median and associated data depth.

    Examples
    --------
    >>> geometric_median(torch.tensor([[0.0], [1.0], [100.0]]))
    tensor([1.])
    """
    checks.tensor("points", points, ndim=2, finite=False)
    checks.nonnegative("tol", tol)
    checks.integer("max_iter", max_iter, low=1)
    own = points.dtype
    # Squares of what is far away leave the range of single precision.
    points = points[torch.isfinite(points).all(1)].double()
    if len(points) == 0:
        raise checks.ArgumentError(
            "points has no finite row; allowed: at least one. Look at how they were made."
        )
    m = points.median(0).values
    for _ in range(max_iter):
        distance = (points - m).norm(dim=1)
        # What is nearer than rounding is on the point; rounding of that point, not of one that is far away.
        on = torch.isfinite(distance) & (distance <= torch.finfo(own).eps * points.norm(dim=1))
        weight = torch.where(on, 0.0, 1 / distance)
        if not bool(weight.sum() > 0):
            break
        target = weight @ points / weight.sum()
        if bool(on.any()):
            pull = (weight[:, None] * (points - m)).sum(0)
            stay = min(1.0, float(on.sum()) / max(float(pull.norm()), 1e-300))
            target = (1 - stay) * target + stay * m
        moved = float((target - m).norm())
        m = target
        if moved <= tol * float(m.norm()) + 1e-300:
            break
    return m.to(own)


def _moved(r: Tensor, size: Tensor, tau: Tensor, norm: str, huber: float) -> Tensor:
    """Return the proximal step of a median by a residual of the given size."""
    if norm == "squared":
        return r * (tau / (1 + tau))
    if norm == "l1":
        return r.clamp(-tau, tau)
    reach = size if norm == "l2" else torch.maximum(size, tau + huber)
    return r * torch.where(reach > 0, tau / reach, torch.ones_like(reach)).clamp(max=1.0)
