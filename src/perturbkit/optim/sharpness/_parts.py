"""Gradients as shifts of the weights: taken from the parameters, measured and scaled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dense_gradients", "global_norm"]


def dense_gradients(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of the gradients of weights that have one, sparse ones made dense."""
    grads = [w.grad for w in weights if w.grad is not None]
    return [(g.to_dense() if g.is_sparse else g).detach().clone() for g in grads]


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all tensors as one vector, on the first one's device."""
    device = tensors[0].device
    return torch.stack([t.norm().to(device) for t in tensors]).norm()
