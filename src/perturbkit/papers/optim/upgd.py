"""UPGD learns a stream of digits whose labels change better than gradient descent, Adam, and shrink-and-perturb.

Digits come one at a time; after every 1250 their labels are permuted anew. Networks of 128 hidden units, five seeds and a grid of
settings a method, are trained side by side as one batch; the score is the share of digits that are classified rightly before
they are learnt from, over the last five of seven tasks. Utilities given to the wrong weights are the control.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import randn, randperm, seeded_init
from perturbkit.optim import UPGD, scaled_utility
from perturbkit.papers import Comparison, Evidence, Run, paper

HIDDEN, TASKS, LENGTH, LATE = 128, 7, 1250, 5
SIGMA, GAIN = 1e-3, 2.0
RATES = (0.1, 0.03, 0.01)
DECAYS = (0.99, 0.999)
SHRINK = (1e-3, 1e-4)
ADAM_RATES = (3e-3, 1e-3, 3e-4)

# Of each method, its settings: a rate, and a decay of utilities or weights.
GRID: dict[str, list[tuple[float, float]]] = {
    "UPGD": list(product(RATES[:2], DECAYS)),
    "wrong weights": list(product(RATES[:2], DECAYS[:1])),
    "gradient descent": [(lr, 0.0) for lr in RATES],
    "shrink and perturb": list(product(RATES[:2], SHRINK)),
    "Adam": [(lr, 0.0) for lr in ADAM_RATES],
}


@paper(
    number=54,
    title="Utility-based Perturbed Gradient Descent: An Optimizer for Continual Learning",
    authors="Elsayed, Mahmood",
    year=2023,
    arxiv="2302.03281",
    claim="Sparing useful weights and perturbing the others keeps a network learning on a stream where other optimizers fall behind.",
    method="perturbkit.optim.UPGD",
    needs="training",
    input="any",
    cost="one gradient a step, one buffer of the weights' size and normal draws",
    seconds=75,
)
def reproduce(run: Run) -> Evidence:
    """Online accuracy over the last tasks, each method at its best setting."""
    seeds = run.seeds(5)
    curves = _online(seeds)
    best = {
        name: max(settings, key=lambda s: float(settings[s][:, -LATE:].mean()))
        for name, settings in curves.items()
    }
    scores = {name: curves[name][best[name]][:, -LATE:].mean(1).tolist() for name in curves}
    others = ("gradient descent", "shrink and perturb", "Adam")
    comparisons = [
        *(
            Comparison.over_seeds(f"online accuracy against {name}", scores["UPGD"], scores[name], "higher", margin=0.02)
            for name in others
        ),
        Comparison("largest difference of a weight to the optimizer's own after 100 steps", _difference(seeds[0]), 0.0, "equal", margin=1e-5),
        Comparison.over_seeds(
            "online accuracy, utilities of other weights", scores["wrong weights"], scores["gradient descent"], "higher",
            margin=0.02, control=True, note="must fail: noise and smaller steps alone do not help",
        ),
    ]  # fmt: skip
    chosen = "; ".join(f"{name} {lr:g}, {decay:g}" for name, (lr, decay) in best.items())
    return Evidence(
        comparisons, _figure({name: curves[name][best[name]] for name in curves}),
        notes=f"Best rates, and decays of utilities or weights: {chosen}. Tasks are half as long and a third as many as on the card's "
        "stream of 50000 digits; images that are permuted instead of labels are left out.",
    )  # fmt: skip


class _Stream:
    """For each seed its digits in order, with the labels of the task."""

    def __init__(self, seeds: Sequence[int]) -> None:
        from perturbkit.data import load_digits8

        digits = load_digits8()
        self.x = digits.x.flatten(1)
        rows, labels = [], []
        for seed in seeds:
            g = torch.Generator().manual_seed(seed)
            order = torch.cat([randperm(len(digits.y), generator=g)[:LENGTH] for _ in range(TASKS)])
            names = torch.stack([randperm(10, generator=g) for _ in range(TASKS)]).repeat_interleave(
                LENGTH, 0
            )
            rows.append(order)
            labels.append(names.gather(1, digits.y[order][:, None])[:, 0])
        self.rows, self.labels = torch.stack(rows, 1), torch.stack(labels, 1)


def _first(seed: int) -> list[Tensor]:
    """Return the weights that a seed's networks begin with."""
    with seeded_init(seed):
        layers = nn.Linear(64, HIDDEN), nn.Linear(HIDDEN, 10)
    return [p.detach() for layer in layers for p in layer.parameters()]


