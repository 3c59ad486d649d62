"""Denoisers with known answers for the tests of the samplers."""

from __future__ import annotations

import math

import torch

from perturbkit.core import Denoiser, VESchedule, VPSchedule
from perturbkit.data import mixture_8

VE, VP = VESchedule(0.02, 20.0), VPSchedule()


def gaussian(schedule=VP, variance=0.5):
    """The exact denoiser of N(0, variance)."""

    def x0(x, t):
        a, s = schedule.alpha(t), schedule.sigma(t)
        return (a * variance / (a**2 * variance + s**2)).to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) * x

    return Denoiser(x0, schedule, predicts="x0")


def gaussian_end(x, schedule, t_start, t_end, variance=0.5):
    """Where the exact flow of N(0, variance) takes a state: x over its standard deviation is constant."""

    def std(t):
        return math.sqrt(float(schedule.alpha(t)) ** 2 * variance + float(schedule.sigma(t)) ** 2)

    return x * std(t_end) / std(t_start)


def mixture(seed=0, schedule=VE):
    """The exact denoiser of five Gaussians in eight dimensions, and the world."""
    world = mixture_8(seed)

    def x0(x, t):
        return world.posterior_mean(x.double(), float(schedule.alpha(t[0])), float(schedule.sigma(t[0]))).to(
            x.dtype
        )

    return Denoiser(x0, schedule, predicts="x0"), world


def start(n=12, d=8, schedule=VE, seed=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return float(schedule.sigma(schedule.t_max)) * torch.randn(n, d, generator=g, dtype=dtype)


def constant(schedule, seed=5, d=8):
    """A noise prediction that never changes."""
    eps = torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Denoiser(lambda x, t: eps.to(x.dtype).expand_as(x), schedule, predicts="eps"), eps


def slope(error, n):
    """The order of convergence between n and 2 n steps."""
    return math.log2(error(n) / error(2 * n))
