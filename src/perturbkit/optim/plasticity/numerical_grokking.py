"""Softmax collapse and what goes on learning in spite of it: StableMax, and gradients orthogonal to the weights.

Use them where a network reaches zero training loss and generalises late or never. Without weight decay training then only
scales the logits, until the softmax rounds to one and the gradient to zero. Prieto, Barsbey, Mediano and Birdal (2025),
Grokking at the Edge of Numerical Stability, arXiv:2501.04697.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.optimizers import Closure, WrappingOptimizer
from perturbkit.core.random import Seed, as_generator, randperm

__all__ = [
    "ModularAddition",
    "OrthogonalGradient",
    "StableMaxCrossEntropy",
    "log_stablemax",
    "naive_loss_alignment",
    "softmax_collapse_fraction",
    "stablemax",
]


def stablemax(x: Tensor, dim: int = -1) -> Tensor:
    r"""Return probabilities that grow with the logits linearly, not exponentially.

    Parameters
    ----------
    x : Tensor
        Logits.
    dim : int
        Dimension of the classes.

    Returns
    -------
    Tensor
        Positive, of the shape of x, and of sum 1 along the dimension.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If x is not a tensor of finite numbers or has no such dimension.

    Notes
    -----
    :math:`s(x_i) / \sum_j s(x_j)` with :math:`s(x) = x + 1` for :math:`x \ge 0` and :math:`1 / (1 - x)` below, which is
    continuous with slope 1 at 0. Not invariant to a shift of all logits, unlike the softmax.

    References
    ----------
    Prieto et al. (2025), arXiv:2501.04697, equations 5 and 6.

    Examples
    --------
    >>> stablemax(torch.tensor([1.0, 0.0, -1.0]))
    tensor([0.5714, 0.2857, 0.1429])
    """
    return log_stablemax(x, dim).exp()


def log_stablemax(x: Tensor, dim: int = -1) -> Tensor:
    r"""Return the logarithm of :func:`stablemax`.

    Parameters
    ----------
    x : Tensor
        Logits.
    dim : int
        Dimension of the classes.

    Returns
    -------
    Tensor
        Of the shape of x.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        As :func:`stablemax`.

    Notes
    -----
    :math:`\log s(x) = \operatorname{sign}(x) \log(1 + |x|)`, and the StableMax of x is the softmax of that. In single
    precision it rounds to 0 only where the correct logit is above some :math:`10^7` times the others' sum.

    References
    ----------
    Prieto et al. (2025), arXiv:2501.04697, proposition 1.

    Examples
    --------
    >>> log_stablemax(torch.tensor([1.0, 0.0, -1.0]))
    tensor([-0.5596, -1.2528, -1.9459])
    """
    checks.tensor("x", x)
    checks.integer("dim", dim, low=-x.ndim, high=x.ndim - 1)
    # The clamps keep the slope of the side that holds, also at 0, and none of the other.
    log_s = torch.where(x >= 0, x.clamp(min=0).log1p(), -x.clamp(max=0).neg().log1p())
    return log_s.log_softmax(dim)


class StableMaxCrossEntropy(nn.Module):
    """Cross-entropy of :func:`stablemax`, in place of ``torch.nn.CrossEntropyLoss``.

    Parameters
    ----------
    reduction : {"mean", "sum", "none"}
        What is made of the losses of the rows.

    Raises
    ------
    ArgumentError
        If the reduction is another.

    Notes
    -----
    The minus logarithm of the probability of the correct class. Cost: that of a softmax and a logarithm.

    References
    ----------
    Prieto et al. (2025), arXiv:2501.04697, equation 7.

    Examples
    --------
    >>> logits = torch.tensor([[20.0, 0.0]])
    >>> nn.CrossEntropyLoss()(logits, torch.tensor([0])).item() < 1e-8
    True
    >>> round(StableMaxCrossEntropy()(logits, torch.tensor([0])).item(), 4)  # log(22 / 21)
    0.0465
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction: str = checks.one_of("reduction", reduction, ("mean", "sum", "none"))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits of shape (n, classes, ...) for class indices of shape (n, ...)."""
        return nn.functional.nll_loss(log_stablemax(logits, dim=1), targets, reduction=self.reduction)


class OrthogonalGradient(WrappingOptimizer):
    r"""Descent along the part of each gradient that is orthogonal to its weights (perpGrad), around any optimizer.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups. A group may have its own ``rescale``, and ``project=False`` leaves its gradients as they
        are, which suits gains and biases of normalisations.
    base_optimizer : callable
        Class of the optimizer that steps. Weight decay would undo what the projection does.
    rescale : bool
        Give the projected gradient the length of the gradient, as in the authors' code.
    **base_options
        Of the optimizer inside, such as ``lr``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    For each tensor w with gradient g,

    .. math:: g_\perp = g - \frac{g \cdot w}{w \cdot w} w,

    in place of g in ``.grad``. Scaling the weights of a network without biases scales its logits and changes no prediction:
    the step along w is the one that lowers the loss without learning. Where w is zero there is no such direction and g is
    kept; where only rounding is left of the projection, it is set to zero and not scaled up.

    Cost: two inner products and norms a tensor, two times over, so that rescaling does not magnify rounding errors.

    References
    ----------
    Prieto et al. (2025), arXiv:2501.04697, section 5.

    Examples
    --------
    >>> w = nn.Parameter(torch.tensor([3.0, 0.0]))
    >>> optimizer = OrthogonalGradient([w], torch.optim.SGD, lr=0.1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = (w * torch.tensor([-3.0, -4.0])).sum()
    ...     loss.backward()
    ...     return loss
    >>> optimizer.step(closure).item(), w.detach()
    (-9.0, tensor([3.0000, 0.5000]))
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        rescale: bool = True,
        **base_options: Any,
    ) -> None:
        if base_optimizer is torch.optim.AdamW:
            base_options = {"weight_decay": 0.0, **base_options}
        super().__init__(params, base_optimizer, {"rescale": rescale, "project": True}, base_options)

    def check_group(self, group: Any) -> None:
        """Check the switches of a group."""
        checks.one_of("rescale", group["rescale"], (True, False))
        checks.one_of("project", group["project"], (True, False))

    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """Take one step and return the closure's loss.

        Parameters
        ----------
        closure : callable, optional
            ``closure() -> loss``; clears the gradients, evaluates the batch and calls ``backward``. Without it the
            gradients of the last ``backward`` are used.
        """
        if closure is None:
            self._project()
            return self.base_optimizer.step()

        def projected() -> Any:
            loss = closure()
            self._project()
            return loss

        return self.base_optimizer.step(projected)

    @torch.no_grad()
    def _project(self) -> None:
        for group, p in self.trained():
            if group["project"]:
                p.grad = _orthogonal(p, p.grad, group["rescale"])  # type: ignore[arg-type]