def _logits(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return the logits of a batch of networks, shape (..., 10), one row of x each."""
    w1, b1, w2, b2 = weights
    hidden = torch.relu((w1 @ x[..., None])[..., 0] + b1)
    return (w2 @ hidden[..., None])[..., 0] + b2


def _online(seeds: Sequence[int]) -> dict[str, dict[tuple[float, float], Tensor]]:
    """Return for each method and setting the accuracy, shape (seeds, tasks)."""
    stream, k = _Stream(seeds), len(seeds)
    settings = [(name, s) for name, choices in GRID.items() for s in choices]
    start = [torch.stack(ws) for ws in zip(*map(_first, seeds), strict=True)]
    # Networks by setting and seed.
    weights = [w.expand(len(settings), *w.shape).clone() for w in start]
    rates, decays = (torch.tensor([s[i] for _, s in settings]) for i in range(2))
    at = {name: [i for i, (n, _) in enumerate(settings) if n == name] for name in GRID}
    part = {name: slice(i[0], i[-1] + 1) for name, i in at.items()}
    ours = slice(part["UPGD"].start, part["wrong weights"].stop)
    noisy = part["shrink and perturb"]
    traces = [torch.zeros_like(w[ours]) for w in weights]
    first, second = ([torch.zeros_like(w[part["Adam"]]) for w in weights] for _ in range(2))
    scale = torch.func.vmap(torch.func.vmap(lambda *u: tuple(scaled_utility(u))))
    g = torch.Generator().manual_seed(seeds[0])
    right = torch.zeros(TASKS, len(settings), k)
    for t in range(TASKS * LENGTH):
        x, y = stream.x[stream.rows[t]], stream.labels[t].expand(len(settings), k)
        leaves = [w.requires_grad_() for w in weights]
        logits = _logits(leaves, x)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum")
        grads = torch.autograd.grad(loss, leaves)
        with torch.no_grad():
            right[t // LENGTH] += logits.argmax(2) == y
            weights = [w.detach() for w in leaves]
            noise = [SIGMA * randn(w.shape, generator=g) for w in start]
            for a, d, w in zip(traces, grads, weights, strict=True):
                # A common factor of all utilities, such as the correction of their start, does not change their scaled form.
                a.mul_(_column(decays[ours], a)).addcmul_(d[ours], w[ours], value=-1)
            scaled = scale(*traces)
            n = len(at["UPGD"])
            for i, (w, d, e, s) in enumerate(zip(weights, grads, noise, scaled, strict=True)):
                # The control has the same utilities at other weights of the tensor.
                s[n:] = s[n:].flatten(2).roll(t + i + 1, 2).view_as(s[n:])
                spared = s.neg_().add_(1).mul_(_column(GAIN * rates[ours], s))
                w[ours].addcmul_(d[ours] + e, spared, value=-1)
                plain = part["gradient descent"]
                w[plain] -= _column(rates[plain], w) * d[plain]
                step = _column(rates[noisy], w)
                w[noisy] *= 1 - step * _column(decays[noisy], w)
                w[noisy] -= step * (d[noisy] + e)
                adam = part["Adam"]
                m = first[i].lerp_(d[adam], 0.1) / (1 - 0.9 ** (t + 1))
                v = second[i].lerp_(d[adam].square(), 0.001) / (1 - 0.999 ** (t + 1))
                w[adam] -= _column(rates[adam], w) * m / (v.sqrt() + 1e-8)
    shares = right.permute(1, 2, 0) / LENGTH
    return {name: {settings[i][1]: shares[i] for i in index} for name, index in at.items()}


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def _difference(seed: int) -> float:
    """Return how far the rule above and the optimizer are apart after 100 steps without noise."""
    stream = _Stream([seed])
    lr, decay = RATES[0], DECAYS[0]
    leaves = [w.clone().requires_grad_() for w in _first(seed)]
    weights = [w.clone() for w in leaves]
    optimizer = UPGD(leaves, lr=lr, sigma=0.0, utility_decay=decay, gain=GAIN)
    traces = [torch.zeros_like(w) for w in weights]
    for t in range(100):
        x, y = stream.x[stream.rows[t, 0]], stream.labels[t, 0]
        optimizer.zero_grad()
        nn.functional.cross_entropy(_logits(leaves, x), y).backward()
        optimizer.step()
        free = [w.detach().requires_grad_() for w in weights]
        grads = torch.autograd.grad(nn.functional.cross_entropy(_logits(free, x), y), free)
        with torch.no_grad():
            traces = [decay * a - (1 - decay) * d * w for a, d, w in zip(traces, grads, weights, strict=True)]
            scaled = scaled_utility([a / (1 - decay ** (t + 1)) for a in traces])
            weights = [w - GAIN * lr * d * (1 - s) for w, d, s in zip(weights, grads, scaled, strict=True)]
    return max(float((a - b).abs().max().detach()) for a, b in zip(leaves, weights, strict=True))


def _figure(curves: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(range(1, TASKS + 1), values.mean(0), label=name)
    axes.set_xlabel("task")
    axes.set_ylabel("online accuracy")
    axes.legend(frameon=False, fontsize="small")
    return figure
