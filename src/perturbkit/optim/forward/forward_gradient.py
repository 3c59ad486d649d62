"""Forward gradient: an unbiased gradient from one forward pass along a random direction.

Use it where a backward pass is not to be had, or where the activations it saves do not fit. Baydin, Pearlmutter,
Syme, Wood and Torr (2022), Gradients without Backpropagation, arXiv:2202.08587.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from perturbkit.core import checks
from perturbkit.core.optimizers import BaseOptimizer
from perturbkit.core.random import Seed, as_generator, rademacher, randn

__all__ = ["ForwardSGD", "forward_gradient", "forward_gradient_variance"]

Distribution = Literal["normal", "rademacher"]
_DRAW = {"normal": randn, "rademacher": rademacher}


def forward_gradient(
    loss_fn: Callable[[dict[str, Tensor]], Tensor],
    params: Mapping[str, Tensor],
    *,
    directions: int = 1,
    distribution: Distribution = "rademacher",
    average: bool = True,
    generator: Seed = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Estimate the gradient of a loss by forward-mode differentiation along random directions.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(params) -> Tensor`` of shape (), the loss of named parameters; write it with
        ``torch.func.functional_call``. Its own randomness must be fixed, or the directions see different losses.
    params : mapping of str to Tensor
        Parameters, floating point.
    directions : int
        Independent directions, at least 1. One direction spans all the parameters together.
    distribution : {"rademacher", "normal"}
        Of the directions' entries. Random signs have the smaller variance.
    average : bool
        Average over the directions; otherwise the estimates are stacked in front.
    generator : torch.Generator, int or None
        Source of the directions.

    Returns
    -------
    loss : Tensor, shape ()
    gradients : dict of str to Tensor
        In the shapes of the parameters, or (directions, ...).

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a parameter or option is not allowed, or the loss is not one number.

    Notes
    -----
    ``g = (grad f . v) v`` with ``E v v^T = I`` is unbiased. The derivative is exact, with no step size. Nothing is
    saved for a backward pass.

    Cost: one forward pass with tangents, about two to three plain ones; with several directions the primal pass is
    shared and the tangents are batched. The variance is that of :func:`forward_gradient_variance`.

    References
    ----------
    Baydin et al. (2022), arXiv:2202.08587, algorithm 1.

    Examples
    --------
    >>> loss, g = forward_gradient(lambda p: (p["w"] ** 2).sum(), {"w": torch.tensor([3.0])}, generator=0)
    >>> float(loss), g["w"].tolist()
    (9.0, [6.0])
    """
    names = _checked(params)
    n = checks.integer("directions", directions, low=1)
    draw = _DRAW[checks.one_of("distribution", distribution, tuple(_DRAW))]
    g = as_generator(generator)
    values = {k: p.detach() for k, p in params.items()}
    tangents = {k: draw((n, *values[k].shape), generator=g, like=values[k]) for k in names}
    tangents = {k: t.to(values[k].dtype) for k, t in tangents.items()}
    with torch.no_grad():
        loss, slopes = _slopes(loss_fn, values, tangents, n)
    gradients = {}
    for k, t in tangents.items():
        each = slopes.to(t.dtype).reshape(-1, *[1] * (t.ndim - 1)) * t
        gradients[k] = each.mean(0) if average else each
    return loss, gradients


def forward_gradient_variance(
    gradient: Tensor | Iterable[Tensor], directions: int = 1, distribution: Distribution = "rademacher"
) -> Tensor:
    """Return the expected squared error of a forward gradient, summed over all parameters.

    Parameters
    ----------
    gradient : Tensor or iterable of Tensor
        The true gradient.
    directions : int
        Directions averaged over, at least 1.
    distribution : {"rademacher", "normal"}
        Of the directions' entries.

    Returns
    -------
    Tensor, shape ()

    Notes
    -----
    ``E |g_hat - g|^2 = (d + 1) |g|^2 / directions`` for normal entries, ``(d - 1) |g|^2 / directions`` for signs.

    References
    ----------
    Baydin et al. (2022), arXiv:2202.08587; Isserlis' theorem.

    Examples
    --------
    >>> float(forward_gradient_variance(torch.tensor([3.0, 4.0]), directions=5))
    5.0
    """
    parts = [gradient] if isinstance(gradient, Tensor) else list(gradient)
    n = checks.integer("directions", directions, low=1)
    checks.one_of("distribution", distribution, tuple(_DRAW))
    d = sum(p.numel() for p in parts)
    square = torch.stack([p.square().sum() for p in parts]).sum()
    return (d + (1 if distribution == "normal" else -1)) * square / n


