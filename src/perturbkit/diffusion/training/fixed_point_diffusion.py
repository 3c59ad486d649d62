"""Fixed point diffusion: a denoiser with one implicit layer, solved with as many iterations as there is time for.

Use it where parameters or memory are scarce, or where the work of sampling must be chosen afterwards: consecutive steps of a
sampler are nearly the same problem, and each starts at the solution of the one before. Bai and Melas-Kyriazi (2024), Fixed
Point Diffusion Models, arXiv:2401.08741.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perturbkit.core import (
    Cost,
    Denoiser,
    SampleResult,
    Schedule,
    TimeFeatures,
    checks,
    edm_scalings,
    keeping_modes,
)
from perturbkit.core.random import Seed, as_generator, randint, randn
from perturbkit.core.sampling import Path, check_start, weighted

__all__ = ["FixedPointDenoiser", "sample_fixed_point", "stochastic_jfb_loss"]

Allocation = Literal["constant", "increasing", "decreasing"] | Callable[[int, int], Sequence[int]]
_TIME_FEATURES = 16


class FixedPointDenoiser(nn.Module):
    """Blocks before, one implicit layer, blocks after, between the scalings of Karras et al. (2022).

    Parameters
    ----------
    dim : int
        Numbers an input, at least 1.
    schedule : Schedule
        Of the states that come in.
    data_std : float
        Standard deviation of the data, positive.
    hidden : int
        Width of the blocks.
    pre_blocks, post_blocks : int
        Explicit blocks before and after the implicit layer, at least 0.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an option is not allowed.

    Notes
    -----
    The implicit layer is the solution of

        u = B(W2 gelu(W1 [u, v]), t),    v a linear map of what the first blocks answer,

    with ``B`` one block that knows the time, by plain iteration from what the first blocks answer.

    References
    ----------
    Bai and Melas-Kyriazi (2024), arXiv:2401.08741, section 3.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> model = FixedPointDenoiser(2, EDMSchedule(), 0.5, hidden=8)
    >>> x0, solution = model(torch.zeros(3, 2), 1.0, n_iterations=4)
    >>> x0.shape, solution.shape
    (torch.Size([3, 2]), torch.Size([3, 8]))
    """

    def __init__(
        self,
        dim: int,
        schedule: Schedule,
        data_std: float,
        *,
        hidden: int = 128,
        pre_blocks: int = 1,
        post_blocks: int = 1,
    ) -> None:
        super().__init__()
        checks.integer("dim", dim, low=1)
        checks.integer("hidden", hidden, low=1)
        if not isinstance(schedule, Schedule):
            raise checks.ArgumentTypeError(
                f"schedule is a {type(schedule).__name__}; allowed: a Schedule. Pass for instance EDMSchedule()."
            )
        self.schedule = schedule
        self.data_std = checks.positive("data_std", data_std)
        self.first = nn.Linear(dim, hidden)
        self.pre = nn.ModuleList(
            _Block(hidden) for _ in range(checks.integer("pre_blocks", pre_blocks, low=0))
        )
        self.injection = nn.Linear(hidden, hidden)
        self.mix = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.block = _Block(hidden)
        self.post = nn.ModuleList(
            _Block(hidden) for _ in range(checks.integer("post_blocks", post_blocks, low=0))
        )
        self.last = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, dim))

    def forward(
        self,
        x: Tensor,
        t: Tensor | float,
        n_iterations: int = 12,
        initial: Tensor | None = None,
        *,
        n_without_gradient: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Return the clean data and the solution of the implicit layer.

        Parameters
        ----------
        x : Tensor, shape (n, dim)
            States.
        t : Tensor of shape (n,) or float
            Their times.
        n_iterations : int
            Iterations of the implicit layer, with gradients where they are on; 0 leaves it out.
        initial : Tensor, shape (n, hidden), optional
            Where the iteration starts: the solution of a problem near by.
        n_without_gradient : int
            Iterations before those, without gradients.
        """
        dim, hidden = self.first.in_features, self.first.out_features
        if x.ndim != 2 or x.shape[1] != dim or (initial is not None and initial.shape != (len(x), hidden)):
            shown = "None" if initial is None else f"of shape {tuple(initial.shape)}"
            raise checks.ArgumentError(
                f"x has shape {tuple(x.shape)} and initial is {shown}; allowed: (n, {dim}), and None or (n, {hidden}). Reshape them."
            )
        checks.integer("n_iterations", n_iterations, low=0)
        checks.integer("n_without_gradient", n_without_gradient, low=0)
        inner, level, kept, gain = edm_scalings(x, t, self.schedule, self.data_std)
        h = self.first(inner)
        for block in self.pre:
            h = block(h, level)
        injected = self.injection(h)

        def once(u: Tensor) -> Tensor:
            return self.block(self.mix(torch.cat([u, injected], 1)), level)

        solution = _iterated(once, h if initial is None else initial, n_without_gradient, n_iterations)
        h = solution
        for block in self.post:
            h = block(h, level)
        return kept + gain * self.last(h), solution

    def denoiser(self, n_iterations: int = 12) -> Denoiser:
        """Return the network as samplers take it, with so many iterations from scratch every call."""
        checks.integer("n_iterations", n_iterations, low=0)
        return Denoiser(lambda x, t: self(x, t, n_iterations)[0], self.schedule, predicts="x0")


