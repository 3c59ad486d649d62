"""The equations of SAM's variants follow the optimizers, where the equation of plain descent does not.

Where everything is linear the means are exact: USAM on a quadratic in 20 dimensions and on a linear regression, with the
drift and covariance read off the equations. SAM itself is compared over 30,000 paths, and a network on the breast-cancer
table over fewer. The saddle's boundary is found by bisection. The equation of plain descent is baseline and control.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import randint, randn
from perturbkit.optim import SAM, saddle_attraction_radius, sam_sde, simulate_sde, weak_error
from perturbkit.papers import Comparison, Evidence, Run, paper

RATES = (0.1, 0.05, 0.025, 0.0125, 0.00625)


@paper(
    number=157,
    title="An SDE for Modeling SAM: Theory and Insights",
    authors="Monzio Compagnoni, Biggio, Orvieto, Proske, Kersting, Lucchi",
    year=2023,
    arxiv="2301.08203",
    claim="Stochastic differential equations with SAM's implicit loss track its variants to first order in the rate.",
    method="perturbkit.optim.sam_sde",
    needs="weights",
    input="any",
    cost="a gradient and a Hessian product for each batch and path",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Weak errors against the rate, of the right and of the plain equation, and the boundary of a saddle."""
    g = run.generator("problems")
    beds = {"quadratic in 20 dimensions": _quadratic(g), "linear regression": _regression(g)}
    exact = {
        name: [[_exact(bed, lr, variant) for lr in RATES] for variant in ("usam", "sgd")]
        for name, bed in beds.items()
    }
    comparisons = []
    for name, (ours, plain) in exact.items():
        comparisons += [
            Comparison(f"order of the weak error of USAM's equation, {name}", _order(ours), 1.0, "equal", margin=0.25),
            Comparison(f"largest ratio of its weak error to the plain equation's, {name}", max(a / b for a, b in zip(ours, plain, strict=True)), 1 / 3, "lower"),
        ]  # fmt: skip
    for name, (own, other) in {
        "SAM, linear regression": _paths(_regression(g, d=3, batches=4), 30_000, run),
        "SAM, network": _paths(_network(), 3000, run),
    }.items():
        comparisons.append(
            Comparison(
                f"weak error of the equation of {name}, against the plain one",
                own,
                other,
                "lower",
                factor=1 / 3,
            )
        )
    boundary = _boundary(0.3)
    formula = saddle_attraction_radius(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)), 0.3)
    comparisons += [
        Comparison("least gradient at which DNSAM leaves a saddle, over the formula", boundary / formula, 1.0, "equal", margin=0.05),
        Comparison("least gradient at which plain descent leaves it", _boundary(0.0), 0.01, "lower"),
        Comparison(
            "order of the weak error of the plain equation", _order(exact["quadratic in 20 dimensions"][1]), 1.0, "equal", margin=0.25, control=True,
            note="must fail: its drift lacks a term of the order of the radius, the root of the rate",
        ),
    ]  # fmt: skip
    return Evidence(comparisons, _figure(exact["quadratic in 20 dimensions"]))


Bed = tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor]


def _radius(lr: float) -> float:
    return 0.5 * math.sqrt(lr)


def _quadratic(g: torch.Generator) -> Bed:
    """Return a quadratic with additive noise, forty batches and a start."""
    d = 20
    hessian = torch.diag(torch.linspace(0.2, 2.0, d, dtype=torch.float64))
    noise = randn((20, d), generator=g, dtype=torch.float64)
    return (
        lambda x, e: x @ hessian @ x / 2 + e @ x,
        (torch.cat([noise, -noise]),),
        torch.ones(d, dtype=torch.float64),
    )


def _regression(g: torch.Generator, d: int = 5, batches: int = 8) -> Bed:
    """Return least squares whose batches share their inputs but not their targets, so that every Hessian is the same."""
    x = randn((12, d), generator=g, dtype=torch.float64)
    y = randn((batches, 12), generator=g, dtype=torch.float64)
    return (
        lambda w, a, b: (a @ w - b).square().mean() / 2,
        (x.expand(batches, 12, d), y),
        2 * torch.ones(d, dtype=torch.float64),
    )


