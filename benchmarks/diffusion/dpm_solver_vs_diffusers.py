"""The overhead of our samplers beyond the denoiser against diffusers' schedulers: 200 calls of a network that does nothing.

The floor is the bare update in PyTorch, written out: the vector of times that a network is given, and the same number of
terms on the same tensors with coefficients known beforehand.
"""

from __future__ import annotations

import torch
from benchmarks._timing import Row, compare, table_in_ms

from perturbkit.core import Denoiser, DiscreteSchedule
from perturbkit.core.random import randn
from perturbkit.diffusion import (
    sample_bdia,
    sample_ddim,
    sample_deis,
    sample_dpm_solver,
    sample_gradient_estimation,
    sample_pndm,
)

CALLS = 200


def main(rounds: int = 5) -> list[Row]:
    """Print the table and return its rows."""
    import diffusers

    rows: list[Row] = []
    for shape in ((16, 2), (4, 3, 32, 32), (4, 3, 128, 128)):
        x = randn(shape, generator=torch.Generator().manual_seed(0))
        idle = torch.zeros_like(x)
        ddpm = diffusers.DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        schedule = DiscreteSchedule(ddpm.alphas_cumprod)
        denoiser = Denoiser(lambda x, t, idle=idle: idle, schedule)
        times = torch.linspace(950, 0, CALLS + 1, dtype=torch.float64)
        peers = {
            "DDIM": (diffusers.DDIMScheduler, {}, lambda d=denoiser, x=x, t=times: sample_ddim(d, x, t).x, 1),
            "DPM-Solver, order 2": (
                diffusers.DPMSolverSinglestepScheduler, {"algorithm_type": "dpmsolver", "solver_order": 2, "final_sigmas_type": "sigma_min"},
                lambda d=denoiser, x=x, t=times: sample_dpm_solver(d, x, t[::2], order=2).x, 2,
            ),
            "gradient estimation": (
                diffusers.DDIMScheduler, {}, lambda d=denoiser, x=x, t=times: sample_gradient_estimation(d, x, t).x, 2,
            ),
            "BDIA": (diffusers.DDIMScheduler, {}, lambda d=denoiser, x=x, t=times: sample_bdia(d, x, t, gamma=0.5).x, 3),
            "DEIS, order 3": (
                diffusers.DEISMultistepScheduler, {"solver_order": 3},
                lambda d=denoiser, x=x, t=times + 0.5: sample_deis(d, x, t).x, 4,
            ),
            "PNDM": (
                diffusers.PNDMScheduler, {"skip_prk_steps": True},
                lambda d=denoiser, x=x, t=times: sample_pndm(d, x, t, warmup="euler").x, 5,
            ),
        }  # fmt: skip
        for name, (kind, options, ours, terms) in peers.items():
            peer = kind(num_train_timesteps=1000, beta_schedule="linear", **options)

            def theirs(peer=peer, x=x, idle=idle) -> torch.Tensor:
                peer.set_timesteps(CALLS)
                for t in peer.timesteps:
                    x = peer.step(idle, t, x).prev_sample
                return x

            def floor(x: torch.Tensor = x, idle: torch.Tensor = idle, terms: int = terms) -> torch.Tensor:
                for _ in range(CALLS):
                    x.new_full((len(x),), 0.5)
                    x = 0.99 * x
                    for _ in range(terms):
                        x = x + 0.01 * idle
                return x

            ours(), theirs(), floor()
            rows += compare(
                ours,
                {f"{name}, {CALLS} calls, {'x'.join(map(str, shape))}, diffusers": theirs},
                floor,
                rounds,
            )
    return table_in_ms(rows)


if __name__ == "__main__":
    main()
