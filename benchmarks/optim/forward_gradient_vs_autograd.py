"""One forward gradient against one gradient by backpropagation, on networks of growing depth.

The floor is one forward pass. A forward gradient takes two to three of them; what it saves is memory: the peak does not grow
with the depth.
"""

from __future__ import annotations

import torch
from benchmarks._timing import Row, compare, table
from torch import nn
from torch.func import functional_call

from perturbkit.core.random import randn
from perturbkit.optim import forward_gradient


def main(rounds: int = 9) -> list[Row]:
    """Print the table and return its rows."""
    rows: list[Row] = []
    g = torch.Generator().manual_seed(0)
    for depth in (4, 16):
        net = nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(256, 256), nn.ReLU())])
        params = {k: p.detach() for k, p in net.named_parameters()}
        x = randn((1024, 256), generator=g)

        def loss(values: dict[str, torch.Tensor], net: nn.Module = net, x: torch.Tensor = x) -> torch.Tensor:
            return functional_call(net, values, (x,)).square().mean()

        def ours(params: dict[str, torch.Tensor] = params, loss=loss) -> None:
            forward_gradient(loss, params, generator=0)

        def backward(params: dict[str, torch.Tensor] = params, loss=loss) -> None:
            leaves = {k: p.clone().requires_grad_(True) for k, p in params.items()}
            torch.autograd.grad(loss(leaves), list(leaves.values()))

        def floor(params: dict[str, torch.Tensor] = params, loss=loss) -> None:
            with torch.no_grad():
                loss(params)

        ours(), backward(), floor()
        rows += compare(ours, {f"forward gradient, {depth} layers, autograd": backward}, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
