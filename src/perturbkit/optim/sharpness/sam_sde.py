"""Sharpness-aware minimisation, and the stochastic differential equations that its variants follow.

Use the optimizer to find flat minima, and the equations to see why: they name the loss that is implicitly descended and
where saddles attract. Monzio Compagnoni, Biggio, Orvieto, Proske, Kersting and Lucchi (2023), An SDE for Modeling SAM:
Theory and Insights, arXiv:2301.08203.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perturbkit.core import Result, checks
from perturbkit.core.optimizers import Closure, WrappingOptimizer, dense_gradients, displaced, global_norm
from perturbkit.core.random import Seed, as_generator, randn

__all__ = [
    "SAM",
    "WeakError",
    "implicit_loss",
    "saddle_attraction_radius",
    "sam_sde",
    "simulate_sde",
    "weak_error",
]

Variant = Literal["sam", "usam", "dnsam"]
_VARIANTS = ("sam", "usam", "dnsam")
Field = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class WeakError(Result):
    """How far the means of a test function over two sets of paths are apart.

    Attributes
    ----------
    value : float
        Absolute difference of the means.
    standard_error : float
        Of the difference.
    """

    value: float
    standard_error: float


class SAM(WrappingOptimizer):
    r"""Sharpness-aware minimisation around any PyTorch optimizer.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups; a group may have its own ``radius``.
    base_optimizer : callable
        Class of the optimizer that steps.
    radius : float
        Length :math:`\rho` of the ascent, in units of the weights, zero or above; its factor of the gradient for ``"usam"``.
    variant : {"sam", "usam", "dnsam"}
        Ascent along the batch's gradient over its norm; along the gradient itself; over the norm of the full gradient.
    model : nn.Module, optional
        Where given, the running statistics of its batch normalisations are moved by the first pass only (and by that of
        ``full_batch``).
    **base_options
        Of the optimizer inside, such as ``lr``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    The optimizer inside is given :math:`\nabla L(w + \rho g / n)` with :math:`g = \nabla L(w)` and n the norm over all
    parameters of all groups, 1 for ``"usam"``. Where the norm is zero there is no ascent.

    Cost: two gradients a step, and a copy of the weights; ``"dnsam"`` also one of the full loss.

    References
    ----------
    Foret et al. (2021), arXiv:2010.01412; Monzio Compagnoni et al. (2023), arXiv:2301.08203, equations 2 to 4.

    Examples
    --------
    >>> w = nn.Parameter(torch.tensor([2.0]))
    >>> optimizer = SAM([w], lr=0.1, radius=0.5)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = w.square().sum() / 2
    ...     loss.backward()
    ...     return loss
    >>> _ = optimizer.step(closure)
    >>> w.item()  # the gradient at 2.5
    1.75
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        radius: float = 0.05,
        variant: Variant = "sam",
        model: nn.Module | None = None,
        **base_options: Any,
    ) -> None:
        self._variant = checks.one_of("variant", variant, _VARIANTS)
        super().__init__(params, base_optimizer, {"radius": radius}, base_options, model)

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check a group's radius."""
        checks.nonnegative("radius", group["radius"])

    def step(self, closure: Closure, full_batch: Closure | None = None) -> Any:  # type: ignore[override]
        """Take one step and return the loss before it.

        Parameters
        ----------
        closure : callable
            ``closure() -> loss``; clears the gradients, evaluates the batch and calls ``backward``.
        full_batch : callable, optional
            The same for all data; for ``"dnsam"`` only, where it is needed.
        """
        if (full_batch is not None) != (self._variant == "dnsam"):
            raise checks.ArgumentError(
                f"full_batch is {'given' if full_batch is not None else 'not given'} and variant is {self._variant!r}; allowed: "
                "given for 'dnsam' and for no other. Pass the closure of the whole loss, or leave it out."
            )
        norm = None
        if full_batch is not None:
            self.replay(full_batch)()
            norm = self._norm()
        again = self.replay(closure)
        loss = again()
        members = self.trained()
        weights = [p for _, p in members]
        if weights:
            norm = self._norm() if norm is None else norm
            scale = torch.ones_like(norm) if self._variant == "usam" else 1 / norm
            scale = torch.where(norm > 0, scale, torch.zeros_like(scale))
            # Multiplied in the scale's precision: the scale of a small gradient can be beyond half precision.
            shifts = [
                (g.to(scale.dtype) * (group["radius"] * scale.to(g.device))).to(g.dtype)
                for (group, _), g in zip(members, dense_gradients(weights), strict=True)
            ]
            with displaced(weights, shifts):
                again()
        self.base_optimizer.step()
        return loss

    def _norm(self) -> Tensor:
        grads = dense_gradients([p for _, p in self.trained()])
        return global_norm(grads) if grads else torch.zeros(())


