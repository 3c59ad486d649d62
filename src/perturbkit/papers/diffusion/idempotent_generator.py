"""One network that maps noise to digits, leaves digits alone and brings noisy ones back."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core.random import randn, seeded_init, uniform
from perturbkit.diffusion import IdempotentGenerator
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._quality import energy_distance, two_sample_accuracy
from perturbkit.papers.diffusion._samples import draw_sheets, png

_NOISE = 0.3
_Noise = Literal["gaussian", "fourier"]


@paper(
    number=155,
    title="Idempotent Generative Network",
    authors="Shocher, Dravid, Gandelsman, Mosseri, Rubinstein, Efros",
    year=2023,
    arxiv="2311.01462",
    claim="A network trained to be idempotent generates in one application, is left nearly unchanged by a second one, and "
    "projects corrupted inputs onto the data.",
    method="perturbkit.diffusion.IdempotentGenerator",
    needs="training",
    input="image",
    cost="four calls of the network a training step, one a sample",
    seconds=90,
)
def reproduce(run: Run) -> Evidence:
    """Digits of 8x8 and a ring in the plane, against an autoencoder that only reconstructs."""
    from perturbkit.data import load_digits8

    train, held = (load_digits8(part).x.flatten(1) * 2 - 1 for part in ("train", "test"))
    rows: dict[str, list[float]] = {}
    last: dict[str, Tensor] = {}
    for seed in run.seeds(3):
        full = _trained(train, 64, seed)
        alone = _trained(train, 64, seed, idem_weight=0.0, tight_weight=0.0)
        z = _untouched(train, "gaussian").sample(len(held), generator=seed).x
        ours, plain = full.project(z), alone.project(z)
        noisy = held + _NOISE * randn(held.shape, generator=torch.Generator().manual_seed(seed))
        back = full.project(noisy)
        numbers = {
            "unrest": _unrest(full, ours),
            "energy": energy_distance(ours, held),
            "noise": energy_distance(z, held),
            "alone": energy_distance(plain, held),
            "noisy": float((noisy - held).square().mean()),
            "projected": float((back - held).square().mean()),
            "told": two_sample_accuracy(ours, held, seed),
        }
        for name, value in numbers.items():
            rows.setdefault(name, []).append(value)
        last = {
            "noise": z,
            "once": ours,
            "twice": full.project(ours),
            "noisy digits": noisy,
            "projected": back,
        }
    ring, ring_held = (_ring(800, run.generator(f"ring {name}")) for name in ("train", "held"))
    seed = run.seeds(1)[0]
    flat, dots = _trained(ring, 2, seed), _untouched(ring, "gaussian").sample(800, generator=seed).x
    coloured, stains = (
        _trained(train, 64, seed, "fourier"),
        _untouched(train, "fourier").sample(360, generator=seed).x,
    )
    n = len(rows["energy"])
    over = Comparison.over_seeds
    comparisons = [
        over("change by a second application, relative", rows["unrest"], [0.1] * n, "lower"),
        over("energy distance to held-out digits, against the noise", rows["energy"], rows["noise"], "lower", factor=0.5),
        over("energy distance, against reconstruction alone", rows["energy"], rows["alone"], "lower"),
        over("squared error of projected noisy digits", rows["projected"], rows["noisy"], "lower"),
        Comparison(
            "ring: energy distance, against the noise", energy_distance(flat.project(dots), ring_held),
            energy_distance(dots, ring_held), "lower", factor=0.5,
        ),
        Comparison("ring: change by a second application, relative", _unrest(flat, flat.project(dots)), 0.1, "lower"),
        over(
            "energy distance of the identity, against the noise", rows["noise"], rows["noise"], "lower", factor=0.5,
            control=True,
        ),
    ]  # fmt: skip
    notes = (
        f"A classifier tells samples from held-out digits with accuracy {sum(rows['told']) / n:.2f}: they are coarse at this size. "
        "With noise of the digits' own spectrum, as in the paper, which starts much nearer: energy distance "
        f"{energy_distance(stains, held):.2f} of the noise, {energy_distance(coloured.project(stains), held):.2f} after the network; "
        f"change by a second application {_unrest(coloured, coloured.project(stains)):.3f}."
    )
    tiles = {name: (x.unflatten(1, (8, 8)) + 1) / 2 for name, x in last.items()}
    samples = {"once.png": png(tiles["once"][:40]), "projected.png": png(tiles["projected"][:40])}
    return Evidence(comparisons, _figure(tiles), notes, samples)


def _network(dim: int) -> nn.Module:
    wide, narrow = (256, 64) if dim > 2 else (128, 32)
    sizes = [dim, wide, narrow, wide]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(wide, dim))


def _trained(
    x: Tensor, dim: int, seed: int, noise: _Noise = "gaussian", **weights: float
) -> IdempotentGenerator:
    with seeded_init(seed):
        model = IdempotentGenerator(_network(dim), lr=5e-4, noise=noise, **weights)  # type: ignore[arg-type]
    return model.fit(x, 4000, generator=seed, progress=False)


def _untouched(x: Tensor, noise: _Noise) -> IdempotentGenerator:
    """The noise itself: a generator that does nothing."""
    return IdempotentGenerator(nn.Identity(), noise=noise).watch(x)


def _unrest(model: IdempotentGenerator, once: Tensor) -> float:
    return float((model.project(once) - once).norm() / once.norm())


def _ring(n: int, generator: torch.Generator) -> Tensor:
    angle = uniform((n,), 0, 2 * torch.pi, generator=generator)
    radius = 1 + 0.05 * randn((n,), generator=generator)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)


def _figure(tiles: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots(len(tiles), 1)
    draw_sheets(axes, {name: x[:20] for name, x in tiles.items()}, columns=20)
    return figure
