"""Deep Taylor maps of digits sum to the output and are never negative, find the pixels that matter, and stay calm under noise.

A convolutional network with biases held at or below zero, on 200 test digits, against squared gradients (sensitivity
analysis): every map must be conservative to 1e-4 and positive; flipping pixels in its order must lower the output faster by 0.02
in area than the squared gradient's and than a random order; and maps of an image and its noisy copy must correlate more.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core import Oracle
from perturbkit.core.random import as_generator, randint, randn, seeded_init, uniform
from perturbkit.explain import RemovalCurve, deep_taylor, deletion_curve
from perturbkit.papers import Comparison, Evidence, Run, paper


@paper(
    number=227,
    title="Explaining NonLinear Classification Decisions with Deep Taylor Decomposition",
    authors="Montavon, Bach, Binder, Samek, Müller",
    year=2017,
    arxiv="1512.02479",
    claim="Deep Taylor heat maps are conservative and positive, and less noisy than sensitivity analysis.",
    method="perturbkit.explain.deep_taylor",
    needs="weights",
    input="image",
    cost="one evaluation and one pass back",
    seconds=15,
)
def reproduce(run: Run) -> Evidence:
    """Conservation, pixel flipping and noise."""
    from perturbkit.data import load_digits8

    train, test = load_digits8("train"), load_digits8("test")
    net = _network(train.x, train.y, run)
    oracle, x = Oracle(net), test.x[:200]
    label = oracle(x).argmax(1)
    output = oracle.value(x, label)
    kept = output > 0
    x, label, output = x[kept], label[kept], output[kept]

    def sensitivity(z: Tensor) -> Tensor:
        return oracle.gradient(z, label).square()

    def ours(z: Tensor) -> Tensor:
        return deep_taylor(net, z, label).values

    maps = {"deep Taylor": ours(x), "squared gradient": sensitivity(x)}
    maps["random"] = uniform(x.shape, generator=run.generator("random"), like=x)
    whole = {name: _conserved(values, output) for name, values in maps.items()}
    curves = {
        name: deletion_curve(oracle, x, values, label, baseline=1 - x, n_steps=16)
        for name, values in maps.items()
    }
    area = {name: curve.area.tolist() for name, curve in curves.items()}
    noisy = (x + 0.1 * randn(x.shape, generator=run.generator("noise"), like=x)).clamp(0, 1)
    calm = {
        name: _correlation(maps[name], method(noisy)).tolist()
        for name, method in (("deep Taylor", ours), ("squared gradient", sensitivity))
    }
    comparisons = [
        Comparison("share of maps conservative to 1e-4 and positive", whole["deep Taylor"], 1.0, "equal", n=len(x)),
        Comparison(
            "share of squared gradients conservative to 1e-4", whole["squared gradient"], 1.0, "equal", n=len(x),
            control=True, note="must fail: sensitivity decomposes the slope, not the output",
        ),
        *(
            Comparison.over_seeds(
                f"area as pixels flip, against {other}", area["deep Taylor"], area[other], "lower", margin=0.02
            )
            for other in ("squared gradient", "random")
        ),
        Comparison.over_seeds(
            "correlation of the maps of an image and its noisy copy (0.1)", calm["deep Taylor"], calm["squared gradient"],
            "higher",
        ),
    ]  # fmt: skip
    accuracy = float((oracle(test.x).argmax(1) == test.y).float().mean())
    notes = f"Accuracy {accuracy:.3f} with biases at or below 0; {len(x)} of 200 outputs are positive. The paper claims "
    notes += "conservation, positivity and calm; flipping pixels is a test of our own, and there the squared gradient, which "
    notes += "names the pixels that a flip exploits, did better."
    return Evidence(comparisons, _figure(x, maps, curves), notes)


def _network(x: Tensor, y: Tensor, run: Run) -> nn.Sequential:
    """Train with every bias held at or below zero."""
    with seeded_init(run.seeds(1)[0]):
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
    g, optimiser = as_generator(run.generator("batches")), torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(600):
        batch = randint(0, len(x), (64,), generator=g)
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimiser.step()
        with torch.no_grad():
            for layer in net:
                if isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None:
                    layer.bias.clamp_(max=0)
    return net.requires_grad_(False)


def _conserved(values: Tensor, output: Tensor) -> float:
    flat = values.flatten(1)
    good = ((flat.sum(1) - output).abs() < 1e-4 * output) & (flat.amin(1) >= 0)
    return float(good.float().mean())


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    a, b = (m.flatten(1) - m.flatten(1).mean(1, keepdim=True) for m in (a, b))
    return nn.functional.cosine_similarity(a, b)


def _figure(x: Tensor, maps: dict[str, Tensor], curves: dict[str, RemovalCurve]) -> Figure:
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    axes = figure.subplots(1, 4)
    for ax, (name, image) in zip(axes, {"image": x, **maps}.items(), strict=False):
        if name != "random":
            ax.imshow(image[0, 0], cmap="gray" if name == "image" else "Reds")
            ax.set_title(name, fontsize=8)
            ax.set_axis_off()
    for name, curve in curves.items():
        axes[3].plot(curve.fractions, curve.outputs.mean(0), label=name)
    axes[3].set_xlabel("share flipped")
    axes[3].set_ylabel("probability")
    axes[3].legend(frameon=False, fontsize=6)
    return figure
