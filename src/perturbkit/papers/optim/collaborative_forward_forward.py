"""Layers that count the goodness of all layers classify digits better than layers that learn alone.

Both algorithms train the same three layers on the same batches, five times; backpropagation of the same network is the
ceiling and untrained layers are the control.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import randperm, seeded_init
from perturbkit.optim import ForwardForwardClassifier, information_flow
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.optim._digits import Digits, accuracy, load

EPOCHS = 200


@paper(
    number=209,
    title="Layer Collaboration in the Forward-Forward Algorithm",
    authors="Lorberbom, Gat, Adi, Schwing, Hazan",
    year=2023,
    arxiv="2305.12393",
    claim="Layers that share their goodness classify better and pass more on, at no more computation.",
    method="perturbkit.optim.ForwardForwardClassifier",
    needs="training",
    input="tabular",
    cost="two forward passes a step and local gradients",
    seconds=120,
)
def reproduce(run: Run) -> Evidence:
    """Test accuracy, and the accuracy that later layers add."""
    data = load(run)
    seeds = run.seeds(5)
    flows = {kind: [_flow(data, seed, kind, EPOCHS) for seed in seeds] for kind in (True, False)}
    ours, alone = ([float(flow[-1]) for flow in flows[kind]] for kind in (True, False))
    added = {kind: [float(flow[-1] - flow[0]) for flow in flows[kind]] for kind in (True, False)}
    untrained = _flow(data, seeds[0], True, 1, lr=1e-12)
    ceiling = _backpropagation(data, seeds[0])
    return Evidence(
        [
            Comparison.over_seeds("test accuracy, against layers that learn alone", ours, alone, "higher"),
            Comparison.over_seeds("test accuracy", ours, [0.9] * 5, "higher"),
            Comparison.over_seeds("accuracy that layers 2 and 3 add to the first", added[True], added[False], "higher"),
            Comparison(
                "test accuracy, untrained", float(untrained[-1]), 0.9, "higher", control=True, note="must fail: nothing was learned"
            ),
        ],
        _figure(flows),
        notes=f"Backpropagation of the same three layers reaches {ceiling:.3f}.",
    )  # fmt: skip


def _flow(data: Digits, seed: int, collaborate: bool, epochs: int, lr: float = 0.03) -> Tensor:
    """Return the test accuracy of layers 1..k of a trained classifier."""
    made = ForwardForwardClassifier(collaborate=collaborate, epochs=epochs, lr=lr, generator=seed)
    made.fit(data.x.numpy(), data.y.numpy())
    return information_flow(made, data.test_x.numpy(), data.test_y.numpy()).accuracy


def _backpropagation(data: Digits, seed: int) -> float:
    with seeded_init(seed):
        layers: list[nn.Module] = []
        for before in (64, 200, 200):
            layers += [nn.Linear(before, 200), nn.ReLU()]
        net = nn.Sequential(*layers, nn.Linear(200, 10))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    g = torch.Generator().manual_seed(seed)
    for _ in range(30):
        for rows in randperm(len(data.y), generator=g).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
    return accuracy(net, data)


def _figure(flows: dict[bool, list[Tensor]]) -> Figure:
    figure = Figure(figsize=(4.2, 3), layout="constrained")
    axes = figure.add_subplot()
    for kind, label, colour in ((False, "alone", "tab:gray"), (True, "collaborating", "tab:blue")):
        mean = torch.stack(flows[kind]).mean(0)
        axes.plot(range(1, len(mean) + 1), mean, "o-", color=colour, label=label)
    axes.set_xticks([1, 2, 3])
    axes.set_xlabel("layers used")
    axes.set_ylabel("test accuracy")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    return figure
