"""Attacks on the policy of a battery: what they cost the building, and how large they must be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from perturbkit.core import Ball
from perturbkit.papers import Comparison, Evidence, Run, paper
from perturbkit.papers.robust._battery import CAPACITY, HOURS, Days, draw_days, imitate, observations, step
from perturbkit.robust import bifurcation_attack

_SIZES = (0.02, 0.05, 0.1)
# The clock cannot be written by the attacker.
_FREE = torch.tensor([0, 0, 1, 1, 1, 1])
Attack = Callable[[nn.Module, Tensor, float, int], Tensor]


@paper(
    number=6,
    title="A Novel Bifurcation Method for Observation Perturbation Attacks on Reinforcement Learning Agents: Load Altering "
    "Attacks on a Cyber Physical Power System",
    authors="Broda-Milian, Al-Mallah, Dagdougui",
    year=2024,
    arxiv="2407.05182",
    claim="Pushing actions across the middle of their range costs far more than an untargeted attack, with less distortion than a targeted one.",
    method="perturbkit.robust.bifurcation_attack",
    needs="gradient",
    input="tabular",
    cost="a gradient a row and step",
    seconds=60,
)
def reproduce(run: Run) -> Evidence:
    """Three policies, 20 days each, and perturbations of 2, 5 and 10 % of the range of what is seen."""
    attacks: dict[str, Attack] = {"bifurcation": _bifurcation, "untargeted": _untargeted, "random": _random}
    rise: dict[str, list[list[float]]] = {name: [] for name in attacks}
    ours, theirs = [], []
    for seed in run.seeds(3):
        rng = np.random.default_rng(seed)
        policy, days = imitate(seed, draw_days(200, rng)), draw_days(20, rng)
        clean = _cost(policy, days, lambda net, x, e, s: x, 0.0, seed)
        for name, attack in attacks.items():
            rise[name].append([_cost(policy, days, attack, e, seed) - clean for e in _SIZES])
        x = torch.cat([observations(days, h, np.full(20, 0.5 * CAPACITY)) for h in range(HOURS)])
        ours.append(_needed(policy, x, seed, targeted=False))
        theirs.append(_needed(policy, x, seed, targeted=True))
    comparisons = [
        Comparison.over_seeds(
            f"rise of the day's cost at {e:.0%}, against the untargeted attack",
            [r[i] for r in rise["bifurcation"]],
            [r[i] for r in rise["untargeted"]],
            "higher",
            factor=1.3,
        )
        for i, e in enumerate(_SIZES)
    ]
    comparisons += [
        Comparison.over_seeds("median size that changes the half, against one that reaches the far end", ours, theirs, "lower", factor=0.7),
        Comparison.over_seeds(
            "rise of the day's cost at 10 % by random changes", [r[-1] for r in rise["random"]], [r[-1] for r in rise["untargeted"]], "higher", factor=1.3, control=True
        ),
    ]  # fmt: skip
    return Evidence(
        comparisons,
        _figure(rise),
        notes="The policy imitates dynamic programming with the day known, and is attacked before it is clipped to its range. The "
        "untargeted attack climbs the squared change of the action; the targeted one aims at the end of the range opposite.",
    )


def _cost(policy: nn.Module, days: Days, attack: Attack, epsilon: float, seed: int) -> float:
    stored, total = np.full(len(days.price), 0.5 * CAPACITY), 0.0
    for hour in range(HOURS):
        seen = attack(policy, observations(days, hour, stored), epsilon, seed + hour)
        action = policy(seen)[:, 0].detach().numpy()
        stored, cost = step(days, hour, stored, action)
        total += float(cost.mean())
    # What is stored is worth the lowest price.
    return total - 0.15 * float(stored.mean())


def _bifurcation(policy: nn.Module, x: Tensor, epsilon: float, seed: int) -> Tensor:
    return bifurcation_attack(policy, x, Ball("linf", epsilon), feature_mask=_FREE, generator=seed).x


def _untargeted(policy: nn.Module, x: Tensor, epsilon: float, seed: int) -> Tensor:
    """40 steps of a tenth of the radius on the squared change, from a random start."""
    clean, moved = policy(x)[:, 0].detach(), _random(policy, x, epsilon, seed)
    for _ in range(40):
        leaf = moved.clone().requires_grad_()
        (slope,) = torch.autograd.grad((policy(leaf)[:, 0] - clean).square().sum(), leaf)
        moved = x + _FREE * (moved + 0.1 * epsilon * slope.sign() - x).clamp(-epsilon, epsilon)
    return moved


def _targeted(policy: nn.Module, x: Tensor, epsilon: float) -> Tensor:
    """The same towards the opposite end of the range."""
    goal, moved = -torch.sign(policy(x)[:, 0].detach()), x
    for _ in range(40):
        leaf = moved.clone().requires_grad_()
        (slope,) = torch.autograd.grad((policy(leaf)[:, 0] - goal).square().sum(), leaf)
        moved = x + _FREE * (moved - 0.1 * epsilon * slope.sign() - x).clamp(-epsilon, epsilon)
    return moved


def _random(policy: nn.Module, x: Tensor, epsilon: float, seed: int) -> Tensor:
    return x + _FREE * Ball("linf", epsilon).sample(x, generator=seed)


def _needed(policy: nn.Module, x: Tensor, seed: int, targeted: bool) -> float:
    """Median over rows of the least size, on a grid, at which the action changes its half, or comes within 0.1 of the end."""
    sizes = np.geomspace(0.005, 1.0, 20)
    clean = policy(x)[:, 0]
    least = np.full(len(x), 2.0)
    for epsilon in sizes[::-1]:
        if targeted:
            done = (policy(_targeted(policy, x, float(epsilon)))[:, 0] + torch.sign(clean)).abs() < 0.1
        else:
            done = policy(_bifurcation(policy, x, float(epsilon), seed))[:, 0] * clean < 0
        least[done.numpy()] = epsilon
    return float(np.median(least))


def _figure(rise: dict[str, list[list[float]]]) -> Figure:
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    for name, rows in rise.items():
        ax.plot(_SIZES, np.mean(rows, 0), marker="o", label=name)
    ax.set_xlabel("largest change of a feature")
    ax.set_ylabel("rise of the day's cost")
    ax.legend(frameon=False)
    return figure
