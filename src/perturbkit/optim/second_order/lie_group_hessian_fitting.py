"""Fit a preconditioner to pairs of vectors and Hessian products, by relative gradients on a group of matrices.

Use it where curvature is seen through noisy products only: the fit is linear in rate, follows a Hessian that changes, and keeps
positive definite for one that is not. Li (2024), Stochastic Hessian Fitting on Lie Group, arXiv:2402.11858.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from perturbkit.core import checks
from perturbkit.core.optimizers import BaseOptimizer, loss_value
from perturbkit.core.random import Seed, as_generator, mixed_seed, randn
from perturbkit.optim.second_order._fits import (
    fit_bfgs,
    fit_closed_form,
    fit_euclidean_gd,
    fit_spd_gd,
    fitting_criterion,
)
from perturbkit.optim.second_order._low_rank import (
    apply_low_rank,
    dense_low_rank,
    start_low_rank,
    update_low_rank,
)

__all__ = [
    "PSGD",
    "HessianFitter",
    "fit_bfgs",
    "fit_closed_form",
    "fit_euclidean_gd",
    "fit_spd_gd",
    "fitting_criterion",
]

Group = Literal["dense", "triangular", "diagonal", "kronecker", "low_rank"]
_GROUPS = ("dense", "triangular", "diagonal", "kronecker", "low_rank")


class HessianFitter:
    r"""A preconditioner :math:`P = Q^\top Q` that is fitted pair by pair.

    Parameters
    ----------
    shape : int or sequence of int
        Numbers d; for "kronecker" the two sides of a matrix.
    group : {"dense", "triangular", "diagonal", "kronecker", "low_rank"}
        What Q is: any matrix, upper triangular, diagonal, a Kronecker product of two triangular ones, or
        :math:`(I + U V^\top) \operatorname{diag}(d)`.
    rate : float
        Step :math:`\mu`, in (0, 1]. Noisy pairs leave a floor in proportion to it.
    init_scale : float
        Multiple of the identity that Q starts from, above 0.
    rank : int
        Columns of U and V for "low_rank", at least 1; no more than d are used.
    generator : torch.Generator, int or None
        Source of the first U and V, which are small.
    dtype : torch.dtype, optional
        PyTorch's default unless given.
    device : torch.device or str, optional
        The CPU unless given.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    For pairs :math:`(v, h)`, v standard normal and :math:`h = H v`, the fit descends
    :math:`E[h^\top P h + v^\top P^{-1} v]`, whose minimum is :math:`(E h h^\top)^{-1/2}`, without noise :math:`|H|^{-1}`. With
    :math:`a = Q h` and :math:`b = Q^{-\top} v`,

    .. math:: Q \leftarrow Q - \mu \frac{a a^\top - b b^\top}{|a|^2 + |b|^2} Q,

    of which the triangular group keeps the upper triangle of the bracket and the diagonal one its diagonal over its largest
    entry. For matrices :math:`A = Q_1 H Q_2^\top` and :math:`B = Q_1^{-\top} V Q_2^{-1}`, and :math:`Q_1` moves by the triangle of
    :math:`A A^\top - B B^\top` over a bound of the norm of their sum, :math:`Q_2` alike. Of a low rank,
    :math:`U \leftarrow U - \mu (a a^\top - b b^\top) V (I + V^\top U)` over a bound and V alike, in turn; the diagonal moves by
    :math:`(P h) h - (P^{-1} v) v`. Its two factors
    move at once and only one of them along a group, so that rates near one need not settle: take 0.5 or less, and a rank above
    the one sought.

    Cost: O(d^2) and a triangular solve a pair (a general solve for "dense"); O(m^3) for an m by m matrix; O(d r) for rank r.

    References
    ----------
    Li (2024), arXiv:2402.11858, sections 3 and 4.

    Examples
    --------
    >>> fitter = HessianFitter(2, dtype=torch.float64)
    >>> hessian = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
    >>> g = torch.Generator().manual_seed(0)
    >>> for _ in range(400):
    ...     v = torch.randn(2, generator=g, dtype=torch.float64)
    ...     fitter.update(v, hessian @ v)
    >>> bool(torch.allclose(fitter.preconditioner() @ hessian, torch.eye(2, dtype=torch.float64), atol=1e-3))
    True
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        group: Group = "dense",
        *,
        rate: float = 0.1,
        init_scale: float = 1.0,
        rank: int = 10,
        generator: Seed = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.group = checks.one_of("group", group, _GROUPS)
        checks.between("rate", rate, 0, 1, inclusive="high")
        checks.positive("init_scale", init_scale)
        sides = [shape] if isinstance(shape, int) else list(shape)
        if len(sides) != (2 if group == "kronecker" else 1):
            raise checks.ArgumentError(
                f"shape has {len(sides)} sides; allowed: 2 for 'kronecker' and 1 for the others. Flatten the weight, or choose 'kronecker'."
            )
        self.rate = rate
        sides = [checks.integer("shape", n, low=1) for n in sides]
        self.shape = tuple(sides)
        self._n_updates = 0
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        if group == "low_rank":
            columns = min(checks.integer("rank", rank, low=1), sides[0])
            self.factors = start_low_rank(sides[0], columns, init_scale, generator, torch.ones((), **options))
        elif group == "diagonal":
            self.factors = [init_scale * torch.ones(sides[0], **options)]
        else:
            root = math.sqrt(init_scale) if group == "kronecker" else init_scale
            self.factors = [root * torch.eye(n, **options) for n in sides]

    @torch.no_grad()
    def update(self, v: Tensor, h: Tensor) -> None:
        """Move the fit by a pair.

        Parameters
        ----------
        v, h : Tensor, shape (d,) or (m, n)
            A standard normal vector, and its product with the Hessian.
        """
        for name, value in (("v", v), ("h", h)):
            checks.tensor(name, value, shape=self.shape)
        v, h = (x.to(self.factors[0]) for x in (v, h))
        if self.group == "low_rank":
            update_low_rank(self.factors, v, h, self.rate, first=self._n_updates % 2 == 0)
            self._n_updates += 1
            return
        if self.group == "kronecker":
            self._kronecker(v, h)
            return
        (q,) = self.factors
        if self.group == "diagonal":
            a, b = (q * h).square(), (v / q).square()
            q.mul_(1 - self.rate * (a - b) / (a + b).max().clamp(min=torch.finfo(q.dtype).tiny))
            return
        a = q @ h
        if self.group == "triangular":
            b = torch.linalg.solve_triangular(q.T, v[:, None], upper=False)[:, 0]
        else:
            b = torch.linalg.solve(q.T, v)
        size = (a.square().sum() + b.square().sum()).clamp(min=torch.finfo(q.dtype).tiny)
        if self.group == "triangular":
            bracket = torch.triu(torch.outer(a, a) - torch.outer(b, b))
            q.sub_(bracket @ q, alpha=float(self.rate / size))
        else:
            q.sub_(torch.outer(a, a @ q) - torch.outer(b, b @ q), alpha=float(self.rate / size))

    def apply(self, g: Tensor) -> Tensor:
        """Return the preconditioner's product with a gradient of the same shape."""
        g = checks.tensor("g", g, shape=self.shape).to(self.factors[0])
        if self.group == "low_rank":
            return apply_low_rank(self.factors, g)
        if self.group == "diagonal":
            return self.factors[0].square() * g
        if self.group == "kronecker":
            left, right = self.factors
            return left.T @ (left @ g @ right.T) @ right
        return self.factors[0].T @ (self.factors[0] @ g)

    def preconditioner(self) -> Tensor:
        """Return P, shape (d, d); of flattened matrices, row by row, for "kronecker"."""
        if self.group == "diagonal":
            return torch.diag(self.factors[0].square())
        if self.group == "low_rank":
            return dense_low_rank(self.factors)
        grams = [q.T @ q for q in self.factors]
        return grams[0] if len(grams) == 1 else torch.kron(grams[0], grams[1])

    def _kronecker(self, v: Tensor, h: Tensor) -> None:
        left, right = self.factors
        a = left @ h @ right.T
        half = torch.linalg.solve_triangular(left.T, v, upper=False)
        b = torch.linalg.solve_triangular(right, half, upper=True, left=False)
        for q, one, two in ((left, a @ a.T, b @ b.T), (right, a.T @ a, b.T @ b)):
            # The largest row sum bounds the spectral norm of a symmetric matrix.
            size = (one + two).abs().sum(1).max().clamp(min=torch.finfo(q.dtype).tiny)
            q.sub_(torch.triu(one - two) @ q, alpha=float(self.rate / size))
        # The product is what counts: the factors share its size evenly, so that neither over- nor underflows.
        balance = (left.abs().max() / right.abs().max()).sqrt()
        left.div_(balance)
        right.mul_(balance)