class ForwardSGD(BaseOptimizer):
    """Stochastic gradient descent by forward gradients.

    Parameters
    ----------
    module : nn.Module
        The model; its trainable parameters are updated in place.
    lr : float
        First learning rate, above 0. About ``1 / (d + 2)`` of the largest that plain gradient descent bears, for one
        direction over d parameters.
    decay : float
        The rate is ``lr exp(-decay t)`` at step t; zero or above.
    directions : int
        Directions a step, at least 1.
    distribution : {"rademacher", "normal"}
        Of the directions' entries.
    generator : torch.Generator, int or None
        Source of the directions.

    Notes
    -----
    ``w <- w - lr exp(-decay t) g_hat``. On a quadratic of curvature L with normal entries the expected error shrinks
    for ``lr < 2 / (L (d + 2))``.

    Cost: a step is one forward pass with tangents; no activation is saved.

    References
    ----------
    Baydin et al. (2022), arXiv:2202.08587, section 4.

    Examples
    --------
    >>> net = nn.Linear(2, 1)
    >>> optimizer = ForwardSGD(net, lr=0.1, generator=0)
    >>> x, y = torch.eye(2), torch.ones(2, 1)
    >>> losses = [float(optimizer.step(lambda model: ((model(x) - y) ** 2).mean())) for _ in range(200)]
    >>> losses[-1] < 0.01
    True
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        *,
        decay: float = 1e-4,
        directions: int = 1,
        distribution: Distribution = "rademacher",
        generator: Seed = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise checks.ArgumentTypeError(
                f"module is a {type(module).__name__}; allowed: an nn.Module. Pass the model, not its parameters."
            )
        checks.positive("lr", lr)
        checks.nonnegative("decay", decay)
        checks.integer("directions", directions, low=1)
        checks.one_of("distribution", distribution, tuple(_DRAW))
        self._module = module
        self._names = [k for k, p in module.named_parameters() if p.requires_grad]
        self._generator = as_generator(generator)
        self._options: dict[str, Any] = {"directions": directions, "distribution": distribution}
        defaults = {"lr": lr, "decay": decay}
        super().__init__([p for p in module.parameters() if p.requires_grad], defaults)

    def step(self, closure: Callable[[Callable[..., Any]], Tensor]) -> Tensor:  # type: ignore[override]
        """Take one step and return the loss before it.

        Parameters
        ----------
        closure : callable
            ``closure(model) -> loss``, where ``model`` is called like the module.
        """
        own = dict(self._module.named_parameters())
        params = {k: own[k] for k in self._names}

        def loss_fn(values: dict[str, Tensor]) -> Tensor:
            return closure(lambda *args, **kwargs: functional_call(self._module, values, args, kwargs))

        loss, gradients = forward_gradient(loss_fn, params, generator=self._generator, **self._options)
        for group in self.param_groups:
            t = group.setdefault("t", 0)
            rate = group["lr"] * math.exp(-group["decay"] * t)
            group["t"] = t + 1
            members = {id(p) for p in group["params"]}
            with torch.no_grad():
                for k, p in params.items():
                    if id(p) in members:
                        p.sub_(rate * gradients[k])
        return loss


def _checked(params: Mapping[str, Tensor]) -> list[str]:
    if not isinstance(params, Mapping) or not params:
        raise checks.ArgumentTypeError(
            f"params is a {type(params).__name__}; allowed: a mapping of names to tensors, not empty. "
            "Pass dict(module.named_parameters())."
        )
    for name, value in params.items():
        checks.tensor(f"params[{name!r}]", value, finite=False)
    return list(params)


def _slopes(
    loss_fn: Callable[[dict[str, Tensor]], Tensor],
    values: dict[str, Tensor],
    tangents: dict[str, Tensor],
    n: int,
) -> tuple[Tensor, Tensor]:
    """Return the loss and its derivative along each direction, shape (n,)."""

    def along(tangent: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        loss, slope, *_ = torch.func.jvp(loss_fn, (values,), (tangent,))
        if loss.ndim != 0:
            raise checks.ArgumentError(
                f"the loss has shape {tuple(loss.shape)}; allowed: one number, shape (). Take its mean."
            )
        return loss, slope

    if n == 1:
        loss, slope = along({k: t[0] for k, t in tangents.items()})
        return loss, slope[None]
    # The primal does not depend on the batched tangents: vmap runs it once.
    out_dims: Any = (None, 0)
    loss, slopes = torch.func.vmap(along, out_dims=out_dims)(tangents)
    return loss, slopes
