"""Gradients from forward-mode differentiation, without a backward pass."""