class PSGD(BaseOptimizer):
    r"""Gradient descent whose preconditioner, one for each tensor, is fitted to Hessian products or to gradients.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        Parameters or groups.
    lr : float
        Learning rate, zero or above.
    rate : float
        Step of the fits, in (0, 1].
    group : {"kronecker", "diagonal"}
        Of matrices; vectors and scalars have diagonal ones, and tensors of more dimensions are flattened to matrices.
    mode : {"newton", "whitening"}
        Fit to products of the Hessian with random vectors, or to the gradients themselves.
    update_every : int
        Steps between fits, at least 1.
    max_norm : float
        Largest root mean square of a tensor's step over ``lr``, above 0.
    seed : int
        Seed of the vectors, zero or above.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    :math:`w \leftarrow w - \eta P g`. In "newton" mode the closure returns the loss with its graph, without ``backward``, and must
    be twice differentiable. Of an indefinite Hessian P is the absolute value's inverse: saddles repel.

    Cost: a gradient, and every ``update_every`` steps a Hessian product; O(m^3) for an m by m weight.

    References
    ----------
    Li (2018), Preconditioned Stochastic Gradient Descent, arXiv:1512.04202; Li (2024), arXiv:2402.11858.

    Examples
    --------
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = PSGD([w], lr=0.5, rate=0.5, group="diagonal")
    >>> scale = torch.tensor([1.0, 100.0])
    >>> for _ in range(100):
    ...     loss = optimizer.step(lambda: (scale * w * w).sum() / 2)
    >>> bool(w.abs().max() < 1e-3)
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        rate: float = 0.1,
        group: Literal["kronecker", "diagonal"] = "kronecker",
        mode: Literal["newton", "whitening"] = "newton",
        update_every: int = 1,
        max_norm: float = 1.0,
        seed: int = 0,
    ) -> None:
        checks.between("rate", rate, 0, 1, inclusive="high")
        self._rate, self._group = rate, checks.one_of("group", group, ("kronecker", "diagonal"))
        self._mode = checks.one_of("mode", mode, ("newton", "whitening"))
        self._every = checks.integer("update_every", update_every, low=1)
        self._max_norm = checks.positive("max_norm", max_norm)
        self._seed = checks.integer("seed", seed, low=0)
        super().__init__(params, {"lr": lr})

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Check a group's own options."""
        checks.nonnegative("lr", group["lr"])

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        """Take one step and return the loss before it.

        Parameters
        ----------
        closure : callable
            ``closure() -> loss`` with its graph; no ``backward``.
        """
        members = [
            (group, p)
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad and p.numel()
        ]
        weights = [p for _, p in members]
        with torch.enable_grad():
            loss = closure()
            loss_value(loss)
            t = int(self.state.get("step", 0))  # type: ignore[call-overload]
            fits = t % self._every == 0
            twice = fits and self._mode == "newton"
            grads = torch.autograd.grad(
                loss, weights, create_graph=twice, allow_unused=True, materialize_grads=True
            )
        self.state["step"] = t + 1  # type: ignore[index]
        if fits:
            g = as_generator(mixed_seed(self._seed, t))
            vectors = [randn(p.shape, generator=g, like=p) for p in weights]
            pairs = grads
            if twice:
                # Where the loss is linear in a tensor the product is zero, and says nothing.
                curved = [(x, v) for x, v in zip(grads, vectors, strict=True) if x.requires_grad]
                pairs = tuple(torch.zeros_like(p) for p in weights)
                if curved:
                    outs, cotangents = zip(*curved, strict=True)
                    pairs = torch.autograd.grad(
                        outs, weights, cotangents, allow_unused=True, materialize_grads=True
                    )
            for p, v, h in zip(weights, vectors, pairs, strict=True):
                fitter = self._fitter(p)
                if bool(h.any()):
                    fitter.update(v.reshape(fitter.shape), h.detach().reshape(fitter.shape))
                self.state[p].update({f"factor{i}": q for i, q in enumerate(fitter.factors)})
        with torch.no_grad():
            for (group, p), grad in zip(members, grads, strict=True):
                fitter = self._fitter(p)
                move = fitter.apply(grad.detach().reshape(fitter.shape)).reshape(p.shape)
                size = move.norm() / math.sqrt(max(p.numel(), 1))
                p.sub_((move / (size / self._max_norm).clamp(min=1.0)).to(p), alpha=group["lr"])
        return loss.detach()

    def _fitter(self, p: Tensor) -> HessianFitter:
        """Return a tensor's fit, on the factors that the state holds."""
        matrix = self._group == "kronecker" and p.ndim >= 2
        shape: Any = (len(p), p[0].numel()) if matrix else p.numel()
        fitter = HessianFitter(
            shape, "kronecker" if matrix else "diagonal", rate=self._rate, init_scale=0.1 if self._mode == "newton" else 1.0,
            dtype=torch.promote_types(p.dtype, torch.float32), device=p.device,
        )  # fmt: skip
        if "factor0" in self.state[p]:
            fitter.factors = [self.state[p][f"factor{i}"] for i in range(len(fitter.factors))]
        return fitter
