"""A third of the parameters and any budget at sampling: one implicit block against eight explicit ones on digits."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor

from perturbkit.core import EDMSchedule, fit
from perturbkit.core.random import randn, randperm, seeded_init, uniform
from perturbkit.diffusion import FixedPointDenoiser, sample_ddim, sample_fixed_point, stochastic_jfb_loss
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._quality import frechet_distance
from perturbkit.papers.diffusion._samples import png

_SCHEDULE = EDMSchedule(sigma_max=20.0)
_END = 0.02
# Block evaluations a sample. The implicit model spends four a step (two blocks and two iterations), the explicit one eight.
_BUDGETS = (8, 16, 24, 40)
_EXPLICIT_STEPS = 3000
# Blocks worked on in one training step, a backward pass counted as two: 8 x 3 for the explicit network; 2 x 3 for the two
# blocks of the implicit one, 6 iterations without and 6.5 with gradients. So the training work is the same.
_IMPLICIT_STEPS = round(_EXPLICIT_STEPS * 24 / (6 + 6 + 6.5 * 3))


@paper(
    number=214,
    title="Fixed Point Diffusion Models",
    authors="Bai, Melas-Kyriazi",
    year=2024,
    arxiv="2401.08741",
    claim="With far fewer parameters the implicit model samples better than an explicit one when sampling work is scarce, and "
    "starting each step at the last solution helps.",
    method="perturbkit.diffusion.FixedPointDenoiser",
    needs="training",
    input="image",
    cost="two blocks a step and the iterations chosen",
    seconds=75,
)
def reproduce(run: Run) -> Evidence:
    """Digits of 8x8, width 64, equal training work; pixel Frechet distance to held-out digits by budget, two seeds."""
    from perturbkit.data import load_digits8

    train, held = (load_digits8(part).x.flatten(1) * 2 - 1 for part in ("train", "test"))
    rows: dict[tuple[str, int], list[float]] = {}
    residuals: list[tuple[Tensor, Tensor, Tensor]] = []
    images = torch.empty(0)
    for seed in run.seeds(2):
        implicit = _trained(train, seed, 1, 1, _IMPLICIT_STEPS)
        explicit = _trained(train, seed, 4, 4, _EXPLICIT_STEPS)
        start = 20 * randn((1000, 64), generator=torch.Generator().manual_seed(seed))
        for budget in _BUDGETS:
            n = budget // 4
            for name, reuse in (("reuse", True), ("scratch", False)):
                found = sample_fixed_point(implicit, start, _grid(n), total_iterations=2 * n, reuse=reuse)
                assert found.extras["block_evaluations"] == budget
                rows.setdefault((name, budget), []).append(frechet_distance(found.x, held))
                images = found.x if name == "reuse" else images
            x = sample_ddim(explicit.denoiser(0), start, _grid(budget // 8)).x
            rows.setdefault(("explicit", budget), []).append(frechet_distance(x, held))
        residuals.append(_residuals(implicit, start))
    sizes = _blocks(implicit, used=True), _blocks(explicit, used=False)
    over, least = Comparison.over_seeds, _BUDGETS[0]
    kept, scratch, strange = (torch.cat([r[i] for r in residuals]) for i in range(3))
    best = [min(rows["explicit", b][i] for b in _BUDGETS[:1]) for i in range(len(rows["explicit", least]))]
    comparisons = [
        Comparison("parameters", sizes[0], sizes[1], "lower", factor=0.5),
        over(f"Frechet distance at {least} block evaluations, against the explicit network", rows["reuse", least], best, "lower"),
        *(
            over(f"Frechet distance at {b} block evaluations, reuse against none", rows["reuse", b], rows["scratch", b], "lower")
            for b in _BUDGETS
        ),
        Comparison(
            "share of steps with a smaller residual after two iterations with reuse", float((kept < scratch).double().mean()),
            1.0, "higher", n=len(kept), note="steps but the first, 20 steps a run",
        ),
        Comparison(
            "share of steps with a smaller residual from a row's own last solution than from another row's",
            float((kept < strange).double().mean()), 1.0, "higher", n=len(kept),
        ),
        Comparison(
            "share of steps with a smaller residual from another row's solution than from the own", float((strange < kept).double().mean()),
            1.0, "higher", n=len(kept), control=True,
        ),
    ]  # fmt: skip
    table = "; ".join(
        f"{b}: " + " / ".join(f"{_mean(rows[k, b]):.2f}" for k in ("reuse", "scratch", "explicit"))
        for b in _BUDGETS
    )
    blocks = (
        3 * sum(p.numel() for p in implicit.block.parameters()),
        8 * sum(p.numel() for p in implicit.block.parameters()),
    )
    notes = (
        f"Blocks alone, without injection and the ends, have {blocks[0]:,} parameters against {blocks[1]:,}. "
        "From scratch the iteration starts further away than any row's solution, so the first comparison of residuals alone says "
        "little; the one with another row's solution was added for that. "
        f"Frechet distance by block evaluations, reuse / scratch / explicit: {table}."
    )
    return Evidence(
        comparisons,
        _figure(rows, kept, scratch),
        notes,
        {"reuse_40.png": png((images[:40].unflatten(1, (8, 8)) + 1) / 2)},
    )


def _trained(train: Tensor, seed: int, pre: int, post: int, steps: int) -> FixedPointDenoiser:
    with seeded_init(seed):
        model = FixedPointDenoiser(
            64, _SCHEDULE, float(train.std()), hidden=64, pre_blocks=pre, post_blocks=post
        )

    def loss(model: FixedPointDenoiser, x0: Tensor, *, generator: torch.Generator) -> Tensor:
        t = uniform((len(x0),), -4.0, 3.0, generator=generator).exp()  # 0.02 to 20, log-uniform
        if pre == 1:
            return stochastic_jfb_loss(model, x0, t, generator=generator)
        noisy = x0 + t[:, None] * randn(x0.shape, generator=generator, like=x0)
        weight = 1 / t**2 + 1 / model.data_std**2
        return (weight[:, None] * (model(noisy, t, 0)[0] - x0).square()).mean()

    fit(model, loss, train, steps=steps, lr=2e-3, average=0.995, generator=seed, progress=False)
    return model.requires_grad_(False)


def _residuals(model: FixedPointDenoiser, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Residual after two iterations at each of 20 steps but the first: from the last solution, from scratch, from another row's."""
    runs = [
        sample_fixed_point(model, start, _grid(20), total_iterations=40, reuse=reuse).extras["residual"]
        for reuse in (True, False)
    ]
    strange, solution = [], None
    order = randperm(len(start), generator=torch.Generator().manual_seed(0))
    states = [start]
    sample_fixed_point(model, start, _grid(20), total_iterations=40, callback=lambda i, x: states.append(x))
    for x, t in zip(states[:-1], _grid(20)[:-1].tolist(), strict=True):
        before = model(x, t, 1, solution)[1]
        after = model(x, t, 1, before)[1]
        strange.append(((after - before).norm(dim=1) / after.norm(dim=1)).mean())
        solution = after[order]
    return runs[0][1:], runs[1][1:], torch.stack(strange)[1:]


def _grid(n: int) -> Tensor:
    return _SCHEDULE.times(n, t_end=_END, spacing="karras")


def _blocks(model: FixedPointDenoiser, used: bool) -> float:
    """Parameters, without those of the implicit layer where it is not used."""
    implicit = [] if used else [model.injection, model.mix, model.block]
    return float(
        sum(p.numel() for p in model.parameters()) - sum(p.numel() for m in implicit for p in m.parameters())
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _figure(rows: dict[tuple[str, int], list[float]], kept: Tensor, scratch: Tensor) -> Figure:
    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("reuse", "scratch", "explicit"):
        left.loglog(_BUDGETS, [_mean(rows[name, b]) for b in _BUDGETS], marker="o", label=name)
    left.set_xlabel("block evaluations a sample")
    left.set_ylabel("Frechet distance to held-out digits")
    left.legend(frameon=False)
    steps = range(1, 20)
    right.semilogy(steps, kept[:19], label="reuse")
    right.semilogy(steps, scratch[:19], label="scratch")
    right.set_xlabel("step of 20")
    right.set_ylabel("residual after two iterations")
    right.legend(frameon=False)
    return figure
