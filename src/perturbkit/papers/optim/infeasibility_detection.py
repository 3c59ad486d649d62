"""Anchoring speeds up infeasibility detection by the residual, in the worst case.

Slow rotations with a translation, where the displacement is known, then random linear and second-order cone programs with
Douglas-Rachford: those without a point must be found and certified, those with one must not be flagged.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core.random import randn, uniform
from perturbkit.optim import douglas_rachford_operator, solve_fixed_point
from perturbkit.papers import Comparison, Evidence, Run, paper

PLANES, STEPS = 60, 3000
PROGRAMS, ROWS, COLUMNS = 50, 10, 20


@paper(
    number=104,
    title="Accelerated Infeasibility Detection of Constrained Optimization and Fixed-Point Iterations",
    authors="Park, Ryu",
    year=2023,
    arxiv="2303.15876",
    claim="The squared residual error falls as 1/k^2 up to logarithms with the anchor, and as 1/k without.",
    method="perturbkit.optim.solve_fixed_point",
    needs="data",
    input="any",
    cost="one evaluation of the map a step",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Slopes of the errors, and verdicts over programs."""
    errors = {method: _errors(method) for method in ("picard", "halpern")}
    slopes = {method: _slope(e) for method, e in errors.items()}
    linear = _linear(run.generator("infeasible"), feasible=False)
    feasible = _linear(run.generator("feasible"), feasible=True)
    cones = _cones(run.generator("cones"))
    picard, halpern = (_discs(method) for method in ("picard", "halpern"))
    comparisons = [
        Comparison("slope of the squared residual error, anchored", slopes["halpern"], -1.8, "lower"),
        Comparison("slope of the squared residual error, plain", slopes["picard"], -1.0, "equal", margin=0.1),
        Comparison(
            f"squared residual error after {STEPS} steps, anchored against plain",
            float(errors["halpern"][-1]), float(errors["picard"][-1]), "lower", factor=0.1,
        ),
        Comparison("infeasible linear programs certified to 1e-4", linear, 1.0, "equal", n=PROGRAMS),
        Comparison("infeasible second-order cone programs certified to 1e-4", cones, 1.0, "equal", n=PROGRAMS),
        Comparison("feasible linear programs flagged", feasible, 0.0, "equal", n=PROGRAMS),
        Comparison(
            "slope of the squared residual error, plain", slopes["picard"], -1.8, "lower", control=True,
            note="must fail: without the anchor it is -1",
        ),
    ]  # fmt: skip
    notes = (
        "The acceleration is of the worst case. On two discs apart, projected by Douglas-Rachford, the squared residual error "
        f"after 300 steps is {picard:.1e} without the anchor and {halpern:.1e} with it."
    )
    return Evidence(comparisons, _figure(errors), notes=notes)


def _errors(method: str) -> Tensor:
    """Return the squared residual errors of averaged rotations by ever smaller angles, and a unit translation."""
    angles = math.pi * 2 ** (-torch.arange(PLANES, dtype=torch.float64) / 4)
    cos, sin = angles.cos(), angles.sin()
    seen = []

    def operator(x: Tensor) -> Tensor:
        a, b = x[:PLANES], x[PLANES : 2 * PLANES]
        turned = torch.cat([cos * a - sin * b, sin * a + cos * b, x[-1:]])
        moved = 0.5 * (x + turned)
        moved[-1] -= 1.0
        error = x - moved
        error[-1] -= 1.0
        seen.append(error.square().sum())
        return moved

    start = torch.ones(2 * PLANES + 1, dtype=torch.float64)
    start[-1] = 0.0
    solve_fixed_point(operator, start, method=method, max_iter=STEPS, certificate_tol=1e9)  # type: ignore[arg-type]
    return torch.stack(seen)