def softmax_collapse_fraction(logits: Tensor, targets: Tensor) -> float:
    """Return the share of rows whose correct class has no gradient left, because its probability rounds to one.

    Parameters
    ----------
    logits : Tensor, shape (n, classes)
        In the precision that is trained in.
    targets : Tensor of int, shape (n,)
        The correct classes.

    Returns
    -------
    float
        Between 0 and 1.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the shapes or the labels do not fit.

    Notes
    -----
    The derivative of the cross-entropy by the correct logit is ``p - 1``. It is exactly 0 where the exponentials of the other
    logits are absorbed in the sum: in single precision above a margin of 24 ln 2 = 16.6, in double of 53 ln 2 = 36.7.

    References
    ----------
    Prieto et al. (2025), arXiv:2501.04697, section 3.

    Examples
    --------
    >>> logits = torch.tensor([[16.0, 0.0], [17.0, 0.0], [0.0, 17.0]])
    >>> round(softmax_collapse_fraction(logits, torch.tensor([0, 0, 0])), 3)
    0.333
    """
    checks.tensor("logits", logits, ndim=2)
    rows = checks.labels("targets", targets, n=len(logits), n_classes=logits.shape[1])
    p = logits.detach().softmax(1).gather(1, rows.to(logits.device)[:, None])
    return float((p == 1).double().mean())


