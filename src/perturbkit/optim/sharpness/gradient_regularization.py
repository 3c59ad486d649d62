"""Gradient regularisation by finite differences: descend the loss and the size of its gradient.

Use it as a regulariser at the price of one more gradient a step, without differentiating twice. Karakida, Takase,
Hayase and Osawa (2023), Understanding Gradient Regularization in Deep Learning, arXiv:2210.02720.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perturbkit.core import checks
from perturbkit.core.optimizers import (
    Closure,
    Replay,
    WrappingOptimizer,
    dense_gradients,
    displaced,
    loss_value,
)

__all__ = ["DiagonalLinearNet", "Flooding", "GradientRegularizer", "implicit_norm", "richness"]

Scheme = Literal["forward", "backward", "central", "double_backprop"]
_SCHEMES = ("forward", "backward", "central", "double_backprop")


class GradientRegularizer(WrappingOptimizer):
    r"""Descent of ``L + coefficient |grad L|^2 / 2`` around any PyTorch optimizer.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups.
    base_optimizer : callable
        Class of the optimizer that steps.
    coefficient : float
        Weight :math:`\gamma` of the penalty, zero or above.
    radius : float
        Step :math:`\epsilon` of the difference along the gradient, above 0. Large ones (0.01 to 1) are best for the forward
        scheme: its error is a regulariser too.
    scheme : {"forward", "backward", "central", "double_backprop"}
        The difference; or the exact product, by differentiating twice: the closure must then not call ``backward`` but
        return the loss with its graph.
    model : nn.Module, optional
        Where given, the running statistics of its batch normalisations are moved by the first pass only.
    **base_options
        Of the optimizer inside, such as ``lr``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    The optimizer inside is given :math:`g + \gamma \Delta`, with :math:`g = \nabla L(w)` and, for the forward scheme,
    :math:`\Delta = (\nabla L(w + \epsilon g) - g) / \epsilon`; for the backward one :math:`(g - \nabla L(w - \epsilon g))
    / \epsilon`; and half of their sum for the central one. All are :math:`H g` on a quadratic loss. With
    :math:`\gamma = \epsilon` the forward scheme is sharpness-aware minimisation without normalisation. Both passes see the
    same batch and dropout masks.

    Cost: two gradients a step, three for the central scheme.

    References
    ----------
    Karakida et al. (2023), arXiv:2210.02720, section 3.

    Examples
    --------
    >>> w = nn.Parameter(torch.tensor([2.0]))
    >>> optimizer = GradientRegularizer([w], lr=0.1, coefficient=0.5, radius=0.1)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = w.square().sum() / 2
    ...     loss.backward()
    ...     return loss
    >>> _ = optimizer.step(closure)
    >>> round(float(w), 4)  # 2 - 0.1 (2 + 0.5 * 1 * 2)
    1.7
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        coefficient: float = 0.05,
        radius: float = 0.05,
        scheme: Scheme = "forward",
        model: nn.Module | None = None,
        **base_options: Any,
    ) -> None:
        self._scheme = checks.one_of("scheme", scheme, _SCHEMES)
        defaults = {"coefficient": coefficient, "radius": radius}
        super().__init__(params, base_optimizer, defaults, base_options, model)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check the weight and the step of a group."""
        checks.nonnegative("coefficient", group["coefficient"])
        checks.positive("radius", group["radius"])

    def step(self, closure: Closure) -> Any:  # type: ignore[override]
        """Take one step and return the loss before it.

        Parameters
        ----------
        closure : callable
            ``closure() -> loss``; clears the gradients, evaluates the batch and calls ``backward`` (unless the scheme is
            ``"double_backprop"``).
        """
        again = self.replay(closure)
        if self._scheme == "double_backprop":
            loss = self._twice(again)
        else:
            loss = self._differences(again)
        self.base_optimizer.step()
        return loss

    def _differences(self, again: Replay) -> Any:
        loss = again()
        members = self.trained()
        weights = [p for _, p in members]
        grads = dense_gradients(weights)
        penalty = [torch.zeros_like(g) for g in grads]
        signs = {"forward": (1.0,), "backward": (-1.0,), "central": (1.0, -1.0)}[self._scheme]
        for sign in signs:
            shifts = [g * (sign * group["radius"]) for g, (group, _) in zip(grads, members, strict=True)]
            with displaced(weights, shifts):
                again()
            for total, g, there, (group, _) in zip(
                penalty, grads, dense_gradients(weights), members, strict=True
            ):
                total.add_(there - g, alpha=sign * group["coefficient"] / (group["radius"] * len(signs)))
        for p, g, extra in zip(weights, grads, penalty, strict=True):
            p.grad = g + extra
        return loss

    def _twice(self, again: Replay) -> Any:
        self.zero_grad()
        loss = again()
        loss_value(loss)
        trained = [(group, p) for group in self.param_groups for p in group["params"] if p.requires_grad]
        weights = [p for _, p in trained]
        called = any(p.grad is not None for _, p in trained)
        if not isinstance(loss, Tensor) or loss.grad_fn is None or called:
            raise checks.ModelError(
                f"the closure {'called backward' if called else 'returned a loss without a graph'}; allowed: a loss that can be "
                "differentiated twice. Do not call backward in it."
            )
        with torch.enable_grad():
            grads = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
            penalty = sum(
                g.square().sum() * (group["coefficient"] / 2)
                for g, (group, _) in zip(grads, trained, strict=True)
                if g is not None
            )
        # A loss that is linear in all weights has gradients without a graph.
        curved = isinstance(penalty, Tensor) and penalty.requires_grad
        products = (
            torch.autograd.grad(penalty, weights, allow_unused=True) if curved else [None] * len(weights)
        )
        for p, g, extra in zip(weights, grads, products, strict=True):
            # What the loss does not use has no gradient, and the optimizer inside leaves it alone.
            if g is not None:
                p.grad = g.detach() if extra is None else g.detach() + extra
        return loss.detach()


class Flooding(WrappingOptimizer):
    r"""Descent of ``|L - level| + level``: down above the level, up below it.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups.
    base_optimizer : callable
        Class of the optimizer that steps.
    level : float
        The level :math:`b`, zero or above.
    model : nn.Module, optional
        See :class:`GradientRegularizer`.
    **base_options
        Of the optimizer inside, such as ``lr``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    A step up followed by one down moves the weights by :math:`-\eta (\nabla L(w + \eta g) - g) \approx -\eta^2 H g`: the
    forward difference of :class:`GradientRegularizer` with the learning rate as its radius.

    References
    ----------
    Ishida et al. (2020), arXiv:2002.08709; Karakida et al. (2023), arXiv:2210.02720, section 5.

    Examples
    --------
    >>> w = nn.Parameter(torch.tensor([1.0]))
    >>> optimizer = Flooding([w], lr=0.1, level=2.0)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = w.square().sum() / 2
    ...     loss.backward()
    ...     return loss
    >>> _ = optimizer.step(closure)
    >>> round(float(w), 4)  # the loss is below the level: up
    1.1
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        level: float = 0.1,
        model: nn.Module | None = None,
        **base_options: Any,
    ) -> None:
        self._level = checks.nonnegative("level", level)
        super().__init__(params, base_optimizer, {}, base_options, model)

    def step(self, closure: Closure) -> Any:  # type: ignore[override]
        """Take one step and return the loss before it.

        Parameters
        ----------
        closure : callable
            ``closure() -> loss``; clears the gradients, evaluates the batch and calls ``backward``.
        """
        loss = self.replay(closure)()
        if loss_value(loss) < self._level:
            for _, p in self.trained():
                assert p.grad is not None
                p.grad.neg_()
        self.base_optimizer.step()
        return loss


