"""Stochastic model building bears initial rates that are too large, where gradient descent fails.

A network on digits and logistic regression on badly scaled features, twenty passes from four initial rates. Gradient descent
on the same batches is the baseline, and at the largest rate the control.
"""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import randn, randperm, seeded_init
from perturbkit.optim import SMB
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.optim._digits import Digits, load

RATES = (0.01, 0.1, 1.0, 10.0)
Data = tuple[Tensor, Tensor]


@paper(
    number=177,
    title="Bolstering Stochastic Gradient Descent with Model Building",
    authors="Birbil, Martin, Onay, Oztoprak",
    year=2021,
    arxiv="2111.07058",
    claim="Rebuilding the steps that fail makes stochastic gradient descent competitive without tuning its rate.",
    method="perturbkit.optim.SMB",
    needs="weights",
    input="any",
    cost="two gradients a step",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Last training losses by initial rate, and how many steps were rebuilt."""
    data = load(run)
    seed = run.seeds(1)[0]
    network = {
        lr: [_train(_network(seed), _digits(data), lr, kind, seed) for kind in ("SMB", "SGD")] for lr in RATES
    }
    scaled = {
        lr: [_train(_logistic(), _scaled(run), lr, kind, seed) for kind in ("SMB", "SGD")] for lr in RATES
    }
    best = [min(network[lr][i][0] for lr in RATES) for i in (0, 1)]
    comparisons = [
        Comparison("last loss of the network at the best rate, against descent", best[0], best[1], "lower"),
        Comparison("last loss on badly scaled features at rate 1, against descent", scaled[1.0][0][0], scaled[1.0][1][0], "lower", factor=1 / 3),
        Comparison("last loss on badly scaled features at rate 10", scaled[10.0][0][0], 1e3, "lower"),
        Comparison("last loss on badly scaled features at rate 0.01, against descent", scaled[0.01][0][0], scaled[0.01][1][0], "equal", margin=0.05),
        Comparison(
            "last loss of descent on badly scaled features at rate 1, against ours", scaled[1.0][1][0], scaled[1.0][0][0], "lower", control=True,
            note="must fail: the rate is too large for it",
        ),
    ]  # fmt: skip
    shown = "; ".join(
        f"rate {lr:g}: {network[lr][0][0]:.3f} and {network[lr][1][0]:.3f}, {network[lr][0][1]:.0%} rebuilt"
        for lr in RATES
    )
    return Evidence(
        comparisons, _figure(network, scaled),
        notes=f"The network's last losses, ours and descent's: {shown}. A step costs two gradients: at equal gradients descent "
        "makes twice as many passes.",
    )  # fmt: skip


def _network(seed: int) -> nn.Module:
    with seeded_init(seed):
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def _logistic() -> nn.Module:
    net = nn.Linear(30, 2)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    return net


def _digits(data: Digits) -> Data:
    return data.x, data.y


def _scaled(run: Run) -> Data:
    """Return two classes in thirty features whose scales span three decades, with a tenth of the labels wrong."""
    g = run.generator("scaled")
    x = randn((600, 30), generator=g)
    y = (x @ randn((30,), generator=g) + 0.3 * randn((600,), generator=g) > 0).long()
    y[:60] = 1 - y[:60]
    return x * torch.logspace(-1.5, 1.5, 30), y


def _train(net: nn.Module, data: Data, lr: float, kind: str, seed: int) -> tuple[float, float]:
    """Return the last training loss and the share of steps that were rebuilt."""
    x, y = data
    optimizer: Any = (
        SMB(net.parameters(), lr=lr) if kind == "SMB" else torch.optim.SGD(net.parameters(), lr=lr)
    )
    g = torch.Generator().manual_seed(seed)
    steps = 0
    for _ in range(20):
        for rows in randperm(len(y), generator=g).split(100):

            def closure(rows: Tensor = rows) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
                loss.backward()
                return loss

            optimizer.step(closure)
            steps += 1
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(net(x), y))
    return (loss if loss == loss else float("inf")), getattr(optimizer, "models_built", 0) / steps


def _figure(*beds: dict[float, list[tuple[float, float]]]) -> Figure:
    figure = Figure(figsize=(6.4, 3), layout="constrained")
    for axes, found, title in zip(
        figure.subplots(1, 2), beds, ("network on digits", "badly scaled features"), strict=True
    ):
        for i, (label, colour) in enumerate((("model building", "tab:blue"), ("descent", "tab:gray"))):
            axes.loglog(RATES, [max(found[lr][i][0], 1e-4) for lr in RATES], "o-", color=colour, label=label)
        axes.set_xlabel("initial rate")
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, fontsize=8)
    return figure