def naive_loss_alignment(params: Iterable[Tensor]) -> float:
    """Return the cosine of the angle between the step of gradient descent and the weights.

    Parameters
    ----------
    params : iterable of Tensor
        Parameters; those without a gradient are left out.

    Returns
    -------
    float
        From -1 to 1, of all tensors as one vector. Near 1 where training only scales the weights; 0 where gradient or
        weights are zero.

    Raises
    ------
    ArgumentError
        If no parameter has a gradient.

    Notes
    -----
    ``-g . w / (|g| |w|)`` in double precision.

    References
    ----------
    Prieto et al. (2025), arXiv:2501.04697, section 4.

    Examples
    --------
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> (-3 * w.square().sum()).backward()
    >>> round(naive_loss_alignment([w]), 6)
    1.0
    """
    members = [p for p in params if p.grad is not None]
    if not members:
        raise checks.ArgumentError(
            "params has none with a gradient; allowed: at least one. Call backward() on the loss first."
        )
    w = torch.cat([p.detach().reshape(-1).double() for p in members])
    g = torch.cat([_dense(p.grad).detach().reshape(-1).double() for p in members])  # type: ignore[arg-type]
    length = float(w.norm() * g.norm())
    return -float(g @ w) / length if length > 0 else 0.0


class ModularAddition:
    """The sums of two numbers modulo p, some for training and the rest for testing.

    Parameters
    ----------
    p : int
        The modulus and number of classes, at least 2.
    train_fraction : float
        Share of the p^2 pairs that are for training, in (0, 1).
    generator : torch.Generator, int or None
        Chooses the pairs.

    Attributes
    ----------
    x, test_x : Tensor, shape (n, 2 p)
        One-hot codes of both numbers, side by side.
    y, test_y : Tensor of int, shape (n,)
        Their sums modulo p.

    Raises
    ------
    ArgumentError
        If the modulus or the share is not allowed.

    Notes
    -----
    A task that networks learn by heart first and understand later.

    Examples
    --------
    >>> task = ModularAddition(5, 0.4, generator=0)
    >>> task.x.shape, task.test_x.shape
    (torch.Size([10, 10]), torch.Size([15, 10]))
    >>> bool(((task.x.nonzero()[:, 1] % 5).view(-1, 2).sum(1) % 5 == task.y).all())
    True
    """

    def __init__(self, p: int = 113, train_fraction: float = 0.4, generator: Seed = None) -> None:
        self.p = checks.integer("p", p, low=2)
        checks.between("train_fraction", train_fraction, 0, 1, inclusive="neither")
        numbers = torch.arange(p)
        pairs = torch.cartesian_prod(numbers, numbers)
        pairs = pairs[randperm(p * p, generator=as_generator(generator))]
        x = nn.functional.one_hot(pairs, p).flatten(1).to(torch.get_default_dtype())
        y = pairs.sum(1) % p
        n = min(max(round(train_fraction * p * p), 1), p * p - 1)
        self.x, self.test_x = x[:n], x[n:]
        self.y, self.test_y = y[:n], y[n:]


def _dense(g: Tensor) -> Tensor:
    return g.to_dense() if g.is_sparse else g


def _orthogonal(w: Tensor, g: Tensor, rescale: bool) -> Tensor:
    """Return the part of g orthogonal to w."""
    dense = _dense(g)
    wide = torch.promote_types(dense.dtype, torch.float32)
    weights, full = w.detach().to(wide).reshape(-1), dense.to(wide).reshape(-1)
    square, before = weights.dot(weights), full.dot(full).sqrt()
    # A weight of zero gives no direction, and the gradient stays.
    inverse = torch.where(square > 0, 1 / square, torch.zeros_like(square))
    part = torch.addcmul(full, weights, full.dot(weights) * inverse, value=-1)
    part.addcmul_(weights, part.dot(weights) * inverse, value=-1)
    after = part.dot(part).sqrt()
    rounding = after <= 4 * torch.finfo(wide).eps * before
    scale = before / after if rescale else torch.ones_like(after)
    part.mul_(torch.where(rounding, torch.zeros_like(scale), scale))
    return part.view_as(dense).to(dense.dtype)
