"""Gradients through a whole sampler at the memory of one call, by the adjoint equation.

Use it to optimise the initial noise, a condition or the network for what comes out of sampling, where the graph of all
steps does not fit into memory. Pan, Liao, Shi, Yan, Tang, Feng and Zhang (2024), AdjointDPM: Adjoint Sensitivity Method for
Gradient Backpropagation of Diffusion Probabilistic Models, arXiv:2307.10711.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from perturbkit.core import Denoiser, checks
from perturbkit.core.sampling import check_noise_left, check_start, check_times

__all__ = ["adjoint_sample"]

Solver = Literal["euler", "heun", "rk4"]
State = list[Tensor]

# Butcher tableaus: the node and the row of each stage, and the weights.
_TABLEAUS: dict[str, tuple[list[tuple[float, list[float]]], list[float]]] = {
    "euler": ([(0.0, [])], [1.0]),
    "heun": ([(0.0, []), (1.0, [1.0])], [0.5, 0.5]),
    "rk4": ([(0.0, []), (0.5, [0.5]), (0.5, [0.0, 0.5]), (1.0, [0.0, 0.0, 1.0])], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}  # fmt: skip


def adjoint_sample(
    denoiser: Denoiser,
    x: Tensor,
    times: Tensor,
    *,
    params: Iterable[Tensor] | None = None,
    method: Solver = "rk4",
    backward_times: Tensor | None = None,
    checkpoint: bool = False,
) -> Tensor:
    """Draw along the probability flow, differentiably, without keeping the steps.

    Parameters
    ----------
    denoiser : Denoiser
        The network with its schedule; differentiable.
    x : Tensor, shape (n, ...)
        State at ``times[0]``, floating point.
    times : Tensor, shape (steps + 1,)
        Decreasing times; the last must have noise unless the method is "euler" and ``checkpoint`` is set.
    params : iterable of Tensor, optional
        What else to differentiate by: tensors that the denoiser uses, such as parameters or a condition. By default the
        parameters of the network that require gradients, if it is a module.
    method : {"euler", "heun", "rk4"}
        Solver of both equations, with 1, 2 and 4 calls a step; "euler" is DDIM.
    backward_times : Tensor, optional
        Decreasing times of the backward solve, with the ends of ``times``; those of ``times`` by default. More of them
        make gradients more exact without making the draw slower.
    checkpoint : bool
        Keep the state at every time, not to solve for it again: exact states, and memory of one state a step.

    Returns
    -------
    Tensor, shape of ``x``
        State at ``times[-1]``, with a gradient.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If an argument is not allowed.

    Notes
    -----
    With ``z = x / alpha`` and ``lam = sigma / alpha`` the flow is ``dz/dlam = eps(alpha z, t(lam))``, whose linear part is
    gone. For ``a = dL/dz`` the backward pass solves from the data to the noise

    ``dz/dlam = eps``, ``da/dlam = -a^T d eps/dz``, ``dg/dlam = -a^T d eps/dparams``,

    each right side one call and one vector-Jacobian product; ``dL/dx = a(lam_T) / alpha_T``. The gradient is that of the
    flow, not of the discrete steps: both agree up to the order of the solver.

    Cost: forward ``k`` calls a step, backward ``k`` calls and as many products, ``k`` the calls of the method; the memory of
    one call, whatever the number of steps.

    References
    ----------
    Pan et al. (2024), arXiv:2307.10711.

    Examples
    --------
    >>> from perturbkit.core import EDMSchedule
    >>> schedule = EDMSchedule(10.0)
    >>> gaussian = Denoiser(lambda x, t: x / (1 + t[:, None] ** 2), schedule, predicts="x0")  # data N(0, 1)
    >>> x = torch.full((1, 1), 5.0, dtype=torch.float64, requires_grad=True)
    >>> adjoint_sample(gaussian, x, schedule.times(30, t_end=0.01)).sum().backward()
    >>> abs(float(x.grad) - (1.0001 / 101) ** 0.5) < 1e-4
    True
    """
    check_start(denoiser, x.detach(), times)
    checks.one_of("method", method, tuple(_TABLEAUS))
    back = times if backward_times is None else backward_times
    check_times(back)
    if float(back[0]) != float(times[0]) or float(back[-1]) != float(times[-1]):
        raise checks.ArgumentError(
            f"backward_times go from {float(back[0]):g} to {float(back[-1]):g}; allowed: the ends of times, "
            f"{float(times[0]):g} and {float(times[-1]):g}. Refine only between them."
        )
    if checkpoint and backward_times is not None:
        raise checks.ArgumentError(
            "checkpoint is set and backward_times are given; allowed: one of them, since states are kept at times alone. "
            "Leave one out."
        )
    if not (method == "euler" and checkpoint):
        remedy = "End a little earlier, or take method='euler' with checkpoint=True."
        check_noise_left(denoiser.schedule, times, remedy)
    if params is None:
        module = denoiser.network if isinstance(denoiser.network, nn.Module) else nn.Identity()
        tensors: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    else:
        tensors = list(params)
        for i, p in enumerate(tensors):
            checks.tensor(f"params[{i}]", p.detach() if isinstance(p, Tensor) else p, finite=False)
            if not p.requires_grad:
                raise checks.ArgumentError(
                    f"params[{i}] does not require gradients; allowed: tensors that do. Call requires_grad_() or leave it out."
                )
    return _Adjoint.apply(_Flow(denoiser, times, back, method, checkpoint, tensors), x, *tensors)


class _Flow:
    """What the forward and the backward pass share."""

    def __init__(
        self,
        denoiser: Denoiser,
        times: Tensor,
        back: Tensor,
        method: str,
        checkpoint: bool,
        params: list[Tensor],
    ) -> None:
        self.denoiser, self.checkpoint, self.params = denoiser, checkpoint, params
        schedule = denoiser.schedule
        self.levels, self.back_levels = (
            schedule.lam(t.detach().to("cpu", torch.float64)).tolist() for t in (times, back)
        )
        ends = times[[0, -1]].detach().to("cpu", torch.float64)
        self.alpha_noise, self.alpha_data = schedule.alpha(ends).tolist()
        self.tableau = _TABLEAUS[method]

    def eps(self, z: Tensor, lam: float) -> Tensor:
        """Return the noise prediction in the scaled state."""
        schedule = self.denoiser.schedule
        t = float(schedule.time(lam))
        return self.denoiser.eps(float(schedule.alpha(t)) * z, t)

    def augmented(self, state: State, lam: float) -> State:
        """Return the right sides of the three backward equations."""
        with torch.enable_grad():
            z = state[0].detach().requires_grad_()
            eps = self.eps(z, lam)
            products = torch.autograd.grad(eps, [z, *self.params], state[1], allow_unused=True)
        slopes = [torch.zeros_like(s) if p is None else -p for s, p in zip(state[1:], products, strict=True)]
        return [eps.detach(), *slopes]

    def step(self, field: Callable[[State, float], State], state: State, lam: float, h: float) -> State:
        """Take one Runge-Kutta step."""
        stages, weights = self.tableau
        slopes: list[State] = []
        for node, row in stages:
            slopes.append(field(_moved(state, slopes, row, h), lam + node * h))
        return _moved(state, slopes, weights, h)


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flow: _Flow, x: Tensor, *params: Tensor) -> Tensor:
        z = x / flow.alpha_noise
        kept = [z]
        for lam, lam_next in pairwise(flow.levels):
            (z,) = flow.step(lambda state, at: [flow.eps(state[0], at)], [z], lam, lam_next - lam)
            if flow.checkpoint:
                kept.append(z)
        ctx.flow = flow
        # Saving the parameters lets autograd refuse a backward pass after they were changed in place.
        ctx.save_for_backward(*(kept if flow.checkpoint else [z]), *params)
        return flow.alpha_data * z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flow: _Flow = ctx.flow
        saved = ctx.saved_tensors
        states = saved[: len(saved) - len(flow.params)]
        state = [states[-1], flow.alpha_data * grad, *(torch.zeros_like(p) for p in flow.params)]
        levels = flow.back_levels
        for i in range(len(levels) - 2, -1, -1):
            if flow.checkpoint and len(flow.tableau[1]) == 1:
                # Euler's own adjoint: the product is taken where the forward step was.
                slopes = flow.augmented([states[i], *state[1:]], levels[i])
                state = _moved(state, [slopes], [1.0], levels[i] - levels[i + 1])
                state[0] = states[i]
                continue
            if flow.checkpoint:
                state[0] = states[i + 1]
            state = flow.step(flow.augmented, state, levels[i + 1], levels[i] - levels[i + 1])
        return None, state[1] / flow.alpha_noise, *state[2:]


def _moved(state: State, slopes: Sequence[State], weights: Sequence[float], h: float) -> State:
    for slope, weight in zip(slopes, weights, strict=True):
        if weight:
            state = [s + (h * weight) * d for s, d in zip(state, slope, strict=True)]
    return state
