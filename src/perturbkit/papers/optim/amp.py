"""Adversarial model perturbation trains flatter networks that err less, where a fifth of the labels is wrong.

Ten networks are trained on 500 digits by gradient descent with momentum, alone and inside the perturbation, whose radius
is chosen on clean validation rows. Of a sharp and a wide pit the perturbed loss must prefer the wide one. A perturbation in a random
direction of the same length is the control.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.parameters import perturbed
from perturbkit.core.random import mixed_seed
from perturbkit.optim import AMP, amp_loss
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.optim._noisy import NoisyDigits, draw, largest_curvature, score, train

RADII = (0.25, 0.5, 1.0)
SGD: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}


@paper(
    number=29,
    title="Regularizing Neural Networks via Adversarial Model Perturbation",
    authors="Zheng, Zhang, Mao",
    year=2021,
    arxiv="2010.04925",
    claim="Descending the largest loss in a ball around the weights finds flatter minima that generalise better.",
    method="perturbkit.optim.AMP",
    needs="weights",
    input="any",
    cost="two gradients a step, and a copy of the weights",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Test accuracy and largest curvature against plain descent, and the pit that is found."""
    seeds = run.seeds(10)
    plain, ours, random_, curvature = [], [], [], []
    for seed in seeds:
        data = draw(seed)
        net = train(partial(torch.optim.SGD, **SGD), data, seed)
        nets = [train(partial(AMP, radius=r, per_tensor=False, **SGD), data, seed) for r in RADII]
        validation = [score(n, data.validation_x, data.validation_y) for n in nets]
        best = validation.index(max(validation))
        noisy = train(partial(_Noise, radius=RADII[best], **SGD), data, seed)
        plain.append(score(net, data.test_x, data.test_y))
        ours.append(score(nets[best], data.test_x, data.test_y))
        random_.append(score(noisy, data.test_x, data.test_y))
        curvature.append([_curvature(n, data) for n in (nets[best], net)])
    wide = {name: _share_in_the_wide_pit(radius) for name, radius in (("AMP", 0.5), ("descent", 0.0))}
    flat = [a for a, _ in curvature]
    sharp = [b for _, b in curvature]
    comparisons = [
        Comparison.over_seeds("test accuracy", ours, plain, "higher", margin=0.005),
        Comparison("largest curvature of the training loss, mean", sum(flat) / len(flat), sum(sharp) / len(sharp), "lower", factor=0.8, n=len(flat)),
        Comparison("loss of the sharp pit less that of the wide one", _gap(0.0), 0.0, "lower", margin=0.1),
        Comparison("the same of the perturbed loss", _gap(0.5), 0.0, "higher", margin=0.1),
        Comparison.over_seeds(
            "test accuracy, random direction of the same length", random_, plain, "higher", margin=0.005, control=True,
            note="must fail: noise of this length does not look for the worst weights",
        ),
    ]  # fmt: skip
    return Evidence(
        comparisons, _figure(),
        notes=f"The perturbed loss prefers the wide pit, but its descent need not find it: of 28 starts {wide['AMP']:.0%} end there, "
        f"and {wide['descent']:.0%} by plain descent. Between the pits the ascent climbs the flank of the sharp one, whose steep "
        "slope then pulls the weight in.",
    )  # fmt: skip


class _Noise(torch.optim.SGD):
    """Gradients at weights moved by the radius in a random direction."""

    def __init__(self, params: Iterable[nn.Parameter], radius: float, **options: Any) -> None:
        self._weights = list(params)
        self._scale = radius / sum(p.numel() for p in self._weights) ** 0.5
        self._t = 0
        super().__init__(self._weights, **options)

    def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]
        self._t += 1
        with perturbed(self._weights, mixed_seed(self._t), self._scale):
            loss = closure()
        super().step()
        return loss


def _curvature(net: nn.Module, data: NoisyDigits) -> float:
    return largest_curvature(net, data.x, data.y)


def _pits(x: Tensor) -> Tensor:
    """Return a landscape with a sharp pit at -1, the deeper one, and a wide pit at 1."""
    return -1.2 * torch.exp(-((x + 1) ** 2) / (2 * 0.1**2)) - torch.exp(-((x - 1) ** 2) / (2 * 0.7**2))


def _gap(radius: float) -> float:
    """Return by how much the (perturbed) loss at the sharp pit's centre is above that at the wide one's."""
    losses = []
    for centre in (-1.0, 1.0):
        # Off the centre by a little: the gradient of the exact centre has no direction.
        w = torch.tensor(centre + 1e-3, dtype=torch.float64, requires_grad=True)
        losses.append(amp_loss(lambda w=w: _pits(w), [w], radius, inner_lr=1.0, inner_steps=50))  # type: ignore[misc]
    return losses[0] - losses[1]


def _share_in_the_wide_pit(radius: float) -> float:
    """Return the share of starts between the far sides of the two pits that end in the wide one."""
    starts = torch.linspace(-1.2, 1.5, 28, dtype=torch.float64)
    # One tensor a start, so that each has its own ball.
    points = [nn.Parameter(s.clone()) for s in starts]
    optimizer = AMP(points, lr=0.005, radius=radius, inner_lr=1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _pits(torch.stack(list(points))).sum()
        loss.backward()
        return loss

    for _ in range(1500):
        optimizer.step(closure)
    return float((torch.stack(list(points)).detach() - 1).abs().lt(0.5).double().mean())


def _figure() -> Figure:
    figure = Figure(figsize=(4.5, 3), layout="constrained")
    axes = figure.add_subplot()
    x = torch.linspace(-2.5, 3, 1200, dtype=torch.float64)
    worst = _pits(x[:, None] + torch.linspace(-0.5, 0.5, 101, dtype=torch.float64)).amax(1)
    axes.plot(x, _pits(x), color="tab:gray", label="loss")
    axes.plot(x, worst, color="tab:blue", label="largest loss within 0.5")
    axes.set_xlabel("weight")
    axes.legend(frameon=False)
    return figure
