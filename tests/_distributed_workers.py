"""Functions of distributed optimizers that tests run in other processes, which import them by name."""

from typing import Any

import torch
from torch import distributed, nn

from perturbkit.core import checks, prox_l1
from perturbkit.optim import EF21, DProxSGT


def quadratic(worker: int, d: int = 6, dtype: torch.dtype = torch.float64) -> Any:
    """Return the Hessian and linear term of a worker's own convex quadratic."""
    g = torch.Generator().manual_seed(100 + worker)
    a = torch.randn(d, d, generator=g, dtype=torch.float64) * (1 + worker)
    b = torch.randn(d, generator=g, dtype=torch.float64)
    return (a.T @ a / d + 0.1 * torch.eye(d)).to(dtype), b.to(dtype)


def quadratic_gradients(n: int, d: int = 6, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Return each worker's gradient, as a function of the point."""
    return [lambda x, h=h, b=b: h @ x - b for h, b in (quadratic(i, d, dtype) for i in range(n))]


def split_weights(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Return six numbers as two parameters, with a frozen one between them."""
    start = torch.linspace(-1, 1, 6, dtype=dtype)
    frozen = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)
    return [nn.Parameter(start[:4].reshape(2, 2).clone()), frozen, nn.Parameter(start[4:].clone())]


def quadratic_closure(params: list[nn.Parameter], worker: int) -> Any:
    """Return a closure of a worker's quadratic, for an optimizer."""
    h, b = quadratic(worker, dtype=params[0].dtype)

    def closure() -> torch.Tensor:
        for p in params:
            p.grad = None
        x = torch.cat([params[0].reshape(-1), params[2]])
        # Its gradient is bit for bit that of quadratic_gradients.
        loss = (h @ x - b).detach() @ x
        loss.backward()
        return loss

    return closure


def ef21_run(steps: int, runs: list[dict[str, Any]]) -> list[tuple[torch.Tensor, int, bool]]:
    """Minimise the mean of the processes' quadratics; return weights, bytes sent and whether any step was idle, by run."""
    found = []
    for options in runs:
        params = split_weights()
        optimizer = EF21(params, **options)
        closure = quadratic_closure(params, distributed.get_rank())
        idle = [optimizer.step(closure) is None for _ in range(steps)]
        found.append((torch.cat([p.detach().reshape(-1) for p in params]), optimizer.bytes_sent, any(idle)))
    return found


def ef21_mismatch() -> str:
    """Return what a worker is told when starting weights and seeds differ."""
    w = nn.Parameter(torch.full((3,), float(distributed.get_rank())))
    try:
        EF21([w], 0.1, seed=distributed.get_rank()).step(lambda: w.sum())
    except checks.ModelError as error:
        return str(error)
    return ""


def shrink(v: torch.Tensor, step: float) -> torch.Tensor:
    """Return the proximal map of an l1 norm."""
    return prox_l1(v, 0.3 * step)


def dproxsgt_run(steps: int, runs: list[dict[str, Any]]) -> list[tuple[torch.Tensor, int]]:
    """Minimise the mean of the processes' quadratics with an l1 norm over a graph; return weights and bytes sent, by run."""
    found = []
    for options in runs:
        params = split_weights()
        optimizer = DProxSGT(params, 0.02, prox=shrink, **options)
        closure = quadratic_closure(params, distributed.get_rank())
        for _ in range(steps):
            optimizer.step(closure)
        found.append((torch.cat([p.detach().reshape(-1) for p in params]), optimizer.bytes_sent))
    return found
