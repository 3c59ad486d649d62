"""Deep Taylor decomposition of digits of 28x28 against captum's LRP and zennit, which share the rule of positive weights.

captum's alpha1-beta0 rule without biases is z+ in every layer. It stops with an error on a network that flattens pictures
between layers, and so it is compared on linear layers with ReLUs. zennit is compared on the convolutional network, with z+
in every layer (its rule also carries the negative parts of the inputs, here all zero: twice the work) and with the rule for a
box in the first. zennit needs torchvision to be imported; without it those rows are left out. That the scores agree is
asserted. The floor is one gradient of the bare model.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import torch
from benchmarks._timing import Call, Row, compare, table
from torch import Tensor, nn

from perturbkit.core.random import seeded_init
from perturbkit.explain import deep_taylor

ROWS = 512


def main(rounds: int = 9) -> list[Row]:
    """Print the table and return its rows."""
    from captum.attr import LRP
    from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule

    from perturbkit.data import digits_classifier, load_digits28

    x = load_digits28("test").x[:ROWS]
    flat, linear, conv = x.flatten(1), _linear(), digits_classifier().module.eval().requires_grad_(False)
    label, label_conv = linear(flat).argmax(1), conv(x).argmax(1)
    assert isinstance(conv, nn.Sequential)
    # captum explains a negative output too, where ours explains its positive part.
    assert bool((linear(flat).amax(1) > 0).all())

    def captum() -> Tensor:
        for layer in linear:
            if isinstance(layer, nn.Linear):
                layer.rule = Alpha1_Beta0_Rule(set_bias_to_zero=True)  # type: ignore[assignment]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LRP(linear).attribute(flat, target=label).detach()

    def ours(rule: Literal["z+", "box"]) -> Tensor:
        return deep_taylor(conv, x, label_conv, input_rule=rule).values

    def ours_linear() -> Tensor:
        return deep_taylor(linear, flat, label, input_rule="z+").values

    _agree(ours_linear(), captum())
    jobs: list[tuple[str, Call, Call, Call]] = [
        ("linear layers, z+, captum", ours_linear, captum, lambda: _gradient(linear, flat, label))
    ]
    if find_spec("zennit") and find_spec("torchvision"):
        for rule in ("z+", "box"):
            peer = _zennit(conv, x, label_conv, rule)
            _agree(ours(rule), peer())  # type: ignore[arg-type]
            jobs.append(
                (
                    f"convolutions, {rule}, zennit",
                    lambda rule=rule: ours(rule),  # type: ignore[misc]
                    peer,
                    lambda: _gradient(conv, x, label_conv),
                )
            )
    rows = []
    for name, run, other, floor in jobs:
        floor()
        rows += compare(run, {name: other}, floor, rounds)
    print(table(rows))
    return rows


def _linear() -> nn.Sequential:
    with seeded_init(0):
        return nn.Sequential(
            nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
        ).requires_grad_(False)


def _zennit(model: nn.Module, x: Tensor, label: Tensor, rule: str) -> Call:
    """Return a call for zennit's scores under z+ without biases, with the given rule in the first layer."""
    rules, composites = import_module("zennit.rules"), import_module("zennit.composites")
    gradient, bias = import_module("zennit.attribution").Gradient, {"zero_params": ["bias"]}
    weighted, small = (nn.Conv2d, nn.Linear), 1e-12
    plus = [(nn.ReLU, rules.Pass()), (weighted, rules.ZPlus(small, **bias))]
    first = rules.ZPlus(small, **bias) if rule == "z+" else rules.ZBox(0.0, 1.0, small, **bias)
    composite = composites.SpecialFirstLayerMapComposite(plus, [(weighted, first)])

    def positive_part(out: Tensor) -> Tensor:
        at = label[:, None]
        return torch.zeros_like(out).scatter(1, at, out.gather(1, at).clamp(min=0)).detach()

    def run() -> Tensor:
        with gradient(model, composite) as attributor:
            return attributor(x.clone(), positive_part)[1].detach()

    return run


def _agree(ours: Tensor, theirs: object) -> None:
    assert isinstance(theirs, Tensor)
    gap = float((ours - theirs).abs().max() / ours.abs().max())
    assert gap < 1e-4, f"the scores differ by {gap:g} of the largest"


def _gradient(model: nn.Module, x: Tensor, label: Tensor) -> None:
    leaf = x.detach().requires_grad_(True)
    torch.autograd.grad(model(leaf).gather(1, label[:, None]).sum(), leaf)


if __name__ == "__main__":
    main()