def sam_sde(
    loss: Callable[..., Tensor],
    batches: Tensor | Sequence[Tensor],
    *,
    variant: Variant | Literal["sgd"] = "sam",
    lr: float,
    radius: float,
) -> tuple[Field, Field]:
    r"""Return the drift and the diffusion of the equation that a variant follows.

    Parameters
    ----------
    loss : callable
        ``loss(x, *batch) -> value``, shapes (d,) and those of one batch to (); twice differentiable by ``torch.func``.
    batches : Tensor or sequence of Tensor
        All batches, stacked in front, each as likely as the others. One batch gives the equation without noise.
    variant : {"sam", "usam", "dnsam", "sgd"}
        The optimizer, see :class:`SAM`; or plain descent.
    lr : float
        Learning rate, above 0: time is ``lr`` times the steps.
    radius : float
        Of the variant, zero or above; of the order of the root of ``lr``.

    Returns
    -------
    drift : callable
        (paths, d) to (paths, d).
    diffusion : callable
        (paths, d) to (paths, d, d): what multiplies the Brownian motion.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    With :math:`g_b` and :math:`H_b` the gradient and Hessian of a batch's loss, f the mean loss and :math:`\Sigma` the
    covariance of :math:`g_b`,

    .. math:: dX = -\nabla F(X)\, dt + \sqrt{\eta}\, (\Sigma + \rho (S + S^\top))^{1/2} dW, \quad
        S = E[(\nabla f - g_b)(E H_b u_b - H_b u_b)^\top],

    where :math:`u_b = g_b / |g_b|` and :math:`F = f + \rho E |g_b|` for SAM, and :math:`u_b = g_b` and
    :math:`F = f + \rho E |g_b|^2 / 2` without normalisation. For ``"dnsam"`` :math:`F = f + \rho |\nabla f|`, and the covariance
    is :math:`(I + \rho H / |\nabla f|) \Sigma (I + \rho H / |\nabla f|)`. The match is of weak order 1 in :math:`\eta` for
    :math:`\rho = O(\sqrt\eta)`. Where a gradient is zero its direction is taken as zero; the drift of SAM jumps there.

    Cost: a gradient and a Hessian product for each batch and path, and a decomposition of a d by d matrix for each path.

    References
    ----------
    Monzio Compagnoni et al. (2023), arXiv:2301.08203, theorems 3.2, 3.4 and 3.5.

    Examples
    --------
    >>> drift, diffusion = sam_sde(lambda x, a: (x - a).square().sum() / 2, torch.tensor([[1.0], [-1.0]]),
    ...                            variant="usam", lr=0.01, radius=0.5)
    >>> drift(torch.tensor([[2.0]])), diffusion(torch.tensor([[2.0]])).shape
    (tensor([[-3.]]), torch.Size([1, 1, 1]))
    """
    checks.one_of("variant", variant, (*_VARIANTS, "sgd"))
    root = math.sqrt(checks.positive("lr", lr))
    rho = 0.0 if variant == "sgd" else checks.nonnegative("radius", radius)
    parts = _derivatives(loss, batches, variant)

    def drift(x: Tensor) -> Tensor:
        g, product, _ = parts(x)
        return -(g + rho * product).mean(1)

    def diffusion(x: Tensor) -> Tensor:
        g, product, hessian = parts(x)
        centred = g - g.mean(1, keepdim=True)
        covariance = centred.mT @ centred / g.shape[1]
        if variant == "dnsam":
            turn = torch.eye(x.shape[1], dtype=x.dtype, device=x.device) + rho * hessian(x)
            return root * turn @ _root(covariance)
        cross = centred.mT @ (product - product.mean(1, keepdim=True)) / g.shape[1]
        return root * _root(covariance + rho * (cross + cross.mT))

    return drift, diffusion