def _slope(errors: Tensor) -> float:
    """Return the log-log slope from 10 to 3,000 steps, at powers of a tenth of a decade."""
    k = torch.logspace(1, math.log10(STEPS), 25, dtype=torch.float64).round()
    x, y = k.log(), errors[k.long()].log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def _linear(generator: torch.Generator, *, feasible: bool) -> float:
    """Return the share of programs ``A x = b, x >= 0`` that are found infeasible (with a certificate, if they are)."""
    a = randn((PROGRAMS, ROWS, COLUMNS), generator=generator, dtype=torch.float64)
    if feasible:
        x = uniform((PROGRAMS, COLUMNS), generator=generator, dtype=torch.float64)
        b = torch.einsum("pmn,pn->pm", a, x)
    else:
        # A direction y with y A >= 0 and y b = -1.
        y = randn((PROGRAMS, ROWS), generator=generator, dtype=torch.float64)
        y = y / y.norm(dim=1, keepdim=True)
        low = torch.einsum("pm,pmn->pn", y, a).clamp(max=0)
        a = a - y[:, :, None] * low[:, None, :]
        b = randn((PROGRAMS, ROWS), generator=generator, dtype=torch.float64)
        b = b - y * ((y * b).sum(1, keepdim=True) + 1)
    return _run(a, b, lambda z: z.clamp(min=0), lambda z: (-z).clamp(min=0), strict=not feasible)


def _cones(generator: torch.Generator) -> float:
    """Return the share of programs ``A x = b``, x in a second-order cone, found infeasible with a certificate."""
    a = randn((PROGRAMS, ROWS, COLUMNS), generator=generator, dtype=torch.float64)
    y = randn((PROGRAMS, ROWS), generator=generator, dtype=torch.float64)
    y = y / y.norm(dim=1, keepdim=True)
    # Replace y A by a vector inside the cone, which is its own dual.
    image = torch.einsum("pm,pmn->pn", y, a)
    inside = image.clone()
    inside[:, 0] = 1.1 * image[:, 1:].norm(dim=1)
    a = a + y[:, :, None] * (inside - image)[:, None, :]
    b = randn((PROGRAMS, ROWS), generator=generator, dtype=torch.float64)
    b = b - y * ((y * b).sum(1, keepdim=True) + 1)
    return _run(a, b, _project_cone, lambda z: z - _project_cone(z), strict=True)


def _project_cone(z: Tensor) -> Tensor:
    """Project rows (t, x) on the cone |x| <= t."""
    t, x = z[:, :1], z[:, 1:]
    size = x.norm(dim=1, keepdim=True)
    half = ((t + size) / 2).clamp(min=0)
    on = torch.cat([half, x * half / size.clamp(min=1e-300)], 1)
    return torch.where(size <= t, z, torch.where(size <= -t, torch.zeros_like(z), on))


def _run(
    a: Tensor,
    b: Tensor,
    project: Callable[[Tensor], Tensor],
    outside: Callable[[Tensor], Tensor],
    *,
    strict: bool,
) -> float:
    """Return the share of rows flagged; strictly: whose y has y b < 0 and y A within 1e-4 of the dual cone, relatively."""
    inverse = torch.linalg.pinv(a)

    def affine(z: Tensor) -> Tensor:
        miss = torch.einsum("pmn,pn->pm", a, z) - b
        return z - torch.einsum("pnm,pm->pn", inverse, miss)

    def certified(displacement: Tensor) -> Tensor:
        y = -torch.einsum("pn,pnm->pm", displacement, inverse)
        image = torch.einsum("pm,pmn->pn", y, a)
        miss = outside(image).norm(dim=1) / image.norm(dim=1)
        return ((y * b).sum(1) < 0) & (miss <= 1e-4)

    operator = douglas_rachford_operator(affine, project)
    start = torch.zeros(len(a), a.shape[2], dtype=a.dtype)
    found = solve_fixed_point(operator, start, max_iter=2**14, tol=1e-5, verify=certified if strict else None)
    return sum(s == "infeasible" for s in found.status) / len(a)


def _discs(method: str) -> float:
    """Return the squared error of the displacement between two discs 2.5 apart after 300 steps."""
    centers = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)

    def disc(center: Tensor, radius: float) -> Callable[[Tensor], Tensor]:
        return lambda z: center + (z - center) / ((z - center).norm() / radius).clamp(min=1)

    operator = douglas_rachford_operator(disc(centers[0], 1.0), disc(centers[1], 1.5))
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    found = solve_fixed_point(operator, start, method=method, max_iter=300, certificate_tol=1e9)  # type: ignore[arg-type]
    want = torch.tensor([-1.5, -2.0], dtype=torch.float64)
    return float((found.displacement - want).square().sum())


def _figure(errors: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.loglog(errors["picard"], color="tab:gray", label="plain")
    axes.loglog(errors["halpern"], color="tab:blue", label="anchored")
    axes.set_xlabel("step")
    axes.set_ylabel("squared residual error")
    axes.legend(frameon=False, fontsize=8)
    return figure
