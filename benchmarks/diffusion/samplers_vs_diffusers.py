"""Samplers against the schedulers of diffusers that compute the same: 100 calls of a network that only scales.

Methods: heun, pfgmpp (the field and prior of PFGM++ on Heun's sampler), predictor_corrector_guidance (`sample_guided`), ddim with
all its noise and score_sampling_bounds (`sample_reverse_sde`) against DDPM, learned_schedule (`sample_cvdm` with the betas of
DDPM as its schedule), stochastic_interpolant (`solve` without noise), iia and bdia. `dpm_solver_vs_diffusers` has the others.

Before timing, each is asserted to end where diffusers does, to a relative 1e-4 (its tables are float32), noise included where the
method has any. Four do not compute what their peer does: PFGM++ at D = 2048 draws from another prior (with D infinite it is asserted, as
"Heun"), the reverse diffusion is another integrator of what DDPM integrates (standard deviations of Gaussian data are printed), BDIA
inverts exactly where DDIM's inversion does not (errors of the way there and back are printed), and the correction of IIA is fitted
(without it the end is that of DDIM, which is asserted).

The floor is the network and the bare update in PyTorch: the vector of times, and as many terms as the update has, no noise. Times in
milliseconds. Runs in a minute: ``python -m benchmarks samplers_vs_diffusers``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from benchmarks._timing import Row, compare, table_in_ms
from torch import Tensor

from perturbkit.core import Denoiser, DiscreteSchedule
from perturbkit.core.random import as_generator, randn
from perturbkit.diffusion import (
    PoissonFlow,
    StochasticInterpolant,
    invert_bdia,
    sample_bdia,
    sample_cvdm,
    sample_ddim,
    sample_guided,
    sample_heun,
    sample_iia,
    sample_reverse_sde,
)

CALLS = 100
BETAS = {"num_train_timesteps": 1000, "beta_schedule": "linear"}
Run = Callable[[], Tensor]


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    rows: list[Row] = []
    for shape in ((16, 2), (4, 3, 32, 32), (4, 3, 128, 128)):
        x = randn(shape, generator=as_generator(0))
        for name, ours, theirs, terms, same in cases(x):
            if same:
                error = float((ours() - theirs()).abs().max() / theirs().abs().max())
                assert error < 1e-4, (name, shape, error)
            floor = bare(x, terms)
            ours(), theirs(), floor()
            rows += compare(ours, {f"{name}, {'x'.join(map(str, shape))}, diffusers": theirs}, floor, rounds)
    inversion()
    reverse()
    return table_in_ms(rows)


def cases(x: Tensor) -> Iterator[tuple[str, Run, Run, int, bool]]:
    """Yield name, our run, that of diffusers, terms of the update, and whether both end at the same place."""
    from diffusers import (  # fmt: skip
        DDIMInverseScheduler,
        DDIMScheduler,
        DDPMScheduler,
        FlowMatchHeunDiscreteScheduler,
        HeunDiscreteScheduler,
        UniPCMultistepScheduler,
    )

    yield "Heun", *heun(x, HeunDiscreteScheduler), 2, True
    yield "PFGM++, D = 2048, its prior and Heun", *heun(x, HeunDiscreteScheduler, extra_dims=2048), 2, False
    ddim = DDIMScheduler(**BETAS, set_alpha_to_one=False, clip_sample=False)
    ddim.set_timesteps(CALLS + 1)
    net = Denoiser(lambda x, t: 0.1 * x, DiscreteSchedule(ddim.alphas_cumprod))
    other = Denoiser(lambda x, t: 0.05 * x, net.schedule)
    times = ddim.timesteps.double()

    def guided() -> Tensor:
        return stepped(ddim, x, lambda x, t: 0.05 * x + 3.0 * (0.1 * x - 0.05 * x))

    yield "guidance", lambda: sample_guided(net, other, x, times, weight=3.0).x, guided, 4, True
    ddpm = DDPMScheduler(**BETAS, clip_sample=False)

    def ancestral() -> Tensor:
        return stepped(ddpm, x, lambda x, t: 0.1 * x, generator=as_generator(1))

    yield "DDPM", lambda: sample_ddim(net, x, times, eta=1.0, generator=1).x, ancestral, 2, True
    yield "reverse diffusion", lambda: sample_reverse_sde(net, x, times, generator=1).x, ancestral, 2, False
    if x.ndim == 2:
        yield "learned schedule, all steps", *learned(x), 3, True
    yield "interpolant, no noise", *interpolant(x, FlowMatchHeunDiscreteScheduler), 2, True

    def deterministic() -> Tensor:
        return stepped(ddim, x, lambda x, t: 0.1 * x)

    def unipc(peer: Any = UniPCMultistepScheduler(**BETAS)) -> Tensor:  # noqa: B008
        return stepped(peer, x, lambda x, t: 0.1 * x)

    zero, some = torch.zeros(CALLS, 2, dtype=torch.float64), torch.full((CALLS, 2), 0.01, dtype=torch.float64)
    yield "IIA, no correction, DDIM", lambda: sample_iia(net, x, times, zero).x, deterministic, 3, True
    yield "IIA, UniPC", lambda: sample_iia(net, x, times, some).x, unipc, 3, False

    inverse = DDIMInverseScheduler(**BETAS, clip_sample=False)
    drawn = sample_bdia(net, x, times, gamma=0.5)

    def inverted() -> Tensor:
        return stepped(inverse, x, lambda x, t: 0.1 * x)

    yield (
        "BDIA back",
        lambda: invert_bdia(net, drawn.x, drawn.previous, times, gamma=0.5).x,
        inverted,
        3,
        False,
    )


def stepped(peer: Any, x: Tensor, net: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Tensor:
    """Run a scheduler; its last step, for which the table of ours has no time, is left out."""
    peer.set_timesteps(CALLS + 1)
    for t in peer.timesteps[:CALLS]:
        x = peer.step(net(x, t), t, x, **options).prev_sample
    return x


def heun(x: Tensor, kind: Any, extra_dims: float = math.inf) -> tuple[Run, Run]:
    steps = CALLS // 2
    peer = kind(**BETAS, use_karras_sigmas=True)
    peer.set_timesteps(steps)
    levels = torch.cat([peer.sigmas[:-1:2], peer.sigmas[-1:]]).double()
    flow = PoissonFlow(
        extra_dims, x.shape[1:], sigma_min=float(levels[-2]), sigma_max=float(levels[0]), data_std=0.5
    )
    grid = torch.cat([flow.times(steps - 1), torch.zeros(1, dtype=torch.float64)])
    assert float((grid - levels).abs().max() / levels[0]) < 1e-6  # the same noise levels
    net = Denoiser(lambda x, t: 0.03 * x, flow.schedule)

    def theirs() -> Tensor:
        peer.set_timesteps(steps)
        z = float(levels[0]) * randn(x.shape, generator=as_generator(2))
        for t in peer.timesteps:
            z = peer.step(0.03 * z, t, z).prev_sample
        return z

    return lambda: sample_heun(net, flow.prior(len(x), generator=2, dtype=x.dtype), grid).x, theirs


def learned(x: Tensor) -> tuple[Run, Run]:
    from diffusers import DDPMScheduler

    peer = DDPMScheduler(num_train_timesteps=CALLS, beta_schedule="linear", beta_end=0.1, clip_sample=False)

    class Table:
        """The betas of the peer as a schedule on [0, 1]."""

        def signal_fraction(self, t: Tensor, condition: Tensor | None) -> Tensor:
            return peer.alphas_cumprod[(t * CALLS).long().clamp_max(CALLS - 1)]

        def rate(self, t: Tensor, condition: Tensor | None) -> Tensor:
            return CALLS * peer.betas[(t * CALLS).long().clamp_max(CALLS - 1)]

    def theirs() -> Tensor:
        peer.set_timesteps(CALLS)
        g, z = as_generator(3), x
        for t in peer.timesteps:
            z = peer.step(0.1 * z, t, z, generator=g).prev_sample
        return z

    return lambda: sample_cvdm(lambda x, f, c: 0.1 * x, Table(), x, n_steps=CALLS, generator=3).x, theirs


def interpolant(x: Tensor, kind: Any) -> tuple[Run, Run]:
    peer = kind()
    steps = CALLS // 2
    peer.set_timesteps(steps + 1)
    times = 1 - peer.sigmas[:-1:2].double()
    path = StochasticInterpolant("linear", "zero")

    def theirs() -> Tensor:
        peer.set_timesteps(steps + 1)
        z = x
        for t in peer.timesteps[:-1]:
            z = peer.step(0.7 * z, t, z).prev_sample
        return z

    return lambda: path.solve(lambda x, t: -0.7 * x, x, times).x, theirs


def inversion() -> None:
    """Print how far BDIA and DDIM are off after the way there and back, in ten steps with a network that bends."""
    from diffusers import DDIMInverseScheduler, DDIMScheduler

    x = randn((64, 2), generator=as_generator(4), dtype=torch.float64)
    ddim = DDIMScheduler(**BETAS, set_alpha_to_one=False, clip_sample=False, timestep_spacing="leading")
    back = DDIMInverseScheduler(**BETAS, clip_sample=False)
    net = Denoiser(lambda x, t: x.tanh(), DiscreteSchedule(ddim.alphas_cumprod))
    ddim.set_timesteps(11)
    times = ddim.timesteps.double()
    drawn = sample_bdia(net, x, times, gamma=0.5)
    ours = invert_bdia(net, drawn.x, drawn.previous, times, gamma=0.5).x
    z = x
    for t in ddim.timesteps[:10]:
        z = ddim.step(z.tanh(), t, z).prev_sample
    back.set_timesteps(11)
    # Its step to t starts one spacing below, so that the first is no step.
    for t in back.timesteps[1:]:
        z = back.step(z.tanh(), t, z).prev_sample
    errors = [float((end - x).abs().max()) for end in (ours, z)]
    assert errors[0] < 1e-9
    print(f"there and back, largest error: BDIA {errors[0]:.1e}, DDIM of diffusers {errors[1]:.1e}")


def reverse() -> None:
    """Print the standard deviation that the reverse diffusion and DDPM give Gaussian data."""
    from diffusers import DDPMScheduler

    ddpm = DDPMScheduler(**BETAS, clip_sample=False)
    alphas = ddpm.alphas_cumprod.double()
    x = randn((100_000, 1), generator=as_generator(5), dtype=torch.float64)
    ddpm.set_timesteps(CALLS + 1)
    times = ddpm.timesteps.double()

    def eps(x: Tensor, t: Tensor) -> Tensor:  # data N(0, 1/4)
        kept = alphas[t.long()].reshape(-1, *[1] * (t.ndim))
        return (1 - kept).sqrt() / (1 - 0.75 * kept) * x

    ours = sample_reverse_sde(Denoiser(eps, DiscreteSchedule(ddpm.alphas_cumprod)), x, times, generator=6).x
    theirs = stepped(ddpm, x, eps, generator=as_generator(6))
    kept = float(alphas[0])
    exact = math.sqrt(1 - 0.75 * kept)
    off = [float(end.std()) / exact - 1 for end in (ours, theirs)]
    print(
        f"deviation of Gaussian data, relative error: reverse diffusion {off[0]:+.4f}, DDPM of diffusers {off[1]:+.4f}"
    )
    assert abs(off[0]) < 0.05


def bare(x: Tensor, terms: int) -> Run:
    def floor() -> Tensor:
        z = x
        for _ in range(CALLS):
            z.new_full((len(z),), 0.5)
            out = 0.1 * z
            z = 0.99 * z
            for _ in range(terms):
                z = z + 0.01 * out
        return z

    return floor


if __name__ == "__main__":
    main()
