"""Amortised inference without and with the penalty against neural posterior estimation in ``sbi``, which has none.

A linear model with ten observations, 2000 simulations, 25 epochs in batches of 200; a mixture of eight Gaussians and a masked
autoregressive flow. Each takes its own rate. The floor is the forward and backward passes of the same network. Held-out log-densities of all are printed
beside the exact posterior's. Run it with ``python -m benchmarks.robust.robust_amortized_inference_vs_sbi``; it takes a minute.
"""

from __future__ import annotations

import logging
from contextlib import chdir
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from benchmarks._timing import Row, compare, table
from torch import Tensor

from perturbkit.core.random import randn, seeded_init
from perturbkit.robust import AmortizedPosterior

EPOCHS, BATCH = 25, 200
MIXING = randn((2, 10), generator=torch.Generator().manual_seed(7))


def _prior(n: int, generator: torch.Generator) -> Tensor:
    return randn((n, 2), generator=generator)


def _simulator(theta: Tensor, generator: torch.Generator) -> Tensor:
    return theta @ MIXING + 0.7 * randn((len(theta), 10), generator=generator)


def main(rounds: int = 2) -> list[Row]:
    """Print the table and return its rows."""
    inference, networks = import_module("sbi.inference"), import_module("sbi.neural_nets")
    logging.getLogger("sbi").setLevel(logging.ERROR)
    source = AmortizedPosterior(_simulator, _prior, generator=0)
    theta, x = source.simulate(2000)
    held_theta, held_x = source.simulate(1000)
    precision = torch.eye(2) + MIXING @ MIXING.T / 0.49
    mean = (held_x @ MIXING.T / 0.49) @ torch.linalg.inv(precision)
    exact = torch.distributions.MultivariateNormal(mean, precision_matrix=precision).log_prob(held_theta)
    print(f"exact posterior: log-density {float(exact.mean()):.3f}")
    rows: list[Row] = []
    kinds: tuple[Literal["mdn", "maf"], ...] = ("mdn", "maf")
    # The peer writes its logs where it runs.
    with TemporaryDirectory() as folder, chdir(folder), seeded_init(0):
        for kind in kinds:

            def ours(weight: float = 0.0, kind: Literal["mdn", "maf"] = kind) -> AmortizedPosterior:
                made = AmortizedPosterior(_simulator, _prior, density=kind, fisher_weight=weight, generator=1)
                return made.fit((theta, x), epochs=EPOCHS, batch_size=BATCH)

            def penalised(ours: Any = ours) -> AmortizedPosterior:
                return ours(0.03)  # type: ignore[no-any-return]

            def peer(kind: str = kind) -> Any:
                options = {"num_components": 8} if kind == "mdn" else {"num_transforms": 4}
                builder = networks.posterior_nn(model=kind, hidden_features=64, **options)
                trainer = inference.NPE(density_estimator=builder, show_progress_bars=False)
                return trainer.append_simulations(theta, x).train(
                    training_batch_size=BATCH, max_num_epochs=EPOCHS - 1, stop_after_epochs=1000
                )  # fmt: skip

            density = ours().density_

            def floor(density: Any = density) -> None:
                for _ in range(EPOCHS):
                    for t, z in zip(theta[:1800].split(BATCH), x[:1800].split(BATCH), strict=True):
                        density.zero_grad(set_to_none=True)
                        (-density.log_prob(t, z).mean()).backward()

            theirs = peer().log_prob(held_theta[None], condition=held_x).mean()
            found = (float(run().log_prob(held_theta, held_x).mean()) for run in (ours, penalised))
            print(
                f"{kind}: ours {next(found):.3f}, with the penalty {next(found):.3f}, sbi {float(theirs):.3f}"
            )
            rows += compare(ours, {f"{kind}, 2000 simulations, sbi": peer}, floor, rounds)
            rows += compare(penalised, {f"{kind} with the penalty, sbi without": peer}, floor, rounds)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main()
