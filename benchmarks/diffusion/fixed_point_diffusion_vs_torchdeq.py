"""The implicit layer of fixed point diffusion against torchdeq's: one training step on 256 rows of 64, hidden 128, 12 + 4 iterations.

Method: fixed_point_diffusion (`FixedPointDenoiser`). The peer is `torchdeq.get_deq` with plain fixed-point iteration and its one-step
("phantom") gradient, around the same blocks of the same weights. Before timing, answers and gradients are asserted to agree to a relative
1e-4, with a single iteration under the gradient (both are then Jacobian-free backpropagation) and with the four that are timed. Timed
too: a forward pass alone.

The floor is the blocks, called as often, forward and backward. Times in milliseconds. Needs torchdeq (``pip install torchdeq``); runs in
half a minute: ``python -m benchmarks fixed_point_diffusion_vs_torchdeq``.
"""

from __future__ import annotations

from typing import Any

import torch
from benchmarks._timing import Row, compare, table_in_ms
from torch import Tensor

from perturbkit.core import EDMSchedule, edm_scalings
from perturbkit.core.random import as_generator, randn, seeded_init
from perturbkit.diffusion import FixedPointDenoiser

BEFORE, WITH = 12, 4


def main(rounds: int = 10) -> list[Row]:
    """Print the table and return its rows."""
    import torchdeq

    with seeded_init(0):
        model = FixedPointDenoiser(64, EDMSchedule(), 0.5)
    for weights in model.mix.parameters():
        weights.data.mul_(0.5)  # a contraction, so that iterates settle
    x, t = randn((256, 64), generator=as_generator(1)), torch.ones(256)
    weights = list(model.parameters())
    once = torchdeq.get_deq(f_solver="simple_fixed_point_iter", f_max_iter=BEFORE, f_tol=0.0, grad=1, tau=1.0)
    several = torchdeq.get_deq(
        f_solver="simple_fixed_point_iter", f_max_iter=BEFORE, f_tol=0.0, grad=WITH, tau=1.0
    )
    once.train(), several.train()

    def around(layer: Any) -> Tensor:
        """The model with the layer of the peer in the place of ours."""
        inner, level, kept, gain = edm_scalings(x, t, model.schedule, model.data_std)
        h = model.first(inner)
        for block in model.pre:
            h = block(h, level)
        injected = model.injection(h)
        found = layer(lambda u: model.block(model.mix(torch.cat([u, injected], 1)), level), h)
        h = found[0][-1]
        for block in model.post:
            h = block(h, level)
        return kept + gain * model.last(h)

    def gradients(answer: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(answer.square().mean(), weights)

    def ours(n: int = WITH) -> tuple[Tensor, ...]:
        return gradients(model(x, t, n, n_without_gradient=BEFORE)[0])

    def floor() -> tuple[Tensor, ...]:
        with torch.no_grad():
            model(x, t, BEFORE)
        return gradients(model(x, t, WITH)[0])

    with torch.no_grad():
        torch.testing.assert_close(model(x, t, BEFORE + 1)[0], around(once), rtol=1e-4, atol=1e-5)
    for n, layer in ((1, once), (WITH, several)):
        for mine, other in zip(ours(n), gradients(around(layer)), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()) + 1e-9)

    def forward() -> Tensor:
        with torch.no_grad():
            return model(x, t, BEFORE)[0]

    def theirs_forward() -> Tensor:
        with torch.no_grad():
            return around(once)

    def step() -> tuple[Tensor, ...]:
        return gradients(around(several))

    once.eval()
    torch.testing.assert_close(forward(), theirs_forward(), rtol=1e-4, atol=1e-5)
    forward(), theirs_forward(), ours(), step(), floor()
    rows = compare(ours, {f"training, {BEFORE} + {WITH} iterations, torchdeq": step}, floor, rounds)
    rows += compare(forward, {f"forward, {BEFORE} iterations, torchdeq": theirs_forward}, forward, 3 * rounds)
    return table_in_ms(rows)


if __name__ == "__main__":
    main()