def stochastic_jfb_loss(
    model: FixedPointDenoiser,
    x0: Tensor,
    t: Tensor,
    *,
    max_no_grad: int = 12,
    max_with_grad: int = 12,
    generator: Seed = None,
) -> Tensor:
    """Return the denoising loss by stochastic Jacobian-free backpropagation.

    Parameters
    ----------
    model : FixedPointDenoiser
        In training.
    x0 : Tensor, shape (n, dim)
        Clean data.
    t : Tensor, shape (n,)
        A time for each row, with noise left.
    max_no_grad : int
        ``N``, at least 0.
    max_with_grad : int
        ``M``, at least 1.
    generator : torch.Generator, int or None
        Source of the noise and of the numbers of iterations.

    Returns
    -------
    Tensor
        The mean of ``(1 / lam^2 + 1 / s^2) |x0' - x0|^2``, with its graph.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    Draws ``n`` from 0..N and ``m`` from 1..M, iterates the implicit layer ``n`` times without and ``m`` times with gradients, and
    backpropagates through those ``m`` alone: no tolerance, no implicit Jacobian. The random numbers teach the layer to come
    near its solution from any start.

    Cost: the blocks, ``n + m`` evaluations of the implicit one and the memory of ``m``.

    References
    ----------
    Bai and Melas-Kyriazi (2024), arXiv:2401.08741, section 3.3; Fung et al. (2022), arXiv:2103.12803.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> model = FixedPointDenoiser(2, EDMSchedule(), 0.5, hidden=8)
    >>> stochastic_jfb_loss(model, torch.zeros(3, 2), torch.ones(3), generator=0).requires_grad
    True
    """
    _check_model(model)
    checks.tensor("x0", x0, ndim=2)
    checks.tensor("t", t, shape=(len(x0),))
    checks.positive("the least noise at t", float(model.schedule.sigma(t).min()))
    checks.integer("max_no_grad", max_no_grad, low=0)
    checks.integer("max_with_grad", max_with_grad, low=1)
    g = as_generator(generator)
    n, m = (
        int(randint(0, max_no_grad + 1, (), generator=g)),
        int(randint(1, max_with_grad + 1, (), generator=g)),
    )
    noisy = model.schedule.add_noise(x0, randn(x0.shape, generator=g, like=x0), t)
    answer, _ = model(noisy, t, m, n_without_gradient=n)
    weight = 1 / model.schedule.lam(t).to(x0) ** 2 + 1 / model.data_std**2
    return (weight[:, None] * (answer - x0).square()).mean()


