"""Digits from small blurred noisy ones: a learned schedule against two that are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core import CosineSchedule, Schedule, VPSchedule, fit
from perturbkit.core.random import randn, seeded_init
from perturbkit.diffusion import LearnedSchedule, cvdm_loss, sample_cvdm
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.diffusion._samples import draw_sheets, png

_TRAINING_STEPS, _STEPS, _DRAWS = 1000, 50, 8


class _Network(nn.Module):
    """The noise from state, signal fraction and condition."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64 + 64 + 16, 256), nn.SiLU(), nn.Linear(256, 256), nn.SiLU(), nn.Linear(256, 64)
        )

    def forward(self, x: Tensor, fraction: Tensor, condition: Tensor | None) -> Tensor:
        assert condition is not None
        snr = torch.log(fraction) - torch.log1p(-fraction)
        return self.body(torch.cat([x, snr.expand(x.shape) / 4, condition], 1))


class _Given:
    """A schedule of the library as one that is not learned."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def signal_fraction(self, t: Tensor, condition: Tensor | None) -> Tensor:
        return (2 * self.schedule.log_alpha(t * self.schedule.t_max)).exp().clamp(1e-6, 0.99999)

    def rate(self, t: Tensor, condition: Tensor | None) -> Tensor:
        inside = t * self.schedule.t_max
        alpha_rate, _ = self.schedule.rates(inside)
        return -2 * self.schedule.t_max * alpha_rate / self.schedule.alpha(inside)


class _Pair(nn.Module):
    def __init__(self, network: nn.Module, schedule: nn.Module) -> None:
        super().__init__()
        self.network, self.schedule = network, schedule


@dataclass(frozen=True)
class _Trained:
    """Errors of one trained pair, draws to look at, and how steep its schedule is."""

    error: float
    energy: float
    steepness: float
    draws: Tensor
    course: Tensor


@paper(
    number=233,
    title="Conditional Variational Diffusion Models",
    authors="Della Maggiora, Croquevielle, Deshpande, Horsley, Heinis, Yakimovich",
    year=2024,
    arxiv="2312.02246",
    claim="A schedule learned with the denoiser is as good as the better of two given ones and better than the worse; without its "
    "regulariser it becomes steep.",
    method="perturbkit.diffusion.cvdm_loss",
    needs="training",
    input="image",
    cost="one call of the network and two derivatives of the schedule a step",
    seconds=100,
)
def reproduce(run: Run) -> Evidence:
    """Posterior means and draws of 8x8 digits given 4x4 blurred noisy ones; two seeds, the same network."""
    from perturbkit.data import load_digits8

    train, held = (_pairs(load_digits8(part).x * 2 - 1, run.generator(part)) for part in ("train", "test"))
    rows: dict[str, list[_Trained]] = {"learned": [], "linear": [], "cosine": [], "free": []}
    for seed in run.seeds(2):
        rows["learned"].append(_train(train, held, seed, None, 1e-3))
        rows["free"].append(_train(train, held, seed, None, 0.0))
        rows["linear"].append(_train(train, held, seed, _Given(VPSchedule()), 0.0))
        rows["cosine"].append(_train(train, held, seed, _Given(CosineSchedule()), 0.0))
    over = Comparison.over_seeds
    comparisons = []
    for name in ("error", "energy"):
        ours, linear, cosine = ([getattr(t, name) for t in rows[k]] for k in ("learned", "linear", "cosine"))
        better, worse = sorted((linear, cosine), key=sum)
        title = {"error": "squared error of the posterior mean", "energy": "energy score of the draws"}[name]
        comparisons += [
            over(f"{title}, against the better given schedule", ours, better, "lower", factor=1.02),
            over(f"{title}, against the worse given schedule", ours, worse, "lower"),
        ]
    comparisons.append(
        over(
            "steepest fall of the signal fraction, without the regulariser against with it",
            [t.steepness for t in rows["free"]], [t.steepness for t in rows["learned"]], "higher", factor=2.0,
        )
    )  # fmt: skip
    untrained = _train(train, held, run.seeds(1)[0], None, 1e-3, steps=1)
    comparisons.append(
        Comparison(
            "squared error of an untrained pair, against the worse given schedule", untrained.error,
            max(sum(t.error for t in rows[k]) / 2 for k in ("linear", "cosine")), "lower", control=True,
        )
    )  # fmt: skip
    table = "; ".join(
        f"{k} {sum(t.error for t in v) / 2:.4f}, {sum(t.energy for t in v) / 2:.3f}, {sum(t.steepness for t in v) / 2:.1f}"
        for k, v in rows.items()
    )
    notes = (
        f"Squared error, energy score and steepest fall by schedule (free: learned without regulariser): {table}. "
        "Guesses of the data are cut off outside [-1, 1], as DDPM does: without that the chains of the given schedules ran away "
        "(squared errors 0.6 and 7e9 in a first run), not the learned one's."
    )
    learned = rows["learned"][0]
    small = nn.functional.interpolate(held[1][:20].unflatten(1, (1, 4, 4)), scale_factor=2.0)[:, 0]
    sheets = {"given": small, "draws": learned.draws[:20], "truth": held[0][:20].unflatten(1, (8, 8))}
    shown = {k: (v + 1) / 2 for k, v in sheets.items()}
    return Evidence(
        comparisons, _figure(rows, shown), notes, {"draws.png": png((learned.draws[:40] + 1) / 2)}
    )


def _pairs(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits and what is measured of them: means of 2x2 pixels with noise of deviation 0.1."""
    small = nn.functional.avg_pool2d(images, 2).flatten(1)
    return images.flatten(1), small + 0.1 * randn(small.shape, generator=generator, like=small)


