"""Reverse stochastic equations against ScoreSdeVp and ScoreSdeVe of diffusers: 60 steps of a score that only scales.

Methods: linear_sde_audio (`LinearSDE.vp` and `.ve`), sgmse (`MeanRevertingDiffusion`, whose own packages, speechbrain and sgmse, are
not installed here; without stiffness it is the variance-exploding equation) and reflected_diffusion (`sample`, beside the practice
that it replaces: variance-exploding steps, clipped).

Before timing it is asserted that a VP predictor step and a Langevin corrector step equal those of diffusers to 1e-5 (the corrector on a batch
of one: ours has a step size a row, theirs one for the batch), and that the clipped reflected sampler ends where clipped steps of
ScoreSdeVe with the same noise do, to 1e-4. Whole VE paths differ: diffusers takes the exact variance of a step, ours are Euler's for
any drift and diffusion; the deviation of Gaussian data at the end is printed for both.

The floor is the calls of the score, the noise and the bare update in PyTorch. Times in milliseconds. Runs in half a minute:
``python -m benchmarks sde_vs_diffusers``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from benchmarks._timing import Row, compare, table_in_ms
from torch import Tensor

from perturbkit.core.random import as_generator, randn, uniform
from perturbkit.diffusion import LinearSDE, MeanRevertingDiffusion, ReflectedDiffusion

STEPS, LOW, HIGH = 60, 0.05, 0.5
Run = Callable[[], Tensor]


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    same_steps()
    deviations()
    rows: list[Row] = []
    for shape in ((16, 64), (4, 2, 256, 64)):
        x = uniform(shape, generator=as_generator(0))
        for name, ours, theirs, calls in cases(x):
            floor = bare(x, calls)
            ours(), theirs(), floor()
            rows += compare(ours, {f"{name}, {'x'.join(map(str, shape))}, diffusers": theirs}, floor, rounds)
    return table_in_ms(rows)


def cases(x: Tensor) -> list[tuple[str, Run, Run, int]]:
    """Return name, our run, that of diffusers, and calls of the score a step."""
    times = torch.linspace(1, 1e-3, STEPS + 1, dtype=torch.float64)
    vp, ve = LinearSDE.vp(), LinearSDE.ve(LOW, HIGH)
    enhancement, y = MeanRevertingDiffusion(1.5, LOW, HIGH), 0.9 * x
    model = ReflectedDiffusion(x.shape[1:], LOW, HIGH)

    def reflected(boundary: str) -> Tensor:
        return model.sample(_score, x, reflected_times, boundary=boundary, generator=1).x  # type: ignore[arg-type]

    reflected_times = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
    end, clipped = reflected("project"), ve_path(x, corrected=False, clipped=True)
    assert float((end - clipped).abs().max()) < 1e-4
    return [
        (
            "linear SDE, VP, predictor",
            lambda: vp.reverse_sample(lambda x, t, c: _score(x, t), x, times, corrector_steps=0, generator=1).x,
            lambda: vp_path(x), 1,
        ),
        (
            "linear SDE, VE, predictor and corrector",
            lambda: ve.reverse_sample(lambda x, t, c: _score(x, t), x, times, snr=0.15, generator=1).x,
            lambda: ve_path(x), 2,
        ),
        (
            "SGMSE, predictor and corrector",
            lambda: enhancement.sample(lambda x, y, t: _score(x, t), y, times, x=x, snr=0.15, generator=1).x,
            lambda: ve_path(x), 2,
        ),
        ("reflected, folded", lambda: reflected("reflect"), lambda: ve_path(x, False, True), 1),
        ("reflected, clipped", lambda: reflected("project"), lambda: ve_path(x, False, True), 1),
    ]  # fmt: skip


def _score(x: Tensor, t: Tensor) -> Tensor:
    return -0.5 * x


def ve_path(x: Tensor, corrected: bool = True, clipped: bool = False) -> Tensor:
    peer, g = ve_peer(), as_generator(1)
    for k in range(STEPS, 0, -1):
        if corrected:
            x = peer.step_correct(-0.5 * x, x, generator=g).prev_sample
        # Half a place above, so that its rounding down finds the place.
        x = peer.step_pred(-0.5 * x, (k + 0.5) / STEPS, x, generator=g).prev_sample
        if clipped:
            x = x.clamp(0, 1)
    return x


@cache
def ve_peer() -> Any:
    """Return the scheduler, made once: its tables are not part of what is timed."""
    from diffusers import ScoreSdeVeScheduler

    peer = ScoreSdeVeScheduler(snr=0.15, sigma_min=LOW, sigma_max=HIGH)
    peer.set_timesteps(STEPS + 1)
    peer.set_sigmas(STEPS + 1)
    return peer


def vp_path(x: Tensor) -> Tensor:
    from diffusers.schedulers.deprecated import ScoreSdeVpScheduler

    peer = ScoreSdeVpScheduler()
    peer.set_timesteps(STEPS)
    g = as_generator(1)
    for t in peer.timesteps:
        x, _ = peer.step_pred(-0.5 * x, x, t, generator=g)
    return x


def same_steps() -> None:
    from diffusers import ScoreSdeVeScheduler
    from diffusers.schedulers.deprecated import ScoreSdeVpScheduler

    x, t = randn((1, 50), generator=as_generator(2), dtype=torch.float64), 0.7
    vp, peer = LinearSDE.vp(), ScoreSdeVpScheduler()
    peer.set_timesteps(STEPS)
    grid = torch.tensor([t, t - 1 / STEPS], dtype=torch.float64)
    std = float(vp.sigma(t))
    ours = vp.reverse_sample(lambda x, t, c: -x.tanh() / std, x, grid, corrector_steps=0).x
    theirs = peer.step_pred(x.tanh(), x, torch.tensor([t], dtype=torch.float64))[1]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    x = x.float()
    plain, ve = MeanRevertingDiffusion(0.0, LOW, HIGH), ScoreSdeVeScheduler(snr=0.15)
    ve.set_timesteps(STEPS)
    ours = plain.sample(lambda x, y, t: -x.tanh(), x, grid, x=x, corrector_steps=1, snr=0.15, generator=3).x
    z = ve.step_correct(-x.tanh(), x, generator=as_generator(3)).prev_sample
    # The predictor that follows, of which diffusers has another form.
    theirs = z - float(plain.diffusion(t)) ** 2 / STEPS * z.tanh()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def deviations() -> None:
    """Print the deviation that either gives Gaussian data of deviation 0.2 from the exact law at the start, predictor alone."""
    ve, peer = LinearSDE.ve(LOW, HIGH), ve_peer()
    start = randn((100_000, 1), generator=as_generator(4), dtype=torch.float64)
    variances = [0.04 + float(ve.sigma(t)) ** 2 for t in (1.0, 1e-3)]
    times = torch.linspace(1, 1e-3, STEPS + 1, dtype=torch.float64)

    def score(x: Tensor, t: Tensor, c: None) -> Tensor:
        return -x / (0.04 + ve.sigma(t[0]) ** 2)

    ours = ve.reverse_sample(score, math.sqrt(variances[0]) * start, times, corrector_steps=0, generator=5).x
    x, g = math.sqrt(0.04 + HIGH**2) * start, as_generator(5)
    levels = peer.discrete_sigmas.double()
    for k in range(STEPS, 0, -1):
        x = peer.step_pred(-x / (0.04 + levels[k] ** 2), (k + 0.5) / STEPS, x, generator=g).prev_sample
    off = float(ours.std()) / math.sqrt(variances[1]) - 1, float(x.std()) / math.sqrt(0.04 + LOW**2) - 1
    print(f"deviation of Gaussian data, relative error: ours {off[0]:+.4f}, ScoreSdeVe {off[1]:+.4f}")
    assert abs(off[0]) < 0.05


def bare(x: Tensor, calls: int) -> Run:
    def floor() -> Tensor:
        z, g = x, as_generator(1)
        for _ in range(STEPS):
            for _ in range(calls):
                z.new_full((len(z),), 0.5)
                z = 0.99 * z - 0.01 * _score(z, z) + 0.01 * randn(z.shape, generator=g, like=z)
        return z

    return floor


if __name__ == "__main__":
    main()