def sample_fixed_point(
    model: FixedPointDenoiser,
    x: Tensor,
    times: Tensor,
    *,
    total_iterations: int,
    allocation: Allocation = "constant",
    reuse: bool = True,
    callback: Callable[[int, Tensor], None] | None = None,
) -> SampleResult:
    """Follow the probability flow with a given number of iterations of the implicit layer in all.

    Parameters
    ----------
    model : FixedPointDenoiser
        Trained.
    x : Tensor, shape (n, dim)
        State at ``times[0]``, floating point; all rows are at the same time.
    times : Tensor, shape (steps + 1,)
        Decreasing times, as :meth:`~perturbkit.core.noise.Schedule.times` gives them.
    total_iterations : int
        Iterations over all steps, at least one a step.
    allocation : {"constant", "increasing", "decreasing"} or callable
        How they are shared among the steps: alike, or along a line from 1 to the number of steps or back; or
        ``allocation(steps, total) -> numbers`` that add up to the total.
    reuse : bool
        Whether each step starts the iteration at the solution of the step before; otherwise from scratch.
    callback : callable, optional
        Called as ``callback(i, x)`` after step ``i``.

    Returns
    -------
    SampleResult
        ``x`` at ``times[-1]``; in ``extras`` the "iterations" of each step, the "residual" of its last iteration relative to the
        solution, and "block_evaluations", those of all blocks for one row.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the state, the times or the numbers of iterations are not allowed.

    Notes
    -----
    Steps are those of DDIM, exact for a constant noise prediction.

    Cost: ``steps (pre_blocks + post_blocks) + total_iterations`` evaluations of a block a row.

    References
    ----------
    Bai and Melas-Kyriazi (2024), arXiv:2401.08741, sections 3.4 and 3.5.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> schedule = EDMSchedule(sigma_max=5.0)
    >>> model = FixedPointDenoiser(2, schedule, 0.5, hidden=8)
    >>> found = sample_fixed_point(model, torch.ones(3, 2), schedule.times(4), total_iterations=6, allocation="decreasing")
    >>> found.extras["iterations"]
    [2, 2, 1, 1]
    """
    _check_model(model)
    denoiser = Denoiser(lambda x, t: model(x, t)[0], model.schedule, predicts="x0")
    check_start(denoiser, x, times)
    path = Path(denoiser, times)
    counts = _shared(allocation, path.n_steps, total_iterations)
    solution: Tensor | None = None
    residuals = []
    with keeping_modes(model), torch.no_grad():
        model.eval()
        for i, count in enumerate(counts):
            s, t = path.points[i], path.points[i + 1]
            start = solution if reuse else None
            if count > 1:
                before = model(x, s.time, count - 1, start)[1]
                x0, solution = model(x, s.time, 1, before)
            else:
                x0, solution = model(x, s.time, 1, start)
                before = start if start is not None else model(x, s.time, 0)[1]
            residuals.append((solution - before).norm(dim=1) / solution.norm(dim=1))
            eps = (x - s.alpha * x0) / s.sigma
            x = weighted((t.alpha / s.alpha, x), (t.alpha * (t.lam - s.lam), eps))
            if callback is not None:
                callback(i, x)
    extras: dict[str, Any] = {
        "iterations": counts,
        "residual": torch.stack(residuals).mean(1),
        "block_evaluations": path.n_steps * (len(model.pre) + len(model.post)) + sum(counts),
    }
    return SampleResult(x, path.result(x, 0).times, Cost(nfev=path.n_steps * len(x)), extras)


class _Block(nn.Module):
    """A residual block of two layers that knows the time."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.features = TimeFeatures(_TIME_FEATURES)
        self.norm = nn.LayerNorm(hidden)
        self.time = nn.Linear(_TIME_FEATURES, hidden)
        self.one, self.two = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        time = self.time(self.features(level))
        return h + self.two(nn.functional.silu(self.one(self.norm(h)) + time))


def _iterated(once: Callable[[Tensor], Tensor], u: Tensor, without: int, with_gradient: int) -> Tensor:
    """Iterate a map, the first times without a graph."""
    if without:
        with torch.no_grad():
            for _ in range(without):
                u = once(u)
    for _ in range(with_gradient):
        u = once(u)
    return u


def _shared(allocation: Allocation, steps: int, total: int) -> list[int]:
    """Return iterations a step that add up to the total, at least one each."""
    checks.integer("total_iterations", total, low=steps)
    if callable(allocation):
        counts = [int(c) for c in allocation(steps, total)]
        if len(counts) != steps or min(counts) < 1 or sum(counts) != total:
            raise checks.ArgumentError(
                f"allocation gives {counts}; allowed: {steps} numbers of at least 1 that add up to {total}. Share them differently."
            )
        return counts
    checks.one_of("allocation", allocation, ("constant", "increasing", "decreasing"))
    ramp = [1.0] * steps if allocation == "constant" else [i + 1.0 for i in range(steps)]
    if allocation == "decreasing":
        ramp.reverse()
    # Whole parts first, then one more to the largest remainders, earlier steps first.
    spare = total - steps
    exact = [spare * w / sum(ramp) for w in ramp]
    counts = [1 + int(e) for e in exact]
    order = sorted(range(steps), key=lambda i: int(exact[i]) - exact[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _check_model(model: Any) -> None:
    if not isinstance(model, FixedPointDenoiser):
        raise checks.ArgumentTypeError(
            f"model is a {type(model).__name__}; allowed: a FixedPointDenoiser. Build one: FixedPointDenoiser(dim, schedule, data_std)."
        )