def implicit_loss(
    loss: Callable[..., Tensor], batches: Tensor | Sequence[Tensor], *, variant: Variant, radius: float
) -> Field:
    r"""Return the loss whose gradient is minus the drift of :func:`sam_sde`.

    Parameters
    ----------
    loss, batches, variant, radius
        As for :func:`sam_sde`.

    Returns
    -------
    callable
        (paths, d) to (paths,); can be differentiated.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    :math:`f + \rho E|g_b|`, :math:`f + \rho E|g_b|^2 / 2` or :math:`f + \rho |\nabla f|`.

    References
    ----------
    Monzio Compagnoni et al. (2023), arXiv:2301.08203, section 4.

    Examples
    --------
    >>> whole = implicit_loss(lambda x, a: (x - a).square().sum() / 2, torch.zeros(1, 1), variant="sam", radius=0.5)
    >>> whole(torch.tensor([[2.0]]))  # 2 + 0.5 * 2
    tensor([3.])
    """
    checks.one_of("variant", variant, _VARIANTS)
    rho = checks.nonnegative("radius", radius)
    rows = _rows(batches)
    inner = (None, *[0] * len(rows))
    both = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=inner)
    over_paths = torch.func.vmap(both, in_dims=(0, *[None] * len(rows)))

    def whole(x: Tensor) -> Tensor:
        g, values = over_paths(x, *rows)
        if variant == "usam":
            extra = g.square().sum(2).mean(1) / 2
        elif variant == "sam":
            extra = g.norm(dim=2).mean(1)
        else:
            extra = g.mean(1).norm(dim=1)
        return values.mean(1) + rho * extra

    return whole


def simulate_sde(
    drift: Field, diffusion: Field, x0: Tensor, dt: float, steps: int, *, generator: Seed = None
) -> Tensor:
    """Return the ends of Euler-Maruyama paths.

    Parameters
    ----------
    drift, diffusion : callable
        As :func:`sam_sde` returns them.
    x0 : Tensor, shape (paths, d)
        Starts.
    dt : float
        Time step, above 0; no more than the learning rate that the equation was made for.
    steps : int
        Steps, zero or above.
    generator : torch.Generator, int or None
        Source of the Brownian motion.

    Returns
    -------
    Tensor, shape (paths, d)

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``X <- X + drift(X) dt + diffusion(X) sqrt(dt) N(0, I)``.

    References
    ----------
    Kloeden and Platen (1992), Numerical Solution of Stochastic Differential Equations, chapter 10.

    Examples
    --------
    >>> still = lambda x: torch.zeros(len(x), 1, 1)
    >>> simulate_sde(lambda x: -x, still, torch.ones(1, 1), 0.5, 2, generator=0)
    tensor([[0.2500]])
    """
    x = checks.tensor("x0", x0, ndim=2)
    checks.positive("dt", dt)
    g = as_generator(generator)
    for _ in range(checks.integer("steps", steps, low=0)):
        factor = diffusion(x)
        if factor.ndim != 3 or factor.shape[:2] != x.shape:
            raise checks.ArgumentError(
                f"diffusion answered shape {tuple(factor.shape)}; allowed: {(*x.shape, 'any')}. Return one matrix a path."
            )
        noise = randn((len(x), factor.shape[2]), generator=g, like=x)
        x = x + drift(x) * dt + math.sqrt(dt) * (factor @ noise[:, :, None])[:, :, 0]
    return x


def saddle_attraction_radius(hessian: Tensor, radius: float) -> float:
    r"""Return the size of the gradient below which SAM and DNSAM are drawn into a saddle of a quadratic.

    Parameters
    ----------
    hessian : Tensor, shape (d, d)
        Symmetric, with a negative eigenvalue.
    radius : float
        Of the optimizer, zero or above.

    Returns
    -------
    float

    Raises
    ------
    ArgumentError
        If it has no negative eigenvalue.

    Notes
    -----
    :math:`dX = -H (I + \rho H / |H X|) X\, dt` contracts along a negative eigenvalue while :math:`|H X| < \rho |\lambda|`: the
    saddle attracts where :math:`|H X| < \rho \min_{\lambda_i < 0} |\lambda_i|`.

    References
    ----------
    Monzio Compagnoni et al. (2023), arXiv:2301.08203, lemma 4.2.

    Examples
    --------
    >>> saddle_attraction_radius(torch.diag(torch.tensor([1.0, -2.0])), 0.1)
    0.2
    """
    checks.tensor("hessian", hessian, ndim=2)
    checks.nonnegative("radius", radius)
    if hessian.shape[0] != hessian.shape[1] or not torch.allclose(hessian, hessian.mT, rtol=1e-3, atol=1e-6):
        raise checks.ArgumentError(
            f"hessian has shape {tuple(hessian.shape)} and is not symmetric; allowed: a symmetric matrix. Take (H + H.T) / 2."
        )
    values = torch.linalg.eigvalsh(hessian.double())
    # What rounding makes of a zero is not negative.
    noise = len(values) * torch.finfo(hessian.dtype).eps * values.abs().max()
    if not bool((values < -noise).any()):
        raise checks.ArgumentError(
            f"hessian has the least eigenvalue {float(values[0]):g}; allowed: one below 0. This point is no saddle."
        )
    return radius * float(-values[values < -noise].max())


