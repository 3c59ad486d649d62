"""A training step against the DDPM training loop of diffusers: a small U-Net on 32 images of 3 x 32 x 32, forward and backward.

Methods: input_perturbation (`input_perturbation_loss`), pfgmpp (`PoissonFlow.loss`) and learned_schedule (`cvdm_loss`, on rows of 64
with a network of two layers). The peer is `DDPMScheduler.add_noise` and the mean squared error, as in its training script.

Before timing it is asserted that without perturbation the first is the peer's loss to 1e-5 for the same noise, that the states of
`PoissonFlow` with D infinite are those of `EulerDiscreteScheduler.add_noise`, and that the noise part of `cvdm_loss` under the
betas of DDPM is the peer's loss. The first two add a draw of noise or of a radius. `cvdm_loss` is the slower one: it evaluates its
schedule at three times with two derivatives in time, and trains that as well, which a fixed schedule does not need; beside a
network of this size that is half of the step.

The floor is the network alone, forward and backward. Times in milliseconds. Runs in half a minute: ``python -m benchmarks training_vs_diffusers``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from benchmarks._timing import Row, compare, table_in_ms
from torch import Tensor, nn

from perturbkit.core import Denoiser, DiscreteSchedule, SmallUNet
from perturbkit.core.random import as_generator, randint, randn, seeded_init
from perturbkit.diffusion import LearnedSchedule, PoissonFlow, cvdm_loss, input_perturbation_loss

Loss = Callable[[], Tensor]


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    rows = images(rounds) + elements(rounds)
    return table_in_ms(rows)


def images(rounds: int) -> list[Row]:
    from diffusers import DDPMScheduler, EulerDiscreteScheduler

    ddpm = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    with seeded_init(0):
        net = SmallUNet(3, width=16)
    x0 = randn((32, 3, 32, 32), generator=as_generator(1))
    denoiser = Denoiser(net, DiscreteSchedule(ddpm.alphas_cumprod))
    flow = PoissonFlow(2048, (3, 32, 32))

    def theirs(seed: int = 2) -> Tensor:
        g = as_generator(seed)
        t = randint(0, 1000, (len(x0),), generator=g)
        noise = randn(x0.shape, generator=g, like=x0)
        return nn.functional.mse_loss(net(ddpm.add_noise(x0, noise, t), t.float()), noise)

    def ours(strength: float = 0.1) -> Tensor:
        g = as_generator(2)
        t = randint(0, 1000, (len(x0),), generator=g).float()
        return input_perturbation_loss(denoiser, x0, t, strength=strength, generator=g)

    with torch.no_grad():
        torch.testing.assert_close(ours(0.0), theirs(), rtol=1e-5, atol=1e-6)
    euler = EulerDiscreteScheduler(num_train_timesteps=1000, beta_schedule="linear")
    levels = euler.sigmas[:-1:40]
    noise = randn((len(levels), 3, 32, 32), generator=as_generator(3))
    state = PoissonFlow(math.inf, (3, 32, 32)).perturb(x0[: len(levels)], levels, as_generator(3))
    torch.testing.assert_close(state, euler.add_noise(x0[: len(levels)], noise, euler.timesteps[::40]))

    def poisson() -> Tensor:
        return flow.loss(net, x0, generator=2)

    idle = torch.zeros(len(x0))
    rows = []
    for name, loss in (("input perturbation, strength 0.1", ours), ("PFGM++, D = 2048", poisson)):
        rows += timed(
            f"{name}, diffusers",
            loss,
            theirs,
            lambda: net(x0, idle).square().mean(),
            net.parameters(),
            rounds,
        )
    return rows


def elements(rounds: int) -> list[Row]:
    from diffusers import DDPMScheduler

    ddpm = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    with seeded_init(0):
        body = nn.Sequential(
            nn.Linear(128, 512), nn.SiLU(), nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, 64)
        )
        learned = LearnedSchedule(64)
    x0, kept = randn((256, 64), generator=as_generator(1)), ddpm.alphas_cumprod

    def net(x: Tensor, fraction: Tensor, condition: None = None) -> Tensor:
        return body(torch.cat([x, fraction.expand(x.shape)], 1))

    class Table:
        """The fixed schedule of the peer, between its steps along a line."""

        def signal_fraction(self, t: Tensor, condition: None) -> Tensor:
            place = 999 * t
            low = place.detach().floor().long().clamp_max(998)
            return torch.lerp(kept[low], kept[low + 1], place - low)

        def rate(self, t: Tensor, condition: None) -> Tensor:
            return 1000 * ddpm.betas[(999 * t.detach()).long()]

    def theirs(net: Callable[..., Tensor] = net) -> Tensor:
        g = as_generator(2)
        drawn = torch.rand((len(x0), 1), generator=g)
        noise = randn(x0.shape, generator=g, like=x0)
        steps = (999 * drawn[:, 0]).round().long()
        return nn.functional.mse_loss(
            net(ddpm.add_noise(x0, noise, steps), kept[steps][:, None].expand(x0.shape)), noise
        )

    def ours(schedule: Any) -> Tensor:
        return cvdm_loss(net, schedule, x0, generator=2)["total"]

    def answer(x: Tensor, fraction: Tensor, condition: Tensor | None = None) -> Tensor:
        return (
            x + fraction
        )  # of the size of the noise: the fresh network's is near zero, whatever it is given

    # Times between steps, so that they agree to a step's width.
    found = cvdm_loss(answer, Table(), x0, generator=2)["noise"]
    torch.testing.assert_close(found, theirs(answer), rtol=1e-3, atol=1e-3)
    weights = [*body.parameters(), *learned.parameters()]
    rows = []
    for name, schedule in (
        ("learned schedule", learned),
        ("learned schedule, a fixed one in its place", Table()),
    ):
        rows += timed(
            f"{name}, diffusers", lambda s=schedule: ours(s), theirs, lambda: net(x0, x0).square().mean(), weights, rounds
        )  # fmt: skip
    return rows


def timed(name: str, ours: Loss, theirs: Loss, floor: Loss, weights: Any, rounds: int) -> list[Row]:
    weights = list(weights)

    def step(loss: Loss) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(loss(), weights, allow_unused=True)

        return run

    runs = [step(loss) for loss in (ours, theirs, floor)]
    for run in runs:
        run()
    return compare(runs[0], {name: runs[1]}, runs[2], rounds)


if __name__ == "__main__":
    main()
