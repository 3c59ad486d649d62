"""Variance-reduced Halpern iteration: zeros of a monotone operator that is a mean of many, certified by a residual.

Use it for equilibria, saddle points and convex programs over large data where a full operator is dear and the size of the
last iterate's residual is what is asked for. Cai, Alacaoglu and Diakonikolas (2023), Variance Reduced Halpern Iteration for
Finite-Sum Monotone Inclusions, arXiv:2310.02987.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from perturbkit.core import Result, checks
from perturbkit.core.progress import ProgressLike, track
from perturbkit.core.random import Seed, as_generator, randint, uniform

__all__ = ["MonotoneSolution", "solve_monotone_finite_sum"]

Resolvent = Callable[[Tensor, float], Tensor]
_BLOCK = 1024
"""Steps whose indices are drawn at once."""


@dataclass(frozen=True, eq=False)
class MonotoneSolution(Result):
    """Where a monotone inclusion was left, with a residual that was computed from all components.

    Attributes
    ----------
    x : Tensor, shape (d,)
        The last point at which all components were evaluated.
    residual : Tensor, shape ()
        Norm of ``F(x) + g`` with an element g of the set ``G(x)``: exact, no estimate.
    converged : bool
        Whether the residual is at most ``tol``.
    message : str
        Why it stopped.
    history : Tensor, shape (evaluations,)
        The exact residuals, one each time that all components were evaluated.
    history_calls : Tensor of int64, shape (evaluations,)
        Component evaluations spent by then.
    calls : int
        Component evaluations in all.
    steps : int
        Halpern steps.
    """

    x: Tensor
    residual: Tensor
    converged: bool
    message: str
    history: Tensor
    history_calls: Tensor
    calls: int
    steps: int


def solve_monotone_finite_sum(
    operator: Callable[[Tensor, Tensor], Tensor],
    n: int,
    x0: Tensor,
    *,
    lipschitz: float,
    kind: Literal["cocoercive", "monotone"] = "cocoercive",
    resolvent: Resolvent | None = None,
    tol: float = 1e-4,
    max_calls: int = 10**6,
    step: float | None = None,
    batch: int | None = None,
    generator: Seed = None,
    progress: ProgressLike = None,
) -> MonotoneSolution:
    r"""Find a zero of the mean of n operators, plus a set-valued one with a known resolvent.

    Parameters
    ----------
    operator : callable
        ``operator(x, indices)``, shapes (d,) and (k,) to (d,): the mean of the components ``F_i(x)`` over the indices.
    n : int
        Number of components, at least 1.
    x0 : Tensor, shape (d,)
        Start, which is the anchor too.
    lipschitz : float
        The constant L of the mean, above 0: :math:`E|F_i u - F_i v|^2 \le L \langle F u - F v, u - v \rangle` for
        "cocoercive", :math:`E|F_i u - F_i v|^2 \le L^2 |u - v|^2` for "monotone".
    kind : {"cocoercive", "monotone"}
        What is known of F. Gradients of convex functions are cocoercive, operators of saddle points only monotone.
    resolvent : callable, optional
        ``resolvent(x, step)``, the point u with ``x in u + step G(u)``: the proximal map of ``step`` times a convex
        function, the projection on a convex set. Left out where G is zero.
    tol : float
        Residual at which to stop, zero or above.
    max_calls : int
        Component evaluations that may be spent, at least ``2 n``.
    step : float, optional
        Step size :math:`\eta`, above 0. ``1 / (4 L)`` for "cocoercive" and ``sqrt(n) / L`` for "monotone", unless given;
        ``1 / L`` for both where the batch has all components.
    batch : int, optional
        Components of an estimate, at least 1: ``ceil(sqrt(n))`` for "cocoercive", 1 for "monotone", unless given. With n or
        more every evaluation is of all components: the ordinary iteration, for which L need only hold for F itself.
    generator : torch.Generator, int or None
        Source of indices and of the times of full evaluations.
    progress : optional
        See :func:`~perturbkit.core.progress.track`.

    Returns
    -------
    MonotoneSolution
        Its residual is exact whatever was estimated on the way.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed, or the operator answers in another shape.

    Notes
    -----
    Cocoercive, with J the resolvent of step :math:`\eta`:

    .. math:: u_{k+1} = J(\lambda_k u_0 + (1 - \lambda_k) u_k - \eta \tilde F_k), \quad \lambda_k = 2 / (k + 4)

    where :math:`\tilde F_{k+1}` is :math:`F(u_{k+1})` with probability :math:`4/(k+5)`, and otherwise :math:`\tilde F_k` plus the mean of :math:`F_i(u_{k+1}) - F_i(u_k)` over a batch, drawn with replacement. It is
    :math:`F(u_{k+1})` too where the estimate says that the work is done.

    Monotone: :math:`u_{k+1} = \lambda_k u_0 + (1 - \lambda_k) w`, :math:`\lambda_k = 1 / (k + 2)`, where w is near the zero of
    :math:`\eta (F + G)(v) + v - u_k`, found by the loopless variance-reduced forward-reflected-backward method. Its exact
    residual bounds the distance to that zero, and is brought below :math:`|w - u_k| / (2k + 2)`, so that the errors fall as
    :math:`1 / k^2`.

    Cost: :math:`O(n \log n + \sqrt n L / \epsilon)` component evaluations for a residual of :math:`\epsilon`, up to
    logarithms; memory O(d).

    References
    ----------
    Cai, Alacaoglu and Diakonikolas (2023), arXiv:2310.02987. The inner method: Alacaoglu and Malitsky (2021),
    arXiv:2102.08352.

    Examples
    --------
    >>> rows = torch.eye(3, dtype=torch.float64)  # least squares: F_i(x) = a_i (a_i x - 1)
    >>> mean = lambda x, i: (rows[i] * (rows[i] @ x - 1)[:, None]).mean(0)
    >>> found = solve_monotone_finite_sum(mean, 3, torch.zeros(3, dtype=torch.float64), lipschitz=1.0, generator=0)
    >>> found.converged, bool(found.residual <= 1e-4)
    (True, True)
    """
    checks.integer("n", n, low=1)
    checks.tensor("x0", x0, ndim=1)
    checks.positive("lipschitz", lipschitz)
    checks.one_of("kind", kind, ("cocoercive", "monotone"))
    checks.nonnegative("tol", tol)
    checks.integer("max_calls", max_calls, low=2 * n)
    cocoercive = kind == "cocoercive"
    size = math.ceil(math.sqrt(n)) if cocoercive else 1
    size = min(checks.integer("batch", size if batch is None else batch, low=1), n)
    if step is None:
        factor = 1.0 if size >= n else 0.25 if cocoercive else math.sqrt(n)
        step = factor / lipschitz
    checks.positive("step", step)
    calls = _Calls(operator, n, size, x0, as_generator(generator), max_calls)
    solver = _cocoercive if cocoercive else _monotone
    x, seen, steps = solver(calls, x0.detach(), resolvent, lipschitz, step, tol, progress)
    residual = x0.new_tensor(seen[-1][1])
    converged = bool(seen[-1][1] <= tol)
    message = (
        f"the residual is at most {tol:g}"
        if converged
        else f"{max_calls} component evaluations do not suffice"
    )
    return MonotoneSolution(
        x, residual, converged, message, x0.new_tensor([r for _, r in seen]),
        torch.tensor([c for c, _ in seen], dtype=torch.int64), calls.spent, steps,
    )  # fmt: skip


class _Calls:
    """Counts component evaluations, and draws what is random."""

    def __init__(
        self, operator: Any, n: int, batch: int, x0: Tensor, generator: torch.Generator, limit: int
    ) -> None:
        self.operator, self.n, self.batch, self.limit = operator, n, batch, limit
        self.every = torch.arange(n, device=x0.device)
        self.generator, self.device = generator, x0.device
        self.spent, self._next = 0, _BLOCK

    def draw(self) -> tuple[Tensor | None, float]:
        """Return the indices of a batch and a uniform number, or None and 0 where the batch has all components."""
        if self.batch == self.n:
            return None, 0.0
        if self._next == _BLOCK:
            shape = (_BLOCK, self.batch)
            self._indices = randint(0, self.n, shape, generator=self.generator, device=self.device)
            self._coins = uniform((_BLOCK,), generator=self.generator, dtype=torch.float64).tolist()
            self._next = 0
        self._next += 1
        return self._indices[self._next - 1], self._coins[self._next - 1]

    def full(self, x: Tensor) -> Tensor:
        """Return F(x)."""
        value = self.operator(x, self.every)
        if not isinstance(value, Tensor) or value.shape != x.shape:
            given = (
                f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            )
            raise checks.ArgumentError(
                f"operator answered {given}; allowed: the shape of x, {tuple(x.shape)}. Return the mean over the indices."
            )
        self.spent += self.n
        return value.detach()

    def difference(self, x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        """Return the mean of F_i(x) - F_i(y): both at the same components, or it would not vanish with x - y."""
        self.spent += 2 * self.batch
        return (self.operator(x, indices) - self.operator(y, indices)).detach()

    def last(self) -> bool:
        """Return whether an estimate and a full evaluation afterwards would be too much."""
        return self.spent + (2 * self.batch if self.batch < self.n else 0) + self.n > self.limit


Found = tuple[Tensor, list[tuple[int, float]], int]


def _cocoercive(
    calls: _Calls,
    anchor: Tensor,
    resolvent: Resolvent | None,
    lipschitz: float,
    eta: float,
    tol: float,
    progress: ProgressLike,
) -> Found:
    u, value, seen, k = anchor, calls.full(anchor), [], 0
    for k in track(range(calls.limit), "variance-reduced Halpern", progress=progress):
        lam = 2 / (k + 4)
        target = lam * anchor + (1 - lam) * u - eta * value
        new = target if resolvent is None else resolvent(target, eta)
        element = (target - new) / eta
        indices, coin = calls.draw()
        exact = indices is None or coin < 4 / (k + 5) or calls.last()
        if indices is not None and not exact:
            value = value + calls.difference(new, u, indices)
            exact = float((value + element).norm()) <= tol
        if exact:
            value = calls.full(new)
        u = new
        if exact:
            seen.append((calls.spent, float((value + element).norm())))
            if seen[-1][1] <= tol or calls.last():
                break
    return u, seen, k + 1


def _monotone(
    calls: _Calls,
    anchor: Tensor,
    resolvent: Resolvent | None,
    lipschitz: float,
    eta: float,
    tol: float,
    progress: ProgressLike,
) -> Found:
    """Halpern on the resolvent of eta (F + G); snapshots of the inner method are kept from one step to the next."""
    p = calls.batch / calls.n
    # The largest step for which the snapshot's distance is paid for by its own weight p in the average.
    tau = 0.5 * math.sqrt(p) / (eta * lipschitz)
    u, seen, k = anchor, [], 0
    w, value = anchor, calls.full(anchor)
    for k in track(range(calls.limit), "variance-reduced Halpern", progress=progress):
        z = before = w
        earlier, done = value, False
        while not done:
            indices, coin = calls.draw()
            if indices is None or z is before:
                change = value - earlier
            else:
                change = calls.difference(z, before, indices)
            # v - u_k belongs to the resolvent, where the strong monotonicity then is.
            target = ((1 - p) * z + p * w - tau * eta * (value + change) + tau * u) / (1 + tau)
            z = target if resolvent is None else resolvent(target, tau * eta / (1 + tau))
            before, earlier = w, value
            if coin < p or calls.last():
                w, value = z, calls.full(z)
                element = (target - z) * ((1 + tau) / (tau * eta))
                seen.append((calls.spent, float((value + element).norm())))
                inner = float((eta * (value + element) + w - u).norm())
                over = seen[-1][1] <= tol or calls.last()
                done = over or inner <= float((w - u).norm()) / (2 * k + 2)
        if over:
            break
        lam = 1 / (k + 2)
        u = lam * anchor + (1 - lam) * w
    return w, seen, k + 1
