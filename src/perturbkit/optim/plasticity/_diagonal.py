"""The diagonal of a loss's Hessian, exactly or from random signs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from perturbkit.core.random import rademacher

__all__ = ["gradient_and_diagonal"]

_ROWS = 64
"""Hessian-vector products that are made at a time."""


def gradient_and_diagonal(
    loss: Tensor, weights: Sequence[Tensor], n_probes: int | None, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradient and the Hessian's diagonal, exactly or as the mean of z * Hz over signs z."""
    grads = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True, materialize_grads=True)
    sizes = [p.numel() for p in weights]
    flat = torch.cat([g.reshape(-1) for g in grads])
    diagonal = torch.zeros_like(flat)
    n = flat.numel() if n_probes is None else n_probes
    for start in range(0, n if flat.requires_grad else 0, _ROWS):
        rows = min(_ROWS, n - start)
        if n_probes is None:
            z = torch.zeros(rows, flat.numel(), dtype=flat.dtype, device=flat.device)
            z[torch.arange(rows), torch.arange(start, start + rows)] = 1
        else:
            z = rademacher((rows, flat.numel()), generator=generator, like=flat)
        images = torch.autograd.grad(
            flat,
            weights,
            z,
            retain_graph=True,
            is_grads_batched=True,
            allow_unused=True,
            materialize_grads=True,
        )
        image = torch.cat([i.reshape(rows, -1) for i in images], 1)
        diagonal = diagonal.detach() + (z * image).sum(0) / (1 if n_probes is None else n)
    pieces = diagonal.detach().split(sizes)
    return [g.detach() for g in grads], [d.reshape(p.shape) for d, p in zip(pieces, weights, strict=True)]
