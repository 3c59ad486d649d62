"""Steps of optimizers against those of torch, transformers and pytorch_optimizer, on a network of two million weights.

Both sides train the same network on the same batch from the same start; where they compute the same thing their weights are
asserted to agree. The floor is the gradients that a step makes, without an update.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from benchmarks._timing import Row, compare, table
from torch import Tensor, nn

from perturbkit.core.random import randn, seeded_init
from perturbkit.optim import SAM, Adafactor, AdaGradNorm, ClippedSGD

Step = Callable[[nn.Module], Callable[[], object]]


def main(rounds: int = 9) -> list[Row]:
    """Print the table and return its rows."""
    from pytorch_optimizer import SAM as TheirSAM
    from transformers.optimization import Adafactor as TheirAdafactor

    with seeded_init(0):
        start = nn.Sequential(
            *[m for _ in range(8) for m in (nn.Linear(512, 512), nn.Tanh())], nn.Linear(512, 10)
        )
    g = torch.Generator().manual_seed(0)
    x, y = randn((256, 512), generator=g), torch.arange(256) % 10

    def gradient(net: nn.Module) -> Tensor:
        net.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    def with_closure(make: Callable[[Any], Any]) -> Step:
        def built(net: nn.Module) -> Callable[[], object]:
            optimizer = make(net.parameters())
            return lambda: optimizer.step(lambda: gradient(net))

        return built

    def after_gradient(make: Callable[[Any], Any], clip: float | None = None) -> Step:
        def built(net: nn.Module) -> Callable[[], object]:
            optimizer = make(net.parameters())

            def step() -> None:
                gradient(net)
                if clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()

            return step

        return built

    def sam(net: nn.Module) -> Callable[[], object]:
        optimizer = TheirSAM(net.parameters(), torch.optim.SGD, lr=0.01)

        def step() -> None:
            gradient(net)
            optimizer.first_step(zero_grad=True)
            gradient(net)
            optimizer.second_step(zero_grad=True)

        return step

    own: dict[str, Any] = {"lr": 1e-3, "scale_parameter": False}
    pairs: dict[str, tuple[Step, Step, int, bool]] = {
        "SAM, pytorch_optimizer": (with_closure(lambda p: SAM(p, lr=0.01)), sam, 2, True),
        "Adafactor, transformers": (
            after_gradient(lambda p: Adafactor(p, relative_step_size=False, **own)),
            after_gradient(lambda p: TheirAdafactor(p, relative_step=False, **own)),
            1,
            True,
        ),
        "Adafactor, torch": (
            after_gradient(lambda p: Adafactor(p, relative_step_size=False, **own)),
            after_gradient(lambda p: torch.optim.Adafactor(p, lr=1e-3)),
            1,
            False,
        ),
        "clipped descent, torch": (
            after_gradient(lambda p: ClippedSGD(p, lr=0.01, clip=0.1)),
            after_gradient(lambda p: torch.optim.SGD(p, lr=0.01), clip=0.1),
            1,
            True,
        ),
        "AdaGrad's norm, torch's Adagrad": (
            after_gradient(lambda p: AdaGradNorm(p, lr=0.1)),
            after_gradient(lambda p: torch.optim.Adagrad(p, lr=0.01)),
            1,
            False,
        ),
    }
    rows: list[Row] = []
    for name, (ours, theirs, passes, same) in pairs.items():
        nets = [copy.deepcopy(start) for _ in range(3)]
        mine, other = ours(nets[0]), theirs(nets[1])

        def floor(net: nn.Module = nets[2], passes: int = passes) -> None:
            for _ in range(passes):
                gradient(net)

        mine()
        other()
        floor()
        gap = max(
            float((a - b).abs().max())
            for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True)
        )
        assert not same or gap < 1e-5, f"{name}: the weights differ by {gap:g}"
        rows += compare(mine, {name: other}, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
