"""Integrated gradients keep the axioms that gradients break, are complete, and order pixels better than gradients.

Three claims: the axioms on random networks, where gradient times input must fail sensitivity; completeness within
1 % at 128 nodes on a digits network and on EfficientNet-lite0; and the area under the deletion curve on 100 digits
against the plain gradient and a random order.
"""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core import Oracle
from perturbkit.core.random import randn, uniform
from perturbkit.explain import check_axioms, integrated_gradients
from perturbkit.papers import Comparison, Evidence, Run, paper

_STEPS = 20


@paper(
    number=181,
    title="Axiomatic Attribution for Deep Networks",
    authors="Sundararajan, Taly, Yan",
    year=2017,
    arxiv="1703.01365",
    claim="Of path attributions only integrated gradients keep sensitivity, implementation invariance, completeness "
    "and symmetry; gradients break sensitivity.",
    method="perturbkit.explain.integrated_gradients",
    needs="gradient",
    input="any",
    cost="n_steps gradients a row",
    seconds=15,
)
def reproduce(run: Run) -> Evidence:
    """Axioms, completeness and deletion curves."""
    from perturbkit.data import digits_classifier, image_model, load_digits28, load_photographs

    nets = [_random_network(run.generator(f"net {i}")) for i in range(20)]
    ours = check_axioms(
        lambda f, x, b: integrated_gradients(f, x, baseline=b, n_steps=64).values,
        nets,
        generator=run.generator("axioms"),
    )
    gradient = check_axioms(
        lambda f, x, b: Oracle(f).gradient(x) * (x - b), nets, generator=run.generator("axioms")
    )
    comparisons = [
        Comparison("axioms violated on 20 networks", len(ours.failed), len(gradient.failed), "lower", margin=1),
        Comparison("sensitivity (a) violations, share", ours.sensitivity_a, 0.0, "equal"),
        Comparison(
            "sensitivity (a) violations, gradient x input", gradient.sensitivity_a, 0.0, "equal", control=True,
            note="must fail: the gradient of 1 - ReLU(1 - x) at 2 is zero",
        ),
    ]  # fmt: skip
    classifier, digits = digits_classifier(28), load_digits28("test")
    x, oracle = digits.x[:100], Oracle(classifier.module)
    target = oracle(x).argmax(1)
    maps = integrated_gradients(oracle, x, target, n_steps=128)
    change = oracle.value(x, target) - oracle.value(torch.zeros_like(x), target)
    photos = load_photographs()
    network, photo = Oracle(image_model().module), photos.x[:1]
    label = network(photo).argmax(1)
    large = integrated_gradients(network, photo, label, n_steps=128)
    large_change = network.value(photo, label) - network.value(torch.zeros_like(photo), label)
    for name, found, size in (("digits", maps, change), ("EfficientNet-lite0", large, large_change)):
        gap = (found.extras["completeness_gap"].abs() / size.abs()).median()
        comparisons.append(
            Comparison(f"median completeness gap, {name}", float(gap), 0.01, "lower", n=len(size))
        )
    orders = {
        "integrated gradients": maps.values,
        "gradient": oracle.gradient(x, target),
        "random": uniform(x.shape, generator=run.generator("random"), like=x),
    }
    curves = {name: _deletion(oracle, x, target, values) for name, values in orders.items()}
    area = {name: curve.mean(1) for name, curve in curves.items()}
    for other in ("gradient", "random"):
        comparisons.append(
            Comparison(
                f"deletion area against {other}", float(area["integrated gradients"].mean()),
                float(area[other].mean()), "lower", margin=0.02, n=100,
                spread=float((area["integrated gradients"] - area[other]).std() / 10),
            )
        )  # fmt: skip
    comparisons.append(
        Comparison(
            "deletion area of a random order", float(area["random"].mean()), float(area["gradient"].mean()), "lower",
            margin=0.02, n=100, control=True, note="must fail: a random order says nothing",
        )
    )  # fmt: skip
    return Evidence(comparisons, _figure(curves))


def _random_network(generator: torch.Generator) -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 16), nn.Softplus(), nn.Linear(16, 1)).double()
    for p in net.parameters():
        p.data = randn(p.shape, generator=generator, like=p.data)
    return net.requires_grad_(False)


def _deletion(oracle: Oracle, x: Tensor, target: Tensor, values: Tensor) -> Tensor:
    """Probability of the target as the pixels of highest score are blackened, shape (n, steps + 1)."""
    n, pixels = len(x), x[0].numel()
    rank = values.flatten(1).argsort(1, descending=True).argsort(1)
    found = []
    for step in range(_STEPS + 1):
        # Digits are mostly black: half of the pixels is plenty.
        kept = rank >= round(step * pixels / _STEPS / 2)
        covered = x * kept.reshape(x.shape)
        found.append(oracle(covered).softmax(1)[torch.arange(n), target])
    return torch.stack(found, 1)


def _figure(curves: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    for name, curve in curves.items():
        ax.plot(torch.linspace(0, 0.5, _STEPS + 1), curve.mean(0), label=name)
    ax.set_xlabel("share of pixels deleted")
    ax.set_ylabel("probability of the class")
    ax.legend(frameon=False)
    return figure