def _train(
    train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], seed: int, given: _Given | None, reg: float, steps: int = _TRAINING_STEPS
) -> _Trained:  # fmt: skip
    with seeded_init(seed):
        network = _Network()
        learned = LearnedSchedule(64, 16, hidden=32)
    schedule = learned if given is None else given
    pair = _Pair(network, learned if given is None else nn.Identity())

    def loss(pair: nn.Module, x0: Tensor, condition: Tensor, *, generator: torch.Generator) -> Tensor:
        found = cvdm_loss(network, schedule, x0, condition, reg=reg, generator=generator)
        return found["total"] if given is None else found["noise"]

    fit(pair, loss, train, steps=steps, lr=1e-3, average=0.995, clip=1.0, generator=seed, progress=False)
    truth, condition = held[0][:200], held[1][:200]
    many = condition.repeat_interleave(_DRAWS, 0)
    start = randn((len(many), 64), generator=torch.Generator().manual_seed(seed))
    draws = sample_cvdm(
        network, schedule, start, many, n_steps=_STEPS, bounds=(-1.0, 1.0), generator=seed
    ).x.reshape(200, _DRAWS, 64)
    error = float((draws.mean(1) - truth).square().mean())
    near = (draws - truth[:, None]).norm(dim=2).mean(1)
    apart = torch.cdist(draws, draws).sum((1, 2)) / (_DRAWS * (_DRAWS - 1))
    t = torch.linspace(0, 1, 201)[:, None]
    with torch.no_grad():
        course = schedule.signal_fraction(t, condition[:1].expand(201, -1)).expand(201, 64)
    steepness = float((course.diff(dim=0).abs() * 200).max(0).values.mean())
    return _Trained(
        error, float((near - 0.5 * apart).mean()), steepness, draws[:, 0].unflatten(1, (8, 8)), course
    )


def _figure(rows: dict[str, list[_Trained]], sheets: dict[str, Tensor]) -> Figure:
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=(1, 1.4))
    left, right = parts
    ax = left.subplots()
    for name, trained in rows.items():
        ax.plot(torch.linspace(0, 1, 201), trained[0].course.mean(1), label=name)
    ax.set_xlabel("time")
    ax.set_ylabel("signal fraction, mean over pixels")
    ax.legend(frameon=False)
    draw_sheets(right.subplots(3, 1), sheets, columns=20)
    return figure
