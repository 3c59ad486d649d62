"""Orthogonal gradients against ``OrthoGrad`` of pytorch_optimizer: that both take the same steps, and how long a step takes.

The floor is the step of the optimizer inside. Ours projects twice, so that rescaling does not magnify rounding errors where gradient
and weights are nearly parallel.
"""

from __future__ import annotations

import torch
from benchmarks._timing import Row, compare, table
from pytorch_optimizer import OrthoGrad
from torch import nn

from perturbkit.core.random import randn, seeded_init
from perturbkit.optim import OrthogonalGradient


def _problem(width: int, depth: int) -> tuple[nn.Module, torch.Tensor]:
    with seeded_init(0):
        net = nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU())])
    return net, randn((64, width), generator=torch.Generator().manual_seed(1))


def difference(steps: int = 50) -> float:
    """Return the largest difference of a weight after some steps by the two."""
    ends = []
    for wrap in (
        lambda p: OrthogonalGradient(p, torch.optim.AdamW, lr=1e-2),
        lambda p: OrthoGrad(torch.optim.AdamW(p, lr=1e-2, weight_decay=0.0)),
    ):
        net, x = _problem(32, 3)
        net.double()
        optimizer = wrap(net.parameters())
        for _ in range(steps):
            optimizer.zero_grad()
            (net(x.double()) - x.double()).square().mean().backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    return float((ends[0] - ends[1]).abs().max())


def main(rounds: int = 9) -> list[Row]:
    """Print the table and return its rows."""
    rows: list[Row] = []
    for width, depth in ((64, 20), (1024, 4)):
        steps = []
        for wrap in (
            lambda p: OrthogonalGradient(p, torch.optim.SGD, lr=1e-3),
            lambda p: OrthoGrad(torch.optim.SGD(p, lr=1e-3)),
            lambda p: torch.optim.SGD(p, lr=1e-3),
        ):
            net, x = _problem(width, depth)
            net(x).square().mean().backward()
            optimizer = wrap(net.parameters())

            def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
                for _ in range(10):
                    optimizer.step()

            step()
            steps.append(step)
        name = f"ten steps of descent, {depth} layers of {width}, pytorch_optimizer"
        rows += compare(steps[0], {name: steps[1]}, steps[2], rounds)
    print(table(rows))
    print(f"largest difference of a weight after 50 steps of AdamW in double precision: {difference():.1e}")
    return rows


if __name__ == "__main__":
    main()