class DiagonalLinearNet(nn.Module):
    r"""Linear regression with coefficients :math:`\beta = u^2 - v^2`, which descent makes sparse from a small start.

    Parameters
    ----------
    d : int
        Coefficients, at least 1.
    init_scale : float
        Value of every ``u`` and ``v`` at the start, above 0.
    dtype : torch.dtype, optional
        Of the weights; PyTorch's default unless given.

    Notes
    -----
    Small starts lead to the solution of least l1 norm, large ones to that of least l2 norm.

    References
    ----------
    Woodworth et al. (2020), arXiv:2002.09277; Karakida et al. (2023), arXiv:2210.02720, section 4.

    Examples
    --------
    >>> net = DiagonalLinearNet(3, 0.5)
    >>> net(torch.ones(2, 3)).tolist()
    [0.0, 0.0]
    """

    def __init__(self, d: int, init_scale: float, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        size = (checks.integer("d", d, low=1),)
        start = checks.positive("init_scale", init_scale)
        self.u = nn.Parameter(torch.full(size, start, dtype=dtype))
        self.v = nn.Parameter(torch.full(size, start, dtype=dtype))

    @property
    def beta(self) -> Tensor:
        """The coefficients, shape (d,)."""
        return self.u.square() - self.v.square()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ beta``, shape (n,)."""
        return x @ self.beta


def implicit_norm(beta: Tensor, alpha: float | Tensor) -> Tensor:
    r"""Return the norm that gradient flow of a diagonal linear network minimises among the solutions.

    Parameters
    ----------
    beta : Tensor, shape (..., d)
        Coefficients.
    alpha : float or Tensor, shape (..., d)
        Scale of the start, above 0.

    Returns
    -------
    Tensor, shape (...,)

    Raises
    ------
    ArgumentError
        If the scale is not above 0.

    Notes
    -----
    :math:`\sum_i \alpha_i^2 q(\beta_i / \alpha_i^2)` with :math:`q(z) = 2 - \sqrt{4 + z^2} + z \operatorname{arcsinh}(z / 2)`,
    up to a factor the squared l2 norm for large starts and the l1 norm for small ones.

    References
    ----------
    Woodworth et al. (2020), arXiv:2002.09277, theorem 1.

    Examples
    --------
    >>> float(implicit_norm(torch.zeros(3), 0.1))
    0.0
    """
    checks.tensor("beta", beta)
    square = _positive(alpha, beta).square()
    z = beta / square
    # 2 - sqrt(4 + z^2) without the cancellation of small z.
    q = -z.square() / (2 + (4 + z.square()).sqrt()) + z * torch.asinh(z / 2)
    return (square * q).sum(-1)


def richness(beta: Tensor, alpha: float | Tensor) -> Tensor:
    r"""Return how far the implicit norm is from the squared l2 norm and near the l1 norm, between 0 and 1.

    Parameters
    ----------
    beta : Tensor, shape (..., d)
        Coefficients, not all zero.
    alpha : float or Tensor, shape (..., d)
        Scale of the start, above 0.

    Returns
    -------
    Tensor, shape (...,)

    Raises
    ------
    ArgumentError
        If the scale is not above 0, or all coefficients are zero.

    Notes
    -----
    The exponent p of the growth of the implicit norm under scaling, :math:`p = \beta \cdot \nabla Q / Q`, is 2 in the lazy
    regime and tends to 1 in the rich one; returned is :math:`2 - p`.

    References
    ----------
    Woodworth et al. (2020), arXiv:2002.09277, section 4.

    Examples
    --------
    >>> float(richness(torch.ones(2), 1e-6)) > 0.9, float(richness(torch.ones(2), 1e3)) < 0.01
    (True, True)
    """
    checks.tensor("beta", beta)
    square = _positive(alpha, beta).square()
    if bool((beta == 0).all(-1).any()):
        raise checks.ArgumentError(
            "beta is zero; allowed: at least one coefficient that is not. Take it after the first steps."
        )
    # The derivative of alpha^2 q(beta / alpha^2) is arcsinh(beta / (2 alpha^2)).
    growth = (beta * torch.asinh(beta / (2 * square))).sum(-1)
    return 2 - growth / implicit_norm(beta, alpha)


def _positive(alpha: float | Tensor, beta: Tensor) -> Tensor:
    scale = torch.as_tensor(alpha, dtype=beta.dtype, device=beta.device)
    if not bool((scale > 0).all()):
        raise checks.ArgumentError(
            f"alpha is {alpha}; allowed: numbers above 0. Pass the scale of the first weights."
        )
    return scale
