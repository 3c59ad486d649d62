"""The factor ``Q = (I + U V^T) diag(d)``: its start, its products and its relative gradient step.

For V held, the matrices ``I + U V^T`` are a group, and for U held as well, so the two are moved in turn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from perturbkit.core.random import Seed, as_generator, randn

__all__ = ["apply_low_rank", "dense_low_rank", "start_low_rank", "update_low_rank"]


def start_low_rank(n: int, rank: int, scale: float, generator: Seed, like: Tensor) -> list[Tensor]:
    """Return d of shape (n,), and U and V of shape (n, rank): small random ones, since zero ones have no gradient."""
    g = as_generator(generator)
    size = (n * (n + 10)) ** -0.5
    u, v = (size * randn((n, rank), generator=g, like=like) for _ in range(2))
    return [scale * like.new_ones(n), u, v]


def apply_low_rank(factors: list[Tensor], g: Tensor) -> Tensor:
    """Return ``Q^T Q g``."""
    d, u, v = factors
    x = d * g
    x = x + u @ (v.T @ x)
    return d * (x + v @ (u.T @ x))


def dense_low_rank(factors: list[Tensor]) -> Tensor:
    """Return ``Q^T Q``."""
    d, u, v = factors
    q = torch.diag(d) + u @ (v * d[:, None]).T
    return q.T @ q


def update_low_rank(factors: list[Tensor], x: Tensor, h: Tensor, rate: float, first: bool) -> None:
    """Move d, and U if ``first`` or else V, by the relative gradient of a pair ``(x, h)``, in place."""
    d, u, v = factors
    tiny = torch.finfo(d.dtype).tiny
    small = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    scaled = d * h
    a = scaled + u @ (v.T @ scaled)
    inverse = x / d
    b = inverse - v @ torch.linalg.solve(small + u.T @ v, u.T @ inverse)
    # P h and P^-1 x, for the diagonal: it is perturbed from the right.
    ph = d * (a + v @ (u.T @ a))
    px = (b - u @ torch.linalg.solve(small + v.T @ u, v.T @ b)) / d
    along = ph * h - px * x
    # Moved along e, the criterion bends by |Q (e h)|^2 + |Q^-T (e x)|^2: the traces of both forms bound the step.
    columns = 1 + 2 * (u * v).sum(1) + ((v @ (u.T @ u)) * v).sum(1)
    w = torch.linalg.solve(small + u.T @ v, u.T).T
    rows = 1 - 2 * (v * w).sum(1) + ((w @ (v.T @ v)) * w).sum(1)
    bend = columns * scaled.square() + rows * inverse.square()
    reach = (ph.abs() * h.abs() + px.abs() * x.abs()).max()
    bound = torch.maximum(bend.sum(), reach).clamp(min=tiny)
    rate = rate / 2  # two factors move at once
    if first:
        av, bv = v.T @ a, v.T @ b
        step = torch.outer(a, av) - torch.outer(b, bv)
        size = a.norm() * (v @ av).norm() + b.norm() * (v @ bv).norm()
        u.sub_(step @ (small + v.T @ u), alpha=float(rate / size.clamp(min=tiny)))
    else:
        au, bu = u.T @ a, u.T @ b
        step = torch.outer(a, au) - torch.outer(b, bu)
        size = a.norm() * (u @ au).norm() + b.norm() * (u @ bu).norm()
        v.sub_(step + v @ (u.T @ step), alpha=float(rate / size.clamp(min=tiny)))
    d.mul_(1 - rate * along / bound)
    # Only the product counts: the two share its size evenly.
    balance = (u.norm() / v.norm().clamp(min=tiny)).clamp(min=tiny).sqrt()
    u.div_(balance)
    v.mul_(balance)
