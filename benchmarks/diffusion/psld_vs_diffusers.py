"""Filling a hole in digits: posterior sampling against RePaint of diffusers, the same network, 100 calls of it and 95.

Methods: psld (`sample_psld` without an autoencoder, which is DPS; deepinv's, its nearer peer, is not installed here) and enkg (`sample_enkg`, which needs
no gradient, as RePaint; it moves an ensemble of 64 for one image, here for the first). Both libraries answer the same question by
different means, so that the squared error in the hole is printed for each; asserted is that ours is below that of filling in the mean
digit and, for psld, not above RePaint's. The weight of the measurement, 10, was chosen among 1, 3, 10 and 30 on digits of the train part.

The floor is 100 calls of the network. A call of psld also goes back through the network, twice the work of the call, and that is
what it is slower by; RePaint takes no gradient, jumps back and forth instead, and knows only holes, where psld takes any operator. Runs
in two minutes: ``python -m benchmarks psld_vs_diffusers``.
"""

from __future__ import annotations

import torch
from benchmarks._timing import Row, compare, table
from torch import Tensor

from perturbkit.core.random import as_generator, randn
from perturbkit.data import digits_denoiser, load_digits28
from perturbkit.diffusion import Inpainting, sample_enkg, sample_psld

N, CALLS = 16, 100


def main(rounds: int = 2) -> list[Row]:
    """Print the table and return its rows."""
    denoiser = digits_denoiser()
    x = 2 * load_digits28("test").x[:N].float().reshape(N, 1, 28, 28) - 1
    mean = 2 * load_digits28("train").x.float().reshape(-1, 1, 28, 28).mean(0) - 1
    mask = torch.ones(1, 28, 28, dtype=torch.bool)
    mask[:, 10:18, 10:18] = False
    operator, schedule = Inpainting(mask), denoiser.schedule
    times = schedule.times(CALLS, t_end=0.02, spacing="karras")
    y = operator(x)

    def ours(seed: int = 0) -> Tensor:
        start = 80 * randn(x.shape, generator=as_generator(seed))
        return sample_psld(denoiser, start, times, operator, y, measurement_weight=10.0, gluing_weight=0.0).x

    def theirs(seed: int = 0) -> Tensor:
        return repaint(x, mask, seed)

    def floor() -> Tensor:
        z = x
        with torch.no_grad():
            for _ in range(CALLS):
                z = denoiser.x0(x, 1.0)
        return z

    def error(found: Tensor) -> float:
        return float((found - x)[:, ~mask].square().mean())

    errors = [error(run(seed)) for run in (ours, theirs) for seed in (1, 2)]
    means = sum(errors[:2]) / 2, sum(errors[2:]) / 2
    filled = error(mean.expand_as(x))
    print(
        f"squared error in the hole: psld {means[0]:.3f}, RePaint {means[1]:.3f}, the mean digit {filled:.3f}"
    )
    ensemble(x[:1], mask, y[:1], mean)
    assert means[0] < min(filled, means[1])
    rows = compare(ours, {f"{N} digits, a hole of 8 x 8, RePaint": theirs}, floor, rounds)
    print(table(rows))
    return rows


def repaint(x: Tensor, mask: Tensor, seed: int) -> Tensor:
    """Fill the hole as the pipeline of diffusers does, with our network as its noise prediction."""
    from diffusers import RePaintScheduler

    denoiser, peer, g = (
        digits_denoiser(),
        RePaintScheduler(beta_schedule="linear", clip_sample=True),
        as_generator(seed),
    )
    peer.set_timesteps(50, jump_length=5, jump_n_sample=2)
    lam = ((1 - peer.alphas_cumprod) / peer.alphas_cumprod).sqrt()
    z, last = randn(x.shape, generator=g), int(peer.timesteps[0]) + 1
    with torch.no_grad():
        for t in peer.timesteps.tolist():
            if t < last:
                level = min(float(lam[t]), 80.0)
                inner = z / peer.alphas_cumprod[t].sqrt() * (level / float(lam[t]))
                z = peer.step(denoiser.eps(inner, level), t, z, x, mask.float(), generator=g).prev_sample
            else:
                z = peer.undo_step(z, last, generator=g)
            last = t
    return z


def ensemble(x: Tensor, mask: Tensor, y: Tensor, mean: Tensor) -> None:
    denoiser, operator = digits_denoiser(), Inpainting(mask)
    start = 80 * randn((64, 1, 28, 28), generator=as_generator(3))
    times = denoiser.schedule.times(20, t_end=0.02, spacing="karras")
    found = sample_enkg(denoiser, start, times, operator, y[0])
    repainted = repaint(x, mask, 3)
    seen = [float((end - x)[:, mask].square().mean()) for end in (found.x, repainted)]
    hole = [float((end - x)[:, ~mask].square().mean()) for end in (found.x, repainted)]
    print(
        f"the first digit, squared error outside and in the hole: enkg {seen[0]:.3f}, {hole[0]:.3f}, RePaint {seen[1]:.3f}, {hole[1]:.3f}"
    )
    assert hole[0] < float((mean - x)[:, ~mask].square().mean())


if __name__ == "__main__":
    main()
