"""Adafactor trains as well as Adam with the memory of rows and columns, and clipping bounds its updates.

A network on digits and a small transformer of characters, both optimizers over the same rates. Updates are measured with
and without clipping while the data change abruptly. Descent without adaptation is the control.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import randint, randn, seeded_init
from perturbkit.optim import Adafactor, state_bytes
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.optim._digits import Digits, load

RATES = (1e-3, 3e-3, 1e-2)
Make = Callable[[Any, float], torch.optim.Optimizer]
Loss = Callable[[int], Tensor]


@paper(
    number=76,
    title="Adafactor: Adaptive Learning Rates with Sublinear Memory Cost",
    authors="Shazeer, Stern",
    year=2018,
    arxiv="1804.04235",
    claim="Factored second moments train like Adam's with the memory of a row and a column, if updates are clipped.",
    method="perturbkit.optim.Adafactor",
    needs="weights",
    input="any",
    cost="the gradient's; n + m numbers for an n by m matrix",
    seconds=110,
)
def reproduce(run: Run) -> Evidence:
    """Memory, final losses over the same rates, and the size of updates."""
    data = load(run)
    makes: dict[str, Make] = {
        "Adafactor": lambda p, lr: Adafactor(p, lr=lr, relative_step_size=False, scale_parameter=False),
        "Adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
        "descent": lambda p, lr: torch.optim.SGD(p, lr=lr),
    }
    digits = {
        name: [_best(make, partial(_digits, data, s), 300) for s in run.seeds(3)]
        for name, make in makes.items()
    }
    text = {name: _best(makes[name], _characters, 250) for name in ("Adafactor", "Adam")}
    updates = {clip: _largest_update(clip) for clip in (1.0, math.inf)}
    return Evidence(
        [
            Comparison("bytes of state for a layer of 1024 x 1024", _bytes(makes["Adafactor"]), 8192, "equal"),
            Comparison("bytes of state for a layer of 1024 x 1024, over Adam's", _bytes(makes["Adafactor"]) / _bytes(makes["Adam"]), 0.002, "lower"),
            Comparison("last loss on digits, mean of 3, against Adam", statistics.fmean(digits["Adafactor"]), statistics.fmean(digits["Adam"]), "lower", factor=1.05, n=3),
            Comparison("last loss of a transformer of characters, against Adam", text["Adafactor"], text["Adam"], "lower", factor=1.05),
            Comparison("largest root mean square of an update, clipped", updates[1.0], 1.0, "lower", margin=-1e-3),
            Comparison("largest root mean square of an update, not clipped", updates[math.inf], 2.0, "higher"),
            Comparison(
                "last loss on digits, plain descent at the same rates, against Adam", statistics.fmean(digits["descent"]), statistics.fmean(digits["Adam"]),
                "lower", factor=1.05, n=3, control=True, note="must fail: the rates are those of adaptive steps",
            ),
        ],
        _figure(digits),
    )  # fmt: skip


def _best(make: Make, problem: Callable[[], tuple[nn.Module, Loss]], steps: int) -> float:
    """Return the least mean loss of the last 50 steps over the rates."""
    found = []
    for lr in RATES:
        net, loss = problem()
        optimizer = make(net.parameters(), lr)
        losses = []
        for t in range(steps):
            optimizer.zero_grad()
            value = loss(t)
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(value.detach()))
        found.append(statistics.fmean(losses[-50:]))
    return min(found)


def _digits(data: Digits, seed: int) -> tuple[nn.Module, Loss]:
    with seeded_init(seed):
        net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    g = torch.Generator().manual_seed(seed)

    def loss(t: int) -> Tensor:
        rows = randint(0, len(data.y), (128,), generator=g)
        return nn.functional.cross_entropy(net(data.x[rows]), data.y[rows])

    return net, loss


class _Characters(nn.Module):
    """Two layers of causal attention over a hundred characters."""

    def __init__(self, n: int, width: int = 64, context: int = 48) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(n, width), nn.Parameter(torch.zeros(context, width))
        layer = nn.TransformerEncoderLayer(width, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, n)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))
        self.mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x) + self.place, self.mask, is_causal=True))


def _characters() -> tuple[nn.Module, Loss]:
    from perturbkit.data import load_sentences

    text = "\n".join(map(str, load_sentences().x))[:100_000]
    letters = sorted(set(text))
    codes = torch.tensor([letters.index(c) for c in text])
    with seeded_init(0):
        net = _Characters(len(letters))
    g = torch.Generator().manual_seed(0)

    def loss(t: int) -> Tensor:
        start = randint(0, len(codes) - 49, (16, 1), generator=g)
        rows = codes[start + torch.arange(49)]
        return nn.functional.cross_entropy(net(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    return net, loss


def _largest_update(clip: float) -> float:
    """Return the largest root mean square of updates over gradients whose scale jumps by a hundred."""
    w = nn.Parameter(torch.zeros(32, 48, dtype=torch.float64))
    optimizer = Adafactor([w], lr=1.0, relative_step_size=False, scale_parameter=False, clip_threshold=clip)
    g = torch.Generator().manual_seed(0)
    largest = 0.0
    for t in range(400):
        w.grad = (100.0 if t % 100 == 99 else 1.0) * randn(w.shape, generator=g, dtype=w.dtype)
        before = w.detach().clone()
        optimizer.step()
        largest = max(largest, float((w.detach() - before).square().mean().sqrt()))
    return largest


def _bytes(make: Make) -> int:
    w = nn.Parameter(torch.zeros(1024, 1024))
    optimizer = make([w], 1e-3)
    w.grad = torch.ones_like(w)
    optimizer.step()
    return state_bytes(optimizer)


def _figure(digits: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(4.2, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(
        list(digits),
        [statistics.fmean(v) for v in digits.values()],
        color=["tab:blue", "tab:gray", "tab:orange"],
    )
    axes.set_yscale("log")
    axes.set_ylabel("last training loss on digits")
    return figure
