"""Surrogates in the outputs need fewer dear gradients than descent in the weights.

Softmax regression on digits and a squared loss that interpolates; and imitation of a controller whose states the learner
itself visits. Descent, Adam and surrogates get the same grid of rates; one step inside a surrogate is the control.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import randn
from perturbkit.optim import SSO
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.optim._digits import load

RATES = (0.01, 0.1, 1.0, 10.0)
Bed = tuple[int, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], float]


@paper(
    number=127,
    title="Target-based Surrogates for Stochastic Optimization",
    authors="Lavington, Vaswani, Babanezhad, Schmidt, Le Roux",
    year=2023,
    arxiv="2302.02607",
    claim="Many cheap steps on a surrogate of one dear gradient need fewer of those than descent in the weights.",
    method="perturbkit.optim.SSO",
    needs="training",
    input="any",
    cost="one dear gradient and several passes of the model a step",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Dear gradients until a loss, on two problems, and the loss of imitation after equal ones."""
    beds = {"softmax regression": _digits(run), "interpolating squares": _squares(run)}
    calls = {
        name: {kind: _calls(bed, kind) for kind in ("surrogates", "one step", "descent", "Adam")}
        for name, bed in beds.items()
    }
    comparisons = [
        Comparison(f"dear gradients until the loss, {name}, against the better of descent and Adam", found["surrogates"], min(found["descent"], found["Adam"]), "lower", factor=0.5)
        for name, found in calls.items()
    ]  # fmt: skip
    seed = run.seeds(1)[0]
    imitation = {
        kind: min(_imitate(kind, lr, seed) for lr in RATES[:3]) for kind in ("surrogates", "descent")
    }
    comparisons += [
        Comparison("loss of imitation after 30 queries of the expert, against descent", imitation["surrogates"], imitation["descent"], "lower"),
        Comparison(
            "dear gradients until the loss, squares, one step inside against the better of both",
            calls["interpolating squares"]["one step"], min(calls["interpolating squares"]["descent"], calls["interpolating squares"]["Adam"]),
            "lower", factor=0.5, control=True, note="must fail: one step inside is descent",
        ),
    ]  # fmt: skip
    shown = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {n}" for kind, n in found.items()) for name, found in calls.items()
    )
    return Evidence(
        comparisons, _figure(calls),
        notes=f"Dear gradients. {shown}. A surrogate takes ten passes of the model: it pays where a dear gradient costs more than the "
        "passes that it saves.",
    )  # fmt: skip


def _digits(run: Run) -> Bed:
    data = load(run)
    x, y = data.x[:300].double(), data.y[:300]
    return 640, lambda w: x @ w.reshape(64, 10), lambda z: nn.functional.cross_entropy(z, y), 0.1


def _squares(run: Run) -> Bed:
    g = run.generator("squares")
    x = randn((60, 40), generator=g, dtype=torch.float64) * torch.logspace(-1, 0.5, 40, dtype=torch.float64)
    y = x @ randn((40,), generator=g, dtype=torch.float64)
    return 40, lambda w: x @ w, lambda z: (z - y).square().mean() / 2, 1e-2


def _optimizer(kind: str, w: nn.Parameter, lr: float) -> Any:
    if kind == "surrogates":
        return SSO([w], "armijo-gd", target_lr=lr, inner_steps=10)
    if kind == "one step":
        return SSO([w], torch.optim.SGD, inner_steps=1, lr=lr)
    return (torch.optim.SGD if kind == "descent" else torch.optim.Adam)([w], lr=lr)


def _calls(bed: Bed, kind: str, most: int = 2000) -> int:
    """Return the least number of dear gradients, over the rates, until the loss is reached."""
    d, model, loss, goal = bed
    least = most
    for lr in RATES:
        w = nn.Parameter(torch.zeros(d, dtype=torch.float64))
        optimizer = _optimizer(kind, w, lr)
        for t in range(least):
            if isinstance(optimizer, SSO):
                value = optimizer.step(lambda w=w: model(w), loss)  # type: ignore[misc]
            else:
                optimizer.zero_grad()
                value = loss(model(w))
                value.backward()
                optimizer.step()
            if float(value.detach()) <= goal:
                least = min(least, t + 1)
                break
            if not bool(value.isfinite()):
                break
    return least


def _imitate(kind: str, lr: float, seed: int) -> float:
    """Clone a linear controller on the states that the clone visits; return the last loss there."""
    g = torch.Generator().manual_seed(seed)
    dynamics = torch.eye(4, dtype=torch.float64) + 0.1 * randn((4, 4), generator=g, dtype=torch.float64)
    push = randn((4, 2), generator=g, dtype=torch.float64)
    expert = -torch.linalg.pinv(push) @ (dynamics - 0.6 * torch.eye(4))
    w = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    optimizer = _optimizer(kind, w, lr)
    value = torch.tensor(float("inf"))
    for _ in range(30):
        states, s = [], randn((20, 4), generator=g, dtype=torch.float64)
        for _ in range(8):
            states.append(s)
            s = (s @ dynamics.T + s @ w.detach().reshape(2, 4).T @ push.T).clamp(-10, 10)
        x = torch.cat(states)
        x = x / x.norm(dim=1, keepdim=True).clamp(min=1.0)

        def loss(z: Tensor, x: Tensor = x) -> Tensor:
            return (z - x @ expert.T).square().sum(1).mean() / 2

        if isinstance(optimizer, SSO):
            value = optimizer.step(lambda x=x: x @ w.reshape(2, 4).T, loss)  # type: ignore[misc]
        else:
            optimizer.zero_grad()
            value = loss(x @ w.reshape(2, 4).T)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return float(value.detach())


def _figure(calls: dict[str, dict[str, int]]) -> Figure:
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    for axes, (name, found) in zip(figure.subplots(1, 2), calls.items(), strict=True):
        axes.bar(list(found), list(found.values()), color="tab:blue")
        axes.set_yscale("log")
        axes.set_title(name, fontsize=10)
        axes.set_ylabel("dear gradients")
        axes.tick_params(axis="x", labelsize=8)
    return figure
