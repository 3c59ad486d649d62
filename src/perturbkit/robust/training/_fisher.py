"""How far a conditional density moves with what it is conditioned on: Fisher information, its penalty, divergences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from perturbkit.core import Ball, Oracle, keeping_modes, track
from perturbkit.core.progress import ProgressLike
from perturbkit.core.random import randperm
from perturbkit.robust.attacks._parts import half_cosine
from perturbkit.robust.training._loops import TrainingHistory

__all__ = ["Divergence", "FisherPenalty", "exact_root", "fit_density", "sampled_root", "steepest_change"]

# A row whose sampled trace is more than this many medians of its batch is scaled down to it.
_OUTLIER = 10.0
_DECAY = 0.99


class FisherPenalty:
    """The penalty in training: in closed form, or sampled, with a moving average of its gradient over the steps."""

    def __init__(self, density: Any, weight: float, exact: bool, generator: torch.Generator) -> None:
        self.density, self.weight, self.exact, self.generator = density, weight, exact, generator
        self.parameters = [p for p in density.parameters() if p.requires_grad]
        self.average = [torch.zeros_like(p) for p in self.parameters]
        self.step = 0

    def trace(self, z: Tensor) -> Tensor:
        """Return the mean trace over a batch, with a graph."""
        if self.exact:
            return exact_root(self.density, z, graph=True).square().sum((1, 2)).mean()
        trace = sampled_root(self.density, z, 1, self.generator, graph=True).square().sum((1, 2))
        size = trace.detach()
        limit = _OUTLIER * size.median()
        return (trace * torch.where(size > limit, limit / size, 1.0)).mean()

    def backward(self, loss: Tensor, trace: Tensor) -> None:
        """Put the gradient of the loss and the weighted trace into the parameters."""
        if self.exact:
            (loss + self.weight * trace).backward()
            return
        loss.backward()
        gradients = torch.autograd.grad(trace, self.parameters, allow_unused=True, materialize_grads=True)
        self.step += 1
        for parameter, mean, gradient in zip(self.parameters, self.average, gradients, strict=True):
            mean.lerp_(gradient, 1 - _DECAY)
            # Free of the zeros that the average began with.
            added = self.weight / (1 - _DECAY**self.step) * mean
            parameter.grad = added if parameter.grad is None else parameter.grad + added


def exact_root(density: Any, z: Tensor, *, graph: bool) -> Tensor:
    """Return R from the moments: the rows W dm, and the elements of S / sqrt(2)."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_(True)
        mean, factor = density.moments(leaf)
        n, d = mean.shape
        rows, columns = torch.tril_indices(d, d, device=z.device)
        outputs = torch.cat([mean, factor[:, rows, columns]], 1)
        k = outputs.shape[1]
        axes = torch.eye(k, dtype=z.dtype, device=z.device)[:, None].expand(k, n, k)
        (jacobian,) = torch.autograd.grad(outputs, leaf, axes, is_grads_batched=True, create_graph=graph)
        of_mean = factor @ jacobian[:d].movedim(0, 1)  # [n, d, d_x]
        change = z.new_zeros(n, z.shape[1], d, d)
        change[:, :, rows, columns] = jacobian[d:].permute(1, 2, 0)
        b = torch.linalg.solve_triangular(factor[:, None], change, upper=False, left=False)
        of_factor = (b + b.mT).flatten(2).mT / 2**0.5  # [n, d * d, d_x]
        return torch.cat([of_mean, of_factor], 1)


def sampled_root(
    density: Any, z: Tensor, n_samples: int, generator: torch.Generator, *, graph: bool
) -> Tensor:
    """Return the scores of draws from the density itself over the root of their number, shape (n, n_samples, d_x)."""
    with torch.no_grad():
        theta = density.sample(z, n_samples, generator).flatten(0, 1)
    rows = z.repeat_interleave(n_samples, 0)
    if graph:
        with torch.enable_grad():
            leaf = rows.requires_grad_(True)
            value = density.log_prob(theta, leaf).sum()
            (score,) = torch.autograd.grad(value, leaf, create_graph=True)
    else:
        # In chunks, as many as memory allows.
        given = Oracle(_Rows(density, lambda x, draws: density.log_prob(draws, x)))
        score = given.gradient(rows, None, theta)
    return score.reshape(len(z), n_samples, -1) / n_samples**0.5


