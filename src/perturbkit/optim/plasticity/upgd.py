"""UPGD: gradient descent that perturbs the weights that are of no use and protects those that are.

Use it where a network learns from a stream whose task changes: useful weights are forgotten less, and the others stay ready
to learn. Elsayed and Mahmood (2023), Utility-based Perturbed Gradient Descent: An Optimizer for Continual Learning,
arXiv:2302.03281 (extended in 2024 as arXiv:2404.00781).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from perturbkit.core import checks
from perturbkit.core.optimizers import BaseOptimizer, Closure, loss_value
from perturbkit.core.random import Seed, as_generator, mixed_seed, randn
from perturbkit.optim.plasticity._diagonal import gradient_and_diagonal

__all__ = ["UPGD", "scaled_utility", "true_utility", "weight_utility"]

Scaling = Literal["global", "local"]

_SCALINGS = ("global", "local")
_SMALLEST = 1e-12
"""Least largest utility that is divided by; early ones may all be negative."""


class UPGD(BaseOptimizer):
    r"""Utility-based perturbed gradient descent.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups; a group may have its own ``lr``, ``sigma``, ``utility_decay``, ``weight_decay`` and ``gain``.
    lr : float
        Learning rate, zero or above.
    sigma : float
        Standard deviation of the noise that is added to each gradient, zero or above.
    utility_decay : float
        Decay of the running mean of the utilities, in [0, 1).
    weight_decay : float
        Decay of the weights, decoupled from the gradient; zero or above.
    protect : bool
        Useful weights are spared gradient and noise; otherwise the noise alone.
    scaling : {"global", "local"}
        Utilities are compared with the largest of all weights, or with the Euclidean norm of their row (last dimension).
    second_order : bool
        Utilities with the Hessian's diagonal.
    gain : float
        Factor of the step, above 0. Useless weights have a scaled utility of about one half, so that a gain of 2, as in the
        later code of the authors, gives them the step of gradient descent.
    n_probes : int, optional
        Random sign vectors that estimate the Hessian's diagonal; ``None`` computes it exactly, at one product a weight.
    seed : int
        Seed of noise and probes, zero or above.
    feature_wise : bool
        One utility for all weights that leave a unit, that of a gate of one on its output, instead of one a weight. Vectors
        (biases) keep their own.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    With the utility U of a weight (see :func:`weight_utility`), :math:`A \leftarrow \beta A + (1 - \beta) U`, its scaled form s of
    :func:`scaled_utility` of :math:`A / (1 - \beta^t)`, and fresh noise :math:`\xi \sim N(0, \sigma^2)`,

    .. math:: w \leftarrow (1 - \eta \lambda) w - \gamma \eta (g + \xi) (1 - s),

    or :math:`(g + \xi (1 - s))` without protection. The global s is at most 0.731: no weight is ever frozen. By features,
    :math:`U_j = -\partial L / \partial \text{gate}_j = -\sum_i g_{ij} w_{ij}` over the weights that leave unit j (second dimension of a
    weight), by the chain rule.

    Cost: one gradient a step, one buffer of the weights' size and normal draws. Second order: a graph of the gradient
    and ``n_probes`` Hessian-vector products.

    References
    ----------
    Elsayed and Mahmood (2023), arXiv:2302.03281, algorithm 1 and equations 2 to 6.

    Examples
    --------
    >>> w = torch.tensor([3.0, -1.0], requires_grad=True)
    >>> optimizer = UPGD([w], lr=0.2)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     w.square().sum().backward()
    ...     optimizer.step()
    >>> bool(w.detach().abs().max() < 0.01)
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        sigma: float = 1e-3,
        utility_decay: float = 0.999,
        weight_decay: float = 0.0,
        protect: bool = True,
        scaling: Scaling = "global",
        second_order: bool = False,
        gain: float = 1.0,
        n_probes: int | None = 1,
        seed: int = 0,
        feature_wise: bool = False,
    ) -> None:
        if feature_wise and second_order:
            raise checks.ArgumentError(
                "feature_wise and second_order are both True; allowed: one of them, since the curvature of a gate is not a sum of those of "
                "weights. Leave second_order out."
            )
        self._feature_wise = bool(feature_wise)
        self._protect, self._second_order = bool(protect), bool(second_order)
        self._scaling: Scaling = checks.one_of("scaling", scaling, _SCALINGS)
        self._probes = None if n_probes is None else checks.integer("n_probes", n_probes, low=1)
        self._seed = checks.integer("seed", seed, low=0)
        options = {"lr": lr, "sigma": sigma, "utility_decay": utility_decay, "weight_decay": weight_decay}
        super().__init__(params, {**options, "gain": gain})

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check a group's own options."""
        for name in ("lr", "sigma", "weight_decay"):
            checks.nonnegative(name, group[name])
        checks.between("utility_decay", group["utility_decay"], 0, 1, inclusive="low")
        checks.positive("gain", group["gain"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, utilities in the precision in which they were kept."""
        super().load_state_dict(state_dict)
        # PyTorch gives the state the dtype of the parameter, which is too narrow for half precision.
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        members = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(keys, members, strict=True):
            if key in state_dict["state"]:
                kept = state_dict["state"][key]["utility"]
                self.state[p]["utility"] = kept.detach().clone().to(p.device)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """Take one step and return the closure's loss.

        Parameters
        ----------
        closure : callable, optional
            ``closure() -> loss``; clears the gradients, evaluates the batch and calls ``backward``. With ``second_order`` it
            is needed, and must not call ``backward``: the step differentiates the loss itself, twice.
        """
        t = self.advance()
        loss, curvatures = self._evaluated(closure, t)
        members = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not members:
            return loss
        # All utilities before any update: the scale is the largest of them all.
        scaled = scaled_utility(
            [self._traced(group, p, curvatures.get(p)) for group, p in members], self._scaling
        )
        generators: dict[torch.device, torch.Generator] = {}
        for (group, p), s in zip(members, scaled, strict=True):
            g, spared = _wide(p.grad), s.neg_().add_(1)  # type: ignore[arg-type]
            if s.shape != p.shape:  # one a unit: along the second dimension
                spared = spared.reshape(1, -1, *[1] * (p.ndim - 2))
            if group["sigma"] > 0:
                if p.device not in generators:
                    generators[p.device] = torch.Generator(p.device).manual_seed(mixed_seed(self._seed, t, 0))
                noise = randn(p.shape, generator=generators[p.device], like=g).mul_(group["sigma"])
                g = (noise if self._protect else noise * spared).add_(g)
            # Of the parameter's own memory, but for half precision.
            w, rate = _wide(p), group["gain"] * group["lr"]
            if group["weight_decay"] > 0:
                w.mul_(1 - group["lr"] * group["weight_decay"])
            if self._protect:
                w.addcmul_(g, spared, value=-rate)
            else:
                w.add_(g, alpha=-rate)
            if w.dtype != p.dtype:
                p.copy_(w)
        return loss

    def _evaluated(self, closure: Closure | None, t: int) -> tuple[Any, dict[Tensor, Tensor]]:
        """Return the closure's loss, and the Hessian's diagonal of each weight where it is wanted."""
        if not self._second_order:
            with torch.enable_grad():
                return (None if closure is None else closure()), {}
        if not callable(closure):
            raise checks.ArgumentTypeError(
                f"closure is {closure!r}; allowed with second_order: a function that returns the loss with its graph. "
                "Pass step(closure), with no backward() inside."
            )
        weights = self.weights
        with torch.enable_grad():
            loss = _graph(closure)
            generator = torch.Generator().manual_seed(mixed_seed(self._seed, t, 1))
            grads, diagonals = gradient_and_diagonal(loss, weights, self._probes, generator)
        for p, g in zip(weights, grads, strict=True):
            p.grad = g
        return loss.detach(), dict(zip(weights, diagonals, strict=True))

    def _traced(self, group: dict[str, Any], p: Tensor, curvature: Tensor | None) -> Tensor:
        """Return the running mean of a parameter's utilities, corrected for its start at zero."""
        state, decay = self.state[p], group["utility_decay"]
        w, g = _wide(p), _wide(p.grad)  # type: ignore[arg-type]
        by_unit = self._feature_wise and w.ndim >= 2
        if "utility" not in state:
            state["step"], state["utility"] = 0, w.new_zeros(w.shape[1] if by_unit else w.shape)
        state["step"] += 1
        if by_unit:
            others = [d for d in range(w.ndim) if d != 1]
            state["utility"].mul_(decay).add_((g * w).sum(others), alpha=decay - 1)
        else:
            state["utility"].mul_(decay).addcmul_(g, w, value=decay - 1)
        if curvature is not None:
            state["utility"].addcmul_(curvature * w, w, value=(1 - decay) / 2)
        return state["utility"] / (1 - decay ** state["step"])


def scaled_utility(utilities: Sequence[Tensor], scaling: Scaling = "global") -> list[Tensor]:
    r"""Return utilities as numbers between 0 and 1, of which 1/2 means useless.

    Parameters
    ----------
    utilities : sequence of Tensor
        One a parameter tensor.
    scaling : {"global", "local"}
        What a utility is compared with.

    Returns
    -------
    list of Tensor
        Of the shapes given. The function can be mapped over networks by ``torch.func.vmap``.

    Raises
    ------
    ArgumentError
        If there is none, or the scaling is another.

    Notes
    -----
    The sigmoid of the utility over the largest of all (at least 1e-12), or over the Euclidean norm along the last dimension.

    References
    ----------
    Elsayed and Mahmood (2023), arXiv:2302.03281, section 3.

    Examples
    --------
    >>> scaled_utility([torch.tensor([2.0, 0.0]), torch.tensor([-2.0])])
    [tensor([0.7311, 0.5000]), tensor([0.2689])]
    """
    checks.one_of("scaling", scaling, _SCALINGS)
    if not utilities:
        raise checks.ArgumentError(
            "utilities is empty; allowed: at least one tensor. Pass the list that weight_utility returns."
        )
    if scaling == "global":
        device = utilities[0].device
        # Tensors without entries have no largest one; the floor stands for them.
        tops = [u.amax().to(device) for u in utilities if u.numel()] or [utilities[0].new_zeros(())]
        largest = torch.stack(tops).amax().clamp(min=_SMALLEST)
        return [(u / largest.to(u.device)).sigmoid_() for u in utilities]
    return [
        torch.sigmoid(torch.nn.functional.normalize(u, dim=-1, eps=_SMALLEST) if u.ndim else u.sign())
        for u in utilities
    ]


def weight_utility(
    loss_fn: Callable[[], Tensor],
    params: Iterable[Tensor],
    order: Literal[1, 2] = 1,
    *,
    n_probes: int | None = None,
    generator: Seed = None,
) -> list[Tensor]:
    r"""Estimate by how much the loss would rise if a weight were zero, for each weight.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn() -> loss`` with a graph to the parameters.
    params : iterable of Tensor
        Parameters; they and their gradients are left as they are.
    order : {1, 2}
        Order of the Taylor polynomial.
    n_probes : int, optional
        Random sign vectors that estimate the Hessian's diagonal; ``None`` computes it exactly.
    generator : torch.Generator, int or None
        Source of the probes.

    Returns
    -------
    list of Tensor
        One a parameter that requires a gradient, of its shape.

    Raises
    ------
    ArgumentError, ArgumentTypeError, ModelError
        If an option is not allowed, no parameter is trained or the loss is not one number with a graph.

    Notes
    -----
    :math:`U = -g w` and :math:`U = -g w + h w^2 / 2` with the Hessian's diagonal h. The latter is exact for quadratic losses.
    The utility of a unit is the sum over its outgoing weights, to first order.

    Cost: a gradient, and ``n_probes`` Hessian-vector products or one a weight.

    References
    ----------
    Elsayed and Mahmood (2023), arXiv:2302.03281, equations 2 and 3.

    Examples
    --------
    >>> w = torch.tensor([2.0, 1.0], requires_grad=True)
    >>> loss = lambda: (w.sum() - 3) ** 2 / 2
    >>> weight_utility(loss, [w], order=2), true_utility(loss, [w])
    ([tensor([2.0000, 0.5000])], [tensor([2.0000, 0.5000])])
    """
    checks.one_of("order", order, (1, 2))
    if n_probes is not None:
        checks.integer("n_probes", n_probes, low=1)
    weights = _trained(params)
    with torch.enable_grad():
        loss = _graph(loss_fn)
        if order == 1:
            grads = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            return [_taylor(p.detach(), g, None) for p, g in zip(weights, grads, strict=True)]
        g2, curvatures = gradient_and_diagonal(loss, weights, n_probes, as_generator(generator))
    return [_taylor(p.detach(), g, h) for p, g, h in zip(weights, g2, curvatures, strict=True)]


@torch.no_grad()
def true_utility(loss_fn: Callable[[], Any], params: Iterable[Tensor]) -> list[Tensor]:
    """Return by how much the loss rises if a weight is zero, for each weight, by setting one after another to zero.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn() -> loss``.
    params : iterable of Tensor
        Parameters, changed in the meantime and put back bit for bit.

    Returns
    -------
    list of Tensor
        One a parameter that requires a gradient, of its shape.

    Raises
    ------
    ArgumentError, ModelError
        If no parameter is trained, or the loss is not one number.

    Notes
    -----
    What :func:`weight_utility` estimates. Cost: an evaluation a weight, and one.

    References
    ----------
    Elsayed and Mahmood (2023), arXiv:2302.03281, equation 1.

    Examples
    --------
    >>> w = torch.tensor([2.0, 1.0], requires_grad=True)
    >>> true_utility(lambda: w.square().sum(), [w])
    [tensor([-4., -1.])]
    """
    weights = _trained(params)
    whole = loss_value(loss_fn())
    found = []
    for p in weights:
        rises = torch.empty_like(p).reshape(-1)
        for i in range(p.numel()):
            place = tuple(int(k) for k in torch.unravel_index(torch.tensor(i), p.shape))
            kept = p[place].clone()
            try:
                p[place] = 0
                rises[i] = loss_value(loss_fn()) - whole
            finally:
                p[place] = kept
        found.append(rises.reshape(p.shape))
    return found


def _trained(params: Iterable[Tensor]) -> list[Tensor]:
    weights = [p for p in params if p.requires_grad]
    if not weights:
        raise checks.ArgumentError(
            "params has none that require a gradient; allowed: at least one. Pass model.parameters()."
        )
    return weights


def _graph(loss_fn: Closure) -> Tensor:
    """Return the loss, which must be one number with a graph."""
    loss = loss_fn()
    loss_value(loss)
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise checks.ModelError(
            "the loss has no graph; allowed: a loss that is computed from the parameters. Do not detach it."
        )
    return loss


def _taylor(w: Tensor, g: Tensor, h: Tensor | None) -> Tensor:
    """Return ``L(w with this weight 0) - L(w)`` to first or second order."""
    return -g * w if h is None else -g * w + h * w.square() / 2


def _wide(x: Tensor) -> Tensor:
    """Return a tensor dense, in single precision at least."""
    x = x.to_dense() if x.is_sparse else x
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