def weak_error(discrete: Tensor, sde: Tensor, test_function: Field) -> WeakError:
    """Return how far the means of a test function over two sets of ends are apart.

    Parameters
    ----------
    discrete, sde : Tensor, shape (paths, d)
        Ends of the optimizer's and of the equation's paths, at least two each.
    test_function : callable
        (paths, d) to (paths,).

    Returns
    -------
    WeakError

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    ``|E test(discrete) - E test(sde)|``, with the standard error of the difference of the two means.

    References
    ----------
    Monzio Compagnoni et al. (2023), arXiv:2301.08203, definition 3.1.

    Examples
    --------
    >>> weak_error(torch.ones(3, 1), torch.zeros(3, 1), lambda x: x[:, 0]).value
    1.0
    """
    means, variance = [], 0.0
    for name, paths in (("discrete", discrete), ("sde", sde)):
        checks.tensor(name, paths, ndim=2)
        if len(paths) < 2:
            raise checks.ArgumentError(f"{name} has {len(paths)} paths; allowed: at least 2. Simulate more.")
        values = test_function(paths).double()
        means.append(float(values.mean()))
        variance += float(values.var()) / len(values)
    return WeakError(abs(means[0] - means[1]), math.sqrt(variance))


def _derivatives(
    loss: Callable[..., Tensor], batches: Tensor | Sequence[Tensor], variant: str
) -> Callable[[Tensor], tuple[Tensor, Tensor, Field]]:
    """Return the function that gives, for each path and batch, the gradient and Hessian times direction, (paths, B, d).

    Its third answer makes the mean Hessian over the norm of the mean gradient, (paths, d, d).
    """
    rows = _rows(batches)
    shared = [0] * len(rows)
    gradient = torch.func.grad(loss)
    gradients = torch.func.vmap(
        torch.func.vmap(gradient, in_dims=(None, *shared)), in_dims=(0, *[None] * len(rows))
    )

    def product(x: Tensor, u: Tensor, *batch: Tensor) -> Tensor:
        return torch.func.jvp(lambda p: gradient(p, *batch), (x,), (u,))[1]

    products = torch.func.vmap(
        torch.func.vmap(product, in_dims=(None, 0, *shared)), in_dims=(0, 0, *[None] * len(rows))
    )

    def mean_loss(x: Tensor) -> Tensor:
        return torch.func.vmap(loss, in_dims=(None, *shared))(x, *rows).mean()

    def parts(x: Tensor) -> tuple[Tensor, Tensor, Field]:
        g = gradients(x, *rows)
        full = g.mean(1, keepdim=True)
        if variant == "sgd":
            return g, torch.zeros_like(g), torch.zeros_like
        u = {"usam": g, "sam": _unit(g), "dnsam": _unit(full).expand_as(g)}[variant]

        def hessian(x: Tensor) -> Tensor:
            size = full.norm(dim=2, keepdim=True)
            inverse = torch.where(size > 0, 1 / size, torch.zeros_like(size))
            return torch.func.vmap(torch.func.hessian(mean_loss))(x) * inverse

        return g, products(x, u, *rows), hessian

    return parts


def _rows(batches: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    rows = (batches,) if isinstance(batches, Tensor) else tuple(batches)
    if not rows or any(not isinstance(r, Tensor) or r.ndim == 0 or len(r) == 0 for r in rows):
        raise checks.ArgumentTypeError(
            "batches has a part that is not a tensor of batches; allowed: tensors of one length, batches in front. "
            "Stack the batches."
        )
    if len({len(r) for r in rows}) > 1:
        raise checks.ArgumentError(
            f"batches have the lengths {[len(r) for r in rows]}; allowed: one length. Give each batch a row of each tensor."
        )
    return rows


def _unit(v: Tensor) -> Tensor:
    size = v.norm(dim=-1, keepdim=True)
    return torch.where(size > 0, v / size, torch.zeros_like(v))


def _root(covariance: Tensor) -> Tensor:
    """Return the symmetric root of the positive part of symmetric matrices."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    return (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
