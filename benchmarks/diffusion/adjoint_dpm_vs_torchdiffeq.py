"""Our adjoint against torchdiffeq's on the same flow, grid and solver; the floor is the calls and products alone."""

from __future__ import annotations

import torch
from benchmarks._timing import Row, compare, table
from torch import nn

from perturbkit.core import Denoiser, EDMSchedule
from perturbkit.core.random import randn, seeded_init
from perturbkit.diffusion import adjoint_sample

STEPS = 20


class _Net(nn.Module):
    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(dim + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, dim)
        )

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.body(torch.cat([x / (1 + t[:, None] ** 2).sqrt(), t[:, None].log()], 1))


class _Field(nn.Module):
    """dz/dlam for the schedule whose time is the noise level: the network itself."""

    def __init__(self, net: _Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, lam: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.net(z, lam.to(z).expand(len(z)))


def main(rounds: int = 11) -> list[Row]:
    """Print the table and return its rows."""
    from torchdiffeq import odeint_adjoint

    rows: list[Row] = []
    schedule = EDMSchedule(20.0)
    times = schedule.times(STEPS, t_end=0.05, spacing="karras")
    for dim, width, batch in ((64, 256, 64), (256, 1024, 64)):
        with seeded_init(0):
            net = _Net(dim, width)
        x = 20 * randn((batch, dim), generator=torch.Generator().manual_seed(1))
        denoiser, field = Denoiser(net, schedule), _Field(net)
        params = list(net.parameters())

        def ours(x: torch.Tensor = x, denoiser: Denoiser = denoiser, params: list = params) -> tuple:
            leaf = x.clone().requires_grad_()
            return torch.autograd.grad(adjoint_sample(denoiser, leaf, times).square().sum(), [leaf, *params])

        def theirs(x: torch.Tensor = x, field: _Field = field, params: list = params) -> tuple:
            leaf = x.clone().requires_grad_()
            ends = odeint_adjoint(field, leaf, times.float(), method="rk4", adjoint_params=params)
            return torch.autograd.grad(ends[-1].square().sum(), [leaf, *params])

        def floor(x: torch.Tensor = x, net: _Net = net, params: list = params) -> None:
            t = torch.ones(len(x))
            for _ in range(4 * STEPS):
                with torch.no_grad():
                    net(x, t)
            for _ in range(4 * STEPS):
                leaf = x.detach().requires_grad_()
                torch.autograd.grad(net(leaf, t), [leaf, *params], x)

        a, b = ours(), theirs()
        gap = max(float((u - v).norm() / v.norm()) for u, v in zip(a, b, strict=True))
        if gap > 1e-2:
            raise AssertionError(f"gradients differ by {gap:.2g}: the two do not solve the same problem")
        floor()
        rows += compare(
            ours,
            {f"adjoint, rk4, {STEPS} steps, {batch}x{dim}, width {width}, torchdiffeq": theirs},
            floor,
            rounds,
        )
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
