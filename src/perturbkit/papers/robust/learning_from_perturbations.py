"""Networks trained on mislabelled noise with perturbations: what they know of the data, and what the closed form says."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core.random import rademacher, randn
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.robust import LeakyTwoLayer, boundary_perturbation, perturbation_boundary, standard_boundary

_ROWS, _DIM, _NEW = 200, 1000, 400
_NORMS: tuple[Any, ...] = ("l2", "linf", "l0")
_SIZES = tuple(0.01 * 1.5**k for k in range(24))


@paper(
    number=53,
    title="Theoretical Understanding of Learning from Adversarial Perturbations",
    authors="Kumano, Kera, Yamasaki",
    year=2024,
    arxiv="2402.10470",
    claim="Perturbations alone hold enough features of the classes: mislabelled noise that carries them teaches the true boundary.",
    method="perturbkit.robust.perturbation_boundary",
    needs="data",
    input="any",
    cost="one product of the data with their labels",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Gaussian classes in 1000 dimensions, and digits 3 against 7, with noise that is labelled at random."""
    comparisons, curves = [], {}
    worlds = {"Gaussian classes": _gaussian(run), "digits 3 and 7": _digits()}
    for name, (x, y) in worlds.items():
        g = run.generator(name)
        noise = randn((_NEW, x.shape[1]), generator=g) * x.std()
        labels = rademacher((_NEW,), generator=g)
        for norm in _NORMS if name == "Gaussian classes" else ("l2",):
            predicted = [_predicted(x, y, noise, labels, e, norm) for e in _SIZES]
            # The size is chosen by the closed form alone, before any network is trained.
            at = next((i for i, p in enumerate(predicted) if p >= 0.95), len(_SIZES) - 1)
            push = labels[:, None] * boundary_perturbation(standard_boundary(x, y), _SIZES[at], norm=norm)
            net = _trained(noise + push, labels, run.seeds(1)[0])
            answers = torch.where(net(x) >= 0, 1, -1)
            closed = perturbation_boundary(x, y, noise, labels, _SIZES[at], norm=norm).predict(x)
            curves[f"{name}, {norm}"] = predicted
            comparisons.append(Comparison(f"{name}, {norm}: accuracy on the data of a network that has seen none", _share(answers == y), 0.9 if "Gauss" in name else 0.8, "higher", n=len(x)))  # fmt: skip
            if name == "Gaussian classes":
                comparisons.append(Comparison(f"{name}, {norm}: share of rows where it answers as predicted", _share(answers == closed), 0.9, "higher", n=len(x)))  # fmt: skip
        plain = _trained(noise, labels, run.seeds(1)[0])
        comparisons.append(Comparison(f"{name}: accuracy without perturbations", _share(torch.where(plain(x) >= 0, 1, -1) == y), 0.8, "higher", n=len(x), control=True))  # fmt: skip
    return Evidence(
        comparisons,
        _figure(curves),
        notes="The size of the perturbation is the first at which the closed form answers 95 % of the data rightly. The noise has "
        "the spread of the data. Fashion-MNIST and CIFAR-10 are not here.",
    )


def _gaussian(run: Run) -> tuple[Tensor, Tensor]:
    g = run.generator("world")
    y = torch.where(torch.arange(_ROWS) % 2 == 0, 1, -1)
    mean = 2 * randn((_DIM,), generator=g) / _DIM**0.5
    return randn((_ROWS, _DIM), generator=g) + y[:, None] * mean, y


def _digits() -> tuple[Tensor, Tensor]:
    from perturbkit.data import load_digits28

    digits = load_digits28()
    chosen = (digits.y == 3) | (digits.y == 7)
    x = digits.x[chosen].flatten(1)[:400]
    return x - x.mean(0), torch.where(digits.y[chosen][:400] == 3, 1, -1)


def _predicted(x: Tensor, y: Tensor, noise: Tensor, labels: Tensor, epsilon: float, norm: Any) -> float:
    return _share(perturbation_boundary(x, y, noise, labels, epsilon, norm=norm).predict(x) == y)


def _trained(x: Tensor, y: Tensor, seed: int) -> LeakyTwoLayer:
    """Train with steps that keep their size as the loss falls, since the margin is what counts in the end."""
    net = LeakyTwoLayer(x.shape[1], 100, slope=0.1, generator=seed)
    rate = 0.5 / float(x.square().sum(1).mean())
    for _ in range(2000):
        loss = torch.nn.functional.softplus(-y * net(x)).mean()
        (slope,) = torch.autograd.grad(loss, [net.weight])
        with torch.no_grad():
            net.weight.sub_(rate * len(x) ** 0.5 * slope / loss.clamp_min(1e-6))
        if float(loss.detach()) < 1e-3:
            break
    return net.requires_grad_(False)


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _figure(curves: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    for name, values in curves.items():
        ax.semilogx(_SIZES, values, marker="o", markersize=3, label=name)
    ax.set_xlabel("size of the perturbation")
    ax.set_ylabel("accuracy that the closed form predicts")
    ax.legend(frameon=False, fontsize=8)
    return figure
