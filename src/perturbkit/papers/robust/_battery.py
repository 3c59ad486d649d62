"""A building with a battery: storage, a price, sun and load, and a policy that imitates dynamic programming."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from perturbkit.core.random import seeded_init

HOURS, CAPACITY, POWER, EFFICIENCY = 24, 6.0, 2.0, 0.95


@dataclass(frozen=True)
class Days:
    """Series by the hour, shape (days, 24): price, sun and load."""

    price: np.ndarray
    sun: np.ndarray
    load: np.ndarray


def draw_days(n: int, rng: np.random.Generator) -> Days:
    """Draw days with an evening peak of price and load, and clouds."""
    hour = np.arange(HOURS)
    peak = np.exp(-((hour - 18.5) ** 2) / 8)
    price = (
        0.15 + 0.25 * peak + 0.05 * np.exp(-((hour - 8) ** 2) / 6) + 0.03 * rng.standard_normal((n, HOURS))
    )
    sun = rng.uniform(0.3, 1, (n, 1)) * 3 * np.clip(np.sin((hour - 6) / 12 * math.pi), 0, None)
    load = 1 + 1.5 * peak + 0.3 * rng.standard_normal((n, HOURS))
    return Days(price.clip(0.05), sun * rng.uniform(0.8, 1.0, (n, HOURS)), load.clip(0.1))


def observations(days: Days, hour: int, stored: np.ndarray) -> Tensor:
    """Return what the policy sees, in units of about one: two of time, price, sun, load, charge."""
    angle = 2 * math.pi * hour / HOURS
    n = len(stored)
    columns = [np.full(n, math.sin(angle)), np.full(n, math.cos(angle)), days.price[:, hour] / 0.4, days.sun[:, hour] / 3, days.load[:, hour] / 2.5, stored / CAPACITY]  # fmt: skip
    return torch.from_numpy(np.stack(columns, 1))


def step(days: Days, hour: int, stored: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Charge (above 0) or discharge; return the charge after and the cost of what the grid delivers."""
    wanted = POWER * np.clip(action, -1, 1)
    change = np.clip(wanted, -stored, (CAPACITY - stored) / EFFICIENCY)
    after = stored + np.where(change > 0, EFFICIENCY * change, change)
    drawn = days.load[:, hour] - days.sun[:, hour] + change
    return after, days.price[:, hour] * np.where(drawn > 0, drawn, 0.3 * drawn)


def teacher(days: Days, n_levels: int = 25, n_actions: int = 13) -> np.ndarray:
    """Return the best actions, (days, hour, level), knowing the day, by dynamic programming over the charge."""
    levels, actions = np.linspace(0, CAPACITY, n_levels), np.linspace(-1, 1, n_actions)
    n = len(days.price)
    value = np.zeros((n, n_levels))
    best = np.zeros((n, HOURS, n_levels))
    for hour in reversed(range(HOURS)):
        totals = np.empty((n_actions, n, n_levels))
        for i, a in enumerate(actions):
            for j, level in enumerate(levels):
                after, cost = step(days, hour, np.full(n, level), np.full(n, a))
                place = after / CAPACITY * (n_levels - 1)
                low = np.clip(place.astype(int), 0, n_levels - 2)
                rows = np.arange(n)
                future = value[rows, low] + (place - low) * (value[rows, low + 1] - value[rows, low])
                totals[i, :, j] = cost + future
        best[:, hour] = actions[totals.argmin(0)]
        value = totals.min(0)
    return best


def imitate(seed: int, days: Days) -> nn.Module:
    """Train a policy on the teacher's actions; its answer is not squashed."""
    best, rng = teacher(days), np.random.default_rng(seed)
    inputs, wanted = [], []
    for hour in range(HOURS):
        level = rng.integers(0, best.shape[2], len(days.price))
        stored = level / (best.shape[2] - 1) * CAPACITY
        inputs.append(observations(days, hour, stored))
        wanted.append(torch.from_numpy(best[np.arange(len(level)), hour, level]))
    x, y = torch.cat(inputs), torch.cat(wanted)
    with seeded_init(seed % 2**31):
        net = nn.Sequential(
            nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
        ).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(600):
        loss = (net(x)[:, 0] - y).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return net.requires_grad_(False)