def fit_density(
    density: Any, t: Tensor, z: Tensor, held: int, penalty: FisherPenalty, epochs: int, lr: float, batch_size: int,
    units: float, generator: torch.Generator, progress: ProgressLike,
) -> TrainingHistory:  # fmt: skip
    """Train a density by Adam on all rows but the last ``held``, at a rate that falls to zero along half a cosine.

    ``units`` is what a held-out log-density of standardised parameters is too large by.
    """
    losses, traces, scores = [], [], []
    optimizer = torch.optim.Adam(density.parameters(), lr=lr)
    n, step = len(z) - held, 0
    total = epochs * -(-n // batch_size)
    with keeping_modes(density):
        for _ in track(range(epochs), "amortised inference", progress=progress):
            density.train()
            loss_sum = trace_sum = 0.0
            for rows in randperm(n, generator=generator, device=z.device).split(batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = lr * half_cosine(step, total)
                step += 1
                optimizer.zero_grad(set_to_none=True)
                loss = -density.log_prob(t[rows], z[rows]).mean()
                loss_sum += float(loss.detach()) * len(rows) / n
                if penalty.weight > 0:
                    trace = penalty.trace(z[rows])
                    trace_sum += float(trace.detach()) * len(rows) / n
                    penalty.backward(loss, trace)
                else:
                    loss.backward()
                optimizer.step()
            losses.append(loss_sum)
            traces += [trace_sum] if penalty.weight > 0 else []
            density.eval()
            with torch.no_grad():
                scores.append(float(density.log_prob(t[n:], z[n:]).mean()) - units)
    return TrainingHistory(*(torch.tensor(v, dtype=z.dtype) for v in (losses, traces, scores)))


class Divergence:
    """KL between the posteriors of z and z + delta, in closed form where the density has moments."""

    def __init__(
        self, density: Any, z: Tensor, reverse: bool, n_samples: int, generator: torch.Generator
    ) -> None:
        self.density, self.z, self.reverse, self.n, self.generator = density, z, reverse, n_samples, generator
        self.closed = hasattr(density, "moments")
        self.oracle = Oracle(_Rows(density, self._gaussian if self.closed else self._sampled))
        if self.closed:
            with self.oracle.frozen(), torch.no_grad():
                self.clean: tuple[Tensor, Tensor] = density.moments(z)

    def gradient(self, delta: Tensor) -> Tensor:
        return self.oracle.gradient(self.z + delta, None, *self._fixed(delta, self.n))

    def value(self, delta: Tensor) -> Tensor:
        return self.oracle(self.z + delta, *self._fixed(delta, 10 * self.n))

    def _fixed(self, delta: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Return what does not move with the perturbed row: the clean moments, or draws and their clean log-densities."""
        if self.closed:
            return self.clean
        with torch.no_grad():
            theta = self.density.sample(self.z + delta if self.reverse else self.z, n, self.generator)
            return theta, _log_probs(self.density, theta, self.z)

    def _gaussian(self, z: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
        moved = self.density.moments(z)
        return _gaussian_kl(moved, (mean, factor)) if self.reverse else _gaussian_kl((mean, factor), moved)

    def _sampled(self, z: Tensor, theta: Tensor, clean: Tensor) -> Tensor:
        moved = _log_probs(self.density, theta, z)
        if not self.reverse:
            return (clean - moved).mean(1)
        ratio = (moved - clean).detach()
        climbed = ((ratio - ratio.mean(1, keepdim=True)) * moved).mean(1)
        return ratio.mean(1) + climbed - climbed.detach()


def steepest_change(
    divergence: Divergence, ball: Ball, leading: Tensor, n_steps: int, n_restarts: int,
    generator: torch.Generator, progress: ProgressLike,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Climb the divergence from both ways along the leading direction, then from random points; return the best and its size."""
    z, radius = divergence.z, float(ball.radius)
    best, best_kl = torch.zeros_like(z), torch.zeros_like(z[:, 0])
    with divergence.oracle.frozen():
        for start in range(n_restarts):
            if start < 2:
                delta = ball.project((1.0, -1.0)[start] * 0.5 * radius * leading)
            else:
                delta = ball.sample(z, generator=generator)
            for step in track(range(n_steps), "posterior attack", progress=progress):
                stride = Ball(ball.norm, 0.5 * radius * half_cosine(step, n_steps))
                delta = ball.project(delta + stride.maximiser(divergence.gradient(delta)))
            kl = divergence.value(delta)
            better = kl > best_kl
            best, best_kl = torch.where(better[:, None], delta, best), torch.where(better, kl, best_kl)
        # The largest of several estimates is too large: the change chosen is estimated anew.
        return best, best_kl if divergence.closed else divergence.value(best)


class _Rows(nn.Module):
    """A function of rows that belongs to a density, so that the oracle holds the density in evaluation mode."""

    def __init__(self, density: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.density, self.function = density, function

    def forward(self, *rows: Tensor) -> Tensor:
        return self.function(*rows)


def _gaussian_kl(p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor]) -> Tensor:
    """Return KL(p || q) a row, from means and lower triangular factors of the precisions."""
    (mean_p, w_p), (mean_q, w_q) = p, q
    shape = torch.linalg.solve_triangular(w_p, w_q, upper=False, left=False)
    shift = (w_q @ (mean_p - mean_q)[..., None])[..., 0]
    log_ratio = (w_p.diagonal(dim1=1, dim2=2) / w_q.diagonal(dim1=1, dim2=2)).log().sum(1)
    return 0.5 * (shape.square().sum((1, 2)) - mean_p.shape[1] + shift.square().sum(1)) + log_ratio


def _log_probs(density: Any, theta: Tensor, z: Tensor) -> Tensor:
    """Return log-densities of (rows, n, d) draws, shape (rows, n)."""
    flat = density.log_prob(theta.flatten(0, 1), z.repeat_interleave(theta.shape[1], 0))
    return flat.reshape(theta.shape[:2])
