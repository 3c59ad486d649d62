"""PSGD in its whitening mode against ``Kron`` of pytorch_optimizer: the time of a step, and the loss after as many.

The floor is a step of Adam. Both keep triangular factors a side and fit them in every step here; Kron's products run through
``opt_einsum``, and its momentum is on by default.
"""

from __future__ import annotations

import torch
from benchmarks._timing import Row, compare, table
from pytorch_optimizer import Kron
from torch import nn

from perturbkit.core.random import randn, seeded_init
from perturbkit.optim import PSGD


def _problem(width: int, depth: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    with seeded_init(0):
        net = nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())])
    g = torch.Generator().manual_seed(1)
    x = randn((256, width), generator=g) * torch.logspace(-1, 1, width)
    return net, x, torch.tanh(x @ randn((width, width), generator=g) / width**0.5)


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    rows: list[Row] = []
    makers = {
        "ours": lambda p: PSGD(p, lr=0.01, rate=0.1, mode="whitening"),
        "Kron": lambda p: Kron(p, lr=0.01, pre_conditioner_update_probability=lambda step: torch.tensor(1.0)),
        "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    }
    for width, depth in ((32, 3), (128, 3)):
        steps, losses = {}, {}
        for name, make in makers.items():
            net, x, y = _problem(width, depth)
            optimizer = make(list(net.parameters()))

            def step(
                net: nn.Module = net, x: torch.Tensor = x, y: torch.Tensor = y, o: torch.optim.Optimizer = optimizer, name: str = name
            ) -> None:  # fmt: skip
                for _ in range(10):
                    if name == "ours":
                        o.step(lambda: (net(x) - y).square().mean())  # type: ignore[arg-type, return-value]
                    else:
                        o.zero_grad()
                        (net(x) - y).square().mean().backward()
                        o.step()

            for _ in range(20):
                step()
            steps[name] = step
            losses[name] = float((net(x) - y).square().mean().detach())
        rows += compare(
            steps["ours"],
            {f"ten steps, {depth} layers of {width}, Kron": steps["Kron"]},
            steps["Adam"],
            rounds,
        )
        print(
            f"{depth} layers of {width}, loss after 200 steps: "
            + ", ".join(f"{k} {v:.4f}" for k, v in losses.items())
        )
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
