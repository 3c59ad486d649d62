"""Votes under noise certify radii that no attack crosses, and training under the noise is what makes them large.

On 8x8 digits: certified accuracy over the radius for a network trained under the noise and for the same trained without;
larger noise, which certifies farther and answers worse; and the certificate against an attack on the smoothed classifier.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

from perturbkit.core import around
from perturbkit.core.random import randn, randperm, uniform
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.robust import SmoothedCertificate, projected_gradient, randomized_smoothing

_ROWS, _DRAWS = 120, 2000


@paper(
    number=0,
    title="Certified Adversarial Robustness via Randomized Smoothing",
    authors="Cohen, Rosenfeld, Kolter",
    year=2019,
    arxiv="1902.02918",
    claim="The vote of a classifier under Gaussian noise is certified within a radius in the Euclidean norm; training under "
    "the noise makes the radii large, and its size trades accuracy for radius.",
    method="perturbkit.robust.randomized_smoothing",
    needs="forward",
    input="any",
    cost="n_selection + n_samples evaluations a row",
    seconds=25,
)
def reproduce(run: Run) -> Evidence:
    """Certify networks trained with and without noise."""
    from perturbkit.data import load_digits8

    train, test = load_digits8("train"), load_digits8("test")
    rows = randperm(len(test), generator=run.generator("rows"))[:_ROWS]
    x, y = test.x[rows], test.y[rows]
    found, nets = {}, {}
    for name, trained, sigma in (
        ("noise 0.25", 0.25, 0.25),
        ("noise 0.5", 0.5, 0.5),
        ("no noise", 0.0, 0.25),
    ):
        nets[name] = _trained(train.x, train.y, trained, run)
        found[name] = randomized_smoothing(
            nets[name],
            x,
            sigma=sigma,
            n_samples=_DRAWS,
            generator=run.generator("votes"),
            progress=run.progress,
        )
    certified = {name: _certified(result, y) for name, result in found.items()}
    at: dict[str, Callable[[float], float]] = {name: partial(_share, c) for name, c in certified.items()}
    small = found["noise 0.25"]
    sure = small.prediction >= 0
    broken = _attacked(nets["noise 0.25"], x[sure], small, sure, run)
    comparisons = [
        Comparison("certified accuracy at 0.5, training under noise against without", at["noise 0.25"](0.5), at["no noise"](0.5), "higher", margin=0.1, n=_ROWS),
        Comparison("certified accuracy at 0.25, training under noise above 50 %", at["noise 0.25"](0.25), 0.5, "higher", n=_ROWS),
        Comparison("accuracy of the vote, noise 0.5 against 0.25", at["noise 0.5"](1e-9), at["noise 0.25"](1e-9), "lower", n=_ROWS),
        Comparison(
            "largest radius certified, noise 0.5 against 0.25", float(certified["noise 0.5"].max()),
            float(certified["noise 0.25"].max()), "higher", margin=0.1, n=_ROWS,
            note=f"at 0.6 the smaller noise still certifies more: {at['noise 0.25'](0.6):.0%} against "
            f"{at['noise 0.5'](0.6):.0%}",
        ),
        Comparison("certified rows broken inside their radius", broken, 0.0, "equal", n=int(sure.sum())),
        Comparison(
            "certified accuracy at 0.9 of noise 0.25", at["noise 0.25"](0.9), 0.02, "higher", control=True, n=_ROWS,
            note="must fail: 2000 draws certify at most 0.68 at this noise",
        ),
    ]  # fmt: skip
    return Evidence(
        comparisons,
        _figure(certified),
        notes=f"{_ROWS} test rows, {_DRAWS} draws a row, against the paper's 100,000.",
    )


def _share(radius: Tensor, least: float) -> float:
    return float((radius >= least).double().mean())


def _certified(result: SmoothedCertificate, y: Tensor) -> Tensor:
    assert result.radius is not None
    return torch.where(result.prediction == y, result.radius, -1.0)


def _trained(x: Tensor, y: Tensor, sigma: float, run: Run) -> nn.Module:
    net = nn.Sequential(
        nn.Flatten(), nn.utils.skip_init(nn.Linear, 64, 128), nn.ReLU(), nn.utils.skip_init(nn.Linear, 128, 128), nn.ReLU(),
        nn.utils.skip_init(nn.Linear, 128, 10),
    )  # fmt: skip
    generator = run.generator("weights")
    for p in net.parameters():
        p.data = uniform(p.shape, -0.1, 0.1, generator=generator)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(1200):
        rows = randperm(len(x), generator=generator)[:128]
        noisy = x[rows] + sigma * randn(x[rows].shape, generator=generator)
        loss = functional.cross_entropy(net(noisy), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def _attacked(net: nn.Module, x: Tensor, result: SmoothedCertificate, sure: Tensor, run: Run) -> float:
    """Share of rows whose vote, of fresh draws, is turned by an attack on the mean probability inside the radius."""
    assert result.radius is not None
    noise = 0.25 * randn((500, *x.shape[1:]), generator=run.generator("attack"), like=x)

    def votes(z: Tensor, hard: bool) -> Tensor:
        out = net((z[:, None] + noise).flatten(0, 1)).reshape(len(z), len(noise), -1)
        return functional.one_hot(out.argmax(2), 10).float().mean(1) if hard else out.softmax(2).mean(1)

    y = result.prediction[sure]
    ball = around(x, "l2", result.radius[sure], None)
    found = projected_gradient(
        lambda z: votes(z, False), x, y, ball, n_steps=8, generator=run.generator("start")
    )
    return float((votes(found.x, True).argmax(1) != y).double().mean())


def _figure(certified: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    grid = torch.linspace(0, 1.6, 200)
    for name, radius in certified.items():
        ax.plot(
            grid, (radius[:, None] >= grid.clamp_min(1e-9)).double().mean(0), label=f"trained with {name}"
        )
    ax.set_xlabel("radius (Euclidean)")
    ax.set_ylabel("certified accuracy")
    ax.legend(frameon=False)
    return figure