def _network() -> Bed:
    """Return a network of 17 weights on two components of the breast-cancer table, in twenty batches."""
    from perturbkit.data import load_breast_cancer

    table = load_breast_cancer()
    x = table.x.double()
    x = (x - x.mean(0)) / x.std(0)
    x = x @ torch.linalg.svd(x, full_matrices=False).Vh[:2].T / 3
    rows = torch.arange(560).reshape(20, 28)

    def loss(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        hidden = torch.tanh(a @ w[:8].reshape(2, 4) + w[8:12])
        return nn.functional.binary_cross_entropy_with_logits(hidden @ w[12:16] + w[16], b)

    start = randn((17,), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return loss, (x[rows], table.y[rows].double()), start


def _mean_loss(bed: Bed, x: Tensor) -> Tensor:
    loss, batches, _ = bed
    over = torch.func.vmap(loss, in_dims=(None, *[0] * len(batches)))
    return torch.func.vmap(lambda w: over(w, *batches).mean())(x)


def _exact(bed: Bed, lr: float, variant: str) -> float:
    """Return the weak error of the mean loss at time 1, where drift and noise are linear and constant.

    Of USAM by its recursion; of the equation by that of its Euler steps, of a twentieth of the rate, extrapolated.
    """
    loss, batches, start = bed
    d, rho = len(start), _radius(lr)
    points = torch.cat([torch.zeros(1, d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)])
    steps = round(1 / lr)
    # A step of USAM is affine with the noise of its gradients at the displaced weights.
    over = torch.func.vmap(torch.func.grad(loss), in_dims=(None, *[0] * len(batches)))

    def displaced(x: Tensor) -> Tensor:
        g = over(x, *batches)
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(0, *[0] * len(batches)))
        return each(x + rho * g, *batches)

    moved = torch.stack([displaced(p) for p in points])
    discrete = _moments(-moved.mean(1), torch.cov(moved[0].T, correction=0), lr, steps, start)
    drift, diffusion = sam_sde(loss, batches, variant=variant, lr=lr, radius=rho)  # type: ignore[arg-type]
    factor = diffusion(points[:1])[0]
    fields = drift(points)
    coarse, fine = (
        _moments(fields, factor @ factor.T / (lr / n), lr / n, steps * n, start) for n in (20, 40)
    )
    ends = [_mean_of(bed, m, c) for m, c in (discrete, coarse, fine)]
    return abs(ends[0] - (2 * ends[2] - ends[1]))


def _moments(
    fields: Tensor, covariance: Tensor, step: float, steps: int, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and covariance after steps of ``x + step (fields[0] + A x) + step noise``, A from values at unit vectors."""
    offset, matrix = fields[0], (fields[1:] - fields[0]).T
    once = torch.eye(len(start), dtype=start.dtype) + step * matrix
    mean, spread = start, torch.zeros_like(once)
    for _ in range(steps):
        mean = once @ mean + step * offset
        spread = once @ spread @ once.T + step**2 * covariance
    return mean, spread


def _mean_of(bed: Bed, mean: Tensor, spread: Tensor) -> float:
    """Return the mean loss of a normal vector: exact, the loss being quadratic."""
    hessian = torch.func.hessian(lambda w: _mean_loss(bed, w[None])[0])(mean)
    return float(_mean_loss(bed, mean[None])[0] + (hessian * spread).sum() / 2)


def _order(errors: list[float]) -> float:
    """Return the order between the two smallest rates: at larger ones the error of the quadratic changes its sign."""
    return math.log(errors[-2] / errors[-1]) / math.log(RATES[-2] / RATES[-1])


def _paths(bed: Bed, paths: int, run: Run) -> tuple[float, float]:
    """Return the weak errors of SAM's and of the plain equation at time 1 and rate 0.05, on the same starts."""
    loss, batches, start = bed
    lr, seed = 0.05, run.seeds(1)[0]
    rho = _radius(lr)
    g = torch.Generator().manual_seed(seed)
    gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(0, *[0] * len(batches)))
    x = start.expand(paths, -1)
    for _ in range(round(1 / lr)):
        rows = randint(0, len(batches[0]), (paths,), generator=g)
        own = [b[rows] for b in batches]
        u = gradient(x, *own)
        x = x - lr * gradient(x + rho * u / u.norm(dim=1, keepdim=True), *own)
    errors = []
    for variant in ("sam", "sgd"):
        drift, diffusion = sam_sde(loss, batches, variant=variant, lr=lr, radius=rho)  # type: ignore[arg-type]
        ends = simulate_sde(
            drift, diffusion, start.expand(paths, -1), lr / 2, 2 * round(1 / lr), generator=seed
        )
        errors.append(weak_error(x, ends, lambda w: _mean_loss(bed, w)).value)
    return errors[0], errors[1]


def _boundary(radius: float) -> float:
    """Return the least distance along the negative eigenvector, 0.001 to 1, from which the saddle is left."""
    low, high = 1e-3, 1.0
    if _leaves(low, radius):
        return low
    for _ in range(12):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if _leaves(middle, radius) else (middle, high)
    return high


def _leaves(size: float, radius: float) -> bool:
    w = nn.Parameter(torch.tensor([0.0, size], dtype=torch.float64))
    optimizer = SAM([w], lr=0.01, radius=radius, variant="dnsam")

    def closure() -> Any:
        optimizer.zero_grad()
        loss = (w[0] ** 2 - w[1] ** 2) / 2
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(400):
        optimizer.step(closure, closure)
    return abs(float(w.detach()[1])) > size


def _figure(errors: list[list[float]]) -> Figure:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.loglog(RATES, errors[1], "o-", color="tab:gray", label="plain equation")
    axes.loglog(RATES, errors[0], "o-", color="tab:blue", label="USAM's equation")
    axes.set_xlabel("rate")
    axes.set_ylabel("weak error of the loss at time 1")
    axes.legend(frameon=False)
    return figure
